"""Tables of the results of runs."""

import json
import statistics
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kd.results.tuned import selection_words, tuned_words


def console(width: int = 200) -> Console:
    """Return the console for tables; names of runs, tasks and folders are printed verbatim, not as rich markup.

    Args:
        width: width in characters if the output is not a terminal.
    """
    return Console(width=None if sys.stdout.isatty() else width, markup=False, emoji=False, highlight=False)


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


OWN_UNITS = ("mse", "loss")
"""Metrics that are shown in the units of the labels, or in nats; all others are shown in percent."""

UNITS = "In percent (correlations times 100, as GLUE gives them); mse in the labels' units, loss in nats."


def score(metric: str, value: float | None, sign: str = "") -> str:
    """Format a metric for tables, cards and messages: in percent, correlations times 100; errors unscaled.

    Args:
        metric: name of the metric.
        value: value as in `result.json`, a fraction; None if undefined.
        sign: suffix of values in percent.

    >>> score("accuracy", 0.8125), score("pearson", -0.5), score("mse", 2.25, " %"), score("f1", 0.5, " %"), score("f1", None)
    ('81.2', '-50.0', '2.2500', '50.0 %', 'undefined')
    """
    if value is None:
        return "undefined"
    return f"{value:.4f}" if in_own_units(metric) else f"{100 * value:.1f}{sign}"


def in_own_units(metric: str) -> bool:
    """Return whether a metric, perhaps of a task of a mixture, is shown in its own units.

    >>> in_own_units("mse"), in_own_units("stsb/mse"), in_own_units("stsb/pearson")
    (True, True, False)
    """
    return metric.rpartition("/")[2] in OWN_UNITS


def heading(split: str, metric: str) -> str:
    """Return the heading of a column; the metric of a task of a mixture is below the task's name.

    >>> print(heading("test", "rte/accuracy"))
    test
    rte
    accuracy
    """
    return f"{split} {metric}" if "/" not in metric else "\n".join([split, *metric.split("/")])


def closing_table(result: Mapping[str, Any], directory: Path) -> None:
    """Print the table of a finished run: students, their ensemble, the teachers, and how they were measured."""
    table = Table(title=f"{result['method']} on {result['task']}, seed {result['seed']}", title_justify="left")
    metrics = [(split, name) for split, values in result["metrics"].items() for name in values]
    first = next(iter(result["agreement"]))
    teachers = list(result["metrics_teacher"])
    for column in ("model", "parameters", "MB", *(heading(split, name) for split, name in metrics)):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name in teachers:
        table.add_column(f"agreement ({first})" if len(teachers) == 1 else f"agreement with {name} ({first})", justify="right")
    table.add_column("latency ms", justify="right")

    def scores(by_split: Mapping[str, Mapping[str, float | None]]) -> list[str]:
        return [
            score(metric, by_split[split][metric]) if metric in by_split.get(split, {}) else "" for split, metric in metrics
        ]

    students = result["students"]
    for name, student in students.items():
        label = f"student {result['student'] if len(students) == 1 else name}"
        table.add_row(
            label + (" (the run's)" if len(students) > 1 and name == result["headline"] else ""),
            f"{student['parameters']:,}",
            _number(student["megabytes"], 1),
            *scores(student["metrics"]),
            *(score("agreement", student["agreement"][first].get(teacher)) for teacher in teachers),
            _number(student["latency_ms"], 2),
        )
    if result["metrics_ensemble"]:
        table.add_row("ensemble of the students", "", "", *scores(result["metrics_ensemble"]), *[""] * len(teachers), "")
    for name in teachers:
        table.add_row(
            f"teacher {name}",
            f"{result['parameters']['teachers'][name]:,}",
            _number(result["megabytes"][name], 1),
            *scores(result["metrics_teacher"][name]),
            *[""] * len(teachers),
            _number(result["latency_ms"][name], 2),
        )
    if baseline := result.get("baseline"):
        label = "mean of the scores" if result["labels"] is None else "majority class"
        label = "constant prediction" if "tasks" in result else label
        table.add_row(label, "", "", *scores(baseline), *[""] * len(teachers), "")
    out = console()
    out.print(table)
    out.print(UNITS)
    for name, student in students.items():
        if student.get("collapsed"):
            what = "predicted scores hardly differ" if result["labels"] is None else "predictions are one class"
            settings_of_student = result["identity"].get("student", {})
            tasks = [task for task, of_task in result.get("tasks", {}).items() if of_task["students"][name]["collapsed"]]
            where = f" of {', '.join(tasks)}" if tasks else ""
            words = f"WARN  student {name if len(students) > 1 else result['student']}: its {what}{where}, whatever the text. "
            out.print(f"{words}Try {cure(result['teacher'], settings_of_student)}")
    out.print(protocol([result]))
    gone = result.get("keep") == "figures"
    exported = "none is left (trainer.keep=figures)" if gone else str(directory / "student")
    out.print(f"run: {directory}\nexported student: {exported}", soft_wrap=True)
    if len(students) > 1 and not gone:
        words = "the run's student is the best on validation; the others are in"
        out.print(f"{words} {directory / 'peers'}", soft_wrap=True)


