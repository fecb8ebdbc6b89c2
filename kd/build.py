"""Building of models, data and engine from a planned run, and the checks that need no training."""

import copy
import functools
import math
import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kd import distributed
from kd.caching import cached_or_live
from kd.cohorts import students_of
from kd.config import typed
from kd.data.datamodule import Examples, KDDataModule, load_examples
from kd.data.labels import label_text
from kd.data.tasks import Task, higher_is_better
from kd.data.text import MaskedLMDataModule
from kd.engines.base import Engine
from kd.errors import InputError, one_of
from kd.functional.policy import best, rank_probabilities
from kd.make import arguments_of, build_method, build_optimizer, logger_maker
from kd.methods.base import Method, needs_of_teachers
from kd.models import Encoder, FrozenTeacher
from kd.models.compiled import check_compiler
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
from kd.planning import backbone_of, rename_error_keys, source_of, teacher_config, teacher_source
from kd.pools import teachers_of
from kd.runs import Run, digest_of
from kd.schedules import Schedule
from kd.schema import RunSpec, StudentSpec, TeacherSpec
from kd.surgeries import apply_surgeries, check_vocabularies, surgeries
from kd.values import locate, one_line, subclass_of

DATA: Mapping[str, type[KDDataModule]] = {"classifier": KDDataModule, "masked_lm": MaskedLMDataModule}
"""Head of `kd.models.heads.HEADS` -> the data module of its tasks."""


@dataclass
class Models:
    """Students with their methods, and the teachers.

    Attributes:
        students: name -> student; a single student is named `student`.
        methods: name of the student -> its method, bound.
        teachers: the frozen teachers.
        online: a teacher that is trained together with the students; None if there is none.
        weights: term -> schedule of its weight.
        inits: name of the student -> description of its initial weights.
        caches: name of the teacher -> the entry of the record about its cache: whether it is cached, and the time that took.
    """

    students: dict[str, Encoder]
    methods: dict[str, Method]
    teachers: list[FrozenTeacher]
    online: Encoder | None
    weights: dict[str, Schedule]
    inits: dict[str, str]
    caches: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def student(self) -> Encoder:
        """First student."""
        return next(iter(self.students.values()))

    @property
    def teaching(self) -> list[Encoder]:
        """Models of all teachers, possibly without weights, in the order of `Batch.teachers`."""
        return [teacher.shape for teacher in self.teachers] + ([] if self.online is None else [self.online])


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
        record = run.inputs[f"pilot {name}"].result
        assert record is not None  # inputs are done before a run is built
        score = record["metrics"]["validation"][task.monitor]
        scores.append(worst if score is None else float(score))
    return best(scores, higher) if pool.distribution == "best" else rank_probabilities(scores, higher, pool.sharpness)


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
        teacher_run = run.inputs.get(f"teacher {name}")
        head, columns = HEADS[task.head], None
        source, key = teacher_source(run, name)
        if teacher_run is None:
            config = load_config(source, key)
            if not head.is_in(config):
                architectures = ", ".join(config.architectures)
                raise InputError(
                    f"'{spec.model}' has no head for this task: its architecture is {architectures}, not ...{head.suffix}", key
                )
            if head.labelled:
                columns = teacher_columns(task, teacher_labels(config, spec, name), f"teacher.{name}.labels")
                check_outputs(config, task, spec.model, key)
        elif meta:  # it may not be trained yet: use the shape that it will have
            with rename_error_keys(f"teacher {name}", run.spec, run.config):
                config = student_config(
                    teacher_run.spec.student, backbone_of(teacher_run.spec)[0], task.labels, "student.backbone", task.head
                )
            source = backbone_of(teacher_run.spec)[0]
        else:
            config = with_labels(load_config(source, key), task.labels, task.head)
        check_head(config, task.head, key)
        tokenizer = load_tokenizer(source, key)
        check_tokenizer(tokenizer, config, key, task.head, len(run.spec.task.text) > 1)
        shape = Encoder(new_model(config, task.head, meta=True), tokenizer)
        if teacher_run is None:
            # If its outputs are cached, its weights are never loaded; otherwise `load_model` checks their values. They are
            # checked here only if another run has to be trained first.
            values = meta and any(needed.result is None for needed in run.inputs.values())
            weights = check_weights(source, key, config, task.head, head_needed=True, values=values)
            shape.notes, shape.asides = list(weights.notes), list(weights.asides)
        load = None if meta else functools.partial(load_model, source, key, config, task.head, head_needed=True)
        teachers.append(FrozenTeacher(shape, name, columns, load))
    return teachers


def build_online(run: Run, task: Task, meta: bool) -> Encoder | None:
    """Return the teacher that is trained together with the students, with its initial weights; None if teachers are frozen."""
    if run.spec.cohort.teacher != "online":
        return None
    ((name, teacher),) = run.spec.teacher.items()
    with rename_error_keys(f"teacher {name}", run.spec, run.config):
        spec = typed(teacher_config(run.config, run.spec, name, teacher))
        backbone, key = backbone_of(spec)
        torch.manual_seed(spec.seed)
        initial = None if spec.student.init == "random" else backbone
        pairs = len(run.spec.task.text) > 1
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


