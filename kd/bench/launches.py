"""Kernel launches, graph launches and waits of a turn on a GPU, counted in a trace of torch's profiler."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.profiler import profile, record_function

SPAN = "kd-bench turn"
"""Name of the annotation of a turn in a trace: calls of the host outside it, such as the profiler's own, are not counted."""

HOST = ("cuda_runtime", "cuda_driver")
"""Categories of calls of CUDA's runtime and driver. Triton's kernels are launched by the driver's (pytorch/kineto 752)."""

KERNEL_LAUNCH = re.compile(r"cu(da)?Launch(Cooperative)?Kernel(Ex|ExC)?")
GRAPH_LAUNCH = re.compile(r"cu(da)?GraphLaunch")
WAIT = re.compile(r"cu(da)?(Stream|Event|Device|Ctx|Thread)Synchronize|cu(da)?Memcpy(?!.*Async)\w*")
"""Calls that return when the device has finished; of copies those that are not asynchronous."""

VERSION = re.compile(r"(_v\d+|_ptsz|_ptds)+$")
"""Ending that the names of calls have in some versions of CUDA."""

PAGEABLE = "Pageable"
"""Part of the name of a copy from or to memory that is not page-locked, as in `Memcpy HtoD (Pageable -> Device)`."""


@dataclass(frozen=True, slots=True)
class Launches:
    """Counts of a turn.

    Attributes:
        kernel_launches: launches of single kernels by the host.
        graph_launches: launches of CUDA graphs by the host.
        kernels: kernels that the device ran, those in graphs included.
        waits: calls in which the host waited for the device.
        pageable_copies: copies between the device and memory that is not page-locked, for which the host waits too.
    """

    kernel_launches: int
    graph_launches: int
    kernels: int
    waits: int
    pageable_copies: int

    def per_step(self, steps: int) -> dict[str, float]:
        """Return the counts divided by the number of optimiser steps of the turn."""
        return {name: count / steps for name, count in asdict(self).items()}


def count_launches(events: Iterable[Mapping[str, Any]]) -> Launches:
    """Count the launches of a turn in the events of a Chrome trace, as torch's profiler exports it.

    Calls of the host count inside the annotation `SPAN`, on any thread: backward passes have threads of their own. What the
    device ran counts from the beginning of the annotation on, because it runs after the call that launched it. A launch that
    is recorded twice, as a call of the runtime and as the driver's call in it, has one correlation number and counts once.

    Args:
        events: `traceEvents` of the trace, in any order.

    Raises:
        ValueError: for a trace without the annotation.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    spans = [event for event in complete if event.get("cat") == "user_annotation" and event["name"] == SPAN]
    if not spans:
        raise ValueError(f"the trace has no annotation '{SPAN}'")
    begin, end = min(span["ts"] for span in spans), max(span["ts"] + span["dur"] for span in spans)
    calls: dict[re.Pattern[str], set[object]] = {KERNEL_LAUNCH: set(), GRAPH_LAUNCH: set(), WAIT: set()}
    kernels = pageable = 0
    for index, event in enumerate(complete):
        if event.get("cat") in HOST and begin <= event["ts"] < end:
            name = VERSION.sub("", event["name"])
            for pattern, seen in calls.items():
                if pattern.fullmatch(name):
                    seen.add(event.get("args", {}).get("correlation", f"event {index}"))
        elif event.get("cat") == "kernel" and event["ts"] >= begin:
            kernels += 1
        elif event.get("cat") == "gpu_memcpy" and event["ts"] >= begin:
            pageable += PAGEABLE in event["name"]
    return Launches(len(calls[KERNEL_LAUNCH]), len(calls[GRAPH_LAUNCH]), kernels, len(calls[WAIT]), pageable)


class Profile:
    """Profile of one turn.

    Args:
        folder: folder for the trace, which is deleted once it is counted.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._profiler: profile | None = None
        self._span: record_function | None = None

    def start(self) -> None:
        """Start to record, in the thread that trains, when the device is idle."""
        import torch
        from torch.profiler import ProfilerActivity, profile, record_function

        cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self._profiler = profile(activities=[ProfilerActivity.CPU, *cuda])
        self._profiler.start()
        self._span = record_function(SPAN)
        self._span.__enter__()

    def stop(self) -> Launches:
        """Stop to record, and return the counts."""
        assert self._profiler is not None
        assert self._span is not None
        self._span.__exit__(None, None, None)
        self._profiler.stop()  # waits for the device
        trace = self.folder / "trace.json"
        self._profiler.export_chrome_trace(str(trace))
        try:
            return count_launches(json.loads(trace.read_text(encoding="utf-8"))["traceEvents"])
        finally:
            trace.unlink()