def cure(teachers: Sequence[str], student: Mapping[str, Any]) -> str:
    """Return advice for a student that predicts one class: configuration keys and values to try.

    Args:
        teachers: names of the run's teachers.
        student: the student's settings, of which `init` and `init_from` are read.
    """
    copies = student.get("init") not in ("random", "checkpoint", "run")
    better = ["student.init_from=teacher"] if teachers and copies and student.get("init_from") != "teacher" else []
    return ", ".join([*better, "a larger optimizer.lr", "more trainer.max_epochs"])


def protocol(results: Sequence[Mapping[str, Any]]) -> str:
    """Describe how these results were measured, in a sentence or two; values that differ are listed in braces."""

    def common(values: Iterable[Any]) -> str:
        distinct = sorted({str(value) for value in values})
        return distinct[0] if len(distinct) == 1 else "{" + ", ".join(distinct) + "}"

    checkpoint = common(f"{r['selection']['kind']} checkpoint, {r['selection']['by']}{tuned_words(r)}" for r in results)
    init = common(r["init"] for r in results)
    precision = common(r["precision"] for r in results)
    latency = common(latency_words(r) for r in results)
    return f"{checkpoint}; student starts from {init}; trained in {precision}, scored in float32. latency: {latency}."


def latency_words(result: Mapping[str, Any]) -> str:
    """Describe how the latencies of a record were measured."""
    about = result.get("latency")
    if about is None:  # an older record, without this entry
        return "one sentence of 32 tokens, float32, CPU, median, tokenizer excluded"
    return f"{about['threads']} thread(s), {about['measure']}"