def build_models(run: Run, task: Task, meta: bool = False, texts: Sequence[tuple[str, ...]] = ()) -> Models:
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
    models = Models({}, {}, teachers, online, weights, {})
    for index, (name, student_spec) in enumerate(cohort.items()):
        # A student's random weights depend only on the seed and its index in the cohort, not on its method or teachers.
        torch.manual_seed(spec.seed if index == 0 else int(np.random.SeedSequence([spec.seed, index]).generate_state(1)[0]))
        initial, initial_key = initial_source(run, student_spec, meta)
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
        own.bind(student, teachers if online is None else [online])  # type: ignore[list-item]
        check_vocabularies(run, task, own, student, models.teaching)
        if meta and student_spec.init == "run":  # its stage may not be trained yet: use the shape that it will have
            stage, stage_key = run.init_run.spec, "student.run" if "stage" in run.inputs else "method.before"
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
    teacher, teacher_run = run.spec.teacher[name], run.inputs.get(f"teacher {name}")
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


_examples: weakref.WeakValueDictionary[str, Examples] = weakref.WeakValueDictionary()
"""Digest of task and data -> examples in use: a run and the runs that train its teachers share them."""


def build_examples(run: Run) -> Examples:
    """Read and check the task's texts and labels; runs of this process that need the same ones at the same time share them."""
    digest = digest_of({part: run.digest_inputs[part] for part in ("task", "data")})
    examples = _examples.get(digest)
    if examples is None:
        examples = _examples[digest] = load_examples(run.spec.task, source_of(run.spec))
    return examples


