"""Frozen teachers."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kd.errors import InputError
from kd.forward.lazy import Inputs
from kd.forward.needs import Needs
from kd.forward.outputs import Outputs, UndeclaredRead
from kd.models.encoder import Encoder
from kd.models.labels import columns


def match_labels(task: Sequence[str], teacher: Sequence[str], key: str) -> list[int]:
    """For each label of the task, its column in the teacher's logits; see `kd.models.labels.columns`.

    Raises:
        InputError: if the names differ as sets; position is never used instead.

    >>> match_labels(["negative", "positive"], ["POSITIVE", "NEGATIVE"], "teacher.x.labels")
    [1, 0]
    """
    found = columns(task, teacher)
    if found is None:
        hint = f"If the teacher's configuration names them badly, list its labels in the order of its outputs: {key}=[...]"
        if any(re.fullmatch(r"LABEL_\d+", name) for name in teacher):
            hint = f"The teacher's outputs have no names but numbers; list the task's labels in their order: {key}=[...]"
        raise InputError(
            f"the task's labels are {list(task)}, the teacher's are {list(teacher)}; they are matched by name, and these "
            f"do not match. {hint}",
            key,
        )
    return found


class FrozenTeacher:
    """A teacher that rides along: never trained, always in eval mode, outside `parameters()`, checkpoints and DDP.

    Only a pass with `Needs.dropout` is not in eval mode. It is not a module on purpose. The engine moves it between devices.

    Args:
        encoder: the fine-tuned model, or its shape, on the meta device, where `load` gives it its weights.
        name: what messages and results call it.
        columns: for each label of the task, its column in this teacher's logits; None keeps them as they are.
        load: reads the weights, when they are first needed.
    """

    def __init__(
        self,
        encoder: Encoder,
        name: str = "teacher",
        columns: Sequence[int] | None = None,
        load: Callable[[], nn.Module] | None = None,
    ) -> None:
        self.shape = encoder.eval().requires_grad_(False)
        """The model, perhaps without weights."""
        self.load = load
        self.loaded = encoder if load is None else None
        self.name = name
        self.columns = None if columns is None or list(columns) == sorted(columns) else list(columns)
        self.passes = 0
        """Forward passes so far, on this rank."""
        self.examples = 0
        """Examples forwarded so far, on this rank."""
        self.batches_used = 0
        """Batches so far in which a method looked at what it says, on this rank."""

    @property
    def work(self) -> dict[str, int]:
        """Passes, examples and looks so far, on this rank."""
        return {"passes": self.passes, "examples": self.examples, "batches_used": self.batches_used}

    @work.setter
    def work(self, counts: Mapping[str, int]) -> None:
        self.passes, self.examples, self.batches_used = (counts.get(name, 0) for name in ("passes", "examples", "batches_used"))

    @property
    def encoder(self) -> Encoder:
        """The model with its weights; they are read when this is first looked at."""
        if self.loaded is None:
            assert self.load is not None
            with torch.random.fork_rng(devices=[]):  # what loading draws is nobody's business
                self.loaded = Encoder(self.load(), self.shape.tokenizer).eval().requires_grad_(False)
        self.loaded.compiled = self.shape.compiled
        return self.loaded

    @property
    def depth(self) -> int:
        """Blocks."""
        return self.shape.depth

    @property
    def width(self) -> int:
        """Size of a hidden state."""
        return self.shape.width

    @property
    def heads(self) -> int:
        """Attention heads of a block."""
        return self.shape.heads

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that makes its inputs."""
        return self.shape.tokenizer

    def __call__(self, inputs: Inputs, needs: Needs) -> Outputs:
        """One pass, without gradients unless `needs.gradient`; logits are in the task's label order."""
        self.batches_used += 1
        before = self.encoder.forwards
        outputs = self.run(inputs, needs)
        passes = self.encoder.forwards - before  # more than one where something is derived from passes of its own
        self.passes += passes
        self.examples += passes * len(inputs["input_ids"])
        return self.in_order(outputs)

    def run(self, inputs: Inputs, needs: Needs) -> Outputs:
        """The same with the logits in the teacher's own order, and not counted."""
        encoder = self.encoder.train(needs.dropout)
        with torch.set_grad_enabled(needs.gradient):
            outputs: Outputs = encoder(inputs, needs)
        encoder.eval()
        return outputs

    def in_order(self, outputs: Outputs) -> Outputs:
        """The same with the logits in the task's label order."""
        return outputs if self.columns is None else outputs.with_logits(outputs.logits[:, self.columns])

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Move or convert every tensor, as `nn.Module._apply` does for modules."""
        self.encoder._apply(function)


class CachedTeacher(FrozenTeacher):
    """A frozen teacher that is not there: its inputs are what it said of the examples when it was run once (`kd.caching`).

    Args:
        teacher: that was run; it can be forgotten.
        passes: that it took to fill the cache, in this run and on this rank.
        examples: forwarded in them, training examples alone.
    """

    def __init__(self, teacher: FrozenTeacher, passes: int = 0, examples: int = 0) -> None:
        super().__init__(teacher.shape, teacher.name, teacher.columns)
        self.passes, self.examples = passes, examples

    def __call__(self, inputs: Inputs, needs: Needs) -> Outputs:
        """What it said.

        Args:
            inputs: of a `kd.data.store.CachedOutputs`: tensors by name, as `Needs.tensors` names them.
            needs: what of it to show.

        Raises:
            UndeclaredRead: for other inputs, or more needs, than were declared when the cache was filled.
        """
        if "logits" not in inputs:
            raise UndeclaredRead(
                f"the teacher '{self.name}' is cached and cannot read other text; a method whose teachers have to run "
                "declares Needs(uncacheable_reason='the reason') for them"
            )
        self.batches_used += 1
        return self.in_order(Outputs.from_named(inputs, inputs["attention_mask"].bool(), needs, self.heads))

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """There is nothing to move."""
