"""What a model is worth: metrics, agreement, size, latency."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kd.data.batch import Batch
from kd.data.tasks import Task, higher_is_better
from kd.forward import Needs
from kd.models import Encoder, FrozenTeacher

LATENCY_TOKENS = 32
LATENCY_REPEATS = 30


Scores = dict[str, float | None]


@dataclass
class Evaluation:
    """What one split says of all models; None where a metric is undefined.

    Attributes:
        students: name -> metric -> value.
        teachers: the same.
        agreement: student -> teacher -> share of examples with the same predicted class, or Pearson correlation of the scores.
        ensemble: metrics of the students' mean prediction; empty for one student.
    """

    students: dict[str, Scores]
    teachers: dict[str, Scores]
    agreement: dict[str, Scores]
    ensemble: Scores


def headline(task: Task, students: Mapping[str, Mapping[str, float | None]]) -> str:
    """The name of the student with the best monitored metric; the first of equal ones."""
    sign = 1.0 if higher_is_better(task.monitor) else -1.0

    def value(name: str) -> float:
        found = students[name][task.monitor]
        return -math.inf if found is None else sign * found

    return max(students, key=value)


@torch.no_grad()
def evaluate(
    students: Mapping[str, Encoder], teachers: Sequence[FrozenTeacher], loader: Iterable[Batch], task: Task, device: Any = "cpu"
) -> Evaluation:
    """Metrics of students and teachers over a loader, in float32, and how far each student agrees with each teacher.

    Under DDP every rank sees its share and torchmetrics reduces over exactly the examples there are.
    """
    for student in students.values():
        student.to(device).eval()
    for teacher in teachers:
        teacher.apply(lambda tensor: tensor.to(device))

    def meters() -> dict[str, Any]:
        return {metric: task.metric(metric).to(device) for metric in task.metrics}

    ours, theirs = {name: meters() for name in students}, {teacher.name: meters() for teacher in teachers}
    together = meters() if len(students) > 1 else {}
    agreement = {name: {teacher.name: task.metric(task.agreement).to(device) for teacher in teachers} for name in students}
    for batch in loader:
        batch = batch.to(device)
        logits = {
            name: student(inputs, Needs()).logits.float()
            for (name, student), inputs in zip(students.items(), batch.students, strict=True)
        }
        for name, found in logits.items():
            task.score(ours[name], found, batch.labels)
        if together:
            task.score(together, task.ensemble(list(logits.values())), batch.labels)
        for teacher, inputs in zip(teachers, batch.teachers, strict=True):
            taught = teacher(inputs, Needs()).logits.float()
            task.score(theirs[teacher.name], taught, batch.labels)
            for name, found in logits.items():
                agreement[name][teacher.name].update(task.predict(found), task.predict(taught))
    return Evaluation(
        {name: _compute(metrics) for name, metrics in ours.items()},
        {name: _compute(metrics) for name, metrics in theirs.items()},
        {name: _compute(metrics) for name, metrics in agreement.items()},
        _compute(together),
    )


def _compute(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: finite_or_none(float(metric.compute())) for name, metric in metrics.items()}


def finite_or_none(value: float) -> float | None:
    """A correlation with constant predictions is undefined; JSON has no word for it but null."""
    return value if math.isfinite(value) else None


def folder_megabytes(folder: Path, pattern: str = "*") -> float:
    """Size on disk of a folder's files of a pattern, in units of 10^6 bytes."""
    return sum(file.stat().st_size for file in folder.rglob(pattern) if file.is_file()) / 1e6


@torch.no_grad()
def latencies(models: Mapping[str, Encoder], repeats: int = LATENCY_REPEATS, tokens: int = LATENCY_TOKENS) -> dict[str, float]:
    """Milliseconds for one sentence on this machine's CPU: batch 1, float32, tokenizer excluded, warmed up, the median.

    The models take turns, so that a slow moment hits all of them.
    """
    calls: dict[str, Callable[[], Any]] = {}
    for name, model in models.items():
        model.to("cpu").eval()
        ids = torch.randint(5, int(model.config.vocab_size), (1, tokens), generator=torch.Generator().manual_seed(0))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        calls[name] = lambda model=model, inputs=inputs: model(inputs, Needs())  # type: ignore[misc]
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 5):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if repeat >= 5:
                times[name].append(time.perf_counter() - began)
    return {name: 1000 * statistics.median(values) for name, values in times.items()}
