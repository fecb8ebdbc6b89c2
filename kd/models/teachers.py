"""Frozen teachers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from kd.errors import InputError
from kd.forward.lazy import Inputs
from kd.forward.needs import Needs
from kd.forward.outputs import Outputs
from kd.models.encoder import Encoder


def match_labels(task: Sequence[str], teacher: Sequence[str], key: str) -> list[int]:
    """For each label of the task, its column in the teacher's logits. Names are compared without case.

    Raises:
        InputError: if the names differ as sets; position is never used instead.

    >>> match_labels(["negative", "positive"], ["POSITIVE", "NEGATIVE"], "teacher.x.labels")
    [1, 0]
    """
    wanted, found = [name.casefold() for name in task], [name.casefold() for name in teacher]
    if sorted(wanted) != sorted(found):
        raise InputError(
            f"the task's labels are {list(task)}, the teacher's are {list(teacher)}; they are matched by name, and these "
            "do not match. If the teacher's configuration names them badly, list its labels in the order of its outputs",
            key,
        )
    return [found.index(name) for name in wanted]


class FrozenTeacher:
    """A teacher that rides along: never trained, always in eval mode, outside `parameters()`, checkpoints and DDP.

    It is not a module on purpose. The engine moves it between devices.

    Args:
        encoder: the fine-tuned model.
        name: what messages and results call it.
        columns: for each label of the task, its column in this teacher's logits; None keeps them as they are.
    """

    def __init__(self, encoder: Encoder, name: str = "teacher", columns: Sequence[int] | None = None) -> None:
        self.encoder = encoder.eval().requires_grad_(False)
        self.name = name
        self.columns = None if columns is None or list(columns) == sorted(columns) else list(columns)
        self.passes = 0
        """Forward passes so far, on this rank."""
        self.examples = 0
        """Examples forwarded so far, on this rank."""

    @property
    def depth(self) -> int:
        """Blocks."""
        return self.encoder.depth

    @property
    def width(self) -> int:
        """Size of a hidden state."""
        return self.encoder.width

    @property
    def heads(self) -> int:
        """Attention heads of a block."""
        return self.encoder.heads

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that makes its inputs."""
        return self.encoder.tokenizer

    def __call__(self, inputs: Inputs, needs: Needs) -> Outputs:
        """One pass, without gradients unless `needs.gradient`; logits are in the task's label order."""
        self.encoder.eval()
        self.passes += 1
        self.examples += len(inputs["input_ids"])
        with torch.set_grad_enabled(needs.gradient):
            outputs: Outputs = self.encoder(inputs, needs)
        return outputs if self.columns is None else outputs.with_logits(outputs.logits[:, self.columns])

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Move or convert every tensor, as `nn.Module._apply` does for modules."""
        self.encoder._apply(function)
