"""Losses between attention maps."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kd.functional.hidden import at_least_float32, mean_over_real

MASKED = -100.0
"""Largest score that TinyBERT's code treats as masked."""

DIRECTIONS = ("forward", "reverse")
"""Directions of a divergence: `forward` is KL(teacher || student), `reverse` is KL(student || teacher)."""


def score_error(student: Tensor, teacher: Tensor, mask: Tensor, padding: str = "strict", reduction: str = "mean") -> Tensor:
    """Return the mean squared error between attention scores before softmax; head i is compared with head i.

    Source: Jiao et al., TinyBERT, arXiv:1909.10351, eq. 7; authors' code `task_distill.py`.

    Args:
        student: (batch, heads, tokens, tokens), queries by keys, without a padding mask added.
        teacher: the same shape; the target, no gradient flows to it.
        mask: (batch, tokens), bool, False on padding.
        padding: `strict` averages over heads and pairs of real tokens of an example, then over the examples (our choice);
            `reference` averages over everything, rows of padded queries included, with the scores of padded keys, and those
            of -100 and less, set to 0 in both (authors' code).
        reduction: `mean` over the examples; `none` gives (batch,), which has that mean.

    Raises:
        ValueError: if the shapes differ, or for an unknown padding or reduction.

    >>> ours = torch.tensor([[[[1.0, 5.0], [3.0, 5.0]]]])
    >>> theirs = torch.tensor([[[[0.0, 9.0], [1.0, 9.0]]]])
    >>> mask = torch.tensor([[True, False]])
    >>> [score_error(ours, theirs, mask, padding).item() for padding in ("reference", "strict")]
    [1.25, 1.0]
    """
    student, teacher = _alike(student, teacher)
    keys = mask[:, None, None, :]
    if padding == "reference":
        student, teacher = (torch.where(keys & (scores > MASKED), scores, 0.0) for scores in (student, teacher))
    squares = ((student - teacher) ** 2).mean(dim=1)
    return mean_over_real(squares, mask[:, :, None] & mask[:, None, :], padding, reduction)


def probability_error(
    student: Tensor, teacher: Tensor, mask: Tensor, padding: str = "strict", reduction: str = "mean"
) -> Tensor:
    """Return the mean squared error between attention probabilities; head i is compared with head i.

    TinyBERT's authors use scores instead (Jiao et al., arXiv:1909.10351, section 3.1: scores converge faster) and published
    no code for probabilities; the reductions are those of `score_error`.

    Args:
        student: (batch, heads, tokens, tokens), queries by keys; every row adds up to 1, padded keys have probability 0.
        teacher: the same shape; the target, no gradient flows to it.
        mask: (batch, tokens), bool, False on padding.
        padding: `strict` averages over heads and pairs of real tokens of an example, then over the examples; `reference`
            averages over everything, rows of padded queries included; padded keys add nothing.
        reduction: `mean` over the examples; `none` gives (batch,), which has that mean.

    Raises:
        ValueError: if the shapes differ, or for an unknown padding or reduction.

    >>> ours, theirs = torch.tensor([[[[0.5, 0.5], [0.5, 0.5]]]]), torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])
    >>> probability_error(ours, theirs, torch.ones(1, 2).bool()).item()
    0.125
    """
    student, teacher = _alike(student, teacher)
    squares = ((student - teacher) ** 2).mean(dim=1)
    return mean_over_real(squares, mask[:, :, None] & mask[:, None, :], padding, reduction)


def attention_divergence(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    direction: str = "forward",
    padding: str = "strict",
    reduction: str = "mean",
) -> Tensor:
    r"""Return the Kullback-Leibler divergence between attention distributions, in nats; head i is compared with head i.

    A row is a distribution over the real keys of an example: the softmax of its scores. The divergence is summed over keys
    and averaged over heads and rows. Padded keys add exactly nothing, whatever their scores are.

    Source: Dankar, Jassani, Kumar, 2023, arXiv:2308.13958, mention it in the abstract; direction and reduction are our choice.

    Args:
        student: (batch, heads, tokens, tokens) scores before softmax, queries by keys, without a padding mask added.
        teacher: the same shape; the target, no gradient flows to it. Log-probabilities are scores too.
        mask: (batch, tokens), bool, False on padding.
        direction: `forward` is :math:`KL(p_t \| p_s)`, `reverse` is :math:`KL(p_s \| p_t)`.
        padding: `strict` averages over heads and rows of real queries of an example, then over the examples; `reference`
            averages over heads, all rows and examples.
        reduction: `mean` over the examples; `none` gives (batch,), which has that mean.

    Raises:
        ValueError: if the shapes differ, or for an unknown direction, padding or reduction.

    >>> ours, theirs = torch.zeros(1, 1, 2, 2), torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    >>> round(attention_divergence(ours, theirs, torch.ones(1, 2).bool()).item(), 6)
    0.055472
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction '{direction}' is not one of {', '.join(DIRECTIONS)}")
    student, teacher = (_log_probabilities(scores, mask) for scores in _alike(student, teacher))
    left, right = (teacher, student) if direction == "forward" else (student, teacher)
    gap = (left - right).masked_fill(~mask[:, None, None, :], 0.0)
    rows = (left.exp() * gap).sum(dim=-1)
    return mean_over_real(rows.mean(dim=1), mask, padding, reduction)


def mean_distribution(scores: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Return the log of the mean of several layers' attention probabilities, which can be used as scores of a softmax.

    The mean is taken of probabilities, not of scores, and computed in logarithms, so that a key with probability 0 in all
    layers does not become infinite.

    Args:
        scores: for each layer (batch, heads, tokens, tokens), before softmax, without a padding mask added.
        mask: (batch, tokens), bool, False on padding.

    Returns:
        (batch, heads, tokens, tokens); on padded keys the lowest finite number of the type, or close to it.
    """
    logs = torch.stack([_log_probabilities(at_least_float32(layer), mask) for layer in scores])
    return logs.logsumexp(dim=0) - math.log(len(scores))


def _log_probabilities(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min).log_softmax(dim=-1)


def _alike(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in the same precision, at least float32, with the teacher's detached."""
    if student.shape != teacher.shape:
        raise ValueError(f"attention of student and teacher differs in shape: {tuple(student.shape)}, {tuple(teacher.shape)}")
    student = at_least_float32(student)
    return student, teacher.detach().to(student.dtype)
