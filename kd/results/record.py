"""The record of a finished run, `result.json`, and its exports."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch

from kd.build.models import BuiltModels
from kd.build.parts import Part, mixture_of
from kd.config.cohort import students_of
from kd.config.mixture import is_mixture
from kd.data.datamodule import Epoch, KDDataModule
from kd.data.tasks import headline
from kd.engines.base import Engine
from kd.engines.models import Models
from kd.models import Encoder, FrozenTeacher
from kd.models.heads import HEADS
from kd.models.latency import LATENCY_MEASURE, Latency, latencies, to_time
from kd.results.eval_results import eval_results, without_results
from kd.results.evaluate import Evaluation, Scores, baseline, folder_megabytes
from kd.results.export import TOLERANCE, export, largest_difference, model_card, origin
from kd.results.maps import maps_of, write_maps
from kd.results.mixture import mixture_record
from kd.results.predictions import predictions_of, write_predictions
from kd.results.tuned import tuned_of
from kd.runs.kept import write_kept
from kd.runs.run import Run
from kd.system import distributed
from kd.system.hardware import git, hardware, versions
from kd.system.model_sources import kept_file, recorded_files
from kd.teacher_cache.cache import CacheUnused, CacheUsed


def folder_of(run: Run, name: str, headline: str) -> Path:
    """Return the folder that a student of a run is exported to; a mixture has a folder for each task in it."""
    return run.folder(None if name == headline else name)


def exported_files(run: Run, names: Sequence[str], headline: str) -> dict[str, dict[str, Any]]:
    """Return size and digest of every exported file, by its path relative to the run's directory."""
    folders = [folder_of(run, name, headline) for name in names]
    return recorded_files(run.directory, [*folders, *map(kept_file, folders)])


def documents_of(record: Mapping[str, Any], name: str) -> dict[str, str]:
    """Return the model card of a student of a run, and its results for the hub, by their paths in the student's folder."""
    own = record["students"][name]
    label = record["student"] if len(record["students"]) == 1 else name
    counts = {"student": own["parameters"], "exported": own["exported"]}
    backbone = record["identity"].get("cohort", {}).get("backbones", {}).get(name)  # None for that of the run
    about = {**record, **own, "student": label, "parameters": counts, "backbone": backbone}
    return {"README.md": model_card(about), **eval_results(about)}


@dataclass(frozen=True)
class StudentResult:
    """Entry of the record about one student.

    Attributes:
        metrics: split -> metric -> value.
        agreement: split -> teacher -> agreement with the teacher's predictions.
        parameters: number of parameters in training, embeddings included.
        exported: number of parameters of the exported model.
        latency_ms: milliseconds for one sentence; None if the machine was too busy to tell.
        collapsed: True if it predicts a single class, or nearly the same score for every example.
        init: description of its initial weights.
        origin: its backbone and its data, for its model card.
        folder: folder of its export, relative to the run's directory.
        export_difference: largest difference between its logits and those of its export; None before the export.
        megabytes: size of the exported weights in units of 10^6 bytes; None before the export.
    """

    metrics: dict[str, Scores]
    agreement: dict[str, Scores]
    parameters: int
    exported: int
    latency_ms: float | None
    collapsed: bool
    init: str
    origin: dict[str, Any]
    folder: str
    export_difference: float | None = None
    megabytes: float | None = None


@dataclass(frozen=True)
class TeacherResult:
    """Size and speed of a teacher: number of parameters, weights in 10^6 bytes, and milliseconds for one sentence."""

    parameters: int
    megabytes: float
    latency_ms: float | None


@dataclass(frozen=True)
class Work:
    """Work of a run, over all ranks and starts.

    Attributes:
        examples: training examples seen.
        teachers: name of the teacher -> its forward passes, the examples in them, and the batches that used it.
        starts: number of starts of the run.
    """

    examples: int
    teachers: dict[str, dict[str, int]]
    starts: int

    def of(self, prefix: str) -> "Work":
        """Return the work for one task of a mixture, by the prefix of its teachers; examples are those of all tasks."""
        mine = {name.removeprefix(prefix): done for name, done in self.teachers.items() if name.startswith(prefix)}
        return replace(self, teachers=mine)


