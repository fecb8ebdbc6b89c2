"""One process for each candidate, so that its peak memory is its own; it works only when it is its turn."""

import contextlib
import importlib
import multiprocessing
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from kd.bench.candidates import Candidate
from kd.errors import InputError

WAITING, GO, STOP = "waiting", "go", "stop"
PATIENCE = 10.0
"""Seconds a worker has to end after it was told to."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker measures.

    Attributes:
        candidate: whose turns it does.
        overrides: of the candidate's run.
        steps: optimiser steps of one turn, or fewer where there are not so many examples.
        turns: the warm-up included.
        folder: for its files; it is deleted in the end.
    """

    candidate: Candidate
    overrides: tuple[str, ...]
    steps: int
    turns: int
    folder: Path


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn.

    Attributes:
        seconds: on the clock.
        cpu_seconds: of all its threads; less than the clock's on a machine that others keep busy.
        examples: trained on.
        peak_bytes: of the process since its first turn began.
    """

    seconds: float
    cpu_seconds: float
    examples: int
    peak_bytes: int


class Finished(Exception):
    """There are no more turns."""


class WorkerDied(Exception):
    """A worker ended before its turns were done."""

    def __init__(self, name: str, status: int | None) -> None:
        how = f"was killed by signal {-status}" if status is not None and status < 0 else f"ended with status {status}"
        memory = "; the system kills what takes more memory than there is" if status == -9 else ""
        super().__init__(f"the process of '{name}' {how} before its turns were done{memory}. What it said stands above")


class Gate:
    """The worker's side: the clock runs from the parent's word to the end of the turn.

    Args:
        channel: to the parent.
        job: whose turns these are.
    """

    def __init__(self, channel: Connection, job: Job) -> None:
        self.channel, self.job = channel, job
        self.accelerator = "cpu"
        self._began = self._cpu_began = 0.0

    def ready(self, facts: Mapping[str, Any], accelerator: str) -> None:
        """Say what was built, before the first turn."""
        from kd.bench.cost import forget_peak

        self.accelerator = accelerator
        forget_peak(accelerator)
        self.channel.send(dict(facts))

    def open(self) -> None:
        """Wait for the turn, then start the clock.

        Raises:
            Finished: if there is none.
        """
        from kd.bench.cost import synchronise

        self.channel.send(WAITING)
        if self.channel.recv() == STOP:
            raise Finished
        synchronise(self.accelerator)
        self._began, self._cpu_began = time.perf_counter(), time.process_time()

    def close(self, examples: int) -> None:
        """Stop the clock and say how long it took."""
        from kd.bench.cost import peak_bytes, synchronise

        synchronise(self.accelerator)
        seconds, cpu_seconds = time.perf_counter() - self._began, time.process_time() - self._cpu_began
        self.channel.send(Turn(seconds, cpu_seconds, examples, peak_bytes(self.accelerator)))


def work(channel: Connection, job: Job) -> None:
    """What a worker does: it builds its candidate, and trains in turns until it is told to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent ends its workers
    module, _, function = job.candidate.worker.partition(":")
    try:
        getattr(importlib.import_module(module), function)(job, Gate(channel, job))
    except (Finished, EOFError):  # told to stop, or the parent is gone
        pass
    except InputError as error:  # whatever its subclass: one with other arguments would not survive the pipe
        channel.send(InputError(error.message, error.key))


class Worker:
    """The parent's side.

    Args:
        job: what it measures. The process starts at once and builds; `facts` is known when it is ready.

    Raises:
        InputError: from building.
        WorkerDied: if it ends before it is ready.
    """

    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit the parent's memory and threads
        self.name = job.candidate.name
        self.channel, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, job), name=f"kd-bench {self.name}")
        self.process.start()
        theirs.close()
        self.facts: dict[str, Any] = {}

    def wait(self) -> None:
        """Until it is ready for its first turn."""
        self.facts = self._receive()
        self._receive()

    def turn(self) -> Turn:
        """Let it do one turn, and wait until it is idle again."""
        try:
            self.channel.send(GO)
        except OSError as error:
            raise self._died() from error
        done: Turn = self._receive()
        self._receive()
        return done

    def close(self) -> None:
        """End it, whatever it is at."""
        with contextlib.suppress(OSError):  # it has ended
            self.channel.send(STOP)
        self.channel.close()
        self.process.join(PATIENCE if self.facts else 0)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join(PATIENCE)
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
        self.process.join(PATIENCE)
        return WorkerDied(self.name, self.process.exitcode)
