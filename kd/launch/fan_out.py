"""Execution of jobs side by side in processes of this machine, shared with any number of identical commands.

Commands share jobs by locks in the folder of the runs: a job that another process executes is left alone until it is done. A
job that fails is not tried again by the commands that run at that time, nor by other tasks of its submission to a queue, but by
the next one.
"""

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType

from filelock import FileLock, Timeout

from kd.config.failure import Failure
from kd.launch.jobs import Job
from kd.launch.places import cores
from kd.launch.processes import Program
from kd.system.command import INTERRUPTED
from kd.system.files import check_writable, remove, write_text, writing
from kd.system.hardware import threads_asked_for

POLL = 0.2
"""Seconds between two looks at the processes. Our choice."""

POLL_OTHERS = 3.0
"""Seconds between two looks at jobs that other commands execute, which read files. Our choice."""

WORKER = ("-m", "kd.launch.worker")
"""Program that executes one job, as arguments of the interpreter."""

GRACE = 60.0
"""Seconds that a process has to end after an interrupt, before it is killed. Our choice: a checkpoint takes a few."""


@dataclass(frozen=True)
class Event:
    """Change of a job's state.

    Attributes:
        job: the job.
        state: `started`, `elsewhere` (another command executes it), `done` or `failed`.
        seconds: time that it took here; None if it was executed elsewhere, or has not ended.
        failure: the reason, if it has failed.
        workers: number of jobs that are executed side by side, if it was started here.
    """

    job: Job
    state: str
    seconds: float | None = None
    failure: Failure | None = None
    workers: int | None = None


@dataclass
class Running:
    """A job's process, with the lock that keeps others away from the job."""

    job: Job
    program: Program
    claim: FileLock
    slot: int
    began: float


@dataclass
class FanOut:
    """Execution of jobs.

    Args:
        jobs: name -> job; a job's needs are among them.
        slots: environment variables of each of the places in which jobs are executed, see `places`.
        submitted: time, in seconds since the epoch, from which a failure that is there already counts: that of the submission
            to a queue, whose tasks are one command. By default none counts, so that each command tries every job.
    """

    jobs: Mapping[str, Job]
    slots: Sequence[Mapping[str, str]]
    submitted: float = math.inf
    running: list[Running] = field(default_factory=list)
    done: set[str] = field(default_factory=set)
    failed: dict[str, Failure] = field(default_factory=dict)
    elsewhere: set[str] = field(default_factory=set)
    earlier: dict[str, Failure] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Event]:
        """Execute the jobs; yield what changes.

        On an interrupt, also SIGTERM, the processes are interrupted: their runs resume from their last checkpoints.

        Raises:
            InputError: if the folder of the runs cannot be written to.
            KeyboardInterrupt: if it is interrupted, after the processes have ended.
        """
        for folder in {job.run.directory.parent for job in self.jobs.values()}:
            check_writable(folder)
        failures = {job.name: job.failure for job in self.jobs.values()}
        self.earlier = {name: failure for name, failure in failures.items() if failure and failure.at < self.submitted}
        looked = 0.0
        with interrupted_by_sigterm():
            try:
                while self.left:
                    yield from self._reap()
                    now = time.monotonic()
                    if self._free and (now - looked > POLL_OTHERS or not self.elsewhere):
                        looked = now
                        yield from self._start()
                    if self.left:
                        time.sleep(POLL)
            finally:
                self._stop()

    @property
    def left(self) -> list[Job]:
        """Jobs that are neither done nor failed."""
        return [job for job in self.jobs.values() if job.name not in self.done and job.name not in self.failed]

    @property
    def _free(self) -> list[int]:
        taken = {running.slot for running in self.running}
        return [slot for slot in range(len(self.slots)) if slot not in taken]

    def _reap(self) -> Iterator[Event]:
        """Yield the jobs whose processes have ended."""
        for running in list(self.running):
            status = running.program.status
            if status is None:
                continue
            self.running.remove(running)
            job, seconds = running.job, time.monotonic() - running.began
            done = status == 0 and job.run.is_done()
            failure = None if done or status == INTERRUPTED else self._new_failure(job)
            if failure is None and not done and status != INTERRUPTED:
                failure = Failure(reason(status, job))
                failure.record(job.file(".failed"))  # for other commands, before they may take the job
            running.claim.release()
            if status == INTERRUPTED:
                raise KeyboardInterrupt
            yield self._finish(job, seconds) if failure is None else self._fail(job, failure, seconds)

    def _new_failure(self, job: Job) -> Failure | None:
        """Return the failure of a job since this command began, or was submitted, of any command's process."""
        failure = job.failure
        return failure if failure != self.earlier.get(job.name) else None

    def _start(self) -> Iterator[Event]:
        """Start jobs in the free slots; yield these, and jobs that are found done, failed or executed elsewhere."""
        running = {entry.job.name for entry in self.running}
        for job in self.left:
            if not self._free:
                return
            if job.name in running:
                continue
            if broken := [name for name in job.needs if name in self.failed]:
                yield self._fail(job, Failure(f"it needs {broken[0]}, which failed: {self.failed[broken[0]].message}"))
                continue
            if any(name not in self.done for name in job.needs if name in self.jobs):
                continue
            if (claim := take(job)) is None:
                if job.name not in self.elsewhere:
                    self.elsewhere.add(job.name)
                    yield Event(job, "elsewhere")
                continue
            self.elsewhere.discard(job.name)
            if (change := self._ended(job)) is not None:  # by another command, since this one planned it
                claim.release()
                yield change
                continue
            self.running.append(self._launch(job, claim, self._free[0]))
            yield Event(job, "started", workers=len(self.slots))

    def _ended(self, job: Job) -> Event | None:
        """Return how a job ended in another command; None if it did not."""
        if job.run.is_done():
            return self._finish(job)
        failure = self._new_failure(job)
        return None if failure is None else self._fail(job, failure)

    def _launch(self, job: Job, claim: FileLock, slot: int) -> Running:
        failed = job.file(".failed")
        remove(failed)
        arguments, log = [*WORKER, job.name, str(failed), *job.command], job.file(".log")
        with writing(log):
            log.open("ab").close()
        threads = threads_of(job, self.slots[slot]["OMP_NUM_THREADS"])
        environment = {**os.environ, **self.slots[slot], "OMP_NUM_THREADS": threads}
        program = Program(arguments, environment, log)
        return Running(job, program, claim, slot, time.monotonic())

    def _finish(self, job: Job, seconds: float | None = None) -> Event:
        self.done.add(job.name)
        self.elsewhere.discard(job.name)
        for suffix in (".failed", ".threads"):
            remove(job.file(suffix))
        return Event(job, "done", seconds)

    def _fail(self, job: Job, failure: Failure, seconds: float | None = None) -> Event:
        self.failed[job.name] = failure
        self.elsewhere.discard(job.name)
        return Event(job, "failed", seconds, failure)

    def _stop(self) -> None:
        """Interrupt the processes that still run, and wait for their ends."""
        for running in self.running:
            running.program.interrupt()
        until = time.monotonic() + GRACE
        for running in self.running:
            running.program.end(until - time.monotonic())
            running.claim.release()
        self.running.clear()


