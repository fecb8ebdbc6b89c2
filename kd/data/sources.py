"""Sources of a task's examples: files, installed packages and GLUE. They return splits of raw examples, with raw labels."""

import bisect
import hashlib
import itertools
import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from kd.config.values import column_names, literal, number
from kd.data.columnar import COLUMNAR, columnar_pieces
from kd.data.readers import SUFFIXES, Layout, Row, check_file, data_path, line_pieces, rows
from kd.data.shards import data_fingerprint, shards_of
from kd.data.texts import Example as Example
from kd.data.texts import Table, TableWriter, Texts
from kd.errors import InputError
from kd.system import distributed
from kd.system.model_sources import check_not_here, file_fingerprint
from kd.system.packages import package_folder, package_version

TABLE_ROWS = 4096
"""Number of rows that are read at a time from files which need not fit into memory."""

Splits = dict[str, Sequence[Example]]

SAY_AFTER = 10.0
"""Seconds between progress messages while files are read, and while texts are tokenised."""


class Source(Protocol):
    """Interface of a source of examples. Splits are `train`, `validation`, `test`, and any further ones to evaluate on.

    A source with an argument `extra`, names of further columns, can serve tasks that read some (`task.extra`); their values
    are in `Example.columns`. A source of files that the user chose, for which no setting is published, may have an attribute
    `own_data` that is true: `student.init_from=auto` is another start there.
    """

    def splits(self) -> Splits:
        """Return the examples of each split."""
        ...

    def fingerprint(self) -> dict[str, str]:
        """Return an identification of the data, which is part of the digest of every run that uses it."""
        ...


def hash_fraction(texts: Sequence[str]) -> float:
    """Return a number in [0, 1) that depends on the text alone, not on case, spacing or position in the file."""
    words = " ".join(" ".join(texts).casefold().split())
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest()) / 2**64


SPLITS = ("train", "validation", "test")
"""Names of splits, in the order in which a text's hash is compared with their shares."""


def split_by_hash(examples: Sequence[Example], shares: Mapping[str, float]) -> Splits:
    """Cut examples into splits by a hash of their text, so that no text is in two splits.

    Args:
        examples: in any order, which is preserved within a split.
        shares: split name -> share of the text; they add up to 1.

    Raises:
        InputError: for a share outside [0, 1], or shares that do not add up to 1.
    """
    # In a fixed order: the order of the mapping is not part of a run's digest, so the splits must not depend on it.
    names = sorted(shares, key=lambda name: (SPLITS.index(name) if name in SPLITS else len(SPLITS), name))
    for name in names:
        number(shares[name], "source.shares", 0, 1)
    if not names or abs(sum(shares.values()) - 1) > 1e-6:
        raise InputError(f"source.shares={dict(shares)} add up to {sum(shares.values()):g}, not 1", "source.shares")
    table = Table.of(examples)
    bounds = list(itertools.accumulate(shares[name] for name in names))[:-1]  # the last takes the rest, rounding included
    parts = np.fromiter((bisect.bisect_right(bounds, hash_fraction(texts)) for texts in table.texts), np.int8, len(table))
    return {name: table.take(np.flatnonzero(parts == part)) for part, name in enumerate(names)}


def is_blank(text: str) -> bool:
    r"""Return whether a text has no visible character: only blanks, control characters and invisible ones.

    >>> is_blank(" \t\u200b\x07"), is_blank(" . ")
    (True, False)
    """
    return not any(unicodedata.category(letter)[0] not in "CZ" for letter in text)


def check_text(text: object, name: str, where: str, *, blank: bool) -> None:
    """Check that a value of a file can be read as text.

    Args:
        text: the value.
        name: name of its column.
        where: its position in the file, for the message.
        blank: whether a blank text is allowed.

    Raises:
        InputError: for a value that is not text, has a NUL character, or is blank although `blank` is false.
    """
    if not isinstance(text, str):
        raise InputError(f"{where}: '{name}' is {literal(text)}, not text", "text")
    if "\0" in text:
        raise InputError(f"{where}: '{name}' has a NUL character: {literal(text)}; is the file damaged?", "text")
    if not blank and is_blank(text):
        raise InputError(f"{where}: '{name}' is blank ({literal(text)}); leave the line out, or give it a text", "text")


def half_character(where: str, error: UnicodeEncodeError) -> InputError:
    """Return the error for a text with a lone surrogate, which is half of a character."""
    half = literal(error.object[error.start : error.start + 1])
    return InputError(f"{where}: half of a character, {half} (a lone surrogate), which is no text", "text")


