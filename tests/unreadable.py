"""A device whose values cannot be read: the meta device in the place of an accelerator, for steps that must not wait for it."""

import contextlib
import re
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from kd.system import hardware

DEVICE = torch.device("meta")


def is_here(value: object) -> bool:
    """Return whether it is a tensor of the CPU with one dimension or more: a number is passed to a kernel as it is."""
    return isinstance(value, Tensor) and value.device.type == "cpu" and value.ndim > 0


def line_of_package() -> str:
    """Return the innermost line of the package that is running."""
    frames = [frame for frame in traceback.extract_stack() if re.search(r"/kd/(?!.*site-packages)", frame.filename)]
    return "" if not frames else f"{frames[-1].filename.rpartition('/kd/')[2]}: {frames[-1].line}"


INDEXED = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)


def has_list(index: object) -> bool:
    """Return whether a list of numbers is part of an index."""
    return any(isinstance(one, list | np.ndarray) for one in (index if isinstance(index, tuple) else (index,)))


class Made(TorchFunctionMode):
    """Records tensors that are made of numbers of Python on the device, which `TorchDispatchMode` does not show."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = func in (torch.tensor, torch.as_tensor) and result.device == DEVICE
        if made or (func in INDEXED and args[0].device == DEVICE and has_list(args[1])):
            self.waits.append(f"{func.__name__}: {line_of_package()}")
        return result


class Copied(TorchDispatchMode):
    """Records copies from the CPU to the device, and indices on the CPU, which an accelerator copies before it goes on."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [value for one in (*args, *kwargs.values()) for value in (one if isinstance(one, list | tuple) else [one])]
        if isinstance(result, Tensor) and result.device == DEVICE and any(map(is_here, given)):
            self.waits.append(f"{func}: {line_of_package()}")
        return result


@contextlib.contextmanager
def unreadable(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Let a step run on the device; reading a value raises, and copies that it would wait for are in the list.

    `hardware.to_device` makes the copies that nothing waits for. The device has no autocast, as no step does here.
    """
    waits: list[str] = []
    autocast: Callable[..., Any] = torch.autocast

    def of_cpu(device_type: str, *given: Any, **more: Any) -> Any:
        return autocast("cpu" if device_type == DEVICE.type else device_type, *given, **more)

    with monkeypatch.context() as patch, Made(waits), Copied(waits):
        patch.setattr(torch, "autocast", of_cpu)
        patch.setattr(
            hardware, "to_device", lambda values, device: torch.empty(values.shape, dtype=values.dtype, device=device)
        )
        yield waits


@contextlib.contextmanager
def swapped() -> Iterator[None]:
    """Let parameters stay the same objects on their way to the device, as on the way to any other one."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def move(module: nn.Module) -> None:
    """Move a module to the device."""
    with swapped():
        module.to(DEVICE)
