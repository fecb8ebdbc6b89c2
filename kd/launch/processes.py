"""Processes that execute programs, forked from one that has imported the libraries already.

The imports of a run take longer than its own preparation does. The processes of one command are therefore forks of a server
(`multiprocessing`'s), which has imported what a run needs, has no threads and holds no data.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from kd.system.hardware import configure_openmp

PRELOAD = ("kd.launch.libraries",)
"""Modules that the server imports."""


def start_server() -> None:
    """Start the server, if it does not run yet, without waiting until it has imported the libraries."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(PRELOAD))
    with environment_of({**os.environ, "OMP_NUM_THREADS": "1"}):  # processes set their own number
        configure_openmp()
        forkserver.ensure_running()


class Program:
    """A program of Python that runs in a process of its own, in a session of its own: Ctrl-C reaches its parent alone.

    Args:
        arguments: those of the interpreter, `-m`, a module and its arguments, or a file and its arguments.
        environment: its environment variables. The number of OpenMP threads is set in the process too.
        log: file that its output is appended to.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        start_server()
        target = (list(arguments), dict(environment), str(log))
        context = multiprocessing.get_context("forkserver")
        self.process: ForkServerProcess = context.Process(target=execute, args=target)
        self.process.start()

    @property
    def status(self) -> int | None:
        """Exit status, that of a signal negative; None while it runs."""
        return self.process.exitcode

    def interrupt(self) -> None:
        """Interrupt it, as Ctrl-C does."""
        if self.process.pid is not None and self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGINT)

    def end(self, seconds: float) -> None:
        """Wait until it has ended, and kill it after so many seconds."""
        self.process.join(max(0.0, seconds))
        if self.status is None:
            self.process.kill()
            self.process.join()


@contextlib.contextmanager
def environment_of(environment: Mapping[str, str]) -> Iterator[None]:
    """Set the environment variables of this process, and restore them on exit."""
    before = dict(os.environ)
    try:
        os.environ.clear()
        os.environ.update(environment)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def execute(arguments: Sequence[str], environment: Mapping[str, str], log: str) -> None:
    """Execute a program in a forked process; arguments as for `Program`."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(descriptor, stream.fileno())
    os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    if "torch" in sys.modules and "OMP_NUM_THREADS" in environment:
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        runpy.run_path(arguments[0], run_name="__main__")
