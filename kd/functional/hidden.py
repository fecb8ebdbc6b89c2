"""Losses between hidden states."""

import torch
from torch import Tensor
from torch.nn import functional as F

REDUCTIONS = ("elements", "vectors", "examples", "sum")


def patience(student: Tensor, teacher: Tensor, normalize: bool = True, reduction: str = "elements") -> Tensor:
    """Squared distance between sentence vectors of paired layers.

    Source: Sun et al., EMNLP 2019, arXiv:1908.09355, eq. 7; authors' code `src/KD_loss.py`.

    Args:
        student: (batch, layers, width), one vector a sentence and layer; usually the [CLS] states.
        teacher: (batch, layers, width); the target, no gradient flows to it.
        normalize: scale every vector to unit length first. Eq. 7 does; the authors' code makes it a switch.
        reduction: `elements` averages over batch, layers and width (authors' code), `vectors` sums over width and
            averages over batch and layers (= `elements` times width), `examples` sums over layers and width and averages
            over the batch, `sum` sums over all (eq. 7, = `examples` times batch).

    Padding does not enter: [CLS] is never padding.

    >>> patience(torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[4.0, 3.0]]]), reduction="sum").item()  # doctest: +ELLIPSIS
    0.0799...
    """
    if student.shape != teacher.shape:
        raise ValueError(f"states of student and teacher differ in shape: {tuple(student.shape)}, {tuple(teacher.shape)}")
    if student.dtype in (torch.float16, torch.bfloat16):
        student = student.float()
    teacher = teacher.detach().to(student.dtype)
    if normalize:
        student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    squares = (student - teacher) ** 2
    if reduction == "elements":
        return squares.mean()
    if reduction == "vectors":
        return squares.sum(dim=-1).mean()
    if reduction == "examples":
        return squares.sum(dim=(-2, -1)).mean()
    if reduction == "sum":
        return squares.sum()
    raise ValueError(f"reduction '{reduction}' is not one of {', '.join(REDUCTIONS)}")
