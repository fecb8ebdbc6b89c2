"""A run is a pure function of its configuration, and its inputs are other runs.

A run's directory is named by the digest of everything that changes its result. A teacher to fine-tune or a stage to start from
is a run of its own: it is trained first if it is not done, and reused if it is.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from kd import config as composition
from kd.cohorts import PEERS, check_cohort, cohort_identity
from kd.data.sources import Source, as_names
from kd.errors import InputError
from kd.hardware import resolve_precision
from kd.pools import RANKED, check_pool, pool_identity, teachers_of
from kd.runs import Run, digest_of
from kd.schema import PoolSpec, RunSpec, TeacherSpec, check_values
from kd.sources import fingerprint
from kd.stages import before_config, has_key, key_of_stage, laid_over, nested, stage_config, without
from kd.values import has, locate, one_line, shown

DIGEST_FORMAT = 2
"""Part of every digest; raised when a change of code makes old results incomparable."""

NOT_IN_DIGEST = [
    "accelerator",
    "devices",
    "strategy",
    "eval_batch_size",
    "num_workers",
    "checkpoint_minutes",
    "progress",
]
"""Trainer keys that do not change a result, and are therefore not part of the digest."""

MACHINE_KEYS = ("precision", "compile", "pad_multiple")
"""Trainer keys that change a result, but are chosen for the machine: runs that train teachers inherit them."""

NAMES = ("text", "label", "columns")
"""Keys of a task's source that name columns; a number on the command line is taken for a name."""

PATH_KEYS = ("root", "train", "validation", "test")
"""Keys with paths of data files; the content of the files enters the digest instead."""


def plan(config: DictConfig, overrides: Sequence[str] = (), depth: int = 0, teaching: Mapping[str, Run] | None = None) -> Run:
    """Return the run of a configuration, with the runs that it needs. Nothing is trained, loaded or written.

    Args:
        config: the composed configuration.
        overrides: the overrides that it was composed from; those of a stage are added to them.
        depth: number of stages before this one in the chain, counted from the command.
        teaching: runs that train or rank the teachers; None to plan them from the configuration.

    Raises:
        InputError: for a value of the wrong type, or an input that does not exist.
    """
    spec = composition.typed(config)
    check_values(spec)
    spec.trainer.precision = resolve_precision(spec.trainer.precision, spec.trainer.accelerator)
    check_cohort(spec)
    check_pool(spec)
    inputs = dict(teaching or {})
    for role, needed in teacher_configs(config, spec) if teaching is None else ():
        with rename_error_keys(role, spec, config):
            inputs[role] = plan(needed, pilot_overrides(role, spec, overrides), depth)
    if (before := spec.method.get("before")) is not None:
        first = before_config(config)
        with rename_error_keys("before", spec, config):
            inputs["before"] = plan(first, overrides, depth, inputs)
        spec.student = replace(spec.student, init="run", run={"name": before["name"]})
    elif spec.student.init == "run":
        stage = stage_config(spec.student.run, "student.run", overrides, depth, config)
        with rename_error_keys("stage", spec, config):
            inputs["stage"] = plan(*stage, depth + 1)
    for name, surgery in spec.surgery.items():
        if surgery.get("run") is not None:
            stage = stage_config(surgery["run"], f"surgery.{name}.run", overrides, depth, config)
            with rename_error_keys(f"surgery {name}", spec, config):
                inputs[f"surgery {name}"] = plan(*stage, depth + 1)
    identified = digest_inputs(spec, inputs)
    if spec.cohort.teacher == "online":  # it has no run of its own: its shape and initial weights enter this digest
        ((name, teacher),) = spec.teacher.items()
        with rename_error_keys(f"teacher {name}", spec, config):
            online = composition.typed(teacher_config(config, spec, name, teacher))
            check_values(online)
        own = digest_inputs(online, {})
        identified["online"] = {key: own[key] for key in ("student", "seed")}
    digest = digest_of(identified)
    name = f"{spec.method['name']}-{spec.student.name}-{spec.task.name}-s{spec.seed}-{digest}"
    return Run(config, spec, digest, Path(spec.paths.runs).expanduser() / name, inputs, identified)


