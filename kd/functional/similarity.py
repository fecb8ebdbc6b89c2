"""Similarity of what two models compute for the same texts, for reports: representations and attention heads."""

import math

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from kd.functional.divergences import entropy

EQUAL = 1e-6
"""Vectors are equal if what differs is at most this share of their size: a few units of float32, which models compute in."""


def linear_cka(first: Tensor, second: Tensor) -> float:
    r"""Return the linear centred kernel alignment, :math:`\|Y^T X\|_F^2 / (\|X^T X\|_F \|Y^T Y\|_F)` of centred columns.

    Source: Kornblith et al., Similarity of Neural Network Representations Revisited, ICML 2019, arXiv:1905.00414. It is
    invariant to rotations, permutations of features and a common scale, and not to other linear maps. It is biased upwards
    where examples are not many more than features: unrelated representations then have a similarity well above 0.

    Args:
        first: (examples, width), one vector for each example; computed in float64, no gradient flows to either.
        second: (examples, width) of any width, for the same examples in the same order.

    Returns:
        From 0 to 1; NaN if all vectors of one side are equal up to rounding, as those of [CLS] in layer 0.

    Raises:
        ValueError: if the numbers of examples differ.

    >>> round(linear_cka(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[3.0, 0.0], [6.0, 0.0], [12.0, 0.0]])), 12)
    1.0
    """
    if not all(_varies(side) for side in (first, second)):
        return math.nan
    ours, theirs = _centred(first, second)
    scale = float(torch.linalg.norm(ours.T @ ours) * torch.linalg.norm(theirs.T @ theirs))
    return min(float((theirs.T @ ours).square().sum()) / scale, 1.0)


def leave_one_out_cka(first: Tensor, second: Tensor) -> Tensor:
    r"""Return `linear_cka` without each of the examples, for the spread of a jackknife.

    With :math:`x_i` and :math:`y_i` the vectors of example i, centred over all n, and :math:`C = X^T Y`, the inner product of
    the centred kernels without example i is
    :math:`\|C\|_F^2 - 2 r_i + d_i - \frac{2}{n - 1} (r_i - d_i) + \frac{d_i}{(n - 1)^2}`, where :math:`r_i = x_i^T C y_i` and
    :math:`d_i = \|x_i\|^2 \|y_i\|^2`. Our derivation; it takes the time of one similarity instead of n.

    Args:
        first: as for `linear_cka`.
        second: as for `linear_cka`.

    Returns:
        (examples,), float64; NaN where all vectors of one side that are left are equal.

    Raises:
        ValueError: if the numbers of examples differ.
    """
    ours, theirs = _centred(first, second)
    others = len(ours) - 1
    if not all(_varies(side) for side in (first, second)):
        return torch.full((len(ours),), math.nan, dtype=torch.double)

    def products(one: Tensor, other: Tensor) -> Tensor:
        cross = one.T @ other
        rows = ((one @ cross) * other).sum(dim=1)
        own = one.square().sum(dim=1) * other.square().sum(dim=1)
        return cross.square().sum() - 2 * rows + own - 2 / others * (rows - own) + own / others**2

    scales = products(ours, ours), products(theirs, theirs)
    # The differences above leave rounding where the vectors without an example are equal.
    defined = [scale > EQUAL**2 * side.square().sum() ** 2 for scale, side in zip(scales, (ours, theirs), strict=True)]
    values = products(ours, theirs) / (scales[0] * scales[1]).clamp(min=0).sqrt()
    return torch.where(defined[0] & defined[1], values.clamp(0, 1), math.nan)


def _varies(vectors: Tensor) -> bool:
    """Return whether vectors, (examples, width), differ by more than rounding."""
    given = vectors.detach().double()
    return bool(torch.linalg.norm(given - given.mean(dim=0)) > EQUAL * torch.linalg.norm(given))


def _centred(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return two representations in float64 without gradients, less their means over examples.

    Raises:
        ValueError: if the numbers of examples differ.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} examples cannot be compared")
    ours, theirs = (side.detach().double() - side.detach().double().mean(dim=0) for side in (first, second))
    return ours, theirs


def head_divergences(first: Tensor, second: Tensor, mask: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence between the attention of every head of one layer and every head of another.

    It is `kd.functional.divergences.js_divergence`, with the entropy of each head computed once.

    Args:
        first: (batch, heads, tokens, tokens), probabilities by query and key; padded keys have 0. No gradient flows to either.
        second: (batch, other heads, tokens, tokens), for the same tokens.
        mask: (batch, tokens), bool, False on padding.

    Returns:
        (batch, heads, other heads), in bits, from 0 to 1, float64: means over the real queries of each example, so that
        padding does not enter. No reduction over the batch.
    """
    ours, theirs = first.detach().double(), second.detach().double()
    own, other = entropy(ours), entropy(theirs)  # (batch, heads, tokens)
    columns = []
    for head in range(first.shape[1]):  # all pairs at once would take as many times the memory as there are heads
        mean = entropy((ours[:, head, None] + theirs) / 2)  # (batch, other heads, tokens)
        rows = (mean - (own[:, head, None] + other) / 2).clamp(0, 1)
        columns.append((rows * mask[:, None]).sum(dim=-1) / mask.sum(dim=-1, keepdim=True))
    return torch.stack(columns, dim=1)


def match_heads(costs: Tensor) -> list[tuple[int, int]]:
    """Return the pairs of heads whose costs add up to the least: each head has at most one partner.

    Where the numbers of heads differ, some heads of the side with more have none. The assignment is that of
    `scipy.optimize.linear_sum_assignment`.

    Args:
        costs: (heads, other heads), finite.

    Returns:
        Pairs of head and other head, from 0, by the first; as many as the side with fewer heads has.

    >>> match_heads(torch.tensor([[0.0, 0.1, 0.9], [0.1, 0.9, 0.9]]))
    [(0, 1), (1, 0)]
    """
    return [(int(one), int(other)) for one, other in zip(*linear_sum_assignment(costs.detach().double().numpy()), strict=True)]
