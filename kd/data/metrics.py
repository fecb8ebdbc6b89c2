"""The metrics of tasks, by name: torchmetrics in float64, with its states and its reduction over ranks, and two corrections."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, MeanSquaredError, Metric, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import BinaryF1Score, MulticlassAccuracy, MulticlassF1Score, MulticlassMatthewsCorrCoef
from torchmetrics.utilities.data import dim_zero_cat


class Exact:
    """Counts become float64 before they are divided; torchmetrics takes float32, in which 89 of 100 is 0.8899999856948853."""

    def _final_state(self) -> tuple[Tensor, ...]:
        return tuple(count.double() for count in super()._final_state())  # type: ignore[misc]


class Accuracy(Exact, MulticlassAccuracy):  # type: ignore[misc]
    """Share of right predictions."""


class BinaryF1(Exact, BinaryF1Score):  # type: ignore[misc]
    """F1 of the second of two classes."""


class MacroF1(Exact, MulticlassF1Score):  # type: ignore[misc]
    """The mean of every class's F1."""


class Matthews(MulticlassMatthewsCorrCoef):
    """Matthews correlation, 0 where predictions or labels are constant, as in scikit-learn, which GLUE's scripts use.

    torchmetrics 1.9 gives 0.0256 where every one of CoLA's 1,043 dev sentences is called acceptable, and loses digits to
    float32 where a product of counts is more than 2^24.
    """

    def compute(self) -> Tensor:
        """The correlation, in [-1, 1]."""
        counts = self.confmat.double()  # type: ignore[operator]
        total, labels, predictions = counts.sum(), counts.sum(dim=1), counts.sum(dim=0)
        covariance = counts.trace() * total - labels @ predictions
        scale = (total**2 - labels @ labels) * (total**2 - predictions @ predictions)
        return covariance / scale.sqrt() if scale > 0 else torch.zeros_like(total)


class Matches(Metric):
    """Share of equal entries, in [0, 1]; it need not know how many classes there are."""

    equal: Tensor
    count: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("equal", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Count; both (positions,)."""
        self.equal += (predictions == labels).sum()
        self.count += labels.numel()

    def compute(self) -> Tensor:
        """The share."""
        return self.equal.double() / self.count


class InDouble:
    """States and updates in float64: sums over a million scores, and scores that differ in their last digits."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.set_dtype(torch.float64)  # type: ignore[attr-defined]

    def update(self, *values: Tensor) -> None:
        """Scores of both sides, (batch,)."""
        super().update(*(value.double() for value in values))  # type: ignore[misc]


class Pearson(InDouble, PearsonCorrCoef):
    """Pearson correlation, NaN where either side is constant.

    In float32 torchmetrics calls it undefined where the variance is below 0.00034 of the largest squared deviation: one
    score of ten thousand that is far from the others is enough.
    """


class SquaredError(InDouble, MeanSquaredError):
    """Mean squared error."""


class Mean(InDouble, MeanMetric):  # type: ignore[misc]
    """The mean of values."""


class Spearman(InDouble, SpearmanCorrCoef):
    """Pearson correlation of the ranks, equal scores sharing their mean rank; NaN where either side is constant.

    torchmetrics 1.9 gives 0 there, adds 1e-6 to the denominator (two scores in the right order correlate by 0.999996), and
    sums ranks in int32, which overflows where some 60,000 scores are equal.
    """

    def compute(self) -> Tensor:
        """The correlation, in [-1, 1]."""
        ours, theirs = (ranks(dim_zero_cat(scores)) for scores in (self.preds, self.target))  # type: ignore[arg-type]
        ours, theirs = ours - ours.mean(), theirs - theirs.mean()
        return (ours @ theirs) / ((ours @ ours) * (theirs @ theirs)).sqrt()


def ranks(scores: Tensor) -> Tensor:
    """Ranks from 1 on, (examples,), double; equal scores share their mean rank.

    >>> ranks(torch.tensor([3.0, 1.0, 3.0]))
    tensor([2.5000, 1.0000, 2.5000], dtype=torch.float64)
    """
    _, place, counts = torch.unique(scores, sorted=True, return_inverse=True, return_counts=True)
    found: Tensor = (counts.cumsum(0).double() - (counts.double() - 1) / 2)[place]
    return found


NEARLY_CONSTANT = 0.05
"""Standard deviation of predicted scores, as a share of that of the labels, below which they hardly differ. Our choice."""


class Collapse(Metric):
    """Whether predictions are one class, or nearly one score, where the labels are not.

    Its value is (4,): 1 if they are, else 0; the lowest prediction; the standard deviations of predictions and labels.
    """

    full_state_update = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for whose in ("predictions", "labels"):
            self.add_state(f"{whose}_least", torch.tensor(torch.inf, dtype=torch.double), dist_reduce_fx="min")
            self.add_state(f"{whose}_most", torch.tensor(-torch.inf, dtype=torch.double), dist_reduce_fx="max")
            self.add_state(f"{whose}_moments", torch.zeros(3, dtype=torch.double), dist_reduce_fx="sum")
        self.add_state("scores", torch.zeros(()), dist_reduce_fx="max")

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Take up predictions and labels, both (batch,): classes as integers, scores as floating point."""
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
        """See the class."""
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


CLASSIFICATION: Mapping[str, Callable[..., Any]] = {
    "accuracy": lambda classes, **options: Accuracy(classes, average="micro", **options),
    "f1": lambda classes, **options: BinaryF1(**options),  # of the second of two classes, as GLUE reports it
    "macro_f1": lambda classes, **options: MacroF1(classes, average="macro", **options),
    "matthews_corrcoef": Matthews,
}
"""Name -> maker, called with the number of classes."""

REGRESSION: Mapping[str, Callable[..., Any]] = {
    "pearson": Pearson,
    "spearman": Spearman,
    "mse": SquaredError,
}
"""Name -> maker."""

MASKED_LM: Mapping[str, Callable[..., Any]] = {
    "accuracy": Matches,
    "loss": Mean,
}
"""Name -> maker; over the predicted positions, `loss` in nats."""
