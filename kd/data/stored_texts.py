"""Texts that lie on disk: written in one pass over files of any format, and read a few at a time.

A folder holds `content.bin`, all texts as UTF-8, one after the other; `offsets.bin`, the start of each and the end of the last
one; `files.bin` and `numbers.bin`, the file that each example is from and its line there; and a file for each further column.
"""

import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kd.data.stored import ABOUT, StoredBytes, describe, description, empty, remove_with
from kd.data.texts import Texts, TextSequence
from kd.errors import InputError
from kd.system import distributed
from kd.system.files import LOCK, locked, note_stored, remove

TEXTS_FORMAT = 1
"""Version of the stored format, part of the digest that names every folder; incremented when the format changes."""

PIECE_ROWS, PIECE_BYTES = 4096, 1 << 24
"""Largest numbers of texts, and of their bytes, that are read at a time; one text may have more bytes."""

OFFSET, NUMBER, FILE = (np.dtype(name) for name in ("<i8", "<i8", "<i4"))
"""Types of the numbers in the files."""


@dataclass(frozen=True)
class TextPiece:
    """Some examples, in memory, on their way to the disk.

    Attributes:
        file: index of the file that they are from.
        texts: their texts.
        numbers: their lines in the file, (examples,).
        columns: further column -> values, (examples,).
    """

    file: int
    texts: Texts
    numbers: np.ndarray
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)


