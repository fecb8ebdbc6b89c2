"""Attributions: the card's numbers, completeness, and maps written as loops."""

import decimal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kd.functional.attribution import attributions, map_error, scores, token_maps
from kd.functional.hidden import unit

WEIGHT = torch.tensor([3.0, 1.0]).double()
STATES = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]]).double()
TEACHER = torch.tensor([[[3.0], [2.0], [0.0]]]).double()
STUDENT = torch.tensor([[[0.6], [0.8], [0.0]]]).double()
REAL = torch.tensor([[True, True, False]])


def one_pass(states: Tensor) -> tuple[Tensor, Tensor]:
    at = states.clone().requires_grad_()
    return (at @ WEIGHT).sum(dim=1, keepdim=True), at


def test_a_linear_score_is_attributed_as_the_card_says() -> None:
    maps = token_maps(attributions([one_pass(STATES)]))
    assert torch.equal(maps, TEACHER)
    assert torch.nn.functional.normalize(maps, dim=1).flatten().tolist() == pytest.approx([0.83205, 0.55470, 0.0], abs=1e-5)


def test_map_errors_are_the_numbers_of_the_card() -> None:
    assert map_error(STUDENT, TEACHER, REAL, reduction="tokens").item() == pytest.approx(0.0570097, abs=1e-7)
    assert map_error(STUDENT, TEACHER, REAL).item() == pytest.approx(0.0570097, abs=1e-7)
    assert map_error(STUDENT, TEACHER, REAL, reduction="norm").item() == pytest.approx(0.3376675, abs=1e-7)


def test_a_factor_of_the_score_changes_no_error() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.rand(2, 3, 4, generator=generator).double() for _ in range(2))
    mask = torch.ones(2, 3).bool()
    for reduction in ("examples", "tokens", "norm"):
        one, other = (map_error(ours, theirs * factor, mask, reduction=reduction).item() for factor in (1.0, 1e-3))
        assert one == pytest.approx(other, rel=1e-12)


@pytest.mark.parametrize("norm", [1.0, 2.0])
@pytest.mark.parametrize("distance", ["l2", "l1", "smooth_l1"])
@pytest.mark.parametrize("reduction", ["examples", "tokens"])
def test_map_errors_equal_loops(norm: float, distance: str, reduction: str) -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = [5, 2, 3]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    ours, theirs = (torch.rand(3, 5, 2, generator=generator).double() * mask[..., None] for _ in range(2))
    total, by_example = 0.0, [0.0] * 3
    for view in range(2):
        for example, length in enumerate(lengths):
            one, other = ours[example, :length, view].tolist(), theirs[example, :length, view].tolist()
            sizes = [sum(abs(x) ** norm for x in values) ** (1 / norm) for values in (one, other)]
            for x, y in zip(one, other, strict=True):
                gap = x / sizes[0] - y / sizes[1]
                each = {"l2": gap**2, "l1": abs(gap), "smooth_l1": gap**2 / 2 if abs(gap) < 1 else abs(gap) - 0.5}[distance]
                total += each / (3 * length if reduction == "examples" else sum(lengths))
                by_example[example] += each / length
    found = map_error(ours, theirs, mask, distance, norm, reduction).item()
    assert found == pytest.approx(total, rel=1e-10)
    assert map_error(ours, theirs, mask, distance, norm, "none").tolist() == pytest.approx(by_example, rel=1e-10)


def test_only_the_largest_entries_of_a_token_count() -> None:
    attributed = torch.tensor([3.0, -4.0, 1.0]).double()[None, None, :, None]
    assert token_maps(attributed, keep=2).item() == pytest.approx(5.0)
    assert token_maps(attributed, keep=1).item() == pytest.approx(4.0)
    assert token_maps(attributed).item() == pytest.approx(26**0.5)


