"""A planned run to its models, data and engine, with whatever can be checked before they are trained."""

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
from kd.loggers import check_logger
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
"""What makes batches for a head of `kd.models.heads.HEADS`."""


@dataclass
class Models:
    """Students with their methods, and the teachers.

    Attributes:
        students: name -> student; `student` where there is one alone.
        methods: name -> its method, bound.
        teachers: frozen.
        online: a teacher that is trained with the students.
        weights: term -> schedule.
        inits: name -> where the student starts from, in words.
        caches: teacher -> whether it is cached, and what that took, as a record states it.
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
        """The first student."""
        return next(iter(self.students.values()))

    @property
    def teaching(self) -> list[Encoder]:
        """Every teacher's model, perhaps without weights, in the order of `Batch.teachers`."""
        return [teacher.shape for teacher in self.teachers] + ([] if self.online is None else [self.online])


def teacher_probabilities(run: Run, task: Task, meta: bool) -> list[float]:
    """The probability, or weight, of each teacher of a pool; even ones where pilots decide that have not run yet."""
    pool, names = run.spec.pool, list(run.spec.teacher)
    if isinstance(pool.distribution, list):
        return [float(value) / sum(pool.distribution) for value in pool.distribution]  # to the last bit, as numpy wants it
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
    """The frozen teachers, labels matched by name. Their weights are read when they are first looked at.

    Args:
        run: the run they serve.
        task: whose labels they must have.
        meta: shapes only.

    Raises:
        InputError: for labels that do not match, or weights that cannot be had.
    """
    teachers = []
    for name in [] if run.spec.cohort.teacher == "online" else teachers_of(run.spec):
        spec = run.spec.teacher[name]
        made = run.inputs.get(f"teacher {name}")
        head, columns = HEADS[task.head], None
        source, key = teacher_source(run, name)
        if made is None:
            config = load_config(source, key)
            if not head.is_in(config):
                found = ", ".join(config.architectures)
                raise InputError(f"'{spec.model}' has no head for this task: it is {found}, not ...{head.suffix}", key)
            if head.labelled:
                columns = teacher_columns(task, teacher_labels(config, spec, name), f"teacher.{name}.labels")
                check_outputs(config, task, spec.model, key)
        elif meta:  # it has yet to be made: the shape that it will have
            with rename_error_keys(f"teacher {name}", run.spec, run.config):
                config = student_config(
                    made.spec.student, backbone_of(made.spec)[0], task.labels, "student.backbone", task.head
                )
            source = backbone_of(made.spec)[0]
        else:
            config = with_labels(load_config(source, key), task.labels, task.head)
        check_head(config, task.head, key)
        tokenizer = load_tokenizer(source, key)
        check_tokenizer(tokenizer, config, key, task.head, len(run.spec.task.text) > 1)
        shape = Encoder(new_model(config, task.head, meta=True), tokenizer)
        if made is None:
            # Its weights may never be needed, where a cache has its outputs; `load_model` looks at what they hold. Only before
            # something else is trained for this run is that looked at now.
            values = meta and any(needed.result is None for needed in run.inputs.values())
            weights = check_weights(source, key, config, task.head, head_needed=True, values=values)
            shape.notes, shape.asides = list(weights.notes), list(weights.asides)
        load = None if meta else functools.partial(load_model, source, key, config, task.head, head_needed=True)
        teachers.append(FrozenTeacher(shape, name, columns, load))
    return teachers


def build_online(run: Run, task: Task, meta: bool) -> Encoder | None:
    """The teacher that is trained with its students: its run's student before any training; None where teachers are frozen."""
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
    """Names of a ready teacher's outputs: those listed for it, else its configuration's.

    Raises:
        InputError: for a list of another length than the outputs, or a configuration that does not say which is which.
    """
    key = f"teacher.{name}.labels"
    if not spec.labels:
        return label_names(config, key)
    names = [label_text(name) for name in spec.labels]
    if len(names) != config.num_labels or len(set(names)) < len(names):
        raise InputError(f"{key}={list(spec.labels)} must name each of the {config.num_labels} outputs of '{spec.model}'", key)
    return names


def check_outputs(config: Any, task: Task, model: str | None, key: str) -> None:
    """Check that the outputs of a ready teacher mean what the task takes them for.

    Raises:
        InputError: if its configuration says that they mean something else.
    """
    wanted = "regression" if task.labels is None else "single_label_classification"
    if config.problem_type not in (None, wanted):
        raise InputError(f"the task is a {wanted.replace('_', ' ')}; '{model}' says problem_type={config.problem_type}", key)


def teacher_columns(task: Task, labels: list[str], key: str) -> list[int] | None:
    """Columns of a ready teacher's logits in the task's order; None for regression."""
    if task.labels is not None:
        return match_labels(task.labels, labels, key)
    if len(labels) != 1:
        raise InputError(f"the task is a regression, the teacher has {len(labels)} outputs: {labels}", key)
    return None


