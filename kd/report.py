"""Runs to tables."""

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kd.hardware import version_line


def console(width: int = 200) -> Console:
    """What tables are printed by; names of runs, tasks and folders are printed as they are, whatever rich takes for markup.

    Args:
        width: where there is no terminal: a pipe or a log has none of its own.
    """
    return Console(width=None if sys.stdout.isatty() else width, markup=False, emoji=False, highlight=False)


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


OWN_UNITS = ("mse", "loss")
"""Metrics in the units of the labels, or in nats; all others are shown in percent."""

UNITS = "In percent (correlations times 100, as GLUE gives them); mse in the labels' units, loss in nats."


def score(metric: str, value: float | None, sign: str = "") -> str:
    """A metric as every table, card and message shows it: in percent, correlations times 100; errors as they are.

    Args:
        metric: its name.
        value: as records have it, a fraction.
        sign: behind what is in percent.

    >>> score("accuracy", 0.8125), score("pearson", -0.5), score("mse", 2.25, " %"), score("f1", 0.5, " %"), score("f1", None)
    ('81.2', '-50.0', '2.2500', '50.0 %', 'undefined')
    """
    if value is None:
        return "undefined"
    return f"{value:.4f}" if metric in OWN_UNITS else f"{100 * value:.1f}{sign}"


def closing_table(result: Mapping[str, Any], directory: Path) -> None:
    """What a finished run prints: students, their ensemble and the teachers, and how it was measured."""
    table = Table(title=f"{result['method']} on {result['task']}, seed {result['seed']}", title_justify="left")
    metrics = [(split, name) for split, found in result["metrics"].items() for name in found]
    first = next(iter(result["agreement"]))
    teachers = list(result["metrics_teacher"])
    for column in ("model", "parameters", "MB", *(f"{split} {name}" for split, name in metrics)):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name in teachers:
        table.add_column(f"agreement ({first})" if len(teachers) == 1 else f"agreement with {name} ({first})", justify="right")
    table.add_column("latency ms", justify="right")

    def scores(found: Mapping[str, Mapping[str, float | None]]) -> list[str]:
        return [score(metric, found[split][metric]) if metric in found.get(split, {}) else "" for split, metric in metrics]

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
        table.add_row(label, "", "", *scores(baseline), *[""] * len(teachers), "")
    out = console()
    out.print(table)
    out.print(UNITS)
    for name, student in students.items():
        if student.get("collapsed"):
            what = "predicted scores hardly differ" if result["labels"] is None else "predictions are one class"
            known = result["identity"].get("student", {})
            words = f"WARN  student {name if len(students) > 1 else result['student']}: its {what}, whatever the text. "
            out.print(f"{words}Try {cure(result['teacher'], known)}")
    out.print(protocol([result]))
    out.print(f"run: {directory}\nexported student: {directory / 'student'}", soft_wrap=True)
    if len(students) > 1:
        words = "the run's student is the best on validation; the others are in"
        out.print(f"{words} {directory / 'peers'}", soft_wrap=True)


def cure(teachers: Sequence[str], student: Mapping[str, Any]) -> str:
    """What to try where a student predicts one class: keys and values.

    Args:
        teachers: names of the run's teachers.
        student: `init` and `init_from`.
    """
    copies = student.get("init") not in ("random", "checkpoint", "run")
    better = ["student.init_from=teacher"] if teachers and copies and student.get("init_from") != "teacher" else []
    return ", ".join([*better, "a larger optimizer.lr", "more trainer.max_epochs"])


def protocol(results: Sequence[Mapping[str, Any]]) -> str:
    """How the figures of these results came about, in a sentence or two; parts that differ are counted."""

    def common(values: Iterable[Any]) -> str:
        found = sorted({str(value) for value in values})
        return found[0] if len(found) == 1 else "{" + ", ".join(found) + "}"

    checkpoint = common(f"{r['selection']['kind']} checkpoint, {r['selection']['by']}" for r in results)
    init = common(r["init"] for r in results)
    precision = common(r["precision"] for r in results)
    latency = common(latency_words(r) for r in results)
    return f"{checkpoint}; student starts from {init}; trained in {precision}, scored in float32. latency: {latency}."


def latency_words(result: Mapping[str, Any]) -> str:
    """How a record's latencies were measured."""
    about = result.get("latency")
    if about is None:  # a record of before it was stated
        return "one sentence of 32 tokens, float32, CPU, median, tokenizer excluded"
    return f"{about['threads']} thread(s), {about['measure']}"


def load_results(folder: Path) -> list[dict[str, Any]]:
    """The records of every finished run in a folder, oldest first."""
    found = []
    if folder.exists():
        next(folder.iterdir(), None)  # says what is wrong with it, where `glob` finds nothing
    for path in folder.glob("*/result.json"):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and "students" in record:  # else another program's
            found.append({**record, "run": path.parent.name})
    return sorted(found, key=lambda record: record.get("finished", ""))


