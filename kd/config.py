"""Composing configurations, and what Hydra's errors mean in plain words."""

import difflib
import pickle
import re
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kd.errors import InputError
from kd.schema import RunSpec

ROOT = "train"
PARTS = tuple(RunSpec.__dataclass_fields__)
ROOT_VALUES = ("seed", "backbone", "cache", "preflight", "resume")
"""Keys of the root that are no parts: no file is chosen by them."""


def conf_folder() -> Path:
    """The configuration tree: inside an installed wheel, or beside the package in a checkout."""
    installed = Path(__file__).parent / "conf"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "conf"


def compose(overrides: Sequence[str]) -> DictConfig:
    """The configuration of these overrides. Inside a Hydra job it sees what the job sees, `--config-dir` included.

    Raises:
        InputError: for a part, key or value that does not exist.
    """
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    try:
        if GlobalHydra.instance().is_initialized():
            return _compose(overrides)
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            return _compose(overrides)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise explain(error) from error


def _compose(overrides: Sequence[str]) -> DictConfig:
    """As Hydra composes. Files are read and merged once for each choice of parts: runs of a sweep differ in values."""
    from hydra import compose as hydra_compose
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    try:
        parsed = [_parsed(override) for override in overrides]
        values = [each for each in parsed if _is_value(each)]
        chosen = tuple(override for override, each in zip(overrides, parsed, strict=True) if not _is_value(each))
        if any(
            isinstance(each.value(), dict) for each in parsed if not _is_value(each)
        ):  # a part given as a whole, in its turn
            return hydra_compose(ROOT, list(overrides))
        place = str(GlobalHydra.instance().config_loader().get_search_path())
        config: DictConfig = pickle.loads(_composed(place, chosen))
        ConfigLoaderImpl._apply_overrides_to_config(values, config)  # Hydra's own last step, in the order of the command line
    except (HydraException, OmegaConfBaseException, ValueError):
        return hydra_compose(ROOT, list(overrides))  # which says what is wrong with the whole
    return config


@lru_cache(maxsize=4096)
def _parsed(override: str) -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (parsed,) = OverridesParser.create().parse_overrides([override])
    return parsed


def _is_value(override: Any) -> bool:
    """Whether a parsed override sets a value below a part, or one of the root's own; others may choose which files are read."""
    key: str = override.key_or_group
    inside = "." in key and not key.startswith("hydra.") and "/" not in key
    return override.package is None and (inside or key in ROOT_VALUES)


@lru_cache(maxsize=64)
def _composed(place: str, overrides: tuple[str, ...]) -> bytes:
    """A pickled configuration: reading it back is ten times faster than a deep copy.

    Args:
        place: where files are searched for.
        overrides: that choose parts.
    """
    from hydra import compose as hydra_compose

    return pickle.dumps(hydra_compose(ROOT, list(overrides)))


def explain(error: BaseException) -> InputError:
    """A Hydra or OmegaConf error in plain words, naming the key."""
    text = str(error).strip()
    cause = str(error.__cause__ or "").strip()
    if match := re.search(r"Could not (?:override|append to config\. .*?) '?([\w.@/]+)'?", text):
        return _no_such_key(match.group(1))
    if match := re.search(r"Could not (?:find|load) '(\w+)/([^']+)'", text):
        group, name = match.groups()
        known = sorted(path.stem for path in (conf_folder() / group).glob("*.yaml"))
        hint = f"; there are {', '.join(known)}" if known else ""
        close = difflib.get_close_matches(name, known, n=1)
        return InputError(f"there is no {group} '{name}'{hint}{_suggest(close)}", group)
    if "${method}_${task}" in text or "must be a string or a list" in text:
        return InputError("a run has one method and one task, each named by a word: method=pkd task=rte", "method")
    if isinstance(error, OverrideParseException):
        return InputError(
            f"'{error.override}' is no override: {_first(text)}. Values with brackets, commas or equals signs need quotes",
            str(error.override).partition("=")[0].lstrip("+~"),
        )
    if "is not a ListConfig" in text:
        key = re.search(r"full_key: ([\w.]+)", f"{text}\n{cause}") or re.search(r"(task\.text)", "task.text")
        name = key.group(1) if key else ""
        return InputError(f"{name} takes a list: '{name}=[...]'", name)
    if match := re.search(r"full_key: ([\w.\[\]]+)", f"{text}\n{cause}"):
        return InputError(_first(text), match.group(1))
    return InputError(_first(text) + (f" ({_first(cause)})" if cause and cause not in text else ""))


