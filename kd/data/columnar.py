"""Reader of Parquet and Arrow files. It reads them batch by batch, by pyarrow, which is imported when there is such a file."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kd.config.values import column_names
from kd.errors import InputError

COLUMNAR = ("parquet", "arrow")
"""Formats that this module reads: Parquet; and Arrow's, both its files and its streams, as `datasets` writes them."""

AT_ONCE = 4096
"""Number of rows that are converted to Python's values at a time."""

FILE_BEGINS = b"ARROW1"
"""First bytes of an Arrow file; a stream has none of its own."""


def columnar_rows(
    path: Path, key: str | None, kind: str, wanted: Mapping[str, str | None]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a file with their numbers, from 1; arguments, values and errors as for `columnar_pieces`."""
    for first, columns in columnar_pieces(path, key, kind, wanted):
        names = list(columns)
        for number, row in enumerate(zip(*columns.values(), strict=True), first):
            yield number, dict(zip(names, row, strict=True))


def columnar_pieces(
    path: Path, key: str | None, kind: str, wanted: Mapping[str, str | None]
) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    """Yield the values of columns for at most `AT_ONCE` rows at a time, with the number of the first of these, from 1.

    Integers, booleans and texts are Python's, dictionary-encoded values are decoded, and a null is None.

    Args:
        path: path of the file.
        key: the configuration key that an error about the file names.
        kind: one of `COLUMNAR`.
        wanted: columns to read -> the configuration key that an error about the column names.

    Raises:
        InputError: without pyarrow; if the file is empty, damaged or of another format; for a column that is missing, there
            twice, nested, or neither text nor numbers.
    """
    try:
        import pyarrow as pa
    except ImportError as error:
        raise InputError(f"reading '{path}' needs the package pyarrow: pip install 'kd[arrow]'", key) from error
    if not path.stat().st_size:
        raise InputError(f"the file '{path}' is empty", key)
    first = 1
    try:
        with contextlib.ExitStack() as stack:
            schema, batches = (_parquet if kind == "parquet" else _arrow)(path, list(wanted), stack)
            kinds = {name: _kind_to_read(path, schema, name, argument) for name, argument in wanted.items()}
            for batch in batches:
                for start in range(0, batch.num_rows, AT_ONCE):
                    piece = batch.slice(start, AT_ONCE)
                    yield first, {name: _values(piece.column(name), kinds[name]) for name in wanted}
                    first += piece.num_rows
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        at = "" if first == 1 else f", after row {first - 1}"
        what = "a Parquet file" if kind == "parquet" else "an Arrow file"
        why = " ".join(str(error).split()).rstrip(".")
        raise InputError(f"'{path}'{at}: not {what}, or damaged ({why})", key) from error


def _parquet(path: Path, wanted: list[str], stack: contextlib.ExitStack) -> tuple[Any, Iterator[Any]]:
    """Return the schema of a Parquet file, and its batches with the wanted columns."""
    from pyarrow import parquet

    file = stack.enter_context(parquet.ParquetFile(path, pre_buffer=False))  # else all that was read stays in memory
    columns = [name for name in wanted if name in file.schema_arrow.names]
    return file.schema_arrow, file.iter_batches(batch_size=AT_ONCE, columns=columns, use_threads=False)


def _arrow(path: Path, wanted: list[str], stack: contextlib.ExitStack) -> tuple[Any, Iterator[Any]]:
    """Return the schema of an Arrow file or stream, and its batches; columns are memory-mapped, so that others cost nothing."""
    import pyarrow as pa

    source = stack.enter_context(pa.memory_map(str(path)))
    with path.open("rb") as file:
        is_stream = file.read(len(FILE_BEGINS)) != FILE_BEGINS
    if is_stream:
        stream = stack.enter_context(pa.ipc.open_stream(source))
        return stream.schema, iter(stream)
    reader = stack.enter_context(pa.ipc.open_file(source))
    return reader.schema, (reader.get_batch(index) for index in range(reader.num_record_batches))


def _kind_to_read(path: Path, schema: Any, name: str, key: str | None) -> Any:
    """Return the type that a column is converted to.

    Raises:
        InputError: for a column that cannot be read.
    """
    import pyarrow as pa

    names = schema.names
    if name not in names:
        raise InputError(f"'{path}': no column '{name}'; the columns are {column_names(names)}", key)
    if names.count(name) > 1:
        raise InputError(f"'{path}': the column '{name}' is there twice", key)
    given = schema.field(name).type
    kind = given.value_type if pa.types.is_dictionary(given) else given
    if pa.types.is_nested(kind):
        raise InputError(f"'{path}': the column '{name}' is nested ({given}); it should have one value in each row", key)
    is_a = pa.types
    if is_a.is_decimal(kind) or any(test(kind) for test in (is_a.is_string, is_a.is_large_string, is_a.is_string_view)):
        return pa.large_string()
    if is_a.is_binary(kind) or is_a.is_large_binary(kind):  # as some programs write text
        return pa.large_string()
    if is_a.is_floating(kind):
        return pa.float64()
    if is_a.is_integer(kind) or is_a.is_boolean(kind) or is_a.is_null(kind):
        return kind
    raise InputError(f"'{path}': the column '{name}' has values of type {given}, which are neither text nor numbers", key)


def _values(column: Any, kind: Any) -> list[Any]:
    """Return the values of a column as Python's; a damaged file is found before they are read."""
    column.validate(full=True)
    return list(column.cast(kind).to_pylist())
