"""Samples along a gradient against loops, and the map between word embeddings."""

import math

import pytest
import torch
from torch import Tensor

from kd.functional.ascent import (
    ascend,
    divergence,
    gaussian,
    gradient_by_words,
    noise_like,
    transfer_matrix,
    within,
)

MOVABLE = torch.tensor([[False, True, True, False], [False, True, False, False], [False, False, False, False]])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_one_step_on_a_line_gives_the_numbers_of_the_formula() -> None:
    one, all_of_it = torch.ones(1, 1, 1, dtype=torch.float64), torch.tensor([[True]])

    def ascended(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        student, teacher = x[:, 0], 2 * x[:, 0]
        values = divergence(student, teacher)
        return values.detach(), gradient_by_words(values, [student, teacher], x)

    before, gradient = ascended(one)
    moved = ascend(one, gradient, all_of_it, 0.1)
    after, _ = ascended(moved)
    assert [before.item(), gradient.item(), moved.item()] == pytest.approx([1.0, 2.0, 1.2], abs=1e-12)
    assert after.item() == pytest.approx(1.44, abs=1e-12)


@pytest.mark.parametrize("outputs", ["logits", "probabilities"])
def test_divergence_equals_loops(outputs: str) -> None:
    student, teacher = drawn(3, 4), drawn(3, 4, seed=1)
    for row, value in enumerate(divergence(student, teacher, outputs)):
        a, b = student[row].tolist(), teacher[row].tolist()
        if outputs == "probabilities":
            a, b = ([math.exp(z) / sum(map(math.exp, logits)) for z in logits] for logits in (a, b))
        assert value.item() == pytest.approx(sum((y - x) ** 2 for x, y in zip(a, b, strict=True)), rel=1e-12)


def test_gradient_by_words_equals_autograds_and_differences() -> None:
    weights, words = (drawn(4, 3, seed=2), drawn(4, 3, seed=3)), drawn(2, 5, 4)

    def both(words: Tensor) -> list[Tensor]:
        return [(words @ weight).tanh().sum(dim=1) for weight in weights]

    given = words.clone().requires_grad_()
    logits = both(given)
    gradient = gradient_by_words(divergence(*logits), logits, given)
    again = words.clone().requires_grad_()
    (expected,) = torch.autograd.grad(divergence(*both(again)).sum(), again)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)
    shift = 1e-6 * drawn(2, 5, 4, seed=9)
    change = divergence(*both(words + shift)) - divergence(*both(words - shift))
    torch.testing.assert_close(change, 2 * (gradient * shift).sum(dim=(1, 2)), rtol=1e-6, atol=1e-12)


def test_gradients_of_models_that_nearly_agree_do_not_underflow_in_half_precision() -> None:
    words = torch.ones(1, 1, 2, dtype=torch.float16).requires_grad_()
    student = words.sum(dim=-1) * 2**-10
    teacher = student.detach() + 2**-20
    slope = torch.autograd.grad(divergence(student, teacher).sum(), words, retain_graph=True)[0]
    assert slope.abs().max() < 1e-7  # 2^-19 times 2^-10 is below the smallest number of the type
    student = words.sum(dim=-1) * 2**-10
    found = gradient_by_words(divergence(student.float(), student.detach().float() + 2**-20), [student], words)
    assert found.abs().max().item() == pytest.approx(2**-29, rel=1e-3)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_step_moves_the_movable_tokens_as_loops_do_and_no_other_at_all(normalize: bool) -> None:
    words, gradient = drawn(3, 4, 5), drawn(3, 4, 5, seed=1)
    gradient[:, 3] = math.inf  # what stands at padding is not read
    moved = ascend(words, gradient, MOVABLE, 0.3, normalize=normalize)
    for example in range(3):
        places = [token for token in range(4) if MOVABLE[example, token]]
        square = sum(entry**2 for token in places for entry in gradient[example, token].tolist())
        factor = 0.3 * (math.sqrt(len(places) / square) if normalize and places else 1)
        for token in range(4):
            own, slope = words[example, token], gradient[example, token]
            expected = [x + factor * g if token in places else x for x, g in zip(own.tolist(), slope.tolist(), strict=True)]
            assert moved[example, token].tolist() == pytest.approx(expected, rel=1e-12)
            assert token in places or torch.equal(moved[example, token], own)
    if normalize:
        lengths = torch.linalg.vector_norm(moved - words, dim=-1).square().sum(dim=1) / MOVABLE.sum(dim=1)
        assert lengths[:2].sqrt().tolist() == pytest.approx([0.3, 0.3], rel=1e-12)


