"""Checks of single values of a configuration: type, range, and one form of words for what is wrong."""

import inspect
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kd.errors import InputError, one_of

TINY = 1e-12
"""Least positive rate, weight or bound. Below it nothing moves in float32, and what is below 1e-38 is zero there."""
LARGEST_SEED = 2**63 - 1
"""The largest seed that torch and numpy both take."""
MANY = 1_000_000
"""Largest count of what a run has many of: examples of a batch, tokens of a vocabulary, epochs."""


def number(
    value: Any, key: str, least: float = -math.inf, most: float = math.inf, above: float | None = None, zero: bool = False
) -> float:
    """Check that a value is a finite number in a range, and return it as a float.

    Args:
        value: from a configuration. A truth value, or a word that reads as a number, is none.
        key: the configuration key that an error names.
        least: smallest allowed value.
        most: largest allowed value.
        above: a bound that is not allowed itself, in place of `least`.
        zero: also allow zero, below `least`.

    Raises:
        InputError: if it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{key}={shown(value)} is not a number", key)
    low = f"more than {above:g}" if above is not None else f"at least {least:g}" if least > -math.inf else ""
    high = f"at most {most:g}" if most < math.inf else ""
    allowed = ("0, or " if zero else "") + (" and ".join(filter(None, (low, high))) or "finite")
    fits = (value > above if above is not None else value >= least) and value <= most  # also false for nan
    if not (fits or (zero and value == 0)) or math.isinf(value):
        raise InputError(f"{key}={shown(value)} must be {allowed}", key)
    return float(value)


def whole(value: Any, key: str, least: int = 1, most: int = MANY) -> int:
    """Check that a value is a whole number in a range, and return it.

    Raises:
        InputError: if it is not; a truth value and 3.0 are none.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{key}={shown(value)} must be a whole number from {least} to {most}", key)
    if not least <= value <= most:
        bound = f"at least {least}" if value < least else f"at most {most}"
        raise InputError(f"{key}={shown(value)} must be {bound}: a whole number from {least} to {most}", key)
    return value


def word(value: Any, allowed: Sequence[str], key: str) -> str:
    """Check that a value is one of a closed list of words, and return it.

    Raises:
        InputError: if it is not.
    """
    if not isinstance(value, str) or value not in allowed:
        raise one_of(shown(value), tuple(allowed), key)
    return value


def switch(value: Any, key: str) -> bool:
    """Check that a value is a truth value, and return it.

    Raises:
        InputError: if it is not.
    """
    if not isinstance(value, bool):
        raise one_of(shown(value), ("true", "false"), key)
    return value


def shown(value: Any, most: int = 120) -> str:
    """A value as a message quotes it: printable, and not longer than a line.

    >>> shown(None), shown(True), shown(10**20)
    ('null', 'true', '100000000000000000000')
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value.bit_length() > 1000:  # Python turns no number of thousands of digits into text
        return f"a number of more than {int(value.bit_length() * 0.301)} digits"
    text = str(value)
    if not text.isprintable():
        text = text.encode("unicode_escape").decode()
    return text if len(text) <= most else f"{text[: most - 3]}..."


def literal(value: Any, most: int = 60) -> str:
    r"""A value of a file as a message quotes it: a text in quotes, so that its blanks are seen and it differs from a number.

    >>> literal("a\nb\ud83d"), literal("x" * 100)[-5:], literal(1.0), literal(None)
    ("'a\\nb\\ud83d'", "x'...", '1.0', 'null')
    """
    if isinstance(value, str | bytes | list):
        text = shown(repr(value[:most]), 4 * most)
        return f"{text}..." if len(value) > most and not text.endswith("...") else text
    return shown(repr(value) if type(value) is int else value, 4 * most)  # Python reads no number that it cannot write


def one_line(error: BaseException) -> str:
    """What an error, or the one that it came from, says, in a line."""
    return shown(" ".join(str(error.__cause__ or error).split()) or type(error).__name__, 300)


HYDRA_WORDS = ("_args_", "_convert_", "_recursive_")
"""Words of Hydra's nodes that have no meaning here."""


def locate(node: Mapping[str, Any], key: str, fits: Callable[[Any], bool], expected: str, partial: bool = False) -> Any:
    """The class, or function, that a node names.

    Args:
        node: with `_target_`.
        key: where it stands.
        fits: whether something found is what the place expects. It is asked before anything is called.
        expected: the same in words.
        partial: whether Hydra's word `_partial_` may stand there, as in configurations that were written for it.

    Raises:
        InputError: if there is no such thing, or it is something else.
    """
    name, where = node.get("_target_"), f"{key}._target_"
    if not isinstance(name, str) or not name:
        raise InputError(f"{key} has no class: its _target_ is missing, or no word", where)
    if "_partial_" in node:
        switch(node["_partial_"], f"{key}._partial_")
    if spare := [word for word in (*HYDRA_WORDS, *(() if partial else ("_partial_",))) if word in node]:
        raise InputError(f"{key}.{spare[0]} is no argument of {name}", f"{key}.{spare[0]}")
    try:
        found = pkgutil.resolve_name(name)
    except Exception as error:  # whatever the import of a module raises
        raise InputError(f"{where}={shown(name)} cannot be imported: {one_line(error)}", where) from error
    if not fits(found):
        raise InputError(f"{where}={shown(name)} is not {expected}", where)
    return found


def subclass_of(*bases: type) -> Callable[[Any], bool]:
    """A test for classes that inherit from one of these, and can be made."""
    return lambda found: inspect.isclass(found) and issubclass(found, bases) and not inspect.isabstract(found)


def has(*names: str) -> Callable[[Any], bool]:
    """A test for classes that define all of these names."""
    return lambda found: inspect.isclass(found) and all(hasattr(found, name) for name in names)
