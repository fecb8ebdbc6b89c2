"""Configurations of the runs that teachers and pilots come from."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace

from omegaconf import DictConfig, OmegaConf, open_dict

from kd.config import compose as composition
from kd.config.cohort import PEERS, are_alike, students_of
from kd.config.mixture import LIMITS, MIXTURE, check_tasks, is_mixture, tasks_of
from kd.config.nodes import nested
from kd.config.pool import RANKED, teachers_of
from kd.config.schema import PoolSpec, RunSpec, StudentSpec, TaskSpec, TeacherSpec
from kd.config.values import shown
from kd.errors import InputError, one_of
from kd.runs.edits import edits_of_teachers
from kd.runs.identity import backbone_of
from kd.runs.inherit import inherit, laid_over
from kd.runs.run import Role, Run
from kd.runs.stages import without

FINETUNE = "finetune"
"""Method of a teacher's run, unless `teacher.<name>.method` names another."""

EACH = "each"
"""Value of `teacher.<name>.tasks`: a teacher of its own for each task of a mixture."""


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
    trained = () if spec.cohort.teacher == "online" else teachers_of(spec)
    for index, (name, teacher) in enumerate(spec.teacher.items()):
        apart = spec.cohort.teacher == "online" or teacher.model is not None
        method = None if teacher.method == FINETUNE else teacher.method
        for key, value in {"tasks": teacher.tasks, "method": method, "member": teacher.member}.items():
            if value is not None and (apart or (key != "tasks" and spec.pool.chain and index)):
                why = "has none" if apart else "is taught by the one before it in the chain"
                raise InputError(
                    f"teacher.{name}.{key} is of a teacher that a run of its own trains, and '{name}' {why}; leave it out",
                    f"teacher.{name}.{key}",
                )
    if not trained:
        return
    for name in trained:
        teacher = spec.teacher[name]
        if needs_fine_tuning(name, teacher):
            for entry, on, of in on_tasks(config, spec, name, teacher):
                tuned = teacher_config(on, of, name, teacher)
                yield Role("teacher", entry), link_config(on, of, tuned) if spec.pool.chain else tuned
    if spec.pool.wrapper is not None and spec.pool.distribution in RANKED:
        for name, teacher in spec.teacher.items():
            of_student = spec.pool.distribution == "student_rank"
            pilot = one_teacher(config, [name]) if of_student else teacher_config(config, spec, name, teacher)
            OmegaConf.update(pilot, "task.holdout", spec.pool.holdout, force_add=True)
            if of_student:  # all pilots train the same student
                OmegaConf.update(pilot, "student.backbone", backbone_of(spec)[0], force_add=True)
                OmegaConf.update(pilot, "student.init_from", spec.student.init_from)
            yield Role("pilot", name), pilot


def student_of(run: Run) -> StudentSpec:
    """Return the student that a teacher's run trains: the chosen one of a cohort, else one of those that are alike."""
    students = students_of(run.spec)
    return next(iter(students.values())) if run.chosen is None else students[run.chosen]


def with_member(run: Run, name: str, member: str | None) -> Run:
    """Return the run of a teacher with `teacher.<name>.member` as its chosen student; teachers of one run share its digest.

    Raises:
        InputError: for a run of one student, or without a student of this name; or without a name, if the students differ.
    """
    if member is None:
        if not are_alike(run.spec):
            names = ", ".join(students_of(run.spec))
            raise InputError(
                f"the run of the teacher '{name}' trains students that differ, {names}: teacher.{name}.member names one",
                f"teacher.{name}.member",
            )
        return run
    key, students = f"teacher.{name}.member", list(students_of(run.spec))
    if len(students) == 1:
        raise InputError(
            f"{key}={shown(member)} is a student of a cohort, and the run of the teacher '{name}' trains one student; leave it "
            f"out, or set teacher.{name}.run.cohort",
            key,
        )
    if member not in students:
        raise one_of(shown(member), students, key)
    return replace(run, chosen=member)


