"""The metrics of tasks, by name: torchmetrics' in float64, with its states and reduction over ranks, and two corrections."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, MeanSquaredError, Metric, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import BinaryF1Score, MulticlassAccuracy, MulticlassF1Score, MulticlassMatthewsCorrCoef
from torchmetrics.utilities.data import dim_zero_cat


class Exact:
    """Mixin that divides counts in float64; torchmetrics uses float32, in which 89 of 100 is 0.8899999856948853."""

    def _final_state(self) -> tuple[Tensor, ...]:
        return tuple(count.double() for count in super()._final_state())  # type: ignore[misc]


class Accuracy(Exact, MulticlassAccuracy):  # type: ignore[misc]
    """Share of correct predictions, in [0, 1]."""


class BinaryF1(Exact, BinaryF1Score):  # type: ignore[misc]
    """F1 of the second of two classes."""


class MacroF1(Exact, MulticlassF1Score):  # type: ignore[misc]
    """Unweighted mean of the F1 of all classes."""


class BalancedAccuracy(Exact, MulticlassAccuracy):  # type: ignore[misc]
    """Unweighted mean of the recall of the classes that occur among the labels, in [0, 1], as in scikit-learn.

    torchmetrics 1.9 counts a class that is predicted but has no example as a recall of 0.
    """

    def compute(self) -> Tensor:
        """Return the mean recall."""
        right, _, _, missed = self._final_state()
        examples = right + missed
        return (right / examples)[examples > 0].mean()


class Matthews(MulticlassMatthewsCorrCoef):
    """Matthews correlation, 0 where predictions or labels are constant, as in scikit-learn, which GLUE's scripts use.

    torchmetrics 1.9 gives 0.0256 if all of CoLA's 1,043 dev sentences are predicted to be acceptable, and loses precision in
    float32 if a product of counts exceeds 2^24.
    """

    def compute(self) -> Tensor:
        """Return the correlation, in [-1, 1]."""
        counts = self.confmat.double()  # type: ignore[operator]
        total, labels, predictions = counts.sum(), counts.sum(dim=1), counts.sum(dim=0)
        covariance = counts.trace() * total - labels @ predictions
        scale = (total**2 - labels @ labels) * (total**2 - predictions @ predictions)
        return covariance / scale.sqrt() if scale > 0 else torch.zeros_like(total)


class InDouble:
    """Mixin for states and updates in float64, which sums over a million scores, or of nearly equal scores, need."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.set_dtype(torch.float64)  # type: ignore[attr-defined]

    def update(self, *values: Tensor) -> None:
        """Add the values of a batch, (batch,) each."""
        super().update(*(value.double() for value in values))  # type: ignore[misc]


class Pearson(InDouble, PearsonCorrCoef):
    """Pearson correlation, NaN where either side is constant.

    In float32 torchmetrics treats it as undefined if the variance is below 0.00034 of the largest squared deviation: one
    outlier among ten thousand scores is enough.
    """


class SquaredError(InDouble, MeanSquaredError):
    """Mean squared error."""


class Mean(InDouble, MeanMetric):  # type: ignore[misc]
    """Mean of the values."""


class Matches(Mean):  # type: ignore[misc]
    """Share of predictions that equal their label, in [0, 1], without a number of classes."""

    def update(self, predictions: Tensor, labels: Tensor) -> None:  # type: ignore[override]
        """Add the matches of a batch; predictions and labels are both (positions,)."""
        super().update(predictions == labels)


class Spearman(InDouble, SpearmanCorrCoef):
    """Pearson correlation of the ranks, equal scores sharing their mean rank; NaN where either side is constant.

    torchmetrics 1.9 gives 0 there, adds 1e-6 to the denominator (two scores in the right order correlate by 0.999996), and
    sums ranks in int32, which overflows where some 60,000 scores are equal.
    """

    def compute(self) -> Tensor:
        """Return the correlation, in [-1, 1]."""
        ours, theirs = (ranks(dim_zero_cat(scores)) for scores in (self.preds, self.target))  # type: ignore[arg-type]
        ours, theirs = ours - ours.mean(), theirs - theirs.mean()
        return (ours @ theirs) / ((ours @ ours) * (theirs @ theirs)).sqrt()


