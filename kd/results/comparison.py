"""Comparison of methods: figures as mean and spread over seeds, beside the paper's, and beside a baseline of one budget."""

import shlex
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

from kd.data.direction import higher_is_better
from kd.errors import InputError
from kd.results.figures import Figure
from kd.results.statistics import (
    ExampleDifference,
    McNemar,
    PairedDifference,
    TaskSummary,
    corrected,
    seed_difference,
    task_summary,
)
from kd.results.tables import differences, grouped, with_selections
from kd.results.tuned import selection_words
from kd.runs.digest import digest_of

BASELINE = "finetune"
"""Label of the method that others are compared with."""

BUDGET = ("student", "surgery", "cohort", "task", "data", "held", "optimizer", "trainer")
"""Parts of a run's identity that runs of one budget and one initialisation share."""

STARTS = ("stage", "surgery", "edit")
"""Roles of needed runs that a student's initial weights or its data come from."""

CONDITIONS = ("selection", "initialisation", "budget")
"""Conditions that a method shares with its baseline, so that they differ in the method alone, without `any_budget`."""

SELECTS = "validation"
"""Split by which checkpoints, and the better of several students, are selected."""

Column = tuple[str, str, str]
"""Task, split and metric."""


@dataclass(frozen=True)
class Entry:
    """Our figures of one method and student in one column, over seeds, with the paper's.

    Attributes:
        row: label of the row.
        method: label of the method; so are student, teacher and task labels.
        split: name of the split, as in `result.json`.
        metric: name of the metric.
        values: seed -> value, as in `result.json`; None if undefined.
        expected: seeds that the table's definition asks for.
        selection: how the checkpoint was chosen.
        init: initial weights of the student.
        family: digest of everything but the seed.
        budget: digest that entries of one budget share, see `budget_of`.
        settings: settings in which the entry differs from others with the same labels; empty without such.
        digests: seed -> digest of the run.
        commands: seed -> overrides of `kd-train` that make the run.
        paper: figures of the paper for the same method, student, task, split and metric.
        difference: difference from the baseline, with p corrected over the methods; None without a baseline.
        differs_in: conditions, of `CONDITIONS`, in which it differs from its baseline; empty without one.
        by_example: difference of the trained models from the baseline's, over examples; None if predictions are not at hand.
        mcnemar: McNemar's test of the same two models; None where several seeds have a pair, or the metric is not accuracy.
        incomparable: reason why predictions that are at hand are not compared; empty without such.
        details: sizes and costs from the runs' records, where these are at hand: see `details_of`.
    """

    row: str
    method: str
    student: str
    teacher: str
    task: str
    split: str
    metric: str
    values: Mapping[int, float | None] = field(default_factory=dict)
    expected: frozenset[int] = frozenset()
    selection: str = ""
    init: str = ""
    family: str = ""
    budget: str = ""
    settings: str = ""
    digests: Mapping[int, str] = field(default_factory=dict)
    commands: Mapping[int, str] = field(default_factory=dict)
    paper: tuple[Figure, ...] = ()
    difference: PairedDifference | None = None
    differs_in: tuple[str, ...] = ()
    by_example: ExampleDifference | None = None
    mcnemar: McNemar | None = None
    incomparable: str = ""
    details: Mapping[str, float] = field(default_factory=dict)

    @property
    def column(self) -> Column:
        """Task, split and metric."""
        return (self.task, self.split, self.metric)

    @property
    def higher_is_better(self) -> bool:
        """Return whether a larger value is an improvement."""
        return higher_is_better(self.metric)

    @property
    def defined(self) -> list[float]:
        """Values that are defined."""
        return [value for value in self.values.values() if value is not None]

    @property
    def mean(self) -> float | None:
        """Mean over seeds; None if there is none, or a value is undefined."""
        return statistics.fmean(self.defined) if self.values and len(self.defined) == len(self.values) else None

    @property
    def std(self) -> float | None:
        """Standard deviation over seeds, with n - 1; None for fewer than two."""
        return statistics.stdev(self.defined) if self.mean is not None and len(self.values) > 1 else None

    @property
    def missing(self) -> list[int]:
        """Seeds that the table asks for and that have no figure."""
        return sorted(self.expected - self.values.keys())

    @property
    def key(self) -> tuple[str, ...]:
        """Labels and settings of the row."""
        return (self.row, self.method, self.student, self.teacher, self.settings)

    @property
    def conditions(self) -> tuple[str, ...]:
        """Return what it shares with its baseline, in the order of `CONDITIONS`."""
        return (self.selection, self.init, self.budget)


