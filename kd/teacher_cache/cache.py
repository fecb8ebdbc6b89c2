"""Cache of the outputs of frozen teachers: the decision whether to cache, and the look-up of cached tensors.

A frozen teacher's outputs for an example never change, so it is run once per split. Its outputs are stored in the teacher's
run, for all students, methods and seeds, under a digest of the teacher's weights, the tokenised text and the precision.
Outputs that cannot be cached, or would be too large, are computed at every step; the others by `kd.teacher_cache.precompute`.

With a size for a limit (a budget), the outputs of as many examples as fit are stored, and the teacher runs at every step on the
others. They are the first examples of a split in the order of its indices, whatever the seed and the order of training, so that
runs with other budgets, and without one, read what is there and add the examples that follow.

Guarantees on every machine: cached values are read back bit for bit, and given the same values, training that reads them ends
with bitwise the same weights as training that runs the teacher. The values themselves equal those of a running teacher up to
rounding: precomputing uses other batches, and the order in which a processor adds up products depends on their shape, its
instructions and its libraries. Two such runs differ by rounding only, as does one run on two machines; an optimiser that
divides by the size of a gradient, such as AdamW, makes the difference visible where gradients consist of rounding errors.
"""

import contextlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kd.config.schema import cache_limit
from kd.errors import InputError
from kd.forward import Needs
from kd.models.teachers import CachedTeacher, FrozenTeacher
from kd.runs.digest import digest_of
from kd.system import distributed
from kd.system.files import locked, readable_size, write_text
from kd.teacher_cache.precompute import Gap, Piece, SplitCache, precompute, probe
from kd.teacher_cache.store import CachedOutputs, TensorStore, size_of_array

CACHE_FORMAT = 3
"""Version of the cache layout; incremented when a code change makes existing caches unreadable."""
AUTO_LIMIT = 8e9
"""Largest size in bytes of one teacher's cache with `cache=auto`, or a quarter of the free disk if less. Our choice."""

Tensors = frozenset[tuple[str, str]]
"""Tensors of splits: (split, name)."""


@dataclass(frozen=True)
class CacheUsed:
    """Entry of the record about a teacher that is cached, or of which some examples are.

    Attributes:
        bytes: size of the outputs that the run reads.
        seconds: time that filling the cache took.
        written: splits whose outputs were computed.
        live: split -> number of its examples that are not cached, on which the teacher runs whenever a batch has them; splits
            that are cached as a whole are left out.
        budget: size in bytes that `cache` gives; None for a word.
    """

    used: bool = field(default=True, init=False)
    bytes: int
    seconds: float
    written: list[str]
    live: dict[str, int] = field(default_factory=dict)
    budget: int | None = None


@dataclass(frozen=True)
class CacheUnused:
    """Entry of the record about a teacher that runs at every step, and the reason."""

    used: bool = field(default=False, init=False)
    why: str


@dataclass(frozen=True)
class CachedOrLive:
    """A teacher to train with.

    Attributes:
        teacher: a cached teacher, or the frozen teacher with its weights loaded. The weights of a cached teacher are in memory
            only if it runs on some examples.
        record: the entry of the record about its cache.
        outputs: split -> cached outputs, which its batches consist of; empty for a teacher that runs.
    """

    teacher: FrozenTeacher
    record: CacheUsed | CacheUnused
    outputs: Mapping[str, CachedOutputs] = field(default_factory=dict)


