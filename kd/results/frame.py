"""Finished runs as a table of pandas."""

import json
import warnings
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from kd.errors import InputError
from kd.results.folder import load_results

if TYPE_CHECKING:
    from pandas import DataFrame

FIRST = ("run", "method", "student", "teacher", "task", "seed", "split")
"""Columns that name a row, before the metrics."""

LAST = ("selection", "init", "parameters", "train_seconds", "digest", "family", "finished", "directory")
"""Columns behind the metrics, before the keys that differ."""

OF_ROWS = ("seed", "method.name", "student.name", "task.name", "tuned")
"""Keys of the configuration that other columns show."""

ELSEWHERE = ("paths.", "logger.", "launcher.", "tuned.", "hydra.", "task.source.", "method._target_")
"""Prefixes of keys that are no settings of a run, or follow from others."""


def results(folder: str | Path = "runs") -> "DataFrame":
    """Return a row for each finished run in a folder, and each of its tasks, splits and students, oldest run first.

    Columns, in this order:
        `run`: name of the run's directory.
        `method`, `student`, `task`, `seed`, `split`: as in `result.json`. A cohort has a row for each of its students, by their
            names; a mixture one for each of its tasks, and one for their mean.
        `teacher`: names of the teachers, separated by commas.
        metrics: a column for each, as `accuracy`; fractions, and NaN where a row has none.
        `selection`: how the checkpoint was chosen. `init`: initial weights of the student.
        `parameters`: number of the student's parameters in training.
        `train_seconds`: seconds of training.
        `digest`, `family`: digests of everything that changes the result, and of all but the seed.
        `finished`: time in UTC. `directory`: directory of the run.
        keys of the configuration that differ between the runs, as `optimizer.lr`; lists as JSON. Paths, loggers and launchers
            are left out.

    Runs that have begun and are not finished, as failed ones, have no row; a warning names them.

    Args:
        folder: folder of runs.

    Raises:
        InputError: if there is no such folder, or pandas is not installed.
    """
    try:
        from pandas import DataFrame
    except ModuleNotFoundError as error:
        raise InputError("kd.results needs pandas, which is not installed: pip install 'kd[pandas]'") from error
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise InputError(f"'{path}' is no folder of runs", "paths.runs")
    records = load_results(path)
    if missing := unfinished(path, [record["run"] for record in records]):
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        warnings.warn(f"{len(missing)} of the runs in '{path}' are not finished and have no row: {shown}", stacklevel=3)
    settings = {record["run"]: settings_of(path / record["run"]) for record in records}
    varied = differing(list(settings.values()))
    rows = []
    for record in records:
        keys = {key: settings[record["run"]].get(key) for key in varied}
        rows += [{**row, "directory": str(path / record["run"]), **keys} for row in rows_of(record)]
    metrics = dict.fromkeys(name for row in rows for name in row["metrics"])
    columns = [*FIRST, *metrics, *LAST, *varied]
    return DataFrame([{**row, **row["metrics"]} for row in rows], columns=columns)


def unfinished(folder: Path, finished: Container[str]) -> list[str]:
    """Return the names of runs that have begun, and so have a configuration, and are not among the finished ones."""
    begun = sorted(path.parent.name for path in folder.glob("*/config.yaml"))
    return [name for name in begun if name not in finished]


def rows_of(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a row for each task, split and student of a record, with the metrics as a mapping."""
    tasks: Mapping[str, Mapping[str, Any]] = record.get("tasks", {})
    for task, own in {**tasks, record["task"]: record}.items():
        for name, student in own["students"].items():
            for split, metrics in student["metrics"].items():
                shown = metrics if own is not record else {key: value for key, value in metrics.items() if "/" not in key}
                if tasks and not shown:
                    continue  # a split that a task of the mixture lacks has no mean
                yield {
                    "run": record["run"],
                    "method": record["method"],
                    "student": record["student"] if len(own["students"]) == 1 else name,
                    "teacher": ",".join(record["teacher"]),
                    "task": task,
                    "seed": record["seed"],
                    "split": split,
                    "metrics": shown,
                    "selection": record["selection"]["by"],
                    "init": student.get("init"),
                    "parameters": student.get("parameters"),
                    "train_seconds": record["seconds"]["train"],
                    "digest": record["digest"],
                    "family": record.get("family"),
                    "finished": record.get("finished"),
                }


def settings_of(directory: Path) -> dict[str, Any]:
    """Return the configuration of a run as key -> value; empty if its `config.yaml` cannot be read."""
    try:
        content = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    keys = flat(content) if isinstance(content, dict) else {}
    return {key: value for key, value in keys.items() if key not in OF_ROWS and not key.startswith(ELSEWHERE)}


def flat(node: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by their keys, with a list as JSON; empty mappings have none.

    >>> flat({"a": {"b": 1, "c": [1, 2]}, "d": {}})
    {'a.b': 1, 'a.c': '[1, 2]'}
    """
    leaves: dict[str, Any] = {}
    for name, value in node.items():
        if isinstance(value, Mapping):
            leaves |= flat(value, f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = json.dumps(value) if isinstance(value, list) else value
    return leaves


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys whose values differ between configurations, or that some of them lack, in their order.

    >>> differing([{"a": 1, "b": 2}, {"a": 1, "b": 3, "c": None}, {}])
    ['b', 'c']
    """
    known = [one for one in settings if one]  # a run without a configuration differs in every key
    keys = dict.fromkeys(key for one in known for key in one)
    return [key for key in keys if len({repr(one.get(key, differing)) for one in known}) > 1]
