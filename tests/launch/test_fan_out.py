"""Jobs side by side: order, failures, locks, and what is left after an interrupt. The jobs' program is a stand-in."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from filelock import FileLock

from kd.errors import InputError
from kd.launch import fan_out, processes
from kd.launch import places as division
from kd.launch.fan_out import Event, FanOut, take
from kd.launch.jobs import Job, find_run, jobs_of, plan_command
from kd.launch.places import cores, places
from kd.launch.worker import work
from kd.system import hardware
from kd.system.files import is_locked, locked
from kd.training import execute

STAND_IN = Path(__file__).parent / "stand_in.py"
Small = Callable[..., list[str]]
TWO = ({"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "1"})


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fan_out, "WORKER", (str(STAND_IN),))
    monkeypatch.setattr(processes, "PRELOAD", ())
    monkeypatch.setattr(fan_out, "POLL_OTHERS", 0.2)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))


def jobs(commands: Sequence[Sequence[str]]) -> dict[str, Job]:
    return jobs_of({index: plan_command(command) for index, command in enumerate(commands)}, commands)


def commands(small: Small, runs: Path, *seeds: int, method: str = "kd") -> list[list[str]]:
    return [small(f"method={method}", f"seed={seed}", f"paths.runs={runs}") for seed in seeds]


def events(runs: Path) -> Counter[tuple[str, str]]:
    lines = (runs / "events.txt").read_text().splitlines()
    return Counter((word, name) for word, name, _ in (line.split() for line in lines))


def test_what_several_commands_need_is_one_job_before_theirs(small: Small, tmp_path: Path) -> None:
    found = jobs(commands(small, tmp_path, 0, 1, 2))
    (teacher, *students) = found.values()
    assert (teacher.wanted, teacher.needs) == (False, ())
    assert [job.wanted for job in students] == [True] * 3
    assert {job.needs for job in students} == {(teacher.name,)}
    ((role, needing),), run = find_run(students[0].run, teacher.name)
    assert (str(role), needing, run.digest) == ("teacher minilm", students[0].run, teacher.run.digest)
    assert find_run(students[0].run, students[0].name) == ([], students[0].run)
    with pytest.raises(InputError, match="start again"):
        find_run(students[0].run, "another")


def test_a_run_that_is_wanted_and_needed_is_one_job(small: Small, tmp_path: Path) -> None:
    (command,) = commands(small, tmp_path, 0)
    (teacher, _) = jobs([command]).values()
    defaults = ("student=2l", "trainer.max_epochs=2", "trainer.batch_size=16")
    words = small("method=finetune", "teacher=[]", "student=full", f"paths.runs={tmp_path}")
    alone = [word for word in words if word not in defaults]
    found = jobs([command, alone])
    assert len(found) == 2
    assert found[teacher.name].wanted


def test_jobs_are_executed_once_and_after_what_they_need(small: Small, tmp_path: Path) -> None:
    found = jobs(commands(small, tmp_path, 0, 1, 2))
    changes = list(FanOut(found, TWO))
    (teacher, *_) = found
    states = [(event.state, event.job.name) for event in changes]
    assert states.index(("done", teacher)) < min(states.index(("started", name)) for name in list(found)[1:])
    assert events(tmp_path) == Counter({(word, name): 1 for word in ("began", "done") for name in found})
    assert all(event.seconds for event in changes if event.state == "done")
    assert jobs(commands(small, tmp_path, 0, 1, 2)) == {}


def test_failures_leave_the_others_alone_and_are_told_with_their_reason(small: Small, tmp_path: Path) -> None:
    found = jobs(commands(small, tmp_path, 0, 13, 14, 15))
    run = FanOut(found, TWO)
    told = {event.job.run.spec.seed: event.failure.line for event in run if event.failure is not None}
    assert told.keys() == {13, 14, 15}
    assert told[13] == "the loss is not finite (change: optimizer.lr)"
    assert "killed" in told[14]
    assert "memory" in told[14]
    assert "status 3" in told[15]
    assert len(run.done) == 2
    assert all(job.file(".log").is_file() for job in found.values())


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ("resumes", "1"),
        ("has no checkpoint", "2"),
        ("starts again", "2"),
        ("has more threads than the machine", "2"),
        ("has a damaged file", "2"),
        ("the user sets threads", "2"),
    ],
)
def test_a_run_that_resumes_has_the_threads_that_it_began_with(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, again: str
) -> None:
    monkeypatch.setattr(fan_out, "cores", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS")
    command = small("method=finetune", "teacher=[]", "seed=15", f"paths.runs={tmp_path}")
    (job,) = jobs([command]).values()
    list(FanOut({job.name: job}, TWO[:1]))
    assert job.file(".threads").read_text() == "1\n"
    if change != "has no checkpoint":
        job.run.checkpoints.mkdir(parents=True)
        (job.run.checkpoints / "last.ckpt").touch()
    if change == "starts again":
        (job,) = jobs([[*command, "resume=false"]]).values()
    if change in (damages := {"has more threads than the machine": "3", "has a damaged file": "-1"}):
        job.file(".threads").write_text(damages[change])
    if change == "the user sets threads":
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
    list(FanOut({job.name: job}, [{"OMP_NUM_THREADS": "2"}]))
    assert [line.split()[2] for line in (tmp_path / "events.txt").read_text().splitlines()] == ["1", again]
    assert job.file(".threads").read_text() == f"{again}\n"


def test_a_run_that_is_done_leaves_no_number_of_threads(small: Small, tmp_path: Path) -> None:
    found = jobs(commands(small, tmp_path, 0))
    started = [event.workers for event in FanOut(found, TWO) if event.state == "started"]
    assert started == [2, 2]
    assert not list((tmp_path / ".launch").glob("*.threads"))


def test_a_failure_is_tried_again_by_the_next_command(small: Small, tmp_path: Path) -> None:
    list(FanOut(jobs(commands(small, tmp_path, 13)), TWO))
    (job,) = jobs(commands(small, tmp_path, 13)).values()
    assert job.failure.message == "the loss is not finite"
    list(FanOut({job.name: job}, TWO))
    assert events(tmp_path)["began", job.name] == 2


def test_what_needs_a_failed_run_fails_with_its_reason(small: Small, tmp_path: Path) -> None:
    found = jobs([[*command, "teacher.minilm.run.seed=13"] for command in commands(small, tmp_path, 13)])
    told = [event for event in FanOut(found, TWO) if event.state == "failed"]
    assert [event.job.wanted for event in told] == [False, True]
    assert str(told[1].failure) == f"it needs {told[0].job.name}, which failed: the loss is not finite"


def test_a_job_that_another_command_executes_is_left_to_it(small: Small, tmp_path: Path) -> None:
    found = jobs(commands(small, tmp_path, 0, method="finetune"))
    others: list[Event] = []
    thread = threading.Thread(target=lambda: others.extend(FanOut(found, TWO[:1])))
    thread.start()
    time.sleep(0.1)
    ours = list(FanOut(found, TWO[:1]))
    thread.join()
    assert events(tmp_path) == Counter({(word, name): 1 for word in ("began", "done") for name in found})
    done = [event for event in [*ours, *others] if event.state == "done"]
    assert len(done) == 2 * len(found)
    assert sum(event.seconds is not None for event in done) == len(found)


def test_a_job_whose_run_is_locked_is_not_taken(small: Small, tmp_path: Path) -> None:
    (job, *_) = jobs(commands(small, tmp_path, 0)).values()
    with locked(job.run.directory, "waiting"):
        assert is_locked(job.run.directory)
        assert take(job) is None
    assert not is_locked(job.run.directory)
    claim = take(job)
    assert isinstance(claim, FileLock)
    assert take(job) is None
    claim.release()
    take(job).release()


def test_looking_at_a_lock_leaves_no_file(tmp_path: Path) -> None:
    assert not is_locked(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_processes(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setenv("STAND_IN_SECONDS", "60")
    found = jobs(commands(small, tmp_path, 0))
    run = FanOut(found, TWO)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background of a script ignore it
    threading.Timer(1.0, lambda: os.kill(os.getpid(), number)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            list(run)
    finally:
        signal.signal(signal.SIGINT, before)
    assert run.running == []
    (teacher, _) = found.values()
    assert not teacher.run.is_done()
    assert not is_locked(teacher.run.directory)
    claim = take(teacher)
    assert claim is not None
    claim.release()


def test_a_worker_can_be_interrupted_although_its_command_ignores_it() -> None:
    code = "import signal, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); from kd.launch import worker\n"
    code += "worker.work = lambda *words: (print('ready', flush=True), time.sleep(60))\n"
    code += "sys.argv = ['worker', 'run', 'file']; worker.main()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130


def test_places_share_the_threads_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert [place["OMP_NUM_THREADS"] for place in places(None, uses_gpus=False)] == ["1"] * cores()
    assert [place["OMP_NUM_THREADS"] for place in places(1, uses_gpus=False)] == [str(cores())]
    with pytest.raises(InputError, match="workers=0"):
        places(0, uses_gpus=False)


def test_the_quota_of_a_container_is_shared_and_what_the_user_sets_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setattr(hardware, "_threads", None)
    for module in (hardware, division):
        monkeypatch.setattr(module, "cpu_quota", lambda: 4.0)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    hardware.configure_openmp()
    assert os.environ["OMP_NUM_THREADS"] == "4"
    assert [place["OMP_NUM_THREADS"] for place in places(None, uses_gpus=False)] == ["1"] * 4
    assert [place["OMP_NUM_THREADS"] for place in places(2, uses_gpus=False)] == ["2"] * 2
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert [place["OMP_NUM_THREADS"] for place in places(2, uses_gpus=False)] == ["3"] * 2


def test_each_place_has_a_gpu_of_those_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd.launch.places.gpus", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places(None, uses_gpus=True)] == ["5", "7"]
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places(3, uses_gpus=True)] == ["5", "7", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places(None, uses_gpus=True)] == ["0", "1"]
    assert "CUDA_VISIBLE_DEVICES" not in places(None, uses_gpus=False)[0]


def test_an_error_of_a_needed_run_names_the_key_of_the_command(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (command,) = commands(small, tmp_path, 0)
    (teacher, _) = jobs([command]).values()

    def diverges(*arguments: object, **more: object) -> None:
        raise InputError("the loss is not finite", "optimizer.lr")

    monkeypatch.setattr(execute, "check_all", lambda run: None)
    monkeypatch.setattr(execute, "execute", diverges)
    with pytest.raises(InputError) as caught:
        work(teacher.name, command)
    assert caught.value.key == "teacher.minilm.run.optimizer.lr"
