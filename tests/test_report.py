"""Tables of finished runs: what is grouped, what is averaged, what is left out."""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

from kd import report
from kd.results import tables
from kd.results.comparison import entries_of_records
from kd.runs.run import read_record

OLD_RESULT = Path(__file__).parent / "old_result.json"
"""The record of a run of an early version, made small."""


def record(seed: int = 0, family: str = "f0", settings: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """The record of a run, as `result.json` has it."""
    method = {"name": more.get("method", "kd"), "temperature": 4.0, "weights": {"task": 0.5, "logits": 0.5}}
    found = {
        "method": "kd",
        "student": "2l",
        "teacher": ["minilm"],
        "task": "rte",
        "seed": seed,
        "init": "first 2 layers of minilm",
        "limit_train": None,
        "epochs": 3,
        "lr": 5e-5,
        "precision": "32-true",
        "weights": {"task": 0.5, "logits": 0.5},
        "digest": f"d{seed}",
        "inputs": {},
        "family": family,
        "identity": {"seed": seed, "method": method, "trainer": {"max_epochs": 3}, **(settings or {})},
        "finished": f"2025-01-0{seed + 1}T00:00:00",
        "metrics": {"validation": {"accuracy": 0.6 + seed / 100}, "test": {"accuracy": 0.5 + seed / 50}},
        "metrics_teacher": {"minilm": {"validation": {"accuracy": 0.7}, "test": {"accuracy": 0.65}}},
        "agreement": {"validation": {"minilm": 0.875}, "test": {"minilm": 0.8}},
        "metrics_ensemble": {},
        "headline": "student",
        "parameters": {"student": 12345678, "teacher": 22700000, "teachers": {"minilm": 22700000}},
        "megabytes": {"student": 47.1, "minilm": 86.7},
        "latency_ms": {"student": 2.0 + seed, "minilm": 9.25},
        "seconds": {"train": 30.0 + seed},
        "selection": {"kind": "best", "by": "validation accuracy"},
        **more,
    }
    one = {key: found[key] for key in ("metrics", "agreement", "init")}
    student = {**one, "parameters": 12345678, "megabytes": 47.1, "latency_ms": 2.0 + seed}
    return {"students": {"student": student}, **found}


def write(folder: Path, *records: dict[str, Any]) -> Path:
    for place, found in enumerate(records):
        (folder / f"run{place}").mkdir(parents=True)
        (folder / f"run{place}" / "result.json").write_text(json.dumps(found))
    return folder


def cells(table: Any) -> list[dict[str, str]]:
    """The rows of a rich table, by column."""
    rows = zip(*(column.cells for column in table.columns), strict=True)
    return [dict(zip([str(column.header) for column in table.columns], row, strict=True)) for row in rows]


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["kd-report", *map(str, words)])
    report.main()


def test_seeds_are_averaged_with_their_sample_deviation() -> None:
    (row,) = cells(tables.report_table([record(0), record(1), record(2)]))
    mean, spread = 100 * statistics.fmean([0.5, 0.52, 0.54]), 100 * statistics.stdev([0.5, 0.52, 0.54])
    assert row["test accuracy"] == f"{mean:.1f} ± {spread:.1f}" == "52.0 ± 2.0"
    assert row["validation accuracy"] == "61.0 ± 1.0"
    assert row["agreement"] == "87.5 ± 0.0"
    assert (row["seeds"], row["latency ms"], row["train s"]) == ("0, 1, 2", "3.00", "31")
    assert (row["parameters"], row["MB"]) == ("12,345,678", "47.1")


def test_one_seed_has_no_spread() -> None:
    (row,) = cells(tables.report_table([record(1)]))
    assert row["test accuracy"] == "52.0"


def test_only_runs_of_one_family_are_averaged() -> None:
    groups = tables.grouped([record(0), record(0, family="f1"), record(1), record(1, family="f1")])
    assert [[(result["family"], result["seed"]) for result in group] for group in groups] == [
        [("f0", 0), ("f0", 1)],
        [("f1", 0), ("f1", 1)],
    ]


