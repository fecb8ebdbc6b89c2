"""Composing configurations, and what Hydra's errors mean in plain words."""

import dataclasses
import difflib
import math
import pickle
import re
import types
import typing
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kd.errors import InputError
from kd.schema import RunSpec
from kd.values import shown

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

    What has been composed before is copied: a plan of several runs asks for the same defaults again and again.

    Raises:
        InputError: for a part, key or value that does not exist.
    """
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    check_overrides(overrides)
    try:
        if GlobalHydra.instance().is_initialized():
            return _compose(overrides)
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            return _compose(overrides)
    except (HydraException, OmegaConfBaseException, *FROM_HYDRA) as error:
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
    except (HydraException, OmegaConfBaseException, *FROM_HYDRA):
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


FROM_HYDRA = (ValueError, TypeError, LookupError, AttributeError, RecursionError, OSError)
"""What Hydra raises for overrides that it has no words for."""

LISTS = ("teacher", "surgery")
"""Groups of which a run may have several, or none."""


def check_overrides(overrides: Sequence[str]) -> None:
    """Check what Hydra has no words for: groups without a name, and deletions of what every run has.

    Raises:
        InputError: naming the key.
    """
    groups = _groups()
    for override in overrides:
        match = re.fullmatch(r"(~|\+\+|\+)?([\w./]+)(?:@[\w.]+)?(?:=(.*))?", override, re.DOTALL)
        if match is None:
            continue
        sign, key, value = match[1] or "", match[2], match[3]
        if sign == "~" and key in _typed_keys() and key not in LISTS:
            raise InputError(f"'{shown(override)}' takes '{key}' away, which every run has; give it a value instead", key)
        if sign == "~" and key in LISTS:
            raise InputError(f"'{shown(override)}': a run without one says so: {key}=[]", key)
        if key in _typed_containers(dict) and (value or "").strip().startswith("["):
            raise InputError(f"'{shown(override)}': {key} takes a mapping, {{name: value}}, and no list", key)
        if key in _typed_containers(list) and (value or "").strip().startswith("{"):
            raise InputError(f"'{shown(override)}': {key} takes a list, [word, ...], and no mapping", key)
        if key not in groups or value is None:
            continue
        text = value.strip()
        if not text.strip("'\"") or re.fullmatch(r"null|\{\s*\}|true|false|[-+]?[\d.]+(e[-+]?\d+)?", text.lower()):
            known = sorted(path.stem for path in (conf_folder() / key).glob("*.yaml"))
            how = f"{key}=[] where there is none, or {key}=[name, ...]" if key in LISTS else f"{key}=<name>"
            raise InputError(f"'{shown(override)}' names no {key}: {how}; there are {', '.join(known)}", key)
        alone = text.startswith("[") and text.count("[") == 1  # several lists are a sweep
        names = [name.strip(" '\"") for name in text.strip("[]").split(",")] if alone else []
        if twice := [name for name in names if name and names.count(name) > 1]:
            raise InputError(f"'{shown(override)}' lists '{twice[0]}' twice", key)
        if key in ("method", "task") and text.startswith("["):
            raise InputError(f"'{shown(override)}': a run has one {key}, named by a word", key)


@cache
def _groups() -> tuple[str, ...]:
    return tuple(folder.name for folder in conf_folder().iterdir() if folder.is_dir() and folder.name != "base")


@cache
def _typed_containers(kind: type) -> frozenset[str]:
    """Keys below a part whose value is a mapping, or a list: Hydra cannot lay one over the other."""
    found = set()
    for name, hint in typing.get_type_hints(RunSpec).items():
        if dataclasses.is_dataclass(hint):
            for key, own in typing.get_type_hints(hint).items():
                if any(typing.get_origin(one) is kind for one in (own, *typing.get_args(own))):
                    found.add(f"{name}.{key}")
    return frozenset(found)


@cache
def _typed_keys() -> frozenset[str]:
    """Keys of the typed specification, which no run lacks."""
    found = set(PARTS)
    for name, hint in typing.get_type_hints(RunSpec).items():
        if dataclasses.is_dataclass(hint):
            found |= {f"{name}.{field.name}" for field in dataclasses.fields(hint)}
    return frozenset(found)


def quoted(override: str) -> str:
    """An override whose value Hydra reads as one word, where it could not read it, or would read several.

    >>> quoted("task.train=a,b.csv"), quoted("seed=1"), quoted("teacher=[]")
    ("task.train='a,b.csv'", 'seed=1', 'teacher=[]')
    """
    from hydra.errors import HydraException

    name, equals, value = override.partition("=")
    try:
        if not equals or not _parsed(override).is_sweep_override():
            return override
    except HydraException:
        pass
    escaped = re.sub(r"(\\*)'", lambda found: found[1] * 2 + "\\'", value)
    return f"{name}='{escaped}'"


def explain(error: BaseException) -> InputError:
    """A Hydra or OmegaConf error in plain words, naming the key."""
    text = str(error).strip()
    cause = str(error.__cause__ or "").strip()
    if isinstance(error, RecursionError):
        return InputError("a value refers to itself: ${...} goes round in a circle, or is nested too deeply")
    if match := re.search(r"item is already at '([\w.@/]+)'", text):
        return InputError(f"'{match[1]}' is there already; leave the plus out: {match[1]}=...", match[1])
    if match := re.search(r"force-add of config groups is not supported: '\+\+([\w/]+)", text):
        return InputError(f"{match[1]} is chosen without plus signs: {match[1]}=...", match[1])
    if match := re.search(r"Multiple values for ([\w@/.]+)", text):
        key = match[1].partition("@")[0]
        return InputError(f"{key} is given twice; give it once, or both as a sweep: --multirun {key}=a,b", key)
    if match := re.search(r"(?:Ambiguous value for argument|is a sweep:) '?([+~]*)([\w.@/]+)=(.*?)'?(?:\n|$)", text):
        _, key, value = match.groups()
        return InputError(
            f"{key}={value} has commas, which are a sweep (--multirun). A list has brackets, a word with commas quotes, and "
            f"the shell needs quotes around both: '{key}=[{value}]', or '{key}=\"{value}\"'",
            key,
        )
    if match := re.search(r"Could not delete (?:from config\. )?'([\w.@/=]+)'", text):
        key = match[1].partition("=")[0]
        return InputError(f"'~{match[1]}' cannot be taken away: {_cause_of_deletion(text)}", key)
    if match := re.search(r"Could not (?:override|append to config\. .*?) '?([\w.@/]+)'?", text):
        return _no_such_key(match.group(1))
    if match := re.search(r"Could not (?:find|load) '(\w+)/([^']*)'", text):
        group, name = match.groups()
        known = sorted(path.stem for path in (conf_folder() / group).glob("*.yaml"))
        hint = f"; there are {', '.join(known)}" if known else ""
        close = difflib.get_close_matches(name, known, n=1)
        return InputError(f"there is no {group} '{shown(name)}'{hint}{_suggest(close)}", group)
    if "${method}_${task}" in text or "must be a string or a list" in text:
        return InputError("a run has one method and one task, each named by a word: method=pkd task=rte", "method")
    if isinstance(error, OverrideParseException):
        key, _, value = str(error.override).partition("=")
        cure = f": '{key}=\"{value}\"'" if value and '"' not in value and len(value) < 100 else ""
        return InputError(
            f"'{shown(error.override)}' is no override: {shown(_first(text), 300)}. Values with brackets, commas, spaces or "
            f"equals signs need quotes, inside those of the shell{cure}",
            key.lstrip("+~") or None,
        )
    if match := re.search(r"full_key: ([\w.\[\]]+)", f"{text}\n{cause}"):
        return InputError(shown(_first(text), 300), match.group(1))
    more = f" ({_first(cause)})" if cause and cause not in text else ""
    return InputError(shown(_first(text) + more, 400) or type(error).__name__)


def _cause_of_deletion(text: str) -> str:
    if "does not match" in text:
        return "it has another value"
    return "no such part was chosen" if "defaults list" in text else "it is not there"


def _no_such_key(key: str) -> InputError:
    """The error for a key that the configuration does not have: the one that was meant, or how it is added."""
    added = f"an entry that is not there yet is added with a plus: '+{key}=...'"
    if key.startswith("teacher."):
        name = key.split(".")[1]
        own = conf_folder() / "teacher" / f"{name}.yaml"
        if not own.is_file():
            return InputError(f"there is no key '{key}': teacher=[...] does not list '{name}'", "teacher")
        below = key.removeprefix(f"teacher.{name}.run.")
        if (below != key and below in _all_keys()) or key.removeprefix(f"teacher.{name}.") in ("labels", "model", "backbone"):
            return InputError(f"'{key}' is not set by conf/teacher/{name}.yaml, if teacher=[...] lists '{name}': {added}", key)
        close = difflib.get_close_matches(key, _all_keys(), n=1, cutoff=0.75)
        listed = _suggest(close) if close and close != [key] else f"; does teacher=[...] list '{name}'?"
        return InputError(f"there is no key '{key}'{listed}", key)
    if key in _all_keys() or key in _typed_keys() or (key.rpartition(".")[0] in OPEN and not _meant(key)):
        group = key.partition(".")[0]
        return InputError(
            f"the chosen {group} has no key '{key}' (another one has), or it cannot take this value. conf/{group}/ holds the "
            f"keys of each; {added}",
            key,
        )
    return InputError(f"there is no key '{key}'{_suggest(_meant(key))}", key)


OPEN = ("method", "method.before", "method.weights", "engine", "optimizer.factory", "task.source", "task.codes", "logger.extra")
"""Mappings that hold whatever their class takes."""


def _meant(key: str) -> list[str]:
    """Keys that somebody may have meant: one that is spelt like it, or those whose last part it is."""
    last = key.rpartition(".")[2]
    close = [
        known
        for known in difflib.get_close_matches(key, _all_keys(), n=3, cutoff=0.75)
        if difflib.SequenceMatcher(None, last, known.rpartition(".")[2]).ratio() >= 0.6  # long paths are alike by their parts
    ][:1]
    if close or "." in key:
        return close
    same = [known for known in _all_keys() if known.rpartition(".")[2] == key]
    if not same:
        lasts = difflib.get_close_matches(key, {known.rpartition(".")[2] for known in _all_keys()}, n=1, cutoff=0.8)
        same = [known for known in _all_keys() if known.rpartition(".")[2] in lasts]
    return sorted(same, key=lambda known: (known.count("."), not known.startswith(("optimizer.", "trainer.", "method."))))[:4]


LIBRARY_WORDS = ("full_key:", "object_type=", "reference_type=", "See https://")


def _first(text: str) -> str:
    """The first lines of a library's message, without what only its authors understand."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith(LIBRARY_WORDS)]
    return " ".join(lines[:2]).replace(" is not in struct", " does not exist")


