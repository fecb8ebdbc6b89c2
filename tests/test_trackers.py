"""Loggers beside the history: what they are told of a run, read back from what they have written."""

import csv
import os
import sys
import types
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import Logger
from wandb_files import BLOCK, HEADER, WandbRun, pieces, records, runs_in, without_account

from kd import train
from kd.errors import InputError
from kd.results.summary import COLUMNS, result_rows, summary
from kd.runs.run import Role, Run
from kd.training import execute
from kd.training.trackers.base import FILES, TrackedRun, import_package
from kd.training.trackers.trackio import TrackioTracker
from kd.training.tracking import check_loggers, conclude_all, make_loggers, tracking
from whole_runs import Small, broken_off, made, planned


@pytest.fixture(scope="module")
def nobody(tmp_path_factory: pytest.TempPathFactory) -> Iterator[types.ModuleType]:
    """Return wandb, in an environment in which it finds no account."""
    wandb = pytest.importorskip("wandb")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB")]:
            patch.delenv(name)
        for name, value in without_account(tmp_path_factory.mktemp("home")).items():
            patch.setenv(name, value)
        yield wandb
        wandb.teardown()


@pytest.fixture(scope="module")
def sweep(nobody: types.ModuleType, small: Small, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """The runs of a sweep over two seeds with a teacher, by their names without digest."""
    more = ["method=pkd", "logger=wandb", "logger.group=two seeds", "+logger.extra.wandb.notes=on a laptop"]
    overrides = small(*more, "trainer.max_epochs=1", f"paths.runs={tmp_path_factory.mktemp('sweep')}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["kd-train", "--multirun", "seed=0,1", *overrides])
        train.main()
    nobody.teardown()  # waits until its files are written
    first, second = (planned([*overrides, f"seed={seed}"]) for seed in range(2))
    runs = [first.inputs.teachers["minilm"], first, second]
    return {run.name.removesuffix(f"-{run.digest}"): run for run in runs}


def test_each_point_of_a_sweep_is_a_run_of_wandb_with_group_role_and_tags(sweep: dict[str, Run]) -> None:
    told = {}
    for name, run in sweep.items():
        (found,) = runs_in(run.directory)
        assert (found.run.display_name, found.run.run_id, found.run.project) == (name, run.digest, "kd")
        assert (found.run.run_group, found.run.notes, found.exit_code) == ("two seeds", "on a laptop", 0)
        told[name] = (found.run.job_type, list(found.run.tags))
    assert told == {
        "finetune-full-file-s0": ("teacher", ["finetune", "full", "file"]),
        "pkd-2l-file-s0": ("student", ["pkd", "2l", "file"]),
        "pkd-2l-file-s1": ("student", ["pkd", "2l", "file"]),
    }


def test_a_run_of_wandb_has_the_configuration_the_record_and_the_files(sweep: dict[str, Run]) -> None:
    run = sweep["pkd-2l-file-s1"]
    record = run.result
    assert record is not None
    (found,) = runs_in(run.directory)
    assert (found.config["seed"], found.config["method"]["name"], found.config["task"]["name"]) == (1, "pkd", "file")
    assert found.config["optimizer"]["lr"] == run.spec.optimizer.lr
    for split in ("validation", "test"):
        assert found.summary[f"{split}/accuracy"] == record["metrics"][split]["accuracy"]
    assert found.summary["parameters/student"] == record["parameters"]["student"]
    assert found.summary["parameters/teacher"] == record["parameters"]["teacher"]
    assert found.summary.get("latency_ms/student") == record["latency_ms"]["student"]
    assert found.summary["method/layer map (student<-teacher)"] == "1<-2"
    assert found.summary["results"]["nrows"] == len(result_rows(record))
    assert found.artifacts[f"record-{run.digest}"] == sorted(FILES)


def test_wandb_shows_every_metric_against_the_optimiser_step(sweep: dict[str, Run]) -> None:
    run = sweep["pkd-2l-file-s0"]
    (found,) = runs_in(run.directory)
    assert found.metrics["*"] == "trainer/global_step"
    assert curves(found) == rows_of(run)


def rows_of(run: Run) -> dict[int, dict[str, float]]:
    """The rows of a run's `metrics.csv`, by step."""
    with (run.directory / "metrics.csv").open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    return {int(row.pop("step")): row for row in rows}


def curves(found: WandbRun) -> dict[int, dict[str, float]]:
    """The metrics that wandb was told, by optimiser step, with the digits of `metrics.csv`."""
    steps: dict[int, dict[str, float]] = {}
    for row in found.history:
        values = {name: value for name, value in row.items() if not name.startswith("_") and name != "results"}
        step = int(values.pop("trainer/global_step"))
        steps.setdefault(step, {}).update({name: float(f"{value:.9g}") for name, value in values.items()})
    return steps


@pytest.fixture(scope="module")
def resumed(nobody: types.ModuleType, small: Small, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with two loggers that was stopped at step 31, after it had logged step 29, and resumed from step 24."""
    more = ["logger=[wandb,tensorboard]", "trainer.batch_size=4", f"paths.runs={tmp_path_factory.mktemp('resumed')}"]
    run = planned(small("method=finetune", "teacher=[]", *more))
    with pytest.MonkeyPatch.context() as patch:
        broken_off(run, 32, patch)
    assert execute.execute(run)["resumed"]["from_steps"] == [24]
    nobody.teardown()
    return run


def test_the_last_of_several_offline_runs_has_the_whole_history(resumed: Run) -> None:
    first, last = runs_in(resumed.directory)
    assert (first.exit_code, last.exit_code) == (1, 0)
    assert (first.run.run_id, last.run.run_id) == (resumed.digest, resumed.digest)
    assert curves(last) == rows_of(resumed)
    assert max(curves(first)) == 29
    assert "test/accuracy" not in first.summary
    assert last.history[0]["_step"] == 0, "the counter of wandb begins again"


def test_tensorboard_shows_each_step_of_a_resumed_run_once_and_its_results(resumed: Run) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(resumed.directory / "tensorboard"))
    events.Reload()
    rows = rows_of(resumed)
    for name in ("train/loss", "validation/accuracy"):
        shown = {event.step: event.value for event in events.Scalars(name)}
        assert len(shown) == len(events.Scalars(name))
        assert shown == pytest.approx({step: row[name] for step, row in rows.items() if name in row})
    record = resumed.result
    assert record is not None
    (result,) = events.Scalars("result/test/accuracy")
    assert result.value == pytest.approx(record["metrics"]["test"]["accuracy"])
    assert "_hparams_/session_start_info" in events.summary_metadata


ONE = TrackedRun(Path("nowhere"), "pkd-3l-rte-s0", "abc123", "table", "student", ("pkd", "3l", "rte"), {"seed": 0})
"""A run that has no folder."""


def test_the_digest_is_left_out_of_the_name_and_the_tasks_of_a_mixture_are_tags(small: Small) -> None:
    run = planned(small("method=finetune", "teacher=[]", "logger.group=g"))
    tracked = TrackedRun.of(run, Role("stage"), 7)
    assert (tracked.name, tracked.digest, tracked.group) == ("finetune-2l-file-s0", run.digest, "g")
    assert (tracked.tags, tracked.job_type, tracked.first_step) == (("finetune", "2l", "file"), "stage", 7)
    assert (TrackedRun.of(run).job_type, TrackedRun.of(run).first_step) == ("student", 0)
    mixture = replace(run.spec.task, kind="mixture", of={"sst2": run.spec.task, "rte": run.spec.task})
    mixed = replace(run, spec=replace(run.spec, task=mixture))
    assert TrackedRun.of(mixed).tags == ("finetune", "2l", "sst2", "rte")


def test_a_needed_run_inherits_loggers_and_group(small: Small) -> None:
    run = planned(small("method=kd", "logger=[wandb,trackio]", "logger.group=g", "logger.extra.wandb.project=mine"))
    teacher = run.inputs.teachers["minilm"]
    assert teacher.spec.logger == run.spec.logger
    assert run.spec.logger.extra["wandb"]["project"] == "mine"


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "trackio"])
def test_a_package_that_is_not_installed_is_named(name: str, small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    run = planned(small("method=finetune", "teacher=[]", f"logger={name}"))
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=rf"pip install {name}\n") as caught:
        check_loggers(run)
    assert caught.value.key == "logger"


def test_a_folder_called_wandb_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.setitem(sys.modules, "wandb", sys)  # so that what is imported here is taken away after the test
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [PathFinder])
    with pytest.raises(InputError, match="pip install wandb"):
        import_package("wandb")
    assert "wandb" in sys.modules, "what was imported was the folder"


REFUSED = {
    "project": ("logger=wandb", "logger.extra.wandb.project=a/b", "logger.extra.wandb.project", "cannot contain characters"),
    "tag": ("logger=wandb", f"logger.extra.wandb.tags=[{'x' * 65}]", "logger.extra.wandb.tags", "between 1 and 64 characters"),
    "a tag alone": ("logger=wandb", "logger.extra.wandb.tags=mine", "logger.extra.wandb.tags", "must be a list"),
    "argument": ("logger=wandb", "+logger.extra.wandb.colour=red", "logger.extra.wandb.colour", "takes no argument 'colour'"),
    "writer": (
        "logger=[csv,tensorboard]",
        "+logger.extra.tensorboard.colour=red",
        "logger.extra.tensorboard.colour",
        "no argument",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_a_package_refuses_are_found_before_training(case: str, nobody: types.ModuleType, small: Small) -> None:
    loggers, option, key, words = REFUSED[case]
    with pytest.raises(InputError, match=words) as caught:
        check_loggers(planned(small("method=finetune", "teacher=[]", loggers, option)))
    assert caught.value.key == key


@pytest.mark.parametrize("group", ["x" * 129, "''", "' a'", "'a\tb'"])
def test_a_group_that_wandb_refuses_names_its_key(group: str, small: Small) -> None:
    with pytest.raises(InputError) as caught:
        planned(small("method=finetune", "teacher=[]", f"logger.group={group}"))
    assert caught.value.key == "logger.group"


def test_the_longest_group_that_wandb_takes_is_taken(small: Small) -> None:
    group = "x" * 128
    assert planned(small("method=finetune", "teacher=[]", f"logger.group={group}")).spec.logger.group == group


class Mine(Logger):
    """A logger of a user's own, which is no tracker."""

    def __init__(self, run: TrackedRun, colour: str) -> None:
        super().__init__()
        self.told = (run.name, colour)
        self.rows: list[int | None] = []

    @property
    def name(self) -> str:
        return "mine"

    @property
    def version(self) -> str:
        return ""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append(step)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None: ...


def test_a_logger_of_ones_own_is_given_the_run_and_its_options(small: Small) -> None:
    run = planned(small("method=finetune", "teacher=[]", f"+logger.extra.mine={{_target_: {__name__}.Mine, colour: red}}"))
    check_loggers(run)
    with tracking(run, None, None) as loggers:
        (mine,) = loggers
        assert isinstance(mine, Mine)
        assert mine.told == ("finetune-2l-file-s0", "red")
        conclude_all(loggers, {}, {})


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Put a module in the place of trackio that notes each call, with the signatures of trackio 0.43; return the notes."""
    calls: list[tuple[str, Any]] = []

    class Artifact:
        def __init__(self, name: str, type: str) -> None:
            self.name, self.type, self.files = name, type, []

        def add_file(self, path: str) -> None:
            self.files.append(Path(path).name)

    class Started:
        def log(self, metrics: dict[str, Any], step: int | None = None) -> None:
            calls.append(("log", (metrics, step)))

        def log_artifact(self, artifact: Artifact) -> None:
            calls.append(("artifact", (artifact.name, artifact.type, artifact.files)))

    def init(
        project: str, name: str | None = None, group: str | None = None, config: Any = None, resume: str = "never"
    ) -> Started:
        calls.append(("init", (project, name, group, config, resume)))
        return Started()

    module = types.ModuleType("trackio")
    parts = {"init": init, "Artifact": Artifact, "Markdown": str, "finish": lambda: calls.append(("finish", None))}
    vars(module).update(parts, __file__="trackio.py")
    monkeypatch.setitem(sys.modules, "trackio", module)
    return calls


RECORD = {
    "metrics": {"test": {"accuracy": 0.75, "f1": None}},
    "students": {"student": {"metrics": {"test": {"accuracy": 0.75, "f1": None}}}},
    "metrics_teacher": {"minilm": {"test": {"accuracy": 0.875}}},
    "baseline": {"test": {"accuracy": 0.5}},
    "method": "pkd",
    "student": "3l",
    "teacher": ["minilm"],
    "task": "rte",
    "seed": 0,
    "init": "first 3 layers",
    "parameters": {"student": 12, "teacher": 30, "teachers": {"minilm": 30}},
    "latency_ms": {"student": None, "minilm": 2.5},
    "steps": 9,
}
"""The part of a record that loggers read."""


def test_trackio_is_told_the_run_its_metrics_and_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch)
    tracker = TrackioTracker(replace(ONE, folder=tmp_path))
    tracker.check()
    assert not calls
    tracker.begin([])
    tracker.log_metrics({"train/loss": 0.5}, 3)
    tracker.conclude(RECORD, {"layer map": "1<-2"})
    tracker.close(failed=False)
    tracker.close(failed=False)
    config = {"seed": 0, "job_type": "student", "tags": ["pkd", "3l", "rte"]}
    values = {"result/test/accuracy": 0.75, "result/parameters/student": 12, "result/parameters/teacher": 30}
    values |= {"result/latency_ms/minilm": 2.5, "result/steps": 9}
    assert calls == [
        ("init", ("kd", "pkd-3l-rte-s0-abc123", "table", config, "allow")),
        ("log", ({"train/loss": 0.5}, 3)),
        ("log", ({**values, "method/layer map": "1<-2"}, 9)),
        ("artifact", ("record-abc123", "record", list(FILES))),
        ("finish", None),
    ]


def test_trackio_refuses_a_project_that_is_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    with pytest.raises(InputError) as caught:
        TrackioTracker(ONE, project="a/b").check()
    assert caught.value.key == "project"


@pytest.mark.next
def test_trackio_itself_keeps_a_run(tmp_path: Path, small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check what the stand-in takes for granted, with the package itself, which `make next` installs."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    trackio = pytest.importorskip("trackio")
    more = ["logger=trackio", "logger.group=g", "trainer.max_epochs=1", f"paths.runs={tmp_path / 'runs'}"]
    run, _ = made(small("method=finetune", "teacher=[]", *more))
    (found,) = trackio.Api().runs("kd")
    assert (found.name, found.config["_Group"], found.config["job_type"]) == (run.name, "g", "student")


def test_rows_of_the_results_are_of_every_model(tmp_path: Path) -> None:
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in result_rows(RECORD)]
    assert [(row["model"], row["metric"], row["value"]) for row in rows] == [
        ("3l", "accuracy", 0.75),
        ("3l", "f1", None),
        ("teacher minilm", "accuracy", 0.875),
        ("baseline", "accuracy", 0.5),
    ]
    assert {(row["method"], row["teacher"], row["seed"], row["split"]) for row in rows} == {("pkd", "minilm", 0, "test")}


def test_the_summary_of_a_cohort_has_each_student() -> None:
    students = {name: {"metrics": {"test": {"accuracy": value}}} for name, value in {"3l": 0.75, "2l": 0.625}.items()}
    found = summary({**RECORD, "students": students, "agreement": {"test": {"minilm": 0.5}}})
    assert (found["test/accuracy"], found["test/3l/accuracy"], found["test/2l/accuracy"]) == (0.75, 0.75, 0.625)
    assert found["agreement/test/minilm"] == 0.5


def test_a_failing_logger_leaves_no_other_open(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch)
    run = planned(small("method=finetune", "teacher=[]", "logger=[tensorboard,trackio]"))
    monkeypatch.setattr("kd.training.trackers.tensorboard.TensorBoardTracker.close", lambda self, failed: 1 / 0)
    with pytest.raises(ZeroDivisionError), tracking(run, None, None) as loggers:
        loggers[1].begin([])
    assert [name for name, _ in calls] == ["init", "finish"]
    assert len(make_loggers(run, TrackedRun.of(run))) == 2


# The reader of files of wandb


def test_a_record_longer_than_a_block_is_read_whole() -> None:
    import struct
    import zlib

    def piece(kind: int, content: bytes) -> bytes:
        return struct.pack("<IHB", zlib.crc32(bytes([kind]) + content), len(content), kind) + content

    short, long = b"a", bytes(range(256)) * 200
    room = BLOCK - len(HEADER) - 7 - len(short) - 7
    first, rest = long[:room], long[room:]
    content = HEADER + piece(1, short) + piece(2, first) + piece(4, rest)
    padded = HEADER + piece(1, long[: BLOCK - len(HEADER) - 7 - 3]) + bytes(3) + piece(1, short)
    assert list(records(content)) == [short, long]
    assert [len(found) for found in records(padded)] == [BLOCK - len(HEADER) - 10, 1]
    with pytest.raises(AssertionError, match="damaged"):
        list(pieces(content[:-1] + b"?"))