def test_a_run_of_a_search_is_not_averaged_with_one_of_none() -> None:
    """In the table, and in each format of a comparison."""
    tuned = [{"study": "mine", "trials": 20, "by": "validation accuracy", "best": True}]
    records = [record(0, tuned=tuned), record(1), record(2, tuned=[])]
    for order in (records, records[::-1]):
        rows = {row["seeds"]: row["where"] for row in cells(tables.report_table(order))}
        assert {tuple(sorted(seeds.split(", "))): where for seeds, where in rows.items()} == {
            ("0",): "best, validation accuracy, best of 20 trials by validation accuracy",
            ("1", "2"): "best, validation accuracy",
        }
    identities = {"student": {}, "task": {}, "optimizer": {}, "teachers": [], "pool": {}}
    named = [{**one, "identity": {**one["identity"], **identities}} for one in records]
    entries = entries_of_records(named)
    assert {(entry.settings, tuple(entry.values)) for entry in entries} == {
        ("best, validation accuracy, best of 20 trials by validation accuracy", (0,)),
        ("best, validation accuracy", (1, 2)),
    }
    assert len({entry.key for entry in entries}) == 2


def test_rows_that_look_alike_tell_the_settings_in_which_they_differ() -> None:
    longer = record(0, family="f1", settings={"trainer": {"max_epochs": 9}})
    hotter = record(
        0, family="f2", settings={"method": {"name": "kd", "temperature": 8.0, "weights": {"task": 0.5, "logits": 0.5}}}
    )
    rows = cells(tables.report_table([record(0), record(1), longer, hotter]))
    assert [row["where"] for row in rows] == [
        "temperature=4.0 trainer.max_epochs=3",
        "temperature=4.0 trainer.max_epochs=9",
        "temperature=8.0 trainer.max_epochs=3",
    ]
    other = record(0, family="f3", method="pkd")  # its own column tells
    assert "where" not in cells(tables.report_table([record(0), record(1), other]))[0]


def test_a_metric_that_a_run_does_not_have_is_undefined_not_averaged_away() -> None:
    (row,) = cells(
        tables.report_table([record(0), record(1, metrics={"validation": {"accuracy": None}, "test": {"accuracy": 0.5}})])
    )
    assert row["validation accuracy"] == "undefined"
    assert row["test accuracy"] == "50.0 ± 0.0"


def test_tasks_with_different_metrics_share_a_table_with_gaps() -> None:
    other = record(
        0,
        family="f1",
        task="cola",
        metrics={"validation": {"matthews_corrcoef": 0.25}},
        teacher=[],
        agreement={"validation": {}},
    )
    rte, cola = cells(tables.report_table([record(0), other]))
    assert (rte["validation matthews_corrcoef"], cola["validation matthews_corrcoef"]) == ("", "25.0")
    assert (rte["test accuracy"], cola["test accuracy"]) == ("50.0", "")
    assert (cola["teacher"], cola["agreement"]) == ("", "")


def test_only_whole_records_of_finished_runs_are_read_oldest_first(tmp_path: Path) -> None:
    write(tmp_path, record(2), record(0), record(1))
    for name, content in {"killed": None, "cut": '{"method": "kd"', "list": "[]", "bytes": "\x00"}.items():
        (tmp_path / name).mkdir()
        if content is not None:
            (tmp_path / name / "result.json").write_text(content)
    found = report.load_results(tmp_path)
    assert [(result["seed"], result["run"]) for result in found] == [(0, "run1"), (1, "run2"), (2, "run0")]


def test_the_protocol_states_what_is_common_and_lists_what_differs() -> None:
    words = tables.protocol([record(0), record(1)])
    assert "best checkpoint, validation accuracy; student starts from first 2 layers of minilm; trained in 32-true" in words
    assert "student starts from {first 2 layers of minilm, random};" in tables.protocol([record(0), record(1, init="random")])


def test_the_closing_table_puts_student_and_teachers_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    tables.closing_table(record(1), Path("runs/kd-2l"))
    lines = capsys.readouterr().out.splitlines()
    student = next(line for line in lines if "student 2l" in line)
    teacher = next(line for line in lines if "teacher minilm" in line)
    for word in ("12,345,678", "47.1", "61.0", "52.0", "87.5", "3.00"):
        assert word in student
    for word in ("22,700,000", "86.7", "70.0", "65.0", "9.25"):
        assert word in teacher
    assert any("kd on rte, seed 1" in line for line in lines)
    assert "run: runs/kd-2l" in lines
    assert f"exported student: {Path('runs/kd-2l/student')}" in lines


def test_the_closing_table_of_a_run_without_a_teacher_has_no_agreement(capsys: pytest.CaptureFixture[str]) -> None:
    tables.closing_table(record(0, teacher=[], agreement={"validation": {}}, metrics_teacher={}), Path("run"))
    out = capsys.readouterr().out
    assert "agreement" not in out
    assert "teacher" not in out


