"""Compilation of transformer blocks by torch.compile, for the duration of a forward pass."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kd.errors import InputError

if TYPE_CHECKING:
    from kd.models.encoder import Encoder

VARIANTS = 64
"""Maximum number of graphs for one class of blocks, beyond which torch runs it uncompiled: student and teachers, training and
evaluation, with and without padding each need their own. Torch's default of 8 is meant for one model."""


@dataclass(frozen=True)
class GraphShapes:
    """Shapes of the forward passes whose blocks run as CUDA graphs; the blocks of all others run uncompiled.

    A graph is recorded for every shape, at the first passes of this shape, so there must be few of them: the rows and the
    lengths of training batches. A pass over some of the rows of a batch, whose number changes from step to step, would be
    recorded in every step.

    Attributes:
        rows: numbers of examples.
        lengths: numbers of tokens after padding.
    """

    rows: frozenset[int]
    lengths: frozenset[int]

    def __contains__(self, shape: torch.Size) -> bool:
        rows, tokens = shape
        return rows in self.rows and tokens in self.lengths


@lru_cache
def compiled_forward(kind: type[nn.Module], mode: str | None = None) -> Callable[..., Any]:
    """Return the forward of a class of blocks; its first call compiles it for any batch size and length.

    Args:
        kind: the class.
        mode: mode of `torch.compile`; None for the default. With `reduce-overhead` one compiled function serves every shape
            too, and a CUDA graph of it is recorded for each.
    """
    torch.compiler.config.recompile_limit = VARIANTS
    compiled: Callable[..., Any] = torch.compile(kind.forward, dynamic=True, mode=mode)
    return compiled


@contextmanager
def compiled_blocks(blocks: Iterable[nn.Module], mode: str | None = None) -> Iterator[None]:
    """Run blocks compiled inside this context.

    Only a block's `forward` is compiled, without its hooks: `nn.Module.compile` compiles the hooks too and does not notice
    when others are registered, so a tap would read an earlier step. Names and state of the modules do not change.

    Args:
        blocks: the blocks.
        mode: see `compiled_forward`.
    """
    changed = list(dict.fromkeys(blocks))
    try:
        for block in changed:
            block.forward = partial(compiled_forward(type(block), mode), block)  # type: ignore[arg-type]
        yield
    finally:
        for block in changed:
            block.__dict__.pop("forward", None)


@contextmanager
def uncompiled(*encoders: "Encoder") -> Iterator[None]:
    """Switch compilation off inside this context: it does not pay for a forward pass that runs once."""
    settings = [(encoder.compiled, encoder.graphs) for encoder in encoders]
    try:
        for encoder in encoders:
            encoder.compiled, encoder.graphs = False, None
        yield
    finally:
        for encoder, setting in zip(encoders, settings, strict=True):
            encoder.compiled, encoder.graphs = setting


def check_compiler(device: str, mode: str | None = None) -> None:
    """Check that torch.compile works on this machine, by compiling a small function.

    Args:
        device: type of the device.
        mode: mode of `torch.compile`; None for the default.

    Raises:
        InputError: if it fails, as it does without a C++ compiler.
    """
    try:
        # Without this, kernels cached before a compiler was removed would hide that there is none now.
        with torch.compiler.config.patch(force_disable_caches=True):  # type: ignore[attr-defined]
            function = torch.compile(lambda values: values.sin() + 1, mode=mode)
            for _ in range(1 if mode is None else 3):  # a CUDA graph is recorded by the second call, and replayed by the third
                function(torch.ones(3, device=device))
    except (RuntimeError, OSError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise InputError(
            f"torch.compile does not work here ({lines[0] if lines else type(error).__name__}); it needs a C++ compiler, "
            "g++ or what the variable CXX names. Use trainer.compile=false",
            "trainer.compile",
        ) from error
