"""Comparisons as text: Markdown, CSV, LaTeX and JSON."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from kd.results.comparison import Comparison, Entry
from kd.results.statistics import PairedDifference
from kd.results.tables import UNITS, in_own_units


def number(metric: str, value: float | None, sign: bool = False) -> str:
    """Return a value in percent, or in its own unit for errors.

    >>> number("accuracy", 0.7512), number("accuracy", 0.0123, sign=True), number("mse", 0.25), number("f1", None)
    ('75.1', '+1.2', '0.2500', '')
    """
    if value is None:
        return ""
    plus = "+" if sign else ""
    return f"{value:{plus}.4f}" if in_own_units(metric) else f"{100 * value:{plus}.1f}"


def ours(entry: Entry) -> str:
    """Return mean and spread of an entry, or what there is in their place."""
    if not entry.values:
        return "missing" if entry.expected else ""
    if entry.mean is None:
        return "undefined"
    spread = "" if entry.std is None else f" ± {number(entry.metric, entry.std)}"
    return number(entry.metric, entry.mean) + spread


def paper(entry: Entry) -> str:
    """Return the paper's figures of an entry, those that are not printed ones with a mark."""
    marks = {"printed": "", "copied": " (copied)", "memory": " (from memory)"}
    return " / ".join(number(entry.metric, figure.value) + marks.get(figure.confidence, "") for figure in entry.paper)


def gap(entry: Entry) -> str:
    """Return our mean minus the paper's value; empty unless there is one of each."""
    values = [figure.value for figure in entry.paper]
    if entry.mean is None or len(values) != 1 or values[0] is None:
        return ""
    return number(entry.metric, entry.mean - values[0], sign=True)


def against(entry: Entry) -> str:
    """Return the difference from the baseline with its interval."""
    difference = entry.difference
    if difference is None or difference.mean is None:
        return ""
    text = number(entry.metric, difference.mean, sign=True)
    if difference.low is not None:
        ends = (number(entry.metric, end, sign=True) for end in (difference.low, difference.high))
        text += f" [{', '.join(ends)}]"
    return text


def probability(difference: PairedDifference | None) -> str:
    """Return p, corrected where it is."""
    p = None if difference is None else difference.p if difference.adjusted is None else difference.adjusted
    return "" if p is None else f"{p:.3f}" if p >= 0.001 else "< 0.001"


def verdict(entry: Entry, baseline: str) -> str:
    """Return the outcome of the comparison with the baseline in words."""
    if entry.method == baseline:
        return "baseline" if entry.values else ""
    if entry.difference is not None:
        unpaired = entry.difference.unpaired
        return str(entry.difference.verdict) + (f"; seeds without a pair: {_list(unpaired)}" if unpaired else "")
    return "no baseline of this budget" if entry.values else ""


