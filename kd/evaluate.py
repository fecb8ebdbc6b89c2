"""Evaluation of models: metrics, agreement with teachers, size and latency."""

import copy
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kd.data.batch import Batch
from kd.data.metrics import finite_or_none
from kd.data.tasks import Task
from kd.forward import Needs
from kd.models import CachedTeacher, Encoder, FrozenTeacher
from kd.models.pretrained import quiet
from kd.models.students import new_model

LATENCY_TOKENS = 32
"""Tokens of the sentence that is timed."""
LATENCY_ROUNDS, LATENCY_CALLS = 3, 10
"""Number of rounds, and of calls of each model per round."""
LATENCY_SPREAD = 0.2
"""Largest relative difference between the minima of two rounds at which a latency is reported. Our choice."""
FILLER = 0.02
"""Value of every weight of a model that is timed without its weights in memory: the standard deviation of BERT's
initialisation. Zeros or denormal numbers, with which the processor has another speed, would change the time."""
LATENCY_MEASURE = (
    f"least of {LATENCY_ROUNDS * LATENCY_CALLS} calls, the run's models in turn, one sentence of {LATENCY_TOKENS} tokens, "
    f"float32, CPU, tokenizer excluded; left out where rounds differ by more than {LATENCY_SPREAD:.0%}"
)


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
    """

    students: dict[str, Scores]
    teachers: dict[str, Scores]
    agreement: dict[str, Scores]
    ensemble: Scores
    collapsed: dict[str, bool] = field(default_factory=dict)


@torch.no_grad()
def evaluate(
    students: Mapping[str, Encoder], teachers: Sequence[FrozenTeacher], loader: Iterable[Batch], task: Task, device: Any = "cpu"
) -> Evaluation:
    """Compute metrics of students and teachers over a loader, in float32, and the agreement of each student with each teacher.

    Under DDP every rank evaluates its share, and torchmetrics reduces over all ranks; no example is counted twice.
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
    agreement = {name: {teacher.name: task.metric(task.agreement).to(device) for teacher in teachers} for name in students}
    for batch in loader:
        batch = batch.to(device)
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
        for teacher, inputs in zip(teachers, batch.teachers, strict=True):
            teacher_logits = teacher(inputs, Needs()).logits.float()
            task.score(theirs[teacher.name], teacher_logits, batch.labels)
            for name, student_logits in logits.items():
                agreement[name][teacher.name].update(task.predict(student_logits), task.predict(teacher_logits))
    return Evaluation(
        {name: _compute(metrics) for name, metrics in ours.items()},
        {name: _compute(metrics) for name, metrics in theirs.items()},
        {name: _compute(metrics) for name, metrics in agreement.items()},
        _compute(together),
        {name: bool(metric.compute()[0]) for name, metric in collapse.items()},
    )


def baseline(task: Task, labels: Mapping[str, Sequence[float]]) -> dict[str, Scores]:
    """Return the metrics of a constant prediction, by split: the majority class, or the mean score, of train.

    Args:
        task: defines the constant prediction; for a task without one the result is empty.
        labels: labels by split, as numbers.
    """
    constant = task.constant(labels["train"])
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


@dataclass(frozen=True)
class Latency:
    """Latency of a model for one sentence.

    Attributes:
        milliseconds: minimum over all calls; None if the rounds differ by more than `LATENCY_SPREAD`.
        spread: relative difference between the largest and the smallest minimum of a round, a fraction of the latter.
    """

    milliseconds: float | None
    spread: float


@torch.no_grad()
def latencies(models: Mapping[str, Encoder], tokens: int = LATENCY_TOKENS) -> dict[str, Latency]:
    """Time one sentence on this machine's CPU: batch size 1, float32, tokenizer excluded, after a warm-up.

    The models are called in turn, so that a temporary slowdown affects all of them, and the minimum of each model's times is
    taken, because other load on the machine only adds time. If the machine is too busy, even the minima of rounds differ.
    """
    calls: dict[str, Callable[[], Any]] = {}
    for name, model in models.items():
        model.to("cpu").eval()
        ids = torch.randint(5, int(model.config.vocab_size), (1, tokens), generator=torch.Generator().manual_seed(0))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        calls[name] = lambda model=model, inputs=inputs: model(inputs, Needs())  # type: ignore[misc]
    for call in [*calls.values()] * 5:
        call()
    least: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(LATENCY_ROUNDS):
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(LATENCY_CALLS):
            for name, call in calls.items():
                began = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - began)
        for name, taken in times.items():
            least[name].append(min(taken))
    return {name: _latency(minima) for name, minima in least.items()}


def _latency(least: Sequence[float]) -> Latency:
    """Return the latency from the minimum of each round, in seconds."""
    spread = max(least) / min(least) - 1
    return Latency(round(1000 * min(least), 3) if spread <= LATENCY_SPREAD else None, round(spread, 3))


def to_time(teacher: FrozenTeacher, head: str) -> Encoder:
    """Return a teacher's model to be timed; for a cached teacher, whose weights are not in memory, a model of its shape.

    The time does not depend on the weights as long as they are ordinary numbers: all are `FILLER`. No random numbers are drawn.
    """
    if not isinstance(teacher, CachedTeacher):
        return teacher.encoder
    shape = new_model(teacher.shape.config, head, meta=True)
    # from_pretrained initialises buffers and ties weights, as it does for a model that is read from a file.
    numbers = {name: torch.full((), FILLER).expand(parameter.shape) for name, parameter in shape.named_parameters()}
    with torch.random.fork_rng(devices=[]), quiet():
        model: Any = type(shape).from_pretrained(  # type: ignore[attr-defined]
            None, config=copy.deepcopy(teacher.shape.config), state_dict=numbers, dtype=torch.float32
        )
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # an expanded number would be read from memory faster than real weights
    return Encoder(model, teacher.tokenizer)
