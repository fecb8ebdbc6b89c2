"""Training proper: from a planned run whose inputs are done to its record."""

import logging
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import transformers
from omegaconf import OmegaConf

from kd import distributed
from kd.build import Models, build_data, build_engine, build_models, make
from kd.checkpoints import AtomicCheckpointIO, checkpoint_callbacks, read_checkpoint
from kd.data.datamodule import Examples, KDData
from kd.engines.distiller import Distiller
from kd.evaluate import evaluate, folder_megabytes, latencies
from kd.export import TOLERANCE, export, largest_difference, model_card
from kd.hardware import git, hardware, versions
from kd.loggers import History, close_wandb
from kd.models.heads import HEADS
from kd.preflight import preflight
from kd.progress import Progress
from kd.runs import Run, write_atomically


def fit(run: Run, examples: Examples) -> dict[str, Any]:
    """Train, evaluate and export a run whose inputs are done.

    Raises:
        InputError: for what the user can put right.
        KeyboardInterrupt: on Ctrl-C, after Lightning has shut down.
    """
    quieten()
    spec = run.spec
    models = build_models(run, examples.task, texts=examples.texts["train"])
    data = build_data(run, examples, models)
    engine = build_engine(run, models, examples.task)
    if distributed.is_first():
        run.begin(spec.resume)
        if spec.preflight:
            print("\n".join(preflight(run, engine, data, models.init).lines), flush=True)
    distributed.agree(None)
    last = run.checkpoints / "last.ckpt"
    checkpoint = read_checkpoint(last) if last.is_file() else None
    step = None if checkpoint is None else int(checkpoint["global_step"])
    if checkpoint is not None and distributed.is_first():
        print(f"  going on from step {step}", flush=True)
    del checkpoint
    trainer = build_trainer(run, engine, step)
    try:
        train(trainer, engine, data, last if step is not None else None)
    finally:
        close_wandb()
    device = trainer.strategy.root_device
    selection = select(run, engine)
    scores = {
        split: evaluate(models.student, models.teachers, data.loader(split), engine.task, device)
        for split in examples.evaluated
    }
    counts = {
        name: distributed.total(value) for name, value in (("examples", engine.examples), ("teacher", engine.teacher_examples))
    }
    record: dict[str, Any] | None = None
    if distributed.is_first():
        record = conclude(run, models, data, engine, scores, selection, counts)
    return distributed.agree(record)  # type: ignore[no-any-return]


