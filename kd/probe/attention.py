"""Similarity of the attention of two models: divergences between heads, of which the best pairs are matched."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kd.forward import Needs
from kd.functional.similarity import head_divergences, match_heads
from kd.models import FrozenTeacher
from kd.probe.outputs import Rows, batches, run
from kd.results.statistics import Estimate, drawn, mean_of


@dataclass(frozen=True)
class AttentionSimilarity:
    """Jensen-Shannon divergence between the attention of two models, in bits.

    Attributes:
        n: number of examples.
        matrix: divergence of every layer of the model (rows) and of the teacher (columns), from layer 1: the mean over the
            matched pairs of heads, over the real queries of each example, and over examples.
        heads: the matched pairs of heads of each pair of layers, from 0; the match is that of the mean over all examples.
    """

    n: int
    matrix: list[list[Estimate]]
    heads: list[list[list[tuple[int, int]]]]


def attention_similarity(model: FrozenTeacher, teacher: FrozenTeacher, texts: Rows, max_length: int) -> AttentionSimilarity:
    """Return the similarity of the attention of two models that read the same tokens.

    Args:
        model: the model.
        teacher: its teacher, with the same tokenizer.
        texts: the examples.
        max_length: number of tokens to which they are truncated.
    """
    layers, others = range(1, model.depth + 1), range(1, teacher.depth + 1)
    found: dict[tuple[int, int], list[Tensor]] = {(layer, other): [] for layer in layers for other in others}
    for _, inputs in batches(model, texts, max_length):
        teacher.encoder.to(inputs["attention_mask"].device)
        ours, theirs = run(model, inputs, Needs(attention=layers)), run(teacher, inputs, Needs(attention=others))
        for layer in layers:
            attention = ours.attention(layer)
            for other in others:
                found[layer, other].append(head_divergences(attention, theirs.attention(other), ours.mask).cpu())
    statistics, matched = {}, {}
    for pair, values in found.items():
        divergences = torch.cat(values)  # (examples, heads, other heads), in the order of the batches
        matched[pair] = match_heads(divergences.mean(dim=0))
        by_example = torch.stack([divergences[:, one, other] for one, other in matched[pair]]).mean(dim=0)
        statistics[f"{pair[0]} {pair[1]}"] = (mean_of(by_example.numpy()), len(texts))
    draws = drawn(statistics, len(texts))
    return AttentionSimilarity(
        len(texts),
        [[draws[f"{layer} {other}"].estimate() for other in others] for layer in layers],
        [[matched[layer, other] for other in others] for layer in layers],
    )
