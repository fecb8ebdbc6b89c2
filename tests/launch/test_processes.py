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


def test_workers_of_data_loaders_are_forks_and_what_is_registered_for_the_end_is_called(start: Start, tmp_path: Path) -> None:
    code = """
import atexit, multiprocessing, os
atexit.register(lambda: print("at the end"))
child = multiprocessing.Process(target=lambda: print(os.getppid(), flush=True))
child.start()
child.join()
print(os.getpid())
"""
    assert status(start(code)) == 0
    (parent, own, last) = (tmp_path / "log").read_text().splitlines()
    assert parent == own
    assert last == "at the end"


def test_the_number_of_threads_may_be_one_for_each_level(start: Start, tmp_path: Path) -> None:
    assert status(start("import torch; print(torch.get_num_threads())", OMP_NUM_THREADS="2,1")) == 0
    assert (tmp_path / "log").read_text() == "2\n"


COMMAND = """
import os, sys, time
from multiprocessing import forkserver
from pathlib import Path
from kd.launch import processes
def main():
    processes.PRELOAD = tuple(os.environ["PRELOAD"].split())
    folder = Path(sys.argv[1])
    program = processes.Program([str(folder / "program.py")], os.environ, folder / "log")
    while os.environ.get("WAIT") and not ((folder / "log").exists() and (folder / "log").read_text()):
        time.sleep(0.05)
    (folder / "groups").write_text(f"{os.getpgid(0)} {os.getpgid(forkserver._forkserver._forkserver_pid)}")
    if os.environ.get("WAIT"):
        os.kill(forkserver._forkserver._forkserver_pid, 9)
        time.sleep(0.5)
        living = program.status
        program.interrupt()
    else:
        living = None
    program.end(60)
    (folder / "ended").write_text(f"{living} {program.status}")
if __name__ == "__main__":  # processes import this file
    main()
"""


@pytest.mark.parametrize("redirection", ["", ">&-", "2>&-", ">&- 2>&-", "<&- >&-", "<&- >&- 2>&-"])
def test_streams_may_be_closed_the_temporary_folder_long_and_the_working_folder_full_of_others_modules(
    tmp_path: Path, redirection: str
) -> None:
    (tmp_path / "program.py").write_text("import sys; print('out', flush=True); print('err', file=sys.stderr)")
    (tmp_path / "command.py").write_text(COMMAND)
    far = tmp_path / ("x" * 100)
    far.mkdir()
    (far / "filelock.py").write_text("raise RuntimeError")
    environment = {**os.environ, "PRELOAD": "filelock", "TMPDIR": str(far), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = f"exec {sys.executable} {tmp_path / 'command.py'} {tmp_path} {redirection}"
    subprocess.run(["sh", "-c", command], env=environment, cwd=far, check=True, timeout=60)
    assert (tmp_path / "ended").read_text() == "None 0"
    assert (tmp_path / "log").read_text() == "out\nerr\n"


def test_a_process_that_has_lost_its_server_is_interrupted_and_waited_for(tmp_path: Path) -> None:
    code = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
print("ready", flush=True)
try:
    time.sleep(100)
except KeyboardInterrupt:
    time.sleep(1)
    print("saved", flush=True)
"""
    (tmp_path / "program.py").write_text(code)
    (tmp_path / "command.py").write_text(COMMAND)
    environment = {**os.environ, "PRELOAD": "", "WAIT": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, str(tmp_path / "command.py"), str(tmp_path)], env=environment, check=True, timeout=90)
    assert (tmp_path / "log").read_text() == "ready\nsaved\n"
    assert (tmp_path / "ended").read_text().startswith("None ")
    own, server = (tmp_path / "groups").read_text().split()
    assert own != server  # signals to the group of the command do not reach the server
