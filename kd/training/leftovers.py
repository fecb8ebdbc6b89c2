"""Leftovers of a folder of runs: what `kd-clean` lists, and removes."""

import contextlib
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kd.errors import InputError
from kd.runs.retention import Uses, read_uses, removable
from kd.runs.run import is_record, keep_of, read_record
from kd.system.files import LOCK, is_abandoned, locked_now, remove, size_of
from kd.system.model_sources import fingerprint
from kd.teacher_cache.cache import CACHE_FORMAT
from kd.training.checkpoints import optimizer_bytes
from kd.training.reduce import reduce

RUN = re.compile(r".+-([0-9a-f]{12})")
"""Name of a run's directory; the group is its digest."""

DRAFT = re.compile(r"\.part\d*$")
"""End of the name of a file, or folder, that is being written."""

STORED = re.compile(r"[0-9a-f]{32}\.npz")
"""Name of a file of stored arrays (`kd.data.tokenized.TokenStore`)."""

DAY = 24 * 3600.0


@dataclass(frozen=True)
class Leftover:
    """Something that serves no purpose any more.

    Attributes:
        owner: the folder that it was found in: a run, a given teacher's cache, or a store beside the runs.
        paths: its files and folders.
        bytes: bytes on disk that its removal frees.
        reason: sentence for the user.
        keep: word of `trainer.keep` that the run is reduced to; None if the paths are removed as they are.
        cache: folder of a cache, whose lock is needed as well; None if it is not in one.
    """

    owner: Path
    paths: tuple[Path, ...]
    bytes: int
    reason: str
    keep: str | None = None
    cache: Path | None = None