def build_models(run: Run, task: Task, meta: bool = False, texts: Sequence[tuple[str, ...]] = ()) -> Models:
    """Students, teachers and methods, bound.

    Args:
        run: what to build.
        task: its labels name the outputs.
        meta: shapes only; checks a configuration before anything is loaded or trained.
        texts: of the training examples; what a surgery learns a vocabulary from.

    Raises:
        InputError: for whatever does not fit.
    """
    spec = run.spec
    torch.manual_seed(spec.seed)
    chances = teacher_probabilities(run, task, meta) if spec.pool.wrapper is not None else []
    method, weights = build_method(spec.method, spec.pool, spec.cohort, chances)
    seen = teachers_of(spec)
    if method.teachers is not None and method.teachers != len(seen):
        several = "; pool=stochastic and pool=wkd make one of several" if len(seen) > 1 else ""
        raise InputError(
            f"method={spec.method['name']} takes {method.teachers} teacher(s), teacher={seen} has {len(seen)}{several}",
            "teacher",
        )
    teachers, online = build_teachers(run, task, meta), build_online(run, task, meta)
    backbone, key = backbone_of(spec)
    cohort = students_of(spec)
    models = Models({}, {}, teachers, online, weights, {})
    for index, (name, student_spec) in enumerate(cohort.items()):
        # A student's fresh weights depend on the seed and its place alone, not on its method or teachers.
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
        student, done = apply_surgeries(run, student, None if meta else flat(texts) if spec.surgery else [])
        own = copy.deepcopy(method)
        own.bind(student, teachers if online is None else [online])  # type: ignore[list-item]
        check_vocabularies(run, task, own, student, models.teaching)
        if meta and student_spec.init == "run":  # it has yet to be made: the shape that it will have
            stage, key_of_it = run.init_run.spec, "student.run" if "stage" in run.inputs else "method.before"
            found = student_config(stage.student, backbone_of(stage)[0], task.labels, key_of_it, task.head)
            check_copy(student.config, found, student_spec, key_of_it)
        student.notes, student.asides = notes, asides  # a surgery may have put it into another encoder
        depth = load_config(initial, initial_key).num_hidden_layers if initial is not None else None
        label = name if len(cohort) > 1 else "student"
        models.students[label], models.methods[label] = student, own
        began = run.init_run.result if student_spec.init == "run" else None
        start = describe_init(student_spec, student.depth, depth) + ("" if began is None else f", begun from {began['init']}")
        models.inits[label] = "; ".join([start, *notes, *done])
    for encoder in (*models.students.values(), *models.teaching):
        encoder.compiled = spec.trainer.compile and not meta
    return models


def initial_source(run: Run, spec: StudentSpec, meta: bool) -> tuple[str | None, str]:
    """Where a student's weights come from, None for random, and the key that says so.

    Raises:
        InputError: for an unknown `student.init_from`, or a fine-tuned teacher where there is none.
    """
    if spec.init == "random":
        return None, "student.init"
    if spec.init == "checkpoint":
        return spec.checkpoint, "student.checkpoint"
    if spec.init == "run":
        return None if meta else str(run.init_run.student), "student.run"  # its shape is checked when it is there
    if spec.init_from not in INIT_FROM:
        raise one_of(spec.init_from, INIT_FROM, "student.init_from")
    if spec.init_from == "pretrained":
        return backbone_of(run.spec)
    if not run.spec.teacher:
        raise InputError("student.init_from=teacher needs a teacher, teacher=[] has none", "student.init_from")
    name = teachers_of(run.spec)[0]
    teacher, made = run.spec.teacher[name], run.inputs.get(f"teacher {name}")
    key = f"teacher.{name}.{'backbone' if teacher.model is None else 'model'}"
    if made is None:
        return teacher.model or teacher.backbone, key  # of one that is trained online the weights it begins from
    return (teacher.backbone if meta else str(made.student)), key


def initial_labels(run: Run, spec: StudentSpec) -> list[str] | None:
    """Names that the command lists for the outputs of the ready teacher that a student begins from, if it does."""
    if spec.init in ("random", "checkpoint", "run") or spec.init_from != "teacher" or not run.spec.teacher:
        return None
    teacher = run.spec.teacher[teachers_of(run.spec)[0]]
    return None if teacher.model is None else teacher.labels


_examples: weakref.WeakValueDictionary[str, Examples] = weakref.WeakValueDictionary()
"""What has been read, for as long as somebody has it: a run and the runs that make its teachers read the same files."""


def build_examples(run: Run) -> Examples:
    """The task's text and labels, read and checked; once, where several runs of this process need them at a time."""
    text = digest_of({part: run.digest_inputs[part] for part in ("task", "data")})
    examples = _examples.get(text)
    if examples is None:
        examples = _examples[text] = load_examples(run.spec.task, source_of(run.spec))
    return examples


def flat(texts: Sequence[tuple[str, ...]]) -> list[str]:
    """Every text on its own."""
    return [text for pair in texts for text in pair]


