"""Configuration to objects; the only module that instantiates."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate

from kd import distributed
from kd.data.datamodule import Examples, KDData, load_examples, tokenizer_fingerprint
from kd.data.tasks import Task
from kd.data.text import OTHER_VOCABULARY, MaskedData
from kd.engines.distiller import Distiller, check_weights
from kd.errors import InputError, one_of
from kd.forward import Needs
from kd.methods.base import Method
from kd.models import Encoder, FrozenTeacher
from kd.models.heads import HEADS
from kd.models.students import (
    INIT_FROM,
    build_student,
    check_head,
    describe_init,
    load_config,
    load_model,
    load_tokenizer,
    new_model,
    with_labels,
)
from kd.models.surgery import Material, Surgery
from kd.models.teachers import match_labels
from kd.optimizers import OptimizerFactory
from kd.planning import backbone_of, source_of
from kd.runs import Run
from kd.schedules import Schedule, as_schedule
from kd.schema import RunSpec

DATA: Mapping[str, type[KDData]] = {"classifier": KDData, "masked_lm": MaskedData}
"""What makes batches for a head of `kd.models.heads.HEADS`."""


@dataclass
class Models:
    """Student and teachers with a method bound to them."""

    student: Encoder
    teachers: list[FrozenTeacher]
    method: Method
    weights: dict[str, Schedule]
    init: str


def make(node: Mapping[str, Any], key: str, **extra: Any) -> Any:
    """Instantiate a `_target_` node.

    Raises:
        InputError: for a class that does not exist, or arguments that it does not take.
    """
    try:
        return instantiate(dict(node), _convert_="all", **extra)
    except InstantiationException as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from error
        cause = " ".join(str(error.__cause__ or error).split())
        raise InputError(f"{node.get('_target_')} cannot be made: {cause}", key) from error


def build_method(node: Mapping[str, Any]) -> tuple[Method, dict[str, Schedule]]:
    """A method, unbound, and the schedules of its weights.

    Raises:
        InputError: for an unknown argument, or weights and terms that do not match.
    """
    arguments = {name: value for name, value in node.items() if name not in ("name", "weights")}
    method: Method = make(arguments, "method")
    if not isinstance(method, Method):
        raise InputError(f"{node.get('_target_')} is not a Method", "method._target_")
    weights = node.get("weights", {})
    if not isinstance(weights, Mapping):
        raise InputError(f"method.weights={weights!r} is not a mapping of terms to numbers", "method.weights")
    check_weights(method.names, weights)
    return method, {name: build_schedule(value, f"method.weights.{name}") for name, value in weights.items()}


def build_schedule(value: Any, key: str) -> Schedule:
    """A number, or a node of `kd.schedules`, as a schedule.

    Raises:
        InputError: for anything else.
    """
    made = make(value, key) if isinstance(value, Mapping) else value
    try:
        schedule = as_schedule(made)
        finite = all(math.isfinite(schedule(step / 100)) for step in range(101))
    except (TypeError, ValueError) as error:
        raise InputError(f"{key}={value!r} is neither a number nor a schedule of numbers", key) from error
    if not finite:
        raise InputError(f"{key}={value!r} is not finite throughout training", key)
    return schedule


def build_optimizer(spec: RunSpec) -> OptimizerFactory:
    """The optimiser's factory.

    Raises:
        InputError: for a value that cannot work.
    """
    part = spec.optimizer
    if spec.trainer.precision == "16-mixed" and part.factory.get("fused"):
        raise InputError(
            "trainer.precision=16-mixed scales gradients, which a fused optimiser undoes before they can be clipped; "
            "use bf16-mixed, or optimizer.factory.fused=false",
            "trainer.precision",
        )
    return OptimizerFactory(make(part.factory, "optimizer.factory"), part.lr, part.weight_decay, part.schedule, part.warmup)


def build_teachers(run: Run, task: Task, meta: bool) -> list[FrozenTeacher]:
    """The frozen teachers, labels matched by name.

    Args:
        run: the run they serve.
        task: whose labels they must have.
        meta: shapes only.

    Raises:
        InputError: for labels that do not match, or weights that cannot be had.
    """
    teachers = []
    for name, spec in run.spec.teacher.items():
        made = run.inputs.get(f"teacher {name}")
        key = f"teacher.{name}.{'model' if made is None else 'backbone'}"
        ready = str(made.student) if made is not None else str(spec.model)
        shape = str(spec.backbone) if made is not None and meta else ready
        config = load_config(shape, key)
        head, columns = HEADS[task.head], None
        if made is not None:
            config = with_labels(config, task.labels, task.head)
        elif not head.is_in(config):
            found = ", ".join(config.architectures)
            raise InputError(f"'{spec.model}' has no head for this task: it is {found}, not ...{head.suffix}", key)
        elif head.labelled:
            columns = teacher_columns(task, spec.labels or list(config.id2label.values()), f"teacher.{name}.labels")
        check_head(config, task.head, key)
        model = new_model(config, task.head, meta=True) if meta else load_model(ready, key, config, task.head)
        teachers.append(FrozenTeacher(Encoder(model, load_tokenizer(shape, key)), name, columns))
    return teachers


def teacher_columns(task: Task, labels: list[str], key: str) -> list[int] | None:
    """Columns of a ready teacher's logits in the task's order; None for regression."""
    if task.labels is not None:
        return match_labels(task.labels, labels, key)
    if len(labels) != 1:
        raise InputError(f"the task is a regression, the teacher has {len(labels)} outputs: {labels}", key)
    return None


def build_models(run: Run, task: Task, meta: bool = False, texts: Sequence[tuple[str, ...]] = ()) -> Models:
    """Student, teachers and method, bound.

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
    method, weights = build_method(spec.method)
    if method.teachers is not None and method.teachers != len(spec.teacher):
        raise InputError(
            f"method={spec.method['name']} takes {method.teachers} teacher(s), teacher={list(spec.teacher)} has "
            f"{len(spec.teacher)}",
            "teacher",
        )
    teachers = build_teachers(run, task, meta)
    initial = initial_source(run, meta)
    backbone, key = backbone_of(spec)
    torch.manual_seed(spec.seed)  # a student's fresh weights depend on the seed alone, not on its method or teachers
    student = build_student(spec.student, backbone, task.labels, initial, meta, key, task.head)
    student, done = operate(run, student, None if meta else [text for pair in texts for text in pair])
    method.bind(student, teachers)
    check_vocabularies(run, task, method, student, teachers)
    depth = load_config(initial, "student.init").num_hidden_layers if initial is not None else None
    init = "; ".join([describe_init(spec.student, student.depth, depth), *done])
    return Models(student, teachers, method, weights, init)


