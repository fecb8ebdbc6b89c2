"""Texts and raw examples in compact form: a million sentences take their bytes, not a million Python objects."""

import bisect
import hashlib
import itertools
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, overload

import numpy as np

Item = TypeVar("Item")

INTERNED = 10_000
"""Number of distinct labels up to which equal ones share one object; further ones, as of scores, are stored separately."""


@dataclass(frozen=True, slots=True)
class Example:
    """Raw example: one or two texts, the label as in the file, and its position in the file for messages.

    `columns` has the values of the further columns that the task reads (`task.extra`), as in the file.
    """

    texts: tuple[str, ...]
    label: Any
    where: str
    columns: Mapping[str, Any] = field(default_factory=dict)


class RowSequence(Sequence[Item]):
    """Base class of sequences that make an item on access: a subclass has `__len__` and `row`."""

    @abstractmethod
    def row(self, row: int) -> Item:
        """Return the item at an index, which is in range."""

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self.row(row) for row in range(*index.indices(len(self)))]
        row = index + len(self) if index < 0 else index
        if not 0 <= row < len(self):
            raise IndexError(index)
        return self.row(row)


class TextSequence(RowSequence[tuple[str, ...]]):
    """Base class of one or two texts for each example, which behave like a list of tuples."""

    @abstractmethod
    def pieces(self) -> "Iterator[Texts]":
        """Yield the texts in parts that fit into memory."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


class Texts(TextSequence):
    """One or two texts for each example, as one UTF-8 buffer and offsets.

    It behaves like a list of tuples, which are created on access.

    Args:
        content: all texts, concatenated.
        offsets: (examples x columns + 1,), start of each text in `content`, and end of the last one.
        columns: number of texts of each example.
    """

    def __init__(self, content: bytes | bytearray, offsets: np.ndarray, columns: int) -> None:
        self.content = content
        self.offsets = offsets
        self.columns = columns

    @classmethod
    def of(cls, rows: Iterable[Sequence[str]]) -> "Texts":
        """Convert texts to compact form."""
        if isinstance(rows, Texts):
            return rows
        writer = Writer()
        for row in rows:
            writer.add(row)
        return writer.texts()

    def __len__(self) -> int:
        return (len(self.offsets) - 1) // self.columns

    def row(self, row: int) -> tuple[str, ...]:
        """Return the texts of one example."""
        bounds = self.offsets[row * self.columns : (row + 1) * self.columns + 1].tolist()
        return tuple(self.content[a:b].decode() for a, b in itertools.pairwise(bounds))

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        step = 4096 * self.columns
        for start in range(0, len(self.offsets) - 1, step):
            bounds = self.offsets[start : start + step + 1].tolist()
            texts = [self.content[a:b].decode() for a, b in itertools.pairwise(bounds)]
            yield from zip(*[iter(texts)] * self.columns, strict=True)

    def __repr__(self) -> str:
        return f"Texts({len(self)} examples of {self.columns}, {len(self.content)} bytes)"

    def pieces(self) -> Iterator["Texts"]:
        """Yield the texts, which are in memory already."""
        yield self

    def take(self, rows: Sequence[int] | np.ndarray) -> "Texts":
        """Return these examples, in this order."""
        rows = np.asarray(rows, dtype=np.int64)
        starts, ends = self.offsets[rows * self.columns], self.offsets[(rows + 1) * self.columns]
        view = memoryview(self.content)
        content = b"".join([view[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)])
        sizes = np.diff(self.offsets).reshape(-1, self.columns)[rows].reshape(-1)
        return Texts(content, np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)]), self.columns)

    def joined(self) -> "Texts":
        """Return the texts of each example joined to one, with a blank between them."""
        return self if self.columns == 1 else Texts.of((" ".join(row),) for row in self)

    def digest(self) -> str:
        """Return a digest of the texts and their order."""
        digest = hashlib.blake2b(np.int64(self.columns).tobytes(), digest_size=16)
        digest.update(self.offsets.astype("<i8").tobytes())
        digest.update(self.content)
        return digest.hexdigest()

    def keys(self) -> np.ndarray:
        """Return a number for each example, equal for equal texts, (examples,): of its size and its last bytes.

        Examples whose numbers are equal need not have equal texts. `hashes` takes ten times as long.
        """
        content = np.frombuffer(self.content or b"\0", dtype=np.uint8)
        starts, ends = self.offsets[: -1 : self.columns], self.offsets[self.columns :: self.columns]
        keys: np.ndarray = ends - starts
        sizes = keys
        for back in range(1, 9):
            keys = keys * 257 + np.where(back <= sizes, content[np.maximum(ends - back, 0)], 0)
        return keys

    def hashes(self) -> np.ndarray:
        """Return a hash for each example, equal for equal texts, (examples,); valid in this process only."""
        view, columns = memoryview(self.content).toreadonly(), self.columns
        bounds = self.offsets.tolist()
        texts = (hash(view[a:b]) for a, b in itertools.pairwise(bounds))
        values = np.fromiter(texts, np.int64, len(bounds) - 1)
        if columns == 1:
            return values
        return np.fromiter((hash(tuple(row)) for row in values.reshape(-1, columns).tolist()), np.int64, len(self))


class JoinedTexts(TextSequence):
    """Sequences of texts, one after the other, as one sequence; each may be in memory or on disk.

    Args:
        parts: the sequences.
    """

    def __init__(self, *parts: Sequence[tuple[str, ...]]) -> None:
        self.parts = parts
        self.starts = list(itertools.accumulate(map(len, parts), initial=0))

    def __len__(self) -> int:
        return self.starts[-1]

    def row(self, row: int) -> tuple[str, ...]:
        """Return the texts of one example."""
        part = bisect.bisect_right(self.starts, row) - 1
        return self.parts[part][row - self.starts[part]]

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        return itertools.chain(*self.parts)

    def pieces(self) -> Iterator[Texts]:
        """Yield the texts in parts that fit into memory."""
        return itertools.chain.from_iterable(map(pieces_of, self.parts))


def pieces_of(texts: Sequence[tuple[str, ...]]) -> Iterator[Texts]:
    """Yield texts in compact form: those that are in memory at once, those on disk piece by piece."""
    return texts.pieces() if isinstance(texts, TextSequence) else iter([Texts.of(texts)])


class FlatTexts(RowSequence[str]):
    """The single texts of examples, one after the other.

    Args:
        texts: one or two texts for each example; all parts of a `JoinedTexts` need not have as many.
    """

    def __init__(self, texts: Sequence[tuple[str, ...]]) -> None:
        self.texts = texts
        inner = [FlatTexts(part) for part in texts.parts] if isinstance(texts, JoinedTexts) else []
        self.columns = len(texts[0]) if len(texts) and not inner else 1
        self.starts = list(itertools.accumulate(map(len, inner), initial=0))
        self.parts = inner

    def __len__(self) -> int:
        return self.starts[-1] if self.parts else len(self.texts) * self.columns

    def row(self, row: int) -> str:
        """Return one text."""
        if self.parts:
            part = bisect.bisect_right(self.starts, row) - 1
            return self.parts[part][row - self.starts[part]]
        return self.texts[row // self.columns][row % self.columns]

    def __iter__(self) -> Iterator[str]:
        return itertools.chain.from_iterable(self.texts)


def count_shared(texts: Sequence[tuple[str, ...]], seen: Sequence[tuple[str, ...]]) -> int:
    """Return the number of examples whose texts also occur in `seen`, which is read piece by piece.

    >>> count_shared([("a",), ("b",), ("a",)], [("a",), ("c",)])
    2
    """
    own = Texts.of(texts)
    hashes, keys = own.hashes(), np.sort(own.keys())
    shared = np.zeros(len(hashes), dtype=bool)
    for piece in pieces_of(seen) if len(keys) else ():
        theirs = piece.keys()
        alike = keys[np.minimum(np.searchsorted(keys, theirs), len(keys) - 1)] == theirs
        shared |= np.isin(hashes, piece.take(np.flatnonzero(alike)).hashes())
    return int(shared.sum())


class Writer:
    """Builder of `Texts`, one example at a time."""

    def __init__(self) -> None:
        self.content = bytearray()
        self.ends = array("q", [0])
        self.columns = 1

    def add(self, row: Sequence[str]) -> None:
        """Add the texts of an example.

        Raises:
            UnicodeEncodeError: for half of a character (a lone surrogate), which is no text.
        """
        self.columns = len(row)
        for text in row:
            self.content += text.encode()
            self.ends.append(len(self.content))

    def texts(self) -> Texts:
        """Return the texts that were added."""
        return Texts(bytes(self.content), np.frombuffer(self.ends, dtype=np.int64), self.columns)


class Table(RowSequence[Example]):
    """Raw examples in compact form, which behave like a list of `Example`s.

    Args:
        texts: texts of each example.
        labels: label of each example, as in the file.
        places: prefixes of positions, such as `'a.csv', line `, which a line's number follows.
        place: (examples,), index of each example's prefix in `places`.
        numbers: (examples,), line number of each example; -1 for none.
        columns: further column -> value of each example, as in the file.
    """

    def __init__(
        self,
        texts: Texts,
        labels: list[Any],
        places: Sequence[str],
        place: np.ndarray,
        numbers: np.ndarray,
        columns: Mapping[str, list[Any]] | None = None,
    ) -> None:
        self.texts, self.labels = texts, labels
        self.places, self.place, self.numbers = places, place, numbers
        self.columns = columns or {}

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "Table":
        """Convert examples to compact form."""
        if isinstance(examples, Table):
            return examples
        writer = TableWriter(list(examples[0].columns) if len(examples) else [])
        for example in examples:
            further = [example.columns.get(name) for name in writer.columns]
            writer.add(example.texts, example.label, example.where, -1, further)
        return writer.table()

    @classmethod
    def joined(cls, parts: Sequence["Table"]) -> "Table":
        """Concatenate tables."""
        writer = TableWriter(list(parts[0].columns) if parts else [])
        for part in parts:
            for row, texts in enumerate(part.texts):
                further = [part.columns[name][row] for name in writer.columns]
                writer.add(texts, part.labels[row], part.places[part.place[row]], int(part.numbers[row]), further)
        return writer.table()

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, row: int) -> str:
        """Return the position of an example in its file, for messages."""
        number = int(self.numbers[row])
        return f"{self.places[self.place[row]]}{number if number >= 0 else ''}"

    def row(self, row: int) -> Example:
        """Return one example."""
        return self._example(row, self.texts[row])

    def __iter__(self) -> Iterator[Example]:
        for row, texts in enumerate(self.texts):
            yield self._example(row, texts)

    def _example(self, row: int, texts: tuple[str, ...]) -> Example:
        return Example(texts, self.labels[row], self.where(row), {name: values[row] for name, values in self.columns.items()})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def take(self, rows: Sequence[int] | np.ndarray) -> "Table":
        """Return these examples, in this order."""
        rows = np.asarray(rows, dtype=np.int64)
        labels = [self.labels[row] for row in rows.tolist()]
        columns = {name: [values[row] for row in rows.tolist()] for name, values in self.columns.items()}
        return Table(self.texts.take(rows), labels, self.places, self.place[rows], self.numbers[rows], columns)


class TableWriter:
    """Builder of a `Table`, one raw example at a time.

    Args:
        columns: names of the further columns, whose values `add` takes.
    """

    def __init__(self, columns: Sequence[str] = ()) -> None:
        self.writer = Writer()
        self.labels: list[Any] = []
        self.columns: dict[str, list[Any]] = {name: [] for name in columns}
        self.places: dict[str, int] = {}
        self.place = array("q")
        self.numbers = array("q")
        self._known: dict[tuple[type, Any], Any] = {}

    def add(self, texts: Sequence[str], label: object, place: str, number: int, further: Sequence[object] = ()) -> None:
        """Add an example; `place` is its prefix and `number` its line, as in `Table`; `further` are the values of `columns`.

        Raises:
            UnicodeEncodeError: for half of a character (a lone surrogate), which is no text.
        """
        self.writer.add(texts)
        self.labels.append(self._interned(label))
        for values, value in zip(self.columns.values(), further, strict=True):
            values.append(self._interned(value))
        self.place.append(self.places.setdefault(place, len(self.places)))
        self.numbers.append(number)

    def _interned(self, value: object) -> object:
        if not isinstance(value, str | int | float):
            return value
        key, interned = (type(value), value), self._known
        return interned.setdefault(key, value) if len(interned) < INTERNED else interned.get(key, value)

    def table(self) -> Table:
        """Return the examples that were added."""
        place, numbers = (np.frombuffer(values, dtype=np.int64) for values in (self.place, self.numbers))
        return Table(self.writer.texts(), self.labels, list(self.places), place, numbers, self.columns)
