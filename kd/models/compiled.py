"""Blocks run by torch.compile, for as long as a forward lasts."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn

from kd.errors import InputError

VARIANTS = 64
"""Graphs of one kind of block before torch gives up and runs it as it is: student and teachers, training and evaluation, with
and without padding each have their own. Torch's default of 8 is for one model."""


@lru_cache
def compiled_forward(kind: type[nn.Module]) -> Callable[..., Any]:
    """The forward of a kind of block, compiled for any batch and length when it is first called."""
    torch._dynamo.config.recompile_limit = VARIANTS
    compiled: Callable[..., Any] = torch.compile(kind.forward, dynamic=True)
    return compiled


@contextmanager
def compiled_blocks(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Run blocks compiled inside this context.

    Only what is between a block's hooks is compiled: `nn.Module.compile` takes the hooks in, and does not notice when others
    are registered, so a tap would read an earlier step. Names and state of the modules stay as they are.
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
def uncompiled(*encoders: Any) -> Iterator[None]:
    """Leave compilation out inside this context: it does not pay for what is run once."""
    kept = [encoder.compiled for encoder in encoders]
    try:
        for encoder in encoders:
            encoder.compiled = False
        yield
    finally:
        for encoder, compiled in zip(encoders, kept, strict=True):
            encoder.compiled = compiled


def check_compiler(device: str) -> None:
    """Compile something small.

    Raises:
        InputError: if that fails, as it does where there is no C++ compiler.
    """
    try:
        # A compiler may have been here once: what it made then would still be found.
        with torch._inductor.config.patch(force_disable_caches=True):
            torch.compile(lambda values: values.sin() + 1)(torch.ones(3, device=device))
    except (RuntimeError, OSError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise InputError(
            f"torch.compile does not work here ({lines[0] if lines else type(error).__name__}); it needs a C++ compiler, "
            "g++ or what the variable CXX names. Use trainer.compile=false",
            "trainer.compile",
        ) from error
