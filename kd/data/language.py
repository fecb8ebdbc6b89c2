"""Masked language modelling as a task."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from kd.data.metrics import MASKED_LM
from kd.data.tasks import known_metrics, log_mean_probability
from kd.data.texts import Example
from kd.functional import logits as soft_losses

NOT_PREDICTED = -100
"""Label of a position that a masked language model does not predict."""


class MaskedLM:
    """Masked tokens of text without labels, to be predicted from the others.

    Labels are (batch, tokens), `NOT_PREDICTED` wherever nothing is predicted; logits are (predicted positions, vocabulary) in
    row-major order. A mean is over the predicted positions of each example, then over the examples (our choice; BERT's is over
    all positions of the batch): it then depends neither on how many ranks share a batch nor on how many batches make a step.

    Source: Devlin et al., NAACL 2019, arXiv:1810.04805, section 3.1.

    Args:
        name: of the task.
        metrics: of `kd.data.metrics.MASKED_LM`, over the predicted positions; `loss` in nats.
        monitor: the metric that chooses the best checkpoint.
    """

    head = "masked_lm"
    agreement = "accuracy"
    start: float | None = None

    def __init__(self, name: str, metrics: Sequence[str], monitor: str) -> None:
        self.name = name
        self.labels: list[str] | None = None
        self.metrics = known_metrics(metrics, monitor, tuple(MASKED_LM))
        self.monitor = monitor
        self._labels: Tensor | None = None

    def encode(self, example: Example) -> float:
        """Text has no label; what is predicted is drawn when a batch is made."""
        return 0.0

    def check_labels(self, values: Sequence[float]) -> None:
        """Nothing: there are none."""

    def label_tensor(self, values: Sequence[float]) -> Tensor:
        """(batch,), for what knows no better."""
        return torch.tensor(values)

    def of(self, labels: Tensor) -> Self:
        """The task of a batch with these labels, which say to which example a position belongs."""
        task = copy.copy(self)
        task._labels = labels
        return task

    def hard(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy in nats, logits (predicted positions, vocabulary), labels (batch, tokens)."""
        losses = F.cross_entropy(soft_losses.widened(logits), labels[labels != NOT_PREDICTED], reduction="none")
        return by_example(losses, labels).mean()

    def soft(
        self, student: Tensor, teacher: Tensor, temperature: float, loss: str = "kl", reduction: str = "batchmean"
    ) -> Tensor:
        """As of a classification, with the mean over an example's positions in place of an example.

        Raises:
            ValueError: without the labels of a batch, see `of`.
        """
        if self._labels is None:
            raise ValueError("which positions belong together is known of a batch only: task.of(batch.labels).soft(...)")
        if loss == "mse":
            losses = soft_losses.squared_error(student, teacher, "none")
        else:
            function = {"kl": soft_losses.kl_divergence, "ce": soft_losses.soft_cross_entropy}[loss]
            losses = function(student, teacher, temperature, "none")
        found = by_example(losses, self._labels)
        mean = found.mean()
        return {"none": found, "sum": found.sum(), "batchmean": mean, "elementmean": mean / student.shape[-1]}[reduction]

    def predict(self, logits: Tensor) -> Tensor:
        """The token with the largest logit, (predicted positions,)."""
        return logits.argmax(dim=-1)

    def ensemble(self, logits: Sequence[Tensor]) -> Tensor:
        """Log of the mean of the probabilities."""
        return log_mean_probability(logits)

    def score(self, metrics: Mapping[str, Any], logits: Tensor, labels: Tensor) -> None:
        """Update metrics with the predicted positions of a batch."""
        wanted, logits = labels[labels != NOT_PREDICTED], logits.float()
        given = {
            "accuracy": lambda: (self.predict(logits), wanted),
            "loss": lambda: (F.cross_entropy(logits, wanted, reduction="none"),),
        }
        for name, metric in metrics.items():
            metric.update(*given[name]())

    def metric(self, name: str, across_ranks: bool = True) -> Any:
        """A torchmetrics metric."""
        return MASKED_LM[name](sync_on_compute=across_ranks)

    def majority_baseline(self, labels: Tensor) -> dict[str, float]:
        """Unknown: it is a matter of the vocabulary."""
        return {}

    def constant(self, labels: Sequence[float]) -> None:
        """None: the labels are the text's own words."""

    def collapse(self) -> None:
        """None: a model that has just begun says the most frequent word everywhere."""


def by_example(values: Tensor, labels: Tensor) -> Tensor:
    """The mean over the predicted positions of each example, (batch,).

    Args:
        values: (predicted positions,), in row-major order.
        labels: (batch, tokens); every row has a predicted position.

    >>> by_example(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([[7, -100, 7], [-100, 7, -100]]))
    tensor([2., 5.])
    """
    predicted = labels != NOT_PREDICTED
    row = predicted.nonzero()[:, 0]
    return values.new_zeros(len(labels)).index_add(0, row, values) / predicted.sum(dim=1)