@dataclass(frozen=True)
class RunEntry:
    """Part of the record that identifies the run; for a cohort, `student` is the name of its best student."""

    method: str
    student: str
    teacher: list[str]
    pool: str
    task: str
    seed: int
    digest: str
    family: str

    @classmethod
    def of(cls, run: Run, student: str) -> Self:
        """Return the entry of a run whose student has this name."""
        spec = run.spec
        names = (spec.method["name"], student, list(spec.teacher), spec.pool.name, spec.task.name)
        return cls(*names, spec.seed, run.digest, run.family)


@dataclass(frozen=True)
class ScoresEntry:
    """Part of the record with the scores that are not of one student, and with the choice of the checkpoint."""

    metrics_last: dict[str, Scores]
    metrics_teacher: dict[str, dict[str, Scores]]
    metrics_ensemble: dict[str, Scores]
    selection: dict[str, Any]

    @classmethod
    def of(cls, evaluations: Mapping[str, Evaluation], last: Scores, selection: dict[str, Any]) -> Self:
        """Return the entry of evaluations by split, and of the best student's metrics at the end of training."""
        return cls(
            metrics_last={"validation": last},
            metrics_teacher={
                name: {split: evaluation.teachers[name] for split, evaluation in evaluations.items()}
                for name in evaluations["validation"].teachers
            },
            metrics_ensemble={split: evaluation.ensemble for split, evaluation in evaluations.items() if evaluation.ensemble},
            selection=selection,
        )


@dataclass(frozen=True)
class TrainingEntry:
    """Part of the record about the cost of training and of its teachers."""

    seconds: dict[str, float]
    resumed: dict[str, Any]
    examples_per_second: float
    teacher_forward_examples: int
    teacher_forwards: dict[str, dict[str, int]]
    cache: dict[str, CacheUsed | CacheUnused]

    @classmethod
    def of(cls, run: Run, engine: Engine, work: Work, caches: dict[str, CacheUsed | CacheUnused]) -> Self:
        """Return the entry of a run whose engine has finished training."""
        filling = sum(cache.seconds for cache in caches.values() if isinstance(cache, CacheUsed))
        return cls(
            seconds={"train": round(engine.seconds, 3), "cache": filling, "before": seconds_before(run)},
            resumed={"starts": work.starts, "from_steps": engine.resumed},
            examples_per_second=round(work.examples / max(engine.seconds, 1e-9), 3),
            teacher_forward_examples=sum(done["examples"] for done in work.teachers.values()),
            teacher_forwards=work.teachers,
            cache=caches,
        )


@dataclass(frozen=True)
class SettingsEntry:
    """Part of the record with the settings and sizes that tables and the model card show."""

    notes_teacher: dict[str, Sequence[str]]
    labels: list[str] | None
    pipeline: str
    origin: dict[str, Any]
    max_length: int
    limit_train: int | None
    examples: dict[str, int]
    epochs: int
    batch_size: int | None
    batch_tokens: int | None
    accumulate: int
    steps: int
    precision: str
    ranks: int
    lr: float
    weights: dict[str, Any]

    @classmethod
    def of(cls, run: Run, teachers: Iterable[FrozenTeacher], data: KDDataModule, epoch: Epoch, steps: int) -> Self:
        """Return the entry of a run that took a number of optimiser steps."""
        spec, task = run.spec, data.examples.task
        return cls(
            notes_teacher={teacher.name: teacher.shape.notes for teacher in teachers if teacher.shape.notes},
            labels=task.labels,
            pipeline=HEADS[task.head].pipeline,
            origin=origin(run),
            max_length=spec.task.max_length,
            limit_train=spec.task.limit_train,
            examples=counts_of(data),
            epochs=spec.trainer.max_epochs,
            **batch_of(run, epoch),
            steps=steps,
            precision=spec.trainer.precision,
            ranks=distributed.world(),
            lr=spec.optimizer.lr,
            weights=spec.method.get("weights", {}),
        )


