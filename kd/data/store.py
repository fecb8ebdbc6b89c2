"""What a frozen teacher says of a split, on disk: one file a tensor, memory-mapped, keyed by example.

A folder holds `about.json`, which says what all of it is of, and for every tensor a file of raw numbers and a small JSON file
with shape, type and checksum. The latter is written last and all at once, so a tensor is whole or not there, and a method that
needs more adds files beside those that are there.
"""

import hashlib
import json
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd.runs import write_atomically

TOKEN_KINDS = ("hidden", "query", "key", "value", "derived")
"""Kinds of tensors that have a place for every token; the others have one for every example."""

RAW: Mapping[torch.dtype, type] = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bfloat16: np.uint16,  # numpy has no word for it; the bits are what is kept
}
NAMES = {str(kind).removeprefix("torch.") for kind in RAW}
"""The same types, by name."""
RELEASE = 8
"""Reads after which pages are let go of."""
CHUNK = 1 << 24
"""Bytes read at a time for a checksum."""


def by_token(name: str) -> bool:
    """Return whether a tensor has a place for every token."""
    return name.partition("-")[0] in TOKEN_KINDS


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor.

    Attributes:
        shape: (examples or tokens, width).
        stored: type on disk.
        shown: type that the forward showed and that a read gives back.
        checksum: of the file's bytes.
    """

    shape: tuple[int, int]
    stored: str
    shown: str
    checksum: str = ""

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self.shape[0] * self.shape[1] * getattr(torch, self.stored).itemsize  # type: ignore[no-any-return]


@dataclass
class TensorStore:
    """Tensors of one teacher over one split.

    Args:
        folder: where they are.
        offsets: (examples + 1,), where each example's tokens begin among all tokens of the split.
    """

    folder: Path
    offsets: np.ndarray
    _open: dict[str, tuple[np.ndarray, Entry]] = field(default_factory=dict, repr=False)
    _reads: int = 0

    def __getstate__(self) -> dict[str, Any]:  # a memory map that is pickled would be copied
        return {"folder": self.folder, "offsets": self.offsets, "_open": {}, "_reads": 0}

    @property
    def examples(self) -> int:
        """Examples of the split."""
        return len(self.offsets) - 1

    def rows(self, name: str) -> int:
        """First size of a tensor."""
        return int(self.offsets[-1]) if by_token(name) else self.examples

    def entry(self, name: str) -> Entry | None:
        """What is known of a tensor; None if it is not there."""
        try:
            found = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
            entry = Entry(tuple(found.pop("shape")), **found)
            rows, width = entry.shape
            if all(isinstance(size, int) for size in (rows, width)) and {entry.stored, entry.shown} <= NAMES:
                return entry
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            pass
        return Entry((0, 0), "uint8", "uint8")  # no file has these bytes: it is damaged

    def damaged(self, names: Iterable[str]) -> list[str]:
        """Those that are there but not as they were written; reads every byte."""
        return [name for name in names if (entry := self.entry(name)) is not None and not self._whole(name, entry)]

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those that are not there."""
        return [name for name in names if self.entry(name) is None]

    def remove(self, names: Iterable[str]) -> None:
        """Forget tensors."""
        for name in names:
            self._open.pop(name, None)
            for ending in ("json", "bin"):
                (self.folder / f"{name}.{ending}").unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what a killed process left."""
        for left in self.folder.glob("*.part*"):
            left.unlink(missing_ok=True)

    def draft(self, name: str, rank: int) -> Path:
        """Where a rank writes its share of a tensor."""
        return self.folder / f"{name}.part{rank}"

    def commit(self, name: str, entry: Entry, ranks: int) -> None:
        """Join the ranks' shares to a tensor, on disk before it counts."""
        whole = self.draft(name, 0)
        with whole.open("ab") as target:
            for rank in range(1, ranks):
                with self.draft(name, rank).open("rb") as share:
                    while block := share.read(CHUNK):
                        target.write(block)
                self.draft(name, rank).unlink()
            target.flush()
            os.fsync(target.fileno())
        if whole.stat().st_size != entry.size:
            raise RuntimeError(f"{whole} has {whole.stat().st_size} bytes, not {entry.size}")
        checksum = _checksum(whole)
        os.replace(whole, self.folder / f"{name}.bin")
        write_atomically(self.folder / f"{name}.json", json.dumps(asdict(entry) | {"checksum": checksum}) + "\n")

    def read(self, names: Iterable[str], rows: Sequence[int], longest: int | None = None) -> dict[str, Tensor]:
        """Tensors of some examples: (batch, width), or (batch, longest, width) with zeros on padding."""
        found = {}
        where = np.asarray(rows)
        lengths = self.offsets[where + 1] - self.offsets[where]
        for name in names:
            array, entry = self._array(name)
            if by_token(name):
                values = np.zeros((len(where), longest or int(lengths.max()), entry.shape[1]), dtype=array.dtype)
                for index, (row, length) in enumerate(zip(where, lengths, strict=True)):
                    values[index, :length] = array[self.offsets[row] : self.offsets[row] + length]
            else:
                values = array[where]
            found[name] = _tensor(values, entry.stored).to(getattr(torch, entry.shown))
        self._reads += 1
        if self._reads % RELEASE == 0:
            self._release()
        return found

    def open(self, names: Iterable[str]) -> None:
        """Map tensors now, so that they can be read also if the files are deleted."""
        for name in names:
            self._array(name)

    def _release(self) -> None:
        """Let go of pages that were read: they stay in the system's cache, and are not counted as this process's memory."""
        for array, _ in self._open.values():
            if hasattr(mmap, "MADV_DONTNEED"):
                array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]

    def size(self, names: Iterable[str]) -> int:
        """Bytes of those that are there."""
        return sum(entry.size for name in names if (entry := self.entry(name)) is not None)

    def _array(self, name: str) -> tuple[np.ndarray, Entry]:
        if name not in self._open:
            entry = self.entry(name)
            if entry is None:
                raise KeyError(name)
            raw = RAW[getattr(torch, entry.stored)]
            self._open[name] = np.memmap(self.folder / f"{name}.bin", raw, "r", shape=entry.shape), entry
        return self._open[name]

    def _whole(self, name: str, entry: Entry) -> bool:
        path = self.folder / f"{name}.bin"
        try:
            if path.stat().st_size != entry.size or entry.shape[0] != self.rows(name):
                return False
            return _checksum(path) == entry.checksum
        except (OSError, AttributeError):
            return False


