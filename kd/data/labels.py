"""Conversion of a file's values to labels: the same class from every file format, or an error."""

import itertools
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from kd.config.values import literal
from kd.data.texts import RowSequence, Table
from kd.errors import InputError

MISSING = frozenset({"", "nan", "-nan", "na", "n/a", "#n/a", "<na>", "null", "none", "nat"})
"""Words, in lower case, that stand for a missing value in tables. To use one as a class name, list it in `task.labels`."""

LISTED = 10
"""Number of names that a message lists."""

SCORES = 3
"""Number of distinct numeric labels, not all integers, from which a column is taken for scores, not classes. Our choice."""

WHOLE_NUMBER = re.compile(r"([+-]?\d+)\.0*")
NUMBER = re.compile(r"[+-]?\d+(\.\d*)?")


def label_text(name: object) -> str:
    """Return a label's name as text, from any file or model, without surrounding blanks and with one name for an integer.

    >>> [label_text(name) for name in (1, 1.0, "1", "1.0", " good ", 0.5, True, "v1.0")]
    ['1', '1', '1', '1', 'good', '0.5', 'True', 'v1.0']
    """
    text = str(name).strip()
    if isinstance(name, float):
        return str(int(name)) if name.is_integer() else text
    whole = WHOLE_NUMBER.fullmatch(text)
    return whole[1] if whole else text


def label_name(value: object, where: str, key: str = "label") -> str:
    """Return the class name of a raw label, as `label_text` writes it; empty for a missing label.

    Raises:
        InputError: for a list, an object, an infinite number, or a lone surrogate (half of a character) or NUL.

    >>> [label_name(value, "") for value in (1, 1.0, "1.0", " a b ", 0.5, True, None, float("nan"))]
    ['1', '1', '1', 'a b', '0.5', 'True', '', '']
    """
    if value is None:
        return ""
    if isinstance(value, str):
        name = value.strip()
        if any("\ud800" <= letter <= "\udfff" or letter == "\0" for letter in name):
            raise InputError(f"{where}: the label {literal(value)} holds half of a character, or a NUL: it is no text", key)
    elif not isinstance(value, bool | int | float) or (isinstance(value, float) and math.isinf(value)):
        raise InputError(f"{where}: the label {literal(value)} is neither a text nor a number", key)
    return "" if isinstance(value, float) and math.isnan(value) else label_text(value)


def is_missing(name: str) -> bool:
    """Return whether the name of a class stands for a missing value, unless the task lists it."""
    return name.casefold() in MISSING


def missing(value: object, where: str) -> InputError:
    """Return the error for a missing label."""
    word = literal(value)
    hint = (
        ""
        if value is None or isinstance(value, float) or not str(value).strip()
        else f"; if {word} is the name of a class, list it with the others: labels=[...]"
    )
    return InputError(f"{where}: the label is missing ({word}){hint}", "label")


def listed(names: Sequence[str]) -> str:
    """Format names for a message, at most `LISTED` of them."""
    first = ", ".join(name if name.isprintable() and len(name) < 40 else literal(name) for name in names[:LISTED])
    return first if len(names) <= LISTED else f"{first}, ... ({len(names)} in all)"


def likeness(name: str) -> str:
    """Return a name without differences of case, blanks, invisible characters and number format, to detect look-alikes.

    >>> likeness(" Very  Good") == likeness("very good"), likeness("01") == likeness("1"), likeness("True") == likeness("1")
    (True, True, True)
    """
    plain = unicodedata.normalize("NFKC", name).casefold()
    plain = " ".join("".join(letter for letter in plain if unicodedata.category(letter) not in ("Cf", "Cc")).split())
    if NUMBER.fullmatch(plain):
        return str(Decimal(plain).normalize() + 0)
    return {"true": "1", "false": "0"}.get(plain, plain)


def class_names(table: Table) -> list[str]:
    """Return the classes of a task that lists none: the sorted labels of its training split.

    Raises:
        InputError: for a missing label, for labels that differ only in spelling, and for columns that do not hold
            classes: scores, or a different label for nearly every example.
    """
    first: dict[str, int] = {}
    seen = set()
    for row, value in enumerate(table.labels):
        try:
            if (type(value), value) in seen:
                continue
            seen.add((type(value), value))
        except TypeError:  # a list cannot be hashed; `label_name` rejects it
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
                f"{table.where(first[other])} has the label {literal(other)} and {table.where(row)} {literal(name)}: they "
                "differ only in spelling. Use one spelling or, if they are two classes, list all as labels=[...]",
                "labels",
            )
    names = sorted(first)
    numbers = [name for name in names if NUMBER.fullmatch(name)]
    if len(numbers) == len(names) >= SCORES and any("." in name for name in names):
        raise InputError(
            f"the labels look like scores: {len(names)} different numbers, {listed(names)}. For a regression: "
            "kind=regression 'metrics=[pearson,spearman]' monitor=pearson. If they are classes, list them as "
            "labels=[...]",
            "kind",
        )
    if len(names) > 50 and 2 * len(names) > len(table):
        raise InputError(
            f"{len(table)} training examples have {len(names)} different labels ({listed(names)}): is this the column of the "
            "label? If they are classes, list them as labels=[...]; scores are kind=regression",
            "label",
        )
    return names


class PartLabels(RowSequence[float]):
    """Labels of examples, as numbers, and behind them examples without any; NaN stands for a missing label.

    Args:
        labels: the labels.
        missing: number of the examples behind them.
    """

    def __init__(self, labels: Sequence[float], missing: int) -> None:
        self.labels, self.missing = labels, missing

    def __len__(self) -> int:
        return len(self.labels) + self.missing

    def row(self, row: int) -> float:
        """Return the label of one example."""
        return self.labels[row] if row < len(self.labels) else math.nan

    def __iter__(self) -> Iterator[float]:
        return itertools.chain(self.labels, itertools.repeat(math.nan, self.missing))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate([np.asarray(self.labels, dtype=np.float64), np.full(self.missing, np.nan)])


def has_label(labels: Sequence[float]) -> np.ndarray:
    """Return whether each example has a label, (examples,), bool.

    >>> has_label(PartLabels([1.0, math.nan], 1)).tolist()
    [True, False, False]
    """
    own = labels.labels if isinstance(labels, PartLabels) else labels
    mask = np.zeros(len(labels), dtype=bool)
    mask[: len(own)] = ~np.isnan(np.asarray(own, dtype=np.float64))
    return mask


def given_labels(labels: Sequence[float]) -> list[float]:
    """Return the labels that are not missing."""
    own = labels.labels if isinstance(labels, PartLabels) else labels
    return [label for label in own if not math.isnan(label)]
