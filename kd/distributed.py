"""Ranks, as torchrun started them."""

import os
from collections.abc import Sequence
from typing import Any


def world() -> int:
    """Processes of this job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_world() -> int:
    """Processes of this job on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world()))


def is_first() -> bool:
    """Whether this process writes."""
    return rank() == 0


def start(accelerator: str) -> None:
    """Join the other processes, if there are any; done once."""
    import torch

    if world() > 1 and not torch.distributed.is_initialized():
        gpu = accelerator != "cpu" and torch.cuda.is_available()
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")


def agree(value: Any) -> Any:
    """The first rank's value, on every rank."""
    if world() == 1:
        return value
    import torch

    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def mean(tensors: Sequence[Any]) -> list[Any]:
    """The mean over all ranks of each tensor, in one exchange."""
    if world() == 1:
        return list(tensors)
    import torch

    flat = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    parts = (flat / world()).split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def total(value: int) -> int:
    """The sum over all ranks."""
    if world() == 1:
        return value
    import torch

    box: list[Any] = [None] * world()
    torch.distributed.all_gather_object(box, value)
    return sum(box)
