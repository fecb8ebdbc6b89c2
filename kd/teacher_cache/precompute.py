"""Precomputation of teacher outputs: a frozen teacher is run once over a split, and its outputs are stored."""

import contextlib
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from kd.data.tokenized import batches_by_length
from kd.forward import Needs
from kd.forward.kinds import by_token
from kd.models.compiled import uncompiled
from kd.models.teachers import FrozenTeacher
from kd.system import distributed, hardware
from kd.teacher_cache.store import Entry, Share, TensorStore, stored_as

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


@dataclass(frozen=True)
class Piece:
    """Consecutive examples of a split whose outputs are computed and stored as one segment of each tensor.

    Attributes:
        split: name of the split.
        span: the first example, and the one after the last.
        entries: name -> description of the segment of each tensor.
    """

    split: str
    span: tuple[int, int]
    entries: Mapping[str, Entry]

    @property
    def examples(self) -> int:
        """Number of examples."""
        return self.span[1] - self.span[0]


@dataclass(frozen=True)
class Gap:
    """Tensors of a split that are not stored for all of its examples.

    Attributes:
        split: cache of the split.
        entries: name -> description of the tensor, if it were one segment of all examples.
        stored: name -> number of examples, from the first on, that are stored of it.
        seconds: estimated seconds of a forward pass, for each token.
    """

    split: SplitCache
    entries: Mapping[str, Entry]
    stored: Mapping[str, int]
    seconds: float

    @cached_property
    def sizes(self) -> np.ndarray:
        """Number of bytes that the first k examples add to those that are stored, for each k, (examples + 1,)."""
        offsets = self.split.store.offsets.astype(np.int64)
        sizes = np.zeros(len(offsets), dtype=np.int64)
        for name, entry in self.entries.items():
            rows = offsets if by_token(name) else np.arange(len(offsets))
            sizes += entry.shape[1] * entry.raw.itemsize * np.maximum(rows - rows[self.stored[name]], 0)
        return sizes

    def pieces(self, count: int) -> list[Piece]:
        """Return the pieces to compute, so that all tensors are stored for the first `count` examples."""
        bounds = sorted({*(begin for begin in self.stored.values() if begin < count), count})
        pieces = []
        for span in itertools.pairwise(bounds):
            names = [name for name, begin in self.stored.items() if begin <= span[0]]
            entries = {
                name: replace(self.entries[name], shape=(self.split.store.rows(name, span), self.entries[name].shape[1]))
                for name in names
            }
            pieces.append(Piece(self.split.name, span, entries))
        return pieces

    def seconds_of(self, piece: Piece) -> float:
        """Return the estimated seconds of the pass over a piece."""
        begin, end = piece.span
        offsets = self.split.store.offsets
        return float(self.seconds * (offsets[end] - offsets[begin]))


def probe(
    teacher: FrozenTeacher, split: SplitCache, absent: Iterable[str], device: torch.device
) -> tuple[dict[str, Entry], float]:
    """Run a teacher over a few examples of median length.

    Returns:
        The entries of the absent tensors, if they are stored for all examples, and the estimated seconds for each token.
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
    return entries, seconds / tokens


def precompute(
    teacher: FrozenTeacher, split: SplitCache, piece: Piece, device: torch.device
) -> tuple[int, int, frozenset[str]]:
    """Run a teacher over this rank's share of some examples of a split and store its outputs.

    Segments appear all at once at the end, so a process that is killed leaves nothing that looks complete.

    Args:
        teacher: the teacher, which is on the CPU again afterwards.
        split: cache of the split.
        piece: the examples, which follow those that are stored of each tensor, and the tensors.
        device: device on which the teacher runs.

    Returns:
        The numbers of forward passes and of examples on this rank, and the names of the tensors that are not stored, because
        the type on disk cannot represent some of their values.
    """
    rank, world = distributed.rank(), distributed.world()
    begin, passes = piece.span[0], 0
    span = (begin + piece.examples * rank // world, begin + piece.examples * (rank + 1) // world)
    with split.store.drafts(piece.entries, rank):
        shares = {name: Share(split.store, name, entry, span, rank) for name, entry in piece.entries.items()}
        narrow: set[str] = set()
        with _on_device(teacher, split.precision, device):
            for rows in batches_by_length(split.store.offsets, span):
                outputs = _outputs_of(teacher, split, rows, device)
                passes += 1
                narrow |= {name for name, share in shares.items() if not share.write(rows, outputs[name])}
        for share in shares.values():
            share.close()
        too_narrow = frozenset().union(*distributed.gather(narrow))

        def commit() -> None:
            for name, entry in piece.entries.items():
                if name in too_narrow:
                    split.store.discard(name, world)
                else:
                    split.store.commit(name, entry, world, piece.span)

        distributed.on_rank_zero(commit)
    return passes, span[1] - span[0], too_narrow


def logits_over(teacher: FrozenTeacher, tokens: Any, precision: str, device: torch.device, first: int = 0) -> torch.Tensor:
    """Run a teacher over the examples of a split that are not cached, each rank over a share; return logits on every rank.

    Args:
        teacher: the teacher, which is on the CPU again afterwards; its passes are counted.
        tokens: text of the split, tokenised for the teacher.
        precision: precision of the forward pass.
        device: device on which the teacher runs.
        first: first of the examples, of which there is one at least.

    Returns:
        (examples, classes), on the CPU, with logits in the task's label order.
    """
    rank, world, count = distributed.rank(), distributed.world(), len(tokens) - first
    span = (first + count * rank // world, first + count * (rank + 1) // world)
    logits: dict[int, torch.Tensor] = {}
    with _on_device(teacher, precision, device):
        for rows in batches_by_length(tokens.offsets, span):
            inputs = {name: hardware.to_device(tensor, device) for name, tensor in tokens.pad(rows).items()}
            outputs = teacher.in_order(teacher.run(inputs, Needs()))
            logits |= dict(zip(rows, outputs.logits.cpu(), strict=True))
            teacher.passes += 1
    teacher.examples += len(logits)
    shares = distributed.gather(torch.stack([logits[row] for row in range(*span)]) if logits else None)
    return torch.cat([share for share in shares if share is not None])


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
    inputs = {name: hardware.to_device(tensor, device) for name, tensor in split.tokens.pad(rows).items()}
    outputs = teacher.run(inputs, split.needs)
    return {name: tensor for name, tensor in outputs.named().items() if name in split.names}
