"""SP: its similarities as loops over what models show, its features, and what is refused."""

import math

import pytest
import torch
from methods.two_models import FEATURES, TASK, bound_to, check_features_are_checked, check_padding, encoder, features, soft

from kd.errors import InputError
from kd.methods.base import Step
from kd.methods.sp import SP
from kd.models import Encoder


def bound(student: Encoder, teacher: Encoder, padding: int = 0, **arguments: object) -> tuple[SP, Step]:
    return bound_to(student, teacher, SP(**arguments), padding)


def naive(rows: list[list[float]]) -> list[list[float]]:
    gram = [[sum(x * y for x, y in zip(one, other, strict=True)) for other in rows] for one in rows]
    return [[value / math.sqrt(sum(each**2 for each in row)) for value in row] for row in gram]


@pytest.mark.parametrize("width", [32, 16])
@pytest.mark.parametrize(("feature", "layers", "pairs"), FEATURES, ids=str)
def test_term_equals_the_formula_written_as_loops(feature: str, layers: object, pairs: list, width: int) -> None:
    method, step = bound(encoder(2, width, seed=1), encoder(6), feature=feature, layers=layers)
    expected = 0.0
    for both in features(step, feature, pairs):
        ours, theirs = (naive(rows.tolist()) for rows in both)
        flat = [(x, y) for one, other in zip(ours, theirs, strict=True) for x, y in zip(one, other, strict=True)]
        expected += sum((x - y) ** 2 for x, y in flat) / 4**2
    assert method.terms(step)["similarity"].item() == pytest.approx(expected, rel=1e-9)


def test_student_gets_gradients_and_the_teacher_none() -> None:
    student, teacher = encoder(2, seed=1), encoder(6)
    method, step = bound(student, teacher)
    method.terms(step)["similarity"].backward()
    assert list(method.parameters()) == []
    assert student.base.embeddings.word_embeddings.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_padding_changes_no_term() -> None:
    models = encoder(2, 16, seed=1).eval(), encoder(6)
    check_padding(lambda padding: bound(*models, padding, feature="mean"))


def test_soft_loss_is_the_divergence_times_temperature_squared() -> None:
    method, step = bound(encoder(2, seed=1), encoder(6), temperature=3.0)
    torch.testing.assert_close(method.terms(step)["logits"], soft(step, 3.0))
    assert method.terms(step)["task"] == TASK.hard(step.student.outputs.logits, step.batch.labels)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"feature": "tokens"}, "feature"),
        ({"layers": "all"}, "layers"),
        ({"feature": "pooled", "layers": "stages"}, "layers"),
        ({"feature": "logits", "layers": [[1, 1]]}, "layers"),
        ({"temperature": 0}, "temperature"),
        ({"loss": "l1"}, "loss"),
        ({"reduction": "sum"}, "reduction"),
    ],
    ids=str,
)
def test_impossible_arguments_are_refused_by_their_key(arguments: dict[str, object], key: str) -> None:
    with pytest.raises(InputError) as caught:
        SP(**arguments)
    assert caught.value.key == key


def test_what_does_not_suit_the_models_or_the_task_is_refused_while_binding() -> None:
    check_features_are_checked(SP)


def test_a_student_deeper_than_its_teacher_is_compared_by_its_last_layer() -> None:
    method, _ = bound(encoder(4), encoder(2))
    assert method.describe() == {"layer map (student<-teacher)": "4<-2"}
    assert method.needs()[0].cls == {4}


def test_a_comparison_of_examples_says_so() -> None:
    assert "of the examples of a batch" in SP().batch_dependence()
    assert SP.across_ranks
