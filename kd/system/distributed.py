"""Ranks that torchrun started: their numbers, collectives, and the end of a job."""

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from kd.errors import InputError

if TYPE_CHECKING:
    import torch

    from kd.system.watchdog import Watchdog

T = TypeVar("T")

LONGEST_WAIT = timedelta(days=7)
"""Timeout of a collective: the others wait for rank 0, which may wait for another job's lock, or export a model. Lost ranks
are detected by the watchdog, `kd.system.watchdog`, not by this timeout."""

LAUNCHED = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")
"""Environment variables that Lightning's launcher of DDP sets and leaves."""

_watchdog: "Watchdog | None" = None
_alone = False
"""True on rank 0 inside `on_rank_zero`: the other ranks wait, so collectives must be skipped."""


def _group() -> Any:
    """Return `torch.distributed` if there is a process group, else None; torch is not imported for it.

    A group may be of others than torchrun, which set none or only some of its variables: Lightning's launcher leaves `RANK`
    out, and processes that a script starts need none.
    """
    module = sys.modules.get("torch.distributed")
    return module if module is not None and module.is_available() and module.is_initialized() else None


def world() -> int:
    """Return the number of processes of this job: of the process group, or, before there is one, of the environment."""
    group = _group()
    return int(os.environ.get("WORLD_SIZE", "1")) if group is None else int(group.get_world_size())


def rank() -> int:
    """Return the rank of this process, from 0; as `world`."""
    group = _group()
    return int(os.environ.get("RANK", "0")) if group is None else int(group.get_rank())


def local_rank() -> int:
    """Return the rank of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", rank()))


def local_world() -> int:
    """Return the number of processes of this job on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world()))


def device(accelerator: str) -> "torch.device":
    """Return the device of this process for `trainer.accelerator`: its own GPU if the machine has one, else the CPU."""
    import torch

    gpu = accelerator != "cpu" and torch.cuda.is_available()
    return torch.device("cuda", local_rank()) if gpu else torch.device("cpu")


def is_rank_zero() -> bool:
    """Return whether this is rank 0, the only process that writes files."""
    return rank() == 0


def join() -> None:
    """Wait for the other ranks, if there are any, and start the watchdog."""
    global _watchdog
    if world() > 1 and _watchdog is None:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch would log a stack trace whenever a connection ends
        from kd.system.watchdog import Watchdog

        _watchdog = Watchdog(rank(), world())


def start(accelerator: str) -> None:
    """Initialise the process group if there are other ranks; later calls do nothing."""
    if world() == 1:
        return
    import torch

    if not torch.distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device(accelerator).type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=LONGEST_WAIT)


@contextmanager
def alone_afterwards() -> Iterator[None]:
    """End the process group that Lightning's DDP makes for one process in the body, and restore the environment.

    Other libraries, such as accelerate, take a process with such a group, or with these variables, for a rank of a job. A
    group that was there before, such as torchrun's, is kept.
    """
    import torch

    group = torch.distributed
    if group.is_initialized() or world() > 1:
        yield
        return
    found = {name: os.environ.get(name) for name in LAUNCHED}
    try:
        yield
    finally:
        if group.is_initialized() and group.get_world_size() == 1:
            group.destroy_process_group()
            for name, value in found.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def leave(status: int = 0) -> None:
    """Wait until every rank is done, so that none takes a finished rank for a lost one; end the process if there are others.

    The process ends without interpreter shutdown: a thread of torch or of the watchdog that is inside C++ at that time would
    crash a job that has finished.
    """
    if _watchdog is not None:
        import torch

        if torch.distributed.is_initialized():
            gather(None)
            torch.distributed.destroy_process_group()
        _watchdog.leave()
        end(status)


def broadcast(value: T) -> T:
    """Return rank 0's value on every rank; inside `on_rank_zero` return the value unchanged."""
    if world() == 1 or _alone:
        return value
    import torch

    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def mean(tensors: Sequence[Any]) -> list[Any]:
    """Return the mean of each tensor over all ranks, in one all-reduce; inside `on_rank_zero` return the tensors unchanged."""
    if world() == 1 or _alone or not tensors:
        return list(tensors)
    import torch

    flat = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    parts = (flat / world()).split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def on_rank_zero(make: Callable[[], T]) -> T:
    """Call a function on rank 0 and return its result on every rank; an InputError there is raised on all ranks.

    Inside another such call, which only rank 0 executes, there is no communication.
    """
    global _alone
    if world() == 1 or _alone:
        return make()
    result: Any = None
    failed: InputError | None = None
    if is_rank_zero():
        _alone = True
        try:
            result = make()
        except InputError as error:
            failed = error
        finally:
            _alone = False
    result, error_arguments = broadcast((result, failed and (failed.message, failed.key)))
    if error_arguments:
        raise failed or InputError(*error_arguments)
    return result  # type: ignore[no-any-return]


