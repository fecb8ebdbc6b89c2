"""The metrics of tasks, by name: torchmetrics, and one correction."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, MeanSquaredError, Metric, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import BinaryF1Score, MulticlassAccuracy, MulticlassF1Score, MulticlassMatthewsCorrCoef


class Matthews(MulticlassMatthewsCorrCoef):
    """Matthews correlation that is 0 where predictions or labels are constant, as in scikit-learn, which GLUE's scripts use.

    torchmetrics 1.9 gives 0.0256 where every one of CoLA's 1,043 dev sentences is called acceptable.
    """

    def compute(self) -> Tensor:
        """The correlation, in [-1, 1]."""
        constant = any(int((self.confmat.sum(dim=axis) > 0).sum()) < 2 for axis in (0, 1))  # type: ignore[operator]
        return torch.zeros((), device=self.device) if constant else super().compute()


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
        return self.equal / self.count


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
    "accuracy": lambda classes, **options: MulticlassAccuracy(classes, average="micro", **options),
    "f1": lambda classes, **options: BinaryF1Score(**options),  # of the second of two classes, as GLUE reports it
    "macro_f1": lambda classes, **options: MulticlassF1Score(classes, average="macro", **options),
    "matthews_corrcoef": Matthews,
}
"""Name -> maker, called with the number of classes."""

REGRESSION: Mapping[str, Callable[..., Any]] = {
    "pearson": PearsonCorrCoef,
    "spearman": SpearmanCorrCoef,
    "mse": MeanSquaredError,
}
"""Name -> maker."""

MASKED_LM: Mapping[str, Callable[..., Any]] = {
    "accuracy": Matches,
    "loss": MeanMetric,
}
"""Name -> maker; over the predicted positions, `loss` in nats."""