def examples_of(
    table: Iterable[tuple[int, Row]],
    path: Path,
    text: Sequence[str],
    label: str | None,
    key: str | None,
    *,
    blank: bool = True,
    extra: Sequence[str] = (),
) -> Table:
    """Convert the rows of a table to examples, whose labels are None without a label column.

    Args:
        table: rows with the numbers of the lines on which they begin.
        path: path of the file.
        text: text columns.
        label: label column.
        key: the configuration key that an error about the file names.
        blank: whether a blank text is allowed.
        extra: further columns.

    Raises:
        InputError: if a column is missing, a value is not text (see `check_text`), or there is no row.
    """
    writer = TableWriter(extra)
    add_examples(writer, reported(table, path), path, text, label, blank=blank)
    if not writer.labels:
        raise InputError(f"the file '{path}' has no examples", key)
    return writer.table()


def read_shards(
    files: Sequence[Path],
    text: Sequence[str],
    label: str | None,
    key: str | None,
    layout: Layout,
    *,
    blank: bool = False,
    extra: Sequence[str] = (),
) -> Table:
    """Read examples from files, one after the other; labels are None without a label column.

    Args:
        files: a file, or the shards of a folder.
        text: text columns; a file of plain lines has one text.
        label: label column.
        key: the configuration key that an error about a file names.
        layout: layout of the files.
        blank: whether a blank text is allowed.
        extra: further columns.

    Raises:
        InputError: if a file cannot be read, a column is missing, a value is not text (see `check_text`), or there is no row.
    """
    writer = TableWriter(extra)
    for file, word, table in opened(files, text, label, key, layout, extra):
        add_examples(writer, table, file, in_file(text, layout), label, blank=blank, number=word)
    if not writer.labels:
        raise no_examples(files, key)
    return writer.table()


def tables_of(
    files: Sequence[Path], text: Sequence[str], key: str, layout: Layout, extra: Sequence[str] = (), at_once: int = TABLE_ROWS
) -> Iterator[tuple[int, Table]]:
    """Yield examples without labels from files, in tables of few rows: a file need not fit into memory.

    Arguments and errors as for `read_shards`. Each table comes with the index of its file, and has at most `at_once` rows, or
    those of a piece of text if the files are lines.
    """
    text = in_file(text, layout)
    columns, empty, count, said = keys_of_columns(text, None, extra), True, 0, time.monotonic()
    for index, file in enumerate(files):
        place = f"'{file}', {'row' if layout.kind(file, key) in COLUMNAR else 'line'} "
        for numbers, values in pieces_of_file(file, key, layout, columns, at_once):
            if numbers:
                empty = False
                yield index, table_of(numbers, values, file, text, extra, place)
            count += len(numbers)
            if time.monotonic() - said > SAY_AFTER:
                said = time.monotonic()
                distributed.print_rank_zero(f"  reading '{file.name}': {count:,} examples so far")
    if empty:
        raise no_examples(files, key)


def pieces_of_file(
    file: Path, key: str, layout: Layout, columns: Mapping[str, str], at_once: int
) -> Iterator[tuple[Sequence[int], Mapping[str, list[Any]]]]:
    """Yield the numbers and the columns of the rows of a file, at most `at_once` rows at a time, or a piece of lines.

    Args:
        file: the file.
        key: the configuration key that an error about the file names.
        layout: its layout.
        columns: columns to read -> the configuration key that names them.
        at_once: number of rows.

    Raises:
        InputError: if the file cannot be read, or lacks a column.
    """
    kind = layout.kind(file, key)
    if kind == "lines" and layout.pattern is None:
        for numbers, lines in line_pieces(file, key, layout):
            if numbers and (lacking := [name for name in columns if name != "text"]):
                raise no_column(lacking[0], {"text": lines[0]}, f"'{file}', line {numbers[0]}", columns[lacking[0]])
            yield numbers, {"text": lines}
    elif kind in COLUMNAR:
        check_file(file, key)
        for first, values in columnar_pieces(file, key, kind, columns):
            yield range(first, first + len(next(iter(values.values())))), values
    else:
        table = rows(file, key, layout=layout, wanted=columns)
        while some := list(itertools.islice(table, at_once)):
            try:
                values = {name: [row[name] for _, row in some] for name in columns}
            except KeyError:
                line, row = next((line, row) for line, row in some if not columns.keys() <= row.keys())
                name = next(name for name in columns if name not in row)
                raise no_column(name, row, f"'{file}', line {line}", columns[name]) from None
            yield [line for line, _ in some], values


