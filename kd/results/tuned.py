"""The search that a run's settings came of: what its record and its figures say of it (`kd-tune`)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kd.config.schema import TunedSpec
from kd.runs.run import read_record, write_record
from kd.system.files import locked_now, write_text, writing

DOCUMENTS = ("README.md", ".eval_results/*.yaml")
"""Files beside an exported student that say how its figures were selected."""


@dataclass(frozen=True)
class Tuned:
    """Entry of a record about a search.

    Attributes:
        study: name of the study; None if it is not known.
        trials: number of trials that were compared, finished and pruned ones; None if it is not known.
        by: what they were compared by, as `validation accuracy`; None if it is not known.
        best: True if the settings are the best trial's, False if they are another one's.
    """

    study: str | None
    trials: int | None
    by: str | None
    best: bool = True

    def __str__(self) -> str:
        number = "an unknown number of" if self.trials is None else str(self.trials)
        which = f"best of {number} trials" if self.best else f"one of {number} trials, not the best,"
        return which if self.by is None else f"{which} by {self.by}"


def tuned_of(spec: TunedSpec) -> list[dict[str, Any]]:
    """Return the entries of the record of a run whose configuration names the search that it came of; none if it names none."""
    return [] if spec == TunedSpec() else [asdict(Tuned(spec.study, spec.trials, spec.by))]


def tuned_words(record: Mapping[str, Any]) -> str:
    """Return what figures of a run say of the searches that its settings came of, behind how its checkpoint was chosen.

    >>> tuned_words({"tuned": [{"study": "pkd", "trials": 20, "by": "validation accuracy", "best": True}]})
    ', best of 20 trials by validation accuracy'
    >>> tuned_words({})
    ''
    """
    return "".join(f", {Tuned(**entry)}" for entry in record.get("tuned") or [])


def selection_words(record: Mapping[str, Any]) -> str:
    """Return how the figures of a run were selected: its checkpoint, and its settings if a search chose them."""
    selection = record["selection"]
    return f"{selection['kind']}, {selection['by']}{tuned_words(record)}"


def state_tuned(directory: Path, entry: Mapping[str, Any], *, has_lock: bool = False) -> dict[str, Any] | None:
    """Write to the record of a finished run, and to the documents of its exports, which search its settings came of.

    Args:
        directory: directory of the run.
        entry: a `Tuned` as a mapping; it replaces one of the same study, unless that has more trials.
        has_lock: True if this process has locked the run.

    Returns:
        The record as it is now; None if the run is not finished, or another process has locked it.

    Raises:
        InputError: if a file cannot be written.
    """
    record = read_record(directory / "result.json")
    if record is None or any(
        dict(entry) == other or (other["study"] == entry["study"] and (other["trials"] or 0) > (entry["trials"] or 0))
        for other in record.get("tuned") or []
    ):
        return record
    if not has_lock:
        with locked_now(directory) as mine:
            return state_tuned(directory, entry, has_lock=True) if mine else None
    current = with_tuned(record, entry)
    before, after = selection_words(record), selection_words(current)
    exports = [directory / name for name in ("student", "peers")]
    with writing(directory):
        for document in (path for name in DOCUMENTS for folder in exports for path in folder.rglob(name)):
            write_text(document, document.read_text(encoding="utf-8").replace(before, after))
    return write_record(directory / "result.json", current)


def with_tuned(record: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record, and those of the tasks of a mixture in it, with an entry about a search."""
    others = [other for other in record.get("tuned") or [] if other["study"] != entry["study"]]
    tasks = {name: with_tuned(of_task, entry) for name, of_task in record.get("tasks", {}).items()}
    return {**record, "tuned": [*others, dict(entry)], **({"tasks": tasks} if tasks else {})}
