"""Similarities, distances and angles of the examples of a batch: as loops, over what is published, and what changes nothing."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kd.functional.geometry import (
    angle_error,
    angles,
    distance_error,
    mean_of_tokens,
    relative_distances,
    similarities,
    similarity_error,
)

ERRORS = (similarity_error, distance_error, angle_error)
LINE = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]).double()
CORNER = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).double()


def rows(width: int, seed: int = 0, count: int = 5) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turned(vectors: Tensor) -> Tensor:
    """The vectors, turned, stretched and shifted."""
    turn, _ = torch.linalg.qr(rows(vectors.shape[1], seed=9, count=vectors.shape[1]))
    return vectors @ turn * 5 + 7


def dot(one: list[float], other: list[float]) -> float:
    return sum(x * y for x, y in zip(one, other, strict=True))


def minus(one: list[float], other: list[float]) -> list[float]:
    return [x - y for x, y in zip(one, other, strict=True)]


def huber(difference: float) -> float:
    return difference**2 / 2 if abs(difference) < 1 else abs(difference) - 0.5


def naive_similarities(vectors: list[list[float]]) -> list[list[float]]:
    gram = [[dot(one, other) for other in vectors] for one in vectors]
    return [[value / math.sqrt(dot(row, row)) for value in row] for row in gram]


def naive_distances(vectors: list[list[float]]) -> list[list[float]]:
    found = [[math.sqrt(dot(minus(one, other), minus(one, other))) for other in vectors] for one in vectors]
    pairs = len(vectors) * (len(vectors) - 1)
    mean = sum(map(sum, found)) / pairs
    return [[value / mean for value in row] for row in found]


def naive_cosine(i: list[float], j: list[float], k: list[float]) -> float:
    one, other = minus(i, j), minus(k, j)
    sizes = math.sqrt(dot(one, one) * dot(other, other))
    return dot(one, other) / sizes if sizes else 0.0


def naive_angles(vectors: list[list[float]]) -> list[list[float]]:
    return [[naive_cosine(i, j, k) for i in vectors for k in vectors] for j in vectors]


NAIVE: dict[Callable[..., Tensor], tuple[Callable[..., list[list[float]]], Callable[[float], float]]] = {
    similarity_error: (naive_similarities, lambda difference: difference**2),
    distance_error: (naive_distances, huber),
    angle_error: (naive_angles, huber),
}


@pytest.mark.parametrize("loss", ERRORS)
@pytest.mark.parametrize("scale", [1.0, 4.0])  # of one row, so that differences of distances exceed 1
def test_errors_equal_the_formula_written_as_loops(loss: Callable[..., Tensor], scale: float) -> None:
    student, teacher = rows(4), rows(6, seed=1)
    student[0] *= scale
    relation, penalty = NAIVE[loss]
    lists = [relation(each.tolist()) for each in (student, teacher)]
    means = [sum(penalty(x - y) for x, y in zip(*pair, strict=True)) / len(pair[0]) for pair in zip(*lists, strict=True)]
    assert loss(student, teacher).item() == pytest.approx(sum(means) / 5, rel=1e-12)
    torch.testing.assert_close(loss(student, teacher, "none").tolist(), means)


def test_distances_of_one_row_far_away_are_in_the_linear_part_of_the_loss() -> None:
    student, teacher = rows(4), rows(6, seed=1)
    student[0] *= 4
    assert (relative_distances(student) - relative_distances(teacher)).abs().max() > 1


def test_worked_number_of_similarities() -> None:
    student, teacher = torch.eye(2).double(), torch.tensor([[1.0, 0.0], [1.0, 0.0]]).double()
    assert similarity_error(student, teacher).item() == pytest.approx(0.292893, abs=1e-6)
    torch.testing.assert_close(similarity_error(3 * student, teacher), similarity_error(student, teacher))


def test_worked_numbers_of_distances_and_angles() -> None:
    assert distance_error(LINE, CORNER).item() == pytest.approx(0.0716991, abs=1e-7)
    assert angle_error(LINE, CORNER).item() == pytest.approx(0.1296296, abs=1e-7)
    for loss in (distance_error, angle_error):
        torch.testing.assert_close(loss(turned(CORNER), CORNER), torch.zeros(()).double(), rtol=0, atol=1e-24)


@pytest.mark.parametrize("relation", [relative_distances, angles])
def test_turned_stretched_and_shifted_rows_have_the_same_relations(relation: Callable[[Tensor], Tensor]) -> None:
    torch.testing.assert_close(relation(turned(rows(6))), relation(rows(6)))


def test_similarities_are_of_directions_as_the_origin_sees_them() -> None:
    torch.testing.assert_close(similarities(rows(6) * 1e30), similarities(rows(6)))
    assert (similarities(rows(6) + 7) - similarities(rows(6))).abs().max() > 0.1
    torch.testing.assert_close(similarities(rows(6)).norm(dim=1), torch.ones(5).double())


@pytest.mark.parametrize("loss", ERRORS)
def test_order_of_the_rows_changes_nothing(loss: Callable[..., Tensor]) -> None:
    student, teacher, order = rows(4), rows(6, seed=1), torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(loss(student[order], teacher[order]), loss(student, teacher))


@pytest.mark.parametrize("loss", ERRORS)
def test_gradient_flows_to_the_student_alone_and_is_that_of_differences(loss: Callable[..., Tensor]) -> None:
    student, teacher = rows(4).requires_grad_(), rows(6, seed=1).requires_grad_()
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert (student.grad != 0).all()
    assert torch.autograd.gradcheck(lambda each: loss(each, teacher.detach()), student)


@pytest.mark.parametrize("loss", ERRORS)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_rows_one_row_and_zeros_have_finite_values_and_gradients(loss: Callable[..., Tensor], kind: torch.dtype) -> None:
    cases = {
        "all equal": torch.ones(4, 3),
        "zeros": torch.zeros(4, 3),
        "two equal": torch.tensor([[1.0, 2, 3], [1, 2, 3], [0, 1, 0], [5, 5, 5]]),
        "one row": torch.ones(1, 3),
    }
    for name, vectors in cases.items():
        for teacher in (rows(6, count=len(vectors)), vectors):
            student = vectors.to(kind).requires_grad_()
            error = loss(student, teacher.to(kind))
            (gradient,) = torch.autograd.grad(error, student)
            assert error.isfinite(), name
            assert gradient.isfinite().all(), name
            assert gradient.abs().max() < 10, name


def test_equal_rows_count_in_the_mean_of_distances_as_in_the_authors_code() -> None:
    vectors = torch.tensor([[0.0], [0.0], [3.0]]).double()
    square = (vectors**2).sum(1)
    found = (square[:, None] + square[None] - 2 * vectors @ vectors.T).clamp(min=1e-12).sqrt()
    found.fill_diagonal_(0)
    expected = found / found[found > 0].mean()
    torch.testing.assert_close(relative_distances(vectors), expected, rtol=1e-6, atol=1e-6)
    assert relative_distances(vectors)[0].tolist() == [0, 0, 1.5]


def test_half_precision_is_computed_in_single() -> None:
    student, teacher = (300 * each / each.abs().max() for each in (rows(64), rows(64, seed=1)))
    for loss in ERRORS:
        exact = loss(student.half().double(), teacher.half().double())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = loss(student.half(), teacher.half())
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-7)


def test_mean_of_tokens_leaves_padding_out() -> None:
    states, mask = rows(4, count=6).view(2, 3, 4), torch.tensor([[True, True, True], [True, False, False]])
    states[1, 1:] = float("inf")
    torch.testing.assert_close(mean_of_tokens(states, mask), torch.stack([states[0].mean(0), states[1, 0]]))


@pytest.mark.parametrize("loss", ERRORS)
def test_numbers_of_rows_and_words_that_do_not_fit_are_refused(loss: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="5 and 4 rows"):
        loss(rows(4), rows(4, count=4))
    with pytest.raises(ValueError, match="not one of"):
        loss(rows(4), rows(4), "sum")
