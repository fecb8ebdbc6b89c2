"""Loggers beside `metrics.csv`, as configured: `logger=[wandb,tensorboard]` are two entries of `logger.extra`."""

from collections.abc import Mapping
from typing import Any

from kd.config.schema import LoggerSpec
from kd.config.values import shown
from kd.errors import InputError

LONGEST_GROUP = 128
"""Most characters of a group's name: Weights & Biases answers "128 limit exceeded for GroupName" to a longer one."""


def check_loggers(spec: LoggerSpec) -> None:
    """Check the group, and that each logger is a node; whether its class fits is checked where it is imported.

    Raises:
        InputError: for an invalid group, or a logger that is not a mapping.
    """
    if spec.group is not None:
        check_group(spec.group, "logger.group")
    nodes: Mapping[str, Any] = spec.extra
    for name, node in nodes.items():
        if not isinstance(node, Mapping):
            key = f"logger.extra.{name}"
            raise InputError(f"{key}={shown(node)} is not a logger; logger.extra maps names to nodes with a _target_", key)


def check_group(group: str, key: str) -> None:
    """Check the name of a group of runs.

    Raises:
        InputError: for a name that Weights & Biases refuses, or that could not be typed again: one that is empty or too long,
            begins or ends with a space, or has a character that cannot be printed.
    """
    if not group.strip():
        raise InputError(f"{key} is empty; it is a name, or null for runs without a group", key)
    if len(group) > LONGEST_GROUP:
        raise InputError(
            f"{key}={shown(group)} has {len(group)} characters; Weights & Biases takes at most {LONGEST_GROUP}", key
        )
    if group != group.strip() or not group.isprintable():
        raise InputError(f"{key}='{shown(group)}' begins or ends with a space, or has a character that cannot be printed", key)
