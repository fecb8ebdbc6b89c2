"""Hints and activation maps: as loops, over what is published, and what changes nothing."""

import math

import pytest
import torch
from torch import Tensor

from kd.functional.activation import activation_error, activation_map, hint_error

LENGTHS = (5, 3, 1)
MASK = torch.arange(5) < torch.tensor(LENGTHS)[:, None]


def states(width: int, seed: int = 0) -> Tensor:
    return torch.randn(3, 5, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_map(example: Tensor, length: int, power: float) -> list[float]:
    values = [sum(abs(x) ** power for x in example[token].tolist()) for token in range(length)]
    norm = math.sqrt(sum(value**2 for value in values))
    return [value / norm for value in values]


@pytest.mark.parametrize("power", [1.0, 2.0, 3.5])
def test_activation_error_equals_equation_2_written_as_loops(power: float) -> None:
    student, teacher = states(4), states(6, seed=1)
    norms, squares, means = [], [], []
    for example, length in enumerate(LENGTHS):
        pairs = zip(*(naive_map(each[example], length, power) for each in (student, teacher)), strict=True)
        total = sum((ours - theirs) ** 2 for ours, theirs in pairs)
        norms.append(math.sqrt(total))
        squares.append(total)
        means.append(total / length)
    for reduction, values in (("norm", norms), ("squares", squares), ("elements", means)):
        found = activation_error(student, teacher, MASK, power, reduction)
        assert found.item() == pytest.approx(sum(values) / 3, rel=1e-12)
    torch.testing.assert_close(activation_error(student, teacher, MASK, power, "none").tolist(), squares)


def test_activation_error_of_images_of_one_size_is_the_authors() -> None:
    student, teacher, mask = states(4), states(6, seed=1), torch.ones(3, 5).bool()

    def at(x: Tensor) -> Tensor:  # (images, channels, positions)
        q = x.pow(2).mean(1)
        return q / q.pow(2).sum(1, keepdim=True).sqrt()

    expected = (at(student.transpose(1, 2)) - at(teacher.transpose(1, 2))).pow(2).mean()
    torch.testing.assert_close(activation_error(student, teacher, mask), expected)


def test_worked_number_of_two_positions() -> None:
    ours, theirs = (torch.tensor(values).double()[None, :, None] for values in ([1.0, 2.0], [2.0, 1.0]))
    mask = torch.ones(1, 2).bool()
    torch.testing.assert_close(activation_map(ours, mask).tolist(), [[0.24254, 0.97014]], rtol=0, atol=5e-6)
    for reduction, value in (("elements", 0.529412), ("squares", 2 * 0.529412), ("norm", math.sqrt(2 * 0.529412))):
        assert activation_error(ours, theirs, mask, 2.0, reduction).item() == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("scale", [1e-20, 7.0, 1e20])
def test_states_of_another_scale_have_the_same_map(scale: float) -> None:
    for power in (1.0, 2.0, 8.0):
        plain = activation_map(states(4), MASK, power)
        torch.testing.assert_close(activation_map(states(4).float() * scale, MASK, power), plain.float())


def test_padding_has_no_part_in_a_map() -> None:
    padded = states(4).masked_fill(~MASK[..., None], 1e6)
    assert torch.equal(activation_map(padded, MASK), activation_map(states(4), MASK))
    assert (activation_map(padded, MASK)[~MASK] == 0).all()
    assert activation_map(padded, MASK)[2].tolist() == [1, 0, 0, 0, 0]  # a text of one token


def test_states_of_zeros_have_a_finite_gradient() -> None:
    zeros = torch.zeros(3, 5, 4, requires_grad=True)
    for reduction in ("elements", "squares", "norm"):
        error = activation_error(zeros, states(4), MASK, reduction=reduction)
        (gradient,) = torch.autograd.grad(error, zeros)
        assert gradient.isfinite().all()


def test_hint_error_equals_equation_3_written_as_loops() -> None:
    student, teacher = states(4), states(4, seed=1)
    sums = []
    for example, length in enumerate(LENGTHS):
        rows = [zip(student[example, token].tolist(), teacher[example, token].tolist(), strict=True) for token in range(length)]
        sums.append(sum((x - y) ** 2 for row in rows for x, y in row))
    for reduction, parts in (("examples", (1, 1, 1)), ("vectors", LENGTHS), ("elements", [4 * n for n in LENGTHS])):
        expected = sum(total / part for total, part in zip(sums, parts, strict=True)) / 3
        assert hint_error(student, teacher, MASK, reduction).item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(hint_error(student, teacher, MASK, "none").tolist(), sums)


@pytest.mark.parametrize("loss", [hint_error, activation_error])
def test_no_gradient_flows_to_the_teacher_and_padding_gets_none(loss: object) -> None:
    student, teacher = (states(4, seed).requires_grad_() for seed in (0, 1))
    loss(student, teacher, MASK).backward()
    assert teacher.grad is None
    assert (student.grad[~MASK] == 0).all()
    assert (student.grad[MASK][:-1] != 0).any(dim=-1).all()


def test_shapes_and_words_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        hint_error(states(4), states(6), MASK)
    with pytest.raises(ValueError, match="differ in shape"):
        activation_error(states(4), states(4)[:, :2], MASK)
    for loss in (hint_error, activation_error):
        with pytest.raises(ValueError, match="not one of"):
            loss(states(4), states(4), MASK, reduction="mean")
