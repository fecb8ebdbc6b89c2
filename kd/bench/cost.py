"""What a turn's seconds are held against: useful arithmetic, the machine's own rate, memory."""

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
"""Trainer precision -> what its matrix products are computed in."""

SIZES = {"cpu": (1024, 1536), "cuda": (4096, 8192)}
"""Rows of the square matrices whose product is timed: large enough that a core, or a GPU, is at its best."""

PRODUCTS = 3
"""Timed products of each size; the fastest counts."""


def device_of(accelerator: str) -> str:
    """`cuda` or `cpu`, for a trainer's accelerator."""
    import torch

    return "cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu"


def synchronise(accelerator: str) -> None:
    """Wait for the device: its work is queued, and a clock read before it is done shows nothing."""
    if device_of(accelerator) == "cuda":
        import torch

        torch.cuda.synchronize()


def peak_bytes(accelerator: str) -> int:
    """The most memory this process has held: tensors of the GPU where there is one, else resident memory.

    Linux lets a process that was started by another inherit the other's peak in `getrusage`, as far as its memory was shared
    at that moment; `VmHWM` begins with the program itself.
    """
    if device_of(accelerator) == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else found * 1024


def forget_peak(accelerator: str) -> None:
    """Begin to measure the peak anew, from what is held now; where the system cannot, the peak of building stays in it."""
    if device_of(accelerator) == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def product_rate(dtype: str, accelerator: str = "cpu") -> float:
    """Floating-point operations per second of this device's matrix product, at its best.

    The product of two n x n matrices is 2 n^3 operations.
    """
    import torch

    device, best = device_of(accelerator), 0.0
    for size in SIZES[device]:
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
    """Useful floating-point operations of training a classifier on each of these examples once.

    Forward, an example of n tokens takes 2 n (weights of the linear maps of embeddings and blocks) for these maps, 4 n^2
    width for each block's attention (queries by keys, attention by values), and 2 (weights of the linear maps of pooler and
    classifier), which see one vector. Backward takes twice as much: a product for the inputs' gradient and one for the
    weights'. Look-ups, normalisation, activations, softmax and the optimiser are left out, as is whatever is done for
    padding, for recomputation, or by a teacher: none of it is useful to the student.

    Args:
        student: whatever surgery it had; linear maps are counted where they stand.
        lengths: tokens of each example, special ones included.
    """
    blocks: Sequence[Any] = list(student.base.get_submodule(student.family.blocks))  # type: ignore[call-overload]
    embeddings = student.base.get_submodule(student.family.embeddings)
    of_tokens = sum(linear_weights(part) for part in (embeddings, *blocks))  # a block that is shared counts at each layer
    of_examples = linear_weights(student) - linear_weights(embeddings, *blocks)
    forward = 0.0
    for length in lengths:
        forward += 2 * length * of_tokens + 4 * len(blocks) * student.width * length**2 + 2 * of_examples
    return 3 * forward


def linear_weights(*parts: Any) -> int:
    """Weights of all linear maps in these modules, without biases; a shared map once."""
    from torch import nn

    maps = dict.fromkeys(module for part in parts for module in part.modules() if isinstance(module, nn.Linear))
    return sum(linear.weight.numel() for linear in maps)