def ranks(scores: Tensor) -> Tensor:
    """Return ranks from 1 on, (examples,), double; equal scores share their mean rank.

    >>> ranks(torch.tensor([3.0, 1.0, 3.0]))
    tensor([2.5000, 1.0000, 2.5000], dtype=torch.float64)
    """
    _, inverse, counts = torch.unique(scores, sorted=True, return_inverse=True, return_counts=True)
    result: Tensor = (counts.cumsum(0).double() - (counts.double() - 1) / 2)[inverse]
    return result


NEARLY_CONSTANT = 0.05
"""Ratio of the standard deviations of predicted scores and labels below which predictions count as constant. Our choice."""


class Collapse(Metric):
    """Metric for collapsed predictions: all of one class, or nearly one score, although the labels differ."""

    full_state_update = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for whose in ("predictions", "labels"):
            self.add_state(f"{whose}_least", torch.tensor(torch.inf, dtype=torch.double), dist_reduce_fx="min")
            self.add_state(f"{whose}_most", torch.tensor(-torch.inf, dtype=torch.double), dist_reduce_fx="max")
            self.add_state(f"{whose}_moments", torch.zeros(3, dtype=torch.double), dist_reduce_fx="sum")
        self.add_state("scores", torch.zeros(()), dist_reduce_fx="max")

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Add predictions and labels of a batch, both (batch,): classes as integers, scores as floating point."""
        if predictions.is_floating_point():
            self.scores = torch.ones_like(self.scores)  # type: ignore[has-type]
        for whose, values in {"predictions": predictions.double(), "labels": labels.double()}.items():
            if not values.numel():
                continue
            setattr(self, f"{whose}_least", torch.minimum(getattr(self, f"{whose}_least"), values.min()))
            setattr(self, f"{whose}_most", torch.maximum(getattr(self, f"{whose}_most"), values.max()))
            moments = torch.stack([torch.ones_like(values), values, values.square()]).sum(dim=1)
            setattr(self, f"{whose}_moments", getattr(self, f"{whose}_moments") + moments)

    def compute(self) -> Tensor:
        """Return (4,): 1 for collapsed predictions, else 0; the lowest one; standard deviations of predictions and labels."""
        spreads = []
        for whose in ("predictions", "labels"):
            count, total, squares = getattr(self, f"{whose}_moments")
            spreads.append((squares / count - (total / count).square()).clamp(min=0).sqrt())
        least, most = self.predictions_least, self.predictions_most
        alike: Tensor = least == most  # type: ignore[assignment]
        if self.scores:
            alike = alike | (spreads[0] < NEARLY_CONSTANT * spreads[1])
        alike = alike & (self.labels_least < self.labels_most)  # type: ignore[operator]
        return torch.stack([alike.double(), least, *spreads])  # type: ignore[list-item]


CLASSIFICATION: Mapping[str, Callable[..., Metric]] = {
    "accuracy": lambda classes, **options: Accuracy(classes, average="micro", **options),
    "balanced_accuracy": lambda classes, **options: BalancedAccuracy(classes, average="none", **options),
    "f1": lambda classes, **options: BinaryF1(**options),  # of the second of two classes, as GLUE reports it
    "macro_f1": lambda classes, **options: MacroF1(classes, average="macro", **options),
    "matthews_corrcoef": Matthews,
}
"""Name -> function or class that builds the metric, called with the number of classes."""

REGRESSION: Mapping[str, Callable[..., Metric]] = {
    "pearson": Pearson,
    "spearman": Spearman,
    "mse": SquaredError,
}
"""Name -> class of the metric."""

MASKED_LM: Mapping[str, Callable[..., Metric]] = {
    "accuracy": Matches,
    "loss": Mean,
}
"""Name -> class of the metric, over the predicted positions; `loss` in nats."""


def finite_or_none(value: float) -> float | None:
    """Return a value, or None if it is not finite, as JSON has no NaN: the correlation with a constant is undefined."""
    return value if math.isfinite(value) else None
