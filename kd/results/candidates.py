"""Finished runs of GLUE tasks, and the choice among those of one task."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd.data.direction import higher_is_better
from kd.errors import InputError
from kd.runs.run import read_record


@dataclass(frozen=True)
class Candidate:
    """A finished run, or one task of a mixture, whose student may predict a GLUE task.

    Attributes:
        directory: directory of the run.
        record: record of the task.
    """

    directory: Path
    record: Mapping[str, Any]

    @property
    def data(self) -> Mapping[str, Any]:
        """Source of the task's data, without paths; empty in a record that does not name it."""
        return self.record["identity"].get("data") or {}

    @property
    def task(self) -> str | None:
        """Name of the GLUE task, as `kd.data.sources.Glue.folder`; None for other data."""
        kind, folder = str(self.data.get("_target_")).rpartition(".")[2], self.data.get("folder")
        return str(folder) if kind == "Glue" and folder is not None else None

    @property
    def codes(self) -> Mapping[str, str]:
        """Label in the files of the data -> class name, for labels that are codes."""
        return self.record["identity"]["task"].get("codes") or {}

    @property
    def monitor(self) -> str:
        """Metric that chose the checkpoint."""
        return str(self.record["identity"]["task"]["monitor"])

    @property
    def validation(self) -> float | None:
        """Value of this metric on validation; None if it is undefined."""
        value = self.record["metrics"]["validation"].get(self.monitor)
        return None if value is None else float(value)

    @property
    def folder(self) -> Path:
        """Folder of the exported student; of a cohort, of the best one."""
        return self.directory / str(self.record["students"][self.record["headline"]]["folder"])


def candidates_of(runs: Sequence[Path], tasks: Collection[str]) -> dict[str, list[Candidate]]:
    """Return the runs of each GLUE task, by its name.

    Args:
        runs: directories of runs; one that is given twice counts once.
        tasks: names of the tasks, as `kd.data.sources.Glue.folder`.

    Raises:
        InputError: for a directory without a finished run, or a run of another task.
    """
    found: dict[str, list[Candidate]] = {}
    for directory in dict.fromkeys(runs):
        record = read_record(directory / "result.json")
        if record is None or "students" not in record:
            raise InputError(
                f"'{directory}' is not the directory of a finished run: there is no valid result.json in it", "runs"
            )
        for one in (record.get("tasks") or {"": record}).values():
            candidate = Candidate(directory, one)
            if candidate.task not in tasks:
                raise InputError(f"the record of '{directory}' names no task of GLUE, but '{one['task']}'", "runs")
            found.setdefault(str(candidate.task), []).append(candidate)
    return found


def best(candidates: Sequence[Candidate]) -> Candidate:
    """Return the candidate of one task that is the best on validation; among equals the first.

    Raises:
        InputError: if they monitor different metrics, or were validated on different numbers of examples.
    """
    first = candidates[0]
    for other in candidates[1:]:
        for what, one, two in (
            ("the metric", first.monitor, other.monitor),
            ("the number of examples", *(each.record["examples"]["validation"] for each in (first, other))),
        ):
            if one != two:
                raise InputError(
                    f"'{first.directory}' and '{other.directory}' cannot be compared on validation: {what} is {one} and {two}; "
                    f"give one run of {first.task}",
                    "runs",
                )
    sign = 1.0 if higher_is_better(first.monitor) else -1.0
    values = [-math.inf if one.validation is None else sign * one.validation for one in candidates]
    return candidates[values.index(max(values))]
