"""Outputs of a frozen teacher over a split, on disk: memory-mapped files for each tensor, indexed by example.

A folder holds `about.json`, which describes the model and data of all tensors. A tensor is stored for the first examples of
the split, most often for all of them, in one or more segments of consecutive examples. A segment is numpy's `.npy` file and a
small JSON file with what that format has no place for: the examples, the type that a read returns, and a checksum. The JSON
file is written last and atomically, so a segment is either complete or missing. A method that needs further tensors, and a run
that stores more examples, add files to the existing ones and change none, so that other processes may read them at that time.
"""

import contextlib
import glob
import io
import json
import mmap
import os
import tokenize
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd.forward.inputs import LIVE, ORDER
from kd.forward.kinds import by_token
from kd.system.files import checksum_of, write_text

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
LATER = "@"
"""Character between the name of a tensor and the first example of a segment, in file names; the first segment has none."""
UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    SyntaxError,
    OverflowError,
    tokenize.TokenError,
    RecursionError,
)
"""Errors of numpy and json on a file that is damaged or of another program."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Description of a stored tensor, or of one of its segments.

    Attributes:
        shape: (examples or tokens of the segment, width).
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


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive examples of a stored tensor.

    Attributes:
        span: its first example, and the one after its last.
        array: the numbers, memory-mapped, (examples or tokens, width).
        entry: their shape and types.
    """

    span: tuple[int, int]
    array: np.ndarray
    entry: Entry