def table_of(
    numbers: Sequence[int],
    columns: Mapping[str, list[Any]],
    path: Path,
    text: Sequence[str],
    extra: Sequence[str],
    place: str,
) -> Table:
    """Return rows without labels as a table; many at once take a tenth of the time of one after the other.

    Args:
        numbers: the numbers of the rows.
        columns: column -> values.
        path: path of the file.
        text: text columns.
        extra: further columns.
        place: prefix of positions.

    Raises:
        InputError: for a value that is not text, see `check_text`; of several, the first.
    """
    texts = [columns[name] for name in text]
    flat = texts[0] if len(texts) == 1 else list(itertools.chain.from_iterable(zip(*texts, strict=True)))
    try:
        for at, value in enumerate(flat):
            # Nearly every text passes by its first letter; `check_text` is slow for a million of them.
            if not (isinstance(value, str) and value[:1].isalnum()):
                check_text(value, text[at % len(text)], f"{place}{numbers[at // len(text)]}", blank=False)
        content = "".join(flat)
        if "\0" in content:
            raise InputError("a NUL character", "text")
        sizes = map(len, flat if content.isascii() else [value.encode() for value in flat])
        ends = np.fromiter(itertools.accumulate(sizes), np.int64, len(flat))
        offsets = np.concatenate([np.zeros(1, dtype=np.int64), ends])
        found = Texts(content.encode(), offsets, len(text))
    except (InputError, UnicodeEncodeError):  # the first row with an error, whatever it is, is named
        writer = TableWriter(extra)
        each = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
        add_examples(writer, zip(numbers, each, strict=True), path, text, None, blank=False, number=place.split()[-1])
        return writer.table()
    place_of = np.zeros(len(numbers), dtype=np.int64)
    further = {name: columns[name] for name in extra}
    return Table(found, [None] * len(numbers), [place], place_of, np.asarray(numbers, dtype=np.int64), further)


def opened(
    files: Sequence[Path], text: Sequence[str], label: str | None, key: str | None, layout: Layout, extra: Sequence[str]
) -> Iterator[tuple[Path, str, Iterator[tuple[int, Row]]]]:
    """Yield each file, the word for the numbers of its rows, and the rows; arguments as for `read_shards`."""
    wanted = keys_of_columns(in_file(text, layout), label, extra)
    for file in files:
        word = "row" if layout.kind(file, key) in COLUMNAR else "line"
        yield file, word, reported(rows(file, key, layout=layout, wanted=wanted), file)


def in_file(text: Sequence[str], layout: Layout) -> Sequence[str]:
    """Return the text columns as they are named in a file: one of plain lines has no names."""
    return ["text"] if layout.format == "lines" and layout.pattern is None else text


def no_examples(files: Sequence[Path], key: str | None) -> InputError:
    """Return the error for a file, or the shards of a folder, without any example."""
    shown = f"the file '{files[0]}' has" if len(files) == 1 else f"the files of the folder '{files[0].parent}' have"
    return InputError(f"{shown} no examples", key)


def keys_of_columns(text: Sequence[str], label: str | None, extra: Sequence[str]) -> dict[str, str]:
    """Return the columns to read -> the configuration key that names them."""
    columns = dict.fromkeys(text, "text") | ({} if label is None else {label: "label"})
    return columns | {name: "extra" for name in extra if name not in columns}


def add_examples(
    writer: TableWriter,
    table: Iterable[tuple[int, Row]],
    path: Path,
    text: Sequence[str],
    label: str | None,
    *,
    blank: bool,
    number: str = "line",
) -> None:
    """Add the rows of a file to a table; arguments as for `examples_of`.

    Args:
        writer: builder of the table, with its further columns.
        table: rows with their numbers.
        path: path of the file.
        text: text columns.
        label: label column.
        blank: whether a blank text is allowed.
        number: word for the numbers of the rows, in messages.

    Raises:
        InputError: if a column is missing, or a value is not text.
    """
    extra, place = list(writer.columns), f"'{path}', {number} "
    columns = keys_of_columns(text, label, extra)
    for line, row in table:
        for name, argument in columns.items():
            if name not in row:
                raise no_column(name, row, f"{place}{line}", argument)
        texts = [row[name] for name in text]
        for name, value in zip(text, texts, strict=True):
            # A quick test of the first letter passes nearly every text; `check_text` is slow for a million of them.
            if not (isinstance(value, str) and value[:1].isalnum()) or "\0" in value:
                check_text(value, name, f"{place}{line}", blank=blank)
        value = None if label is None else row[label]
        try:
            writer.add(texts, value, place, line, [row[name] for name in extra])
        except UnicodeEncodeError as error:
            raise half_character(f"{place}{line}", error) from error