@contextmanager
def rename_error_keys(role: str, spec: RunSpec, config: DictConfig) -> Iterator[None]:
    """Let errors about an input's run name the key in the configuration of the run that needs it, which the user can change.

    Args:
        role: role of the input; see `Run.inputs`.
        spec: specification of the run that needs it.
        config: configuration of the run that needs it, not resolved.

    Raises:
        InputError: in place of one that names a key of the input's run.
    """
    try:
        yield
    except InputError as error:
        key = key_for(role, spec, error.key, config)
        if error.key and key in ("student.run", f"surgery.{role.removeprefix('surgery ')}.run") and key != error.key:
            raise InputError(f"the run of {key}: {error.message} ({error.key})", key) from error
        raise InputError(error.message.replace(f"{error.key}=", f"{key}="), key) from error


def key_for(role: str, spec: RunSpec, key: str | None, config: DictConfig | None = None) -> str | None:
    """Return the key in the configuration of a run that sets a key of one of its inputs.

    >>> key_for("teacher minilm", RunSpec(teacher={"minilm": TeacherSpec()}), "optimizer.lr")
    'teacher.minilm.run.optimizer.lr'
    """
    kind, _, name = role.partition(" ")
    if key is not None and kind in ("stage", "surgery") and config is not None:
        return key_of_stage(config, "student.run" if kind == "stage" else f"surgery.{name}.run", key)
    if key is None or kind not in ("teacher", "pilot", "before"):
        return key
    if kind == "before":
        part, _, rest = key.partition(".")
        if part == "method":
            return f"method.before.{rest}".removesuffix(".")
        return f"method.before.run.{key}" if has_key(spec.method["before"].get("run", {}), key) else key
    if key == "task.holdout" and kind == "pilot":
        return "pool.holdout"
    if is_student(role, spec):  # a pilot of the student has the keys of the run that needs it
        return key
    if key.startswith("teacher.") or (spec.pool.chain and key.startswith("method.")):  # a run of the chain inherits these
        return key
    if has_key(spec.teacher[name].run, key):
        return f"teacher.{name}.run.{key}"
    if key == "student.backbone":
        return f"teacher.{name}.backbone"
    part, _, rest = key.partition(".")
    own = part in ("method", "student", "optimizer", "seed") or (
        part == "trainer" and rest not in (*NOT_IN_DIGEST, *MACHINE_KEYS)
    )
    return f"teacher.{name}.run.{key}" if own else key


def needs_fine_tuning(name: str, teacher: TeacherSpec) -> bool:
    """Return whether a teacher is fine-tuned by a run of its own.

    Raises:
        InputError: if the teacher has neither or both of `model` and `backbone`.
    """
    if (teacher.model is None) == (teacher.backbone is None):
        raise InputError(
            f"the teacher '{name}' needs one of `model` (a ready classifier) and `backbone` (fine-tuned first)",
            f"teacher.{name}.model",
        )
    return teacher.model is None


def backbone_of(spec: RunSpec) -> tuple[str, str]:
    """Return the source of the student's shape and vocabulary, and the key that sets it.

    It is the student's backbone, else the first teacher's, else the default `backbone`.
    """
    if spec.student.backbone is not None:
        return spec.student.backbone, "student.backbone"
    for name, teacher in spec.teacher.items():
        kind = "model" if teacher.backbone is None else "backbone"
        return str(teacher.backbone or teacher.model), f"teacher.{name}.{kind}"
    return spec.backbone, "backbone"


def teacher_source(run: Run, name: str) -> tuple[str, str]:
    """Return the source of a frozen teacher's weights, its run's student or a ready classifier, and the key that sets it."""
    teacher_run = run.inputs.get(f"teacher {name}")
    if teacher_run is None:
        return str(run.spec.teacher[name].model), f"teacher.{name}.model"
    return str(teacher_run.student), f"teacher.{name}.backbone"