@dataclass
class TensorStore:
    """Stored tensors of one teacher over one split.

    Args:
        folder: folder of the files.
        offsets: (examples + 1,), index of each example's first token among all tokens of the split.
    """

    folder: Path
    offsets: np.ndarray
    _open: dict[str, list[Segment]] = field(default_factory=dict, repr=False)
    _reads: int = 0

    def __getstate__(self) -> dict[str, Any]:  # a memory map that is pickled would be copied
        return {"folder": self.folder, "offsets": self.offsets, "_open": {}, "_reads": 0}

    @property
    def examples(self) -> int:
        """Number of examples of the split."""
        return len(self.offsets) - 1

    def rows(self, name: str, span: tuple[int, int] | None = None) -> int:
        """Return the number of rows that a tensor has for a span of examples, all by default: their tokens, or one for each."""
        begin, end = (0, self.examples) if span is None else span
        return int(self.offsets[end] - self.offsets[begin]) if by_token(name) else end - begin

    def count(self, names: Iterable[str]) -> int:
        """Return the number of examples, from the first on, of which all of these tensors are stored."""
        return min(max((end for _, end in self._spans(name)), default=0) for name in names)

    def entry(self, name: str) -> Entry | None:
        """Return the description of a tensor's last segment; None if it is not stored, or its files cannot be read."""
        try:
            return self._load(name)[-1].entry
        except UNREADABLE:
            return None

    def damaged(self, names: Iterable[str]) -> list[str]:
        """Return the names of stored tensors of which a size or a checksum is wrong; reads every byte."""
        return [name for name in names if not self._whole(name)]

    def missing(self, names: Iterable[str]) -> list[str]:
        """Return the names of tensors that are not stored for all examples."""
        return [name for name in names if self.count([name]) < self.examples]

    def remove(self, names: Iterable[str]) -> None:
        """Delete stored tensors: the last segment first, so that a process that is killed leaves the first ones."""
        for name in names:
            self._open.pop(name, None)
            for begin in sorted(self._begins(name), reverse=True):
                for ending in ("json", "npy"):
                    self._path(name, ending, begin).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Delete what is of no use: partial files of a killed process, and segments that do not continue a tensor."""
        for left in self.folder.glob("*.part*"):
            left.unlink(missing_ok=True)
        for path in (*self.folder.glob(f"*{LATER}*.json"), *self.folder.glob(f"*{LATER}*.npy")):
            name, _, begin = path.stem.rpartition(LATER)
            if begin not in [str(first) for first, _ in self._spans(name)]:
                path.unlink(missing_ok=True)

    def draft(self, name: str, rank: int) -> Path:
        """Return the path to which a rank writes its share of a tensor."""
        return self.folder / f"{name}.part{rank}"

    @contextlib.contextmanager
    def drafts(self, names: Collection[str], rank: int) -> Iterator[None]:
        """Delete a rank's shares of these tensors if the block raises: on a full disk they would be what fills it."""
        try:
            yield
        except BaseException:
            for name in names:
                self.draft(name, rank).unlink(missing_ok=True)
            raise

    def commit(self, name: str, entry: Entry, ranks: int, span: tuple[int, int] | None = None) -> None:
        """Concatenate the ranks' shares to one segment, synced to disk before its description is written.

        Args:
            name: name of the tensor.
            entry: description of the segment.
            ranks: number of shares.
            span: its examples, which follow those that are stored; all by default.
        """
        begin, end = (0, self.examples) if span is None else span
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
        about = {"shown": entry.shown, "examples": [begin, end], "checksum": checksum_of(whole)}
        os.replace(whole, self._path(name, "npy", begin))
        write_text(self._path(name, "json", begin), json.dumps(about) + "\n")

    def discard(self, name: str, ranks: int) -> None:
        """Delete the ranks' shares of a tensor."""
        for rank in range(ranks):
            self.draft(name, rank).unlink()

    def read(self, names: Iterable[str], rows: Sequence[int], longest: int | None = None) -> dict[str, Tensor]:
        """Return tensors of some examples: (batch, width), or (batch, longest, width) with zeros on padding.

        Raises:
            IndexError: for an example that is not stored.
        """
        indices = np.asarray(rows, dtype=np.int64)
        if longest is None:
            longest = int((self.offsets[indices + 1] - self.offsets[indices]).max())
        tensors = {name: self._read(name, indices, longest) for name in names}
        self._reads += 1
        if self._reads % RELEASE == 0:
            self._release()
        return tensors

    def _read(self, name: str, indices: np.ndarray, longest: int) -> Tensor:
        segments = self._segments(name)
        which = np.searchsorted([segment.span[1] for segment in segments], indices, side="right")
        used = np.unique(which) if len(indices) else [0]  # of no example, the tensor has its width and type all the same
        parts = [self._read_segment(name, segments[number], indices[which == number], longest) for number in used]
        if len(parts) == 1:
            return parts[0]
        places = np.concatenate([np.flatnonzero(which == number) for number in used])
        return torch.cat(parts)[torch.from_numpy(places.argsort())]

    def _read_segment(self, name: str, segment: Segment, indices: np.ndarray, longest: int) -> Tensor:
        """Return a tensor of some examples of one segment."""
        array, begin = segment.array, segment.span[0]
        if by_token(name):
            values = np.zeros((len(indices), longest, array.shape[1]), dtype=array.dtype)
            starts, ends = (self.offsets[indices + n] - self.offsets[begin] for n in range(2))
            for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
                values[index, : end - start] = array[start:end]
        else:
            values = array[indices - begin]
        return _tensor(values, segment.entry.stored).to(getattr(torch, segment.entry.shown))

    def open(self, names: Iterable[str]) -> None:
        """Memory-map tensors now, so that they stay readable if the files are deleted."""
        for name in names:
            self._segments(name)

    def _release(self) -> None:
        """Release pages that were read: they stay in the page cache, but no longer count as this process's memory."""
        for segment in (segment for segments in self._open.values() for segment in segments):
            if hasattr(mmap, "MADV_DONTNEED"):
                segment.array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]

    def size(self, names: Iterable[str], count: int | None = None) -> int:
        """Return the total number of bytes that are stored of tensors for the first `count` examples, all by default."""
        most, total = self.examples if count is None else count, 0
        for name in names:
            with contextlib.suppress(*UNREADABLE):
                for segment in self._load(name):
                    begin, end = segment.span
                    rows = self.rows(name, (begin, min(end, most))) if begin < most else 0
                    total += rows * segment.entry.shape[1] * segment.entry.raw.itemsize
        return total

    def _path(self, name: str, ending: str, begin: int = 0) -> Path:
        return self.folder / f"{name}{f'{LATER}{begin}' if begin else ''}.{ending}"

    def _begins(self, name: str) -> list[int]:
        """Return the first examples of all segments of which there is a file."""
        later = (path.stem.rpartition(LATER)[2] for path in self.folder.glob(f"{glob.escape(name)}{LATER}*.*"))
        return [0, *{int(begin) for begin in later if begin.isascii() and begin.isdigit()}]

    def _spans(self, name: str) -> list[tuple[int, int]]:
        """Return the examples of a tensor's segments, which follow each other from the first example on."""
        spans: list[tuple[int, int]] = []
        end = 0
        while end < self.examples and self._path(name, "json", end).exists():
            begin = end
            try:
                end = int(self._description(name, begin).get("examples", [0, self.examples])[1])
            except UNREADABLE:  # its examples are not known, but it has to be removed
                end = self.examples
            spans.append((begin, end))
            if end <= begin:
                break
        return spans

    def _segments(self, name: str) -> list[Segment]:
        if name not in self._open:
            self._open[name] = self._load(name)
        return self._open[name]

    def _load(self, name: str) -> list[Segment]:
        """Memory-map a stored tensor; raise one of `UNREADABLE` for files that `commit` did not write."""
        segments = []
        for begin, end in self._spans(name):
            shown = self._description(name, begin)["shown"]
            array = np.lib.format.open_memmap(self._path(name, "npy", begin), mode="r")
            rows, width = array.shape
            if shown not in DTYPE_NAMES.values() or rows != self.rows(name, (begin, end)):
                raise ValueError(shown, rows)
            segments.append(Segment((begin, end), array, Entry((rows, width), DTYPE_NAMES[array.dtype], shown)))
        return segments

    def _description(self, name: str, begin: int) -> Any:
        return json.loads(self._path(name, "json", begin).read_text(encoding="utf-8"))

    def _whole(self, name: str) -> bool:
        """Return whether all segments that are stored of a tensor are as they were written."""
        try:
            for begin, end in self._spans(name):
                about = self._description(name, begin)
                if about.get("examples", [0, self.examples]) != [begin, end]:
                    return False
                if checksum_of(self._path(name, "npy", begin)) != about["checksum"]:
                    return False  # before a damaged header is parsed
            self._load(name)
        except UNREADABLE:
            return False
        return True


