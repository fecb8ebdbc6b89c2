"""Figures of papers and of runs in one long table: `paper.csv` and `ours.csv` of a folder in `experiments/`."""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from kd.errors import InputError
from kd.system.files import atomic_write, locked, writing

CONFIDENCES = ("printed", "copied", "memory", "measured")
"""Origins of a value: read in the paper or in its authors' result files | read in a secondary source | recalled, and not
checked against a source | a run of ours."""

ONE_RUN = ("best run", "one run")
AGGREGATES = (*ONE_RUN, "mean of runs", "median of runs", "unknown")
"""Kinds of a paper's value by the runs behind it: of one that was selected among several, and so higher than a run is expected
to be | of one that nothing was selected from but its checkpoint | of `n` runs together | not known, without `n`."""


@dataclass(frozen=True)
class Figure:
    """A value of a paper's table, or of one run of ours, with what it was measured on and where it stands.

    Attributes:
        paper: stem of the paper, as in `method=`.
        table: number or name of the table in its source.
        row: label of the row, as printed.
        method: label of the method, which the cells of `conf/table` have too; so have student, teacher and task.
        student: label of the student.
        teacher: label of the teacher; empty without one.
        task: label of the task.
        split: split as in `result.json`: validation, validation_mismatched, test; test_mismatched is MNLI's second hidden set.
        metric: metric of the task, as in `result.json`.
        value: value in the unit of `result.json`, a fraction; None if undefined or unknown.
        std: standard deviation over the runs, in the same unit; None if unknown.
        n: number of runs behind the value, at least 1; None if unknown.
        seeds: seeds as printed; of a run of ours its seed. Empty if unknown.
        selection: best | last | unknown, and by what; of settings that a search chose also its number of trials.
        init: initial weights of the student.
        source: place where the value stands: paper and table, or a file of a repository at a commit.
        confidence: one of `CONFIDENCES`.
        aggregate: of a paper's value one of `AGGREGATES`; empty for a run of ours.
        digest: digest of the run; empty for a paper's value.
        commit: commit of this repository that made the run, with `-dirty` if code or configuration differed from it; empty for
            a paper's value.
        command: overrides of `kd-train` that make the run, without paths, quoted as in a shell; empty for a paper's value.
        family: digest of everything but the seed, which runs that may be averaged share; empty for a paper's value.
        budget: digest that runs of one student, initialisation, data and budget share; empty for a paper's value.
        scale: scale of the table that the run is a cell of, as local; empty for a paper's value.
    """

    paper: str
    table: str
    row: str
    method: str
    student: str
    teacher: str
    task: str
    split: str
    metric: str
    value: float | None
    std: float | None
    n: int | None
    seeds: str
    selection: str
    init: str
    source: str
    confidence: str
    aggregate: str = ""
    digest: str = ""
    commit: str = ""
    command: str = ""
    family: str = ""
    budget: str = ""
    scale: str = ""

    @property
    def identity(self) -> tuple[str, ...]:
        """Key of the value: two figures of a file with one key are two versions of one value."""
        return tuple(str(getattr(self, name)) for name in IDENTITY)


COLUMNS = tuple(field.name for field in fields(Figure))
"""Columns of `ours.csv`, in their order."""

IDENTITY = ("paper", "table", "row", "method", "student", "teacher", "task", "split", "metric", "seeds", "digest", "scale")
"""Attributes that say what a value is of."""

OF_RUNS = ("digest", "commit", "command", "family", "budget", "scale")
"""Columns that `paper.csv` lacks."""

OF_PAPERS = ("aggregate",)
"""Columns that `ours.csv` lacks."""

NEEDED_OF_RUNS = ("digest", "family", "budget", "scale")
"""Columns whose value is never empty if the figure is of a run."""

NEEDED = ("paper", "method", "student", "task", "split", "metric", "confidence")
"""Columns whose value is never empty."""


