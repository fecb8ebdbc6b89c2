"""Comparisons as text: Markdown, CSV, LaTeX and JSON."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from enum import StrEnum
from typing import Any

from kd.results.columns import (
    COLUMNS,
    against,
    by_example,
    gap_of,
    label,
    notes,
    number,
    ours,
    paper,
    printed,
    probability,
    seed_test_name,
    seeds,
    title_of,
    unlike,
    used_columns,
    verdict,
)
from kd.results.comparison import Comparison, Entry
from kd.results.published import compared_with


def markdown(comparison: Comparison) -> str:
    """Return a comparison in Markdown: a table for each task, split and metric."""
    names, lines = used_columns(comparison), [f"# {comparison.title}", ""] if comparison.title else []
    for column in comparison.columns:
        lines += [f"## {title_of(column)}", "", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        for entry in comparison.entries:
            if entry.column == column:
                cells = (COLUMNS[name](entry, comparison).replace("|", "\\|") for name in names)
                lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join([*lines, *(f"- {line}" for line in notes(comparison))]) + "\n"


def as_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Return a row for each entry, with numbers as they are in `result.json`."""
    return [
        {
            **{name: getattr(entry, name) for name in ("row", "method", "student", "teacher", "settings")},
            **{name: getattr(entry, name) for name in ("task", "split", "metric", "mean", "std")},
            "n": len(entry.values),
            "seeds": seeds(entry),
            **row_of_paper(entry),
            **fields_of(entry.difference, BY_SEED),
            "verdict": verdict(entry, comparison.baseline),
            "baseline_differs_in": " ".join(entry.differs_in),
            **fields_of(entry.by_example, BY_EXAMPLE, "by_example"),
            **fields_of(entry.mcnemar, MCNEMAR, "mcnemar"),
            "by_example_note": entry.incomparable,
            "selection": entry.selection,
            "init": entry.init,
            **{name: entry.details.get(name) for name in DETAILS},
            "digests": " ".join(entry.digests.values()),
            "command": next(iter(entry.commands.values()), ""),
        }
        for entry in comparison.entries
    ]


P = {"p": "p", "adjusted": "p_corrected"}
BY_SEED = {
    "mean": "difference",
    "spread": "spread",
    "low": "low",
    "high": "high",
    **P,
    "test": "test",
    "sign_flip": "p_sign_flip",
    "t": "p_t",
    "comparisons": "comparisons",
}
BY_EXAMPLE = {
    "n": "n",
    "differing": "differing",
    "difference": "difference",
    "low": "low",
    "high": "high",
    **P,
    "verdict": "verdict",
}
MCNEMAR = {"method_only": "method_only", "baseline_only": "baseline_only", **P, "verdict": "verdict"}
"""Attributes of the results of tests -> their columns in CSV and JSON."""


def fields_of(test: object | None, columns: Mapping[str, str], prefix: str = "") -> dict[str, Any]:
    """Return attributes of the result of a test by column; None for each without a result.

    Args:
        test: the result.
        columns: attribute -> column.
        prefix: beginning of the names of the columns.
    """
    start = f"{prefix}_" if prefix else ""
    values = {column: None if test is None else getattr(test, name) for name, column in columns.items()}
    return {start + column: str(value) if isinstance(value, StrEnum) else value for column, value in values.items()}


def row_of_paper(entry: Entry) -> dict[str, Any]:
    """Return the paper's figures of an entry: the one that ours is compared with, or the only one, and the text of all."""
    one = compared_with(entry.paper) or (entry.paper[0] if len(entry.paper) == 1 else None)
    return {
        "paper": None if one is None else one.value,
        "paper_row": "" if one is None else one.row,
        "minus_paper": gap_of(entry),
        "paper_values": "; ".join(f"{figure.row}: {figure.value}" for figure in entry.paper),
        "paper_source": "; ".join(f"{figure.source} ({figure.confidence})" for figure in entry.paper),
    }


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
        {"method": method, "student": student, "teacher": teacher, "split": split, **asdict(summary)}
        for (method, student, teacher, split), summary in comparison.over_tasks.items()
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

    The paper's value is in parentheses behind ours; of several the one that ours is compared with. Best and second are those of
    ours with the same student. Teachers are a column if rows differ in them. Tests by seed and by example are comments above
    the table.
    """
    columns = comparison.columns
    groups: dict[tuple[Any, ...], list[Entry]] = {}
    for one in comparison.entries:
        groups.setdefault((one.column, one.student), []).append(one)
    place = {(column, *key): rank for (column, _), of in groups.items() for key, rank in ranks(of).items()}
    labels = (2, 3) if len({key[3] for key in comparison.rows}) > 1 else (2,)  # student and teacher
    lines = [f"% {line}" for line in (*notes(comparison), *lines_by_seed(comparison), *lines_by_example(comparison))]
    lines += [r"\begin{tabular}{l" + "l" * len(labels) + "r" * len(columns) + "}", r"\toprule"]
    headings = ["", *("" for _ in labels), *(tex(" ".join(filter(None, column))) for column in columns)]
    lines += [" & ".join(headings) + r" \\", r"\midrule"]
    for key in comparison.rows:
        of_row = comparison.of_row(key)
        cells = [tex(key[0] + (f" ({key[4]})" if key[4] else "")), *(tex(key[index]) for index in labels)]
        cells += [latex_cell(of_row.get(column), place.get((column, *key))) for column in columns]
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def latex_cell(entry: Entry | None, rank: int | None) -> str:
    """Return our value of an entry, bold or underlined by its rank, with the paper's in parentheses."""
    if entry is None:
        return "--"
    text, figure = tex(ours(entry)), compared_with(entry.paper)
    if rank in (1, 2) and entry.values:
        text = rf"\textbf{{{text}}}" if rank == 1 else rf"\underline{{{text}}}"
    of_paper = tex(paper(entry) if figure is None else printed(figure, labelled=False))
    return " ".join(filter(None, [text, f"({of_paper})" if of_paper else ""])) or "--"


def lines_by_seed(comparison: Comparison) -> list[str]:
    """Return a line for each entry with a test by seed: its name, p and verdict."""
    lines = []
    for entry in comparison.entries:
        if name := seed_test_name(entry):
            where, p = f"{label(entry)} on {title_of(entry.column)}", probability(entry.difference)
            test = f"{name}, p {equals(p)}" if p else name
            lines.append(f"By seed, {where}: {against(entry)}, {test}: {verdict(entry, comparison.baseline)}.")
    return lines


def equals(p: str) -> str:
    """Return the text of a p with the sign that stands before it, that of equality unless it has one.

    >>> equals("0.031"), equals("< 0.001")
    ('= 0.031', '< 0.001')
    """
    return p if p.startswith("<") else f"= {p}"


def lines_by_example(comparison: Comparison) -> list[str]:
    """Return a line for each entry with a test by example."""
    lines = []
    for entry in comparison.entries:
        if entry.by_example is not None:
            mcnemar = "" if entry.mcnemar is None else f"; McNemar p {equals(probability(entry.mcnemar))}"
            where, p = f"{label(entry)} on {title_of(entry.column)}", equals(probability(entry.by_example))
            words = filter(None, [f"{by_example(entry)}, p {p}{mcnemar}", unlike(entry)])
            lines.append(f"By example, {where}: {'; '.join(words)}.")
    return lines


FORMATS: Mapping[str, Callable[[Comparison], str]] = {
    "markdown": markdown,
    "csv": as_csv,
    "latex": latex,
    "json": as_json,
}
"""Formats of a comparison that are text."""
