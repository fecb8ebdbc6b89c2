"""Submissions to GLUE's server: which run predicts what, in which words, and what is refused."""

import csv
import random
import shutil
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from conftest import BAD, FILLER, GOOD, sentence
from kd.data import glue_server
from kd.data.glue_server import SERVER_FILES, ServerFile, unlabelled_texts
from kd.errors import InputError
from kd.results import submission
from kd.results.candidates import Candidate, best
from kd.results.submission import write_submission
from kd.runs.run import Run, write_record
from whole_runs import Small, made

SIZES = {file.name: 12 + number for number, file in enumerate(SERVER_FILES)}
"""Numbers of examples of the test sets here, which differ."""

COLUMNS = {
    "CoLA": ("sentence",),
    "SST-2": ("sentence",),
    "MRPC": ("#1 String", "#2 String"),
    "STS-B": ("sentence1", "sentence2"),
    "QQP": ("question1", "question2"),
    "MNLI": ("sentence1", "sentence2"),
    "QNLI": ("question", "sentence"),
    "RTE": ("sentence1", "sentence2"),
    "WNLI": ("sentence1", "sentence2"),
}
"""Text columns in GLUE's files."""

LABELS = {
    "CoLA": ("label", "01"),
    "SST-2": ("label", "01"),
    "MRPC": ("Quality", "01"),
    "STS-B": ("score", ("0.5", "4.75")),
    "QQP": ("is_duplicate", "01"),
    "MNLI": ("gold_label", ("contradiction", "entailment", "neutral")),
    "QNLI": ("label", ("not_entailment", "entailment")),
    "RTE": ("label", ("not_entailment", "entailment")),
    "WNLI": ("label", "01"),
}
"""Label column, and labels."""


def write_tsv(path: Path, header: list[str], rows: list[list[str]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in [header, *rows] if row))


def words(generator: random.Random, columns: int, good: bool) -> list[str]:
    """Texts of several lengths, so that batches by length are not in the order of the file."""
    return [sentence(generator, GOOD if good else BAD) for _ in range(columns)]


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of GLUE's TSV files, laid out as GLUE's."""
    root, generator = tmp_path_factory.mktemp("glue"), random.Random(0)
    for task, columns in COLUMNS.items():
        name, labels = LABELS[task]
        for split in ("train", *(("dev_matched", "dev_mismatched") if task == "MNLI" else ("dev",))):
            rows = [[*words(generator, len(columns), n % len(labels) == 1), labels[n % len(labels)]] for n in range(18)]
            if task == "CoLA":  # without a header, and with two columns more
                write_tsv(root / task / f"{split}.tsv", [], [["gj04", label, "", text] for text, label in rows])
            else:
                write_tsv(root / task / f"{split}.tsv", [*columns, name], rows)
    for file in SERVER_FILES:
        columns = COLUMNS[file.task]
        rows = [[str(n), *words(generator, len(columns), n % 3 == 0)] for n in range(SIZES[file.name])]
        write_tsv(root / file.paths[0], ["id" if file.task == "QQP" else "index", *columns], rows)
    return root


@pytest.fixture(autouse=True)
def _few_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    files = tuple(replace(file, examples=SIZES[file.name]) for file in SERVER_FILES)
    monkeypatch.setattr(submission, "SERVER_FILES", files)


Maker = Callable[..., Run]


@pytest.fixture(scope="module")
def run_of(glue: Path, backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Finished runs of tasks, each made once: `run_of("rte", "seed=1")`."""
    runs = tmp_path_factory.mktemp("runs")

    def run(*given: str) -> Run:
        tasks = [word for word in given if "=" not in word]
        task = f"task=[{','.join(tasks)}]" if len(tasks) > 1 else f"task={tasks[0]}"
        lengths = [f"task.of.{name}.max_length=32" for name in tasks] if len(tasks) > 1 else ["task.max_length=32"]
        settings = ["method=finetune", "teacher=[]", "student=2l", f"backbone={backbone}", "trainer.max_epochs=1"]
        machine = [f"paths.runs={runs}", f"paths.glue={glue}", "trainer.progress=none"]
        more = [word for word in given if "=" in word]
        return made([*settings, *machine, "trainer.batch_size=6", "optimizer.lr=2e-3", task, *lengths, *more])[0]

    return run


TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")


@pytest.fixture(scope="module")
def mixture(run_of: Maker) -> Run:
    """A mixture of all tasks, which predicts every file."""
    return run_of(*TASKS, "trainer.max_epochs=6")


