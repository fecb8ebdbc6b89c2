"""Composition and validation of configurations; Hydra's errors in plain words."""

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
from typing import TYPE_CHECKING, Any

from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kd.config.mixture import expand
from kd.config.nodes import nested
from kd.config.schema import RunSpec, TaskSpec, TeacherSpec
from kd.config.values import shown
from kd.errors import InputError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

ROOT = "train"
PARTS = tuple(RunSpec.__dataclass_fields__)
ROOT_VALUES = ("seed", "backbone", "cache", "preflight", "resume")
"""Top-level keys that hold a value and do not choose a configuration file."""


def conf_folder() -> Path:
    """Return the folder of configuration files: inside an installed wheel, or beside the package in a checkout."""
    package = Path(__file__).parent.parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def compose(overrides: Sequence[str]) -> DictConfig:
    """Compose the configuration of these overrides; inside a Hydra job with the job's search path, `--config-dir` included.

    Compositions are cached and copied: planning several runs composes the same defaults many times.

    Raises:
        InputError: for a group, key or value that does not exist.
    """
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    check_overrides(overrides)
    overrides = expand(overrides)
    try:
        if GlobalHydra.instance().is_initialized():
            return _compose(overrides)
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            return _compose(overrides)
    except (HydraException, OmegaConfBaseException, *FROM_HYDRA) as error:
        raise explain(error) from error


def _compose(overrides: Sequence[str]) -> DictConfig:
    """Compose as Hydra does, but read and merge the files once per choice of groups: runs of a sweep differ in values."""
    from hydra import compose as hydra_compose
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import ConfigCompositionException, HydraException

    try:
        parsed = [parsed_override(override) for override in overrides]
        values = [entry for entry in parsed if _is_value(entry)]
        chosen = tuple(override for override, entry in zip(overrides, parsed, strict=True) if not _is_value(entry))
        # A group that is given as a mapping is merged in the order of the command line, which only Hydra does.
        if any(isinstance(entry.value(), dict) for entry in parsed if not _is_value(entry)):
            return hydra_compose(ROOT, list(overrides))
        search_path = str(GlobalHydra.instance().config_loader().get_search_path())
        config: DictConfig = pickle.loads(_composed(search_path, chosen))
    except (HydraException, OmegaConfBaseException, *FROM_HYDRA):
        return hydra_compose(ROOT, list(overrides))  # raises the error for all overrides
    try:
        ConfigLoaderImpl._apply_overrides_to_config(values, config)  # Hydra's own last step, in the order of the command line
    except (HydraException, OmegaConfBaseException, *FROM_HYDRA) as error:
        if isinstance(error, ConfigCompositionException) and not any(entry.is_sweep_override() for entry in values):
            raise
        return hydra_compose(ROOT, list(overrides))  # refuses sweeps before that step, in other words
    return config


