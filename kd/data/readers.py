"""Strict readers of tables, CSV, TSV, JSON Lines, Parquet and Arrow, and of plain lines, whose errors name the line or row."""

import codecs
import csv
import json
import re
import stat
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd.config.values import bare, literal
from kd.data.columnar import COLUMNAR, columnar_rows
from kd.errors import InputError, one_of

Row = Mapping[str, Any]

FORMATS = ("csv", "tsv", "jsonl", "json", "lines", *COLUMNAR)
"""Values of `task.format`: `jsonl` and `json` are an object per line, or an array of objects; `lines` is a text per line."""

SUFFIXES: Mapping[str, str] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""File suffix -> format, for files without `task.format`."""

DELIMITERS: Mapping[str, str] = {
    "comma": ",",
    "semicolon": ";",
    "tab": "\t",
    "\\t": "\t",
    "pipe": "|",
    "colon": ":",
    "space": " ",
}
"""Words for `task.delimiter`, because several of the characters have a special meaning on a command line."""

MAGIC: Mapping[bytes, str] = {
    b"\x1f\x8b": "compressed (gzip)",
    b"BZh": "compressed (bzip2)",
    b"\xfd7zXZ": "compressed (xz)",
    b"\x28\xb5\x2f\xfd": "compressed (zstd)",
    b"PK\x03\x04": "a zip archive or a spreadsheet",
}
"""First bytes of files that are not text -> kind of file."""

MAGIC_OF_COLUMNAR: Mapping[bytes, str] = {b"PAR1": "parquet", b"ARROW1": "arrow"}
"""First bytes of files that are read by another reader than text -> format."""

UTF8 = "utf-8-sig"
"""Encoding of text by default: UTF-8 with or without a byte-order mark."""

PIECE_BYTES = 1 << 20
"""Number of characters that are read at a time."""

csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # one review may be longer than the default of 128 kB


@dataclass(frozen=True, slots=True)
class Layout:
    """Layout of a file. An option that is None follows from the file's suffix, or has the usual value.

    Attributes:
        format: one of `FORMATS`.
        delimiter: one character, or one of the words of `DELIMITERS`.
        columns: names of all columns, for a file whose first line is an example.
        quoted: whether fields may be quoted; by default in CSV, not in TSV (as GLUE ships it).
        pattern: regular expression that matches each line of a file of lines, whose named groups are the columns.
        encoding: encoding of text; by default UTF-8 with or without a byte-order mark.
        configurable: whether these are options of the configuration, so that an error about text can name `encoding`.
    """

    format: str | None = None
    delimiter: str | None = None
    columns: Sequence[str] | None = None
    quoted: bool | None = None
    pattern: str | None = None
    encoding: str | None = None
    configurable: bool = False

    def kind(self, path: Path, key: str | None) -> str:
        """Return the format of a file.

        Raises:
            InputError: for options that contradict each other, or a format that neither they nor the suffix determine.
        """
        if self.format is not None and self.format not in FORMATS:
            raise one_of(self.format, FORMATS, "format")
        if self.pattern is not None and self.format not in (None, "lines"):
            raise InputError(f"pattern is for lines, and format={self.format}", "pattern")
        kind = self.format or (self.pattern and "lines") or SUFFIXES.get(path.suffix.lower()) or (self.delimiter and "csv")
        if kind is None:
            known = "a .csv, .tsv, .jsonl, .parquet or .arrow file"
            raise InputError(f"'{path}' is not {known}; set format={'|'.join(FORMATS)}", key)
        if kind not in ("csv", "tsv"):
            for name in ("delimiter", "columns"):
                if getattr(self, name) is not None:
                    raise InputError(f"{name} is for tables (csv, tsv), '{path}' is {kind}", name)
        if kind in COLUMNAR and self.encoding is not None:
            raise InputError(f"encoding is for text, '{path}' is {kind}", "encoding")
        return kind

    def codec(self) -> str:
        """Return the encoding of text; UTF-8 by its name is read as it is by default.

        Raises:
            InputError: for one that Python does not have.
        """
        if self.encoding is None:
            return UTF8
        try:
            name = codecs.lookup(self.encoding).name
            "".encode(name)
        except (LookupError, ValueError) as error:  # a codec of bytes, as base64, is no encoding of text
            raise InputError(f"encoding={literal(self.encoding)} is no encoding of text; latin-1 is one", "encoding") from error
        return UTF8 if name == "utf-8" else name

    def expression(self) -> re.Pattern[str]:
        """Return the pattern, compiled.

        Raises:
            InputError: if it is no regular expression, or has no named group.
        """
        try:
            found = re.compile(self.pattern or "")
        except (re.error, OverflowError, RecursionError) as error:
            raise InputError(f"pattern={literal(self.pattern)} is no regular expression: {error}", "pattern") from error
        if not found.groupindex:
            raise InputError(
                f"pattern={literal(self.pattern)} names no column; a named group does: '(?P<label>\\w+) (?P<text>.+)'",
                "pattern",
            )
        return found

    def separator(self, kind: str) -> str:
        """Return the character between fields.

        Raises:
            InputError: for a delimiter that is neither a character nor a word for one.
        """
        if self.delimiter is None:
            return "\t" if kind == "tsv" else ","
        character = DELIMITERS.get(self.delimiter, self.delimiter)
        if len(character) != 1 or character in '"\r\n\0' or "\ud800" <= character <= "\udfff":
            words = ", ".join(name for name in DELIMITERS if name.isalpha())
            raise InputError(
                f"delimiter={literal(self.delimiter)} must be one character between fields, or a word for it: {words}",
                "delimiter",
            )
        return character

    def names(self) -> list[str] | None:
        """Return the configured column names, or None.

        Raises:
            InputError: for an empty list, or a name that occurs twice.
        """
        if self.columns is None:
            return None
        names = list(self.columns)
        if not names or len(set(names)) != len(names):
            raise InputError(f"columns={literal(names)} must name every column of the file once", "columns")
        return names


def data_path(name: str, key: str | None) -> Path:
    """Convert a configured path to a `Path`, with `~` expanded.

    Raises:
        InputError: if it is empty, or the home folder cannot be determined.
    """
    if not name:
        raise InputError("an empty path; give a file, or a folder of shards", key)
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise InputError(f"{literal(name)}: {error}", key) from error


def check_file(path: Path, key: str | None, folder: str = "") -> None:
    """Check that a path is a file that can be opened.

    Args:
        path: path of the file.
        key: the configuration key that an error names.
        folder: text that is added to the message for a folder.

    Raises:
        InputError: if it is not.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise InputError(f"'{path}' is a folder, not a file{folder}", key)
        if not stat.S_ISREG(mode):
            raise InputError(f"'{path}' is no file but a device or a pipe", key)
        with path.open("rb"):
            pass
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"the file '{path}' does not exist", key) from error
    except (OSError, ValueError) as error:  # a name that is too long, a link in a circle, no permission; a NUL in a name
        raise InputError(
            f"the file {literal(str(path))} cannot be read ({getattr(error, 'strerror', None) or error})", key
        ) from error