def no_column(name: str, row: Row, where: str, key: str) -> InputError:
    """Return the error for a missing column, with a hint at its usual causes."""
    hint = ""
    if len(row) == 1 and any(mark in str(next(iter(row))) for mark in ";\t|"):
        hint = ". With another character between fields: delimiter=semicolon|tab|pipe"
    elif any(" " in str(column) for column in row):
        hint = ". If the first line is an example, name the columns: 'columns=[text,label]'"
    return InputError(f"{where}: no column '{name}'; the columns are {column_names(row)}{hint}", key)


def reported(table: Iterable[tuple[int, Row]], path: Path) -> Iterator[tuple[int, Row]]:
    """Yield the rows, and print progress every `SAY_AFTER` seconds."""
    said = time.monotonic()
    for count, (line, row) in enumerate(table, start=1):
        if count % 50_000 == 0 and time.monotonic() - said > SAY_AFTER:
            said = time.monotonic()
            distributed.print_rank_zero(f"  reading '{path.name}': {count:,} examples so far")
        yield line, row


def as_names(values: object) -> Any:
    """Return column names as text: on a command line `[0,1]` is two numbers, but a header holds text.

    >>> as_names([0, "b"]), as_names(1), as_names(None)
    (['0', 'b'], '1', None)
    """
    if isinstance(values, list | tuple):
        return [str(value) for value in values]
    return None if values is None else str(values)


def check_hash_split(splits: Splits, path: str, key: str = "validation") -> None:
    """Check that every part of a split by hash has an example.

    Raises:
        InputError: if a part is empty.
    """
    sizes = {name: len(examples) for name, examples in splits.items()}
    shares = ", ".join(f"{size} into {name}" for name, size in sizes.items())
    for name, size in sizes.items():
        if size == 0:
            raise InputError(
                f"{path} is too small to be split: a hash of the text puts {shares} of {sum(sizes.values())} examples, which "
                f"leaves '{name}' without; give the splits files of their own: "
                "validation=..., test=...",
                key,
            )


def given_paths(train: object, validation: object, test: object, usage: str) -> dict[str, dict[str | None, Path]]:
    """Return split -> class -> file, from the configuration; the class is None for a file with a label column.

    Raises:
        InputError: without a training file, or for a value that is neither a file nor a mapping from classes to files.
    """
    if train is None:
        raise InputError(usage, "train")
    paths: dict[str, dict[str | None, Path]] = {}
    for split, value in {"train": train, "validation": validation, "test": test}.items():
        key = split
        if isinstance(value, Mapping):
            if len(value) < 2 or not all(isinstance(path, str) for path in value.values()):
                raise InputError(
                    f"{key}={literal(dict(value))} must give a file for each of two classes or more: "
                    f"'{key}={{pos: a.txt, neg: b.txt}}'",
                    key,
                )
            paths[split] = {str(name).strip(): data_path(path, key) for name, path in value.items()}
        elif isinstance(value, list | tuple):
            raise InputError(
                f"{key}={literal(list(value))} must be a file, or one for each class: '{key}={{pos: a.txt, neg: b.txt}}'", key
            )
        elif value is not None:
            paths[split] = {None: data_path(str(value), key)}
    return paths


def fingerprint_of(paths: Mapping[str, Mapping[str | None, Path]], *, any_suffix: bool = False) -> dict[str, str]:
    """Return a digest of the bytes of every file, and of all shards of every folder.

    Args:
        paths: split -> class -> a file, or a folder of shards.
        any_suffix: whether the files of a folder may have several suffixes.

    Raises:
        InputError: for a file or folder that cannot be read.
    """
    digests = {}
    for split, files in paths.items():
        for name, path in files.items():
            own = split if name is None else f"{split}/{name}"
            digests[own] = data_fingerprint(path, split, any_suffix=any_suffix)
    return digests


