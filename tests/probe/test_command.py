"""The command on whole runs: figures beside those of the records, controls, teachers, and what is refused."""

import contextlib
import io
import json
import shlex
import shutil
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

import kd.probe
from conftest import tiny_model, tiny_tokenizer
from kd.config.compose import compose
from kd.errors import InputError
from kd.probe import analysis
from kd.results.predictions import Predictions, SplitPredictions, read_predictions, write_predictions
from kd.runs.plan import plan
from kd.runs.run import Run, read_record, write_record
from kd.system.command import split_words
from whole_runs import Small, made

QUICK = ("--only", "differences")

LEARNS = ("teacher.minilm.run.optimizer.lr=2e-3", "teacher.minilm.run.trainer.max_epochs=6")
"""Overrides with which the toy's teacher learns something, but not all."""

STUDENT = ("optimizer.lr=2e-3", "trainer.max_epochs=3", "preflight=false")
"""Overrides with which its student does."""


def probed(out: Path, *words: object) -> dict[str, Any]:
    """The JSON that the command leaves in a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["kd-probe", *map(str, words), "--out", str(out)])
        kd.probe.main()
    found: dict[str, Any] = json.loads((out / "probe.json").read_text())
    assert {path.name for path in out.iterdir()} == {"probe.json", "probe.html"}
    return found


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The message of a command that ends with status 2 and writes nothing."""
    monkeypatch.setattr(sys, "argv", ["kd-probe", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        kd.probe.main()
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def seeds(small: Small) -> list[tuple[Run, dict[str, Any]]]:
    """Distilled students of two seeds."""
    return [made(small("method=kd", f"seed={seed}", *LEARNS, *STUDENT)) for seed in (0, 1)]


@pytest.fixture(scope="module")
def control(small: Small) -> Run:
    """Fine-tuning of the student of seed 0."""
    run, _ = made(small("method=finetune", "teacher=[]", "seed=0", *STUDENT))
    return run


@dataclass
class Probed:
    """Files and output of one command."""

    json: dict[str, Any]
    page: str
    printed: str


@pytest.fixture(scope="module")
def whole(seeds: list[tuple[Run, dict[str, Any]]], control: Run, tmp_path_factory: pytest.TempPathFactory) -> Probed:
    """All parts of both seeds, of which the first has a control."""
    del control
    out, printed = tmp_path_factory.mktemp("whole") / "out", io.StringIO()
    with contextlib.redirect_stdout(printed):
        found = probed(
            out, *(run.directory for run, _ in seeds), "--examples", 20, "--train-examples", 40, "--part-examples", 10
        )
    return Probed(found, (out / "probe.html").read_text(), printed.getvalue())


def copied(run: Run, folder: Path) -> Path:
    """A copy of a run and of what it needs, in another folder of runs."""
    for each in (run, *(needed for _, needed in run.inputs)):
        shutil.copytree(each.directory, folder / each.name, ignore=shutil.ignore_patterns("cache", "checkpoints"))
    return folder / run.name


def value(case: dict[str, Any], name: str, model: str = "student") -> float:
    found: float = case["differences"]["figures"][name][model]["value"]
    return found


def test_all_parts_of_two_seeds_and_a_control(
    whole: Probed, seeds: list[tuple[Run, dict]], control: Run, tmp_path: Path
) -> None:
    found = whole.json
    first, second = found["cases"]
    for case, (run, record) in zip((first, second), seeds, strict=True):
        about = case["about"]
        assert (about["run"], about["seed"], about["digest"]) == (run.name, run.spec.seed, run.digest)
        assert about["init"] == record["init"]
        assert value(case, "score.accuracy") == pytest.approx(record["metrics"]["validation"]["accuracy"])
        assert value(case, "agreement") == pytest.approx(record["agreement"]["validation"]["minilm"])
        teacher = case["differences"]["teacher"]["score.accuracy"]["value"]
        assert teacher == pytest.approx(record["metrics_teacher"]["minilm"]["validation"]["accuracy"])
        lost, gained = case["differences"]["figures"]["lost"]["student"]["value"], value(case, "gained")
        assert value(case, "score.accuracy") == pytest.approx(teacher * (1 - lost) + (1 - teacher) * gained)
        assert 0 < lost < 1, "the toy's student differs from its teacher"
        assert case["absent"] == {}
        assert about["logits"] == dict.fromkeys(about["logits"], "stored")
        roles = ["student", "control"] if about["control"] else ["student"]
        assert list(case["cka"]) == list(case["attention"]) == roles
        assert list(case["probes"]) == list(case["ablation"]) == ["teacher", *roles]
        assert (len(case["cka"]["student"]["matrix"]), len(case["cka"]["student"]["matrix"][0])) == (3, 5)
        assert case["cka"]["student"]["n"] == case["probes"]["student"]["layers"][0]["n"] == 20
        assert case["attention"]["student"]["n"] == case["ablation"]["student"]["n"] == 10
        assert case["probes"]["student"]["train"] == 40
        assert [len(case["ablation"][role]["heads"]) for role in ("teacher", "student")] == [4, 2]
    assert first["about"]["control"] == control.name
    assert value(first, "score.accuracy", "control") == pytest.approx(control.result["metrics"]["validation"]["accuracy"])
    assert second["about"]["control"] is None
    (summary,) = found["summaries"]
    assert (summary["seeds"], summary["controls"]) == ([0, 1], [control.name, None])
    accuracies = [value(case, "score.accuracy") for case in (first, second)]
    spread = summary["figures"]["score.accuracy"]
    assert (spread["student"]["mean"], spread["student"]["seeds"]) == (pytest.approx(np.mean(accuracies)), 2)
    assert spread["student"]["sd"] == pytest.approx(np.std(accuracies, ddof=1))
    assert (spread["control"]["mean"], spread["control"]["sd"]) == (value(first, "score.accuracy", "control"), None)
    assert not [word for word in (str(tmp_path), str(seeds[0][0].directory.parent)) if word in json.dumps(found["summaries"])]
    assert 0.5 < value(first, "agreement") < 1


def test_a_control_of_fewer_seeds_says_so(whole: Probed) -> None:
    (summary,) = whole.json["summaries"]
    first, second = (value(case, "score.accuracy") for case in whole.json["cases"])
    of_control = value(whole.json["cases"][0], "score.accuracy", "control")
    assert f"{100 * of_control:.1f} (1 of 2 seeds)" in whole.page
    assert f"{100 * of_control:.1f} (1 of 2 seeds)" in whole.printed
    difference = summary["figures"]["score.accuracy"]["difference"]
    assert (difference["mean"], difference["seeds"]) == (pytest.approx(first - of_control), 1)
    assert difference["mean"] != pytest.approx((first + second) / 2 - of_control)


def test_one_teacher_of_all_seeds_has_no_spread(whole: Probed) -> None:
    (summary,) = whole.json["summaries"]
    of_teacher = whole.json["cases"][0]["differences"]["teacher"]["score.accuracy"]
    spread = summary["teacher_figures"]["score.accuracy"]
    assert (spread["mean"], spread["sd"], spread["seeds"]) == (of_teacher["value"], None, 1)
    assert (spread["low"], spread["high"]) == (of_teacher["low"], of_teacher["high"])


def test_the_table_and_the_page_of_two_seeds(whole: Probed) -> None:
    assert "lost: wrong, teacher right" in whole.printed
    assert "No control of seed 1: kd-train method=finetune" in whole.printed
    assert whole.page.count("<svg") == 2 + 1 + 2 + 3
    assert "http" not in whole.page.replace("http://www.w3.org", "")
    check_balanced(whole.page)


def test_the_size_and_the_constant_prediction_of_a_student(whole: Probed, seeds: list[tuple[Run, dict]]) -> None:
    for case, (_, record) in zip(whole.json["cases"], seeds, strict=True):
        assert case["about"]["shape"] == {"layers": 2, "heads": 4, "width": 32}
        assert case["about"]["majority"] == record["baseline"]["validation"]
    assert f"{100 * seeds[0][1]['baseline']['validation']['accuracy']:.1f}</td>" in whole.page


class Balanced(HTMLParser):
    """Parser that fails where an element is closed that was not opened last."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, _: object) -> None:
        if tag not in ("meta", "line", "circle", "rect", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "line", "circle", "polyline"):
            assert self.open.pop() == tag


def check_balanced(page: str) -> None:
    parser = Balanced()
    parser.feed(page)
    assert not parser.open


def test_the_command_that_makes_the_missing_control_is_of_the_same_budget(
    seeds: list[tuple[Run, dict]], tmp_path: Path, small: Small
) -> None:
    run, _ = seeds[1]
    found = probed(tmp_path / "out", run.directory, *QUICK)
    command = found["cases"][0]["about"]["without_control"]
    words = shlex.split(command)[1:]
    assert {"method=finetune", "teacher=[]", "seed=1", "optimizer.lr=0.002"} <= set(words)
    assert plan(compose(words)).digest == plan(compose(small("method=finetune", "teacher=[]", "seed=1", *STUDENT))).digest


def test_the_command_of_a_control_that_starts_from_the_teacher_has_the_teachers_options(
    small: Small, backbone: Path, tmp_path: Path
) -> None:
    teacher = ("teacher=[hub]", f"teacher.hub.backbone={backbone}", "teacher.hub.run.trainer.max_epochs=1")
    begins = ("student.init_from=auto", f"paths.runs={tmp_path / 'runs'}")
    run, _ = made(small("method=kd", *teacher, *begins, *STUDENT))
    found = probed(tmp_path / "out", run.directory, *QUICK)
    command = found["cases"][0]["about"]["without_control"]
    words = shlex.split(command)[1:]
    assert {"method=finetune", *teacher} <= set(words)
    assert plan(compose(words)).digest == plan(compose(small("method=finetune", *teacher, *begins, *STUDENT))).digest


def test_a_student_beside_itself_has_lost_nothing(seeds: list[tuple[Run, dict]], tmp_path: Path) -> None:
    (run, _), _ = seeds
    words = (run.directory, "--teacher", run.directory, "--examples", 12, "--train-examples", 30, "--part-examples", 8)
    (case,) = probed(tmp_path / "out", *words)["cases"]
    for name, expected in {"agreement": 1, "kl": 0, "js": 0, "total_variation": 0, "lost": 0, "delta.accuracy": 0}.items():
        one = case["differences"]["figures"][name]["student"]
        assert (one["value"], one["low"], one["high"]) == (expected, expected, expected), name
    assert value(case, "retention.accuracy") == 1
    assert value(case, "gained") == 0
    for layer in range(3):
        one = case["cka"]["student"]["matrix"][layer][layer]
        assert (one["value"], one["low"], one["high"]) == pytest.approx((1, 1, 1), abs=1e-12)
    for layer in range(2):
        assert case["attention"]["student"]["matrix"][layer][layer]["value"] == 0
        assert case["attention"]["student"]["heads"][layer][layer] == [[head, head] for head in range(4)]
    assert case["probes"]["student"] == case["probes"]["teacher"]
    assert case["ablation"]["student"] == case["ablation"]["teacher"]
    assert value(case, "agreement", "control") < 1, "the control is another model"


def test_a_teacher_that_was_evaluated_on_longer_texts_reads_the_same_tokens_as_the_student(
    seeds: list[tuple[Run, dict]], tmp_path: Path
) -> None:
    run, _ = seeds[0]
    teacher = copied(run.inputs.teachers["minilm"], tmp_path / "runs")
    longer = (teacher / "config.yaml").read_text().replace("max_length: 32", "max_length: 64")
    (teacher / "config.yaml").write_text(longer)
    (case,) = probed(tmp_path / "out", run.directory, "--teacher", teacher, *QUICK)["cases"]
    (own,) = probed(tmp_path / "own", run.directory, *QUICK)["cases"]
    assert case["about"]["logits"] == {"student": "stored", "teacher": "computed", "control": "stored"}
    assert value(case, "kl") == pytest.approx(value(own, "kl"), abs=1e-6)


def test_logits_that_were_not_stored_are_computed(seeds: list[tuple[Run, dict]], tmp_path: Path) -> None:
    run, _ = seeds[0]
    stored = probed(tmp_path / "stored", copied(run, tmp_path / "runs"), *QUICK)["cases"][0]
    (tmp_path / "runs" / run.name / "predictions.npz").unlink()
    computed = probed(tmp_path / "computed", tmp_path / "runs" / run.name, *QUICK)["cases"][0]
    assert computed["about"]["logits"] == {"student": "computed", "teacher": "computed"}
    assert stored["about"]["control"] is None, "the copy's folder has no control"
    for name in ("score.accuracy", "agreement", "kl", "ece"):
        assert value(computed, name) == pytest.approx(value(stored, name), abs=1e-6)


def test_without_models_differences_are_left_and_the_rest_has_a_reason(
    seeds: list[tuple[Run, dict]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, record = seeds[0]
    directory = copied(run, tmp_path / "runs")
    shutil.rmtree(directory / "student")
    write_record(directory / "result.json", {**record, "keep": "figures"})
    (case,) = probed(tmp_path / "out", directory, "--examples", 8, "--train-examples", 20, "--part-examples", 8)["cases"]
    assert value(case, "score.accuracy") == pytest.approx(record["metrics"]["validation"]["accuracy"])
    reason = f"the run {run.name} has no exported student (trainer.keep=figures)"
    assert case["absent"] == {f"{part}/student": reason for part in ("cka", "probes", "attention", "ablation")}
    assert list(case["probes"]) == list(case["ablation"]) == ["teacher"]
    assert reason in capsys.readouterr().out
    assert reason in (tmp_path / "out" / "probe.html").read_text()
    shutil.rmtree(tmp_path / "runs" / run.inputs.teachers["minilm"].name)
    (case,) = probed(tmp_path / "out", directory, "--only", "ablation")["cases"]
    assert "is not beside the run" in case["absent"]["ablation/teacher"]
    assert case["differences"] is None
    (directory / "predictions.npz").unlink()
    assert "no stored predictions of student" in refused(monkeypatch, capsys, directory)


def test_predictions_that_are_not_those_of_the_record_are_refused(
    seeds: list[tuple[Run, dict]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = seeds[0]
    directory = copied(run, tmp_path / "runs")
    splits = dict(read_predictions(directory).splits)
    split = splits["validation"]

    def stored(**change: Any) -> None:
        parts = {name: getattr(split, name) for name in ("index", "labels", "students", "teachers", "texts")}
        write_predictions(
            directory / "predictions.npz", Predictions({**splits, "validation": SplitPredictions(**{**parts, **change})})
        )

    stored(students={"student": -split.students["student"]})
    assert "result.json has" in refused(monkeypatch, capsys, directory, *QUICK)
    stored(teachers={"minilm": -split.teachers["minilm"]})
    assert "the stored predictions of minilm" in refused(monkeypatch, capsys, directory, *QUICK)
    stored(texts="other")
    assert "evaluated on other examples" in refused(monkeypatch, capsys, directory, *QUICK)
    stored(labels=1 - split.labels)
    assert "evaluated on other examples" in refused(monkeypatch, capsys, directory, *QUICK)
    stored()
    assert len(probed(tmp_path / "out", directory, *QUICK)["cases"]) == 1


def test_teachers_are_compared_one_by_one_and_one_of_another_vocabulary_without_attention(
    seeds: list[tuple[Run, dict]], small: Small, tmp_path: Path
) -> None:
    """The teachers are trained classifiers: the student of another run, and a random one that reads other tokens."""
    other = tmp_path / "reversed"
    model = tiny_model(seed=3, initializer_range=0.1)
    model.config.id2label, model.config.label2id = {0: "positive", 1: "negative"}, {"positive": 0, "negative": 1}
    model.save_pretrained(other)
    tiny_tokenizer(sorted(word for word in tiny_tokenizer().get_vocab() if not word.startswith("["))).save_pretrained(other)
    of_run = seeds[0][0].student
    words = (
        "teacher=[minilm,minilm_3l]",
        "teacher.minilm.backbone=null",
        f"+teacher.minilm.model={of_run}",
        "teacher.minilm_3l.backbone=null",
        f"+teacher.minilm_3l.model={other}",
    )
    run, record = made(small("method=kd", "pool=wkd", *words, "trainer.max_epochs=1", "preflight=false"))
    found = probed(
        tmp_path / "out",
        run.directory,
        "--split",
        "test",
        "--examples",
        8,
        "--part-examples",
        8,
        "--only",
        "differences,cka,attention",
    )
    assert [case["about"]["teacher"] for case in found["cases"]] == ["minilm", "minilm_3l"]
    for case in found["cases"]:
        assert case["about"]["split"] == "test"
        assert value(case, "agreement") == pytest.approx(record["agreement"]["test"][case["about"]["teacher"]])
        assert list(case["cka"]) == ["student"]
    first, second = found["cases"]
    assert (list(first["attention"]), first["absent"]) == (["student"], {})
    assert "another vocabulary than the teacher" in second["absent"]["attention/student"]


def test_a_cohort_has_a_case_for_each_student_and_an_online_teacher_has_predictions_alone(small: Small, tmp_path: Path) -> None:
    words = ("method=dml", "cohort.teacher=online", "cohort.students=[1l,2l]", "trainer.max_epochs=1", "preflight=false")
    run, record = made(small(*words))
    found = probed(tmp_path / "out", run.directory, "--examples", 8, "--train-examples", 20, "--part-examples", 8)
    students = list(record["students"])
    assert [case["about"]["student"] for case in found["cases"]] == students
    for name, case in zip(students, found["cases"], strict=True):
        assert value(case, "score.accuracy") == pytest.approx(record["students"][name]["metrics"]["validation"]["accuracy"])
        assert "trained together with the students" in case["absent"]["cka/student"]
        assert list(case["ablation"]) == list(case["probes"]) == ["student"]


def test_tasks_of_a_mixture_have_a_case_each_and_scores_have_correlations_layers_and_attention(
    small: Small, reviews: Path, tmp_path: Path
) -> None:
    """Both tasks have the toy's texts; the second has scores, and is smaller."""
    for split in ("train", "validation", "test"):
        text = (reviews / f"{split}.csv").read_text()
        (tmp_path / f"{split}.csv").write_text(text.replace(",negative", ",1.5").replace(",positive", ",4"))
    base = [word for word in small("method=kd", "trainer.max_epochs=1", "preflight=false") if not word.startswith("task")]
    tasks = [f"+task@task.of.{name}=file" for name in ("a", "b")]
    folders = {"a": reviews, "b": tmp_path}
    files = [f"task.of.{n}.{part}={of}/{part}.csv" for n, of in folders.items() for part in ("train", "validation", "test")]
    more = ["task.of.a.max_length=32", "task.of.b.max_length=32", "task.of.b.limit_validation=20"]
    scores = [f"task.of.b.{word}" for word in ("kind=regression", "labels=null", "metrics=[pearson,mse]", "monitor=pearson")]
    run, record = made([*base, "task=mixture", *tasks, *files, *more, *scores, "task.monitor=mean"])
    found = probed(tmp_path / "out", run.directory, "--examples", 16, "--train-examples", 20, "--part-examples", 16)
    assert [case["about"]["task"] for case in found["cases"]] == ["a", "b"]
    first, second = found["cases"]
    accuracy = record["tasks"]["a"]["metrics"]["validation"]["accuracy"]
    assert value(first, "score.accuracy") == pytest.approx(accuracy)
    assert list(first["probes"]) == list(first["ablation"]) == ["teacher", "student"]
    assert second["differences"]["n"] == 20
    of_task = record["tasks"]["b"]
    assert value(second, "score.pearson") == pytest.approx(of_task["metrics"]["validation"]["pearson"], rel=1e-5)
    assert value(second, "agreement") == pytest.approx(of_task["agreement"]["validation"]["minilm"], rel=1e-4)
    assert second["absent"] == {"probes": "the probes are classifiers, and the task has scores"}
    assert set(second["differences"]["absent"]) == {"retention.mse", "classes", "slices"}
    assert second["ablation"]["student"]["metric"] == "pearson"
    assert list(second["cka"]) == list(second["attention"]) == ["student"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere",), "'nowhere' is not the directory of a finished run: there is no such folder"),
        (("--split", "train"), "'train' is not one of validation, test"),
        (("--only", "ckaa"), "'ckaa' is not one of differences, cka, probes, attention, ablation. Did you mean 'cka'?"),
        (("--vectors", "max"), "'max' is not one of mean, cls"),
        (("--examples", "1"), "--examples=1 must be a whole number, at least 2"),
        (("--train-examples", "many"), "--train-examples=many must be"),
        (("--part-examples", "0"), "--part-examples=0 must be"),
        (("task.limit_validation=3",), "would change what the runs are of"),
        (("--teacher", "nowhere"), "'nowhere' is not the directory"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    words: tuple[str, ...],
    message: str,
    seeds: list[tuple[Run, dict]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(monkeypatch, capsys, seeds[0][0].directory, *words)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_finished_run_is_refused_with_what_to_do(
    seeds: list[tuple[Run, dict]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    directory = copied(seeds[0][0], tmp_path / "runs")
    assert f"is a folder of runs; name runs in it, such as {tmp_path / 'runs'}" in refused(
        monkeypatch, capsys, tmp_path / "runs"
    )
    record = directory / "result.json"
    record.write_text(record.read_text().replace('"seed"', '"sed"'))
    assert f"result.json of '{directory}' is damaged" in refused(monkeypatch, capsys, directory)
    record.unlink()
    assert f"the run '{directory}' is not finished: its command continues it" in refused(monkeypatch, capsys, directory)
    (tmp_path / "empty").mkdir()
    assert "there is no result.json in it" in refused(monkeypatch, capsys, tmp_path / "empty")


def test_a_run_without_a_teacher_takes_one_and_is_its_own_control(
    control: Run,
    seeds: list[tuple[Run, dict]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "has no teacher to compare its student with; --teacher" in refused(monkeypatch, capsys, control.directory)
    teacher = seeds[0][0].inputs.teachers["minilm"]
    (case,) = probed(tmp_path / "out", control.directory, "--teacher", teacher.directory, *QUICK)["cases"]
    assert case["about"]["without_control"] == "the run is fine-tuning, which is the control of other runs"
    (other,) = probed(tmp_path / "out", seeds[0][0].directory, *QUICK)["cases"]
    for name in ("agreement", "lost", "kl"):
        assert value(case, name) == value(other, name, "control")


def test_a_damaged_configuration_is_refused(
    seeds: list[tuple[Run, dict]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    directory = copied(seeds[0][0], tmp_path / "runs")
    whole = (directory / "config.yaml").read_text()
    mark = tmp_path / "mark"
    for text, message in {
        "a: [": "is not YAML",
        "- a": "is not the configuration of a run",
        f"a: !!python/object/apply:os.mkdir [{mark}]": "is not YAML",
        whole.replace("max_length: 32", "max_length: many"): "task.max_length",
    }.items():
        (directory / "config.yaml").write_text(text)
        assert message in refused(monkeypatch, capsys, directory, *QUICK)
    assert not mark.exists()
    (directory / "config.yaml").unlink()
    assert "cannot be read: No such file" in refused(monkeypatch, capsys, directory, *QUICK)
    (directory / "config.yaml").write_text(whole)
    record = read_record(directory / "result.json")
    write_record(directory / "result.json", {**record, "labels": ["positive", "negative"]})
    assert "the classes of" in refused(monkeypatch, capsys, directory, *QUICK)


def test_a_changed_export_is_refused(
    seeds: list[tuple[Run, dict]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    directory = copied(seeds[0][0], tmp_path / "runs")
    config = directory / "student" / "config.json"
    config.write_text(config.read_text() + " ")
    assert "is a finished run whose model is not as it was written" in refused(monkeypatch, capsys, directory, "--only", "cka")


def test_what_is_computed_of_a_teacher_is_computed_once(
    seeds: list[tuple[Run, dict]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[str] = []
    original = analysis.ablated_logits

    def counting(model: Any, *given: Any) -> Any:
        calls.append(model.name)
        return original(model, *given)

    monkeypatch.setattr(analysis, "ablated_logits", counting)
    probed(tmp_path / "out", *(run.directory for run, _ in seeds), "--only", "ablation", "--part-examples", 4)
    assert len(calls) == len(set(calls))
    assert sum("full" in name for name in calls) == 1


def test_masked_language_models_are_refused(
    seeds: list[tuple[Run, dict]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    directory = copied(seeds[0][0], tmp_path / "runs")
    config = OmegaConf.load(directory / "config.yaml")
    config.task = compose(["task=imdb_text"]).task
    OmegaConf.save(config, directory / "config.yaml")
    assert "trains a masked language model" in refused(monkeypatch, capsys, directory)


def test_a_command_names_a_run() -> None:
    with pytest.raises(InputError, match="name the directory of a finished run"):
        split_words(["paths.glue=somewhere"], "kd-probe")
    run = Path("runs/a")
    assert split_words(["runs/a", "paths.glue=b", "runs/a"], "kd-probe") == ([run], ["paths.glue=b"])