def _suggest(close: Sequence[str]) -> str:
    return f". Did you mean {' or '.join(repr(each) for each in close)}?" if close else ""


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
        check_plain(known)
        check_types(known, RunSpec)
        return RunSpec(**_typed_parts(known))
    except RecursionError as error:
        raise InputError("a value refers to itself: ${...} goes round in a circle, or is nested too deeply") from error
    except OverflowError as error:
        raise InputError(f"a number is too large ({error})") from error
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


DEEPEST = 32
"""Levels of nested values."""
LONGEST = 16_384
"""Characters of a word."""
MOST_ENTRIES = 100_000
"""Entries of a list or a mapping."""


def check_plain(value: Any, key: str = "", depth: int = 0) -> None:
    """Check what no value may be, whatever its key: a number that is not finite, or text that no file can hold.

    Raises:
        InputError: naming the key.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{key}={value} is not finite", key)
    if isinstance(value, int) and value.bit_length() > 1000:
        raise InputError(f"{key}={shown(value)} is too large", key)
    if isinstance(value, str):
        if len(value) > LONGEST:
            raise InputError(f"{key}={shown(value)} has {len(value)} characters, more than {LONGEST}", key)
        if "\0" in value:
            raise InputError(f"{key}={shown(value)} has a zero byte", key)
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise InputError(f"{key}={shown(ascii(value))} is not valid Unicode", key)
    if isinstance(value, dict | list):
        if depth > DEEPEST:
            raise InputError(f"{key} is nested too deeply", key)
        if len(value) > MOST_ENTRIES:
            raise InputError(f"{key} has {len(value)} entries, more than {MOST_ENTRIES}", key)
        entries = value.items() if isinstance(value, dict) else ((None, each) for each in value)
        for name, inner in entries:
            numbered = type(name) is int and key.rpartition(".")[2] in ("train", "validation", "test")  # a file for each class
            if name is not None and not numbered and (not isinstance(name, str) or not name):
                raise InputError(f"{key} has the key {name!r}, which is no word; quote it", key)
            if name is not None:
                check_plain(name, key, depth + 1)
            check_plain(inner, key if name is None else f"{key}.{name}".lstrip("."), depth + 1)


def check_types(values: Mapping[str, Any], part: Any, prefix: str = "") -> None:
    """Check what OmegaConf would turn into another type without a word: a number into a truth value, a truth value into text.

    Args:
        values: of a part of the configuration.
        part: its dataclass.
        prefix: of its keys.

    Raises:
        InputError: naming the key.
    """
    for name, hint in typing.get_type_hints(part).items():
        if name in values:
            _check_type(values[name], hint, prefix + name)


def _check_type(value: Any, hint: Any, key: str) -> None:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if value is None:
            return
        (hint,) = (each for each in typing.get_args(hint) if each is not type(None))
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        check_types(value, hint, f"{key}.")
    elif typing.get_origin(hint) is dict and isinstance(value, dict):
        for name, inner in value.items():
            if dataclasses.is_dataclass(typing.get_args(hint)[1]) and not isinstance(inner, dict):
                raise InputError(f"{key}.{name}={shown(inner)} is no mapping of keys", f"{key}.{name}")
            _check_type(inner, typing.get_args(hint)[1], f"{key}.{name}")
    elif typing.get_origin(hint) is list and isinstance(value, list):
        for inner in value:
            if inner is None or isinstance(inner, dict | list):
                raise InputError(f"{key}={shown(value)} is a list of words; {shown(inner)} is none", key)
            _check_type(inner, str, key)
    elif typing.get_origin(hint) is list:
        raise InputError(f"{key}={shown(value)} takes a list: {as_list(value, key)}", key)
    elif hint is str and isinstance(value, bool | float):
        raise InputError(f"{key}={shown(value)} is a {_kind(value)}, not a word; a word that looks like one needs quotes", key)
    elif hint is bool and str(value).lower() not in TRUTHS and not isinstance(value, list | dict) and value is not None:
        raise InputError(f"{key}={shown(value)} is neither true nor false", key)


def as_list(value: Any, key: str) -> str:
    """An override, in quotes for the shell, that gives a list in place of a single word.

    >>> print(as_list("text", "task.text"), as_list("no, yes", "task.labels"), as_list(True, "task.text"))
    'task.text=[text]' 'task.labels=[no, yes]' 'task.text=["true"]'
    """
    from hydra.errors import HydraException

    if not isinstance(value, bool | int | float | str) or not str(value).strip():
        return f"'{key}=[...]'"
    meant = shown(value)
    try:
        words = _parsed(f"{key}=[{meant}]").value()
    except HydraException:
        words = [None]
    if any(each is None or isinstance(each, bool | float | dict | list) for each in words):  # no words without quotes
        meant = '"' + meant.replace('"', '\\"') + '"'
    return f"'{key}=[{meant}]'"


TRUTHS = ("true", "false", "yes", "no", "on", "off", "y", "n", "1", "0")
"""What OmegaConf takes for a truth value; it would take any other number for true as well."""


def _kind(value: Any) -> str:
    return "truth value" if isinstance(value, bool) else "number"