def flat(texts: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the texts of all examples in one list."""
    return [text for pair in texts for text in pair]


def build_data(run: Run, examples: Examples, models: Models) -> KDDataModule:
    """Return the data module, and replace teachers that can be cached in `models.teachers` by their caches."""
    spec = run.spec
    data = DATA[examples.task.head](
        examples,
        [student.tokenizer for student in models.students.values()],
        [teacher.tokenizer for teacher in models.teaching],
        batch_size=spec.trainer.batch_size,
        eval_batch_size=spec.trainer.eval_batch_size,
        max_length=checked_length(spec, models),
        seed=spec.seed,
        workers=spec.trainer.num_workers,
        rank=distributed.rank(),
        world=distributed.world(),
        pad_multiple=spec.trainer.pad_multiple,
        batch_tokens=spec.trainer.batch_tokens,
        store=Path(spec.paths.runs).expanduser() / ".tokens",
        accumulate=spec.trainer.accumulate,
    )
    taught = [method for method in models.methods.values() if method.uses_teachers]
    wanted = needs_of_teachers(taught, len(models.teachers))
    for index, (teacher, needs) in enumerate(zip(models.teachers, wanted, strict=True)):
        replaced = cached_or_live(run, data, index, teacher, needs if taught else None)
        models.teachers[index], models.caches[teacher.name] = replaced
    return data


def checked_length(spec: RunSpec, models: Models) -> int:
    """Return `task.max_length` after a check that every model has that many positions.

    Raises:
        InputError: if a model has fewer, or the length is less than 3.
    """
    for encoder in (*models.students.values(), *models.teaching):
        # RoBERTa and MPNet number positions from the padding index plus one.
        table: Any = encoder.base.get_submodule("embeddings.position_embeddings")
        room = encoder.config.max_position_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
        if not 2 < spec.task.max_length <= room:
            raise InputError(
                f"task.max_length={spec.task.max_length} must be from 3 to {room}, the positions of the model",
                "task.max_length",
            )
    return spec.task.max_length


def build_engine(run: Run, models: Models, task: Task) -> Engine:
    """Return the LightningModule that trains the run.

    Raises:
        InputError: for an engine that does not fit the students, or does not support a key of the trainer.
    """
    trainer = run.spec.trainer
    given: dict[str, Any] = {
        "students": models.students,
        "methods": models.methods,
        "teachers": models.teachers,
        "online": models.online,
        "task": task,
        "weights": models.weights,
        "optimizer": build_optimizer(run.spec),
        "seed": run.spec.seed,
        "clip": trainer.clip,
    }
    if reserved := [name for name in run.spec.engine if name in given]:
        raise InputError(f"engine.{reserved[0]} follows from the rest of the configuration", f"engine.{reserved[0]}")
    target = locate(run.spec.engine, "engine", subclass_of(Engine), "an engine: a class of kd.engines.base.Engine")
    options = arguments_of(target, run.spec.engine, "engine")
    try:
        engine: Engine = target(**given, **options)
    except TypeError as error:
        raise InputError(f"the engine cannot be instantiated: {error}", "engine") from error
    if not engine.automatic_optimization:  # it calls the optimiser itself after every batch
        if trainer.accumulate > 1:
            raise InputError("this engine does not accumulate gradients; use trainer.accumulate=1", "trainer.accumulate")
        if trainer.precision == "16-mixed":
            raise InputError("this engine has no gradient scaler; use trainer.precision=bf16-mixed", "trainer.precision")
    return engine


def check_optimizer_steps(spec: RunSpec) -> None:
    """Check the optimiser by a step on a temporary layer, on the device of the training.

    The device matters because some optimisers need a GPU. If the GPU of the configuration is missing, the check is skipped:
    `check_machine` reports that.

    Raises:
        InputError: for arguments that the optimiser does not accept, or that result in weights that are not finite.
    """
    key, factory = "optimizer.factory", build_optimizer(spec)
    gpu = spec.trainer.accelerator != "cpu" and torch.cuda.is_available()
    if spec.trainer.accelerator == "gpu" and not gpu:
        return
    layer = torch.nn.Linear(2, 2, device=torch.device("cuda", distributed.local_rank()) if gpu else "cpu")
    try:
        optimizer = factory.optimizer(layer)
        layer(torch.ones_like(layer.weight)).sum().backward()
        optimizer.step()
    except InputError:
        raise
    except Exception as error:  # torch raises many different exceptions for invalid arguments
        raise InputError(f"the optimiser does not work: {one_line(error)}", key) from error
    if not all(parameter.isfinite().all() for parameter in layer.parameters()):
        raise InputError("a step of the optimiser results in weights that are not finite", key)


def check_memory(spec: RunSpec, models: Models) -> None:
    """Check that weights and gradients in float32, the least that training needs, fit into the memory of the machine.

    Raises:
        InputError: if they do not fit. Other memory of training, such as the optimiser's state, is not counted.
    """
    count = sum(student.parameter_count() for student in models.students.values())
    if spec.trainer.accelerator == "gpu" and torch.cuda.is_available():
        memory, whose = torch.cuda.get_device_properties(0).total_memory, "accelerator"
    elif hasattr(os, "sysconf"):
        memory, whose = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "machine"
    else:
        return
    if 8 * count > memory:
        sizes = [name for name in ("width", "intermediate", "layers") if getattr(spec.student, name) is not None]
        key = "cohort.students" if len(models.students) > 1 else f"student.{sizes[0]}" if sizes else "student"
        raise InputError(
            f"{count:,} parameters take {8 * count / 1e9:,.0f} GB for weights and gradients alone, and the {whose} has "
            f"{memory / 1e9:,.0f}; use a smaller student",
            key,
        )


def check_machine(spec: RunSpec) -> None:
    """Check that this machine supports the accelerator and the precision of a configuration.

    Raises:
        InputError: if there is no GPU, and the accelerator or the precision needs one.
    """
    has_gpu = torch.cuda.is_available()
    if spec.trainer.accelerator == "gpu" and not has_gpu:
        raise InputError("torch finds no usable GPU on this machine; use trainer=cpu", "trainer")
    if spec.trainer.precision == "16-mixed" and (spec.trainer.accelerator == "cpu" or not has_gpu):
        raise InputError(  # Lightning would train in bf16 and the record would not say so
            "trainer.precision=16-mixed needs a GPU; on a CPU use 32-true or bf16-mixed", "trainer.precision"
        )


def check_arguments(run: Run) -> None:
    """Check all that needs neither data nor models: methods, schedules, surgeries, optimisers, loggers of a run and its inputs.

    Raises:
        InputError: for an invalid argument; its key is named.
    """
    spec = run.spec
    check_machine(spec)  # first, because other errors do not matter on a machine that cannot run this
    probabilities = [1 / max(len(spec.teacher), 1)] * len(spec.teacher)
    build_method(spec.method, spec.pool, spec.cohort, probabilities)
    surgeries(spec)
    locate(spec.engine, "engine", subclass_of(Engine), "an engine: a class of kd.engines.base.Engine")
    check_optimizer_steps(spec)
    if spec.logger.extra:
        logger_maker(spec)
    for role, needed in run.inputs.items():
        if needed.result is None:
            with rename_error_keys(role, run.spec, run.config):
                check_arguments(needed)


def check_run(run: Run, examples: Examples) -> None:
    """Build a run with shapes in place of weights, to find errors before anything is trained.

    Raises:
        InputError: for parts of the run that do not fit each other, or the machine.
    """
    check_machine(run.spec)
    for role, needed in run.inputs.items():
        if role.startswith("pilot "):  # all pilots hold out the same examples
            with rename_error_keys(role, run.spec, run.config):
                build_examples(needed)
            break
    models = build_models(run, examples.task, meta=True)
    checked_length(run.spec, models)
    for surgery in surgeries(run.spec).values():
        if hasattr(surgery, "dry_run"):
            surgery.dry_run(models.student.tokenizer, flat(examples.texts["train"]))
    check_memory(run.spec, models)
    build_engine(run, models, examples.task)
    if run.spec.trainer.compile:
        check_compiler("cuda" if run.spec.trainer.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
