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


def _console() -> Console:
    # Where there is no terminal, a table is as wide as it needs to be; a pipe or a log has no width.
    return Console() if sys.stdout.isatty() else Console(width=200)


def _number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def closing_table(result: Mapping[str, Any], directory: Path) -> None:
    """What a finished run prints: student and teachers side by side, and how it was measured."""
    table = Table(title=f"{result['method']} on {result['task']}, seed {result['seed']}", title_justify="left")
    metrics = [(split, name) for split, found in result["metrics"].items() for name in found]
    columns = ["model", "parameters", "MB", *(f"{split} {name}" for split, name in metrics)]
    columns += [f"agreement ({split})" for split in list(result["agreement"])[:1]] if result["teacher"] else []
    columns.append("latency ms")
    for column in columns:
        table.add_column(column, justify="left" if column == "model" else "right")
    first = next(iter(result["agreement"]))
    agreement = [_number(next(iter(result["agreement"][first].values()), None))] if result["teacher"] else []
    latency, size = result["latency_ms"], result["megabytes"]
    table.add_row(
        f"student {result['student']}",
        f"{result['parameters']['student']:,}",
        _number(size["student"], 1),
        *(_number(result["metrics"][split][name]) for split, name in metrics),
        *agreement,
        _number(latency["student"], 2),
    )
    for place, name in enumerate(result["teacher"]):
        scores = result["metrics_teacher"][name]
        count = f"{result['parameters']['teacher']:,}" if place == 0 else ""
        table.add_row(
            f"teacher {name}",
            count,
            _number(size[name], 1),
            *(_number(scores.get(split, {}).get(metric)) for split, metric in metrics),
            *([""] if agreement else []),
            _number(latency[name], 2),
        )
    console = _console()
    console.print(table)
    console.print(protocol([result]), highlight=False)
    console.print(f"run: {directory}\nexported student: {directory / 'student'}", highlight=False, soft_wrap=True)


def protocol(results: Sequence[Mapping[str, Any]]) -> str:
    """How the figures of these results came about, in a sentence or two; parts that differ are counted."""

    def common(values: Iterable[Any]) -> str:
        found = sorted({str(value) for value in values})
        return found[0] if len(found) == 1 else "{" + ", ".join(found) + "}"

    checkpoint = common(f"{r['selection']['kind']} checkpoint, {r['selection']['by']}" for r in results)
    init = common(r["init"] for r in results)
    precision = common(r["precision"] for r in results)
    latency = "latency: one sentence of 32 tokens, float32, CPU, median, tokenizer excluded."
    return f"{checkpoint}; student starts from {init}; trained in {precision}, scored in float32. {latency}"


def load_results(folder: Path) -> list[dict[str, Any]]:
    """The records of every finished run in a folder, oldest first."""
    found = []
    for path in folder.glob("*/result.json"):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and "family" in record:  # else another program's
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


def differences(groups: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """For each group, the settings in which it differs from the others of the same task, method and student, in words."""
    found = []
    for group in groups:
        first, own = group[0], settings(group[0]["identity"])
        alike = [g[0] for g in groups if all(g[0][name] == first[name] for name in ("task", "method", "student", "teacher"))]
        others = [settings(other["identity"]) for other in alike]
        names = [n for n in own if not n.startswith(TOLD) and any(other.get(n) != own[n] for other in others)]
        found.append(" ".join(f"{name.removeprefix('method.')}={own[name]}" for name in names))
    return found


OWN_UNITS = ("mse", "loss")
"""Metrics in the units of the labels, or in nats; all others are shown in percent."""


def _spread(values: Sequence[float | None], scale: float = 100.0) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return "undefined"
    mean = statistics.fmean(known)
    return f"{scale * mean:.2f}" if len(known) == 1 else f"{scale * mean:.2f} ± {scale * statistics.stdev(known):.2f}"


def report_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """One row for each configuration of one task: mean and standard deviation over seeds, in percent; errors as they are."""
    metrics = list(dict.fromkeys((s, n) for r in results for s, found in r["metrics"].items() for n in found))
    groups = grouped(results)
    told = differences(groups)
    table = Table(title=results[0]["task"], title_justify="left")
    for column in ("method", "student", "teacher", *(["where"] if any(told) else []), "seeds"):
        table.add_column(column, overflow="fold")
    for column in ("parameters", "MB", *(f"{split} {name}" for split, name in metrics), "agreement", "latency ms", "train s"):
        table.add_column(column, justify="right", overflow="fold")
    for group, words in zip(groups, told, strict=True):
        first = group[0]
        agreements = [value for r in group for value in list(r["agreement"].get("validation", {}).values())[:1]]
        table.add_row(
            first["method"],
            first["student"],
            ", ".join(first["teacher"]),
            *([words] if any(told) else []),
            ", ".join(str(r["seed"]) for r in group),
            f"{first['parameters']['student']:,}",
            _number(first["megabytes"]["student"], 1),
            *(
                _spread([r["metrics"][split][name] for r in group], 1.0 if name in OWN_UNITS else 100.0)
                if name in first["metrics"].get(split, {})
                else ""
                for split, name in metrics
            ),
            _spread(agreements) if agreements else "",
            _number(statistics.median(r["latency_ms"]["student"] for r in group), 2),
            _number(statistics.fmean(r["seconds"]["train"] for r in group), 0),
        )
    return table


def main() -> None:
    """The command `kd-report`."""
    parser = argparse.ArgumentParser(prog="kd-report", description="Tables of finished runs.")
    parser.add_argument("runs", nargs="?", default="runs", type=Path, help="folder of runs (paths.runs), default: runs")
    parser.add_argument("--task", help="only this task")
    parser.add_argument("--method", help="only these methods, separated by commas")
    parser.add_argument("--json", action="store_true", help="the records themselves, as JSON")
    arguments = parser.parse_args()
    results = load_results(arguments.runs)
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
    console = _console()
    for task in dict.fromkeys(result["task"] for result in results):
        chosen = [result for result in results if result["task"] == task]
        console.print(report_table(chosen))
        console.print(f"Percent; mean ± standard deviation over seeds. {protocol(chosen)}\n", highlight=False)


if __name__ == "__main__":
    main()
