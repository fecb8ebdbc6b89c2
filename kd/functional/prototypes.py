"""Prototypes of domains, and the weights of examples in Meta-KD, which are made of similarities to them."""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from kd.functional.geometry import mean_of_tokens
from kd.functional.hidden import PADDING, at_least_float32

ACROSS = ("mean_of_prototypes", "mean_of_cosines")
"""Comparisons with other domains: with the mean of their prototypes, or with each prototype."""

AT_ONCE = 4096
"""Number of examples that are compared with prototypes at a time, for the memory."""


def content_vector(states: Tensor, mask: Tensor, padding: str = "strict") -> Tensor:
    """Return the mean of the states of all tokens but the first, (batch, width).

    Source: Pan et al., Meta-KD, ACL 2021, arXiv:2012.01266; authors' code.

    Args:
        states: (batch, tokens, width).
        mask: (batch, tokens), bool, False on padding.
        padding: `strict` averages over real tokens (our choice); `reference` over all positions, padding included (authors'
            code).

    A text without tokens after the first has a vector of zeros.

    Raises:
        ValueError: for an unknown padding.

    >>> states, mask = torch.tensor([[[1.0], [2.0], [6.0]]]), torch.tensor([[True, True, False]])
    >>> [content_vector(states, mask, padding).item() for padding in PADDING]
    [2.0, 4.0]
    """
    if padding not in PADDING:
        raise ValueError(f"padding '{padding}' is not one of {', '.join(PADDING)}")
    counted = mask[:, 1:] if padding == "strict" else torch.ones_like(mask[:, 1:])
    return mean_of_tokens(states[:, 1:], counted)


def prototypes(vectors: Tensor, groups: Tensor, count: int) -> Tensor:
    """Return the mean vector of each group, (count, width); zeros for a group without examples.

    Args:
        vectors: (examples, width).
        groups: (examples,), long, from 0.
        count: number of groups.
    """
    vectors = at_least_float32(vectors)
    sums = vectors.new_zeros((count, vectors.shape[1])).index_add_(0, groups, vectors)
    sizes = torch.bincount(groups, minlength=count).clamp(min=1)
    return sums / sizes.to(vectors.dtype).unsqueeze(1)


def transferability(
    vectors: Tensor,
    domains: Tensor,
    count: int,
    classes: Tensor | None = None,
    own: float = 0.5,
    others: float = 0.5,
    across: str = "mean_of_prototypes",
) -> Tensor:
    r"""Return how close each example is to the prototypes of its own and of other domains, (examples,).

    :math:`t(x) = a \cos(x, \mu_k) + b \cos(x, mean_{k' \ne k} \mu_{k'})`, k the domain of x; with `mean_of_cosines` the
    second part is the mean of :math:`\cos(x, \mu_{k'})`.

    Source: Pan et al., Meta-KD, ACL 2021, arXiv:2012.01266; prototypes of domains and the mean of prototypes are the authors'
    code, prototypes of a class within a domain and the mean of cosines the paper.

    Args:
        vectors: (examples, width).
        domains: (examples,), long, from 0.
        count: number of domains, 2 or more; each has an example.
        classes: (examples,), long: prototypes are those of the example's class within a domain; None for those of domains.
            A domain without an example of the class is left out.
        own: a.
        others: b.
        across: see `ACROSS`.

    Raises:
        ValueError: for an unknown comparison.

    >>> vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> [round(transferability(vectors, torch.arange(3), 3, across=across)[0].item(), 6) for across in ACROSS]
    [0.723607, 0.676777]
    """
    if across not in ACROSS:
        raise ValueError(f"the comparison '{across}' is not one of {', '.join(ACROSS)}")
    vectors = at_least_float32(vectors)
    kinds = torch.zeros_like(domains) if classes is None else classes
    number = int(kinds.max()) + 1
    means = prototypes(vectors, domains * number + kinds, count * number).view(count, number, -1)
    there = torch.bincount(domains * number + kinds, minlength=count * number).view(count, number) > 0
    apart = (there.T[kinds] & ~torch.nn.functional.one_hot(domains, count).bool()).to(vectors.dtype)
    apart = apart / apart.sum(dim=1, keepdim=True).clamp(min=1)  # (examples, domains), the weights of the others' mean
    parts = []
    for rows in torch.arange(len(vectors), device=vectors.device).split(AT_ONCE):
        of_kind = means[:, kinds[rows]].movedim(1, 0)  # (examples, domains, width)
        similar = cosine_similarity(vectors[rows].unsqueeze(1), of_kind, dim=-1)
        if across == "mean_of_cosines":
            far = (similar * apart[rows]).sum(dim=1)
        else:
            far = cosine_similarity(vectors[rows], (of_kind * apart[rows].unsqueeze(-1)).sum(dim=1), dim=-1)
        parts.append(own * similar.gather(1, domains[rows].unsqueeze(1)).squeeze(1) + others * far)
    return torch.cat(parts)


def expertise(transfer: Tensor, probability: Tensor) -> Tensor:
    r"""Return the weight of each example in Meta-KD's distillation, (batch,): :math:`(1 + t) / (\exp((p - 1)^2) + 1)`.

    Source: Pan et al., Meta-KD, ACL 2021, arXiv:2012.01266; authors' code.

    Args:
        transfer: (batch,), t, as `transferability` returns it.
        probability: (batch,), p, that the teacher gives the label, at temperature 1.

    >>> expertise(torch.tensor([1.0, 0.9]), torch.tensor([1.0, 0.0]))
    tensor([1.0000, 0.5110])
    """
    probability = at_least_float32(probability)
    return (1 + transfer.to(probability.dtype)) / (torch.exp((probability - 1) ** 2) + 1)
