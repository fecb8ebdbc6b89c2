"""The history of a run."""

import csv
from pathlib import Path

import pytest
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from kd.training.loggers import History


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


TORN = {
    "NUL bytes at the end": (lambda whole: whole + bytes(64), 12),
    "a line of NUL bytes": (lambda whole: whole + bytes(64) + b"\n", 12),
    "NUL bytes within": (lambda whole: whole[:80] + b"\0" + whole[81:], 11),
    "cut within a number": (lambda whole: whole.rstrip()[:-1], 11),
    "cut before its last line's end": (lambda whole: whole.rstrip(), 11),
    "cut within the header": (lambda whole: whole[:9], 0),
    "empty": (lambda whole: b"", 0),
    "no header": (lambda whole: whole.split(b"\n", 1)[1], 0),
    "another header": (lambda whole: b"epoch,step\n1,2\n", 0),
    "a pickle": (lambda whole: b"\x80\x04\x95\n.", 0),
    "bytes that are no text": (lambda whole: whole[:70] + b"\xff\xfe" + whole[72:], 11),
    "a line of words": (lambda whole: whole + b"a,b,c,d\n", 12),
    "a line too long": (lambda whole: whole + b"1,2,3,4,5,6\n", 12),
    "a cell too large": (lambda whole: whole + b"12,0," + b"x" * 200_000 + b",\n", 12),
    "an open quote": (lambda whole: whole + b'12,0,"1,\n', 12),
    "a step that comes again": (lambda whole: whole + b"3,0,1,\n", 12),
}


@pytest.mark.parametrize("kind", TORN)
def test_a_torn_history_is_read_as_far_as_it_is_whole(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.csv"
    log(History(path), *range(12))
    whole = History(path, last_step=11).rows
    tear, left = TORN[kind]
    path.write_bytes(tear(path.read_bytes()))
    resumed = History(path, last_step=11)
    assert len(resumed.rows) == left
    assert all(row in whole for row in resumed.rows)
    assert "is damaged" in capsys.readouterr().out
    log(resumed, 12, 13)
    assert read(path)[-2:] == [{"step": "12", "epoch": "3", "train/loss": "0.0769230769"}, {**read(path)[-1], "step": "13"}]
    assert b"\0" not in path.read_bytes()


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