def rows(
    path: Path,
    key: str | None,
    columns: Sequence[str] | None = None,
    quoted: bool | None = None,
    *,
    skip_broken: bool = False,
    layout: Layout | None = None,
    wanted: Mapping[str, str | None] | None = None,
) -> Iterator[tuple[int, Row]]:
    """Yield the rows of a file with their line numbers.

    Args:
        path: ends in .csv, .tsv, .txt (as TSV), .jsonl, .ndjson or .json (an object a line, or an array of them), .parquet or
            .arrow, unless `layout` gives the format.
        key: the configuration key that an error names.
        columns: names, for a file without a header.
        quoted: whether fields may be quoted; by default in CSV, not in TSV (as GLUE ships it).
        skip_broken: leave out lines with a wrong number of fields, with a warning that counts them.
        layout: replaces `columns` and `quoted`, and gives format, delimiter and encoding.
        wanted: columns that are read -> the configuration key that an error about the column names. Parquet and Arrow need it;
            in other formats all columns are read.

    Raises:
        InputError: if the file is missing, empty, of an unknown format, not text, or has a broken line.
    """
    layout = layout or Layout(columns=columns, quoted=quoted)
    check_file(path, key)
    kind = layout.kind(path, key)
    if kind in COLUMNAR:
        yield from columnar_rows(path, key, kind, wanted or {})
        return
    encoding = layout.codec()
    _check_beginning(path, key)
    try:
        if kind in ("csv", "tsv"):
            yield from _delimited(path, key, layout, kind, encoding, skip_broken=skip_broken)
        elif layout.pattern is not None:
            yield from _matched(path, key, layout)
        elif kind == "lines":
            for number, line in nonblank_lines(path, key, layout):
                yield number, {"text": line}
        else:
            yield from _json_rows(path, key, encoding)
    except UnicodeDecodeError as error:
        raise _not_text(path, key, layout) from error
    except OSError as error:
        raise InputError(f"the file '{path}' cannot be read ({error.strerror})", key) from error


