"""Models of a run: planned from shapes alone, then built with weights that follow from seeds."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from kd.build.data import build_examples
from kd.build.inputs import TrainedModels
from kd.build.models import build_models, materialise, plan_models
from kd.data.examples import Examples
from kd.engines.models import Models
from kd.errors import InputError
from kd.models.students import with_labels
from kd.runs.run import Run, RunInputs
from whole_runs import Small, planned, same_weights

ALONE = ["method=finetune", "teacher=[]"]
CASES = {
    "random": [*ALONE, "student.init=random"],
    "every": [*ALONE, "student.init=every"],
    "a cohort": ["method=dml", "teacher=[]", "cohort.students=[{},{layers: 3,init: random}]"],
    "an online teacher": ["method=p2p_mutual", "cohort.teacher=online"],
    "cut": [*ALONE, "surgery=[cut_vocabulary]"],
    "shared layers": [*ALONE, "surgery=[sps]"],
    "factorized": [*ALONE, "surgery=[factorized]", "surgery.factorized.rank=4"],
    "the teacher's layers": ["method=pkd", "student.init_from=teacher"],
    "projections": ["method=bert_emd", "student.init=random", "student.width=16"],
}


@pytest.fixture
def ready(small: Small, tmp_path: Path) -> Callable[..., tuple[Run, Examples]]:
    """A run, and its examples; its teacher is saved untrained."""

    def of(*words: str) -> tuple[Run, Examples]:
        run = planned(small(*words))
        inputs = {name: replace(needed, directory=tmp_path / name) for name, needed in run.inputs.teachers.items()}
        for needed in inputs.values():
            build_models(needed, build_examples(needed).task).student.save(needed.student)
        return replace(run, inputs=RunInputs(inputs)), build_examples(run)

    return of


def states(built: Models) -> list[dict[str, torch.Tensor]]:
    trained = [*built.students.values(), *built.methods.values(), *([] if built.online is None else [built.online])]
    return [module.state_dict() for module in trained]


@pytest.mark.parametrize("case", CASES)
def test_models_follow_from_their_plan_and_not_from_earlier_draws(
    case: str, ready: Callable[..., tuple[Run, Examples]]
) -> None:
    run, examples = ready(*CASES[case])
    plan = plan_models(run, examples.task, TrainedModels)
    torch.manual_seed(99)
    one = materialise(plan, examples.texts["train"])
    drawn = torch.get_rng_state()
    torch.rand(7)
    other = materialise(plan, examples.texts["train"])
    assert torch.equal(torch.get_rng_state(), drawn)
    again = build_models(run, examples.task, texts=examples.texts["train"])
    assert len(states(one)) == len(states(other)) > 1
    for first, second, third in zip(states(one), states(other), states(again), strict=True):
        assert same_weights(first, second)
        assert same_weights(first, third)


@pytest.mark.parametrize("case", [name for name in CASES if name != "cut"])  # its size depends on the texts
def test_a_plan_has_the_shapes_of_the_models_and_no_weights(case: str, ready: Callable[..., tuple[Run, Examples]]) -> None:
    run, examples = ready(*CASES[case])
    built = build_models(run, examples.task, texts=examples.texts["train"])
    for shapes in (plan_models(run, examples.task).shapes, plan_models(run, examples.task, TrainedModels).shapes):
        encoders = [*shapes.students.values(), *shapes.teaching]
        assert {parameter.device.type for encoder in encoders for parameter in encoder.parameters()} == {"meta"}
        assert list(shapes.students) == list(built.students)
        for encoder, model in zip(encoders, [*built.students.values(), *built.teaching], strict=True):
            assert {n: p.shape for n, p in encoder.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
        for name, method in shapes.methods.items():
            assert {n: p.shape for n, p in method.named_parameters()} == {
                n: p.shape for n, p in built.methods[name].named_parameters()
            }


def test_a_plan_loads_no_model(ready: Callable[..., tuple[Run, Examples]], monkeypatch: pytest.MonkeyPatch) -> None:
    run, examples = ready("method=pkd", "student.init_from=teacher")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights are loaded")

    for module in ("students", "pretrained"):
        monkeypatch.setattr(f"kd.models.{module}.load_model", refuse)
    plan = plan_models(run, examples.task, TrainedModels)
    with pytest.raises(AssertionError, match="weights are loaded"):
        materialise(plan)


def test_random_weights_are_those_that_transformers_draws_from_the_seed(small: Small) -> None:
    run = planned(small("method=dml", "teacher=[]", "student.init=random", "cohort.students=3", "seed=4"))
    task = build_examples(run).task
    built = build_models(run, task).students.values()
    for index, student in enumerate(built):
        torch.manual_seed(4 if index == 0 else int(np.random.SeedSequence([4, index]).generate_state(1)[0]))
        expected = AutoModelForSequenceClassification.from_config(with_labels(student.config, task.labels))
        assert same_weights(student.model.state_dict(), expected.state_dict())


def test_a_plan_before_training_needs_no_trained_teacher(small: Small, tmp_path: Path) -> None:
    run = planned(small("method=pkd", "student.init_from=teacher"))
    inputs = {name: replace(needed, directory=tmp_path / name) for name, needed in run.inputs.teachers.items()}
    run = replace(run, inputs=RunInputs(inputs))
    task = build_examples(run).task
    plan = plan_models(run, task)
    assert plan.shapes.teachers[0].depth == 4
    with pytest.raises(ValueError, match="not trained yet"):
        materialise(plan)
    with pytest.raises(InputError):
        plan_models(run, task, TrainedModels)
