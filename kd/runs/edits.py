"""Nodes of edits: their classes, the models that they read, which of them teachers see, and what enters the digest."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kd.config.edits import edit_nodes
from kd.config.frozen import FrozenSpec, frozen_of
from kd.config.mixture import tasks_of
from kd.config.schema import TaskSpec
from kd.config.values import locate, shown, subclass_of, switch
from kd.data.readers import check_file, data_path
from kd.errors import InputError
from kd.system.model_sources import file_fingerprint, fingerprint

if TYPE_CHECKING:
    from kd.data.edits import Edit

OF_MODEL = ("model", "run")
"""Keys of the node of an edit that reads a model, which are not arguments of its class."""


def edit_class(node: Mapping[str, Any], key: str) -> "type[Edit]":
    """Return the class of an edit.

    Raises:
        InputError: for something that is no edit.
    """
    from kd.data.edits import Edit  # which imports torch, that a plan does not need

    expected = "an edit: a class that inherits from kd.data.edits.Edit"
    target: type[Edit] = locate(node, key, subclass_of(Edit), expected)
    return target


def reads_model(target: "type[Edit]") -> bool:
    """Return whether edits of a class read a model."""
    from kd.data.edits import ModelEdit

    return issubclass(target, ModelEdit)


def arguments_of_edit(target: "type[Edit]", node: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of an edit's node that its class gets."""
    spare = ("teachers", *(OF_MODEL if reads_model(target) else ()))
    return {name: value for name, value in node.items() if name not in spare}


def model_of_edit(node: Mapping[str, Any], key: str) -> FrozenSpec | None:
    """Return the model that an edit reads; None if it reads none.

    Raises:
        InputError: for something that is no edit, or without a model that it needs.
    """
    if not reads_model(edit_class(node, key)):
        return None
    return frozen_of({name: node[name] for name in OF_MODEL if name in node}, key)


def models_of_edits(task: TaskSpec) -> dict[str, FrozenSpec]:
    """Return the model that each edit reads, by the name of the edit, for those that read one.

    Raises:
        InputError: for something that is no edit, or without a model that it needs.
    """
    models = {key: model_of_edit(node, key) for key, node in edit_nodes(task).items()}
    return {key.removeprefix("task.edits."): model for key, model in models.items() if model is not None}


def unlabelled_sources(task: TaskSpec) -> dict[str, str]:
    """Return the keys of what gives a task training examples without labels, each with the override that takes it away.

    Raises:
        InputError: for something that is no edit.
    """
    if task.unlabelled is not None:
        return {"task.unlabelled": "task.unlabelled=null"}
    return {key: "edit=[]" for key, node in edit_nodes(task).items() if edit_class(node, key).unlabels}


def edits_of_teachers(task: TaskSpec) -> Any:
    """Return `task.edits` for the runs that fine-tune teachers: without the edits that are for students alone.

    Raises:
        InputError: for something that is no edit.
    """
    nodes = edit_nodes(task)
    seen = {key: switch(node.get("teachers", edit_class(node, key).teachers), f"{key}.teachers") for key, node in nodes.items()}
    if all(seen.values()):
        return task.edits
    if isinstance(task.edits, Mapping):
        return {name: node for name, node in task.edits.items() if seen[f"task.edits.{name}"]}
    return [node for index, node in enumerate(task.edits) if seen[f"task.edits.{index}"]]


def edit_identity(node: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the values of an edit that enter the digest: contents in place of paths. A run that it needs is an input.

    Raises:
        InputError: for a model or a file that cannot be read.
    """
    target = edit_class(node, key)
    identity = arguments_of_edit(target, node)
    for name in target.files:
        if (value := identity.get(name)) is not None:
            where = f"{key}.{name}"
            if not isinstance(value, str):
                raise InputError(f"{where}={shown(value)} is not the path of a file", where)
            path = data_path(value, where)
            check_file(path, where)
            identity[name] = file_fingerprint(path)
    if (model := model_of_edit(node, key)) is not None:
        identity["model"] = None if model.model is None else fingerprint(model.model, f"{key}.model")
    return identity


def changes_texts(task: TaskSpec) -> bool:
    """Return whether an edit changes texts of train: what is held of it then depends on the texts of before.

    Raises:
        InputError: for something that is no edit.
    """
    from kd.data.edits import TextEdit  # which imports torch, that a plan does not need

    nodes = [item for one in tasks_of(task).values() for item in edit_nodes(one).items()]
    return any(issubclass(edit_class(node, key), TextEdit) for key, node in nodes)
