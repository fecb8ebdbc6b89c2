"""A frozen teacher says the same of an example each time, so it is run once: whether it can be, and what is there already.

What it says of a split is kept with the teacher's run, for all students, methods and seeds, under a digest of the teacher's
weights, the text as tokenised and the precision. What cannot be kept, or would be too large, is computed at every step.
The pass itself is in `kd.passes`.

What holds on every machine: a number that is kept is read again to the bit, and from the same numbers training that reads
them ends with the same weights, to the bit, as training whose teacher runs. The numbers themselves are those of a running
teacher but for rounding: the pass has other batches, and a processor adds up products in an order that depends on their
shape, its instructions and its libraries. Rounding is all that sets two such runs apart, as it does one run on two machines;
an optimiser that divides by the size of a gradient, such as AdamW, makes it visible where gradients are nothing else.
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

from kd import distributed
from kd.data.store import CachedOutputs, TensorStore
from kd.errors import InputError
from kd.forward import Needs
from kd.models.teachers import CachedTeacher, FrozenTeacher
from kd.passes import SplitCache, precompute, probe
from kd.planning import teacher_source
from kd.runs import Run, digest_of, locked, write_atomically
from kd.schema import cache_limit
from kd.sources import fingerprint, hub_commit, is_float32

if TYPE_CHECKING:
    from kd.data.datamodule import KDDataModule

CACHE_FORMAT = 1
"""Raised when a change of code makes what is kept unreadable."""
AUTO_LIMIT = 8e9
"""Bytes that `cache=auto` takes at most for one teacher, if a quarter of the free disk is not less. Our choice."""


def cached_or_live(
    run: Run, data: "KDDataModule", index: int, teacher: FrozenTeacher, needs: Needs | None
) -> tuple[FrozenTeacher, dict[str, Any]]:
    """The teacher as training will see it, and what a record says of it.

    Either one that is cached, its weights not in memory, with `data` set to read what it said; or the teacher itself,
    loaded.

    Args:
        run: that it serves.
        data: tokenised; of every split something is kept: of train what the methods need, of the others the logits.
        place: of the teacher in a batch.
        teacher: frozen.
        needs: of it, by all methods; None where no method listens to it. It is then compared with on the other splits only.

    Raises:
        InputError: if the teacher cannot be loaded, or the disk has no room for what `cache=on` asks for.
    """
    why = reason_to_run(run, data, teacher, needs)
    if why is None:
        why = distributed.on_rank_zero(lambda: _not_writable(folder_of(run, teacher)))
    if why is None:
        with _held(folder_of(run, teacher)):
            found = cached(run, data, index, teacher, needs)
        if not isinstance(found, str):
            return found
        why = found
    if cache_limit(run.spec.cache) != 0:
        distributed.print_rank_zero(f"  teacher '{teacher.name}' runs at every step: {why}")
    _ = teacher.encoder  # now, so that weights that cannot be read end the run before it begins
    return teacher, {"used": False, "why": why}


def reason_to_run(run: Run, data: "KDDataModule", teacher: FrozenTeacher, needs: Needs | None) -> str | None:
    """Why a teacher cannot be cached, whatever the size; None if it can."""
    if cache_limit(run.spec.cache) == 0:
        return "cache=off"
    if data.changes:
        return data.changes
    if weights_of(run, teacher) is None:
        return "which weights its name on the hub stands for today is not known"
    if needs is None:
        return None
    if needs.uncacheable_reason:
        return needs.uncacheable_reason
    if needs.gradient:
        return "gradients are taken through it"
    if needs.attention and teacher.shape.family.score_bias is not None:
        return f"the positional bias of {teacher.shape.config.model_type}'s attention is not kept"
    return None


def cached(
    run: Run, data: "KDDataModule", index: int, teacher: FrozenTeacher, needs: Needs | None
) -> tuple[CachedTeacher, dict[str, Any]] | str:
    """A cached teacher, after the pass if there had to be one; or why there is none."""
    asked = {split: needs if split == "train" else Needs() for split in data.tokens}
    plans = [split_cache(run, data, index, teacher, split, of) for split, of in asked.items() if of is not None]
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
    size, kept = sum(plan.store.size(plan.names) for plan in plans), " ".join(plans[0].names)
    what = f"made in {taken:.1f} s" if missing else "made before, teacher not loaded"
    distributed.print_rank_zero(f"  teacher '{teacher.name}' is cached: {kept}, {readable_size(size)}, {what}")
    record = {"used": True, "bytes": size, "seconds": round(taken, 3), "written": [plan.split for plan in missing]}
    return CachedTeacher(teacher, passes, examples), record


def folder_of(run: Run, teacher: FrozenTeacher) -> Path:
    """Where what a teacher says is kept: in its run, or beside the runs if it was brought."""
    made = run.inputs.get(f"teacher {teacher.name}")
    if made is not None:
        return made.directory / "cache"
    return Path(run.spec.paths.runs).expanduser() / ".teachers" / digest_of({"weights": weights_of(run, teacher)})


def weights_of(run: Run, teacher: FrozenTeacher) -> str | None:
    """What identifies a teacher's weights; of the hub with the commit that was loaded, None where that is not known."""
    source, key = teacher_source(run, teacher.name)
    if not source.startswith("hf:"):
        # What was kept when models of other types were computed in their own is not used.
        return fingerprint(source, key) + ("" if is_float32(source, key) else ", used in float32")
    commit = hub_commit(source)
    return None if commit is None else f"{source}@{commit}"


