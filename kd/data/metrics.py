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