def operate(run: Run, student: Encoder, texts: Sequence[str] | None) -> tuple[Encoder, list[str]]:
    """The student after its surgeries, and what they did, in words.

    Args:
        run: whose configuration lists them.
        student: initialised.
        texts: the training texts; None on the meta device.

    Raises:
        InputError: for a surgery that cannot be made on this student.
    """
    done = []
    for name, node in run.spec.surgery.items():
        surgery: Surgery = make({key: value for key, value in node.items() if key != "run"}, f"surgery.{name}")
        if not callable(surgery):
            raise InputError(f"surgery.{name} has no class: its _target_ is missing", f"surgery.{name}")
        needed = run.inputs.get(f"surgery {name}")
        folder = None if texts is None or needed is None else needed.student
        student, words = surgery(student, Material(texts, folder))
        done += [words] if words else []
    return student, done


def vocabulary_key(run: Run) -> str | None:
    """The key that gives a student a vocabulary of its own, as far as the configuration shows; None if there is none."""
    for node in run.spec.surgery.values():
        if getattr(get_class(str(node.get("_target_"))), "changes_vocabulary", False):
            return "surgery"
    stage = run.inputs.get("stage")
    return "student.run" if stage is not None and vocabulary_key(stage) is not None else None


def check_vocabularies(run: Run, task: Task, method: Method, student: Encoder, teachers: Sequence[FrozenTeacher]) -> None:
    """Tokens of different vocabularies do not stand for each other: what is compared token by token needs one vocabulary.

    Raises:
        InputError: for a method that reads token-level tensors of a teacher with another vocabulary, or a masked language
            model beside a teacher with another one.
    """
    own, key = tokenizer_fingerprint(student.tokenizer), vocabulary_key(run)
    theirs = method.needs()[1] or [Needs()] * len(teachers)
    for teacher, needs in zip(teachers, theirs, strict=True):
        if key is None and tokenizer_fingerprint(teacher.tokenizer) == own:
            continue
        if not HEADS[task.head].labelled:
            raise InputError(OTHER_VOCABULARY, key or "student.backbone")
        if needs.tokens:
            cure = {"surgery": "use surgery=[]", "student.run": "begin from another run"}.get(
                key or "", "give the student the teacher's backbone"
            )
            raise InputError(
                f"method={run.spec.method['name']} compares student and teacher '{teacher.name}' token by token ({needs}), but "
                f"the student has a vocabulary of its own, so its tokens are others than the teacher's; {cure}, or take a "
                "method that reads only logits or [CLS] states",
                key or "student.backbone",
            )


