"""Attributions: the card's numbers, completeness, and maps written as loops."""

import pytest
import torch
from torch import Tensor

from kd.functional.attribution import attributions, map_error, scores, token_maps

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
    total = 0.0
    for view in range(2):
        for example, length in enumerate(lengths):
            one, other = ours[example, :length, view].tolist(), theirs[example, :length, view].tolist()
            sizes = [sum(abs(x) ** norm for x in values) ** (1 / norm) for values in (one, other)]
            for x, y in zip(one, other, strict=True):
                gap = x / sizes[0] - y / sizes[1]
                each = {"l2": gap**2, "l1": abs(gap), "smooth_l1": gap**2 / 2 if abs(gap) < 1 else abs(gap) - 0.5}[distance]
                total += each / (3 * length if reduction == "examples" else sum(lengths))
    found = map_error(ours, theirs, mask, distance, norm, reduction).item()
    assert found == pytest.approx(total, rel=1e-10)


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
        assert tuple(len(scores(cut, cut, target)) for target in ("loss", "logit")) == targets
    losses = -logits.log_softmax(-1).flatten()
    whole = torch.tensor([[0.5, 0.1, -2.0]]).double()
    expected = losses / (1 - whole.softmax(-1).flatten())
    assert [score.item() for score in scores(logits, whole)] == pytest.approx(expected.tolist())
    with pytest.raises(ValueError, match="target 'x'"):
        scores(logits, logits, "x")


def test_the_derivative_of_a_certain_class_is_not_lost() -> None:
    logits = torch.tensor([[40.0, 0.0]], requires_grad=True)
    (score,) = scores(logits, logits.detach())
    assert torch.autograd.grad(score.sum(), logits)[0].flatten().tolist() == pytest.approx([-1.0, 1.0])


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
