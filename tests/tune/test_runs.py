"""Trials as runs: a pruned one that resumes, and what records, cards and figures of whole runs state of a search."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kd import tune
from kd.report import load_results
from kd.results.comparison import compare, entries_of_records
from kd.results.tuned import Tuned, selection_words, state_tuned
from kd.runs.run import Run, read_record
from kd.table.cells import PlannedCell
from kd.table.definition import parse_table
from kd.training import execute
from kd.tune.pruning import EpochScores, Pruned
from whole_runs import last_weights, planned, same_weights

Small = Callable[..., list[str]]


def finetuned(small: Small, runs: Path, *more: str) -> Run:
    return planned(small("method=finetune", "teacher=[]", f"paths.runs={runs}", *more))


def test_a_pruned_run_is_not_finished_and_resumes_to_the_same_weights(small: Small, tmp_path: Path) -> None:
    run, straight = finetuned(small, tmp_path / "pruned"), finetuned(small, tmp_path / "straight")
    scores: list[tuple[int, float]] = []

    def report(epoch: int, score: float) -> bool:
        scores.append((epoch, score))
        return True

    with pytest.raises(Pruned):
        execute.execute(run, callbacks=[EpochScores(report)])
    assert [epoch for epoch, _ in scores] == [1]
    assert (run.result, run.is_locked(), load_results(tmp_path / "pruned")) == (None, False, [])
    assert (run.checkpoints / "last.ckpt").exists()
    record = execute.execute(run, callbacks=[EpochScores(report)])
    assert record["resumed"]["from_steps"] == [6]  # of 96 examples in batches of 16: the second epoch alone
    assert [epoch for epoch, _ in scores] == [1, 2]  # a run is not stopped after its last epoch
    assert scores[-1][1] == pytest.approx(record["metrics_last"]["validation"]["accuracy"])
    expected = execute.execute(straight)
    assert record["metrics"] == expected["metrics"]
    assert same_weights(last_weights(run), last_weights(straight))


def test_a_study_of_whole_runs_is_stated_by_all_that_came_of_it(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = small("method=finetune", "teacher=[]", f"paths.runs={tmp_path}")
    words = [word for word in words if not word.startswith("optimizer.lr=")]
    monkeypatch.setattr(sys, "argv", ["kd-tune", *words, "optimizer.lr=5e-3,1e-6", "n_trials=2"])
    with pytest.raises(SystemExit) as end:
        tune.main()
    out = capsys.readouterr().out
    assert end.value.code == 0, out
    command = shlex.split(next(line for line in out.splitlines() if line.startswith("kd-train ")))[1:]
    run = planned(command)
    assert run.directory == planned([*words, "optimizer.lr=5e-3"]).directory  # a trial is the run that kd-train makes
    assert len(load_results(tmp_path)) == 2
    stated = "best of 2 trials by validation accuracy"
    assert run.result is not None
    assert selection_words(run.result).endswith(f"over 2 epoch(s), {stated}")
    assert f"over 2 epoch(s), {stated}." in (run.student / "README.md").read_text()
    assert run.is_done(thorough=True)
    before = run.result
    assert execute.execute(run) == before  # the command changes nothing that the study has stated
    other = planned([*command, "seed=1"])
    record = execute.execute(other)
    assert (record["tuned"], other.family) == (before["tuned"], run.family)
    assert stated in (other.student / "README.md").read_text()
    entries = entries_of_records([before, record])
    assert {tuple(entry.values) for entry in entries} == {(0, 1)}  # seeds of the best settings are one row
    assert all(entry.selection.endswith(stated) for entry in entries)


def test_a_run_that_is_done_states_the_search_that_a_later_command_names(small: Small, tmp_path: Path) -> None:
    run = finetuned(small, tmp_path)
    assert execute.execute(run)["tuned"] == []
    named = finetuned(small, tmp_path, "tuned.study=mine", "tuned.trials=20", "tuned.by=validation accuracy")
    record = execute.execute(named)
    assert record["tuned"] == [{"study": "mine", "trials": 20, "by": "validation accuracy", "best": True}]
    fewer = Tuned("mine", 5, "validation accuracy", best=False)
    assert state_tuned(run.directory, vars(fewer)) == record  # a study only grows
    for_hub = run.student / ".eval_results" / "glue_rte_accuracy.yaml"
    for_hub.parent.mkdir()
    for_hub.write_text(f"notes: {selection_words(record)}; seed 0")
    more = state_tuned(run.directory, vars(Tuned("other", 30, "accuracy on 0.1 of train", best=False)))
    assert more is not None
    assert selection_words(more).endswith(
        ", best of 20 trials by validation accuracy, one of 30 trials, not the best, by accuracy on 0.1 of train"
    )
    for document in (for_hub, run.student / "README.md"):
        assert selection_words(more) in document.read_text()
    assert run.is_done(thorough=True)
    with run.lock():
        assert state_tuned(run.directory, vars(Tuned("third", 1, None))) is None
    assert read_record(run.directory / "result.json") == more
    table = parse_table("toy", {"paper": "toy", "title": "A", "scales": {"local": {"cells": [{"method": ["finetune"]}]}}})
    figures = PlannedCell(table.cells("local")[0], run, ()).figures(table, more)
    assert {figure.selection for figure in figures} == {selection_words(more)}
    assert compare(entries_of_records([more])).entries[0].selection == selection_words(more)