class Folder:
    """A folder of runs. Links in it are not followed.

    Args:
        runs: the folder.
        days: age in days from which a run that is not finished is a leftover; None for never.
    """

    def __init__(self, runs: Path, days: float | None = None) -> None:
        self.runs, self.days = runs.resolve(), days
        self.notes: list[str] = []

    def leftovers(self) -> Iterator[Leftover]:
        """Yield all leftovers, but those of runs and caches that another process has locked.

        Raises:
            OSError: if the folder cannot be read.
        """
        for owner in (*self.directories, *self.given, *self.stores):
            with contextlib.ExitStack() as held:
                if (owner / LOCK).exists() and not held.enter_context(locked_now(owner)):
                    self.notes.append(f"left alone: {owner.name}, which another process has locked")
                    continue
                yield from self.of(owner)
        if self.uses is None:
            self.notes.append(
                "caches that no run uses are not listed, because a run does not say what it uses: it is not finished, and of "
                "an earlier version, or its record is damaged"
            )

    def remove(self, leftover: Leftover) -> int:
        """Remove a leftover that still is one, with the locks of what it belongs to; return the number of bytes.

        Raises:
            InputError: if another process has locked it, or it cannot be removed.
            OSError: if it cannot be removed.
        """
        with contextlib.ExitStack() as held:

            def lock(folder: Path) -> None:
                if not held.enter_context(locked_now(folder)):
                    raise InputError(f"'{folder}' is locked by another process, or cannot be written to", "paths.runs")

            if leftover.owner.name not in STORES:
                lock(leftover.owner)
            if not any((now.paths, now.keep) == (leftover.paths, leftover.keep) for now in self.of(leftover.owner)):
                return 0
            if leftover.cache not in (None, leftover.owner):
                lock(leftover.cache)
            if leftover.keep is not None:
                record = read_record(leftover.owner / "result.json")
                return 0 if record is None else reduce(leftover.owner, record, leftover.keep)[1]
            freed = sum(size_of(path) for path in leftover.paths)
            for path in leftover.paths:
                remove(path)
            return freed

    def shown(self, leftover: Leftover) -> str:
        """Return the paths of a leftover for the user, relative to the folder of runs."""
        names = [path.relative_to(self.runs).as_posix() for path in leftover.paths]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    @cached_property
    def directories(self) -> list[Path]:
        """Directories of runs."""
        marks = (LOCK, "config.yaml", "result.json")
        named = [path for path in sorted(self.runs.iterdir()) if RUN.fullmatch(path.name) and is_folder(path)]
        return [path for path in named if any((path / mark).is_file() for mark in marks)]

    @cached_property
    def given(self) -> list[Path]:
        """Folders of the caches of teachers that are no runs."""
        return [path for path in entries(self.runs / ".teachers") if is_folder(path)]

    @cached_property
    def stores(self) -> list[Path]:
        """Folders of stored tokens and edited examples."""
        return [self.runs / name for name in STORES if is_folder(self.runs / name)]

    @cached_property
    def uses(self) -> Uses | None:
        """Use of the folder by its runs; None if a run does not say it."""
        uses = [read_uses(directory) for directory in self.directories]
        known = [one for one in uses if one is not None]
        if len(known) < len(uses):
            return None
        runs, models = (frozenset[str]().union(*sets) for sets in ([one.runs for one in known], [one.models for one in known]))
        return Uses(runs, models, any(one.edits for one in known))

    def of(self, owner: Path) -> Iterator[Leftover]:
        """Yield the leftovers in a run, a given teacher's cache, or a store."""
        if owner in self.stores:
            yield from self.of_store(owner)
        elif owner in self.given:
            yield from self.of_caches(owner, owner, current=None)
        else:
            yield from self.of_run(owner)

    def of_run(self, directory: Path) -> Iterator[Leftover]:
        """Yield the leftovers in the directory of a run."""
        record = finished(directory)
        if record is None and exists(directory / "result.json"):
            self.notes.append(f"left alone: {directory.name}, whose result.json cannot be read")
            return
        if record is None and self.days is not None and (age := age_of(directory)) >= self.days:
            yield Leftover(directory, (directory,), size_of(directory), f"not finished, and unchanged for {age:.0f} days")
            return
        if record is not None:
            yield from of_record(directory, record)
        for place in (directory, *(folder for name in PARTS for folder in folders(directory / name))):
            yield from drafts(directory, place)
        if is_folder(directory / "cache"):
            current = None if record is None else fingerprints(directory)
            yield from self.of_caches(directory, directory / "cache", current)

    def of_caches(self, owner: Path, folder: Path, current: set[str] | None) -> Iterator[Leftover]:
        """Yield the caches of a teacher that are of no use, and drafts in them.

        Args:
            owner: run of the teacher, or folder of the caches of a given one.
            folder: folder of the caches; a cohort and a mixture have further ones in it.
            current: identifiers of the weights that the run has exported; None if they are not known.
        """
        if folder != owner and not is_free(folder):  # the owner itself is locked by this process
            return
        found: dict[str, list[Path]] = {}
        for entry in entries(folder):
            if not is_folder(entry):
                continue
            about = about_of(entry)
            if about is None:
                yield from self.of_caches(owner, entry, current)
            elif (why := self.useless(owner, about, current)) is not None:
                found.setdefault(why, []).append(entry)
            else:
                yield from drafts(owner, entry, folder)
        for why, paths in found.items():
            yield Leftover(owner, tuple(paths), sum(map(size_of, paths)), why, cache=folder)

    def useless(self, owner: Path, about: dict[str, Any], current: set[str] | None) -> str | None:
        """Return the reason why a cache is of no use, by its `about.json`; None if it may be."""
        weights = str(about.get("weights"))
        if about.get("format") != CACHE_FORMAT:
            return "the cache of a teacher, made by another version of kd"
        if current and weights not in current:
            return "the cache of a teacher, made from other weights than its run has"
        if self.uses is None:
            return None
        named = owner.name in self.uses.runs
        given = any(weights == model or weights.startswith(f"{model}@") for model in self.uses.models)
        return None if named or given else "the cache of a teacher that no run in this folder uses"

    def of_store(self, folder: Path) -> Iterator[Leftover]:
        """Yield drafts and unfinished parts of a store, and all of `.edits` if no run has an edit that reads a model."""
        yield from drafts(folder, folder)
        for entry in entries(folder):
            unfinished = PART_OF_STORE.fullmatch(entry.name) and is_folder(entry) and not (entry / "about.json").exists()
            if unfinished and age_of(entry) >= 1 and is_free(entry):
                yield Leftover(folder, (entry,), size_of(entry), "text or tokens that are not complete, unchanged for a day")
        if folder.name == EDITS and self.uses is not None and not self.uses.edits:
            paths = tuple(path for path in entries(folder) if STORED.fullmatch(path.name) and is_file(path))
            if paths:
                yield Leftover(folder, paths, sum(map(size_of, paths)), "edited examples, and no run has an edit with a model")


