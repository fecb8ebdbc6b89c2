"""kd-export on whole runs: the folder, its figures, the gate, students that are not plain, and what is refused."""

import csv
import errno
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import kd.deploy.export
from conftest import GOOD, sentence, tiny_model
from kd.deploy import exporters
from kd.deploy.check import random_batch
from kd.deploy.folder import read_folder, why_none
from kd.deploy.source import named_students, student_of, text_columns
from kd.errors import InputError
from kd.results.predictions import read_predictions
from kd.runs.run import Run, read_record
from whole_runs import Small, made

Ends = Callable[..., Any]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def raw_logits(file: Path, folder: Path, texts: list[str], length: int) -> np.ndarray:
    """Logits of an ONNX file by onnxruntime and transformers' tokenizer, one text at a time."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for text in texts:
        inputs = tokenizer(text, truncation=True, max_length=length, return_tensors="np")
        given = {one.name: inputs[one.name].astype(np.int64) for one in session.get_inputs()}
        found.append(session.run(["logits"], given)[0][0])
    return np.stack(found)


def test_the_folder_has_the_layout_of_the_hub(exported: Path, finished: Run) -> None:
    files = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    assert files == {
        "README.md",
        "config.json",
        "deployment.json",
        "model.safetensors",
        "onnx/model.onnx",
        "onnx/model_quantized.onnx",
        "openvino/openvino_model.bin",
        "openvino/openvino_model.xml",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert not list(exported.parent.glob("*.part*")), "drafts are left"
    inputs = AutoTokenizer.from_pretrained(exported)("a fine film", return_tensors="pt")
    one, other = (AutoModelForSequenceClassification.from_pretrained(path).eval() for path in (exported, finished.student))
    assert torch.equal(one(**inputs).logits, other(**inputs).logits)
    assert one.config.id2label == {0: "negative", 1: "positive"}


def test_figures_of_the_record_and_the_card_are_those_of_the_files(exported: Path, finished: Run, reviews: Path) -> None:
    record = json.loads((exported / "deployment.json").read_text())
    examples = rows_of(reviews / "validation.csv")
    labels = np.array([row["label"] == "positive" for row in examples])
    card = (exported / "README.md").read_text()
    for name, file in {"onnx": "model.onnx", "int8": "model_quantized.onnx"}.items():
        logits = raw_logits(exported / "onnx" / file, exported, [row["text"] for row in examples], 32)
        accuracy = float((logits.argmax(1) == labels).mean())
        about = record["files"][name]
        # int8 scales activations by batch, so that single texts may differ by an example
        assert about["check"]["value"] == pytest.approx(accuracy, abs=1e-12 if name == "onnx" else 2 / 32)
        assert about["check"]["torch"] == finished.metrics["validation"]["accuracy"]
        assert about["check"]["drop"] == pytest.approx(100 * (about["check"]["torch"] - about["check"]["value"]))
        assert about["check"]["examples"] == 32
        assert [shape["batch"] for shape in about["check"]["shapes"]] == [1, 1, 3, 32]
        (size,) = (entry["bytes"] for entry in about["files"].values())
        assert size == (exported / "onnx" / file).stat().st_size
        row = next(line for line in card.splitlines() if line.startswith(f"| `onnx/{file}`"))
        apart = " / ".join(f"{shape['difference']:.1e}" for shape in about["check"]["shapes"])
        assert f"| {apart} | {100 * about['check']['value']:.1f} % | {about['check']['drop']:.2f} |" in row
    assert max(shape["difference"] for shape in record["files"]["onnx"]["check"]["shapes"]) < 1e-5
    assert (record["text"], record["max_length"], record["labels"]) == (["text"], 32, ["negative", "positive"])
    assert "## Lineage" in card, "the run's card is kept"


def test_logits_of_onnx_are_those_that_the_run_stored(exported: Path, finished: Run, reviews: Path) -> None:
    texts = [row["text"] for row in rows_of(reviews / "test.csv")]
    stored = read_predictions(finished.directory).splits["test"].students["student"]
    assert np.abs(raw_logits(exported / "onnx" / "model.onnx", exported, texts, 32) - stored).max() < 1e-4


def of_another_model(onnx: Path, path: Path) -> None:
    """Write a file whose model knows nothing, in place of int8."""
    model = tiny_model(seed=5, layers=2)
    exporters.write_onnx(
        model, dict(random_batch(("input_ids", "token_type_ids", "attention_mask"), model.config, 2, 16)), path
    )


def test_a_missed_gate_ends_with_1_and_keeps_the_file_aside(
    finished: Run, tmp_path: Path, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "student"
    with monkeypatch.context() as patch:
        patch.setattr(exporters, "write_int8", of_another_model)
        ended = ends(kd.deploy.export, finished.directory, "--out", out)
    assert ended.status == 1
    assert "more than --max-drop 0.5" in ended.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student", "student.rejected"]
    aside = tmp_path / "student.rejected"
    figures = json.loads((aside / "figures.json").read_text())["files"]["int8"]
    assert (aside / "onnx" / "model_quantized.onnx").is_file()
    assert figures["check"]["drop"] > 0.5
    assert figures["why"]
    assert sorted(read_folder(out).files) == ["onnx", "torch"]
    assert not (out / "onnx" / "model_quantized.onnx").exists()
    assert "Not in this folder: ONNX, int8" in (out / "README.md").read_text()
    ended = ends(kd.deploy.export, finished.directory, "--out", out, "--formats", "torch")
    assert ended.status == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student"], "an export that passes removes what was aside"


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_without_a_file_that_passes_no_folder_is_written_and_an_earlier_one_stays(
    finished: Run, exported: Path, tmp_path: Path, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporters, "write_int8", of_another_model)
    out = tmp_path / "student"
    for earlier in (False, True):
        if earlier:
            shutil.copytree(exported, out)
        ended = ends(kd.deploy.export, finished.directory, "--out", out, "--formats", "int8")
        assert ended.status == 1
        assert str(out) not in ended.output.splitlines(), "a folder is named that was not written"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["student"] * earlier + ["student.rejected"]
    assert content(out) == content(exported)


def test_a_wrong_mask_misses_the_gate_although_the_metric_is_kept(
    finished: Run, tmp_path: Path, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = exporters.Logits.forward

    def shifted(self: exporters.Logits, *inputs: torch.Tensor) -> torch.Tensor:
        return forward(self, *inputs) + 0.01

    monkeypatch.setattr(exporters.Logits, "forward", shifted)
    ended = ends(kd.deploy.export, finished.directory, "--out", tmp_path / "student", "--formats", "torch,onnx")
    assert ended.status == 1
    assert "logits differ from torch's by 0.01" in ended.output
    assert list(read_folder(tmp_path / "student").files) == ["torch"], "the others are written"


def write_pairs(path: Path, count: int, seed: int) -> None:
    generator = random.Random(seed)
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["one", "two", "score"])
        for _ in range(count):
            table.writerow([sentence(generator, GOOD), sentence(generator, GOOD), round(generator.random() * 5, 2)])


@pytest.fixture(scope="module")
def pairs(small: Small, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A regression of pairs, by a student with a small, factorised table of embeddings and shared layers; and its data."""
    folder = tmp_path_factory.mktemp("pairs")
    for seed, (split, count) in enumerate({"train": 64, "validation": 24}.items()):
        write_pairs(folder / f"{split}.csv", count, seed)
    words = [f"task.{split}={folder / split}.csv" for split in ("train", "validation")]
    of_scores = ["task.kind=regression", "task.metrics=[pearson,mse]", "task.monitor=mse", "task.text=[one,two]"]
    own = ["task.label=score", "task.test=null", "surgery=[cut_vocabulary,factorized,sps]", "surgery.factorized.rank=8"]
    run, _ = made(small("method=finetune", "teacher=[]", *words, *of_scores, *own))
    return run, folder


