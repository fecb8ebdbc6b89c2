"""Tasks own the label names, the hard and the soft loss, and the metrics, so that no method asks what kind of task it is."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kd.data.labels import is_missing, label_name, listed, missing
from kd.data.metrics import CLASSIFICATION, REGRESSION, Collapse
from kd.data.texts import Example
from kd.errors import InputError, one_of
from kd.functional import logits as soft_losses
from kd.values import literal

SCORE = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
"""A score as text. Python's own reader also takes `1_000` and the digits of other scripts."""

LARGEST = 1e18
"""Of a score: the sum of a batch's squared errors is finite in float32 below it."""

SMALLEST = 1e-15
"""Standard deviation of scores: the square of a hundredth of it is a normal number in float32."""

CLOSEST = 0.01
"""Of the scores' standard deviation: the step between neighbouring float32 numbers where they lie, at most. Our choice."""


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

    def check_labels(self, values: Sequence[float]) -> None:
        """Raise an InputError for training labels, as `encode` gives them, from which nothing can be learned."""
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

    def majority_baseline(self, labels: Tensor) -> dict[str, float]:
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
        predictions = self.predict(soft_losses.widened(logits))
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
        labels: class names; their order is the order of the logits. Names that are the same number, 1 and 1.0, are one.
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
        if blank := [name for name in self.names if not name.strip()]:
            raise InputError(f"a class needs a name, {literal(blank[0])} is blank", "task.labels")
        for raw, label in codes.items():
            if label not in self.names:
                raise InputError(f"task.codes maps '{raw}' to '{label}', which is not a label: {self.names}", "task.codes")
        self.numbers = {name: number for number, name in enumerate(self.names)}
        self.numbers.update({raw: self.numbers[label] for raw, label in codes.items() if raw not in self.numbers})
        for raw, number in list(self.numbers.items()):
            name = label_name(raw, f"the label {literal(raw)}", "task.labels")
            if self.numbers.setdefault(name, number) != number:
                raise InputError(f"the labels {literal(raw)} and {literal(name)} are the same number", "task.labels")
        self.metrics = known_metrics(metrics, monitor, tuple(CLASSIFICATION))
        self.monitor = monitor
        if "f1" in self.metrics and len(self.names) != 2:
            raise InputError(f"the metric f1 is for two classes, this task has {len(self.names)}; use macro_f1", "task.metrics")

    def encode(self, example: Example) -> float:
        """The class index of a raw label.

        Raises:
            InputError: for a label that is missing, or that the task does not have.
        """
        name = label_name(example.label, example.where)
        if name not in self.numbers:
            if is_missing(name):
                raise missing(example.label, example.where)
            raise InputError(
                f"{example.where}: unknown label {literal(name)}; the labels are {listed(list(self.numbers))}", "task.labels"
            )
        return self.numbers[name]

    def check_labels(self, values: Sequence[float]) -> None:
        """Check that there are two classes or more.

        Raises:
            InputError: if there is one.
        """
        if len(set(values)) < 2:
            only = self.names[int(values[0])]
            raise InputError(f"every training example has the label '{only}'; a classifier needs two or more", "task.label")

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

    def majority_baseline(self, labels: Tensor) -> dict[str, float]:
        """The majority class's share, as accuracy; 0 as Matthews correlation."""
        counts = torch.bincount(labels.long(), minlength=len(self.names)).double()
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
            InputError: if it is missing, none, or too large for its squared error.
        """
        value = score_of(example.label)
        if math.isnan(value):
            why = "; the label is missing" if is_missing_score(example.label) else ""
            raise InputError(f"{example.where}: the score {literal(example.label)} is not a finite number{why}", "task.label")
        if abs(value) >= LARGEST:
            raise InputError(
                f"{example.where}: the score {literal(example.label)} is too large, its squared error would overflow: scale "
                f"the scores to less than {LARGEST:g}",
                "task.label",
            )
        return value

    def check_labels(self, values: Sequence[float]) -> None:
        """Check that scores that differ do so by enough for float32 arithmetic.

        Raises:
            InputError: if they do not.
        """
        scores = np.asarray(values, dtype=np.float64)
        size = float(np.abs(scores).max())
        if scores.min() == scores.max():  # a poor task, which the preflight warns of, and not an impossible one
            return
        spread = float((scores / size).std()) * size
        if spread < SMALLEST or float(np.spacing(np.float32(size))) > CLOSEST * spread:
            raise InputError(
                f"the scores lie within {spread:g} (their standard deviation) of {float(scores.mean()):g}, too close for "
                "float32 arithmetic: subtract their mean and scale them",
                "task.label",
            )

    def label_tensor(self, values: Sequence[float]) -> Tensor:
        """(batch,), double: a metric is of the scores as they are; losses are in the precision of the logits."""
        return torch.tensor(values, dtype=torch.double)

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

    def majority_baseline(self, labels: Tensor) -> dict[str, float]:
        """Correlations of 0; the variance, as mean squared error."""
        return {"pearson": 0.0, "spearman": 0.0, "mse": float(labels.double().var(unbiased=False))}

    def constant(self, labels: Sequence[float]) -> Tensor:
        """The mean score."""
        return torch.tensor(labels, dtype=torch.double).mean().float().view(1, 1)


def score_of(raw: Any) -> float:
    """The number of a raw score, NaN if it is none; infinite only where a finite number is too large.

    >>> [score_of(raw) for raw in (" 0.25", "1e3", 3, True, "1_000", "inf", float("inf"), "1e400")]
    [0.25, 1000.0, 3.0, nan, nan, nan, nan, inf]
    """
    if isinstance(raw, str):
        return float(raw) if SCORE.fullmatch(raw.strip()) else math.nan
    if isinstance(raw, bool) or not isinstance(raw, int | float) or (isinstance(raw, float) and math.isinf(raw)):
        return math.nan
    try:
        return float(raw)
    except OverflowError:
        return math.inf


def is_missing_score(raw: Any) -> bool:
    """Return whether a raw score is what tables hold where a value is missing."""
    return raw is None or raw != raw or (isinstance(raw, str) and is_missing(raw.strip()))


def log_mean_probability(logits: Sequence[Tensor]) -> Tensor:
    """Log of the mean of several models' probabilities, (..., classes) each.

    >>> log_mean_probability([torch.tensor([0.0, 0.0]), torch.tensor([0.0, -torch.inf])]).exp()
    tensor([0.7500, 0.2500])
    """
    each = torch.stack([soft_losses.widened(one).log_softmax(dim=-1) for one in logits])
    return each.logsumexp(0) - math.log(len(logits))


def higher_is_better(metric: str) -> bool:
    """Return whether more is better; true for every metric but an error."""
    return metric not in ("mse", "loss")
