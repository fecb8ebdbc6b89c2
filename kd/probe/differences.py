"""How a student's predictions differ from its teacher's: scores, agreement, churn, divergences, calibration, and by slices."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd.data.direction import higher_is_better
from kd.functional.calibration import brier_score, calibration_error, negative_log_likelihood
from kd.functional.divergences import js_divergence, total_variation
from kd.functional.logits import kl_divergence
from kd.functional.outcomes import confidence
from kd.results.statistics import COUNTED, Draws, Estimate, Statistic, drawn, mean_of
from kd.results.statistics.counted import Floats

Statistics = dict[str, tuple[Statistic, int]]
"""Name of a figure -> its statistic, and the number of examples that it is over."""

SLICES = 3
"""Number of slices by length and by confidence, with as equal numbers of examples as ties permit. Our choice."""

SLICED = ("accuracy",)
"""Metric of slices: F1 and correlations of a slice depend on its share of each class more than on the predictions."""


@dataclass(frozen=True)
class Compared:
    """A figure of a student and of its control, and their difference.

    Attributes:
        student: of the student.
        control: of the control; None without one.
        difference: of student and control, student minus control, from the same bootstrap samples; None without a control.
    """

    student: Estimate
    control: Estimate | None = None
    difference: Estimate | None = None


@dataclass(frozen=True)
class Slice:
    """Figures over some of the examples.

    Attributes:
        by: what the examples are sliced by: `label`, `length` or `confidence`.
        name: the slice.
        n: number of its examples.
        figures: name -> figure.
        teacher: name -> figure of the teacher alone.
    """

    by: str
    name: str
    n: int
    figures: Mapping[str, Compared]
    teacher: Mapping[str, Estimate]


@dataclass(frozen=True)
class Differences:
    """Differences between the predictions of a student, its teacher and its control.

    Attributes:
        n: number of examples.
        figures: name -> figure of the student and of the control, as `figures_of` names them.
        teacher: name -> figure of the teacher alone.
        churn: `student`, `control` -> number of examples by teacher right, wrong (rows) and the model right, wrong (columns);
            empty for scores.
        slices: the same figures by slice.
        one_class: `teacher`, `student`, `control` -> the class that this model predicts for every example, if it does.
        absent: name of a figure, or of a kind of figures -> reason why there is none.
    """

    n: int
    figures: Mapping[str, Compared]
    teacher: Mapping[str, Estimate]
    churn: Mapping[str, list[list[int]]] = field(default_factory=dict)
    slices: Sequence[Slice] = ()
    one_class: Mapping[str, str] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)


def differences(
    student: NDArray[np.floating],
    teacher: NDArray[np.floating],
    control: NDArray[np.floating] | None,
    labels: NDArray[np.float64],
    metrics: Sequence[str],
    *,
    classes: Sequence[str] | None,
    lengths: NDArray[np.int64] | None = None,
) -> Differences:
    """Return the differences of the predictions on labelled examples.

    Args:
        student: logits, (examples, classes), or (examples, 1) for scores; of the same examples and classes as the others.
        teacher: logits of the teacher.
        control: logits of the control; None without one.
        labels: (examples,), class indices or scores.
        metrics: names of the task's metrics.
        classes: names of the classes; None for scores.
        lengths: (examples,), by which the examples are sliced; None for no such slices.
    """
    models = {"student": student} if control is None else {"student": student, "control": control}
    figures, of_teacher = compared(models, teacher, labels, metrics, classes is not None)
    absent = {f"retention.{metric}": "an error has none" for metric in metrics if not higher_is_better(metric)}
    if classes is None:
        absent["classes"] = (
            "scores have no classes: no churn, divergence, calibration, and no agreement given the teacher right"
        )
        absent["slices"] = "correlations within a slice depend on the spread of its scores"
        return Differences(len(labels), figures, of_teacher, absent=absent)
    churn = {name: churn_of(logits, teacher, labels) for name, logits in models.items()}
    slices = []
    for by, name, chosen in slices_of(teacher, labels, classes, lengths):
        some = {model: logits[chosen] for model, logits in models.items()}
        own, of_slice = compared(some, teacher[chosen], labels[chosen], SLICED, True)
        slices.append(Slice(by, name, int(chosen.sum()), own, of_slice))
    predicted = {name: np.unique(predictions(logits, True)) for name, logits in {"teacher": teacher, **models}.items()}
    one_class = {name: classes[values[0]] for name, values in predicted.items() if len(values) == 1}
    return Differences(len(labels), figures, of_teacher, churn, slices, one_class, absent)


def compared(
    models: Mapping[str, NDArray[np.floating]],
    teacher: NDArray[np.floating],
    labels: NDArray[np.float64],
    metrics: Sequence[str],
    classifies: bool,
) -> tuple[dict[str, Compared], dict[str, Estimate]]:
    """Return the figures of the student and its control, and those of the teacher; arguments as for `differences`."""
    statistics: Statistics = {f"teacher/{name}": one for name, one in own_figures(teacher, labels, metrics, classifies).items()}
    for model, logits in models.items():
        own = figures_of(logits, teacher, labels, metrics, classifies)
        statistics |= {f"{model}/{name}": one for name, one in own.items()}
    draws: dict[str, dict[str, Draws]] = {}
    for name, values in drawn(statistics, len(labels)).items():
        model, _, figure = name.partition("/")
        draws.setdefault(model, {})[figure] = values
    control = draws.get("control")
    figures = {
        name: Compared(of_student.estimate())
        if control is None
        else Compared(of_student.estimate(), control[name].estimate(), of_student.minus(control[name]).estimate())
        for name, of_student in draws["student"].items()
    }
    return figures, {name: values.estimate() for name, values in draws["teacher"].items()}


def figures_of(
    model: NDArray[np.floating],
    teacher: NDArray[np.floating],
    labels: NDArray[np.float64],
    metrics: Sequence[str],
    classifies: bool,
) -> Statistics:
    """Return the figures of a model beside its teacher.

    Those of `own_figures`, and `delta.<metric>`, the teacher's less the model's; `retention.<metric>`, the model's over the
    teacher's, undefined where that is not positive. For classes: `agreement`, the share of equal predictions; `agreement_right`
    and `agreement_wrong`, that share where the teacher is right or wrong; `lost`, the share of wrong predictions where the
    teacher is right; `gained`, that of right ones where it is wrong; `kl`, the mean of KL(teacher || model) in nats, `js`
    in bits, `total_variation`. For scores: `agreement`, their Pearson correlation, `rank_agreement`, Spearman's, and
    `distance`, the mean absolute difference.
    """
    n, ours, theirs = len(labels), predictions(model, classifies), predictions(teacher, classifies)
    found = own_figures(model, labels, metrics, classifies)
    for metric in metrics:
        own, of_teacher = found[f"score.{metric}"][0], counted(metric, theirs, labels)
        found[f"delta.{metric}"] = (delta(own, of_teacher), n)
        if higher_is_better(metric):
            found[f"retention.{metric}"] = (retention(own, of_teacher), n)
    if not classifies:
        found["agreement"] = (counted("pearson", ours, theirs), n)
        found["rank_agreement"] = (counted("spearman", ours, theirs), n)
        found["distance"] = (mean_of(np.abs(ours - theirs)), n)
        return found
    right, teacher_right, same = ours == labels, theirs == labels, ours == theirs
    found["agreement"] = (mean_of(same), n)
    for name, values, where in (
        ("agreement_right", same, teacher_right),
        ("agreement_wrong", same, ~teacher_right),
        ("lost", ~right, teacher_right),
        ("gained", right, ~teacher_right),
    ):
        found[name] = (mean_of(values, where), int(where.sum()))
    student_logits, teacher_logits = doubles(model), doubles(teacher)
    p, q = teacher_logits.softmax(dim=-1), student_logits.softmax(dim=-1)
    found["kl"] = (mean_of(kl_divergence(student_logits, teacher_logits, reduction="none").numpy()), n)
    found["js"] = (mean_of(js_divergence(p, q).numpy()), n)
    found["total_variation"] = (mean_of(total_variation(p, q).numpy()), n)
    return found


def own_figures(
    model: NDArray[np.floating], labels: NDArray[np.float64], metrics: Sequence[str], classifies: bool
) -> Statistics:
    """Return the figures of a model alone.

    `score.<metric>` as in `result.json`; for classes also `ece`, the calibration error, `nll` in nats, and `brier`.
    """
    n, predicted = len(labels), predictions(model, classifies)
    found: Statistics = {f"score.{metric}": (counted(metric, predicted, labels), n) for metric in metrics}
    if classifies:
        logits, truth = doubles(model), torch.from_numpy(labels.astype(np.int64))
        found["ece"] = (lambda counts: calibration_error(logits, truth, torch.from_numpy(counts)).numpy(), n)
        found["nll"] = (mean_of(negative_log_likelihood(logits, truth).numpy()), n)
        found["brier"] = (mean_of(brier_score(logits, truth).numpy()), n)
    return found


def counted(metric: str, predicted: NDArray[Any], labels: NDArray[Any]) -> Statistic:
    """Return a metric of given predictions as a statistic."""
    return lambda counts: COUNTED[metric](predicted, labels, counts)


def delta(model: Statistic, teacher: Statistic) -> Statistic:
    """Return the teacher's figure less the model's as a statistic."""
    return lambda counts: teacher(counts) - model(counts)


def retention(model: Statistic, teacher: Statistic) -> Statistic:
    """Return the model's figure over the teacher's as a statistic; NaN where the teacher's is not positive."""

    def quotient(counts: Floats) -> Floats:
        of_teacher = teacher(counts)
        result: Floats = np.where(of_teacher > 0, model(counts) / np.where(of_teacher > 0, of_teacher, 1.0), np.nan)
        return result

    return quotient


