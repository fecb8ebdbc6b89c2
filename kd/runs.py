"""A run is a pure function of its configuration, and its inputs are other runs.

The digest of everything that changes a result names a run's directory. A teacher to fine-tune or a stage to begin from is a
run of its own, made first if it is missing and reused if it is done.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kd import config as composition
from kd.data.sources import Source
from kd.errors import InputError, one_of
from kd.hardware import PRECISIONS, resolve_precision
from kd.schema import RunSpec, TeacherSpec
from kd.sources import fingerprint

FORMAT = 1
"""Part of every digest; raised when a change of code makes old results incomparable."""

COSTLESS = [
    "accelerator",
    "devices",
    "strategy",
    "eval_batch_size",
    "num_workers",
    "checkpoint_minutes",
    "progress",
]
"""Trainer keys that do not change a result."""

PLACES = ("root", "train", "validation", "test")
"""Keys that say where data is; their content enters the digest instead."""

DEEPEST_CHAIN = 8
"""Stages that may follow each other; a longer chain is a stage that begins from itself."""


@dataclass
class Run:
    """One run: what it is, where it lives, what it needs first.

    Attributes:
        config: as composed, for `config.yaml`.
        spec: the same, typed.
        digest: of everything that changes the result.
        directory: where it lives.
        inputs: role -> run; `teacher <name>`, or `stage`.
        identity: what the digest is of.
    """

    config: DictConfig
    spec: RunSpec
    digest: str
    directory: Path
    inputs: dict[str, "Run"] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the directory."""
        return self.directory.name

    @property
    def family(self) -> str:
        """Digest of everything but the seed: what runs that may be averaged have in common."""
        inputs = dict(self.identity.get("inputs", {}))
        if "stage" in self.inputs:  # it has the seed of the run that begins from it
            inputs["stage"] = self.inputs["stage"].family
        return digest_of({**self.identity, "inputs": inputs, "seed": None})

    @property
    def result(self) -> dict[str, Any] | None:
        """The record of a finished run; None for any other. It is written last, and all at once."""
        try:
            found = json.loads((self.directory / "result.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and found.get("digest") == self.digest else None

    @property
    def student(self) -> Path:
        """The exported model."""
        return self.directory / "student"

    @property
    def checkpoints(self) -> Path:
        """`best.ckpt` and `last.ckpt`."""
        return self.directory / "checkpoints"

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the record that makes the run done."""
        write_atomically(
            self.directory / "result.json", json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        )

    def begin(self, resume: bool) -> None:
        """Make the directory; forget what is there unless it is to be resumed.

        Raises:
            InputError: if it cannot be made.
        """
        try:
            if not resume:
                shutil.rmtree(self.checkpoints, ignore_errors=True)
                (self.directory / "metrics.csv").unlink(missing_ok=True)
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_atomically(self.directory / "config.yaml", OmegaConf.to_yaml(self.config))
        except OSError as error:
            raise InputError(f"cannot write to '{self.directory}': {error.strerror}", "paths.runs") from error

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run: a second process that needs it waits, then finds it done. A killed holder's lock is free."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make '{self.directory}': {error.strerror}", "paths.runs") from error
        lock = FileLock(self.directory / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"{self.name}: another process is at this run; waiting for it", flush=True)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


def digest_of(identified: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that stand for a configuration; 10 and 10.0 are the same number."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(name): plain(inner) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [plain(inner) for inner in value]
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value

    text = json.dumps(plain(identified), sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a text file, all or nothing."""
    draft = path.with_name(path.name + ".part")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def plan(config: DictConfig, overrides: Sequence[str] = (), depth: int = 0) -> Run:
    """The run of a configuration, with the runs it needs. Nothing is trained, loaded or written.

    Args:
        config: composed.
        overrides: what it was composed from; a stage is stated relative to them.
        depth: of the chain of stages.

    Raises:
        InputError: for a value of the wrong type, or an input that does not exist.
    """
    spec = composition.typed(config)
    check_values(spec)
    spec.trainer.precision = resolve_precision(spec.trainer.precision, spec.trainer.accelerator)
    inputs = {}
    for name, teacher in spec.teacher.items():
        if needs_fine_tuning(name, teacher):
            with keys_of(f"teacher {name}"):
                inputs[f"teacher {name}"] = plan(teacher_config(config, spec, name, teacher), depth=depth)
    if spec.student.init == "run":
        inputs["stage"] = plan(*stage_config(spec, overrides, depth), depth + 1)
    identified = identity(spec, inputs)
    digest = digest_of(identified)
    name = f"{spec.method['name']}-{spec.student.name}-{spec.task.name}-s{spec.seed}-{digest}"
    return Run(config, spec, digest, Path(spec.paths.runs).expanduser() / name, inputs, identified)


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
    least = {"max_epochs": 1, "batch_size": 1, "accumulate": 1, "eval_batch_size": 1, "num_workers": 0, "checkpoint_minutes": 0}
    for key, bound in least.items():
        if not getattr(trainer, key) >= bound:
            raise InputError(f"trainer.{key}={getattr(trainer, key)} must be at least {bound}", f"trainer.{key}")
    if trainer.devices != "auto" and not (str(trainer.devices).isdigit() and int(trainer.devices) > 0):
        raise InputError(f"trainer.devices={trainer.devices} must be auto or a number from 1", "trainer.devices")
    if spec.seed < 0:
        raise InputError(f"seed={spec.seed} must not be negative", "seed")
    if not spec.paths.runs:
        raise InputError("paths.runs is empty; it is the folder where runs live", "paths.runs")
    for part, name in {"method": spec.method.get("name"), "student": spec.student.name, "task": spec.task.name}.items():
        if not re.fullmatch(r"[\w.-]+", str(name)):
            raise InputError(
                f"{part}.name='{name}' is part of a folder's name: letters, digits, '.', '_' and '-'", f"{part}.name"
            )


@contextmanager
def keys_of(role: str) -> Iterator[None]:
    """Errors of an input's run name the key of the run that needs it: where the user can change it."""
    try:
        yield
    except InputError as error:
        if error.key is None or not role.startswith("teacher "):
            raise
        place = f"teacher.{role.removeprefix('teacher ')}"
        part = error.key.partition(".")[0]
        own = part in ("method", "student", "optimizer", "seed") or error.key == "trainer.max_epochs"
        key = f"{place}.run.{error.key}" if own else error.key
        raise InputError(error.message, f"{place}.backbone" if error.key == "student.backbone" else key) from error


def needs_fine_tuning(name: str, teacher: TeacherSpec) -> bool:
    """Whether a teacher is made by a run of its own.

    Raises:
        InputError: if it has neither or both of `model` and `backbone`.
    """
    if (teacher.model is None) == (teacher.backbone is None):
        raise InputError(
            f"the teacher '{name}' needs one of `model` (a ready classifier) and `backbone` (fine-tuned first)",
            f"teacher.{name}.model",
        )
    return teacher.model is None


def backbone_of(spec: RunSpec) -> tuple[str, str]:
    """Where the student's shape and vocabulary come from, and the key that says so.

    Its own backbone, else the first teacher's, else the default.
    """
    if spec.student.backbone is not None:
        return spec.student.backbone, "student.backbone"
    for name, teacher in spec.teacher.items():
        kind = "model" if teacher.backbone is None else "backbone"
        return str(teacher.backbone or teacher.model), f"teacher.{name}.{kind}"
    return spec.backbone, "backbone"


def source_of(spec: RunSpec) -> Source:
    """The data source of a task.

    Raises:
        InputError: for a source that cannot be made.
    """
    node = dict(spec.task.source)
    try:
        return get_class(node.pop("_target_"))(**node)  # type: ignore[no-any-return]
    except (KeyError, TypeError, ImportError, ValueError) as error:
        raise InputError(f"the task's source cannot be made: {error}", "task.source") from error


def identity(spec: RunSpec, inputs: Mapping[str, Run]) -> dict[str, Any]:
    """Everything that changes the result, and nothing else."""
    student, task, trainer = asdict(spec.student), asdict(spec.task), asdict(spec.trainer)
    student["backbone"] = fingerprint(*backbone_of(spec))
    if spec.student.init == "checkpoint":
        if spec.student.checkpoint is None:
            raise InputError("student.init=checkpoint needs student.checkpoint=<folder or source>", "student.checkpoint")
        student["checkpoint"] = fingerprint(spec.student.checkpoint, "student.checkpoint")
    else:
        student["checkpoint"] = None
    if spec.student.init in ("random", "checkpoint", "run"):
        student["init_from"] = None
    student.pop("run")
    source = {key: value for key, value in task.pop("source").items() if key not in PLACES}
    return {
        "format": FORMAT,
        "method": spec.method,
        "engine": spec.engine,
        "student": student,
        "teachers": [  # a list: the order of a pool says whose weights a student begins from
            {
                "name": name,
                "labels": teacher.labels,
                "model": teacher.model and fingerprint(teacher.model, f"teacher.{name}.model"),
            }
            for name, teacher in spec.teacher.items()
        ],
        "inputs": {role: run.digest for role, run in inputs.items()},
        "task": {key: value for key, value in task.items() if key not in PLACES},
        "data": {**source, **source_of(spec).fingerprint()},
        "optimizer": asdict(spec.optimizer),
        "trainer": {key: value for key, value in trainer.items() if key not in COSTLESS},
        "seed": spec.seed,
    }


def teacher_config(parent: DictConfig, spec: RunSpec, name: str, teacher: TeacherSpec) -> DictConfig:
    """The configuration of a teacher's fine-tuning: the defaults, the parent's task, places and hardware, and its `run`.

    The student's method, optimiser, epochs and seed do not enter, so that a sweep over them has one teacher.
    """
    config = composition.compose(["method=finetune", "teacher=[]", "student=full"])
    for part in ("task", "paths", "logger"):
        OmegaConf.update(config, part, OmegaConf.to_container(parent[part], resolve=True), merge=False, force_add=True)
    for key in (*COSTLESS, "precision"):
        OmegaConf.update(config, f"trainer.{key}", getattr(spec.trainer, key), force_add=True)
    OmegaConf.update(config, "student.backbone", teacher.backbone)
    config.preflight, config.resume = spec.preflight, spec.resume
    try:
        OmegaConf.set_struct(config, True)
        merged = OmegaConf.merge(config, teacher.run)
    except OmegaConfBaseException as error:
        explained = composition.explain(error)
        raise InputError(
            f"teacher.{name}.run does not fit a run's configuration: {explained.message} ({explained.key})",
            f"teacher.{name}.run",
        ) from error
    assert isinstance(merged, DictConfig)
    return merged


def without(overrides: Sequence[str], starts: Sequence[str]) -> list[str]:
    """The overrides that do not begin with any of these words, with or without a plus."""
    return [override for override in overrides if not override.lstrip("+~").startswith(tuple(starts))]


def stage_config(spec: RunSpec, overrides: Sequence[str], depth: int) -> tuple[DictConfig, list[str]]:
    """The configuration of the run that this one begins from, and its overrides.

    It is this command with `student.run` laid over it.
    """
    if not spec.student.run:
        raise InputError("student.init=run needs student.run=[override, ...], the run to begin from", "student.run")
    if depth >= DEEPEST_CHAIN:
        raise InputError("student.run begins from itself; give the first stage another student.init", "student.run")
    kept = without(overrides, ["student.init=", "student.run="])
    # Another method has other keys: what was said of this one's does not carry over.
    swapped = [override.partition("=")[0] for override in spec.student.run if "." not in override.partition("=")[0]]
    merged = [*without(kept, [f"{group}." for group in swapped]), *spec.student.run]
    return composition.compose(merged), merged