@lru_cache(maxsize=4096)
def parsed_override(override: str) -> "Override":
    """Return Hydra's reading of an override.

    Raises:
        OverrideParseException: if it is no valid override.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (parsed,) = OverridesParser.create().parse_overrides([override])
    return parsed


def _is_value(override: "Override") -> bool:
    """Return True if a parsed override only sets a value; any other may change which files are read."""
    key: str = override.key_or_group
    inside = "." in key and not key.startswith("hydra.") and "/" not in key
    return override.package is None and (inside or key in ROOT_VALUES)


@lru_cache(maxsize=256)
def _composed(search_path: str, overrides: tuple[str, ...]) -> bytes:
    """Return a pickled configuration: unpickling it is ten times faster than a deep copy.

    Args:
        search_path: Hydra's search path, as part of the cache's key.
        overrides: the overrides that choose files.
    """
    from hydra import compose as hydra_compose

    return pickle.dumps(hydra_compose(ROOT, list(overrides)))


FROM_HYDRA = (ValueError, TypeError, LookupError, AttributeError, RecursionError, OSError)
"""Exceptions that Hydra raises for invalid overrides without a message of its own."""

LISTS = ("teacher", "surgery", "edit", "logger")
"""Groups from which a run may choose several entries, or none."""


def check_overrides(overrides: Sequence[str]) -> None:
    """Check overrides for mistakes that Hydra reports unclearly: groups without a name, deletions of required keys.

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
            raise InputError(f"'{shown(override)}' deletes '{key}', which every run needs; give it a value instead", key)
        if sign == "~" and key in LISTS:
            raise InputError(f"'{shown(override)}': for a run without one, use {key}=[]", key)
        if key in _typed_containers(dict) and (value or "").strip().startswith("["):
            raise InputError(f"'{shown(override)}': {key} takes a mapping, {{name: value}}, and no list", key)
        if key in _typed_containers(list) and (value or "").strip().startswith("{"):
            raise InputError(f"'{shown(override)}': {key} takes a list, [word, ...], and no mapping", key)
        if key not in groups or value is None:
            continue
        text = value.strip()
        if not text.strip("'\"") or re.fullmatch(r"null|\{\s*\}|true|false|[-+]?[\d.]+(e[-+]?\d+)?", text.lower()):
            available = sorted(path.stem for path in (conf_folder() / key).glob("*.yaml"))
            how = f"{key}=[] where there is none, or {key}=[name, ...]" if key in LISTS else f"{key}=<name>"
            raise InputError(f"'{shown(override)}' names no {key}: {how}; there are {', '.join(available)}", key)
        alone = text.startswith("[") and text.endswith("]") and text.count("[") == 1  # several lists are a sweep
        names = [name.strip(" '\"") for name in text.strip("[]").split(",")] if alone else []
        if twice := [name for name in names if name and names.count(name) > 1]:
            raise InputError(f"'{shown(override)}' lists '{twice[0]}' twice", key)
        if key == "method" and text.startswith("["):
            raise InputError(f"'{shown(override)}': a run has one method, named by a word", key)
        if key == "task" and alone and not any(names):
            raise InputError(f"'{shown(override)}' names no task: task=rte, or for a mixture 'task=[sst2,rte]'", key)


NO_GROUPS = ("base", "table", "tune")
"""Folders of the tree that are no groups of a run: parts of other files, and tables of papers."""


@cache
def _groups() -> tuple[str, ...]:
    return tuple(folder.name for folder in conf_folder().iterdir() if folder.is_dir() and folder.name not in NO_GROUPS)


@cache
def _typed_containers(kind: type) -> frozenset[str]:
    """Return the keys whose value is a mapping, or a list: Hydra cannot merge one into the other."""
    keys = set()
    for name, hint in typing.get_type_hints(RunSpec).items():
        if dataclasses.is_dataclass(hint):
            for key, inner in typing.get_type_hints(hint).items():
                if any(typing.get_origin(option) is kind for option in (inner, *typing.get_args(inner))):
                    keys.add(f"{name}.{key}")
    return frozenset(keys)


@cache
def _typed_keys() -> frozenset[str]:
    """Return the keys of the typed specification, which every run has."""
    keys = set(PARTS)
    for name, hint in typing.get_type_hints(RunSpec).items():
        if dataclasses.is_dataclass(hint):
            keys |= {f"{name}.{field.name}" for field in dataclasses.fields(hint)}
    return frozenset(keys)


def quoted(override: str) -> str:
    """Return an override with its value quoted if Hydra could not parse it, or would parse it as several values.

    >>> quoted("task.train=a,b.csv"), quoted("seed=1"), quoted("teacher=[]")
    ("task.train='a,b.csv'", 'seed=1', 'teacher=[]')
    """
    from hydra.errors import HydraException

    name, equals, value = override.partition("=")
    try:
        if not equals or not parsed_override(override).is_sweep_override():
            return override
    except HydraException:
        pass
    escaped = re.sub(r"(\\*)'", lambda match: match[1] * 2 + "\\'", value)
    return f"{name}='{escaped}'"