def test_a_regression_of_pairs_with_shared_layers_and_small_embeddings(
    pairs: tuple[Run, Path], tmp_path: Path, ends: Ends
) -> None:
    run, _ = pairs
    out = tmp_path / "student"
    ended = ends(kd.deploy.export, run.directory, "--out", out, "--formats", "onnx,int8", "--max-drop", 20)
    assert ended.status == 0, ended.errors
    record = json.loads((out / "deployment.json").read_text())
    assert (record["text"], record["labels"]) == (["one", "two"], None)
    checks = {name: about["check"] for name, about in record["files"].items()}
    assert list(checks) == ["onnx", "int8"]
    assert {check["metric"] for check in checks.values()} == {"mse"}
    assert checks["onnx"]["value"] == pytest.approx(run.metrics["validation"]["mse"], rel=1e-4)
    assert not (out / "model.safetensors").exists()


def test_one_of_several_students_is_chosen_by_its_name(small: Small, tmp_path: Path, ends: Ends) -> None:
    run, record = made(small("method=dml", "cohort.students=2", "trainer.max_epochs=1", "task.limit_train=32"))
    ended = ends(kd.deploy.export, run.directory, "--out", tmp_path / "x")
    names = ", ".join(record["students"])
    assert ended.status == 2
    assert f"has several students; choose --student from {names}" in ended.errors
    other = next(name for name in record["students"] if name != record["headline"])
    ended = ends(kd.deploy.export, run.directory, "--student", other, "--out", tmp_path / "x", "--formats", "onnx")
    assert ended.status == 0, ended.errors
    value = json.loads((tmp_path / "x" / "deployment.json").read_text())["files"]["onnx"]["check"]["value"]
    assert value == record["students"][other]["metrics"]["validation"]["accuracy"]
    ended = ends(kd.deploy.export, run.directory, "--student", "none", "--out", tmp_path / "y")
    assert f"has no student 'none', but {names}" in ended.errors