def read(path: Path) -> dict[str, list[list[str]]]:
    """The rows of each file of an archive."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name).decode() for name in archive.namelist()}
    return {name: list(csv.reader(text.splitlines(), delimiter="\t")) for name, text in contents.items()}


NAMES = "CoLA SST-2 MRPC STS-B QQP MNLI-m MNLI-mm QNLI RTE WNLI AX".split()
WORDS = {
    **{name: {"0", "1"} for name in ("CoLA", "SST-2", "MRPC", "QQP", "WNLI")},
    **{name: {"entailment", "not_entailment"} for name in ("QNLI", "RTE")},
    **{name: {"entailment", "neutral", "contradiction"} for name in ("MNLI-m", "MNLI-mm", "AX")},
}


def expected(folder: Path, file: ServerFile, glue: Path, words: dict[str, str]) -> list[str]:
    """Predictions of an exported student, one example after the other, by transformers alone."""
    with (glue / file.paths[0]).open(newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    model, tokenizer = (auto.from_pretrained(folder) for auto in (AutoModelForSequenceClassification, AutoTokenizer))
    found = []
    for row in rows:
        with torch.no_grad():
            texts = [row[column] for column in COLUMNS[file.task]]
            (logits,) = model.eval()(**tokenizer(*texts, return_tensors="pt")).logits
        name = model.config.id2label[int(logits.argmax())]
        found.append(words.get(name, name) if file.words else f"{min(max(float(logits), 0), 5):.3f}")
    return found


CODES = {
    "CoLA": {"unacceptable": "0", "acceptable": "1"},
    "SST-2": {"negative": "0", "positive": "1"},
    "MRPC": {"not_equivalent": "0", "equivalent": "1"},
    "QQP": {"not_duplicate": "0", "duplicate": "1"},
    "WNLI": {"not_entailment": "0", "entailment": "1"},
}


def test_archive_has_every_file_with_the_predictions_of_its_student(
    mixture: Run, glue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    entries = write_submission(tmp_path / "a.zip", [mixture.directory], str(glue))
    files = read(tmp_path / "a.zip")
    assert list(files) == [f"{name}.tsv" for name in NAMES]
    folders = {"CoLA": "cola", "SST-2": "sst2", "STS-B": "stsb"}
    varied = set()
    for file in SERVER_FILES:
        header, *rows = files[file.name]
        assert header == ["index", "prediction"]
        assert [number for number, _ in rows] == [str(number) for number in range(SIZES[file.name])]
        given = [word for _, word in rows]
        stem = file.name.removesuffix(".tsv")
        assert set(given) <= WORDS.get(stem, set(given))
        task = folders.get(file.task, file.task.lower())
        assert given == expected(mixture.directory / "student" / task, file, glue, CODES.get(file.task, {})), file.name
        varied |= {file.name} if len(set(given)) > 1 else set()
    assert len(varied) > 5, "otherwise any order would do"
    assert [entry.run for entry in entries] == [mixture.directory] * 11
    assert [entry.validation for entry in entries[:2]] == [
        mixture.result["tasks"]["cola"]["metrics"]["validation"]["matthews_corrcoef"],
        mixture.result["tasks"]["sst2"]["metrics"]["validation"]["accuracy"],
    ]
    out = capsys.readouterr().out
    assert f"RTE.tsv: {mixture.name}, accuracy" in out
    assert "FILLED" not in out


def test_equal_predictions_make_equal_archives(mixture: Run, glue: Path, tmp_path: Path) -> None:
    for name in "ab":
        write_submission(tmp_path / f"{name}.zip", [mixture.directory], str(glue))
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "b.zip"]


def test_best_run_on_validation_predicts(run_of: Maker, mixture: Run, glue: Path, tmp_path: Path) -> None:
    run, folders = run_of("rte", "optimizer.lr=1e-5"), []
    for value in (0.125, 0.9375, 0.25):
        folders.append(shutil.copytree(run.directory, tmp_path / str(value), ignore=shutil.ignore_patterns("checkpoints")))
        record = run.result
        record["metrics"]["validation"]["accuracy"] = value
        write_record(folders[-1] / "result.json", record)
    entries = {entry.file: entry for entry in write_submission(tmp_path / "a.zip", [mixture.directory, *folders], str(glue))}
    rte, wnli = entries["RTE.tsv"], entries["WNLI.tsv"]
    assert (rte.run, rte.metric, rte.validation, rte.candidates) == (folders[1], "accuracy", 0.9375, 4)
    assert (wnli.run, wnli.candidates) == (mixture.directory, 1)


def candidate(name: str, value: float | None, monitor: str = "accuracy", examples: int = 18) -> Candidate:
    identity = {"task": {"monitor": monitor}, "data": {"_target_": "Glue", "folder": "RTE"}}
    record = {"identity": identity, "metrics": {"validation": {monitor: value}}, "examples": {"validation": examples}}
    return Candidate(Path(name), record)


def test_choice_is_by_the_monitored_metric_and_among_equals_the_first() -> None:
    assert best([candidate("a", 0.5), candidate("b", 0.75), candidate("c", 0.75), candidate("d", None)]).directory == Path("b")
    assert best([candidate("a", None), candidate("b", -0.5)]).directory == Path("b")
    assert best([candidate("a", 0.5, "mse"), candidate("b", 0.25, "mse")]).directory == Path("b")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (candidate("b", 0.9, "f1"), "'a' and 'b' cannot be compared on validation: the metric is accuracy and f1"),
        (candidate("b", 0.9, examples=9), "the number of examples is 18 and 9; give one run of RTE"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(other: Candidate, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        best([candidate("a", 0.5), other])
    assert caught.value.key == "runs"


def test_task_without_a_run_is_named_or_filled_if_asked_for(
    run_of: Maker, glue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of("rte", "optimizer.lr=1e-5")
    with pytest.raises(InputError, match="cannot be predicted") as caught:
        write_submission(tmp_path / "a.zip", [run.directory], str(glue))
    assert caught.value.key == "fill"
    lacking = [f"{name}.tsv" for name in NAMES if name != "RTE"]
    assert all(f"{name} (no run of" in caught.value.message for name in lacking)
    assert "RTE.tsv" not in caught.value.message
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="'mean' is not one of majority"):
        write_submission(tmp_path / "a.zip", [run.directory], str(glue), fill="mean")
    capsys.readouterr()
    entries = write_submission(tmp_path / "a.zip", [run.directory], str(glue), fill="majority")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"RTE.tsv: {run.name}")
    assert [line.partition(": FILLED")[0] for line in lines[1:]] == lacking
    assert {entry.file for entry in entries if entry.run is None} == set(lacking)
    files = read(tmp_path / "a.zip")
    assert {name: len(rows) - 1 for name, rows in files.items()} == SIZES
    assert {word for _, word in files["WNLI.tsv"][1:]} == {"0"}
    assert {word for _, word in files["STS-B.tsv"][1:]} == {"2.701"}


def test_test_set_that_the_folder_lacks_is_named(mixture: Run, glue: Path, tmp_path: Path) -> None:
    root = shutil.copytree(glue, tmp_path / "glue")
    (root / "diagnostic" / "diagnostic.tsv").unlink()
    with pytest.raises(InputError, match=r"AX.tsv \(no 'diagnostic/diagnostic.tsv' in '.*glue'\)\. ") as caught:
        write_submission(tmp_path / "a.zip", [mixture.directory], str(root))
    assert caught.value.message.count(".tsv (") == 1
    entries = write_submission(tmp_path / "a.zip", [mixture.directory], str(root), fill="majority")
    assert [entry.file for entry in entries if entry.run is None] == ["AX.tsv"]
    shutil.copy(glue / "diagnostic" / "diagnostic.tsv", root / "AX.tsv")  # as the page of the benchmark names it
    assert all(entry.run for entry in write_submission(tmp_path / "a.zip", [mixture.directory], str(root)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:-1], r"RTE/test.tsv' has 19 examples, and GLUE's server takes RTE.tsv with 20"),
        (lambda lines: [*lines, f"{len(lines) - 1}\ta\tb"], "has 21 examples"),
        (lambda lines: [lines[0], *lines[:0:-1]], "line 2: index is '19' where a test set, numbered from 0, has 0"),
        (lambda lines: ["index\tpremise\thypothesis", *lines[1:]], "no column 'sentence1'"),
    ],
)
def test_other_test_set_is_refused(
    change: Callable[[list[str]], list[str]], message: str, mixture: Run, glue: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(glue, tmp_path / "glue")
    file = root / "RTE" / "test.tsv"
    file.write_text("\n".join(change(file.read_text().splitlines())) + "\n")
    with pytest.raises(InputError, match=message):
        write_submission(tmp_path / "a.zip", [mixture.directory], str(root))
    assert not (tmp_path / "a.zip").exists()


def test_what_is_no_finished_run_of_glue_is_refused(mixture: Run, small: Small, glue: Path, tmp_path: Path) -> None:
    other, _ = made(small("method=finetune", "teacher=[]"))
    for runs, message in {
        (tmp_path,): "is not the directory of a finished run",
        (mixture.directory, other.directory): f"the record of '{other.directory}' names no task of GLUE, but 'file'",
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            write_submission(tmp_path / "a.zip", runs, str(glue), fill="majority")
        assert caught.value.key == "runs"


def test_damaged_student_is_refused(mixture: Run, glue: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(mixture.directory, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    weights = copy / "student" / "qnli" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match=r"student/qnli' is not as its run wrote it: .* is damaged") as caught:
        write_submission(tmp_path / "a.zip", [copy], str(glue))
    assert caught.value.key == "runs"


def test_classes_are_matched_by_name_and_others_are_refused(run_of: Maker, glue: Path, tmp_path: Path) -> None:
    run = run_of("rte", "task.labels=[other,same]", "+task.codes={entailment: same,not_entailment: other}")
    write_submission(tmp_path / "a.zip", [run.directory], str(glue), fill="majority")
    assert {word for _, word in read(tmp_path / "a.zip")["RTE.tsv"][1:]} <= WORDS["RTE"]
    files, one = {file.name: file for file in SERVER_FILES}, Candidate(run.directory, run.result)
    assert submission.words_of(files["RTE.tsv"], one) == ["not_entailment", "entailment"]
    for name, words in {"STS-B.tsv": "scores", "AX.tsv": "entailment, neutral, contradiction", "WNLI.tsv": "0, 1"}.items():
        with pytest.raises(InputError, match=f"are other, same, and {name} takes {words}") as caught:
            submission.words_of(files[name], one)
        assert caught.value.key == "runs"


def test_scores_are_clipped_and_have_three_decimals(mixture: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = np.array([[-0.25], [2.34567], [7.0]], dtype=np.float32)
    monkeypatch.setattr(submission, "logits_over", lambda *_: logits)
    stsb = Candidate(mixture.directory, mixture.result["tasks"]["stsb"])
    assert submission.predicted(stsb, None, [], torch.device("cpu")) == ["0.000", "2.346", "5.000"]


def test_archive_that_cannot_be_written_names_the_path(mixture: Run, glue: Path, tmp_path: Path) -> None:
    (tmp_path / "b.zip").mkdir()
    for path in (tmp_path / "missing" / "a.zip", tmp_path / "b.zip"):
        with pytest.raises(InputError, match=r"no folder|cannot write") as caught:
            write_submission(path, [mixture.directory], str(glue))
        assert caught.value.key == "path"


def test_sizes_are_those_of_glue() -> None:
    """Counts of the data set nyu-mll/glue on the hub."""
    sizes = dict(zip(NAMES, (1063, 1821, 1725, 1379, 390965, 9796, 9847, 5463, 3000, 146, 1104), strict=True))
    assert {file.name: file.examples for file in glue_server.SERVER_FILES} == {f"{n}.tsv": size for n, size in sizes.items()}
    assert all(file.constant in file.words for file in SERVER_FILES if file.words)


def test_test_sets_of_the_hub_are_read_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    module, asked = ModuleType("datasets"), []
    rows = [{"premise": f"a {word}", "hypothesis": word, "label": -1, "idx": n} for n, word in enumerate(FILLER[:4])]

    def load_dataset(*names: str) -> Any:
        asked.append(names)
        return {"test_matched": rows, "test": rows}

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    files = {file.name: replace(file, examples=4) for file in SERVER_FILES}
    for name in ("MNLI-m.tsv", "AX.tsv"):
        texts = unlabelled_texts(files[name], ["premise", "hypothesis"], None)
        assert list(texts) == [(row["premise"], row["hypothesis"]) for row in rows]
    assert asked == [("nyu-mll/glue", "mnli"), ("nyu-mll/glue", "ax")]
    for file, columns, message in (
        (files["MNLI-mm.tsv"], ["premise"], "has no split 'test_mismatched'"),
        (files["AX.tsv"], ["sentence1"], "no column 'sentence1'"),
        (replace(files["AX.tsv"], examples=5), ["premise"], "has 4 examples"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            unlabelled_texts(file, columns, None)
        assert caught.value.key == "paths.glue"