@dataclass(frozen=True)
class TeacherCache:
    """Cache of the outputs of one frozen teacher.

    Args:
        folder: folder of the cache, created when it is first filled.
        weights: identifier of the teacher's weights; None if it is unknown, as for a hub model without a commit.
        precision: precision of training, as `trainer.precision` has it.
        setting: `auto`, `on`, `off` or a size, as `cache` has it.
        device: device on which the teacher runs to fill the cache.
        task: name of the task, for messages.
    """

    folder: Path
    weights: str | None
    precision: str
    setting: Any
    device: torch.device
    task: str

    def cached_or_live(
        self,
        teacher: FrozenTeacher,
        tokens: Mapping[str, Any],
        needs: Needs | None,
        changes: str | None = None,
        later: str | None = None,
    ) -> CachedOrLive:
        """Return the teacher to train with: a cached one if possible, whose missing outputs are computed now, within the limit.

        Args:
            teacher: the frozen teacher.
            tokens: split -> the text as the teacher's tokens. Cached are the tensors that the methods need for train, and the
                logits for other splits.
            needs: tensors that all methods together need; None if no method uses the teacher, which is then only evaluated, on
                the other splits.
            changes: the reason why the text differs between epochs; None if it does not.
            later: the reason why not all text of train has tokens yet; None if it has. Training would wait for a teacher that
                reads all of it first, so that `cache=auto` does not cache it.

        Raises:
            InputError: if the teacher cannot be loaded, or the disk has no room for what `cache` asks for.
        """
        why = self.reason_to_run(teacher, needs, changes)
        if why is None and needs is not None and later is not None and cache_limit(self.setting) is None:
            why = f"{later}; cache=on or a size tokenises them, and runs it over them, before the training"
        if why is None:
            why = distributed.on_rank_zero(lambda: _not_writable(self.folder))
        if why is None:
            with _held(self.folder):
                result = self.cached(teacher, tokens, needs)
            if not isinstance(result, str):
                return result
            why = result
        if cache_limit(self.setting) != 0:
            distributed.print_rank_zero(f"  teacher '{teacher.name}' runs at every step: {why}")
        _ = teacher.encoder  # load the weights now, so that unreadable ones end the run before it begins
        return CachedOrLive(teacher, CacheUnused(why))

    def reason_to_run(self, teacher: FrozenTeacher, needs: Needs | None, changes: str | None = None) -> str | None:
        """Return the reason why a teacher cannot be cached, whatever the size; None if it can."""
        if cache_limit(self.setting) == 0:
            return "cache=off"
        if changes is not None:
            return changes
        if needs is not None and (why := needs.reason_to_run) is not None:
            return why
        if needs is not None and needs.attention and teacher.shape.family.score_bias is not None:
            return f"the positional bias of {teacher.shape.config.model_type}'s attention is not stored"
        return "the commit of its weights on the hub is unknown" if self.weights is None else None

    @property
    def budget(self) -> float | None:
        """Size in bytes into which as many examples go as fit; None for a word, with which it is all examples or none."""
        limit = cache_limit(self.setting)
        return None if limit is None or math.isinf(limit) else limit

    def cached(self, teacher: FrozenTeacher, tokens: Mapping[str, Any], needs: Needs | None) -> CachedOrLive | str:
        """Return a cached teacher, its missing outputs computed; or the reason why it is not cached."""
        needs_by_split = {name: needs if name == "train" else Needs() for name in tokens}
        splits = {
            name: self.split(teacher, name, tokens[name], wanted)
            for name, wanted in needs_by_split.items()
            if wanted is not None
        }
        began = time.perf_counter()
        written = self.fill(teacher, splits)
        if isinstance(written, str):
            return written
        # Rank 0 counts for all: once the folder is not locked any more, another process may add examples.
        counts = distributed.on_rank_zero(lambda: {name: split.store.count(split.names) for name, split in splits.items()})
        live = {name: rest for name, split in splits.items() if (rest := split.store.examples - counts[name])}
        if live:
            _ = teacher.encoder  # load the weights now, so that unreadable ones end the run before it begins
        else:
            teacher.release()  # before the next teacher is loaded
        for split in splits.values():
            split.store.open(split.names)
        taken = time.perf_counter() - began if written else 0.0
        size = sum(split.store.size(split.names, counts[name]) for name, split in splits.items())
        names = " ".join(next(iter(splits.values())).names)
        what = f"made in {taken:.1f} s" if written else "from an earlier run"
        if live:
            of = ", ".join(f"{counts[name]:,} of {counts[name] + rest:,} examples of {name}" for name, rest in live.items())
            when = " at every step" if "train" in live else ""
            line = f"is cached for {of}: {names}, {readable_size(size)}, {what}; it runs{when} on the others"
        else:
            line = f"is cached: {names}, {readable_size(size)}, {what if written else f'{what}, teacher not loaded'}"
        distributed.print_rank_zero(f"  teacher '{teacher.name}' {line}")
        record = CacheUsed(size, round(taken, 3), written, live, None if self.budget is None else int(self.budget))
        outputs = {name: CachedOutputs(split.store, split.names, split.tokens, counts[name]) for name, split in splits.items()}
        return CachedOrLive(CachedTeacher(teacher, teacher.passes, teacher.examples, runs=bool(live)), record, outputs)

    def fill(self, teacher: FrozenTeacher, splits: Mapping[str, SplitCache]) -> list[str] | str:
        """Compute and store the missing outputs, as far as the limit allows; the passes over train are counted.

        Returns:
            The splits of which outputs were computed, or the reason not to cache the teacher.

        Raises:
            InputError: if the disk has no room for them.
        """
        written: dict[str, None] = {}
        wide = Tensors()
        while True:
            pieces = distributed.on_rank_zero(partial(self.plan, teacher, splits, wide))
            if isinstance(pieces, str):
                return pieces
            narrow = Tensors()
            for piece in pieces:
                passes, examples, names = precompute(teacher, splits[piece.split], piece, self.device)
                if piece.split == "train":
                    teacher.passes, teacher.examples = teacher.passes + passes, teacher.examples + examples
                narrow |= {(piece.split, name) for name in names}
                written[piece.split] = None
            if not narrow:
                return list(written)
            # Some values overflow the type on disk: these tensors are computed again and stored in their own type.
            for split in written:
                if kept := sorted(name for owner, name in narrow if owner == split):
                    distributed.print_rank_zero(f"  {', '.join(kept)} of '{split}' do not fit 16 bits; they are kept in full")
            wide |= narrow

    def split(self, teacher: FrozenTeacher, name: str, tokens: Any, needs: Needs) -> SplitCache:
        """Return the cache of a split, and create its folder on rank 0."""
        # Evaluation is in float32 whatever the precision of training.
        precision = self.precision if name == "train" or self.precision == "64-true" else "32-true"
        about = {"format": CACHE_FORMAT, "weights": self.weights, "text": tokens.digest(), "precision": precision}
        folder = self.folder / f"{name}-{digest_of(about)}"
        if distributed.is_rank_zero():
            _begin(folder, {"teacher": teacher.name, "task": self.task, "split": name, **about})
        return SplitCache(name, tokens, TensorStore(folder, tokens.offsets), tuple(needs.tensors), needs, precision)

    def plan(self, teacher: FrozenTeacher, splits: Mapping[str, SplitCache], wide: Tensors) -> list[Piece] | str:
        """Return the outputs to compute, or the reason not to cache the teacher; damaged ones are deleted.

        Args:
            teacher: the teacher, which is run over a few examples to learn sizes.
            splits: caches of the splits by name.
            wide: tensors to store in their own type.

        Raises:
            InputError: if the disk has no room for them.
        """
        gaps = {name: self.gap(teacher, split, absent, wide) for name, split in splits.items() if (absent := _absent(split))}
        if not gaps:
            return []
        free = shutil.disk_usage(self.folder).free
        counts = self.counts(splits, gaps, free, whole_fits=bool(wide))
        if isinstance(counts, str):
            return counts
        size = sum(int(gap.sizes[counts[name]]) for name, gap in gaps.items())
        if size * (2 if distributed.world() > 1 else 1) > free:  # ranks' shares are joined
            needed = f"its outputs take {readable_size(size)} ({next(iter(gaps.values())).split.needs})"
            hint = f"use cache=off or {'a size' if self.budget is None else 'a smaller size'}"
            raise InputError(f"teacher '{teacher.name}': {needed}, and {readable_size(free)} are free; {hint}", "cache")
        pieces = [piece for name, gap in gaps.items() for piece in gap.pieces(counts[name])]
        if pieces:
            seconds = sum(gaps[piece.split].seconds_of(piece) for piece in pieces) / distributed.world()
            computed = {name: sum(piece.examples for piece in pieces if piece.split == name) for name in gaps}
            shown = ", ".join(share_of(name, count, splits[name]) for name, count in computed.items() if count)
            distributed.print_rank_zero(
                f"  teacher '{teacher.name}' is run once over {shown}: {readable_size(size)}, about {seconds:.0f} s"
            )
        return pieces

    def counts(
        self, splits: Mapping[str, SplitCache], gaps: Mapping[str, Gap], free: int, *, whole_fits: bool
    ) -> dict[str, int] | str:
        """Return the number of examples of each split, from the first on, to cache within the limit; or the reason for none.

        Args:
            splits: caches of the splits by name.
            gaps: what is missing of those that are not complete.
            free: free bytes of the disk.
            whole_fits: with a word, do not check the limit again.
        """
        existing = sum(size_of_array(file) for file in self.folder.glob("*/*.npy"))
        whole = sum(int(gap.sizes[-1]) for gap in gaps.values())
        needed = f"its outputs take {readable_size(whole)} ({next(iter(gaps.values())).split.needs})"
        needed += f" beside the {readable_size(existing)} that exist" if existing else ""
        counts = {name: split.store.examples for name, split in splits.items()}
        if self.budget is None:
            limit = cache_limit(self.setting)
            limit = min(AUTO_LIMIT, free / 4) if limit is None else limit
            if whole + existing > limit and not whole_fits:
                allowed = f"more than cache={self.setting} allows, {readable_size(limit)}"
                return f"{needed}, {allowed}; use cache=on, or a size, into which as many examples go as fit"
            return counts
        counts |= fitting(gaps, max(self.budget - existing, 0))
        if not (counts["train"] if "train" in counts else any(counts.values())):
            return f"{needed}, and cache={self.setting} has no room for those of one example; use cache=on or a larger size"
        return counts

    def gap(self, teacher: FrozenTeacher, split: SplitCache, absent: list[str], wide: Tensors) -> Gap:
        """Return what is missing of a split."""
        entries, seconds = probe(teacher, split, absent, self.device)
        for name, entry in entries.items():
            last = split.store.entry(name)
            if (split.name, name) in wide or (last is not None and last.stored == last.shown == entry.shown):
                entries[name] = replace(entry, stored=entry.shown)
        return Gap(split, entries, {name: split.store.count([name]) for name in entries}, seconds)


