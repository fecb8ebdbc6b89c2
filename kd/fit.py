"""Training proper: from a planned run whose inputs are done to its record."""

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
        InputError: for what the user can put right.
        KeyboardInterrupt: on Ctrl-C, after Lightning has shut down.
    """
    quieten()
    models = build_models(run, examples.task, texts=examples.texts["train"])
    data = build_data(run, examples, models)
    keep_memory()  # from here on: what building took, a teacher's weights among it, goes back to the system
    engine = build_engine(run, models, examples.task)
    distributed.on_rank_zero(lambda: begin(run, engine, data, models.inits))
    starts = count_fills(run, engine, models.caches)
    step = last_step(run, engine)
    if step is not None:
        distributed.print_rank_zero(f"  going on from step {step}")
    trainer = build_trainer(run, engine, step)
    try:
        run_trainer(trainer, engine, data, run.checkpoints / "last.ckpt" if step is not None else None)
    finally:
        close_wandb()
    for encoder in (*models.students.values(), *models.teaching):
        encoder.compiled = False  # what is scored, timed and exported is the model that others load
    device = trainer.strategy.root_device
    selection = select(run, engine)
    if models.online is not None:  # from here on it is a teacher like any other
        models.teachers.append(FrozenTeacher(models.online, next(iter(run.spec.teacher))))
    scores = {
        split: evaluate(models.students, models.teachers, data.loader(split), engine.task, device)
        for split in examples.evaluated
    }
    work = {name: {**done, "examples": distributed.total(done["examples"])} for name, done in engine.teacher_work.items()}
    counts = {"examples": distributed.total(engine.examples), "teachers": work, "starts": starts}
    return distributed.on_rank_zero(lambda: conclude(run, models, data, engine, scores, selection, counts))


def begin(run: Run, engine: Engine, data: KDDataModule, inits: Mapping[str, str]) -> None:
    """Make the run's folder, and look for what usually goes wrong."""
    run.begin(run.spec.resume)
    if run.spec.preflight:
        distributed.print_rank_zero("\n".join(preflight(run, engine, data, inits).lines))


def count_fills(run: Run, engine: Engine, caches: dict[str, dict[str, Any]]) -> int:
    """Add what earlier starts of this run spent on filling caches: a kill before the first checkpoint must not hide it.

    Args:
        run: whose folder holds the sums, in `checkpoints/costs.json`.
        engine: its teachers get the passes of all starts.
        caches: what the record will say of them; they get the seconds of all starts.

    Returns:
        How often this run was started.
    """
    spent: dict[str, dict[str, Any]] = {}
    for name, done in work_of_all(distributed.gather(engine.work_of_teachers())).items():
        told = caches.get(name, {})
        spent[name] = {**done, "seconds": told.get("seconds", 0.0), "written": told.get("written", [])}

    def added() -> dict[str, Any]:
        path = run.checkpoints / "costs.json"
        kept = read_record(path, sealed=True)
        if kept is not None and not are_costs(kept, spent):
            kept = None
        if kept is None and path.exists():
            distributed.print_rank_zero(
                f"  '{path}' is damaged: what earlier starts of this run spent on caches is not counted"
            )
        kept = kept or {"starts": 0, "caches": {}}
        sums = {
            name: {kind: value + kept["caches"].get(name, {}).get(kind, type(value)()) for kind, value in now.items()}
            for name, now in spent.items()
        }
        return write_record(path, {"starts": 1 + kept["starts"], "caches": sums})

    sums = distributed.on_rank_zero(added)
    for teacher in engine.teachers:
        known = sums["caches"][teacher.name]
        teacher.work = {kind: known[kind] if distributed.is_rank_zero() else 0 for kind in teacher.work}
        if "seconds" in caches.get(teacher.name, {}):
            caches[teacher.name] |= {"seconds": round(known["seconds"], 3), "written": list(dict.fromkeys(known["written"]))}
    engine.filled = engine.work_of_teachers()
    return int(sums["starts"])