def nonblank_lines(path: Path, key: str | None, layout: Layout) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file that are not blank, with their numbers.

    Raises:
        InputError: if the file is missing, empty or not text.
    """
    for numbers, lines in line_pieces(path, key, layout):
        yield from zip(numbers, lines, strict=True)


def line_pieces(path: Path, key: str | None, layout: Layout) -> Iterator[tuple[list[int], list[str]]]:
    """Yield the lines of a file that are not blank, about `PIECE_BYTES` at a time: their numbers, and their texts.

    Raises:
        InputError: if the file is missing, empty or not text.
    """
    check_file(path, key)
    _check_beginning(path, key)
    number, encoding = 0, layout.codec()
    try:
        with path.open(encoding=encoding, newline="") as file:
            while parts := file.readlines(PIECE_BYTES):
                # UTF-8 is also split at separators that `open` does not count as line ends. In latin-1 one of these is a byte
                # that texts of Windows have for three dots.
                whole = encoding == UTF8
                lines = "".join(parts).splitlines() if whole else [part.rstrip("\r\n") for part in parts]
                numbers = [at for at, line in enumerate(lines, number + 1) if line and not line.isspace()]
                yield numbers, [lines[at - number - 1] for at in numbers] if len(numbers) < len(lines) else lines
                number += len(lines)
    except UnicodeDecodeError as error:
        raise _not_text(path, key, layout) from error


def _not_text(path: Path, key: str | None, layout: Layout) -> InputError:
    """Return the error for a file that is not text in the encoding of its layout."""
    encoding = layout.codec()
    line = _undecodable_line(path, encoding)
    if encoding != UTF8:
        return InputError(f"'{path}', line {line}: not {encoding} text", "encoding")
    cure = "encoding=latin-1 reads" if layout.configurable else "iconv -f latin-1 -t UTF-8 converts"
    cure += " text of that encoding"
    return InputError(f"'{path}', line {line}: not UTF-8 text; {cure}", key)


def _matched(path: Path, key: str | None, layout: Layout) -> Iterator[tuple[int, Row]]:
    """Yield the named groups of each line that is not blank."""
    pattern = layout.expression()
    for number, line in nonblank_lines(path, key, layout):
        found = pattern.fullmatch(line)
        if found is None:
            raise InputError(
                f"'{path}', line {number}: {literal(line)} does not match pattern={literal(pattern.pattern)}", "pattern"
            )
        yield number, found.groupdict()


def _check_beginning(path: Path, key: str | None) -> None:
    """Check that a file begins like text."""
    with path.open("rb") as file:
        first = file.read(4096)
    if not first:
        raise InputError(f"the file '{path}' is empty", key)
    for magic, what in MAGIC.items():
        if first.startswith(magic):
            raise InputError(f"'{path}' is {what}, not text: unpack it, or save it as CSV or JSON Lines", key)
    for magic, kind in MAGIC_OF_COLUMNAR.items():
        if first.startswith(magic):
            raise InputError(f"'{path}' is in the format {kind}, not text: its name should end in .{kind}", key)
    if first.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"'{path}' is UTF-16, not UTF-8 text: iconv -f UTF-16 -t UTF-8", key)
    if b"\0" in first:
        line = first[: first.index(b"\0")].count(b"\n") + 1
        raise InputError(f"'{path}', line {line}: a NUL byte; this is not UTF-8 text (UTF-16, or a damaged file?)", key)


def _undecodable_line(path: Path, encoding: str) -> int:
    """Return the number of the first line that cannot be decoded; the decoder's position is relative to its buffer."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode(encoding)
            except UnicodeDecodeError:
                return number
    return 0


