"""How many processes side by side: the choice, by stand-ins for processes, and a measurement from start to end."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from filelock import FileLock
from overwriting import Overwriting, overwriting

from kd.bench import cell
from kd.bench.workers import GO, Finished, Go, Turn, WorkerDied
from kd.bench.workers import Job as Measurement
from kd.config.schema import LauncherSpec
from kd.data import datamodule
from kd.errors import InputError
from kd.launch import launcher as launching
from kd.launch import measure as measuring
from kd.launch.jobs import Job, jobs_of, plan_command
from kd.launch.measure import CELL, Speeds, candidates, largest, measure, measured, read_speeds, shape_of, write_speeds
from kd.training.execute import execute

__all__ = ["overwriting"]
Small = Callable[..., list[str]]


def speeds(rates: dict[int, float], memory: int = 100, threads: int = 64) -> Speeds:
    return Speeds(rates, {count: str(threads // count) for count in rates}, memory, 9.4, "2025-01-31")


@pytest.mark.parametrize(
    ("rates", "best"),
    [
        ({1: 10.0, 2: 12.4}, 2),
        ({1: 12.4, 2: 10.0}, 1),
        ({1: 10.0, 2: 10.29}, 1),  # a tie: fewer processes
        ({1: 10.0, 2: 10.31}, 2),
        ({1: 10.0, 2: 13.0, 32: 13.2, 64: 12.0}, 2),
        ({1: 1.00, 2: 1.02, 32: 1.04, 64: 1.06}, 32),  # within 3 % of the fastest, not of the next
    ],
)
def test_the_fewest_processes_within_a_tie_of_the_fastest_are_chosen(rates: dict[int, float], best: int) -> None:
    assert speeds(rates).best == best


def test_numbers_are_one_two_half_and_all() -> None:
    assert {count: candidates(count) for count in (1, 2, 3, 4, 5, 64)} == {
        1: [1],
        2: [1, 2],
        3: [1, 2, 3],
        4: [1, 2, 4],
        5: [1, 2, 5],
        64: [1, 2, 32, 64],
    }


class StandIn:
    """A process whose steps take longer the more are at work at the same time.

    Args:
        index: its index.
        seconds: number of processes at work -> seconds of a turn.
        memory: its peak memory in bytes.
    """

    alive: ClassVar[list["StandIn"]] = []
    turns: ClassVar[list[tuple[int, int | None]]] = []
    """Number of processes at work and their threads, for each turn of all."""

    def __init__(self, index: int, seconds: dict[int, float], memory: int = 100) -> None:
        self.index, self.seconds, self.memory = index, seconds, memory
        self.facts: dict[str, Any] = {}
        self.taken = 0
        self.at_work = False
        StandIn.alive.append(self)

    def wait(self) -> None:
        self.facts = {"steps": 5}

    def go(self, message: Go = GO) -> None:
        threads = message.threads
        self.at_work = True
        if not self.index:
            StandIn.turns.append((0, threads))
        StandIn.turns[-1] = (StandIn.turns[-1][0] + 1, threads)

    def done(self) -> Turn:
        others = StandIn.turns[-1][0]
        assert self.at_work
        self.at_work, self.taken = False, self.taken + 1
        first = 100.0 if self.taken == 1 else 1.0  # the first turn of a process is slow, and does not count
        return Turn(self.seconds[others] * first, 0.0, 80, 0, resident_bytes=self.memory * self.taken)

    def close(self) -> None:
        StandIn.alive.remove(self)


@pytest.fixture(autouse=True)
def _no_stand_ins() -> Iterator[None]:
    StandIn.alive, StandIn.turns = [], []
    yield
    assert StandIn.alive == []


def started(seconds: dict[int, float], memory: int = 100) -> Callable[[int], StandIn]:
    return lambda index: StandIn(index, seconds, memory)


FOUR = {1: "4", 2: "2", 4: "1"}


def test_rates_are_those_of_all_processes_together_without_their_first_turn() -> None:
    """Five steps in a second by one of four threads, in 1.25 by two of two, in 4 seconds by four of one."""
    found = measure([1, 2, 4], FOUR, started({1: 1.0, 2: 1.25, 4: 4.0}), available=1e9)
    assert found.rates == {1: 5.0, 2: 8.0, 4: 5.0}
    assert found.best == 2
    assert found.compared() == ["1.60 times 1 x 4", "1.60 times 4 x 1"]
    # One turn to warm up, then turns for three seconds; at least one.
    assert StandIn.turns == [(1, 4)] * 4 + [(2, 2)] * 4 + [(4, 1)] * 2


def test_a_slow_process_does_not_stand_for_the_others() -> None:
    class Uneven(StandIn):
        def done(self) -> Turn:
            return replace(super().done(), seconds=1.0 + self.index)

    found = measure([1, 2], {1: "2", 2: "1"}, lambda index: Uneven(index, {1: 1.0, 2: 1.0}), available=1e9)
    assert found.rates == {1: 5.0, 2: 5.0 + 2.5}


def test_what_needs_more_memory_than_there_is_is_not_started() -> None:
    """The peak of a process is that of its last turn: 4 turns of one, in which it grows to 400 bytes."""
    found = measure([1, 2, 4], FOUR, started({1: 1.0, 2: 1.0, 4: 1.0}), available=799)
    assert (list(found.rates), found.memory) == ([1], 400)
    assert {count for count, _ in StandIn.turns} == {1}
    StandIn.turns = []
    found = measure([1, 2, 4], FOUR, started({1: 1.0, 2: 1.0, 4: 1.0}), available=800)
    assert list(found.rates) == [1, 2]
    assert {count for count, _ in StandIn.turns} == {1, 2}
    assert measure([1, 2], FOUR, started({1: 1.0, 2: 1.0}), available=1).best == 1  # one is always tried


def test_processes_are_ended_if_one_dies() -> None:
    class Dying(StandIn):
        def done(self) -> Turn:
            if self.index == 1:
                raise WorkerDied("a cell", -9, "in 'log'")
            return super().done()

    with pytest.raises(WorkerDied, match="killed by signal 9"):
        measure([1, 2], {1: "2", 2: "1"}, lambda index: Dying(index, {1: 1.0, 2: 1.0}), available=1e9)


def test_a_stored_measurement_is_found_unless_it_lacks_a_number_or_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "workers.json"
    assert read_speeds(path, [1, 2], 1e9) is None
    write_speeds(path, speeds({1: 3.0, 2: 4.0, 32: 5.0}, memory=100), {"machine": {"cpu": "mine"}})
    found = read_speeds(path, [1, 2, 32], 1e9)
    assert found is not None
    assert (found.rates, found.date, found.threads[2], found.memory) == ({1: 3.0, 2: 4.0, 32: 5.0}, "2025-01-31", "32", 100)
    assert json.loads(path.read_text())["machine"] == {"cpu": "mine"}
    assert read_speeds(path, [1, 2, 32, 64], 1e9) is None  # there was no memory for 64 then, and there is now
    for available, counts in {1e9: [1, 2, 32], 6399: [1, 2, 32], 3199: [1, 2], 1: [1]}.items():
        known = read_speeds(path, [1, 2, 32, *([64] if available < 6400 else [])], available)
        assert known is not None
        assert list(known.rates) == counts
    path.write_text(path.read_text().replace("4.0", "4.5"))
    assert read_speeds(path, [1, 2], 1e9) is None


def test_processes_end_at_the_same_time_and_none_that_was_started_is_forgotten() -> None:
    """Each may take some seconds, in the middle of a turn: one after the other, an interrupt of many took minutes."""
    everybody = threading.Barrier(3, timeout=20)

    class Slow(StandIn):
        def close(self) -> None:
            everybody.wait()  # until all are told to end
            super().close()

    def start(index: int) -> Slow:
        if index == 3:
            raise OSError(12, "Cannot allocate memory")
        return Slow(index, {1: 1.0, 2: 1.0, 4: 1.0})

    with pytest.raises(OSError, match="Cannot allocate"):
        measure([1, 2, 4], FOUR, start, available=1e9)
    assert StandIn.alive == []


def test_a_folder_for_files_has_nothing_of_a_killed_measurement(tmp_path: Path) -> None:
    folder = tmp_path / "workers.part"
    (folder / "killed" / "0").mkdir(parents=True)

    def dies(scratch: Path) -> None:
        assert list(folder.iterdir()) == [scratch]
        assert list(scratch.iterdir()) == []
        (scratch / "0").mkdir()
        raise WorkerDied("a cell", -9)

    with pytest.raises(WorkerDied), measuring.scratch_folder(folder) as scratch:
        dies(scratch)
    assert list(tmp_path.iterdir()) == []


# -- cells of a sweep --------------------------------------------------------------------------------------------------


def cells_of(small: Small, runs: Path, *variants: str, base: Sequence[str] = ()) -> list[Job]:
    """Cells of fine-tuning, one for each variant: overrides that are separated by blanks."""
    words = ["method=finetune", "teacher=[]", f"paths.runs={runs}", *base]
    commands = [small(*words, *variant.split()) for variant in variants]
    return list(jobs_of({index: plan_command(command) for index, command in enumerate(commands)}, commands).values())


def test_cells_of_a_sweep_over_settings_have_one_shape_and_others_do_not(small: Small, tmp_path: Path) -> None:
    alike = ["seed=0", "seed=1", "optimizer.lr=1e-4", "trainer.max_epochs=5", "task.limit_train=50", "optimizer.warmup=0.2"]
    others = [
        "student=3l",
        "trainer.batch_size=8",
        "task.max_length=16",
        "trainer.precision=bf16-mixed",
        "trainer.accumulate=2",
    ]
    one, *rest = [shape_of(job.run) for job in cells_of(small, tmp_path, *alike, *others, "surgery=[cut_vocabulary]")]
    assert all(shape == one for shape in rest[: len(alike) - 1])
    for index, shape in enumerate(rest[len(alike) - 1 :]):
        assert shape != one, [*others, "surgery"][index]
    words = small("method=kd", f"paths.runs={tmp_path}")
    (*_, kd) = jobs_of({0: plan_command(words)}, [words]).values()
    assert shape_of(kd.run) != one


def test_the_largest_student_is_measured(small: Small, tmp_path: Path) -> None:
    """By parameters, as a process that builds them counts: one layer of twice the width has more than two layers."""
    variants = ["student=2l seed=0", "student=2l seed=1", "student=1l student.width=64 student.init=random", "student=1l"]
    cells = cells_of(small, tmp_path, *variants)
    asked: list[Job] = []

    class Size:
        def __init__(self, job: Job) -> None:
            asked.append(job)
            self.job, self.facts = job, dict[str, Any]()

        def describe(self) -> dict[str, Any]:
            sent: list[dict[str, Any]] = []
            gate = type("Gate", (), {"ready": lambda _, facts, accelerator: sent.append(facts)})()
            cell.count_parameters(Measurement(CELL, self.job.command, 1, 1, tmp_path), gate)
            return sent[0]

        def close(self) -> None:
            self.job = None

    assert largest(cells, lambda job, candidate: Size(job)) is cells[2]  # type: ignore[arg-type,return-value]
    assert asked == [cells[0], cells[2], cells[3]]  # each student once
    asked.clear()
    assert largest(cells[:2], lambda job, candidate: Size(job)) is cells[0]  # type: ignore[arg-type,return-value]
    assert asked == []
    assert not any(job.run.directory.exists() for job in cells)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Lines that are printed; the machine has two cores, and no process is started but stand-ins."""
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("kd.launch.places.cores", lambda: 2)
    monkeypatch.setattr(measuring, "available_memory", lambda: 1e12)
    return []


