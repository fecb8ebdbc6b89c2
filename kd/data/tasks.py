"""Tasks own the label names, the hard and the soft loss, and the metrics, so that no method asks what kind of task it is."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from kd.data.metrics import CLASSIFICATION, REGRESSION, Collapse
from kd.data.sources import Example
from kd.errors import InputError, one_of
from kd.functional import logits as soft_losses


class Task(Protocol):
    """What a method and an engine need of a task."""

    name: str
    head: str
    """What its models end in, of `kd.models.heads.HEADS`."""
    labels: list[str] | None
    metrics: tuple[str, ...]
    monitor: str
    start: float | None
    """Where the bias of a head that is drawn afresh begins; None is zero."""
    agreement: str
    """The metric that, with a teacher's predictions in place of the labels, says how far a student agrees with it."""

    def encode(self, example: Example) -> float:
        """The number of a raw label."""
        ...

    def hard(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss against the labels; logits (batch, classes), labels (batch,); mean over the batch."""
        ...

    def soft(
        self, student: Tensor, teacher: Tensor, temperature: float, loss: str = "kl", reduction: str = "batchmean"
    ) -> Tensor:
        """Loss against a teacher's logits, both (batch, classes)."""
        ...

    def of(self, labels: Tensor) -> Self:
        """The task as it stands for one batch, whose labels may say what a mean is taken over."""
        ...

    def predict(self, logits: Tensor) -> Tensor:
        """Predictions (batch,) from logits (batch, classes)."""
        ...

    def ensemble(self, logits: Sequence[Tensor]) -> Tensor:
        """Logits (batch, classes) of the mean prediction of several models."""
        ...

    def score(self, metrics: Mapping[str, Any], logits: Tensor, labels: Tensor) -> None:
        """Update metrics, by name, with a batch."""
        ...

    def label_tensor(self, values: Sequence[float]) -> Tensor:
        """Labels of a batch as a tensor."""
        ...

    def metric(self, name: str, across_ranks: bool = True) -> Any:
        """A fresh torchmetrics metric over `predict(logits)` and labels, reduced over all ranks or of this one alone."""
        ...

    def chance(self, labels: Tensor) -> dict[str, float]:
        """What predicting without looking scores: the majority class, or the mean."""
        ...

    def constant(self, labels: Sequence[float]) -> Tensor | None:
        """Logits (1, classes) of a prediction without looking, given the training labels; None where there is no such thing."""
        ...

    def collapse(self) -> Any:
        """A fresh `kd.data.metrics.Collapse`; None where one prediction for all examples is nothing unusual."""
        ...


class Labelled:
    """What tasks with one label for each example have in common."""

    head = "classifier"
    start: float | None = None

    def of(self, labels: Tensor) -> Self:
        """Itself: a mean over the batch is a mean over its rows."""
        return self

    def predict(self, logits: Tensor) -> Tensor:
        """Predictions, (batch,)."""
        raise NotImplementedError

    def collapse(self) -> Any:
        """A fresh metric that tells whether predictions are one class, or nearly one score."""
        return Collapse()

    def score(self, metrics: Mapping[str, Any], logits: Tensor, labels: Tensor) -> None:
        """Update metrics with the predictions of a batch."""
        predictions = self.predict(logits.float())
        for metric in metrics.values():
            metric.update(predictions, labels)


def known_metrics(metrics: Sequence[str], monitor: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """The metrics of a task, if all of them are allowed and the monitored one is among them.

    Raises:
        InputError: for one that is not.
    """
    if not metrics:
        raise InputError(f"a task needs a metric of {', '.join(allowed)}", "task.metrics")
    for name in metrics:
        if name not in allowed:
            raise one_of(name, allowed, "task.metrics")
    if monitor not in metrics:
        raise one_of(monitor, tuple(metrics), "task.monitor")
    return tuple(metrics)


class Classification(Labelled):
    """One of several named classes.

    Args:
        name: of the task.
        labels: class names; their order is the order of the logits.
        codes: raw label -> class name, for files that hold numbers.
        metrics: of `kd.data.metrics.CLASSIFICATION`; `f1` is the F1 of the second of two classes, as GLUE reports it.
        monitor: the metric that chooses the best checkpoint.
    """

    agreement = "accuracy"

    def __init__(
        self, name: str, labels: Sequence[str], codes: Mapping[str, str], metrics: Sequence[str], monitor: str
    ) -> None:
        self.name = name
        self.labels: list[str] | None = list(labels)
        self.names = list(labels)
        if len(self.names) < 2 or len(set(self.names)) != len(self.names):
            raise InputError(f"a classification task needs two different labels or more, got {self.names}", "task.labels")
        for raw, label in codes.items():
            if label not in self.names:
                raise InputError(f"task.codes maps '{raw}' to '{label}', which is not a label: {self.names}", "task.codes")
        self.numbers = {name: number for number, name in enumerate(self.names)}
        self.numbers.update({raw: self.numbers[label] for raw, label in codes.items() if raw not in self.numbers})
        self.metrics = known_metrics(metrics, monitor, tuple(CLASSIFICATION))
        self.monitor = monitor
        if "f1" in self.metrics and len(self.names) != 2:
            raise InputError(f"the metric f1 is for two classes, this task has {len(self.names)}; use macro_f1", "task.metrics")

    def encode(self, example: Example) -> float:
        """The class index of a raw label.

        Raises:
            InputError: for a label that the task does not have.
        """
        raw = str(example.label).strip()
        if raw not in self.numbers:
            raise InputError(f"{example.where}: unknown label '{raw}'; the labels are {', '.join(self.numbers)}", "task.labels")
        return self.numbers[raw]

    def label_tensor(self, values: Sequence[float]) -> Tensor:
        """(batch,), long."""
        return torch.tensor(values, dtype=torch.long)

    def hard(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy, in nats."""
        return F.cross_entropy(soft_losses.widened(logits), labels)

    def soft(
        self, student: Tensor, teacher: Tensor, temperature: float, loss: str = "kl", reduction: str = "batchmean"
    ) -> Tensor:
        """`kl` (times temperature squared), `ce` (not), or `mse` of raw logits; see `kd.functional.logits`."""
        if loss == "mse":
            return soft_losses.squared_error(student, teacher, reduction)
        function = {"kl": soft_losses.kl_divergence, "ce": soft_losses.soft_cross_entropy}[loss]
        return function(student, teacher, temperature, reduction)

    def predict(self, logits: Tensor) -> Tensor:
        """The class with the largest logit, (batch,)."""
        return logits.argmax(dim=-1)

    def ensemble(self, logits: Sequence[Tensor]) -> Tensor:
        """Log of the mean of the probabilities."""
        return log_mean_probability(logits)

    def metric(self, name: str, across_ranks: bool = True) -> Any:
        """A torchmetrics metric."""
        return CLASSIFICATION[name](len(self.names), sync_on_compute=across_ranks)

    def chance(self, labels: Tensor) -> dict[str, float]:
        """The majority class's share, as accuracy; 0 as Matthews correlation."""
        counts = torch.bincount(labels.long(), minlength=len(self.names))
        return {"accuracy": float(counts.max() / counts.sum()), "matthews_corrcoef": 0.0}

    def constant(self, labels: Sequence[float]) -> Tensor:
        """The majority class; the first of equal ones."""
        counts = torch.bincount(self.label_tensor(labels), minlength=len(self.names))
        return F.one_hot(counts.argmax(), len(self.names))[None].float()


class Regression(Labelled):
    """A score. Temperature and the form of the soft loss do not apply: both losses are mean squared errors.

    Source: the losses of BERT-EMD's distillation loss for STS-B (Li et al., EMNLP 2020); arguments as `Classification`.
    """

    agreement = "pearson"

    def __init__(self, name: str, metrics: Sequence[str], monitor: str) -> None:
        self.name = name
        self.labels: list[str] | None = None
        self.metrics = known_metrics(metrics, monitor, tuple(REGRESSION))
        self.monitor = monitor

    def encode(self, example: Example) -> float:
        """The score as a number.

        Raises:
            InputError: if it is none.
        """
        try:
            value = float(example.label)
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise InputError(f"{example.where}: the score '{example.label}' is not a finite number", "task.label")
        return value

    def label_tensor(self, values: Sequence[float]) -> Tensor:
        """(batch,), float."""
        return torch.tensor(values, dtype=torch.float)

    def hard(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean squared error of logits (batch, 1) against labels (batch,)."""
        scores = soft_losses.widened(self.predict(logits))
        return F.mse_loss(scores, labels.to(scores.dtype))

    def soft(
        self, student: Tensor, teacher: Tensor, temperature: float, loss: str = "kl", reduction: str = "batchmean"
    ) -> Tensor:
        """Mean squared error of the two scores, whatever the other arguments."""
        return soft_losses.squared_error(student, teacher, "elementmean")

    def predict(self, logits: Tensor) -> Tensor:
        """(batch, 1) -> (batch,)."""
        if logits.shape[-1] != 1:
            raise ValueError(f"a regression model has one output, not {logits.shape[-1]}")
        return logits.squeeze(-1)

    def ensemble(self, logits: Sequence[Tensor]) -> Tensor:
        """The mean of the scores."""
        return torch.stack([soft_losses.widened(each) for each in logits]).mean(0)

    def metric(self, name: str, across_ranks: bool = True) -> Any:
        """A torchmetrics metric."""
        return REGRESSION[name](sync_on_compute=across_ranks)

    def chance(self, labels: Tensor) -> dict[str, float]:
        """Correlations of 0; the variance, as mean squared error."""
        return {"pearson": 0.0, "spearman": 0.0, "mse": float(labels.float().var(unbiased=False))}

    def constant(self, labels: Sequence[float]) -> Tensor:
        """The mean score."""
        return torch.tensor(labels, dtype=torch.double).mean().float().view(1, 1)


def log_mean_probability(logits: Sequence[Tensor]) -> Tensor:
    """Log of the mean of several models' probabilities, (..., classes) each.

    >>> log_mean_probability([torch.tensor([0.0, 0.0]), torch.tensor([0.0, -torch.inf])]).exp()
    tensor([0.7500, 0.2500])
    """
    each = torch.stack([soft_losses.widened(one).log_softmax(dim=-1) for one in logits])
    return each.logsumexp(0) - math.log(len(logits))


def higher_is_better(metric: str) -> bool:
    """Whether more is better; true for every metric but an error."""
    return metric not in ("mse", "loss")
