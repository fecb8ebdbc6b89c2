"""ALP-KD: worked numbers, its loss as loops over what models show, its buckets, and where its gradient goes."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from methods.two_models import LENGTHS, TASK, bound_to, check_padding, encoder, shown
from torch import Tensor, nn

from kd.errors import InputError
from kd.forward import Forward, Needs
from kd.functional.combination import attended, combination_squares, layer_attention
from kd.functional.logits import soft_cross_entropy
from kd.methods.alp_kd import ALPKD
from kd.methods.base import Bound, Progress, Step
from kd.models import Encoder, FrozenTeacher
from kd.system import distributed

STATE, LAYERS = torch.tensor([1.0, 0.0]).double(), torch.eye(2).double()
BUCKETS = {
    "all": {1: [1, 2, 3, 4, 5, 6], 2: [1, 2, 3, 4, 5, 6]},
    "no_overlap": {1: [1, 2, 3], 2: [4, 5, 6]},
    "partial_overlap": {1: [1, 2, 3, 4], 2: [3, 4, 5, 6]},
    "list": {1: [0, 6], 2: [5]},
}
"""Student layer -> teacher layers, of two and six."""


def bound(student: Encoder, teacher: Encoder, padding: int = 0, **arguments: object) -> tuple[ALPKD, Step]:
    return bound_to(student, teacher, ALPKD(**arguments), padding)


def given(layers: str) -> object:
    return [[j, group] for j, group in BUCKETS[layers].items()] if layers == "list" else layers


def naive(method: ALPKD, step: Step, buckets: dict[int, list[int]]) -> list[list[list[float]]]:
    """Example -> token -> student layer -> mean squared error."""
    ours, theirs = shown(step, teacher=False), shown(step, teacher=True)
    if isinstance(method.project, nn.Linear):
        with torch.no_grad():
            ours = [states @ method.project.weight.T + method.project.bias for states in ours]

    def error(example: int, token: int, layer: int) -> float:
        c = ours[layer][example, token].tolist()
        layers = [theirs[other][example, token].tolist() for other in buckets[layer]]
        products = [sum(x * y for x, y in zip(c, other, strict=True)) for other in layers]
        if method.scaled:
            products = [product / math.sqrt(len(c)) for product in products]
        weights = [math.exp(product - max(products)) for product in products]
        target = [sum(w * other[k] for w, other in zip(weights, layers, strict=True)) / sum(weights) for k in range(len(c))]
        return sum((x - y) ** 2 for x, y in zip(c, target, strict=True)) / len(c)

    tokens = [range(length if method.states == "tokens" else 1) for length in LENGTHS]
    return [[[error(i, t, layer) for layer in buckets] for t in tokens[i]] for i in range(4)]


@pytest.mark.parametrize(
    ("scaled", "weights", "loss"),
    [(False, (0.731059, 0.268941), 0.072329), (True, (0.669762, 0.330238), 0.109057)],
)
def test_worked_numbers(scaled: bool, weights: tuple[float, float], loss: float) -> None:
    attention = layer_attention(STATE, LAYERS, scaled=scaled)
    assert attention.tolist() == pytest.approx(weights, abs=1e-6)
    target = attended(attention, LAYERS)
    assert target.tolist() == pytest.approx(weights, abs=1e-6)
    assert combination_squares(STATE, target, "none").mean().item() == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("states", ["cls", "tokens"])
@pytest.mark.parametrize(("layers", "width"), [("all", 32), ("no_overlap", 16), ("partial_overlap", 32), ("list", 32)])
def test_hidden_term_equals_the_formula_written_as_loops(layers: str, width: int, states: str, scaled: bool) -> None:
    student, teacher = encoder(2, width, seed=1), encoder(6)
    method, step = bound(student, teacher, layers=given(layers), states=states, scaled=scaled)
    rows = naive(method, step, BUCKETS[layers])
    expected = sum(sum(map(sum, row)) / len(row) for row in rows) / 4  # the paper sums over the batch, we average
    assert method.terms(step)["hidden"].item() == pytest.approx(expected, rel=1e-9)
    for reduction, factor in {"elements": 1 / 2, "vectors": 32 / 2, "examples": 32.0}.items():
        method.hidden_reduction = reduction
        assert method.terms(step)["hidden"].item() == pytest.approx(factor * expected, rel=1e-9)
    method.hidden_reduction = "tokens"
    total = 32 * sum(sum(map(sum, row)) for row in rows) / sum(map(len, rows))
    assert method.terms(step)["hidden"].item() == pytest.approx(total, rel=1e-9)
    assert (method.batch_dependence() is None) == (states == "cls")


def test_weights_add_up_to_one_however_large_products_are() -> None:
    torch.manual_seed(0)
    student, teacher = 30 * torch.randn(4, 768), 30 * torch.randn(4, 12, 768)
    weights = layer_attention(student, teacher)
    assert weights.isfinite().all()
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(4))


def test_duplicates_of_all_layers_change_nothing() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 5, 8).double(), torch.randn(3, 5, 4, 8).double()
    twice = torch.cat([teacher, teacher], dim=-2)
    one, other = (attended(layer_attention(student, layers), layers) for layers in (teacher, twice))
    torch.testing.assert_close(one, other)


def test_layers_that_equal_the_student_have_equal_weights_and_no_loss() -> None:
    student = torch.randn(3, 8).double()
    layers = student[:, None].expand(3, 5, 8)
    weights = layer_attention(student, layers)
    torch.testing.assert_close(weights, torch.full((3, 5), 0.2).double())
    assert combination_squares(student, attended(weights, layers), "none").sum().item() == pytest.approx(0, abs=1e-20)


def test_buckets_of_equal_depths_without_overlap_are_the_layers_themselves() -> None:
    method, step = bound(encoder(3).eval(), encoder(3), layers="no_overlap")
    assert method.terms(step)["hidden"].item() == pytest.approx(0, abs=1e-12)
    method, step = bound(encoder(3).eval(), encoder(3), layers="partial_overlap", scaled=True)
    assert method.terms(step)["hidden"] > 1e-3


@pytest.mark.parametrize(
    ("layers", "depths", "groups"),
    [
        ("all", (2, 3), "1<-1+2+3, 2<-1+2+3"),
        ("no_overlap", (2, 5), "1<-1+2, 2<-3+4+5"),
        ("partial_overlap", (2, 5), "1<-1+2+3, 2<-2+3+4+5"),
        ("partial_overlap", (3, 6), "1<-1+2+3, 2<-2+3+4+5, 3<-4+5+6"),
        ("no_overlap", (1, 4), "1<-1+2+3+4"),
    ],
)
def test_buckets_of_any_depths(layers: str, depths: tuple[int, int], groups: str) -> None:
    method, step = bound(encoder(depths[0], seed=1), encoder(depths[1]), layers=layers)
    assert method.describe() == {"layer map (student<-teacher)": groups}
    ours, (theirs,) = method.needs()
    assert ours == Needs(cls=range(1, depths[0] + 1))
    assert theirs == Needs(cls=range(1, depths[1] + 1))
    assert method.terms(step)["hidden"].isfinite()


@pytest.mark.parametrize("states", ["cls", "tokens"])
def test_padding_changes_no_term(states: str) -> None:
    models = encoder(2, 16, seed=1).eval(), encoder(6)
    check_padding(lambda padding: bound(*models, padding, states=states), 1e-12)


def naive_weights(method: ALPKD, step: Step, buckets: dict[int, list[int]]) -> Tensor:
    """Means over tokens, then examples, of the softmax of dot products, (student layers, teacher layers)."""
    ours, theirs = shown(step, teacher=False), shown(step, teacher=True)
    found = torch.zeros(3, 7).double()
    for layer, others in buckets.items():
        for example, length in enumerate(LENGTHS):
            tokens = length if method.states == "tokens" else 1
            for token in range(tokens):
                products = [float(ours[layer][example, token] @ theirs[other][example, token]) for other in others]
                exponentials = [math.exp(product - max(products)) for product in products]
                for other, value in zip(others, exponentials, strict=True):
                    found[layer, other] += value / sum(exponentials) / tokens / len(LENGTHS)
    return found


@pytest.mark.parametrize("states", ["cls", "tokens"])
@pytest.mark.parametrize("layers", list(BUCKETS))
def test_map_of_layers_is_the_mean_attention_of_an_epoch(layers: str, states: str) -> None:
    method, step = bound(encoder(2, seed=1), encoder(6), layers=given(layers), states=states, scaled=False)
    other = step.replace(student=Forward(encoder(2, seed=3), step.student.inputs, step.student.needs))
    weights = [naive_weights(method, each, BUCKETS[layers]) for each in (step, other)]
    for epoch in (0, 1):
        for each in (step, other)[epoch:]:
            each = each.replace(progress=Progress(epoch=epoch))
            method.after_step(each, method.terms(each))
        (found,) = (maps["hidden"].double() for maps in method.layer_maps())
        torch.testing.assert_close(found, sum(weights[epoch:]) / (2 - epoch), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.sum(dim=1), torch.tensor([0.0, 1.0, 1.0]).double())


def test_maps_of_two_ranks_are_that_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    method, step = bound(encoder(2, seed=1), encoder(6))
    parts = []
    for rows, weight in ((slice(0, 3), 1.5), (slice(3, 4), 0.5)):
        share = {name: tensor[rows] for name, tensor in step.batch.student.items()}
        batch = replace(step.batch, student=share, teachers=(share,), labels=step.batch.labels[rows], weight=weight)
        student, teacher = (Forward(each.model, share, each.needs) for each in (step.student, step.teacher))
        parts.append(step.replace(student=student, teachers=[teacher], batch=batch))

    def taken(part: Step) -> ALPKD:
        rank = copy.deepcopy(method)
        rank.after_step(part, rank.terms(part))
        return rank

    sent: list[list[Tensor]] = []
    monkeypatch.setattr(distributed, "mean", lambda tensors: sent.append(list(tensors)) or list(tensors))
    for part in parts:
        taken(part)
    average = [torch.stack(each).mean(0) for each in zip(*sent, strict=True)]
    monkeypatch.setattr(distributed, "mean", lambda _: average)
    expected = naive_weights(method, step, BUCKETS["all"])
    for part in parts:
        found = taken(part).layer_maps()[0]["hidden"]
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def slope(detach: bool) -> Tensor:
    """The gradient of a mean squared error by a state, with and without the part through the weights."""
    state = STATE.clone().requires_grad_()
    weights = layer_attention(state, LAYERS)
    target = attended(weights.detach() if detach else weights, LAYERS)
    (gradient,) = torch.autograd.grad(((state - target) ** 2).mean(), state)
    return gradient


def test_gradient_through_the_weights_is_that_of_the_softmax() -> None:
    a, b = (layer_attention(STATE, LAYERS)).tolist()
    residual = [1 - a, -b]
    assert slope(True).tolist() == pytest.approx(residual, abs=1e-12)
    # d a / d state = a b (layer 1 - layer 2), and the target is (a, b)
    inner = a * b * (residual[0] - residual[1])
    assert slope(False).tolist() == pytest.approx([residual[0] - inner, residual[1] + inner], abs=1e-12)


@pytest.mark.parametrize("width", [32, 16])
def test_gradients_through_the_weights_are_a_switch_and_the_teacher_gets_none(width: int) -> None:
    gradients, values = [], []
    for detach in (False, True):
        student, teacher = encoder(2, width, seed=1), encoder(6)
        method, step = bound(student, teacher, detach_attention=detach, scaled=True)
        value = method.terms(step)["hidden"]
        value.backward()
        values.append(value.item())
        gradients.append(student.base.encoder.layer[0].output.dense.weight.grad)
        assert all(parameter.grad is None for parameter in teacher.parameters())
        assert [parameter.grad.abs().sum() > 0 for parameter in method.parameters()] == [True] * (2 * (width == 16))
        assert [tuple(p.shape) for p in method.parameters()] == ([(32, 16), (32,)] if width == 16 else [])
    assert values[0] == values[1]
    assert (gradients[0] - gradients[1]).abs().max() > 1e-3 * gradients[0].abs().max()


def test_teacher_layers_get_no_gradient() -> None:
    student, teacher = torch.randn(2, 4), torch.randn(2, 3, 4, requires_grad=True)
    weights = layer_attention(student, teacher)
    assert not weights.requires_grad
    assert not attended(weights, teacher).requires_grad


def test_soft_loss_is_the_cross_entropy_without_temperature_squared() -> None:
    method, step = bound(encoder(2, seed=1), encoder(6), temperature=3.0)
    s, t = step.student.outputs.logits, step.teacher.outputs.logits
    expected = -((t / 3).softmax(-1) * (s / 3).log_softmax(-1)).sum() / 4
    torch.testing.assert_close(method.terms(step)["logits"], expected)
    torch.testing.assert_close(expected, soft_cross_entropy(s, t, 3.0, "batchmean"))


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"layers": "rc"}, "layers"),
        ({"states": "pooled"}, "states"),
        ({"scaled": 1}, "scaled"),
        ({"detach_attention": "no"}, "detach_attention"),
        ({"hidden_reduction": "sum"}, "hidden_reduction"),
        ({"hidden_reduction": "none"}, "hidden_reduction"),
        ({"temperature": 0}, "temperature"),
        ({"loss": "l1"}, "loss"),
        ({"reduction": "none"}, "reduction"),
    ],
    ids=str,
)
def test_impossible_arguments_are_refused_by_their_key(arguments: dict[str, object], key: str) -> None:
    with pytest.raises(InputError) as caught:
        ALPKD(**arguments)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("layers", "depths", "message"),
    [
        ("all", (4, 2), "no deeper"),
        ("partial_overlap", (4, 2), "no deeper"),
        ([], (2, 4), "neither"),
        ([[1, []]], (2, 4), "at least one"),
        ([[1, [2, 5]]], (2, 4), "layer 5 of the teacher"),
        ([[3, [2]]], (2, 4), "layer 3 of the student"),
    ],
    ids=str,
)
def test_buckets_that_do_not_suit_the_depths_are_refused_while_binding(
    layers: object, depths: tuple[int, int], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        ALPKD(layers).bind(Bound(encoder(depths[0]), [FrozenTeacher(encoder(depths[1]))], TASK))
    assert caught.value.key == "layers"
