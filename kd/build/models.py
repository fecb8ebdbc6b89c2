"""Models of a run: a plan of their shapes, with every check that needs no weights, and then the models with their weights."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from kd.build.inputs import ExpectedModels, InputModels, TrainedModels, prefix_student_errors
from kd.build.instantiate import bind_method, build_method
from kd.build.sharing import HeadSharing
from kd.build.surgeries import (
    apply_surgeries,
    check_aid_vocabularies,
    check_vocabularies,
    config_after,
    surgery_shapes,
)
from kd.build.teachers import TeacherPlan, plan_aids, plan_teachers
from kd.config.cohort import students_of
from kd.config.compose import typed
from kd.config.pool import teachers_of
from kd.config.schema import StudentSpec
from kd.data.tasks import Task
from kd.data.texts import FlatTexts
from kd.data.tokenized import tokenizer_fingerprint
from kd.engines.models import Models
from kd.errors import InputError, one_of
from kd.methods.base import Bound, Method
from kd.models import Encoder
from kd.models.heads import HEADS
from kd.models.students import INIT_FROM, StudentPlan, describe_init, plan_student
from kd.runs.error_keys import rename_error_keys
from kd.runs.identity import backbone_of
from kd.runs.inputs import teacher_config
from kd.runs.kept import read_kept
from kd.runs.run import Role, Run
from kd.schedules import Schedule
from kd.system.model_sources import source_name
from kd.teacher_cache.cache import CacheUnused, CacheUsed


@dataclass(frozen=True)
class BuiltModels(Models):
    """Models of a run, and what its record says of them.

    Attributes:
        inits: name of the student -> description of its initial weights.
        caches: name of the teacher -> the entry of the record about its cache, once the data is built.
    """

    inits: dict[str, str] = field(default_factory=dict)
    caches: dict[str, CacheUsed | CacheUnused] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LearnerPlan:
    """Plan of a model that is trained.

    Attributes:
        plan: its shape and initialisation.
        seed: seed of its random weights.
        init: description of its initial weights, for the record.
    """

    plan: StudentPlan
    seed: int
    init: str = ""

    def materialise(self) -> Encoder:
        """Return the model with its initial weights; torch's generator is seeded first.

        Raises:
            InputError: if the weights that it starts from cannot be loaded.
        """
        torch.manual_seed(self.seed)
        return self.plan.materialise()


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """Plan of all models of a run; no weights of a model are loaded or drawn.

    Attributes:
        run: the run.
        task: task whose labels name the outputs.
        method: the method, not bound to any model.
        weights: term -> schedule of its weight.
        teachers: the frozen teachers.
        online: the teacher that is trained together with the students; None if there is none.
        students: name -> student; a single student is named `student`.
        aids: name -> frozen model of the method that is no teacher.
        shapes: the models on the meta device, with surgeries applied and methods bound, for checks.
        complete: whether the models of other runs are those that were trained. Only a complete plan can be materialised.
    """

    run: Run
    task: Task
    method: Method
    weights: dict[str, Schedule]
    teachers: Sequence[TeacherPlan]
    online: LearnerPlan | None
    students: Mapping[str, LearnerPlan]
    aids: Mapping[str, TeacherPlan]
    shapes: Models
    complete: bool


def plan_models(run: Run, task: Task, inputs: Callable[[Run], InputModels] = ExpectedModels) -> ModelPlan:
    """Plan the models of a run from its configuration, with every check that needs no weights.

    Args:
        run: the planned run.
        task: task whose labels name the outputs.
        inputs: how to find the models of other runs: `ExpectedModels` if these may not be trained yet, else `TrainedModels`.

    Raises:
        InputError: for models, teachers, methods or surgeries that do not fit each other.
    """
    spec, models_of_inputs = run.spec, inputs(run)
    torch.manual_seed(spec.seed)  # a method may draw numbers when it is instantiated
    probabilities = models_of_inputs.probabilities(task) if spec.pool.wrapper is not None else []
    method, weights = build_method(spec.method, spec.pool, spec.cohort, probabilities)
    check_teacher_count(run, method)
    teachers, online = plan_teachers(run, task, models_of_inputs), plan_online(run, task)
    teachers = [replace(teacher, kept=kept_by(run, teacher, task, models_of_inputs)) for teacher in teachers]
    aids = plan_aids(run, task, method, models_of_inputs)
    online_shape = None if online is None else online.plan.shape()
    aid_shapes = {name: aid.shape() for name, aid in aids.items()}
    shapes = Models({}, {}, [teacher.shape() for teacher in teachers], online_shape, weights, aid_shapes)
    cohort, students, sharing = students_of(spec), {}, HeadSharing(run.spec, task)
    for index, (name, student) in enumerate(cohort.items()):
        label = name if len(cohort) > 1 else "student"
        students[label] = learner = plan_learner(run, task, student, index, models_of_inputs)
        shapes.students[label] = surgery_shapes(run, learner.plan.shape())
        sharing.join(label, shapes.students[label])
        shapes.methods[label] = bind(run, task, method, shapes.students[label], shapes, backbone_of(spec, student)[1])
        if not models_of_inputs.trained and run.inputs.before is not None and shapes.methods[label].kept():
            with rename_error_keys(Role("before"), run.spec, run.config):
                first = plan_models(run.inputs.before, task).shapes.methods[label]
            inherit(run, shapes.methods[label], first.kept())
    sharing.check(shapes.students)
    check_one_vocabulary(task, shapes.students)
    complete = models_of_inputs.trained or len(run.inputs) == 0
    return ModelPlan(run, task, method, weights, teachers, online, students, aids, shapes, complete)


def kept_by(run: Run, teacher: TeacherPlan, task: Task, inputs: InputModels) -> Mapping[str, Tensor]:
    """Return what the method that trains a teacher keeps; on the meta device if the teacher is not trained yet."""
    needed = run.inputs.teachers.get(teacher.name)
    if needed is None or inputs.trained:
        return read_kept(teacher.source, teacher.key)
    if not build_method(needed.spec.method)[0].keeps:
        return {}
    with rename_error_keys(Role("teacher", teacher.name), run.spec, run.config):
        methods = plan_models(needed, task).shapes.methods
        return methods.get(needed.chosen or "", next(iter(methods.values()))).kept()


def materialise(plan: ModelPlan, texts: Sequence[tuple[str, ...]] = (), body: Models | None = None) -> BuiltModels:
    """Build the planned models: load weights, draw random ones, apply the surgeries and bind the methods.

    Args:
        plan: a plan with `TrainedModels`, or of a run that needs no other runs.
        texts: texts of the training examples, from which a surgery may learn a vocabulary.
        body: models of another task of the mixture, whose bodies the models share; None for bodies of their own.

    Raises:
        InputError: for weights that cannot be loaded, or a surgery that does not fit the student or the texts.
        ValueError: for a plan that is not complete.
    """
    if not plan.complete:
        raise ValueError("the plan describes models that are not trained yet: plan again with TrainedModels once they are")
    run = plan.run
    teachers = [teacher.materialise() for teacher in plan.teachers]
    aids = {name: aid.materialise() for name, aid in plan.aids.items()}
    models = BuiltModels({}, {}, teachers, materialise_online(plan), plan.weights, aids)
    if body is not None and models.online is not None and body.online is not None:
        models.online.share_body(body.online)
    words = FlatTexts(texts)
    sharing = HeadSharing(run.spec, plan.task)
    for name, learner in plan.students.items():
        student, changes = apply_surgeries(run, learner.materialise(), words)
        learner.plan.check_derived(student)
        if body is not None:
            student.share_body(body.students[name])
        changes += sharing.join(name, student)
        models.methods[name] = bind(run, plan.task, plan.method, student, models)
        inherit(
            run,
            models.methods[name],
            read_kept(str(run.init_run.student), "student.run") if run.inputs.init is not None else {},
        )
        # A surgery may have replaced the encoder.
        student.notes, student.asides = list(learner.plan.notes), list(learner.plan.asides)
        models.students[name] = student
        models.inits[name] = "; ".join([learner.init, *student.notes, *changes])
    for encoder in (*models.students.values(), *models.teaching, *(aid.shape for aid in aids.values())):
        encoder.compiled = run.spec.trainer.compile is True  # CUDA graphs are for steps alone: `kd.training.graphs`
    return models


def build_models(run: Run, task: Task, texts: Sequence[tuple[str, ...]] = (), body: Models | None = None) -> BuiltModels:
    """Plan and build the models of a run whose inputs are done; see `plan_models` and `materialise`.

    Raises:
        InputError: for models, teachers, methods or surgeries that do not fit each other.
    """
    return materialise(plan_models(run, task, TrainedModels), texts, body)


def check_teacher_count(run: Run, method: Method) -> None:
    """Check that a run has as many teachers as its method takes.

    Raises:
        InputError: if it has not.
    """
    names = teachers_of(run.spec)
    if method.teachers is not None and method.teachers != len(names):
        several = "; pool=stochastic and pool=wkd reduce several to one" if len(names) > 1 else ""
        raise InputError(
            f"method={run.spec.method['name']} takes {method.teachers} teacher(s), teacher={names} has {len(names)}{several}",
            "teacher",
        )


def plan_online(run: Run, task: Task) -> LearnerPlan | None:
    """Plan the teacher that is trained together with the students; None if teachers are frozen.

    Raises:
        InputError: for sizes or an initialisation that do not fit.
    """
    if run.spec.cohort.teacher != "online":
        return None
    ((name, teacher),) = run.spec.teacher.items()
    with rename_error_keys(Role("teacher", name), run.spec, run.config):
        spec = typed(teacher_config(run.config, run.spec, name, teacher))
        backbone, key = backbone_of(spec)
        initial = None if spec.student.init == "random" else backbone
        pairs = len(run.spec.task.text) > 1
        with prefix_student_errors():
            student = plan_student(
                spec.student, backbone, task.labels, initial, key=key, initial_key=key, pairs=pairs, start=task.start
            )
    return LearnerPlan(student, spec.seed)


def materialise_online(plan: ModelPlan) -> Encoder | None:
    """Build the teacher that is trained together with the students, with its initial weights; None if there is none.

    Raises:
        InputError: if the weights that it starts from cannot be loaded.
    """
    if plan.online is None:
        return None
    (name,) = plan.run.spec.teacher
    with rename_error_keys(Role("teacher", name), plan.run.spec, plan.run.config):
        return plan.online.materialise()


def plan_learner(run: Run, task: Task, spec: StudentSpec, index: int, inputs: InputModels) -> LearnerPlan:
    """Plan a student.

    Args:
        run: the run that trains it.
        task: task whose labels name the outputs.
        spec: its sizes and initialisation.
        index: its index in the cohort.
        inputs: models of the runs that the run needs.

    Raises:
        InputError: for sizes or an initialisation that do not fit.
    """
    backbone, key = backbone_of(run.spec, spec)
    initial, initial_key = initial_source(run, spec, inputs)
    with prefix_student_errors():
        plan = plan_student(
            spec,
            backbone,
            task.labels,
            initial,
            key=key,
            head=task.head,
            initial_key=initial_key,
            initial_labels=initial_labels(run, spec),
            pairs=len(run.spec.task.text) > 1,
            start=task.start,
            deepen=partial(config_after, run.spec),
        )
    if spec.init == "run":
        inputs.check_init(plan.config, spec, task)
    seed = run.spec.seed
    # A student's random weights depend only on the seed and its index in the cohort, not on its method or teachers.
    own_seed = seed if index == 0 else int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
    source = None if plan.copied is None else plan.copied.config
    record = run.init_run.result if spec.init == "run" else None
    origin = "" if record is None else f", begun from {record['init']}"
    if key == "cohort.students":
        origin += f", backbone {source_name(backbone)}"
    return LearnerPlan(plan, own_seed, describe_init(spec, plan.config, source) + origin)


def bind(
    run: Run, task: Task, method: Method, student: Encoder, models: Models, backbone_key: str = "student.backbone"
) -> Method:
    """Return a copy of a method that is bound to a student and the teachers; their vocabularies are checked.

    Args:
        run: the run.
        task: task whose labels name the outputs.
        method: the method that is copied.
        student: the student.
        models: the teachers and the aids.
        backbone_key: configuration key of the student's backbone, which an error about its vocabulary names.

    Raises:
        InputError: if the method cannot work with these models.
    """
    own = copy.deepcopy(method)
    teachers = models.teachers if models.online is None else [models.online]
    bind_method(own, run.spec.method, Bound(student, teachers, task, models.aids))  # type: ignore[arg-type]
    check_vocabularies(run, task, own, student, models.teaching, backbone_key)
    check_aid_vocabularies(run, student, models.aids)
    check_prefit(run, task, own, online=models.online is not None)
    return own


def check_one_vocabulary(task: Task, students: Mapping[str, Encoder]) -> None:
    """Check that students which are masked language models, and so read the same masked tokens, have one vocabulary.

    Raises:
        InputError: if they have several.
    """
    if not HEADS[task.head].labelled and len({tokenizer_fingerprint(student.tokenizer) for student in students.values()}) > 1:
        raise InputError(
            "masked language models that are trained together read the same masked tokens, and these have different "
            "vocabularies; give the students one backbone",
            "cohort.students",
        )


def inherit(run: Run, method: Method, state: Mapping[str, Tensor]) -> None:
    """Let a method take over what the method of the run that this one starts from kept, if that is anything.

    Raises:
        InputError: if that does not fit.
    """
    if not state:
        return
    try:
        method.inherit(state)
    except InputError as error:
        raise InputError(error.message, "method.before" if run.inputs.before else "student.run") from error


def check_prefit(run: Run, task: Task, method: Method, *, online: bool) -> None:
    """Check that a method which reads its teachers' outputs over all of train before training can do so.

    Raises:
        InputError: if its teacher is trained with the students, or examples have no labels.
    """
    if not method.prefits:
        return
    name = run.spec.method["name"]
    if online:
        raise InputError(
            f"method={name} reads its teacher's outputs over train before training; use cohort.teacher=frozen", "cohort.teacher"
        )
    if not HEADS[task.head].labelled:
        raise InputError(f"method={name} compares its teacher with the labels of examples, which text has not", "task")


def initial_source(run: Run, spec: StudentSpec, inputs: InputModels) -> tuple[str | None, str]:
    """Return the source of a student's initial weights, None for random ones, and the key that sets it.

    Raises:
        InputError: for an unknown `student.init_from`, or `student.init_from=teacher` without a teacher.
    """
    if spec.init == "random":
        return None, "student.init"
    if spec.init == "checkpoint":
        return spec.checkpoint, "student.checkpoint"
    if spec.init == "run":
        return inputs.init_weights(), "student.run"
    if spec.init_from not in INIT_FROM:
        raise one_of(spec.init_from, INIT_FROM, "student.init_from")
    if spec.init_from != "teacher":
        return backbone_of(run.spec, spec)
    if not run.spec.teacher:
        raise InputError("student.init_from=teacher needs a teacher, teacher=[] has none", "student.init_from")
    name = teachers_of(run.spec)[0]
    teacher = run.spec.teacher[name]
    key = f"teacher.{name}.{'backbone' if teacher.model is None else 'model'}"
    if name not in run.inputs.teachers:
        return teacher.model or teacher.backbone, key  # the backbone is the start of a teacher that is trained online
    return inputs.teacher_weights(name), key


def initial_labels(run: Run, spec: StudentSpec) -> list[str] | None:
    """Return `teacher.<name>.labels` of the classifier that a student starts from; None if it starts from another source."""
    if not spec.copies_layers or spec.init_from != "teacher" or not run.spec.teacher:
        return None
    teacher = run.spec.teacher[teachers_of(run.spec)[0]]
    return None if teacher.model is None else teacher.labels
