"""`kd-table`: tables of papers, by commands that can be killed, repeated, and started on any number of machines."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kd.errors import InputError
from kd.system.command import ended
from kd.system.hardware import configure_openmp, version_line

if TYPE_CHECKING:
    from kd.config.schema import LauncherSpec
    from kd.table.cells import PlannedTable
    from kd.table.definition import Cell, Table

CLEAR_LINE = "\r\033[K"
"""Control characters with which a terminal goes to the beginning of a line and clears it."""

DESCRIPTION = """Make the missing cells of a paper's table, each in a process of its own, and first the runs that they need.
The command can be killed, repeated, and started on several machines that share the folder of the runs: a cell is made once.
Overrides, such as paths.runs=... and paths.glue=..., are those of kd-train and count for every cell."""


def main() -> None:
    """Run the command `kd-table`: status 1 if a cell fails, 2 for an error of the command, 130 on an interrupt."""
    arguments = parser().parse_intermixed_args()
    configure_openmp()
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with ended("kd-table"):
        sys.exit(COMMANDS[arguments.command](arguments))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(prog="kd-table", description=DESCRIPTION)
    found.add_argument(
        "command", choices=sorted(COMMANDS), help="list of tables | plan: what is missing | run: make it | submit: for GLUE"
    )
    found.add_argument("table", nargs="?", help="a table, as pkd_dev, or a file of yours, as mine.yaml; submit: a run")
    found.add_argument(
        "overrides",
        nargs="*",
        help="scale=local (default) or published; rows=pkd,mine: these methods and the baseline; overrides of kd-train",
    )
    found.add_argument(
        "--workers", type=count, metavar="N", help="cells side by side (default: a GPU or a core each), or measure: the fastest"
    )
    found.add_argument("--only", metavar="TEXT", help="cells whose labels contain this, as 'method=pkd student=3l'")
    found.add_argument("--needed", action="store_true", help="make only the runs that the cells need, such as teachers")
    found.add_argument("--slurm", action="store_true", help="write the script of an array for SLURM, make nothing")
    found.add_argument("--time", help="SLURM: time limit of a job (launcher.time of kd-train, as the next two)")
    found.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="SLURM: as --sbatch=--gres=gpu:1")
    found.add_argument("--array-limit", type=int, metavar="N", help="SLURM: its MaxArraySize, less one")
    found.add_argument("--ray", metavar="ADDRESS", help="make the cells on a Ray cluster: its address, auto, or local")
    found.add_argument("--out", type=Path, default=Path("glue.zip"), metavar="FILE", help="submit: archive (default glue.zip)")
    found.add_argument("--fill", choices=["majority"], help="submit: what stands in files that no run predicts")
    found.add_argument("--figures", type=Path, metavar="FILE", help="default: experiments/<table>/ours.csv")
    found.add_argument("--version", action="version", version=version_line())
    return found


def count(word: str) -> int | str:
    """Return a number of the command line, or the word for one that is measured.

    Raises:
        ValueError: for anything else.
    """
    return word if word == "measure" else int(word)


def list_tables(arguments: argparse.Namespace) -> int:
    """Print the tables that come with the package."""
    from kd.table.definition import load_table, table_names

    for name in table_names():
        table = load_table(name)
        counts = ", ".join(f"{scale} {len(cells)}" for scale, cells in table.scales.items())
        print(f"{name:20} {table.title} (cells: {counts})")
    return 0


def planned_of(arguments: argparse.Namespace) -> "PlannedTable":
    """Return the planned cells of a command: all of a table, or those that `--only` chooses.

    Raises:
        InputError: if no table is named, there is none of this name or scale, or no cell is chosen.
    """
    from kd.table.cells import plan_table
    from kd.table.definition import load_table, table_names

    if arguments.table is None:
        raise InputError(f"name a table: {', '.join(table_names())}", "table")
    table = load_table(arguments.table)
    scale, rows, more = chosen(arguments.overrides)
    cells = cells_of(table, scale, rows, arguments.only or "")
    with shown_count() as show:
        return plan_table(table, cells, more, figures_file(arguments, table), show)


def chosen(words: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """Return the scale, the methods of `rows=` and the overrides among the words of a command; no methods are all."""
    scale, rows, more = "local", [], []
    for word in words:
        key, _, value = word.partition("=")
        if key == "scale":
            scale = value
        elif key == "rows":
            rows = value.strip("[]").split(",")
        else:
            more.append(word)
    return scale, rows, more


def cells_of(table: "Table", scale: str, rows: Sequence[str], labels: str) -> "list[Cell]":
    """Return the cells of a table that have labels.

    Args:
        table: the table.
        scale: name of a scale.
        rows: methods, to which the baseline is added if the table has it; empty for all.
        labels: as `method=pkd student=3l`, quoted as in a shell; empty for all cells.

    Raises:
        InputError: if there is no such scale, the labels cannot be read, or no cell has them.
    """
    try:
        words = shlex.split(labels)
    except ValueError as error:
        raise InputError(f"--only={labels} cannot be read: {error}", "--only") from error
    from kd.results.comparison import BASELINE

    baseline = [BASELINE] if any(cell.labels.get("method") == BASELINE for cell in table.cells(scale)) else []
    cells = table.rows(scale, [*baseline, *rows]) if rows else table.cells(scale)
    found = [cell for cell in cells if all(word in cell.words for word in words)]
    if not found:
        raise InputError(f"no cell of table {table.name} at scale={scale} has the labels --only='{labels}'", "--only")
    return found


def figures_file(arguments: argparse.Namespace, table: "Table") -> Path:
    """Return the file that the figures of a table are added to."""
    given: Path | None = arguments.figures
    return table.folder / "ours.csv" if given is None else given.expanduser()


@contextmanager
def shown_count() -> Iterator[Callable[[int, int], None]]:
    """Yield a function that shows on a terminal which cell is being planned; clear its line at the end, also on an error."""
    if not sys.stderr.isatty():
        yield lambda number, count: None
        return
    try:
        yield lambda number, count: print(f"\rplanning cell {number + 1} of {count}", end="", file=sys.stderr, flush=True)
    finally:
        print(CLEAR_LINE, end="", file=sys.stderr, flush=True)


def show_plan(arguments: argparse.Namespace) -> int:
    """Print what is done, missing and failed, and the time and disk that the rest will take."""
    from kd.launch.estimate import Durations, duration
    from kd.launch.places import cores
    from kd.system.files import readable_size, size_of

    planned = planned_of(arguments)
    missing = planned.missing()
    jobs = planned.jobs(missing)
    done = {cell.run.name: cell.run for cell in planned.cells if cell.run.is_done()}
    failures = {name: failure for name, job in jobs.items() if (failure := job.failure) is not None}
    for cell in planned.cells:
        if cell.run.name in done:
            state = "done"
        elif planned.is_recorded(cell):
            state = "done, elsewhere"
        elif cell.run.name in jobs and jobs[cell.run.name].run.is_locked():
            state = "running"
        else:
            state = "failed" if cell.run.name in failures else "missing"
        why = f": {failures[cell.run.name].line}" if state == "failed" else ""
        print(f"{state:15} {cell.cell}{why}")
    for broken, failure in planned.broken:
        print(f"{'broken':15} {broken}: {failure.line}")
    others = [job for job in jobs.values() if not job.wanted]
    failed_before = sum(cell.run.name in failures for cell in missing)
    print(f"\n{len(planned.cells) - len(missing)} done, {len(missing)} missing, {failed_before} of these failed before")
    if planned.broken:
        print(f"{len(planned.broken)} cannot be planned, see above")
    if others:
        print(f"first {len(others)} run(s) that they need: {', '.join(job.name for job in others)}")
    for job in others:
        if job.name in failures:
            print(f"{job.name} failed before: {failures[job.name].line}")
    workers = (isinstance(arguments.workers, int) and arguments.workers) or cores()
    seconds = Durations(run.result or {} for run in done.values()).left(jobs.values(), workers)
    mean = sum(size_of(run.directory) for run in done.values()) / len(done) if done else None
    disk = "unknown" if mean is None else readable_size(mean * len(jobs))
    if jobs:
        why = "" if done else " until a cell is done"
        print(f"time left with {workers} worker(s): {duration(seconds)}{why}; disk: {disk}{why}")
    return 1 if planned.broken else 0


def launcher_of(arguments: argparse.Namespace) -> "LauncherSpec":
    """Return the launcher that the options choose, as `launcher=` does for the points of a sweep."""
    from kd.config.schema import LauncherSpec

    name = "slurm" if arguments.slurm else "local" if arguments.ray is None else "ray"
    settings = {key: getattr(arguments, key) for key in ("workers", "time", "sbatch", "array_limit")}
    given = {**settings, "address": arguments.ray}
    return LauncherSpec(name, **{key: value for key, value in given.items() if value is not None})


def run_table(arguments: argparse.Namespace) -> int:
    """Make the missing cells, or write what a cluster's queue needs to make them."""
    from kd.results.figures import figures_if_there
    from kd.table.make import make

    planned = planned_of(arguments)
    missing = planned.missing()
    broken = f"; {len(planned.broken)} cannot be planned" if planned.broken else ""
    print(f"{planned.table.title}\n{len(planned.cells)} cells, {len(missing)} to make{broken}", flush=True)
    figures, rows = figures_file(arguments, planned.table), chosen(arguments.overrides)[1]
    if rows:
        figures_if_there(planned.table.folder / "paper.csv")  # a damaged file is told before anything is trained
    status = make(planned, missing, launcher_of(arguments), figures, needed_alone=arguments.needed)
    if rows and planned.cells and not arguments.needed and not planned.missing():
        show_rows(planned, rows, figures)
    return status


