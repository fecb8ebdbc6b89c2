"""Importance of the parts of a model: how much its score drops without a head or a layer."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kd.forward import Needs
from kd.models import FrozenTeacher
from kd.probe.differences import Statistics, counted, delta, predictions
from kd.probe.outputs import Rows, batches, in_rows, run
from kd.results.statistics import Estimate, drawn


@dataclass(frozen=True)
class Ablation:
    """Drops of a model's score: its own, less that without a part.

    Attributes:
        n: number of examples.
        metric: name of the score.
        score: score of the whole model.
        heads: by layer, from 1, the drop without each head, from 0.
        layers: by layer the drop without the layer.
    """

    n: int
    metric: str
    score: Estimate
    heads: list[list[Estimate]]
    layers: list[Estimate]


def ablated_logits(model: FrozenTeacher, texts: Rows, max_length: int) -> dict[tuple[int, int | None] | None, Tensor]:
    """Return the logits of a model without each of its parts, (examples, classes) each.

    What is below a part is the same without it, so that a pass starts at the states of the layer below.

    Args:
        model: the model.
        texts: the examples.
        max_length: number of tokens to which they are truncated.

    Returns:
        Layer and head -> logits without the head; layer and None -> without the layer; None -> those of the whole model.
    """
    found: dict[tuple[int, int | None] | None, list[tuple[list[int], Tensor]]] = {}
    for rows, inputs in batches(model, texts, max_length):
        whole = run(model, inputs, Needs(hidden=range(model.depth)))
        found.setdefault(None, []).append((rows, whole.logits))
        for layer in range(1, model.depth + 1):
            start: Any = {
                "embedded": whole.hidden(layer - 1),
                "from_layer": layer - 1,
                "attention_mask": inputs["attention_mask"],
            }
            with model.encoder.without(layer=layer):
                found.setdefault((layer, None), []).append((rows, run(model, start, Needs()).logits))
            for head in range(model.heads):
                with model.encoder.without(head=(layer, head)):
                    found.setdefault((layer, head), []).append((rows, run(model, start, Needs()).logits))
    return {part: in_rows(values).float() for part, values in found.items()}


def ablation_of(
    logits: dict[tuple[int, int | None] | None, Tensor],
    labels: NDArray[np.float64],
    metric: str,
    *,
    classifies: bool,
) -> Ablation:
    """Return the drops of a score, with intervals over the same bootstrap samples of the examples.

    Args:
        logits: those of `ablated_logits`.
        labels: (examples,), class indices or scores.
        metric: name of the score, in `kd.results.statistics.COUNTED`.
        classifies: whether labels are classes.
    """
    scores = {part: counted(metric, predictions(values.numpy(), classifies), labels) for part, values in logits.items()}
    n, whole = len(labels), scores[None]
    statistics: Statistics = {str(part): (delta(score, whole), n) for part, score in scores.items() if part is not None}
    estimates = {name: draws.estimate() for name, draws in drawn({**statistics, "score": (whole, n)}, n).items()}
    layers = sorted({part[0] for part in logits if part is not None})
    heads = sorted({part[1] for part in logits if part is not None and part[1] is not None})
    return Ablation(
        n,
        metric,
        estimates["score"],
        [[estimates[str((layer, head))] for head in heads] for layer in layers],
        [estimates[str((layer, None))] for layer in layers],
    )
