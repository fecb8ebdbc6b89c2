"""Training, evaluation and export of a planned run whose inputs are done, up to its record."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kd.build.data import build_data, prefit_methods
from kd.build.engine import build_engine
from kd.build.models import build_models
from kd.data.datamodule import KDDataModule
from kd.data.examples import Examples
from kd.engines.base import Engine, work_of_all
from kd.errors import InputError
from kd.models import FrozenTeacher
from kd.results.evaluate import evaluate
from kd.results.export import export, origin
from kd.results.record import Work, card_of, conclude, exported_files, folder_of
from kd.runs.kept import write_kept
from kd.runs.run import Run, read_record, write_record
from kd.system import distributed
from kd.system.hardware import keep_memory
from kd.teacher_cache.cache import CacheUnused, CacheUsed
from kd.training.loggers import close_wandb
from kd.training.preflight import preflight
from kd.training.trainer import build_trainer, last_step, load_weights, quieten, run_trainer, select


def fit(run: Run, examples: Examples) -> dict[str, Any]:
    """Train, evaluate and export a run whose inputs are done.

    Raises:
        InputError: for an error that the user can correct.
        KeyboardInterrupt: on Ctrl-C, after Lightning has shut down.
    """
    quieten()
    models = build_models(run, examples.task, texts=examples.texts["train"])
    data, models = build_data(run, examples, models)
    prefit_methods(run, data, models)
    keep_memory()  # from here on, so that memory of building, such as a teacher's weights, is returned to the system
    engine = build_engine(run, models, examples.task)
    distributed.on_rank_zero(lambda: begin(run, engine, data, models.inits))
    starts, caches = count_fills(run, engine, models.caches)
    models = replace(models, caches=caches)
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
        models = replace(models, teachers=[*models.teachers, FrozenTeacher(models.online, next(iter(run.spec.teacher)))])
    evaluations = {
        split: evaluate(models.students, models.teachers, data.loader(split), engine.task, device)
        for split in examples.evaluated
    }
    teacher_work = {
        name: {**done, "examples": distributed.total(done["examples"])} for name, done in engine.teacher_work.items()
    }
    work = Work(distributed.total(engine.examples), teacher_work, starts)
    return distributed.on_rank_zero(lambda: conclude(run, models, data, engine, evaluations, selection, work))


def begin(run: Run, engine: Engine, data: KDDataModule, inits: Mapping[str, str]) -> None:
    """Make the run's folder, and run the preflight checks."""
    run.begin(resume=run.spec.resume)
    if run.spec.preflight:
        distributed.print_rank_zero("\n".join(preflight(run, engine, data, inits).lines))


def count_fills(
    run: Run, engine: Engine, caches: Mapping[str, CacheUsed | CacheUnused]
) -> tuple[int, dict[str, CacheUsed | CacheUnused]]:
    """Add the cost of filling caches in earlier starts of this run, which a kill before the first checkpoint must not hide.

    Args:
        run: the run; the sums are in `checkpoints/costs.json` of its folder.
        engine: engine whose teachers get the forward counts of all starts.
        caches: entries of the record about caches, by teacher.

    Returns:
        Number of starts of this run, and the entries with the seconds and splits of all starts.
    """
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
    for teacher in engine.teachers:
        total = sums["caches"][teacher.name]
        teacher.work = {kind: total[kind] if distributed.is_rank_zero() else 0 for kind in teacher.work}
    engine.filled = engine.work_of_teachers()
    return int(sums["starts"]), {name: of_all_starts(cache, sums["caches"][name]) for name, cache in caches.items()}


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
        folder = folder_of(run, name, record["headline"])
        export(student, folder, card_of(record, name))
        write_kept(folder, models.methods[name].kept())
    written = exported_files(run, list(models.students), record["headline"])
    for name, recorded in (record.get("files") or {}).items():
        if name.endswith(".safetensors") and written.get(name) != recorded:
            raise InputError(
                f"'{run.directory / name}' was exported again, and differs from its digest in result.json. One of the two "
                "is damaged: start this run again with resume=false",
                "resume",
            )
    return run.finish({**record, "files": written})
