"""Building of models, data and engine from a planned run, and the checks that need no training."""

import copy
import functools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch

from kd.build.instantiate import bind_method, build_method
from kd.build.surgeries import apply_surgeries, check_vocabularies
from kd.config.cohort import students_of
from kd.config.compose import typed
from kd.config.pool import teachers_of
from kd.config.schema import StudentSpec, TeacherSpec
from kd.data.labels import label_text
from kd.data.tasks import Task, higher_is_better
from kd.engines.models import Models
from kd.errors import InputError, one_of, prefix_error_keys
from kd.functional.policy import best, rank_probabilities
from kd.models import Encoder, FrozenTeacher
from kd.models.heads import HEADS
from kd.models.pretrained import (
    check_head,
    check_tokenizer,
    check_weights,
    label_names,
    load_config,
    load_model,
    load_tokenizer,
)
from kd.models.students import (
    INIT_FROM,
    build_student,
    check_copy,
    describe_init,
    new_model,
    student_config,
    with_labels,
)
from kd.models.teachers import match_labels
from kd.runs.error_keys import rename_error_keys
from kd.runs.identity import backbone_of
from kd.runs.inputs import teacher_config, teacher_source
from kd.runs.run import Role, Run
from kd.teacher_cache.cache import CacheUnused, CacheUsed


@dataclass(frozen=True)
class BuiltModels(Models):
    """Models of a run, and what its record says of them.

    Attributes:
        inits: name of the student -> description of its initial weights.
        caches: name of the teacher -> the entry of the record about its cache, once the data is built.
    """

    inits: dict[str, str]
    caches: dict[str, CacheUsed | CacheUnused] = field(default_factory=dict)


def teacher_probabilities(run: Run, task: Task, meta: bool) -> list[float]:
    """Return the probability, or weight, of each teacher of a pool; equal ones if `meta`, when pilots may not have run yet."""
    pool, names = run.spec.pool, list(run.spec.teacher)
    if isinstance(pool.distribution, list):
        return [
            float(value) / sum(pool.distribution) for value in pool.distribution
        ]  # numpy requires a sum of 1 up to rounding
    if meta or pool.distribution == "uniform":
        return [1 / len(names)] * len(names)
    higher = higher_is_better(task.monitor)
    scores, worst = [], -math.inf if higher else math.inf
    for name in names:
        record = run.inputs.pilots[name].result
        assert record is not None  # inputs are done before a run is built
        score = record["metrics"]["validation"][task.monitor]
        scores.append(worst if score is None else float(score))
    if pool.distribution == "best":
        return best(scores, higher_is_better=higher)
    return rank_probabilities(scores, higher_is_better=higher, sharpness=pool.sharpness)


def build_teachers(run: Run, task: Task, meta: bool) -> list[FrozenTeacher]:
    """Return the frozen teachers, their labels matched by name. Their weights are loaded when they are first needed.

    Args:
        run: the run that they teach.
        task: task whose labels they must have.
        meta: build shapes only.

    Raises:
        InputError: for labels that do not match, or weights that cannot be read.
    """
    teachers = []
    for name in [] if run.spec.cohort.teacher == "online" else teachers_of(run.spec):
        spec = run.spec.teacher[name]
        teacher_run = run.inputs.teachers.get(name)
        head, columns = HEADS[task.head], None
        source, key = teacher_source(run, name)
        if teacher_run is None:
            config = load_config(source, key)
            if not head.is_in(config):
                architectures = ", ".join(config.architectures or ())
                raise InputError(
                    f"'{spec.model}' has no head for this task: its architecture is {architectures}, not ...{head.suffix}", key
                )
            if head.labelled:
                columns = teacher_columns(task, teacher_labels(config, spec, name), f"teacher.{name}.labels")
                check_outputs(config, task, spec.model, key)
        elif meta:  # it may not be trained yet: use the shape that it will have
            with rename_error_keys(Role("teacher", name), run.spec, run.config), prefix_student_errors():
                config = student_config(
                    teacher_run.spec.student, backbone_of(teacher_run.spec)[0], task.labels, "student.backbone", task.head
                )
            source = backbone_of(teacher_run.spec)[0]
        else:
            config = with_labels(load_config(source, key), task.labels, task.head)
        check_head(config, task.head, key)
        tokenizer = load_tokenizer(source, key)
        check_tokenizer(tokenizer, config, key, task.head, pairs=len(run.spec.task.text) > 1)
        shape = Encoder(new_model(config, task.head, meta=True), tokenizer)
        if teacher_run is None:
            # If its outputs are cached, its weights are never loaded; otherwise `load_model` checks their values. They are
            # checked here only if another run has to be trained first.
            values = meta and any(needed.result is None for _, needed in run.inputs)
            weights = check_weights(source, key, config, task.head, head_needed=True, values=values)
            shape.notes, shape.asides = list(weights.notes), list(weights.asides)
        load = None if meta else functools.partial(load_model, source, key, config, task.head, head_needed=True)
        teachers.append(FrozenTeacher(shape, name, columns, load))
    return teachers


