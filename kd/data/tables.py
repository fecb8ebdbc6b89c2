"""Readers of CSV, TSV and JSON Lines files: strict, and clear about where a file is wrong."""

import csv
import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kd.errors import InputError

Row = Mapping[str, Any]

csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # one review may be longer than the default of 128 kB


def rows(
    path: Path,
    key: str,
    columns: Sequence[str] | None = None,
    quoted: bool | None = None,
    encoding: str = "utf-8-sig",
    skip_broken: bool = False,
) -> Iterator[tuple[int, Row]]:
    """The rows of a file with their line numbers.

    Args:
        path: ends in .csv, .tsv, .txt (as TSV), .jsonl, .ndjson or .json (one object a line).
        key: the configuration key that an error names.
        columns: names, for a file without a header.
        quoted: whether fields may be quoted; by default in CSV, not in TSV (as GLUE ships it).
        encoding: by default UTF-8 with or without a byte-order mark.
        skip_broken: leave out lines with another number of fields, with a warning that counts them.

    Raises:
        InputError: if the file is missing, empty, of another kind, not text, or a line is broken.
    """
    if not path.is_file():
        raise InputError(f"the file '{path}' does not exist", key)
    if path.stat().st_size == 0:
        raise InputError(f"the file '{path}' is empty", key)
    kind = path.suffix.lower()
    if kind in (".jsonl", ".ndjson", ".json"):
        reader = _json_lines(path, key, encoding)
    elif kind in (".csv", ".tsv", ".txt"):
        commas = kind == ".csv"
        reader = _delimited(path, key, columns, commas if quoted is None else quoted, commas, encoding, skip_broken)
    else:
        raise InputError(f"'{path}' is not a .csv, .tsv or .jsonl file", key)
    try:
        yield from reader
    except UnicodeDecodeError as error:
        raise InputError(f"'{path}', line {_undecodable_line(path, encoding)}: not UTF-8 text", key) from error


def _undecodable_line(path: Path, encoding: str) -> int:
    """Number of the first line that cannot be decoded; the decoder's own position counts from its last buffer."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode(encoding)
            except UnicodeDecodeError:
                return number
    return 0


def _delimited(
    path: Path,
    key: str,
    columns: Sequence[str] | None,
    quoted: bool,
    commas: bool,
    encoding: str,
    skip_broken: bool,
) -> Iterator[tuple[int, Row]]:
    with path.open(newline="", encoding=encoding) as file:
        reader = csv.reader(
            file,
            delimiter="," if commas else "\t",
            quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
            strict=True,
        )
        start, skipped = 1, 0
        names = list(columns) if columns is not None else None
        try:
            for fields in reader:
                line, start = start, reader.line_num + 1
                if names is None:
                    names = fields
                    if twice := {name for name in names if names.count(name) > 1}:
                        raise InputError(f"'{path}': the column '{min(twice)}' is there twice", key)
                    continue
                if not fields:
                    continue
                if len(fields) == len(names):
                    yield line, dict(zip(names, fields, strict=True))
                elif skip_broken:
                    skipped += 1
                else:
                    shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
                    found = f"{len(fields)} fields where the header has {len(names)} ({shown})"
                    raise InputError(f"'{path}', line {line}: {found}", key)
        except csv.Error as error:
            raise InputError(f"'{path}', line {start}: {error}", key) from error
    if skipped:
        warnings.warn(f"'{path}': {skipped} broken lines were left out", stacklevel=2)


def _json_lines(path: Path, key: str, encoding: str) -> Iterator[tuple[int, Row]]:
    with path.open(encoding=encoding) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"'{path}', line {number}: not JSON ({error.msg})", key) from error
            if not isinstance(row, dict):
                raise InputError(f"'{path}', line {number}: not a JSON object", key)
            yield number, row
