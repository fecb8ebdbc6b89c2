"""Checkpoints with atomic writes and a checksum, which are read without executing code."""

import hashlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.types import STEP_OUTPUT

from kd.data.batch import Batch
from kd.data.direction import higher_is_better
from kd.engines.base import Engine
from kd.engines.nonfinite import LATEST
from kd.errors import InputError
from kd.system import distributed
from kd.system.files import atomic_write, writing

SEAL = b"kd blake2b-256 "
"""Prefix of the checksum in the comment at the end of the file: torch reads a zip archive with a comment."""

DIGITS = 64
"""Hexadecimal digits of the checksum."""

STATE = ("pytorch-lightning_version", "epoch", "global_step", "state_dict", "loops", "callbacks", "lr_schedulers", "kd")
"""Entries that a checkpoint must have for training to resume, besides `optimizer_states`."""

OF_RESUMING = ("callbacks", "lr_schedulers", "optimizer_states")
"""Entries that a checkpoint of the weights alone does not have."""

ENTRY_TYPES: Mapping[str, type] = {
    **dict.fromkeys(("epoch", "global_step"), int),
    **dict.fromkeys(("loops", "callbacks", "kd"), dict),
    **dict.fromkeys(("lr_schedulers", "optimizer_states"), list),
}
"""Types of entries of a checkpoint."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint IO that writes a draft and renames it; files carry a checksum and the run's digest, both checked on reading.

    Lightning's own writer stages the file in the system's temporary folder; from another file system the last step is a
    copy, which a kill or a full disk leaves truncated in place of the previous checkpoint.

    Args:
        digest: digest of the run whose checkpoints are read and written.
    """

    def __init__(self, digest: str) -> None:
        super().__init__()
        self.digest = digest

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None) -> None:
        """Write a checkpoint atomically.

        Raises:
            InputError: if the folder cannot be written.
        """
        target = Path(path)
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(target, "w+b") as file:
                torch.save({**checkpoint, "digest": self.digest}, file)
                seal(file)

    def load_checkpoint(
        self, path: str | Path, map_location: object = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint of the run, on the CPU and without executing anything, whatever the arguments.

        Raises:
            InputError: if it is damaged, or belongs to another run.
        """
        return read_checkpoint(Path(path), self.digest)


class Checkpoint(ModelCheckpoint):
    """A ModelCheckpoint whose folder may have moved: Lightning's drops the best score when the path has changed."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state, with every path moved to the current folder."""

        def moved(path: str) -> str:
            return str(Path(str(self.dirpath)) / Path(path).name) if path else path

        paths = ("best_model_path", "last_model_path", "kth_best_model_path")
        state = {**state_dict, **{name: moved(state_dict.get(name, "")) for name in paths}, "dirpath": self.dirpath}
        state["best_k_models"] = {moved(path): score for path, score in state_dict.get("best_k_models", {}).items()}
        super().load_state_dict(state)


class EveryFewMinutes(Checkpoint):
    """Callback that writes `last.ckpt` every few minutes within an epoch, between optimiser steps.

    It does not save after an epoch's last batch, because Lightning would resume after the validation that chooses the best
    checkpoint; `last.ckpt` is written at the end of the epoch instead. It does not save between the batches of one optimiser
    step, because accumulated gradients are not part of a checkpoint.

    It measures the time itself, because Lightning's timer does not run for an engine with manual optimisation. Ranks agree
    through their devices, and on accelerators so do only once in `LATEST` steps: a step that asks waits for its device.
    """

    def __init__(self, folder: Path, minutes: float) -> None:
        super().__init__(folder, "last", every_n_train_steps=0, enable_version_counter=False)
        self.seconds = 60 * minutes
        self.saved = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        """Save if the interval has passed."""
        if trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        asynchronous = trainer.strategy.root_device.type != "cpu"
        if distributed.world() > 1 and asynchronous and trainer.global_step % LATEST:
            return
        if trainer.strategy.broadcast(time.monotonic() - self.saved >= self.seconds):
            assert isinstance(pl_module, Engine)
            pl_module.finish_batch(batch)  # so that the checkpoint holds what methods do after the batch
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
            self.saved = time.monotonic()


def checkpoint_callbacks(folder: Path, monitor: str, minutes: float) -> list[pl.Callback]:
    """Return the callbacks that write `best.ckpt` (weights only, by the monitored metric) and `last.ckpt`.

    `last.ckpt` is written at the end of each epoch and every `minutes`.
    """
    best = Checkpoint(
        folder,
        "best",
        monitor=f"validation/{monitor}",
        mode="max" if higher_is_better(monitor) else "min",
        save_weights_only=True,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    last = Checkpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False)
    return [best, last, EveryFewMinutes(folder, minutes)]


def seal(file: IO[bytes]) -> None:
    """Append a checksum to a zip archive without a comment, as its comment.

    Args:
        file: the archive, open for reading and writing.
    """
    file.seek(-2, os.SEEK_END)  # an archive without a comment ends with the comment's length
    file.write((len(SEAL) + DIGITS).to_bytes(2, "little"))
    size = file.tell()
    file.write(SEAL + _checksum(file, size))


def _checksum(file: IO[bytes], size: int) -> bytes:
    """Return the checksum of the first `size` bytes of a file, and leave the file positioned behind them."""
    digest = hashlib.blake2b(digest_size=DIGITS // 2)
    file.seek(0)
    while block := file.read(min(size, 1 << 24)):
        digest.update(block)
        size -= len(block)
    return digest.hexdigest().encode()


def _damage(file: IO[bytes]) -> str | None:
    """Return a description of the damage to a sealed file; None if its checksum matches."""
    size = file.seek(0, os.SEEK_END) - len(SEAL) - DIGITS
    if size <= 0:
        return "it is truncated"
    file.seek(size)
    mark, written = file.read(len(SEAL)), file.read()
    if mark != SEAL:
        return "it is truncated or damaged, or an earlier version of kd wrote it: there is no checksum at its end"
    return None if _checksum(file, size) == written else "it is truncated or damaged: its checksum does not match"


def refused(path: Path, why: str) -> InputError:
    """Return the error for a checkpoint that cannot be used."""
    return InputError(f"the checkpoint '{path}' cannot be used: {why}. Start this run again with resume=false", "resume")


def read_checkpoint(path: Path, digest: str) -> dict[str, Any]:
    """Read a checkpoint of a run and verify its checksum. No code in it is executed.

    Args:
        path: path of the file.
        digest: digest of the run.

    Raises:
        InputError: if it is missing, truncated, damaged, not a checkpoint of this program, or of another run.
    """
    try:
        with path.open("rb") as file:
            if why := _damage(file):
                raise refused(path, why)
            file.seek(0)
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise refused(path, "it is missing") from error
    except OSError as error:
        raise refused(path, error.strerror or str(error)) from error
    except Exception as error:  # torch's reader raises a dozen types for a file that was crafted to be wrong
        raise refused(path, f"it is no checkpoint, or holds more than tensors and numbers ({type(error).__name__})") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise refused(path, "it is not a checkpoint of this program")
    if checkpoint.get("digest") != digest:
        raise refused(path, f"it is of the run {checkpoint.get('digest')}, not of {digest}")
    return checkpoint


def drop_optimizer(path: Path, digest: str) -> None:
    """Write a checkpoint of a run again, atomically, without what only resuming needs, such as the state of the optimiser.

    Args:
        path: path of the file.
        digest: digest of the run.

    Raises:
        InputError: if it cannot be read (see `read_checkpoint`) or written.
    """
    found = read_checkpoint(path, digest)
    AtomicCheckpointIO(digest).save_checkpoint({name: found[name] for name in found if name not in OF_RESUMING}, path)


def optimizer_bytes(path: Path) -> int:
    """Return the bytes of the optimiser's state in a checkpoint, whose tensors are not read; 0 for an unreadable file."""
    try:
        states = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("optimizer_states", [])
        values = [value for state in states for of_parameter in state["state"].values() for value in of_parameter.values()]
        return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))
    except Exception:  # noqa: BLE001 - torch's reader raises a dozen types for a damaged file
        return 0