def threads_of(job: Job, given: str) -> str:
    """Return the number of threads for a job: of a run that resumes here, that with which it began; else the given one.

    Sums that other numbers of threads make are rounded differently, so that a run that resumes with another number does not end
    with the weights of one that was not interrupted.

    Args:
        job: the job.
        given: number of threads of its place.
    """
    file, resumes = job.file(".threads"), job.run.spec.resume and (job.run.checkpoints / "last.ckpt").exists()
    with writing(file):
        if resumes and threads_asked_for() is None and file.is_file():
            before = file.read_text(encoding="utf-8").strip()
            if before.isascii() and before.isdigit() and 0 < int(before) <= cores():  # it may have begun on another machine
                return before
        write_text(file, f"{given}\n")
    return given


def take(job: Job) -> FileLock | None:
    """Lock a job for this command; return the lock, or None if another process executes its run."""
    claim = FileLock(job.file(".claim"))
    with writing(job.file(".claim")):
        job.file(".claim").parent.mkdir(parents=True, exist_ok=True)
        try:
            claim.acquire(timeout=0)
        except Timeout:
            return None
    if job.run.is_locked():  # by a kd-train, or by a process whose command was killed
        claim.release()
        return None
    return claim


def reason(status: int, job: Job) -> str:
    """Return the reason why a process ended that left no failure."""
    log = f"its output is in '{job.file('.log')}'"
    if status == -signal.SIGKILL:
        return f"its process was killed, perhaps for want of memory: fewer workers need less; {log}"
    if status < 0:
        return f"its process ended by signal {signal.Signals(-status).name}; {log}"
    return f"its process ended with status {status}; {log}" if status else f"its process left no complete run; {log}"


@contextlib.contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM, with which queues and service managers stop a process; only in the main thread."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        before: Callable[..., object] | int | None = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