@dataclass(frozen=True)
class CachedOutputs:
    """What a teacher said of a split, in the place of its tokens: what a batch of them is collated from.

    Args:
        store: where it is.
        names: tensors that are read.
        tokens: that the teacher read; a batch is padded as they are.
    """

    store: TensorStore
    names: tuple[str, ...]
    tokens: Any

    def pad(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The teacher's tensors of these examples, by name, and its `attention_mask`, (batch, tokens)."""
        mask = self.tokens.mask(rows)
        read = self.store.read(self.names, rows, mask.shape[1])
        return {"attention_mask": torch.from_numpy(mask.astype(np.int64)), **read}


def _tensor(values: np.ndarray, stored: str) -> Tensor:
    if stored == "bfloat16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(values))


def _checksum(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


class Share:
    """One rank's part of a tensor that is being written: consecutive examples, filled in any order.

    Args:
        store: that it is for.
        name: of the tensor.
        entry: its shape and types.
        span: first example of the share, and the one after its last.
        rank: whose it is.
    """

    def __init__(self, store: TensorStore, name: str, entry: Entry, span: tuple[int, int], rank: int) -> None:
        self.entry = entry
        self.offsets = store.offsets if by_token(name) else None
        begin, end = span if self.offsets is None else (int(self.offsets[index]) for index in span)
        self.begin = begin
        path = store.draft(name, rank)
        shape, raw = (end - begin, entry.shape[1]), RAW[getattr(torch, entry.stored)]
        size = shape[0] * shape[1] * np.dtype(raw).itemsize
        with path.open("wb") as file:  # a disk that is full is an error here, and the end of the process in a memory map
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
        self.array = np.memmap(path, raw, "r+" if path.stat().st_size else "w+", shape=shape) if size else np.empty(shape, raw)

    def write(self, rows: Sequence[int], values: Tensor) -> bool:
        """Put the tensors of some examples in their places; false if the stored type cannot hold them."""
        stored = getattr(torch, self.entry.stored)
        if not fits(values, stored):
            return False
        kept = values.detach().to(stored).cpu()
        array = kept.view(torch.int16).numpy().view(np.uint16) if stored is torch.bfloat16 else kept.numpy()
        if self.offsets is None:
            self.array[np.asarray(rows) - self.begin] = array
            return True
        for index, row in enumerate(rows):
            begin, end = int(self.offsets[row]), int(self.offsets[row + 1])
            self.array[begin - self.begin : end - self.begin] = array[index, : end - begin]
        return True

    def close(self) -> None:
        """Hand everything to the system."""
        if isinstance(self.array, np.memmap):
            self.array.flush()


def stored_as(shown: torch.dtype, precision: str) -> torch.dtype:
    """The type that a tensor is kept in: its own, or 16 bits where its numbers are no better than that.

    float32 that a mixed-precision pass shows comes from products of 8 (bfloat16) or 11 (float16) significant bits; float16
    keeps 11. Whether the numbers are in its range is for `fits` to say.
    """
    return torch.float16 if shown is torch.float32 and precision in ("bf16-mixed", "16-mixed") else shown


def fits(values: Tensor, stored: torch.dtype) -> bool:
    """Whether a type holds these numbers as well as they deserve: no number off by more than 2^-10 of its row's largest."""
    if stored is values.dtype:
        return True
    lost = (values.to(stored).to(values.dtype) - values).abs().amax(dim=-1)
    return bool((lost <= values.abs().amax(dim=-1) * 2.0**-10).all())