@dataclass(frozen=True, slots=True)
class Files:
    """Files of the user, CSV, TSV, JSON Lines, Parquet or Arrow, or one for each class; a folder of shards is as a file.

    Without a validation file, `train` is split by a hash of the text: 90/10 if there is a test file, else 80/10/10
    into train, validation and test (our choice).

    Args:
        train: a file; or class -> file, each with the texts of one class, a text on each line of a `.txt`.
        text: text columns.
        label: label column.
        validation: as `train`.
        test: as `train`.
        quoted: this and the next three arguments describe the files, as in `kd.data.readers.Layout`.
        format: see `quoted`.
        delimiter: see `quoted`.
        columns: see `quoted`.
        extra: further columns.
        pattern: see `quoted`.
        encoding: see `quoted`.
    """

    own_data: ClassVar[bool] = True

    train: Any
    text: Sequence[str]
    label: str | None
    validation: Any = None
    test: Any = None
    quoted: bool | None = None
    format: str | None = None
    delimiter: str | None = None
    columns: Sequence[str] | None = None
    extra: Sequence[str] = ()
    pattern: str | None = None
    encoding: str | None = None

    @property
    def _any_suffix(self) -> bool:
        """True if the configuration names the format, so that suffixes do not count."""
        return self.format is not None or self.pattern is not None

    def _paths(self) -> dict[str, dict[str | None, Path]]:
        return given_paths(
            self.train,
            self.validation,
            self.test,
            "task=file needs train=<a file or a folder of shards>",
        )

    def splits(self) -> Splits:
        """Return the examples of every split.

        Raises:
            InputError: if a file is missing, empty, lacks a column, or has a broken line.
        """
        found: Splits = {}
        for split, files in self._paths().items():
            parts = [self._read(path, name, split) for name, path in files.items()]
            found[split] = parts[0] if len(parts) == 1 else Table.joined(parts)
        if "validation" not in found:
            rest = {} if "test" in found else {"test": 0.1}
            shares = {"train": 0.9 - sum(rest.values()), "validation": 0.1, **rest}
            parts_of_train = split_by_hash(found["train"], shares)
            check_hash_split(parts_of_train, f"'{self.train}'")
            found.update(parts_of_train)
        return found

    def _read(self, path: Path, name: str | None, key: str) -> Table:
        text, label = as_names(self.text), as_names(self.label)
        layout = Layout(
            *(as_names(self.format), as_names(self.delimiter), as_names(self.columns), self.quoted),
            *(as_names(self.pattern), as_names(self.encoding)),
            configurable=True,
        )
        layout.codec()
        files = shards_of(path, key, any_suffix=self._any_suffix)
        if name is None and (layout.format != "lines" or layout.pattern is not None):
            if label in text:
                raise InputError(f"label={label} is among text={text}: the label would be read as text", "label")
            return read_shards(files, text, label, key, layout, extra=self.extra)
        if name is None:
            raise InputError(
                f"format=lines has no labels: give a file for each class, '{key}={{pos: pos.txt, neg: neg.txt}}'",
                "format",
            )
        suffix = files[0].suffix.lower()
        is_lines = layout.format == "lines" or (layout.format is None and (suffix == LINES or suffix not in SUFFIXES))
        if is_lines and layout.pattern is None:
            layout = Layout("lines", encoding=layout.encoding, configurable=True)
        found = read_shards(files, text, None, key, layout, extra=self.extra)
        found.labels = [name] * len(found)
        return found

    def fingerprint(self) -> dict[str, str]:
        """Return a digest of the bytes of every file."""
        return fingerprint_of(self._paths(), any_suffix=self._any_suffix)


LINES = ".txt"
"""Suffix of files without labels that have a text on each line; with labels it is a table's."""


@dataclass(frozen=True, slots=True)
class PackageFile:
    """CSV file that an installed package ships, split by a hash of the text.

    Args:
        package: module name.
        file: path inside the package.
        text: text columns.
        label: label column; None for text without labels.
        where: column -> value; rows with another value are left out.
        shares: split -> share of the text, 80/10/10 by default.
        extra: further columns.
    """

    package: str
    file: str
    text: Sequence[str]
    label: str | None
    where: Mapping[str, str]
    shares: Mapping[str, float] | None = None
    extra: Sequence[str] = ()

    def splits(self) -> Splits:
        """Return the examples of each split.

        Raises:
            InputError: if the package is not installed.
        """
        path = package_folder(self.package, None) / self.file
        table = (
            (line, row)
            for line, row in rows(path, None)
            if all(row.get(column) == value for column, value in self.where.items())
        )
        examples = examples_of(table, path, as_names(self.text), as_names(self.label), None, extra=self.extra)
        return split_by_hash(examples, self.shares or {"train": 0.8, "validation": 0.1, "test": 0.1})

    def fingerprint(self) -> dict[str, str]:
        """Return the package's version, or a digest of the file if the version is unknown."""
        path = package_folder(self.package, None) / self.file
        version = package_version(self.package)
        return {"package": file_fingerprint(path) if version == "unknown" else f"{self.package}=={version}"}


