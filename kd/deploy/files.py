"""Predictions for files of any size: texts are read a few rows at a time, and what is predicted is written as it comes.

The file that is written has a draft, and beside it a note of how far it is: the same command goes on there after it was
stopped. Rows are read in the same pieces again, so that the result is that of a command that was not stopped, to the bit.
"""

import csv
import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from kd.data.columnar import COLUMNAR
from kd.data.readers import Layout
from kd.data.sources import LINES, SAY_AFTER, in_file, keys_of_columns, no_examples, pieces_of_file, table_of
from kd.data.texts import Table
from kd.errors import InputError
from kd.system.files import remove, write_text, writing
from kd.system.model_sources import file_fingerprint

FILE, OUT = "FILE", "--out"
"""Names that errors give the file that is read, and the one that is written."""

AT_ONCE = 4096
"""Number of rows that are read, predicted and written at a time."""

SUFFIXES: Mapping[str, str | None] = {".csv": ",", ".tsv": "\t", ".jsonl": None}
"""Suffix of the file that is written -> character between its fields; None for an object on each line."""


@dataclass(frozen=True)
class Predicted:
    """Rows of a file that were predicted.

    Attributes:
        lines: their numbers in the file.
        logits: (rows, outputs).
        labels: names of the classes in the order of the logits; None for one score.
    """

    lines: Sequence[int]
    logits: np.ndarray
    labels: Sequence[str] | None

    @property
    def probabilities(self) -> np.ndarray:
        """Softmax of the logits, (rows, classes), double."""
        logits = self.logits.astype(np.float64)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares: np.ndarray = powers / powers.sum(axis=1, keepdims=True)
        return shares


def layout_of(path: Path, layout: Layout, text: Sequence[str]) -> Layout:
    """Return the layout of a file without labels: a `.txt` has a text on each line.

    Args:
        path: the file.
        layout: what the command says of it.
        text: its text columns.

    Raises:
        InputError: for lines where a task has pairs of texts, and for a `.txt` that looks like a table.
    """
    if layout == Layout(encoding=layout.encoding, configurable=layout.configurable) and path.suffix.lower() == LINES:
        layout = replace(layout, format="lines")
        with path.open(encoding=layout.codec(), errors="replace") as file:
            fields = file.readline().rstrip("\r\n").split("\t")
        if set(text) <= set(fields):
            raise InputError(
                f"'{path}' begins with names of columns: format=tsv reads it as a table, format=lines a text on each line",
                "format",
            )
    if layout.format == "lines" and layout.pattern is None and len(text) > 1:
        raise InputError(
            f"the task has pairs of texts, {' and '.join(text)}, and '{path}' has one text on each line: give a table", FILE
        )
    return layout


def tables_in(path: Path, text: Sequence[str], layout: Layout) -> Iterator[Table]:
    """Yield the texts of a file in tables of few rows.

    Args:
        path: the file.
        text: text columns; a file of plain lines has one text.
        layout: layout of the file.

    Raises:
        InputError: if the file cannot be read, a column is missing, or a text is missing or blank; the message has its line.
    """
    kind = layout.kind(path, FILE)
    names = in_file(text, layout)
    columns = keys_of_columns(names, None, ())
    word = "row" if kind in COLUMNAR else "line"
    expected = 1
    for numbers, values in pieces_of_file(path, FILE, layout, columns, AT_ONCE):
        if kind == "lines":  # where the reader leaves out blank lines
            for number in numbers:
                if number != expected:
                    raise InputError(
                        f"'{path}', line {expected}: the text is missing; leave the line out, or give it one", "text"
                    )
                expected = number + 1
        if numbers:
            yield table_of(numbers, values, path, names, (), f"'{path}', {word} ")


def header(labels: Sequence[str] | None) -> list[str]:
    """Return the names of the columns of a table of predictions.

    >>> header(["no", "yes"]), header(None)
    (['line', 'label', 'probability_no', 'probability_yes'], ['line', 'score'])
    """
    return ["line", "score"] if labels is None else ["line", "label", *(f"probability_{label}" for label in labels)]


def rendered(predicted: Predicted, delimiter: str | None) -> str:
    """Return the lines of predictions, six digits for each number.

    Args:
        predicted: the predictions.
        delimiter: character between fields; None for an object on each line.
    """
    labels, buffer = predicted.labels, io.StringIO()
    table = csv.writer(buffer, delimiter=delimiter or ",", lineterminator="\n")
    if labels is None:
        for line, (score,) in zip(predicted.lines, predicted.logits.tolist(), strict=True):
            if delimiter is None:
                buffer.write(json.dumps({"line": line, "score": float(f"{score:.6g}")}) + "\n")
            else:
                table.writerow([line, f"{score:.6g}"])
        return buffer.getvalue()
    best = predicted.logits.argmax(axis=1).tolist()
    for line, chosen, shares in zip(predicted.lines, best, predicted.probabilities.tolist(), strict=True):
        if delimiter is None:
            named = {label: float(f"{share:.6g}") for label, share in zip(labels, shares, strict=True)}
            row = {"line": line, "label": labels[chosen], "probabilities": named}
            buffer.write(json.dumps(row, ensure_ascii=False) + "\n")
        else:
            table.writerow([line, labels[chosen], *(f"{share:.6g}" for share in shares)])
    return buffer.getvalue()


