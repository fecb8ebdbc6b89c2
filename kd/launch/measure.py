"""Measurement of how many processes side by side train the cells of a sweep fastest on this machine.

Processes take the training steps of a cell that waits (`kd.bench.cell`), started together turn by turn, each with its share of
the threads. The steps per second of all together decide. They are stored in the folder of the runs, by machine, versions and
shape of the steps, so that later commands find the same number.
"""

import contextlib
import datetime
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from kd.bench.candidates import Candidate
from kd.bench.workers import GO, Go, Turn, Worker, WorkerDied
from kd.bench.workers import Job as Measurement
from kd.config.cohort import students_of
from kd.config.mixture import tasks_of
from kd.errors import InputError
from kd.launch.fan_out import interrupted_by_sigterm
from kd.launch.jobs import Job
from kd.launch.places import cores, gpus, places
from kd.launch.processes import fork
from kd.runs.digest import digest_of
from kd.runs.identity import backbone_of
from kd.runs.run import Run, read_record, write_record
from kd.system.files import remove
from kd.system.hardware import available_memory, cpu_name, threads_asked_for, versions

CELL = Candidate("cell", "a cell", worker="kd.bench.cell:train_cell")
SIZE = Candidate("size", "size of a cell", worker="kd.bench.cell:count_parameters")

STEPS = 5
"""Batches of a turn, rounded up to whole optimiser steps. Our choice: with steps of a second a turn takes a few."""

SECONDS = 3.0
"""Seconds for which each number of processes is measured, in whole turns, of which there is at least one. Our choice."""

MOST_TURNS = 100_000
"""More turns than are measured."""

TIE = 1.03
"""Ratio of speeds up to which fewer processes are preferred: they need less memory, and the first cell is done earlier."""

SIZES = ("name", "layers", "width", "heads", "intermediate", "family", "backbone")
"""Keys of a student that its size follows from."""

SHAPE = "batch_size batch_tokens pad_multiple accumulate clip precision compile accelerator embedding_rows num_workers".split()
"""Keys of the trainer on which the time of a step depends."""


@dataclass(frozen=True)
class Speeds:
    """Measurement of several numbers of processes.

    Attributes:
        rates: number of processes -> training steps per second, of all processes together.
        threads: number of processes -> threads of each.
        memory: peak resident memory of one process in bytes.
        seconds: time that the measurement took.
        date: day on which it was made, as 2025-01-31.
    """

    rates: Mapping[int, float]
    threads: Mapping[int, str]
    memory: int
    seconds: float
    date: str

    def among(self, counts: Sequence[int]) -> "Speeds":
        """Return the measurement of some of the numbers."""
        return Speeds({count: self.rates[count] for count in counts}, self.threads, self.memory, self.seconds, self.date)

    @property
    def best(self) -> int:
        """Number of processes that is fastest; of several that are within `TIE` of it, the smallest."""
        most = max(self.rates.values())
        return min(count for count, rate in self.rates.items() if rate * TIE >= most)

    def compared(self) -> list[str]:
        """Return how many times as fast as with each other number it is with the best one, in words."""
        best = self.best
        return [
            f"{self.rates[best] / rate:.2f} times {count} x {self.threads[count]}"
            for count, rate in self.rates.items()
            if count != best
        ]


class Process(Protocol):
    """A process that takes turns, see `kd.bench.workers.Worker`."""

    facts: dict[str, Any]

    def wait(self) -> None:
        """Wait until it is ready."""

    def go(self, message: Go = GO) -> None:
        """Start a turn."""

    def done(self) -> Turn:
        """Wait for the end of the turn."""

    def close(self) -> None:
        """End the process."""