def read_figures(path: Path) -> list[Figure]:
    """Read the figures of a file, in its order.

    Args:
        path: a CSV file in UTF-8 with a header; columns may be in any order.

    Raises:
        InputError: naming file and line, if the file cannot be read, a column is missing or unknown, a line has another number
            of fields, a value of `NEEDED` is empty, a number is none or is not finite, a confidence is unknown, or a paper's
            aggregate is unknown or contradicts its number of runs.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, strict=True)
            header = next(lines, [])
            _check_header(header, f"{path}, line 1")
            return [_figure(header, line, f"{path}, line {lines.line_num}") for line in lines if line]
    except OSError as error:
        raise InputError(f"cannot read '{path}': {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"'{path}' is no CSV file in UTF-8: {error}") from error


def figures_if_there(path: Path) -> list[Figure]:
    """Return the figures of a file, as `read_figures` does; none if there is no such file."""
    return read_figures(path) if path.is_file() else []


def _check_header(header: Sequence[str], place: str) -> None:
    """Check the names of the columns.

    Raises:
        InputError: if one is missing, unknown, or there twice.
    """
    missing = [name for name in COLUMNS if name not in header and name not in (*OF_RUNS, *OF_PAPERS)]
    if missing:
        raise InputError(f"{place}: missing column {', '.join(missing)}", missing[0])
    for name in header:
        if name not in COLUMNS:
            raise InputError(f"{place}: unknown column '{name}'; allowed are {', '.join(COLUMNS)}", name)
        if header.count(name) > 1:
            raise InputError(f"{place}: column {name} is there twice", name)


def _figure(header: Sequence[str], line: Sequence[str], place: str) -> Figure:
    if len(line) != len(header):
        raise InputError(f"{place}: {len(line)} fields in place of {len(header)}")
    texts = {name: text.strip() for name, text in zip(header, line, strict=True)}
    for name in NEEDED:
        if not texts[name]:
            raise InputError(f"{place}: {name} is empty", name)
    if texts["confidence"] not in CONFIDENCES:
        allowed = ", ".join(CONFIDENCES)
        raise InputError(f"{place}: confidence '{texts['confidence']}' is not one of {allowed}", "confidence")
    if texts["confidence"] == "measured":
        for name in NEEDED_OF_RUNS:
            if not texts.get(name):
                cure = "remove the file, and `kd-table run` writes it anew from the finished runs"
                raise InputError(f"{place}: {name} of a run is empty or missing; {cure}", name)
    value, std = (_number(texts.pop(name), name, place) for name in ("value", "std"))
    if std is not None and std < 0:
        raise InputError(f"{place}: std={std} is negative", "std")
    count = _count(texts.pop("n"), place)
    _check_aggregate(texts.get("aggregate", ""), count, texts["confidence"] == "measured", place)
    return Figure(value=value, std=std, n=count, **texts)


def _check_aggregate(aggregate: str, count: int | None, measured: bool, place: str) -> None:
    """Check the runs behind a value: its kind is told by a word of a list alone, never read out of a sentence.

    Raises:
        InputError: if a paper's aggregate is no word of the list or contradicts its number of runs, or a run of ours has one.
    """
    if measured and aggregate:
        raise InputError(f"{place}: aggregate '{aggregate}' is of a paper's value, and this one is of a run", "aggregate")
    if not measured and aggregate not in AGGREGATES:
        raise InputError(f"{place}: aggregate '{aggregate}' is not one of {', '.join(AGGREGATES)}", "aggregate")
    if not measured and ((aggregate in ONE_RUN) != (count == 1) or (aggregate == "unknown" and count is not None)):
        number = "empty" if count is None else str(count)
        raise InputError(f"{place}: aggregate '{aggregate}' contradicts n, which is {number}", "aggregate")


def _number(text: str, name: str, place: str) -> float | None:
    """Return a finite number, or None for an empty text.

    Raises:
        InputError: for anything else.
    """
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{place}: {name} '{text}' is not a number", name)
    return number


def _count(text: str, place: str) -> int | None:
    """Return a number of runs, or None for an empty text.

    Raises:
        InputError: for anything else.
    """
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and int(text)):
        raise InputError(f"{place}: n '{text}' is not a number of runs, 1 or more", "n")
    return int(text)


def write_figures(path: Path, figures: Sequence[Figure]) -> None:
    """Write figures atomically, in their order; numbers in the fewest digits that read back as the same number.

    Args:
        path: a file whose folder exists.
        figures: the figures; the columns of `OF_RUNS` are left out if all are of papers, and those of `OF_PAPERS` if none is.

    Raises:
        InputError: if the file cannot be written.
        OSError: if the disk is full.
    """
    spare = [names for names in (OF_RUNS, OF_PAPERS) if not any(getattr(figure, name) for figure in figures for name in names)]
    columns = [name for name in COLUMNS if not any(name in names for names in spare)]
    with writing(path, None), atomic_write(path, newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for figure in figures:
            values = (getattr(figure, name) for name in columns)
            writer.writerow("" if value is None else value for value in values)


def add_figures(path: Path, figures: Iterable[Figure]) -> None:
    """Add figures to a file, which is made if there is none; one with the identity of a figure of the file replaces it.

    The folder is locked from reading to writing, so that figures of several processes are all kept.

    Args:
        path: the file; its folder is made.
        figures: figures to add, behind those of the file.

    Raises:
        InputError: if the file cannot be read or written.
        OSError: if the disk is full.
    """
    with locked(path.parent, f"'{path.parent}' is locked by another process, waiting", None):
        merged = {figure.identity: figure for figure in (read_figures(path) if path.exists() else [])}
        merged |= {figure.identity: figure for figure in figures}
        write_figures(path, list(merged.values()))
