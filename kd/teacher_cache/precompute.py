"""Precomputation of teacher outputs: a frozen teacher is run once over a split, and its outputs are stored."""

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from kd.forward import Needs
from kd.models.compiled import uncompiled
from kd.models.teachers import FrozenTeacher
from kd.system import distributed
from kd.teacher_cache.store import Entry, Share, TensorStore, stored_as

BATCH_TOKENS = 2048
"""Tokens of a batch, padding included. Our choice: enough to keep the kernels busy, little memory."""
PROBE_EXAMPLES = 32
"""Number of examples that are run to estimate sizes and speed."""
AUTOCAST_TYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class SplitCache:
    """Cache of one split.

    Attributes:
        name: name of the split.
        tokens: text of the split, tokenised for the teacher.
        store: the stored tensors.
        names: names of the tensors that are needed.
        needs: declaration of the same tensors for the teacher's forward pass.
        precision: precision of that forward pass.
    """

    name: str
    tokens: Any
    store: TensorStore
    names: tuple[str, ...]
    needs: Needs
    precision: str


def probe(
    teacher: FrozenTeacher, split: SplitCache, absent: Iterable[str], device: torch.device
) -> tuple[dict[str, Entry], float]:
    """Run a teacher over a few examples of median length.

    Returns:
        The entries of the absent tensors, and the estimated seconds of a run over the split.
    """
    order = np.argsort(np.diff(split.store.offsets), kind="stable")
    middle = max(len(order) // 2 - PROBE_EXAMPLES // 2, 0)
    rows = order[middle : middle + PROBE_EXAMPLES].tolist()
    with _on_device(teacher, split.precision, device):
        outputs = _outputs_of(teacher, split, rows, device)
        began = time.perf_counter()
        _outputs_of(teacher, split, rows, device)
        seconds = time.perf_counter() - began
    entries = {}
    for name in absent:
        stored = stored_as(outputs[name].dtype, split.precision)
        shape = (split.store.rows(name), outputs[name].shape[-1])
        entries[name] = Entry(shape, *(str(dtype).removeprefix("torch.") for dtype in (stored, outputs[name].dtype)))
    tokens = len(rows) * max(split.tokens.lengths_of(rows))
    return entries, float(seconds * split.store.offsets[-1] / tokens)


def precompute(
    teacher: FrozenTeacher, split: SplitCache, entries: Mapping[str, Entry], device: torch.device
) -> tuple[int, int]:
    """Run a teacher over this rank's share of a split and store its outputs.

    Tensors appear all at once at the end, so a process that is killed leaves nothing that looks complete.

    Args:
        teacher: the teacher, which is on the CPU again afterwards.
        split: cache of the split.
        entries: name -> entry of each tensor to store.
        device: device on which the teacher runs.

    Returns:
        The numbers of forward passes and of examples on this rank.
    """
    rank, world = distributed.rank(), distributed.world()
    span = (split.store.examples * rank // world, split.store.examples * (rank + 1) // world)
    passes, examples, again = 0, 0, dict(entries)
    while again:
        examples += span[1] - span[0]
        shares = {name: Share(split.store, name, entry, span, rank) for name, entry in again.items()}
        narrow: set[str] = set()
        with _on_device(teacher, split.precision, device):
            for rows in batches_by_length(split.store.offsets, span):
                outputs = _outputs_of(teacher, split, rows, device)
                passes += 1
                narrow |= {name for name, share in shares.items() if not share.write(rows, outputs[name])}
        for share in shares.values():
            share.close()
        too_narrow = set().union(*distributed.gather(narrow))

        def commit(done: Mapping[str, Entry] = again, but: set[str] = too_narrow) -> None:
            for name, entry in done.items():
                if name not in but:
                    split.store.commit(name, entry, world)

        distributed.on_rank_zero(commit)
        # Some values overflow the type on disk: these tensors are computed again and stored in their own type.
        again = {name: replace(entries[name], stored=entries[name].shown) for name in too_narrow}
        if again:
            distributed.print_rank_zero(
                f"  {', '.join(sorted(again))} of '{split.name}' do not fit 16 bits; they are kept in full"
            )
    return passes, examples


def logits_over(teacher: FrozenTeacher, tokens: Any, precision: str, device: torch.device) -> torch.Tensor:
    """Run a teacher that is not cached over a split, each rank over a share, and return its logits on every rank.

    Args:
        teacher: the teacher, which is on the CPU again afterwards; its passes are counted.
        tokens: text of the split, tokenised for the teacher.
        precision: precision of the forward pass.
        device: device on which the teacher runs.

    Returns:
        (examples, classes), on the CPU, with logits in the task's label order.
    """
    rank, world, count = distributed.rank(), distributed.world(), len(tokens)
    span = (count * rank // world, count * (rank + 1) // world)
    logits: dict[int, torch.Tensor] = {}
    with _on_device(teacher, precision, device):
        for rows in batches_by_length(tokens.offsets, span):
            inputs = {name: tensor.to(device) for name, tensor in tokens.pad(rows).items()}
            outputs = teacher.in_order(teacher.run(inputs, Needs()))
            logits |= dict(zip(rows, outputs.logits.cpu(), strict=True))
            teacher.passes += 1
    teacher.examples += len(logits)
    return torch.cat(distributed.gather(torch.stack([logits[row] for row in range(*span)])))


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
def _on_device(teacher: FrozenTeacher, precision: str, device: torch.device) -> Iterator[None]:
    """Put the teacher on a device and in a precision; move it back to the CPU at the end."""
    dtype = torch.float64 if precision == "64-true" else torch.float32
    teacher.encoder.to(device, dtype)
    mixed = AUTOCAST_TYPES.get(precision)
    with uncompiled(teacher.shape), torch.no_grad(), torch.autocast(device.type, mixed, enabled=mixed is not None):
        try:
            yield
        finally:
            teacher.encoder.to("cpu")


def _outputs_of(
    teacher: FrozenTeacher, split: SplitCache, rows: Sequence[int], device: torch.device
) -> dict[str, torch.Tensor]:
    inputs = {name: tensor.to(device) for name, tensor in split.tokens.pad(rows).items()}
    outputs = teacher.run(inputs, split.needs)
    return {name: tensor for name, tensor in outputs.named().items() if name in split.names}
