"""A run from its configuration, with the runs that it needs first. Nothing is trained, loaded or written."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from kd.config import compose as composition
from kd.config.cohort import SHARED_HEAD, alone, check_cohort, students_of
from kd.config.frozen import aids_of
from kd.config.loggers import check_loggers
from kd.config.mixture import check_tasks, is_mixture, named, rename_task_error_keys, tasks_of
from kd.config.pool import RANKED, check_pool
from kd.config.schema import RunSpec, TrainerSpec, check_values, compile_mode, padding_multiple
from kd.errors import InputError
from kd.runs.digest import digest_of
from kd.runs.edits import models_of_edits
from kd.runs.error_keys import rename_error_keys, stage_key
from kd.runs.identity import backbone_of, digest_inputs, source_of
from kd.runs.inputs import EACH, is_student, pilot_overrides, teacher_config, teacher_configs, with_member
from kd.runs.run import Role, Run, RunInputs
from kd.runs.stages import before_config, stage_config
from kd.system.hardware import resolve_precision
from kd.system.model_sources import fingerprint, stated_depth


def plan(config: DictConfig, overrides: Sequence[str] = (), depth: int = 0, teaching: RunInputs | None = None) -> Run:
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
    check_loggers(spec.logger)
    spec = replace(spec, task=named(spec.task))
    check_tasks(spec.task)
    spec = replace(spec, trainer=resolved(spec.trainer))
    check_cohort(spec)
    spec = alone(spec)
    spec = replace(spec, student=replace(spec.student, init_from=beginning(spec)))
    check_pool(spec)
    if is_mixture(spec.task) and spec.pool.distribution in RANKED:
        raise InputError(
            f"pool.distribution={spec.pool.distribution} ranks teachers by their scores on one task, and this is a "
            "mixture; use uniform, or numbers",
            "pool.distribution",
        )
    if is_mixture(spec.task) and spec.cohort.share == SHARED_HEAD:
        raise InputError(
            "cohort.share=head ties the pooling and prediction layer of students, and the tasks of a mixture have prediction "
            "layers of their own over one body; use cohort.share=none",
            "cohort.share",
        )
    inputs = teachers_of_run(config, spec, overrides, depth) if teaching is None else teaching
    if (before := spec.method.get("before")) is not None:
        first = before_config(config)
        with rename_error_keys(Role("before"), spec, config):
            same_pool = first.pool == config.pool  # then both runs draw teachers by one ranking
            inputs = replace(inputs, before=plan(first, overrides, depth, inputs if same_pool else None))
        spec = replace(spec, student=replace(spec.student, init="run", run={"name": before["name"]}))
    elif spec.student.init == "run":
        stage = stage_config(spec.student.run, "student.run", overrides, depth, config)
        with rename_error_keys(Role("stage"), spec, config):
            inputs = replace(inputs, stage=plan(*stage, depth + 1))
    staged: dict[str, dict[str, Run]] = {"surgery": {}, "aid": {}, "edit": {}}
    for role, given in further_stages(spec):
        stage = stage_config(given, stage_key(role), overrides, depth, config)
        with rename_error_keys(role, spec, config):
            staged[role.kind][str(role.name)] = plan(*stage, depth + 1)
    inputs = replace(inputs, surgeries=staged["surgery"], aids=staged["aid"], edits=staged["edit"])
    identified = digest_inputs(spec, inputs)
    if spec.cohort.teacher == "online":  # it has no run of its own: its shape and initial weights enter this digest
        ((name, teacher),) = spec.teacher.items()
        with rename_error_keys(Role("teacher", name), spec, config):
            online = composition.typed(teacher_config(config, spec, name, teacher))
            check_values(online)
            check_tasks(online.task)
        own = digest_inputs(online, RunInputs())
        identified["online"] = {key: own[key] for key in ("student", "seed")}
    digest = digest_of(identified)
    name = f"{spec.method['name']}-{spec.student.name}-{spec.task.name}-s{spec.seed}-{digest}"
    return Run(config, spec, digest, Path(spec.paths.runs).expanduser() / name, inputs, identified)


def resolved(trainer: TrainerSpec) -> TrainerSpec:
    """Return the trainer with the values that `precision=auto`, the words of `compile` and `pad_multiple=null` stand for."""
    return replace(
        trainer,
        precision=resolve_precision(trainer.precision, trainer.accelerator),
        compile=compile_mode(trainer.compile),
        pad_multiple=padding_multiple(trainer),
    )


def beginning(spec: RunSpec) -> str:
    """Return `student.init_from`; `auto` is `teacher` for a user's own data where the teacher's layers fit, else `pretrained`.

    They fit where one student learns from one teacher of the same task, both have the sizes of one backbone, and the student
    has fewer layers.
    """
    student = spec.student
    if student.init_from != "auto":
        return student.init_from
    together = len(students_of(spec)) > 1 or len(spec.teacher) != 1 or is_mixture(spec.task)
    if together or not student.copies_layers or not getattr(source_of(spec.task), "own_data", False):
        return "pretrained"
    ((name, teacher),) = spec.teacher.items()
    theirs = teacher.run.get("student", {})
    resized = any(getattr(student, size) is not None for size in ("width", "heads", "intermediate", "family"))
    changed = "cohort" in teacher.run or not isinstance(theirs, Mapping) or not theirs.keys() <= {"layers", "dropout"}
    source, kind = (teacher.backbone, "backbone") if teacher.model is None else (teacher.model, "model")
    if resized or changed or source is None or teacher.tasks not in (None, EACH):
        return "pretrained"
    own, key = backbone_of(spec)
    if own != source and fingerprint(own, key) != fingerprint(source, f"teacher.{name}.{kind}"):
        return "pretrained"
    depth = theirs.get("layers") or stated_depth(own, key) or sys.maxsize
    shallower = student.layers is not None and isinstance(depth, int) and student.layers < depth
    return "teacher" if shallower else "pretrained"


def further_stages(spec: RunSpec) -> Iterator[tuple[Role, Any]]:
    """Yield the role and the configuration of every run that trains the model of a surgery, an aid or an edit."""
    for name, surgery in spec.surgery.items():
        if surgery.get("run") is not None:
            yield Role("surgery", name), surgery["run"]
    for name, aid in aids_of(spec).items():
        if aid.run is not None:
            yield Role("aid", name), aid.run
    if is_mixture(spec.task):
        check_edits_of_mixture(spec)
    else:
        for name, model in models_of_edits(spec.task).items():
            if model.run is not None:
                yield Role("edit", name), model.run


def check_edits_of_mixture(spec: RunSpec) -> None:
    """Check that no task of a mixture has an edit that reads a model.

    Raises:
        InputError: if one has.
    """
    for name, task in tasks_of(spec.task).items():
        with rename_task_error_keys(spec.task, name):
            if models := list(models_of_edits(task)):
                raise InputError(
                    f"the edit '{models[0]}' reads a model, which a task of a mixture cannot have: run it on the task alone",
                    "task.edits",
                )


def teachers_of_run(config: DictConfig, spec: RunSpec, overrides: Sequence[str], depth: int) -> RunInputs:
    """Return the runs that train and rank the teachers of a run; arguments as for `plan`."""
    runs: dict[str, dict[str, Run]] = {"teacher": {}, "pilot": {}}
    for role, needed in teacher_configs(config, spec):
        with rename_error_keys(role, spec, config):
            run = plan(needed, pilot_overrides(role, spec, overrides), depth)
        teacher = str(role.name).partition("/")[0]  # after it, the task of a mixture that a teacher is for
        member = None if is_student(role, spec) else spec.teacher[teacher].member
        runs[role.kind][str(role.name)] = with_member(run, teacher, member)
    return RunInputs(runs["teacher"], runs["pilot"])