def _no_such_key(key: str) -> InputError:
    if key.startswith("teacher."):
        name = key.split(".")[1]
        own = conf_folder() / "teacher" / f"{name}.yaml"
        if not own.is_file():
            return InputError(f"there is no key '{key}': teacher=[...] does not list '{name}'", "teacher")
        close = difflib.get_close_matches(key, _all_keys(), n=1, cutoff=0.75)
        listed = _suggest(close) if close and close != [key] else f"; does teacher=[...] list '{name}'?"
        return InputError(f"there is no key '{key}'{listed}", key)
    if key in _all_keys():
        group = key.partition(".")[0]
        return InputError(
            f"the chosen {group} has no key '{key}' (another one has), or it cannot take this value. conf/{group}/ holds the "
            f"keys of each; an entry that is not there yet is added with +{key}=...",
            key,
        )
    return InputError(f"there is no key '{key}'{_suggest(difflib.get_close_matches(key, _all_keys(), n=1, cutoff=0.75))}", key)


LIBRARY_WORDS = ("full_key:", "object_type=", "reference_type=", "See https://")


def _first(text: str) -> str:
    """The first lines of a library's message, without what only its authors understand."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith(LIBRARY_WORDS)]
    return " ".join(lines[:2]).replace(" is not in struct", " does not exist")


def _suggest(close: Sequence[str]) -> str:
    return f". Did you mean '{close[0]}'?" if close else ""


@cache
def _all_keys() -> list[str]:
    """Every key that a default configuration has, for suggestions; read as YAML, without composing."""
    keys: list[str] = list(PARTS)
    for file in conf_folder().glob("*/*.yaml"):
        group = {"base": file.stem}.get(file.parent.name, file.parent.name)
        group = {"classification": "task", "regression": "task", "masked_lm": "task"}.get(group, group)
        content = OmegaConf.to_container(OmegaConf.load(file))
        if isinstance(content, dict):
            keys += [f"{group}.{path}" for path in _paths(content)]
    return sorted(set(keys))


def _paths(node: dict[Any, Any], prefix: str = "") -> list[str]:
    found = []
    for name, value in node.items():
        found.append(f"{prefix}{name}")
        if isinstance(value, dict):
            found += _paths(value, f"{prefix}{name}.")
    return found


def typed(config: DictConfig) -> RunSpec:
    """The configuration as dataclasses, every value of its type.

    Raises:
        InputError: naming the key of a value that has the wrong type, or is missing.
    """
    try:
        plain = OmegaConf.to_container(config, resolve=True)
        assert isinstance(plain, dict)
        for name in map(str, plain):
            if name not in (*PARTS, "hydra"):
                raise _no_such_key(name)
        return RunSpec(**_typed_parts({name: value for name, value in plain.items() if name in PARTS}))
    except OmegaConfBaseException as error:
        raise explain(error) from error


_parts: dict[tuple[str, bytes], bytes] = {}
"""Name and pickled value of a part -> the same with every value of its type. Runs of a sweep differ in a part or two."""


def _typed_parts(values: dict[str, Any]) -> dict[str, Any]:
    """Each part of a resolved configuration as its dataclass, made anew for each caller."""
    keys = {name: (name, pickle.dumps(values[name]) if name in values else b"") for name in PARTS}
    new = [name for name, key in keys.items() if key not in _parts]
    if new:
        merged: Any = OmegaConf.merge(_schema(), {name: value for name, value in values.items() if name in new})
        for missing in sorted(OmegaConf.missing_keys(merged)):
            if missing.partition(".")[0] in new:
                raise InputError(f"'{missing}' has no value", missing)
        if len(_parts) > 4096:
            _parts.clear()
        for name in new:
            part = merged[name]
            _parts[keys[name]] = pickle.dumps(OmegaConf.to_object(part) if OmegaConf.is_config(part) else part)
    return {name: pickle.loads(_parts[key]) for name, key in keys.items()}


@cache
def _schema() -> DictConfig:
    schema: DictConfig = OmegaConf.structured(RunSpec)
    return schema
