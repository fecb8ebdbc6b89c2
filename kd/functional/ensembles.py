"""Ensembles of the branches of one network.

Source: Lan, Zhu, Gong, Knowledge Distillation by On-the-Fly Native Ensemble, NeurIPS 2018, arXiv:1806.04606; authors' code
`models/cifar/resnet.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kd.functional.hidden import at_least_float32
from kd.functional.logits import widened

EPSILON = 1e-5
"""Number that is added to a variance before its root, that of `torch.nn.BatchNorm1d`."""


def over_rows(scores: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return scores normalised over the batch and scaled: batch normalisation, always with the statistics of these rows.

    Args:
        scores: (batch, branches).
        weight: (branches,).
        bias: (branches,).
    """
    scores = at_least_float32(scores)
    variance, mean = torch.var_mean(scores, dim=0, correction=0)
    return (scores - mean) / (variance + EPSILON).sqrt() * weight + bias


def gate(scores: Tensor) -> Tensor:
    """Return the importance of each branch, softmax(relu(scores)): (batch, branches), rows that add up to 1."""
    return at_least_float32(scores).relu().softmax(dim=-1)


def gated(logits: Sequence[Tensor], importance: Tensor) -> Tensor:
    r"""Return the logits of the ensemble, :math:`z_e = \sum_i g_i z_i`.

    Args:
        logits: (batch, classes) of each branch.
        importance: g, (batch, branches), as `gate` returns it.

    >>> gated([torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])], torch.tensor([[0.75, 0.25]]))
    tensor([[0.7500, 0.5000]])
    """
    stacked = torch.stack([widened(one) for one in logits], dim=1)
    return (importance.to(stacked.dtype)[..., None] * stacked).sum(dim=1)
