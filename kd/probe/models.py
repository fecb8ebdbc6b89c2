"""Models of finished runs, loaded from where the runs exported them."""

from dataclasses import dataclass
from functools import lru_cache

from kd.data.labels import label_text
from kd.errors import InputError
from kd.models import Encoder, FrozenTeacher
from kd.models.pretrained import label_names, load_config, load_model, load_tokenizer
from kd.models.teachers import match_labels
from kd.probe.result import Shape
from kd.probe.runs import KEY, Finished
from kd.runs.run import is_record, keep_of, read_record

LOADED = 3
"""Number of models in memory: a student, its teacher and its control."""


@dataclass(frozen=True)
class ModelSource:
    """Place that a model is loaded from.

    Attributes:
        source: a folder, `hf:<id>` or `package:<module>/<folder>`.
        key: key that errors name.
        labels: `teacher.<name>.labels`, names of its outputs in their order; None for those of its configuration.
    """

    source: str
    key: str = KEY
    labels: tuple[str, ...] | None = None


def student_source(run: Finished, student: str) -> ModelSource | str:
    """Return the place of an exported student; a reason if the run has let it go."""
    if not run.folder(student).is_dir():
        return f"the run {run.name} has no exported student (trainer.keep={keep_of(run.record)})"
    return ModelSource(str(run.folder(student)))


def teacher_source(run: Finished, teacher: str) -> ModelSource | str:
    """Return the place of a teacher of a run: a trained classifier, or the student of the run that trained it.

    Returns:
        The place, or a reason why there is none.
    """
    if run.spec.cohort.teacher == "online":
        return f"the teacher '{teacher}' was trained together with the students, and is not exported"
    spec = run.spec.teacher[teacher]
    if spec.model is not None:
        labels = tuple(label_text(name) for name in spec.labels) if spec.labels else None
        return ModelSource(spec.model, f"teacher.{teacher}.model", labels)
    directory = run.directory.parent / str(run.record["inputs"][f"teacher {teacher}"])
    record = read_record(directory / "result.json")
    if record is None or not is_record(record):
        return f"the run of the teacher '{teacher}', {directory.name}, is not beside the run {run.name}"
    of_task = record["tasks"][run.task.name] if "tasks" in record else record
    folder = directory / str(of_task["students"][spec.member or record["headline"]]["folder"])
    if not folder.is_dir():
        return f"the run of the teacher '{teacher}' has no exported student (trainer.keep={keep_of(record)})"
    return ModelSource(str(folder))


def shape_of(run: Finished, student: str) -> Shape | None:
    """Return the sizes of an exported student by its `config.json`; None if its run has let it go. No weights are read."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(run.folder(student), local_files_only=True)
        return Shape(int(config.num_hidden_layers), int(config.num_attention_heads), int(config.hidden_size))
    except (OSError, ValueError, AttributeError):
        return None


@lru_cache(maxsize=LOADED)
def load(place: ModelSource, classes: tuple[str, ...] | None) -> FrozenTeacher:
    """Return a model, frozen, in float32 and eval mode, whose logits are in the order of the task's classes.

    Args:
        place: where it is.
        classes: names of the classes, which are matched with the model's outputs by name; None for scores.

    Raises:
        InputError: if it cannot be loaded, has changed since its run exported it, or has other classes.
    """
    config = load_config(place.source, place.key)
    names = list(place.labels or label_names(config, place.key))
    if classes is None and len(names) != 1:
        raise InputError(f"the task has scores, and '{place.source}' has {len(names)} outputs: {names}", place.key)
    columns = None if classes is None else match_labels(classes, names, place.key)
    model = load_model(place.source, place.key, config, head_needed=True)
    return FrozenTeacher(Encoder(model, load_tokenizer(place.source, place.key)), place.source, columns)
