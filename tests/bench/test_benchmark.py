"""The command, from start to end, and what goes wrong on the way."""

import importlib.util
import json
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kd import bench
from kd.bench import benchmark as benchmarks
from kd.bench.benchmark import benchmark
from kd.bench.candidates import CANDIDATES, FINETUNE, LIVE
from kd.bench.harness import prepare
from kd.bench.workers import Job, Worker, WorkerDied
from kd.errors import InputError
from processes import fork_server
from whole_runs import planned

Small = Callable[..., list[str]]


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that need no import of PyTorch; those of a test without this fixture are new interpreters."""
    server = fork_server()

    def get_context(kind: str) -> ForkServerContext:
        assert kind == "spawn"
        return server

    monkeypatch.setattr(multiprocessing, "get_context", get_context)


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

        def turn(self) -> object:
            self.process.kill()
            return super().turn()

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


def test_an_error_while_building_comes_out_as_what_it_is(small: Small) -> None:
    with pytest.raises(InputError, match="positions of the model") as caught:
        benchmark(small("task.max_length=4000"), 1, 1, candidates=[FINETUNE])
    assert caught.value.key == "task.max_length"


def test_baseline_has_the_students_keys_and_none_of_the_methods(small: Small) -> None:
    asked = small("method=pkd", "method.layers=last", "pool=none", "cohort.students=1", "student.dropout=0.2", "seed=3")
    laid = FINETUNE.overrides(asked)
    assert laid[-2:] == ["method=finetune", "cache=off"]
    assert not [word for word in laid[:-2] if word.startswith(("method", "pool", "cohort"))]
    assert {"student.dropout=0.2", "seed=3"} <= set(laid)
    assert CANDIDATES[0] is FINETUNE
