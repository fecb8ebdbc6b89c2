"""Latencies of calls that take turns: every round calls each candidate once, in another order."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from kd.errors import InputError

Call = Callable[[], object]
"""Function whose time is taken."""

Prepare = Callable[[int], Call]
"""Function from the number of a round to its call; what it does itself is not timed."""

Name = TypeVar("Name")


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


def order_of(number: int, count: int) -> list[int]:
    """Return the order of candidates in a round.

    In as many rounds as there are candidates, twice as many for an odd number, each has every position and follows every other
    one equally often: what a call leaves in the caches of the processor affects all alike.

    Source: E. J. Williams, Experimental designs balanced for the estimation of residual effects of treatments, Australian
    Journal of Scientific Research A 2 (1949).

    Args:
        number: number of the round.
        count: number of candidates.

    >>> [order_of(number, 4) for number in range(4)]
    [[0, 3, 1, 2], [1, 0, 2, 3], [2, 1, 3, 0], [3, 2, 0, 1]]
    """
    outwards = [at // 2 if at % 2 == 0 else count - 1 - at // 2 for at in range(count)]
    turned = [(at + number) % count for at in outwards]
    return turned[::-1] if number // count % 2 else turned


def in_turns(candidates: Mapping[Name, Prepare], calls: int, warm_up: int) -> dict[Name, list[float]]:
    """Return the seconds of calls of each candidate, which take turns in the order of `order_of`.

    Load of the machine that comes and goes affects all candidates alike.

    Args:
        candidates: name -> its calls.
        calls: number of rounds that are timed.
        warm_up: number of rounds before that.
    """
    names = list(candidates)
    seconds: dict[Name, list[float]] = {name: [] for name in names}
    for number in range(warm_up + calls):
        for at in order_of(number, len(names)):
            call = candidates[names[at]](number)
            began = time.perf_counter()
            call()
            taken = time.perf_counter() - began
            if number >= warm_up:
                seconds[names[at]].append(taken)
    return seconds


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
