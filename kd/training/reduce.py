"""Removal of the files that a finished run does not retain (`trainer.keep`; `kd.runs.retention`)."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd.errors import InputError, disk_is_full
from kd.runs.retention import fewer, removable, with_model
from kd.runs.run import Run, keep_of, write_record
from kd.system import distributed
from kd.system.files import locked_now, readable_size, remove, size_of, writing


def reduce_run(run: Run, record: dict[str, Any], *, first: bool, model: bool = True, has_lock: bool = False) -> dict[str, Any]:
    """Remove the files that a finished run does not retain, on rank 0; return its record.

    The run that the command requests is reduced to `trainer.keep` if it retains more, and is never restored. From a run that
    another one needs, only what it had not removed itself is removed. Where nothing can be removed, because another process
    has locked the run or the folder cannot be written to, a line says so: the run is done, and a later start removes the files.

    Args:
        run: the run, which is done.
        record: its record.
        first: True for the run that the command requests.
        model: True if the model is read by the run that needs this one; it then stays.
        has_lock: True if this process has locked the run.
    """

    def words(record: Mapping[str, Any]) -> tuple[str, str]:
        """Return the words of `trainer.keep` for the record, and for what is removed now."""
        keep = fewer(keep_of(record), run.spec.trainer.keep) if first else keep_of(record)
        return keep, keep if first or not model else with_model(keep)

    keep, level = words(record)
    if first and keep == "figures" != run.spec.trainer.keep and not run.has_model:
        distributed.print_rank_zero("  trainer.keep=figures has let its model go; without its result.json it is trained again")
    if keep == keep_of(record) and not removable(run.directory, record, level)[0]:
        return record
    try:
        with contextlib.nullcontext(True) if has_lock else locked_now(run.directory) as mine:
            current = run.record if mine else None
            if current is None:
                raise InputError("another process has locked the run, or its folder cannot be written to", "paths.runs")
            record, freed = reduce(run.directory, current, *words(current))
    except (InputError, OSError, RuntimeError) as error:
        if not isinstance(error, InputError) and not disk_is_full(error):
            raise
        why = error.message if isinstance(error, InputError) else "the disk is full"
        distributed.print_rank_zero(f"  not all is removed that trainer.keep={keep} does not retain: {why}")
        return run.record or record
    if freed and not has_lock:
        distributed.print_rank_zero(f"  {readable_size(freed)} removed, which trainer.keep={keep} does not retain")
    return record


def reduce(directory: Path, record: Mapping[str, Any], keep: str, level: str | None = None) -> tuple[dict[str, Any], int]:
    """Write what a finished run retains to its record, then remove the other files. The run must be locked.

    Args:
        directory: directory of the run.
        record: its record.
        keep: a word of `kd.config.schema.KEEP` for the record.
        level: another word, which retains more, for what is removed now; None for the same.

    Returns:
        The record as it is now, and the number of bytes that were removed.

    Raises:
        InputError: if a file cannot be written or removed.
    """
    current = dict(record)
    if keep != keep_of(record):
        current = write_record(directory / "result.json", {**record, "keep": keep})
    files, user = removable(directory, record, level or keep)
    if user is not None:
        distributed.print_rank_zero(f"  the model of {directory.name} stays: {user} reads it, and is not finished")
    freed = 0
    with writing(directory):
        if files.rewrite is not None:
            from kd.training.checkpoints import drop_optimizer

            before = size_of(files.rewrite)
            drop_optimizer(files.rewrite, record["digest"])
            freed += before - size_of(files.rewrite)
        for path in files.remove:
            freed += size_of(path)
            remove(path)
        checkpoints = directory / "checkpoints"
        if checkpoints.is_dir() and not checkpoints.is_symlink() and not any(checkpoints.iterdir()):
            checkpoints.rmdir()
    return current, freed
