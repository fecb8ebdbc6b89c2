"""Configurations of runs that another run starts from: a stage in `student.run`, or the first run of its method."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from kd.config import compose as composition
from kd.config.mixture import expand
from kd.config.nodes import nested
from kd.config.values import shown
from kd.errors import InputError
from kd.runs.inherit import EVERY_RUN_INHERITS, inherit, laid_over

MOST_OVERRIDES = 1000
"""Largest number of overrides of a stage."""

NOT_OWN = ("name", "choose", "inherits")
"""Keys of a stage that are not keys of its configuration."""

DEEPEST_CHAIN = 8
"""Longest chain of stages; a longer one is taken for a stage that starts from itself."""


def before_config(config: DictConfig) -> DictConfig:
    """Return the configuration of the run that a method starts with: this one, with `method.before` as its method.

    `method.before.run` is merged over it; its `pool` may be the name of a pool. Interpolations in `method.before.run` refer to
    the run that follows; those in the rest of the node refer to the first run.

    Raises:
        InputError: for an invalid node, or a key that no run has.
    """
    given = config.method.before
    if not OmegaConf.is_dict(given) or not isinstance(given.get("name"), str) or given.get("_target_") is None:
        raise InputError(f"method.before={given} is neither null nor a method with name and _target_", "method.before")
    node: Any = OmegaConf.to_container(given, resolve=False)
    resolved: Any = OmegaConf.to_container(given, resolve=True)
    node.pop("run", None)
    if resolved.get("run") is not None and not isinstance(resolved["run"], Mapping):
        raise InputError(f"method.before.run={shown(resolved['run'])} is not a mapping of a run's keys", "method.before.run")
    own = resolved.get("run") or {}
    if shared := [part for part in ("method", "student", "surgery", "teacher", "cohort") if part in own]:
        raise InputError(f"both runs have one {shared[0]}; set it for the command", f"method.before.run.{shared[0]}")
    stage = config.copy()
    with open_dict(stage):
        stage.method = node
        if isinstance(own.get("pool"), str):
            stage.pool = chosen_pool(own.pop("pool"))
    return laid_over(stage, own, "method.before.run")


def chosen_pool(name: str) -> DictConfig:
    """Return the pool of a name in `conf/pool`.

    Raises:
        InputError: if there is none of that name.
    """
    try:
        pool: DictConfig = composition.compose([f"pool={name}"]).pool
    except InputError as error:
        raise InputError(error.message, "method.before.run.pool") from error
    return pool


def key_of_stage(config: DictConfig, where: str, key: str) -> str:
    """Return the key of a command's configuration that determines the value of a key of one of its stages.

    Args:
        config: configuration of the command, not resolved.
        where: key of the stage, such as `student.run`.
        key: key in the configuration of the stage.

    Returns:
        The key that the stage interpolates; the key of the value in the stage, or of the stage if it is an override that holds
        the value; `key` itself if the stage inherits it from the command; the key of the stage for a default.
    """
    stage = OmegaConf.select(config, where)
    node = OmegaConf.to_container(stage, resolve=False) if OmegaConf.is_config(stage) else stage
    if isinstance(node, dict) and "choose" in node:
        return key_of_inheriting_stage({str(name): value for name, value in node.items()}, where, key)
    if isinstance(node, Mapping) and key.startswith("student.run") and node.get("run") is not None:
        return f"{where}.run"
    overrides = node.get("overrides") if isinstance(node, Mapping) else node
    for override in reversed(overrides if isinstance(overrides, list) else []):
        name, _, value = str(override).lstrip("+~").partition("=")
        if key == name or key.startswith(f"{name}."):
            return (interpolated_key(value) if key == name else None) or where
    return key


def key_of_inheriting_stage(stage: Mapping[str, Any], where: str, key: str) -> str:
    """Return the same as `key_of_stage` for a stage that lists what it inherits."""
    value = nested(stage, key)
    if value is None:
        inherits = (*EVERY_RUN_INHERITS, *(stage.get("inherits") or []))
        return key if any(key == name or key.startswith(f"{name}.") for name in inherits) else where
    return interpolated_key(value) or f"{where}.{key}"


def interpolated_key(value: object) -> str | None:
    """Return the key that a value interpolates, perhaps with a default; None if the value is not one interpolation.

    >>> interpolated_key("${seed}"), interpolated_key("${oc.select:task.holdout,null}"), interpolated_key("${seed}1")
    ('seed', 'task.holdout', None)
    """
    interpolation = re.fullmatch(r"\$\{(?:oc\.select:)?([\w.]+)(?:,[^}]*)?\}", str(value))
    return None if interpolation is None else interpolation[1]


def without(overrides: Sequence[str], starts: Sequence[str]) -> list[str]:
    """Return the overrides that do not start with any of these texts; leading `+` and `~` are ignored."""
    return [override for override in overrides if not override.lstrip("+~").startswith(tuple(starts))]


def stage_config(
    stage: Any, key: str, overrides: Sequence[str], depth: int, parent: DictConfig
) -> tuple[DictConfig, list[str]]:
    """Return the configuration of a run that this one needs, and the overrides that would compose it.

    A stage is either a mapping with `choose`, `inherits` and keys of its own (see `kd.runs.inherit.inherit`), or this command
    with further overrides, which is shorter on a command line.

    Args:
        stage: such a mapping, perhaps with `name`, its name in results; or a list of overrides; or a mapping with `overrides`,
            `run` (the `student.run` of the stage, so that a chain needs no nested quotes), `name`, and any keys that its
            overrides interpolate.
        key: configuration key of the stage.
        overrides: overrides of this command.
        depth: number of stages before this one in the chain, counted from the command.
        parent: configuration of this command.

    Raises:
        InputError: if the stage is missing or invalid, or the chain is endless.
    """
    parts = stage if isinstance(stage, Mapping) else {"overrides": stage}
    overrides = expand(overrides)
    if depth >= DEEPEST_CHAIN:
        cure = (
            "give the first stage another student.init"
            if key == "student.run"
            else "give it `choose`, or edit=[] and surgery=[]"
        )
        raise InputError(f"{key} starts from itself; {cure}", key)
    if "choose" in parts:
        return inheriting_config(parts, key, parent), []
    given = parts.get("overrides")
    if isinstance(given, str) and given:
        where = f"{key}.overrides" if isinstance(stage, Mapping) else key
        raise InputError(f"{where}={shown(given)} takes a list of overrides: {composition.as_list(given, where)}", where)
    if not isinstance(given, list) or not given:
        about = "student.init=run needs student.run" if key == "student.run" else f"{key} must be"
        raise InputError(f"{about}=[override, ...], or a mapping with `overrides` or `choose`: the run to start from", key)
    if spare := [word for word in given if not isinstance(word, str) or not re.match(r"[+~]*[\w/@.]+", word)]:
        raise InputError(f"{key} is a list of overrides, each a word such as 'seed=1'; {shown(spare[0])} is not one", key)
    if len(given) > MOST_OVERRIDES:
        raise InputError(f"{key} lists {len(given)} overrides, more than {MOST_OVERRIDES}", key)
    # An interpolated null becomes the text None.
    added = [composition.quoted(re.sub("=None$", "=null", str(word))) for word in given]
    inherited = without(overrides, ["student.init=", "student.run="])
    # Another entry of a group, such as another method, has other keys: overrides of those of this command do not apply.
    swapped = [word.partition("=")[0] for word in added if "." not in word.partition("=")[0]]
    merged = [*without(inherited, [group + mark for group in swapped for mark in ".@"]), *added]
    try:
        config = composition.compose(merged)
    except InputError as error:
        where = key_of_stage(parent, key, error.key or "")
        raise InputError(f"the run of {key}: {error.message} ({error.key})", where if error.key else key) from error
    if parts.get("run") is not None:
        OmegaConf.update(config, "student.run", parts["run"], merge=False)
    return config, merged


def inheriting_config(stage: Mapping[str, Any], key: str, parent: DictConfig) -> DictConfig:
    """Return the configuration of a stage that lists what it inherits; arguments as for `stage_config`.

    Raises:
        InputError: for a group, a key or a value that no run has.
    """
    choose, inherits = stage["choose"], stage.get("inherits") or []
    if not isinstance(choose, Mapping):
        raise InputError(f"{key}.choose={shown(choose)} is not a mapping of groups to names", f"{key}.choose")
    for group, names in choose.items():
        if not isinstance(names, str) and not (isinstance(names, list) and all(isinstance(word, str) for word in names)):
            raise InputError(f"{key}.choose.{group}={shown(names)} is not a name, or a list of names", f"{key}.choose.{group}")
    if (name := stage.get("name")) is not None and not isinstance(name, str):
        raise InputError(f"{key}.name={shown(name)} is not a name", f"{key}.name")
    if not isinstance(inherits, list) or not all(isinstance(word, str) for word in inherits):
        raise InputError(f"{key}.inherits={shown(inherits)} is not a list of keys", f"{key}.inherits")
    own = {name: value for name, value in stage.items() if name not in NOT_OWN}
    try:
        return inherit(parent, choose, inherits, own, key)
    except InputError as error:
        if error.key is not None and error.key.startswith(f"{key}."):
            raise
        where = key_of_stage(parent, key, error.key or "")
        raise InputError(f"the run of {key}: {error.message} ({error.key})", where if error.key else key) from error
