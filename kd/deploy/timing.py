"""Latencies of calls that take turns: every round calls each candidate once, and starts with another one."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kd.errors import InputError
from kd.system.hardware import cpu_quota

Call = Callable[[], object]
"""What is timed."""

Prepare = Callable[[int], Call]
"""Function from the number of a round to its call; what it does itself is not timed."""


@dataclass(frozen=True)
class Latency:
    """Latency of a candidate in milliseconds: percentiles over its calls, linearly interpolated."""

    calls: int
    median: float
    p95: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Latency":
        """Return the latency of these calls."""
        median, p95, p99 = (round(1000 * float(value), 4) for value in np.percentile(seconds, (50, 95, 99)))
        return cls(len(seconds), median, p95, p99)


def in_turns(candidates: Mapping[str, Prepare], calls: int, warm_up: int) -> dict[str, list[float]]:
    """Return the seconds of calls of each candidate.

    Load of the machine that comes and goes, and the state in which one call leaves the processor for the next, thus affect all
    candidates alike: in as many rounds as there are candidates, each is called once in every position.

    Args:
        candidates: name -> its calls.
        calls: number of rounds that are timed.
        warm_up: number of rounds before that.
    """
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warm_up + calls):
        first = number % len(names)
        for name in [*names[first:], *names[:first]]:
            call = candidates[name](number)
            began = time.perf_counter()
            call()
            taken = time.perf_counter() - began
            if number >= warm_up:
                seconds[name].append(taken)
    return seconds


def usable_cores() -> int:
    """Return the number of cores that this process may use, by its affinity and its control group's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(cpu_quota(), allowed)))


def checked_load(cores: int, own: int = 0) -> float:
    """Return the load of this machine, the mean number of threads that computed or waited for a core in the last minute.

    Args:
        cores: number of cores.
        own: number of threads of this process that computed.

    Raises:
        InputError: if the load without this process's is above the number of cores.
    """
    load = os.getloadavg()[0]
    if load > cores + own:
        ours = f", of which {own} may be ours" if own else ""
        raise InputError(
            f"the load of this machine is {load:.1f} on {cores} core(s){ours}: other work would be measured with it; wait "
            "until it is idle"
        )
    return round(load, 2)
