"""What this machine is, as a result states it. Nothing here imports torch unless it has to."""

import ctypes
import math
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SPINS = 1000
"""Rounds that a waiting thread of GNU's OpenMP, the one in torch's wheels, counts before it sleeps; its own default is 300,000.
Our choice: on two idle cores a step takes as long, on busy ones a third (`experiments/bench/README.md`)."""

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true", "auto")


@lru_cache
def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines) if value}


def cpu_has_bf16() -> bool:
    """Return whether this CPU multiplies bfloat16 in hardware; emulated, it is slower than float32."""
    flags = _cpuinfo().get("flags", "").split()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def is_asynchronous(tensor: "Tensor") -> bool:
    """Return True where reading a tensor's values waits for a device, as it does on accelerators."""
    return tensor.device.type != "cpu"


def resolve_precision(precision: str, accelerator: str) -> str:
    """`auto` as a precision: bf16 where the machine computes it, else float32."""
    if precision != "auto":
        return precision
    if accelerator == "cpu":
        return "bf16-mixed" if cpu_has_bf16() else "32-true"
    import torch

    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    return "bf16-mixed" if cpu_has_bf16() else "32-true"


def configure_openmp() -> None:
    """Let threads that wait sleep early, and have no more of them than a container's quota of processor time lasts for.

    By default a thread counts for milliseconds before it sleeps. Where other processes want the cores, the thread that it waits
    for is the one that gets none meanwhile, at each of the hundreds of products of a step. And OpenMP counts the cores that a
    process may run on, not the time that its control group gives it: with more threads all of them are stopped now and then.

    OpenMP reads its settings when torch is imported, so this comes before. What the user has set stays. How many threads there
    are changes a result by rounding alone, and `result.json` states it; that they follow from the machine and not from its
    present load keeps runs that are resumed equal to the bit.
    """
    if not any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
    quota = cpu_quota()
    if quota < (os.cpu_count() or 1) and not any(name in os.environ for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")):
        allowed = len(os.sched_getaffinity(0))
        os.environ["OMP_NUM_THREADS"] = str(max(1, min(int(quota), allowed)))


def cpu_quota(root: Path = Path("/")) -> float:
    """Processors whose time the control groups of this process have; infinity without a limit. Linux alone knows them.

    Args:
        root: of the file system.
    """
    table = root / "proc/self/cgroup"
    limits = [math.inf]
    for line in table.read_text().splitlines() if table.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # Version 2 has one tree, version 1 one for each controller. A container may see its own group as the root.
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        group = mount / path.lstrip("/")
        for folder in (mount, group, *(parent for parent in group.parents if mount in parent.parents)):
            quota, period = _quota_of(folder)
            if quota > 0 and period > 0:
                limits.append(quota / period)
    return min(limits)


def _quota_of(folder: Path) -> tuple[float, float]:
    """Microseconds of processor time in each period of so many, of one control group; zeros where it has no limit."""
    names = ("cpu.max",) if (folder / "cpu.max").is_file() else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    try:
        words = [word for name in names for word in (folder / name).read_text().split()]
        return float(words[0]), float(words[1])
    except (OSError, ValueError, IndexError):  # no such files, or "max"
        return 0.0, 0.0


def keep_memory() -> bool:
    """Let the C library keep memory that is freed; whether it does.

    By default glibc hands large blocks back to the kernel, so that the gradient of an embedding table, made and freed in each
    step, is mapped and filled with zeros by the kernel page by page each time. Peak memory stays what it is. Elsewhere, and
    where the user has set malloc up, nothing is done.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    trim_threshold, mmap_threshold = -1, -3  # as malloc.h numbers them
    return bool(library.mallopt(mmap_threshold, 1 << 30) and library.mallopt(trim_threshold, (1 << 31) - 1))


def hardware() -> dict[str, Any]:
    """Processor, cores, accelerators."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": _cpuinfo().get("model name", platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def versions(more: Sequence[str] = ()) -> dict[str, str]:
    """Versions of what decides a result, and of further packages."""
    found = {"python": sys.version.split()[0]}
    for name in ("kd", "torch", "lightning", "transformers", "tokenizers", "torchmetrics", "hydra-core", "numpy", *more):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def version_line() -> str:
    """Version of kd and of what decides its results, as `--version` prints them."""
    found = versions()
    return " ".join(f"{name} {found[name]}" for name in ("kd", "python", "torch", "lightning", "transformers", "hydra-core"))


def git() -> dict[str, Any] | None:
    """Commit of the checkout that kd runs from, and whether it has changes; None for an installed wheel."""
    folder = Path(__file__).parent.parent
    if not (folder / ".git").exists():
        return None
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
        changes = subprocess.run(["git", "status", "--porcelain"], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(changes.stdout.strip())}
