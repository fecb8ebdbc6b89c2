"""What a model is worth: metrics, agreement, size, latency."""

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kd.data.batch import Batch
from kd.data.tasks import Task, higher_is_better
from kd.forward import Needs
from kd.models import CachedTeacher, Encoder, FrozenTeacher
from kd.models.pretrained import quiet
from kd.models.students import new_model

LATENCY_TOKENS = 32
LATENCY_ROUNDS, LATENCY_CALLS = 3, 10
"""Rounds, and calls of each model in a round."""
LATENCY_SPREAD = 0.2
"""Largest difference between the least times of two rounds, as a share, that is taken for a measurement. Our choice."""
FILLER = 0.02
"""Every weight of a model that is timed without its own: the deviation that BERT's are drawn with. Zeros, or numbers so small
that the processor computes them slowly, would change the time."""
LATENCY_MEASURE = (
    f"least of {LATENCY_ROUNDS * LATENCY_CALLS} calls, the run's models in turn, one sentence of {LATENCY_TOKENS} tokens, "
    f"float32, CPU, tokenizer excluded; left out where rounds differ by more than {LATENCY_SPREAD:.0%}"
)


Scores = dict[str, float | None]


@dataclass
class Evaluation:
    """What one split says of all models; None where a metric is undefined.

    Attributes:
        students: name -> metric -> value.
        teachers: the same.
        agreement: student -> teacher -> share of examples with the same predicted class, or Pearson correlation of the scores.
        ensemble: metrics of the students' mean prediction; empty for one student.
        collapsed: student -> whether its predictions are one class, or nearly one score.
    """

    students: dict[str, Scores]
    teachers: dict[str, Scores]
    agreement: dict[str, Scores]
    ensemble: Scores
    collapsed: dict[str, bool] = field(default_factory=dict)


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
    collapse = {} if task.collapse() is None else {name: task.collapse().to(device) for name in students}
    agreement = {name: {teacher.name: task.metric(task.agreement).to(device) for teacher in teachers} for name in students}
    for batch in loader:
        batch = batch.to(device)
        logits = {
            name: student(inputs, Needs()).logits.float()
            for (name, student), inputs in zip(students.items(), batch.students, strict=True)
        }
        for name, found in logits.items():
            task.score(ours[name], found, batch.labels)
            if collapse:
                collapse[name].update(task.predict(found), batch.labels)
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
        {name: bool(metric.compute()[0]) for name, metric in collapse.items()},
    )


def baseline(task: Task, labels: Mapping[str, Sequence[float]]) -> dict[str, Scores]:
    """Metrics of a prediction without looking, by split: the majority class, or the mean score, of train.

    Args:
        task: says what that is; a task that has none gives an empty mapping.
        labels: by split, as numbers.
    """
    constant = task.constant(labels["train"])
    found: dict[str, Scores] = {}
    if constant is None:
        return found
    for split, values in labels.items():
        if split == "train" or not len(values):
            continue
        metrics = {name: task.metric(name, across_ranks=False) for name in task.metrics}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a correlation with a constant is undefined; it counts as chance, 0
            targets = task.label_tensor(values)
            task.score(metrics, constant.expand(len(values), -1), targets)
            chance = task.majority_baseline(targets)
            found[split] = {name: chance.get(name) if value is None else value for name, value in _compute(metrics).items()}
    return found


def _compute(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: finite_or_none(float(metric.compute())) for name, metric in metrics.items()}


def finite_or_none(value: float) -> float | None:
    """A correlation with constant predictions is undefined; JSON has no word for it but null."""
    return value if math.isfinite(value) else None


def folder_megabytes(folder: Path, pattern: str = "*") -> float:
    """Size on disk of a folder's files of a pattern, in units of 10^6 bytes."""
    return sum(file.stat().st_size for file in folder.rglob(pattern) if file.is_file()) / 1e6


@dataclass(frozen=True)
class Latency:
    """Milliseconds for one sentence.

    Attributes:
        milliseconds: the least time; None where the rounds differ by too much.
        spread: difference between the slowest and the fastest round's least time, as a share of the latter.
    """

    milliseconds: float | None
    spread: float


@torch.no_grad()
def latencies(models: Mapping[str, Encoder], tokens: int = LATENCY_TOKENS) -> dict[str, Latency]:
    """Time one sentence on this machine's CPU: batch 1, float32, tokenizer excluded, warmed up.

    The models take turns call by call, so that a slow moment hits all of them, and the least time of each is taken: whatever
    else the machine does only adds to it. On a machine that is too busy even the least times of rounds differ.
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
    return {name: _latency(found) for name, found in least.items()}


def _latency(least: Sequence[float]) -> Latency:
    """From the least seconds of each round."""
    spread = max(least) / min(least) - 1
    return Latency(round(1000 * min(least), 3) if spread <= LATENCY_SPREAD else None, round(spread, 3))


def to_time(teacher: FrozenTeacher, head: str) -> Encoder:
    """Return a teacher's model to be timed: of a cached one, whose weights are not in memory, one of its shape.

    The time does not depend on the weights, as long as they are ordinary numbers: all are `FILLER`. Nothing is drawn.
    """
    if not isinstance(teacher, CachedTeacher):
        return teacher.encoder
    shape = new_model(teacher.shape.config, head, meta=True)
    # Transformers gives buffers their values, and a tied tensor its own, as it does for a model that is read from a file.
    numbers = {name: torch.full((), FILLER).expand(parameter.shape) for name, parameter in shape.named_parameters()}
    with torch.random.fork_rng(devices=[]), quiet():
        model: Any = type(shape).from_pretrained(  # type: ignore[attr-defined]
            None, config=copy.deepcopy(teacher.shape.config), state_dict=numbers, dtype=torch.float32
        )
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # one number seen as many would be read from memory faster than many
    return Encoder(model, teacher.tokenizer)