def prefix_student_errors() -> AbstractContextManager[None]:
    """Let errors about a `StudentSpec` name the keys of its fields; see `kd.errors.prefix_error_keys`.

    The key of the backbone, which may be `backbone`, is an argument of the functions that read it.
    """
    return prefix_error_keys("student", [part.name for part in fields(StudentSpec) if part.name != "backbone"])


def build_online(run: Run, task: Task, meta: bool) -> Encoder | None:
    """Return the teacher that is trained together with the students, with its initial weights; None if teachers are frozen."""
    if run.spec.cohort.teacher != "online":
        return None
    ((name, teacher),) = run.spec.teacher.items()
    with rename_error_keys(Role("teacher", name), run.spec, run.config):
        spec = typed(teacher_config(run.config, run.spec, name, teacher))
        backbone, key = backbone_of(spec)
        torch.manual_seed(spec.seed)
        initial = None if spec.student.init == "random" else backbone
        pairs = len(run.spec.task.text) > 1
        with prefix_student_errors():
            return build_student(
                spec.student, backbone, task.labels, initial, meta, key, initial_key=key, pairs=pairs, start=task.start
            )


def teacher_labels(config: Any, spec: TeacherSpec, name: str) -> list[str]:
    """Return the names of a ready classifier's outputs: `teacher.<name>.labels`, else those of its configuration.

    Raises:
        InputError: for a list of another length than the outputs, or a configuration that does not name each output.
    """
    key = f"teacher.{name}.labels"
    if not spec.labels:
        return label_names(config, key)
    names = [label_text(name) for name in spec.labels]
    if len(names) != config.num_labels or len(set(names)) < len(names):
        raise InputError(f"{key}={list(spec.labels)} must name each of the {config.num_labels} outputs of '{spec.model}'", key)
    return names


def check_outputs(config: Any, task: Task, model: str | None, key: str) -> None:
    """Check that a ready classifier was trained for the problem type of the task, if its configuration states one.

    Raises:
        InputError: if its `problem_type` is another.
    """
    wanted = "regression" if task.labels is None else "single_label_classification"
    if config.problem_type not in (None, wanted):
        raise InputError(f"the task is a {wanted.replace('_', ' ')}; '{model}' says problem_type={config.problem_type}", key)


def teacher_columns(task: Task, labels: list[str], key: str) -> list[int] | None:
    """Return the columns of a ready classifier's logits in the order of the task's labels; None for regression.

    Raises:
        InputError: if the labels do not match, or the task is a regression and the teacher has several outputs.
    """
    if task.labels is not None:
        return match_labels(task.labels, labels, key)
    if len(labels) != 1:
        raise InputError(f"the task is a regression, the teacher has {len(labels)} outputs: {labels}", key)
    return None


