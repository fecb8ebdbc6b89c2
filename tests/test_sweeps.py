"""Sweeps: each point that fails is told at once and again at the end, and leaves the others alone."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from kd import train
from kd.config import compose as config
from kd.config.compose import compose, conf_folder
from kd.errors import InputError
from kd.runs.plan import plan
from kd.runs.run import Run
from kd.system.files import writes_to
from kd.training import execute

Small = Callable[..., list[str]]


class Sweep:
    """A sweep in this process, whose runs are not trained.

    Attributes:
        made: names of the points' seeds, in the order in which they were made.
    """

    def __init__(self, small: Small, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.small, self.patch, self.capsys = small, monkeypatch, capsys
        self.trouble: dict[int, BaseException] = {}
        self.made: list[int] = []

        def deliver(run: Run) -> None:
            print(f"making {run.name}")
            if run.spec.seed in self.trouble:
                raise self.trouble[run.spec.seed]
            self.made.append(run.spec.seed)

        for module in (train, execute):  # points that are done are reported while the others are planned
            monkeypatch.setattr(module, "deliver", deliver)

    def __call__(self, *overrides: str) -> tuple[int, str, str]:
        """Exit status, what was printed, what was said of errors."""
        self.patch.setattr(sys, "argv", ["kd-train", "--multirun", *self.small("method=finetune", "teacher=[]", *overrides)])
        status = 0
        try:
            train.main()
        except SystemExit as end:
            status = int(end.code or 0)
        return status, *self.capsys.readouterr()


@pytest.fixture
def sweep(small: Small, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Sweep:
    return Sweep(small, monkeypatch, capsys)


@pytest.mark.parametrize("option", ["--multirun", "-m"])
@pytest.mark.parametrize("place", ["first", "in the middle", "last"])
def test_a_sweep_is_asked_for_anywhere_among_the_overrides(sweep: Sweep, option: str, place: str) -> None:
    words = sweep.small("method=finetune", "teacher=[]", "seed=0,1")
    at = {"first": 0, "in the middle": 4, "last": len(words)}[place]
    sweep.patch.setattr(sys, "argv", ["kd-train", *words[:at], option, *words[at:]])
    train.main()
    assert sweep.made == [0, 1]


def test_options_with_values_keep_them_wherever_they_stand(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "mine.yaml").write_text("defaults: [rte]\nname: mine\n")
    words = ["seed=3", "--config-dir", str(tmp_path), "task=mine", "--cfg", "job", "method=kd"]
    monkeypatch.setattr(sys, "argv", ["kd-train", *words])
    train.main()
    shown = capsys.readouterr().out
    assert "name: mine" in shown
    assert "seed: 3" in shown
    assert "kd.methods.kd.KD" in shown


def test_points_that_cannot_be_planned_are_told_before_the_first_is_made(sweep: Sweep) -> None:
    """One fails in its composition, which ends Hydra's own sweep; another's file is missing."""
    train = next(word.partition("=")[2] for word in sweep.small() if word.startswith("task.train="))
    status, out, err = sweep("student=2l,nosuch", f"task.train=nowhere.csv,{train}")
    assert status == 2
    told, _, end = err.partition("kd-train: 1 done, 3 failed:")
    assert "point 1 of 4: student=2l task.train=nowhere.csv\n  failed: " in told
    assert "change: task.train" in told
    assert "point 3 of 4: student=nosuch" in told
    assert "point 4 of 4: student=nosuch" in told
    assert "point 2 of 4" not in told
    assert [line.split(":")[0].strip() for line in end.splitlines() if "failed" in line] == ["1 of 4", "3 of 4", "4 of 4"]
    assert "4 points: 0 done already, 3 failed, 1 to run\nmaking " in out
    assert "Traceback" not in err
    assert "Error executing job" not in err


def test_points_that_fail_while_they_are_made_leave_the_others_alone(sweep: Sweep) -> None:
    sweep.trouble = {1: InputError("the loss is not finite", "optimizer.lr"), 3: OSError(28, "No space left on device")}
    status, _, err = sweep("seed=1,2,3,4")
    assert (status, sweep.made) == (2, [2, 4])
    assert "kd-train: point 1 of 4: seed=1\n  failed: the loss is not finite\n  change: optimizer.lr" in err
    assert "kd-train: point 3 of 4: seed=3\n  failed: the disk is full" in err
    assert "kd-train: 2 done, 2 failed:\n  1 of 4: seed=1  failed: the loss is not finite (change: optimizer.lr)" in err
    assert "Traceback" not in err


def test_a_fault_of_the_program_shows_its_traceback_and_ends_the_sweep_with_1(sweep: Sweep) -> None:
    sweep.trouble = {1: ZeroDivisionError("by zero"), 3: InputError("no")}
    status, _, err = sweep("seed=1,2,3")
    assert (status, sweep.made) == (1, [2])
    assert err.count("Traceback") == 1
    assert "kd-train: point 1 of 3: seed=1\n  failed: ZeroDivisionError: by zero" in err
    assert err.rstrip().endswith("3 of 3: seed=3  failed: no")


def test_a_sweep_without_failures_ends_with_their_number_and_0(sweep: Sweep) -> None:
    status, out, err = sweep("seed=1,2")
    assert (status, err) == (0, "")
    assert out.rstrip().endswith("2 done, 0 failed")


def test_an_interrupted_sweep_tells_how_far_it_came(sweep: Sweep) -> None:
    sweep.trouble = {1: InputError("no"), 3: KeyboardInterrupt()}
    status, out, err = sweep("seed=1,2,3,4")
    assert (status, sweep.made) == (130, [2])
    assert "interrupted: 1 done, 1 failed, 2 not started" in out
    assert "resume from the last checkpoint" in err


def test_a_value_that_hydra_knows_inside_a_job_alone_is_planned_there(sweep: Sweep) -> None:
    status, _, err = sweep("seed=${hydra:job.num}", "optimizer.lr=1e-3,2e-3")
    assert (status, sweep.made) == (0, [0, 1]), err


def test_points_that_are_done_read_no_configuration_files_again(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "is_done", lambda run: True)
    composed = []
    original = hydra.compose
    monkeypatch.setattr(hydra, "compose", lambda *words: composed.append(words) or original(*words))
    status, _, err = sweep("seed=1,2,3,4,5", "teacher=[minilm]", "method=kd", "method.temperature=1,2")
    assert (status, len(sweep.made)) == (0, 10), err
    assert len(composed) <= 2  # of the points, and of their teacher, where no test before has read them


FOLDERS = {"a file": "{}/file", "a file on the way": "{}/file/runs", "not there to be made": "/proc/nowhere"}


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("words", [[], ["--multirun", "seed=1,2"]], ids=["run", "sweep"])
def test_a_folder_of_runs_that_cannot_be_written_to_is_told_once(
    kind: str, words: list[str], small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    (tmp_path / "file").touch()
    runs = FOLDERS[kind].format(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kd-train", *words, *small("method=finetune", "teacher=[]", f"paths.runs={runs}")])
    with pytest.raises(SystemExit) as stopped:
        train.main()
    err = capsys.readouterr().err
    assert stopped.value.code == 2, err
    assert err.count(f"cannot make '{runs}") == 1, err
    assert "change: paths.runs" in err
    assert "Traceback" not in err


def test_a_read_only_file_system_is_told_like_any_folder(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = plan(compose(small("method=finetune", "teacher=[]", f"paths.runs={tmp_path}")))
    original = os.open

    def refuse(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR) and str(path).startswith(str(tmp_path)):
            raise OSError(30, "Read-only file system", str(path))
        return original(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(InputError, match=r"cannot write to .*Read-only file system") as told:
        execute.execute(run)
    assert told.value.key == "paths.runs"


def test_only_what_lies_in_the_folder_of_runs_is_put_down_to_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Read-only"), writes_to(str(tmp_path)):
        raise OSError(30, "Read-only file system", str(tmp_path / "run" / "metrics.csv"))
    with pytest.raises(OSError, match="Read-only"), writes_to(str(tmp_path)):
        raise OSError(30, "Read-only file system", "/elsewhere/cache")
    with pytest.raises(OSError, match="No space"), writes_to(str(tmp_path)):  # which has words of its own
        raise OSError(28, "No space left on device", str(tmp_path / "run"))


OVERRIDES = {
    "nothing": [],
    "values": ["method=kd", "method.temperature=2", "seed=3", "optimizer.lr=1e-4"],
    "the last of two values": ["seed=3", "seed=4", "trainer.max_epochs=1", "trainer.max_epochs=9"],
    "a part after its value": ["trainer.max_epochs=9", "trainer=ddp"],
    "added, forced and deleted keys": ["+teacher.minilm.run.trainer.clip=2", "++seed=2", "~method.normalize"],
    "a part as a mapping, and a value before it": ["method.layers=last", "method={layers: skip}"],
    "lists and mappings": ["teacher=[minilm,minilm_4l]", "pool=stochastic", "student.init=[1,4,6]", "cache=1GB"],
    "a mapping in a value": ["method.weights.hidden={_target_: kd.schedules.Linear, start: 1, end: 0}"],
    "an experiment": ["experiment=demo", "seed=5"],
    "interpolation": ["optimizer.lr=${oc.decode:'1e-3'}", "student.name=of_${task.name}"],
    "Hydra's own": ["hydra.job.name=x", "seed=1"],
}


@pytest.mark.parametrize("kind", OVERRIDES)
def test_composing_in_two_steps_gives_what_hydra_gives(kind: str) -> None:
    ours = compose(OVERRIDES[kind])
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        whole = hydra_compose("train", OVERRIDES[kind])
    assert OmegaConf.to_container(ours, resolve=False) == OmegaConf.to_container(whole, resolve=False)
    assert list(ours.method) == list(whole.method)
    assert OmegaConf.is_struct(ours)


def test_a_configuration_that_is_changed_leaves_the_next_one_as_it_was() -> None:
    first = compose(["seed=1"])
    first.method.temperature, first.seed = 99, 7
    assert compose(["seed=1"]).method.temperature != 99
    spec = config.typed(compose(["seed=1"]))
    spec.task.metrics[0], spec.method["temperature"] = "changed", 99
    again = config.typed(compose(["seed=1"]))
    assert again.task.metrics[0] != "changed"
    assert again.method["temperature"] != 99
