"""Similarity of the layers of two models, and what a linear classifier reads from each layer of one."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kd.functional.linear_probe import ITERATIONS, fit_linear_probe
from kd.functional.similarity import leave_one_out_cka, linear_cka
from kd.results.statistics import Estimate, drawn, jackknifed, mean_of

SEED = 0
"""Seed of the permutation of examples that gives unrelated representations."""

Matrix = list[list[float | None]]
"""Values by row and column; None where one is undefined."""


@dataclass(frozen=True)
class Alignment:
    """Linear CKA between the layers of two models.

    Attributes:
        n: number of examples.
        matrix: rows are the model's layers, columns the teacher's, from layer 0, the embeddings' output; the intervals are
            those of a jackknife, because the repeated examples of a bootstrap sample raise CKA.
        unrelated: the same with the model's examples in another order: what CKA is where nothing is shared, above 0 for few
            examples.
    """

    n: int
    matrix: list[list[Estimate]]
    unrelated: Matrix


@dataclass(frozen=True)
class Probed:
    """Accuracy of linear probes of a model.

    Attributes:
        train: number of training examples of each probe.
        layers: accuracy on other examples by layer, from layer 0 on.
        iterations: largest number of iterations of L-BFGS.
        c: inverse strength of the regularisation.
    """

    train: int
    layers: list[Estimate]
    iterations: int = ITERATIONS
    c: float = 1.0


def defined(value: float) -> float | None:
    """Return a number, or None for NaN."""
    return None if value != value else value


def alignment_of(model: Sequence[Tensor], teacher: Sequence[Tensor]) -> Alignment:
    """Return the CKA of every layer of a model with every layer of its teacher.

    Args:
        model: for each layer (examples, width), of the same examples as the teacher's.
        teacher: for each layer (examples, width of the teacher).
    """
    n = len(model[0])
    order = torch.randperm(n, generator=torch.Generator().manual_seed(SEED))
    matrix = [
        [jackknifed(linear_cka(ours, theirs), leave_one_out_cka(ours, theirs).numpy(), (0.0, 1.0)) for theirs in teacher]
        for ours in model
    ]
    unrelated = [[defined(linear_cka(ours[order], theirs)) for theirs in teacher] for ours in model]
    return Alignment(n, matrix, unrelated)


def probes_of(
    train: Sequence[Tensor], labels: Tensor, evaluated: Sequence[Tensor], evaluated_labels: Tensor, classes: int
) -> Probed:
    """Return the accuracy of a linear probe of each layer, with the same budget for every layer and model.

    Args:
        train: for each layer (examples, width), of training examples.
        labels: (examples,), their class indices.
        evaluated: for each layer (evaluated examples, width).
        evaluated_labels: (evaluated examples,).
        classes: number of classes.
    """
    n = len(evaluated_labels)
    right = {}
    for layer, (features, others) in enumerate(zip(train, evaluated, strict=True)):
        predicted = fit_linear_probe(features, labels, classes).logits(others).argmax(dim=-1)
        right[str(layer)] = (mean_of((predicted == evaluated_labels).numpy()), n)
    return Probed(len(labels), [draws.estimate() for draws in drawn(right, n).values()])