class StoredTexts(TextSequence):
    """One or two texts for each example, on disk. It behaves like a list of tuples, which are read on access.

    Args:
        folder: a complete folder.
        about: its description.
        places: prefixes of positions, such as `'a.csv', line `, one for each file that the texts were read from.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], places: Sequence[str]) -> None:
        self.folder, self.places = folder, list(places)
        self.columns: int = about["columns"]
        self.further: Mapping[str, Sequence[str]] = about["further"]
        files = about["files"]
        self.digest = f"{self.columns}-{files['offsets.bin']['checksum']}-{files['content.bin']['checksum']}"
        """Identification of the texts and their order."""
        self.offsets: np.ndarray = np.memmap(folder / "offsets.bin", OFFSET, "r")
        self.content = StoredBytes(folder / "content.bin")

    def __len__(self) -> int:
        return (len(self.offsets) - 1) // self.columns

    def row(self, row: int) -> tuple[str, ...]:
        """Return the texts of one example."""
        return self.span(row, row + 1)[0]

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        return itertools.chain.from_iterable(self.pieces())

    def pieces(self) -> Iterator[Texts]:
        """Yield the texts in parts of at most `PIECE_ROWS` examples, and `PIECE_BYTES` but for a single one, each in memory."""
        start = 0
        while start < len(self):
            begins = self.offsets[start * self.columns :: self.columns][: PIECE_ROWS + 1]
            end = start + max(int(np.searchsorted(begins, begins[0] + PIECE_BYTES, side="right")) - 1, 1)
            yield self.span(start, end)
            start = end

    def span(self, start: int, end: int) -> Texts:
        """Return the texts from one index to another, which is not included."""
        offsets = np.array(self.offsets[start * self.columns : end * self.columns + 1])
        return Texts(self.content.read(int(offsets[0]), int(offsets[-1] - offsets[0])), offsets - offsets[0], self.columns)

    def take(self, rows: Sequence[int] | np.ndarray) -> Texts:
        """Return these texts, in this order."""
        rows = np.asarray(rows, dtype=np.int64)
        bounds = self.offsets[rows[:, None] * self.columns + np.arange(self.columns + 1)]
        spans = zip(bounds[:, 0].tolist(), bounds[:, -1].tolist(), strict=True)
        content = b"".join([self.content.read(start, end - start) for start, end in spans])
        sizes = np.diff(bounds, axis=1).reshape(-1)
        return Texts(content, np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)]), self.columns)

    def sizes(self, rows: np.ndarray) -> np.ndarray:
        """Return the number of bytes of the texts of each of these examples, (examples,)."""
        begins = self.offsets[rows * self.columns]
        sizes: np.ndarray = self.offsets[(rows + 1) * self.columns] - begins
        return sizes

    def where(self, row: int) -> str:
        """Return the position of an example in its file, for messages."""
        file = np.memmap(self.folder / "files.bin", FILE, "r")[row]
        number = np.memmap(self.folder / "numbers.bin", NUMBER, "r")[row]
        return f"{self.places[file]}{number}"

    def column(self, name: str) -> np.ndarray:
        """Return the values of a further column, (examples,)."""
        file, kind = self.further[name]
        return np.fromfile(self.folder / file, np.dtype(kind))


def store_texts(
    folder: Path | None, places: Sequence[str], pieces: Callable[[], Iterable[TextPiece]], what: str
) -> StoredTexts:
    """Return texts that lie in a folder; they are written first if the folder is not complete.

    Rank 0 writes, every rank has to call this. Other processes that need the same folder wait.

    Args:
        folder: folder of the texts, named by a digest of everything that determines them; None for a temporary one.
        places: prefixes of positions, one for each file that the texts are read from.
        pieces: reads the examples.
        what: description of the texts, for messages.

    Raises:
        InputError: for an error in the files, which leaves nothing that looks complete; if the folder cannot be written to, or
            is not one that all machines share.
    """
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="kd-texts-"))
        try:
            write_texts(folder, pieces())
        except BaseException:
            remove(folder)
            raise
        texts = StoredTexts(folder, description(folder, thorough=False) or {}, places)
        remove_with(texts, folder)
        return texts

    def make() -> dict[str, Any]:
        about = description(folder)
        if about is None:
            with locked(folder, f"  another process reads {what}; waiting for it"):
                about = description(folder)
                if about is None:
                    if (folder / ABOUT).exists():
                        distributed.print_rank_zero(f"  the stored texts '{folder}' are damaged; {what} is read again")
                    note_stored(folder)
                    write_texts(folder, pieces())
                    about = description(folder, thorough=False)
        assert about is not None
        return about

    about = distributed.on_rank_zero(make)
    try:
        return StoredTexts(folder, about, places)
    except FileNotFoundError as error:
        raise InputError(f"'{folder.parent.parent}' is not a folder that all machines share", "paths.runs") from error


def write_texts(folder: Path, pieces: Iterable[TextPiece]) -> None:
    """Write texts, and declare the folder complete. An error leaves nothing in it but its lock.

    Raises:
        InputError: for an error in the files that the pieces are read from.
        OSError: if the folder cannot be written to.
    """
    empty(folder, but=(LOCK,))
    further: dict[str, tuple[str, str]] = {}
    end, columns = 0, 1
    try:
        with ExitStack() as stack:
            names = ["content", "offsets", "files", "numbers"]
            files = {name: stack.enter_context((folder / f"{name}.bin").open("wb")) for name in names}
            files["offsets"].write(np.zeros(1, OFFSET).tobytes())
            for piece in pieces:
                columns = piece.texts.columns
                files["content"].write(piece.texts.content)
                files["offsets"].write((piece.texts.offsets[1:] + end).astype(OFFSET).tobytes())
                files["files"].write(np.full(len(piece.numbers), piece.file, FILE).tobytes())
                files["numbers"].write(piece.numbers.astype(NUMBER).tobytes())
                end += len(piece.texts.content)
                for name, values in piece.columns.items():
                    if name not in further:
                        further[name] = (f"column{len(further)}.bin", values.dtype.newbyteorder("<").str)
                        files[name] = stack.enter_context((folder / further[name][0]).open("wb"))
                    files[name].write(values.astype(further[name][1]).tobytes())
        written = [*(f"{name}.bin" for name in names), *(file for file, _ in further.values())]
        describe(folder, written, {"format": TEXTS_FORMAT, "columns": columns, "further": further})
    except BaseException:
        empty(folder, but=(LOCK,))
        raise
