"""CKD: its layer maps, its loss as loops over what models show, both sides' projections, and what is refused."""

import math
from collections.abc import Sequence

import pytest
import torch
from methods.two_models import LENGTHS, TASK, bound_to, check_padding, encoder, shown, soft
from torch import Tensor, nn

from kd.errors import InputError
from kd.functional.combination import REDUCTIONS, combination_squares, concatenate, reduce_layers, resolve_groups
from kd.functional.hidden import patience
from kd.functional.logits import kl_divergence
from kd.methods.base import Bound, Step
from kd.methods.ckd import CKD, MAPS
from kd.models import Encoder, FrozenTeacher

GROUPS_OF_SIX = {
    "rc": [[1, 2, 3], [4, 5, 6]],
    "oc": [[1, 2, 3, 4], [3, 4, 5, 6]],
    "sc": [[1, 2], [5, 6]],
    "cc": [[1, 3], [4, 6]],
    "skip_comb": [[1, 3, 5], [2, 4, 6]],
    "skip": [[3], [6]],
}
"""The maps of the paper's and the authors' code's models, 2 layers of 6."""


def bound(student: Encoder, teacher: Encoder, padding: int = 0, **arguments: object) -> tuple[CKD, Step]:
    return bound_to(student, teacher, CKD(**arguments), padding)


def unit(vector: Sequence[float]) -> list[float]:
    length = math.sqrt(sum(entry * entry for entry in vector))
    return [entry / length for entry in vector]


def linear(module: nn.Module, vector: Sequence[float]) -> list[float]:
    weight, bias = module.weight.tolist(), module.bias.tolist()
    return [sum(w * x for w, x in zip(row, vector, strict=True)) + b for row, b in zip(weight, bias, strict=True)]


def naive(method: CKD, step: Step, groups: Sequence[Sequence[int]]) -> list[list[float]]:
    """The squared distances of every example's real tokens, summed over layers and width."""
    ours, theirs = shown(step, teacher=False), shown(step, teacher=True)
    found = []
    for example, length in enumerate(LENGTHS):
        found.append([])
        for token in range(length if method.states == "tokens" else 1):
            total = 0.0
            for layer, (group, project) in enumerate(zip(groups, method.projections, strict=True), start=1):
                a = ours[layer][example, token].tolist()
                parts = [theirs[other][example, token].tolist() for other in group]
                if method.project == "student":
                    a = linear(project, a)
                    width = len(parts[0])
                    if method.normalize == "layers":
                        a = [x for start in range(0, len(a), width) for x in unit(a[start : start + width])]
                        parts = [unit(part) for part in parts]
                    b = [x for part in parts for x in part]
                else:
                    if method.normalize == "layers":
                        parts = [unit(part) for part in parts]
                    b = linear(project, [x for part in parts for x in part])
                    if method.normalize == "layers":
                        a, b = unit(a), unit(b)
                if method.normalize == "concatenation":
                    a, b = unit(a), unit(b)
                total += sum((x - y) ** 2 for x, y in zip(a, b, strict=True))
            found[-1].append(total)
    return found


@pytest.mark.parametrize("normalize", ["concatenation", "layers", "none"])
@pytest.mark.parametrize("project", ["student", "teacher"])
@pytest.mark.parametrize(("layers", "width"), [("rc", 32), ("oc", 16), ("skip_comb", 16)])
def test_hidden_term_equals_the_formula_written_as_loops(layers: str, width: int, project: str, normalize: str) -> None:
    student, teacher = encoder(2, width, seed=1), encoder(6)
    method, step = bound(student, teacher, layers=layers, project=project, normalize=normalize)
    rows = naive(method, step, GROUPS_OF_SIX[layers])
    expected = sum(sum(row) / len(row) for row in rows) / 4
    assert method.terms(step)["hidden"].item() == pytest.approx(expected, rel=1e-9)
    method.hidden_reduction = "tokens"  # the authors' code: the sum over the batch, divided by its tokens
    assert method.terms(step)["hidden"].item() == pytest.approx(sum(map(sum, rows)) / sum(LENGTHS), rel=1e-9)


def test_states_of_the_first_token_equal_the_formula() -> None:
    method, step = bound(encoder(2, seed=1), encoder(6), states="cls")
    rows = naive(method, step, GROUPS_OF_SIX["rc"])
    assert [len(row) for row in rows] == [1, 1, 1, 1]
    for reduction in ("examples", "tokens"):
        method.hidden_reduction = reduction
        assert method.terms(step)["hidden"].item() == pytest.approx(sum(map(sum, rows)) / 4, rel=1e-9)
        assert method.batch_dependence() is None


