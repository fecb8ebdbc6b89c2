"""The record of a finished run, `result.json`, and its exports."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kd.build.models import Models
from kd.data.datamodule import KDDataModule
from kd.data.tasks import headline
from kd.engines.base import Engine
from kd.models import Encoder
from kd.models.heads import HEADS
from kd.models.latency import LATENCY_MEASURE, latencies, to_time
from kd.results.evaluate import Evaluation, baseline, folder_megabytes
from kd.results.export import TOLERANCE, export, largest_difference, model_card, origin
from kd.runs.run import Run
from kd.system import distributed
from kd.system.hardware import git, hardware, versions
from kd.system.model_sources import recorded_files


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
            "cache": sum(getattr(cache, "seconds", 0.0) for cache in models.caches.values()),
            "before": seconds_before(run),
        },
        "resumed": {"starts": counts["starts"], "from_steps": engine.resumed},
        "examples_per_second": round(counts["examples"] / max(engine.seconds, 1e-9), 3),
        "teacher_forward_examples": sum(work["examples"] for work in counts["teachers"].values()),
        "teacher_forwards": counts["teachers"],
        "cache": {name: asdict(cache) for name, cache in models.caches.items()},
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
        "identity": {**run.digest_inputs, **({"before": run.inputs.before.digest_inputs} if run.inputs.before else {})},
        "inputs": {str(role): needed.name for role, needed in run.inputs},
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
    first = run.inputs.before
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
