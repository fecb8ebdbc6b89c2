"""Outputs of a frozen teacher over a split, on disk: one memory-mapped file per tensor, indexed by example.

A folder holds `about.json`, which describes the model and data of all tensors, and for every tensor numpy's `.npy` file and a
small JSON file with what that format has no place for: the type that a read returns, and a checksum. The JSON file is written
last and atomically, so a tensor is either complete or missing, and a method that needs further tensors adds files to the
existing ones.
"""

import hashlib
import io
import json
import mmap
import os
import tokenize
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd.forward.kinds import by_token
from kd.system.files import write_text

RAW: Mapping[torch.dtype, type] = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bfloat16: np.uint16,  # numpy has no such type; the bits are stored
}
DTYPE_NAMES = {np.dtype(raw): str(kind).removeprefix("torch.") for kind, raw in RAW.items()}
"""Type in a file -> name of the tensor's type."""
RELEASE = 8
"""Number of reads after which memory-mapped pages are released."""
CHUNK = 1 << 24
"""Number of bytes read at a time for a checksum."""
UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, SyntaxError, tokenize.TokenError, RecursionError)
"""Errors of numpy and json on a file that is damaged or of another program."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Description of one stored tensor.

    Attributes:
        shape: (examples or tokens, width).
        stored: data type on disk.
        shown: data type that the forward pass returned, and that a read returns.
    """

    shape: tuple[int, int]
    stored: str
    shown: str

    @property
    def raw(self) -> np.dtype[Any]:
        """Data type of the numbers in the file."""
        return np.dtype(RAW[getattr(torch, self.stored)])

    @property
    def size(self) -> int:
        """Number of bytes on disk, without the file's header."""
        return self.shape[0] * self.shape[1] * self.raw.itemsize


@dataclass
class TensorStore:
    """Stored tensors of one teacher over one split.

    Args:
        folder: folder of the files.
        offsets: (examples + 1,), index of each example's first token among all tokens of the split.
    """

    folder: Path
    offsets: np.ndarray
    _open: dict[str, tuple[np.ndarray, Entry]] = field(default_factory=dict, repr=False)
    _reads: int = 0

    def __getstate__(self) -> dict[str, Any]:  # a memory map that is pickled would be copied
        return {"folder": self.folder, "offsets": self.offsets, "_open": {}, "_reads": 0}

    @property
    def examples(self) -> int:
        """Number of examples of the split."""
        return len(self.offsets) - 1

    def rows(self, name: str) -> int:
        """Return the number of rows of a tensor: tokens or examples of the split."""
        return int(self.offsets[-1]) if by_token(name) else self.examples

    def entry(self, name: str) -> Entry | None:
        """Return the description of a tensor; None if it is not stored, or its files cannot be read."""
        try:
            return self._load(name)[1]
        except UNREADABLE:
            return None

    def damaged(self, names: Iterable[str]) -> list[str]:
        """Return the names of stored tensors whose size or checksum is wrong; reads every byte."""
        return [name for name in names if self._path(name, "json").exists() and not self._whole(name)]

    def missing(self, names: Iterable[str]) -> list[str]:
        """Return the names of tensors that are not stored."""
        return [name for name in names if not self._path(name, "json").exists()]

    def remove(self, names: Iterable[str]) -> None:
        """Delete stored tensors."""
        for name in names:
            self._open.pop(name, None)
            for ending in ("json", "npy"):
                self._path(name, ending).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Delete partial files that a killed process left behind."""
        for left in self.folder.glob("*.part*"):
            left.unlink(missing_ok=True)

    def draft(self, name: str, rank: int) -> Path:
        """Return the path to which a rank writes its share of a tensor."""
        return self.folder / f"{name}.part{rank}"

    def commit(self, name: str, entry: Entry, ranks: int) -> None:
        """Concatenate the ranks' shares to one tensor, synced to disk before its description is written."""
        whole = self.draft(name, 0)
        with whole.open("ab") as target:
            for rank in range(1, ranks):
                with self.draft(name, rank).open("rb") as share:
                    while block := share.read(CHUNK):
                        target.write(block)
                self.draft(name, rank).unlink()
            target.flush()
            os.fsync(target.fileno())
        size = len(header(entry)) + entry.size
        if whole.stat().st_size != size:
            raise RuntimeError(f"{whole} has {whole.stat().st_size} bytes, not {size}")
        checksum = _checksum(whole)
        os.replace(whole, self._path(name, "npy"))
        write_text(self._path(name, "json"), json.dumps({"shown": entry.shown, "checksum": checksum}) + "\n")

    def read(self, names: Iterable[str], rows: Sequence[int], longest: int | None = None) -> dict[str, Tensor]:
        """Return tensors of some examples: (batch, width), or (batch, longest, width) with zeros on padding."""
        tensors = {}
        indices = np.asarray(rows)
        lengths = self.offsets[indices + 1] - self.offsets[indices]
        for name in names:
            array, entry = self._array(name)
            if by_token(name):
                values = np.zeros((len(indices), longest or int(lengths.max()), entry.shape[1]), dtype=array.dtype)
                for index, (row, length) in enumerate(zip(indices, lengths, strict=True)):
                    values[index, :length] = array[self.offsets[row] : self.offsets[row] + length]
            else:
                values = array[indices]
            tensors[name] = _tensor(values, entry.stored).to(getattr(torch, entry.shown))
        self._reads += 1
        if self._reads % RELEASE == 0:
            self._release()
        return tensors

    def open(self, names: Iterable[str]) -> None:
        """Memory-map tensors now, so that they stay readable if the files are deleted."""
        for name in names:
            self._array(name)

    def _release(self) -> None:
        """Release pages that were read: they stay in the page cache, but no longer count as this process's memory."""
        for array, _ in self._open.values():
            if hasattr(mmap, "MADV_DONTNEED"):
                array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]

    def size(self, names: Iterable[str]) -> int:
        """Return the total number of bytes of the tensors among `names` that are stored."""
        return sum(entry.size for name in names if (entry := self.entry(name)) is not None)

    def _path(self, name: str, ending: str) -> Path:
        return self.folder / f"{name}.{ending}"

    def _array(self, name: str) -> tuple[np.ndarray, Entry]:
        if name not in self._open:
            self._open[name] = self._load(name)
        return self._open[name]

    def _load(self, name: str) -> tuple[np.ndarray, Entry]:
        """Memory-map a stored tensor; raise one of `UNREADABLE` for files that `commit` did not write."""
        shown = self._description(name)["shown"]
        array = np.lib.format.open_memmap(self._path(name, "npy"), mode="r")
        rows, width = array.shape
        if shown not in DTYPE_NAMES.values():
            raise ValueError(shown)
        return array, Entry((rows, width), DTYPE_NAMES[array.dtype], shown)

    def _description(self, name: str) -> Any:
        return json.loads(self._path(name, "json").read_text(encoding="utf-8"))

    def _whole(self, name: str) -> bool:
        try:
            if _checksum(self._path(name, "npy")) != self._description(name)["checksum"]:
                return False  # before a damaged header is parsed
            return self._load(name)[1].shape[0] == self.rows(name)
        except UNREADABLE:
            return False


