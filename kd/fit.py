"""Training, evaluation and export of a planned run whose inputs are done, up to its record."""

import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import transformers
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from omegaconf import OmegaConf

from kd import distributed
from kd.build import Models, build_data, build_engine, build_models
from kd.checkpoints import (
    AtomicCheckpointIO,
    best_is_due,
    check_resumable,
    check_state,
    checkpoint_callbacks,
    read_checkpoint,
)
from kd.data.datamodule import Examples, KDDataModule
from kd.data.tasks import headline
from kd.engines.base import Engine, work_of_all
from kd.errors import InputError
from kd.evaluate import LATENCY_MEASURE, Evaluation, baseline, evaluate, folder_megabytes, latencies, to_time
from kd.export import TOLERANCE, export, largest_difference, model_card, origin
from kd.hardware import git, hardware, keep_memory, versions
from kd.loggers import History, close_wandb
from kd.make import logger_maker
from kd.models import Encoder, FrozenTeacher
from kd.models.heads import HEADS
from kd.preflight import preflight
from kd.progress import ProgressBar
from kd.report import cure
from kd.runs import Run, read_record, write_record
from kd.sources import recorded_files


def fit(run: Run, examples: Examples) -> dict[str, Any]:
    """Train, evaluate and export a run whose inputs are done.

    Raises:
        InputError: for an error that the user can correct.
        KeyboardInterrupt: on Ctrl-C, after Lightning has shut down.
    """
    quieten()
    models = build_models(run, examples.task, texts=examples.texts["train"])
    data = build_data(run, examples, models)
    keep_memory()  # from here on, so that memory of building, such as a teacher's weights, is returned to the system
    engine = build_engine(run, models, examples.task)
    distributed.on_rank_zero(lambda: begin(run, engine, data, models.inits))
    starts = count_fills(run, engine, models.caches)
    step = last_step(run, engine)
    if step is not None:
        distributed.print_rank_zero(f"  resuming from step {step}")
    trainer = build_trainer(run, engine, step)
    try:
        run_trainer(trainer, engine, data, run.checkpoints / "last.ckpt" if step is not None else None)
    finally:
        close_wandb()
    for encoder in (*models.students.values(), *models.teaching):
        encoder.compiled = False  # the exported model is not compiled: score and time the same model
    device = trainer.strategy.root_device
    selection = select(run, engine)
    if models.online is not None:  # it is evaluated like a frozen teacher
        models.teachers.append(FrozenTeacher(models.online, next(iter(run.spec.teacher))))
    scores = {
        split: evaluate(models.students, models.teachers, data.loader(split), engine.task, device)
        for split in examples.evaluated
    }
    work = {name: {**done, "examples": distributed.total(done["examples"])} for name, done in engine.teacher_work.items()}
    counts = {"examples": distributed.total(engine.examples), "teachers": work, "starts": starts}
    return distributed.on_rank_zero(lambda: conclude(run, models, data, engine, scores, selection, counts))


def begin(run: Run, engine: Engine, data: KDDataModule, inits: Mapping[str, str]) -> None:
    """Make the run's folder, and run the preflight checks."""
    run.begin(run.spec.resume)
    if run.spec.preflight:
        distributed.print_rank_zero("\n".join(preflight(run, engine, data, inits).lines))


