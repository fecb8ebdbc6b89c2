"""Training, evaluation and export of a planned run whose inputs are done, up to its record."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger

from kd.build.engine import build_engine
from kd.build.parts import Part, build_models_of, build_parts, data_of, engine_of
from kd.config.mixture import rename_task_error_keys
from kd.data.datamodule import Epoch, KDDataModule
from kd.data.examples import Examples
from kd.data.mixture import MixedData
from kd.engines.base import Engine, work_of_all
from kd.errors import InputError
from kd.models import FrozenTeacher
from kd.results.evaluate import evaluate
from kd.results.export import export, origin
from kd.results.record import Work, conclude, documents_of, exported_files, folder_of
from kd.runs.kept import write_kept
from kd.runs.members import members
from kd.runs.run import Role, Run, read_record, write_record
from kd.system import distributed
from kd.system.hardware import keep_memory
from kd.teacher_cache.cache import CacheUnused, CacheUsed
from kd.training.graphs import line_of_graphs
from kd.training.preflight import check_steps, preflight
from kd.training.rows import Table, TrainOccurringRows, plan_tables, readers_of
from kd.training.tracking import conclude_all, tracking
from kd.training.trainer import build_trainer, callbacks_of, last_step, load_weights, quieten, run_trainer, select


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to be trained.

    Attributes:
        parts: its tasks, by name.
        engine: its engine.
        data: its batches.
        tables: word-embedding tables of its models, with the rows to train.
    """

    parts: dict[str, Part]
    engine: Engine
    data: KDDataModule | MixedData
    tables: list[Table]


def prepare(run: Run, examples: Mapping[str, Examples]) -> Prepared:
    """Build a run whose inputs are done, from the examples of each of its tasks.

    Raises:
        InputError: for parts that do not fit each other, or a teacher that cannot be loaded.
    """
    quieten()
    parts = build_parts(run, examples)
    keep_memory()  # from here on, so that memory of building, such as a teacher's weights, is returned to the system
    engine = engine_of(run, {name: part.engine for name, part in parts.items()}, examples)
    readers = [reader for part in parts.values() for reader in readers_of(part.models, part.data)]
    return Prepared(parts, engine, data_of(run, parts), plan_tables(readers, engine, run.spec.trainer))


def fit(
    run: Run, examples: Mapping[str, Examples], role: Role | None = None, callbacks: Sequence[Callback] = ()
) -> dict[str, Any]:
    """Train, evaluate and export a run whose inputs are done.

    Args:
        run: the run.
        examples: the examples of each of its tasks, by name.
        role: its part in the run that needs it; None for the run that the command requests.
        callbacks: Lightning callbacks beside the run's own.

    Raises:
        InputError: for an error that the user can correct.
        KeyboardInterrupt: on Ctrl-C, after Lightning has shut down.
    """
    prepared = prepare(run, examples)
    parts, engine, data, tables = prepared.parts, prepared.engine, prepared.data, prepared.tables
    distributed.on_rank_zero(lambda: begin(run, parts, data.epoch(), tables))
    starts, parts = count_fills(run, engine, parts)
    step = last_step(run, engine)
    if step is not None:
        distributed.print_rank_zero(f"  resuming from step {step}")
    with tracking(run, role, step) as loggers, contextlib.closing(data):
        record = train(run, engine, parts, data, starts, step, loggers, [TrainOccurringRows(tables), *callbacks])
        distributed.on_rank_zero(lambda: conclude_all(loggers, record, notes_of(parts)))
    return record


def train(
    run: Run,
    engine: Engine,
    parts: Mapping[str, Part],
    data: KDDataModule | MixedData,
    starts: int,
    step: int | None,
    loggers: Sequence[Logger],
    callbacks: Sequence[Callback],
) -> dict[str, Any]:
    """Train a run, evaluate and export its students, and write and return its record.

    Args:
        run: the run.
        engine: its engine.
        parts: its tasks, by name.
        data: its batches.
        starts: number of starts of the run, this one included.
        step: optimiser step to resume from; None if training starts.
        loggers: loggers beside the history.
        callbacks: Lightning callbacks beside the run's own.
    """
    trainer = build_trainer(run, engine, step, loggers, [*callbacks_of(run, engine), *callbacks])
    run_trainer(trainer, engine, data, run.checkpoints / "last.ckpt" if step is not None else None)
    for part in parts.values():
        for encoder in (*part.models.students.values(), *part.models.teaching):
            encoder.compiled = False  # the exported model is not compiled: score and time the same model
    device = trainer.strategy.root_device
    selection = select(run, engine)
    parts = {name: with_online(part) for name, part in parts.items()}
    evaluations = {
        name: {
            split: evaluate(part.models.students, part.models.teachers, part.data.loader(split), part.examples.task, device)
            for split in part.examples.evaluated
        }
        for name, part in parts.items()
    }
    teacher_work = {
        name: {**done, "examples": distributed.total(done["examples"])} for name, done in engine.teacher_work.items()
    }
    work = Work(distributed.total(engine.examples), teacher_work, starts)
    return distributed.on_rank_zero(lambda: conclude(run, parts, engine, evaluations, selection, data.epoch(), work))