def split_cache(run: Run, data: "KDDataModule", index: int, teacher: FrozenTeacher, split: str, needs: Needs) -> SplitCache:
    """Where a split's tensors are, or will be."""
    tokens = data.tokens[split][data.teacher_keys[index]]
    training = run.spec.trainer.precision
    # Evaluation is in float32 whatever training is in.
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
    """Make a folder that says what it is of; say so if others hold the same split with other text or other weights."""
    if (folder / "about.json").is_file():
        return
    for other in folder.parent.glob(f"{about['split']}-*/about.json"):
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(other.read_text(encoding="utf-8"))
            changed = [what for what in ("text", "weights") if known.get(what) != about[what]]
            if changed and all(known.get(what) == about[what] for what in ("precision", "task")):
                distributed.print_rank_zero(
                    f"  the cache {other.parent} was made of other {' and '.join(changed)}; it is not used"
                )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "about.json", json.dumps(about, indent=2) + "\n")


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold a teacher's cache on the first rank: a second process that needs the same waits, then finds it."""
    with contextlib.ExitStack() as held:
        distributed.on_rank_zero(
            lambda: held.enter_context(locked(folder, f"  another process is at {folder}; waiting for it"))
        )
        yield


def estimate(run: Run, teacher: FrozenTeacher, plans: Sequence[SplitCache]) -> float | str:
    """Seconds that the pass will take, said before it begins; or why it is not made. Finds what is absent, and its sizes."""
    for plan in plans:
        plan.store.sweep()
        if damaged := plan.store.damaged(plan.names):
            distributed.print_rank_zero(
                f"  the cache {plan.store.folder} is damaged ({', '.join(damaged)}); that part is made again"
            )
            plan.store.remove(damaged)
        plan.absent = plan.store.missing(plan.names)
    missing = [plan for plan in plans if plan.absent]
    if not missing:
        return 0.0
    seconds = sum(probe(run, teacher, plan) for plan in missing) / distributed.world()
    size = sum(plan.size for plan in missing)
    free = shutil.disk_usage(missing[0].store.folder).free
    limit, asked = cache_limit(run.spec.cache), run.spec.cache
    if limit is None:
        limit = min(AUTO_LIMIT, free / 4)
    there = sum(file.stat().st_size for file in folder_of(run, teacher).glob("*/*.bin"))
    needed = f"what it says takes {readable_size(size)} ({missing[0].needs})"
    if size + there > limit:
        beside = f" beside the {readable_size(there)} that are there" if there else ""
        return f"{needed}{beside}, more than cache={asked} takes here, {readable_size(limit)}; cache=on or a size takes more"
    if size * (2 if distributed.world() > 1 else 1) > free:  # ranks' shares are joined
        raise InputError(f"teacher '{teacher.name}': {needed}, and {readable_size(free)} are free; use cache=off", "cache")
    count = ", ".join(f"{plan.split} {plan.store.examples}" for plan in missing)
    distributed.print_rank_zero(
        f"  teacher '{teacher.name}' is run once over {count}: {readable_size(size)}, about {seconds:.0f} s"
    )
    return seconds


def _not_writable(folder: Path) -> str | None:
    """Why nothing can be kept in a folder, None if it can: a teacher's run may be another user's."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"nothing can be written to {folder} ({error.strerror})"


def readable_size(size: float) -> str:
    """Return a number of bytes in words: `37.2 kB` below a megabyte, else `1,234.5 MB`."""
    return f"{size / 1e3:.1f} kB" if size < 1e6 else f"{size / 1e6:,.1f} MB"
