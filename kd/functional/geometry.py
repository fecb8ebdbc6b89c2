"""Losses between relations of the examples of a batch: similarities, distances and angles.

Widths of student and teacher may differ. All examples of a batch enter each of its relations; several ranks have those of one
process if rows come through `kd.methods.base.Step.across`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kd.functional.hidden import at_least_float32, near_one, over_examples, unit


def mean_of_tokens(states: Tensor, mask: Tensor) -> Tensor:
    """Return the mean state of the real tokens of each example, (batch, width), float32 at least.

    Args:
        states: (batch, tokens, width).
        mask: (batch, tokens), bool, False on padding; an example without a real token has zeros.

    >>> mean_of_tokens(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[True, True, False]]))
    tensor([[2.]])
    """
    states = at_least_float32(states).masked_fill(~mask[..., None], 0.0)
    return states.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)


def similarities(rows: Tensor) -> Tensor:
    r"""Return the dot products of all pairs of rows, :math:`F F^T`, with each row of the result scaled to unit length.

    Source: Tung and Mori, ICCV 2019, arXiv:1907.09682, section 3.1.

    Args:
        rows: (batch, width), one for each example.

    Returns:
        (batch, batch), float32 at least; zeros for a row of zeros. Rows of another scale have the same result.

    >>> similarities(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    tensor([[0.7071, 0.7071],
            [0.7071, 0.7071]])
    """
    rows = at_least_float32(rows)
    near = near_one(rows.flatten(), dim=0).view_as(rows)  # so that no product overflows
    return unit(_products(near))


def similarity_error(student: Tensor, teacher: Tensor, reduction: str = "mean") -> Tensor:
    r"""Return the mean squared difference of similarities, :math:`\lVert \tilde G_t - \tilde G_s \rVert_F^2 / b^2`.

    Source: Tung and Mori, ICCV 2019, arXiv:1907.09682, section 3.1. Rows of b similarities have unit length, so that the value
    is at most 4 / b, and falls with the size of the batch.

    Args:
        student: (batch, width), one row for each example.
        teacher: (batch, width), of any width; the target, no gradient flows to it.
        reduction: `mean` over the examples; `none` gives the mean of each row, (batch,), which has that mean.

    Raises:
        ValueError: if the numbers of rows differ, or for an unknown reduction.

    >>> round(similarity_error(torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])).item(), 6)
    0.292893
    """
    _check(student, teacher)
    ours = similarities(student)
    squares = (ours - similarities(teacher.detach()).to(ours.dtype)) ** 2
    return over_examples(squares.mean(dim=-1), reduction)


def relative_distances(rows: Tensor) -> Tensor:
    """Return the Euclidean distances between all pairs of rows, divided by their mean over the pairs of different examples.

    Source: Park et al., RKD, CVPR 2019, arXiv:1904.05068, eq. 4 and 5; authors' code `metric/loss.py`, which counts a distance
    of 0 between different examples as 1e-6. Here it is 0, has no gradient, and is part of the mean as in the paper; if all
    distances are 0, the result is 0.

    Memory grows with batch * batch * width: distances from dot products, which do without, lose half of the digits.

    Args:
        rows: (batch, width), one for each example.

    Returns:
        (batch, batch), float32 at least. Shifted, rotated and scaled rows have the same result.

    >>> relative_distances(torch.tensor([[0.0], [1.0], [3.0]]))
    tensor([[0.0000, 0.5000, 1.5000],
            [0.5000, 0.0000, 1.0000],
            [1.5000, 1.0000, 0.0000]])
    """
    count = len(rows)
    distances: Tensor = torch.linalg.vector_norm(_differences(rows), dim=-1)
    mean = distances.sum() / max(count * (count - 1), 1)
    return distances / torch.where(mean > 0, mean, 1.0)


def distance_error(student: Tensor, teacher: Tensor, reduction: str = "mean") -> Tensor:
    """Return the Huber loss between the relative distances of student and teacher, a mean over all pairs of the batch.

    Source: Park et al., RKD, CVPR 2019, arXiv:1904.05068, eq. 6; the mean, which counts the pairs of an example with itself, is
    that of the authors' code `metric/loss.py`.

    Args:
        student: (batch, width), one row for each example.
        teacher: (batch, width), of any width; the target, no gradient flows to it.
        reduction: `mean` over the examples; `none` gives the mean of each row, (batch,), which has that mean.

    Raises:
        ValueError: if the numbers of rows differ, or for an unknown reduction.

    >>> line, corner = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> round(distance_error(line, corner).item(), 6)
    0.071699
    """
    _check(student, teacher)
    ours = relative_distances(student)
    errors = F.smooth_l1_loss(ours, relative_distances(teacher.detach()).to(ours.dtype), reduction="none")
    return over_examples(errors.mean(dim=-1), reduction)


def angles(rows: Tensor) -> Tensor:
    r"""Return the cosines of the angles of all triplets of rows, :math:`\cos \angle t_i t_j t_k` at [j, i, k].

    Source: Park et al., RKD, CVPR 2019, arXiv:1904.05068, eq. 8; authors' code `metric/loss.py`.

    Memory grows with the cube of the batch.

    Args:
        rows: (batch, width), one for each example.

    Returns:
        (batch, batch, batch), float32 at least; 0, without a gradient, where i or k is j, or equal to it. Shifted, rotated and
        scaled rows have the same result.
    """
    differences = _differences(rows)
    directions = torch.where((differences != 0).any(dim=-1, keepdim=True), unit(differences), 0.0)
    return _products(directions)


def angle_error(student: Tensor, teacher: Tensor, reduction: str = "mean") -> Tensor:
    """Return the Huber loss between the angles of student and teacher, a mean over all triplets of the batch.

    Source: Park et al., RKD, CVPR 2019, arXiv:1904.05068, eq. 9; the mean, which counts triplets of fewer than three examples,
    is that of the authors' code `metric/loss.py`.

    Args:
        student: (batch, width), one row for each example.
        teacher: (batch, width), of any width; the target, no gradient flows to it.
        reduction: `mean` over the examples; `none` gives the mean over an example's angles, (batch,), which has that mean.

    Raises:
        ValueError: if the numbers of rows differ, or for an unknown reduction.

    >>> line, corner = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> round(angle_error(line, corner).item(), 6)
    0.12963
    """
    _check(student, teacher)
    ours = angles(student)
    errors = F.smooth_l1_loss(ours, angles(teacher.detach()).to(ours.dtype), reduction="none")
    return over_examples(errors.mean(dim=(-2, -1)), reduction)


class _Products(torch.autograd.Function):
    """Dot products of all pairs of rows, which autocast would compute in half precision, and so their gradient."""

    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        """Return (..., rows, rows) of (..., rows, width)."""
        context.save_for_backward(rows)
        with torch.autocast(rows.device.type, enabled=False):
            return rows @ rows.mT

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        """Return the gradient by the rows."""
        (rows,) = context.saved_tensors
        with torch.autocast(rows.device.type, enabled=False):
            slope: Tensor = (gradient + gradient.mT) @ rows
        return slope


def _products(rows: Tensor) -> Tensor:
    products: Tensor = _Products.apply(rows)
    return products


def _differences(rows: Tensor) -> Tensor:
    """Return all differences of two rows, (batch, batch, width)."""
    rows = at_least_float32(rows)
    return rows[None] - rows[:, None]


def _check(student: Tensor, teacher: Tensor) -> None:
    if len(student) != len(teacher):
        raise ValueError(f"student and teacher have {len(student)} and {len(teacher)} rows, one for each example")
