"""The command, from start to end, and what goes wrong on the way."""

import importlib.util
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file

from kd import bench
from kd.bench import benchmark as benchmarks
from kd.bench.benchmark import benchmark
from kd.bench.candidates import CANDIDATES, FINETUNE, LIVE
from kd.bench.figures import cells, measurement_notes
from kd.bench.harness import occurring_rows, prepare
from kd.bench.launches import Launches
from kd.bench.workers import GO, PROFILE, STOP, WAITING, Finished, Gate, Go, Job, Turn, Worker, WorkerDied
from kd.build.engine import build_engine
from kd.data import datamodule
from kd.errors import InputError
from whole_runs import planned

Small = Callable[..., list[str]]


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_bench_prints_writes_and_draws(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peer = ["--peer"] if importlib.util.find_spec("textbrewer") else []
    drawn = ["--out", str(tmp_path / "out")] if importlib.util.find_spec("matplotlib") else []
    command = [*small("method.weights.hidden=10"), "--steps=2", "--repeats=2", "--json", str(tmp_path / "bench.json")]
    monkeypatch.setattr(sys, "argv", ["kd-bench", *command, *peer, *drawn])
    monkeypatch.setattr("kd.bench.cost.MATRIX_SIZES", {"cpu": (128,)})
    bench.main()
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "bench.json").read_text())
    names = ["finetune", "cached", "live", *(["textbrewer", "textbrewer_per_batch"] if peer else [])]
    assert list(found["candidates"]) == names
    assert found["order"] == [[*names[first:], *names[:first]] for first in range(3)]
    assert found["examples_per_turn"] == 32
    assert found["examples_per_epoch"] == 96
    assert {len(one[part]) for one in found["candidates"].values() for part in ("seconds", "cpu_seconds")} == {2}
    assert found["candidates"]["finetune"]["time_relative_to_finetune"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    for one in found["candidates"].values():
        assert one["label"] in shown
        assert one["peak_megabytes"] > 100
        assert 0 < one["share_of_matrix_product_rate"]["low"] < 1
        rates = [found["examples_per_turn"] / seconds for seconds in one["seconds"]]
        assert one["examples_per_second"]["median"] == pytest.approx(sum(rates) / 2)
    assert "method.weights.hidden=10" in found["candidates"]["live"]["overrides"]
    assert "method.weights.hidden=10" not in found["candidates"]["finetune"]["overrides"]
    assert ("textbrewer" in found["versions"]) == bool(peer)
    if drawn:
        assert json.loads((tmp_path / "out" / "bench.json").read_text()) == found
        assert (tmp_path / "out" / "bench.png").stat().st_size > 1000
        assert "time / fine-tuning" in (tmp_path / "out" / "table.md").read_text()


def failing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit status and message of a command."""
    monkeypatch.setattr(sys, "argv", ["kd-bench", *words])
    with pytest.raises(SystemExit) as caught:
        bench.main()
    return int(str(caught.value.code)), capsys.readouterr().err


def test_missing_extra_says_what_to_install(
    small: Small, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for option, package in ((["--peer"], "textbrewer"), (["--out", str(tmp_path)], "matplotlib")):
        status, said = failing(monkeypatch, capsys, *small("method=kd"), *option)
        assert status == 2
        assert package in said
        assert "pip install 'kd[bench]'" in said


@pytest.mark.parametrize(
    ("words", "key"),
    [(["method.temprature=3"], "method.temprature"), (["trainer=ddp"], "trainer"), (["student.layers=0"], "student.layers")],
)
def test_what_the_user_can_put_right_exits_with_2(
    small: Small, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], key: str
) -> None:
    status, said = failing(monkeypatch, capsys, *small(*words))
    assert status == 2
    assert f"change: {key}" in said
    assert "Traceback" not in said


def test_a_worker_that_dies_is_named(small: Small, tmp_path: Path) -> None:
    broken = replace(LIVE, worker="kd.bench.nowhere:train")
    with pytest.raises(WorkerDied, match="process of 'live' ended with status 1 before its turns were done"):
        benchmark(small(), 1, 1, candidates=[broken])


@pytest.mark.usefixtures("forked")
def test_a_worker_that_is_killed_is_named_and_its_fellows_are_ended(
    small: Small, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Worker] = []

    class Watched(Worker):
        def __init__(self, job: Job) -> None:
            super().__init__(job)
            made.append(self)

        def turn(self, message: Go = GO) -> Turn:
            self.process.kill()
            return super().turn(message)

    monkeypatch.setattr(benchmarks, "Worker", Watched)
    monkeypatch.setattr("kd.bench.cost.MATRIX_SIZES", {"cpu": (64,)})
    monkeypatch.setattr(benchmarks, "benchmark", partial(benchmark, candidates=[FINETUNE, LIVE]))
    status, said = failing(monkeypatch, capsys, *small("method=kd"), "--steps=1", "--repeats=1")
    alive = [worker.process.is_alive() for worker in made]
    for worker in made:
        worker.process.kill()  # pytest would wait for it for ever
    assert status == 1
    assert "'finetune' was killed by signal 9" in said
    assert "memory runs out" in said
    assert alive == [False, False]


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_where_no_teacher_is_cached_there_is_no_row_of_it(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd.bench.cost.MATRIX_SIZES", {"cpu": (64,)})
    assert list(benchmark(small("method=finetune", "teacher=[]"), 1, 1)["candidates"]) == ["finetune", "live"]


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_of_a_method_with_two_runs_the_first_is_measured(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd.bench.cost.MATRIX_SIZES", {"cpu": (64,)})
    asked = small("method=tinybert", "student.heads=4", "method.before.run.trainer.max_epochs=2")
    found = benchmark(asked, 1, 1, candidates=[FINETUNE, LIVE])
    assert found["method"] == "tinybert_layers"
    assert "tinybert_layers" in found["candidates"]["live"]["label"]
    assert found["candidates"]["finetune"]["overrides"] == FINETUNE.overrides(asked)
    first = planned(asked).inputs.before
    prepared = prepare(Job(LIVE, tuple(LIVE.overrides(asked)), 1, 2, tmp_path))
    assert prepared.run.spec.method["name"] == "tinybert_layers"
    assert prepared.run.spec.optimizer.schedule == first.spec.optimizer.schedule == "constant"


def test_an_untrained_teacher_has_the_layers_of_the_run_that_would_train_it(small: Small, tmp_path: Path) -> None:
    whole, part = (
        prepare(Job(LIVE, tuple(LIVE.overrides(small("method=kd", *more))), 1, 2, tmp_path / name))
        for name, more in {"whole": [], "part": ["+teacher.minilm.run.student.layers=2"]}.items()
    )
    assert [one.models.teachers[0].depth for one in (whole, part)] == [4, 2]
    saved, own = (load_file(one.run.inputs.teachers["minilm"].student / "model.safetensors") for one in (whole, part))
    kept = [name for name in own if "classifier" not in name]
    assert all(torch.equal(own[name], saved[name]) for name in kept)
    assert sum("layer.1." in name for name in kept) > 10


def test_a_method_that_reads_its_teachers_outputs_before_training_is_given_them(small: Small, tmp_path: Path) -> None:
    asked = tuple(LIVE.overrides(small("method=pea_kd")))
    method = prepare(Job(LIVE, asked, 1, 2, tmp_path)).models.methods["student"]
    assert sum(method.counts) == 16  # one step


def test_text_that_a_run_tokenises_in_the_background_is_not_tokenised_for_a_benchmark(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows of the table are trained then, as in the run; which of them occur is not looked up."""
    monkeypatch.setattr(datamodule, "MOST_BEFORE", 10)
    (tmp_path / "more.txt").write_text("a good film\n" * 20)
    words = LIVE.overrides(small("method=kd", f"task.unlabelled={tmp_path / 'more.txt'}"))
    prepared = prepare(Job(LIVE, tuple(words), 2, 1, tmp_path / "bench"))
    engine = build_engine(prepared.run, prepared.models, prepared.examples.task)
    assert occurring_rows(prepared, engine).tables == {}
    assert not list(tmp_path.rglob("tokens-*"))
    monkeypatch.setattr(datamodule, "MOST_BEFORE", 20)
    prepared = prepare(Job(LIVE, tuple(words), 2, 1, tmp_path / "few"))
    engine = build_engine(prepared.run, prepared.models, prepared.examples.task)
    assert len(occurring_rows(prepared, engine).tables) == 1


def test_an_error_while_building_comes_out_as_what_it_is(small: Small) -> None:
    with pytest.raises(InputError, match="positions of the model") as caught:
        benchmark(small("task.max_length=4000"), 1, 1, candidates=[FINETUNE])
    assert caught.value.key == "task.max_length"


class StandIn:
    """A worker that trains nothing: what a benchmark asks of it, and what it would answer on a GPU.

    Attributes:
        asked: name of the candidate and message of each turn of all workers, in their order.
        jobs: the job of each candidate.
    """

    asked: ClassVar[list[tuple[str, Go]]] = []
    jobs: ClassVar[dict[str, Job]] = {}
    refuse: ClassVar[dict[str, InputError]] = {}

    def __init__(self, job: Job) -> None:
        self.name = job.candidate.name
        self.jobs[self.name] = job
        fact = {"examples": 16, "tokens": 90, "turns_in_epoch": 6.0, "flops": 1e6, "precision": "32-true", "dtype": "float32"}
        more = {"students": ["random"], "setup_seconds": 1.0, "device": "cuda", "steps": 1, "caches": {"a": {"used": True}}}
        self.facts: dict[str, Any] = {**fact, **more}

    def wait(self) -> None:
        if self.name in self.refuse:
            raise self.refuse[self.name]

    def turn(self, message: Go = GO) -> Turn:
        self.asked.append((self.name, message))
        launches = Launches(10, 0, 10, 1, 0) if message == PROFILE else None
        return Turn(0.5 if "graphs" in self.name else 1.0, 0.5, 16, 10**6, 2 * 10**6, launches)

    def close(self) -> None:
        pass


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[StandIn]]:
    """A machine with a GPU, by what a benchmark asks of torch."""
    for name, value in (("asked", []), ("jobs", {}), ("refuse", {})):
        monkeypatch.setattr(StandIn, name, value)
    monkeypatch.setattr(benchmarks, "Worker", StandIn)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(benchmarks, "product_rate", lambda dtype, accelerator: rated.append((dtype, accelerator)) or 1e9)
    monkeypatch.setattr(benchmarks, "hardware", lambda: {"cpu": "a cpu", "threads": 2, "gpus": ["a card"]})
    rated: list[tuple[str, str]] = []
    yield StandIn
    assert {accelerator for _, accelerator in rated} == {"gpu"}


