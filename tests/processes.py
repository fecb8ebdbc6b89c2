"""Commands in processes of their own that need no import of PyTorch: they are forked from a process that has imported it.

A new interpreter spends several seconds on the imports of PyTorch, Lightning and Transformers, more than a run of the toy task
takes. The fork server of `multiprocessing` imports them once, and what `kd` needs for a run. Signals, exit status, output and
environment of such a process are those of a new interpreter. What is not: sets have the same order in all of them, and
variables of the environment that libraries read while they are imported have no effect; modules of `kd` read none then. Tests
of either start interpreters with `subprocess`.
"""

import atexit
import ctypes
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path

PACKAGES = """
    kd.launch.libraries torch torch.distributed.run torch.distributed.elastic.agent.server.local_elastic_agent
    torch.distributed.elastic.rendezvous.static_tcp_rendezvous torch.distributed.elastic.rendezvous.c10d_rendezvous_backend
    torch.nn.parallel lightning.pytorch torchmetrics.classification torchmetrics.regression torchmetrics.text tokenizers
    safetensors.torch transformers transformers.models.bert.modeling_bert hydra hydra._internal.hydra omegaconf
    huggingface_hub filelock rich.table rich.console numpy tqdm
""".split()
"""Modules that the server imports. The first is what `kd` imports for its own server, and leaves them out of collections."""


def fork_server() -> ForkServerContext:
    """Return the context of the server, which the first process of a session starts."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PACKAGES)
    return context


def start_fork_server() -> None:
    """Start the server now, without waiting for its imports.

    `multiprocessing` has one server. If it does not run yet, `kd.launch` starts it with modules of its own, and tests of
    `kd.launch` with none: the processes of all later tests would then import the libraries again.
    """
    fork_server()
    forkserver.ensure_running()


def free_port() -> int:
    """Return a port that nobody listens to on this machine."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Command:
    """A running `python <arguments>`, with the methods of `subprocess.Popen` that the tests use.

    Args:
        arguments: what follows the interpreter's name: `-m module`, `-c code` or a file, and its own arguments.
        environment: all its environment variables.
        network: name of the network namespace that it runs in; this process's own if empty.
        output: file that gets its standard output and standard error; a temporary one if empty.
    """

    def __init__(
        self, arguments: Sequence[str], environment: Mapping[str, str] | None = None, network: str = "", output: str = ""
    ) -> None:
        self._file = None if output else tempfile.NamedTemporaryFile("r", prefix="kd-output-")  # noqa: SIM115
        self._output = output or self._file.name
        context = fork_server()
        began, theirs = context.Pipe(duplex=False)
        given = (list(arguments), dict(environment or os.environ), network, self._output, theirs)
        self._process = context.Process(target=run_command, args=given)
        self._process.start()
        theirs.close()
        began.recv()  # it leads a session of its own from here on
        self.pid = self._process.pid

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    @property
    def returncode(self) -> int | None:
        """The exit status, or minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: if it has not ended after so many seconds.
        """
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("python", timeout or 0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        if self.returncode is None:
            self._process.kill()

    def so_far(self) -> str:
        """Return what has been printed until now, also by the processes that it has started."""
        return Path(self._output).read_text()

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait for its end and return what was printed, also by the processes that it has started."""
        self.wait(timeout)
        return self.so_far(), None

    def line_with(self, words: str, within: float = 60) -> str:
        """Return the first line with these words as soon as it is printed, or all that was printed in so many seconds."""
        until = time.monotonic() + within
        while time.monotonic() < until:
            if found := [line for line in self.so_far().splitlines() if words in line]:
                return found[0]
            time.sleep(0.05)
        return self.so_far()


def run_command(arguments: list[str], environment: dict[str, str], network: str, output: str, began: Connection) -> None:
    """Do in this process what `python <arguments>` does."""
    os.setsid()
    began.send(True)
    began.close()
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    os.close(file)
    if network:
        enter(network)
    workers_from_the_server(network, output)
    try:
        run_main(arguments)
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


def run_main(arguments: list[str]) -> None:
    kind, *rest = arguments
    sys.argv = arguments
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(kind, run_name="__main__")


def enter(network: str) -> None:
    """Move this process, which has one thread, into a network namespace, as `ip netns exec` does."""
    with open(f"/run/netns/{network}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0):
            raise OSError(ctypes.get_errno(), "setns", network)


def workers_from_the_server(network: str, output: str) -> None:
    """Let torchrun, if this process is one, take its ranks from the server as well; it starts them with `subprocess` else."""
    # A process of the server knows its address, but not that it runs: it would start one of its own.
    forkserver._forkserver.ensure_running = lambda: None
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

    def start(handler: SubprocessHandler, command: tuple[str, ...], environment: dict[str, str]) -> Command:
        python, unbuffered, *arguments = command
        assert (python, unbuffered) == (sys.executable, "-u")
        return Command(arguments, environment, network, output)

    SubprocessHandler._popen = start
