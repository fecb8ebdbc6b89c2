"""Students of finished runs, as other commands take them: one of several by its name, with the columns of its text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kd.config.schema import TaskSpec
from kd.data.sources import as_names
from kd.deploy.folder import KEY, Deployed, is_exported, why_none
from kd.errors import InputError
from kd.models.pretrained import label_names, load_config
from kd.results.finished import Finished, finished_tasks, student_source
from kd.results.predict import check_export


@dataclass(frozen=True)
class Student:
    """A student of a finished run.

    Attributes:
        run: the task of the run that it is of.
        name: its name in the record.
        deployed: its folder in the run, as something that can be run.
    """

    run: Finished
    name: str
    deployed: Deployed


def student_of(directory: Path, chosen: str | None = None, overrides: Sequence[str] = ()) -> Student:
    """Return a student of a finished run, checked to be as its run wrote it.

    Args:
        directory: directory of the run.
        chosen: `--student`: its name, of a mixture of tasks that of the task, of both as `task/student`. None if there is one.
        overrides: overrides of the run's configuration, such as `paths.glue=...` for data that have moved.

    Raises:
        InputError: if it is no finished run, has no student, several of which none is chosen, or a damaged one.
    """
    if is_exported(directory):
        raise InputError(f"'{directory}' is an exported folder; name the run that it was made from", KEY)
    if not any((directory / name).is_file() for name in ("result.json", "config.yaml")) and not list(
        directory.glob("*/result.json")
    ):
        raise InputError(why_none(directory), KEY)
    students = named_students(finished_tasks(directory, overrides))
    if chosen is None and len(students) > 1:
        raise InputError(f"'{directory}' has several students; choose --student from {', '.join(students)}", "--student")
    if chosen is not None and chosen not in students:
        raise InputError(f"'{directory}' has no student '{chosen}', but {', '.join(students)}", "--student")
    label = next(iter(students)) if chosen is None else chosen
    run, name = students[label]
    place = student_source(run, name)
    if isinstance(place, str):
        raise InputError(f"{place}: the command of the run trains it again, with trainer.keep=student", KEY)
    folder = Path(place.source)
    check_export(run.directory, folder, run.record.get("files") or {}, KEY)
    whole = run.name if len(students) == 1 else f"{run.name}-{label.replace('/', '-')}"
    labels = None if run.record["labels"] is None else label_names(load_config(str(folder), KEY), KEY)
    deployed = Deployed(
        folder, whole, run.task.name, text_columns(run.task), int(run.record["max_length"]), labels, {"torch": {}}
    )
    return Student(run, name, deployed)


def named_students(tasks: Sequence[Finished]) -> dict[str, tuple[Finished, str]]:
    """Return the students of a run by the names that choose one: of the task, of the student, or of both."""
    several_tasks = len(tasks) > 1 or any(task.member is not None for task in tasks)
    found = {}
    for task in tasks:
        for name in task.students:
            parts = ([str(task.member)] if several_tasks else []) + (
                [name] if len(task.students) > 1 or not several_tasks else []
            )
            found["/".join(parts)] = (task, name)
    return found


def text_columns(task: TaskSpec) -> list[str]:
    """Return the columns with the texts of a task, as its run read them: GLUE's files and the hub name some differently."""
    source = task.source
    local = source.get("local_text") if source.get("root") else None
    return list(as_names(list(local or task.text)))