def test_reductions_are_shares_of_each_other() -> None:
    torch.manual_seed(0)
    squares = [torch.rand(4, 6, width).double() for width in (4, 8)]
    mask = torch.arange(6) < torch.tensor(LENGTHS)[:, None]
    total, examples = 0.0, torch.zeros(len(REDUCTIONS), 4).double()
    expected = dict(zip(REDUCTIONS, examples, strict=True))
    for example, length in enumerate(LENGTHS):
        for token in range(length):
            for layer in squares:
                row = layer[example, token]
                total += row.sum()
                expected["examples"][example] += row.sum() / length
                expected["vectors"][example] += row.sum() / length / 2
                expected["layers"][example] += row.mean() / length
                expected["elements"][example] += row.mean() / length / 2
    for reduction in ("examples", "vectors", "layers", "elements"):
        torch.testing.assert_close(reduce_layers(squares, mask, reduction), expected[reduction].mean())
    torch.testing.assert_close(reduce_layers(squares, mask, "none"), expected["examples"])
    torch.testing.assert_close(reduce_layers(squares, mask, "sum"), total)
    torch.testing.assert_close(reduce_layers(squares, mask, "tokens"), total / 18)
    with pytest.raises(ValueError, match="not one of"):
        reduce_layers(squares, mask, "mean")


@pytest.mark.parametrize(("name", "groups"), GROUPS_OF_SIX.items())
def test_maps_of_two_layers_of_six_are_those_of_the_authors(name: str, groups: list[list[int]]) -> None:
    assert resolve_groups(name, MAPS, 2, 6) == tuple((j, tuple(group)) for j, group in enumerate(groups, start=1))


def test_maps_of_depths_that_do_not_divide_round_down() -> None:
    assert [group for _, group in resolve_groups("rc", MAPS, 3, 7)] == [(1, 2), (3, 4), (5, 6, 7)]
    assert [group for _, group in resolve_groups("oc", MAPS, 3, 7)] == [(1, 2, 3), (2, 3, 4, 5), (4, 5, 6, 7)]
    assert [group for _, group in resolve_groups("cc", MAPS, 3, 7)] == [(1, 2), (3, 4), (5, 7)]
    assert [group for _, group in resolve_groups("sc", MAPS, 3, 7)] == [(1,), (3, 4), (6, 7)]
    assert [group for _, group in resolve_groups("sc", MAPS, 3, 9)] == [(1, 2), (4, 5, 6), (8, 9)]


@pytest.mark.parametrize("name", MAPS)
def test_maps_of_any_depths_give_every_student_layer_layers_that_exist(name: str) -> None:
    for teacher in range(1, 13):
        for student in range(1, teacher + 1):
            groups = resolve_groups(name, MAPS, student, teacher)
            assert [layer for layer, _ in groups] == list(range(1, student + 1))
            for _, group in groups:
                assert list(group) == sorted(set(group))
                assert 1 <= group[0] <= group[-1] <= teacher
            assert resolve_groups([[j, list(group)] for j, group in groups], MAPS, student, teacher) == groups
            if name in ("rc", "skip_comb"):
                assert sorted(layer for _, group in groups for layer in group) == list(range(1, teacher + 1))


def test_groups_of_one_layer_without_a_map_are_normalised_patience() -> None:
    student, teacher = encoder(3, seed=1), encoder(3, seed=2)
    method, step = bound(student, teacher, states="cls")
    for project in method.projections:
        nn.init.eye_(project.weight)
        nn.init.zeros_(project.bias)
    ours, theirs = (torch.stack([f.outputs.cls(k) for k in (1, 2, 3)], 1) for f in (step.student, step.teacher))
    torch.testing.assert_close(method.terms(step)["hidden"], patience(ours, theirs, reduction="examples"))


def test_scale_of_all_layers_changes_nothing_but_that_of_one_does_unless_each_is_normalised() -> None:
    torch.manual_seed(0)
    layers, student = [torch.randn(5, 8).double() for _ in range(3)], torch.randn(5, 24).double()
    scaled = [layers[0] * 7, *layers[1:]]

    def loss(states: list[Tensor], normalize: str) -> float:
        return combination_squares(student, concatenate(states), normalize, 3).sum().item()

    whole = loss(layers, "concatenation")
    assert loss([layer * 7 for layer in layers], "concatenation") == pytest.approx(whole, rel=1e-12)
    assert loss(scaled, "concatenation") != pytest.approx(whole, rel=1e-3)
    assert loss(scaled, "layers") == pytest.approx(loss(layers, "layers"), rel=1e-12)
    assert loss(layers, "layers") != pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("project", ["student", "teacher"])
def test_student_and_maps_get_gradients_and_the_teacher_none(project: str) -> None:
    student, teacher = encoder(2, seed=1), encoder(6)
    method, step = bound(student, teacher, project=project)
    method.terms(step)["hidden"].backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in method.parameters())
    assert student.base.embeddings.word_embeddings.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())
    layer = torch.randn(2, 4, requires_grad=True)
    assert not concatenate([layer, layer]).requires_grad


@pytest.mark.parametrize(("project", "shapes"), [("student", [(96, 16), (64, 16)]), ("teacher", [(16, 96), (16, 64)])])
def test_maps_have_the_widths_of_their_groups(project: str, shapes: list[tuple[int, int]]) -> None:
    layers = [[1, [0, 1, 2]], [2, [3, 6]]]
    method, step = bound(encoder(2, 16, seed=1), encoder(6), layers=layers, project=project)
    assert [tuple(p.weight.shape) for p in method.projections] == shapes
    assert method.describe() == {"layer map (student<-teacher)": "1<-0+1+2, 2<-3+6"}
    assert method.terms(step)["hidden"] > 0


