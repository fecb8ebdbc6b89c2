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
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kd.config.schema import cache_limit
from kd.errors import InputError
from kd.forward import Needs
from kd.models.teachers import CachedTeacher, FrozenTeacher
from kd.runs.digest import digest_of
from kd.runs.inputs import teacher_source
from kd.runs.run import Run
from kd.system import distributed
from kd.system.files import locked, write_text
from kd.system.model_sources import fingerprint, hub_commit
from kd.teacher_cache.precompute import SplitCache, precompute, probe
from kd.teacher_cache.store import CachedOutputs, TensorStore

if TYPE_CHECKING:
    from kd.data.datamodule import KDDataModule

CACHE_FORMAT = 2
"""Version of the cache layout; incremented when a code change makes existing caches unreadable."""
AUTO_LIMIT = 8e9
"""Largest size in bytes of one teacher's cache with `cache=auto`, or a quarter of the free disk if less. Our choice."""


def cached_or_live(
    run: Run, data: "KDDataModule", index: int, teacher: FrozenTeacher, needs: Needs | None
) -> tuple[FrozenTeacher, dict[str, Any]]:
    """Return the teacher to train with, and the entry about its cache for `result.json`.

    The teacher is either a cached one, whose weights are not in memory and whose outputs `data` is set to read, or the
    given one with its weights loaded.

    Args:
        run: the run that uses the teacher.
        data: tokenised data. Cached are the tensors that the methods need for train, and the logits for other splits.
        index: position of the teacher in a batch.
        teacher: the frozen teacher.
        needs: tensors that all methods together need; None if no method uses the teacher, which is then only evaluated, on
            the other splits.

    Raises:
        InputError: if the teacher cannot be loaded, or the disk has no room for what `cache=on` asks for.
    """
    why = reason_to_run(run, data, teacher, needs)
    if why is None:
        why = distributed.on_rank_zero(lambda: _not_writable(folder_of(run, teacher)))
    if why is None:
        with _held(folder_of(run, teacher)):
            result = cached(run, data, index, teacher, needs)
        if not isinstance(result, str):
            return result
        why = result
    if cache_limit(run.spec.cache) != 0:
        distributed.print_rank_zero(f"  teacher '{teacher.name}' runs at every step: {why}")
    _ = teacher.encoder  # load the weights now, so that unreadable ones end the run before it begins
    return teacher, {"used": False, "why": why}


def reason_to_run(run: Run, data: "KDDataModule", teacher: FrozenTeacher, needs: Needs | None) -> str | None:
    """Return the reason why a teacher cannot be cached, whatever the size; None if it can."""
    if cache_limit(run.spec.cache) == 0:
        return "cache=off"
    if data.changes:
        return data.changes
    if weights_of(run, teacher) is None:
        return "the commit of its weights on the hub is unknown"
    if needs is None:
        return None
    if needs.uncacheable_reason is not None:
        return needs.uncacheable_reason
    if needs.gradient:
        return "the method takes gradients through it"
    if needs.attention and teacher.shape.family.score_bias is not None:
        return f"the positional bias of {teacher.shape.config.model_type}'s attention is not stored"
    return None


def cached(
    run: Run, data: "KDDataModule", index: int, teacher: FrozenTeacher, needs: Needs | None
) -> tuple[CachedTeacher, dict[str, Any]] | str:
    """Return a cached teacher and its record, precomputing missing outputs; or the reason why it is not cached."""
    needs_by_split = {split: needs if split == "train" else Needs() for split in data.tokens}
    plans = [
        split_cache(run, data, index, teacher, split, wanted) for split, wanted in needs_by_split.items() if wanted is not None
    ]
    began, passes, examples = time.perf_counter(), 0, 0
    seconds = distributed.on_rank_zero(lambda: estimate(run, teacher, plans))
    lacking = distributed.broadcast([(plan.absent, plan.entries) for plan in plans])
    for plan, (absent, entries) in zip(plans, lacking, strict=True):
        plan.absent, plan.entries = absent, entries
    if isinstance(seconds, str):
        return seconds
    missing = [plan for plan in plans if plan.absent]
    for plan in missing:
        done = precompute(run, teacher, plan)
        if plan.split == "train":
            passes, examples = done
    for plan in plans:
        plan.store.open(plan.names)
        data.use_cached(index, {plan.split: CachedOutputs(plan.store, plan.names, plan.tokens)})
    taken = time.perf_counter() - began if missing else 0.0
    size, names = sum(plan.store.size(plan.names) for plan in plans), " ".join(plans[0].names)
    what = f"made in {taken:.1f} s" if missing else "from an earlier run, teacher not loaded"
    distributed.print_rank_zero(f"  teacher '{teacher.name}' is cached: {names}, {readable_size(size)}, {what}")
    record = {"used": True, "bytes": size, "seconds": round(taken, 3), "written": [plan.split for plan in missing]}
    return CachedTeacher(teacher, passes, examples), record


