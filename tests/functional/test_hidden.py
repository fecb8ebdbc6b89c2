"""The patience loss: PKD's numbers, eq. 7 as loops, and what must hold for any states."""

import math

import pytest
import torch

from kd.functional.hidden import HIDDEN_REDUCTIONS, PADDING, patience, token_error, unit

STUDENT, TEACHER = torch.tensor([[[3.0, 4.0]]]).double(), torch.tensor([[[4.0, 3.0]]]).double()
BATCH, LAYERS, WIDTH = 3, 2, 5


def states(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, BATCH, LAYERS, WIDTH, generator=generator, dtype=torch.float64)
    return student, 2 * teacher


def naive(student: torch.Tensor, teacher: torch.Tensor, normalize: bool) -> float:
    """Eq. 7: the sum over examples, layers and components."""
    total = 0.0
    for ours_of_example, theirs_of_example in zip(student.tolist(), teacher.tolist(), strict=True):
        for ours, theirs in zip(ours_of_example, theirs_of_example, strict=True):
            lengths = [math.sqrt(sum(x * x for x in vector)) if normalize else 1.0 for vector in (ours, theirs)]
            total += sum((a / lengths[0] - b / lengths[1]) ** 2 for a, b in zip(ours, theirs, strict=True))
    return total


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("reduction", "share"), [("sum", 1), ("elements", 1 / (BATCH * LAYERS * WIDTH)), ("vectors", 1 / (BATCH * LAYERS))]
)
def test_patience_equals_the_formula_written_as_loops(normalize: bool, reduction: str, share: float) -> None:
    student, teacher = states()
    expected = naive(student, teacher, normalize) * share
    assert patience(student, teacher, normalize=normalize, reduction=reduction).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("normalize", [True, False])
def test_patience_of_each_example_equals_the_formula_and_other_reductions_are_shares_of_its_mean(normalize: bool) -> None:
    student, teacher = states()
    found = patience(student, teacher, normalize=normalize, reduction="none")
    expected = [naive(student[[row]], teacher[[row]], normalize) for row in range(BATCH)]
    assert found.tolist() == pytest.approx(expected, rel=1e-10)
    for reduction, parts in {"examples": 1, "vectors": LAYERS, "elements": LAYERS * WIDTH}.items():
        value = patience(student, teacher, normalize=normalize, reduction=reduction)
        torch.testing.assert_close(value, found.mean() / parts)


@pytest.mark.parametrize(
    ("normalize", "reduction", "expected"),
    [(True, "sum", 0.08), (True, "vectors", 0.08), (True, "elements", 0.04), (False, "elements", 1.0), (False, "sum", 2.0)],
)
def test_patience_gives_the_numbers_of_the_card(normalize: bool, reduction: str, expected: float) -> None:
    assert patience(STUDENT, TEACHER, normalize=normalize, reduction=reduction).item() == pytest.approx(expected, abs=1e-9)


def test_normalised_patience_is_two_minus_two_cosines() -> None:
    student, teacher = states()
    cosines = torch.nn.functional.cosine_similarity(student, teacher, dim=-1)
    torch.testing.assert_close(patience(student, teacher, reduction="vectors"), (2 - 2 * cosines).mean())


@pytest.mark.parametrize("scales", [(5.0, 1.0), (1.0, 0.1), (3.0, 7.0)])
def test_patience_ignores_scale_only_when_normalised(scales: tuple[float, float]) -> None:
    student, teacher = states()
    scaled = student * scales[0], teacher * scales[1]
    torch.testing.assert_close(patience(*scaled), patience(student, teacher))
    assert patience(*scaled, normalize=False) != pytest.approx(patience(student, teacher, normalize=False).item(), rel=0.01)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reduction", HIDDEN_REDUCTIONS)
def test_patience_vanishes_at_identity(normalize: bool, reduction: str) -> None:
    _, teacher = states()
    student = teacher.clone().requires_grad_()
    loss = patience(student, teacher, normalize=normalize, reduction=reduction).sum()
    loss.backward()
    assert loss.item() == 0
    assert student.grad.abs().max() == 0


