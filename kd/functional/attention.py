"""Losses between attention maps."""

import torch
from torch import Tensor

from kd.functional.hidden import at_least_float32, mean_over_real

MASKED = -100.0
"""Scores at or below it are taken for masked ones by TinyBERT's code."""


def score_error(student: Tensor, teacher: Tensor, mask: Tensor, padding: str = "strict") -> Tensor:
    """Mean squared error between attention scores before softmax; head i of one meets head i of the other.

    Source: Jiao et al., TinyBERT, arXiv:1909.10351, eq. 7; authors' code `task_distill.py`.

    Args:
        student: (batch, heads, tokens, tokens), queries by keys, without a padding mask added.
        teacher: the same shape; the target, no gradient flows to it.
        mask: (batch, tokens), bool, False on padding.
        padding: `strict` averages over heads and pairs of real tokens of an example, then over the examples (our choice);
            `reference` averages over everything, with the scores of padded keys, and those of -100 and less, put to 0 on both
            sides while rows of padded queries count (authors' code).

    Raises:
        ValueError: if the shapes differ.

    >>> ours = torch.tensor([[[[1.0, 5.0], [3.0, 5.0]]]])
    >>> theirs = torch.tensor([[[[0.0, 9.0], [1.0, 9.0]]]])
    >>> mask = torch.tensor([[True, False]])
    >>> [score_error(ours, theirs, mask, padding).item() for padding in ("reference", "strict")]
    [1.25, 1.0]
    """
    if student.shape != teacher.shape:
        raise ValueError(f"scores of student and teacher differ in shape: {tuple(student.shape)}, {tuple(teacher.shape)}")
    student = at_least_float32(student)
    teacher = teacher.detach().to(student.dtype)
    keys = mask[:, None, None, :]
    if padding == "reference":
        student, teacher = (torch.where(keys & (scores > MASKED), scores, 0.0) for scores in (student, teacher))
    squares = ((student - teacher) ** 2).mean(dim=1)
    return mean_over_real(squares, mask[:, :, None] & mask[:, None, :], padding)