@dataclass(frozen=True)
class Provenance:
    """Part of the record about what made the run: all that enters its digest, its inputs, software, machine, and the search."""

    identity: dict[str, Any]
    inputs: dict[str, str]
    versions: dict[str, str]
    hardware: dict[str, Any]
    git: dict[str, Any] | None
    finished: str
    tuned: list[dict[str, Any]]

    @classmethod
    def of(cls, run: Run) -> Self:
        """Return the provenance of a run that is finished now, on this machine."""
        before = {} if run.inputs.before is None else {"before": run.inputs.before.digest_inputs}
        return cls(
            identity={**run.digest_inputs, **before},
            inputs={str(role): needed.name for role, needed in run.inputs},
            versions=versions(),
            hardware=hardware(),
            git=git(),
            finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            tuned=tuned_of(run.spec.tuned),
        )


@dataclass(frozen=True)
class LatencyEntry:
    """Part of the record about the measurement of latencies; `spread` is that of each model, a fraction."""

    measure: str
    threads: int
    spread: dict[str, float]


@dataclass(frozen=True)
class Result:
    """The record of a finished run.

    Attributes:
        run: names of the run.
        scores: scores that are not of one student.
        training: costs of training.
        settings: settings and sizes.
        provenance: what made the run.
        latency: how latencies were measured.
        baseline: split -> metric -> value of a constant prediction.
        teachers: name -> size and speed of a teacher.
        headline: name of the best student on validation.
        students: name -> entry of a student.
        files: path relative to the run's directory -> size and digest of an exported file; empty before the export.
    """

    run: RunEntry
    scores: ScoresEntry
    training: TrainingEntry
    settings: SettingsEntry
    provenance: Provenance
    latency: LatencyEntry
    baseline: dict[str, Scores]
    teachers: dict[str, TeacherResult]
    headline: str
    students: dict[str, StudentResult]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def dump(self) -> dict[str, Any]:
        """Return the content of `result.json`: the entries side by side, and the best student's values as the run's."""
        flat = (self.run, self.scores, self.training, self.settings, self.provenance)
        entries = {name: value for entry in flat for name, value in asdict(entry).items()}
        students = {name: asdict(student) for name, student in self.students.items()}
        best, teachers = students[self.headline], self.teachers
        counts = {name: teacher.parameters for name, teacher in teachers.items()}
        return {
            **entries,
            "latency": asdict(self.latency),
            "baseline": self.baseline,
            **{name: best[name] for name in ("metrics", "agreement", "init", "export_difference")},
            "parameters": {
                "student": best["parameters"],
                "exported": best["exported"],
                "teacher": next(iter(counts.values()), None),
                "teachers": counts,
            },
            "megabytes": {"student": best["megabytes"]} | {name: teacher.megabytes for name, teacher in teachers.items()},
            "latency_ms": {"student": best["latency_ms"]} | {name: teacher.latency_ms for name, teacher in teachers.items()},
            "collapsed": best["collapsed"],
            "headline": self.headline,
            "students": students,
            "files": self.files,
        }


