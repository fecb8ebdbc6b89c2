"""Losses between relations: how tokens of a text, or examples of a batch, resemble each other."""

import math

import torch
from torch import Tensor

from kd.functional.attention import attention_divergence
from kd.functional.hidden import at_least_float32, over_examples, unit
from kd.functional.logits import kl_divergence

ANCHORS = ("both", "student")
"""Vectors whose loss is averaged: those of student and teacher, or the student's alone."""


def scaled_products(vectors: Tensor) -> Tensor:
    r"""Return the dot products of all pairs of vectors divided by the root of their width, in float32 at least.

    Their softmax over the last axis is the relation :math:`R(X) = softmax(X X^T / \sqrt{d})` of Zhang, Yang, Ji, MLKD-BERT,
    arXiv:2407.02775, which no rotation of the vectors changes.

    Args:
        vectors: (..., vectors, width). Autocast does not round the products.

    >>> scaled_products(torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    tensor([[2., 0.],
            [0., 0.]])
    """
    vectors = at_least_float32(vectors)
    with torch.autocast(vectors.device.type, enabled=False):
        products: Tensor = (vectors / math.sqrt(vectors.shape[-1])) @ vectors.transpose(-1, -2)
    return products


def split(states: Tensor, splits: int) -> Tensor:
    """Split the width into equal parts: (batch, tokens, width) -> (batch, splits, tokens, width / splits).

    Raises:
        ValueError: if they do not divide the width.
    """
    if states.shape[-1] % splits:
        raise ValueError(f"{splits} splits do not divide a width of {states.shape[-1]}")
    parts: Tensor = states.unflatten(-1, (splits, -1))
    return parts.transpose(1, 2)


def context(attention: Tensor, values: Tensor) -> Tensor:
    """Return the outputs of the heads of a layer, concatenated, before its output layer; in float32 at least.

    Args:
        attention: (batch, heads, tokens, tokens) probabilities, queries by keys.
        values: (batch, tokens, width); head h has the h-th part of the width.

    Returns:
        (batch, tokens, width).
    """
    values = at_least_float32(values)
    with torch.autocast(values.device.type, enabled=False):
        outputs: Tensor = attention.to(values.dtype) @ split(values, attention.shape[1])
    return outputs.transpose(1, 2).flatten(2)


def relation_divergence(
    student: Tensor, teacher: Tensor, mask: Tensor, splits: int = 1, padding: str = "strict", reduction: str = "mean"
) -> Tensor:
    r"""Return the divergence :math:`KL(R(X_t) \| R(X_s))` between relations of tokens, in nats.

    Each side's states are divided into splits, whose widths may differ between the sides. A row of a relation is a token's
    distribution over the tokens; the divergence is a mean over splits and rows.

    Source: Zhang, Yang, Ji, MLKD-BERT, arXiv:2407.02775, its embedding loss (one split) and attention loss.

    Args:
        student: (batch, tokens, width).
        teacher: (batch, tokens, another width); the target, no gradient flows to it.
        mask: (batch, tokens), bool, False on padding.
        splits: number of splits; it divides both widths.
        padding: `strict` takes distributions over the real tokens, and the mean over splits and real rows of an example, then
            over the examples (our choice); `reference` treats padding as any token, in distributions and rows (authors' code).
        reduction: `mean` over the examples; `none` gives (batch,), which has that mean.

    Raises:
        ValueError: if the splits do not divide a width, or for an unknown padding or reduction.

    >>> ours, theirs = torch.tensor([[[1.0], [0.0]]]), torch.tensor([[[2.0, 0, 0, 0], [0, 0, 0, 0]]])
    >>> round(relation_divergence(ours, theirs, torch.ones(1, 2).bool()).item(), 6)
    0.033565
    """
    ours, theirs = (scaled_products(split(states, splits)) for states in (student, teacher.detach()))
    real = torch.ones_like(mask) if padding == "reference" else mask
    return attention_divergence(ours, theirs, real, padding=padding, reduction=reduction)


def similarity_divergence(student: Tensor, teacher: Tensor, reduction: str = "mean") -> Tensor:
    r"""Return the divergence :math:`KL(R(c_t) \| R(c_s))` between relations of the examples of a batch, in nats.

    Source: Zhang, Yang, Ji, MLKD-BERT, arXiv:2407.02775, its loss of sample similarity. An example is among those that it is
    compared with, as in the authors' code.

    Args:
        student: (batch, width), one vector for each example; usually the [CLS] state.
        teacher: (batch, another width); the target, no gradient flows to it.
        reduction: `mean` over the examples; `none` gives (batch,), which has that mean.

    >>> round(similarity_divergence(torch.tensor([[1.0], [0.0]]), torch.tensor([[2.0, 0, 0, 0], [0, 0, 0, 0]])).item(), 6)
    0.033565
    """
    losses = kl_divergence(scaled_products(student), scaled_products(teacher.detach()), reduction="none")
    return over_examples(losses, reduction)


def supervised_contrast(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, anchors: str = "both", reduction: str = "mean"
) -> Tensor:
    r"""Return the contrastive loss between the examples of a batch as student and teacher represent them, in nats.

    All 2 * batch vectors are scaled to unit length. For an anchor i with the positives P(i), the other vectors of i's label,
    :math:`-\frac{1}{|P(i)|} \sum_{p \in P(i)} \log(e^{f_i f_p / \tau} / \sum_{a \ne i} e^{f_i f_a / \tau})`.

    Source: Zhang, Yang, Ji, MLKD-BERT, arXiv:2407.02775, its contrastive loss; the form is that of Khosla et al., NeurIPS
    2020, arXiv:2004.11362, eq. 2.

    Args:
        student: (batch, width).
        teacher: (batch, width); no gradient flows to it.
        labels: (batch,), numbers; vectors of equal ones are positives. Those of one example always are.
        temperature: :math:`\tau` > 0.
        anchors: `both` averages over all vectors (paper), `student` over the student's (a later branch of the authors' code).
        reduction: `mean` over the anchors; `none` gives the mean over the anchors of each example, (batch,).

    Raises:
        ValueError: if the shapes differ, or for unknown anchors or an unknown reduction.

    >>> vectors = torch.eye(2)
    >>> round(supervised_contrast(vectors, vectors, torch.tensor([0, 1]), 1.0).item(), 6)
    0.551445
    """
    if student.shape != teacher.shape:
        raise ValueError(f"vectors of student and teacher differ in shape: {tuple(student.shape)}, {tuple(teacher.shape)}")
    if anchors not in ANCHORS:
        raise ValueError(f"anchors '{anchors}' is not one of {', '.join(ANCHORS)}")
    ours = unit(student)
    vectors = torch.cat([ours, unit(teacher.detach()).to(ours.dtype)])
    with torch.autocast(vectors.device.type, enabled=False):
        scores = vectors @ vectors.T / temperature
    itself = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    logs = scores.masked_fill(itself, torch.finfo(scores.dtype).min).log_softmax(dim=-1)
    positives = (labels[:, None] == labels).repeat(2, 2) & ~itself
    losses = -logs.masked_fill(~positives, 0.0).sum(dim=-1) / positives.sum(dim=-1)
    of_views = losses.view(2, -1)
    return over_examples(of_views.mean(dim=0) if anchors == "both" else of_views[0], reduction)
