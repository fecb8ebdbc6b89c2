"""One batch, as the engine sees it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class Batch:
    """Inputs of the student and of each teacher, labels, and where the examples come from.

    Attributes:
        student: tokenizer output, each (batch, tokens); of a masked language model also `predicted`, bool.
        teachers: the same for each teacher; usually the very same object, where tokenizers agree. Of a teacher that is
            cached, what it said (`kd.data.store.CachedOutputs`).
        labels: (batch,), class indices in the task's order, or float scores; of a masked language model (batch, tokens), the
            tokens to predict and `kd.data.tasks.NOT_PREDICTED`.
        index: (batch,), position of each example in its split; the key of every cache.
        weight: what this rank's loss counts for, 1 where the ranks share the global batch evenly and the batches of an
            optimiser step are as many as asked for and equally large (`kd.data.sampler.Rows`).
        peers: inputs of the further students, where several learn together.
    """

    student: dict[str, Tensor]
    teachers: tuple[dict[str, Tensor], ...]
    labels: Tensor
    index: Tensor
    weight: float = 1.0
    peers: tuple[dict[str, Tensor], ...] = ()

    @property
    def students(self) -> tuple[dict[str, Tensor], ...]:
        """Inputs of every student, the first one's first."""
        return (self.student, *self.peers)

    def seen_by(self, index: int) -> "Batch":
        """The batch as the student at this index sees it: its own inputs as `student`, the others' as `peers`."""
        others = self.students[:index] + self.students[index + 1 :]
        return replace(self, student=self.students[index], peers=others)

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: Any, non_blocking: bool = False) -> "Batch":
        """On a device; inputs that are shared are moved once and stay shared."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """In page-locked memory, for fast copies to an accelerator."""
        return self.map(torch.Tensor.pin_memory)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Return a batch with a function applied to each of its tensors."""
        done: dict[int, dict[str, Tensor]] = {}
        for inputs in (*self.students, *self.teachers):
            if id(inputs) not in done:
                done[id(inputs)] = {name: function(tensor) for name, tensor in inputs.items()}
        return Batch(
            done[id(self.student)],
            tuple(done[id(inputs)] for inputs in self.teachers),
            function(self.labels),
            function(self.index),
            self.weight,
            tuple(done[id(inputs)] for inputs in self.peers),
        )