def check_state(found: Mapping[str, Any], engine: Engine, path: Path) -> None:
    """Check that a checkpoint's tensors match the state of a run's models and methods in name and shape.

    Raises:
        InputError: naming a tensor that is missing, unexpected, or of another shape.
    """
    theirs, ours = found["state_dict"], engine.state_dict()
    if apart := sorted(theirs.keys() ^ ours.keys(), key=str):
        has = "has" if apart[0] in theirs else "lacks"
        raise refused(path, f"it is of another model: it {has} '{apart[0]}'")
    for name, tensor in ours.items():
        shape = getattr(theirs[name], "shape", None)
        if shape != tensor.shape:
            raise refused(path, f"it is of another model: '{name}' is {_size(shape)}, not {_size(tensor.shape)}")


def _size(shape: torch.Size | None) -> str:
    return "no tensor" if shape is None else " x ".join(map(str, shape)) or "one number"


def check_resumable(found: Mapping[str, Any], engine: Engine, path: Path) -> None:
    """Check that training can resume from a checkpoint.

    Raises:
        InputError: if an entry is missing, has another type, or belongs to another run.
    """
    check_state(found, engine, path)
    if lacking := [name for name in (*STATE, "optimizer_states") if name not in found]:
        raise refused(path, f"it lacks {', '.join(lacking)}")
    for name, kind in ENTRY_TYPES.items():
        if not isinstance(found[name], kind):
            raise refused(path, f"its {name} is a {type(found[name]).__name__}")
    states = found["callbacks"].values()
    if not all(isinstance(state, dict) and isinstance(state.get("best_model_path") or "", str) for state in states):
        raise refused(path, "it has no states of callbacks by name")
    try:
        groups = [len(group["params"]) for state in found["optimizer_states"] for group in state["param_groups"]]
    except (KeyError, TypeError):
        groups = []
    ours = [len(group["params"]) for group in engine.optimizer_factory.optimizer(engine).param_groups]
    if groups != ours:
        raise refused(path, f"its optimiser has {groups} parameters by group, not {ours}")


def best_is_due(found: Mapping[str, Any]) -> bool:
    """Return whether the run had written `best.ckpt` when it saved this checkpoint."""
    states = found["callbacks"].values()
    return any(Path(state.get("best_model_path") or "").name == "best.ckpt" for state in states)