def test_on_a_gpu_there_are_rows_with_graphs_and_a_profile_of_every_row(small: Small, a_gpu: type[StandIn]) -> None:
    found = benchmark(small("method=kd", "trainer=gpu"), 1, 2)
    names = ["finetune", "cached", "live", "finetune_graphs", "cached_graphs"]
    assert list(found["candidates"]) == names
    labels = [found["candidates"][name]["label"] for name in names[3:]]
    assert labels == ["fine-tuning, CUDA graphs", "kd, teacher cached, CUDA graphs"]
    assert found["candidates"]["cached_graphs"]["time_relative_to_no_graphs"]["median"] == 0.5
    assert all(one["per_step"]["kernels"] == 10 for one in found["candidates"].values())
    recorded, timed, profiled = a_gpu.asked[:4], a_gpu.asked[4:-5], a_gpu.asked[-5:]
    assert recorded == [("finetune_graphs", GO)] * 2 + [("cached_graphs", GO)] * 2, "not timed"
    assert sorted(name for name, _ in timed) == sorted(names * 3), "a warm-up and two rounds"
    assert {message for _, message in timed} == {GO}
    assert profiled == [(name, PROFILE) for name in names]
    assert found["candidates"]["finetune_graphs"]["seconds"] == [0.5, 0.5]
    assert {job.turns for job in a_gpu.jobs.values()} == {1 + 2 + 2 + 1}
    for name in names:
        overrides = a_gpu.jobs[name].overrides
        assert ("trainer.compile=reduce-overhead" in overrides) == ("graphs" in name)
    assert "method=finetune" in a_gpu.jobs["finetune_graphs"].overrides
    assert "cache=on" in a_gpu.jobs["cached_graphs"].overrides


