"""Lists of values of keys of kd-train in a YAML file: the axes of a table's products, and the parameters of a search space."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from kd.config.compose import conf_folder
from kd.config.values import shown
from kd.errors import InputError


def definition_names(group: str) -> list[str]:
    """Return the names of the files of a folder of `conf`."""
    return sorted(path.stem for path in (conf_folder() / group).glob("*.yaml"))


def read_definition(name: str, group: str, noun: str, key: str) -> tuple[str, Any]:
    """Read a YAML file of the package or of the user; return its stem and its content.

    Args:
        name: name of a file of the package, or the path of a YAML file.
        group: folder of the package's files in `conf`.
        noun: the file's kind, for errors.
        key: key of the errors.

    Raises:
        InputError: if there is no such file, or it is not YAML.
    """
    folder, names = conf_folder() / group, definition_names(group)
    path = Path(name).expanduser() if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    try:
        return path.stem, yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(names) or 'none'}"
        reason = hint if path.parent == folder else error.strerror
        raise InputError(f"no {noun} '{shown(name)}': {reason}", key) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"'{path}' is not YAML: {' '.join(str(error).split())}", key) from error


def choice(axis: str, value: Any, key: str) -> tuple[str, list[str]]:
    """Return the label of a value of an axis, and its overrides.

    A word `w` is the override `axis=w`; a mapping `{label: [overrides]}` names a list of overrides.

    Args:
        axis: key of kd-train, or the name of what the mappings choose.
        value: the value in the file.
        key: key of the value in the file, for errors.

    Raises:
        InputError: for a mapping that is not one list of overrides with a label.

    >>> choice("optimizer.lr", 2e-5, "lr"), choice("alpha", {0.2: ["method.weights.logits=0.2"]}, "alpha")
    (('2e-05', ['optimizer.lr=2e-05']), ('0.2', ['method.weights.logits=0.2']))
    """
    if isinstance(value, Mapping):
        if len(value) != 1:
            raise InputError(f"{key} names one list of overrides at a time, as {{label: [a=1, b=2]}}, not {len(value)}", key)
        ((label, overrides),) = value.items()
        return str(label), words(overrides, key)
    if isinstance(value, list):  # a list group, such as teacher: [[a, b]]
        return "+".join(map(str, value)), [f"{axis}=[{','.join(map(str, value))}]"]
    word = _plain(value)
    return word, [f"{axis}={word}"]


def _plain(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def mapping(value: Any, key: str, allowed: Sequence[str] | None = None) -> Mapping[str, Any]:
    """Return a value that is a mapping.

    Raises:
        InputError: if it is none, or has a key that is not allowed.
    """
    if not isinstance(value, Mapping):
        raise InputError(f"{key} is {value!r}, where a mapping is needed", key)
    for name in value:
        if allowed is not None and name not in allowed:
            raise InputError(f"{key} has a key '{name}'; it may have {', '.join(allowed)}", f"{key}.{name}")
    return value


def entries(value: Any, key: str) -> list[Any]:
    """Return a value that is a list.

    Raises:
        InputError: if it is none.
    """
    if not isinstance(value, list):
        raise InputError(f"{key} is {value!r}, where a list is needed", key)
    return value


def words(value: Any, key: str) -> list[str]:
    """Return a value that is a list of overrides.

    Raises:
        InputError: if it is none.
    """
    listed = entries(value, key)
    for word in listed:
        if not isinstance(word, str):
            raise InputError(f"{key} has {word!r}, where an override such as optimizer.lr=1e-4 is needed", key)
    return listed
