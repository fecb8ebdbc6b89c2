"""Description and settings of this machine, as results record them. torch is imported only inside functions that need it."""

import ctypes
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SPINS = 1000
"""Value of `GOMP_SPINCOUNT`: rounds for which a waiting thread of GNU's OpenMP, the one in torch's wheels, spins before it
sleeps; the default is 300,000. Our choice: on two idle cores a step takes as long as with the default, on busy ones a third of
that (`experiments/bench/README.md`)."""

_threads: str | None = None
"""Value of `OMP_NUM_THREADS` that `configure_openmp` has set; None if it left the variable alone."""

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
    """Return True if reading a tensor's values waits for a device, as on accelerators."""
    return tensor.device.type != "cpu"


def seed_torch(seed: int, device: "torch.device") -> None:
    """Seed torch's generators for a device, as `torch.manual_seed` does.

    That seeds all devices, and where CUDA is not used yet it formats a stack trace for each call, which takes 1 to 5 ms.
    """
    import torch

    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def to_device(values: "Tensor", device: "torch.device") -> "Tensor":
    """Return a tensor of the CPU on a device. The copy to a GPU starts from page-locked memory, and nothing waits for it."""
    cuda = device.type == "cuda"
    return (values.pin_memory() if cuda else values).to(device, non_blocking=cuda)


def resolve_precision(precision: str, accelerator: str) -> str:
    """Return the precision with `auto` resolved: bf16 if the machine computes it in hardware, else float32."""
    if precision != "auto":
        return precision
    if accelerator == "cpu":
        return "bf16-mixed" if cpu_has_bf16() else "32-true"
    import torch

    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    return "bf16-mixed" if cpu_has_bf16() else "32-true"


def configure_openmp() -> None:
    """Shorten the spinning of waiting OpenMP threads, and limit their number to a container's quota of processor time.

    By default a waiting thread spins for milliseconds before it sleeps. If other processes compete for the cores, it thereby
    takes a core from the very thread that it waits for, at each of the hundreds of matrix products of a step. OpenMP also
    counts the cores that a process may run on, not the quota of its control group: more threads than the quota covers are
    throttled together.

    OpenMP reads its settings when torch is imported, so call this before. Variables that the user has set are not changed. The
    number of threads changes results by rounding only, and `result.json` records it; it depends on the machine, not on its
    current load, so that resumed runs are bitwise equal.
    """
    global _threads
    if not any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
    quota = cpu_quota()
    if quota < (os.cpu_count() or 1) and not any(name in os.environ for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")):
        allowed = len(os.sched_getaffinity(0))
        os.environ["OMP_NUM_THREADS"] = _threads = str(max(1, min(int(quota), allowed)))


def threads_asked_for() -> str | None:
    """Return `OMP_NUM_THREADS` as the user has set it; None if it is not set, or only by `configure_openmp`."""
    threads = os.environ.get("OMP_NUM_THREADS")
    return None if not threads or threads == _threads else threads


def cpu_quota(root: Path = Path("/")) -> float:
    """Return the CPU quota of this process's control groups, in processors; infinity without a limit, and outside Linux.

    Args:
        root: root of the file system.
    """
    limits = [math.inf]
    for folder in _control_groups(root, "cpu"):
        quota, period = _quota_of(folder)
        if quota > 0 and period > 0:
            limits.append(quota / period)
    return min(limits)


def _control_groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control groups for `cpu` or `memory`, and of those above; some may not exist."""
    table = root / "proc/self/cgroup"
    for line in table.read_text().splitlines() if table.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # Version 2 has one tree, version 1 one per controller. A container may see its own group as the root.
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        group = mount / path.lstrip("/")
        yield from (mount, group, *(parent for parent in group.parents if mount in parent.parents))


def _quota_of(folder: Path) -> tuple[float, float]:
    """Return the quota and the period of one control group, in microseconds; zeros if it has no limit."""
    names = ("cpu.max",) if (folder / "cpu.max").is_file() else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    try:
        words = [word for name in names for word in (folder / name).read_text().split()]
        return float(words[0]), float(words[1])
    except (OSError, ValueError, IndexError):  # no such files, or "max"
        return 0.0, 0.0


def available_memory(root: Path = Path("/")) -> float:
    """Return the bytes that processes may still take without swapping, or less if a control group has less left.

    Infinity outside Linux, where nothing says it.

    Args:
        root: root of the file system.
    """
    table = root / "proc/meminfo"
    lines = table.read_text().splitlines() if table.is_file() else []
    rooms = [1024 * float(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return min([math.inf, *rooms, *(_memory_left_in(folder) for folder in _control_groups(root, "memory"))])


def _memory_left_in(folder: Path) -> float:
    """Return the bytes that one control group has left; infinity if it has no limit. Cached pages of files count as free."""
    second = (folder / "memory.max").is_file()
    limit, usage = ("memory.max", "memory.current") if second else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    try:
        most, used = float((folder / limit).read_text()), float((folder / usage).read_text())
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such files, or "max"
        return math.inf
    return max(0.0, most - used + float(counts.get("inactive_file" if second else "total_inactive_file", 0)))


def keep_memory() -> bool:
    """Make glibc keep freed memory; return whether the setting took effect.

    By default glibc returns large blocks to the kernel, so that the gradient of an embedding table, allocated and freed in each
    step, is mapped and zeroed by the kernel page by page each time. Peak memory does not change. With another C library, and
    if the user has configured malloc, nothing is changed.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD in malloc.h
    return bool(library.mallopt(mmap_threshold, 1 << 30) and library.mallopt(trim_threshold, (1 << 31) - 1))


def cpu_name() -> str:
    """Return the name of the processor."""
    return _cpuinfo().get("model name", platform.processor() or platform.machine())


def hardware() -> dict[str, Any]:
    """Return the processor, the numbers of cores and threads, and the GPUs."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def versions(more: Sequence[str] = ()) -> dict[str, str]:
    """Return the versions of Python and of the packages that affect results, and of further packages."""
    installed = {"python": sys.version.split()[0]}
    for name in ("kd", "torch", "lightning", "transformers", "tokenizers", "torchmetrics", "hydra-core", "numpy", *more):
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = "unknown"
    return installed


def version_line() -> str:
    """Return the versions of kd, Python and the main packages in one line, for `--version`."""
    installed = versions()
    return " ".join(
        f"{name} {installed[name]}" for name in ("kd", "python", "torch", "lightning", "transformers", "hydra-core")
    )


@cache
def git() -> dict[str, Any] | None:
    """Return the commit of the checkout that kd runs from, and whether its code or configuration is modified.

    None for an installed wheel. It is read once, and first when a run begins, so that a later commit is not taken for its own.
    """
    folder = Path(__file__).parent.parent.parent
    if not (folder / ".git").exists():
        return None
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
        # Figures, which a table adds to, and documents are left out.
        status = ["git", "status", "--porcelain", "--untracked-files=normal", "--", "kd", "conf"]
        changes = subprocess.run(status, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(changes.stdout.strip())}
