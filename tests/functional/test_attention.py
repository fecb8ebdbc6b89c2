"""Losses between attention maps: the card's numbers, the formulas as loops, and what must hold for any scores."""

import math
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from kd.functional.attention import (
    DIRECTIONS,
    attention_divergence,
    mean_distribution,
    probability_error,
    score_error,
)
from kd.functional.hidden import PADDING

BATCH, HEADS, TOKENS, LENGTHS = 3, 2, 4, (4, 3, 1)
MASK = torch.arange(TOKENS) < torch.tensor(LENGTHS)[:, None]
Loss = Callable[..., torch.Tensor]


def scores(seed: int = 0, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(scale * torch.randn(2, BATCH, HEADS, TOKENS, TOKENS, generator=generator, dtype=torch.float64))


def softmax(row: list[float], length: int) -> list[float]:
    """Over the first `length` keys; nothing on the others."""
    powers = [math.exp(value) for value in row[:length]]
    return [power / sum(powers) for power in powers] + [0.0] * (len(row) - length)


def probabilities(values: torch.Tensor) -> torch.Tensor:
    rows = [[[softmax(row, n) for row in head] for head in item] for item, n in zip(values.tolist(), LENGTHS, strict=True)]
    return torch.tensor(rows, dtype=torch.float64)


def naive_squares(ours: torch.Tensor, theirs: torch.Tensor, padding: str) -> list[float]:
    """Mean squared error of each example, by hand."""
    found = []
    for item, length in enumerate(LENGTHS):
        tokens = length if padding == "strict" else TOKENS
        squares = [
            (ours[item, h, q, k].item() - theirs[item, h, q, k].item()) ** 2
            for h in range(HEADS)
            for q in range(tokens)
            for k in range(tokens)
        ]
        found.append(sum(squares) / len(squares))
    return found


def naive_divergence(ours: torch.Tensor, theirs: torch.Tensor, direction: str, padding: str) -> list[float]:
    """Divergence of the rows of each example, by hand: summed over keys, mean over heads and rows."""
    found = []
    for item, length in enumerate(LENGTHS):
        rows = []
        for head in range(HEADS):
            for query in range(length if padding == "strict" else TOKENS):
                p, q = (softmax(values[item, head, query].tolist(), length) for values in (theirs, ours))
                if direction == "reverse":
                    p, q = q, p
                rows.append(sum(a * math.log(a / b) for a, b in zip(p[:length], q[:length], strict=True)))
        found.append(sum(rows) / len(rows))
    return found


def equal_naive(loss: Loss, ours: torch.Tensor, theirs: torch.Tensor, expected: list[float], **options: str) -> None:
    """The losses of examples, and their mean."""
    assert loss(ours, theirs, MASK, **options, reduction="none").tolist() == pytest.approx(expected, rel=1e-10)
    assert loss(ours, theirs, MASK, **options).item() == pytest.approx(sum(expected) / BATCH, rel=1e-10)


def card(values: list[list[float]]) -> torch.Tensor:
    return torch.tensor([[values]], dtype=torch.float64)


@pytest.mark.parametrize("masked", [-1e4, 5.0], ids=["marked", "raw"])
@pytest.mark.parametrize(("padding", "expected"), [("reference", 1.25), ("strict", 1.0)])
def test_score_error_gives_the_numbers_of_the_card(padding: str, expected: float, masked: float) -> None:
    ours, theirs = card([[1, masked], [3, masked]]), card([[0, 2 * masked], [1, masked]])
    mask = torch.tensor([[True, False]])
    assert score_error(ours, theirs, mask, padding).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("padding", "expected"), [("reference", 1 + 3**2 + 2**2 + 0), ("strict", 1 + 103**2 + 2**2 + 40**2)])
def test_scores_that_look_masked_are_taken_for_it_by_the_reference_alone(padding: str, expected: float) -> None:
    ours, theirs = card([[1, -100], [3, -110]]), card([[0, 3], [1, -150]])
    found = score_error(ours, theirs, torch.ones(1, 2).bool(), padding)
    assert found.item() == pytest.approx(expected / 4, abs=1e-12)


@pytest.mark.parametrize("padding", PADDING)
def test_divergence_gives_the_numbers_of_the_card(padding: str) -> None:
    ours, theirs = card([[0, 0], [0, 0]]), card([[1, 0], [0, 0]])
    whole = torch.ones(1, 2).bool()
    assert attention_divergence(ours, theirs, whole, padding=padding).item() == pytest.approx(0.055472, abs=1e-6)
    first = attention_divergence(ours[:, :, :1].expand_as(ours), theirs[:, :, :1].expand_as(ours), whole)
    assert first.item() == pytest.approx(0.110944, abs=1e-6)
    parts = F.kl_div(ours.log_softmax(-1), theirs.softmax(-1), reduction="none")
    assert parts.mean().item() == pytest.approx(0.027736, abs=1e-6)  # torch's own `mean`, which divides by the keys as well


