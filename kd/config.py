"""Composing configurations, and what Hydra's errors mean in plain words."""

import difflib
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kd.errors import InputError
from kd.schema import RunSpec

ROOT = "train"
PARTS = tuple(RunSpec.__dataclass_fields__)


def conf_folder() -> Path:
    """The configuration tree: inside an installed wheel, or beside the package in a checkout."""
    installed = Path(__file__).parent / "conf"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "conf"


def compose(overrides: Sequence[str]) -> DictConfig:
    """The configuration of these overrides. Inside a Hydra job it sees what the job sees, `--config-dir` included.

    Raises:
        InputError: for a part, key or value that does not exist.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    try:
        if GlobalHydra.instance().is_initialized():
            return hydra_compose(ROOT, list(overrides))
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            return hydra_compose(ROOT, list(overrides))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise explain(error) from error


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
        known = {name: value for name, value in plain.items() if name in PARTS}
        merged = OmegaConf.merge(OmegaConf.structured(RunSpec), known)
        for missing in sorted(OmegaConf.missing_keys(merged)):
            raise InputError(f"'{missing}' has no value", missing)
        spec = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise explain(error) from error
    assert isinstance(spec, RunSpec)
    return spec
