"""Fine-tuning: the hard loss and nothing else."""

import pytest
import torch
from torch.nn import functional as F

from conftest import tiny_model
from kd.data.batch import Batch
from kd.data.tasks import Classification, Regression, Task
from kd.engines.distiller import Distiller
from kd.engines.models import Models
from kd.engines.optimizer import OptimizerFactory
from kd.methods.base import Bound
from kd.methods.finetune import Finetune
from kd.models import Encoder, FrozenTeacher
from kd.schedules import Constant

CLASSES = Classification("toy", ["no", "maybe", "yes"], {}, ["accuracy"], "accuracy")
SCORES = Regression("toy", ["pearson"], "pearson")


def engine(task: Task, teachers: int = 0, weight: float = 1.0) -> tuple[Distiller, Batch]:
    """An engine in eval mode, and a batch of two sentences."""
    outputs = 1 if task.labels is None else 3
    models = [Encoder(tiny_model(seed, layers=1, num_labels=outputs)) for seed in range(teachers + 1)]
    frozen = [FrozenTeacher(model, f"teacher {number}") for number, model in enumerate(models[1:])]
    factory = OptimizerFactory(torch.optim.AdamW, 1e-3, 0.0, "linear", 0.0)
    ids = torch.randint(5, 30, (2, 5), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch = Batch(inputs, (inputs,) * teachers, task.label_tensor([2, 1]), torch.arange(2))
    students, methods = {"student": models[0]}, {"student": Finetune()}
    methods["student"].bind(Bound(models[0], frozen, task))
    return Distiller(Models(students, methods, frozen, None, {"task": Constant(weight)}), task, factory).eval(), batch


@pytest.mark.parametrize("task", [CLASSES, SCORES], ids=["classes", "scores"])
def test_loss_is_that_of_plain_transformers(task: Task) -> None:
    distiller, batch = engine(task)
    labels = batch.labels if task is CLASSES else batch.labels.float()  # scores are kept in double, for metrics
    expected = distiller.student.model(**batch.student, labels=labels).loss
    torch.testing.assert_close(distiller.loss(batch).total, expected)


def test_cross_entropy_is_a_mean_over_the_batch_in_nats() -> None:
    distiller, batch = engine(CLASSES)
    logits = distiller.student.model(**batch.student).logits
    expected = -sum(F.log_softmax(row, -1)[label] for row, label in zip(logits, batch.labels, strict=True)) / 2
    loss = distiller.loss(batch)
    assert list(loss.terms) == ["task"]
    torch.testing.assert_close(loss.terms["task"], expected)


def test_weight_multiplies_the_sum_and_not_the_term() -> None:
    (one, batch), (three, _) = engine(CLASSES), engine(CLASSES, weight=3.0)
    torch.testing.assert_close(three.loss(batch).total, 3 * one.loss(batch).total)
    torch.testing.assert_close(three.loss(batch).terms["task"], one.loss(batch).terms["task"])


@pytest.mark.parametrize("teachers", [0, 1, 3])
def test_teachers_change_nothing_and_never_run(teachers: int) -> None:
    distiller, batch = engine(CLASSES, teachers)
    loss = distiller.loss(batch)
    assert torch.equal(loss.total, engine(CLASSES)[0].loss(batch_without_teachers(batch)).total)
    assert [forward.ran for forward in loss.steps[0][1].teachers] == [False] * teachers
    assert [teacher.examples for teacher in distiller.teachers] == [0] * teachers


def batch_without_teachers(batch: Batch) -> Batch:
    return Batch(batch.student, (), batch.labels, batch.index)


def test_every_parameter_of_the_student_is_trained() -> None:
    distiller, batch = engine(CLASSES)
    distiller.loss(batch).total.backward()
    assert all(parameter.grad is not None for parameter in distiller.parameters())
    assert list(distiller.method.parameters()) == []
