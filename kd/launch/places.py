"""Division of a machine among the processes that execute jobs."""

import os
from collections.abc import Mapping, Sequence

from kd.errors import InputError
from kd.system.hardware import cpu_quota, threads_asked_for


def cores() -> int:
    """Return the number of processors that this process may use: its affinity, or the quota of its control group if less."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(allowed, cpu_quota())))


def gpus() -> int:
    """Return the number of GPUs that this process sees."""
    import torch

    return torch.cuda.device_count()


def places(workers: int | None, uses_gpus: bool) -> Sequence[Mapping[str, str]]:
    """Return the environment variables of each place in which jobs are executed.

    On a machine with GPUs each place has one of them. Without, by default there is a place for each processor, with one thread,
    because threads of one run wait for each other at each of its small matrix products. Our choice.

    Args:
        workers: number of places; None for one for each GPU, or else for each processor.
        uses_gpus: True if the jobs use GPUs where there are any.

    Raises:
        InputError: if `workers` is not positive.
    """
    if workers is not None and workers < 1:
        raise InputError(f"workers={workers} must be at least 1", "launcher.workers")
    devices = gpus() if uses_gpus else 0
    count = workers or devices or cores()
    threads = threads_asked_for() or str(max(1, cores() // count))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if os.environ.get("CUDA_VISIBLE_DEVICES") else None
    environments = []
    for number in range(count):
        environment = {"OMP_NUM_THREADS": threads}
        if devices:
            device = number % devices
            environment["CUDA_VISIBLE_DEVICES"] = visible[device] if visible else str(device)
        environments.append(environment)
    return environments
