"""Programs in forked processes: their environment, output, status and signals."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kd.launch.processes import Program

Start = Callable[..., Program]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Start a program with this code, whose output is `log`."""

    def started(code: str, *arguments: str, **environment: str) -> Program:
        (tmp_path / "program.py").write_text(code)
        return Program([str(tmp_path / "program.py"), *arguments], {**os.environ, **environment}, tmp_path / "log")

    return started


def status(program: Program) -> int | None:
    """Wait for a program, and return its exit status."""
    program.end(60)
    return program.status


def test_a_program_has_its_arguments_environment_and_threads_and_its_output_is_appended(start: Start, tmp_path: Path) -> None:
    code = """
import json, os, subprocess, sys, torch
print(json.dumps([__name__, sys.argv[1:], os.environ["MINE"], torch.get_num_threads(), os.getsid(0) == os.getpid()]))
subprocess.run([sys.executable, "-c", "import os; print(os.environ['MINE'])"])
"""
    for mine, threads in (("a", "1"), ("b", "2")):
        assert status(start(code, "x y", "z", MINE=mine, OMP_NUM_THREADS=threads)) == 0
    lines = (tmp_path / "log").read_text().splitlines()
    for line, child, mine, threads in ((lines[0], lines[1], "a", 1), (lines[2], lines[3], "b", 2)):
        assert json.loads(line) == ["__main__", ["x y", "z"], mine, threads, True]
        assert child == mine
    assert "MINE" not in os.environ


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import sys; sys.exit(130)", 130),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("raise ValueError('wrong')", 1),
    ],
)
def test_the_status_is_that_of_an_interpreter(start: Start, tmp_path: Path, code: str, expected: int) -> None:
    assert status(start(code)) == expected
    if expected == 1:
        assert "ValueError: wrong" in (tmp_path / "log").read_text()


def test_a_program_is_interrupted_and_killed_if_that_does_not_end_it(start: Start, tmp_path: Path) -> None:
    code = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler if sys.argv[1] == "ends" else signal.SIG_IGN)
print("ready", flush=True)
try:
    time.sleep(100)
except KeyboardInterrupt:
    sys.exit(130)
"""
    for kind, expected in (("ends", 130), ("goes on", -signal.SIGKILL)):
        (tmp_path / "log").unlink(missing_ok=True)
        program = start(code, kind)
        while not (tmp_path / "log").exists() or "ready" not in (tmp_path / "log").read_text():
            time.sleep(0.05)
            assert program.status is None
        program.interrupt()
        program.end(60 if kind == "ends" else 0.5)
        assert program.status == expected
        program.interrupt()  # of one that has ended: nothing


def test_libraries_are_imported_and_the_worker_and_threads_of_python_are_not() -> None:
    """A module that is imported before it is run would be there twice; a thread would not be in a fork, and its locks would."""
    code = """
import sys, threading
import kd.launch.libraries, torch
print(sorted({"lightning", "transformers", "kd.training.fit", "kd.launch.worker"} & set(sys.modules)))
print(threading.active_count(), torch.cuda.is_initialized())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["['kd.training.fit', 'lightning', 'transformers']", "1 False"]
