"""Evaluation of models: metrics, agreement with teachers, size and latency."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kd.data.batch import Batch
from kd.data.labels import given_labels
from kd.data.metrics import finite_or_none
from kd.data.tasks import Task
from kd.forward import Needs
from kd.models import Encoder, FrozenTeacher
from kd.results.predictions import Logits
from kd.system import distributed

Scores = dict[str, float | None]


@dataclass
class Evaluation:
    """Metrics of all models on one split; None where a metric is undefined.

    Attributes:
        students: name -> metric -> value.
        teachers: name -> metric -> value.
        agreement: student -> teacher -> share of examples with the same predicted class, or Pearson correlation of the scores.
        ensemble: metrics of the students' mean prediction; empty for one student.
        collapsed: student -> True if it predicts a single class, or nearly the same score for every example.
        logits: logits of all models, from all ranks; None for a task whose logits have no row for each example.
    """

    students: dict[str, Scores]
    teachers: dict[str, Scores]
    agreement: dict[str, Scores]
    ensemble: Scores
    collapsed: dict[str, bool] = field(default_factory=dict)
    logits: Logits | None = None


@dataclass
class Rows:
    """Logits of the batches of this rank, in float32.

    Attributes:
        index: position of each example in its split, by batch.
        students: name -> logits by batch, each (batch, classes).
        teachers: the same for the teachers.
    """

    index: list[torch.Tensor] = field(default_factory=list)
    students: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    teachers: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def add(self, index: torch.Tensor, students: Mapping[str, torch.Tensor], teachers: Mapping[str, torch.Tensor]) -> None:
        """Add a batch."""
        self.index.append(index)
        for rows, logits in ((self.students, students), (self.teachers, teachers)):
            for name, values in logits.items():
                rows.setdefault(name, []).append(values)

    def of_all_ranks(self) -> Logits:
        """Return the logits of all ranks; every rank has to call this."""
        students, teachers = (
            {name: joined(batches) for name, batches in rows.items()} for rows in (self.students, self.teachers)
        )
        return Logits(joined(self.index), students, teachers)


def joined(batches: Sequence[torch.Tensor]) -> np.ndarray:
    """Return the rows of these batches on all ranks, in the order of ranks."""
    rows: np.ndarray = torch.cat(distributed.gather_rows(torch.cat(list(batches)).cpu())).numpy()
    return rows


@torch.no_grad()
def evaluate(
    students: Mapping[str, Encoder], teachers: Sequence[FrozenTeacher], loader: Iterable[Batch], task: Task, device: Any = "cpu"
) -> Evaluation:
    """Compute metrics of students and teachers over a loader, in float32, and the agreement of each student with each teacher.

    Under DDP every rank evaluates its share, torchmetrics reduces over all ranks, and the logits are gathered; no example is
    counted twice.
    """
    for student in students.values():
        student.to(device).eval()
    for teacher in teachers:
        teacher.apply(lambda tensor: tensor.to(device))

    def meters() -> dict[str, Any]:
        return {metric: task.metric(metric).to(device) for metric in task.metrics}

    ours, theirs = {name: meters() for name in students}, {teacher.name: meters() for teacher in teachers}
    together = meters() if len(students) > 1 else {}
    collapse = {} if task.collapse() is None else {name: task.collapse().to(device) for name in students}
    rows = Rows()
    agreement = {name: {teacher.name: task.metric(task.agreement).to(device) for teacher in teachers} for name in students}
    for batch in loader:
        batch = batch.to(device, non_blocking=True)
        logits = {
            name: student(inputs, Needs()).logits.float()
            for (name, student), inputs in zip(students.items(), batch.students, strict=True)
        }
        for name, student_logits in logits.items():
            task.score(ours[name], student_logits, batch.labels)
            if collapse:
                collapse[name].update(task.predict(student_logits), batch.labels)
        if together:
            task.score(together, task.ensemble(list(logits.values())), batch.labels)
        taught = {}
        for teacher, inputs in zip(teachers, batch.teachers, strict=True):
            taught[teacher.name] = teacher_logits = teacher(inputs, Needs()).logits.float()
            task.score(theirs[teacher.name], teacher_logits, batch.labels)
            for name, student_logits in logits.items():
                agreement[name][teacher.name].update(task.predict(student_logits), task.predict(teacher_logits))
        if task.row_per_example:
            rows.add(batch.index, logits, taught)
    return Evaluation(
        {name: _compute(metrics) for name, metrics in ours.items()},
        {name: _compute(metrics) for name, metrics in theirs.items()},
        {name: _compute(metrics) for name, metrics in agreement.items()},
        _compute(together),
        {name: bool(metric.compute()[0]) for name, metric in collapse.items()},
        rows.of_all_ranks() if task.row_per_example else None,
    )


def baseline(task: Task, labels: Mapping[str, Sequence[float]]) -> dict[str, Scores]:
    """Return the metrics of a constant prediction, by split: the majority class, or the mean score, of train.

    Args:
        task: defines the constant prediction; for a task without one the result is empty.
        labels: labels by split, as numbers.
    """
    constant = task.constant(given_labels(labels["train"]))
    scores: dict[str, Scores] = {}
    if constant is None:
        return scores
    for split, values in labels.items():
        if split == "train" or not len(values):
            continue
        metrics = {name: task.metric(name, across_ranks=False) for name in task.metrics}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a correlation with a constant is undefined; it counts as chance, 0
            targets = task.label_tensor(values)
            task.score(metrics, constant.expand(len(values), -1), targets)
            chance = task.majority_baseline(targets)
            scores[split] = {name: chance.get(name) if value is None else value for name, value in _compute(metrics).items()}
    return scores


def _compute(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: finite_or_none(float(metric.compute())) for name, metric in metrics.items()}


def folder_megabytes(folder: Path, pattern: str = "*") -> float:
    """Return the total size of a folder's files that match a pattern, in units of 10^6 bytes."""
    return sum(file.stat().st_size for file in folder.rglob(pattern) if file.is_file()) / 1e6