def quieten() -> None:
    """Leave out what libraries say that is of no use to the person at the terminal."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()  # type: ignore[attr-defined]
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*resuming from a checkpoint that ended before the epoch ended.*",  # the sampler goes on where it stopped
        ".*number of training batches .* is smaller than the logging interval.*",
        ".*dataloader is not resumable.*",
        ".*will save all targets and predictions in buffer.*",
        ".*sync_dist=True.*",  # torchmetrics has reduced what is logged on epoch level
        ".*isinstance.treespec, LeafSpec.*",
        ".*`lr_scheduler.step\\(\\)` before `optimizer.step\\(\\)`.*",
    ):
        warnings.filterwarnings("ignore", message)


def build_trainer(run: Run, engine: Distiller, step: int | None) -> pl.Trainer:
    """The Lightning trainer of a run."""
    spec = run.spec.trainer
    loggers: list[Any] = [History(run.directory / "metrics.csv", step)]
    if run.spec.logger.extra and distributed.is_first():
        container = OmegaConf.to_container(run.config, resolve=True)
        loggers.append(make(run.spec.logger.extra, "logger")(folder=run.directory, name=run.name, config=container))
    return pl.Trainer(
        accelerator=spec.accelerator,
        devices=distributed.local_world() if distributed.world() > 1 else spec.devices,
        num_nodes=max(distributed.world() // distributed.local_world(), 1),
        strategy=spec.strategy,
        precision=spec.precision,  # type: ignore[arg-type]
        max_epochs=spec.max_epochs,
        accumulate_grad_batches=spec.accumulate,
        gradient_clip_val=spec.clip,
        deterministic=spec.deterministic,
        logger=loggers,
        callbacks=[
            Progress(run.name, spec.progress),
            *checkpoint_callbacks(run.checkpoints, engine.task.monitor, spec.checkpoint_minutes),
        ],
        plugins=[AtomicCheckpointIO()],
        log_every_n_steps=10,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # the batch sampler shards without loss or repetition
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def train(trainer: pl.Trainer, engine: Distiller, data: KDData, checkpoint: Path | None) -> None:
    """Fit; Ctrl-C comes out as what it is."""
    try:
        trainer.fit(engine, datamodule=data, ckpt_path=checkpoint, weights_only=False)
    except SystemExit as error:  # Lightning's answer to Ctrl-C
        raise KeyboardInterrupt from error


def select(run: Run, engine: Distiller) -> dict[str, Any]:
    """Put the chosen weights into the student; what was chosen and by what."""
    best = run.checkpoints / "best.ckpt"
    monitor = f"validation {engine.task.monitor}"
    if run.spec.trainer.selection == "last" or not best.is_file():
        return {"kind": "last", "by": "at the end of training", "epoch": run.spec.trainer.max_epochs}
    found = read_checkpoint(best)
    engine.load_state_dict(found["state_dict"])
    return {
        "kind": "best",
        "by": f"chosen by {monitor} over {run.spec.trainer.max_epochs} epoch(s)",
        "epoch": found["epoch"] + 1,
    }


def conclude(
    run: Run,
    models: Models,
    data: KDData,
    engine: Distiller,
    scores: dict[str, Any],
    selection: dict[str, Any],
    counts: dict[str, int],
) -> dict[str, Any]:
    """Export the student, check the export, and write the record."""
    student = models.student.to("cpu")
    encoders = {"student": student, **{teacher.name: teacher.encoder for teacher in models.teachers}}
    splits = data.examples.evaluated
    record = {
        "method": run.spec.method["name"],
        "student": run.spec.student.name,
        "teacher": list(run.spec.teacher),
        "task": run.spec.task.name,
        "seed": run.spec.seed,
        "digest": run.digest,
        "family": run.family,
        "metrics": {
            **{split: scores[split]["student"] for split in splits},
            "test": scores.get("test", {}).get("student", {}),
        },
        "metrics_last": {"validation": engine.validation},
        "metrics_teacher": {t.name: {split: scores[split][t.name] for split in splits} for t in models.teachers},
        "agreement": {split: scores[split]["agreement"] for split in splits},
        "selection": selection,
        "parameters": {
            "student": student.parameter_count(),
            "exported": sum(parameter.numel() for parameter in student.plain().parameters()),
            "teacher": models.teachers[0].encoder.parameter_count() if models.teachers else None,
        },
        "seconds": {"train": round(engine.seconds, 3)},
        "examples_per_second": round(counts["examples"] / max(engine.seconds, 1e-9), 3),
        "teacher_forward_examples": counts["teacher"],
        "init": models.init,
        "labels": engine.task.labels,
        "pipeline": HEADS[engine.task.head].pipeline,
        "max_length": run.spec.task.max_length,
        "limit_train": run.spec.task.limit_train,
        "examples": {split: len(found) for split, found in data.examples.texts.items()},
        "epochs": run.spec.trainer.max_epochs,
        "batch_size": run.spec.trainer.batch_size * run.spec.trainer.accumulate,
        "precision": run.spec.trainer.precision,
        "ranks": distributed.world(),
        "lr": run.spec.optimizer.lr,
        "weights": run.spec.method.get("weights", {}),
        "identity": run.identity,
        "inputs": {role: needed.name for role, needed in run.inputs.items()},
        "versions": versions(),
        "hardware": hardware(),
        "git": git(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    export(student, run.student, model_card(record))
    difference = largest_difference(student, run.student, data.probe("validation", 16).student, HEADS[engine.task.head].auto)
    if not difference <= TOLERANCE:
        raise RuntimeError(f"the exported student's logits differ from the run's by {difference:g}; nothing was recorded")
    weights = {name: sum(t.numel() * t.element_size() for t in e.state_dict().values()) / 1e6 for name, e in encoders.items()}
    weights["student"] = folder_megabytes(run.student, "*.safetensors")
    record["megabytes"] = {name: round(value, 2) for name, value in weights.items()}
    record["latency_ms"] = {name: round(value, 3) for name, value in latencies(encoders).items()}
    record["export_difference"] = difference
    write_atomically(run.student / "README.md", model_card(record))
    run.finish(record)
    return record