def build_data(run: Run, examples: Examples, models: Models) -> KDDataModule:
    """Loaders over the task. Teachers that can be cached are from here on (`Models.teachers`)."""
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
    listeners = [method for method in models.methods.values() if method.uses_teachers]
    wanted = needs_of_teachers(listeners, len(models.teachers))
    for index, (teacher, needs) in enumerate(zip(models.teachers, wanted, strict=True)):
        found = cached_or_live(run, data, index, teacher, needs if listeners else None)
        models.teachers[index], models.caches[teacher.name] = found
    return data


def checked_length(spec: RunSpec, models: Models) -> int:
    """`task.max_length`, if every model has that many positions.

    Raises:
        InputError: if one has fewer.
    """
    for encoder in (*models.students.values(), *models.teaching):
        # RoBERTa and MPNet number positions from the padding index on.
        table: Any = encoder.base.get_submodule("embeddings.position_embeddings")
        room = encoder.config.max_position_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
        if not 2 < spec.task.max_length <= room:
            raise InputError(
                f"task.max_length={spec.task.max_length} must be from 3 to {room}, the positions of the model",
                "task.max_length",
            )
    return spec.task.max_length


def build_engine(run: Run, models: Models, task: Task) -> Engine:
    """The LightningModule.

    Raises:
        InputError: for an engine that does not fit the students, or that cannot do what the trainer is asked for.
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
    if taken := [name for name in run.spec.engine if name in given]:
        raise InputError(f"engine.{taken[0]} follows from the rest of the configuration", f"engine.{taken[0]}")
    target = locate(run.spec.engine, "engine", subclass_of(Engine), "an engine: a class of kd.engines.base.Engine")
    options = arguments_of(target, run.spec.engine, "engine")
    try:
        engine: Engine = target(**given, **options)
    except TypeError as error:
        raise InputError(f"the engine cannot be made: {error}", "engine") from error
    if not engine.automatic_optimization:  # it steps the optimiser itself, batch by batch
        if trainer.accumulate > 1:
            raise InputError("updates in turns need whole batches; use trainer.accumulate=1", "trainer.accumulate")
        if trainer.precision == "16-mixed":
            raise InputError("updates in turns have no gradient scaler; use trainer.precision=bf16-mixed", "trainer.precision")
    return engine


def check_optimizer_steps(spec: RunSpec) -> None:
    """Make the optimiser and one step with it, on a layer that is thrown away, where the run will be trained.

    Some optimisers work on a GPU alone. Where a run asks for one that is not there, `check_machine` refuses it.

    Raises:
        InputError: for arguments that it does not take, or that make a step of something else than numbers.
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
    except Exception as error:  # torch raises a dozen kinds for arguments of another type
        raise InputError(f"the optimiser cannot be made: {one_line(error)}", key) from error
    if not all(parameter.isfinite().all() for parameter in layer.parameters()):
        raise InputError("a step of the optimiser makes weights that are not finite", key)


def check_memory(spec: RunSpec, models: Models) -> None:
    """Compare what training cannot do without, weights and gradients in float32, with the memory of the machine.

    Raises:
        InputError: if it is more; what else training takes, as an optimiser's state, comes on top.
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
    """Check that this machine has what a configuration computes with.

    Raises:
        InputError: for a GPU that is not there, or a precision that needs one.
    """
    there = torch.cuda.is_available()
    if spec.trainer.accelerator == "gpu" and not there:
        raise InputError("there is no GPU that torch can use here; use trainer=cpu", "trainer")
    if spec.trainer.precision == "16-mixed" and (spec.trainer.accelerator == "cpu" or not there):
        raise InputError(  # Lightning would train in bf16 and the record would not say so
            "trainer.precision=16-mixed needs a GPU; a processor computes 32-true, or bf16-mixed", "trainer.precision"
        )


def check_arguments(run: Run) -> None:
    """Check whatever needs neither data nor models: methods, schedules, surgeries, optimisers, loggers of a run and its inputs.

    Raises:
        InputError: naming the argument that cannot work.
    """
    spec = run.spec
    check_machine(spec)  # first: what suits no machine like this one need not be put right in other keys before
    chances = [1 / max(len(spec.teacher), 1)] * len(spec.teacher)
    build_method(spec.method, spec.pool, spec.cohort, chances)
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
    """Build a run with shapes in place of weights, so that what cannot work is found before anything is paid for.

    Raises:
        InputError: for whatever does not fit.
    """
    check_machine(run.spec)
    for role, needed in run.inputs.items():
        if role.startswith("pilot "):  # all of them hold out the same examples
            with rename_error_keys(role, run.spec, run.config):
                build_examples(needed)
            break
    check_logger(run.spec.logger.extra)
    models = build_models(run, examples.task, meta=True)
    checked_length(run.spec, models)
    for surgery in surgeries(run.spec).values():
        if hasattr(surgery, "dry_run"):
            surgery.dry_run(models.student.tokenizer, flat(examples.texts["train"]))
    check_memory(run.spec, models)
    build_engine(run, models, examples.task)
    if run.spec.trainer.compile:
        check_compiler("cuda" if run.spec.trainer.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