def build_models(run: Run, task: Task, meta: bool = False, texts: Sequence[tuple[str, ...]] = ()) -> BuiltModels:
    """Build students, teachers and methods, and bind the methods.

    Args:
        run: the planned run.
        task: task whose labels name the outputs.
        meta: build shapes only, to check a configuration before anything is loaded or trained.
        texts: texts of the training examples, from which a surgery may learn a vocabulary.

    Raises:
        InputError: for models, teachers, methods or surgeries that do not fit each other.
    """
    spec = run.spec
    torch.manual_seed(spec.seed)
    probabilities = teacher_probabilities(run, task, meta) if spec.pool.wrapper is not None else []
    method, weights = build_method(spec.method, spec.pool, spec.cohort, probabilities)
    names = teachers_of(spec)
    if method.teachers is not None and method.teachers != len(names):
        several = "; pool=stochastic and pool=wkd reduce several to one" if len(names) > 1 else ""
        raise InputError(
            f"method={spec.method['name']} takes {method.teachers} teacher(s), teacher={names} has {len(names)}{several}",
            "teacher",
        )
    teachers, online = build_teachers(run, task, meta), build_online(run, task, meta)
    backbone, key = backbone_of(spec)
    cohort = students_of(spec)
    models = BuiltModels({}, {}, teachers, online, weights, {})
    for index, (name, student_spec) in enumerate(cohort.items()):
        # A student's random weights depend only on the seed and its index in the cohort, not on its method or teachers.
        torch.manual_seed(spec.seed if index == 0 else int(np.random.SeedSequence([spec.seed, index]).generate_state(1)[0]))
        initial, initial_key = initial_source(run, student_spec, meta)
        with prefix_student_errors():
            student = build_student(
                student_spec,
                backbone,
                task.labels,
                initial,
                meta,
                key,
                task.head,
                initial_key,
                initial_labels(run, student_spec),
                len(spec.task.text) > 1,
                task.start,
            )
        notes, asides = student.notes, student.asides
        student, changes = apply_surgeries(run, student, None if meta else flat(texts) if spec.surgery else [])
        own = copy.deepcopy(method)
        bind_method(own, spec.method, student, teachers if online is None else [online])  # type: ignore[list-item]
        check_vocabularies(run, task, own, student, models.teaching)
        if meta and student_spec.init == "run":  # its stage may not be trained yet: use the shape that it will have
            stage, stage_key = run.init_run.spec, "student.run" if run.inputs.stage else "method.before"
            with prefix_student_errors():
                stage_shape = student_config(stage.student, backbone_of(stage)[0], task.labels, stage_key, task.head)
                check_copy(student.config, stage_shape, student_spec, stage_key)
        student.notes, student.asides = notes, asides  # a surgery may have replaced the encoder
        depth = load_config(initial, initial_key).num_hidden_layers if initial is not None else None
        label = name if len(cohort) > 1 else "student"
        models.students[label], models.methods[label] = student, own
        stage_record = run.init_run.result if student_spec.init == "run" else None
        origin = "" if stage_record is None else f", begun from {stage_record['init']}"
        start = describe_init(student_spec, student.depth, depth) + origin
        models.inits[label] = "; ".join([start, *notes, *changes])
    for encoder in (*models.students.values(), *models.teaching):
        encoder.compiled = spec.trainer.compile and not meta
    return models


def initial_source(run: Run, spec: StudentSpec, meta: bool) -> tuple[str | None, str]:
    """Return the source of a student's initial weights, None for random ones, and the key that sets it.

    Raises:
        InputError: for an unknown `student.init_from`, or `student.init_from=teacher` without a teacher.
    """
    if spec.init == "random":
        return None, "student.init"
    if spec.init == "checkpoint":
        return spec.checkpoint, "student.checkpoint"
    if spec.init == "run":
        return None if meta else str(run.init_run.student), "student.run"  # its shape is checked once it is trained
    if spec.init_from not in INIT_FROM:
        raise one_of(spec.init_from, INIT_FROM, "student.init_from")
    if spec.init_from == "pretrained":
        return backbone_of(run.spec)
    if not run.spec.teacher:
        raise InputError("student.init_from=teacher needs a teacher, teacher=[] has none", "student.init_from")
    name = teachers_of(run.spec)[0]
    teacher, teacher_run = run.spec.teacher[name], run.inputs.teachers.get(name)
    key = f"teacher.{name}.{'backbone' if teacher.model is None else 'model'}"
    if teacher_run is None:
        return teacher.model or teacher.backbone, key  # the backbone is the start of a teacher that is trained online
    return (teacher.backbone if meta else str(teacher_run.student)), key


def initial_labels(run: Run, spec: StudentSpec) -> list[str] | None:
    """Return `teacher.<name>.labels` of the classifier that a student starts from; None if it starts from another source."""
    if spec.init in ("random", "checkpoint", "run") or spec.init_from != "teacher" or not run.spec.teacher:
        return None
    teacher = run.spec.teacher[teachers_of(run.spec)[0]]
    return None if teacher.model is None else teacher.labels


def flat(texts: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the texts of all examples in one list."""
    return [text for pair in texts for text in pair]