def fitting(gaps: Mapping[str, Gap], room: float) -> dict[str, int]:
    """Return for each split the number of its first examples whose outputs fit into a number of bytes together.

    Splits that are evaluated come first: they have few outputs, and are not worth a pass over them in each run.
    """
    counts = {}
    for name in sorted(gaps, key=lambda name: name == "train"):
        counts[name] = int(np.searchsorted(gaps[name].sizes, room, side="right")) - 1
        room -= int(gaps[name].sizes[counts[name]])
    return counts


def share_of(name: str, count: int, split: SplitCache) -> str:
    """Describe a number of examples of a split."""
    return f"{name} {count}" if count == split.store.examples else f"{name} {count} of {split.store.examples}"


def _absent(split: SplitCache) -> list[str]:
    """Return the names of a split's tensors that are not stored, after damaged ones and partial files are deleted."""
    split.store.sweep()
    if damaged := split.store.damaged(split.names):
        distributed.print_rank_zero(
            f"  the cache {split.store.folder} is damaged ({', '.join(damaged)}); that part is recomputed"
        )
        split.store.remove(damaged)
    return split.store.missing(split.names)


def _begin(folder: Path, about: Mapping[str, Any]) -> None:
    """Create a cache folder with `about.json`; print a line if another folder caches the split with other text or weights."""
    if (folder / "about.json").is_file():
        return
    for other in folder.parent.glob(f"{about['split']}-*/about.json"):
        with contextlib.suppress(OSError, ValueError):
            other_about = json.loads(other.read_text(encoding="utf-8"))
            changed = [key for key in ("text", "weights") if other_about.get(key) != about[key]]
            if changed and all(other_about.get(key) == about[key] for key in ("precision", "task")):
                distributed.print_rank_zero(
                    f"  the cache {other.parent} was made from other {' and '.join(changed)}; it is not used"
                )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "about.json", json.dumps(about, indent=2) + "\n")


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Lock a teacher's cache on rank 0: a second process that needs it waits, then reads the finished cache."""
    with contextlib.ExitStack() as held:
        distributed.on_rank_zero(
            lambda: held.enter_context(locked(folder, f"  another process has locked {folder}; waiting for it"))
        )
        yield


def _not_writable(folder: Path) -> str | None:
    """Return the reason why a folder cannot be written, None if it can: a teacher's run may belong to another user."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"nothing can be written to {folder} ({error.strerror})"