def doubles(logits: NDArray[np.floating]) -> Tensor:
    """Return logits as a tensor in float64."""
    return torch.from_numpy(logits.astype(np.float64))


def predictions(logits: NDArray[np.floating], classifies: bool) -> NDArray[Any]:
    """Return predicted class indices, or scores in float64, (examples,)."""
    return logits.argmax(axis=1) if classifies else logits[:, 0].astype(np.float64)


def churn_of(model: NDArray[np.floating], teacher: NDArray[np.floating], labels: NDArray[np.float64]) -> list[list[int]]:
    """Return numbers of examples: rows teacher right, wrong; columns model right, wrong.

    The shares satisfy accuracy = teacher's accuracy * (1 - lost) + (1 - teacher's accuracy) * gained.

    >>> churn_of(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([0.0, 1.0]))
    [[1, 1], [0, 0]]
    """
    right, teacher_right = (predictions(logits, True) == labels for logits in (model, teacher))
    return [[int((rows & columns).sum()) for columns in (right, ~right)] for rows in (teacher_right, ~teacher_right)]


def slices_of(
    teacher: NDArray[np.floating],
    labels: NDArray[np.float64],
    classes: Sequence[str],
    lengths: NDArray[np.int64] | None,
) -> Iterator[tuple[str, str, NDArray[np.bool_]]]:
    """Yield what examples are sliced by, the slice's name, and whether each example is in it; no slice is empty.

    By label; by length; and by the teacher's confidence, its largest probability.
    """
    for number, name in enumerate(classes):
        if (chosen := labels == number).any():
            yield "label", name, chosen
    sliced: list[tuple[str, NDArray[Any], Callable[[Any], str]]] = []
    if lengths is not None:
        sliced.append(("length", lengths, lambda value: f"{value:.0f}"))
    sliced.append(("confidence", confidence(doubles(teacher)).numpy(), lambda value: f"{value:.2f}"))
    for by, values, shown in sliced:
        bins = np.searchsorted(np.quantile(values, np.arange(1, SLICES) / SLICES), values, side="left")
        for number in range(SLICES):
            if (chosen := bins == number).any():
                low, high = shown(values[chosen].min()), shown(values[chosen].max())
                yield by, low if low == high else f"{low} to {high}", chosen
