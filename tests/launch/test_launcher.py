"""Points of a sweep in processes of their own, and what no launcher can run."""

import inspect
import os
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kd import sweeps, train
from kd.config.compose import compose, conf_folder, typed
from kd.config.schema import LAUNCHERS, LauncherSpec
from kd.errors import InputError
from kd.launch import fan_out, processes
from kd.launch.launcher import launch

STAND_IN = Path(__file__).parent / "stand_in.py"
Small = Callable[..., list[str]]
Sweep = Callable[..., tuple[int, str, str]]


@pytest.fixture
def sweep(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Sweep:
    """A sweep over kd's seeds in a folder of its own, whose runs are made by a stand-in."""
    monkeypatch.setattr(fan_out, "WORKER", (str(STAND_IN),))
    monkeypatch.setattr(processes, "PRELOAD", ())
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))

    def run(*words: str) -> tuple[int, str, str]:
        command = ["kd-train", "--multirun", *small("method=kd", f"paths.runs={tmp_path}", *words)]
        monkeypatch.setattr(sys, "argv", [word for word in command if word != "paths.runs"])
        status = 0
        try:
            train.main()
        except SystemExit as end:
            status = int(end.code or 0)
        return status, *capsys.readouterr()

    return run


def made(runs: Path) -> list[str]:
    lines = (runs / "events.txt").read_text().splitlines()
    return sorted(line.split()[1].rpartition("-")[0] for line in lines if line.startswith("done "))


def test_points_are_made_side_by_side_and_their_teacher_once(sweep: Sweep, tmp_path: Path) -> None:
    status, out, _ = sweep("launcher=local", "seed=0,1")
    assert status == 0
    assert made(tmp_path) == ["finetune-full-file-s0", "kd-2l-file-s0", "kd-2l-file-s1"]
    assert "2 done, 0 failed" in out
    assert "[2/2] point " in out
    status, out, _ = sweep("launcher=local", "seed=0,1,2")
    assert "3 points: 2 done already, 1 to run" in out
    assert len(made(tmp_path)) == 4


def test_a_point_that_fails_is_told_and_the_others_are_made(sweep: Sweep, tmp_path: Path) -> None:
    status, _, err = sweep("launcher=local", "seed=0,13")
    assert status == 2
    assert "kd-train: point 2 of 2: seed=13\n  failed: the loss is not finite\n  change: optimizer.lr" in err
    assert "1 done, 1 failed" in err
    assert "kd-2l-file-s0" in made(tmp_path)


def test_an_array_is_written_and_nothing_made(sweep: Sweep, tmp_path: Path) -> None:
    status, out, _ = sweep("launcher=slurm", "launcher.time=01:00:00", "seed=0,1")
    assert status == 0
    assert "--dependency=afterany:$first --array=1-2" in out
    assert "0 done, 0 failed, 2 not started" in out
    assert not (tmp_path / "events.txt").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["launcher=local,none"], "one launcher"),
        (["launcher=local", "task.limit_train=${hydra:job.num}"], "no Hydra jobs"),
    ],
)
def test_what_a_launcher_cannot_run_is_refused(sweep: Sweep, words: list[str], message: str) -> None:
    status, _, err = sweep(*words, "seed=0,1")
    assert (status, message in err, "change: launcher" in err) == (2, True, True), err


def test_names_of_launchers_are_those_of_one_table(sweep: Sweep) -> None:
    """Files, values and functions: `none` alone executes nothing, and what submits jobs leaves none done."""
    assert {path.stem for path in (conf_folder() / "launcher").glob("*.yaml")} == set(LAUNCHERS)
    for name, launcher in LAUNCHERS.items():
        assert typed(compose([f"launcher={name}"])).launcher.name == name
        assert (launcher.execute is None) == (name == "none")
        if launcher.execute is not None:
            assert list(inspect.signature(pkgutil.resolve_name(launcher.execute)).parameters) == ["jobs", "launcher", "name"]
    for words in (["launcher.name=nosuch"], ["launcher.name=nosuch", "task.limit_train=${hydra:job.num}"]):
        status, _, err = sweep(*words, "seed=0,1")
        assert (status, "'nosuch' is not one of none, local" in err, "change: launcher.name" in err) == (2, True, True), err


def test_a_launcher_that_executes_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="launcher=none"):
        list(launch({}, LauncherSpec("none"), "toy"))


def test_ranks_of_torchrun_and_further_configuration_folders_are_refused(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "task").mkdir()
    monkeypatch.setattr(sweeps, "search_path_is_extended", lambda: True)
    status, _, err = sweep("launcher=local", "seed=0,1")
    assert (status, "--config-dir" in err) == (2, True)


def test_a_further_configuration_folder_is_noticed(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ([], ["--config-dir", str(tmp_path)]):
        seen: list[bool] = []
        monkeypatch.setattr(sweeps, "launcher_of", lambda runs, seen=seen: seen.append(sweeps.search_path_is_extended()))
        monkeypatch.setattr(sweeps, "one_after_the_other", lambda *_: None)
        words = small("method=finetune", "teacher=[]", f"paths.runs={tmp_path}")
        monkeypatch.setattr(sys, "argv", ["kd-train", "--multirun", *words, *folder])
        train.main()
        assert seen == [bool(folder)]
