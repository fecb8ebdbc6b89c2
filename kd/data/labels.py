"""What a file's value is as a label: one class whatever format it came from, or refused."""

import math
import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from kd.data.texts import Table, shown
from kd.errors import InputError

MISSING = frozenset({"", "nan", "-nan", "na", "n/a", "#n/a", "<na>", "null", "none", "nat"})
"""Words, in lower case, that tables hold where a value is missing. As the name of a class, they are listed in `task.labels`."""

LISTED = 10
"""Names that a message lists."""

SCORES = 3
"""Different numbers, not all of them whole, from which on a column is taken for scores and not for classes. Our choice."""

WHOLE = re.compile(r"([+-]?\d+)\.0*")
NUMBER = re.compile(r"[+-]?\d+(\.\d*)?")


def label_name(value: Any, where: str, key: str = "task.label") -> str:
    """A raw label as the name of a class: text without blanks around it; 1, 1.0, "1" and "1.0" are the same, `1`.

    Raises:
        InputError: for a list, an object, an infinite number, or half of a character.

    >>> [label_name(value, "") for value in (1, 1.0, "1.0", " a b ", 0.5, True, None, float("nan"))]
    ['1', '1', '1', 'a b', '0.5', 'True', '', '']
    """
    if value is None:
        return ""
    if isinstance(value, str):
        name = value.strip()
        if any("\ud800" <= letter <= "\udfff" or letter == "\0" for letter in name):
            raise InputError(f"{where}: the label {shown(value)} holds half of a character, or a NUL: it is no text", key)
        whole = WHOLE.fullmatch(name)
        return whole[1] if whole else name
    if isinstance(value, bool | int):
        return str(value)
    if not isinstance(value, float) or math.isinf(value):
        raise InputError(f"{where}: the label {shown(value)} is neither a text nor a number", key)
    if math.isnan(value):
        return ""
    return str(int(value)) if value.is_integer() else repr(value)


def is_missing(name: str) -> bool:
    """Whether the name of a class stands for a missing value, unless the task lists it."""
    return name.casefold() in MISSING


def missing(value: Any, where: str) -> InputError:
    """The error of a label that is missing."""
    word = shown(value)
    hint = (
        ""
        if value is None or isinstance(value, float) or not str(value).strip()
        else (f"; if {word} is the name of a class, list it with the others: task.labels=[...]")
    )
    return InputError(f"{where}: the label is missing ({word}){hint}", "task.label")


def listed(names: Sequence[str]) -> str:
    """Names for a message, the first ones of many."""
    found = ", ".join(name if name.isprintable() and len(name) < 40 else shown(name) for name in names[:LISTED])
    return found if len(names) <= LISTED else f"{found}, ... ({len(names)} in all)"


def likeness(name: str) -> str:
    """What names that a reader takes for the same have in common: case, blanks, invisible characters, ways to write a number.

    >>> likeness(" Very  Good") == likeness("very good"), likeness("01") == likeness("1"), likeness("True") == likeness("1")
    (True, True, True)
    """
    plain = unicodedata.normalize("NFKC", name).casefold()
    plain = " ".join("".join(letter for letter in plain if unicodedata.category(letter) not in ("Cf", "Cc")).split())
    if NUMBER.fullmatch(plain):
        return str(Decimal(plain).normalize() + 0)
    return {"true": "1", "false": "0"}.get(plain, plain)


def class_names(table: Table) -> list[str]:
    """The classes of a task that lists none: the sorted labels of its training split.

    Raises:
        InputError: for a missing label, for labels that differ by no more than their spelling, and for columns that are
            no labels: scores, or one label for nearly every example.
    """
    first: dict[str, int] = {}
    seen = set()
    for row, value in enumerate(table.labels):
        try:
            if (type(value), value) in seen:
                continue
            seen.add((type(value), value))
        except TypeError:  # a list; refused below
            pass
        name = label_name(value, table.where(row))
        if is_missing(name):
            raise missing(value, table.where(row))
        first.setdefault(name, row)
    alike: dict[str, str] = {}
    for name, row in first.items():
        other = alike.setdefault(likeness(name), name)
        if other != name:
            raise InputError(
                f"{table.where(first[other])} has the label {shown(other)} and {table.where(row)} {shown(name)}: they differ "
                "by their spelling alone. Make them one or, if they are two classes, list all classes as task.labels=[...]",
                "task.labels",
            )
    names = sorted(first)
    numbers = [name for name in names if NUMBER.fullmatch(name)]
    if len(numbers) == len(names) >= SCORES and any("." in name for name in names):
        raise InputError(
            f"the labels look like scores: {len(names)} different numbers, {listed(names)}. For a regression: "
            "task.kind=regression 'task.metrics=[pearson,spearman]' task.monitor=pearson. If they are classes, list them as "
            "task.labels=[...]",
            "task.kind",
        )
    if len(names) > 50 and 2 * len(names) > len(table):
        raise InputError(
            f"{len(table)} training examples have {len(names)} different labels ({listed(names)}): is this the column of the "
            "label? If they are classes, list them as task.labels=[...]; scores are task.kind=regression",
            "task.label",
        )
    return names
