"""The edits of a task's training split, as configured."""

from collections.abc import Mapping
from typing import Any

from kd.config.schema import TaskSpec
from kd.config.values import shown
from kd.errors import InputError


def edit_nodes(task: TaskSpec) -> dict[str, Mapping[str, Any]]:
    """Return configuration key -> node of each edit, in the order in which they are applied.

    Args:
        task: the task; its `edits` are a list of nodes, or a mapping from names to nodes, as the group `edit` makes.

    Raises:
        InputError: for anything else.

    >>> task = TaskSpec(edits={"label_noise": {"rate": 0.2}})
    >>> edit_nodes(task), edit_nodes(TaskSpec(edits=[{"rate": 0.2}]))
    ({'task.edits.label_noise': {'rate': 0.2}}, {'task.edits.0': {'rate': 0.2}})
    """
    edits = [] if task.edits is None else task.edits
    if not isinstance(edits, list | Mapping):
        raise InputError(f"task.edits={shown(edits)} is not a list of edits: 'task.edits=[{{_target_: ...}}]'", "task.edits")
    named = edits.items() if isinstance(edits, Mapping) else enumerate(edits)
    nodes = {f"task.edits.{name}": node for name, node in named}
    for key, node in nodes.items():
        if not isinstance(node, Mapping):
            raise InputError(f"{key}={shown(node)} is not an edit, a mapping with _target_", key)
    return nodes
