"""Cells of a table with their runs: what is done, what is missing, and the figures of what is done."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd.config.compose import quoted
from kd.config.failure import Failure
from kd.errors import InputError
from kd.launch.jobs import Job, jobs_of, plan_command
from kd.results.comparison import budget_of
from kd.results.figures import Figure, figures_if_there
from kd.results.row_labels import row_label
from kd.results.tuned import selection_words
from kd.runs.run import Run
from kd.table.definition import Cell, Table


@dataclass(frozen=True)
class PlannedCell:
    """A cell and its run.

    Attributes:
        cell: the cell.
        run: its run.
        command: overrides of kd-train that make it.
    """

    cell: Cell
    run: Run
    command: tuple[str, ...]

    def label(self, key: str) -> str:
        """Return the label of the cell for `method`, `student`, `teacher` or `task`: the table's, else that of its run."""
        spec = self.run.spec
        own = {"method": spec.method["name"], "student": spec.student.name, "task": spec.task.name}
        return self.cell.labels.get(key) or own.get(key) or "+".join(spec.teacher)

    @property
    def row(self) -> str:
        """Label of its row."""
        own = {} if self.cell.row is None else {"row": self.cell.row}
        return row_label({**self.cell.labels, **own, "method": self.label("method"), "student": self.label("student")})

    def figures(self, table: Table, record: Mapping[str, Any]) -> list[Figure]:
        """Return the figures of its finished run, one for each metric of each split.

        Args:
            table: its table.
            record: content of the run's `result.json`.
        """
        words = shlex.join(word for word in self.command if not word.startswith(("paths.", "logger.")))
        return [
            Figure(
                paper=table.paper,
                table=table.name,
                row=self.row,
                method=self.label("method"),
                student=self.label("student"),
                teacher=self.label("teacher"),
                task=self.label("task"),
                split=split,
                metric=metric,
                value=value,
                std=None,
                n=1,
                seeds=str(record["seed"]),
                selection=selection_words(record),
                init=record["init"],
                source=f"kd {record['versions'].get('kd', '')}".strip(),
                confidence="measured",
                digest=record["digest"],
                commit=commit_of(record),
                command=words,
                family=record["family"],
                budget=budget_of(record),
                scale=self.cell.scale,
            )
            for split, metrics in record["metrics"].items()
            for metric, value in metrics.items()
        ]


def commit_of(record: Mapping[str, Any]) -> str:
    """Return the short commit of a run, marked as git does if code or configuration differed from it; empty for a wheel."""
    found = record.get("git") or {}
    commit = (found.get("commit") or "")[:7]
    return f"{commit}-dirty" if commit and found.get("dirty") else commit


@dataclass
class PlannedTable:
    """Cells of a table, with what is known of them.

    Attributes:
        table: the table.
        cells: the cells that could be planned.
        broken: cells that could not, with the reason.
        recorded: digest and scale of the runs whose figures are in the table's file.
    """

    table: Table
    cells: list[PlannedCell]
    broken: list[tuple[Cell, Failure]]
    recorded: set[tuple[str, str]] = field(default_factory=set)

    def is_done(self, planned: PlannedCell) -> bool:
        """Return whether a cell is done: its run is finished, or its figures were made elsewhere and are in the file."""
        return self.is_recorded(planned) or planned.run.is_done()

    def is_recorded(self, planned: PlannedCell) -> bool:
        """Return whether the figures of a cell are in the table's file."""
        return (planned.run.digest, planned.cell.scale) in self.recorded

    def missing(self) -> list[PlannedCell]:
        """Return the cells that are not done."""
        return [planned for planned in self.cells if not self.is_done(planned)]

    def jobs(self, missing: Sequence[PlannedCell]) -> dict[str, Job]:
        """Return the jobs that make cells, and first what they need."""
        return jobs_of({index: planned.run for index, planned in enumerate(missing)}, [entry.command for entry in missing])


def plan_table(
    table: Table,
    cells: Sequence[Cell],
    more: Sequence[str],
    figures: Path | None = None,
    tell: Callable[[int, int], None] = lambda number, count: None,
) -> PlannedTable:
    """Plan cells of a table. A cell that cannot be planned does not stop the others.

    Args:
        table: the table.
        cells: cells of one of its scales.
        more: further overrides, of every cell.
        figures: file of figures that have been made, `ours.csv`, which need not exist.
        tell: called with the number of cells that are planned and that of all.

    Raises:
        InputError: if two cells are one run, or the file of figures is damaged.
    """
    planned: list[PlannedCell] = []
    broken: list[tuple[Cell, Failure]] = []
    seen: dict[str, Cell] = {}
    for number, cell in enumerate(cells):
        tell(number, len(cells))
        command = (*cell.overrides, quoted(f"logger.group={table.name}"), *more)
        try:
            run = plan_command(command)
        except Exception as error:  # noqa: BLE001 - reported with its cell; the others go on
            broken.append((cell, Failure.of(error)))
            continue
        if (other := seen.get(run.digest)) is not None:
            raise InputError(
                f"two cells of table {table.name} are one run, {run.name}: '{other}' and '{cell}'; remove one of them, or the "
                "override that makes them alike",
                "scales",
            )
        seen[run.digest] = cell
        planned.append(PlannedCell(cell, run, command))
    ours = [] if figures is None else figures_if_there(figures)
    recorded = {(figure.digest, figure.scale) for figure in ours}
    return PlannedTable(table, planned, broken, recorded)