@dataclass(frozen=True)
class Comparison:
    """Entries of a table or of a folder of runs.

    Attributes:
        title: heading.
        protocol: sentence about the protocol.
        entries: the entries, in the order of the rows.
        baseline: label of the method that others are compared with.
        over_tasks: (method, student, teacher, split) -> comparison with the baseline over the tasks.
        any_budget: whether entries without a baseline of their conditions are compared with one of others.
        incomplete: whether seeds are missing in a column with comparisons, so that verdicts are not final.
    """

    title: str
    protocol: str
    entries: Sequence[Entry]
    baseline: str = BASELINE
    over_tasks: Mapping[tuple[str, str, str, str], TaskSummary] = field(default_factory=dict)
    any_budget: bool = False
    incomplete: bool = False

    @property
    def columns(self) -> list[Column]:
        """Columns in the order in which they first occur."""
        return list(dict.fromkeys(entry.column for entry in self.entries))

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """Keys of the rows in the order in which they first occur."""
        return list(dict.fromkeys(entry.key for entry in self.entries))

    def only(self, keep: Callable[[Entry], bool]) -> "Comparison":
        """Return the comparison with some entries alone; p stay corrected for all."""
        entries = [entry for entry in self.entries if keep(entry)]
        kept = {summarised(entry) for entry in entries}
        return replace(self, entries=entries, over_tasks={key: one for key, one in self.over_tasks.items() if key in kept})

    def of_row(self, key: tuple[str, ...]) -> dict[Column, Entry]:
        """Return the entries of a row by column."""
        return {entry.column: entry for entry in self.entries if entry.key == key}


def entries_of(figures: Iterable[Figure]) -> list[Entry]:
    """Return entries of our figures: those of one family and selection are one entry for each column.

    Figures of one family differ only in the seed; of one selection, their checkpoints and settings were chosen alike, so that
    the best of a search is never averaged with a run that came of none.

    Args:
        figures: rows of an `ours.csv`.
    """
    groups: dict[tuple[str, ...], list[Figure]] = {}
    for figure in figures:
        labels = (figure.row, figure.method, figure.student, figure.teacher, *column_of(figure))
        groups.setdefault((*labels, figure.family, figure.selection), []).append(figure)
    entries = []
    for group in groups.values():
        first = min(group, key=lambda figure: int(figure.seeds))
        entries.append(
            Entry(
                row=first.row,
                method=first.method,
                student=first.student,
                teacher=first.teacher,
                task=first.task,
                split=first.split,
                metric=first.metric,
                values={int(figure.seeds): figure.value for figure in group},
                selection=first.selection,
                init=first.init,
                family=first.family,
                budget=first.budget,
                digests={int(figure.seeds): figure.digest for figure in group},
                commands={int(figure.seeds): figure.command for figure in group},
            )
        )
    return with_settings(entries)


def entries_of_records(records: Sequence[Mapping[str, Any]]) -> list[Entry]:
    """Return entries of finished runs: runs of one family and selection are one entry for each column.

    Args:
        records: contents of `result.json`.
    """
    entries = []
    groups = grouped(records)
    for group, settings in zip(groups, differences(groups), strict=True):
        first = min(group, key=lambda record: record["seed"])
        for split, metrics in first["metrics"].items():
            entries += [
                Entry(
                    f"{first['method']} {first['student']}",
                    *(first["method"], first["student"], "+".join(first["teacher"]), first["task"], split, metric),
                    values={record["seed"]: record["metrics"].get(split, {}).get(metric) for record in group},
                    selection=selection_words(first),
                    init=first["init"],
                    family=first["family"],
                    budget=budget_of(first),
                    settings=settings,
                    digests={record["seed"]: record["digest"] for record in group},
                )
                for metric in metrics
            ]
    return entries


def column_of(figure: Figure) -> Column:
    """Return task, split and metric of a figure."""
    return (figure.task, figure.split, figure.metric)


def words_of(command: str) -> list[str]:
    """Return the overrides of a command but its seed and the search that its settings came of, which no family depends on.

    >>> words_of("method=kd seed=3 tuned.study=mine 'task.where={domain: [books, dvd]}'")
    ['method=kd', 'task.where={domain: [books, dvd]}']
    """
    return [word for word in shlex.split(command) if not word.startswith(("seed=", "tuned."))]