@dataclass(frozen=True, slots=True)
class DomainFolders:
    """A folder with a folder for each domain, each with `train.tsv` and `dev.tsv`.

    The name of the inner folder is the column `domain`. `dev` is the test split; a tenth of `train`, by a hash of the text, is
    the validation split (our choice).

    Args:
        train: the folder.
        text: text columns.
        label: label column; None for text without labels.
        extra: further columns; `domain` may be one of them.
    """

    train: Any
    text: Sequence[str]
    label: str | None
    extra: Sequence[str] = ()

    def _files(self) -> dict[str, dict[str | None, Path]]:
        if not isinstance(self.train, str):
            raise InputError("this task needs train=<folder>, a folder with a folder for each domain", "train")
        root = Path(self.train).expanduser()
        domains = (
            sorted(path.name for path in root.iterdir() if path.is_dir() and path.name[0] not in "._") if root.is_dir() else []
        )
        files: dict[str, dict[str | None, Path]] = {
            split: {domain: root / domain / f"{name}.tsv" for domain in domains}
            for split, name in {"train": "train", "test": "dev"}.items()
        }
        lacking = [path for paths in files.values() for path in paths.values() if not path.is_file()]
        if not domains or lacking:
            why = f"lacks '{lacking[0].relative_to(root)}'" if lacking else "is not a folder with a folder for each domain"
            raise InputError(f"'{root}' {why}", "train")
        return files

    def splits(self) -> Splits:
        """Return the examples of every split.

        Raises:
            InputError: if a file is missing, empty, lacks a column, or has a broken line.
        """
        text, label = as_names(self.text), as_names(self.label)
        found: Splits = {}
        for split, files in self._files().items():
            parts = [
                examples_of(
                    ((line, {**row, "domain": domain}) for line, row in rows(path, "train")),
                    path,
                    text,
                    label,
                    "train",
                    extra=self.extra,
                )
                for domain, path in files.items()
            ]
            found[split] = Table.joined(parts)
        found.update(split_by_hash(found["train"], {"train": 0.9, "validation": 0.1}))
        return found

    def fingerprint(self) -> dict[str, str]:
        """Return a digest of every file's bytes."""
        return fingerprint_of(self._files())


FOLDER_KEY = "paths.glue"
"""Key that sets `Glue.root` for all tasks: it belongs to the machine, not to a task."""

REPOSITORY = "nyu-mll/glue"
"""Data set of GLUE on the hub."""


