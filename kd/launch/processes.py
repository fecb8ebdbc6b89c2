"""Processes that execute programs, forked from one that has imported the libraries already.

The imports of a run take longer than its own preparation does. The processes of one command are therefore forks of a server
(`multiprocessing`'s), which has imported what a run needs, has no threads and holds no data.
"""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from kd.system.hardware import configure_openmp

PRELOAD = ("kd.launch.libraries",)
"""Modules that the server imports, after `kd.launch.session`."""

LONGEST_FOLDER = 70
"""Characters of a temporary folder in which the path of a socket, of at most 107, has room."""

LOST = 255
"""Exit status that `multiprocessing` reports of a process if the server has ended, whether the process has ended or not."""


def start_server() -> None:
    """Start the server, if it does not run yet, without waiting until it has imported the libraries."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["kd.launch.session", *PRELOAD])
    open_standard_streams()
    # The server searches for modules where this process does; by itself it would search the working folder first.
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}  # processes set their own number of threads
    with environment_of({**os.environ, **own}), short_temporary_folder():
        configure_openmp()
        forkserver.ensure_running()


def open_standard_streams() -> None:
    """Open the standard streams that are closed, as by `>&-`, so that no socket or pipe gets their numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


@contextlib.contextmanager
def short_temporary_folder() -> Iterator[None]:
    """Let `multiprocessing` make its folder of sockets in /tmp if the path of the temporary folder is too long for a socket."""
    before = tempfile.tempdir
    try:
        if len(tempfile.gettempdir()) > LONGEST_FOLDER:
            tempfile.tempdir = "/tmp"
        yield
    finally:
        tempfile.tempdir = before


def fork(
    function: Callable[..., None], arguments: Sequence[object], environment: Mapping[str, str], log: Path
) -> ForkServerProcess:
    """Start a function in a fork of the server, in a session of its own, and return the process.

    Args:
        function: a function of a module, which is imported in the process if the server has not done so.
        arguments: its arguments, which have to be picklable.
        environment: environment variables of the process. The number of OpenMP threads is set too.
        log: file that its output is appended to.
    """
    start_server()
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=execute, args=(function, tuple(arguments), dict(environment), str(log)))
    process.start()
    return process


class Program:
    """A program of Python that runs in a process of its own, in a session of its own: Ctrl-C reaches its parent alone.

    Args:
        arguments: those of the interpreter, `-m`, a module and its arguments, or a file and its arguments.
        environment: its environment variables. The number of OpenMP threads is set in the process too.
        log: file that its output is appended to.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.process = fork(run_program, [list(arguments)], environment, log)

    @property
    def status(self) -> int | None:
        """Exit status, that of a signal negative; None while it runs."""
        status = self.process.exitcode
        return None if status == LOST and self._exists() else status

    def _exists(self) -> bool:
        try:
            state = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        return state not in "ZX"  # it has ended, and nobody has asked for its status

    def _signal(self, number: signal.Signals) -> None:
        if self.process.pid is not None and self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

    def interrupt(self) -> None:
        """Interrupt it, as Ctrl-C does."""
        self._signal(signal.SIGINT)

    def end(self, seconds: float) -> None:
        """Wait until it has ended, and kill it after so many seconds."""
        until = time.monotonic() + seconds
        self.process.join(max(0.0, seconds))
        while self.status is None and time.monotonic() < until:  # the server has ended: nothing wakes this process
            time.sleep(0.05)
        self._signal(signal.SIGKILL)
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


def execute(function: Callable[..., None], arguments: Sequence[object], environment: Mapping[str, str], log: str) -> None:
    """Call a function in a forked process; arguments as for `fork`."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for number, name in ((1, "stdout"), (2, "stderr")):
        if (stream := getattr(sys, name)) is None:
            setattr(sys, name, open(number, "w", buffering=1, closefd=False))  # noqa: SIM115
        else:
            stream.flush()
        os.dup2(descriptor, number)
    if descriptor > 2:
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    # Workers of data loaders are to be forks of this process, as those of an interpreter are, not of the server.
    multiprocessing.set_start_method(None, force=True)
    if "torch" in sys.modules and "OMP_NUM_THREADS" in environment:
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"].split(",")[0]))
    try:
        function(*arguments)
    finally:
        atexit._run_exitfuncs()  # a fork ends without them


def run_program(arguments: Sequence[str]) -> None:
    """Run a program of Python in this process; arguments as for `Program`."""
    if arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        runpy.run_path(arguments[0], run_name="__main__")
