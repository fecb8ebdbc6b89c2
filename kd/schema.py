"""The typed shape of each part of a configuration. OmegaConf checks values against it and names the key that is wrong."""

import re
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from kd.errors import InputError, one_of
from kd.hardware import PRECISIONS


@dataclass
class StudentSpec:
    """What student is built. A null size means the backbone's."""

    name: str = MISSING
    layers: int | None = None
    width: int | None = None
    heads: int | None = None
    intermediate: int | None = None
    family: str | None = None
    backbone: str | None = None
    init: Any = "first"
    init_from: str = "pretrained"
    checkpoint: str | None = None
    run: Any = None
    dropout: float | None = None


@dataclass
class TeacherSpec:
    """A teacher: a ready classifier (`model`), or a backbone that is fine-tuned by a run of its own first."""

    model: str | None = None
    backbone: str | None = None
    labels: list[str] | None = None
    run: dict[str, Any] = field(default_factory=dict)


@dataclass
class PoolSpec:
    """What a method sees of several teachers."""

    name: str = "none"
    wrapper: dict[str, Any] | None = None
    chain: bool = False
    distribution: Any = None
    sharpness: float = 1.0
    holdout: float = 0.1


@dataclass
class CohortSpec:
    """Students that learn together."""

    name: str = "single"
    students: Any = 1
    teacher: str = "frozen"
    peers: dict[str, Any] | None = None


@dataclass
class TaskSpec:
    """A task: where its text is, what its labels are called, how it is scored."""

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
    holdout: float | None = None
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    quoted: bool | None = None


@dataclass
class OptimizerSpec:
    """AdamW-style optimiser with a warm-up."""

    name: str = MISSING
    factory: dict[str, Any] = MISSING
    lr: float = MISSING
    weight_decay: float = 0.01
    schedule: str = "linear"
    warmup: float = 0.1


@dataclass
class TrainerSpec:
    """How long, on what, and how a run is protected."""

    max_epochs: int = MISSING
    batch_size: int = MISSING
    batch_tokens: int | None = None
    pad_multiple: int = 1
    accumulate: int = 1
    clip: float | None = 1.0
    precision: str = "32-true"
    compile: bool = False
    selection: str = "best"
    accelerator: str = "cpu"
    devices: Any = 1
    strategy: str = "auto"
    deterministic: bool = False
    eval_batch_size: int = 128
    num_workers: int = 0
    checkpoint_minutes: float = 5.0
    progress: str = "auto"


@dataclass
class PathsSpec:
    """Where things are; none of it changes a result."""

    runs: str = MISSING
    glue: str | None = None


@dataclass
class LoggerSpec:
    """Loggers beside the CSV file that every run writes."""

    name: str = MISSING
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
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
    logger: LoggerSpec = MISSING
    paths: PathsSpec = MISSING
    surgery: dict[str, dict[str, Any]] = field(default_factory=dict)
    pretrain: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    backbone: str = MISSING
    cache: Any = "auto"
    preflight: bool = True
    resume: bool = True


def cache_limit(setting: Any) -> float | None:
    """Bytes that a teacher's cache may take: 0 for `off`, endless for `on`, None where it is for the program to say (`auto`).

    Raises:
        InputError: for anything else that is no size.

    >>> cache_limit("20GB"), cache_limit("1.5 mb"), cache_limit("off")
    (20000000000.0, 1500000.0, 0.0)
    """
    word = str(setting).strip().lower()
    word = {"true": "on", "false": "off"}.get(word, word)  # what YAML makes of the bare words
    named: dict[str, float | None] = {"auto": None, "on": float("inf"), "off": 0.0}
    if word in named:
        return named[word]
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)b?", word)
    if size is None:
        raise InputError(f"cache={setting} must be auto, on, off, or a size as 500MB or 20GB", "cache")
    return float(size[1]) * 1000.0 ** " kmgt".index(size[2] or " ")


def check_values(spec: RunSpec) -> None:
    """What can be told from the values alone.

    Raises:
        InputError: for a word that is not in its list, or a number out of its range.
    """
    trainer = spec.trainer
    words = {
        "precision": PRECISIONS,
        "selection": ("best", "last"),
        "accelerator": ("cpu", "gpu", "auto"),
        "strategy": ("auto", "ddp"),
        "progress": ("auto", "bar", "plain", "none"),
    }
    for key, allowed in words.items():
        if getattr(trainer, key) not in allowed:
            raise one_of(getattr(trainer, key), allowed, f"trainer.{key}")
    ones = ("max_epochs", "batch_size", "batch_tokens", "pad_multiple", "accumulate", "eval_batch_size")
    for key, bound in {**dict.fromkeys(ones, 1), "num_workers": 0, "checkpoint_minutes": 0}.items():
        if getattr(trainer, key) is not None and not getattr(trainer, key) >= bound:
            raise InputError(f"trainer.{key}={getattr(trainer, key)} must be at least {bound}", f"trainer.{key}")
    if trainer.devices != "auto" and not (str(trainer.devices).isdigit() and int(trainer.devices) > 0):
        raise InputError(f"trainer.devices={trainer.devices} must be auto or a number from 1", "trainer.devices")
    cache_limit(spec.cache)
    if spec.seed < 0:
        raise InputError(f"seed={spec.seed} must not be negative", "seed")
    if not spec.paths.runs:
        raise InputError("paths.runs is empty; it is the folder where runs live", "paths.runs")
    for part, name in {"method": spec.method.get("name"), "student": spec.student.name, "task": spec.task.name}.items():
        if not re.fullmatch(r"[\w.-]+", str(name)):
            raise InputError(
                f"{part}.name='{name}' is part of a folder's name: letters, digits, '.', '_' and '-'", f"{part}.name"
            )
