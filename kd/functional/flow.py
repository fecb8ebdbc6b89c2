"""Flow between two layers: the matrix of inner products of their features, and the distance of two such matrices."""

import torch
from torch import Tensor

from kd.functional.hidden import at_least_float32

FLOW_REDUCTIONS = ("elements", "examples", "none")


def flow_matrix(lower: Tensor, upper: Tensor, mask: Tensor) -> Tensor:
    r"""Return :math:`G_{ij} = \frac{1}{n} \sum_l f^a_{l i} f^b_{l j}` over the n real tokens l of each example.

    Source: Yim, Joo, Bae, Kim, CVPR 2017, the FSP matrix, whose sum is over the h x w positions of an image.

    Args:
        lower: (batch, tokens, width), the states of layer a.
        upper: (batch, tokens, width), the states of layer b; its width may be another one.
        mask: (batch, tokens), bool, False on padding, which is left out whatever stands there.

    Returns:
        (batch, width of a, width of b), in float32 at least, also under autocast.

    >>> lower, upper = torch.tensor([[[1.0, 0.0], [2.0, 1.0]]]), torch.tensor([[[1.0], [1.0]]])
    >>> flow_matrix(lower, upper, torch.ones(1, 2).bool()).flatten()
    tensor([1.5000, 0.5000])
    """
    lower, upper = at_least_float32(lower), at_least_float32(upper)
    padding = ~mask[..., None]
    with torch.autocast(lower.device.type, enabled=False):  # which computes products of float32 matrices in half precision
        products: Tensor = lower.masked_fill(padding, 0).transpose(1, 2) @ upper.masked_fill(padding, 0)
    return products / mask.sum(dim=1)[:, None, None]


def flow_error(student: Tensor, teacher: Tensor, reduction: str = "elements") -> Tensor:
    """Return the squared difference between the flow matrices of student and teacher.

    Args:
        student: (batch, width of a, width of b).
        teacher: the same shape; the target, no gradient flows to it.
        reduction: `elements` averages over the entries of a matrix and over the examples (RepDistiller); `examples` sums over
            the entries, the squared norm, and averages over the examples (paper); `none` is that norm, (batch,).

    Raises:
        ValueError: if the shapes differ, or for any other reduction.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"flows of student and teacher differ in shape: {tuple(student.shape)}, {tuple(teacher.shape)}")
    student = at_least_float32(student)
    squares = (student - teacher.detach().to(student.dtype)) ** 2
    if reduction == "elements":
        return squares.mean()
    if reduction not in FLOW_REDUCTIONS:
        raise ValueError(f"reduction '{reduction}' is not one of {', '.join(FLOW_REDUCTIONS)}")
    norms = squares.sum(dim=(1, 2))
    return norms.mean() if reduction == "examples" else norms