def test_students_of_mixtures_are_named_by_their_task() -> None:
    def task(member: str | None, *students: str) -> Any:
        return SimpleNamespace(member=member, students=list(students))

    assert list(named_students([task(None, "student")])) == ["student"]
    assert list(named_students([task(None, "a", "b")])) == ["a", "b"]
    assert list(named_students([task("sst2", "student"), task("rte", "student")])) == ["sst2", "rte"]
    assert list(named_students([task("sst2", "a", "b"), task("rte", "a", "b")])) == ["sst2/a", "sst2/b", "rte/a", "rte/b"]


def test_columns_of_glue_are_those_of_the_files_that_were_read() -> None:
    def task(**source: Any) -> Any:
        return SimpleNamespace(text=["question1", "question2"], source=source)

    assert text_columns(task(root="glue", local_text=["a", "b"])) == ["a", "b"]
    assert text_columns(task(root=None, local_text=["a", "b"])) == ["question1", "question2"]
    assert text_columns(task(root="glue")) == ["question1", "question2"]
    assert text_columns(task()) == ["question1", "question2"]


# What is refused


@pytest.fixture
def bare(finished: Run, tmp_path: Path) -> Path:
    """A copy of the run without its student, as trainer.keep=figures leaves it."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.yaml", "result.json"):
        (folder / name).write_bytes((finished.directory / name).read_bytes())
    return folder


def test_a_run_without_a_student_is_refused(bare: Path, tmp_path: Path, ends: Ends) -> None:
    ended = ends(kd.deploy.export, bare, "--out", tmp_path / "x")
    assert (ended.status, ended.errors.count("has no exported student")) == (2, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare"]


def test_folders_of_something_else_are_named(tmp_path: Path, finished: Run, exported: Path, ends: Ends) -> None:
    cases = {"tf_model.h5": "TensorFlow", "modules.json": "sentence-transformers", "config.json": "transformers", "a.txt": "no"}
    for file, framework in cases.items():
        folder = tmp_path / framework
        folder.mkdir()
        (folder / file).write_text("{}")
        ended = ends(kd.deploy.export, folder, "--out", tmp_path / "x")
        assert ended.status == 2
        assert framework in ended.errors
        assert "Traceback" not in ended.errors
    for folder, words in {
        tmp_path / "missing": "there is no such folder",
        finished.student: f"name the run that it is of: {finished.directory}",
        exported: "is an exported folder; name the run that it was made from",
        finished.directory.parent: "is a folder of runs",
    }.items():
        ended = ends(kd.deploy.export, folder, "--out", tmp_path / "x")
        assert ended.status == 2
        assert words in ended.errors
    assert not (tmp_path / "x").exists()
    assert "no such folder" in why_none(tmp_path / "missing")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--formats", "onnx,tflite"], "'tflite' is not one of torch, onnx, int8, openvino"),
        (["--formats", ""], "is not one of torch"),
        (["--max-drop", "-1"], "--max-drop=-1 must be a number of points from 0"),
        (["--max-drop", "nan"], "--max-drop=nan must be"),
        (["--exporter", "optimum"], "'optimum' is not one of torchscript, dynamo"),
        (["task.limit_validation=3"], "kd-export takes paths.glue=<folder> alone"),
        (["other"], "name one run, not 2"),
        (["--out", "."], "'.' must be a folder with a name"),
    ],
)
def test_options_that_there_are_not(words: list[str], message: str, finished: Run, tmp_path: Path, ends: Ends) -> None:
    ended = ends(kd.deploy.export, finished.directory, "--out", tmp_path / "x", *words)
    assert ended.status == 2
    assert message in ended.errors
    assert not list(tmp_path.iterdir())


def test_a_refused_operator_leaves_nothing_and_an_earlier_export_as_it_was(
    finished: Run, tmp_path: Path, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x"
    assert ends(kd.deploy.export, finished.directory, "--out", out, "--formats", "torch").status == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    forward = exporters.Logits.forward

    def refused(self: exporters.Logits, *inputs: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvalsh(forward(self, *inputs)[:, :1, None])

    monkeypatch.setattr(exporters.Logits, "forward", refused)
    (tmp_path / "x.part").write_text("of the user")
    for target in (out, tmp_path / "new" / "folder" / "x"):
        ended = ends(kd.deploy.export, finished.directory, "--out", target)
        assert ended.status == 2
        assert "torch.onnx (torchscript) does not export this model" in ended.errors
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "x.part"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_and_an_interrupt_leave_nothing(
    error: BaseException, finished: Run, tmp_path: Path, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise error

    monkeypatch.setattr(exporters, "write_onnx", stopped)
    ended = ends(kd.deploy.export, finished.directory, "--out", tmp_path / "x")
    if isinstance(error, OSError):
        assert (ended.status, "the disk is full" in ended.errors, "change: --out" in ended.errors) == (2, True, True)
    else:
        assert (ended.status, ended.errors.splitlines()[-1]) == (130, "kd-export: interrupted")
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_not_replaced(finished: Run, tmp_path: Path, ends: Ends) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine.txt").write_text("mine")
    ended = ends(kd.deploy.export, finished.directory, "--out", tmp_path / "x")
    assert ended.status == 2
    assert "no folder that kd-export wrote: it is not replaced" in ended.errors
    assert (tmp_path / "x" / "mine.txt").read_text() == "mine"
    (tmp_path / "y.rejected").symlink_to(tmp_path / "x")
    ended = ends(kd.deploy.export, finished.directory, "--out", tmp_path / "y")
    assert "none of kd-export's: it is not replaced" in ended.errors


def test_other_data_than_the_runs_are_refused(finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kd.deploy.export import check_data

    student = student_of(finished.directory)
    recorded = read_record(finished.directory / "result.json")["metrics"]["validation"]["accuracy"]
    check_data(student, "accuracy", recorded)
    check_data(student, "accuracy", recorded + 0.004)
    with pytest.raises(InputError, match="these are other data than the run's"):
        check_data(student, "accuracy", recorded - 0.04)


def test_a_changed_student_is_refused(bare: Path, finished: Run, tmp_path: Path, ends: Ends) -> None:
    (bare / "student").mkdir()
    for file in finished.student.iterdir():
        (bare / "student" / file.name).write_bytes(file.read_bytes())
    weights = bare / "student" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    ended = ends(kd.deploy.export, bare, "--out", tmp_path / "x")
    assert ended.status == 2
    assert "is not as its run wrote it" in ended.errors