@pytest.mark.parametrize(("steps", "tolerance"), [(20, 2e-2), (400, 1e-3)])
def test_attributions_add_up_to_the_difference_of_the_score(steps: int, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(2)
    inner, outer = (torch.randn(4, 3, generator=generator).double(), torch.randn(4, generator=generator).double())
    states = torch.randn(1, 2, 3, generator=generator).double()

    def score(at: Tensor) -> Tensor:
        return torch.tanh(at @ inner.T).sum(dim=1) @ outer[:, None]

    passes = []
    for step in range(1, steps + 1):
        at = (states * step / steps).requires_grad_()
        passes.append((score(at), at))
    total = attributions(passes).sum().item()
    assert total == pytest.approx((score(states) - score(0 * states)).item(), abs=tolerance)


def test_views() -> None:
    logits = torch.tensor([[1.0, 2.0, 4.0]]).double()
    for classes, targets in ((1, (1, 1)), (2, (1, 2)), (3, (3, 3))):
        cut = logits[:, :classes]
        assert tuple(len(scores(cut, target)) for target in ("loss", "logit")) == targets
    losses = -logits.log_softmax(-1).flatten()
    assert [float(F.softplus(against)) for against in scores(logits)] == pytest.approx(losses.tolist())
    with pytest.raises(ValueError, match="target 'x'"):
        scores(logits, "x")


SLOPES, BENDS = torch.tensor([1.0, -0.5]), torch.tensor([-1.0, 1.5])
BENT = torch.tensor([[[0.5, 0.25], [0.125, 0.75], [0.0, 0.0]]])


def bent(margin: float, steps: int, kind: torch.dtype, flipped: bool = False, **arguments: object) -> Tensor:
    """Attributions of two classes whose difference is a quadratic function of the states, so that its passes disagree."""
    passes = []
    for step in range(1, steps + 1):
        at = (BENT.to(kind) * (step / steps)).requires_grad_()
        of_first = (margin * (at * SLOPES.to(kind) + at**2 * BENDS.to(kind))).sum(dim=(1, 2))
        logits = torch.stack([of_first, torch.zeros_like(of_first)], dim=-1)
        passes.append((logits.flip(-1) if flipped else logits, at))
    return attributions(passes, **arguments)


def exact_map(margin: float, steps: int) -> Tensor:
    """The normalised map of the first class in sixty decimals: -log p has the derivative -1 / (1 + exp(x)) by the margin x."""
    with decimal.localcontext(prec=60, Emin=-(10**9), Emax=10**9):
        states = [[decimal.Decimal(value) for value in token] for token in BENT[0].tolist()]
        slopes, bends = ([decimal.Decimal(margin) * decimal.Decimal(v) for v in each.tolist()] for each in (SLOPES, BENDS))
        totals = [[decimal.Decimal(0)] * 2 for _ in states]
        for step in range(1, steps + 1):
            at = [[value * step / steps for value in token] for token in states]
            x = sum(v * a + v * v * b for token in at for v, a, b in zip(token, slopes, bends, strict=True))
            weight = 1 / (1 + x.exp())
            for total, token in zip(totals, at, strict=True):
                total[:] = [t + weight * (a + 2 * v * b) for t, v, a, b in zip(total, token, slopes, bends, strict=True)]
        pairs = zip(states, totals, strict=True)
        lengths = [sum((v * t) ** 2 for v, t in zip(token, total, strict=True)).sqrt() for token, total in pairs]
        norm = sum(length**2 for length in lengths).sqrt()
        return torch.tensor([float(length / norm) for length in lengths], dtype=torch.float64)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("margin", [1.0, 23.0, 120.0, 800.0, 1e4])
@pytest.mark.parametrize("sign", [1, -1], ids=["certain", "wrong"])
def test_maps_of_any_margin_are_those_of_exact_arithmetic(sign: int, margin: float, steps: int) -> None:
    for kind in (torch.float32, torch.float64):
        maps = token_maps(bent(sign * margin, steps, kind))
        # The model's own logits are rounded to a part of the margin, and the weight of a pass, an exponential, by as much.
        bound = 8 * torch.finfo(kind).eps * max(margin, 1.0)
        torch.testing.assert_close(unit(maps[0, :, 0], dim=0).double(), exact_map(sign * margin, steps), rtol=0, atol=bound)
    for kind in (torch.float16, torch.bfloat16):
        maps = token_maps(bent(sign * margin, steps, kind))
        assert maps.dtype == torch.float32
        assert maps.isfinite().all()
        assert float(unit(maps, dim=1).detach().square().sum()) == pytest.approx(1)


@pytest.mark.parametrize("margin", [1.0, 23.0, 800.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_second_derivatives_are_those_of_finite_differences(margin: float, steps: int) -> None:
    def error(scale: Tensor) -> Tensor:
        passes = []
        for step in range(1, steps + 1):
            at = (BENT.double() * (step / steps)).requires_grad_()
            of_first = (margin * (at * SLOPES * scale + at**2 * BENDS)).sum(dim=(1, 2))
            passes.append((torch.stack([of_first, torch.zeros_like(of_first)], dim=-1), at))
        return map_error(token_maps(attributions(passes, create_graph=True)), TEACHER, REAL)

    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    error(scale).backward()
    around = [error(scale.detach() + shift).item() for shift in (1e-6, -1e-6)]
    assert scale.grad.item() == pytest.approx((around[0] - around[1]) / 2e-6, rel=1e-5)
    assert scale.grad.abs() > 1e-4


def test_the_loss_of_either_of_two_classes_can_be_attributed() -> None:
    for steps in (1, 4):
        maps = [unit(token_maps(bent(3.0, steps, torch.float64, first=first)), dim=1) for first in (0, 1)]
        assert torch.equal(maps[1], unit(token_maps(bent(3.0, steps, torch.float64, flipped=True)), dim=1))
        assert torch.allclose(*maps, atol=1e-9) == (steps == 1)


def test_padding_has_a_finite_second_derivative() -> None:
    states = (STATES * torch.tensor([1.0, 1.0, 0.0])[:, None]).requires_grad_()
    weight = WEIGHT.clone().requires_grad_()
    logits = torch.tanh(states @ weight).sum(dim=1, keepdim=True)
    error = map_error(token_maps(attributions([(logits, states)], create_graph=True)), TEACHER, REAL)
    error.backward()
    assert torch.isfinite(weight.grad).all()
    assert weight.grad.abs().sum() > 0


def test_words_and_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="reduction 'sum'"):
        map_error(STUDENT, TEACHER, REAL, reduction="sum")
    with pytest.raises(ValueError, match="distance 'l3'"):
        map_error(STUDENT, TEACHER, REAL, distance="l3")
    with pytest.raises(ValueError, match="differ in shape"):
        map_error(STUDENT, TEACHER[:, :2], REAL)