def test_the_closing_table_shows_every_student_and_their_ensemble(capsys: pytest.CaptureFixture[str]) -> None:
    found = record(0)
    one = found["students"]["student"]
    weaker = {**one, "metrics": {"validation": {"accuracy": 0.4321}, "test": {"accuracy": 0.4}}, "parameters": 999}
    ensemble = {"validation": {"accuracy": 0.6543}, "test": {"accuracy": 0.5432}}
    found |= {"students": {"3l": one, "2l": weaker}, "headline": "3l", "metrics_ensemble": ensemble}
    tables.closing_table(found, Path("run"))
    lines = capsys.readouterr().out.splitlines()
    assert any("student 3l (the run's)" in line and "60.0" in line for line in lines)
    assert any("student 2l" in line and "43.2" in line and "999" in line and "(the run's)" not in line for line in lines)
    assert any("ensemble of the students" in line and "65.4" in line and "54.3" in line for line in lines)
    assert any("the others are in" in line for line in lines)


def test_the_command_prints_a_table_and_its_protocol(tmp_path: Path, monkeypatch, capsys) -> None:
    command(monkeypatch, write(tmp_path, record(0), record(1)))
    out = capsys.readouterr().out
    assert "51.0 ± 1.4" in out
    assert "In percent (correlations times 100" in out
    assert "Mean ± standard deviation over seeds. best checkpoint" in out.replace("\n", " ")


@pytest.mark.parametrize(
    ("words", "seeds"),
    [
        ([], [0, 1, 2]),
        (["--task", "rte"], [0, 1]),
        (["--method", "pkd"], [1]),
        (["--method", "pkd,kd"], [0, 1, 2]),
        (["--task", "rte", "--method", "kd"], [0]),
    ],
)
def test_records_are_chosen_and_given_as_json(tmp_path: Path, monkeypatch, capsys, words: list[str], seeds: list[int]) -> None:
    write(tmp_path, record(0), record(1, method="pkd"), record(2, task="cola"))
    command(monkeypatch, tmp_path, "--json", *words)
    found = json.loads(capsys.readouterr().out)
    assert [result["seed"] for result in found] == seeds
    assert found[0] == {**record(seeds[0], **{k: found[0][k] for k in ("method", "task")}), "run": f"run{seeds[0]}"}


@pytest.mark.parametrize("words", [[], ["--task", "mrpc"], ["--json", "--method", "nothing"]])
def test_no_runs_is_said_and_exits_with_two(tmp_path: Path, monkeypatch, capsys, words: list[str]) -> None:
    folder = write(tmp_path, record(0)) if words else tmp_path / "nowhere"
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, folder, *words)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    asked = {"--task": " with task=mrpc", "--method": " with method=nothing"}
    chosen = "".join(text for word, text in asked.items() if word in words)
    missing = "" if words else "; there is no such folder or table"
    assert captured.err == f"kd-report: no finished runs in '{folder}'{chosen}{missing}\n"
    assert captured.out == ""


def test_a_record_of_an_earlier_version_is_reported_beside_a_new_one(tmp_path: Path, monkeypatch, capsys) -> None:
    old = json.loads(OLD_RESULT.read_text())
    new = record(0, task="file", method="pkd", collapsed=True, latency={"threads": 1, "measure": "least of 30 calls"})
    assert not {"baseline", "cache", "collapsed", "files", "latency", "origin", "resumed"} & old.keys()
    command(monkeypatch, write(tmp_path, old, new))
    out = capsys.readouterr().out
    assert "62.5" in out  # test accuracy of the old one
    assert "50.0" in out
    assert "Students that predict one class, or nearly one score: run1" in out
    tables.closing_table(old, tmp_path)
    assert "62.5" in capsys.readouterr().out
    assert read_record(tmp_path / "run0" / "result.json") == old, "it needs no checksum"


def test_a_run_that_another_begins_with_is_no_row_and_its_seconds_are_the_others(tmp_path: Path, monkeypatch, capsys) -> None:
    first = record(0, family="f1", method="tinybert_layers", digest="b0", inputs={})
    last = record(
        1, method="tinybert", inputs={"before": "tinybert_layers-2l-rte-s0-b0"}, seconds={"train": 30.0, "before": 12}
    )
    folder = write(tmp_path, first, last)
    command(monkeypatch, folder)
    out = capsys.readouterr().out
    assert "42 │" in out
    assert "│ tinybert_layers" not in out
    assert "--method=tinybert_layers shows them" in out
    command(monkeypatch, folder, "--method", "tinybert_layers")
    assert "│ tinybert_layers" in capsys.readouterr().out