def grouped(results: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Group results that differ only in the seed, and whose figures were selected alike."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["family"], selection_words(result)), []).append(result)
    return list(groups.values())


def settings(identity: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a run's identity as a flat mapping `key.key` -> value."""
    flat: dict[str, Any] = {}
    for name, value in identity.items():
        flat.update(settings(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value})
    return flat


TOLD = ("method.name", "method._target_", "student.name", "task.name", "seed", "format")
"""Settings that a row shows already, or that are not meaningful to a reader."""

DIGESTS = ("inputs.", "teachers.", "data.")
"""Settings that are mostly digests of files and of other runs. A row shows them if nothing else tells it from others."""


def models(result: Mapping[str, Any]) -> list[str]:
    """Return the names of the students of a run."""
    return list(result["students"]) if len(result["students"]) > 1 else [result["student"]]


def differences(groups: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """Return a text per group: the settings in which it differs from groups of the same task, method, teachers and students.

    Digests of files and of other runs are among them where two such groups differ in nothing else.
    """
    firsts = [group[0] for group in groups]
    kinds, selections = [_kind(first) for first in firsts], [selection_words(first) for first in firsts]
    identities = [settings(first["identity"]) for first in firsts]
    words = _told_apart(kinds, identities, lambda name: not name.startswith((*TOLD, *DIGESTS)))
    alike = list(zip(kinds, words, selections, strict=True))
    digests = _told_apart(alike, identities, lambda name: name.startswith(DIGESTS))
    return with_selections([" ".join(filter(None, pair)) for pair in zip(words, digests, strict=True)], kinds, selections)


def _told_apart(kinds: Sequence[Hashable], identities: Sequence[Mapping[str, Any]], counts: Callable[[str], bool]) -> list[str]:
    """Return a text per identity: the settings in which it differs from others of its kind, of the names that count.

    A name counts without `before.`, the prefix of what is about a first run. A missing name counts as None, and is not shown.
    """
    of_kind: dict[Hashable, list[Mapping[str, Any]]] = {}
    for kind, identity in zip(kinds, identities, strict=True):
        of_kind.setdefault(kind, []).append(identity)
    varied = {kind: _varied(mappings, counts) for kind, mappings in of_kind.items()}
    return [
        " ".join(f"{name.removeprefix('method.')}={identity[name]}" for name in varied[kind] if name in identity)
        for kind, identity in zip(kinds, identities, strict=True)
    ]


def with_selections(settings: Sequence[str], kinds: Sequence[Hashable], selections: Sequence[str]) -> list[str]:
    """Return the settings of rows with the selection of their figures, where nothing else tells rows of one kind apart.

    Args:
        settings: settings in which each row differs from others of its kind.
        kinds: what rows have in common otherwise.
        selections: how the figures of each row were selected.

    >>> with_selections(["", "", "lr=1"], ["kd", "kd", "kd"], ["best", "best, best of 20 trials", "best"])
    ['best', 'best, best of 20 trials', 'lr=1']
    """
    found: dict[tuple[Hashable, str], set[str]] = {}
    for kind, words, selection in zip(kinds, settings, selections, strict=True):
        found.setdefault((kind, words), set()).add(selection)
    return [
        ", ".join(filter(None, [words, selection])) if len(found[kind, words]) > 1 else words
        for kind, words, selection in zip(kinds, settings, selections, strict=True)
    ]


def _kind(result: Mapping[str, Any]) -> str:
    """Return a key of task, method, teachers and students: rows with the same key are distinguished by their settings."""
    return json.dumps([result["task"], result["method"], result["teacher"], models(result)])


def _varied(mappings: Sequence[Mapping[str, Any]], counts: Callable[[str], bool]) -> list[str]:
    """Return the names that count and whose values differ between mappings, in their order."""
    names = dict.fromkeys(name for mapping in mappings for name in mapping if counts(name.removeprefix("before.")))
    return [name for name in names if any(mapping.get(name) != mappings[0].get(name) for mapping in mappings)]


def _spread(values: Sequence[float | None], scale: float = 100.0) -> str:
    defined = [value for value in values if value is not None]
    if len(defined) < len(values) or not defined:
        return "undefined"
    mean = statistics.fmean(defined)
    digits = 1 if scale == 100.0 else 4
    spread = f" ± {scale * statistics.stdev(defined):.{digits}f}" if len(defined) > 1 else ""
    return f"{scale * mean:.{digits}f}{spread}"


SplitScores = Mapping[str, Mapping[str, float | None]]


def report_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table with one row per configuration of a task: mean and standard deviation over seeds.

    Metrics are in percent, those in `OWN_UNITS` unscaled.

    For a cohort of several students the first row is the student that is best on validation, chosen for each seed; rows of
    each student and of their ensemble follow.
    """
    metrics = list(dict.fromkeys((s, n) for r in results for s, values in r["metrics"].items() for n in values))
    groups = grouped(results)
    told = differences(groups)
    table = Table(title=results[0]["task"], title_justify="left")
    for column in ("method", "student", "teacher", *(["where"] if any(told) else []), "seeds"):
        table.add_column(column, overflow="fold")
    for column in (
        "parameters",
        "MB",
        *(heading(split, name) for split, name in metrics),
        "agreement",
        "latency ms",
        "train s",
    ):
        table.add_column(column, justify="right", overflow="fold")

    def scores(by_seed: Sequence[SplitScores]) -> list[str]:
        return [
            _spread([values[split][name] for values in by_seed], 1.0 if in_own_units(name) else 100.0)
            if name in by_seed[0].get(split, {})
            else ""
            for split, name in metrics
        ]

    def model(by_seed: Sequence[Mapping[str, Any]]) -> list[str]:
        """Return the cells of one student, over seeds."""
        agreements = [value for record in by_seed for value in list(record["agreement"].get("validation", {}).values())[:1]]
        sizes = {f"{record['parameters']:,}": _number(record["megabytes"], 1) for record in by_seed}
        cells = [" / ".join(sizes), " / ".join(sizes.values()), *scores([record["metrics"] for record in by_seed])]
        return [
            *cells,
            _spread(agreements) if agreements else "",
            _number(_median(record["latency_ms"] for record in by_seed), 2),
        ]

    for group, words in zip(groups, told, strict=True):
        first = group[0]
        names = list(first["students"])
        seeds = ", ".join(str(r["seed"]) for r in group)
        together = f"{' + '.join(names)}: the best" if len(names) > 1 else first["student"]
        seconds = _number(statistics.fmean(r["seconds"]["train"] + r["seconds"].get("before", 0.0) for r in group), 0)
        where = [words] if any(told) else []
        best = model([r["students"][r["headline"]] for r in group])
        table.add_row(first["method"], together, ", ".join(first["teacher"]), *where, seeds, *best, seconds)
        if len(names) == 1:
            continue
        blank = [""] * len(where)
        for name in names:
            table.add_row("", name, "", *blank, "", *model([r["students"][name] for r in group]), "")
        table.add_row("", "ensemble", "", *blank, "", "", "", *scores([r["metrics_ensemble"] for r in group]), "", "", "")
    return table


def _median(values: Iterable[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return statistics.median(defined) if defined else None