def explain(error: BaseException) -> InputError:
    """Return a Hydra or OmegaConf error in plain words, naming the key."""
    text = str(error).strip()
    cause = str(error.__cause__ or "").strip()
    if isinstance(error, RecursionError):
        return InputError("a value refers to itself: ${...} is circular, or nested too deeply")
    if match := re.search(r"item is already at '([\w.@/]+)'", text):
        return InputError(f"'{match[1]}' exists already; leave the plus out: {match[1]}=...", match[1])
    if match := re.search(r"force-add of config groups is not supported: '\+\+([\w/]+)", text):
        return InputError(f"{match[1]} is chosen without plus signs: {match[1]}=...", match[1])
    if match := re.search(r"Multiple values for ([\w@/.]+)", text):
        key = match[1].partition("@")[0]
        return InputError(f"{key} is given twice; give it once, or both as a sweep: --multirun {key}=a,b", key)
    if match := re.search(r"(?:Ambiguous value for argument|is a sweep:) '?([+~]*)([\w.@/]+)=(.*?)'?(?:\n|$)", text):
        _, key, value = match.groups()
        return InputError(
            f"{key}={value} has commas, which mean a sweep (--multirun). A list has brackets, a word with commas quotes, and "
            f"the shell needs quotes around both: '{key}=[{value}]', or '{key}=\"{value}\"'",
            key,
        )
    if match := re.search(r"Could not delete (?:from config\. )?'([\w.@/=]+)'", text):
        key = match[1].partition("=")[0]
        return InputError(f"'~{match[1]}' cannot be deleted: {_cause_of_deletion(text)}", key)
    if match := re.search(r"Could not (?:override|append to config\. .*?) '?([\w.@/]+)'?", text):
        return _no_such_key(match.group(1))
    if match := re.search(r"Could not (?:find|load) '(\w+)/([^']*)'", text):
        group, name = match.groups()
        available = sorted(path.stem for path in (conf_folder() / group).glob("*.yaml"))
        hint = f"; there are {', '.join(available)}" if available else ""
        close = difflib.get_close_matches(name, available, n=1)
        return InputError(f"there is no {group} '{shown(name)}'{hint}{_suggest(close)}", group)
    if "${method}_${task}" in text or "must be a string or a list" in text:
        return InputError("a run has one method and one task, each named by a word: method=pkd task=rte", "method")
    if isinstance(error, OverrideParseException):
        key, _, value = str(error.override).partition("=")
        cure = f": '{key}=\"{value}\"'" if value and '"' not in value and len(value) < 100 else ""
        return InputError(
            f"'{shown(error.override)}' is no valid override: {shown(_first(text), 300)}. Values with brackets, commas, spaces "
            f"or equals signs need quotes, inside the quotes of the shell{cure}",
            key.lstrip("+~") or None,
        )
    if match := re.search(r"full_key: ([\w.\[\]]+)", f"{text}\n{cause}"):
        return InputError(shown(_first(text), 300), match.group(1))
    more = f" ({_first(cause)})" if cause and cause not in text else ""
    return InputError(shown(_first(text) + more, 400) or type(error).__name__)


def _cause_of_deletion(text: str) -> str:
    if "does not match" in text:
        return "its value is another"
    return "no such part was chosen" if "defaults list" in text else "it does not exist"


def _no_such_key(key: str) -> InputError:
    """Return the error for a key that does not exist, with the closest existing key or the way to add it."""
    added = f"add a new entry with a plus: '+{key}=...'"
    if key.startswith("teacher."):
        name = key.split(".")[1]
        own = conf_folder() / "teacher" / f"{name}.yaml"
        if not own.is_file():
            return InputError(f"there is no key '{key}': teacher=[...] does not list '{name}'", "teacher")
        below, last = key.removeprefix(f"teacher.{name}.run."), key.removeprefix(f"teacher.{name}.")
        if (below != key and below in _all_keys()) or last in ("labels", "model", "backbone", "student_backbone", "member"):
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
"""Mappings with arbitrary keys: the arguments of the class that they configure."""


def _meant(key: str) -> list[str]:
    """Return the keys that were probably meant: one with a similar spelling, or those that end in this word."""
    last = key.rpartition(".")[2]
    close = [
        match
        for match in difflib.get_close_matches(key, _all_keys(), n=3, cutoff=0.75)
        if difflib.SequenceMatcher(None, last, match.rpartition(".")[2]).ratio() >= 0.6  # long keys match by shared prefixes
    ][:1]
    if close or "." in key:
        return close
    same = [existing for existing in _all_keys() if existing.rpartition(".")[2] == key]
    if not same:
        lasts = difflib.get_close_matches(key, {existing.rpartition(".")[2] for existing in _all_keys()}, n=1, cutoff=0.8)
        same = [existing for existing in _all_keys() if existing.rpartition(".")[2] in lasts]
    return sorted(same, key=lambda name: (name.count("."), not name.startswith(("optimizer.", "trainer.", "method."))))[:4]


LIBRARY_WORDS = ("full_key:", "object_type=", "reference_type=", "See https://")


