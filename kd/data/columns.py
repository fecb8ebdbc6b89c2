"""Further columns of the data, which methods read: their values as numbers."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from kd.config.values import literal
from kd.data.labels import is_missing, label_name, listed
from kd.data.tasks import score_of
from kd.data.texts import Table
from kd.errors import InputError

Kinds = Mapping[str, str | Sequence[str]]
"""Further column -> one of `kd.config.schema.COLUMN_KINDS`, or the names of its classes in their order."""


def classes_of_columns(kinds: Kinds, train: Table) -> dict[str, list[str]]:
    """Return the classes of each column of classes: those that are listed, else the sorted names of the training split.

    Raises:
        InputError: if the table lacks a column, or a name is missing.
    """
    return {
        name: sorted({class_name(name, train, row) for row in range(len(train))}) if kind == "classes" else list(kind)
        for name, kind in kinds.items()
        if kind != "number"
    }


Where = Mapping[str, str | Sequence[str]]
"""Selection of examples: further column -> a class, or several."""


def chosen(where: Where, classes: Mapping[str, list[str]], table: Table, key: str = "where") -> np.ndarray:
    """Return the indices of the examples whose columns have one of the given classes.

    Args:
        where: see `Where`.
        classes: as `classes_of_columns` returns them.
        table: the split.
        key: name of the argument that an error is about.

    Raises:
        InputError: for a class that the column does not have.
    """
    mask = np.ones(len(table), dtype=bool)
    for column, wanted in where.items():
        names = known_classes(column, wanted, classes, key)
        mask &= np.fromiter((class_name(column, table, row) in names for row in range(len(table))), bool, len(table))
    return np.flatnonzero(mask)


def chosen_mask(
    where: Where | None, classes: Mapping[str, list[str]], columns: Mapping[str, np.ndarray], count: int, key: str = "where"
) -> np.ndarray:
    """Return whether each example's encoded columns have one of the given classes, (examples,), bool.

    Args:
        where: see `Where`; None for all examples.
        classes: as `classes_of_columns` returns them.
        columns: as `values_of_columns` returns them.
        count: number of examples.
        key: name of the argument that an error is about.

    Raises:
        InputError: for a column that is not one of classes, or a class that it does not have.
    """
    mask = np.ones(count, dtype=bool)
    for column, wanted in (where or {}).items():
        names = known_classes(column, wanted, {name: classes[name] for name in classes if name in columns}, key)
        mask &= np.isin(columns[column], [classes[column].index(name) for name in names])
    return mask


def known_classes(column: str, wanted: str | Sequence[str], classes: Mapping[str, list[str]], key: str) -> list[str]:
    """Return the classes that are wanted of a column.

    Raises:
        InputError: for a column that is not one of classes, or a class that it does not have.
    """
    if column not in classes:
        raise InputError(f"train has no column of classes '{column}': 'task.extra={{{column}: classes}}'", key)
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    if unknown := [name for name in names if name not in classes[column]]:
        raise InputError(f"the column '{column}' has no class {literal(unknown[0])}; it has {listed(classes[column])}", key)
    return names


def values_of_columns(kinds: Kinds, classes: Mapping[str, list[str]], table: Table) -> dict[str, np.ndarray]:
    """Return the values of each column of a split, (examples,): class indices as int64, or numbers as float32.

    Args:
        kinds: see `Kinds`.
        classes: as `classes_of_columns` returns them.
        table: the split.

    Raises:
        InputError: if the table lacks a column, or for a value that is not one of its classes, or not a finite number.
    """
    values = {}
    for name, kind in kinds.items():
        rows = range(len(table))
        if kind == "number":
            values[name] = np.fromiter((finite_number(name, table, row) for row in rows), np.float32, len(table))
        else:
            indices = {known: index for index, known in enumerate(classes[name])}
            values[name] = np.fromiter((class_index(name, indices, table, row) for row in rows), np.int64, len(table))
    return values


def raw_value(name: str, table: Table, row: int) -> object:
    """Return a value as in the file.

    Raises:
        InputError: if the table lacks the column.
    """
    if name not in table.columns:
        raise InputError(f"{table.where(row)}: no column '{name}'", "extra")
    return table.columns[name][row]


def class_name(name: str, table: Table, row: int) -> str:
    """Return the class of an example in a column, written as labels are.

    Raises:
        InputError: if it is missing, or neither text nor a number.
    """
    value = raw_value(name, table, row)
    try:
        text = label_name(value, table.where(row))
    except InputError as error:
        raise InputError(f"the column '{name}': {error.message}", "extra") from error
    if is_missing(text):
        raise InputError(f"{table.where(row)}: the column '{name}' has no value ({literal(value)})", "extra")
    return text


def class_index(name: str, indices: Mapping[str, int], table: Table, row: int) -> int:
    """Return the index of the class of an example in a column.

    Raises:
        InputError: for a class that the training split does not have.
    """
    text = class_name(name, table, row)
    if text not in indices:
        raise InputError(
            f"{table.where(row)}: the column '{name}' is {literal(text)}, which is none of its classes, those of train "
            f"or those that are listed: {listed(list(indices))}",
            "extra",
        )
    return indices[text]


def finite_number(name: str, table: Table, row: int) -> float:
    """Return the number of an example in a column.

    Raises:
        InputError: if it is not a finite number in float32.
    """
    value = raw_value(name, table, row)
    number = score_of(value)
    if math.isnan(number) or abs(number) > np.finfo(np.float32).max:
        raise InputError(f"{table.where(row)}: the column '{name}' is {literal(value)}, not a finite number", "extra")
    return number
