"""The Lightning trainer of a run, and the checkpoint that is selected after training."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import transformers
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.loggers import Logger

from kd.engines.base import Engine
from kd.results.tables import cure
from kd.runs.run import Run
from kd.system import distributed
from kd.training.checkpoints import (
    AtomicCheckpointIO,
    best_is_due,
    check_resumable,
    check_state,
    checkpoint_callbacks,
    read_checkpoint,
)
from kd.training.graphs import graph_callbacks
from kd.training.loggers import History
from kd.training.progress_bar import ProgressBar
from kd.training.tracking import begin_all


def last_step(run: Run, engine: Engine) -> int | None:
    """Return the optimiser step of the checkpoint that a run resumes from; None if it has none.

    Raises:
        InputError: if a checkpoint is damaged, missing, or of another run.
    """
    last, best = run.checkpoints / "last.ckpt", run.checkpoints / "best.ckpt"
    if not last.exists():
        return None
    checkpoint = read_checkpoint(last, run.digest)
    check_resumable(checkpoint, engine, last)
    if run.spec.trainer.selection == "best" and best_is_due(checkpoint):  # before training, not after it
        check_state(read_checkpoint(best, run.digest), engine, best)
    return int(checkpoint["global_step"])


def quieten() -> None:
    """Silence messages of libraries that do not help the user of the command."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()  # type: ignore[attr-defined]
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*resuming from a checkpoint that ended before the epoch ended.*",  # the sampler resumes at the next batch
        ".*number of training batches .* is smaller than the logging interval.*",
        ".*dataloader is not resumable.*",
        ".*will save all targets and predictions in.*buffer.*",
        ".*sync_dist=True.*",  # metrics that are logged at the end of an epoch are reduced by torchmetrics
        ".*isinstance.treespec, LeafSpec.*",
        ".*`lr_scheduler.step\\(\\)` before `optimizer.step\\(\\)`.*",
    ):
        warnings.filterwarnings("ignore", message)


def callbacks_of(run: Run, engine: Engine) -> list[pl.Callback]:
    """Return the callbacks of a run's training: its progress bar and its checkpoints."""
    spec = run.spec.trainer
    advice = cure(list(run.spec.teacher), vars(run.spec.student))
    checkpoints = checkpoint_callbacks(run.checkpoints, engine.task.monitor, spec.checkpoint_minutes)
    return [ProgressBar(run.name, spec.progress, advice), *checkpoints]


def build_trainer(
    run: Run,
    engine: Engine,
    step: int | None,
    loggers: Sequence[Logger] = (),
    callbacks: Sequence[pl.Callback] = (),
    **options: Any,
) -> pl.Trainer:
    """Return the Lightning trainer of a run.

    Args:
        run: the run to train.
        engine: the LightningModule.
        step: optimiser step to resume from; None if training starts.
        loggers: loggers beside the history.
        callbacks: its callbacks; see `callbacks_of`.
        options: further arguments of `pl.Trainer`.
    """
    spec = run.spec.trainer
    history = History(run.directory / "metrics.csv", step)
    distributed.on_rank_zero(lambda: begin_all(loggers, history.rows))
    return pl.Trainer(
        accelerator=spec.accelerator,
        devices=distributed.local_world() if distributed.world() > 1 else spec.devices,
        num_nodes=max(distributed.world() // distributed.local_world(), 1),
        strategy=strategy_of(run, engine),
        precision=spec.precision,  # type: ignore[arg-type]
        max_epochs=spec.max_epochs,
        accumulate_grad_batches=spec.accumulate,
        gradient_clip_val=spec.clip if engine.automatic_optimization else None,
        deterministic=spec.deterministic,
        logger=[history, *loggers],
        callbacks=[*graph_callbacks(spec), *callbacks],
        # In a SLURM job, Lightning would take the job's tasks for ranks of this run, and would bypass SIGTERM.
        plugins=[AtomicCheckpointIO(run.digest), *([LightningEnvironment()] if distributed.world() == 1 else [])],
        default_root_dir=run.directory,  # Lightning searches it for a checkpoint in a SLURM job
        log_every_n_steps=10,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # the batch sampler shards without loss or repetition
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def strategy_of(run: Run, engine: Engine) -> str:
    """Return the strategy of a run: DDP has to know if a step leaves some parameters without a gradient."""
    if distributed.world() > 1 and engine.idles and engine.automatic_optimization:
        return "ddp_find_unused_parameters_true"
    return run.spec.trainer.strategy


def run_trainer(trainer: pl.Trainer, engine: Engine, data: pl.LightningDataModule, checkpoint: Path | None) -> None:
    """Train; raise KeyboardInterrupt on Ctrl-C, which Lightning turns into SystemExit."""
    try:
        with distributed.alone_afterwards():
            trainer.fit(engine, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit as error:  # Lightning raises it on Ctrl-C
        raise KeyboardInterrupt from error


def select(run: Run, engine: Engine) -> dict[str, Any]:
    """Load the selected weights into the students; return the entry of the record about the selection.

    Raises:
        InputError: if the best checkpoint is missing, damaged, or of another run.
    """
    if run.spec.trainer.selection == "last":
        return {"kind": "last", "by": "at the end of training", "epoch": run.spec.trainer.max_epochs}
    checkpoint = load_weights(run, engine, "best.ckpt")
    monitor = f"validation {engine.task.monitor}"
    whose = "" if len(engine.learners) == 1 else f" of the best of {len(engine.learners)} students"
    return {
        "kind": "best",
        "by": f"chosen by {monitor}{whose} over {run.spec.trainer.max_epochs} epoch(s)",
        "epoch": checkpoint["epoch"] + 1,
    }


def load_weights(run: Run, engine: Engine, name: str) -> dict[str, Any]:
    """Load a checkpoint's weights into a run's models; return the checkpoint.

    Raises:
        InputError: if it is missing, damaged, or of another run.
    """
    path = run.checkpoints / name
    checkpoint = read_checkpoint(path, run.digest)
    check_state(checkpoint, engine, path)
    engine.load_state_dict(checkpoint["state_dict"])
    return checkpoint
