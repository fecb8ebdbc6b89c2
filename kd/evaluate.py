"""What a model is worth: metrics, agreement, size, latency."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kd.data.batch import Batch
from kd.data.tasks import Task
from kd.forward import Needs
from kd.models import Encoder, FrozenTeacher

LATENCY_TOKENS = 32
LATENCY_REPEATS = 30


@torch.no_grad()
def evaluate(
    student: Encoder, teachers: Sequence[FrozenTeacher], loader: Iterable[Batch], task: Task, device: Any = "cpu"
) -> dict[str, dict[str, float | None]]:
    """Metrics of student and teachers over a loader, in float32, and how far the student agrees with each teacher.

    Agreement is the share of examples with the same predicted class, or the Pearson correlation of the scores.

    Under DDP every rank sees its share and torchmetrics reduces over exactly the examples there are.

    Returns:
        `student` and each teacher's name -> metric -> value; `agreement` -> teacher's name -> value. None where a metric is
        undefined.
    """
    student.to(device).eval()
    for teacher in teachers:
        teacher.encoder.to(device)
    metrics = {
        name: {metric: task.metric(metric).to(device) for metric in task.metrics}
        for name in ("student", *(teacher.name for teacher in teachers))
    }
    agreement = {teacher.name: task.metric(task.agreement).to(device) for teacher in teachers}
    for batch in loader:
        batch = batch.to(device)
        ours = student(batch.student, Needs()).logits.float()
        task.score(metrics["student"], ours, batch.labels)
        for teacher, inputs in zip(teachers, batch.teachers, strict=True):
            theirs = teacher(inputs, Needs()).logits.float()
            task.score(metrics[teacher.name], theirs, batch.labels)
            agreement[teacher.name].update(task.predict(ours), task.predict(theirs))
    found = {name: _compute(values) for name, values in metrics.items()}
    return {**found, "agreement": _compute(agreement)}


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