def count_fills(run: Run, engine: Engine, caches: dict[str, dict[str, Any]]) -> int:
    """Add the cost of filling caches in earlier starts of this run, which a kill before the first checkpoint must not hide.

    Args:
        run: the run; the sums are in `checkpoints/costs.json` of its folder.
        engine: engine whose teachers get the forward counts of all starts.
        caches: entries of the record about caches, by teacher; they get the seconds of all starts.

    Returns:
        Number of starts of this run.
    """
    spent: dict[str, dict[str, Any]] = {}
    for name, done in work_of_all(distributed.gather(engine.work_of_teachers())).items():
        entry = caches.get(name, {})
        spent[name] = {**done, "seconds": entry.get("seconds", 0.0), "written": entry.get("written", [])}

    def write_sums() -> dict[str, Any]:
        path = run.checkpoints / "costs.json"
        earlier = read_record(path, sealed=True)
        if earlier is not None and not are_costs(earlier, spent):
            earlier = None
        if earlier is None and path.exists():
            distributed.print_rank_zero(
                f"  '{path}' is damaged: the cost of caches in earlier starts of this run is not counted"
            )
        earlier = earlier or {"starts": 0, "caches": {}}
        sums = {
            name: {kind: value + earlier["caches"].get(name, {}).get(kind, type(value)()) for kind, value in now.items()}
            for name, now in spent.items()
        }
        return write_record(path, {"starts": 1 + earlier["starts"], "caches": sums})

    sums = distributed.on_rank_zero(write_sums)
    for teacher in engine.teachers:
        total = sums["caches"][teacher.name]
        teacher.work = {kind: total[kind] if distributed.is_rank_zero() else 0 for kind in teacher.work}
        if "seconds" in caches.get(teacher.name, {}):
            caches[teacher.name] |= {"seconds": round(total["seconds"], 3), "written": list(dict.fromkeys(total["written"]))}
    engine.filled = engine.work_of_teachers()
    return int(sums["starts"])


