"""One process for each candidate, so that peak memory is measured per candidate.

The candidates of a benchmark work one at a time. Several processes that work at once show what a machine can do with them side
by side (`kd.launch.measure`).
"""

import contextlib
import importlib
import multiprocessing
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from kd.bench.candidates import Candidate
from kd.bench.launches import Launches, Profile
from kd.errors import InputError

WAITING, STOP = "waiting", "stop"
EXIT_TIMEOUT = 10.0
"""Seconds that a worker has to exit after a stop message."""


@dataclass(frozen=True, slots=True)
class Job:
    """Description of the measurement that a worker makes.

    Attributes:
        candidate: the candidate to measure.
        overrides: overrides of the candidate's run.
        steps: optimiser steps of one turn; fewer if there are not enough examples.
        turns: largest number of turns, those that are not measured included.
        folder: folder for its files, which is deleted at the end.
    """

    candidate: Candidate
    overrides: tuple[str, ...]
    steps: int
    turns: int
    folder: Path


@dataclass(frozen=True, slots=True)
class Go:
    """Message that starts a turn.

    Attributes:
        threads: number of threads of the process from this turn on; None to leave it.
        profile: whether the turn is profiled, and its launches are counted.
    """

    threads: int | None = None
    profile: bool = False


GO, PROFILE = Go(), Go(profile=True)


@dataclass(frozen=True, slots=True)
class Turn:
    """Measurement of one turn: an epoch over the few training examples of the benchmark.

    Attributes:
        seconds: wall-clock time.
        cpu_seconds: CPU time of all threads; lower than usual for its wall-clock time if other processes use the machine.
        examples: number of examples trained on.
        peak_bytes: peak memory of the process since before its first turn, on the GPU if it uses one.
        reserved_bytes: on a GPU the peak of what torch has reserved there: the memory of graphs is not all of tensors.
        launches: counts of a turn that was profiled, whose time says nothing; None for a turn that was measured.
        resident_bytes: peak resident memory of the process since before its first turn.
    """

    seconds: float
    cpu_seconds: float
    examples: int
    peak_bytes: int
    reserved_bytes: int | None = None
    launches: Launches | None = None
    resident_bytes: int = 0


class Finished(Exception):
    """Signal that there are no more turns."""


class WorkerDied(Exception):
    """Error raised when a worker ends before its turns are done.

    Args:
        name: name of its candidate.
        status: its exit status, that of a signal negative.
        output: where its output is, in words.
    """

    def __init__(self, name: str, status: int | None, output: str = "above") -> None:
        how = f"was killed by signal {-status}" if status is not None and status < 0 else f"ended with status {status}"
        memory = "; the system kills processes when memory runs out" if status == -9 else ""
        super().__init__(f"the process of '{name}' {how} before its turns were done{memory}. Its output is {output}")


class Gate:
    """Worker side of the connection; it times each turn from the parent's go message to the end of the turn.

    Args:
        channel: connection to the parent process.
        job: the measurement to make.
    """

    def __init__(self, channel: Connection, job: Job) -> None:
        self.channel, self.job = channel, job
        self.accelerator = "cpu"
        self._began = self._cpu_began = 0.0
        self._profile: Profile | None = None

    def ready(self, facts: Mapping[str, Any], accelerator: str) -> None:
        """Send a description of the built run to the parent, before the first turn."""
        from kd.bench.cost import forget_peak

        self.accelerator = accelerator
        forget_peak(accelerator)
        self.channel.send(dict(facts))

    def open(self) -> None:
        """Wait for the next turn, then start the clock, and the profiler if the turn is to be profiled.

        Raises:
            Finished: if there are no more turns.
        """
        from kd.bench.cost import synchronise

        self.channel.send(WAITING)
        message = self.channel.recv()
        if message == STOP:
            raise Finished
        if message.threads is not None:
            import torch

            torch.set_num_threads(message.threads)
        synchronise(self.accelerator)
        if message.profile:
            self._profile = Profile(self.job.folder)
            self._profile.start()
        self._began, self._cpu_began = time.perf_counter(), time.process_time()

    def close(self, examples: int) -> None:
        """Stop the clock and send the turn's measurement to the parent."""
        from kd.bench.cost import peak_bytes, reserved_bytes, synchronise

        launches, self._profile = None if self._profile is None else self._profile.stop(), None
        synchronise(self.accelerator)
        seconds, cpu_seconds = time.perf_counter() - self._began, time.process_time() - self._cpu_began
        peak, reserved = peak_bytes(self.accelerator), reserved_bytes(self.accelerator)
        self.channel.send(Turn(seconds, cpu_seconds, examples, peak, reserved, launches, peak_bytes("cpu")))


