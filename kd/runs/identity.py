"""Everything that changes a run's result: the inputs of its digest."""

import inspect
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from kd.config.cohort import backbone_of_entry, cohort_identity, students_of
from kd.config.edits import edit_nodes
from kd.config.frozen import aids_of
from kd.config.mixture import is_mixture, rename_task_error_keys, tasks_of
from kd.config.nodes import nested
from kd.config.pool import pool_identity
from kd.config.schema import RunSpec, StudentSpec, TaskSpec
from kd.config.values import has, locate, one_line, shown
from kd.data.readers import data_path
from kd.data.sources import Source, as_names, fingerprint_of
from kd.errors import InputError, prefix_error_keys
from kd.runs.edits import changes_texts, edit_identity
from kd.runs.run import RunInputs
from kd.system.model_sources import fingerprint

DIGEST_FORMAT = 3
"""Part of every digest; raised when a change of code makes old results incomparable."""

NOT_IN_DIGEST = [
    "accelerator",
    "devices",
    "strategy",
    "embedding_rows",
    "eval_batch_size",
    "num_workers",
    "checkpoint_minutes",
    "progress",
    "keep",
]
"""Trainer keys that do not change a result, and are therefore not part of the digest."""

MACHINE_KEYS = ("precision", "compile", "pad_multiple")
"""Trainer keys that change a result, but are chosen for the machine: runs that train teachers inherit them."""

COLUMN_KEYS = ("text", "label", "columns")
"""Keys of a task's source that name columns; a number on the command line is taken for a name."""

OMIT_IF_EMPTY = ("extra", "where", "where_evaluated", "edits", "of")
"""Keys of a task that enter the digest only if they are set, so that runs without them have the digests of before."""

OMIT_IF_NONE = ("pattern", "encoding")
"""Keys of a task, and of its source, that enter the digest only if they are given; as `OMIT_IF_EMPTY`."""

PATH_KEYS = ("root", "train", "validation", "test", "unlabelled")
"""Keys with paths of data files; the content of the files enters the digest instead."""


def backbone_of(spec: RunSpec, student: StudentSpec | None = None) -> tuple[str, str]:
    """Return the source of a student's shape and vocabulary, and the key that sets it.

    The source is the student's backbone, else the one that the first teacher names for students, else that of this teacher, or
    of its member of a cohort, else the default `backbone`.

    Args:
        spec: specification of the run.
        student: a student of its cohort, which may have a backbone of its own; None for the run's student.
    """
    if student is not None and student.backbone not in (None, spec.student.backbone):
        return str(student.backbone), "cohort.students"
    if spec.student.backbone is not None:
        return spec.student.backbone, "student.backbone"
    for name, teacher in spec.teacher.items():
        if teacher.student_backbone is not None:
            return teacher.student_backbone, f"teacher.{name}.student_backbone"
        own = backbone_of_entry(nested(teacher.run, "cohort.students"), teacher.member)
        if own is not None:
            return own, f"teacher.{name}.run.cohort.students"
        kind = "model" if teacher.backbone is None else "backbone"
        return str(teacher.backbone or teacher.model), f"teacher.{name}.{kind}"
    return spec.backbone, "backbone"


def source_of(task: TaskSpec) -> Source:
    """Return the data source of a task.

    Raises:
        InputError: if the source cannot be instantiated.
    """
    node = dict(task.source)
    try:
        target = locate(node, "task.source", has("splits", "fingerprint"), "a source: a class with `splits` and `fingerprint`")
        if "extra" in node:
            raise InputError("task.source.extra follows from task.extra", "task.source.extra")
        if task.extra:
            if "extra" not in inspect.signature(target).parameters:
                raise InputError(f"task.extra is set, but {target.__name__} reads no further columns", "task.extra")
            node["extra"] = list(task.extra)
        source = target(**{key: value for key, value in node.items() if key != "_target_"})
    except InputError as error:
        of_extra = error.key is not None and error.key.endswith(".extra")
        raise InputError(error.message, error.key if of_extra else "task.source") from error
    except (TypeError, ValueError) as error:
        raise InputError(f"the task's source cannot be instantiated: {one_line(error)}", "task.source") from error
    for field in fields(source) if is_dataclass(source) else ():
        value, kind = getattr(source, field.name), str(field.type)
        wrong = () if "Mapping" in kind or kind.endswith("Any") else (Mapping,) if "Sequence" in kind else (Mapping, list)
        if isinstance(value, wrong):
            key = f"task.source.{field.name}"
            raise InputError(f"{key}={shown(value)} is not a value that the task's source takes", key)
    for split in ("train", "validation", "test"):
        given = getattr(task, split)
        if given is not None and given not in task.source.values():
            raise InputError(
                f"task.{split}={shown(given)} is set, but task={task.name} reads no file of its own", f"task.{split}"
            )
    return source  # type: ignore[no-any-return]


def prefix_task_errors() -> AbstractContextManager[None]:
    """Let errors about data and labels name the keys of the task; see `kd.errors.prefix_error_keys`.

    A source names the task's key that it reads, `train` or `label`, not its own, because users set the task's.
    """
    return prefix_error_keys("task", [part.name for part in fields(TaskSpec)])