def test_settings_of_the_run_that_a_method_begins_with_tell_rows_apart() -> None:
    def before(attention: str, **more: Any) -> dict[str, Any]:
        method = {"name": "tinybert_layers", "attention": attention, "weights": {"attention": 1.0}}
        return {"before": {"seed": more.pop("seed", 0), "method": method, "inputs": {"teacher minilm": attention}, **more}}

    first = [record(seed, "f1", before("scores", seed=seed), method="tinybert") for seed in (0, 1)]
    other = record(0, "f2", before("kl"), method="tinybert")
    rows = cells(tables.report_table([*first, other]))
    assert [row["where"] for row in rows] == ["before.method.attention=scores", "before.method.attention=kl"]
    assert [row["seeds"] for row in rows] == ["0, 1", "0"]


def test_a_table_of_many_configurations_looks_at_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    original = tables.settings
    monkeypatch.setattr(tables, "settings", lambda found, prefix="": looked.append(prefix) or original(found, prefix))
    many = [record(0, f"f{n}", {"trainer": {"max_epochs": n}}) for n in range(40)]
    assert len(set(tables.differences(tables.grouped(many)))) == 40
    assert looked.count("") == 40


def test_rows_that_differ_in_files_or_inputs_alone_are_told_apart() -> None:
    """Compare runs of one command with other data: nothing but digests tells them apart."""
    plain = record(0, "f0", {"data": {"train": "aa"}, "inputs": {"teacher minilm": "t0"}})
    more = record(0, "f1", {"data": {"train": "aa", "unlabelled": "bb"}, "inputs": {"teacher minilm": "t0"}})
    other = record(0, "f2", {"data": {"train": "aa"}, "inputs": {"teacher minilm": "t1"}})
    words = tables.differences(tables.grouped([plain, more, other]))
    assert words == [
        "inputs.teacher minilm=t0",
        "inputs.teacher minilm=t0 data.unlabelled=bb",
        "inputs.teacher minilm=t1",
    ]
    settings = [{"optimizer": {"lr": n}, "data": {"train": str(n)}} for n in range(2)]
    told = [record(0, f"f{n}", identity) for n, identity in enumerate(settings)]
    assert tables.differences(tables.grouped(told)) == ["optimizer.lr=0", "optimizer.lr=1"]


def test_a_setting_that_some_rows_lack_tells_those_that_have_it() -> None:
    old, new = record(0, "f0"), record(0, "f1", {"optimizer": {"lr": 1}})
    same = record(0, "f2", {"trainer": {"max_epochs": 3.0}, "optimizer": {"lr": None}})  # equal to the first
    assert tables.differences(tables.grouped([old, new, same])) == ["", "optimizer.lr=1", "optimizer.lr=None"]


def test_errors_keep_their_units_where_other_metrics_are_in_percent(capsys: pytest.CaptureFixture[str]) -> None:
    scores = {"validation": {"pearson": 0.8125, "mse": 1.25}}
    found = record(0, metrics=scores, metrics_teacher={}, agreement={"validation": {}}, teacher=[], labels=None)
    tables.closing_table({**found, "baseline": {"validation": {"pearson": None, "mse": 2.5}}}, Path("run"))
    lines = capsys.readouterr().out.splitlines()
    assert any("student 2l" in line and "81.2" in line and "1.2500" in line for line in lines)
    assert any("mean of the scores" in line and "undefined" in line and "2.5000" in line for line in lines)
    (row,) = cells(tables.report_table([found]))
    assert (row["validation pearson"], row["validation mse"]) == ("81.2", "1.2500")


def test_a_student_that_predicts_one_class_is_told_beside_the_majority_class(capsys) -> None:
    found = record(0, labels=["bad", "good"], baseline={"validation": {"accuracy": 0.6}, "test": {"accuracy": 0.55}})
    found["students"]["student"]["collapsed"] = True
    found["latency_ms"] = {"student": None, "minilm": None}
    found["identity"]["student"] = {"init": "first", "init_from": "pretrained"}
    tables.closing_table(found, Path("run"))
    out = capsys.readouterr().out
    assert any("majority class" in line and "60.0" in line and "55.0" in line for line in out.splitlines())
    assert "WARN  student 2l: its predictions are one class" in out
    assert "Try student.init_from=teacher, a larger optimizer.lr, more trainer.max_epochs" in out


