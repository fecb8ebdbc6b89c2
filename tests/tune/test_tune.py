"""The command `kd-tune`: a study from start to end, commands that share one, are killed, or have an error."""

import csv
import io
import os
import re
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from kd import clean, report, tune
from kd.launch.jobs import plan_command
from kd.runs.run import read_record
from kd.tune.study import JOURNAL
from processes import Command

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import stand_in  # noqa: E402

Small = Callable[..., list[str]]


class Tuning:
    """Commands in a folder of runs of their own, whose trials are executed by the stand-in."""

    def __init__(self, small: Small, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.runs, self.capsys = folder / "runs", capsys
        self.words = [word for word in small("method=kd") if not word.startswith(("paths.runs=", "task.test"))]
        self.words.append(f"paths.runs={self.runs}")

    def __call__(self, *more: str) -> tuple[int, str, str]:
        """Run the command in this process; return its status, output and errors."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["kd-tune", *self.words, *more])
            stand_in.replace_execution(patch)
            with pytest.raises(SystemExit) as end:
                tune.main()
        return int(end.value.code or 0), *self.capsys.readouterr()

    def start(self, *more: str, seconds: float = 0.2) -> Command:
        """Start the command in a process of its own, with epochs that take so many seconds."""
        path = os.pathsep.join(path for path in sys.path if path)
        environment = {**os.environ, "PYTHONPATH": path, "STAND_IN_SECONDS": str(seconds)}
        return Command([str(HERE / "stand_in.py"), *self.words, *more], environment)

    @property
    def events(self) -> Counter[str]:
        """How often each event of a run happened."""
        path = self.runs / "events.txt"
        return Counter(path.read_text().splitlines() if path.exists() else [])

    def count(self, word: str) -> int:
        """Return the number of events with this first word."""
        return sum(number for event, number in self.events.items() if event.split()[0] == word)

    @property
    def folder(self) -> Path:
        """Folder of the only study."""
        (folder,) = (self.runs / "tune").iterdir()
        return folder

    @property
    def trials(self) -> list[dict[str, str]]:
        """Rows of its table."""
        with (self.folder / "trials.csv").open() as file:
            return list(csv.DictReader(file))

    def records(self) -> dict[str, Any]:
        """Return the records of the finished runs, by temperature."""
        found = {
            row["method.temperature"]: read_record(self.runs / row["run"] / "result.json") for row in self.trials if row["run"]
        }
        return {temperature: record for temperature, record in found.items() if record is not None}


@pytest.fixture
def tuning(small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Tuning:
    return Tuning(small, tmp_path, capsys)


THREE = "method.temperature=2,4,8"


def test_a_study_ends_with_its_table_and_the_command_of_the_best(tuning: Tuning) -> None:
    status, out, _ = tuning(THREE, "n_trials=9")
    assert status == 0
    assert "The search space is exhausted: it has 3 points." in out
    assert "best of 3 trials (0 pruned) by validation accuracy: trial " in out
    assert {(row["method.temperature"], row["validation accuracy"]) for row in tuning.trials} == {
        ("2", "0.02"),
        ("4", "0.04"),
        ("8", "0.08"),
    }
    command = next(line for line in out.splitlines() if line.startswith("kd-train "))
    best = yaml.safe_load((tuning.folder / "best.yaml").read_text())
    assert (best["trials"], best["value"], best["overrides"], best["command"]) == (3, 0.08, ["method.temperature=8"], command)
    overrides = shlex.split(command)[1:]
    assert plan_command(overrides).name == best["run"]  # what it states of the search is not part of the digest
    straight = [word for word in overrides if not word.startswith("tuned.")]
    assert plan_command(straight).name == best["run"]
    assert straight == [*tuning.words, "method.temperature=8"]
    assert plan_command(overrides).spec.tuned.trials == 3


def test_every_record_of_a_trial_states_the_number_of_trials_and_so_does_the_report(tuning: Tuning, tmp_path: Path) -> None:
    tuning(THREE, "n_trials=2")
    first = tuning.records()
    assert {record["tuned"][0]["trials"] for record in first.values()} == {2}
    tuning(THREE, "n_trials=3")
    records = tuning.records()
    entry = {"study": tuning.folder.name, "trials": 3, "by": "validation accuracy"}
    assert {t: record["tuned"] for t, record in records.items()} == {t: [{**entry, "best": t == "8"}] for t in ("2", "4", "8")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["kd-report", str(tuning.runs)])
        report.main()
        shown = tuning.capsys.readouterr().out
        patch.setattr(sys, "argv", ["kd-report", str(tuning.runs), "--format", "csv"])
        report.main()
        table = tuning.capsys.readouterr().out
    words = re.sub(r"\s+", " ", shown)
    assert "best of 3 trials by validation accuracy" in words
    assert "one of 3 trials, not the best, by validation accuracy" in words
    selections = [row["selection"] for row in csv.DictReader(io.StringIO(table))]
    assert sum("best of 3 trials by validation accuracy" in one for one in selections) == 2  # validation and test


def test_the_number_of_trials_is_the_total_also_after_a_restart(tuning: Tuning) -> None:
    assert tuning(THREE, "n_trials=1")[0] == 0
    assert len(tuning.trials) == tuning.count("done") == 1
    tuning(THREE, "n_trials=2")
    tuning(THREE, "n_trials=2")
    assert len(tuning.trials) == tuning.count("began") == 2


def test_scores_on_test_are_neither_read_nor_shown(tuning: Tuning) -> None:
    _, out, err = tuning(THREE, "n_trials=3")
    assert "92.0" not in out + err  # test accuracy of temperature 8, of which validation has 8.0
    assert "8.0" in out
    for path in tuning.folder.glob("*.*"):
        assert "0.92" not in path.read_text()


def test_a_failed_trial_leaves_the_others_and_ends_with_1(tuning: Tuning) -> None:
    words = ("method.temperature=2,13,14", "n_trials=3")
    status, out, err = tuning(*words)
    assert status == 1
    assert re.search(r"trial \d failed: the loss is not finite \(change: optimizer.lr\)", err)
    assert re.search(r"trial \d failed: RuntimeError: a bug", err)
    assert sorted(row["state"] for row in tuning.trials) == ["complete", "failed", "failed"]
    assert "best of 1 trials" in out
    assert tuning(*words)[0] == 1
    assert tuning.count("began") == 5  # those that failed, once more
    assert len(tuning.trials) == 3


def test_a_pruned_trial_is_no_finished_run_and_counts(tuning: Tuning) -> None:
    grid = "method.temperature=" + ",".join(map(str, range(20, 31)))
    status, out, _ = tuning(grid, "n_trials=11", "trainer.max_epochs=3")
    states = Counter(row["state"] for row in tuning.trials)
    assert (status, states["pruned"] > 0, sum(states.values())) == (0, True, 11)
    assert f"best of 11 trials ({states['pruned']} pruned)" in out
    pruned = [row for row in tuning.trials if row["state"] == "pruned"]
    assert all(not (tuning.runs / row["run"] / "result.json").exists() for row in pruned)
    assert {row["epochs"] for row in pruned} == {"1"}
    assert len(report.load_results(tuning.runs)) == states["complete"]
    assert {record["tuned"][0]["trials"] for record in tuning.records().values()} == {11}
    again = tuning(grid, "n_trials=11", "trainer.max_epochs=3", "pruner=none")
    assert again[0] == 0
    assert tuning.count("began") == 11


def test_kd_clean_leaves_a_study_alone(tuning: Tuning, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning(THREE, "n_trials=3")
    before = sorted(path.name for path in tuning.folder.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["kd-clean", str(tuning.runs), "--yes", "--unfinished", "0"])
    clean.main()
    assert sorted(path.name for path in tuning.folder.rglob("*")) == before
    assert "tune" not in tuning.capsys.readouterr().out


def test_trials_compared_on_a_part_of_train_say_so_and_the_command_trains_on_all_of_it(tuning: Tuning) -> None:
    _, out, _ = tuning(THREE, "n_trials=3", "task.holdout=0.25")
    command = next(line for line in out.splitlines() if line.startswith("kd-train "))
    assert "task.holdout" not in command
    assert "'tuned.by=accuracy on 0.25 of train'" in command


@pytest.mark.ddp
def test_three_commands_share_a_study(tuning: Tuning) -> None:
    words = ("method.temperature=" + ",".join(map(str, range(20, 29))), "n_trials=9", "pruner=none")
    commands = [tuning.start(*words) for _ in range(3)]
    outputs = [command.communicate(180)[0] for command in commands]
    assert [command.returncode for command in commands] == [0, 0, 0], outputs
    assert [row["state"] for row in tuning.trials] == ["complete"] * 9
    assert (tuning.count("began"), tuning.count("done")) == (9, 9)
    assert all("best of 9 trials" in output for output in outputs)
    assert sum("\ntrial " in output for output in outputs) > 1


@pytest.mark.ddp
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_trial_of_a_killed_command_is_resumed_and_counts_once(how: signal.Signals, tuning: Tuning) -> None:
    words = (THREE, "n_trials=3", "trainer.max_epochs=4", "pruner=none")
    command = tuning.start(*words, seconds=1.0)
    until = time.monotonic() + 120
    while not tuning.count("epoch-2"):
        assert time.monotonic() < until
        time.sleep(0.05)
    os.kill(command.pid, how)
    output, _ = command.communicate(60)
    assert command.returncode == (-9 if how == signal.SIGKILL else 130), output
    assert not tuning.count("done")
    assert tuning(*words)[0] == 0
    assert [row["trial"] for row in tuning.trials] == ["0", "1", "2"]
    assert [row["epochs"] for row in tuning.trials] == ["4"] * 3
    assert tuning.count("epoch-1") == 3  # the first trial went on after its checkpoint
    assert (tuning.count("began"), tuning.count("done")) == (4, 3)


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ((), "space"),
        (("nosuch", "n_trials=2"), "space"),
        (("kd", "pkd"), "space"),
        ((THREE, "n_trials=0"), "n_trials"),
        ((THREE, "n_trials=many"), "n_trials"),
        ((THREE, "sampler=gp"), "sampler"),
        ((THREE, "pruner=hard"), "pruner"),
        ((THREE, "study=a/b"), "study"),
        ((THREE, "method.temprature=3"), "method.temprature"),
        (("method.temprature=3,4",), "method.temprature"),
        (("method.temperature=4,cold",), "method.temperature"),
        (("optimizer.lr=-1,1",), "optimizer.lr"),
        (("optimizer.lr=interval(1e-3,1e-5)",), "optimizer.lr.low"),
        (("seed=0,1",), "seed"),
        (("task.limit_validation=8,16",), "task.limit_validation"),
        (("trainer.selection=best,last",), "trainer.selection"),
        (("student=nosuch,2l",), "student"),
        ((THREE, "task.train=nowhere.csv"), "task.train"),
    ],
)
def test_a_command_with_an_error_ends_with_2_before_anything_is_written(
    words: tuple[str, ...], key: str, tuning: Tuning
) -> None:
    status, _, err = tuning(*words)
    assert status == 2, err
    assert f"change: {key}\n" in err
    assert not tuning.runs.exists()


def test_a_study_with_another_space_or_a_damaged_journal_is_refused(tuning: Tuning) -> None:
    tuning(THREE, "n_trials=1", "study=mine")
    assert tuning.folder.name == "mine"
    for more in (("method.temperature=2,4",), (THREE, "optimizer.lr=1e-3")):
        status, _, err = tuning(*more, "study=mine")
        assert (status, "change: study" in err, "study=<name>" in err) == (2, True, True)
    with (tuning.folder / JOURNAL).open("a") as file:
        file.write("damaged\n\n")
    status, _, err = tuning(THREE, "study=mine")
    assert (status, "is damaged" in err) == (2, True)


def test_a_folder_of_runs_that_cannot_be_written_to_is_refused(tuning: Tuning) -> None:
    tuning.runs.write_text("")
    status, _, err = tuning(THREE)
    assert (status, "change: paths.runs" in err) == (2, True)


def test_the_spaces_of_the_package_are_listed(tuning: Tuning) -> None:
    status, out, _ = tuning("--list")
    assert (status, "(216 points)" in out) == (0, True)
