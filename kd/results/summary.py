"""The record of a finished run as single values, and as rows of a table, for loggers and dashboards."""

from collections.abc import Mapping
from typing import Any

SUMMARY = ("parameters", "megabytes", "latency_ms", "seconds")
"""Mappings of the record whose numbers enter the summary, as `parameters/student`."""

COLUMNS = ("method", "student", "teacher", "task", "seed", "init", "model", "split", "metric", "value")
"""Columns of `result_rows`."""


def summary(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a record that a list of runs shows, by names as in `metrics.csv`.

    The metrics are those of the selected checkpoint. For a cohort they are those of its best student, and those of each
    student as `test/<student>/accuracy`. Undefined values are left out.

    >>> summary({"metrics": {"test": {"accuracy": 0.75, "f1": None}}, "parameters": {"student": 12, "teachers": {"a": 30}}})
    {'test/accuracy': 0.75, 'parameters/student': 12}
    """
    entries: dict[str, Any] = dict(record["metrics"])
    if len(record.get("students", {})) > 1:
        for name, student in record["students"].items():
            entries |= {f"{split}/{name}": metrics for split, metrics in student["metrics"].items()}
    entries |= {f"agreement/{split}": by_teacher for split, by_teacher in record.get("agreement", {}).items()}
    entries |= {key: record[key] for key in SUMMARY if key in record}
    values = {f"{key}/{name}": value for key, inner in entries.items() for name, value in inner.items()}
    values |= {key: record[key] for key in ("examples_per_second", "teacher_forward_examples", "steps") if key in record}
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


def result_rows(record: Mapping[str, Any]) -> list[list[Any]]:
    """Return a row for each model, split and metric of a record, with the columns `COLUMNS`.

    The models are the students, their ensemble, the teachers and the constant prediction (`baseline`). Values are fractions, as
    in `result.json`, and None where they are undefined.
    """
    students = record["students"]
    models = {record["student"] if len(students) == 1 else name: student["metrics"] for name, student in students.items()}
    models |= {"ensemble": record.get("metrics_ensemble") or {}}
    models |= {f"teacher {name}": metrics for name, metrics in record.get("metrics_teacher", {}).items()}
    models |= {"baseline": record.get("baseline") or {}}
    told = [record["method"], record["student"], ", ".join(record["teacher"]), record["task"], record["seed"], record["init"]]
    return [
        [*told, model, split, metric, None if value is None else float(value)]
        for model, by_split in models.items()
        for split, metrics in by_split.items()
        for metric, value in metrics.items()
    ]
