"""The batch that a training step receives."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass
class Batch:
    """Inputs of the student and of each teacher, labels, and the indices of the examples.

    Attributes:
        student: tokenizer output, each (batch, tokens); for a masked language model also `predicted`, bool.
        teachers: the same for each teacher; the same object where tokenizers are equal. For a cached teacher, its outputs
            instead, and the tokens of the examples that are not cached (`kd.teacher_cache.store.CachedOutputs`).
        labels: (batch,), class indices in the task's order, or float scores; -100 and NaN for an example without a label
            (`task.unlabelled`); for a masked language model (batch, tokens), the
            tokens to predict, and `kd.data.masked_lm.task.NOT_PREDICTED` elsewhere.
        index: (batch,), position of each example in its split; the key of every cache. For a masked language model an example
            is a chunk of a text (`kd.data.masked_lm.tokenized.MaskedTokens.chunks`), whose index follows from the texts, the
            tokenizers and `max_length`.
        weight: factor of this rank's loss; 1 if the global batch is divided evenly among the ranks and the optimiser step has
            `accumulate` batches of equal size (`kd.data.sampler.Rows`).
        peers: inputs of the further students, if several are trained together.
        held: batch of examples that the student is not trained on, if the method holds a part of train (`Method.holds`). Its
            weight is the number of this rank's held examples relative to an equal share: the mean over ranks of weighted means
            is the mean over the global held batch.
        columns: further column that the task reads (`task.extra`) -> values, (batch,): class indices, long, whose names are
            in `Task.column_classes`; or numbers, float.
        label_weight: factor of a mean over this batch's labelled examples, if some have no label (`kd.data.sampler.Rows`);
            `Task.of` takes it.
        task: name of the task of a mixture that the examples are of; None outside a mixture.
    """

    student: dict[str, Tensor]
    teachers: tuple[dict[str, Tensor], ...]
    labels: Tensor
    index: Tensor
    weight: float = 1.0
    peers: tuple[dict[str, Tensor], ...] = ()
    held: "Batch | None" = None
    columns: dict[str, Tensor] = field(default_factory=dict)
    label_weight: float = 1.0
    task: str | None = None

    @property
    def students(self) -> tuple[dict[str, Tensor], ...]:
        """Inputs of all students, in their order."""
        return (self.student, *self.peers)

    def seen_by(self, index: int) -> "Batch":
        """Return the batch for the student at this index: its inputs as `student`, the other students' as `peers`."""
        others = self.students[:index] + self.students[index + 1 :]
        held = None if self.held is None else self.held.seen_by(index)
        return replace(self, student=self.students[index], peers=others, held=held)

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """Return the batch on a device; shared inputs are moved once and stay shared."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory, for fast copies to an accelerator."""
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
            None if self.held is None else self.held.map(function),
            {name: function(values) for name, values in self.columns.items()},
            self.label_weight,
            self.task,
        )