Began = list[tuple[int, dict[str, str]]]


@pytest.fixture
def began(monkeypatch: pytest.MonkeyPatch) -> Began:
    """Index and environment of each process that is started; two together take as long as one alone."""
    found: Began = []

    def worker(job: Measurement, start: Callable[..., Any], output: str) -> StandIn:
        start(None, ())
        return StandIn(len(StandIn.alive), {1: 1.0, 2: 1.0, 4: 4.0})

    def fork(function: object, arguments: object, environment: dict[str, str], log: Path) -> None:
        found.append((len(StandIn.alive), environment))

    monkeypatch.setattr(measuring, "Worker", worker)
    monkeypatch.setattr(measuring, "fork", fork)
    return found


def test_a_measurement_is_told_in_a_line_stored_and_found_again(
    small: Small, tmp_path: Path, told: list[str], began: Began, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = cells_of(small, tmp_path, "seed=0", "seed=1")
    assert measured(cells, uses_gpus=False, tell=told.append) == 2
    assert told == ["launcher: 2 workers x 1 thread: 2.00 times 1 x 2; measured in 0 s"]
    (stored,) = (tmp_path / ".launch").glob("*.json")
    record = json.loads(stored.read_text())
    assert (record["rates"], record["threads"]) == ({"1": 5.0, "2": 10.0}, {"1": "2", "2": "1"})
    assert record["machine"].keys() == {"cpu", "cores", "usable", "threads", "gpus"}
    assert record["versions"]["torch"] == str(torch.__version__)
    assert len(began) == 2
    again = cells_of(small, tmp_path, "seed=3 optimizer.lr=1e-4")  # also for a single cell
    assert measured(again, uses_gpus=False, tell=told.append) == 2
    assert told[1] == f"launcher: 2 workers x 1 thread: 2.00 times 1 x 2; measured on {record['date']}"
    assert len(began) == 2
    monkeypatch.setattr(measuring, "cpu_name", lambda: "another")
    assert measured(cells, uses_gpus=False, tell=told.append) == 2
    assert len(began) == 4
    assert len(list((tmp_path / ".launch").glob("*.json"))) == 2


def test_a_single_cell_is_not_worth_a_measurement(small: Small, tmp_path: Path, told: list[str], began: Began) -> None:
    assert measured(cells_of(small, tmp_path, "seed=0"), uses_gpus=False, tell=told.append) is None
    assert told == ["launcher: 2 workers x 1 thread: not measured, because one cell is left"]
    assert measured([], uses_gpus=False, tell=told.append) is None
    assert (len(told), began) == (1, [])


def test_numbers_without_memory_are_named(
    small: Small, tmp_path: Path, told: list[str], began: Began, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "available_memory", lambda: 500.0)
    assert measured(cells_of(small, tmp_path, "seed=0", "seed=1"), uses_gpus=False, tell=told.append) == 1
    assert told == ["launcher: 1 worker x 2 threads; 2 x 1 would need more memory than is available; measured in 0 s"]


def test_there_are_no_more_processes_than_gpus_and_each_has_its_own(
    small: Small, tmp_path: Path, told: list[str], began: Began, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = cells_of(small, tmp_path, "seed=0", "seed=1")
    monkeypatch.setattr("kd.launch.places.cores", lambda: 64)
    monkeypatch.setattr(measuring, "gpu_names", lambda: ["a GPU"])
    monkeypatch.setattr("kd.launch.places.gpus", lambda: 1)
    assert measured(cells, uses_gpus=True, tell=told.append) is None
    assert told == ["launcher: 1 worker x 64 threads: there is no other number to measure"]
    monkeypatch.setattr("kd.launch.places.gpus", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert measured(cells, uses_gpus=True, tell=told.append) == 2
    assert told[1] == "launcher: 2 workers x 32 threads: 2.00 times 1 x 64, 2.00 times 4 x 16; measured in 0 s"
    assert [environment["CUDA_VISIBLE_DEVICES"] for _, environment in began] == ["4", "5", "6", "7"]
    assert [index for index, _ in began] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (InputError("the teacher cannot be read", "teacher"), "the teacher cannot be read"),
        (WorkerDied("a cell", -9, "in 'log'"), "was killed by signal 9 before its turns were done"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_a_measurement_that_fails_is_told_and_leaves_the_number_without_one(
    small: Small, tmp_path: Path, told: list[str], monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(measuring, "measure", fails)
    assert measured(cells_of(small, tmp_path, "seed=0", "seed=1"), uses_gpus=False, tell=told.append) is None
    (line,) = told
    assert line.startswith("launcher: 2 workers x 1 thread: not measured, because ")
    assert reason in line
    assert not list((tmp_path / ".launch").glob("*.json"))


def test_a_measurement_that_cannot_be_stored_counts_and_says_so(
    small: Small, tmp_path: Path, told: list[str], began: Began, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise InputError("cannot write to 'workers.json'", "paths.runs")

    monkeypatch.setattr(measuring, "write_speeds", refused)
    assert measured(cells_of(small, tmp_path, "seed=0", "seed=1"), uses_gpus=False, tell=told.append) == 2
    assert told[0].endswith("; measured in 0 s, and not stored: cannot write to 'workers.json'")


def test_a_second_command_waits_for_the_measurement_of_the_first(
    small: Small, tmp_path: Path, told: list[str], began: Began, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = cells_of(small, tmp_path, "seed=0", "seed=1")

    class Held(FileLock):
        """A lock that another process holds until it is asked for without a limit of time, and has then measured."""

        def acquire(self, timeout: float | None = None, **more: Any) -> Any:
            if timeout == 0:
                raise measuring.Timeout(self.lock_file)
            path = Path(self.lock_file).with_suffix(".json")
            write_speeds(path, speeds({1: 3.0, 2: 3.0}, threads=2), {})
            return super().acquire(timeout, **more)

    monkeypatch.setattr(measuring, "FileLock", Held)
    assert measured(cells, uses_gpus=False, tell=told.append) == 1
    assert told == [
        "launcher: another command measures how many processes are fastest; waiting for it",
        "launcher: 1 worker x 2 threads: 1.00 times 2 x 1; measured on 2025-01-31",
    ]
    assert began == []


# -- order of a sweep --------------------------------------------------------------------------------------------------


class Executed:
    """Stand-in for `FanOut` that executes no job: all are done, but those whose seed is 13."""

    def __init__(self, jobs: Any, slots: Any, done: set[str] | None = None, failed: dict[str, Any] | None = None) -> None:
        self.jobs, self.slots = jobs, slots
        self.done, self.failed = done or set(), failed or {}

    def __iter__(self) -> Iterator[tuple[str, int]]:
        for name, job in self.jobs.items():
            if name in self.done or name in self.failed:
                continue
            if job.run.spec.seed == 13:
                self.failed[name] = "broken"
            else:
                self.done.add(name)
            yield name, len(self.slots)


@pytest.mark.parametrize("seed", [0, 13])
def test_what_cells_need_is_made_first_and_a_cell_without_it_is_not_measured(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr("kd.launch.places.cores", lambda: 4)
    words = [f"teacher.minilm.run.seed={seed}", f"paths.runs={tmp_path}"]
    commands = [small("method=kd", *words, "seed=1"), small("method=finetune", "teacher=[]", *words[1:], "seed=2")]
    jobs = jobs_of({index: plan_command(command) for index, command in enumerate(commands)}, commands)
    (teacher, student, alone) = jobs
    seen: list[list[str]] = []

    def chosen(cells: Sequence[Job], *, uses_gpus: bool) -> int:
        seen.append([job.name for job in cells])
        return 2

    monkeypatch.setattr(launching, "FanOut", Executed)
    monkeypatch.setattr(measuring, "measured", chosen)
    events = list(launching.local(jobs, LauncherSpec("local", "measure"), "sweep"))
    assert events == [(teacher, 4), (student, 2), (alone, 2)]
    assert seen == [[student, alone] if seed == 0 else [alone]]
    assert launching.workers(LauncherSpec("local", "measure"), jobs.values()) == 4


@pytest.mark.parametrize("name", ["slurm", "ray"])
def test_a_measurement_of_this_machine_is_refused_where_jobs_run_on_others(small: Small, tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"launcher\.workers=measure measures this machine") as caught:
        plan_command(small(f"launcher={name}", "launcher.workers=measure", f"paths.runs={tmp_path}"))
    assert caught.value.key == "launcher.workers"


@pytest.mark.parametrize("value", ["measured", "'2'", "0", "1025", "1.5", "true", "[2]"])
def test_other_numbers_of_workers_are_refused(small: Small, tmp_path: Path, value: str) -> None:
    with pytest.raises(InputError, match=r"launcher\.workers") as caught:
        plan_command(small("launcher=local", f"launcher.workers={value}", f"paths.runs={tmp_path}"))
    assert caught.value.key == "launcher.workers"


# -- steps and processes -----------------------------------------------------------------------------------------------


class Gate:
    """A gate that lets one turn through."""

    def __init__(self, at_end: Callable[[], None]) -> None:
        self.at_end, self.facts, self.examples = at_end, dict[str, Any](), list[int]()

    def ready(self, facts: dict[str, Any], accelerator: str) -> None:
        self.facts = facts

    def open(self) -> None:
        if self.examples:
            raise Finished

    def close(self, examples: int) -> None:
        self.examples.append(examples)
        self.at_end()


@pytest.mark.parametrize("method", ["kd", "dml"])
def test_a_turn_takes_the_steps_of_training(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """A turn of as many steps as an epoch has ends with the weights of the run after its first epoch, to the bit."""
    teacher = ["teacher=[]"] if method == "dml" else []
    words = small(f"method={method}", *teacher, f"paths.runs={tmp_path}")
    run = plan_command(words)
    first: list[dict[str, torch.Tensor]] = []

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            first.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    execute(run, callbacks=[Watch()])
    before = sorted(path for path in run.directory.rglob("*"))
    engines: list[pl.LightningModule] = []
    original = cell.prepare

    def prepare(*arguments: Any) -> Any:
        prepared = original(*arguments)
        engines.append(prepared.engine)
        return prepared

    weights: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(cell, "prepare", prepare)
    gate = Gate(lambda: weights.append({name: value.clone() for name, value in engines[0].state_dict().items()}))
    with pytest.raises(Finished):
        cell.train_cell(Measurement(CELL, tuple(words), 100, 1, tmp_path / "scratch"), gate)  # type: ignore[arg-type]
    assert (gate.facts, gate.examples) == ({"steps": 6}, [96])
    assert weights[0].keys() <= first[0].keys()
    assert any(value.is_floating_point() for value in weights[0].values())
    for name, value in weights[0].items():
        assert torch.equal(value, first[0][name]), name
    assert sorted(path for path in run.directory.rglob("*")) == before


def test_turns_have_the_same_batches_and_whole_optimiser_steps(small: Small, tmp_path: Path) -> None:
    words = small("method=finetune", "teacher=[]", "trainer.accumulate=3", "trainer.batch_size=8", f"paths.runs={tmp_path}")
    prepared = cell.prepare(run := plan_command(words), cell.examples_of(run))
    data = cell.FirstBatches(prepared.data, 6)
    epochs = [[batch.index.tolist() for batch in data.train_dataloader()] for _ in range(2)]
    assert epochs[0] == epochs[1]
    assert epochs[0] == [batch.index.tolist() for batch in prepared.data.train_dataloader()][:6]
    gate = Gate(lambda: None)
    with pytest.raises(Finished):
        cell.train_cell(Measurement(CELL, tuple(words), 4, 1, tmp_path / "scratch"), gate)  # type: ignore[arg-type]
    assert gate.facts == {"steps": 6}


def test_steps_with_cuda_graphs_are_measured(small: Small, tmp_path: Path, overwriting: Overwriting) -> None:
    words = ["method=finetune", "teacher=[]", "trainer.compile=reduce-overhead", f"paths.runs={tmp_path}"]
    gate = Gate(lambda: None)
    with pytest.raises(Finished):
        cell.train_cell(Measurement(CELL, tuple(small(*words)), 3, 1, tmp_path / "scratch"), gate)  # type: ignore[arg-type]
    assert gate.examples == [48]
    assert [len(passes) for passes in overwriting.steps] == [2, 2, 2], "of both blocks, in each step"


def test_no_step_is_measured_while_further_text_is_tokenised(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datamodule, "MOST_BEFORE", 10)
    (tmp_path / "more.txt").write_text("a good film\n" * 200)
    prepared: list[Any] = []
    original = cell.prepare
    monkeypatch.setattr(cell, "prepare", lambda *arguments: prepared.append(original(*arguments)) or prepared[0])
    words = small("method=dml", "teacher=[]", f"task.unlabelled={tmp_path / 'more.txt'}", f"paths.runs={tmp_path}")
    threads: list[list[str]] = []
    gate = Gate(lambda: threads.append([thread.name for thread in threading.enumerate() if "tokens" in thread.name]))
    with pytest.raises(Finished):
        cell.train_cell(Measurement(CELL, tuple(words), 3, 1, tmp_path / "scratch"), gate)  # type: ignore[arg-type]
    assert threads == [[]]
    assert prepared[0].data.lengths().ahead is None
    assert gate.examples == [48]


def test_a_turn_has_the_threads_that_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kd.bench.workers import Gate as Real

    class Channel:
        def send(self, message: object) -> None:
            """Do nothing."""

        def recv(self) -> object:
            return Go(3)

    given: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    Real(Channel(), Measurement(CELL, (), 1, 1, tmp_path)).open()  # type: ignore[arg-type]
    assert given == [3]


COMMAND = """
import sys
from pathlib import Path
from kd.launch import measure, places

def noted(*arguments):
    process = fork(*arguments)
    with (folder / "processes").open("a") as file:
        file.write(f"{process.pid}\\n")
    return process

if __name__ == "__main__":  # processes import this file
    places.cores = lambda: 2
    measure.SECONDS = float(sys.argv.pop(1))
    if measure.SECONDS > 1e3:  # two processes at once, for ever
        measure.candidates = lambda count: [count, 2 * count]
    folder, fork, measure.fork = Path(sys.argv.pop(1)), measure.fork, noted
    from kd import train
    train.main()
"""


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_sweep_is_measured_once_and_a_measurement_that_is_killed_leaves_nothing(small: Small, tmp_path: Path) -> None:
    """Whole commands: one that is killed as it measures, one that measures and makes two cells, one that finds the figures."""
    (tmp_path / "command.py").write_text(COMMAND)
    (tmp_path / "tmp").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(tmp_path / "tmp")}
    runs = tmp_path / "runs"

    def command(seconds: float, *seeds: int) -> list[str]:
        words = ["method=finetune", "teacher=[]", "launcher=local", "launcher.workers=measure", "trainer.max_epochs=1"]
        words = [*words, f"paths.runs={runs}", f"seed={','.join(map(str, seeds))}", "--multirun"]
        return [sys.executable, str(tmp_path / "command.py"), str(seconds), str(tmp_path), *small(*words)]

    killed = subprocess.Popen(command(1e6, 0, 1), env=environment, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while len(list((runs / ".launch").rglob("metrics.csv"))) < 2:  # they take steps
        assert killed.poll() is None
        assert time.monotonic() < until
        time.sleep(0.1)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    processes = [int(line) for line in (tmp_path / "processes").read_text().split()]
    while any(is_alive(process) for process in processes):
        assert time.monotonic() < until
        time.sleep(0.1)
    assert len(processes) == 2
    assert not list((runs / ".launch").glob("*.json"))
    assert [path.name for path in (tmp_path / "tmp").iterdir() if path.name.startswith("kd-")] == []
    assert len(list((runs / ".launch").glob("*.part"))) == 1, "what it was writing"
    assert [path.name for path in runs.iterdir() if not path.name.startswith(".")] == []

    done = subprocess.run(command(0.2, 0, 1), env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("launcher: ")]
    assert re.fullmatch(r"launcher: (1 worker x 2 threads: .* 2 x 1|2 workers x 1 thread: .* 1 x 2); measured in \d+ s", line)
    assert "2 done, 0 failed" in done.stdout
    (stored,) = (runs / ".launch").glob("*.json")
    record = json.loads(stored.read_text())
    assert record["rates"].keys() == {"1", "2"}
    assert min(record["rates"].values()) > 0
    assert 1e7 < record["memory"] < 1e11
    left = [path.suffix for path in (runs / ".launch").iterdir() if not path.name.startswith("finetune-")]
    assert set(left) <= {".json", ".lock"}
    assert len([path for path in runs.iterdir() if not path.name.startswith(".")]) == 2
    threads = line.split(" x ")[1].split()[0]
    for result in runs.glob("*/result.json"):
        assert str(json.loads(result.read_text())["hardware"]["threads"]) == threads
    count = len((tmp_path / "processes").read_text().split())
    assert count == 2 + 2

    done = subprocess.run(command(0.2, 0, 1, 2), env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert f"{line.rpartition(';')[0]}; measured on {record['date']}" in done.stdout
    assert "3 done, 0 failed" in done.stdout
    assert len((tmp_path / "processes").read_text().split()) == count