def folder_of(run: Run, teacher: FrozenTeacher) -> Path:
    """Return the folder of a teacher's cache: in its run, or in `.teachers` beside the runs if no run trained it."""
    teacher_run = run.inputs.teachers.get(teacher.name)
    if teacher_run is not None:
        return teacher_run.directory / "cache"
    return Path(run.spec.paths.runs).expanduser() / ".teachers" / digest_of({"weights": weights_of(run, teacher)})


def weights_of(run: Run, teacher: FrozenTeacher) -> str | None:
    """Return an identifier of a teacher's weights; for a hub model with the loaded commit, or None if that is unknown."""
    source, key = teacher_source(run, teacher.name)
    if not source.startswith("hf:"):
        return fingerprint(source, key)
    commit = hub_commit(source)
    return None if commit is None else f"{source}@{commit}"


def split_cache(run: Run, data: "KDDataModule", index: int, teacher: FrozenTeacher, split: str, needs: Needs) -> SplitCache:
    """Return the description of a split's cache, and create its folder on rank 0."""
    tokens = data.tokens[split][data.teacher_keys[index]]
    training = run.spec.trainer.precision
    # Evaluation is in float32 whatever the precision of training.
    precision = training if split == "train" or training == "64-true" else "32-true"
    text = hashlib.blake2b(tokens.offsets.tobytes(), digest_size=8)
    for column in tokens.columns.values():
        text.update(np.ascontiguousarray(column).tobytes())
    about = {
        "format": CACHE_FORMAT,
        "weights": weights_of(run, teacher),
        "text": text.hexdigest(),
        "precision": precision,
    }
    folder = folder_of(run, teacher) / f"{split}-{digest_of(about)}"
    if distributed.is_rank_zero():
        _begin(folder, {"teacher": teacher.name, "task": run.spec.task.name, "split": split, **about})
    return SplitCache(split, tokens, TensorStore(folder, tokens.offsets), tuple(needs.tensors), needs, precision)


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


def estimate(run: Run, teacher: FrozenTeacher, plans: Sequence[SplitCache]) -> float | str:
    """Return the estimated seconds of precomputing, or the reason not to; set `absent` and `entries` of the plans."""
    for plan in plans:
        plan.store.sweep()
        if damaged := plan.store.damaged(plan.names):
            distributed.print_rank_zero(
                f"  the cache {plan.store.folder} is damaged ({', '.join(damaged)}); that part is recomputed"
            )
            plan.store.remove(damaged)
        plan.absent = plan.store.missing(plan.names)
    missing = [plan for plan in plans if plan.absent]
    if not missing:
        return 0.0
    seconds = sum(probe(run, teacher, plan) for plan in missing) / distributed.world()
    size = sum(plan.size for plan in missing)
    free = shutil.disk_usage(missing[0].store.folder).free
    limit, setting = cache_limit(run.spec.cache), run.spec.cache
    if limit is None:
        limit = min(AUTO_LIMIT, free / 4)
    existing = sum(file.stat().st_size for file in folder_of(run, teacher).glob("*/*.bin"))
    needed = f"its outputs take {readable_size(size)} ({missing[0].needs})"
    if size + existing > limit:
        beside = f" beside the {readable_size(existing)} that exist" if existing else ""
        return f"{needed}{beside}, more than cache={setting} allows, {readable_size(limit)}; use cache=on or a size"
    if size * (2 if distributed.world() > 1 else 1) > free:  # ranks' shares are joined
        raise InputError(f"teacher '{teacher.name}': {needed}, and {readable_size(free)} are free; use cache=off", "cache")
    count = ", ".join(f"{plan.split} {plan.store.examples}" for plan in missing)
    distributed.print_rank_zero(
        f"  teacher '{teacher.name}' is run once over {count}: {readable_size(size)}, about {seconds:.0f} s"
    )
    return seconds


def _not_writable(folder: Path) -> str | None:
    """Return the reason why a folder cannot be written, None if it can: a teacher's run may belong to another user."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"nothing can be written to {folder} ({error.strerror})"


def readable_size(size: float) -> str:
    """Return a number of bytes in words: `37.2 kB` below a megabyte, else `1,234.5 MB`."""
    return f"{size / 1e3:.1f} kB" if size < 1e6 else f"{size / 1e6:,.1f} MB"
