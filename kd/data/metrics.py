"""The metrics of tasks, by name: torchmetrics, and one correction."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanSquaredError, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import BinaryF1Score, MulticlassAccuracy, MulticlassF1Score, MulticlassMatthewsCorrCoef


class Matthews(MulticlassMatthewsCorrCoef):
    """Matthews correlation that is 0 where predictions or labels are constant, as in scikit-learn, which GLUE's scripts use.

    torchmetrics 1.9 gives 0.0256 where every one of CoLA's 1,043 dev sentences is called acceptable.
    """

    def compute(self) -> Tensor:
        """The correlation, in [-1, 1]."""
        constant = any(int((self.confmat.sum(dim=axis) > 0).sum()) < 2 for axis in (0, 1))  # type: ignore[operator]
        return torch.zeros((), device=self.device) if constant else super().compute()


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
