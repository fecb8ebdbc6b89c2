"""FitNets: its hint as loops over what models show, its two stages, and what is refused."""

import pytest
import torch
from conformance.bench import Bench
from methods.two_models import LENGTHS, TASK, bound_to, check_padding, encoder, shown, soft

from kd.errors import InputError
from kd.methods.base import Bound, Step
from kd.methods.fitnets import FitNets
from kd.methods.kd import KD
from kd.models import Encoder, FrozenTeacher


def bound(student: Encoder, teacher: Encoder, padding: int = 0, **arguments: object) -> tuple[FitNets, Step]:
    return bound_to(student, teacher, FitNets(**arguments), padding)


def naive(method: FitNets, step: Step, pairs: list[list[int]]) -> list[list[list[float]]]:
    """For each pair of layers and example the squared distance at each real token, a sum over the width."""
    ours, theirs = shown(step, teacher=False), shown(step, teacher=True)
    found = []
    for (guided, hint), regressor in zip(pairs, method.regressors, strict=True):
        weight, bias = regressor.weight.tolist(), regressor.bias.tolist()
        found.append([])
        for example, length in enumerate(LENGTHS):
            found[-1].append([])
            for token in range(length if method.states == "tokens" else 1):
                v, u = ours[guided][example, token].tolist(), theirs[hint][example, token].tolist()
                r = [sum(w * x for w, x in zip(row, v, strict=True)) + b for row, b in zip(weight, bias, strict=True)]
                found[-1][-1].append(sum((x - y) ** 2 for x, y in zip(r, u, strict=True)))
    return found


@pytest.mark.parametrize("states", ["tokens", "cls"])
@pytest.mark.parametrize("width", [32, 16])
@pytest.mark.parametrize(
    ("layers", "pairs"), [("middle", [[1, 3]]), ("stages", [[1, 3], [2, 6]]), ([[2, 4], [0, 0]], [[2, 4], [0, 0]])]
)
def test_hint_equals_equation_3_written_as_loops(layers: object, pairs: list, width: int, states: str) -> None:
    method, step = bound(encoder(2, width, seed=1), encoder(6), layers=layers, states=states)
    rows = naive(method, step, pairs)
    sums = sum(sum(map(sum, pair)) for pair in rows) / 4
    means = sum(sum(sum(row) / len(row) for row in pair) for pair in rows) / 4
    for reduction, expected in (("examples", sums), ("vectors", means), ("elements", means / 32)):
        method.hidden_reduction = reduction
        assert method.terms(step)["hidden"].item() == pytest.approx(expected, rel=1e-9)
    assert method.names == ("task", "logits", "hidden")


def test_hint_reaches_the_student_up_to_the_guided_layer_and_the_regressor_and_no_teacher() -> None:
    student, teacher = encoder(4, 16, seed=1), encoder(6)
    method, step = bound(student, teacher)
    method.terms(step)["hidden"].backward()
    assert method.describe() == {"layer map (guided<-hint)": "2<-3"}
    assert all(parameter.grad.abs().sum() > 0 for parameter in method.parameters())
    reached = {name for name, parameter in student.model.named_parameters() if parameter.grad is not None}
    assert any("layer.1." in name for name in reached)
    assert not any("layer.2." in name or "classifier" in name or "pooler" in name for name in reached)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_hints_alone_are_the_only_term_and_freeze_what_they_do_not_reach() -> None:
    student, teacher = encoder(4, 16, seed=1), encoder(6)
    whole, step = bound(encoder(4, 16, seed=1), teacher)
    expected = whole.terms(step)["hidden"]
    method, step = bound(student, teacher, hints_only=True)
    terms = method.terms(step)
    assert set(terms) == set(method.names) == {"hidden"}
    torch.testing.assert_close(terms["hidden"], expected)
    terms["hidden"].backward()
    for name, parameter in student.model.named_parameters():
        frozen = any(part in name for part in ("layer.2.", "layer.3.", "pooler", "classifier"))
        assert parameter.requires_grad is not frozen, name
        assert (parameter.grad is None) is frozen, name


def test_the_published_stages_are_hints_and_then_soft_labels_whose_weight_falls_from_4_to_1() -> None:
    first, second = Bench("fitnets_stages before"), Bench("fitnets_stages")
    (hints,), (labels,) = first.methods.values(), second.methods.values()
    assert isinstance(hints, FitNets)
    assert hints.hints_only
    assert isinstance(labels, KD)
    assert labels.loss == "ce"
    assert labels.temperature(0.5) == 3
    weight = second.engine.weights["logits"]
    assert [weight(fraction) for fraction in (0.0, 0.5, 1.0)] == [4.0, 2.5, 1.0]


def test_regressors_of_equal_widths_begin_as_the_identity() -> None:
    method = FitNets()
    method.bind(Bound(encoder(2), [FrozenTeacher(encoder(6))], TASK))
    states = torch.randn(4, 32)
    assert torch.equal(method.regressors[0](states), states)


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
        ({"layers": "half"}, "layers"),
        ({"states": "mean"}, "states"),
        ({"hidden_reduction": "none"}, "hidden_reduction"),
        ({"hints_only": "yes"}, "hints_only"),
        ({"temperature": 0}, "temperature"),
        ({"loss": "l1"}, "loss"),
        ({"reduction": "sum"}, "reduction"),
    ],
    ids=str,
)
def test_impossible_arguments_are_refused_by_their_key(arguments: dict[str, object], key: str) -> None:
    with pytest.raises(InputError) as caught:
        FitNets(**arguments)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("layers", "depths", "message"),
    [
        ([[3, 1]], (2, 4), "layer 3 of the student"),
        ([], (2, 4), "no pair"),
        ("skip", (1, 4), "no pair"),
        ("stages", (4, 2), "no deeper"),
    ],
    ids=str,
)
def test_maps_that_do_not_suit_the_depths_are_refused_while_binding(
    layers: object, depths: tuple[int, int], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        FitNets(layers).bind(Bound(encoder(depths[0]), [FrozenTeacher(encoder(depths[1]))], TASK))
    assert caught.value.key == "layers"
