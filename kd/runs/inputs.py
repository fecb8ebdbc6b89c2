"""Configurations of the runs that teachers and pilots come from."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

from omegaconf import DictConfig, OmegaConf, open_dict

from kd.config.cohort import PEERS
from kd.config.nodes import nested
from kd.config.pool import RANKED, teachers_of
from kd.config.schema import PoolSpec, RunSpec, TeacherSpec
from kd.errors import InputError
from kd.runs.edits import edits_of_teachers
from kd.runs.identity import backbone_of
from kd.runs.inherit import inherit, laid_over
from kd.runs.run import Role, Run
from kd.runs.stages import without


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


def teacher_source(run: Run, name: str) -> tuple[str, str]:
    """Return the source of a frozen teacher's weights, its run's student or a trained classifier, and the key that sets it."""
    teacher_run = run.inputs.teachers.get(name)
    if teacher_run is None:
        return str(run.spec.teacher[name].model), f"teacher.{name}.model"
    return str(teacher_run.student), f"teacher.{name}.backbone"


def teacher_configs(config: DictConfig, spec: RunSpec) -> Iterator[tuple[Role, DictConfig]]:
    """Yield role and configuration of every run that trains or ranks a teacher."""
    if spec.cohort.teacher == "online":
        return
    for name in teachers_of(spec):
        teacher = spec.teacher[name]
        if needs_fine_tuning(name, teacher):
            tuned = teacher_config(config, spec, name, teacher)
            yield Role("teacher", name), link_config(config, spec, tuned) if spec.pool.chain else tuned
    if spec.pool.wrapper is not None and spec.pool.distribution in RANKED:
        for name, teacher in spec.teacher.items():
            of_student = spec.pool.distribution == "student_rank"
            pilot = one_teacher(config, [name]) if of_student else teacher_config(config, spec, name, teacher)
            OmegaConf.update(pilot, "task.holdout", spec.pool.holdout, force_add=True)
            if of_student:  # all pilots train the same student
                OmegaConf.update(pilot, "student.backbone", backbone_of(spec)[0], force_add=True)
            yield Role("pilot", name), pilot


def is_student(role: Role, spec: RunSpec) -> bool:
    """Return whether an input is a pilot that trains this run's student with one teacher, and so has this run's keys."""
    return role.kind == "pilot" and spec.pool.distribution == "student_rank"


def pilot_overrides(role: Role, spec: RunSpec, overrides: Sequence[str]) -> list[str]:
    """Return the overrides that would compose a pilot of the student, for its stages; an empty list for other inputs."""
    if not is_student(role, spec):
        return []
    others = [f"teacher.{other}." for other in spec.teacher if other != role.name]
    remaining = without(overrides, ["pool=", "pool.", "teacher=", *others])
    return [*remaining, "pool=none", f"teacher=[{role.name}]", f"++task.holdout={spec.pool.holdout}"]


def link_config(parent: DictConfig, spec: RunSpec, last: DictConfig) -> DictConfig:
    """Return the configuration of the last teacher of a chain: the teachers before it teach it with the student's method."""
    before = list(spec.teacher)[:-1]
    chain = one_teacher(parent, before) if len(before) == 1 else parent
    config = last.copy()
    with open_dict(config):
        for part in ("method", "pool"):
            config[part] = chain[part]
        if spec.cohort.peers is None:
            config.engine = chain.engine
        else:  # a teacher of a chain is one model, without peers
            del config.method.weights[PEERS]
        config.teacher = {name: parent.teacher[name] for name in before}
    return config


def one_teacher(parent: DictConfig, names: Sequence[str]) -> DictConfig:
    """Return the configuration with these teachers alone and without a pool."""
    config = parent.copy()
    with open_dict(config):
        config.teacher = {name: parent.teacher[name] for name in names}
        config.pool = asdict(PoolSpec())
    return config


def teacher_config(parent: DictConfig, spec: RunSpec, name: str, teacher: TeacherSpec) -> DictConfig:
    """Return the configuration of a teacher's fine-tuning: the defaults, the parent's task, paths and hardware, and its `run`.

    The student's method, optimiser, epochs and seed do not enter, so that a sweep over them shares one teacher.

    Raises:
        InputError: for a key in its `run` that no run has, or if that run needs a further run.
    """
    surgeries = teacher.run.get("surgery")
    if nested(teacher.run, "student.init") == "run" or any(
        nested(surgeries, f"{surgery}.run") for surgery in (surgeries if isinstance(surgeries, Mapping) else ())
    ):
        raise InputError(
            "a teacher's run cannot start from a further run; train that run by a command of its own, and give its folder as "
            f"teacher.{name}.model or as student.checkpoint",
            f"teacher.{name}.run.student.init",
        )
    choose: dict[str, str | list[str]] = {"method": "finetune", "teacher": [], "student": "full"}
    own: dict[str, object] = {"student": {"backbone": teacher.backbone}}
    if spec.task.unlabelled is not None:  # fine-tuning learns from labels alone
        own["task"] = {"unlabelled": None}
    config = inherit(parent, choose, ["task"], own, f"teacher.{name}")
    edits = edits_of_teachers(spec.task)
    if edits != spec.task.edits:
        with open_dict(config):
            config.task.edits = edits
    return laid_over(config, teacher.run, f"teacher.{name}.run")
