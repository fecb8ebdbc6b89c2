"""Masked language modelling as a task."""

import copy
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from kd.data.metrics import MASKED_LM
from kd.data.tasks import known_metrics, log_mean_probability
from kd.data.texts import Example
from kd.functional import logits as soft_losses
from kd.functional.hidden import over_examples

NOT_PREDICTED = -100
"""Label of a position that a masked language model does not predict."""


class MaskedLM:
    """Prediction of the masked tokens of unlabelled text.

    Labels are (batch, tokens), `NOT_PREDICTED` at positions that are not predicted; logits are (predicted positions,
    vocabulary) in row-major order. A mean is over the predicted positions of each example, then over the examples (our choice;
    BERT's is over all positions of the batch): it then depends neither on the number of ranks nor on that of the batches in an
    optimiser step. An example without predicted positions, which `MaskedTokens` does not make, has a loss of 0, and counts as
    one of the examples.

    Source: Devlin et al., NAACL 2019, arXiv:1810.04805, section 3.1.

    Args:
        name: name of the task.
        metrics: names in `kd.data.metrics.MASKED_LM`, over the predicted positions; `loss` in nats.
        monitor: the metric that chooses the best checkpoint.
    """

    head = "masked_lm"
    agreement = "accuracy"
    start: float | None = None
    column_classes: Mapping[str, list[str]] = {}
    columns: Sequence[str] = ()
    row_per_example = False
    partly_labelled = False

    def __init__(self, name: str, metrics: Sequence[str], monitor: str) -> None:
        self.name = name
        self.labels: list[str] | None = None
        self.metrics = known_metrics(metrics, monitor, tuple(MASKED_LM))
        self.monitor = monitor
        self._labels: Tensor | None = None

    def encode(self, example: Example) -> float:
        """Return 0: text has no label, and the positions to predict are drawn when a batch is collated."""
        return 0.0

    def check_labels(self, values: Sequence[float]) -> None:
        """Accept any values, because there are no labels to check."""

    def label_tensor(self, values: Sequence[float]) -> Tensor:
        """Return placeholder labels, (batch,); `MaskedCollate` gives the labels that are used."""
        return torch.tensor(values)

    def of(self, labels: Tensor, label_weight: float = 1.0) -> Self:
        """Return a copy of the task for a batch with these labels, which assign predicted positions to examples."""
        task = copy.copy(self)
        task._labels = labels
        return task

    def hard(self, logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        """Return the cross entropy in nats; logits (predicted positions, vocabulary), labels (batch, tokens).

        For `none` (batch,), the mean over the predicted positions of each example.
        """
        losses = F.cross_entropy(soft_losses.widened(logits), labels[labels != NOT_PREDICTED], reduction="none")
        return over_examples(by_example(losses, labels), reduction)

    def soft(
        self, student: Tensor, teacher: Tensor, temperature: float, loss: str = "kl", reduction: str = "batchmean"
    ) -> Tensor:
        """Return the loss against a teacher's logits, both (predicted positions, vocabulary).

        As in `Classification`, except that the loss of an example is the mean over its predicted positions.

        Raises:
            ValueError: if the task does not hold the labels of a batch; see `of`.
        """
        if self._labels is None:
            raise ValueError("the positions of an example are known only for a batch: use task.of(batch.labels).soft(...)")
        if loss == "mse":
            losses = soft_losses.squared_error(student, teacher, "none")
        else:
            function = {"kl": soft_losses.kl_divergence, "ce": soft_losses.soft_cross_entropy}[loss]
            losses = function(student, teacher, temperature, "none")
        means = by_example(losses, self._labels)
        mean = means.mean()
        return {"none": means, "sum": means.sum(), "batchmean": mean, "elementmean": mean / student.shape[-1]}[reduction]

    def predict(self, logits: Tensor) -> Tensor:
        """Return the token with the largest logit, (predicted positions,)."""
        return logits.argmax(dim=-1)

    def errors(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross entropy over the predicted positions of each example in nats, (batch,)."""
        return self.hard(logits, labels, "none")

    def ensemble(self, logits: Sequence[Tensor], weights: Tensor | None = None) -> Tensor:
        """Return the log of the mean of the models' probabilities; an example's weights are those of its positions.

        Raises:
            ValueError: for weights, if the task does not hold the labels of a batch; see `of`.
        """
        if weights is None:
            return log_mean_probability(logits)
        if self._labels is None:
            raise ValueError("the positions of an example are known only for a batch: use task.of(batch.labels)")
        examples, _ = (self._labels != NOT_PREDICTED).nonzero(as_tuple=True)
        return log_mean_probability(logits, weights[examples])

    def score(self, metrics: Mapping[str, Metric], logits: Tensor, labels: Tensor) -> None:
        """Update metrics with the predicted positions of a batch."""
        wanted, logits = labels[labels != NOT_PREDICTED], logits.float()
        given = {
            "accuracy": lambda: (self.predict(logits), wanted),
            "loss": lambda: (F.cross_entropy(logits, wanted, reduction="none"),),
        }
        for name, metric in metrics.items():
            metric.update(*given[name]())

    def metric(self, name: str, *, across_ranks: bool = True) -> Metric:
        """Return a new torchmetrics metric, reduced over all ranks or on this rank alone."""
        return MASKED_LM[name](sync_on_compute=across_ranks)

    def majority_baseline(self, labels: Tensor) -> dict[str, float]:
        """Return an empty dict: there is no majority baseline, because the most frequent token depends on the vocabulary."""
        return {}

    def constant(self, labels: Sequence[float]) -> None:
        """Return None: the labels are the tokens of the text."""

    def collapse(self) -> None:
        """Return None: predicting the most frequent token everywhere is normal early in training."""


def by_example(values: Tensor, labels: Tensor) -> Tensor:
    """Return the mean over the predicted positions of each example, (batch,); 0 for an example without any.

    Args:
        values: (predicted positions,), in row-major order.
        labels: (batch, tokens).

    >>> by_example(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([[7, -100, 7], [-100, 7, -100]]))
    tensor([2., 5.])
    """
    predicted = labels != NOT_PREDICTED
    row = predicted.nonzero()[:, 0]
    return values.new_zeros(len(labels)).index_add(0, row, values) / predicted.sum(dim=1).clamp(min=1)