def source_of(spec: RunSpec) -> Source:
    """Return the data source of a run's task.

    Raises:
        InputError: if the source cannot be instantiated.
    """
    node = dict(spec.task.source)
    try:
        target = locate(node, "task.source", has("splits", "fingerprint"), "a source: a class with `splits` and `fingerprint`")
        source = target(**{key: value for key, value in node.items() if key != "_target_"})
    except InputError as error:
        raise InputError(error.message, "task.source") from error
    except (TypeError, ValueError) as error:
        raise InputError(f"the task's source cannot be instantiated: {one_line(error)}", "task.source") from error
    for field in fields(source) if is_dataclass(source) else ():
        value, kind = getattr(source, field.name), str(field.type)
        wrong = () if "Mapping" in kind or kind.endswith("Any") else (Mapping,) if "Sequence" in kind else (Mapping, list)
        if isinstance(value, wrong):
            key = f"task.source.{field.name}"
            raise InputError(f"{key}={shown(value)} is not a value that the task's source takes", key)
    return source  # type: ignore[no-any-return]


def digest_inputs(spec: RunSpec, inputs: Mapping[str, Run]) -> dict[str, Any]:
    """Return the values that the digest is computed from: everything that changes the result, and nothing else.

    Raises:
        InputError: if `student.checkpoint` is missing where the student starts from it.
    """
    student, task, trainer = asdict(spec.student), asdict(spec.task), asdict(spec.trainer)
    student["backbone"] = fingerprint(*backbone_of(spec))
    if spec.student.init == "checkpoint":
        if spec.student.checkpoint is None:
            raise InputError("student.init=checkpoint needs student.checkpoint=<folder or source>", "student.checkpoint")
        student["checkpoint"] = fingerprint(spec.student.checkpoint, "student.checkpoint")
    else:
        student["checkpoint"] = None
    if spec.student.init in ("random", "checkpoint", "run"):
        student["init_from"] = None
    student.pop("run")
    surgeries = [  # a list, because the order of application matters
        {"name": name, **{key: value for key, value in surgery.items() if key != "run"}}
        for name, surgery in spec.surgery.items()
    ]
    if spec.trainer.batch_tokens is not None:
        trainer["batch_size"] = None
    source = {key: value for key, value in task.pop("source").items() if key not in PATH_KEYS}
    source.update({name: as_names(source[name]) for name in NAMES if name in source})
    identity = {
        "format": DIGEST_FORMAT,
        "method": {key: value for key, value in spec.method.items() if key != "before"},  # an input, with its own digest
        "engine": spec.engine,
        "student": student,
        "teachers": [  # a list, because a student may start from the weights of the first
            {
                "name": name,
                "labels": teacher.labels,
                "model": teacher.model and fingerprint(teacher.model, f"teacher.{name}.model"),
            }
            for name, teacher in spec.teacher.items()
        ],
        **({"surgery": surgeries} if surgeries else {}),
        "inputs": {role: run.digest for role, run in inputs.items()},
        "pool": pool_identity(spec),
        "cohort": cohort_identity(spec),
        "task": {key: value for key, value in task.items() if key not in PATH_KEYS},
        "data": {**source, **source_of(spec).fingerprint()},
        "optimizer": asdict(spec.optimizer),
        "trainer": {key: value for key, value in trainer.items() if key not in NOT_IN_DIGEST},
        "seed": spec.seed,
    }
    named: dict[str, Any] = with_class_names(identity)
    return named


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


