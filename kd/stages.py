"""The configurations of runs that another begins from: a stage that it names, or the one that its method begins with."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kd import config as composition
from kd.errors import InputError

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
    if own := [
        part for part in ("method", "student", "surgery", "teacher", "pool", "cohort") if part in (laid.get("run") or {})
    ]:
        raise InputError(f"both runs have one {own[0]}; set it for the command", f"method.before.run.{own[0]}")
    stage = config.copy()
    OmegaConf.set_struct(stage, False)
    stage.method = node
    OmegaConf.set_struct(stage, True)
    try:
        merged = OmegaConf.merge(stage, laid.get("run") or {})
    except OmegaConfBaseException as error:
        explained = composition.explain(error)
        raise InputError(
            f"method.before.run does not fit a run's configuration: {explained.message} ({explained.key})", "method.before.run"
        ) from error
    assert isinstance(merged, DictConfig)
    return merged


def has_key(node: Mapping[str, Any], key: str) -> bool:
    """Whether nested mappings have a key.

    >>> has_key({"trainer": {"max_epochs": 3}}, "trainer.max_epochs")
    True
    """
    part, _, rest = key.partition(".")
    if not isinstance(node, Mapping) or part not in node:
        return False
    return not rest or has_key(node[part], rest)


def without(overrides: Sequence[str], starts: Sequence[str]) -> list[str]:
    """The overrides that do not begin with any of these words, with or without a plus."""
    return [override for override in overrides if not override.lstrip("+~").startswith(tuple(starts))]


def stage_config(stage: Any, key: str, overrides: Sequence[str], depth: int) -> tuple[DictConfig, list[str]]:
    """The configuration of a run that this one needs, and its overrides: this command with the stage's laid over it.

    Args:
        stage: a list of overrides, or a mapping with `overrides`, with `run` (the stage's own `student.run`, so that a chain
            needs no nested quotes), `name` (what results call it), and whatever its overrides interpolate.
        key: where it stands.
        overrides: of this command.
        depth: of the chain of stages.

    Raises:
        InputError: if there is none, or the chain is endless.
    """
    parts = stage if isinstance(stage, Mapping) else {"overrides": stage}
    given = parts.get("overrides")
    if not given or isinstance(given, str):
        about = "student.init=run needs student.run" if key == "student.run" else f"{key} must be"
        raise InputError(f"{about}=[override, ...], or a mapping with `overrides`: the run to begin from", key)
    if depth >= DEEPEST_CHAIN:
        raise InputError(f"{key} begins from itself; give the first stage another student.init", key)
    # A null that was interpolated into a word reads None.
    laid = [re.sub("=None$", "=null", str(word)) for word in given]
    kept = without(overrides, ["student.init=", "student.run="])
    # Another method has other keys: what was said of this one's does not carry over.
    swapped = [word.partition("=")[0] for word in laid if "." not in word.partition("=")[0]]
    merged = [*without(kept, [f"{group}." for group in swapped]), *laid]
    config = composition.compose(merged)
    if parts.get("run") is not None:
        OmegaConf.update(config, "student.run", parts["run"], merge=False)
    return config, merged
