"""Gathering of what a comparison shows: runs of a folder, or figures of a table with the cells that are missing."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kd.results.by_example import with_tests_by_example
from kd.results.comparison import BASELINE, Comparison, Entry, compare, entries_of, with_details
from kd.results.figures import Figure, figures_if_there
from kd.results.row_labels import row_label

UNKNOWN_COLUMN = ("", "")
"""Split and metric of cells of a task that nobody has a figure of."""


def with_runs(comparison: Comparison, records: Sequence[Mapping[str, Any]], runs: Path) -> Comparison:
    """Return a comparison with what the runs at hand add: sizes and costs, and tests by example.

    Args:
        comparison: the comparison.
        records: contents of `result.json` of the runs at hand, with the names of the runs' folders as `run`.
        runs: folder of these runs.
    """
    detailed = with_details(comparison, {record["digest"]: record for record in records})
    return with_tests_by_example(detailed, records, runs)


def compare_table(
    ours: Path,
    paper: Path,
    scale: str,
    labels: Sequence[Mapping[str, str]],
    *,
    title: str,
    protocol: str,
    baseline: str = BASELINE,
    any_budget: bool = False,
) -> Comparison:
    """Return the comparison of a table: our figures beside the paper's.

    Args:
        ours: file of our figures, `ours.csv`, which may be missing.
        paper: file of the paper's figures, `paper.csv`, which may be missing.
        scale: name of a scale of the table, whose figures are ours.
        labels: labels of each cell of the scale, by configuration key.
        title: heading.
        protocol: sentence about the protocol.
        baseline: method that the others are compared with.
        any_budget: as of `kd.results.comparison.compare`.

    Raises:
        InputError: if a file of figures is damaged, or there is no figure of that method.
    """
    figures, printed = figures_if_there(ours), figures_if_there(paper)
    entries = with_expected(entries_of(figure for figure in figures if figure.scale == scale), labels, printed)
    return compare(entries, printed, title=title, protocol=protocol, baseline=baseline, any_budget=any_budget)


Group = tuple[str, str, str | None, str]
"""Method, student, teacher and task of cells; the teacher is None where a table does not list it."""


def with_expected(entries: Sequence[Entry], labels: Sequence[Mapping[str, str]], paper: Sequence[Figure] = ()) -> list[Entry]:
    """Return entries with the seeds that a table asks for, and entries without values for cells that have no figure at all.

    A point of a grid that has no figure is an entry of its own, if another point has one; else one entry stands for all. A seed
    that another entry of the same family has, whose figures were selected otherwise, is not missing.

    Args:
        entries: our figures.
        labels: labels of each cell, by configuration key, and of its row, if it has one of its own, as `row`; a cell without
            labels of method, student, task and seed is left out; the task may lack if there is one alone.
        paper: the paper's figures, whose columns stand where there is no figure of ours.
    """
    expected: dict[Group, dict[str, set[int]]] = {}
    tasks = {entry.task for entry in entries}
    only_task = {"task": tasks.pop()} if len(tasks) == 1 else {}
    for given in labels:
        cell = {**only_task, **given}
        if {"method", "student", "task", "seed"} <= cell.keys():
            group = (cell["method"], cell["student"], cell.get("teacher"), cell["task"])
            row = row_label({key: label for key, label in cell.items() if key != "task"})
            expected.setdefault(group, {}).setdefault(row, set()).add(int(cell["seed"]))
    had: dict[tuple[object, ...], set[int]] = {}
    for entry in entries:
        had.setdefault((*entry.key[:4], entry.family, entry.column), set()).update(entry.values)
    found, known = [], set()
    for entry in entries:
        listed = (entry.method, entry.student, entry.teacher, entry.task)
        group = listed if listed in expected else (entry.method, entry.student, None, entry.task)
        known |= {group, (*group, entry.row)}
        elsewhere = had[(*entry.key[:4], entry.family, entry.column)] - entry.values.keys()
        found.append(replace(entry, expected=frozenset(expected.get(group, {}).get(entry.row, ())) - elsewhere))
    columns: dict[str, dict[tuple[str, str], None]] = {}
    for one in entries or paper:
        columns.setdefault(one.task, {})[one.split, one.metric] = None
    for group, rows in expected.items():
        method, student, teacher, task = group
        lacking = {(row, ""): seeds for row, seeds in rows.items() if (*group, row) not in known}
        if group not in known and len(rows) > 1:
            lacking = {(f"{method} {student}", f"{len(rows)} points of a grid"): set.union(*rows.values())}
        for split, metric in columns.get(task, {UNKNOWN_COLUMN: None}):
            found += [
                Entry(*(row, method, student, teacher or "", task, split, metric), expected=frozenset(seeds), settings=settings)
                for (row, settings), seeds in lacking.items()
            ]
    return found


def validation_curve(history: Path, metric: str) -> list[tuple[float, float]]:
    """Return epoch, counted from 1, and validation score of a run's `metrics.csv`; empty if there is none.

    Args:
        history: path of the file.
        metric: name of the metric.
    """
    try:
        with history.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        scores = [(row["epoch"], row.get(f"validation/{metric}")) for row in rows]
        return [(float(epoch) + 1, float(score)) for epoch, score in scores if score]
    except (OSError, ValueError, KeyError, csv.Error, UnicodeDecodeError):
        return []
