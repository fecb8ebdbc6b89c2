"""Metrics of many samples of examples at once, for the bootstrap: a sample is the number of times that it has each example.

Each function takes (examples,) predictions, (examples,) labels and (samples, examples) counts, and returns (samples,) values,
those of the metric of the same name in `kd.data.metrics`: fractions, with the same values where a metric is 0 / 0. Predictions
and labels are class indices from 0 on, or scores.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

CountedMetric = Callable[[NDArray[Any], NDArray[Any], Floats], Floats]
"""Metric of (examples,) predictions and labels in (samples, examples) counts, (samples,)."""

Statistic = Callable[[Floats], Floats]
"""Figure of given predictions in (samples, examples) counts, (samples,); NaN where it is undefined."""

CONSTANT = 1e-12
"""Share of the variance of all examples below which a sample counts as constant: rounding alone leaves some 1e-15."""


def one_by_one(metric: Callable[[NDArray[Any], NDArray[Any]], float]) -> CountedMetric:
    """Return a metric of one sample, (examples,) predictions and labels, as one that is called for each of many."""

    def counted(predictions: NDArray[Any], labels: NDArray[Any], counts: Floats) -> Floats:
        times = counts.astype(np.intp)
        return np.array([metric(np.repeat(predictions, row), np.repeat(labels, row)) for row in times], dtype=np.float64)

    return counted


def by_class(predictions: NDArray[Any], labels: NDArray[Any], counts: Floats) -> tuple[Floats, Floats, Floats]:
    """Return correct predictions, labels and predictions of each class, each (samples, classes)."""
    predicted, true = predictions.astype(np.intp), labels.astype(np.intp)
    rows = np.eye(1 + int(max(predicted.max(), true.max(), 1)))
    return counts @ (rows[true] * (predicted == true)[:, None]), counts @ rows[true], counts @ rows[predicted]


def accuracy(predictions: NDArray[Any], labels: NDArray[Any], counts: Floats) -> Floats:
    """Return shares of correct predictions."""
    return _mean((predictions == labels).astype(np.float64), counts)


def f1_by_class(predictions: NDArray[Any], labels: NDArray[Any], counts: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """Return F1 of each class, and whether the class occurs among predictions or labels, both (samples, classes)."""
    right, true, predicted = by_class(predictions, labels, counts)
    occurs = true + predicted
    return 2 * right / np.maximum(occurs, 1), occurs > 0


def f1(predictions: NDArray[Any], labels: NDArray[Any], counts: Floats) -> Floats:
    """Return F1 of the second of two classes; 0 where it does not occur."""
    return f1_by_class(predictions, labels, counts)[0][:, 1]


def macro_f1(predictions: NDArray[Any], labels: NDArray[Any], counts: Floats) -> Floats:
    """Return unweighted means of the F1 of the classes that occur."""
    values, occurs = f1_by_class(predictions, labels, counts)
    means: Floats = values.sum(axis=1) / occurs.sum(axis=1)
    return means


def balanced_accuracy(predictions: NDArray[Any], labels: NDArray[Any], counts: Floats) -> Floats:
    """Return unweighted means of the recall of the classes that occur among the labels."""
    right, examples, _ = by_class(predictions, labels, counts)
    means: Floats = (right / np.maximum(examples, 1)).sum(axis=1) / (examples > 0).sum(axis=1)
    return means


def matthews_corrcoef(predictions: NDArray[Any], labels: NDArray[Any], counts: Floats) -> Floats:
    """Return Matthews correlations, 0 where predictions or labels are constant."""
    right, true, predicted = by_class(predictions, labels, counts)
    total = true.sum(axis=1)
    covariance = right.sum(axis=1) * total - (true * predicted).sum(axis=1)
    scale = (total**2 - (true**2).sum(axis=1)) * (total**2 - (predicted**2).sum(axis=1))
    return np.where(scale > 0, covariance / np.sqrt(np.where(scale > 0, scale, 1)), 0.0)


def pearson(predictions: NDArray[Any], labels: NDArray[Any], counts: Floats) -> Floats:
    """Return Pearson correlations; NaN where either side is constant."""
    sides = [side - side.mean() for side in (predictions.astype(np.float64), labels.astype(np.float64))]
    ours, theirs = sides
    terms = np.stack([ours, theirs, ours**2, theirs**2, ours * theirs], axis=1)
    means = counts @ terms / counts.sum(axis=1, keepdims=True)
    variances = means[:, 2:4] - means[:, :2] ** 2
    constant = (variances <= CONSTANT * np.mean(np.square(sides), axis=1)).any(axis=1)
    scale = np.sqrt(np.where(constant, 1.0, variances.prod(axis=1)))
    return np.where(constant, np.nan, (means[:, 4] - means[:, 0] * means[:, 1]) / scale)


def spearman(predictions: NDArray[Any], labels: NDArray[Any], counts: Floats) -> Floats:
    """Return Spearman correlations, equal scores sharing their mean rank; NaN where either side is constant."""
    middle = (counts.sum(axis=1, keepdims=True) + 1) / 2  # the mean rank
    ours, theirs = (ranks(side, counts) - middle for side in (predictions, labels))
    counted = counts * ours, counts * theirs
    covariance, *variances = (
        np.einsum("se,se->s", one, other) for one, other in ((counted[0], theirs), (counted[0], ours), (counted[1], theirs))
    )
    scale = np.sqrt(variances[0] * variances[1])
    return np.where(scale > 0, covariance / np.where(scale > 0, scale, 1), np.nan)


def ranks(scores: NDArray[Any], counts: Floats) -> Floats:
    """Return the ranks of scores in each sample, from 1 on, (samples, examples); equal scores share their mean rank."""
    distinct, inverse = np.unique(scores, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    starts = np.searchsorted(inverse[order], np.arange(len(distinct)))
    equal = np.add.reduceat(counts[:, order], starts, axis=1)
    result: Floats = (equal.cumsum(axis=1) - (equal - 1) / 2)[:, inverse]
    return result


def mse(predictions: NDArray[Any], labels: NDArray[Any], counts: Floats) -> Floats:
    """Return mean squared errors."""
    return _mean((predictions.astype(np.float64) - labels) ** 2, counts)


def _mean(values: Floats, counts: Floats) -> Floats:
    means: Floats = counts @ values / counts.sum(axis=1)
    return means


COUNTED: Mapping[str, CountedMetric] = {
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "matthews_corrcoef": matthews_corrcoef,
    "pearson": pearson,
    "spearman": spearman,
    "mse": mse,
}
"""Name of a metric in `kd.data.metrics` -> the metric of many samples."""
