"""AT: its maps as loops over what models show, its reductions, and what is refused."""

import math

import pytest
import torch
from methods.two_models import LENGTHS, TASK, bound_to, check_padding, encoder, shown, soft

from kd.errors import InputError
from kd.methods.at import AT
from kd.methods.base import Bound, Step
from kd.models import Encoder, FrozenTeacher


def bound(student: Encoder, teacher: Encoder, padding: int = 0, **arguments: object) -> tuple[AT, Step]:
    return bound_to(student, teacher, AT(**arguments), padding)


def naive(step: Step, layer: int, power: float, teacher: bool) -> list[list[float]]:
    """The map of each example over its real tokens."""
    found = []
    for example, length in enumerate(LENGTHS):
        states = shown(step, teacher)[layer][example, :length].tolist()
        values = [sum(abs(x) ** power for x in state) for state in states]
        found.append([value / math.sqrt(sum(each**2 for each in values)) for value in values])
    return found


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("width", [32, 16])
@pytest.mark.parametrize(("layers", "pairs"), [("stages", [[1, 3], [2, 6]]), ("final", [[2, 6]]), ([[0, 1]], [[0, 1]])])
def test_term_equals_equation_2_written_as_loops(layers: object, pairs: list, width: int, power: float) -> None:
    method, step = bound(encoder(2, width, seed=1), encoder(6), layers=layers, power=power)
    expected = dict.fromkeys(("norm", "squares", "elements"), 0.0)
    for ours, theirs in pairs:
        for one, other in zip(naive(step, ours, power, False), naive(step, theirs, power, True), strict=True):
            total = sum((x - y) ** 2 for x, y in zip(one, other, strict=True))
            expected["norm"] += math.sqrt(total) / 4
            expected["squares"] += total / 4
            expected["elements"] += total / len(one) / 4
    for reduction, value in expected.items():
        method.activation_reduction = reduction
        assert method.terms(step)["activation"].item() == pytest.approx(value, rel=1e-9)


def test_student_gets_gradients_and_the_teacher_none() -> None:
    student, teacher = encoder(2, seed=1), encoder(6)
    method, step = bound(student, teacher)
    method.terms(step)["activation"].backward()
    assert list(method.parameters()) == []
    assert method.describe() == {"layer map (student<-teacher)": "1<-3, 2<-6"}
    assert student.base.embeddings.word_embeddings.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_padding_changes_no_term() -> None:
    models = encoder(2, 16, seed=1).eval(), encoder(6)
    check_padding(lambda padding: bound(*models, padding))


def test_soft_loss_is_the_divergence_times_temperature_squared() -> None:
    method, step = bound(encoder(2, seed=1), encoder(6), temperature=3.0)
    torch.testing.assert_close(method.terms(step)["logits"], soft(step, 3.0))
    assert method.terms(step)["task"] == TASK.hard(step.student.outputs.logits, step.batch.labels)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"layers": "all"}, "layers"),
        ({"power": 0.5}, "power"),
        ({"power": 9}, "power"),
        ({"power": "2"}, "power"),
        ({"activation_reduction": "none"}, "activation_reduction"),
        ({"temperature": 0}, "temperature"),
        ({"loss": "l1"}, "loss"),
        ({"reduction": "none"}, "reduction"),
    ],
    ids=str,
)
def test_impossible_arguments_are_refused_by_their_key(arguments: dict[str, object], key: str) -> None:
    with pytest.raises(InputError) as caught:
        AT(**arguments)
    assert caught.value.key == key


def test_maps_that_do_not_suit_the_depths_are_refused_while_binding() -> None:
    for layers, depths, message in (("stages", (4, 2), "no deeper"), ([], (2, 4), "no pair"), ([[1, 5]], (2, 4), "layer 5")):
        with pytest.raises(InputError, match=message) as caught:
            AT(layers).bind(Bound(encoder(depths[0]), [FrozenTeacher(encoder(depths[1]))], TASK))
        assert caught.value.key == "layers"