def show_rows(planned: "PlannedTable", rows: Sequence[str], figures: Path) -> None:
    """Print the rows of some methods beside the baseline, of the cells' students and tasks, with their verdicts."""
    from kd.results.comparison import BASELINE
    from kd.results.gathering import compare_table
    from kd.results.renderings import markdown

    table, scale = planned.table, planned.cells[0].cell.scale
    paper, labels = table.folder / "paper.csv", table.labels(scale)
    compared = compare_table(figures, paper, scale, labels, title=table.title, protocol=table.protocol)
    made = {(cell.label("student"), cell.label("task")) for cell in planned.cells}
    shown = compared.only(lambda entry: entry.method in (*rows, BASELINE) and (entry.student, entry.task) in made)
    print(f"\n{markdown(shown)}", end="")


def submit(arguments: argparse.Namespace) -> int:
    """Write the archive that the server of GLUE takes, from finished runs.

    Raises:
        InputError: if no run is named, or the archive cannot be made.
    """
    from kd.results.submission import write_submission

    words = [word for word in (arguments.table, *arguments.overrides) if word is not None]
    glue = [word.removeprefix("paths.glue=") for word in words if word.startswith("paths.glue=")]
    runs = [Path(word).expanduser() for word in words if not word.startswith("paths.glue=")]
    if not runs:
        raise InputError("name the directories of finished runs: kd-table submit runs/kd-3l-*", "runs")
    write_submission(arguments.out.expanduser(), runs, glue=glue[-1] if glue else None, fill=arguments.fill)
    print(arguments.out)
    return 0


COMMANDS = {"list": list_tables, "plan": show_plan, "run": run_table, "submit": submit}