class Draft:
    """The draft of a file of predictions, with a note of how many rows it holds.

    It is left for a command that goes on there, but for an input error that is not about the file that is written: what has
    to be corrected determines the content.

    Args:
        out: the file.
        identity: everything that determines its content.

    Raises:
        InputError: if another command has begun the file, or works on it.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any]) -> None:
        self.out, self.path, self.note = out, Path(f"{out}.part"), Path(f"{out}.part.json")
        self.digest = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()
        self.lock = FileLock(f"{out}.part.lock")
        self.rows = 0

    def __enter__(self) -> "Draft":
        with writing(self.out, OUT):
            try:
                self.lock.acquire(timeout=0)
            except Timeout as error:
                raise InputError(f"another process writes '{self.out}'", OUT) from error
            try:
                self.file = self.opened()
            except BaseException:
                self.unlock()
                raise
        return self

    def opened(self) -> io.BufferedRandom:
        """Return the draft, opened where its note says that it ends."""
        digest, rows, size = self.digest, 0, 0
        if self.path.is_file() and self.note.is_file():
            try:
                note = json.loads(self.note.read_text(encoding="utf-8"))
                digest, rows, size = str(note["digest"]), int(note["rows"]), int(note["bytes"])
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"'{self.note}' is damaged: remove it and '{self.path.name}'", OUT) from error
            if size > self.path.stat().st_size:
                raise InputError(f"'{self.path}' is shorter than it was: remove it and '{self.note.name}'", OUT)
        if digest != self.digest:
            raise InputError(
                f"'{self.path}' was begun with another model, file or option: remove it and '{self.note.name}', or write to "
                "another file",
                OUT,
            )
        file = self.path.open("r+b" if rows else "w+b")
        file.truncate(size)
        file.seek(size)
        self.rows = rows
        return file

    def add(self, text: str, rows: int) -> None:
        """Write further rows, and note that they are there once they are on disk."""
        with writing(self.out, OUT):
            self.file.write(text.encode())
            self.file.flush()
            os.fsync(self.file.fileno())
            rows += self.rows
            write_text(self.note, json.dumps({"digest": self.digest, "rows": rows, "bytes": self.file.tell()}))
            self.rows = rows

    def finish(self) -> None:
        """Make the draft the file."""
        with writing(self.out, OUT):
            os.replace(self.path, self.out)
            remove(self.note)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        self.file.close()
        if not self.rows or (isinstance(error, InputError) and error.key != OUT):  # nothing to go on from
            remove(self.path)
            remove(self.note)
        self.unlock()

    def unlock(self) -> None:
        """Remove the lock while it is held, because later another process might hold it."""
        remove(Path(self.lock.lock_file))
        self.lock.release()


def checked_out(out: Path) -> str | None:
    """Return the character between the fields of the file that is written.

    Raises:
        InputError: for another suffix, a file that is there already, or a folder that is not.
    """
    if out.suffix.lower() not in SUFFIXES:
        raise InputError(f"'{out}' must end in {', '.join(SUFFIXES)}", OUT)
    if out.exists() or out.is_symlink():
        raise InputError(f"'{out}' is there already: remove it, or write to another file", OUT)
    if not out.parent.is_dir():
        raise InputError(f"there is no folder '{out.parent}' for '{out.name}'", OUT)
    return SUFFIXES[out.suffix.lower()]


def count_texts(path: Path, text: Sequence[str], layout: Layout, say: Callable[[str], None]) -> int:
    """Return the number of the texts of a file, which is read as a whole; arguments as for `predict_file`.

    Raises:
        InputError: see `tables_in`; and for a file without texts.
    """
    count, said = 0, time.monotonic()
    for table in tables_in(path, text, layout):
        count += len(table)
        if time.monotonic() - said > SAY_AFTER:
            said = time.monotonic()
            say(f"  read {count:,} texts")
    if not count:
        raise no_examples([path], FILE)
    return count


def predict_file(
    path: Path,
    out: Path,
    text: Sequence[str],
    layout: Layout,
    labels: Sequence[str] | None,
    predict: Callable[[Table], np.ndarray],
    identity: Mapping[str, Any],
    say: Callable[[str], None],
) -> int:
    """Predict the texts of a file, write the predictions, and return their number.

    The whole file is read once before, which takes far less time than its predictions, so that an error in its last line is
    found before any.

    Args:
        path: the file, which exists.
        out: the file to write, which must not be there.
        text: text columns.
        layout: layout of the file.
        labels: names of the classes in the order of the logits; None for one score.
        predict: function from texts to logits, (rows, outputs).
        identity: what determines the logits, for going on where a command was stopped.
        say: prints progress.

    Raises:
        InputError: see `layout_of`, `tables_in`, `Draft` and `checked_out`.
    """
    delimiter = checked_out(out)
    layout = layout_of(path, layout, text)
    count = count_texts(path, text, layout, say)
    whole = {**identity, "text": list(text), "layout": str(layout), "file": file_fingerprint(path), "at_once": AT_ONCE}
    with Draft(out, {**whole, "delimiter": delimiter}) as draft:
        done = draft.rows
        if done:
            say(f"going on after the {done:,} of {count:,} texts that are done")
        seen, began, said = 0, time.monotonic(), time.monotonic()
        for table in tables_in(path, text, layout):
            seen += len(table)
            if seen <= done:
                continue
            logits = predict(table)
            if not np.isfinite(logits).all():
                bad = int(np.flatnonzero(~np.isfinite(logits).all(axis=1))[0])
                raise InputError(f"{table.where(bad)}: the model's outputs are not finite", FILE)
            lines = rendered(Predicted([int(number) for number in table.numbers], logits, labels), delimiter)
            if not draft.rows and delimiter is not None:
                top = io.StringIO()
                csv.writer(top, delimiter=delimiter, lineterminator="\n").writerow(header(labels))
                lines = top.getvalue() + lines
            draft.add(lines, len(table))
            if time.monotonic() - said > SAY_AFTER:
                said = time.monotonic()
                say(f"  {seen:,} of {count:,} texts, {(seen - done) / (said - began):,.0f} a second")
        draft.finish()
    return count
