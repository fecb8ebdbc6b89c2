"""Precomputation of teacher outputs: a frozen teacher is run once over a split, and its outputs are stored."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from kd.forward import Needs
from kd.models.compiled import uncompiled
from kd.models.teachers import FrozenTeacher
from kd.runs.run import Run
from kd.system import distributed
from kd.teacher_cache.store import Entry, Share, TensorStore, stored_as

BATCH_TOKENS = 2048
"""Tokens of a batch, padding included. Our choice: enough to keep the kernels busy, little memory."""
PROBE = 32
"""Number of examples that are run to estimate sizes and speed."""
PRECISIONS = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass
class SplitCache:
    """Cache of one split: where its tensors are stored, which ones are needed, and which are still to be written."""

    split: str
    tokens: Any
    store: TensorStore
    names: tuple[str, ...]
    needs: Needs
    precision: str
    absent: list[str] = field(default_factory=list)
    entries: dict[str, Entry] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes that are still to be written."""
        return sum(entry.size for entry in self.entries.values())


def probe(run: Run, teacher: FrozenTeacher, plan: SplitCache) -> float:
    """Estimate the seconds of a run over a split from a few examples of median length; set the entries of absent tensors."""
    order = np.argsort(np.diff(plan.store.offsets), kind="stable")
    middle = max(len(order) // 2 - PROBE // 2, 0)
    rows = order[middle : middle + PROBE].tolist()
    with _teaching(run, teacher, plan.precision) as device:
        outputs = _outputs_of(teacher, plan, rows, device)
        began = time.perf_counter()
        _outputs_of(teacher, plan, rows, device)
        seconds = time.perf_counter() - began
    for name in plan.absent:
        stored = stored_as(outputs[name].dtype, plan.precision)
        shape = (plan.store.rows(name), outputs[name].shape[-1])
        plan.entries[name] = Entry(shape, *(str(dtype).removeprefix("torch.") for dtype in (stored, outputs[name].dtype)))
    tokens = len(rows) * max(plan.tokens.lengths_of(rows))
    return float(seconds * plan.store.offsets[-1] / tokens)


def precompute(run: Run, teacher: FrozenTeacher, plan: SplitCache) -> tuple[int, int]:
    """Run a teacher over this rank's share of a split and store its outputs.

    Tensors appear all at once at the end, so a process that is killed leaves nothing that looks complete.

    Returns:
        The numbers of forward passes and of examples on this rank.
    """
    rank, world = distributed.rank(), distributed.world()
    span = (plan.store.examples * rank // world, plan.store.examples * (rank + 1) // world)
    passes, examples, again = 0, 0, plan.entries
    while again:
        examples += span[1] - span[0]
        shares = {name: Share(plan.store, name, entry, span, rank) for name, entry in again.items()}
        narrow: set[str] = set()
        with _teaching(run, teacher, plan.precision) as device:
            for rows in batches_by_length(plan.store.offsets, span):
                outputs = _outputs_of(teacher, plan, rows, device)
                passes += 1
                narrow |= {name for name, share in shares.items() if not share.write(rows, outputs[name])}
        for share in shares.values():
            share.close()
        too_narrow = set().union(*distributed.gather(narrow))

        def commit(done: Mapping[str, Entry] = again, but: set[str] = too_narrow) -> None:
            for name, entry in done.items():
                if name not in but:
                    plan.store.commit(name, entry, world)

        distributed.on_rank_zero(commit)
        # Some values overflow the type on disk: these tensors are computed again and stored in their own type.
        again = {name: replace(plan.entries[name], stored=plan.entries[name].shown) for name in too_narrow}
        if again:
            distributed.print_rank_zero(
                f"  {', '.join(sorted(again))} of '{plan.split}' do not fit 16 bits; they are kept in full"
            )
    return passes, examples


def batches_by_length(offsets: np.ndarray, span: tuple[int, int]) -> Iterator[list[int]]:
    """Yield the examples of a span in batches of similar length, of at most `BATCH_TOKENS` tokens."""
    lengths = np.diff(offsets)[span[0] : span[1]]
    batch: list[int] = []
    for index in np.argsort(lengths, kind="stable"):
        if batch and (len(batch) + 1) * lengths[index] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(span[0] + int(index))
    if batch:
        yield batch


@contextlib.contextmanager
def _teaching(run: Run, teacher: FrozenTeacher, precision: str) -> Iterator[torch.device]:
    """Put the teacher on the device and in the precision of training; yield the device, and move it back to the CPU."""
    gpu = run.spec.trainer.accelerator != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", distributed.local_rank()) if gpu else torch.device("cpu")
    dtype = torch.float64 if precision == "64-true" else torch.float32
    teacher.encoder.to(device, dtype)
    mixed = PRECISIONS.get(precision)
    with uncompiled(teacher.shape), torch.no_grad(), torch.autocast(device.type, mixed, enabled=mixed is not None):
        try:
            yield device
        finally:
            teacher.encoder.to("cpu")


def _outputs_of(teacher: FrozenTeacher, plan: SplitCache, rows: Sequence[int], device: torch.device) -> dict[str, torch.Tensor]:
    inputs = {name: tensor.to(device) for name, tensor in plan.tokens.pad(rows).items()}
    outputs = teacher.run(inputs, plan.needs)
    return {name: tensor for name, tensor in outputs.named().items() if name in plan.names}