@dataclass(frozen=True)
class CachedOutputs:
    """Cached outputs of a teacher over a split, from which batches are collated in place of the teacher's tokens.

    Args:
        store: the stored tensors.
        names: names of the tensors to read.
        tokens: the teacher's tokens; outputs are padded like them.
        count: number of examples, from the first on, whose outputs are read; None for all. On the others the teacher runs.
    """

    store: TensorStore
    names: tuple[str, ...]
    tokens: Any
    count: int | None = None

    @property
    def cached(self) -> int:
        """Number of examples, from the first on, whose outputs are read."""
        return self.store.examples if self.count is None else self.count

    def pad(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return a teacher's inputs for these examples, as `kd.forward.inputs` describes them.

        Which examples are cached is known here, on the CPU, so that no step reads it from a device.
        """
        mask = self.tokens.mask(rows)
        stored = np.asarray(rows) < self.cached
        cached, live = np.flatnonzero(stored).tolist(), np.flatnonzero(~stored).tolist()
        inputs = {"attention_mask": torch.from_numpy(mask.astype(np.int64))}
        if self.cached:  # of none of the examples, too, so that all batches have the same tensors
            inputs |= self.store.read(self.names, [rows[place] for place in cached], mask.shape[1])
        if live:
            tokens = self.tokens.pad([rows[place] for place in live])
            inputs |= {f"{LIVE}{name}": tensor for name, tensor in tokens.items()}
            inputs[ORDER] = torch.from_numpy(np.argsort([*cached, *live]))
        return inputs


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
