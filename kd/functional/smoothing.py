"""Smoothed text: word embeddings that are mixed with those that a masked language model finds likely in their place."""

from collections.abc import Callable

import torch
from torch import Tensor

from kd.functional.hidden import at_least_float32
from kd.functional.logits import widened


def likely_words(logits: Tensor, count: int | None, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the most probable words of softmax(logits / temperature), and their probabilities, scaled to add up to 1.

    Args:
        logits: (positions, vocabulary).
        count: number of words; None for all of the vocabulary, in its own order, whose probabilities are not scaled.
        temperature: > 0.

    Returns:
        ids, (positions, words), and probabilities, (positions, words), float32 at least.

    >>> ids, probabilities = likely_words(torch.tensor([[0.7, 0.2, 0.1]]).log(), 2)
    >>> ids.tolist(), [round(p, 4) for p in probabilities[0].tolist()]
    ([[0, 1]], [0.7778, 0.2222])
    """
    tempered = widened(logits) / temperature
    if count is None:
        return torch.arange(logits.shape[-1], device=logits.device).expand(logits.shape), tempered.softmax(dim=-1)
    largest, ids = tempered.topk(min(count, logits.shape[-1]), dim=-1)
    return ids, largest.softmax(dim=-1)  # equal to the probabilities divided by their sum


def mean_embedding(embed: Callable[[Tensor], Tensor], ids: Tensor, probabilities: Tensor) -> Tensor:
    """Return the mean of word embeddings with these probabilities, (positions, width); gradient flows to the embeddings.

    Args:
        embed: function that looks up word embeddings, (any shape) -> (any shape, width).
        ids: (positions, words).
        probabilities: (positions, words).
    """
    if ids.stride(0) == 0:  # every position has the same words, all of the vocabulary
        table = at_least_float32(embed(ids[0]))
        with torch.autocast(table.device.type, enabled=False):
            return probabilities.to(table.dtype) @ table
    words = at_least_float32(embed(ids))
    return (probabilities.to(words.dtype).unsqueeze(-1) * words).sum(dim=1)


def drawn_words(ids: Tensor, probabilities: Tensor, draws: Tensor) -> Tensor:
    """Return one word for each position, drawn from the likely ones by their probabilities.

    Args:
        ids: (positions, words).
        probabilities: (positions, words), adding up to 1.
        draws: (positions,), uniform in [0, 1).

    Returns:
        (positions,).

    >>> drawn_words(torch.tensor([[5, 9], [5, 9]]), torch.tensor([[0.7, 0.3], [0.7, 0.3]]), torch.tensor([0.69, 0.71])).tolist()
    [5, 9]
    """
    passed = probabilities.double().cumsum(dim=-1) <= draws.double().unsqueeze(-1)
    index = passed.sum(dim=-1, keepdim=True).clamp(max=ids.shape[-1] - 1)
    return ids.gather(-1, index).squeeze(-1)
