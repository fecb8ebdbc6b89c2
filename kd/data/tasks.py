"""Tasks: label names, hard and soft losses, and metrics, so that methods do not depend on the kind of task."""

import copy
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from kd.config.values import literal
from kd.data.direction import higher_is_better
from kd.data.labels import is_missing, label_name, listed, missing
from kd.data.metrics import CLASSIFICATION, REGRESSION, Collapse
from kd.data.texts import Example
from kd.errors import InputError, one_of
from kd.functional import logits as soft_losses
from kd.functional.hidden import OVER_EXAMPLES

NO_CLASS = -100
"""Class index of an example without a label; PyTorch's cross entropy ignores it."""

SCORE = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
"""Pattern of a score as text. Python's `float` also accepts `1_000` and digits of other scripts."""

LARGEST = 1e18
"""Bound on the magnitude of scores: below it, the sum of a batch's squared errors is finite in float32."""

SMALLEST_SPREAD = 1e-15
"""Smallest standard deviation of scores: the square of a hundredth of it is a normal number in float32."""

CLOSEST = 0.01
"""Largest ratio of the float32 spacing at the largest score to the scores' standard deviation. Our choice."""


class Task(Protocol):
    """Interface of a task for methods and engines."""

    name: str
    head: str
    """Name of its models' head, a key of `kd.models.heads.HEADS`."""
    labels: list[str] | None
    metrics: tuple[str, ...]
    monitor: str
    start: float | None
    """Initial bias of a newly initialised head; None is zero."""
    agreement: str
    """Name of the metric that measures a student's agreement with a teacher, whose predictions replace the labels."""
    row_per_example: bool
    """True if logits have a row for each example; then a run keeps those of evaluation (`kd.results.predictions`)."""
    partly_labelled: bool
    """True if training examples may have no label (`task.unlabelled`)."""
    column_classes: Mapping[str, list[str]]
    """Further column of classes (`task.extra`) -> its names, in the order of the indices in `Batch.columns`."""
    columns: Sequence[str]
    """Names of all further columns of train, also of those that edits add."""

    def encode(self, example: Example) -> float:
        """Return a raw label as a number."""
        ...

    def check_labels(self, values: Sequence[float]) -> None:
        """Check that training labels, as `encode` returns them, can be learned from, or raise an InputError."""
        ...

    def hard(self, logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        """Return the loss against the labels; logits (batch, classes), labels (batch,).

        With examples that have no label it is the mean over the others times the batch's `label_weight`, or 0 if none has one.

        Args:
            logits: the student's.
            labels: of the batch.
            reduction: `mean` over the batch; `none` gives the loss of each example, (batch,), which has that mean.
        """
        ...

    def soft(
        self, student: Tensor, teacher: Tensor, temperature: float, loss: str = "kl", reduction: str = "batchmean"
    ) -> Tensor:
        """Return the loss against a teacher's logits, both (batch, classes); no gradient flows to the teacher's.

        Args:
            student: logits.
            teacher: logits.
            temperature: > 0.
            loss: see the task.
            reduction: see `kd.functional.logits`; `none` gives the loss of each example, (batch,), whose mean is that of
                `batchmean`.
        """
        ...

    def of(self, labels: Tensor, label_weight: float = 1.0) -> Self:
        """Return the task for one batch, whose labels may determine over which positions a mean is taken.

        `label_weight` is that of the batch, a factor of the loss against the labels.
        """
        ...

    def predict(self, logits: Tensor) -> Tensor:
        """Return predictions (batch,) for logits (batch, classes)."""
        ...

    def errors(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss against the label of each example, (batch,), as `hard` has it; NaN where an example has none."""
        ...

    def ensemble(self, logits: Sequence[Tensor], weights: Tensor | None = None) -> Tensor:
        """Return logits (batch, classes) of the mean prediction of several models.

        Args:
            logits: (batch, classes) of each model.
            weights: (batch, models), of each model for each example, adding up to 1; None for equal weights.
        """
        ...

    def score(self, metrics: Mapping[str, Metric], logits: Tensor, labels: Tensor) -> None:
        """Update metrics, by name, with a batch."""
        ...

    def label_tensor(self, values: Sequence[float]) -> Tensor:
        """Return the labels of a batch as a tensor."""
        ...

    def metric(self, name: str, *, across_ranks: bool = True) -> Metric:
        """Return a new torchmetrics metric of `predict(logits)` and labels, reduced over all ranks or on this rank alone."""
        ...

    def majority_baseline(self, labels: Tensor) -> dict[str, float]:
        """Return the metrics of a constant prediction: the majority class, or the mean."""
        ...

    def constant(self, labels: Sequence[float]) -> Tensor | None:
        """Return logits (1, classes) of the best constant prediction for the training labels; None if there is none."""
        ...

    def collapse(self) -> Any:
        """Return a new `kd.data.metrics.Collapse`; None if equal predictions for all examples are normal."""
        ...


class Labelled:
    """Common parts of tasks with one label for each example."""

    head = "classifier"
    start: float | None = None
    column_classes: Mapping[str, list[str]] = {}
    columns: Sequence[str] = ()
    row_per_example = True
    partly_labelled = False
    label_weight = 1.0

    def of(self, labels: Tensor, label_weight: float = 1.0) -> Self:
        """Return the task itself, or, if examples may have no label, a copy with the batch's factor of `hard`."""
        if not self.partly_labelled:
            return self
        task = copy.copy(self)
        task.label_weight = label_weight
        return task

    def of_labelled(self, losses: Tensor, labelled: Tensor, reduction: str) -> Tensor:
        """Return the mean of the losses of labelled examples times the batch's factor; both arguments are (batch,).

        For `none` (batch,), which has that mean. An example without a label gets no gradient, but stays in the graph, so that
        every parameter has one.
        """
        factor = self.label_weight / labelled.sum().clamp(min=1)
        return (losses * labelled).sum() * factor if reduction == "mean" else losses * labelled * factor * len(losses)

    def predict(self, logits: Tensor) -> Tensor:
        """Return predictions, (batch,)."""
        raise NotImplementedError

    def collapse(self) -> Any:
        """Return a new metric that detects predictions of one class, or of nearly one score."""
        return Collapse()

    def score(self, metrics: Mapping[str, Metric], logits: Tensor, labels: Tensor) -> None:
        """Update metrics with the predictions of a batch."""
        predictions = self.predict(soft_losses.widened(logits))
        for metric in metrics.values():
            metric.update(predictions, labels)


def known_metrics(metrics: Sequence[str], monitor: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """Return the metrics of a task, after checking that all are allowed and that the monitored one is among them.

    Raises:
        InputError: for an empty list, a metric that is not allowed, or a monitored one that is not listed.
    """
    if not metrics:
        raise InputError(f"a task needs a metric of {', '.join(allowed)}", "metrics")
    for name in metrics:
        if name not in allowed:
            raise one_of(name, allowed, "metrics")
    if monitor not in metrics:
        raise one_of(monitor, tuple(metrics), "monitor")
    return tuple(metrics)


class Classification(Labelled):
    """Classification into two or more named classes.

    Args:
        name: name of the task.
        labels: class names, in the order of the logits. Two names of the same number, such as 1 and 1.0, are an error.
        codes: raw label -> class name, for files that hold numbers.
        metrics: names in `kd.data.metrics.CLASSIFICATION`; `f1` is the F1 of the second of two classes, as GLUE reports it.
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
            raise InputError(f"a classification task needs two different labels or more, got {self.names}", "labels")
        if blank := [name for name in self.names if not name.strip()]:
            raise InputError(f"a class needs a name, {literal(blank[0])} is blank", "labels")
        for raw, label in codes.items():
            if label not in self.names:
                raise InputError(f"codes maps '{raw}' to '{label}', which is not a label: {self.names}", "codes")
        self.numbers = {name: number for number, name in enumerate(self.names)}
        self.numbers.update({raw: self.numbers[label] for raw, label in codes.items() if raw not in self.numbers})
        for raw, number in list(self.numbers.items()):
            name = label_name(raw, f"the label {literal(raw)}", "labels")
            if self.numbers.setdefault(name, number) != number:
                raise InputError(f"the labels {literal(raw)} and {literal(name)} are the same number", "labels")
        self.metrics = known_metrics(metrics, monitor, tuple(CLASSIFICATION))
        self.monitor = monitor
        if "f1" in self.metrics and len(self.names) != 2:
            raise InputError(f"the metric f1 is for two classes, this task has {len(self.names)}; use macro_f1", "metrics")

    def encode(self, example: Example) -> float:
        """Return the class index of a raw label.

        Raises:
            InputError: for a label that is missing, or that the task does not have.
        """
        name = label_name(example.label, example.where)
        if name not in self.numbers:
            if is_missing(name):
                raise missing(example.label, example.where)
            raise InputError(
                f"{example.where}: unknown label {literal(name)}; the labels are {listed(list(self.numbers))}", "labels"
            )
        return self.numbers[name]

    def check_labels(self, values: Sequence[float]) -> None:
        """Check that the labels have two classes or more.

        Raises:
            InputError: if all labels are the same.
        """
        check_some(values)
        if len(set(values)) < 2:
            only = self.names[int(values[0])]
            raise InputError(f"every training example has the label '{only}'; a classifier needs two or more", "label")

    def label_tensor(self, values: Sequence[float]) -> Tensor:
        """Return class indices, (batch,), long; `NO_CLASS` for a missing one, which is NaN."""
        if self.partly_labelled:
            values = [NO_CLASS if value != value else value for value in values]
        return torch.tensor(values, dtype=torch.long)

    def hard(self, logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        """Return the cross entropy, in nats."""
        check_reduction(reduction)
        logits = soft_losses.widened(logits)
        if self.partly_labelled:
            losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=NO_CLASS)
            return self.of_labelled(losses, labels != NO_CLASS, reduction)
        return F.cross_entropy(logits, labels, reduction=reduction)

    def soft(
        self, student: Tensor, teacher: Tensor, temperature: float, loss: str = "kl", reduction: str = "batchmean"
    ) -> Tensor:
        """Return `kl` (times temperature squared), `ce` (not scaled), or `mse` of raw logits; see `kd.functional.logits`."""
        if loss == "mse":
            return soft_losses.squared_error(student, teacher, reduction)
        function = {"kl": soft_losses.kl_divergence, "ce": soft_losses.soft_cross_entropy}[loss]
        return function(student, teacher, temperature, reduction)

    def errors(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross entropy of each example in nats, (batch,)."""
        losses = F.cross_entropy(soft_losses.widened(logits), labels, reduction="none", ignore_index=NO_CLASS)
        return losses.masked_fill(labels == NO_CLASS, math.nan) if self.partly_labelled else losses

    def predict(self, logits: Tensor) -> Tensor:
        """Return the class with the largest logit, (batch,)."""
        return logits.argmax(dim=-1)

    def ensemble(self, logits: Sequence[Tensor], weights: Tensor | None = None) -> Tensor:
        """Return the log of the mean of the models' probabilities."""
        return log_mean_probability(logits, weights)

    def metric(self, name: str, *, across_ranks: bool = True) -> Metric:
        """Return a new torchmetrics metric, reduced over all ranks or on this rank alone."""
        return CLASSIFICATION[name](len(self.names), sync_on_compute=across_ranks)

    def majority_baseline(self, labels: Tensor) -> dict[str, float]:
        """Return the majority class's share as accuracy, and 0 as Matthews correlation."""
        counts = torch.bincount(labels.long(), minlength=len(self.names)).double()
        return {"accuracy": float(counts.max() / counts.sum()), "matthews_corrcoef": 0.0}

    def constant(self, labels: Sequence[float]) -> Tensor:
        """Return one-hot logits of the majority class, (1, classes); the first of equally frequent classes."""
        counts = torch.bincount(self.label_tensor(labels), minlength=len(self.names))
        return F.one_hot(counts.argmax(), len(self.names))[None].float()


class Regression(Labelled):
    """Prediction of a score. Temperature and the kind of soft loss do not apply: both losses are mean squared errors.

    Source: the losses of BERT-EMD's distillation loss for STS-B (Li et al., EMNLP 2020); arguments as `Classification`.
    """

    agreement = "pearson"

    def __init__(self, name: str, metrics: Sequence[str], monitor: str) -> None:
        self.name = name
        self.labels: list[str] | None = None
        self.metrics = known_metrics(metrics, monitor, tuple(REGRESSION))
        self.monitor = monitor

    def encode(self, example: Example) -> float:
        """Return a raw score as a number.

        Raises:
            InputError: if it is missing, not a finite number, or so large that its squared error would overflow.
        """
        value = score_of(example.label)
        if math.isnan(value):
            why = "; the label is missing" if is_missing_score(example.label) else ""
            raise InputError(f"{example.where}: the score {literal(example.label)} is not a finite number{why}", "label")
        if abs(value) >= LARGEST:
            raise InputError(
                f"{example.where}: the score {literal(example.label)} is too large, its squared error would overflow: scale "
                f"the scores to less than {LARGEST:g}",
                "label",
            )
        return value

    def check_labels(self, values: Sequence[float]) -> None:
        """Check that different scores are far enough apart for float32 arithmetic; equal scores pass.

        Raises:
            InputError: if they are too close.
        """
        check_some(values)
        scores = np.asarray(values, dtype=np.float64)
        size = float(np.abs(scores).max())
        if scores.min() == scores.max():  # can be trained on; the preflight warns of it
            return
        spread = float((scores / size).std()) * size
        if spread < SMALLEST_SPREAD or float(np.spacing(np.float32(size))) > CLOSEST * spread:
            raise InputError(
                f"the scores lie within {spread:g} (their standard deviation) of {float(scores.mean()):g}, too close for "
                "float32 arithmetic: subtract their mean and scale them",
                "label",
            )

    def label_tensor(self, values: Sequence[float]) -> Tensor:
        """Return scores, (batch,), double, for exact metrics; losses are computed in the precision of the logits."""
        return torch.tensor(values, dtype=torch.double)

    def hard(self, logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        """Return the squared error of logits (batch, 1) against labels (batch,)."""
        check_reduction(reduction)
        scores = soft_losses.widened(self.predict(logits))
        if self.partly_labelled:
            labelled = ~labels.isnan()
            targets = torch.where(labelled, labels.to(scores.dtype), scores.detach())  # NaN times 0 would be NaN
            return self.of_labelled((scores - targets) ** 2, labelled, reduction)
        return F.mse_loss(scores, labels.to(scores.dtype), reduction=reduction)

    def soft(
        self, student: Tensor, teacher: Tensor, temperature: float, loss: str = "kl", reduction: str = "batchmean"
    ) -> Tensor:
        """Return the mean squared error of the two scores, or for `none` each; other reductions and arguments are ignored."""
        return soft_losses.squared_error(student, teacher, "none" if reduction == "none" else "elementmean")

    def predict(self, logits: Tensor) -> Tensor:
        """Return scores: (batch, 1) -> (batch,)."""
        if logits.shape[-1] != 1:
            raise ValueError(f"a regression model has one output, not {logits.shape[-1]}")
        return logits.squeeze(-1)

    def errors(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the squared error of each example, (batch,)."""
        scores = soft_losses.widened(self.predict(logits))
        return (scores - labels.to(scores.dtype)) ** 2

    def ensemble(self, logits: Sequence[Tensor], weights: Tensor | None = None) -> Tensor:
        """Return the mean of the models' scores."""
        scores = torch.stack([soft_losses.widened(scores) for scores in logits])
        return scores.mean(0) if weights is None else torch.einsum("kbc,bk->bc", scores, weights.to(scores.dtype))

    def metric(self, name: str, *, across_ranks: bool = True) -> Metric:
        """Return a new torchmetrics metric, reduced over all ranks or on this rank alone."""
        return REGRESSION[name](sync_on_compute=across_ranks)

    def majority_baseline(self, labels: Tensor) -> dict[str, float]:
        """Return correlations of 0, and the variance of the labels as mean squared error."""
        return {"pearson": 0.0, "spearman": 0.0, "mse": float(labels.double().var(unbiased=False))}

    def constant(self, labels: Sequence[float]) -> Tensor:
        """Return the mean score, (1, 1)."""
        return torch.tensor(labels, dtype=torch.double).mean().float().view(1, 1)


def check_some(labels: Sequence[float]) -> None:
    """Check that there are labels.

    Raises:
        InputError: if there are none.
    """
    if not labels:
        raise InputError("no training example has a label", "label")


def check_reduction(reduction: str) -> None:
    """Check the reduction of a hard loss.

    Raises:
        ValueError: if it is neither `mean` nor `none`.
    """
    if reduction not in OVER_EXAMPLES:
        raise ValueError(f"reduction '{reduction}' is not one of {', '.join(OVER_EXAMPLES)}")


def score_of(raw: object) -> float:
    """Return a raw score as a number, NaN if it is not one; infinite only if a finite number is too large.

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


def is_missing_score(raw: object) -> bool:
    """Return whether a raw score stands for a missing value."""
    return raw is None or raw != raw or (isinstance(raw, str) and is_missing(raw.strip()))


def log_mean_probability(logits: Sequence[Tensor], weights: Tensor | None = None) -> Tensor:
    """Return the log of the mean of several models' probabilities.

    Args:
        logits: (..., classes) of each model.
        weights: (..., models), adding up to 1; None for equal weights.

    >>> log_mean_probability([torch.tensor([0.0, 0.0]), torch.tensor([0.0, -torch.inf])]).exp()
    tensor([0.7500, 0.2500])
    """
    log_probabilities = torch.stack([soft_losses.widened(one).log_softmax(dim=-1) for one in logits])
    if weights is None:
        return log_probabilities.logsumexp(0) - math.log(len(logits))
    # A weight of zero leaves a model out; its logarithm is minus infinity.
    return (log_probabilities + weights.to(log_probabilities.dtype).log().movedim(-1, 0).unsqueeze(-1)).logsumexp(0)


class Monitored(Protocol):
    """Interface of what has a metric that chooses the best checkpoint: a task, or a mixture of tasks."""

    @property
    def monitor(self) -> str:
        """Name of the metric."""
        ...


def headline(task: Monitored, students: Mapping[str, Mapping[str, float | None]]) -> str:
    """Return the name of the student with the best monitored metric; among equals the first."""
    sign = 1.0 if higher_is_better(task.monitor) else -1.0

    def value(name: str) -> float:
        metric = students[name][task.monitor]
        return -math.inf if metric is None else sign * metric

    return max(students, key=value)
