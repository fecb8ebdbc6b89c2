"""Structured configs: the keys and types of each part of a configuration, against which OmegaConf checks values."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from kd.config.values import LARGEST_SEED, MANY, TINY, number, shown, whole, word
from kd.errors import InputError
from kd.system.hardware import PRECISIONS


@dataclass(frozen=True)
class StudentSpec:
    """Architecture and initialisation of a student. Sizes that are None are those of the backbone."""

    name: str = MISSING
    layers: int | None = None
    width: int | None = None
    heads: int | None = None
    intermediate: int | None = None
    family: str | None = None
    backbone: str | None = None
    init: Any = "first"
    init_from: str = "auto"
    checkpoint: str | None = None
    run: Any = None
    dropout: float | None = None

    @property
    def copies_layers(self) -> bool:
        """True if it starts from some layers of a backbone or a teacher, which `init_from` names."""
        return self.init not in ("random", "checkpoint", "run")


@dataclass(frozen=True)
class TeacherSpec:
    """A teacher: a trained classifier (`model`), or a `backbone` that a run of its own trains first, by `method` on `tasks`.

    If that run trains a cohort, `member` is the name of the student that is the teacher; None is the best one, if all
    have one shape. `student_backbone` is the backbone of a student that has none of its own; None is the teacher's.
    """

    model: str | None = None
    backbone: str | None = None
    student_backbone: str | None = None
    labels: list[str] | None = None
    run: dict[str, Any] = field(default_factory=dict)
    tasks: Any = None
    method: str = "finetune"
    member: str | None = None


@dataclass(frozen=True)
class PoolSpec:
    """A pool of teachers: all are used, or the end of a chain, or a choice by a distribution."""

    name: str = "none"
    wrapper: dict[str, Any] | None = None
    chain: bool = False
    distribution: Any = None
    sharpness: float = 1.0
    holdout: float = 0.1


@dataclass(frozen=True)
class CohortSpec:
    """The students of a run, and whether they are trained together."""

    name: str = "single"
    students: Any = 1
    teacher: str = "frozen"
    peers: dict[str, Any] | None = None
    share: str | None = None


@dataclass(frozen=True)
class TaskSpec:
    """A task: its data source, labels and metrics. A mixture of tasks has them in `of`, by name (`kd.config.mixture`)."""

    name: str = MISSING
    kind: str = "classification"
    source: dict[str, Any] = MISSING
    text: list[str] = MISSING
    label: str | None = MISSING
    labels: list[str] | None = None
    codes: dict[str, str] = field(default_factory=dict)
    metrics: list[str] = MISSING
    monitor: str = MISSING
    max_length: int = 128
    limit_train: int | None = None
    limit_validation: int | None = None
    limit_test: int | None = None
    holdout: float | None = None
    train: Any = None
    validation: Any = None
    test: Any = None
    quoted: bool | None = None
    format: str | None = None
    delimiter: str | None = None
    columns: list[str] | None = None
    pattern: str | None = None
    encoding: str | None = None
    extra: dict[str, Any] | None = None
    where: dict[str, Any] | None = None
    where_evaluated: dict[str, Any] | None = None
    edits: Any = None
    unlabelled: str | None = None
    of: "dict[str, TaskSpec]" = field(default_factory=dict)
    tau: float = 1.0


@dataclass(frozen=True)
class OptimizerSpec:
    """AdamW-style optimiser with a warm-up."""

    name: str = MISSING
    factory: dict[str, Any] = MISSING
    lr: float = MISSING
    weight_decay: float = 0.01
    schedule: str = "linear"
    warmup: float = 0.1


@dataclass(frozen=True)
class TrainerSpec:
    """Duration, batches, hardware and checkpoints of training."""

    max_epochs: int = MISSING
    batch_size: int = MISSING
    batch_tokens: int | None = None
    pad_multiple: int | None = None
    accumulate: int = 1
    clip: float | None = 1.0
    precision: str = "32-true"
    compile: Any = False
    selection: str = "best"
    accelerator: str = "cpu"
    devices: Any = 1
    strategy: str = "auto"
    embedding_rows: str = "occurring"
    deterministic: bool = False
    eval_batch_size: int = 128
    num_workers: int = 0
    checkpoint_minutes: float = 5.0
    progress: str = "auto"
    keep: str = "best"


@dataclass(frozen=True)
class TunedSpec:
    """The search that settings came of: its study, its number of trials, and what they were compared by.

    Records and figures state them; they do not change results.
    """

    study: str | None = None
    trials: int | None = None
    by: str | None = None


@dataclass(frozen=True)
class PathsSpec:
    """Folders of runs and data; they do not change results."""

    runs: str = MISSING
    glue: str | None = None


@dataclass(frozen=True)
class LoggerSpec:
    """Loggers beside the CSV file that every run writes, by name, and the group that they show the run in."""

    group: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LauncherSpec:
    """Processes that execute the points of a sweep, or the cells of a table; they do not change results."""

    name: str = "none"
    workers: Any = None
    time: str = "04:00:00"
    sbatch: list[str] = field(default_factory=list)
    array_limit: int = 1000
    address: str = "auto"


@dataclass(frozen=True)
class Launcher:
    """A way to execute jobs.

    Attributes:
        execute: name of a function that executes jobs, see `kd.launch.launcher.launch`; None leaves points to Hydra.
        queues: True if the jobs are only submitted later, so that none is done when the function returns.
        prepare: name of a function without arguments that starts what the first needs, while jobs are still planned.
        measures: True if it executes jobs on this machine, so that `launcher.workers=measure` is about where they are executed.
    """

    execute: str | None = None
    queues: bool = False
    prepare: str | None = None
    measures: bool = False


LAUNCHERS: Mapping[str, Launcher] = {
    "none": Launcher(),
    "local": Launcher("kd.launch.launcher.local", prepare="kd.launch.processes.start_server", measures=True),
    "slurm": Launcher("kd.launch.launcher.slurm", queues=True),
    "ray": Launcher("kd.launch.launcher.ray"),
}
"""Name of a launcher, as of its file in `conf/launcher` -> what it is."""

MOST_WORKERS = 1024
"""Largest number of processes side by side."""

MEASURE = "measure"
"""Value of `launcher.workers`: as many as a short measurement finds fastest (`kd.launch.measure`)."""


@dataclass(frozen=True)
class RunSpec:
    """A whole configuration."""

    method: dict[str, Any] = MISSING
    engine: dict[str, Any] = MISSING
    student: StudentSpec = MISSING
    teacher: dict[str, TeacherSpec] = field(default_factory=dict)
    pool: PoolSpec = field(default_factory=PoolSpec)
    cohort: CohortSpec = field(default_factory=CohortSpec)
    task: TaskSpec = MISSING
    optimizer: OptimizerSpec = MISSING
    trainer: TrainerSpec = MISSING
    logger: LoggerSpec = field(default_factory=LoggerSpec)
    launcher: LauncherSpec = field(default_factory=LauncherSpec)
    tuned: TunedSpec = field(default_factory=TunedSpec)
    paths: PathsSpec = MISSING
    surgery: dict[str, dict[str, Any]] = field(default_factory=dict)
    pretrain: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    backbone: str = MISSING
    cache: Any = "auto"
    preflight: bool = True
    resume: bool = True


def cache_limit(setting: object) -> float | None:
    """Return the largest size of a teacher's cache in bytes: 0 for `off`, infinity for `on`, None for `auto`.

    With `auto` the program chooses the limit (`kd.teacher_cache.cache.AUTO_LIMIT`). A size is a budget: as many examples are
    cached as fit.

    Raises:
        InputError: if the setting is neither a word nor a size.

    >>> cache_limit("20GB"), cache_limit("1.5 mb"), cache_limit("off")
    (20000000000.0, 1500000.0, 0.0)
    """
    text = str(setting).strip().lower()
    text = {"true": "on", "false": "off"}.get(text, text)  # YAML reads the bare words on and off as booleans
    named: dict[str, float | None] = {"auto": None, "on": float("inf"), "off": 0.0}
    if text in named:
        return named[text]
    size = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([kmgt]?)b?", text)
    if size is None:
        raise InputError(f"cache={shown(setting)} must be auto, on, off, or a size as 500MB or 2GB", "cache")
    return float(size[1]) * 1000.0 ** " kmgt".index(size[2] or " ")


GRAPHS = "reduce-overhead"
"""Value of `trainer.compile`, a mode of `torch.compile`: blocks of the training steps run as CUDA graphs."""

PADDING_OF_GRAPHS = 16
"""`trainer.pad_multiple` where it is null and blocks run as CUDA graphs, which are recorded for each length: 8 lengths with
`task.max_length=128`, the number above which torch 2.13 warns. Our choice."""


def compile_mode(setting: object) -> bool | str:
    """Return how `trainer.compile` compiles blocks: not at all, in torch's default mode (True), or in `GRAPHS`.

    Raises:
        InputError: if the setting is none of these.

    >>> compile_mode("off"), compile_mode(True), compile_mode("reduce-overhead")
    (False, True, 'reduce-overhead')
    """
    modes: dict[str, bool | str] = {GRAPHS: GRAPHS}
    modes |= dict.fromkeys(("true", "yes", "on", "y", "1"), True)
    modes |= dict.fromkeys(("false", "no", "off", "n", "0"), False)
    if (text := str(setting).lower()) not in modes:
        raise InputError(f"trainer.compile={shown(setting)} must be true, false or {GRAPHS}", "trainer.compile")
    return modes[text]


def padding_multiple(trainer: TrainerSpec) -> int:
    """Return the number of tokens of which batches are padded to a multiple; null follows from `trainer.compile`."""
    if trainer.pad_multiple is not None:
        return trainer.pad_multiple
    return PADDING_OF_GRAPHS if compile_mode(trainer.compile) == GRAPHS else 1


MOST_OF_TASK = {"max_length": MANY, "limit_train": 2**40, "limit_validation": 2**40, "limit_test": 2**40}
MOST_OF_TRAINER = {
    "max_epochs": MANY,
    "batch_size": MANY,
    "batch_tokens": 2**31,
    "pad_multiple": 65_536,
    "accumulate": MANY,
    "eval_batch_size": MANY,
}
"""Keys whose values are whole numbers from 1, and the largest allowed value of each."""

LARGEST_SIZES = {"layers": 256, "width": 65_536, "heads": 65_536, "intermediate": 1_048_576}
"""Sizes of a student, whole numbers from 1, and the largest allowed value of each."""

LONGEST_NAME = 64
"""Most bytes of the name of a method, student or task: folder names join all three, and file systems allow 255 bytes."""

LONGEST_STUDY = 240
"""Most bytes of the name of a study, which is a folder: it has the names of a method, student and task, and a digest."""

KEEP = ("all", "best", "student", "figures")
"""Words of `trainer.keep`: the files that a finished run retains, from the most to the fewest (`kd.runs.retention`)."""

COLUMN_KINDS = ("classes", "number")
"""Kinds of further columns of a task: names of classes, or numbers; a list of names in place of `classes` fixes their order."""

DECAYS = ("linear", "cosine", "constant")
"""Learning-rate schedules after the warm-up."""


def check_values(spec: RunSpec) -> None:
    """Check each value on its own, without reading files; those of the task are checked by `kd.config.mixture.check_tasks`.

    Raises:
        InputError: for a word that is not in its list, or a number out of range.
    """
    trainer, student = spec.trainer, spec.student
    words = {
        "precision": PRECISIONS,
        "selection": ("best", "last"),
        "accelerator": ("cpu", "gpu", "auto"),
        "strategy": ("auto", "ddp"),
        "embedding_rows": ("occurring", "all"),
        "progress": ("auto", "bar", "plain", "none"),
        "keep": KEEP,
    }
    for key, allowed in words.items():
        word(getattr(trainer, key), allowed, f"trainer.{key}")
    compile_mode(trainer.compile)
    check_student(student)
    for name, most in MOST_OF_TRAINER.items():
        if (value := getattr(trainer, name)) is not None:
            whole(value, f"trainer.{name}", 1, most)
    whole(trainer.num_workers, "trainer.num_workers", 0, 1024)
    number(trainer.checkpoint_minutes, "trainer.checkpoint_minutes", 0, 525_600)
    if trainer.clip is not None:
        if trainer.clip == 0 or trainer.clip == math.inf:
            raise InputError(f"trainer.clip={trainer.clip} must be a positive number; trainer.clip=null is off", "trainer.clip")
        number(trainer.clip, "trainer.clip", TINY, 1e12)
    devices = str(trainer.devices)
    if isinstance(trainer.devices, bool) or not (
        devices == "auto" or (devices.isascii() and devices.isdigit() and len(devices) < 6 and int(devices) > 0)
    ):
        raise InputError(f"trainer.devices={shown(trainer.devices)} must be auto or a number from 1", "trainer.devices")
    cache_limit(spec.cache)
    if spec.seed < 0:
        raise InputError(f"seed={spec.seed} must not be negative", "seed")
    whole(spec.seed, "seed", 0, LARGEST_SEED)
    optimizer = spec.optimizer
    check_optimizer(optimizer.lr, optimizer.weight_decay, optimizer.schedule, optimizer.warmup)
    if not spec.paths.runs:
        raise InputError("paths.runs is empty; it is the folder where runs live", "paths.runs")
    paths: dict[str, Any] = {"paths.runs": spec.paths.runs, "paths.glue": spec.paths.glue, "backbone": spec.backbone}
    paths |= {"student.backbone": student.backbone, "student.checkpoint": student.checkpoint}
    for name, teacher in spec.teacher.items():
        paths |= {f"teacher.{name}.{key}": getattr(teacher, key) for key in ("model", "backbone", "student_backbone")}
    check_paths(paths)
    names: dict[str, Any] = {"method.name": spec.method.get("name"), "student.name": student.name}
    for key, part_name in names.items():
        check_name(part_name, key)
    check_launcher(spec.launcher)
    check_tuned(spec.tuned)


def check_tuned(tuned: TunedSpec) -> None:
    """Check what a configuration says of the search that it came of.

    Raises:
        InputError: for an invalid name of a study, a number of trials that is not positive, or a text that is not one line.
    """
    if tuned.study is not None:
        check_name(tuned.study, "tuned.study", LONGEST_STUDY)
    if tuned.trials is not None:
        whole(tuned.trials, "tuned.trials", 1, MANY)
    if tuned.by is not None and not re.fullmatch(r"\S(.{0,98}\S)?", tuned.by):
        raise InputError(
            f"tuned.by={shown(tuned.by)} must say what the trials were compared by, as 'validation accuracy'", "tuned.by"
        )


def launcher_named(name: str) -> Launcher:
    """Return the launcher of a name.

    Raises:
        InputError: if there is none.
    """
    return LAUNCHERS[word(name, tuple(LAUNCHERS), "launcher.name")]


def check_launcher(launcher: LauncherSpec) -> None:
    """Check the values of a launcher.

    Raises:
        InputError: for a word that is not in its list, a number out of range, or a text that is no option of `sbatch`.
    """
    chosen = launcher_named(launcher.name)
    if launcher.workers == MEASURE and chosen.execute is not None and not chosen.measures:
        raise InputError(
            f"launcher.workers={MEASURE} measures this machine, and launcher={launcher.name} executes jobs on others; give a "
            "number, or null",
            "launcher.workers",
        )
    if isinstance(launcher.workers, str) and launcher.workers != MEASURE:
        raise InputError(
            f"launcher.workers={shown(launcher.workers)} must be null, {MEASURE}, or a whole number from 1 to {MOST_WORKERS}",
            "launcher.workers",
        )
    if launcher.workers not in (None, MEASURE):
        whole(launcher.workers, "launcher.workers", 1, MOST_WORKERS)
    whole(launcher.array_limit, "launcher.array_limit", 1, MANY)
    if not re.fullmatch(r"(\d{1,3}-)?\d{1,6}(:\d{1,2}){0,2}", launcher.time, re.ASCII):
        raise InputError(
            f"launcher.time={shown(launcher.time)} must be a time limit as SLURM reads it: minutes, 04:00:00 or 1-12:00:00",
            "launcher.time",
        )
    for option in launcher.sbatch:
        if not re.fullmatch(r"--?[a-zA-Z][^\n\0]*", option):
            raise InputError(
                f"launcher.sbatch has '{shown(option)}', where an option as --gres=gpu:1 is needed", "launcher.sbatch"
            )
    if not re.fullmatch(r"[\w.:/-]+", launcher.address, re.ASCII):
        raise InputError(
            f"launcher.address={shown(launcher.address)} must be auto, local, or the address of a cluster", "launcher.address"
        )


def check_task(task: TaskSpec) -> None:
    """Check each value of a task on its own, without reading files.

    Raises:
        InputError: for a value out of range, or a column or a file without a name.
    """
    for name, most in MOST_OF_TASK.items():
        if (value := getattr(task, name)) is not None:
            whole(value, f"task.{name}", 1, most)
    if task.holdout is not None:
        check_share(task.holdout, "task.holdout")
    check_columns(task)
    check_paths({f"task.{name}": getattr(task, name) for name in ("train", "validation", "test", "unlabelled")})
    check_name(task.name, "task.name")


def check_paths(paths: Mapping[str, Any]) -> None:
    """Check paths by their configuration keys; a path may be a mapping with a file for each class.

    Raises:
        InputError: for a path that no file system has.
    """
    for key, path in paths.items():
        for file in path.values() if isinstance(path, dict) else [path]:
            if file is not None:
                check_path(str(file), key)


def check_student(student: StudentSpec) -> None:
    """Check the sizes and the dropout of a student.

    Raises:
        InputError: for a value out of range.
    """
    for name, most in LARGEST_SIZES.items():
        if (value := getattr(student, name)) is not None:
            whole(value, f"student.{name}", 1, most)
    if student.dropout is not None:
        number(student.dropout, "student.dropout", 0, 0.99)


def check_optimizer(lr: float, weight_decay: float, schedule: str, warmup: float) -> None:
    """Check the values of an optimiser; the arguments are those of `kd.engines.optimizer.OptimizerFactory`.

    Raises:
        InputError: for a value out of range.
    """
    if not lr > 0:
        raise InputError(f"optimizer.lr={lr} must be positive", "optimizer.lr")
    number(lr, "optimizer.lr", TINY, 100)
    number(weight_decay, "optimizer.weight_decay", TINY, 100, zero=True)
    number(warmup, "optimizer.warmup", 0, 1)
    word(schedule, DECAYS, "optimizer.schedule")


def check_share(value: float, key: str) -> None:
    """Check a fraction of the training split.

    Raises:
        InputError: if it is not strictly between 0 and 1.
    """
    if not 0 < value < 1:
        raise InputError(f"{key}={value} is a share of train, between 0 and 1", key)


def check_columns(task: TaskSpec) -> None:
    """Check that a task has one or two text columns, that its lists have no empty or repeated entry, and its further columns.

    Raises:
        InputError: if not.
    """
    if len(task.text) not in (1, 2):
        raise InputError(f"task.text={shown(task.text)} must name one column, or two for a pair", "task.text")
    for name, kind in (task.extra or {}).items():
        if not str(name).strip():
            raise InputError(f"task.extra={shown(task.extra)} has a column without a name", "task.extra")
        if isinstance(kind, list):
            check_names(kind, f"task.extra.{name}")
        else:
            word(kind, COLUMN_KINDS, f"task.extra.{name}")
    for key, selection in {"where": task.where, "where_evaluated": task.where_evaluated}.items():
        for name, wanted in (selection or {}).items():
            if (task.extra or {}).get(name, "number") == "number":
                raise InputError(
                    f"task.{key}.{name} selects by a column of classes: add 'task.extra={{{name}: classes}}'", f"task.{key}"
                )
            check_names(wanted if isinstance(wanted, list) else [wanted], f"task.{key}.{name}")
    for key, entries in {"text": task.text, "labels": task.labels, "metrics": task.metrics}.items():
        for index, entry in enumerate(entries or []):
            if not str(entry).strip():
                raise InputError(f"task.{key}={shown(entries)} has an empty entry", f"task.{key}")
            if entry in (entries or [])[:index] if len(entries or []) < 1000 else False:
                raise InputError(f"task.{key}={shown(entries)} lists '{shown(entry)}' twice", f"task.{key}")


def check_names(names: list[Any], key: str) -> None:
    """Check a list of names of classes.

    Raises:
        InputError: for an empty list, a name that is no text, or one that is listed twice.
    """
    if not names or not all(isinstance(name, str) and name.strip() for name in names) or len(set(names)) < len(names):
        raise InputError(f"{key}={shown(names)} must list names of classes, each once", key)


def check_path(path: str, key: str) -> None:
    """Check that a text is a valid path.

    Raises:
        InputError: if it has a zero byte, a line break or invalid Unicode, or is too long.
    """
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        raise InputError(f"{key}={path!a} is not valid Unicode", key) from None
    if b"\0" in encoded or "\n" in path:
        raise InputError(f"{key}={shown(path)} has a character that the name of a file cannot have", key)
    if len(encoded) > 3500 or any(len(part) > 255 for part in encoded.split(b"/")):
        raise InputError(f"{key}={shown(path)} is longer than a file system allows", key)


def check_name(name: object, key: str, longest: int = LONGEST_NAME) -> None:
    """Check a name that becomes a folder's name, or part of one.

    Args:
        name: the name.
        key: its configuration key.
        longest: most bytes that it may have.

    Raises:
        InputError: if it has a character other than letters, digits, '.', '_' and '-', or is too long.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        raise InputError(f"{key}='{shown(name)}' becomes part of a folder's name: use letters, digits, '.', '_' and '-'", key)
    if len(name.encode()) > longest:
        raise InputError(f"{key}='{shown(name)}' becomes part of a folder's name: use at most {longest} bytes", key)
