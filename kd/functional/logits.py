"""Losses between the logits of a student and of a teacher."""

import torch
from torch import Tensor
from torch.nn import functional as F

LOGIT_REDUCTIONS = ("batchmean", "elementmean", "sum", "none")
SOFT_LOSSES = ("kl", "ce", "mse")


def widened(logits: Tensor) -> Tensor:
    """Convert half precision to float32: a softmax over half-precision logits loses the tail that distillation uses."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _reduce(values: Tensor, reduction: str) -> Tensor:
    """Reduce (batch, classes) to a scalar, or to (batch,) for `none`."""
    if reduction == "batchmean":
        return values.sum(dim=-1).mean()
    if reduction == "elementmean":
        return values.mean()
    if reduction == "sum":
        return values.sum()
    if reduction == "none":
        return values.sum(dim=-1)
    raise ValueError(f"reduction '{reduction}' is not one of {', '.join(LOGIT_REDUCTIONS)}")


def _check(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(f"logits of student and teacher differ in shape: {tuple(student.shape)}, {tuple(teacher.shape)}")


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0, reduction: str = "batchmean") -> Tensor:
    r"""Return the divergence :math:`KL(p_t \| p_s)` of tempered distributions, in nats, times temperature squared.

    Source: Hinton, Vinyals, Dean, NeurIPS DL workshop 2014, arXiv:1503.02531, section 2 (the square keeps the gradient's
    scale as the temperature changes).

    Args:
        student: (batch, classes) logits.
        teacher: (batch, classes) logits; the target, no gradient flows to it.
        temperature: > 0, applied to both.
        reduction: `batchmean` sums over classes and averages over the batch (the divergence proper); `elementmean`
            averages over both, which is `batchmean / classes`; `sum`; `none` gives (batch,).

    >>> kl_divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])).item()  # doctest: +ELLIPSIS
    0.3278...
    """
    _check(student, teacher)
    log_student = F.log_softmax(widened(student) / temperature, dim=-1)
    log_teacher = F.log_softmax(widened(teacher).detach() / temperature, dim=-1)
    return _reduce(log_teacher.exp() * (log_teacher - log_student), reduction) * temperature**2


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float = 1.0, reduction: str = "batchmean") -> Tensor:
    """Return the cross entropy against the teacher's tempered distribution, in nats; *not* times temperature squared.

    The difference from `kl_divergence` is the teacher's entropy, a constant; shapes and arguments are the same.
    """
    _check(student, teacher)
    log_student = F.log_softmax(widened(student) / temperature, dim=-1)
    target = F.softmax(widened(teacher).detach() / temperature, dim=-1)
    return _reduce(-target * log_student, reduction)


def squared_error(student: Tensor, teacher: Tensor, reduction: str = "elementmean") -> Tensor:
    """Return the squared difference of logits, (batch, classes) each.

    Raises:
        ValueError: if the shapes differ, because broadcasting (batch, 1) against (batch,) would give (batch, batch).
    """
    _check(student, teacher)
    return _reduce((widened(student) - widened(teacher).detach()) ** 2, reduction)