def test_a_command_with_graphs_has_no_further_rows_of_them(small: Small, a_gpu: type[StandIn]) -> None:
    found = benchmark(small("method=kd", "trainer=gpu", "trainer.compile=reduce-overhead"), 1, 1)
    assert list(found["candidates"]) == ["finetune", "cached", "live"]
    recorded = [(name, GO) for name in found["candidates"] for _ in range(2)]
    assert a_gpu.asked[:6] == recorded, "graphs of the command's own rows are recorded before the clock runs, too"
    assert all("trainer.compile=reduce-overhead" in job.overrides for job in a_gpu.jobs.values())


def test_a_method_that_cannot_have_graphs_has_no_row_with_them(
    small: Small, a_gpu: type[StandIn], capsys: pytest.CaptureFixture[str]
) -> None:
    a_gpu.refuse["cached_graphs"] = InputError("method=ad_kd takes gradients", "trainer.compile")
    found = benchmark(small("method=kd", "trainer=gpu", "trainer.compile=true"), 1, 1)
    assert list(found["candidates"]) == ["finetune", "cached", "live", "finetune_graphs"]
    assert "method=ad_kd takes gradients, so there is no row 'cached_graphs'" in capsys.readouterr().err
    assert "trainer.compile=true" not in a_gpu.jobs["finetune_graphs"].overrides
    a_gpu.refuse["cached_graphs"] = InputError("the labels differ", "task.labels")
    with pytest.raises(InputError, match="labels differ"):
        benchmark(small("method=kd", "trainer=gpu"), 1, 1)
    a_gpu.refuse.clear()
    a_gpu.refuse["live"] = InputError("no graphs", "trainer.compile")
    with pytest.raises(InputError, match="no graphs"):
        benchmark(small("method=kd", "trainer=gpu"), 1, 1)