def test_the_cure_names_no_value_that_is_there_already_or_cannot_be() -> None:
    given = {"init": "first", "init_from": "pretrained"}
    assert tables.cure(["minilm"], given).startswith("student.init_from=teacher, ")
    for teachers, student in [([], given), (["t"], {**given, "init_from": "teacher"}), (["t"], {**given, "init": "random"})]:
        assert tables.cure(teachers, student) == "a larger optimizer.lr, more trainer.max_epochs"


def test_runs_that_predict_one_class_are_named_below_the_table(tmp_path: Path, monkeypatch, capsys) -> None:
    command(monkeypatch, write(tmp_path, record(0), record(1, collapsed=True)))
    assert "one class, or nearly one score: run1" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["runs [a] b", "x[/b]", "[red]", "a:smile:b", "[link=x]y[/link]"])
def test_names_and_folders_are_printed_as_they_are_whatever_they_mean_in_markup(
    name: str, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = record(0, task=name, teacher=[name], student=name, collapsed=True)
    for key in ("metrics_teacher", "megabytes", "latency_ms"):
        found[key] = {**found[key], name: found[key]["minilm"]}
    found["parameters"]["teachers"][name] = 1
    found["students"]["student"]["collapsed"] = True
    found |= {"identity": {"task": {"source": {"train": name}}}, "labels": [name, "other"], "method": name}
    tables.closing_table(found, Path("runs") / name)
    out = capsys.readouterr().out
    for words in (
        f"run: runs/{name}\n",
        f"student: runs/{name}/student",
        f"teacher {name} ",
        f"WARN  student {name}:",
        f"on {name}, seed",
    ):
        assert words in out
    other = {**found, "family": "f1", "identity": {"task": {"source": {"train": f"{name}!"}}}}
    folder = write(tmp_path, found, other, record(2, family="f2", digest="b", method=name))
    (folder / "run0").rename(folder / f"run {name}".replace("/", ""))
    command(monkeypatch, folder)
    out = capsys.readouterr().out
    assert f"│ {name} " in out
    assert f"task.source.train={name}!" in out
    assert f"run {name}".replace("/", "") in out


def test_a_folder_of_runs_that_is_none_is_told(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, tmp_path / "file")
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert "cannot read" in err
    assert "change: paths.runs" in err


def test_options_of_the_baseline_reach_runs_and_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {"student": {}, "task": {}, "optimizer": {}, "teachers": [], "pool": {}}
    records = [
        record(0, method=method, family=method, digest=method, settings={**parts, "trainer": {"max_epochs": epochs}})
        for method, epochs in (("finetune", 5), ("kd", 3), ("dml", 3))
    ]
    folder = write(tmp_path / "runs", *records)

    def verdicts(*words: str, student: str = "2l") -> dict[str, str]:
        capsys.readouterr()
        command(monkeypatch, *words, "--format=json")
        rows = json.loads(capsys.readouterr().out)["rows"]
        return {row["method"]: row["verdict"] for row in rows if (row["split"], row["student"]) == ("test", student)}

    none, few = "no baseline of this budget and selection", "too few seeds to decide"
    assert verdicts(str(folder)) == {"finetune": "baseline", "kd": none, "dml": none}
    assert verdicts(str(folder), "--baseline=kd") == {"finetune": none, "kd": "baseline", "dml": few}
    with pytest.raises(SystemExit):
        command(monkeypatch, str(folder), "--any-budget")
    assert "compare a table" in capsys.readouterr().err
    (tmp_path / "none").mkdir()
    table = ("local_bench", "--task=few", "--method=finetune,kd,dml", "--runs", str(tmp_path / "none"))
    strict = verdicts(*table, student="bert_3l_192")
    compared = verdicts(*table, "--any-budget", student="bert_3l_192")
    assert (strict["finetune"], strict["dml"]) == ("baseline", none)
    assert compared["dml"].endswith("; another selection and budget")
    assert none not in (strict["kd"], compared["kd"])
    assert "another" not in compared["kd"]
    assert verdicts(*table, "--baseline=kd", student="bert_3l_192")["kd"] == "baseline"
    assert not verdicts(*table, "--student=2l,3l", student="bert_3l_192")
    assert verdicts(*table, "--student=2l,bert_3l_192", student="bert_3l_192") == strict
    assert verdicts(str(folder), "--student=2l")
    with pytest.raises(SystemExit):
        command(monkeypatch, str(folder), "--student=3l")
    assert "with student=3l" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message", "key"),
    [
        (["runs", "--json", "--baseline=kd"], "--baseline changes nothing in the records", "--baseline"),
        (["runs", "--json", "--format=csv"], "--format changes nothing in the records", "--format"),
        (["runs", "--format=svg", "--baseline=kd"], "--baseline changes nothing in a picture", "--baseline"),
        (["runs", "--out=tables.txt"], "--out changes nothing in tables on the terminal", "--out"),
        (["runs", "--wandb=team/kd", "--group=a", "--task=rte"], "shows all runs of its group", "--task"),
        (["runs", "--format=csv", "--any-budget"], "compare a table", "--any-budget"),
        (["runs", "--scale=published"], "runs of a folder have none", "--scale"),
        (["runs", "--scale=local"], "runs of a folder have none", "--scale"),
        (["runs", "--runs=runs"], "the target itself", "--runs"),
        (["pkd_dev", "--runs=nowhere"], "there is no folder 'nowhere'", "--runs"),
        (["runs", "--method="], "--method is empty", "--method"),
        (["runs", "--format=csv", "--task="], "--task is empty", "--task"),
        (["runs", "--json", "--out="], "'.' is a folder: name a file", "--out"),
        (["runs", "--wandb="], "--wandb is empty", "--wandb"),
        (["pkd_dev", "--json"], "name their folder in place of the table", "--json"),
        (["pkd_dev", "--wandb=team/kd", "--task=rte"], "name their folder in place of the table", "--wandb"),
        (["pkd_dev", "--format=svg", "--any-budget"], "--any-budget changes nothing in a picture", "--any-budget"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_option_that_would_be_ignored_is_refused(
    tmp_path: Path, monkeypatch, capsys, words: list[str], message: str, key: str
) -> None:
    folder = str(write(tmp_path / "runs", record(0)))
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, *(folder if word == "runs" else word for word in words))
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert f"change: {key}\n" in captured.err


def test_every_option_is_used_by_something() -> None:
    defaults = vars(report.parser().parse_args([]))
    options = defaults.keys() - {"target"}
    assert {defaults[name] for name in options} == {None, False}, "an option that is given is told by its value"
    assert {name for used in report.USED.values() for name in used} == options
    assert set(report.OF_TABLES) < options
    assert set(report.OF_FOLDERS) < set(report.USED)


def test_rows_of_a_folder_are_chosen_after_all_were_compared(tmp_path: Path, monkeypatch, capsys) -> None:
    """As those of a table: which rows are shown changes no verdict, and the baseline need not be among them.

    Runs that others begin with are never compared, which would change the correction.
    """
    parts = {"student": {}, "task": {}, "optimizer": {}, "teachers": [], "pool": {}}
    gains = {"finetune": 0.0, "kd": 0.02, "pkd": 0.01}
    records = [
        record(
            seed,
            *(method, parts),
            method=method,
            digest=f"{method}{seed}",
            inputs={"before": "first-2l-rte-s0-b0"} if method == "pkd" else {},
            metrics={"test": {"accuracy": 0.6 + gain * (1 + seed % 3)}},
        )
        for method, gain in gains.items()
        for seed in range(6)
    ]
    other = record(0, "other", parts, method="kd", digest="o0", task="sst2", metrics={"test": {}})
    begun = record(0, "first", parts, method="first", digest="b0", inputs={})
    folder = write(tmp_path, *records, begun, other)

    def rows(*words: str) -> dict[str, dict[str, Any]]:
        command(monkeypatch, folder, "--format=json", *words)
        return {row["method"]: row for row in json.loads(capsys.readouterr().out)["rows"]}

    everything = rows()
    assert everything.keys() == gains.keys()
    assert everything["kd"]["comparisons"] == 2
    assert everything["kd"]["difference"] == pytest.approx(0.04)
    assert rows("--method=kd") == {"kd": everything["kd"]}
    assert rows("--student=2l", "--task=rte") == everything
    for words, told in (
        (["--method=kd,first"], "runs of first that others begin with are not compared"),
        (["--method=dml"], "no finished runs in"),
        (["--task=sst2"], "no finished runs in"),
        (["--baseline=first"], "no run of 'first' to compare with"),
    ):
        with pytest.raises(SystemExit):
            rows(*words)
        assert told in capsys.readouterr().err
