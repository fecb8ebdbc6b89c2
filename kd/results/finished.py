"""Finished runs that a command reads: the tasks of each, and where their students and teachers are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kd.config.compose import explain, typed
from kd.config.mixture import check_tasks, named, rename_task_error_keys, tasks_of
from kd.config.schema import RunSpec, TaskSpec
from kd.data.examples import HEAD_OF_KIND, Examples, load_examples
from kd.data.labels import label_text
from kd.errors import InputError
from kd.models.heads import HEADS
from kd.results.tuned import selection_words
from kd.runs.identity import prefix_task_errors, source_of
from kd.runs.run import is_record, keep_of, read_record

KEY = "RUN"
"""Name that errors give a run: the argument of the command."""


@dataclass(frozen=True)
class Finished:
    """One task of a finished run.

    Attributes:
        directory: directory of the run.
        record: its record; of a mixture that of the task.
        config: its configuration.
        spec: the same, typed.
        task: configuration of the task.
        member: name of the task in a mixture; None for a run of one task.
    """

    directory: Path
    record: Mapping[str, Any]
    config: DictConfig
    spec: RunSpec
    task: TaskSpec
    member: str | None = None

    @property
    def name(self) -> str:
        """Name of the run's directory."""
        return self.directory.name

    @property
    def students(self) -> list[str]:
        """Names of its students."""
        return list(self.record["students"])

    @property
    def teachers(self) -> list[str]:
        """Names of the teachers that it was evaluated with."""
        return list(self.record["metrics_teacher"])

    def label(self, student: str) -> str:
        """Return the name that reports show for a student."""
        return str(self.record["student"]) if len(self.students) == 1 else student

    @property
    def selection(self) -> str:
        """Description of how its checkpoint was chosen."""
        return selection_words(self.record)

    def folder(self, student: str) -> Path:
        """Return the folder of an exported student."""
        return self.directory / str(self.record["students"][student]["folder"])


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


def finished_tasks(directory: Path, overrides: Sequence[str] = ()) -> list[Finished]:
    """Return the tasks of a finished run.

    Args:
        directory: directory of the run.
        overrides: overrides of its configuration, such as `paths.glue=...` for data that have moved.

    Raises:
        InputError: if it is not the directory of a finished run, its configuration cannot be read, or its models are masked
            language models.
    """
    record = read_record(directory / "result.json")
    if record is None or not is_record(record):
        raise InputError(why_no_record(directory), KEY)
    config = read_config(directory / "config.yaml", overrides)
    spec = typed(config)
    task = named(spec.task)
    check_tasks(task)
    if (member := record.get("tasks")) is not None:
        found = [
            Finished(directory, member[name], config, spec, one, name) for name, one in tasks_of(task).items() if name in member
        ]
    else:
        found = [Finished(directory, record, config, spec, task)]
    for one in found:
        if one.task.kind not in HEAD_OF_KIND or not HEADS[HEAD_OF_KIND[one.task.kind]].labelled:
            raise InputError(
                f"'{directory}' trains a masked language model, whose logits are those of tokens; this command "
                "reads models of classes and of scores",
                KEY,
            )
    return found


def why_no_record(directory: Path) -> str:
    """Return why a directory has no record of a finished run, and what to do."""
    if not directory.is_dir():
        return f"'{directory}' is not the directory of a finished run: there is no such folder"
    if (directory / "result.json").exists():
        return f"result.json of '{directory}' is damaged, or none of a run: the command that made the run makes it again"
    if (directory / "config.yaml").exists():
        return f"the run '{directory}' is not finished: its command continues it"
    runs = sorted(path.parent.name for path in directory.glob("*/result.json"))
    if runs:
        return f"'{directory}' is a folder of runs; name runs in it, such as {directory / runs[0]} or {directory}/*"
    return f"'{directory}' is not the directory of a finished run: there is no result.json in it"


def read_config(path: Path, overrides: Sequence[str]) -> DictConfig:
    """Return the configuration of a run, with overrides.

    Raises:
        InputError: if it cannot be read.
    """
    try:
        config = OmegaConf.load(path)
        if not isinstance(config, DictConfig):
            raise InputError(f"'{path}' is not the configuration of a run", KEY)
        return OmegaConf.merge(config, OmegaConf.from_dotlist(list(overrides)))  # type: ignore[return-value]
    except OSError as error:
        raise InputError(f"'{path}' cannot be read: {error.strerror}", KEY) from error
    except OmegaConfBaseException as error:
        raise explain(error) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"'{path}' is not YAML: {' '.join(str(error).split())}", KEY) from error


def examples_of(run: Finished) -> Examples:
    """Read the examples of a task as its run did, but for the edits of train, which what is evaluated does not depend on.

    Raises:
        InputError: for data that cannot be read.
    """
    with rename_task_error_keys(run.spec.task, run.member or ""):
        source = source_of(run.task)
        with prefix_task_errors():
            return load_examples(run.task, source)


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