def test_what_the_profiler_did_not_see_is_not_counted_as_nothing(
    small: Small, a_gpu: type[StandIn], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def turn(self: StandIn, message: Go = GO) -> Turn:
        blind = Launches(0, 0, 0, 0, 0) if self.name != "live" else Launches(10, 0, 10, 1, 0)
        return Turn(1.0, 0.5, 16, 10**6, 2 * 10**6, blind if message == PROFILE else None)

    monkeypatch.setattr(a_gpu, "turn", turn)
    found = benchmark(small("method=kd", "trainer=gpu"), 1, 1)
    assert [name for name, one in found["candidates"].items() if "per_step" in one] == ["live"]
    head, *rows = cells(found)
    assert [row[head.index("kernels/step")] for row in rows] == ["", "", "10.0", "", ""]
    note = measurement_notes(found)[-1]
    assert note.startswith("Reserved memory")
    assert "saw nothing of the GPU" in note
    assert "so the launches of 'finetune' are not counted" in capsys.readouterr().err


def test_graphs_without_a_compiler_leave_out_a_row_and_do_not_end_the_benchmark(small: Small, tmp_path: Path) -> None:
    job = Job(FINETUNE, tuple(FINETUNE.overrides(small("trainer.compile=true"))), 1, 1, tmp_path)
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(InputError, match=r"torch\.compile does not work here") as caught,
    ):
        prepare(job)
    assert caught.value.key == "trainer.compile", "the key by which a row is left out"


def test_without_a_gpu_there_are_no_graphs_no_profile_and_no_further_turns(
    small: Small, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in (("asked", []), ("jobs", {}), ("refuse", {})):
        monkeypatch.setattr(StandIn, name, value)
    monkeypatch.setattr(benchmarks, "Worker", StandIn)
    monkeypatch.setattr("kd.bench.cost.MATRIX_SIZES", {"cpu": (64,)})
    benchmark(small("method=kd"), 1, 2)
    assert sorted(name for name, _ in StandIn.asked) == sorted(["finetune", "cached", "live"] * 3)
    assert {message for _, message in StandIn.asked} == {GO}
    assert {job.turns for job in StandIn.jobs.values()} == {3}


def test_a_gate_profiles_the_turn_that_it_is_asked_to_profile(tmp_path: Path) -> None:
    ours, theirs = multiprocessing.Pipe()
    gate = Gate(theirs, Job(LIVE, (), 1, 3, tmp_path))
    for message in (GO, PROFILE, GO):
        ours.send(message)
        gate.open()
        torch.ones(3).add(1)
        gate.close(5)
    turns = [message for message in (ours.recv() for _ in range(6)) if message != WAITING]
    assert [turn.examples for turn in turns] == [5, 5, 5]
    assert [turn.launches for turn in turns] == [None, Launches(0, 0, 0, 0, 0), None]
    assert [turn.reserved_bytes for turn in turns] == [None] * 3
    assert list(tmp_path.iterdir()) == []
    ours.send(STOP)
    with pytest.raises(Finished):
        gate.open()


@pytest.mark.parametrize(
    ("words", "key"), [(["trainer.compile=reduce-overhead"], "trainer.compile"), (["trainer=gpu"], "trainer")]
)
def test_what_needs_a_gpu_is_refused_before_anything_is_built(small: Small, words: list[str], key: str) -> None:
    with pytest.raises(InputError, match=r"CUDA graphs|usable GPU") as caught:
        benchmark(small("method=kd", *words), 1, 1)
    assert caught.value.key == key


def test_baseline_has_the_students_keys_and_none_of_the_methods(small: Small) -> None:
    asked = small("method=pkd", "method.layers=last", "pool=none", "cohort.students=1", "student.dropout=0.2", "seed=3")
    laid = FINETUNE.overrides(asked)
    assert laid[-2:] == ["method=finetune", "cache=off"]
    assert not [word for word in laid[:-2] if word.startswith(("method", "pool", "cohort"))]
    assert {"student.dropout=0.2", "seed=3"} <= set(laid)
    assert CANDIDATES[0] is FINETUNE