PARTS = ("checkpoints", "predictions", "student", "peers")
"""Folders of a run that have files of its own; of a mixture, the last three have some of each task."""

PART_OF_STORE = re.compile(r"(texts|tokens)-[0-9a-f]{32}")
"""Name of a folder of stored text without labels, or of its tokens."""

EDITS = ".edits"
STORES = (".tokens", EDITS)
"""Folders beside the runs whose files are written without a lock."""


def exists(path: Path) -> bool:
    """Return whether there is a file, a folder or a link, whatever it points at."""
    return path.exists() or path.is_symlink()


def is_folder(path: Path) -> bool:
    """Return whether a path is a folder, and no link to one."""
    return path.is_dir() and not path.is_symlink()


def is_file(path: Path) -> bool:
    """Return whether a path is a file, and no link to one."""
    return path.is_file() and not path.is_symlink()


def is_free(folder: Path) -> bool:
    """Return whether no other process has locked a folder."""
    if not (folder / LOCK).exists():
        return True
    with locked_now(folder) as free:
        return free


def entries(folder: Path) -> list[Path]:
    """Return what is in a folder; nothing if it is none, or a link."""
    return sorted(folder.iterdir()) if is_folder(folder) else []


def folders(folder: Path) -> Iterator[Path]:
    """Yield a folder and those in it, but no drafts; nothing if it is no folder, or a link."""
    if is_folder(folder) and DRAFT.search(folder.name) is None:
        yield folder
        for path in entries(folder):
            yield from folders(path)


def finished(directory: Path) -> dict[str, Any] | None:
    """Return the record of a finished run; None if there is none, or it is not the record of this run."""
    record = read_record(directory / "result.json")
    found = RUN.fullmatch(directory.name)
    complete = record is not None and is_record(record) and found is not None and record.get("digest") == found[1]
    return record if complete else None


def age_of(directory: Path) -> float:
    """Return the days since anything in a folder was changed; locking it is no change."""
    changed = [path.lstat().st_mtime for path in (directory, *directory.rglob("*")) if path.name != LOCK]
    return max(0.0, (time.time() - max(changed)) / DAY)


def of_record(directory: Path, record: dict[str, Any]) -> Iterator[Leftover]:
    """Yield the files of a finished run that it does not retain; those of an earlier version are reduced to the default."""
    keep = keep_of(record) if "keep" in record else "best"
    files, _ = removable(directory, record, keep)
    paths = (*(() if files.rewrite is None else (files.rewrite,)), *files.remove)
    if not paths or not all(is_folder(path.parent) and not path.is_symlink() for path in paths):
        return
    freed = sum(map(size_of, files.remove)) + (0 if files.rewrite is None else optimizer_bytes(files.rewrite))
    if freed:
        of_version = "" if "keep" in record else ", of a run of an earlier version"
        yield Leftover(directory, paths, freed, f"trainer.keep={keep} does not retain it{of_version}", keep)


def drafts(owner: Path, folder: Path, cache: Path | None = None) -> Iterator[Leftover]:
    """Yield drafts in a folder whose process has ended: drafts of its name, and others because their owner is not locked."""
    for path in entries(folder):
        if DRAFT.search(path.name) is None or path.is_symlink():
            continue
        has_process = path.is_file() and path.name.removesuffix(".part").rpartition(".")[2].isdigit()
        if is_abandoned(path) if has_process else owner.name not in STORES:
            yield Leftover(owner, (path,), size_of(path), "a draft that a process which has ended left behind", cache=cache)


def about_of(folder: Path) -> dict[str, Any] | None:
    """Return the description of a cache; None if there is none that can be read."""
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return about if isinstance(about, dict) else None


def fingerprints(directory: Path) -> set[str] | None:
    """Return identifiers of the weights of all students that a run has exported; None if one is damaged or was let go."""
    folders = [path.parent for place in ("student", "peers") for path in (directory / place).rglob("config.json")]
    try:
        return {fingerprint(str(folder), "paths.runs") for folder in folders}
    except (InputError, OSError):
        return None
