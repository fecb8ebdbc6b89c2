"""Maps from the layers of a run's students to those of their teachers, `maps.json`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.runs.run import read_record, write_record
from kd.system.files import writing

if TYPE_CHECKING:
    from kd.engines.models import Models

FILE = "maps.json"
"""Name of the file in the directory of a run."""


@dataclass(frozen=True)
class LayerMap:
    """Map from the layers of a student to those of a teacher, as `Method.layer_maps` returns it.

    Attributes:
        task: name of the task.
        student: name of the student, as in `result.json`; so is the teacher's.
        name: name of the map, that of the loss term if there is one.
        weights: (student layers, teacher layers), numbers >= 0; layer 0, the embeddings, is in both.
    """

    task: str
    student: str
    teacher: str
    name: str
    weights: Sequence[Sequence[float]]


def maps_of(models: "Models", task: str) -> list[LayerMap]:
    """Return the maps of all methods of a task, but those that map no layer.

    Args:
        models: the students with their methods, and the teachers, an online one among them.
        task: name of the task.
    """
    found = []
    for student, method in models.methods.items():
        for teacher, maps in zip(models.teachers, method.layer_maps(), strict=True):
            found += [
                LayerMap(task, student, teacher.name, name, weights.detach().cpu().tolist())
                for name, weights in maps.items()
                if bool(weights.any())
            ]
    return found


def write_maps(directory: Path, maps: Sequence[LayerMap], selection: Mapping[str, Any]) -> None:
    """Write the maps of a run atomically, with a checksum; no file if there are none.

    Args:
        directory: directory of the run.
        maps: the maps.
        selection: entry of the record about the checkpoint that they are of.

    Raises:
        InputError: if the file cannot be written.
    """
    path = directory / FILE
    if maps:
        write_record(path, {"selection": dict(selection), "maps": [asdict(one) for one in maps]})
        return
    with writing(path):
        path.unlink(missing_ok=True)


def read_maps(directory: Path) -> list[LayerMap]:
    """Return the maps of a finished run; none if it has no such file, or that is damaged."""
    record = read_record(directory / FILE, sealed=True) or {}
    try:
        maps = [LayerMap(**entry) for entry in record.get("maps", [])]
        return maps if all(is_whole(one) for one in maps) else []
    except (TypeError, ValueError):
        return []


def is_whole(found: LayerMap) -> bool:
    """Return whether names of a map are texts, and its weights finite numbers >= 0 in rows of one length, at least one."""
    names = (found.task, found.student, found.teacher, found.name)
    sizes = {len(row) for row in found.weights}
    numbers = [weight for row in found.weights for weight in row]
    return (
        all(isinstance(name, str) for name in names)
        and len(sizes) == 1
        and 0 not in sizes
        and all(isinstance(number, int | float) and math.isfinite(number) and number >= 0 for number in numbers)
    )
