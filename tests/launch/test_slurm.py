"""Arrays of a queue: their script, their time limits, and what the tasks of one submission know of each other."""

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from kd.errors import InputError
from kd.launch import fan_out, processes
from kd.launch.jobs import Job, jobs_of, plan_command
from kd.launch.slurm import EARLIER, WARNING, seconds_of, submission, write_script
from kd.launch.task import execute_task

STAND_IN = Path(__file__).parent / "stand_in.py"
Small = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fan_out, "WORKER", (str(STAND_IN),))
    monkeypatch.setattr(processes, "PRELOAD", ())
    monkeypatch.setenv("STAND_IN_SECONDS", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))


def written(jobs: dict[str, Job], *more: str, limit: str = "01:00:00") -> tuple[Path, Path]:
    """Write a script; return it, and the file of its jobs."""
    script, _ = write_script("toy", jobs, sys.executable, limit, more)
    return script, script.with_suffix(".jobs")


def jobs_for(small: Small, runs: Path, *temperatures: int, seed: int = 0) -> dict[str, Job]:
    """Jobs of students at these temperatures and of their teacher, all of one seed, which says whether the stand-in fails."""
    words = ["method=kd", f"seed={seed}", f"teacher.minilm.run.seed={seed}", f"paths.runs={runs}"]
    commands = [small(*words, f"method.temperature={temperature}") for temperature in temperatures]
    return jobs_of({index: plan_command(command) for index, command in enumerate(commands)}, commands)


def began(runs: Path) -> Counter[str]:
    lines = (runs / "events.txt").read_text().splitlines() if (runs / "events.txt").exists() else []
    return Counter(line.split()[1] for line in lines if line.startswith("began "))


def test_a_needed_run_that_fails_is_tried_once_in_a_submission_and_again_in_the_next(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = jobs_for(small, tmp_path, 1, 2, 3, seed=13)
    (teacher, *students) = jobs
    _, listed = written(jobs)
    for attempt in (1, 2):
        submitted = time.time()
        assert [execute_task(listed, number, submitted) for number in range(4)] == [1, 1, 1, 1]
        assert began(tmp_path) == {teacher: attempt}
        out = capsys.readouterr().out
        for student in students:
            assert f"{student}: failed: it needs {teacher}, which failed: the loss is not finite" in out
    again = execute_task(listed, 1, submitted)  # queued again, as after a preemption
    assert (again, began(tmp_path)) == (1, {teacher: 2})


def test_a_needed_run_that_failed_before_the_submission_is_tried_again(small: Small, tmp_path: Path) -> None:
    jobs = jobs_for(small, tmp_path, 1, 2)
    (teacher, *_) = jobs.values()
    teacher.file(".failed").parent.mkdir(parents=True)
    teacher.file(".failed").write_text(json.dumps({"message": "full", "key": None, "users": True, "at": time.time() - 1}))
    _, listed = written(jobs)
    submitted = time.time()
    assert [execute_task(listed, number, submitted) for number in (1, 2)] == [0, 0]  # nobody has made the teacher before
    assert began(tmp_path) == dict.fromkeys(jobs, 1)


def test_both_arrays_of_a_submission_get_its_time(small: Small, tmp_path: Path) -> None:
    """The printed commands and the script itself, with stand-ins for `sbatch` and for the interpreter."""
    jobs = jobs_for(small, tmp_path, 1, 2)
    programs = {"sbatch": f"echo $@ >> {tmp_path}/submitted; echo 7", "python": f"echo $5 >> {tmp_path}/started"}
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    script, needed = write_script("toy", jobs, str(tmp_path / "python"), "60")
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "0"}
    for commands, count in ((submission(script, needed, len(jobs)), 2), (submission(script, 0, len(jobs)), 1)):
        (tmp_path / "submitted").unlink(missing_ok=True)
        subprocess.run(["bash", "-c", commands], env=environment, check=True)
        lines = (tmp_path / "submitted").read_text().splitlines()
        times = {line.rpartition(f"{script} ")[2] for line in lines}
        assert (len(lines), len(times)) == (count, 1)
        (at,) = times
        assert abs(float(at) - time.time()) < 60
        subprocess.run(["bash", script, at], env=environment, check=True)
        assert (tmp_path / "started").read_text().splitlines()[-1] == at
    subprocess.run(["bash", script], env=environment, check=True)  # submitted by hand, without a time
    assert abs(float((tmp_path / "started").read_text().splitlines()[-1]) - time.time()) < 60


def test_a_task_that_is_queued_again_adds_to_its_output(small: Small, tmp_path: Path) -> None:
    script, _ = written(jobs_for(small, tmp_path, 1), "--open-mode=truncate")
    options = re.findall(r"^#SBATCH (.*)$", script.read_text(), re.MULTILINE)
    assert "--open-mode=append" in options
    assert options.index("--open-mode=append") < options.index("--open-mode=truncate")  # the last counts, which is the user's
    assert f"--signal=B:USR1@{WARNING}" in options


@pytest.mark.parametrize("limit", ["1", "3", "2:00", "00:03:00", "0-00:03", "00:00:01", "0:1:59"])
def test_a_time_limit_that_leaves_no_time_to_work_is_refused(small: Small, tmp_path: Path, limit: str) -> None:
    assert seconds_of(limit) <= WARNING + EARLIER
    with pytest.raises(InputError, match=f"launcher.time={limit} is too short") as caught:
        written(jobs_for(small, tmp_path, 1), limit=limit)
    assert caught.value.key == "launcher.time"
    assert not (tmp_path / ".launch").exists()


@pytest.mark.parametrize("limit", ["4", "3:01", "0", "00:00:00", "04:00:00", "0-01", "1-12:00:00"])
def test_other_time_limits_are_passed_on(small: Small, tmp_path: Path, limit: str) -> None:
    script, _ = written(jobs_for(small, tmp_path, 1), limit=limit)
    assert f"#SBATCH --time={limit}\n" in script.read_text()
