"""CUDA graphs of the blocks in training steps: where a step begins, and what may be overwritten then.

`torch.compile` with `mode="reduce-overhead"` records a graph of each block's forward and backward pass for every shape, at the
first passes of this shape, and replays it afterwards. The tensors that a graph writes, states of layers and gradients, are
at fixed addresses, so that the next step overwrites them. Torch would take each call of a compiled function for a
step of its own, and overwrite what the teacher's first block gave while a method still reads it; therefore every batch begins
with `torch.compiler.cudagraph_mark_step_begin`, and all passes of student, teachers and peers up to the next one are one step.
"""

from collections.abc import Collection, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from kd.config.schema import GRAPHS, TrainerSpec
from kd.data.batch import Batch
from kd.engines.base import Engine
from kd.models import CachedTeacher, Encoder
from kd.models.compiled import GraphShapes


def graph_callbacks(trainer: TrainerSpec) -> list[pl.Callback]:
    """Return the callback of a run whose steps have CUDA graphs; none for other runs."""
    return [GraphSteps()] if trainer.compile == GRAPHS else []


def line_of_graphs(trainer: TrainerSpec, lengths: Collection[int]) -> str | None:
    """Return the preflight's line about the graphs of a run whose batches have these lengths; None for a run without any."""
    if trainer.compile != GRAPHS:
        return None
    return (
        f"training batches are padded to one of {len(lengths)} lengths, at most {max(lengths)} tokens, and blocks run as CUDA "
        "graphs, which are recorded at the first batches of each; a pass of another shape runs uncompiled (trainer.compile)"
    )


def encoders_of(engine: nn.Module) -> Iterator[Encoder]:
    """Yield the models of an engine whose passes have the shapes of its batches, frozen ones included, each once.

    A teacher of which some outputs are cached is left out: the number of examples that it runs on differs from batch to batch,
    and where it happens to be the size of another batch, a graph would be recorded for it.
    """
    seen: dict[Encoder, None] = {}
    for module in engine.modules():
        if isinstance(module, Encoder):
            seen[module] = None
        elif isinstance(module, Engine):
            frozen = (*module.teachers, *module.aids.values())
            seen |= dict.fromkeys(one.encoder for one in frozen if not isinstance(one, CachedTeacher))
    yield from seen


class GraphSteps(pl.Callback):
    """Callback that lets the blocks of all models run as CUDA graphs in training steps, and nowhere else.

    Validation runs uncompiled: its batches have other shapes, of which graphs would be recorded too. So does what precedes
    training, as the preflight and the passes that fill a cache, and what follows it.
    """

    def __init__(self) -> None:
        self.encoders: list[Encoder] = []
        self.shapes: GraphShapes | None = None
        self._first = True
        """True in the first batch of an optimiser step."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the blocks run as graphs, of the shapes that training batches have."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        sampler: Any = trainer.train_dataloader.batch_sampler  # type: ignore[union-attr]
        self.shapes = GraphShapes(frozenset(sampler.sizes()), frozenset(data.padded_lengths))
        self.encoders = list(encoders_of(pl_module))
        self._set(self.shapes)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int) -> None:
        """Begin a step, before the first pass over the batch."""
        torch.compiler.cudagraph_mark_step_begin()
        self._first = batch_idx % trainer.accumulate_grad_batches == 0

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy the gradients that the next batch is added to: a graph of that batch would overwrite them.

        Gradients of the first batch of an optimiser step are the very tensors that graphs wrote; those of the next batches are
        added to them in place.
        """
        if trainer.accumulate_grad_batches == 1 or not self._first:
            return
        for parameter in dict.fromkeys(parameter for encoder in self.encoders for parameter in encoder.blocks.parameters()):
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run uncompiled."""
        self._set(None)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the blocks run as graphs again, if training goes on."""
        self._set(self.shapes)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run uncompiled from here on."""
        self._set(None)

    def _set(self, shapes: GraphShapes | None) -> None:
        for encoder in self.encoders:
            encoder.graphs = shapes