def grouped(results: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Results that differ in nothing but the seed, together."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        groups.setdefault(result["family"], []).append(result)
    return list(groups.values())


def settings(identity: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A run's identity as `key.key` -> value."""
    found: dict[str, Any] = {}
    for name, value in identity.items():
        found.update(settings(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value})
    return found


TOLD = ("method.name", "method._target_", "student.name", "task.name", "seed", "inputs.", "teachers.", "data.", "format")
"""Settings that a row tells already, or that say nothing to a person."""


def models(result: Mapping[str, Any]) -> list[str]:
    """Names of the students of a run."""
    return list(result["students"]) if len(result["students"]) > 1 else [result["student"]]


def differences(groups: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """For each group, the settings in which it differs from the others of the same task, method and student, in words."""
    alike: dict[str, list[dict[str, Any]]] = {}
    for group in groups:
        alike.setdefault(_kind(group[0]), []).append(settings(group[0]["identity"]))
    varied = {kind: _varied(found) for kind, found in alike.items()}
    own = {kind: iter(found) for kind, found in alike.items()}
    words = []
    for group in groups:
        kind = _kind(group[0])
        shown = {name: value for name, value in next(own[kind]).items() if name in varied[kind]}
        words.append(" ".join(f"{name.removeprefix('method.')}={value}" for name, value in shown.items()))
    return words


def _kind(result: Mapping[str, Any]) -> str:
    """What rows have in common that are told apart by their settings."""
    return json.dumps([result["task"], result["method"], result["teacher"], models(result)])


def _varied(found: Sequence[Mapping[str, Any]]) -> set[str]:
    """Names whose values are not the same everywhere; one that is missing counts as None."""
    names = {name for one in found for name in one if not name.removeprefix("before.").startswith(TOLD)}
    return {name for name in names if any(one.get(name) != found[0].get(name) for one in found)}


def _spread(values: Sequence[float | None], scale: float = 100.0) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return "undefined"
    mean = statistics.fmean(known)
    digits = 1 if scale == 100.0 else 4
    spread = f" ± {scale * statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{scale * mean:.{digits}f}{spread}"


Scores = Mapping[str, Mapping[str, float | None]]


def report_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """One row for each configuration of one task: mean and standard deviation over seeds, in percent; errors as they are.

    Where several students learnt together, the first row is of the one that is best on validation, seed by seed; then come
    each student and their ensemble.
    """
    metrics = list(dict.fromkeys((s, n) for r in results for s, found in r["metrics"].items() for n in found))
    groups = grouped(results)
    told = differences(groups)
    table = Table(title=results[0]["task"], title_justify="left")
    for column in ("method", "student", "teacher", *(["where"] if any(told) else []), "seeds"):
        table.add_column(column, overflow="fold")
    for column in ("parameters", "MB", *(f"{split} {name}" for split, name in metrics), "agreement", "latency ms", "train s"):
        table.add_column(column, justify="right", overflow="fold")

    def scores(found: Sequence[Scores]) -> list[str]:
        return [
            _spread([each[split][name] for each in found], 1.0 if name in OWN_UNITS else 100.0)
            if name in found[0].get(split, {})
            else ""
            for split, name in metrics
        ]

    def model(found: Sequence[Mapping[str, Any]]) -> list[str]:
        """Cells of one student over the seeds."""
        agreements = [value for each in found for value in list(each["agreement"].get("validation", {}).values())[:1]]
        sizes = {f"{each['parameters']:,}": _number(each["megabytes"], 1) for each in found}
        cells = [" / ".join(sizes), " / ".join(sizes.values()), *scores([each["metrics"] for each in found])]
        return [
            *cells,
            _spread(agreements) if agreements else "",
            _number(_median(e["latency_ms"] for e in found), 2),
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
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def first_runs(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that a method of another begins with: half of what it does, so no rows of a table unless they are asked for."""
    names = {result["inputs"].get("before", "").rpartition("-")[2] for result in results}
    return [result for result in results if result["digest"] in names]


def main() -> None:
    """The command `kd-report`."""
    parser = argparse.ArgumentParser(prog="kd-report", description="Tables of finished runs.")
    parser.add_argument("runs", nargs="?", default="runs", type=Path, help="folder of runs (paths.runs), default: runs")
    parser.add_argument("--task", help="only this task")
    parser.add_argument("--method", help="only these methods, separated by commas")
    parser.add_argument("--version", action="version", version=version_line())
    parser.add_argument("--json", action="store_true", help="the records themselves, as JSON")
    arguments = parser.parse_args()
    try:
        results = load_results(arguments.runs.expanduser())
    except OSError as error:
        print(f"kd-report: cannot read '{arguments.runs}': {error.strerror}\n  change: paths.runs", file=sys.stderr)
        sys.exit(2)
    if arguments.task:
        results = [result for result in results if result["task"] == arguments.task]
    if arguments.method:
        results = [result for result in results if result["method"] in arguments.method.split(",")]
    if not results:
        print(f"kd-report: no finished runs in '{arguments.runs}'", file=sys.stderr)
        sys.exit(2)
    if arguments.json:
        print(json.dumps(results, indent=2, ensure_ascii=False))
        return
    out = console()
    unfinished = [] if arguments.method else first_runs(results)
    left_out = {result["run"] for result in unfinished}
    tasks: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        if result["run"] not in left_out:
            tasks.setdefault(result["task"], []).append(result)
    for chosen in tasks.values():
        out.print(report_table(chosen))
        out.print(f"{UNITS} Mean ± standard deviation over seeds. {protocol(chosen)}")
        if constant := [result["run"] for result in chosen if result.get("collapsed")]:
            out.print(f"Students that predict one class, or nearly one score: {', '.join(constant)}")
        out.print()
    if unfinished:
        left = ",".join(dict.fromkeys(result["method"] for result in unfinished))
        out.print(f"Left out: runs that others begin with; --method={left} shows them")


if __name__ == "__main__":
    main()