@dataclass(frozen=True, slots=True)
class Glue:
    """GLUE task from the hub, or from a local folder of GLUE's TSV files.

    A test split without labels (-1 on the hub, no label column in the TSV), as GLUE's official ones are, is left out.

    Args:
        subset: name of the task on the hub.
        folder: name of the folder under `root`.
        text: text columns on the hub.
        label: label column on the hub.
        root: a folder of GLUE folders; None reads the hub.
        local_text: text columns in the TSV, if they differ.
        local_label: label column in the TSV, if it differs.
        local_columns: names of all columns, for TSV files without a header.
        validation: split -> name, both on the hub and, with `.tsv`, locally.
        repository: data set on the hub.
        skip_broken: leave out lines of the TSV with a wrong number of fields, with a warning that counts them. GLUE's own QQP
            has some.
        extra: further columns, named alike on the hub and in the TSV.
    """

    subset: str
    folder: str
    text: Sequence[str]
    label: str
    root: str | None = None
    local_text: Sequence[str] | None = None
    local_label: str | None = None
    local_columns: Sequence[str] | None = None
    validation: Mapping[str, Sequence[str]] | None = None
    repository: str = REPOSITORY
    skip_broken: bool = False
    extra: Sequence[str] = ()

    def _names(self) -> dict[str, Sequence[str]]:
        """Return split -> [name on the hub, file name without `.tsv`]."""
        return {"train": ["train", "train"], **(self.validation or {"validation": ["validation", "dev"]})}

    def _files(self) -> dict[str, Path]:
        assert self.root is not None
        folder = Path(self.root).expanduser() / self.folder
        if not folder.is_dir():
            raise InputError(f"there is no folder '{folder}' for this GLUE task", FOLDER_KEY)
        files = {split: folder / f"{name}.tsv" for split, (_, name) in self._names().items()}
        first_validation = next(split for split in files if split != "train")
        for split in ("train", first_validation):
            if not files[split].is_file():
                raise InputError(f"the file '{files[split]}' does not exist", FOLDER_KEY)
        return {split: path for split, path in {**files, "test": folder / "test.tsv"}.items() if path.is_file()}

    def splits(self) -> Splits:
        """Return the examples of `train`, the validation splits, and `test` if it has labels.

        Raises:
            InputError: if the data cannot be read or downloaded.
        """
        return self._from_hub() if self.root is None else self._from_folder()

    def _from_folder(self) -> Splits:
        text, label = as_names(self.local_text or self.text), as_names(self.local_label or self.label)
        found: Splits = {}
        for split, path in self._files().items():
            if split == "test" and not self._labelled(path, label):
                continue
            table = rows(path, FOLDER_KEY, self.local_columns, skip_broken=self.skip_broken)
            found[split] = examples_of(table, path, text, label, FOLDER_KEY, extra=self.extra)
        return found

    def _labelled(self, path: Path, label: str) -> bool:
        with path.open(encoding="utf-8-sig") as file:
            return self.local_columns is None and label in file.readline().rstrip("\r\n").split("\t")

    def _from_hub(self) -> Splits:
        data = hub_data(self.repository, self.subset)
        names = {**{split: name for split, (name, _) in self._names().items()}, "test": "test"}
        found: Splits = {}
        for split, name in names.items():
            if name not in data:
                continue
            feature = data[name].features[self.label]
            table = [
                (number, {**row, self.label: hub_label(row[self.label], feature)}) for number, row in enumerate(data[name])
            ]
            if split == "test" and any(row[self.label] in (None, -1, -1.0) for _, row in table):
                continue
            found[split] = self._rows_of_hub(table, f"{self.repository}/{self.subset}, {name}, row ")
        return found

    def _rows_of_hub(self, table: Sequence[tuple[int, Row]], place: str) -> Table:
        writer = TableWriter(self.extra)
        for row_number, row in table:
            if missing := [name for name in self.extra if name not in row]:
                raise no_column(missing[0], row, f"{place}{row_number}", "extra")
            texts = [row[column] for column in self.text]
            for name, text in zip(self.text, texts, strict=True):
                check_text(text, name, f"{place}{row_number}", blank=True)
            try:
                writer.add(texts, row[self.label], place, row_number, [row[name] for name in self.extra])
            except UnicodeEncodeError as error:
                raise half_character(f"{place}{row_number}", error) from error
        return writer.table()

    def fingerprint(self) -> dict[str, str]:
        """Return digests of the files, or the names on the hub."""
        if self.root is None:
            names = {split: name for split, (name, _) in self._names().items()}
            return {"hub": f"{self.repository}/{self.subset}", **names}
        return {split: file_fingerprint(path) for split, path in self._files().items()}


def hub_data(repository: str, subset: str) -> Any:
    """Return a data set of the hub, split -> rows.

    Raises:
        InputError: if it cannot be loaded.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(
            "reading GLUE from the hub needs the package 'datasets' (pip install datasets); "
            f"or point {FOLDER_KEY} at a folder of GLUE's TSV files",
            FOLDER_KEY,
        ) from error
    check_not_here(repository, FOLDER_KEY)
    try:
        return load_dataset(repository, subset)
    except Exception as error:  # the library raises a dozen kinds for a hub that cannot be reached
        raise InputError(
            f"'{repository}/{subset}' cannot be loaded from the hub ({type(error).__name__}: {error}); "
            f"or point {FOLDER_KEY} at a folder of GLUE's TSV files",
            FOLDER_KEY,
        ) from error


def hub_label(value: Any, feature: object) -> Any:
    """Return a label from the hub: the class name, None if it is missing (a class index of -1), or the value itself."""
    if not hasattr(feature, "int2str"):
        return value
    return None if value is None or value < 0 else feature.int2str(value)