def _delimited(
    path: Path, key: str | None, layout: Layout, kind: str, encoding: str, *, skip_broken: bool
) -> Iterator[tuple[int, Row]]:
    separator, names = layout.separator(kind), layout.names()
    quoted = kind == "csv" if layout.quoted is None else layout.quoted
    whose = "the header has" if names is None else "columns=[...] has"
    with path.open(newline="", encoding=encoding) as file:
        reader = csv.reader(file, delimiter=separator, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE, strict=True)
        start, skipped = 1, 0
        try:
            for fields in reader:
                line, start = start, reader.line_num + 1
                if names is None:
                    names = fields
                    if twice := {name for name in names if names.count(name) > 1}:
                        raise InputError(f"'{path}': the column {literal(min(twice))} is there twice", key)
                    continue
                if not fields:
                    continue
                if line == 1 and fields == names:
                    raise InputError(
                        f"'{path}', line 1 holds the names of the columns; columns=[...] is for files whose first line is "
                        "an example",
                        "columns",
                    )
                if len(fields) == len(names):
                    yield line, dict(zip(names, fields, strict=True))
                elif skip_broken:
                    skipped += 1
                else:
                    listed = ", ".join(map(bare, names[:6])) + (", ..." if len(names) > 6 else "")
                    raise InputError(f"'{path}', line {line}: {len(fields)} fields where {whose} {len(names)} ({listed})", key)
        except csv.Error as error:
            why = str(error)
            if "unexpected end of data" in why:
                why = "a quote is opened and never closed; quoted=false reads quotes as text"
            raise InputError(f"'{path}', line {start}: {why}", key) from error
    if skipped:
        warnings.warn(f"'{path}': {skipped} broken lines were left out", stacklevel=2)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, and raise a ValueError for a duplicate key; by default the parser silently takes the last one."""
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {literal(next(name for name in names if names.count(name) > 1))} is there twice")
    return result


BLANKS = re.compile(r"[ \t\r\n]*")
DECODER = json.JSONDecoder(object_pairs_hook=_once)


def _json_rows(path: Path, key: str | None, encoding: str) -> Iterator[tuple[int, Row]]:
    """Yield one object per line, or the objects of one array if the first character opens an array."""
    with path.open(encoding=encoding) as file:
        first = ""
        while not first.strip() and (first := file.read(256)):
            pass
        file.seek(0)
        if first.lstrip().startswith("["):
            yield from _json_array(path, key, file.read())
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _object(path, key, number, line)


def _object(path: Path, key: str | None, number: int, line: str) -> Row:
    try:
        row = DECODER.decode(line)
    except (ValueError, RecursionError) as error:  # overlong integers and deep nesting do not raise JSONDecodeError
        why = error.msg if isinstance(error, json.JSONDecodeError) else str(error).partition(":")[0]
        raise InputError(
            f"'{path}', line {number}: not JSON ({why}); a file has one object on each line, or one array of objects", key
        ) from error
    if not isinstance(row, dict):
        raise InputError(f"'{path}', line {number}: not a JSON object", key)
    return row


def _json_array(path: Path, key: str | None, text: str) -> Iterator[tuple[int, Row]]:
    """Yield the objects of an array, with the numbers of the lines where they begin."""
    line, counted = 1, 0

    def at(position: int) -> str:
        """Skip blanks from a position, count the lines up to there, and return the next character."""
        nonlocal line, counted
        match = BLANKS.match(text, position)
        assert match is not None
        line, counted = line + text.count("\n", counted, match.end()), match.end()
        return text[counted : counted + 1]

    def fail(why: object) -> InputError:
        return InputError(f"'{path}', line {line}: not a JSON array of objects ({why})", key)

    mark = at(text.index("[") + 1)
    while mark != "]":
        try:
            row, end = DECODER.raw_decode(text, counted)
        except json.JSONDecodeError as error:
            line = error.lineno
            raise fail(error.msg) from error
        except (ValueError, RecursionError) as error:
            raise fail(str(error).partition(":")[0]) from error
        if not isinstance(row, dict):
            raise fail("an entry is not an object")
        yield line, row
        mark = at(end)
        if mark == ",":
            at(counted + 1)
        elif mark != "]":
            raise fail("expecting ',' or ']'")
    if at(counted + 1):
        raise fail("more text behind it")
