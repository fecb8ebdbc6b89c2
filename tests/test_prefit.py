"""Outputs over all of train that a method reads before training: which examples, of which teachers, on which ranks."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kd.build.data import build_data, build_examples, prefit_methods
from kd.build.models import build_models
from kd.data.datamodule import KDDataModule
from kd.methods.kd import KD
from kd.methods.wrappers.mutual import Mutual
from kd.methods.wrappers.stochastic import Stochastic
from kd.runs.run import Run
from kd.training import execute
from whole_runs import Small, planned, pool


class Given(KD):
    """A method that remembers what `prefit` gives it."""

    prefits = True

    def prefit(self, logits: Sequence[Tensor], labels: Tensor) -> None:
        self.given = (list(logits), labels)


def prefitted(run: Run, method: Given) -> tuple[KDDataModule, list[torch.Tensor]]:
    """Data of a run, and the live logits of its teachers over train, after `prefit` of a method in place of the run's."""
    for _, needed in run.inputs:
        execute.execute(needed)
    examples = build_examples(run)
    models = build_models(run, examples.task, texts=examples.texts["train"])
    models = replace(models, methods=dict.fromkeys(models.methods, method))
    teachers = list(models.teachers)
    data, models = build_data(run, examples, models)
    prefit_methods(run, data, models)
    live = []
    for index, teacher in enumerate(teachers):
        inputs = data.tokens["train"][data.teacher_keys[index]].pad(list(range(len(examples.labels["train"]))))
        live.append(teacher.in_order(teacher.run(inputs, method.needs()[1][0])).logits)
    return data, live


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_every_example_that_is_trained_on_is_given_once_and_no_held_one(small: Small, cache: str) -> None:
    method = Given()
    method.holds = 0.3
    data, (live,) = prefitted(planned(small("method=kd", f"cache={cache}")), method)
    (logits,), labels = method.given
    assert 0 < data.held_count < len(live)
    assert len(logits) == data.trained_count == len(live) - data.held_count
    torch.testing.assert_close(logits, live[data.trained], rtol=1e-5, atol=1e-5)  # batches of other sizes
    assert labels.tolist() == [int(data.examples.labels["train"][row]) for row in data.trained]


def test_examples_that_are_not_cached_are_run_and_given_in_their_order(small: Small, tmp_path: Path) -> None:
    method = Given()
    method.holds = 0.3
    run = planned(small("method=kd", f"paths.runs={tmp_path}", f"cache={2 * 4 * (32 + 32 + 50)}"))
    data, (live,) = prefitted(run, method)
    assert data.tokens["train"]["teacher 0"].cached == 50
    torch.testing.assert_close(method.given[0][0], live[data.trained], rtol=1e-5, atol=1e-5)


def test_teachers_of_a_pool_are_given_in_their_order(small: Small, backbone: Path) -> None:
    method = Given()
    method.teachers = 2
    run = planned(small("method=kd", "pool=stochastic", *pool(backbone, "minilm", "minilm_4l"), "teacher.minilm_4l.run.seed=9"))
    _, live = prefitted(run, method)
    assert len(method.given[0]) == 2
    assert not torch.allclose(*live)
    for logits, expected in zip(method.given[0], live, strict=True):
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_wrappers_pass_each_method_the_logits_of_its_teachers() -> None:
    wrapped = Mutual(Stochastic(Given(), [0.5, 0.5]))
    assert wrapped.prefits
    first, second, labels = torch.zeros(3, 2), torch.ones(3, 2), torch.zeros(3)
    wrapped.prefit([first, second], labels)
    given = [inner.given for inner in wrapped.inner.inners]
    assert [one[0] for (one, _) in given] == [first, second]
    assert all(also is labels for _, also in given)
    assert not Mutual(KD()).prefits


def test_a_method_that_does_not_ask_is_given_nothing(small: Small) -> None:
    method = Given()
    method.prefits = False
    prefitted(planned(small("method=kd")), method)
    assert not hasattr(method, "given")
