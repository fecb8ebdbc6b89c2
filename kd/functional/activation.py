"""Losses between the activations of layers: the vector of each token, or one map over the tokens of an example."""

import torch
from torch import Tensor

from kd.functional.hidden import at_least_float32, mean_over_real, near_one, over_examples, unit

HINT_REDUCTIONS = ("elements", "vectors", "examples", "none")
ACTIVATION_REDUCTIONS = ("elements", "squares", "norm", "none")


def hint_error(student: Tensor, teacher: Tensor, mask: Tensor, reduction: str = "elements") -> Tensor:
    """Return the squared difference between the states of a layer.

    Source: Romero et al., FitNets, ICLR 2015, arXiv:1412.6550, eq. 3, which has half of it, for feature maps.

    Args:
        student: (batch, tokens, width), after the regressor.
        teacher: the same shape; the target, no gradient flows to it.
        mask: (batch, tokens), bool, False on padding, which has no effect.
        reduction: `elements` averages over width and real tokens of an example, then over the examples (RepDistiller's code
            has the mean over all elements of a feature map); `vectors` sums over width; `examples` sums over width and tokens
            (eq. 3); `none` is the latter for each example, (batch,).

    Raises:
        ValueError: if the shapes differ, or for an unknown reduction.

    >>> states, mask = torch.tensor([[[1.0, 3.0], [2.0, 2.0]]]), torch.ones(1, 2).bool()
    >>> [hint_error(states, torch.zeros(1, 2, 2), mask, reduction).item() for reduction in ("elements", "vectors", "examples")]
    [4.5, 9.0, 18.0]
    """
    _check(student, teacher)
    student = at_least_float32(student)
    squares = (student - teacher.detach().to(student.dtype)) ** 2
    if reduction == "elements":
        return mean_over_real(squares.mean(dim=-1), mask, "strict")
    if reduction == "vectors":
        return mean_over_real(squares.sum(dim=-1), mask, "strict")
    if reduction in ("examples", "none"):
        sums = squares.sum(dim=-1).masked_fill(~mask, 0.0).sum(dim=-1)
        return over_examples(sums, "mean" if reduction == "examples" else "none")
    raise ValueError(f"reduction '{reduction}' is not one of {', '.join(HINT_REDUCTIONS)}")


def activation_map(states: Tensor, mask: Tensor, power: float = 2.0) -> Tensor:
    r"""Return the activation map of a layer, :math:`\sum_c |h_c|^p` over the width for each token, scaled to unit length.

    Source: Zagoruyko and Komodakis, ICLR 2017, arXiv:1612.03928, section 3.1, with tokens in place of the positions of an image
    (our adaptation). A mean over the width has the same result as the sum, and states of another scale have too.

    Args:
        states: (batch, tokens, width).
        mask: (batch, tokens), bool, False on padding, which has no part in the length and is 0 in the map.
        power: p >= 1.

    Returns:
        (batch, tokens), float32 at least, not negative; of real tokens that are all 0, zeros.

    >>> activation_map(torch.tensor([[[1.0, 1.0], [2.0, 2.0], [9.0, 9.0]]]), torch.tensor([[True, True, False]]))
    tensor([[0.2425, 0.9701, 0.0000]])
    """
    states = states.masked_fill(~mask[..., None], 0.0)
    near = near_one(states.flatten(1)).view_as(states)  # so that no power overflows
    return unit((near.abs() ** power).sum(dim=-1))


def activation_error(student: Tensor, teacher: Tensor, mask: Tensor, power: float = 2.0, reduction: str = "elements") -> Tensor:
    """Return the distance between the activation maps of two layers, whose widths may differ.

    Source: Zagoruyko and Komodakis, ICLR 2017, arXiv:1612.03928, eq. 2; authors' code `utils.py` and `cifar.py`.

    Args:
        student: (batch, tokens, width).
        teacher: (batch, tokens, width); the target, no gradient flows to it.
        mask: (batch, tokens), bool, False on padding, which has no effect.
        power: p >= 1 of the map.
        reduction: `elements` averages the squared differences over the real tokens of an example, then over the examples
            (authors' code, whose images have one size); `squares` sums them over the tokens; `norm` is the Euclidean norm of an
            example's differences (eq. 2); both are means over the examples; `none` is `squares` for each example, (batch,).

    Raises:
        ValueError: if the shapes differ in more than the width, or for an unknown reduction.

    >>> ours, theirs = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[2.0], [1.0]]])
    >>> round(activation_error(ours, theirs, torch.ones(1, 2).bool()).item(), 6)
    0.529412
    """
    _check(student[..., :1], teacher[..., :1])
    student = activation_map(student, mask, power)
    teacher = activation_map(teacher.detach(), mask, power).to(student.dtype)
    if reduction == "norm":
        norms: Tensor = torch.linalg.vector_norm(student - teacher, dim=-1)
        return norms.mean()
    squares = (student - teacher) ** 2
    if reduction == "elements":
        return mean_over_real(squares, mask, "strict")
    if reduction in ("squares", "none"):
        return over_examples(squares.sum(dim=-1), "mean" if reduction == "squares" else "none")
    raise ValueError(f"reduction '{reduction}' is not one of {', '.join(ACTIVATION_REDUCTIONS)}")


def _check(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(f"states of student and teacher differ in shape: {tuple(student.shape)}, {tuple(teacher.shape)}")