@dataclass(frozen=True)
class CachedOutputs:
    """Cached outputs of a teacher over a split, from which batches are collated in place of the teacher's tokens.

    Args:
        store: the stored tensors.
        names: names of the tensors to read.
        tokens: the teacher's tokens; outputs are padded like them.
    """

    store: TensorStore
    names: tuple[str, ...]
    tokens: Any

    def pad(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return the teacher's tensors of these examples, by name, and its `attention_mask`, (batch, tokens)."""
        mask = self.tokens.mask(rows)
        read = self.store.read(self.names, rows, mask.shape[1])
        return {"attention_mask": torch.from_numpy(mask.astype(np.int64)), **read}


def _tensor(values: np.ndarray, stored: str) -> Tensor:
    if stored == "bfloat16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(values))


def header(entry: Entry) -> bytes:
    """Return the header of the `.npy` file of a tensor."""
    file = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(entry.raw), "fortran_order": False, "shape": entry.shape}
    np.lib.format.write_array_header_1_0(file, described)
    return file.getvalue()


def size_of_array(path: Path) -> int:
    """Return the number of bytes of an array's file without its header; of a file that is none, all its bytes."""
    try:
        return np.lib.format.open_memmap(path, mode="r").nbytes
    except UNREADABLE:
        return path.stat().st_size


def _checksum(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


class Share:
    """One rank's part of a tensor that is being written: consecutive examples, filled in any order.

    The file of rank 0 begins with the header of the whole tensor, and `TensorStore.commit` appends the other ranks' numbers.

    Args:
        store: the store to write to.
        name: name of the tensor.
        entry: shape and data types of the tensor.
        span: first example of the share, and the one after its last.
        rank: rank that writes the share.
    """

    def __init__(self, store: TensorStore, name: str, entry: Entry, span: tuple[int, int], rank: int) -> None:
        self.entry = entry
        self.offsets = store.offsets if by_token(name) else None
        begin, end = span if self.offsets is None else (int(self.offsets[index]) for index in span)
        self.begin = begin
        path = store.draft(name, rank)
        shape, begins = (end - begin, entry.shape[1]), header(entry) if rank == 0 else b""
        size = shape[0] * shape[1] * entry.raw.itemsize
        with path.open("wb") as file:  # allocate now: a full disk is an error here, but kills the process in a memory map
            file.write(begins)
            file.flush()
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), len(begins), size)
        self.array = np.memmap(path, entry.raw, "r+", len(begins), shape) if size else np.empty(shape, entry.raw)

    def write(self, rows: Sequence[int], values: Tensor) -> bool:
        """Write the tensors of some examples; return False if the stored type cannot represent them."""
        stored = getattr(torch, self.entry.stored)
        if not fits(values, stored):
            return False
        converted = values.detach().to(stored).cpu()
        array = converted.view(torch.int16).numpy().view(np.uint16) if stored is torch.bfloat16 else converted.numpy()
        if self.offsets is None:
            self.array[np.asarray(rows) - self.begin] = array
            return True
        for index, row in enumerate(rows):
            begin, end = int(self.offsets[row]), int(self.offsets[row + 1])
            self.array[begin - self.begin : end - self.begin] = array[index, : end - begin]
        return True

    def close(self) -> None:
        """Flush the memory map."""
        if isinstance(self.array, np.memmap):
            self.array.flush()


def stored_as(shown: torch.dtype, precision: str) -> torch.dtype:
    """Return the data type in which a tensor is stored: its own, or float16 if its values are no more precise than that.

    float32 values of a mixed-precision pass come from products of 8 (bfloat16) or 11 (float16) significant bits; float16
    has 11. `fits` checks that the values are in its range.
    """
    return torch.float16 if shown is torch.float32 and precision in ("bf16-mixed", "16-mixed") else shown


def fits(values: Tensor, stored: torch.dtype) -> bool:
    """Return whether a type represents all values within 2^-10 of the largest magnitude in their row."""
    if stored is values.dtype:
        return True
    lost = (values.to(stored).to(values.dtype) - values).abs().amax(dim=-1)
    return bool((lost <= values.abs().amax(dim=-1) * 2.0**-10).all())
