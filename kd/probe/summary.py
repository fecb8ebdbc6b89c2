"""Summaries of cases over seeds: means and standard deviations of figures, and means of matrices."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from kd.probe.differences import Compared
from kd.probe.result import Case
from kd.results.statistics import Estimate

MODELS = ("student", "control", "difference")
"""Parts of a figure: of the student, of its control, and student minus control."""


@dataclass(frozen=True)
class Spread:
    """Figure over seeds.

    Attributes:
        mean: mean over the seeds; None if there is none, or one is undefined.
        sd: standard deviation over the seeds, with n - 1; None for fewer than two.
        seeds: number of seeds.
        low: lower end of the interval over examples, for one seed.
        high: upper end.
    """

    mean: float | None
    sd: float | None
    seeds: int
    low: float | None = None
    high: float | None = None


Spreads = Mapping[str, Mapping[str, Spread]]
"""Name of a figure -> `student`, `control` and `difference`, where there are such -> figure over seeds."""


@dataclass(frozen=True)
class SliceSummary:
    """Figures of a slice over seeds; attributes as of `kd.probe.differences.Slice`.

    By confidence, the examples of a slice are other ones for each teacher; `name` is that of the first seed.
    """

    by: str
    name: str
    n: int
    figures: Spreads
    teacher: Mapping[str, Spread]


@dataclass(frozen=True)
class Summary:
    """Cases that differ in the seed alone.

    Attributes:
        cases: the cases, by seed.
        figures: figures over seeds.
        teacher: figures of the teacher alone, over the teachers if each seed has its own.
        slices: the same by slice.
    """

    cases: Sequence[Case]
    figures: Spreads = field(default_factory=dict)
    teacher: Mapping[str, Spread] = field(default_factory=dict)
    slices: Sequence[SliceSummary] = ()

    @property
    def seeds(self) -> list[int]:
        """Seeds of the cases."""
        return [case.about.seed for case in self.cases]

    @property
    def label(self) -> str:
        """Method, student and settings."""
        about = self.cases[0].about
        return f"{about.method} {about.student}" + (f" {about.settings}" if about.settings else "")


def summaries_of(cases: Iterable[Case]) -> list[Summary]:
    """Return summaries of the cases of one task, split, configuration, student and teacher, in the order of the first."""
    groups: dict[tuple[str, ...], list[Case]] = {}
    for case in cases:
        about = case.about
        key = (about.task, about.split, about.family, about.selection, about.student, about.teacher)
        groups.setdefault(key, []).append(case)
    return [summary_of(sorted(group, key=lambda case: case.about.seed)) for group in groups.values()]


def summary_of(cases: Sequence[Case]) -> Summary:
    """Return the summary of cases that differ in the seed alone."""
    found = [case.differences for case in cases if case.differences is not None]
    if not found:
        return Summary(cases)
    slices = []
    for index, first in enumerate(found[0].slices):
        of_seeds = [one.slices[index] for one in found if index < len(one.slices)]
        figures = spreads_of([one.figures for one in of_seeds])
        slices.append(SliceSummary(first.by, first.name, first.n, figures, alone([one.teacher for one in of_seeds])))
    return Summary(cases, spreads_of([one.figures for one in found]), alone([one.teacher for one in found]), slices)


def spreads_of(figures: Sequence[Mapping[str, Compared]]) -> Spreads:
    """Return figures over seeds; those of the control are over the seeds that have one."""
    spreads = {}
    for name in figures[0]:
        by_model = {model: [getattr(one[name], model) for one in figures if name in one] for model in MODELS}
        present = {model: [one for one in estimates if one is not None] for model, estimates in by_model.items()}
        spreads[name] = {model: spread_of(estimates) for model, estimates in present.items() if estimates}
    return spreads


def alone(figures: Sequence[Mapping[str, Estimate]]) -> dict[str, Spread]:
    """Return figures of the teacher over seeds; one teacher that all seeds share is one model, without a spread."""
    different = [one for index, one in enumerate(figures) if one not in figures[:index]]
    return {name: spread_of([one[name] for one in different if name in one]) for name in figures[0]}


def spread_of(estimates: Sequence[Estimate]) -> Spread:
    """Return one figure over seeds.

    >>> spread_of([Estimate(0.5, 0.4, 0.6, 9), Estimate(0.7, 0.6, 0.8, 9)])
    Spread(mean=0.6, sd=0.14142135623730948, seeds=2, low=None, high=None)
    """
    values = [one.value for one in estimates if one.value is not None]
    if len(values) < len(estimates):
        return Spread(None, None, len(estimates))
    if len(values) == 1:
        return Spread(values[0], None, 1, estimates[0].low, estimates[0].high)
    return Spread(statistics.fmean(values), statistics.stdev(values), len(values))


def mean_matrix(matrices: Sequence[Sequence[Sequence[float | None]]]) -> list[list[float | None]]:
    """Return the mean of matrices of one shape over seeds; None where one of them has none.

    >>> mean_matrix([[[1.0, None]], [[2.0, 1.0]]])
    [[1.5, None]]
    """
    return [
        [None if None in values else statistics.fmean(values) for values in zip(*rows, strict=True)]  # type: ignore[type-var]
        for rows in zip(*matrices, strict=True)
    ]


def by_role(
    cases: Sequence[Case], part: str, read: Callable[..., Sequence[Sequence[float | None]]]
) -> dict[str, list[list[float | None]]]:
    """Return the mean matrix over seeds of each model that all cases, or those with a control, have.

    Args:
        cases: cases that differ in the seed alone.
        part: name of an attribute of `Case`, a mapping by model.
        read: function that reads a matrix from a value of that mapping.
    """
    found: dict[str, list[Sequence[Sequence[float | None]]]] = {}
    for case in cases:
        for role, value in getattr(case, part).items():
            found.setdefault(role, []).append(read(value))
    return {role: mean_matrix(matrices) for role, matrices in found.items()}