def _first(text: str) -> str:
    """Return the first two lines of a library's message, without lines about its internals."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith(LIBRARY_WORDS)]
    return " ".join(lines[:2]).replace(" is not in struct", " does not exist")


def _suggest(close: Sequence[str]) -> str:
    return f". Did you mean {' or '.join(repr(key) for key in close)}?" if close else ""


@cache
def _all_keys() -> list[str]:
    """Return every key of the default configuration files, for suggestions; read as YAML, without composing."""
    keys: list[str] = list(PARTS)
    for file in conf_folder().glob("*/*.yaml"):
        if file.parent.name in NO_GROUPS[1:]:
            continue
        group = {"base": file.stem}.get(file.parent.name, file.parent.name)
        group = {"classification": "task", "regression": "task", "masked_lm": "task", "edit": "task.edits"}.get(group, group)
        content = OmegaConf.to_container(OmegaConf.load(file))
        if isinstance(content, dict):
            keys += [f"{group}.{path}" for path in _paths(content)]
    return sorted(set(keys))


def _paths(node: dict[Any, Any], prefix: str = "") -> list[str]:
    paths = []
    for name, value in node.items():
        paths.append(f"{prefix}{name}")
        if isinstance(value, dict):
            paths += _paths(value, f"{prefix}{name}.")
    return paths


def typed(config: DictConfig) -> RunSpec:
    """Return the configuration as dataclasses, with every value converted to its type.

    Raises:
        InputError: naming the key of a value that has the wrong type, or is missing.
    """
    try:
        plain = OmegaConf.to_container(config, resolve=True)
        assert isinstance(plain, dict)
        for name in map(str, plain):
            if name not in (*PARTS, "hydra"):
                raise _no_such_key(name)
        parts = {name: value for name, value in plain.items() if name in PARTS}
        check_plain(parts)
        check_types(parts, RunSpec)
        return RunSpec(**_typed_parts(parts))
    except RecursionError as error:
        raise InputError("a value refers to itself: ${...} is circular, or nested too deeply") from error
    except OverflowError as error:
        raise InputError(f"a number is too large ({error})") from error
    except OmegaConfBaseException as error:
        raise explain(error) from error


_parts: dict[tuple[str, bytes], bytes] = {}
"""Cache: name and pickled value of a part -> pickled typed part. Runs of a sweep differ in only a part or two."""


def _typed_parts(values: dict[str, Any]) -> dict[str, Any]:
    """Return each part of a resolved configuration as its dataclass, a new object at every call."""
    keys = {name: (name, pickle.dumps(values[name]) if name in values else b"") for name in PARTS}
    new = [name for name, key in keys.items() if key not in _parts]
    if new:
        merged: Any = pickle.loads(_schema(_names(values.get("teacher")), _names(nested(values, "task.of"))))
        merged.merge_with({name: values[name] for name in new if name in values})
        for missing in sorted(missing for name in new for missing in _missing(merged, name)):
            raise InputError(f"'{missing}' has no value", missing)
        if len(_parts) > 4096:
            _parts.clear()
        for name in new:
            part = merged[name]
            _parts[keys[name]] = pickle.dumps(OmegaConf.to_object(part) if OmegaConf.is_config(part) else part)
    return {name: pickle.loads(_parts[key]) for name, key in keys.items()}


def _names(entries: object) -> tuple[str, ...]:
    return tuple(entries) if isinstance(entries, dict) else ()


def _missing(config: DictConfig, name: str) -> set[str]:
    """Return the keys without a value of one part of a configuration."""
    if OmegaConf.is_missing(config, name):
        return {name}
    return OmegaConf.missing_keys(config[name]) if OmegaConf.is_config(config[name]) else set()


@lru_cache(maxsize=64)
def _schema(teachers: tuple[str, ...], tasks: tuple[str, ...]) -> bytes:
    """Return the pickled structured configuration of a run with these teachers, and these tasks of a mixture.

    It is pickled because values are merged into it, and a copy takes longer. OmegaConf makes the nodes of frozen dataclasses
    read-only, and so no values could be merged into them.
    """
    schema: DictConfig = OmegaConf.structured(RunSpec)
    OmegaConf.set_readonly(schema, False)

    def fill(parent: Any, kinds: Mapping[str, Any]) -> None:
        for name, kind in kinds.items():
            parent[name] = kind
            OmegaConf.set_readonly(parent[name], False)

    fill(schema, {name: hint for name, hint in typing.get_type_hints(RunSpec).items() if dataclasses.is_dataclass(hint)})
    fill(schema.teacher, dict.fromkeys(teachers, TeacherSpec))
    fill(schema.task.of, dict.fromkeys(tasks, TaskSpec))
    return pickle.dumps(schema)


DEEPEST = 32
"""Largest nesting depth of a value."""
LONGEST = 16_384
"""Largest number of characters of a string."""
MOST_ENTRIES = 100_000
"""Largest number of entries of a list or a mapping."""


def check_plain(value: object, key: str = "", depth: int = 0) -> None:
    """Check that values are valid whatever their key: finite numbers, valid text, moderate nesting and size.

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
        entries = value.items() if isinstance(value, dict) else ((None, entry) for entry in value)
        for name, inner in entries:
            numbered = type(name) is int and key.rpartition(".")[2] in ("train", "validation", "test")  # a file for each class
            if name is not None and not numbered and (not isinstance(name, str) or not name):
                raise InputError(f"{key} has the key {name!r}, which is not a word; quote it", key)
            if name is not None:
                check_plain(name, key, depth + 1)
            check_plain(inner, key if name is None else f"{key}.{name}".lstrip("."), depth + 1)