def are_costs(record: Mapping[str, Any], now: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return whether a record has a number of starts and, by teacher, sums to which the values of `now` can be added."""
    caches = record.get("caches")
    if type(record.get("starts")) is not int or not isinstance(caches, Mapping):
        return False
    for name, kinds in now.items():
        earlier = caches.get(name, {})
        if not isinstance(earlier, Mapping):
            return False
        for kind, value in kinds.items():
            if not isinstance(earlier.get(kind, value), list if isinstance(value, list) else int | float):
                return False
    return True


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


def build_trainer(
    run: Run, engine: Engine, step: int | None, callbacks: Sequence[pl.Callback] | None = None, **options: Any
) -> pl.Trainer:
    """Return the Lightning trainer of a run.

    Args:
        run: the run to train.
        engine: the LightningModule.
        step: optimiser step to resume from; None if training starts.
        callbacks: callbacks to use instead of the progress bar and the checkpoints.
        options: further arguments of `pl.Trainer`.
    """
    spec = run.spec.trainer
    if callbacks is None:
        checkpoints = checkpoint_callbacks(run.checkpoints, engine.task.monitor, spec.checkpoint_minutes)
        advice = cure(list(run.spec.teacher), vars(run.spec.student))
        callbacks = [ProgressBar(run.name, spec.progress, advice), *checkpoints]
    loggers: list[Any] = [History(run.directory / "metrics.csv", step)]
    if run.spec.logger.extra and distributed.is_rank_zero():
        container = OmegaConf.to_container(run.config, resolve=True)
        loggers.append(logger_maker(run.spec)(folder=run.directory, name=run.name, config=container))
    return pl.Trainer(
        accelerator=spec.accelerator,
        devices=distributed.local_world() if distributed.world() > 1 else spec.devices,
        num_nodes=max(distributed.world() // distributed.local_world(), 1),
        strategy=spec.strategy,
        precision=spec.precision,  # type: ignore[arg-type]
        max_epochs=spec.max_epochs,
        accumulate_grad_batches=spec.accumulate,
        gradient_clip_val=spec.clip if engine.automatic_optimization else None,
        deterministic=spec.deterministic,
        logger=loggers,
        callbacks=list(callbacks),
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


def run_trainer(trainer: pl.Trainer, engine: Engine, data: KDDataModule, checkpoint: Path | None) -> None:
    """Train; raise KeyboardInterrupt on Ctrl-C, which Lightning turns into SystemExit."""
    try:
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


def export_again(run: Run, examples: Examples, record: dict[str, Any]) -> dict[str, Any]:
    """Export the students of a finished run again from its checkpoint, and record the new files.

    Args:
        run: a run that is done, and whose inputs are done.
        examples: examples of its task.
        record: record of the run.

    Returns:
        The new record.

    Raises:
        InputError: if the checkpoint cannot be read, or the exported weights differ from the recorded digests.
    """
    quieten()
    record = {"origin": origin(run), **record}  # records of earlier versions have none
    models = build_models(run, examples.task, texts=examples.texts["train"])
    engine = build_engine(run, models, examples.task)
    load_weights(run, engine, f"{run.spec.trainer.selection}.ckpt")
    for name, student in models.students.items():
        student.compiled = False
        if not isinstance(record["students"].get(name), dict):
            raise InputError(f"'{run.directory / 'result.json'}' has no entry for the student '{name}'; remove it", "resume")
        export(student, folder_of(run, name, record["headline"]), card_of(record, name))
    written = exported_files(run, list(models.students), record["headline"])
    for name, recorded in (record.get("files") or {}).items():
        if name.endswith(".safetensors") and written.get(name) != recorded:
            raise InputError(
                f"'{run.directory / name}' was exported again, and differs from its digest in result.json. One of the two "
                "is damaged: start this run again with resume=false",
                "resume",
            )
    return run.finish({**record, "files": written})


def folder_of(run: Run, name: str, headline: str) -> Path:
    """Return the folder that a student of a run is exported to."""
    return run.student if name == headline else run.directory / "peers" / name


def exported_files(run: Run, names: Sequence[str], headline: str) -> dict[str, dict[str, Any]]:
    """Return size and digest of every exported file, by its path relative to the run's directory."""
    return recorded_files(run.directory, [folder_of(run, name, headline) for name in names])


def card_of(record: Mapping[str, Any], name: str) -> str:
    """Return the model card of a student of a run."""
    own = record["students"][name]
    label = record["student"] if len(record["students"]) == 1 else name
    counts = {"student": own["parameters"], "exported": own["exported"]}
    return model_card({**record, **own, "student": label, "parameters": counts})


def conclude(
    run: Run,
    models: Models,
    data: KDDataModule,
    engine: Engine,
    scores: dict[str, Evaluation],
    selection: dict[str, Any],
    counts: dict[str, Any],
) -> dict[str, Any]:
    """Export the students, check the exports, and write and return the record. The best student on validation is the run's."""
    for student in models.students.values():
        student.to("cpu")
    first = headline(engine.task, scores["validation"].students)
    teachers = {teacher.name: teacher.encoder for teacher in models.teachers}
    record = {
        "method": run.spec.method["name"],
        "student": run.spec.student.name if len(models.students) == 1 else first,
        "teacher": list(run.spec.teacher),
        "pool": run.spec.pool.name,
        "task": run.spec.task.name,
        "seed": run.spec.seed,
        "digest": run.digest,
        "family": run.family,
        "metrics_last": {"validation": engine.validation.get(first, {})},
        "metrics_teacher": {name: {split: scores[split].teachers[name] for split in scores} for name in teachers},
        "metrics_ensemble": {split: scores[split].ensemble for split in scores if scores[split].ensemble},
        "selection": selection,
        "seconds": {
            "train": round(engine.seconds, 3),
            "cache": sum(entry.get("seconds", 0.0) for entry in models.caches.values()),
            "before": seconds_before(run),
        },
        "resumed": {"starts": counts["starts"], "from_steps": engine.resumed},
        "examples_per_second": round(counts["examples"] / max(engine.seconds, 1e-9), 3),
        "teacher_forward_examples": sum(work["examples"] for work in counts["teachers"].values()),
        "teacher_forwards": counts["teachers"],
        "cache": models.caches,
        "notes_teacher": {teacher.name: teacher.shape.notes for teacher in models.teachers if teacher.shape.notes},
        "labels": engine.task.labels,
        "pipeline": HEADS[engine.task.head].pipeline,
        "origin": origin(run),
        "max_length": run.spec.task.max_length,
        "limit_train": run.spec.task.limit_train,
        "examples": {split: len(texts) for split, texts in data.examples.texts.items()},
        "epochs": run.spec.trainer.max_epochs,
        **batch_of(run, data),
        "steps": engine.global_step,
        "precision": run.spec.trainer.precision,
        "ranks": distributed.world(),
        "lr": run.spec.optimizer.lr,
        "weights": run.spec.method.get("weights", {}),
        "identity": {**run.digest_inputs, **({"before": run.inputs["before"].digest_inputs} if "before" in run.inputs else {})},
        "inputs": {role: needed.name for role, needed in run.inputs.items()},
        "versions": versions(),
        "hardware": hardware(),
        "git": git(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    timed = {teacher.name: to_time(teacher, engine.task.head) for teacher in models.teachers}
    speeds = latencies({**{f"student {name}": student for name, student in models.students.items()}, **timed})
    del timed
    record["latency"] = {
        "measure": LATENCY_MEASURE,
        "threads": torch.get_num_threads(),
        "spread": {name: latency.spread for name, latency in speeds.items()},
    }
    record["baseline"] = baseline(engine.task, data.examples.labels)
    folders = {name: folder_of(run, name, first) for name in models.students}
    students: dict[str, Any] = {}
    for index, (name, student) in enumerate(models.students.items()):
        own: dict[str, Any] = {
            "metrics": {split: evaluation.students[name] for split, evaluation in scores.items()},
            "agreement": {split: evaluation.agreement[name] for split, evaluation in scores.items()},
            "parameters": student.parameter_count(),
            "exported": sum(parameter.numel() for parameter in student.plain().parameters()),
            "latency_ms": speeds[f"student {name}"].milliseconds,
            "collapsed": scores["validation"].collapsed.get(name, False),
            "init": models.inits[name],
            "folder": str(folders[name].relative_to(run.directory)),
        }
        own["metrics"].setdefault("test", {})
        export(student, folders[name], card_of({**record, "students": {**dict.fromkeys(models.students), name: own}}, name))
        own["export_difference"] = export_difference(student, index, folders[name], data)
        own["megabytes"] = round(folder_megabytes(folders[name], "*.safetensors"), 2)
        students[name] = own
    chosen = students[first]
    record |= {key: chosen[key] for key in ("metrics", "agreement", "init", "export_difference")}
    counted = {name: teacher.parameter_count() for name, teacher in teachers.items()}
    record["parameters"] = {
        "student": chosen["parameters"],
        "exported": chosen["exported"],
        "teacher": next(iter(counted.values()), None),
        "teachers": counted,
    }
    record["megabytes"] = {"student": chosen["megabytes"], **{name: megabytes(teacher) for name, teacher in teachers.items()}}
    record["latency_ms"] = {"student": chosen["latency_ms"], **{name: speeds[name].milliseconds for name in teachers}}
    record["collapsed"] = chosen["collapsed"]
    record |= {"headline": first, "students": students, "files": exported_files(run, list(students), first)}
    return run.finish(record)


def seconds_before(run: Run) -> float:
    """Return the seconds of training of the first runs of this run's method (`method.before`)."""
    first = run.inputs.get("before")
    if first is None or first.result is None:
        return 0.0
    return float(first.result["seconds"]["train"]) + float(first.result["seconds"].get("before", 0.0))


def batch_of(run: Run, data: KDDataModule) -> dict[str, int | None]:
    """Return the largest number of examples, or of padded tokens, of an optimiser step, and its batches, for the record.

    They are fewer than configured if an epoch has fewer batches than `trainer.accumulate`, or train has fewer examples than a
    batch.
    """
    trainer = run.spec.trainer
    accumulate = min(trainer.accumulate, len(data.sampler("train", run.spec.seed)))
    if trainer.batch_tokens is None:
        examples = len(data.examples.texts["train"])
        return {"batch_size": min(trainer.batch_size * accumulate, examples), "batch_tokens": None, "accumulate": accumulate}
    return {"batch_size": None, "batch_tokens": trainer.batch_tokens * accumulate, "accumulate": accumulate}


def export_difference(student: Encoder, index: int, folder: Path, data: KDDataModule) -> float:
    """Return the largest difference between a student's logits and those of its exported model.

    Raises:
        RuntimeError: if it is larger than `TOLERANCE`, the rounding.
    """
    inputs = data.probe("validation", 16).students[index]
    difference = largest_difference(student, folder, inputs, HEADS[data.examples.task.head].auto)
    if not difference <= TOLERANCE:
        raise RuntimeError(f"the exported student's logits differ from the run's by {difference:g}; nothing was recorded")
    return difference


def megabytes(model: Encoder) -> float:
    """Return the size of a model's weights in memory, in units of 10^6 bytes."""
    count: int = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    return round(count / 1e6, 2)