def digest_inputs(spec: RunSpec, inputs: RunInputs) -> dict[str, Any]:
    """Return the values that the digest is computed from: everything that changes the result, and nothing else.

    Raises:
        InputError: if `student.checkpoint` is missing where the student starts from it.
    """
    student, trainer = asdict(spec.student), asdict(spec.trainer)
    student["backbone"] = fingerprint(*backbone_of(spec))
    if spec.student.init == "checkpoint":
        if spec.student.checkpoint is None:
            raise InputError("student.init=checkpoint needs student.checkpoint=<folder or source>", "student.checkpoint")
        student["checkpoint"] = fingerprint(spec.student.checkpoint, "student.checkpoint")
    else:
        student["checkpoint"] = None
    if not spec.student.copies_layers:
        student["init_from"] = None
    student.pop("run")
    surgeries = [  # a list, because the order of application matters
        {"name": name, **{key: value for key, value in surgery.items() if key != "run"}}
        for name, surgery in spec.surgery.items()
    ]
    if spec.trainer.batch_tokens is not None:
        trainer["batch_size"] = None
    task, data = task_identity(spec.task)
    identity = {
        "format": DIGEST_FORMAT,
        "method": method_identity(spec),
        "engine": spec.engine,
        "student": student,
        "teachers": [  # a list, because a student may start from the weights of the first
            {
                "name": name,
                "labels": teacher.labels,
                "model": teacher.model and fingerprint(teacher.model, f"teacher.{name}.model"),
                **({} if teacher.member is None else {"member": teacher.member}),
            }
            for name, teacher in spec.teacher.items()
        ],
        **({"surgery": surgeries} if surgeries else {}),
        "inputs": {str(role): run.digest for role, run in inputs},
        "pool": pool_identity(spec),
        **({"held": "by origin"} if spec.method.get("holds") and changes_texts(spec.task) else {}),
        "cohort": {**cohort_identity(spec), **backbones_identity(spec, student["backbone"])},
        "task": task,
        "data": data,
        "optimizer": asdict(spec.optimizer),
        "trainer": {key: value for key, value in trainer.items() if key not in NOT_IN_DIGEST},
        "seed": spec.seed,
    }
    named: dict[str, Any] = with_class_names(identity)
    return named


def backbones_identity(spec: RunSpec, common: str) -> dict[str, Any]:
    """Return the entry of the digest about students of a cohort whose backbones have other weights than the run's.

    Args:
        spec: specification of the run.
        common: identifier of the weights of the run's backbone.
    """
    prints = {name: fingerprint(*backbone_of(spec, student)) for name, student in students_of(spec).items()}
    own = {name: weights for name, weights in prints.items() if weights != common}
    return {"backbones": own} if own else {}


def task_identity(task: TaskSpec) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the values of a task that enter the digest, and those of its data; of a mixture by the name of each task.

    Raises:
        InputError: for a source that cannot be instantiated, or files that cannot be read.
    """
    if is_mixture(task):
        parts = {}
        for name, one in tasks_of(task).items():
            with rename_task_error_keys(task, name):
                parts[name] = task_identity(one)
        own = {key: getattr(task, key) for key in ("name", "kind", "tau", "monitor")}
        return (
            {**own, "of": {name: part for name, (part, _) in parts.items()}},
            {name: data for name, (_, data) in parts.items()},
        )
    values = asdict(task)
    values["edits"] = [edit_identity(node, key) for key, node in edit_nodes(task).items()]
    for key in OMIT_IF_EMPTY:
        if not values[key]:
            values.pop(key)
    values = given_of(values)
    del values["tau"]
    source = given_of({key: value for key, value in values.pop("source").items() if key not in PATH_KEYS})
    source.update({name: as_names(source[name]) for name in COLUMN_KEYS if name in source})
    data_source = source_of(task)
    with prefix_task_errors():
        data = data_source.fingerprint()
        if task.unlabelled is not None:
            data = {**data, **fingerprint_of({"unlabelled": {None: data_path(task.unlabelled, "unlabelled")}})}
    return {key: value for key, value in values.items() if key not in PATH_KEYS}, {**source, **data}


def given_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values without those of `OMIT_IF_NONE` that are not given."""
    return {key: value for key, value in values.items() if key not in OMIT_IF_NONE or value is not None}


def method_identity(spec: RunSpec) -> dict[str, Any]:
    """Return the values of a method that enter the digest; its first run and its aids' runs are inputs, with their own."""
    method = {key: value for key, value in spec.method.items() if key not in ("before", "aids")}
    aids = {
        name: None if aid.model is None else fingerprint(aid.model, f"method.aids.{name}.model")
        for name, aid in aids_of(spec).items()
    }
    return {**method, "aids": aids} if aids else method


def with_class_names(value: Any) -> Any:
    """Return a value with the class's name alone in each `_target_` of this package: a class may move to another module.

    >>> with_class_names({"factory": {"_target_": "kd.methods.pkd.PKD"}, "of_yours": {"_target_": "mine.KD"}})
    {'factory': {'_target_': 'PKD'}, 'of_yours': {'_target_': 'mine.KD'}}
    """
    if isinstance(value, list):
        return [with_class_names(inner) for inner in value]
    if not isinstance(value, Mapping):
        return value
    return {
        key: re.sub(r"^kd\.(?:\w+\.)*", "", inner) if key == "_target_" and isinstance(inner, str) else with_class_names(inner)
        for key, inner in value.items()
    }