def conclude(
    run: Run,
    parts: Mapping[str, Part],
    engine: Engine,
    evaluations: Mapping[str, Mapping[str, Evaluation]],
    selection: dict[str, Any],
    epoch: Epoch,
    work: Work,
) -> dict[str, Any]:
    """Export the students, check the exports, write predictions and maps of layers, and write and return the record.

    The best student on validation is the run's.

    Args:
        run: the run.
        parts: its tasks, by name.
        engine: the engine that trained them.
        evaluations: task -> split -> evaluation.
        selection: entry of the record about the chosen checkpoint.
        epoch: size of an epoch.
        work: work of the run.
    """
    for part in parts.values():
        for student in part.models.students.values():
            student.to("cpu")
    for name, part in parts.items():
        logits = {split: evaluation.logits for split, evaluation in evaluations[name].items()}
        write_predictions(part.run.predictions, predictions_of(part.examples, logits))
    write_maps(run.directory, [one for name, part in parts.items() for one in maps_of(part.models, name)], selection)
    if not is_mixture(run.spec.task):
        (name,) = parts
        best = headline(engine.task, evaluations[name]["validation"].students)
        result = conclude_part(parts[name], engine, evaluations[name], best, selection, epoch, work).dump()
        return run.finish({**result, "keep": run.spec.trainer.keep})
    mixture = mixture_of(run, {name: part.examples for name, part in parts.items()})
    scores = {name: of_task["validation"].students for name, of_task in evaluations.items()}
    students = next(iter(scores.values()))
    best = headline(
        mixture, {student: mixture.joined({name: scores[name][student] for name in scores}) for student in students}
    )
    results = {
        name: conclude_part(part, engine, evaluations[name], best, selection, epoch, work.of(part.run.prefix)).dump()
        for name, part in parts.items()
    }
    counts = {student: count_of([part.models.students[student] for part in parts.values()]) for student in students}
    last = engine.validation.get(best, {})
    record = mixture_record(mixture, results, counts, last, work.teachers, asdict(Provenance.of(run)), run.spec.task)
    return run.finish({**record, "keep": run.spec.trainer.keep})


def count_of(students: Iterable[Encoder]) -> int:
    """Return the number of parameters of students that share parts, each counted once."""
    return sum(parameter.numel() for parameter in dict.fromkeys(p for student in students for p in student.parameters()))


def conclude_part(
    part: Part,
    engine: Engine,
    evaluations: Mapping[str, Evaluation],
    best: str,
    selection: dict[str, Any],
    epoch: Epoch,
    work: Work,
) -> Result:
    """Export the students of one task of a run, and return its record; arguments as for `conclude`.

    Args:
        part: the task.
        engine: the engine that trained the run.
        evaluations: split -> evaluation.
        best: name of the run's student.
        selection: entry of the record about the chosen checkpoint.
        epoch: size of an epoch of the run.
        work: work of the run for this task.
    """
    run, models, data, task = part.run, part.models, part.data, part.examples.task
    timed = {teacher.name: to_time(teacher, task.head) for teacher in models.teachers}
    speeds = latencies({**{f"student {name}": student for name, student in models.students.items()}, **timed})
    del timed
    result = Result(
        run=RunEntry.of(run, run.spec.student.name if len(models.students) == 1 else best),
        scores=ScoresEntry.of(evaluations, of_part(part, engine.validation.get(best, {})), selection),
        training=TrainingEntry.of(run, engine, work, models.caches),
        settings=SettingsEntry.of(run, models.teachers, data, epoch, engine.global_step),
        provenance=Provenance.of(run),
        latency=LatencyEntry(LATENCY_MEASURE, torch.get_num_threads(), {name: speed.spread for name, speed in speeds.items()}),
        baseline=baseline(task, data.examples.labels),
        teachers={teacher.name: teacher_result(teacher.encoder, speeds[teacher.name]) for teacher in models.teachers},
        headline=best,
        students={
            name: student_result(run, models, name, evaluations, speeds[f"student {name}"], best) for name in models.students
        },
    )
    exported = export_students(run, models, data, result)
    return replace(result, students=exported, files=exported_files(run, list(exported), best))


def of_part(part: Part, scores: Scores) -> Scores:
    """Return the metrics of one task from those of a run, with their names in the task."""
    prefix = part.run.prefix
    return {name.removeprefix(prefix): value for name, value in scores.items() if name.startswith(prefix)}


