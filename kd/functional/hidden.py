"""Losses between hidden states."""

import torch
from torch import Tensor
from torch.nn import functional as F

HIDDEN_REDUCTIONS = ("elements", "vectors", "examples", "sum", "none")
PADDING = ("strict", "reference")
"""Means over tokens: `strict` over the real tokens of each example, then over examples; `reference` over all, with padding."""
OVER_EXAMPLES = ("mean", "none")
"""Reductions of losses of examples, (batch,): their mean, or `none`."""


def patience(student: Tensor, teacher: Tensor, *, normalize: bool = True, reduction: str = "elements") -> Tensor:
    """Return the squared distance between sentence vectors of paired layers.

    Source: Sun et al., EMNLP 2019, arXiv:1908.09355, eq. 7; authors' code `src/KD_loss.py`.

    Args:
        student: (batch, layers, width), one vector for each sentence and layer; usually the [CLS] states.
        teacher: (batch, layers, width); the target, no gradient flows to it.
        normalize: scale every vector to unit length first. Eq. 7 does; the authors' code makes it a switch.
        reduction: `elements` averages over batch, layers and width (authors' code), `vectors` sums over width and
            averages over batch and layers (= `elements` times width), `examples` sums over layers and width and averages
            over the batch, `sum` sums over all (eq. 7, = `examples` times batch); `none` sums over layers and width and gives
            (batch,), whose mean is `examples`, and not `vectors` or `elements`, which divide it by layers, and by both.

    Padding has no effect: [CLS] is never padding.

    >>> patience(torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[4.0, 3.0]]]), reduction="sum").item()  # doctest: +ELLIPSIS
    0.0799...
    """
    if student.shape != teacher.shape:
        raise ValueError(f"states of student and teacher differ in shape: {tuple(student.shape)}, {tuple(teacher.shape)}")
    student = at_least_float32(student)
    teacher = teacher.detach().to(student.dtype)
    if normalize:
        student, teacher = unit(student), unit(teacher)
    squares = (student - teacher) ** 2
    if reduction == "elements":
        return squares.mean()
    if reduction == "vectors":
        return squares.sum(dim=-1).mean()
    if reduction == "examples":
        return squares.sum(dim=(-2, -1)).mean()
    if reduction == "sum":
        return squares.sum()
    if reduction == "none":
        return squares.sum(dim=(-2, -1))
    raise ValueError(f"reduction '{reduction}' is not one of {', '.join(HIDDEN_REDUCTIONS)}")


def token_error(student: Tensor, teacher: Tensor, mask: Tensor, padding: str = "strict", reduction: str = "mean") -> Tensor:
    """Return the mean squared error between the states of every token.

    Source: Jiao et al., TinyBERT, arXiv:1909.10351, eq. 8 and 9; authors' code `task_distill.py`.

    Args:
        student: (batch, tokens, width).
        teacher: (batch, tokens, width); the target, no gradient flows to it.
        mask: (batch, tokens), bool, False on padding.
        padding: `strict` averages over the real tokens of an example, then over the examples (our choice: neither padding nor
            the other examples of a batch enter); `reference` averages over all elements, padding included (authors' code).
        reduction: `mean` over the examples; `none` gives (batch,), which has that mean.

    >>> states = torch.tensor([[[1.0], [3.0]]])
    >>> token_error(states, torch.zeros(1, 2, 1), torch.tensor([[True, False]])).item()
    1.0
    """
    if student.shape != teacher.shape:
        raise ValueError(f"states of student and teacher differ in shape: {tuple(student.shape)}, {tuple(teacher.shape)}")
    student = at_least_float32(student)
    squares = (student - teacher.detach().to(student.dtype)) ** 2
    return mean_over_real(squares.mean(dim=-1), mask, padding, reduction)


