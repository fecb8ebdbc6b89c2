"""The history of a run, and Weights & Biases beside it."""

import csv
import os
import sys
from pathlib import Path

import pytest
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from kd.config import compose
from kd.errors import InputError
from kd.loggers import History, wandb_logger


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


def log(history: History, *steps: int) -> None:
    """A training row at each step, a validation row at every second one, saved as Lightning does."""
    for step in steps:
        history.log_metrics({"epoch": step // 4, "train/loss": 1 / (step + 1)}, step)
        history.save()
        if step % 2:
            history.log_metrics({"epoch": step // 4, "validation/accuracy": 0.0}, step)
            history.save()


def test_a_row_for_each_step_and_columns_as_they_turn_up(tmp_path: Path) -> None:
    log(History(tmp_path / "metrics.csv"), 0, 1)
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        "step,epoch,train/loss,validation/accuracy",
        "0,0,1,",
        "1,0,0.5,0",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize("stopped", range(1, 8))
@pytest.mark.parametrize("written_beyond", [0, 1, 3])
def test_a_resumed_history_loses_and_repeats_no_row(tmp_path: Path, stopped: int, written_beyond: int) -> None:
    log(History(tmp_path / "whole.csv"), *range(12))
    log(History(tmp_path / "metrics.csv"), *range(stopped + 1 + written_beyond))
    resumed = History(tmp_path / "metrics.csv", last_step=stopped)
    assert [int(row["step"]) for row in resumed.rows] == list(range(stopped + 1))
    log(resumed, *range(stopped + 1, 12))
    assert (tmp_path / "metrics.csv").read_text() == (tmp_path / "whole.csv").read_text()


def test_a_step_that_was_saved_in_part_is_completed_not_repeated(tmp_path: Path) -> None:
    first = History(tmp_path / "metrics.csv")
    first.log_metrics({"train/loss": 1.5}, 3)
    first.save()
    again = History(tmp_path / "metrics.csv", last_step=3)
    again.log_metrics({"validation/accuracy": 0.5}, 3)
    again.save()
    assert read(tmp_path / "metrics.csv") == [{"step": "3", "train/loss": "1.5", "validation/accuracy": "0.5"}]


def test_a_new_history_replaces_the_old_file(tmp_path: Path) -> None:
    log(History(tmp_path / "metrics.csv"), 0, 1, 2)
    log(History(tmp_path / "metrics.csv"), 7)
    assert [row["step"] for row in read(tmp_path / "metrics.csv")] == ["7"]


def test_resuming_without_a_file_begins_one(tmp_path: Path) -> None:
    log(History(tmp_path / "metrics.csv", last_step=5), 6)
    assert [row["step"] for row in read(tmp_path / "metrics.csv")] == ["6"]


def test_finishing_writes_what_there_is_and_no_empty_file(tmp_path: Path) -> None:
    history = History(tmp_path / "metrics.csv")
    history.finalize("success")
    assert not (tmp_path / "metrics.csv").exists()
    history.log_metrics({"test/accuracy": 0.25})
    history.finalize("success")
    assert read(tmp_path / "metrics.csv") == [{"step": "0", "test/accuracy": "0.25"}]


def test_only_the_first_rank_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    history = History(tmp_path / "metrics.csv")
    log(history, 0, 1)
    history.finalize("success")
    assert not list(tmp_path.iterdir())


def test_wandb_that_is_not_installed_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="pip install wandb") as caught:
        wandb_logger(tmp_path, "pkd-3l-rte-s0-abc123", {})
    assert caught.value.key == "logger"


def test_wandb_without_an_account_runs_offline_under_the_runs_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "WANDB_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "")  # so that what Lightning puts there is taken away after the test
    monkeypatch.delenv("WANDB_MODE")
    wandb = pytest.importorskip("wandb")
    logger = wandb_logger(tmp_path, "pkd-3l-rte-s0-abc123", {"seed": 0})
    try:
        run = logger.experiment
        logger.log_metrics({"train/loss": 1.0}, 0)
        assert run.settings._offline
        assert (run.id, run.name, run.project) == ("abc123", "pkd-3l-rte-s0-abc123", "kd")
        assert Path(run.dir).is_relative_to(tmp_path)
    finally:
        wandb.finish()
        wandb.teardown()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_the_logger_words_reach_the_logger() -> None:
    assert compose([]).logger.get("extra") is None
    assert compose(["logger=wandb"]).logger.extra._target_ == "kd.loggers.wandb_logger"
