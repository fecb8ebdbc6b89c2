"""Frozen models that are no teachers, as configured: the aids of a method, and the models that edits read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kd.config.schema import RunSpec
from kd.config.values import shown
from kd.errors import InputError

KEYS = ("model", "run")


@dataclass(frozen=True)
class FrozenSpec:
    """A frozen model that is no teacher.

    Attributes:
        model: source of a trained model; None if `run` trains it.
        run: the run that trains it, as `kd.runs.stages.stage_config` takes it; None if `model` is given.
    """

    model: str | None
    run: Any


def aids_of(spec: RunSpec) -> dict[str, FrozenSpec]:
    """Return the aids of a run's method by name. `model` takes precedence over `run`, the default of a configuration file.

    Raises:
        InputError: for anything but a mapping of names to mappings with `model` or `run`.

    >>> aids_of(RunSpec(method={"aids": {"mlm": {"model": "a/folder", "run": {"choose": {}}}}}))
    {'mlm': FrozenSpec(model='a/folder', run=None)}
    """
    nodes = spec.method.get("aids") or {}
    if not isinstance(nodes, Mapping):
        raise InputError(f"method.aids={shown(nodes)} is not a mapping of names to models", "method.aids")
    return {str(name): frozen_of(node, f"method.aids.{name}") for name, node in nodes.items()}


def frozen_of(node: object, key: str) -> FrozenSpec:
    """Return the frozen model of a node with `model` or `run`.

    Args:
        node: the node.
        key: its configuration key.

    Raises:
        InputError: for anything but a mapping with `model` or `run`.
    """
    if not isinstance(node, Mapping):
        raise InputError(f"{key}={shown(node)} is not a mapping with `model` or `run`", key)
    if spare := [name for name in node if name not in KEYS]:
        raise InputError(f"{key} has `model` and `run`, no `{shown(spare[0])}`", f"{key}.{spare[0]}")
    model, run = node.get("model"), node.get("run")
    if model is not None and not isinstance(model, str):
        raise InputError(f"{key}.model={shown(model)} is not the source of a model", f"{key}.model")
    if model is None and not run:
        raise InputError(f"{key} needs `model`, a trained model, or `run`, the run that trains it", f"{key}.model")
    return FrozenSpec(model, None if model is not None else run)