def initial_source(run: Run, meta: bool) -> str | None:
    """Where the student's weights come from; None for random.

    Raises:
        InputError: for an unknown `student.init_from`, or a fine-tuned teacher where there is none.
    """
    spec = run.spec.student
    if spec.init == "random":
        return None
    if spec.init == "checkpoint":
        return spec.checkpoint
    if spec.init == "run":
        return None if meta else str(run.inputs["stage"].student)  # its shape is checked when it is there
    if spec.init_from not in INIT_FROM:
        raise one_of(spec.init_from, INIT_FROM, "student.init_from")
    if spec.init_from == "pretrained":
        return backbone_of(run.spec)[0]
    if not run.spec.teacher:
        raise InputError("student.init_from=teacher needs a teacher, teacher=[] has none", "student.init_from")
    name, teacher = next(iter(run.spec.teacher.items()))
    made = run.inputs.get(f"teacher {name}")
    if made is None:
        return teacher.model
    return teacher.backbone if meta else str(made.student)


def build_examples(run: Run) -> Examples:
    """The task's text and labels, read and checked."""
    return load_examples(run.spec.task, source_of(run.spec))


def build_data(run: Run, examples: Examples, models: Models) -> KDData:
    """Loaders over the task."""
    spec = run.spec
    return DATA[examples.task.head](
        examples,
        models.student.tokenizer,
        [teacher.tokenizer for teacher in models.teachers],
        batch_size=spec.trainer.batch_size,
        eval_batch_size=spec.trainer.eval_batch_size,
        max_length=checked_length(spec, models),
        seed=spec.seed,
        workers=spec.trainer.num_workers,
        rank=distributed.rank(),
        world=distributed.world(),
    )


def checked_length(spec: RunSpec, models: Models) -> int:
    """`task.max_length`, if every model has that many positions.

    Raises:
        InputError: if one has fewer.
    """
    for encoder in (models.student, *(teacher.encoder for teacher in models.teachers)):
        # RoBERTa and MPNet number positions from the padding index on.
        table: Any = encoder.base.get_submodule("embeddings.position_embeddings")
        room = encoder.config.max_position_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
        if not 2 < spec.task.max_length <= room:
            raise InputError(
                f"task.max_length={spec.task.max_length} must be from 3 to {room}, the positions of the model",
                "task.max_length",
            )
    return spec.task.max_length


def build_engine(run: Run, models: Models, task: Task) -> Distiller:
    """The LightningModule."""
    engine: Distiller = make(
        {**run.spec.engine, "_partial_": True},
        "engine",
    )(
        student=models.student,
        teachers=models.teachers,
        method=models.method,
        task=task,
        weights=models.weights,
        optimizer=build_optimizer(run.spec),
        seed=run.spec.seed,
    )
    return engine


def check(run: Run, examples: Examples) -> None:
    """Build a run with shapes in place of weights, so that what cannot work is found before anything is paid for.

    Raises:
        InputError: for whatever does not fit.
    """
    models = build_models(run, examples.task, meta=True)
    checked_length(run.spec, models)
    try:
        build_optimizer(run.spec).optimizer(torch.nn.Linear(2, 2))
    except (TypeError, ValueError) as error:
        raise InputError(f"the optimiser cannot be made: {error}", "optimizer.factory") from error
    if run.spec.trainer.accelerator == "gpu" and not torch.cuda.is_available():
        raise InputError("there is no GPU that torch can use here; use trainer=cpu", "trainer")
