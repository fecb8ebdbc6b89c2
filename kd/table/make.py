"""Making of a table's missing cells, with a line for each that ends."""

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kd.config.failure import Failure
from kd.config.schema import LauncherSpec, launcher_named
from kd.errors import InputError
from kd.launch.jobs import needed_in
from kd.launch.launcher import launch, workers
from kd.launch.progress import Progress
from kd.results.figures import add_figures
from kd.system.files import check_writable
from kd.table.cells import PlannedCell, PlannedTable


def make(
    planned: PlannedTable,
    chosen: Sequence[PlannedCell],
    launcher: LauncherSpec,
    figures: Path,
    *,
    needed_alone: bool = False,
) -> int:
    """Make cells and write their figures; return the exit status.

    Args:
        planned: the table.
        chosen: the cells to make.
        launcher: settings of the processes that make them.
        figures: file of figures to add to.
        needed_alone: make only the runs that the cells need.

    Raises:
        InputError: if the folder of the runs cannot be written to.
    """
    check_writable(figures.parent, "--figures")
    record_all(planned, planned.cells, figures)  # of runs that were done before
    jobs = planned.jobs(chosen)
    if needed_alone:
        jobs = {name: job for name, job in jobs.items() if name in needed_in(jobs)}
    cells = {cell.run.name: cell for cell in planned.cells}
    progress = Progress(
        jobs,
        {name: str(cell.cell) for name, cell in cells.items()},
        sum(planned.is_done(cell) for cell in planned.cells),
        len(planned.cells),
        workers(launcher, jobs.values()),
        (cell.run.result or {} for cell in planned.cells if cell.run.is_done()),
    )
    problems = [Problem("broken", str(cell), failure) for cell, failure in planned.broken]
    for event in launch(jobs, launcher, planned.table.name):
        progress(event)
        name = event.job.name
        if event.state == "done" and name in cells:
            try:
                record_all(planned, [cells[name]], figures)
            except (InputError, OSError) as error:  # the run is done, and the next command writes its figures
                problems.append(Problem("figures", f"{cells[name].cell} in {figures}", Failure.of(error)))
        if event.failure is not None and name in cells:
            problems.append(Problem("cell", str(cells[name].cell), event.failure))
        elif event.failure is not None and needed_alone:
            problems.append(Problem("needed", name, event.failure))
    if launcher_named(launcher.name).queues and not problems:
        return 0
    return close(len(planned.cells) - len(planned.missing()), problems)


def record_all(planned: PlannedTable, cells: Iterable[PlannedCell], figures: Path) -> None:
    """Add the figures of the finished runs of cells to a file, but those that it has."""
    rows = []
    for cell in cells:
        record = None if planned.is_recorded(cell) else cell.run.result
        if record is not None:
            rows += cell.figures(planned.table, record)
    if rows:
        add_figures(figures, rows)
        planned.recorded |= {(row.digest, row.scale) for row in rows}


PROBLEMS = {
    "cell": "{count} failed",
    "needed": "{count} run(s) that cells need failed",
    "broken": "{count} cannot be planned",
    "figures": "figures of {count} of them not written, which the next command does",
}
"""Kind of a problem -> words for a number of them, behind that of the cells that are done."""


@dataclass(frozen=True)
class Problem:
    """Something that a command could not do.

    Attributes:
        kind: a key of `PROBLEMS`.
        label: the cell or run.
        failure: the reason.
    """

    kind: str
    label: str
    failure: Failure


def close(done: int, problems: Sequence[Problem]) -> int:
    """Print how many cells are done, how many problems of each kind there were, and each; return 1 if there was any, else 0."""
    if not problems:
        print(f"\n{done} cells done")
        return 0
    counts = Counter(problem.kind for problem in problems)
    told = [words.format(count=counts[kind]) for kind, words in PROBLEMS.items() if counts[kind]]
    print(f"\nkd-table: {', '.join([f'{done} cells done', *told])}:", file=sys.stderr)
    for problem in sorted(problems, key=lambda problem: list(PROBLEMS).index(problem.kind)):
        print(f"  {problem.label}\n    {problem.failure.line}", file=sys.stderr)
    return 1