def are_costs(kept: Mapping[str, Any], now: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a record has a number of starts and, by teacher, sums of the kinds that are added to it."""
    caches = kept.get("caches")
    if type(kept.get("starts")) is not int or not isinstance(caches, Mapping):
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
    """The optimiser step that a run goes on from; None where it begins.

    Raises:
        InputError: if a checkpoint is damaged, missing, or of another run.
    """
    last, best = run.checkpoints / "last.ckpt", run.checkpoints / "best.ckpt"
    if not last.exists():
        return None
    found = read_checkpoint(last, run.digest)
    check_resumable(found, engine, last)
    if run.spec.trainer.selection == "best" and best_is_due(found):  # now, not when training is over
        check_state(read_checkpoint(best, run.digest), engine, best)
    return int(found["global_step"])


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
        ".*will save all targets and predictions in.*buffer.*",
        ".*sync_dist=True.*",  # torchmetrics has reduced what is logged on epoch level
        ".*isinstance.treespec, LeafSpec.*",
        ".*`lr_scheduler.step\\(\\)` before `optimizer.step\\(\\)`.*",
    ):
        warnings.filterwarnings("ignore", message)


def build_trainer(
    run: Run, engine: Engine, step: int | None, callbacks: Sequence[pl.Callback] | None = None, **options: Any
) -> pl.Trainer:
    """The Lightning trainer of a run.

    Args:
        run: whose trainer it is.
        engine: what it trains.
        step: to go on from; None at the beginning.
        callbacks: in place of progress and checkpoints.
        options: of the trainer, beside those that follow from the run.
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
        # One process is alone also inside a SLURM job: Lightning would take the job's tasks for its own and bypass SIGTERM.
        plugins=[AtomicCheckpointIO(run.digest), *([LightningEnvironment()] if distributed.world() == 1 else [])],
        default_root_dir=run.directory,  # in a SLURM job Lightning looks there, else in the working folder, for a checkpoint
        log_every_n_steps=10,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # the batch sampler shards without loss or repetition
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def run_trainer(trainer: pl.Trainer, engine: Engine, data: KDDataModule, checkpoint: Path | None) -> None:
    """Fit; Ctrl-C comes out as what it is."""
    try:
        trainer.fit(engine, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit as error:  # Lightning's answer to Ctrl-C
        raise KeyboardInterrupt from error


def select(run: Run, engine: Engine) -> dict[str, Any]:
    """Put the chosen weights into the student; what was chosen and by what.

    Raises:
        InputError: if the best checkpoint is missing, damaged, or of another run.
    """
    if run.spec.trainer.selection == "last":
        return {"kind": "last", "by": "at the end of training", "epoch": run.spec.trainer.max_epochs}
    found = load_weights(run, engine, "best.ckpt")
    monitor = f"validation {engine.task.monitor}"
    whose = "" if len(engine.learners) == 1 else f" of the best of {len(engine.learners)} students"
    return {
        "kind": "best",
        "by": f"chosen by {monitor}{whose} over {run.spec.trainer.max_epochs} epoch(s)",
        "epoch": found["epoch"] + 1,
    }


def load_weights(run: Run, engine: Engine, name: str) -> dict[str, Any]:
    """Put a checkpoint's weights into a run's models; the checkpoint.

    Raises:
        InputError: if it is missing, damaged, or of another run.
    """
    path = run.checkpoints / name
    found = read_checkpoint(path, run.digest)
    check_state(found, engine, path)
    engine.load_state_dict(found["state_dict"])
    return found


def export_again(run: Run, examples: Examples, record: dict[str, Any]) -> dict[str, Any]:
    """Export the students of a finished run once more, from its checkpoint, and record what was written.

    Args:
        run: done; its inputs are as well.
        examples: of its task.
        record: of the run.

    Raises:
        InputError: if the checkpoint cannot be read, or its weights are not those that were recorded.
    """
    quieten()
    record = {"origin": origin(run), **record}  # of an earlier version, the record has none
    models = build_models(run, examples.task, texts=examples.texts["train"])
    engine = build_engine(run, models, examples.task)
    load_weights(run, engine, f"{run.spec.trainer.selection}.ckpt")
    for name, student in models.students.items():
        student.compiled = False
        known = record["students"].get(name)
        if not isinstance(known, dict):
            raise InputError(f"'{run.directory / 'result.json'}' does not know the student '{name}'; remove it", "resume")
        export(student, folder_of(run, name, record["headline"]), card_of(record, name))
    written = exported_files(run, list(models.students), record["headline"])
    for name, known in (record.get("files") or {}).items():
        if name.endswith(".safetensors") and written.get(name) != known:
            raise InputError(
                f"'{run.directory / name}' was exported again, and differs from what result.json says of it. One of the two is "
                "damaged: begin this run again with resume=false",
                "resume",
            )
    return run.finish({**record, "files": written})


def folder_of(run: Run, name: str, headline: str) -> Path:
    """Where a student of a run is exported to."""
    return run.student if name == headline else run.directory / "peers" / name


def exported_files(run: Run, names: Sequence[str], headline: str) -> dict[str, dict[str, Any]]:
    """Size and digest of every exported file, by its path in the run's directory."""
    return recorded_files(run.directory, [folder_of(run, name, headline) for name in names])


def card_of(record: Mapping[str, Any], name: str) -> str:
    """The model card of one of a run's students."""
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
    """Export the students, check the exports, and write the record. The best student on validation is the run's."""
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
            "cache": sum(made.get("seconds", 0.0) for made in models.caches.values()),
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
        "examples": {split: len(found) for split, found in data.examples.texts.items()},
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
    speeds = latencies({**{f"student {name}": each for name, each in models.students.items()}, **timed})
    del timed
    record["latency"] = {
        "measure": LATENCY_MEASURE,
        "threads": torch.get_num_threads(),
        "spread": {name: found.spread for name, found in speeds.items()},
    }
    record["baseline"] = baseline(engine.task, data.examples.labels)
    folders = {name: folder_of(run, name, first) for name in models.students}
    students: dict[str, Any] = {}
    for index, (name, student) in enumerate(models.students.items()):
        own: dict[str, Any] = {
            "metrics": {**{split: found.students[name] for split, found in scores.items()}},
            "agreement": {split: found.agreement[name] for split, found in scores.items()},
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
    counted = {name: each.parameter_count() for name, each in teachers.items()}
    record["parameters"] = {
        "student": chosen["parameters"],
        "exported": chosen["exported"],
        "teacher": next(iter(counted.values()), None),
        "teachers": counted,
    }
    record["megabytes"] = {"student": chosen["megabytes"], **{name: megabytes(each) for name, each in teachers.items()}}
    record["latency_ms"] = {"student": chosen["latency_ms"], **{name: speeds[name].milliseconds for name in teachers}}
    record["collapsed"] = chosen["collapsed"]
    record |= {"headline": first, "students": students, "files": exported_files(run, list(students), first)}
    return run.finish(record)


def seconds_before(run: Run) -> float:
    """Seconds of training of the runs that this one's method begins with."""
    first = run.inputs.get("before")
    if first is None or first.result is None:
        return 0.0
    return float(first.result["seconds"]["train"]) + float(first.result["seconds"].get("before", 0.0))


def batch_of(run: Run, data: KDDataModule) -> dict[str, int | None]:
    """Examples or padded tokens of an optimiser step at most, and its batches, as a record states them.

    An epoch that has fewer batches than `trainer.accumulate`, or a training set of less than a batch, makes them fewer.
    """
    trainer = run.spec.trainer
    accumulate = min(trainer.accumulate, len(data.sampler("train", run.spec.seed)))
    if trainer.batch_tokens is None:
        examples = len(data.examples.texts["train"])
        return {"batch_size": min(trainer.batch_size * accumulate, examples), "batch_tokens": None, "accumulate": accumulate}
    return {"batch_size": None, "batch_tokens": trainer.batch_tokens * accumulate, "accumulate": accumulate}


def export_difference(student: Encoder, index: int, folder: Path, data: KDDataModule) -> float:
    """Largest difference between a student's logits and those of its exported folder.

    Raises:
        RuntimeError: if it is more than rounding.
    """
    inputs = data.probe("validation", 16).students[index]
    difference = largest_difference(student, folder, inputs, HEADS[data.examples.task.head].auto)
    if not difference <= TOLERANCE:
        raise RuntimeError(f"the exported student's logits differ from the run's by {difference:g}; nothing was recorded")
    return difference


def megabytes(model: Encoder) -> float:
    """Size of a model's weights in memory, in units of 10^6 bytes."""
    count: int = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    return round(count / 1e6, 2)
