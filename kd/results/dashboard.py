"""Dashboards of Weights & Biases: a workspace with the runs of a group, made by the package `wandb-workspaces`."""

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kd.config.loggers import check_group
from kd.config.values import one_line, shown
from kd.errors import InputError

STEP = "trainer/global_step"
"""Name of the optimiser step in Weights & Biases, see `kd.training.trackers.wandb.WandbTracker`."""

CHANGED_IN_FILTERS = "=<>'\\"
"""Characters that wandb-workspaces 0.4.13 changes in the text of a filter, or cannot read there."""

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Logged:
    """Names that the runs of a group have logged; a dashboard has a panel for each metric and loss term.

    Attributes:
        tasks: names of the tasks.
        students: names of the students.
        validation: metrics on validation.
        test: metrics on test.
        terms: loss terms in training, and `loss`, their weighted sum.
    """

    tasks: tuple[str, ...]
    students: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    terms: tuple[str, ...]


def logged(folder: Path, records: Sequence[Record]) -> Logged:
    """Return the names that finished runs have logged.

    Args:
        folder: folder of the runs; the headers of their `metrics.csv` have the loss terms.
        records: their records, with the run's folder as `run`.
    """

    def metrics(split: str) -> tuple[str, ...]:
        return unique(name for record in records for name in record["metrics"].get(split, {}))

    columns = unique(name for record in records for name in header(folder / record["run"] / "metrics.csv"))
    return Logged(
        unique(record["task"] for record in records),
        unique(record["student"] for record in records),
        metrics("validation"),
        metrics("test"),
        tuple(name.removeprefix("train/") for name in columns if name.startswith("train/")),
    )


def unique(names: Iterable[str]) -> tuple[str, ...]:
    """Return names without repetition, in order."""
    return tuple(dict.fromkeys(names))


def header(path: Path) -> list[str]:
    """Return the names of the columns of a CSV file; none if it cannot be read."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return next(csv.reader(file), [])
    except (OSError, ValueError, csv.Error):
        return []


def group_of(folder: Path) -> str | None:
    """Return the group that a run was logged in, from its `config.yaml`; None if it has none, or cannot be read."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        return str(group) if (group := config["logger"]["group"]) is not None else None
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return None


def of_group(folder: Path, records: Sequence[Record], group: str) -> list[Record]:
    """Return the records of the runs that were logged in a group.

    Raises:
        InputError: if there is none.
    """
    groups = {record["run"]: group_of(folder / record["run"]) for record in records}
    if chosen := [record for record in records if groups[record["run"]] == group]:
        return chosen
    there = ", ".join(sorted({shown(name) for name in groups.values() if name is not None})) or "none"
    raise InputError(
        f"no finished run in '{folder}' was logged in the group '{shown(group)}' (logger.group); there are: {there}", "--group"
    )


def address(target: str) -> tuple[str, str]:
    """Split `entity/project`.

    Raises:
        InputError: for any other form.
    """
    match = re.fullmatch(r"([^/\s\\#?%:]+)/([^/\s\\#?%:]+)", target)
    if match is None or len(match[2]) > 128:
        raise InputError(f"--wandb {shown(target)} must be <entity>/<project>, as in the address of the project", "--wandb")
    return match[1], match[2]


def dashboard(entity: str, project: str, group: str, names: Logged) -> Any:
    """Return the workspace of a group, `wandb_workspaces.workspaces.Workspace`; nothing is sent.

    It shows the runs that commands requested (job type `student`), grouped by method, and by task and student if there are
    several: metrics on validation and loss terms over training, metrics on test with the number of parameters, the table of all
    results, and the settings, with layer maps, in which runs differ.

    Args:
        entity: user or team.
        project: name of the project.
        group: name of the group.
        names: what its runs have logged.

    Raises:
        InputError: if wandb-workspaces is not installed, or for a group that its filters cannot name.
    """
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
        from wandb_workspaces import expr
    except ImportError as error:
        raise InputError("--wandb needs packages: pip install wandb wandb-workspaces", "--wandb") from error
    if found := sorted(set(group) & set(CHANGED_IN_FILTERS)):
        raise InputError(
            f"--group {shown(group)} has {' '.join(found)}, which filters of wandb-workspaces cannot name", "--group"
        )

    def curves(prefix: str, metrics: Sequence[str]) -> list[Any]:
        return [reports.LinePlot(title=f"{prefix} {name}", x=STEP, y=[f"{prefix}/{name}"]) for name in metrics]

    results: list[Any] = [
        panel
        for name in names.test
        for panel in (
            reports.BarPlot(title=f"test {name}", metrics=[f"test/{name}"]),
            reports.ScatterPlot(
                title=f"test {name} by size",
                x=reports.SummaryMetric("parameters/student"),
                y=reports.SummaryMetric(f"test/{name}"),
            ),
        )
    ]
    table = reports.WeavePanelSummaryTable(table_name="results", layout=reports.Layout(w=24, h=9))
    sections = {
        "Validation": curves("validation", names.validation),
        "Loss terms": curves("train", names.terms),
        "Test": [*results, table],
        "Settings": [reports.RunComparer(diff_only="split", layout=reports.Layout(w=24, h=9))],
    }
    rows = {"task.name": len(names.tasks) > 1, "method.name": True, "student.name": len(names.students) > 1}
    columns = [f"config:{key}" for key in ("method.name", "student.name", "task.name", "seed")]
    columns += [
        f"summary:{name}" for name in (*(f"test/{name}" for name in names.test), "parameters/student", "latency_ms/student")
    ]
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=f"kd {group}",
        sections=[workspaces.Section(name=name, panels=panels, is_open=True) for name, panels in sections.items() if panels],
        settings=workspaces.WorkspaceSettings(x_axis=STEP, max_runs=100),
        runset_settings=workspaces.RunsetSettings(
            filters=expr.And(expr.Metric("Group") == group, expr.Metric("JobType") == "student"),
            groupby=[expr.Config(key) for key, wanted in rows.items() if wanted],
            pinned_columns=columns,
        ),
    )


def publish(target: str, group: str | None, folder: Path, records: Sequence[Record]) -> str:
    """Make the dashboard of a group in Weights & Biases, as a new view of the project, and return its address.

    Args:
        target: `entity/project`.
        group: name of the group, `logger.group` of its runs.
        folder: folder of the runs.
        records: records of finished runs, of which those of the group are used.

    Raises:
        InputError: for an invalid argument, without an account, or if Weights & Biases refuses it or cannot be reached.
    """
    entity, project = address(target)
    if group is None:
        raise InputError("--wandb needs --group <name>, the group that the runs were logged in (logger.group)", "--group")
    check_group(group, "--group")
    view = dashboard(entity, project, group, logged(folder, of_group(folder, records, group)))
    import wandb

    try:
        known = wandb.login(prompt=False)
        if known:
            view.save()
            return str(view.url)
    except Exception as error:  # a refusal and a network that does not answer have classes of the library's own
        raise InputError(f"Weights & Biases refused the dashboard: {one_line(error)}", "--wandb") from error
    raise InputError(
        "there is no account of Weights & Biases on this machine: run wandb login, or set WANDB_API_KEY", "--wandb"
    )