def work(channel: Connection, job: Job) -> None:
    """Run a worker process: build its candidate, and train turn by turn until the parent sends a stop message."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent ends its workers
    module, _, function = job.candidate.worker.partition(":")
    try:
        getattr(importlib.import_module(module), function)(job, Gate(channel, job))
    except (Finished, EOFError, BrokenPipeError):  # a stop message, or the parent has ended
        pass
    except InputError as error:  # sent as the base class: a subclass with other arguments could not be unpickled
        channel.send(InputError(error.message, error.key))


Start = Callable[[Callable[..., None], tuple[Any, ...]], BaseProcess]
"""Starts a function with these arguments in a process of its own, and returns the process."""


def spawn(function: Callable[..., None], arguments: tuple[Any, ...]) -> BaseProcess:
    """Start a function in a new interpreter: a fork would inherit the parent's memory and threads."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments, name="kd-bench")
    process.start()
    return process


class Worker:
    """Parent side of the connection to one worker process.

    Args:
        job: the measurement to make. The process starts at once and builds the run; `wait` fills `facts`.
        start: how the process is started.
        output: where its output is, for messages.

    Raises:
        InputError: from `wait`, `turn` and `done`, if the worker raised one.
        WorkerDied: from these and `go`, if the process ends early.
    """

    def __init__(self, job: Job, start: Start = spawn, output: str = "above") -> None:
        self.name, self.output = job.candidate.name, output
        self.channel, theirs = multiprocessing.Pipe()
        self.process = start(work, (theirs, job))
        theirs.close()
        self.facts: dict[str, Any] = {}

    def describe(self) -> dict[str, Any]:
        """Wait until the worker has built its run, and return its description."""
        self.facts = self._receive()
        return self.facts

    def wait(self) -> None:
        """Wait until the worker is ready for its first turn."""
        self.describe()
        self._receive()

    def turn(self, message: Go = GO) -> Turn:
        """Run one turn in the worker, and wait until the worker is idle again.

        Args:
            message: `GO`, or `PROFILE` for a turn that is profiled.
        """
        self.go(message)
        return self.done()

    def go(self, message: Go = GO) -> None:
        """Start a turn in the worker, and return at once; `done` returns the turn."""
        try:
            self.channel.send(message)
        except OSError as error:
            raise self._died() from error

    def done(self) -> Turn:
        """Return the turn that `go` has started, once the worker is idle again."""
        done: Turn = self._receive()
        self._receive()
        return done

    def close(self) -> None:
        """Stop the worker process, even in the middle of a turn."""
        with contextlib.suppress(OSError):  # the process has already ended
            self.channel.send(STOP)
        self.channel.close()
        self.process.join(EXIT_TIMEOUT if self.facts else 0)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join(EXIT_TIMEOUT)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def _receive(self) -> Any:
        try:
            message = self.channel.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        if isinstance(message, InputError):
            raise message
        return message

    def _died(self) -> WorkerDied:
        self.process.join(EXIT_TIMEOUT)
        return WorkerDied(self.name, self.process.exitcode, self.output)
