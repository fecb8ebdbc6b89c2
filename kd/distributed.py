"""Ranks, as torchrun started them."""

import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from kd.errors import InputError

if TYPE_CHECKING:
    from kd.watch import Watchdog

T = TypeVar("T")

LONGEST_WAIT = timedelta(days=7)
"""Of a collective: the first rank may wait for another job's lock, or export, while the others wait for it. A rank that is
gone is found by the watch."""

_watchdog: "Watchdog | None" = None
_alone = False
"""Whether the first rank is at work while the others wait, so that it has nobody to exchange with."""


def world() -> int:
    """Processes of this job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process among those on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", rank()))


def local_world() -> int:
    """Processes of this job on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world()))


def is_rank_zero() -> bool:
    """Return whether this process writes."""
    return rank() == 0


def join() -> None:
    """Meet the other ranks, if there are any, and begin to watch them."""
    global _watchdog
    if world() > 1 and _watchdog is None:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # it would show a stack where a connection ends
        from kd.watch import Watchdog

        _watchdog = Watchdog(rank(), world())


def start(accelerator: str) -> None:
    """Open the channel for collectives, if there are other ranks; done once."""
    if world() == 1:
        return
    import torch

    if not torch.distributed.is_initialized():
        gpu = accelerator != "cpu" and torch.cuda.is_available()
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=LONGEST_WAIT)


def leave(status: int = 0) -> None:
    """Wait until every rank has done its work, so that nobody takes one that is done for dead; end, if there are others.

    The process ends at once: a thread of torch's or of the watch that is inside C++ when the interpreter goes away would take
    a finished job down with it.
    """
    if _watchdog is not None:
        import torch

        if torch.distributed.is_initialized():
            gather(None)
            torch.distributed.destroy_process_group()
        _watchdog.leave()
        end(status)


def broadcast(value: T) -> T:
    """The first rank's value, on every rank; the value itself inside `on_rank_zero`."""
    if world() == 1 or _alone:
        return value
    import torch

    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def mean(tensors: Sequence[Any]) -> list[Any]:
    """The mean over all ranks of each tensor, in one exchange; the tensors themselves inside `on_rank_zero`."""
    if world() == 1 or _alone:
        return list(tensors)
    import torch

    flat = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    parts = (flat / world()).split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def on_rank_zero(make: Callable[[], T]) -> T:
    """Return on every rank what the first one makes; if it fails by an InputError, all do.

    Inside another such call, which only the first rank reaches, nothing is exchanged.
    """
    global _alone
    if world() == 1 or _alone:
        return make()
    made: Any = None
    failed: InputError | None = None
    if is_rank_zero():
        _alone = True
        try:
            made = make()
        except InputError as error:
            failed = error
        finally:
            _alone = False
    made, wrong = broadcast((made, failed and (failed.message, failed.key)))
    if wrong:
        raise failed or InputError(*wrong)
    return made  # type: ignore[no-any-return]


def gather(value: T) -> list[T]:
    """Every rank's value, on every rank; the value alone inside `on_rank_zero`."""
    if world() == 1 or _alone:
        return [value]
    import torch

    box: list[Any] = [None] * world()
    torch.distributed.all_gather_object(box, value)
    return box


def print_rank_zero(text: str) -> None:
    """Print, on the first rank only."""
    if is_rank_zero():
        print(text, flush=True)


def total(value: int) -> int:
    """The sum over all ranks."""
    return sum(gather(value))


def all_ranks_failed_alike(step: str, error: Exception) -> bool:
    """Return whether every rank fails at a step in the same way, so that they can go on together."""
    return _watchdog is None or _watchdog.all_failed_alike(step, f"{type(error).__name__}: {error}")


def prints_error(message: str) -> bool:
    """Return whether this rank is the one to print an error: what all ranks find is printed once."""
    return _watchdog is None or _watchdog.prints_error(message)


def end(status: int) -> NoReturn:
    """End this process. With other ranks it does so at once: an interpreter that tidies up may wait for them."""
    if world() == 1:
        sys.exit(status)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # also where nobody listens any more
        os._exit(status)


def end_without(error: BaseException) -> None:
    """End this process if an error says that another rank is gone; return if it does not."""
    lost = lost_peer(error)
    if _watchdog is not None and lost is not None:
        from kd.watch import PEER_LOST

        _watchdog.end(f"another rank has ended or cannot be reached ({lost}); this rank stops too", PEER_LOST)


def lost_peer(error: BaseException | None) -> str | None:
    """What an error, or one that it came from, says of a rank that is gone; None if it says nothing of the kind.

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
