"""Edits of a task's training split, with the frozen models that some of them read."""

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd.build.inputs import ExpectedModels, InputModels, TrainedModels
from kd.build.instantiate import instantiate, option_names
from kd.build.teachers import TeacherPlan, plan_frozen
from kd.config.edits import edit_nodes
from kd.config.schema import TaskSpec
from kd.data.edits import Arrays, Edit, ModelEdit, Split, described, edited
from kd.data.examples import Edited
from kd.data.tasks import Task
from kd.data.tokenized import TokenStore
from kd.errors import prefix_error_keys
from kd.forward import Needs
from kd.models import FrozenTeacher
from kd.runs.edits import arguments_of_edit, edit_class, edit_identity, model_of_edit
from kd.runs.run import Role, Run
from kd.system import distributed
from kd.system.model_sources import fingerprint

EDITS_FORMAT = 1
"""Part of the digest that names a stored result; raised when a change of code changes what an edit makes of its model."""


class ModelOfEdit:
    """The frozen model of an edit; its weights are loaded when they are first needed.

    Args:
        plan: its plan.
        device: where it runs.
    """

    def __init__(self, plan: TeacherPlan, device: torch.device) -> None:
        self.plan, self.device = plan, device
        self.tokenizer = plan.tokenizer

    @cached_property
    def positions(self) -> int:
        """Largest number of tokens of an input."""
        return self.plan.shape().shape.positions

    @cached_property
    def loaded(self) -> FrozenTeacher:
        """The model with its weights."""
        model = self.plan.materialise()
        model.apply(lambda tensor: tensor.to(self.device))
        return model

    def logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the logits of a pass without gradients, on the CPU; inputs as in `kd.forward.inputs`."""
        on_device = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        return self.loaded(on_device, Needs()).logits.float().cpu()

    def states(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the states of the last layer, (batch, tokens, width), float32, as `logits` returns logits."""
        on_device = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        depth = self.loaded.depth
        return self.loaded(on_device, Needs(hidden=[depth])).hidden(depth).float().cpu()

    def embeddings(self) -> np.ndarray:
        """Return the input word embeddings, (vocabulary, width)."""
        weight: Any = self.loaded.word_embeddings.weight
        return np.asarray(weight.detach().float().cpu().numpy())


def build_edits(task: TaskSpec, run: Run | None = None) -> list[Edited]:
    """Return the edits of a task's training split, in the order in which they are applied.

    Args:
        task: the task.
        run: the run, whose inputs are done; None while they may not be: edits that read a model are then checked, but have no
            function.

    Raises:
        InputError: for something that is no edit, or an argument that it does not accept.
    """
    return [build_edit(node, key, run) for key, node in edit_nodes(task).items()]


def build_edit(node: Mapping[str, Any], key: str, run: Run | None = None) -> Edited:
    """Return a function that applies an edit; its errors name the keys below the edit's.

    Args:
        node: configuration node of the edit.
        key: configuration key of the node.
        run: as for `build_edits`.

    Raises:
        InputError: for something that is no edit, or an argument that it does not accept.
    """
    edit, names = instantiated(node, key)
    if isinstance(edit, ModelEdit):
        if run is None:
            return Edited(None, edit.adds, edit.column)
        read_model(edit, node, key, run)

    def apply(train: Split, task: Task) -> tuple[Split, str]:
        with prefix_error_keys(key, names):
            after = edited(edit, train, task)
        return after, described(edit, train, after, task)

    return Edited(apply, edit.adds, edit.column)


def instantiated(node: Mapping[str, Any], key: str) -> tuple[Edit, set[str]]:
    """Return the edit of a node, and the names of its keys.

    Raises:
        InputError: for something that is no edit, or an argument that it does not accept.
    """
    target = edit_class(node, key)
    edit: Edit = instantiate(target, arguments_of_edit(target, node), key)
    return edit, option_names(target, node)


def read_model(edit: ModelEdit, node: Mapping[str, Any], key: str, run: Run) -> None:
    """Let an edit read its model, whose run is done; what it makes of some texts is stored in `.edits` beside the runs.

    Every rank reads the file that rank 0 writes, in one atomic step. Its name is a digest of the texts, the edit and the
    weights, so that runs with other seeds, methods or students share it.

    Raises:
        InputError: for a model that does not fit, or weights that cannot be read.
    """
    plan = plan_model(edit, node, key, run, TrainedModels(run))
    identity = {**edit_identity(node, key), "model": None}
    store = TokenStore(Path(run.spec.paths.runs).expanduser() / ".edits", "examples")

    def stored(train: Split, task: Task) -> Arrays:
        reads = [
            hashlib.blake2b(np.ascontiguousarray(part).tobytes()).hexdigest() if isinstance(part, np.ndarray) else list(part)
            for part in edit.reads(train, task)
        ]
        named = ["edit", EDITS_FORMAT, identity, fingerprint(plan.source, plan.key), train.texts.digest(), *reads]
        return store.arrays(
            lambda: named,
            lambda: dict(edit.made(train, task, ModelOfEdit(plan, distributed.device(run.spec.trainer.accelerator)))),
        )

    edit.stored = stored


def plan_model(edit: ModelEdit, node: Mapping[str, Any], key: str, run: Run, inputs: InputModels) -> TeacherPlan:
    """Plan the model that an edit reads, and check that the edit can work with it.

    Raises:
        InputError: for a model without the head that is read, weights that cannot be read, or an edit that does not fit.
    """
    model = model_of_edit(node, key)
    assert model is not None  # the edit reads one
    role = Role("edit", key.removeprefix("task.edits."))
    return plan_frozen(run, role, key, edit.head, model, inputs, pairs=edit.pairs)


def check_edits(run: Run, task: Task) -> None:
    """Check the edits that read a model, which may not be trained yet.

    Raises:
        InputError: for a model that does not fit, or a file that cannot be read.
    """
    for key, node in edit_nodes(run.spec.task).items():
        edit, names = instantiated(node, key)
        if isinstance(edit, ModelEdit):
            plan = plan_model(edit, node, key, run, ExpectedModels(run))
            with prefix_error_keys(key, names):
                edit.check(ModelOfEdit(plan, torch.device("cpu")), task)