def notes_of(parts: Mapping[str, Part]) -> dict[str, str]:
    """Return what a run's methods have resolved, such as layer maps, by name; of each task and student if there are several."""
    notes: dict[str, str] = {}
    for task, part in parts.items():
        for student, learner in part.engine.learners.items():
            whose = [task] * (len(parts) > 1) + [student] * (len(part.engine.learners) > 1)
            notes |= {"/".join([*whose, name]): text for name, text in learner.method.describe().items()}
    return notes


def with_online(part: Part) -> Part:
    """Return a part whose online teacher, if it has one, is among the teachers: it is evaluated like a frozen one."""
    models = part.models
    if models.online is None:
        return part
    online = FrozenTeacher(models.online, next(iter(part.run.spec.teacher)))
    return replace(part, models=replace(models, teachers=[*models.teachers, online]))


def begin(run: Run, parts: Mapping[str, Part], epoch: Epoch, tables: Sequence[Table]) -> None:
    """Make the run's folder, and run the preflight checks of each task."""
    run.begin(resume=run.spec.resume)
    if not run.spec.preflight:
        return
    for name, part in parts.items():
        if part.run.member is not None:
            distributed.print_rank_zero(f"  {name}:")
        with rename_task_error_keys(run.spec.task, name):
            report = preflight(part.run, part.engine, part.data, part.models)
        distributed.print_rank_zero("\n".join(report.lines))
    report = check_steps(run, epoch)
    for table in tables:
        report.note(table.line)
    lengths = {length for part in parts.values() for length in part.data.padded_lengths}
    if (line := line_of_graphs(run.spec.trainer, lengths)) is not None:
        report.note(line)
    for line in report.lines:
        distributed.print_rank_zero(line)


def count_fills(run: Run, engine: Engine, parts: Mapping[str, Part]) -> tuple[int, dict[str, Part]]:
    """Add the cost of filling caches in earlier starts of this run, which a kill before the first checkpoint must not hide.

    Args:
        run: the run; the sums are in `checkpoints/costs.json` of its folder.
        engine: engine whose teachers get the forward counts of all starts.
        parts: its tasks, whose models have the entries of the record about caches, by teacher.

    Returns:
        Number of starts of this run, and the parts with the seconds and splits of all starts.
    """
    caches = {f"{part.run.prefix}{teacher}": cache for part in parts.values() for teacher, cache in part.models.caches.items()}
    spent: dict[str, dict[str, Any]] = {}
    for name, done in work_of_all(distributed.gather(engine.work_of_teachers())).items():
        cache = caches.get(name)
        seconds, written = (cache.seconds, cache.written) if isinstance(cache, CacheUsed) else (0.0, [])
        spent[name] = {**done, "seconds": seconds, "written": written}

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
    for name, teacher in engine.counted.items():
        total = sums["caches"][name]
        teacher.work = {kind: total[kind] if distributed.is_rank_zero() else 0 for kind in teacher.work}
    engine.filled = engine.work_of_teachers()

    def of_all(part: Part) -> Part:
        own = {
            teacher: of_all_starts(cache, sums["caches"][f"{part.run.prefix}{teacher}"])
            for teacher, cache in part.models.caches.items()
        }
        return replace(part, models=replace(part.models, caches=own))

    return int(sums["starts"]), {name: of_all(part) for name, part in parts.items()}


def of_all_starts(cache: CacheUsed | CacheUnused, total: Mapping[str, Any]) -> CacheUsed | CacheUnused:
    """Return the entry about a cache with the seconds and the splits of all starts of the run."""
    if isinstance(cache, CacheUnused):
        return cache
    return replace(cache, seconds=round(total["seconds"], 3), written=list(dict.fromkeys(total["written"])))


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


def export_again(run: Run, examples: Mapping[str, Examples], record: dict[str, Any]) -> dict[str, Any]:
    """Export the students of a finished run again from its checkpoint, and record the new files.

    Args:
        run: a run that is done, and whose inputs are done.
        examples: examples of its tasks, by name.
        record: record of the run.

    Returns:
        The new record.

    Raises:
        InputError: if the checkpoint cannot be read, or the exported weights differ from the recorded digests.
    """
    quieten()
    models = build_models_of(run, examples)
    runs = members(run)
    engines = {name: build_engine(runs[name], built, examples[name].task) for name, built in models.items()}
    load_weights(run, engine_of(run, engines, examples), f"{run.spec.trainer.selection}.ckpt")
    written: dict[str, dict[str, Any]] = {}
    for name, built in models.items():
        one, own = runs[name], record if runs[name].member is None else record["tasks"][name]
        own = {"origin": origin(one), **own}  # records of earlier versions have none
        for student_name, student in built.students.items():
            student.compiled = False
            if not isinstance(own["students"].get(student_name), dict):
                raise InputError(
                    f"'{run.directory / 'result.json'}' has no entry for the student '{student_name}'; remove it", "resume"
                )
            folder = folder_of(one, student_name, record["headline"])
            export(student, folder, documents_of(own, student_name))
            write_kept(folder, built.methods[student_name].kept())
        written |= exported_files(one, list(built.students), record["headline"])
    for name, recorded in (record.get("files") or {}).items():
        if name.endswith(".safetensors") and written.get(name) != recorded:
            raise InputError(
                f"'{run.directory / name}' was exported again, and differs from its digest in result.json. One of the two "
                "is damaged: start this run again with resume=false",
                "resume",
            )
    return run.finish({**record, "files": written})