def candidates(count: int) -> list[int]:
    """Return the numbers of processes to measure on a machine with so many processors, or GPUs.

    >>> candidates(1), candidates(2), candidates(3), candidates(64)
    ([1], [1, 2], [1, 2, 3], [1, 2, 32, 64])
    """
    return sorted({number for number in (1, 2, count // 2, count) if 1 <= number <= count})


def fitting(counts: Sequence[int], memory: int, available: float) -> list[int]:
    """Return the numbers of processes whose memory is there; one process is always among them.

    Args:
        counts: numbers of processes.
        memory: peak memory of one in bytes.
        available: bytes that are there for all.
    """
    return [count for count in counts if count == 1 or count * memory <= available]


def measure(counts: Sequence[int], threads: Mapping[int, str], start: Callable[[int], Process], available: float) -> Speeds:
    """Measure numbers of processes, from the fewest to the most; those that need more memory than there is are left out.

    A process takes part in all measurements of larger numbers. Before each number is measured, all its processes take a turn
    that does not count.

    Args:
        counts: the numbers, increasing, the first of which is 1.
        threads: number of processes -> threads of each, as for `OMP_NUM_THREADS`.
        start: starts the process with this index.
        available: bytes of memory that are there for all processes.

    Raises:
        InputError: if a run cannot be built.
        WorkerDied: if a process ends early.
    """
    began, processes, memory = time.monotonic(), list[Process](), 0
    rates: dict[int, float] = {}
    try:
        for count in counts:
            if count not in fitting(counts, memory, available):
                break
            first = len(processes)
            for index in range(first, count):
                processes.append(start(index))
            for process in processes[first:]:
                process.wait()
            own = int(threads[count].split(",")[0])
            together(processes, own)
            turns, taken = list[float](), 0.0
            while taken < SECONDS:
                done = together(processes, own)
                steps = zip(processes, done, strict=True)
                turns.append(sum(process.facts["steps"] / turn.seconds for process, turn in steps))
                taken += max(turn.seconds for turn in done)
                memory = max(memory, *(turn.resident_bytes for turn in done))
            rates[count] = statistics.median(turns)
    finally:
        close_all(processes)
    return Speeds(rates, dict(threads), memory, time.monotonic() - began, datetime.date.today().isoformat())


def close_all(processes: Sequence[Process]) -> None:
    """End processes at the same time: one that is in the middle of a turn has some seconds to end it."""
    if processes:
        with ThreadPoolExecutor(len(processes)) as pool:
            list(pool.map(lambda process: process.close(), processes))


def together(processes: Sequence[Process], threads: int) -> list[Turn]:
    """Let processes take a turn at the same time, each with so many threads; return their turns."""
    for process in processes:
        process.go(Go(threads))
    return [process.done() for process in processes]


def machine(uses_gpus: bool) -> dict[str, Any]:
    """Return what identifies machines on which a measurement holds."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "usable": cores(),
        "threads": threads_asked_for(),
        "gpus": gpu_names() if uses_gpus else [],
    }


def gpu_names() -> list[str]:
    """Return the names of the GPUs that this process sees."""
    import torch

    return [torch.cuda.get_device_name(index) for index in range(gpus())]


def shape_of(run: Run) -> dict[str, Any]:
    """Return what the time of a training step of a run depends on: sizes of students, method, data and batches.

    Other options of the method, the optimiser's settings and the seed are not among them, so that the cells of a sweep over
    these have one shape.
    """
    spec = run.spec
    return {
        "students": students_in(run),
        "method": spec.method["name"],
        "teachers": list(spec.teacher),
        "pool": spec.pool.name,
        "cohort": spec.cohort.name,
        "task": spec.task.name,
        "data": digest_of({"data": run.digest_inputs["data"]}),
        "max_length": [task.max_length for task in tasks_of(spec.task).values()],
        "cache": str(spec.cache),
        **{name: getattr(spec.trainer, name) for name in SHAPE},
    }


def students_in(run: Run) -> dict[str, Any]:
    """Return the sizes of a run's students as configured, and what they follow from."""
    students = {name: {key: getattr(one, key) for key in SIZES} for name, one in students_of(run.spec).items()}
    return {**students, "backbone": backbone_of(run.spec)[0], "surgery": list(run.spec.surgery)}


def largest(cells: Sequence[Job], start: Callable[[Job, Candidate], Worker]) -> Job:
    """Return the first of the cells whose students have the most parameters.

    Args:
        cells: the cells.
        start: starts a process about a cell, `SIZE`, which is not needed if all have the same students.

    Raises:
        InputError: if a run cannot be planned.
        WorkerDied: if a process ends early.
    """
    first: dict[str, Job] = {}
    for cell in cells:
        first.setdefault(digest_of(students_in(cell.run)), cell)
    if len(first) == 1:
        return cells[0]
    parameters: dict[str, int] = {}
    for students, cell in first.items():
        with contextlib.closing(start(cell, SIZE)) as worker:
            parameters[students] = worker.describe()["parameters"]
    return first[max(parameters, key=lambda students: parameters[students])]


def read_speeds(path: Path, counts: Sequence[int], available: float) -> Speeds | None:
    """Return a stored measurement of all numbers for which there is memory now; None if there is none.

    Args:
        path: its file.
        counts: numbers of processes.
        available: bytes of memory that are there for all processes.
    """
    record = read_record(path, sealed=True)
    if record is None:
        return None
    rates = {int(count): float(rate) for count, rate in record["rates"].items()}
    threads = {int(count): str(own) for count, own in record["threads"].items()}
    needed = fitting(counts, record["memory"], available)
    if any(count not in rates for count in needed):
        return None
    return Speeds(rates, threads, record["memory"], record["seconds"], record["date"]).among(needed)


def write_speeds(path: Path, speeds: Speeds, about: Mapping[str, Any]) -> None:
    """Store a measurement, with a description of what it is about.

    Raises:
        InputError: if the file cannot be written.
    """
    by_count = {name: {str(count): value for count, value in getattr(speeds, name).items()} for name in ("rates", "threads")}
    rest = {"memory": speeds.memory, "seconds": round(speeds.seconds, 1), "date": speeds.date}
    write_record(path, {**about, **by_count, **rest})


def measured(cells: Sequence[Job], *, uses_gpus: bool, tell: Callable[[str], None] | None = None) -> int | None:
    """Return how many processes train cells fastest; None, for the number without a measurement, where nothing is measured.

    Prints a line with the number and the figures, or the reason why nothing was measured.

    Args:
        cells: cells whose inputs are done. Measured are the steps of the one with the largest student.
        uses_gpus: True if they use GPUs where there are any; there are then at most as many processes as GPUs.
        tell: prints a line.

    Raises:
        KeyboardInterrupt: on an interrupt, also SIGTERM, after the processes have ended.
    """
    tell = tell or (lambda line: print(line, flush=True))
    default = places(None, uses_gpus)
    usual, counts = in_words(len(default), default[0]["OMP_NUM_THREADS"]), candidates(len(default))
    if not cells:
        return None
    if len(counts) == 1:
        tell(f"launcher: {usual}: there is no other number to measure")
        return None
    try:
        with interrupted_by_sigterm():
            speeds, when = speeds_of(cells, counts, tell, uses_gpus=uses_gpus)
    except (InputError, WorkerDied, OSError) as error:
        reason = error.message if isinstance(error, InputError) else str(error)
        tell(f"launcher: {usual}: not measured, because {reason}")
        return None
    if speeds is None:
        tell(f"launcher: {usual}: not measured, because {when}")
        return None
    excluded = [f"{count} x {speeds.threads[count]}" for count in counts if count not in speeds.rates]
    parts = [in_words(speeds.best, speeds.threads[speeds.best]), *filter(None, [", ".join(speeds.compared())])]
    memory = f"; {' and '.join(excluded)} would need more memory than is available" if excluded else ""
    tell(f"launcher: {': '.join(parts)}{memory}; {when}")
    return speeds.best


def speeds_of(
    cells: Sequence[Job], counts: Sequence[int], tell: Callable[[str], None], *, uses_gpus: bool
) -> tuple[Speeds | None, str]:
    """Return a measurement, stored or made now, and words for when it was made; or None, and the reason why there is none.

    Raises:
        InputError: if a run cannot be built.
        WorkerDied: if a process ends early.
        OSError: if nothing can be written to the folder of the runs.
    """
    folder, available = cells[0].file("").parent, available_memory()
    folder.mkdir(parents=True, exist_ok=True)
    environments = places(counts[-1], uses_gpus)
    threads = {count: places(count, uses_gpus)[0]["OMP_NUM_THREADS"] for count in counts}

    def start(cell: Job, candidate: Candidate, log: Path, scratch: Path, index: int = 0) -> Worker:
        environment = {**os.environ, **environments[index]}
        job = Measurement(candidate, cell.command, STEPS, MOST_TURNS, scratch / str(index))
        return Worker(job, lambda function, arguments: fork(function, arguments, environment, log), f"in '{log}'")

    log = folder / "sizes.log"
    cell = largest(cells, lambda cell, candidate: start(cell, candidate, log, folder))
    remove(log)
    about = {"machine": machine(uses_gpus), "versions": versions(), "shape": shape_of(cell.run)}
    path = folder / f"workers-{digest_of(about)}.json"
    with alone(path, tell) if read_speeds(path, counts, available) is None else contextlib.nullcontext():
        if (speeds := read_speeds(path, counts, available)) is not None:
            return speeds, f"measured on {speeds.date}"
        if len(cells) == 1:
            return None, "one cell is left"
        with scratch_folder(path.with_suffix(".part")) as scratch:
            log = path.with_suffix(".log")
            speeds = measure(counts, threads, lambda index: start(cell, CELL, log, scratch, index), available)
        remove(log)
        when = f"measured in {speeds.seconds:.0f} s"
        try:
            write_speeds(path, speeds, about)
        except InputError as error:
            when += f", and not stored: {error.message}"
        return speeds, when


@contextlib.contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """Make a folder for the files of the processes in another one, which has nothing else, and remove it afterwards.

    What a killed measurement left there is removed first; its processes may still be ending.

    Raises:
        OSError: if it cannot be made.
    """
    with contextlib.suppress(OSError):
        remove(folder)
    folder.mkdir(exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as scratch:
            yield Path(scratch)
    finally:
        with contextlib.suppress(OSError):
            remove(folder)


@contextlib.contextmanager
def alone(path: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """Keep other commands from measuring the same; wait for one that does so now. The lock of a killed process is free."""
    lock = FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        tell("launcher: another command measures how many processes are fastest; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def in_words(count: int, threads: str) -> str:
    """Return numbers of processes and threads in words.

    >>> in_words(2, "1"), in_words(1, "8")
    ('2 workers x 1 thread', '1 worker x 8 threads')
    """
    return f"{count} worker{'s' * (count > 1)} x {threads} thread{'s' * (threads != '1')}"
