"""The configurations of runs that another begins from: a stage that it names, or the one that its method begins with."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kd import config as composition
from kd.errors import InputError
from kd.values import one_line, shown

MOST_OVERRIDES = 1000
"""Of a stage."""

DEEPEST_CHAIN = 8
"""Stages that may follow each other; a longer chain is a stage that begins from itself."""


def before_config(config: DictConfig) -> DictConfig:
    """The configuration of the run that a method begins with: the same, with `method.before` as its method.

    `method.before.run` is laid over it. What that interpolates is of the run that follows; what the node itself interpolates
    is of its own run.

    Raises:
        InputError: for a key that no run has.
    """
    given = config.method.before
    if not OmegaConf.is_dict(given) or not isinstance(given.get("name"), str) or given.get("_target_") is None:
        raise InputError(f"method.before={given} is neither null nor a method with name and _target_", "method.before")
    node: Any = OmegaConf.to_container(given, resolve=False)
    laid: Any = OmegaConf.to_container(given, resolve=True)
    node.pop("run", None)
    if laid.get("run") is not None and not isinstance(laid["run"], Mapping):
        raise InputError(f"method.before.run={shown(laid['run'])} is not a mapping of a run's keys", "method.before.run")
    if own := [
        part for part in ("method", "student", "surgery", "teacher", "pool", "cohort") if part in (laid.get("run") or {})
    ]:
        raise InputError(f"both runs have one {own[0]}; set it for the command", f"method.before.run.{own[0]}")
    stage = config.copy()
    OmegaConf.set_struct(stage, False)
    stage.method = node
    OmegaConf.set_struct(stage, True)
    return laid_over(stage, laid.get("run") or {}, "method.before.run")


def laid_over(config: DictConfig, keys: Mapping[str, Any], where: str) -> DictConfig:
    """A run's configuration with some keys laid over it.

    Args:
        config: of the run; it has every key that may be laid over it.
        keys: nested.
        where: the key that they stand under.

    Raises:
        InputError: for a key that no run has, or a value that cannot stand there.
    """
    OmegaConf.set_struct(config, True)
    try:
        merged = OmegaConf.merge(config, keys)
    except OmegaConfBaseException as error:
        explained = composition.explain(error)
        key = f"{where}.{explained.key}" if explained.key else where
        raise InputError(f"{where} does not fit a run's configuration: {explained.message} ({explained.key})", key) from error
    except (TypeError, ValueError) as error:
        raise InputError(f"{where} does not fit a run's configuration: {one_line(error)}", where) from error
    assert isinstance(merged, DictConfig)
    return merged


def has_key(node: Mapping[str, Any], key: str) -> bool:
    """Return whether nested mappings have a key.

    >>> has_key({"trainer": {"max_epochs": 3}}, "trainer.max_epochs")
    True
    """
    part, _, rest = key.partition(".")
    if not isinstance(node, Mapping) or part not in node:
        return False
    return not rest or has_key(node[part], rest)


def nested(node: Any, key: str) -> Any:
    """The value of a key in nested mappings; None where there is none.

    >>> nested({"student": {"init": "run"}}, "student.init"), nested({"student": 3}, "student.init")
    ('run', None)
    """
    part, _, rest = key.partition(".")
    if not isinstance(node, Mapping) or part not in node:
        return None
    return nested(node[part], rest) if rest else node[part]


def key_of_stage(config: DictConfig, where: str, key: str) -> str:
    """Where a command says what a stage of it has at a key.

    Args:
        config: of the command, not resolved.
        where: the key of the stage, as `student.run`.
        key: of the stage's own configuration.

    Returns:
        The key that the stage's override interpolates; the stage's own where the override holds the value; the key itself where
        the stage has taken it over from the command.
    """
    stage = OmegaConf.select(config, where)
    node = OmegaConf.to_container(stage, resolve=False) if OmegaConf.is_config(stage) else stage
    if isinstance(node, Mapping) and key.startswith("student.run") and node.get("run") is not None:
        return f"{where}.run"
    overrides = node.get("overrides") if isinstance(node, Mapping) else node
    for override in reversed(overrides if isinstance(overrides, list) else []):
        name, _, value = str(override).lstrip("+~").partition("=")
        if key == name or key.startswith(f"{name}."):
            source = re.fullmatch(r"\$\{(?:oc\.select:)?([\w.]+)(?:,[^}]*)?\}", value)
            return source[1] if source and key == name else where
    return key


def without(overrides: Sequence[str], starts: Sequence[str]) -> list[str]:
    """The overrides that do not begin with any of these words, with or without a plus."""
    return [override for override in overrides if not override.lstrip("+~").startswith(tuple(starts))]


def stage_config(
    stage: Any, key: str, overrides: Sequence[str], depth: int, parent: DictConfig
) -> tuple[DictConfig, list[str]]:
    """The configuration of a run that this one needs, and its overrides: this command with the stage's laid over it.

    Args:
        stage: a list of overrides, or a mapping with `overrides`, with `run` (the stage's own `student.run`, so that a chain
            needs no nested quotes), `name` (what results call it), and whatever its overrides interpolate.
        key: where it stands.
        overrides: of this command.
        depth: of the chain of stages.
        parent: configuration of this command.

    Raises:
        InputError: if there is none, or the chain is endless.
    """
    parts = stage if isinstance(stage, Mapping) else {"overrides": stage}
    given = parts.get("overrides")
    if isinstance(given, str) and given:
        where = f"{key}.overrides" if isinstance(stage, Mapping) else key
        raise InputError(f"{where}={shown(given)} takes a list of overrides: {composition.as_list(given, where)}", where)
    if not isinstance(given, list) or not given:
        about = "student.init=run needs student.run" if key == "student.run" else f"{key} must be"
        raise InputError(f"{about}=[override, ...], or a mapping with `overrides`: the run to begin from", key)
    if depth >= DEEPEST_CHAIN:
        raise InputError(f"{key} begins from itself; give the first stage another student.init", key)
    if spare := [word for word in given if not isinstance(word, str) or not re.match(r"[+~]*[\w/@.]+", word)]:
        raise InputError(f"{key} is a list of overrides, each a word such as 'seed=1'; {shown(spare[0])} is none", key)
    if len(given) > MOST_OVERRIDES:
        raise InputError(f"{key} lists {len(given)} overrides, more than {MOST_OVERRIDES}", key)
    # A null that was interpolated into a word reads None.
    laid = [composition.quoted(re.sub("=None$", "=null", str(word))) for word in given]
    kept = without(overrides, ["student.init=", "student.run="])
    # Another method has other keys: what was said of this one's does not carry over.
    swapped = [word.partition("=")[0] for word in laid if "." not in word.partition("=")[0]]
    merged = [*without(kept, [f"{group}." for group in swapped]), *laid]
    try:
        config = composition.compose(merged)
    except InputError as error:
        where = key_of_stage(parent, key, error.key or "")
        raise InputError(f"the run of {key}: {error.message} ({error.key})", where if error.key else key) from error
    if parts.get("run") is not None:
        OmegaConf.update(config, "student.run", parts["run"], merge=False)
    return config, merged
