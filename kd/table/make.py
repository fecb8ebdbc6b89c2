"""Making of a table's missing cells, with a line for each that ends."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from kd.launch.fan_out import Event
from kd.launch.jobs import Failure, Job
from kd.results.figures import add_figures
from kd.table.cells import PlannedCell, PlannedTable
from kd.table.estimate import Durations, duration


class Progress:
    """Lines about the jobs of a table as they end.

    Args:
        planned: the table.
        jobs: its jobs.
        workers: number of jobs that are executed side by side.
        tell: prints a line.
    """

    def __init__(
        self, planned: PlannedTable, jobs: Mapping[str, Job], workers: int, tell: Callable[[str], None] = print
    ) -> None:
        self.cells = {cell.run.name: cell for cell in planned.cells}
        self.jobs, self.workers, self.tell = jobs, workers, tell
        self.durations = Durations(cell.run.result or {} for cell in planned.cells if cell.run.is_done())
        self.count = len(planned.cells)
        self.done = self.count - sum(job.wanted for job in jobs.values())
        self.open = dict(jobs)

    def __call__(self, event: Event) -> None:
        """Print a line about a change."""
        name = event.job.name
        label = str(self.cells[name].cell) if name in self.cells else f"{name} (other cells need it)"
        if event.state in ("done", "failed"):
            self.open.pop(name, None)
            self.done += event.state == "done" and event.job.wanted
        if event.seconds is not None and event.state == "done":
            self.durations.add(event.job, event.seconds)
        if event.state == "done":
            took = "by another command" if event.seconds is None else duration(event.seconds)
            self.tell(f"[{self.done}/{self.count}] {label}: {score_of(event.job)}{took}{self._left()}")
        elif event.state == "failed":
            self.tell(f"[{self.done}/{self.count}] {label}: failed: {event.failure}")
        elif event.state == "elsewhere":
            self.tell(f"{label}: another command executes it")

    def _left(self) -> str:
        seconds = self.durations.left(self.open.values(), self.workers)
        return "" if not self.open else f"; about {duration(seconds)} left"


def score_of(job: Job) -> str:
    """Return the validation score of a finished run in words, empty if it has none."""
    record = job.run.result
    values = {} if record is None else record["metrics"].get("validation", {})
    name = job.run.spec.task.monitor if job.run.spec.task.monitor in values else next(iter(values), None)
    value = None if name is None else values[name]
    return "" if value is None else f"validation {name} {value:.4f}, "


def make(
    planned: PlannedTable,
    chosen: Sequence[PlannedCell],
    execute: Callable[[Mapping[str, Job]], Iterable[Event]],
    workers: int,
    figures: Path | None,
    *,
    needed_alone: bool = False,
) -> int:
    """Make cells and write their figures; return the exit status.

    Args:
        planned: the table.
        chosen: the cells to make.
        execute: executes jobs and returns what changes.
        workers: number of jobs that it executes side by side, for estimates.
        figures: file of figures to add to; None writes none.
        needed_alone: make only the runs that the cells need.

    Raises:
        InputError: if the folder of the runs cannot be written to.
    """
    record_all(planned, planned.cells, figures)  # of runs that were done before
    jobs = planned.jobs(chosen)
    if needed_alone:
        jobs = {name: job for name, job in jobs.items() if not job.wanted}
    cells = {cell.run.name: cell for cell in planned.cells}
    progress = Progress(planned, jobs, workers)
    failed = [(str(cell), failure) for cell, failure in planned.broken]
    for event in execute(jobs):
        progress(event)
        name = event.job.name
        if event.state == "done" and name in cells:
            record_all(planned, [cells[name]], figures)
        if event.failure is not None and (name in cells or needed_alone):
            failed.append((str(cells[name].cell) if name in cells else name, event.failure))
    return close(len(planned.cells) - len(planned.missing()), failed)


def record_all(planned: PlannedTable, cells: Iterable[PlannedCell], figures: Path | None) -> None:
    """Add the figures of the finished runs of cells to a file, but those that it has."""
    rows = []
    for cell in cells:
        record = cell.run.result if cell.run.digest not in planned.recorded else None
        if record is not None:
            rows += cell.figures(planned.table, record)
            planned.recorded.add(cell.run.digest)
    if rows and figures is not None:
        add_figures(figures, rows)


def close(done: int, failed: Sequence[tuple[str, Failure]]) -> int:
    """Print how many cells are done and which failed; return the exit status, 1 if any failed."""
    if not failed:
        print(f"\n{done} cells done")
        return 0
    print(f"\nkd-table: {done} cells done, {len(failed)} failed:", file=sys.stderr)
    for label, failure in failed:
        (message, *_) = failure.message.splitlines() or [""]
        print(f"  {label}\n    {message}" + (f" (change: {failure.key})" if failure.key else ""), file=sys.stderr)
    return 1
