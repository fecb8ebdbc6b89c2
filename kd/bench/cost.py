"""Reference quantities for a benchmark's times: useful floating-point operations, rate of matrix products, memory."""

import contextlib
import resource
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd.models import Encoder

DTYPES = {"32-true": "float32", "bf16-mixed": "bfloat16", "16-mixed": "float16", "64-true": "float64"}
"""Trainer precision -> data type of its matrix products."""

MATRIX_SIZES = {"cpu": (1024, 1536), "cuda": (4096, 8192)}
"""Rows of the square matrices whose product is timed: large enough for a core, or a GPU, to reach its peak rate."""

PRODUCTS = 3
"""Number of timed products of each size; the fastest counts."""


def device_of(accelerator: str) -> str:
    """Return `cuda` or `cpu`, for a trainer's accelerator."""
    import torch

    return "cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu"


def synchronise(accelerator: str) -> None:
    """Wait until the device has finished: GPU kernels run asynchronously, so an earlier clock reading would be too low."""
    if device_of(accelerator) == "cuda":
        import torch

        torch.cuda.synchronize()


def peak_bytes(accelerator: str) -> int:
    """Return the peak memory of this process in bytes: of tensors on the GPU if it is used, else resident memory.

    On Linux a child process inherits its parent's peak in `getrusage`, as far as memory was shared when it started; `VmHWM`
    counts from the start of the program itself.
    """
    if device_of(accelerator) == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reserved_bytes(accelerator: str) -> int | None:
    """Return the peak of the memory that torch has reserved on the GPU, in bytes; None if no GPU is used."""
    if device_of(accelerator) != "cuda":
        return None
    import torch

    return torch.cuda.max_memory_reserved()


def forget_peak(accelerator: str) -> None:
    """Reset the peak to the memory in use now; where the system cannot do that, the peak still includes building."""
    if device_of(accelerator) == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def product_rate(dtype: str, accelerator: str = "cpu") -> float:
    """Return the peak rate of this device's matrix product, in floating-point operations per second.

    The product of two n x n matrices is 2 n^3 operations.
    """
    import torch

    device, best = device_of(accelerator), 0.0
    for size in MATRIX_SIZES[device]:
        left, right = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
        torch.mm(left, right)
        for _ in range(PRODUCTS):
            synchronise(accelerator)
            began = time.perf_counter()
            torch.mm(left, right)
            synchronise(accelerator)
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def training_flops(student: "Encoder", lengths: Iterable[int]) -> float:
    """Return the useful floating-point operations of training a classifier on each of these examples once.

    Forward, an example of n tokens takes 2 n (weights of the linear maps of embeddings and blocks) for these maps, 4 n^2
    width for each block's attention (queries by keys, attention by values), and 2 (weights of the linear maps of pooler and
    classifier), which see one vector. Backward takes twice as much: a product for the inputs' gradient and one for the
    weights'. Look-ups, normalisation, activations, softmax and the optimiser are left out, as is whatever is done for
    padding, for recomputation, or by a teacher: none of it is useful to the student.

    Args:
        student: the model as it is trained, after any surgery; its linear maps are counted as they are.
        lengths: tokens of each example, special ones included.
    """
    blocks: Sequence[Any] = list(student.base.get_submodule(student.family.blocks))  # type: ignore[call-overload]
    embeddings = student.base.get_submodule(student.family.embeddings)
    of_tokens = sum(linear_weights(part) for part in (embeddings, *blocks))  # a shared block counts once per layer
    of_examples = linear_weights(student) - linear_weights(embeddings, *blocks)
    forward = 0.0
    for length in lengths:
        forward += 2 * length * of_tokens + 4 * len(blocks) * student.width * length**2 + 2 * of_examples
    return 3 * forward


def linear_weights(*parts: Any) -> int:
    """Return the number of weights of all linear maps in these modules, without biases; a shared map counts once."""
    from torch import nn

    maps = dict.fromkeys(module for part in parts for module in part.modules() if isinstance(module, nn.Linear))
    return sum(linear.weight.numel() for linear in maps)
