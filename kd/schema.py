"""The typed shape of each part of a configuration. OmegaConf checks values against it and names the key that is wrong."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


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
    run: list[str] | None = None
    dropout: float | None = None


@dataclass
class TeacherSpec:
    """A teacher: a ready classifier (`model`), or a backbone that is fine-tuned by a run of its own first."""

    model: str | None = None
    backbone: str | None = None
    labels: list[str] | None = None
    run: dict[str, Any] = field(default_factory=dict)


@dataclass
class TaskSpec:
    """A task: where its text is, what its labels are called, how it is scored."""

    name: str = MISSING
    kind: str = "classification"
    source: dict[str, Any] = MISSING
    text: list[str] = MISSING
    label: str = MISSING
    labels: list[str] | None = None
    codes: dict[str, str] = field(default_factory=dict)
    metrics: list[str] = MISSING
    monitor: str = MISSING
    max_length: int = 128
    limit_train: int | None = None
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
    accumulate: int = 1
    clip: float | None = 1.0
    precision: str = "32-true"
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
    task: TaskSpec = MISSING
    optimizer: OptimizerSpec = MISSING
    trainer: TrainerSpec = MISSING
    logger: LoggerSpec = MISSING
    paths: PathsSpec = MISSING
    seed: int = 0
    backbone: str = MISSING
    preflight: bool = True
    resume: bool = True