def budget_of(record: Mapping[str, Any]) -> str:
    """Return a digest that runs share which differ in their methods and seeds alone.

    It is of student, initialisation, data, optimiser and trainer; of the runs that student, surgery or data start from, which
    depend on the seed; and of the teacher that the student starts from, if it does.

    Args:
        record: content of `result.json`.
    """
    identity = record["identity"]
    shared = {name: identity[name] for name in BUDGET if name in identity}
    if begins := {role: run for role, run in identity.get("inputs", {}).items() if role.partition(" ")[0] in STARTS}:
        shared["inputs"] = begins
    if identity["student"].get("init_from") == "teacher":
        read = -1 if identity["pool"].get("chain") else 0  # of a chain the method sees the last teacher alone
        shared["teacher"] = [identity["teachers"][read], identity["inputs"].get(f"teacher {record['teacher'][read]}")]
    return digest_of(shared)


def with_settings(entries: Sequence[Entry]) -> list[Entry]:
    """Return entries with what tells them from others with the same labels and column: overrides, or else their selection."""
    groups: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((*entry.key[:4], entry.column), []).append(entry)
    told = {}
    for group in groups.values():
        words = [words_of(next(iter(entry.commands.values()), "")) for entry in group]
        common = set.intersection(*map(set, words))
        for entry, own in zip(group, words, strict=True):
            told[id(entry)] = " ".join(word for word in own if word not in common) if len(group) > 1 else ""
    kinds = [(*entry.key[:4], entry.column) for entry in entries]
    settings = with_selections([told[id(entry)] for entry in entries], kinds, [entry.selection for entry in entries])
    return [replace(entry, settings=words) for entry, words in zip(entries, settings, strict=True)]


def compare(
    entries: Sequence[Entry],
    paper: Iterable[Figure] = (),
    *,
    title: str = "",
    protocol: str = "",
    baseline: str = BASELINE,
    any_budget: bool = False,
) -> Comparison:
    """Return entries beside the paper's figures and beside a baseline of the same budget and initialisation.

    Values of one method and its baseline are paired by seed. p is corrected by Holm's procedure over the methods that are
    compared with one baseline in one column. A figure of the paper joins on method, student, task, split and metric, so that a
    figure of a dev set never meets one of a test set; those that meet no entry of ours are entries without values.

    Args:
        entries: our figures.
        paper: the paper's figures.
        title: heading.
        protocol: sentence about the protocol.
        baseline: method that the others are compared with.
        any_budget: compare entries that have no such baseline with one of another selection, initialisation or budget. The
            verdicts of the others stay.

    Raises:
        InputError: if there is no figure of ours of the baseline, and it is not the usual one.
    """
    if baseline != BASELINE and not any(entry.method == baseline and entry.values for entry in entries):
        methods = ", ".join(dict.fromkeys(entry.method for entry in entries if entry.values))
        raise InputError(f"there is no run of '{baseline}' to compare with; there are {methods}", "--baseline")
    printed: dict[tuple[str, str, Column], list[Figure]] = {}
    for figure in paper:
        printed.setdefault((figure.method, figure.student, column_of(figure)), []).append(figure)
    joined = [replace(entry, paper=tuple(printed.get((entry.method, entry.student, entry.column), ()))) for entry in entries]
    met = {(entry.method, entry.student, entry.column) for entry in entries}
    alone = [
        Entry(figure.row, figure.method, figure.student, figure.teacher, *column_of(figure), paper=(figure,))
        for key, figures in printed.items()
        if key not in met
        for figure in figures
    ]
    compared = with_differences(joined, baseline, any_budget=any_budget)
    columns = {entry.column for entry in compared if entry.difference is not None}
    incomplete = any(entry.missing and entry.column in columns for entry in compared)
    return Comparison(title, protocol, [*compared, *alone], baseline, over_tasks(compared), any_budget, incomplete)


Family = tuple[Any, ...]
"""Student, column, and the conditions of the baseline: entries that share them have their p corrected together."""


class Pair(NamedTuple):
    """The baseline of an entry.

    Attributes:
        family: see `Family`.
        baseline: the entry of the baseline.
        differs_in: conditions in which the two differ.
    """

    family: Family
    baseline: Entry
    differs_in: tuple[str, ...] = ()


