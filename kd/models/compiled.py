"""Compilation of transformer blocks by torch.compile, for the duration of a forward pass."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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


@lru_cache
def compiled_forward(kind: type[nn.Module]) -> Callable[..., Any]:
    """Return the forward of a class of blocks; its first call compiles it for any batch size and length."""
    torch.compiler.config.recompile_limit = VARIANTS
    compiled: Callable[..., Any] = torch.compile(kind.forward, dynamic=True)
    return compiled


@contextmanager
def compiled_blocks(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Run blocks compiled inside this context.

    Only a block's `forward` is compiled, without its hooks: `nn.Module.compile` compiles the hooks too and does not notice
    when others are registered, so a tap would read an earlier step. Names and state of the modules do not change.
    """
    changed = list(dict.fromkeys(blocks))
    try:
        for block in changed:
            block.forward = partial(compiled_forward(type(block)), block)  # type: ignore[arg-type]
        yield
    finally:
        for block in changed:
            block.__dict__.pop("forward", None)


@contextmanager
def uncompiled(*encoders: "Encoder") -> Iterator[None]:
    """Switch compilation off inside this context: it does not pay for a forward pass that runs once."""
    settings = [encoder.compiled for encoder in encoders]
    try:
        for encoder in encoders:
            encoder.compiled = False
        yield
    finally:
        for encoder, compiled in zip(encoders, settings, strict=True):
            encoder.compiled = compiled


def check_compiler(device: str) -> None:
    """Check that torch.compile works on this machine, by compiling a small function.

    Raises:
        InputError: if it fails, as it does without a C++ compiler.
    """
    try:
        # Without this, kernels cached before a compiler was removed would hide that there is none now.
        with torch.compiler.config.patch(force_disable_caches=True):  # type: ignore[attr-defined]
            torch.compile(lambda values: values.sin() + 1)(torch.ones(3, device=device))
    except (RuntimeError, OSError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise InputError(
            f"torch.compile does not work here ({lines[0] if lines else type(error).__name__}); it needs a C++ compiler, "
            "g++ or what the variable CXX names. Use trainer.compile=false",
            "trainer.compile",
        ) from error