def gather(value: T) -> list[T]:
    """Return every rank's value on every rank; inside `on_rank_zero` return a list of the value alone."""
    if world() == 1 or _alone:
        return [value]
    import torch

    box: list[Any] = [None] * world()
    torch.distributed.all_gather_object(box, value)
    return box


def gather_rows(rows: Any) -> list[Any]:
    """Return every rank's tensor on every rank, in the order of ranks; this rank's is the tensor itself, with its graph.

    Inside `on_rank_zero`, and before there is a process group, return a list of the tensor alone. The others' tensors have no
    gradient. Bytes are exchanged, so every type is, and no value is rounded.

    Args:
        rows: a tensor whose first dimension may differ between ranks.

    Raises:
        ValueError: on every rank, if the tensors differ in their further dimensions or in their type.
    """
    if world() == 1 or _alone:
        return [rows]
    import torch

    if not torch.distributed.is_initialized():
        return [rows]
    kinds = gather((tuple(rows.shape), str(rows.dtype)))
    if len({(shape[1:], kind) for shape, kind in kinds}) > 1:
        shown = "; ".join(f"{shape} {kind}" for shape, kind in kinds)
        raise ValueError(f"tensors that are gathered may differ in their first dimension alone, those of the ranks are {shown}")
    own = rows.detach().contiguous().flatten().view(torch.uint8)
    sizes = [math.prod(shape) * rows.element_size() for shape, _ in kinds]
    padded = torch.cat([own, own.new_zeros(max(sizes) - len(own))])
    boxes = [torch.empty_like(padded) for _ in kinds]
    torch.distributed.all_gather(boxes, padded)
    parts = [box[:size].view(rows.dtype).view(shape) for box, size, (shape, _) in zip(boxes, sizes, kinds, strict=True)]
    parts[rank()] = rows
    return parts


def print_rank_zero(text: str) -> None:
    """Print on rank 0 only."""
    if is_rank_zero():
        print(text, flush=True)


def total(value: int) -> int:
    """Return the sum over all ranks."""
    return sum(gather(value))


def all_ranks_failed_alike(step: str, error: Exception) -> bool:
    """Return whether every rank failed at a step with the same error, so that the job can go on."""
    return _watchdog is None or _watchdog.all_failed_alike(step, f"{type(error).__name__}: {error}")


def prints_error(message: str) -> bool:
    """Return whether this rank is the one to print an error: an error that all ranks raise is printed once."""
    return _watchdog is None or _watchdog.prints_error(message)


def end(status: int) -> NoReturn:
    """End this process; if there are other ranks, without interpreter shutdown, which might wait for them."""
    if world() == 1:
        sys.exit(status)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # also if the output has been closed
        os._exit(status)


def end_without(error: BaseException) -> None:
    """End this process if an error means that another rank is lost; otherwise return."""
    lost = lost_peer(error)
    if _watchdog is not None and lost is not None:
        from kd.system.watchdog import PEER_LOST

        _watchdog.end(f"another rank has ended or cannot be reached ({lost}); this rank stops too", PEER_LOST)


def lost_peer(error: BaseException | None) -> str | None:
    """Return the message about a lost rank in an error or in its causes; None if the error has another reason.

    Gloo's errors are RuntimeErrors whose text names its transport, NCCL's and those of the store have classes.
    """
    from torch.distributed import DistBackendError, DistNetworkError

    while error is not None:
        text = str(error)
        gloo = "gloo/transport" in text
        nccl = isinstance(error, DistBackendError) and "remote process exited" in text
        if gloo or nccl or isinstance(error, DistNetworkError):
            return text.removeprefix("[").partition("] ")[2].partition(". ")[0] or type(error).__name__
        error = error.__cause__ or error.__context__
    return None