def pairs_of(entries: Sequence[Entry], baseline: str, *, any_budget: bool = False) -> dict[int, Pair]:
    """Return the baseline of each entry that has one: that of the same student, column, selection, start and budget.

    Of several, which may start from another backbone, that of the same teacher is taken, or none.

    Args:
        entries: our figures.
        baseline: method of the baselines.
        any_budget: where there is no such baseline, take one of the same student and column; but none that was selected
            otherwise in the column of the split that selects, where the best of more candidates looks better than it is.

    Returns:
        Index of the entry -> its baseline.
    """
    baselines: dict[tuple[str, Column], list[Entry]] = {}
    for entry in entries:
        if entry.method == baseline and entry.values:
            baselines.setdefault((entry.student, entry.column), []).append(entry)
    pairs = {}
    for index, entry in enumerate(entries):
        if entry.method == baseline or not entry.values:
            continue
        others = baselines.get((entry.student, entry.column), [])
        found = [other for other in others if other.conditions == entry.conditions]
        if any_budget and not found:
            found = [other for other in others if entry.split != SELECTS or other.selection == entry.selection]
        found = [other for other in found if other.teacher == entry.teacher] or found
        if len(found) == 1:
            (other,) = found
            both = zip(CONDITIONS, entry.conditions, other.conditions, strict=True)
            differs_in = tuple(condition for condition, own, its in both if own != its)
            pairs[index] = Pair((entry.student, entry.column, *other.conditions), other, differs_in)
    return pairs


Test = TypeVar("Test")


def corrected_of_pairs(
    pairs: Mapping[int, Pair], tests: Mapping[int, Test], correct: Callable[[Mapping[str, Test]], Mapping[str, Test]]
) -> dict[int, Test]:
    """Return tests with p corrected by families.

    Those of entries that share all conditions with their baseline are corrected together, as if there were no others; those
    that do not are corrected together with them all.

    Args:
        pairs: as `pairs_of` returns them.
        tests: index of the entry -> its test, not corrected.
        correct: correction of the tests of a family.
    """
    families: dict[Family, dict[str, Test]] = {}
    for index, test in tests.items():
        families.setdefault(pairs[index].family, {})[str(index)] = test
    found: dict[str, Test] = {}
    for family in families.values():
        alike = {index: test for index, test in family.items() if not pairs[int(index)].differs_in}
        found |= {**(correct(family) if len(alike) < len(family) else {}), **correct(alike)}
    return {int(index): test for index, test in found.items()}


def with_differences(entries: Sequence[Entry], baseline: str, *, any_budget: bool = False) -> list[Entry]:
    """Return entries with their differences from their baselines over pairs of seeds; the options are those of `pairs_of`."""
    pairs = pairs_of(entries, baseline, any_budget=any_budget)
    differences = {
        index: seed_difference(entries[index].values, pair.baseline.values, higher_is_better=entries[index].higher_is_better)
        for index, pair in pairs.items()
    }
    found = list(entries)
    for index, difference in corrected_of_pairs(pairs, differences, corrected).items():
        found[index] = replace(entries[index], difference=difference, differs_in=pairs[index].differs_in)
    return found


def summarised(entry: Entry) -> tuple[str, str, str, str]:
    """Return the key of an entry in `Comparison.over_tasks`."""
    return (entry.method, entry.student, entry.teacher, entry.split)


def over_tasks(entries: Sequence[Entry]) -> dict[tuple[str, str, str, str], TaskSummary]:
    """Return comparisons with the baseline over tasks, by method, student, teacher and split, with each task's first metric.

    Only differences from baselines of the same conditions count.
    """
    groups: dict[tuple[str, str, str, str], dict[str, PairedDifference]] = {}
    for entry in entries:
        if entry.difference is not None and not entry.settings and not entry.differs_in:
            groups.setdefault(summarised(entry), {}).setdefault(entry.task, entry.difference)
    return {key: task_summary(differences) for key, differences in groups.items()}


def with_details(comparison: Comparison, records: Mapping[str, Mapping[str, Any]]) -> Comparison:
    """Return a comparison with sizes and costs from the records of runs, by digest, where these are at hand."""
    entries = []
    for entry in comparison.entries:
        known = [details_of(records[digest]) for digest in entry.digests.values() if digest in records]
        names = dict.fromkeys(name for details in known for name in details)
        medians = {name: statistics.median(d[name] for d in known if name in d) for name in names}
        entries.append(replace(entry, details=medians))
    return replace(comparison, entries=entries)


def details_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Return parameters, megabytes, latency, speed-up over the first teacher, training seconds and agreement of a run."""
    latency, teachers = record["latency_ms"], record.get("teacher") or []
    agreement = record.get("agreement", {}).get("validation", {})
    own = latency.get("student")
    teacher = latency.get(teachers[0]) if teachers else None
    values = {
        "parameters": record["parameters"]["student"],
        "megabytes": record["megabytes"].get("student"),
        "latency_ms": own,
        "speed_up": teacher / own if teacher and own else None,
        "train_seconds": record["seconds"]["train"] + (record["seconds"].get("before") or 0.0),
        "agreement": next(iter(agreement.values()), None),
    }
    return {name: float(value) for name, value in values.items() if value is not None}