def test_zero_vectors_give_a_finite_loss_and_gradient() -> None:
    student = torch.zeros(1, 1, WIDTH, requires_grad=True)
    loss = patience(student, torch.ones(1, 1, WIDTH))
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_gradient_of_normalised_patience_is_orthogonal_to_the_state() -> None:
    student, teacher = states()
    student.requires_grad_()
    patience(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    torch.testing.assert_close((student * student.grad).sum(-1), torch.zeros(BATCH, LAYERS).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("normalize", [True, False])
def test_half_precision_is_widened_before_anything_is_computed(dtype: torch.dtype, normalize: bool) -> None:
    student, teacher = (values.to(dtype) for values in states())
    value = patience(student, teacher, normalize=normalize)
    assert value.dtype == torch.float32
    assert value.item() == patience(student.float(), teacher.float(), normalize=normalize).item()


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher = (values.requires_grad_() for values in states())
    patience(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("shape", [(BATCH, 1, WIDTH), (BATCH, LAYERS, 1), (BATCH, LAYERS + 1, WIDTH), (LAYERS, WIDTH)])
def test_shapes_that_differ_are_refused_not_broadcast(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shape"):
        patience(states()[0], torch.zeros(shape, dtype=torch.float64))


def test_unknown_reduction_is_named() -> None:
    with pytest.raises(ValueError, match="'mean' is not one of elements, vectors, examples, sum"):
        patience(STUDENT, TEACHER, reduction="mean")


@pytest.mark.parametrize("padding", PADDING)
def test_token_error_equals_equation_8_of_tinybert_written_as_loops(padding: str) -> None:
    lengths = (4, 3, 1)
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    ours, theirs = torch.randn(2, BATCH, 4, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for item, length in enumerate(lengths):
        tokens = length if padding == "strict" else 4
        squares = [(ours[item, t, w] - theirs[item, t, w]).item() ** 2 for t in range(tokens) for w in range(WIDTH)]
        found.append(sum(squares) / len(squares))
    assert token_error(ours, theirs, mask, padding).item() == pytest.approx(sum(found) / BATCH, rel=1e-10)
    assert token_error(ours, theirs, mask, padding, "none").tolist() == pytest.approx(found, rel=1e-10)
    with pytest.raises(ValueError, match="'sum' is not one of mean, none"):
        token_error(ours, theirs, mask, padding, "sum")
    with pytest.raises(ValueError, match="'ignore' is not one of strict, reference"):
        token_error(ours, theirs, mask, "ignore")
    with pytest.raises(ValueError, match="shape"):
        token_error(ours, theirs[:, :1], mask, padding)


@pytest.mark.parametrize("padding", PADDING)
def test_gradient_of_each_examples_loss_is_its_own(padding: str) -> None:
    ours, theirs = torch.randn(2, BATCH, 4, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.arange(4) < torch.tensor([4, 3, 1])[:, None]
    ours.requires_grad_()
    weights = torch.tensor([2.0, 0.0, -1.0]).double()
    losses = {
        "tokens": lambda rows: token_error(ours[rows], theirs[rows], mask[rows], padding, "none"),
        "patience": lambda rows: patience(ours[rows], theirs[rows], reduction="none"),
    }
    for loss in losses.values():
        (found,) = torch.autograd.grad((weights * loss(slice(None))).sum(), ours)
        alone = [torch.autograd.grad(loss(slice(row, row + 1)).sum(), ours)[0] for row in range(BATCH)]
        torch.testing.assert_close(found, sum(weight * gradient for weight, gradient in zip(weights, alone, strict=True)))
        assert all(gradient.abs().sum() > 0 for gradient in alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_each_examples_loss_in_half_precision_is_that_of_widened_states(dtype: torch.dtype) -> None:
    ours, theirs = (values.to(dtype) for values in states())
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    for loss in (
        lambda one, other: patience(one, other, reduction="none"),
        lambda one, other: token_error(one, other, mask, reduction="none"),
    ):
        assert loss(ours, theirs).dtype == torch.float32
        assert torch.equal(loss(ours, theirs), loss(ours.float(), theirs.float()))


@pytest.mark.parametrize("size", [1e-42, 1e-20, 1e-6, 1.0, 300.0, 1e25, 3e38])
@pytest.mark.parametrize("norm", [1.0, 2.0])
def test_unit_vectors_have_their_direction_whatever_their_length(size: float, norm: float) -> None:
    vectors = size * torch.tensor([[0.6, -0.8], [0.0, 1.0], [0.0, 0.0]])
    vectors.requires_grad_()
    found = unit(vectors, norm=norm)
    exact = vectors.detach().double()
    exact = exact / exact.norm(p=norm, dim=-1, keepdim=True).clamp(min=1e-300)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)
    if 1e-6 <= size <= 300:
        assert torch.equal(found, torch.nn.functional.normalize(vectors, p=norm, dim=-1)), (
            "ordinary vectors are as torch has them"
        )
        (gradient,) = torch.autograd.grad(found[:, 0].sum(), vectors)
        assert gradient.isfinite().all()
        assert gradient[2].abs().max() <= 2, "zeros are not blown up"
