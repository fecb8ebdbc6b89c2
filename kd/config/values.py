"""Checks of single configuration values: type and range, with uniform error messages."""

import inspect
import math
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from kd.errors import InputError, one_of

TINY = 1e-12
"""Smallest positive rate, weight or bound. Smaller ones change nothing in float32, where numbers below 1e-38 are zero."""
LARGEST_SEED = 2**63 - 1
"""Largest seed that torch and numpy both accept."""
MANY = 1_000_000
"""Largest allowed count, for example of examples in a batch, tokens in a vocabulary, or epochs."""


def number(
    value: object,
    key: str,
    least: float = -math.inf,
    most: float = math.inf,
    above: float | None = None,
    *,
    zero: bool = False,
) -> float:
    """Check that a value is a finite number in a range, and return it as a float.

    Args:
        value: value from a configuration. Booleans, and strings that look like numbers, are rejected.
        key: the configuration key that an error names.
        least: smallest allowed value.
        most: largest allowed value.
        above: exclusive lower bound, in place of `least`.
        zero: whether zero is also allowed, below `least`.

    Raises:
        InputError: if it is not a finite number in the range.
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


def whole(value: object, key: str, least: int = 1, most: int = MANY) -> int:
    """Check that a value is a whole number in a range, and return it.

    Raises:
        InputError: if it is not; booleans and floats such as 3.0 are rejected.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{key}={shown(value)} must be a whole number from {least} to {most}", key)
    if not least <= value <= most:
        bound = f"at least {least}" if value < least else f"at most {most}"
        raise InputError(f"{key}={shown(value)} must be {bound}: a whole number from {least} to {most}", key)
    return value


def word(value: object, allowed: Sequence[str], key: str) -> str:
    """Check that a value is one of the allowed words, and return it.

    Raises:
        InputError: if it is not.
    """
    if not isinstance(value, str) or value not in allowed:
        raise one_of(shown(value), tuple(allowed), key)
    return value


def switch(value: object, key: str) -> bool:
    """Check that a value is a boolean, and return it.

    Raises:
        InputError: if it is not.
    """
    if not isinstance(value, bool):
        raise one_of(shown(value), ("true", "false"), key)
    return value


def shown(value: object, most: int = 120) -> str:
    """Return a value as text for a message: printable, and at most `most` characters.

    >>> shown(None), shown(True), shown(10**20)
    ('null', 'true', '100000000000000000000')
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value.bit_length() > 1000:  # Python refuses to convert very large numbers to text
        return f"a number of more than {int(value.bit_length() * 0.301)} digits"
    text = str(value)
    if not text.isprintable():
        text = text.encode("unicode_escape").decode()
    return text if len(text) <= most else f"{text[: most - 3]}..."


def literal(value: object, most: int = 60) -> str:
    r"""Return a value from a file as text for a message; strings are quoted, so that blanks show and they differ from numbers.

    >>> literal("a\nb\ud83d"), literal("x" * 100)[-5:], literal(1.0), literal(None)
    ("'a\\nb\\ud83d'", "x'...", '1.0', 'null')
    """
    if isinstance(value, str | bytes | list):
        text = shown(repr(value[:most]), 4 * most)
        return f"{text}..." if len(value) > most and not text.endswith("...") else text
    return shown(
        repr(value) if type(value) is int else value, 4 * most
    )  # repr is safe: Python cannot parse an integer too long to print


def bare(name: str) -> str:
    """Return a column's name for a message, without quotes if it needs none."""
    return name if name.isprintable() and len(name) < 40 else literal(name)


def column_names(columns: Iterable[object]) -> str:
    """Return names of columns for a message, at most 20 of them."""
    names = [bare(str(name)) for name in columns]
    return ", ".join(names[:20]) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")


def one_line(error: BaseException) -> str:
    """Return the message of an error's cause, or else of the error, in one line."""
    return shown(" ".join(str(error.__cause__ or error).split()) or type(error).__name__, 300)


HYDRA_WORDS = ("_args_", "_convert_", "_recursive_")
"""Keys of Hydra's nodes that are not supported here."""


def locate(node: Mapping[str, Any], key: str, fits: Callable[[Any], bool], expected: str, *, partial: bool = False) -> Any:
    """Import the class or function that a node names.

    Args:
        node: configuration node with `_target_`.
        key: configuration key of the node.
        fits: predicate of the objects that are allowed for this key, called before the object itself is.
        expected: description of the allowed objects, for the message.
        partial: whether Hydra's key `_partial_` is allowed, as in configurations that were written for Hydra.

    Raises:
        InputError: if it cannot be imported, or is not an allowed object.
    """
    name, where = node.get("_target_"), f"{key}._target_"
    if not isinstance(name, str) or not name:
        raise InputError(f"{key} has no class: its _target_ is missing, or not a word", where)
    if "_partial_" in node:
        switch(node["_partial_"], f"{key}._partial_")
    if spare := [word for word in (*HYDRA_WORDS, *(() if partial else ("_partial_",))) if word in node]:
        raise InputError(f"{key}.{spare[0]} is no argument of {name}", f"{key}.{spare[0]}")
    try:
        target = pkgutil.resolve_name(name)
    except Exception as error:  # importing a module may raise anything
        raise InputError(f"{where}={shown(name)} cannot be imported: {one_line(error)}", where) from error
    if not fits(target):
        raise InputError(f"{where}={shown(name)} is not {expected}", where)
    return target


def subclass_of(*bases: type) -> Callable[[Any], bool]:
    """Return a predicate that is true for concrete classes that inherit from one of these."""
    return lambda target: inspect.isclass(target) and issubclass(target, bases) and not inspect.isabstract(target)


def returns(*bases: type) -> Callable[[Any], bool]:
    """Return a predicate that is true for functions whose return annotation is a class that inherits from one of these."""

    def matches(target: object) -> bool:
        try:
            kind = inspect.get_annotations(target, eval_str=True).get("return") if inspect.isfunction(target) else None
        except (NameError, SyntaxError):  # an annotation that its own module does not define
            return False
        return inspect.isclass(kind) and issubclass(kind, bases)

    return matches


def has(*names: str) -> Callable[[Any], bool]:
    """Return a predicate that is true for classes that define all of these names."""
    return lambda target: inspect.isclass(target) and all(hasattr(target, name) for name in names)
