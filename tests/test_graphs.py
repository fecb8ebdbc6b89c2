"""CUDA graphs of training steps: few shapes, where a step begins, what is overwritten, what is refused. No GPU is needed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from overwriting import Overwriting, overwriting
from torch import Tensor

from kd.build.data import build_data
from kd.build.engine import build_engine
from kd.build.models import build_models
from kd.build.parts import examples_of
from kd.engines.base import Engine
from kd.runs.run import Run
from kd.training.rows import TrainOccurringRows, plan_tables, readers_of
from kd.training.trainer import build_trainer
from whole_runs import planned

Small = Callable[..., list[str]]
GRAPHS = "trainer.compile=reduce-overhead"
__all__ = ["overwriting"]


def train(run: Run, *callbacks: pl.Callback) -> Engine:
    """Train a run with all that its steps have, and return its engine."""
    run.directory.mkdir(parents=True, exist_ok=True)
    (examples,) = examples_of(run).values()
    data, models = build_data(run, examples, build_models(run, examples.task, texts=examples.texts["train"]))
    engine = build_engine(run, models, examples.task)
    rows = TrainOccurringRows(plan_tables(readers_of(models, data), engine, run.spec.trainer))
    trainer = build_trainer(run, engine, None, callbacks=[rows, *callbacks], enable_checkpointing=False)
    trainer.fit(engine, datamodule=data)
    return engine


@pytest.fixture
def words(small: Small, backbone: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Overrides of a run with a ready teacher that runs at every step."""
    teacher = ["teacher=[hub]", f"teacher.hub.model={backbone}", "teacher.hub.labels=[negative,positive]", "cache=off"]

    def words(*more: str) -> list[str]:
        own = ["teacher=[]"] if {"method=finetune", "method=dml"} & set(more) else teacher
        return small(*own, f"paths.runs={tmp_path}", "task.max_length=24", *more)

    return words


@pytest.mark.parametrize(
    "more",
    [
        ["method=finetune"],
        ["method=finetune", "trainer.accumulate=2"],
        ["method=pkd"],
        ["method=pkd", "cohort=mutual", "trainer.accumulate=2"],
        ["method=dml", "engine.update=sequential"],
        ["method=backward_kd"],
        ["method=one"],
        ["method=alp_kd", "trainer.batch_tokens=256"],
    ],
    ids=" ".join,
)
def test_nothing_is_read_that_the_next_step_overwrites(
    words: Callable[..., list[str]], overwriting: Overwriting, more: list[str]
) -> None:
    plain = train(planned(words(*more, "trainer.pad_multiple=16", "trainer.max_epochs=1")))
    assert not overwriting.events
    graphs = train(planned(words(*more, GRAPHS, "trainer.max_epochs=1")))
    assert len(overwriting.steps) > 4
    assert all(overwriting.steps)
    for (name, expected), found in zip(plain.state_dict().items(), graphs.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name
