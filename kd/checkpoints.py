"""Checkpoints that a kill, a full disk or a crash cannot ruin."""

import os
import pickle
import time
import zipfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from kd.data.tasks import higher_is_better
from kd.errors import InputError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames.

    Lightning's own writer stages the file in the system's temporary folder; from another file system the last step is a
    copy, which a kill or a full disk leaves truncated in place of the checkpoint that was there.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint, all or nothing."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(target.name + ".part")
        try:
            with draft.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, target)
        finally:
            draft.unlink(missing_ok=True)


class Checkpoint(ModelCheckpoint):
    """A ModelCheckpoint whose folder may have moved: Lightning's forgets the best score when the path is another."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state up, with every path in the present folder."""

        def moved(path: str) -> str:
            return str(Path(str(self.dirpath)) / Path(path).name) if path else path

        paths = ("best_model_path", "last_model_path", "kth_best_model_path")
        state = {**state_dict, **{name: moved(state_dict.get(name, "")) for name in paths}, "dirpath": self.dirpath}
        state["best_k_models"] = {moved(path): score for path, score in state_dict.get("best_k_models", {}).items()}
        super().load_state_dict(state)


class EveryFewMinutes(Checkpoint):
    """Keeps `last.ckpt` fresh inside long epochs, between optimiser steps.

    After an epoch's last batch it leaves the saving to the end of the epoch: Lightning would otherwise resume behind the
    validation that chooses the best checkpoint. Between the batches of one optimiser step it waits: gradients that have
    been accumulated are not part of a checkpoint.

    The clock is its own, because Lightning's does not run for an engine that steps its optimiser itself.
    """

    def __init__(self, folder: Path, minutes: float) -> None:
        super().__init__(folder, "last", every_n_train_steps=0, enable_version_counter=False)
        self.seconds = 60 * minutes
        self.saved = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if the time has come."""
        if trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if trainer.strategy.broadcast(time.monotonic() - self.saved >= self.seconds):
            pl_module.on_train_batch_end(outputs, batch, batch_idx)  # Lightning calls it after the callbacks
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
            self.saved = time.monotonic()


def checkpoint_callbacks(folder: Path, monitor: str, minutes: float) -> list[pl.Callback]:
    """`best.ckpt` by the monitored metric (weights only), and `last.ckpt` at the end of each epoch and every few minutes."""
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


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of this program's own making.

    Raises:
        InputError: if the file is truncated or is none.
    """
    try:
        # Written by this program into the run's own folder; it holds optimiser and loop states, not only tensors.
        found = torch.load(path, map_location="cpu", weights_only=False)
    except (RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, OSError) as error:
        raise InputError(
            f"the checkpoint '{path}' cannot be read, it is truncated or damaged ({str(error).splitlines()[0]}). "
            "Begin this run again with resume=false",
            "resume",
        ) from error
    if not isinstance(found, dict) or "state_dict" not in found:
        raise InputError(f"'{path}' is not a checkpoint of this program. Begin this run again with resume=false", "resume")
    return found
