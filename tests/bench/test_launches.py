"""Counts of a turn on a GPU, in traces of torch's profiler that are made by hand: no GPU is needed."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kd.bench.launches import GRAPH_LAUNCH, KERNEL_LAUNCH, SPAN, WAIT, Launches, Profile, count_launches

numbers = itertools.count(1)


def event(cat: str, name: str, ts: float = 50.0, correlation: int | None = None, **more: Any) -> dict[str, Any]:
    """A complete event as the profiler exports it, of 1 microsecond and with a correlation number of its own."""
    args = {"External id": 7, "correlation": next(numbers) if correlation is None else correlation}
    return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": 2, "ts": ts, "dur": 1.0, "args": args, **more}


TURN = event("user_annotation", SPAN, 10.0, dur=100.0)


def counted(*events: dict[str, Any]) -> Launches:
    """The counts of a trace with a turn from 10 to 110."""
    return count_launches([*events, TURN])


NOTHING = Launches(0, 0, 0, 0, 0)


@pytest.mark.parametrize("cat", ["cuda_runtime", "cuda_driver"])
@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            "cudaLaunchKernel cudaLaunchKernelExC cudaLaunchCooperativeKernel cuLaunchKernel cuLaunchKernelEx "
            "cudaLaunchKernel_v7000 cudaLaunchKernel_ptsz",
            Launches(7, 0, 0, 0, 0),
        ),
        ("cudaGraphLaunch cuGraphLaunch cuGraphLaunch_v2 cudaGraphLaunch_ptsz_v10000", Launches(0, 4, 0, 0, 0)),
        (
            "cudaStreamSynchronize cudaDeviceSynchronize cudaEventSynchronize cudaMemcpy cudaMemcpy2D cuStreamSynchronize "
            "cuCtxSynchronize cuMemcpyDtoH_v2 cudaMemcpyFromSymbol cudaStreamSynchronize_v3020",
            Launches(0, 0, 0, 10, 0),
        ),
        (
            "cudaMemcpyAsync cudaMemcpy2DAsync cuMemcpyHtoDAsync_v2 cudaMemcpyPeerAsync cudaStreamWaitEvent cudaEventRecord "
            "cudaEventQuery cudaMemsetAsync cudaMalloc cudaHostAlloc cudaGraphInstantiate cudaStreamIsCapturing "
            "cudaLaunchHostFunc cudaFuncGetAttributes cudaGraphKernelNodeSetParams mycudaLaunchKernel",
            NOTHING,
        ),
    ],
    ids=["launches", "graphs", "waits", "neither"],
)
def test_calls_of_the_host_are_told_apart_by_their_names(cat: str, names: str, expected: Launches) -> None:
    assert counted(*(event(cat, name) for name in names.split())) == expected


def test_kernels_and_copies_of_the_device_are_counted_by_their_category() -> None:
    device = [
        event("kernel", "void at::native::vectorized_elementwise_kernel<4, cudaLaunchKernel>"),
        event("kernel", "triton_poi_fused_add_0", 115.0),  # runs after the call that launched it has returned
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)"),
        event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)"),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)"),
        event("gpu_memset", "Memset (Device)"),
        event("gpu_user_annotation", SPAN),
        event("cpu_op", "cudaLaunchKernel"),
    ]
    assert counted(*device) == Launches(0, 0, 2, 0, 2)


def test_graphs_take_launches_away_and_leave_the_kernels() -> None:
    kernels = [event("kernel", f"kernel_{number}", 20.0 + number) for number in range(6)]
    alone = [event("cuda_runtime", "cudaLaunchKernel", 20.0 + number) for number in range(6)]
    graph = [event("cuda_runtime", "cudaGraphLaunch", 20.0), event("cuda_runtime", "cudaLaunchKernel", 25.0)]
    assert counted(*alone, *kernels) == Launches(6, 0, 6, 0, 0)
    assert counted(*graph, *kernels) == Launches(1, 1, 6, 0, 0)


def test_only_the_turn_counts_and_not_what_the_profiler_does_around_it() -> None:
    wait = ("cuda_runtime", "cudaDeviceSynchronize")
    assert counted(event(*wait, 9.0), event(*wait, 110.0), event("kernel", "before", 5.0)) == NOTHING
    assert counted(event(*wait, 10.0), event(*wait, 109.5)).waits == 2
    with pytest.raises(ValueError, match="no annotation"):
        count_launches([event(*wait)])


def test_a_call_of_the_driver_inside_one_of_the_runtime_is_one_launch() -> None:
    nested = [event("cuda_runtime", "cudaLaunchKernel", 20.0, 5), event("cuda_driver", "cuLaunchKernel", 20.2, 5)]
    assert counted(*nested, event("kernel", "once", 21.0, 5)) == Launches(1, 0, 1, 0, 0)
    without = [{**one, "args": {}} for one in (*nested, event("cuda_runtime", "cudaStreamSynchronize"))]
    assert counted(*without) == Launches(2, 0, 0, 1, 0), "without numbers each is a call"


def test_events_that_are_no_calls_are_left_out() -> None:
    flow = {"ph": "s", "id": 5, "cat": "ac2g", "name": "ac2g", "pid": 1, "tid": 2, "ts": 50.0}
    begin = {**event("cuda_runtime", "cudaLaunchKernel"), "ph": "B"}
    about = {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "python"}}
    assert counted(flow, begin, about) == NOTHING
    threads = [event("cuda_runtime", "cudaLaunchKernel", tid=tid) for tid in (2, 3)]
    assert counted(*threads).kernel_launches == 2, "of the thread of the backward pass too"


def test_every_call_is_of_one_kind() -> None:
    for name in ("cudaLaunchKernel", "cudaGraphLaunch", "cudaStreamSynchronize", "cudaMemcpy"):
        assert sum(bool(pattern.fullmatch(name)) for pattern in (KERNEL_LAUNCH, GRAPH_LAUNCH, WAIT)) == 1


def test_counts_are_divided_by_the_steps() -> None:
    assert Launches(40, 20, 100, 5, 0).per_step(20) == {
        "kernel_launches": 2.0,
        "graph_launches": 1.0,
        "kernels": 5.0,
        "waits": 0.25,
        "pageable_copies": 0.0,
    }


def test_a_profile_is_counted_and_its_trace_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = Profile(tmp_path)
    profile.start()
    torch.ones(3).add(1)
    assert profile.stop() == NOTHING, "nothing of it ran on a GPU"
    assert list(tmp_path.iterdir()) == []

    def export(self: torch.profiler.profile, path: str) -> None:
        Path(path).write_text(json.dumps({"traceEvents": [event("cuda_runtime", "cudaLaunchKernel"), TURN]}))

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", export)
    profile = Profile(tmp_path)
    profile.start()
    assert profile.stop() == Launches(1, 0, 0, 0, 0)
