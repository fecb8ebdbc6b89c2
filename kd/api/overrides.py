"""Values of Python as overrides of Hydra."""

import json
import re
from collections.abc import Mapping
from os import PathLike, fspath

from hydra.errors import HydraException

from kd.config.compose import parsed_override
from kd.config.values import shown
from kd.errors import InputError

BARE = re.compile(r"[A-Za-z_][\w./@-]*")
"""Strings that Hydra's grammar may read as they are; others are quoted."""


def override_of(key: str, value: object) -> str:
    r"""Return the override that gives a key a value of Python. Strings are taken literally.

    Args:
        key: key of the configuration, as `seed` or `task.train`.
        value: None, a boolean, number, string or path; or a list, tuple or mapping of such.

    Raises:
        InputError: for a key or a value that an override cannot have.

    >>> override_of("seed", 1), override_of("teacher", ["minilm"]), override_of("paths.runs", "my runs, today")
    ('seed=1', 'teacher=[minilm]', "paths.runs='my runs, today'")
    >>> override_of("task.labels", None), override_of("task.labels", ["no", "1", 1])
    ('task.labels=null', "task.labels=['no','1',1]")
    """
    if not re.fullmatch(r"[+~]*\w[\w.@/-]*", key):
        raise InputError(f"{shown(key)!r} is no key of the configuration", key)
    override = f"{key}={_word(value, key)}"
    try:
        parsed = parsed_override(override)
        read = None if parsed.is_sweep_override() else parsed.value()
    except HydraException as error:
        raise InputError(f"{key}={shown(value)} cannot be written as an override", key) from error
    if _plain(read) != _plain(value):
        raise InputError(f"{key}={shown(value)} cannot be written as an override; Hydra reads {shown(read)}", key)
    return override


def _plain(value: object) -> str:
    """Return a value as text that shows its types."""

    def of(value: object) -> object:
        if isinstance(value, Mapping):
            return {str(of(name)): of(inner) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [of(inner) for inner in value]
        if isinstance(value, str | PathLike) or type(value).__name__ == "QuotedString":
            return _text(getattr(value, "text", value))
        return value

    return json.dumps(of(value), sort_keys=True, default=repr)


def _text(value: object) -> str:
    """Return a string or a path as a string."""
    return value if isinstance(value, str) else str(fspath(value))  # type: ignore[call-overload]


def _word(value: object, key: str) -> str:
    """Return a value in Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | PathLike):
        if "${" in _text(value):  # which would be replaced each time that the configuration is resolved
            raise InputError(f"{key}={shown(value)} refers to other keys; give it as a text of Hydra, '{key}=...'", key)
        return _string(_text(value))
    if isinstance(value, list | tuple):
        return f"[{','.join(_word(inner, key) for inner in value)}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{_word(inner, key)}" for name, inner in value.items()) + "}"
    raise InputError(
        f"{key}={shown(value)} is a {type(value).__name__}; a value is None, a bool, number, text, list or dict", key
    )


def _string(text: str) -> str:
    """Return a string, in quotes unless Hydra reads it as the same string without them."""
    if BARE.fullmatch(text):
        try:
            if parsed_override(f"key={text}").value() == text and text.lower() not in ("no", "yes", "on", "off"):
                return text
        except HydraException:
            pass
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text)
    return f"'{escaped}'"