def on_tasks(config: DictConfig, spec: RunSpec, name: str, teacher: TeacherSpec) -> Iterator[tuple[str, DictConfig, RunSpec]]:
    """Yield the runs that fine-tune a teacher, by its `tasks`.

    Yields:
        Name of the entry in `RunInputs.teachers`, and the configuration and the specification of the student's run as they
        would be with the teacher's task: the run's own; for `each` one task of a mixture after the other, as `name/task`; for
        a list the mixture of these tasks.

    Raises:
        InputError: for anything else, or for tasks that do not include the run's.
    """
    key, own = f"teacher.{name}.tasks", tasks_of(spec.task)
    if teacher.tasks is None or (teacher.tasks == EACH and not is_mixture(spec.task)):
        yield name, config, spec
    elif teacher.tasks == EACH:
        check_one_start(spec, key)
        for task, one in own.items():
            yield f"{name}/{task}", with_task(config, task_alone(config, task, one)), replace(spec, task=one)
    elif isinstance(teacher.tasks, list) and teacher.tasks and all(isinstance(task, str) for task in teacher.tasks):
        if lacking := [task for task in own if task not in teacher.tasks]:
            raise InputError(f"{key}={shown(teacher.tasks)} lacks '{lacking[0]}', which the student learns", key)
        try:
            mixed = with_task(config, mixture_node(config, spec, teacher.tasks))
            task_of_teacher = composition.typed(mixed).task
            check_tasks(task_of_teacher)
        except InputError as error:
            raise InputError(f"{key}={shown(teacher.tasks)}: {error.message}", key) from error
        yield name, mixed, replace(spec, task=task_of_teacher)
    else:
        raise InputError(f"{key}={shown(teacher.tasks)} must be null, {EACH}, or a list of tasks", key)


def check_one_start(spec: RunSpec, key: str) -> None:
    """Check that the student of a mixture, which has one body, does not start from several teachers.

    Raises:
        InputError: if it does.
    """
    if spec.student.init_from == "teacher" and spec.student.copies_layers:
        raise InputError(
            f"student.init_from=teacher copies the layers of one teacher, and {key}={EACH} has one for each task; use "
            "student.init_from=pretrained",
            "student.init_from",
        )


def mixture_node(config: DictConfig, spec: RunSpec, names: Sequence[str]) -> DictConfig:
    """Return the configuration node of a mixture of a run's own tasks, as the run has them, and of others by their files.

    Limits of a mixture are those of every task in it; those of a run of one task are its own.

    Raises:
        InputError: for a task that is listed twice, or that does not exist.
    """
    own = tasks_of(spec.task)
    if len(set(names)) < len(names):
        raise InputError("a task is listed twice", "task")
    others = [name for name in names if name not in own]
    mixture: DictConfig = composition.compose([f"task={MIXTURE}", *(f"+task@task.of.{name}={name}" for name in others)]).task
    nodes = {name: task_alone(config, name, own[name]) if name in own else mixture.of[name] for name in names}
    with open_dict(mixture):
        mixture.of = nodes
        for limit in LIMITS if is_mixture(spec.task) else ():
            mixture[limit] = config.task.get(limit)
    return mixture


def task_alone(config: DictConfig, name: str, task: TaskSpec) -> DictConfig:
    """Return the configuration node of a run's task of this name, with the limits of its mixture, if it is in one."""
    node: DictConfig = config.task if "of" not in config.task or name not in config.task.of else config.task.of[name]
    node = node.copy()
    with open_dict(node):
        for key in ("name", *LIMITS):
            node[key] = getattr(task, key)
    return node


def with_task(config: DictConfig, task: DictConfig) -> DictConfig:
    """Return a configuration with another task."""
    other = config.copy()
    with open_dict(other):
        other.task = task
    return other


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
    choose: dict[str, str | list[str]] = {"method": teacher.method, "teacher": [], "student": "full"}
    own: dict[str, object] = {"student": {"backbone": teacher.backbone, "init_from": "pretrained"}}
    try:
        config = inherit(parent, choose, ["task"], own, f"teacher.{name}")
    except InputError as error:
        raise InputError(error.message, f"teacher.{name}.method" if error.key == "method" else error.key) from error
    for task, node in task_nodes(config.task, spec.task):
        with open_dict(node):
            if task.unlabelled is not None:  # fine-tuning learns from labels alone
                node.unlabelled = None
            if (edits := edits_of_teachers(task)) != task.edits:
                node.edits = edits
    return laid_over(config, teacher.run, f"teacher.{name}.run")


def task_nodes(node: DictConfig, task: TaskSpec) -> Iterator[tuple[TaskSpec, DictConfig]]:
    """Yield a task and its node in a configuration; of a mixture each of its tasks."""
    if not is_mixture(task):
        yield task, node
    for name, one in task.of.items():
        yield one, node.of[name]