def check_types(values: Mapping[str, Any], part: object, prefix: str = "") -> None:
    """Check for values that OmegaConf would silently convert: a number to a boolean, a boolean or a number to a string.

    Args:
        values: values of a part of the configuration, by key.
        part: dataclass of the part.
        prefix: prefix of the keys in error messages.

    Raises:
        InputError: naming the key.
    """
    for name, hint in typing.get_type_hints(part).items():
        if name in values:
            _check_type(values[name], hint, prefix + name)


def _check_type(value: object, hint: object, key: str) -> None:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if value is None:
            return
        (hint,) = (option for option in typing.get_args(hint) if option is not type(None))
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise InputError(f"{key}={shown(value)} is not a mapping of keys", key)
        check_types(value, hint, f"{key}.")
    elif typing.get_origin(hint) is dict and isinstance(value, dict):
        for name, inner in value.items():
            _check_type(inner, typing.get_args(hint)[1], f"{key}.{name}")
    elif typing.get_origin(hint) is dict and isinstance(value, list):
        raise InputError(f"{key}={shown(value)} takes a mapping, {{name: value}}, and no list", key)
    elif typing.get_origin(hint) is list and isinstance(value, list):
        for inner in value:
            if inner is None or isinstance(inner, dict | list):
                raise InputError(f"{key}={shown(value)} takes a list of words; {shown(inner)} is not a word", key)
            _check_type(inner, str, key)
    elif typing.get_origin(hint) is list:
        raise InputError(f"{key}={shown(value)} takes a list: {as_list(value, key)}", key)
    elif hint is str and isinstance(value, bool | float):
        raise InputError(f"{key}={shown(value)} is a {_kind(value)}, not a word; a word that looks like one needs quotes", key)
    elif hint is bool and str(value).lower() not in BOOLEAN_TEXTS and not isinstance(value, list | dict) and value is not None:
        raise InputError(f"{key}={shown(value)} is neither true nor false", key)


def as_list(value: object, key: str) -> str:
    """Return an override, quoted for the shell, that passes a list in place of a single value.

    >>> print(as_list("text", "task.text"), as_list("no, yes", "task.labels"), as_list(True, "task.text"))
    'task.text=[text]' 'task.labels=[no, yes]' 'task.text=["true"]'
    """
    from hydra.errors import HydraException

    if not isinstance(value, bool | int | float | str) or not str(value).strip():
        return f"'{key}=[...]'"
    meant = shown(value)
    try:
        words: Any = parsed_override(f"{key}=[{meant}]").value()
    except HydraException:
        words = [None]
    if any(word is None or isinstance(word, bool | float | dict | list) for word in words):  # not strings unless quoted
        meant = '"' + meant.replace('"', '\\"') + '"'
    return f"'{key}=[{meant}]'"


BOOLEAN_TEXTS = ("true", "false", "yes", "no", "on", "off", "y", "n", "1", "0")
"""Texts that stand for a boolean; OmegaConf would also convert any other number to true."""


def _kind(value: object) -> str:
    return "truth value" if isinstance(value, bool) else "number"