def _list(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def seeds(entry: Entry) -> str:
    """Return the seeds of an entry and those that are missing."""
    text = _list(sorted(entry.values))
    return f"{text}; missing {_list(entry.missing)}".lstrip("; ") if entry.missing else text


def detail(entry: Entry, name: str, form: str) -> str:
    """Return a size or cost, empty where it is not known."""
    value = entry.details.get(name)
    return "" if value is None else format(value, form)


COLUMNS: Mapping[str, Callable[[Entry, Comparison], str]] = {
    "row": lambda entry, _: entry.row + (f" ({entry.settings})" if entry.settings else ""),
    "student": lambda entry, _: entry.student,
    "teacher": lambda entry, _: entry.teacher,
    "seeds": lambda entry, _: seeds(entry),
    "ours": lambda entry, _: ours(entry),
    "paper": lambda entry, _: paper(entry),
    "ours - paper": lambda entry, _: gap(entry),
    "against baseline": lambda entry, _: against(entry),
    "p": lambda entry, _: probability(entry.difference),
    "verdict": lambda entry, comparison: verdict(entry, comparison.baseline),
    "parameters": lambda entry, _: detail(entry, "parameters", ",.0f"),
    "speed-up": lambda entry, _: detail(entry, "speed_up", ".2f"),
}
"""Columns of a table of entries, with what is in them."""


def notes(comparison: Comparison) -> list[str]:
    """Return sentences that have to stand below any table of a comparison."""
    own = [entry for entry in comparison.entries if entry.values]
    lines = [f"{UNITS} Mean ± standard deviation over seeds."]
    if comparison.protocol:
        lines.append(comparison.protocol)
    if own:
        selections = sorted({entry.selection for entry in own})
        inits = sorted({entry.init for entry in own})
        lines.append(f"Ours: {' | '.join(selections)}. Students start from {' | '.join(inits)}.")
    lines.append(
        f"Baseline: {comparison.baseline} with the same student, initialisation, budget and seeds. Differences are means over "
        "pairs of seeds, with a 95 % BCa interval from six pairs on; p by a sign-flip test, corrected by Holm over the methods "
        "of a column; fewer than six pairs decide nothing."
    )
    for (method, student, split), summary in comparison.over_tasks.items():
        if summary.better + summary.worse + summary.equal < 2:
            continue
        counts = f"{summary.better} better, {summary.worse} worse, {summary.equal} equal"
        p = "" if summary.p is None else f", sign test p = {summary.p:.3f}"
        lines.append(f"{method} {student} on {split}, over tasks: {counts}{p}: {summary.verdict}.")
    return lines


def used_columns(comparison: Comparison) -> list[str]:
    """Return the columns of which an entry has something."""
    return [name for name, text in COLUMNS.items() if any(text(entry, comparison) for entry in comparison.entries)]


def markdown(comparison: Comparison) -> str:
    """Return a comparison in Markdown: a table for each task, split and metric."""
    names, lines = used_columns(comparison), [f"# {comparison.title}", ""] if comparison.title else []
    for column in comparison.columns:
        lines += [f"## {column[0]}: {column[1]} {column[2]}", "", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        for entry in comparison.entries:
            if entry.column == column:
                cells = (COLUMNS[name](entry, comparison).replace("|", "\\|") for name in names)
                lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join([*lines, *(f"- {line}" for line in notes(comparison))]) + "\n"


def as_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Return a row for each entry, with numbers as they are in `result.json`."""
    rows = []
    for entry in comparison.entries:
        difference = entry.difference
        rows.append(
            {
                **{name: getattr(entry, name) for name in ("row", "method", "student", "teacher", "settings")},
                **{name: getattr(entry, name) for name in ("task", "split", "metric", "mean", "std")},
                "n": len(entry.values),
                "seeds": seeds(entry),
                "paper": entry.paper[0].value if len(entry.paper) == 1 else None,
                "paper_source": "; ".join(f"{figure.source} ({figure.confidence})" for figure in entry.paper),
                "difference": None if difference is None else difference.mean,
                "low": None if difference is None else difference.low,
                "high": None if difference is None else difference.high,
                "p": None if difference is None else difference.p,
                "p_corrected": None if difference is None else difference.adjusted,
                "verdict": verdict(entry, comparison.baseline),
                "selection": entry.selection,
                "init": entry.init,
                **{name: entry.details.get(name) for name in DETAILS},
                "digests": " ".join(entry.digests.values()),
                "command": next(iter(entry.commands.values()), ""),
            }
        )
    return rows


DETAILS = ("parameters", "megabytes", "latency_ms", "speed_up", "train_seconds", "agreement")
"""Sizes and costs of `Entry.details`."""


def as_csv(comparison: Comparison) -> str:
    """Return a comparison in CSV, a row for each entry."""
    rows, file = as_rows(comparison), io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: "" if value is None else value for name, value in row.items()} for row in rows)
    return file.getvalue()


def as_json(comparison: Comparison) -> str:
    """Return a comparison in JSON: rows as in CSV with the values of each seed, and the comparisons over tasks."""
    rows = as_rows(comparison)
    for row, entry in zip(rows, comparison.entries, strict=True):
        row["values"] = {str(seed): value for seed, value in sorted(entry.values.items())}
    tasks = [
        {"method": method, "student": student, "split": split, **asdict(summary)}
        for (method, student, split), summary in comparison.over_tasks.items()
    ]
    content = {"title": comparison.title, "rows": rows, "over_tasks": tasks, "notes": notes(comparison)}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


SPECIAL = {
    "\\": r"\textbackslash{}",
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
}


def tex(text: str) -> str:
    """Return a text with the special characters of LaTeX escaped."""
    return "".join(SPECIAL.get(letter, letter) for letter in text)


def ranks(entries: Sequence[Entry]) -> dict[tuple[str, ...], int]:
    """Return the rank of each row's mean in a column, 1 for the best; rows whose printed values are equal share a rank."""
    shown = {entry.key: float(number(entry.metric, entry.mean)) for entry in entries if entry.mean is not None}
    higher = all(entry.higher_is_better for entry in entries)
    order = sorted(set(shown.values()), reverse=higher)
    return {key: order.index(value) + 1 for key, value in shown.items()}


def latex(comparison: Comparison) -> str:
    """Return a comparison as a LaTeX table for booktabs: rows by columns, the best of a column bold, the second underlined.

    The paper's value is in parentheses behind ours. Best and second are those of ours with the same student.
    """
    columns = comparison.columns
    groups: dict[tuple[Any, ...], list[Entry]] = {}
    for one in comparison.entries:
        groups.setdefault((one.column, one.student), []).append(one)
    place = {(column, *key): rank for (column, _), of in groups.items() for key, rank in ranks(of).items()}
    lines = [f"% {line}" for line in notes(comparison)]
    lines += [r"\begin{tabular}{ll" + "r" * len(columns) + "}", r"\toprule"]
    lines.append(" & ".join(["", "", *(tex(f"{task} {split} {metric}") for task, split, metric in columns)]) + r" \\")
    lines.append(r"\midrule")
    for key in comparison.rows:
        of_row = comparison.of_row(key)
        cells = [tex(key[0] + (f" ({key[4]})" if key[4] else "")), tex(key[2])]
        for column in columns:
            entry = of_row.get(column)
            text = "" if entry is None else tex(ours(entry))
            rank = place.get((column, *key))
            if rank in (1, 2) and entry is not None and entry.values:
                text = rf"\textbf{{{text}}}" if rank == 1 else rf"\underline{{{text}}}"
            printed = "" if entry is None else tex(paper(entry))
            cells.append(f"{text} ({printed})" if text and printed else text or (f"({printed})" if printed else "--"))
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


FORMATS: Mapping[str, Callable[[Comparison], str]] = {
    "markdown": markdown,
    "csv": as_csv,
    "latex": latex,
    "json": as_json,
}
"""Formats of a comparison that are text."""