@pytest.mark.parametrize("project", ["student", "teacher"])
def test_maps_of_equal_widths_begin_as_copies_or_means(project: str) -> None:
    method = CKD(layers="rc", project=project)
    method.bind(Bound(encoder(2), [FrozenTeacher(encoder(6))], TASK))
    states = torch.randn(4, 32)
    given, expected = (states, states.repeat(1, 3)) if project == "student" else (states.repeat(1, 3), states)
    torch.testing.assert_close(method.projections[0](given), expected)


@pytest.mark.parametrize("attention", [True, False])
def test_padding_changes_no_term(attention: bool) -> None:
    models = encoder(2, 16, seed=1).eval(), encoder(6)
    terms = check_padding(lambda padding: bound(*models, padding, attention=attention), 1e-12)
    assert set(terms) == {"task", "logits", "hidden", *["attention"] * attention}


def test_attention_term_compares_means_over_heads_and_layers() -> None:
    method, step = bound(encoder(2, seed=1), encoder(6), attention=True)
    ours, theirs = ([None] * 7, [None] * 7)
    for layer in range(1, 7):
        theirs[layer] = step.teacher.outputs.attention(layer).mean(1)
        if layer < 3:
            ours[layer] = step.student.outputs.attention(layer).mean(1)
    expected = 0.0
    for layer, group in enumerate(GROUPS_OF_SIX["rc"], start=1):
        target = sum(theirs[other] for other in group) / 3
        for example, n in enumerate(LENGTHS):
            expected += ((ours[layer] - target)[example, :n, :n] ** 2).sum().item() / n**2 / 4
    assert method.terms(step)["attention"].item() == pytest.approx(expected, rel=1e-9)
    assert method.names == (*CKD.names, "attention")


def test_soft_loss_is_the_divergence_times_temperature_squared() -> None:
    method, step = bound(encoder(2, seed=1), encoder(6), temperature=3.0)
    s, t = step.student.outputs.logits, step.teacher.outputs.logits
    torch.testing.assert_close(method.terms(step)["logits"], soft(step, 3.0))
    torch.testing.assert_close(soft(step, 3.0), kl_divergence(s, t, 3.0, "batchmean"))


def test_a_mean_over_the_tokens_of_a_batch_says_so() -> None:
    assert "tokens of a batch" in str(CKD(hidden_reduction="tokens").batch_dependence())
    assert CKD().batch_dependence() is None


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"layers": "uniform"}, "layers"),
        ({"project": "both"}, "project"),
        ({"normalize": "true"}, "normalize"),
        ({"states": "pooled"}, "states"),
        ({"hidden_reduction": "sum"}, "hidden_reduction"),
        ({"hidden_reduction": "none"}, "hidden_reduction"),
        ({"temperature": 0}, "temperature"),
        ({"loss": "l1"}, "loss"),
        ({"reduction": "sum"}, "reduction"),
        ({"attention": "yes"}, "attention"),
    ],
    ids=str,
)
def test_impossible_arguments_are_refused_by_their_key(arguments: dict[str, object], key: str) -> None:
    with pytest.raises(InputError) as caught:
        CKD(**arguments)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("layers", "depths", "message"),
    [
        ("rc", (4, 2), "no deeper"),
        ([], (2, 4), "neither"),
        (3, (2, 4), "neither"),
        ([[1, 2]], (2, 4), "not a pair"),
        ([1], (2, 4), "not a pair"),
        ([[1, [2], 3]], (2, 4), "not a pair"),
        ([[1, []]], (2, 4), "at least one"),
        ([[1, [2, 2]]], (2, 4), "none twice"),
        ([[3, [2]]], (2, 4), "layer 3 of the student"),
        ([[1, [2, 5]]], (2, 4), "layer 5 of the teacher"),
        ([[1, [-1]]], (2, 4), "layer -1 of the teacher"),
        ([[1, [True]]], (2, 4), "whole numbers"),
        ([[1, [1.0]]], (2, 4), "whole numbers"),
    ],
    ids=str,
)
def test_maps_that_do_not_suit_the_depths_are_refused_while_binding(
    layers: object, depths: tuple[int, int], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        CKD(layers).bind(Bound(encoder(depths[0]), [FrozenTeacher(encoder(depths[1]))], TASK))
    assert caught.value.key == "layers"


def test_embeddings_have_no_attention_to_compare() -> None:
    CKD([[0, [0]]]).bind(Bound(encoder(2), [FrozenTeacher(encoder(4))], TASK))
    with pytest.raises(InputError, match="it may be 1 to 4") as caught:
        CKD([[1, [0, 1]]], attention=True).bind(Bound(encoder(2), [FrozenTeacher(encoder(4))], TASK))
    assert caught.value.key == "layers"


def test_shapes_and_words_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        combination_squares(torch.ones(2, 4), torch.ones(2, 8))
    with pytest.raises(ValueError, match="not one of"):
        combination_squares(torch.ones(2, 4), torch.ones(2, 4), "whole")
