"""The table of finished runs: a row for each task, split and student, and the keys that differ."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kd
import kd.results.tables
from kd.results.frame import FIRST, LAST

pytest.importorskip("pandas")
OLD = json.loads((Path(__file__).parent.parent / "old_result.json").read_text())


def finished(folder: Path, name: str, config: str = "", **changes: Any) -> Path:
    """A folder of a run with a record."""
    run = folder / name
    run.mkdir(parents=True)
    (run / "result.json").write_text(json.dumps({**OLD, **changes}))
    if config:
        (run / "config.yaml").write_text(config)
    return run


def test_a_row_is_a_split_of_a_run(tmp_path: Path) -> None:
    run = finished(tmp_path, "one")
    table = kd.results(tmp_path)
    assert list(table.columns) == [*FIRST, "accuracy", *LAST]
    assert table[["run", "split", "accuracy"]].values.tolist() == [["one", "validation", 0.75], ["one", "test", 0.625]]
    row = table.iloc[1]
    assert (row["method"], row["student"], row["teacher"], row["task"], row["seed"]) == ("pkd", "2l", "minilm", "file", 0)
    assert (row["directory"], row["digest"], row["parameters"]) == (str(run), "c77bab7600b5", 21698)


def test_keys_that_differ_are_columns(tmp_path: Path) -> None:
    same = "trainer: {max_epochs: 2}\ntask: {text: [a]}\npaths: {runs: a}\nlogger: {group: a}\nteacher: {}\n"
    finished(tmp_path, "one", f"seed: 0\noptimizer: {{lr: 1.0}}\n{same}", seed=0)
    finished(tmp_path, "two", f"seed: 1\noptimizer: {{lr: 2.0}}\n{same}".replace("[a]", "[a, b]").replace("runs: a", "runs: b"))
    finished(tmp_path, "without a configuration")
    table = kd.results(tmp_path)
    assert list(table.columns)[-2:] == ["optimizer.lr", "task.text"]
    assert {(row["run"], row["optimizer.lr"], row["task.text"]) for _, row in table.dropna().iterrows()} == {
        ("one", 1.0, '["a"]'),
        ("two", 2.0, '["a", "b"]'),
    }


def test_a_cohort_has_a_row_for_each_student(tmp_path: Path) -> None:
    students = {
        name: {**OLD["students"]["student"], "metrics": {"test": {"f1": value}}} for name, value in (("a", 0.5), ("b", 1.0))
    }
    finished(tmp_path, "one", students=students, headline="b")
    assert kd.results(str(tmp_path))[["student", "split", "f1"]].values.tolist() == [["a", "test", 0.5], ["b", "test", 1.0]]


def test_a_mixture_has_a_row_for_each_task_and_the_mean(tmp_path: Path) -> None:
    def with_metrics(metrics: dict[str, float]) -> dict[str, Any]:
        return {"student": {**OLD["students"]["student"], "metrics": {"test": metrics}}}

    tasks = {"a": {**OLD, "students": with_metrics({"f1": 0.5})}, "b": {**OLD, "students": with_metrics({"mse": 0.1})}}
    mean = with_metrics({"a/f1": 0.5, "b/mse": 0.1, "mean": 0.3})
    finished(tmp_path, "one", students=mean, tasks=tasks, task="mixture")
    rows = kd.results(tmp_path)[["task", "f1", "mse", "mean"]].fillna(-1).values.tolist()
    assert rows == [["a", 0.5, -1, -1], ["b", -1, 0.1, -1], ["mixture", -1, -1, 0.3]]
    assert not [column for column in kd.results(tmp_path).columns if "/" in column]


def test_runs_that_are_not_finished_have_no_row_and_are_named(tmp_path: Path) -> None:
    """A failed run has a configuration and no record; folders of other things have neither."""
    (tmp_path / "cache").mkdir()
    table = kd.results(tmp_path)
    assert (len(table), list(table.columns)) == (0, [*FIRST, *LAST])
    finished(tmp_path, "one", "seed: 0\n")
    for name, record in (("failed", None), ("damaged", "{"), ("of another program", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("seed: 0\n")
        if record is not None:
            (tmp_path / name / "result.json").write_text(record)
    with pytest.warns(UserWarning, match="3 of the runs in .* have no row: damaged, failed, of another program$") as warned:
        table = kd.results(tmp_path)
    assert [warning.filename for warning in warned] == [__file__]
    assert set(table["run"]) == {"one"}


def test_the_table_of_real_runs(small: Callable[..., list[str]]) -> None:
    words = small("method=finetune", "teacher=[]", "student=2l", "trainer.max_epochs=1")
    one, two = kd.run(*words), kd.run(*words, **{"optimizer.lr": 1e-3})
    table = kd.results(one.directory.parent).set_index(["run", "split"])
    for run, rate in ((one, 5e-3), (two, 1e-3)):
        row = table.loc[run.directory.name, "test"]
        assert (row["accuracy"], row["optimizer.lr"], row["digest"]) == (run.metrics["test"]["accuracy"], rate, run.digest)
    assert "paths.runs" not in table.columns


def test_errors_are_clear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(kd.InputError, match="is no folder of runs"):
        kd.results(tmp_path / "none")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(kd.InputError, match=r"pip install 'kd\[pandas\]'"):
        kd.results(tmp_path)


def test_the_package_can_be_called_and_keeps_its_modules() -> None:
    assert callable(kd.results)
    assert kd.results.tables.closing_table
