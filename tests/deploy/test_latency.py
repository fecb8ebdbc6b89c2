"""kd-latency: turns, percentiles, the load of the machine, and the rows of a run. No test depends on a speed."""

import csv
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import kd.deploy.latency
from kd.deploy import timing
from kd.deploy.latency import Timed, prepared
from kd.deploy.timing import Latency, checked_load, in_turns, order_of
from kd.errors import InputError
from kd.runs.run import Run

Ends = Callable[..., Any]


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (0.25, 9.0, 9.0))


@pytest.mark.parametrize("count", [1, 2, 3, 8, 10, 5])
def test_every_candidate_has_every_position_and_follows_every_other_equally_often(count: int) -> None:
    rounds = [order_of(number, count) for number in range(2 * count)]
    assert all(sorted(order) == list(range(count)) for order in rounds)
    positions = Counter((at, candidate) for order in rounds for at, candidate in enumerate(order))
    assert set(positions.values()) == {2}
    neighbours = Counter(pair for order in rounds for pair in itertools.pairwise(order))
    assert neighbours == dict.fromkeys(itertools.permutations(range(count), 2), 2)


def test_every_candidate_is_called_once_a_round() -> None:
    called: list[tuple[str, int]] = []
    candidates = {name: (lambda number, name=name: lambda: called.append((name, number))) for name in "abc"}
    seconds = in_turns(candidates, calls=6, warm_up=3)
    rounds = ["".join(name for name, at in called if at == number) for number in range(9)]
    assert rounds == ["".join("abc"[at] for at in order_of(number, 3)) for number in range(9)]
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 6, "b": 6, "c": 6}


def test_calls_are_timed_without_their_preparation_and_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def pass_time(seconds: float) -> None:
        clock[0] += seconds

    def prepare(number: int) -> Callable[[], object]:
        pass_time(100)
        return lambda: pass_time(1000 if number < 2 else number)

    assert in_turns({"a": prepare}, calls=3, warm_up=2)["a"] == [2, 3, 4]


def test_inputs_and_texts_are_made_before_the_call() -> None:
    done: list[str] = []

    def inputs(number: int, batch: int, tokens: int | None) -> str:
        done.append(f"inputs {number}")
        return f"{batch} texts"

    model: Any = SimpleNamespace(inputs=inputs, texts=[("a",), ("b",)], rules=None)
    model.rows = lambda number, batch: [done.append(f"rows {number}") or number % 2] * batch
    model.encode = lambda rules, texts: done.append(f"encodes {texts}")
    runtime: Any = SimpleNamespace(logits=lambda given: done.append(f"computes {given}"))
    calls = [prepared(model, runtime, 2, None)(0), Timed.tokenise(model, 2, 1)]
    assert done == ["inputs 0", "rows 1"]
    for call in calls:
        call()
    assert done[2:] == ["computes 2 texts", "encodes [('b',), ('b',)]"]


def test_percentiles_are_numpys_in_milliseconds() -> None:
    seconds = np.random.default_rng(0).gamma(2, size=200).tolist()
    found = Latency.of(seconds)
    ordered = sorted(seconds)
    assert found.calls == 200
    assert found.median == pytest.approx(1000 * (ordered[99] + ordered[100]) / 2, abs=1e-4)
    assert found.p95 == pytest.approx(1000 * (ordered[189] + 0.05 * (ordered[190] - ordered[189])), abs=1e-4)
    assert found.median < found.p95 < found.p99 <= 1000 * max(seconds) + 1e-4


def test_a_load_above_the_cores_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for load, cores, own, passes in ((2.0, 2, 0, True), (2.1, 2, 0, False), (3.9, 2, 2, True), (4.1, 2, 2, False)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        if passes:
            assert checked_load(cores, own) == load
        else:
            with pytest.raises(InputError, match=rf"the load of this machine is {load} on {cores} core"):
                checked_load(cores, own)


def test_rows_of_student_and_teacher_stand_side_by_side(
    finished: Run, reviews: Path, tmp_path: Path, ends: Ends, idle: None
) -> None:
    out = tmp_path / "latency.json"
    words = ["--threads", "1", "--batch", "1,3", "--tokens", "own,8", "--calls", "3", "--warm-up", "1"]
    ended = ends(kd.deploy.latency, finished.directory, "--out", out, *words)
    assert ended.status == 0, ended.errors
    found = json.loads(out.read_text())
    rows = found["rows"]
    keys = {(row["model"], row["runtime"], row["batch"], row["own"]) for row in rows}
    models = ("student", "teacher minilm")
    runtimes = ("torch", "bf16", "onnx", "int8")
    expected = {
        (model, runtime, batch, own) for model in models for runtime in runtimes for batch in (1, 3) for own in (True, False)
    }
    expected |= {(model, "tokenizer", batch, True) for model in models for batch in (1, 3)}
    assert keys == expected
    assert len(rows) == len(expected)
    assert all(0 < row["median"] <= row["p95"] <= row["p99"] for row in rows)
    assert {row["calls"] for row in rows} == {3}
    assert {row["tokens"] for row in rows if not row["own"]} == {8}
    with (reviews / "validation.csv").open() as file:  # the first round warms up
        lengths = [len(row["text"].split()) + 2 for row in csv.DictReader(file)][1:4]
    assert {row["tokens"] for row in rows if row["own"] and row["batch"] == 1} == {round(sum(lengths) / 3, 1)}
    assert {row["load"] for row in rows} == {found["load"]["before"]} == {0.25}
    assert "ONNX, int8" in ended.output
    assert "teacher minilm" in ended.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latency.json"]


def test_a_busy_machine_is_refused_before_anything_is_read(tmp_path: Path, ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (1e4, 0.0, 0.0))
    ended = ends(kd.deploy.latency, tmp_path, "--out", tmp_path / "x.json")
    assert ended.status == 2
    assert "the load of this machine is 10000.0" in ended.errors
    assert not list(tmp_path.iterdir())


def test_a_machine_that_becomes_busy_is_refused_and_nothing_is_left(
    finished: Run, tmp_path: Path, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = itertools.chain([0.25, 0.25], itertools.repeat(1e4))
    monkeypatch.setattr(os, "getloadavg", lambda: (next(loads), 0.0, 0.0))
    words = ["--threads", "1", "--batch", "1,3", "--tokens", "8", "--calls", "2", "--warm-up", "0", "--formats", "torch"]
    ended = ends(kd.deploy.latency, finished.directory, "--out", tmp_path / "x.json", *words)
    assert ended.status == 2
    assert "measured 1 text(s) of 8 tokens" in ended.errors
    assert "the load of this machine is 10000.0" in ended.errors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--formats", "torch,tf"], "'tf' is not one of torch, bf16, onnx, int8, openvino"),
        (["--threads", "100000"], "--threads=100000: there are"),
        (["--threads", "none"], "--threads=none must be a whole number"),
        (["--batch", "0"], "--batch=0 must be a whole number, at least 1"),
        (["--tokens", "1"], "--tokens=1 must be a whole number, at least 4"),
        (["--calls", "1"], "--calls=1 must be a whole number, at least 2"),
        (["--out", "no/x.json"], "there is no folder 'no'"),
        (["--out", "."], "'.' is a folder; name a file in it"),
        (["--tokens", "32,65"], "--tokens=65: the student reads at most 64 tokens"),
        (["more"], "name one run, not 2"),
    ],
)
def test_options_that_there_are_not(words: list[str], message: str, finished: Run, ends: Ends, idle: None) -> None:
    ended = ends(kd.deploy.latency, finished.directory, *words)
    assert ended.status == 2
    assert message in ended.errors
