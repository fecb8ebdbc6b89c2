"""Similarity of what two models compute for the same texts, for reports: representations and attention heads."""

import math

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from kd.functional.divergences import entropy


def linear_cka(first: Tensor, second: Tensor) -> float:
    r"""Return the linear centred kernel alignment, :math:`\|Y^T X\|_F^2 / (\|X^T X\|_F \|Y^T Y\|_F)` of centred columns.

    Source: Kornblith et al., Similarity of Neural Network Representations Revisited, ICML 2019, arXiv:1905.00414. It is
    invariant to rotations, permutations of features and a common scale, and not to other linear maps. It is biased upwards
    where examples are not many more than features: unrelated representations then have a similarity well above 0.

    Args:
        first: (examples, width), one vector for each example; computed in float64, no gradient flows to either.
        second: (examples, width) of any width, for the same examples in the same order.

    Returns:
        From 0 to 1; NaN if all vectors of one side are equal.

    Raises:
        ValueError: if the numbers of examples differ.

    >>> round(linear_cka(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[3.0, 0.0], [6.0, 0.0], [12.0, 0.0]])), 12)
    1.0
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} examples cannot be compared")
    ours, theirs = (side.detach().double() - side.detach().double().mean(dim=0) for side in (first, second))
    scale = float(torch.linalg.norm(ours.T @ ours) * torch.linalg.norm(theirs.T @ theirs))
    return min(float((theirs.T @ ours).square().sum()) / scale, 1.0) if scale > 0 else math.nan


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