@pytest.mark.parametrize("padding", PADDING)
def test_squared_errors_equal_the_formula_written_as_loops(padding: str) -> None:
    ours, theirs = scores()
    real = MASK[:, None, None, :].expand_as(ours)
    shown = [torch.where(real, values, 0.0) for values in (ours, theirs)]
    equal_naive(score_error, ours, theirs, naive_squares(*shown, padding), padding=padding)
    shown = [probabilities(values) for values in (ours, theirs)]
    equal_naive(probability_error, *shown, naive_squares(*shown, padding), padding=padding)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_divergence_equals_the_formula_written_as_loops(direction: str, padding: str) -> None:
    ours, theirs = scores()
    expected = naive_divergence(ours, theirs, direction, padding)
    equal_naive(attention_divergence, ours, theirs, expected, direction=direction, padding=padding)


def test_one_direction_is_the_other_with_the_sides_changed() -> None:
    ours, theirs = scores()
    forward, reverse = (attention_divergence(ours, theirs, MASK, direction) for direction in DIRECTIONS)
    assert forward.item() != pytest.approx(reverse.item(), rel=0.01)
    assert attention_divergence(theirs, ours, MASK, "reverse").item() == pytest.approx(forward.item(), rel=1e-12)


def test_a_constant_on_a_row_changes_the_error_of_scores_and_no_divergence() -> None:
    ours, theirs = scores()
    moved = ours + torch.arange(TOKENS).double()[:, None]
    assert score_error(moved, theirs, MASK).item() != pytest.approx(score_error(ours, theirs, MASK).item(), rel=0.01)
    for direction in DIRECTIONS:
        before, after = (attention_divergence(each, theirs, MASK, direction).item() for each in (ours, moved))
        assert after == pytest.approx(before, rel=1e-10)


def losses() -> list[tuple[str, Loss]]:
    """Every loss as a function of scores, mask, padding and reduction."""

    def of_probabilities(ours: torch.Tensor, theirs: torch.Tensor, mask: torch.Tensor, *reductions: str) -> torch.Tensor:
        lowest = torch.finfo(ours.dtype).min
        ours, theirs = (each.masked_fill(~mask[:, None, None, :], lowest).softmax(-1) for each in (ours, theirs))
        return probability_error(ours, theirs, mask, *reductions)

    def reverse(ours: torch.Tensor, theirs: torch.Tensor, mask: torch.Tensor, *reductions: str) -> torch.Tensor:
        return attention_divergence(ours, theirs, mask, "reverse", *reductions)

    def forward(ours: torch.Tensor, theirs: torch.Tensor, mask: torch.Tensor, *reductions: str) -> torch.Tensor:
        return attention_divergence(ours, theirs, mask, "forward", *reductions)

    return [("scores", score_error), ("probabilities", of_probabilities), ("forward", forward), ("reverse", reverse)]


each_loss = pytest.mark.parametrize("loss", [loss for _, loss in losses()], ids=[name for name, _ in losses()])


@each_loss
@pytest.mark.parametrize("padding", PADDING)
def test_loss_vanishes_at_identity_with_its_gradient_and_is_positive_elsewhere(loss: Loss, padding: str) -> None:
    ours, theirs = scores()
    at = theirs.clone().requires_grad_()
    value = loss(at, theirs, MASK, padding)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert at.grad.abs().max() < 1e-12
    assert loss(ours, theirs, MASK, padding) > 0


@each_loss
def test_strict_loss_does_not_see_padding(loss: Loss) -> None:
    ours, theirs = scores()
    expected = loss(ours, theirs, MASK).item()
    for junk in (0.0, 1e30, -1e30):
        real = (MASK[:, :, None] & MASK[:, None, :])[:, None].expand_as(ours)
        other = [torch.where(real, values, junk * sign) for values, sign in ((ours, 1), (theirs, -1))]
        assert loss(*other, MASK).item() == pytest.approx(expected, rel=1e-12)
    wider = [F.pad(values, (0, 2, 0, 2), value=7.0) for values in (ours, theirs)]
    assert loss(*wider, F.pad(MASK, (0, 2))).item() == pytest.approx(expected, rel=1e-12)
    alone = [loss(ours[[n], :, :k, :k], theirs[[n], :, :k, :k], MASK[[n], :k]).item() for n, k in enumerate(LENGTHS)]
    assert expected == pytest.approx(sum(alone) / len(alone), rel=1e-12)  # nor the other examples


@each_loss
@pytest.mark.parametrize("padding", PADDING)
def test_padded_keys_get_exactly_no_gradient(loss: Loss, padding: str) -> None:
    ours, theirs = scores()
    ours.requires_grad_()
    loss(ours, theirs, MASK, padding).backward()
    padded = ~MASK[:, None, None, :].expand_as(ours)
    assert ours.grad[padded].abs().max() == 0
    real = (MASK[:, :, None] & MASK[:, None, :])[:, None].expand_as(ours)
    real = real & (MASK.sum(1) > 1)[:, None, None, None]  # of one key there is one distribution
    assert ours.grad[real].abs().min() > 0


