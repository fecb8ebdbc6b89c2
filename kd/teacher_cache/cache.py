"""Cache of the outputs of frozen teachers: the decision whether to cache, and the look-up of cached tensors.

A frozen teacher's outputs for an example never change, so it is run once per split. Its outputs are stored in the teacher's
run, for all students, methods and seeds, under a digest of the teacher's weights, the tokenised text and the precision.
Outputs that cannot be cached, or would be too large, are computed at every step; the others by `kd.teacher_cache.precompute`.

Guarantees on every machine: cached values are read back bit for bit, and given the same values, training that reads them ends
with bitwise the same weights as training that runs the teacher. The values themselves equal those of a running teacher up to
rounding: precomputing uses other batches, and the order in which a processor adds up products depends on their shape, its
instructions and its libraries. Two such runs differ by rounding only, as does one run on two machines; an optimiser that
divides by the size of a gradient, such as AdamW, makes the difference visible where gradients consist of rounding errors.
"""

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kd.config.schema import cache_limit
from kd.errors import InputError
from kd.forward import Needs
from kd.models.teachers import CachedTeacher, FrozenTeacher
from kd.runs.digest import digest_of
from kd.system import distributed
from kd.system.files import locked, readable_size, write_text
from kd.teacher_cache.precompute import SplitCache, precompute, probe
from kd.teacher_cache.store import CachedOutputs, Entry, TensorStore, size_of_array

CACHE_FORMAT = 3
"""Version of the cache layout; incremented when a code change makes existing caches unreadable."""
AUTO_LIMIT = 8e9
"""Largest size in bytes of one teacher's cache with `cache=auto`, or a quarter of the free disk if less. Our choice."""


@dataclass(frozen=True)
class CacheUsed:
    """Entry of the record about a teacher that is cached.

    Attributes:
        bytes: size of the outputs that the run reads.
        seconds: time that filling the cache took.
        written: splits whose outputs were computed.
    """

    used: bool = field(default=True, init=False)
    bytes: int
    seconds: float
    written: list[str]


@dataclass(frozen=True)
class CacheUnused:
    """Entry of the record about a teacher that runs at every step, and the reason."""

    used: bool = field(default=False, init=False)
    why: str


@dataclass(frozen=True)
class CachedOrLive:
    """A teacher to train with.

    Attributes:
        teacher: a cached teacher, whose weights are not in memory, or the frozen teacher with its weights loaded.
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
        """Return the teacher to train with: a cached one if possible, whose missing outputs are computed now.

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
            InputError: if the teacher cannot be loaded, or the disk has no room for what `cache=on` asks for.
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
        if needs is not None and needs.uncacheable_reason is not None:
            return needs.uncacheable_reason
        if needs is not None and needs.gradient:
            return "the method takes gradients through it"
        if needs is not None and needs.words:
            return "word embeddings are not stored"
        if needs is not None and needs.attention and teacher.shape.family.score_bias is not None:
            return f"the positional bias of {teacher.shape.config.model_type}'s attention is not stored"
        return "the commit of its weights on the hub is unknown" if self.weights is None else None

    def cached(self, teacher: FrozenTeacher, tokens: Mapping[str, Any], needs: Needs | None) -> CachedOrLive | str:
        """Return a cached teacher, its missing outputs computed; or the reason why it is not cached."""
        needs_by_split = {split: needs if split == "train" else Needs() for split in tokens}
        splits = [
            self.split(teacher, split, tokens[split], wanted) for split, wanted in needs_by_split.items() if wanted is not None
        ]
        began, passes, examples = time.perf_counter(), 0, 0
        missing = distributed.on_rank_zero(lambda: self.missing(teacher, splits))
        if isinstance(missing, str):
            return missing
        for split in splits:
            if split.name in missing:
                done = precompute(teacher, split, missing[split.name], self.device)
                passes, examples = done if split.name == "train" else (passes, examples)
        teacher.release()  # before the next teacher is loaded
        for split in splits:
            split.store.open(split.names)
        taken = time.perf_counter() - began if missing else 0.0
        size, names = sum(split.store.size(split.names) for split in splits), " ".join(splits[0].names)
        what = f"made in {taken:.1f} s" if missing else "from an earlier run, teacher not loaded"
        distributed.print_rank_zero(f"  teacher '{teacher.name}' is cached: {names}, {readable_size(size)}, {what}")
        record = CacheUsed(size, round(taken, 3), list(missing))
        outputs = {split.name: CachedOutputs(split.store, split.names, split.tokens) for split in splits}
        return CachedOrLive(CachedTeacher(teacher, passes, examples), record, outputs)

    def split(self, teacher: FrozenTeacher, name: str, tokens: Any, needs: Needs) -> SplitCache:
        """Return the cache of a split, and create its folder on rank 0."""
        # Evaluation is in float32 whatever the precision of training.
        precision = self.precision if name == "train" or self.precision == "64-true" else "32-true"
        about = {"format": CACHE_FORMAT, "weights": self.weights, "text": tokens.digest(), "precision": precision}
        folder = self.folder / f"{name}-{digest_of(about)}"
        if distributed.is_rank_zero():
            _begin(folder, {"teacher": teacher.name, "task": self.task, "split": name, **about})
        return SplitCache(name, tokens, TensorStore(folder, tokens.offsets), tuple(needs.tensors), needs, precision)

    def missing(self, teacher: FrozenTeacher, splits: Sequence[SplitCache]) -> dict[str, dict[str, Entry]] | str:
        """Return the tensors to compute, split -> name -> entry, or the reason not to; damaged ones are deleted.

        Raises:
            InputError: if the disk has no room for them.
        """
        absent = {split.name: names for split in splits if (names := _absent(split))}
        incomplete = [split for split in splits if split.name in absent]
        if not incomplete:
            return {}
        probed = {split.name: probe(teacher, split, absent[split.name], self.device) for split in incomplete}
        size = sum(entry.size for entries, _ in probed.values() for entry in entries.values())
        if why := self.too_large(teacher, size, incomplete[0].needs):
            return why
        seconds = sum(seconds for _, seconds in probed.values()) / distributed.world()
        count = ", ".join(f"{split.name} {split.store.examples}" for split in incomplete)
        distributed.print_rank_zero(
            f"  teacher '{teacher.name}' is run once over {count}: {readable_size(size)}, about {seconds:.0f} s"
        )
        return {name: entries for name, (entries, _) in probed.items()}

    def too_large(self, teacher: FrozenTeacher, size: int, needs: Needs) -> str | None:
        """Return the reason if outputs of this size, in bytes, exceed the limit; None if they do not.

        Raises:
            InputError: if they are within the limit, and the disk has no room for them.
        """
        free = shutil.disk_usage(self.folder).free
        limit = cache_limit(self.setting)
        if limit is None:
            limit = min(AUTO_LIMIT, free / 4)
        existing = sum(size_of_array(file) for file in self.folder.glob("*/*.npy"))
        needed = f"its outputs take {readable_size(size)} ({needs})"
        if size + existing > limit:
            beside = f" beside the {readable_size(existing)} that exist" if existing else ""
            allowed = f"more than cache={self.setting} allows, {readable_size(limit)}"
            return f"{needed}{beside}, {allowed}; use cache=on or a size"
        if size * (2 if distributed.world() > 1 else 1) > free:  # ranks' shares are joined
            raise InputError(f"teacher '{teacher.name}': {needed}, and {readable_size(free)} are free; use cache=off", "cache")
        return None


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