def teacher_result(teacher: Encoder, latency: Latency) -> TeacherResult:
    """Return the entry of a teacher's model, which may have no weights."""
    return TeacherResult(teacher.parameter_count(), megabytes(teacher), latency.milliseconds)


def student_result(
    run: Run, models: BuiltModels, name: str, evaluations: Mapping[str, Evaluation], latency: Latency, best: str
) -> StudentResult:
    """Return the entry of a student that is not exported yet."""
    student = models.students[name]
    untested: dict[str, Scores] = {} if "test" in evaluations else {"test": {}}
    return StudentResult(
        metrics={split: evaluation.students[name] for split, evaluation in evaluations.items()} | untested,
        agreement={split: evaluation.agreement[name] for split, evaluation in evaluations.items()},
        parameters=student.parameter_count(),
        exported=sum(parameter.numel() for parameter in student.plain().parameters()),
        latency_ms=latency.milliseconds,
        collapsed=evaluations["validation"].collapsed.get(name, False),
        init=models.inits[name],
        origin=origin(run, students_of(run.spec).get(name)),
        folder=str(folder_of(run, name, best).relative_to(run.directory)),
    )


def export_students(run: Run, models: Models, data: KDDataModule, result: Result) -> dict[str, StudentResult]:
    """Export students with their documents, and what their methods keep; print why there are no results for the hub, if so.

    Returns:
        Name of the student -> its entry with size and difference of the exported model.
    """
    record, exported = result.dump(), {}
    if reason := without_results(record):
        print(f"no results for the hub beside the student: {reason}", flush=True)
    for index, (name, student) in enumerate(models.students.items()):
        folder = folder_of(run, name, result.headline)
        export(student, folder, documents_of(record, name))
        write_kept(folder, models.methods[name].kept())
        exported[name] = replace(
            result.students[name],
            export_difference=export_difference(student, index, folder, data),
            megabytes=round(folder_megabytes(folder, "*.safetensors"), 2),
        )
    return exported


def seconds_before(run: Run) -> float:
    """Return the seconds of training of the first runs of this run's method (`method.before`)."""
    first = run.inputs.before
    if first is None or first.result is None:
        return 0.0
    return float(first.result["seconds"]["train"]) + float(first.result["seconds"].get("before", 0.0))


def counts_of(data: KDDataModule) -> dict[str, int]:
    """Return the number of examples of each split; where a part of train is held, `train` is the rest and `held` that part."""
    counts = {split: len(texts) for split, texts in data.examples.texts.items()}
    return counts if not data.held_count else {**counts, "train": data.trained_count, "held": data.held_count}


def batch_of(run: Run, epoch: Epoch) -> dict[str, Any]:
    """Return the largest number of examples, or of padded tokens, of an optimiser step, and its batches, for the record.

    The numbers are smaller than configured if an epoch has fewer batches than `trainer.accumulate`, or train has fewer
    examples than a batch.
    """
    trainer = run.spec.trainer
    accumulate = min(trainer.accumulate, epoch.batches)
    if trainer.batch_tokens is None:
        size = min(trainer.batch_size * accumulate, epoch.examples)
        return {"batch_size": size, "batch_tokens": None, "accumulate": accumulate}
    return {"batch_size": None, "batch_tokens": trainer.batch_tokens * accumulate, "accumulate": accumulate}


def export_difference(student: Encoder, index: int, folder: Path, data: KDDataModule) -> float:
    """Return the largest difference between a student's logits and those of its exported model.

    Raises:
        RuntimeError: if it is larger than `TOLERANCE`, the rounding.
    """
    inputs = data.probe("validation", 16).students[index]
    difference = largest_difference(student, folder, inputs, data.examples.task.head)
    if not difference <= TOLERANCE:
        raise RuntimeError(f"the exported student's logits differ from the run's by {difference:g}; nothing was recorded")
    return difference


def megabytes(model: Encoder) -> float:
    """Return the size of a model's weights in memory, in units of 10^6 bytes."""
    count: int = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    return round(count / 1e6, 2)
