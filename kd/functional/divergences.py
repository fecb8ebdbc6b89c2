"""Symmetric distances between distributions, for reports: bounded, and zero where the two are equal."""

import math

import torch
from torch import Tensor


def entropy(probabilities: Tensor) -> Tensor:
    """Return the entropy of distributions, (...), in bits, float64, for probabilities, (..., outcomes); 0 log 0 is 0.

    >>> entropy(torch.tensor([0.5, 0.5, 0.0])).item()
    1.0
    """
    bits: Tensor = torch.special.entr(probabilities.detach().double()).sum(dim=-1) / math.log(2)
    return bits


def js_divergence(first: Tensor, second: Tensor) -> Tensor:
    r"""Return the Jensen-Shannon divergence :math:`\frac12 KL(p \| m) + \frac12 KL(q \| m)`, with m the mean of p and q.

    Source: Lin, IEEE Transactions on Information Theory 37(1), 1991, with equal weights: the entropy of the mean less the mean
    of the entropies.

    Args:
        first: (..., outcomes), probabilities p, which add up to 1; outcomes that are no part of it, as padding, have 0 in
            both. No gradient flows to either.
        second: (..., outcomes), q, of a shape that broadcasts with that of the first.

    Returns:
        (...), in bits, from 0 to 1, float64. No reduction.

    >>> js_divergence(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])).item()
    1.0
    """
    p, q = first.detach().double(), second.detach().double()
    return (entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2).clamp(0, 1)  # rounding leaves the range by some 1e-16


def total_variation(first: Tensor, second: Tensor) -> Tensor:
    r"""Return the total variation distance :math:`\frac12 \sum |p - q|`, the largest difference of an event's probabilities.

    Args:
        first: (..., outcomes), probabilities; no gradient flows to either.
        second: (..., outcomes), of a shape that broadcasts with that of the first.

    Returns:
        (...), from 0 to 1, float64. No reduction.

    >>> total_variation(torch.tensor([0.75, 0.25]), torch.tensor([0.5, 0.5])).item()
    0.25
    """
    return (first.detach().double() - second.detach().double()).abs().sum(dim=-1) / 2
