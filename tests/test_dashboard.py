"""The dashboard of a group: what would be sent to Weights & Biases, and what is refused before."""

import csv
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from wandb_files import without_account

from kd import report
from kd.errors import InputError
from kd.results.dashboard import Logged, address, dashboard, logged, publish


def record(run: str, task: str = "rte", student: str = "3l", method: str = "pkd") -> dict[str, Any]:
    """The part of a record that a dashboard reads."""
    metrics = {"validation": {"accuracy": 0.5}, "test": {"accuracy": 0.5} if task == "rte" else {}}
    return {"run": run, "task": task, "student": student, "method": method, "metrics": metrics, "students": {}}


RUNS = {"a": record("a"), "b": record("b", student="2l", method="kd"), "c": record("c", task="sst2"), "d": record("d")}
GROUPS = {"a": "table", "b": "table", "c": "other", "d": None}
COLUMNS = {
    "a": ["step", "epoch", "train/task", "train/hidden", "train/loss", "validation/accuracy"],
    "b": ["step", "train/loss"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of runs in two groups and in none."""
    for name, found in RUNS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps({**found, "inputs": {}, "digest": name}))
        (tmp_path / name / "config.yaml").write_text(OmegaConf.to_yaml({"logger": {"group": GROUPS[name], "extra": {}}}))
        if name in COLUMNS:
            with (tmp_path / name / "metrics.csv").open("w", newline="") as file:
                csv.writer(file).writerow(COLUMNS[name])
    return tmp_path


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """The variables of each request that would have been sent, by somebody with an account."""
    pytest.importorskip("wandb_workspaces")
    import wandb
    from wandb_workspaces.workspaces import interface, internal

    requests: list[dict[str, Any]] = []

    def execute(api: object, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        requests.append(variables)
        return {"upsertView": {"view": {"name": variables["name"], "id": "1"}}}

    monkeypatch.setattr(internal, "execute_graphql", execute)
    monkeypatch.setattr(interface, "get_app_url", lambda api: "https://wandb.ai")
    monkeypatch.setattr(wandb, "Api", lambda: None)
    monkeypatch.setattr(wandb, "login", lambda prompt: True)
    return requests


def panels(spec: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Section -> its panels."""
    return {section["name"]: section["panels"] for section in spec["section"]["panelBankConfig"]["sections"]}


def test_what_is_sent_has_a_panel_for_each_metric_and_loss_term_of_the_group(folder: Path, sent: list[dict[str, Any]]) -> None:
    found = publish("team/kd", "table", folder, list(RUNS.values()))
    (request,) = sent
    assert found.startswith("https://wandb.ai/team/kd?nw=")
    assert (request["entityName"], request["projectName"], request["displayName"]) == ("team", "kd", "kd table")
    spec = json.loads(request["spec"])
    shown = panels(spec)
    curves = {
        name: [(panel["config"]["xAxis"], *panel["config"]["metrics"]) for panel in shown[name]]
        for name in ("Validation", "Loss terms")
    }
    step = "trainer/global_step"
    assert curves == {
        "Validation": [(step, "validation/accuracy")],
        "Loss terms": [(step, "train/task"), (step, "train/hidden"), (step, "train/loss")],
    }
    bar, scatter, table = shown["Test"]
    assert bar["config"]["metrics"] == ["test/accuracy"]
    assert (scatter["config"]["xAxis"], scatter["config"]["yAxis"]) == ("summary:parameters/student", "summary:test/accuracy")
    assert '"val": "results"' in json.dumps(table)
    assert [panel["viewType"] for panel in shown["Settings"]] == ["Run Comparer"]


def test_the_runs_shown_are_students_of_the_group_by_method(folder: Path, sent: list[dict[str, Any]]) -> None:
    publish("team/kd", "table", folder, list(RUNS.values()))
    spec = json.loads(sent[0]["spec"])
    (runs,) = spec["section"]["runSets"]
    assert [(entry["key"]["name"], entry["op"], entry["value"]) for entry in runs["filters"]["filters"]] == [
        ("group", "=", "table"),
        ("jobType", "=", "student"),
    ]
    assert [entry["name"] for entry in runs["grouping"]] == ["method.value.name", "student.value.name"]
    assert "summary:test/accuracy" in runs["runFeed"]["columnPinned"]


NAMES = Logged(("rte", "sst2"), ("3l",), ("accuracy",), (), ("loss",))


def test_several_tasks_are_apart_and_there_is_no_section_without_panels() -> None:
    workspaces = pytest.importorskip("wandb_workspaces.workspaces")
    view = dashboard("team", "kd", "table", NAMES)
    assert isinstance(view, workspaces.Workspace)
    assert [group.name for group in view.runset_settings.groupby] == ["task.name", "method.name"]
    names = [section.name for section in dashboard("team", "kd", "table", Logged(("rte",), ("3l",), (), (), ())).sections]
    assert names == ["Test", "Settings"]


def test_names_are_those_of_the_records_and_of_what_was_logged(folder: Path) -> None:
    names = logged(folder, [RUNS["a"], RUNS["c"]])
    assert names == Logged(("rte", "sst2"), ("3l",), ("accuracy",), ("accuracy",), ("task", "hidden", "loss"))


@pytest.mark.parametrize("character", ["=", "<", ">", "'", "\\"])
def test_a_group_that_a_filter_would_change_is_refused(character: str) -> None:
    pytest.importorskip("wandb_workspaces")
    with pytest.raises(InputError, match="cannot name") as caught:
        dashboard("team", "kd", f"lr{character}1", NAMES)
    assert caught.value.key == "--group"


@pytest.mark.parametrize("group", ["pkd_dev", "a sweep: lr/seed", 'in "quotes"', "Ünïcode", "a and b or c"])
def test_any_other_group_stands_in_the_filter_as_it_is(group: str) -> None:
    pytest.importorskip("wandb_workspaces")
    settings = dashboard("team", "kd", group, NAMES).runset_settings
    from wandb_workspaces import expr

    tree = expr.filters_tree_to_v2(expr.expr_to_filters(settings.filters))
    assert tree["filters"][0]["value"] == group


@pytest.mark.parametrize("target", ["team", "team/kd/x", "/kd", "team/", "team/k d", "team/kd?x", f"team/{'x' * 129}"])
def test_a_project_without_its_entity_is_refused(target: str) -> None:
    with pytest.raises(InputError, match="entity") as caught:
        address(target)
    assert caught.value.key == "--wandb"


def fails(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["kd-report", str(folder), *words])
    with pytest.raises(SystemExit) as stopped:
        report.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2, error
    assert "Traceback" not in error
    return error


BAD = {
    "no group": (["--wandb", "team/kd"], "needs --group", "--group"),
    "a group alone": (["--group", "table"], "--wandb <entity>/<project>", "--wandb"),
    "no such group": (["--wandb", "team/kd", "--group", "tables"], "there are: other, table", "--group"),
    "too long": (["--wandb", "team/kd", "--group", "x" * 129], "129 characters", "--group"),
    "a project alone": (["--wandb", "kd", "--group", "table"], "<entity>/<project>", "--wandb"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_exits_with_2_and_names_the_option(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, told, key = BAD[case]
    error = fails(folder, monkeypatch, capsys, *words)
    assert told in error
    assert f"change: {key}\n" in error


def test_without_an_account_nothing_is_sent(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb_workspaces")
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    for name, value in without_account(tmp_path_factory.mktemp("home")).items():
        monkeypatch.setenv(name, value)
    error = fails(folder, monkeypatch, capsys, "--wandb", "team/kd", "--group", "table")
    assert "there is no account" in error
    assert "change: --wandb\n" in error


def test_packages_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb_workspaces"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(InputError, match="pip install wandb wandb-workspaces") as caught:
        dashboard("team", "kd", "table", NAMES)
    assert caught.value.key == "--wandb"