def teacher_configs(config: DictConfig, spec: RunSpec) -> Iterator[tuple[str, DictConfig]]:
    """Yield role and configuration of every run that trains or ranks a teacher."""
    if spec.cohort.teacher == "online":
        return
    for name in teachers_of(spec):
        teacher = spec.teacher[name]
        if needs_fine_tuning(name, teacher):
            tuned = teacher_config(config, spec, name, teacher)
            yield f"teacher {name}", link_config(config, spec, tuned) if spec.pool.chain else tuned
    if spec.pool.wrapper is not None and spec.pool.distribution in RANKED:
        for name, teacher in spec.teacher.items():
            of_student = spec.pool.distribution == "student_rank"
            pilot = one_teacher(config, [name]) if of_student else teacher_config(config, spec, name, teacher)
            OmegaConf.update(pilot, "task.holdout", spec.pool.holdout, force_add=True)
            if of_student:  # all pilots train the same student
                OmegaConf.update(pilot, "student.backbone", backbone_of(spec)[0], force_add=True)
            yield f"pilot {name}", pilot


def is_student(role: str, spec: RunSpec) -> bool:
    """Return whether an input is a pilot that trains this run's student with one teacher, and so has this run's keys."""
    return role.startswith("pilot ") and spec.pool.distribution == "student_rank"


def pilot_overrides(role: str, spec: RunSpec, overrides: Sequence[str]) -> list[str]:
    """Return the overrides that would compose a pilot of the student, for its stages; an empty list for other inputs."""
    if not is_student(role, spec):
        return []
    name = role.removeprefix("pilot ")
    others = [f"teacher.{other}." for other in spec.teacher if other != name]
    remaining = without(overrides, ["pool=", "pool.", "teacher=", *others])
    return [*remaining, "pool=none", f"teacher=[{name}]", f"++task.holdout={spec.pool.holdout}"]


def link_config(parent: DictConfig, spec: RunSpec, last: DictConfig) -> DictConfig:
    """Return the configuration of the last teacher of a chain: the teachers before it teach it with the student's method."""
    before = list(spec.teacher)[:-1]
    chain = one_teacher(parent, before) if len(before) == 1 else parent
    config = last.copy()
    OmegaConf.set_struct(config, False)
    for part in ("method", "pool"):
        config[part] = chain[part]
    if spec.cohort.peers is None:
        config.engine = chain.engine
    else:  # a teacher of a chain is one model, without peers
        del config.method.weights[PEERS]
    config.teacher = {name: parent.teacher[name] for name in before}
    OmegaConf.set_struct(config, True)
    return config


def one_teacher(parent: DictConfig, names: Sequence[str]) -> DictConfig:
    """Return the configuration with these teachers alone and without a pool."""
    config = parent.copy()
    OmegaConf.set_struct(config, False)
    config.teacher = {name: parent.teacher[name] for name in names}
    config.pool = asdict(PoolSpec())
    OmegaConf.set_struct(config, True)
    return config


def teacher_config(parent: DictConfig, spec: RunSpec, name: str, teacher: TeacherSpec) -> DictConfig:
    """Return the configuration of a teacher's fine-tuning: the defaults, the parent's task, paths and hardware, and its `run`.

    The student's method, optimiser, epochs and seed do not enter, so that a sweep over them shares one teacher.

    Raises:
        InputError: for a key in its `run` that no run has, or if that run needs a further run.
    """
    config = composition.compose(["method=finetune", "teacher=[]", "student=full"])
    for part in ("task", "paths", "logger"):
        OmegaConf.update(config, part, OmegaConf.to_container(parent[part], resolve=True), merge=False, force_add=True)
    for key in (*NOT_IN_DIGEST, *MACHINE_KEYS):
        OmegaConf.update(config, f"trainer.{key}", getattr(spec.trainer, key), force_add=True)
    OmegaConf.update(config, "student.backbone", teacher.backbone)
    config.preflight, config.resume, config.cache = spec.preflight, spec.resume, spec.cache
    surgeries = teacher.run.get("surgery")
    if nested(teacher.run, "student.init") == "run" or any(
        nested(surgeries, f"{surgery}.run") for surgery in (surgeries if isinstance(surgeries, Mapping) else ())
    ):
        raise InputError(
            "a teacher's run cannot start from a further run; train that run by a command of its own, and give its folder as "
            f"teacher.{name}.model or as student.checkpoint",
            f"teacher.{name}.run.student.init",
        )
    return laid_over(config, teacher.run, f"teacher.{name}.run")