def cosine_distance(student: Tensor, teacher: Tensor, mask: Tensor, padding: str = "strict", reduction: str = "mean") -> Tensor:
    r"""Return the mean of 1 - cosine between the states of every token, in [0, 2]; a vector of zeros has the distance 1.

    Source: Sanh et al., DistilBERT, arXiv:1910.01108, section 3, L_cos.

    Args:
        student: (batch, tokens, width).
        teacher: (batch, tokens, width); the target, no gradient flows to it.
        mask: (batch, tokens), bool, False on padding.
        padding: `strict` or `reference`, as in `token_error`.
        reduction: `mean` over the examples; `none` gives (batch,), which has that mean.

    >>> student, teacher = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]]), torch.tensor([[[2.0, 0.0], [1.0, -1.0]]])
    >>> cosine_distance(student, teacher, torch.tensor([[True, True]]))
    tensor(0.5000)
    """
    if student.shape != teacher.shape:
        raise ValueError(f"states of student and teacher differ in shape: {tuple(student.shape)}, {tuple(teacher.shape)}")
    cosines = (unit(student) * unit(teacher.detach())).sum(dim=-1)
    return mean_over_real(1 - cosines, mask, padding, reduction)


def mean_over_real(values: Tensor, real: Tensor, padding: str, reduction: str = "mean") -> Tensor:
    """Return the mean of values: over the real ones of each example, then over examples; or over all of them.

    Args:
        values: (batch, ...), with at least one further axis.
        real: the same shape, bool, False on padding; at least one is True in every example.
        padding: `strict`, or `reference` for all values.
        reduction: `mean` over the examples; `none` gives the mean of each, (batch,).

    Raises:
        ValueError: for any other `padding` or `reduction`.
    """
    values = at_least_float32(values)
    inner = tuple(range(1, values.ndim))
    if padding == "reference":
        return values.mean() if reduction == "mean" else over_examples(values.mean(dim=inner), reduction)
    if padding != "strict":
        raise ValueError(f"padding '{padding}' is not one of {', '.join(PADDING)}")
    return over_examples(values.masked_fill(~real, 0).sum(dim=inner) / real.sum(dim=inner), reduction)


def over_examples(losses: Tensor, reduction: str) -> Tensor:
    """Return the mean of losses, or for `none` the losses themselves.

    Args:
        losses: (batch,), one for each example.
        reduction: `mean` or `none`.

    Raises:
        ValueError: for any other reduction.
    """
    if reduction not in OVER_EXAMPLES:
        raise ValueError(f"reduction '{reduction}' is not one of {', '.join(OVER_EXAMPLES)}")
    losses = at_least_float32(losses)
    return losses.mean() if reduction == "mean" else losses


def unit(vectors: Tensor, dim: int = -1, norm: float = 2.0) -> Tensor:
    """Divide vectors by their norm, however large or small it is; zeros stay zeros.

    `torch.nn.functional.normalize` returns vectors shorter than 1 if their norm is below 1e-12, and squares of entries beyond
    1e19 overflow float32. Vectors are first divided by a power of two, which is exact, so for ordinary vectors the result is
    equal to torch's bit for bit.

    Args:
        vectors: any shape.
        dim: dimension along which the norm is taken.
        norm: p of the norm.

    >>> unit(torch.tensor([3e-30, 4e-30]))
    tensor([0.6000, 0.8000])
    """
    # After `near_one` the norm of a non-zero vector is at least 1, so eps only applies to zeros.
    return F.normalize(near_one(vectors, dim), p=norm, dim=dim, eps=0.5)


def near_one(vectors: Tensor, dim: int = -1) -> Tensor:
    """Divide vectors by the power of two that brings their largest entry to between 1 and 2, without rounding.

    >>> near_one(torch.tensor([0.0, 3e-30, -6e-30]))
    tensor([ 0.0000,  0.9507, -1.9015])
    """
    vectors = at_least_float32(vectors)
    largest = vectors.detach().abs().amax(dim=dim, keepdim=True)
    power = largest / (2 * largest.frexp().mantissa)
    return vectors / torch.where(largest > 0, power, 1.0)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Convert half precision to float32, because a sum of squares in half precision loses too much."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