def test_a_gradient_of_zeros_moves_nothing() -> None:
    words = drawn(3, 4, 5)
    for normalize in (True, False):
        assert torch.equal(ascend(words, torch.zeros_like(words), MOVABLE, 0.3, normalize=normalize), words)


def test_a_shift_beyond_the_radius_is_cut_to_it_and_a_shorter_one_is_not() -> None:
    start = drawn(3, 4, 5)
    near, far = (start + size * drawn(3, 4, 5, seed=1).masked_fill(~MOVABLE[..., None], 0) for size in (1e-3, 10.0))
    torch.testing.assert_close(within(near, start, MOVABLE, 0.5), near, rtol=0, atol=1e-15)
    cut = within(far, start, MOVABLE, 0.5) - start
    for example, count in ((0, 2), (1, 1)):
        square = sum(entry**2 for entry in cut[example].flatten().tolist())
        assert math.sqrt(square / count) == pytest.approx(0.5, rel=1e-12)
        ratio = cut[example][MOVABLE[example]] / (far - start)[example][MOVABLE[example]]
        torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio))
    assert torch.equal(cut[2], torch.zeros(4, 5, dtype=torch.float64))


def test_noise_has_the_norm_of_the_shift_and_its_own_direction() -> None:
    shift, noise = drawn(3, 4, 5).masked_fill(~MOVABLE[..., None], 0), drawn(3, 4, 5, seed=1)
    found = noise_like(shift, noise, MOVABLE)
    torch.testing.assert_close(found.flatten(1).norm(dim=1), shift.flatten(1).norm(dim=1))
    assert torch.equal(found[~MOVABLE], torch.zeros_like(found[~MOVABLE]))
    ratio = found[0, 1] / noise[0, 1]
    torch.testing.assert_close(ratio, ratio[:1].expand(5))
    assert torch.equal(noise_like(torch.zeros_like(shift), noise, MOVABLE), torch.zeros_like(shift))


def test_uniform_numbers_become_standard_normal_ones() -> None:
    ends = gaussian(torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64))
    assert ends.isfinite().all()
    assert ends[0] < -8
    found = gaussian((torch.arange(10000, dtype=torch.float64) + 0.5) / 10000)
    assert [found.mean().item(), found.std().item()] == pytest.approx([0, 1], abs=1e-3)


def test_the_transfer_matrix_is_the_map_there_is() -> None:
    student, map_ = drawn(50, 6), drawn(9, 6, seed=1)
    assert torch.equal(transfer_matrix(student, student.clone()), torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(transfer_matrix(student, student @ map_.T, ridge=0), map_, rtol=0, atol=1e-12)
    near = transfer_matrix(student, student @ map_.T)
    assert 1e-8 < float((near - map_).abs().max()) < 1e-5  # the default's ridge
    almost = student + 1e-9 * drawn(50, 6, seed=2)
    torch.testing.assert_close(transfer_matrix(student, almost, 1e-9), torch.eye(6).double(), rtol=0, atol=1e-6)


def test_the_transfer_matrix_equals_the_formula_in_columns() -> None:
    student, teacher = drawn(50, 6), drawn(50, 9, seed=1)
    ours, theirs = student.T, teacher.T  # W_S and W_T, (width, vocabulary)
    expected = theirs @ ours.T @ torch.linalg.inv(ours @ ours.T)
    torch.testing.assert_close(transfer_matrix(student, teacher, ridge=0), expected, rtol=0, atol=1e-12)
    residual = teacher - student @ transfer_matrix(student, teacher, ridge=0).T
    torch.testing.assert_close(student.T @ residual, torch.zeros(6, 9).double(), rtol=0, atol=1e-10)  # least squares
    rho = 0.5 * (ours @ ours.T).trace() / 6
    expected = theirs @ ours.T @ torch.linalg.inv(ours @ ours.T + rho * torch.eye(6).double())
    torch.testing.assert_close(transfer_matrix(student, teacher, ridge=0.5), expected, rtol=0, atol=1e-12)


def test_a_ridge_makes_a_table_of_low_rank_invertible() -> None:
    student = drawn(50, 2) @ drawn(2, 6, seed=1)
    teacher = student @ drawn(9, 6, seed=2).T
    torch.testing.assert_close(student @ transfer_matrix(student, teacher).T, teacher, rtol=0, atol=1e-3)


def test_other_shapes_and_words_are_refused() -> None:
    with pytest.raises(ValueError, match="5 and 4 words"):
        transfer_matrix(drawn(5, 2), drawn(4, 2))
    with pytest.raises(ValueError, match="differ in shape"):
        divergence(drawn(5, 2), drawn(5, 3))
    with pytest.raises(ValueError, match="not one of"):
        divergence(drawn(5, 2), drawn(5, 2), "scores")
