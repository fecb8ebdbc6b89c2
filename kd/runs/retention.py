"""The files that a finished run retains (`trainer.keep`), and what the runs of a folder use of each other.

| `trainer.keep` | checkpoints | `student/`, `peers/`, `method.safetensors` | record, metrics, predictions and all else |
|---|---|---|---|
| `all` | both, with the state of the optimiser | yes | yes |
| `best` | the chosen one, without that state: the export can be written again | yes | yes |
| `student` | none | yes | yes |
| `figures` | none | no | yes |

The record of a finished run says which of them it retains, and is written before anything is removed. A process that is killed
in between leaves a finished run; the next start, or `kd-clean`, removes the rest.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kd.config.mixture import tasks_of
from kd.config.schema import KEEP
from kd.runs.edits import models_of_edits
from kd.runs.run import Run, keep_of, read_record, write_record
from kd.system.model_sources import damaged_file

USES = ".inputs.json"
"""Name of the file in which a run that is not finished says what it uses; a finished one has its record."""


def fewer(one: str, other: str) -> str:
    """Return the one of two words of `KEEP` that retains fewer files.

    >>> fewer("all", "student"), fewer("figures", "best")
    ('student', 'figures')
    """
    return max(one, other, key=KEEP.index)


def with_model(keep: str) -> str:
    """Return a word of `KEEP`, or `student` for the one that retains no model.

    >>> with_model("figures"), with_model("best")
    ('student', 'best')
    """
    return min(keep, "student", key=KEEP.index)


@dataclass(frozen=True)
class Excess:
    """Files of a finished run that it does not retain.

    Attributes:
        remove: files and folders to remove, after `rewrite` is written.
        rewrite: a checkpoint to write again without the state of the optimiser; None if there is none.
    """

    remove: tuple[Path, ...] = ()
    rewrite: Path | None = None

    def __bool__(self) -> bool:
        return self.rewrite is not None or bool(self.remove)


def excess(directory: Path, record: Mapping[str, Any], keep: str) -> Excess:
    """Return the files of a finished run that `trainer.keep` does not retain.

    Where the last checkpoint is the chosen one, it is written again before the other one is removed: as long as that is there,
    it has to be done. If the chosen one is missing, the other one stays.

    Args:
        directory: directory of the run.
        record: its record.
        keep: a word of `KEEP`.
    """
    checkpoints = directory / "checkpoints"
    best, last = checkpoints / "best.ckpt", checkpoints / "last.ckpt"
    remove: list[Path] = []
    rewrite = None
    if keep == "best":
        kind = record["selection"].get("kind")
        if kind == "best" and best.is_file():
            remove = [last]
        elif kind == "last" and last.is_file():
            remove = [best]
            rewrite = last if best.is_file() or keep_of(record) == "all" else None
    elif keep in ("student", "figures"):
        remove = [best, last, checkpoints / "costs.json"]
    if keep == "figures":
        remove += [directory / "student", directory / "peers", directory / "method.safetensors"]
    return Excess(tuple(path for path in remove if path.exists() or path.is_symlink()), rewrite)


@dataclass(frozen=True)
class Uses:
    """Files of a folder of runs that a run uses.

    Attributes:
        runs: names of the runs whose models it reads, or a run reads that it needs.
        models: identifiers of the weights of teachers that are no runs (`kd.system.model_sources.fingerprint`).
        edits: whether an edit of its training examples reads a model, whose results are in `.edits`.
    """

    runs: frozenset[str] = frozenset()
    models: frozenset[str] = frozenset()
    edits: bool = False


def with_inputs(run: Run) -> Iterator[Run]:
    """Yield a run and all runs that it needs, those that these need among them."""
    yield run
    for _, needed in run.inputs:
        yield from with_inputs(needed)


def write_uses(run: Run) -> None:
    """Write what a run uses to its directory, before the runs that it needs are executed: until it is done, they keep it.

    Raises:
        InputError: if the file cannot be written.
    """
    runs = list(with_inputs(run))
    read = {needed.name for one in runs for role, needed in one.inputs if role.kind != "pilot"}
    given = {teacher["model"] for one in runs for teacher in one.digest_inputs["teachers"] if teacher["model"] is not None}
    edits = any(models_of_edits(task) for one in runs for task in tasks_of(one.spec.task).values())
    uses = Uses(frozenset(read), frozenset(given), edits)
    write_record(run.directory / USES, {**asdict(uses), "runs": sorted(read), "models": sorted(given)})


def read_uses(directory: Path) -> Uses | None:
    """Return what a run uses, from its record, or from `write_uses` if it is not finished; None if neither can be read."""
    record = read_record(directory / "result.json")
    try:
        if record is not None:
            identity = record["identity"]
            tasks = [identity["task"], *identity["task"].get("of", {}).values()]
            given = {teacher["model"] for teacher in identity["teachers"]} - {None}
            edits = any("model" in edit for task in tasks for edit in task.get("edits", []))
            return Uses(frozenset(record["inputs"].values()), frozenset(given), edits)
        begun = read_record(directory / USES, sealed=True)
        return None if begun is None else Uses(frozenset(begun["runs"]), frozenset(begun["models"]), begun["edits"])
    except (KeyError, TypeError, AttributeError):  # of another program, or of an early version
        return None


def needed_by(directory: Path) -> str | None:
    """Return the name of a run in the same folder that is not finished and reads the model of a run; None if there is none."""
    for path in sorted(directory.parent.glob(f"*/{USES}")):
        if read_record(path.parent / "result.json") is None:
            uses = read_uses(path.parent)
            if uses is not None and directory.name in uses.runs:
                return path.parent.name
    return None


def removable(directory: Path, record: Mapping[str, Any], keep: str) -> tuple[Excess, str | None]:
    """Return the files of a finished run to remove now, and the name of the run for which its model stays, if there is one.

    A model that a run in the same folder reads stays until that is finished. If it is gone, it is being trained again for that
    run, and the checkpoints of this training stay.

    Args:
        directory: directory of the run.
        record: its record.
        keep: a word of `KEEP`.
    """
    files = excess(directory, record, keep)
    if keep != "figures" or not files or (user := needed_by(directory)) is None:
        return files, None
    intact = damaged_file(directory, record.get("files"), thorough=False) is None
    return (excess(directory, record, "student") if intact else Excess()), user
