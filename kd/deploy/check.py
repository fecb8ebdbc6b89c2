"""Checks of an exported file: its logits beside torch's at four shapes, and the task's metric on validation."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from kd.data.direction import higher_is_better
from kd.data.metrics import finite_or_none
from kd.data.tasks import Task
from kd.data.tokenized import Tokens, in_order
from kd.deploy.runtimes import Batch, Runtime

SHAPES = ((1, 8), (1, 512), (3, 17), (32, 40))
"""Batch and number of tokens of the shapes; of more than one text, all but the first are padded. Tokens are at most as many as
the model reads in its task. Our choice: one short text, one that is cut, an odd number of odd length, many."""

ROUNDING = 1e-4
"""Largest difference of an exact format from torch, of logits up to 1 in magnitude; of larger ones relative to the largest. Our
choice: float32 with sums in another order differs by 1e-6, a wrong mask by 1e-2 and more."""


@dataclass(frozen=True)
class Shape:
    """Difference of a file from torch at one shape: the largest of logits, and torch's largest logit."""

    batch: int
    tokens: int
    difference: float
    largest: float

    @property
    def agrees(self) -> bool:
        """True if the difference is rounding."""
        return self.difference <= ROUNDING * max(1.0, self.largest)


@dataclass(frozen=True)
class Check:
    """Check of a file.

    Attributes:
        shapes: differences at the shapes.
        metric: name of the metric.
        value: its value on validation; None if it is undefined.
        torch: torch's.
        drop: points by which it is worse, negative if it is better; None if one of both is undefined.
        examples: number of examples of validation.
    """

    shapes: Sequence[Shape]
    metric: str
    value: float | None
    torch: float | None
    drop: float | None
    examples: int

    @property
    def difference(self) -> float:
        """Largest difference at any shape."""
        return max(shape.difference for shape in self.shapes)

    def failures(self, *, exact: bool, max_drop: float) -> list[str]:
        """Return what is wrong with the file, in words; nothing if it passes.

        Args:
            exact: whether its logits should be torch's up to rounding.
            max_drop: largest drop that passes, in points.
        """
        found = [
            f"logits differ from torch's by {shape.difference:.2g} for {shape.batch} text(s) of {shape.tokens} tokens"
            for shape in self.shapes
            if (exact and not shape.agrees) or not np.isfinite(shape.difference)
        ]
        if self.drop is None and self.torch is not None:
            found.append(f"validation {self.metric} is undefined")
        elif self.drop is not None and self.drop > max_drop:
            found.append(f"validation {self.metric} drops by {self.drop:.2f} points, more than --max-drop {max_drop:g}")
        return found

    def dump(self) -> dict[str, Any]:
        """Return the check as JSON holds it."""
        return asdict(self)


def random_batch(names: Sequence[str], config: Any, batch: int, tokens: int, seed: int = 0, *, padded: bool = True) -> Batch:
    """Return random inputs, each (batch, tokens).

    Args:
        names: inputs of the model.
        config: its configuration.
        batch: number of texts.
        tokens: number of tokens of the longest, which is the first.
        seed: seed of the random words.
        padded: whether the others are shorter.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, int(config.vocab_size), (batch, tokens), generator=generator)
    lengths = tokens - torch.arange(batch) * max(tokens - 3, 0) // max(batch, 1) * int(padded)
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    segments = (torch.arange(tokens) >= lengths[:, None] // 2).long() * mask * int(getattr(config, "type_vocab_size", 1) > 1)
    padding = config.pad_token_id or 0
    inputs = {"input_ids": ids * mask + padding * (1 - mask), "token_type_ids": segments, "attention_mask": mask}
    return {name: inputs[name] for name in names}


def shapes_of(runtime: Runtime, torchs: Runtime, names: Sequence[str], config: Any, most: int) -> list[Shape]:
    """Return the differences of a runtime from torch at `SHAPES`.

    Args:
        runtime: the runtime of a file.
        torchs: torch's.
        names: inputs of the model.
        config: its configuration.
        most: largest number of tokens.
    """
    found = []
    for number, (batch, tokens) in enumerate(SHAPES):
        inputs = random_batch(names, config, batch, min(tokens, most), seed=number)
        ours, theirs = torchs.logits(inputs), runtime.logits(inputs)
        difference = float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else float("inf")
        found.append(Shape(batch, min(tokens, most), difference, float(np.abs(ours).max())))
    return found


def validation_score(runtime: Runtime, tokens: Tokens, task: Task, labels: Sequence[float]) -> float | None:
    """Return the task's metric on validation, the one that chose the checkpoint; None if it is undefined."""
    metric = task.metric(task.monitor, across_ranks=False)
    logits = torch.from_numpy(in_order(tokens, lambda batch: runtime.logits(batch)))
    task.score({task.monitor: metric}, logits, task.label_tensor(labels))
    return finite_or_none(float(metric.compute()))


def drop_of(metric: str, value: float | None, torchs: float | None) -> float | None:
    """Return by how many points a metric is worse than torch's: percent, of errors percent of torch's.

    >>> round(drop_of("accuracy", 0.80, 0.81), 6), round(drop_of("mse", 1.02, 1.0), 6), drop_of("f1", None, 0.5)
    (1.0, 2.0, None)
    """
    if value is None or torchs is None:
        return None
    if higher_is_better(metric):
        return 100 * (torchs - value)
    return 100 * (value - torchs) / torchs if torchs else (0.0 if value == torchs else float("inf"))


def check_of(
    runtime: Runtime,
    shapes: Sequence[Shape],
    tokens: Tokens,
    task: Task,
    labels: Sequence[float],
    torchs: float | None,
) -> Check:
    """Return the check of a runtime whose differences at the shapes are known.

    Args:
        runtime: the runtime of a file.
        shapes: the differences.
        tokens: texts of validation.
        task: the task.
        labels: labels of validation.
        torchs: torch's value of the metric.
    """
    value = validation_score(runtime, tokens, task, labels)
    return Check(shapes, task.monitor, value, torchs, drop_of(task.monitor, value, torchs), len(labels))
