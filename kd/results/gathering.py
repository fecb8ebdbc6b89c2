"""Gathering of what a comparison shows: runs of a folder, or figures of a table with the cells that are missing."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kd.results.comparison import BASELINE, Comparison, Entry, compare, entries_of, entries_of_records, with_details
from kd.results.figures import Figure, read_figures


def compare_runs(records: Sequence[Mapping[str, Any]], title: str) -> Comparison:
    """Return the comparison of finished runs.

    Args:
        records: contents of `result.json`.
        title: heading.
    """
    comparison = compare(entries_of_records(records), title=title)
    return with_details(comparison, {record["digest"]: record for record in records})


def compare_table(
    folder: Path,
    scale: str,
    labels: Sequence[Mapping[str, str]],
    records: Sequence[Mapping[str, Any]],
    *,
    title: str,
    protocol: str,
    baseline: str = BASELINE,
) -> Comparison:
    """Return the comparison of a table: our figures beside the paper's, with sizes and costs of runs that are at hand.

    Args:
        folder: folder with `paper.csv` and `ours.csv`, each of which may be missing.
        scale: name of a scale of the table, whose figures are ours.
        labels: labels of each cell of the scale, by configuration key.
        records: contents of `result.json` of runs.
        title: heading.
        protocol: sentence about the protocol.
        baseline: label of the method that others are compared with.

    Raises:
        InputError: if a file of figures is damaged.
    """
    ours, paper = (read_figures(folder / name) if (folder / name).is_file() else [] for name in ("ours.csv", "paper.csv"))
    entries = with_expected(entries_of(figure for figure in ours if figure.scale == scale), labels, paper)
    comparison = compare(entries, paper, title=title, protocol=protocol, baseline=baseline)
    return with_details(comparison, {record["digest"]: record for record in records})


def with_expected(entries: Sequence[Entry], labels: Sequence[Mapping[str, str]], paper: Sequence[Figure] = ()) -> list[Entry]:
    """Return entries with the seeds that a table asks for, and entries without values for cells that have no figure at all.

    Args:
        entries: our figures.
        labels: labels of each cell, by configuration key; a cell without labels of method, student, task and seed is left out;
            the task may lack if there is one alone.
        paper: the paper's figures, whose columns stand where there is no figure of ours.
    """
    expected: dict[tuple[str, str, str], set[int]] = {}
    tasks = {entry.task for entry in entries}
    only_task = {"task": tasks.pop()} if len(tasks) == 1 else {}
    for given in labels:
        cell = {**only_task, **given}
        if {"method", "student", "task", "seed"} <= cell.keys():
            expected.setdefault((cell["method"], cell["student"], cell["task"]), set()).add(int(cell["seed"]))
    found = [
        replace(entry, expected=frozenset(expected.get((entry.method, entry.student, entry.task), ()))) for entry in entries
    ]
    known = {(entry.method, entry.student, entry.task) for entry in entries}
    columns: dict[str, dict[tuple[str, str], None]] = {}
    for one in entries or paper:
        columns.setdefault(one.task, {})[one.split, one.metric] = None
    for key, seeds in expected.items():
        if key not in known:
            method, student, task = key
            for split, metric in columns.get(task, {("validation", ""): None}):
                row = f"{method} {student}"
                found.append(Entry(row, method, student, "", task, split, metric, expected=frozenset(seeds)))
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