@each_loss
def test_no_gradient_reaches_the_teacher(loss: Loss) -> None:
    ours, theirs = (values.requires_grad_() for values in scores())
    loss(ours, theirs, MASK).backward()
    assert theirs.grad is None
    assert ours.grad.abs().sum() > 0


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_loss_and_gradient_are_finite_for_sharp_rows_in_any_precision(loss: Loss, dtype: torch.dtype, scale: float) -> None:
    ours, theirs = (values.to(dtype) for values in scores(scale=scale))  # at 300 most probabilities are 0
    ours.requires_grad_()
    for padding in PADDING:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            value = loss(ours, theirs, MASK, padding)
        value.backward()
        assert value.dtype == torch.float32
        assert value.isfinite()
        assert ours.grad.isfinite().all()
        assert ours.grad.abs().sum() > 0 or (scale > 1 and loss is not score_error)


@each_loss
def test_gradient_is_the_slope(loss: Loss) -> None:
    ours, theirs = scores(scale=1.0)
    ours.requires_grad_()
    for padding in PADDING:
        assert torch.autograd.gradcheck(lambda values, padding=padding: loss(values, theirs, MASK, padding), (ours,))


@each_loss
@pytest.mark.parametrize("padding", PADDING)
def test_gradient_of_each_examples_loss_is_its_own(loss: Loss, padding: str) -> None:
    ours, theirs = scores(scale=1.0)
    ours.requires_grad_()
    weights = torch.tensor([2.0, 0.0, -1.0]).double()
    (found,) = torch.autograd.grad((weights * loss(ours, theirs, MASK, padding, "none")).sum(), ours)
    rows = [[row] for row in range(BATCH)]
    losses = [loss(ours[row], theirs[row], MASK[row], padding, "none").sum() for row in rows]
    alone = [torch.autograd.grad(value, ours)[0] for value in losses]
    torch.testing.assert_close(found, sum(weight * gradient for weight, gradient in zip(weights, alone, strict=True)))
    assert alone[0].abs().sum() > 0


@each_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_each_examples_loss_in_half_precision_is_that_of_widened_scores(loss: Loss, dtype: torch.dtype) -> None:
    ours, theirs = (values.to(dtype) for values in scores())
    found = [loss(*each, MASK, "strict", "none") for each in ((ours, theirs), (ours.float(), theirs.float()))]
    assert found[0].dtype == torch.float32
    # Probabilities are rounded to half precision before the error sees them.
    units = torch.finfo(dtype).eps if "of_probabilities" in loss.__name__ else 0.0
    torch.testing.assert_close(*found, rtol=16 * units, atol=0)


@pytest.mark.parametrize("function", [score_error, probability_error, attention_divergence])
@pytest.mark.parametrize("shape", [(BATCH, 1, TOKENS, TOKENS), (BATCH, HEADS, TOKENS, 1), (1, HEADS, TOKENS, TOKENS)])
def test_shapes_that_differ_are_refused_not_broadcast(function: Loss, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shape"):
        function(scores()[0], torch.zeros(shape, dtype=torch.float64), MASK)


@pytest.mark.parametrize("function", [score_error, probability_error, attention_divergence])
def test_unknown_words_are_named(function: Loss) -> None:
    with pytest.raises(ValueError, match="'ignore' is not one of strict, reference"):
        function(*scores(), MASK, padding="ignore")
    for padding in PADDING:
        with pytest.raises(ValueError, match="'sum' is not one of mean, none"):
            function(*scores(), MASK, padding=padding, reduction="sum")
    with pytest.raises(ValueError, match="'both' is not one of forward, reverse"):
        attention_divergence(*scores(), MASK, "both")


def test_softmax_of_a_mean_distribution_is_the_mean_of_the_probabilities() -> None:
    layers = [*scores(), *scores(1)]
    found = mean_distribution(layers, MASK)
    expected = torch.stack([probabilities(each) for each in layers]).mean(dim=0)
    torch.testing.assert_close(found.exp(), expected)
    torch.testing.assert_close(found.masked_fill(~MASK[:, None, None, :], -math.inf).softmax(-1), expected)
    mean_of_scores = torch.stack(layers).mean(dim=0)
    assert (probabilities(mean_of_scores) - expected).abs().max() > 0.01


def test_mean_distribution_of_alike_layers_is_that_of_one() -> None:
    ours, theirs = scores()
    for direction in DIRECTIONS:
        one = attention_divergence(ours, theirs, MASK, direction)
        several = attention_divergence(ours, mean_distribution([theirs] * 3, MASK), MASK, direction)
        torch.testing.assert_close(several, one)


def test_mean_distribution_of_keys_that_no_layer_looks_at_stays_finite() -> None:
    sharp = [values.float() for values in scores(scale=300.0)]
    found = mean_distribution(sharp, MASK)
    assert (found.exp() == 0).any()
    assert found[MASK[:, None, None, :].expand_as(found)].isfinite().all()
    for direction in DIRECTIONS:
        assert attention_divergence(torch.zeros_like(found), found, MASK, direction).isfinite()
    half = mean_distribution([values.bfloat16() for values in sharp], MASK)
    assert half.dtype == torch.float32
