"""kd-predict: predictions beside those that the run stored, every kind of file, going on, and what is refused."""

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kd.deploy.predict
from conftest import FILLER, GOOD
from kd.data.readers import Layout
from kd.data.texts import Table
from kd.deploy import files
from kd.deploy.files import predict_file
from kd.deploy.folder import FORMATS
from kd.errors import InputError
from kd.results.predictions import read_predictions
from kd.runs.run import Run

Ends = Callable[..., Any]


def table(path: Path, delimiter: str = ",") -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


def stored(finished: Run) -> np.ndarray:
    """Probabilities of the second class that follow from the logits that the run stored for test.csv."""
    logits = read_predictions(finished.directory).splits["test"].students["student"].astype(np.float64)
    return 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))


@pytest.fixture
def texts(reviews: Path) -> list[str]:
    return [row["text"] for row in table(reviews / "test.csv")]


@pytest.mark.parametrize("format", FORMATS)
def test_probabilities_are_those_of_the_run(
    format: str, finished: Run, exported: Path, reviews: Path, tmp_path: Path, ends: Ends
) -> None:
    out = tmp_path / "out.csv"
    ended = ends(kd.deploy.predict, exported, reviews / "test.csv", "--format", format, "--out", out)
    assert ended.status == 0, ended.errors
    rows, expected = table(out), stored(finished)
    assert list(rows[0]) == ["line", "label", "probability_negative", "probability_positive"]
    assert [int(row["line"]) for row in rows] == list(range(2, 34))
    found = np.array([float(row["probability_positive"]) for row in rows])
    assert np.abs(found - expected).max() < (0.1 if format == "int8" else 1e-5)
    assert np.allclose(found + [float(row["probability_negative"]) for row in rows], 1, atol=2e-6)
    assert [row["label"] for row in rows] == ["positive" if value > 0.5 else "negative" for value in found]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv"]


def test_a_run_predicts_as_its_exported_folder_does(
    finished: Run, exported: Path, reviews: Path, tmp_path: Path, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    shutil.copy(reviews / "test.csv", "data")
    ended = ends(kd.deploy.predict, finished.directory, "data/test.csv")
    assert ended.status == 0, ended.errors
    assert ended.output.strip() == "data/test.predictions.csv", "it is not beside the file"
    ends(kd.deploy.predict, exported, "data/test.csv", "--out", "other.csv")
    assert Path("other.csv").read_bytes() == Path("data/test.predictions.csv").read_bytes()


def write(path: Path, texts: list[str], kind: str) -> Path:
    """The texts in a file of a kind, with another column where it has columns."""
    if kind in ("csv", "tsv"):
        with path.open("w", newline="") as file:
            csv.writer(file, delimiter="," if kind == "csv" else "\t").writerows([("id", "text"), *enumerate(texts)])
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts))
    elif kind == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"id": list(range(len(texts))), "text": texts}), path)
    else:
        path.write_text("".join(text + "\n" for text in texts))
    return path


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [("csv", ".tsv"), ("tsv", ".csv"), ("jsonl", ".csv"), ("txt", ".jsonl"), ("parquet", ".jsonl")],
)
def test_every_kind_of_file_gives_the_same(
    kind: str, suffix: str, finished: Run, exported: Path, texts: list[str], tmp_path: Path, ends: Ends
) -> None:
    file, out = write(tmp_path / f"given.{kind}", texts, kind), tmp_path / f"out{suffix}"
    ended = ends(kd.deploy.predict, exported, file, "--format", "onnx", "--out", out)
    assert ended.status == 0, ended.errors
    if suffix == ".jsonl":
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        found = [row["probabilities"]["positive"] for row in rows]
        assert all(row["label"] == max(row["probabilities"], key=row["probabilities"].get) for row in rows)
    else:
        rows = table(out, "\t" if suffix == ".tsv" else ",")
        found = [float(row["probability_positive"]) for row in rows]
    assert np.abs(np.array(found) - stored(finished)).max() < 1e-5
    first = 2 if kind in ("csv", "tsv") else 1
    assert [int(row["line"]) for row in rows] == list(range(first, first + len(texts)))


def test_words_describe_the_file_as_in_training(exported: Path, texts: list[str], tmp_path: Path, ends: Ends) -> None:
    (tmp_path / "a.csv").write_text("\n".join(f"{number};{text}" for number, text in enumerate(texts)))
    words = ["task.delimiter=semicolon", "task.columns=[id,review]", "task.text=[review]"]
    ended = ends(kd.deploy.predict, exported, tmp_path / "a.csv", "--out", tmp_path / "out.csv", *words)
    assert ended.status == 0, ended.errors
    assert len(table(tmp_path / "out.csv")) == len(texts)
    ended = ends(kd.deploy.predict, exported, tmp_path / "a.csv", "--out", tmp_path / "x.csv", "task.seperator=;")
    assert "'task.seperator=;' is not one of task.text=..., task.format=..." in ended.errors
    ended = ends(kd.deploy.predict, exported, tmp_path / "a.csv", "--out", tmp_path / "x.csv", "task.text=[a,b]")
    assert "the texts of 'file' are in one column" in ended.errors


def test_other_encodings_and_lines_with_a_form_are_read_as_in_training(exported: Path, tmp_path: Path, ends: Ends) -> None:
    (tmp_path / "a.txt").write_bytes("a fine film\nthe café is bad\n".encode("latin-1"))
    ended = ends(kd.deploy.predict, exported, tmp_path / "a.txt", "--out", tmp_path / "out.csv")
    assert "line 2: not UTF-8 text; task.encoding=latin-1" in ended.errors
    words = ["task.encoding=latin-1", "--out", tmp_path / "out.csv"]
    ended = ends(kd.deploy.predict, exported, tmp_path / "a.txt", *words)
    assert ended.status == 0, ended.errors
    labels = [(row["line"], row["label"]) for row in table(tmp_path / "out.csv")]
    (tmp_path / "b.dat").write_bytes("LOC:city a fine film\nNUM:count the café is bad\n".encode("latin-1"))
    pattern = r'task.pattern="(?P<label>\w+):\S+ (?P<text>.+)"'
    ended = ends(kd.deploy.predict, exported, tmp_path / "b.dat", "task.encoding=latin-1", pattern)
    assert ended.status == 0, ended.errors
    assert [(row["line"], row["label"]) for row in table(tmp_path / "b.predictions.csv")] == labels
    (tmp_path / "c.dat").write_text("LOC:city a fine film\n\nNUM:count bad\n")
    ended = ends(kd.deploy.predict, exported, tmp_path / "c.dat", pattern)
    assert "line 2: the text is missing" in ended.errors


# Files in pieces


def shares_of(table: Table) -> np.ndarray:
    """Logits that depend on the text alone."""
    good = np.array([sum(word in GOOD for word in text.split()) for (text,) in table.texts], dtype=np.float32)
    return np.stack([1 - good, good], axis=1)


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(files, "AT_ONCE", 5)
    return 5


def predicted(path: Path, out: Path, predict: Callable[[Table], np.ndarray] = shares_of, **identity: object) -> int:
    return predict_file(path, out, ["text"], Layout(), ["no", "yes"], predict, identity, lambda words: None)


def test_a_file_is_read_in_pieces_as_it_is_predicted(
    texts: list[str], tmp_path: Path, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    original = files.pieces_of_file

    def counted(*arguments: Any) -> Iterator[Any]:
        for numbers, values in original(*arguments):
            read.append(len(numbers))
            yield numbers, values

    monkeypatch.setattr(files, "pieces_of_file", counted)
    sizes: list[tuple[int, int]] = []

    def predict(rows: Table) -> np.ndarray:
        sizes.append((len(rows), sum(read)))
        return shares_of(rows)

    assert predicted(write(tmp_path / "a.csv", texts, "csv"), tmp_path / "out.csv", predict) == len(texts) == 32
    # once as a whole before, then piece by piece
    assert sizes == [(5, 37), (5, 42), (5, 47), (5, 52), (5, 57), (5, 62), (2, 64)]


def test_an_error_in_the_last_line_is_found_before_anything_is_predicted(texts: list[str], tmp_path: Path, pieces: int) -> None:
    def never(rows: Table) -> np.ndarray:
        raise AssertionError("predicted")

    with pytest.raises(InputError, match="line 34: 'text' is blank"):
        predicted(write(tmp_path / "a.csv", [*texts, " "], "csv"), tmp_path / "out.csv", never)
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def test_progress_says_how_many_texts_there_are(
    texts: list[str], tmp_path: Path, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(files, "SAY_AFTER", -1.0)
    file = write(tmp_path / "a.csv", texts, "csv")
    predict_file(file, tmp_path / "out.csv", ["text"], Layout(), ["no", "yes"], shares_of, {}, said.append)
    assert [line.split(",")[0].strip() for line in said][6:9] == ["read 32 texts", "5 of 32 texts", "10 of 32 texts"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_command_that_was_stopped_goes_on_and_ends_with_the_same_bytes(
    error: type[BaseException], suffix: str, texts: list[str], tmp_path: Path, pieces: int
) -> None:
    file = write(tmp_path / "a.csv", texts, "csv")
    predicted(file, tmp_path / f"whole{suffix}")
    calls: list[int] = []

    def stopped(rows: Table) -> np.ndarray:
        calls.append(len(rows))
        if len(calls) == 4:
            raise error("stopped")
        return shares_of(rows)

    out = tmp_path / f"out{suffix}"
    with pytest.raises(error):
        predicted(file, out, stopped)
    assert not out.exists()
    with Path(f"{out}.part").open("a") as draft:
        draft.write("half a li")  # as a kill in the middle of a write leaves it
    assert predicted(file, out, stopped) == 32
    assert sum(calls[4:]) == 32 - 15, "what was done is done again"
    assert out.read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["a.csv", f"out{suffix}", f"whole{suffix}"])


def test_a_draft_of_another_model_or_file_is_not_gone_on_with(texts: list[str], tmp_path: Path, pieces: int) -> None:
    file, out = write(tmp_path / "a.csv", texts, "csv"), tmp_path / "out.csv"

    def stopped(rows: Table) -> np.ndarray:
        if rows.numbers[0] > 10:
            raise RuntimeError("stopped")
        return shares_of(rows)

    with pytest.raises(RuntimeError):
        predicted(file, out, stopped, model="a")
    with pytest.raises(InputError, match="begun with another model, file or option"):
        predicted(file, out, model="b")
    write(file, [*texts[:-1], "another text"], "csv")
    with pytest.raises(InputError, match="begun with another model, file or option"):
        predicted(file, out, model="a")
    write(file, texts, "csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "out.csv.part", "out.csv.part.json"]
    draft, note = Path(f"{out}.part"), Path(f"{out}.part.json")
    kept, noted = draft.read_bytes(), note.read_text()
    draft.write_bytes(kept[:-1])
    with pytest.raises(InputError, match="is shorter than it was: remove it"):
        predicted(file, out, model="a")
    draft.write_bytes(kept)
    note.write_text("{}")
    with pytest.raises(InputError, match="is damaged: remove it"):
        predicted(file, out, model="a")
    note.write_text(noted)
    assert predicted(file, out, model="a") == 32
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "out.csv"]


def test_a_note_without_its_draft_is_no_draft(texts: list[str], tmp_path: Path, pieces: int) -> None:
    out = tmp_path / "out.csv"
    Path(f"{out}.part.json").write_text(json.dumps({"digest": "of another", "rows": 5, "bytes": 99}))
    assert predicted(write(tmp_path / "a.csv", texts, "csv"), out) == 32
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "out.csv"]


@pytest.mark.parametrize("format", ["torch", "openvino"])
def test_a_draft_of_other_weights_is_not_gone_on_with(
    format: str, exported: Path, reviews: Path, tmp_path: Path, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    identities: list[Any] = []
    monkeypatch.setattr(files, "predict_file", lambda *given: identities.append(given[6]) or 0)
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    record = json.loads((copy / "deployment.json").read_text())
    for changed in (None, "config.json", FORMATS[format].paths[-1]):
        if changed is not None:
            content = (copy / changed).read_bytes()
            (copy / changed).write_bytes(content + b"\n" if changed == "config.json" else content[:-1] + b"\1")
        record["files"][format]["files"] = {}  # as if it had been exported so
        (copy / "deployment.json").write_text(json.dumps(record))
        ended = ends(kd.deploy.predict, copy, reviews / "test.csv", "--format", format, "--out", tmp_path / "x.csv")
        assert ended.status == 0, ended.errors
    assert identities[0] != identities[1] != identities[2] != identities[0]


def test_two_commands_do_not_write_the_same_file(texts: list[str], tmp_path: Path, pieces: int) -> None:
    file, out = write(tmp_path / "a.csv", texts, "csv"), tmp_path / "out.csv"

    def nested(rows: Table) -> np.ndarray:
        with pytest.raises(InputError, match="another process writes"):
            predicted(file, out)
        return shares_of(rows)

    assert predicted(file, out, nested) == 32


# What is refused


CASES = {
    "a blank text": ("csv", "text,id\na fine film,1\n  ,2\n", "line 3: 'text' is blank"),
    "an empty text": ("csv", 'text,id\na fine film,1\n"",2\n', "line 3: 'text' is blank"),
    "no text in JSON": ("jsonl", '{"text": "a"}\n{"text": null}\n', "line 2: 'text' is null, not text"),
    "a number in JSON": ("jsonl", '{"text": "a"}\n{"text": 3}\n', "line 2: 'text' is 3, not text"),
    "no column in JSON": ("jsonl", '{"text": "a"}\n{"body": "b"}\n', "line 2: no column 'text'; the columns are body"),
    "a blank line": ("txt", "a fine film\n\nbad\n", "line 2: the text is missing"),
    "a blank first line": ("txt", "\na fine film\n", "line 1: the text is missing"),
    "no column": ("csv", "body,id\na fine film,1\n", "line 2: no column 'text'; the columns are body, id"),
    "another delimiter": ("csv", "text;id\na fine film;1\n", "task.delimiter=semicolon|tab|pipe"),
    "a field too many": ("csv", "text,id\na fine, film,1\n", "line 2: 3 fields where the header has 2"),
    "no rows": ("csv", "text,id\n", "has no examples"),
    "an empty file": ("csv", "", "is empty"),
    "a table as lines": ("txt", "id\ttext\n1\ta fine film\n", "begins with names of columns: task.format=tsv"),
    "an unknown suffix": ("dat", "text\n", "is not a .csv, .tsv, .jsonl, .parquet or .arrow file; set task.format=csv|"),
    "an open quote": ("csv", 'text\n"a fine film\n', "line 2: a quote is opened and never closed; task.quoted=false"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_text_that_is_missing_is_an_error_with_its_line(name: str, exported: Path, tmp_path: Path, ends: Ends) -> None:
    suffix, content, message = CASES[name]
    (tmp_path / f"a.{suffix}").write_text(content)
    ended = ends(kd.deploy.predict, exported, tmp_path / f"a.{suffix}", "--out", tmp_path / "out.csv")
    assert ended.status == 2
    assert message in ended.errors
    assert [path.name for path in tmp_path.iterdir()] == [f"a.{suffix}"], "something is half written"


def test_a_blank_line_at_the_end_is_no_text(exported: Path, tmp_path: Path, ends: Ends) -> None:
    (tmp_path / "a.txt").write_text("a fine film\n\n\n")
    ended = ends(kd.deploy.predict, exported, tmp_path / "a.txt", "--out", tmp_path / "out.csv")
    assert ended.status == 0, ended.errors
    assert len(table(tmp_path / "out.csv")) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "tflite"], "'tflite' is not one of torch, onnx, int8, openvino"),
        (["--out", "out.xlsx"], "'out.xlsx' must end in .csv, .tsv, .jsonl"),
        (["--out", "there.csv"], "'there.csv' is there already"),
        (["--out", "no/out.csv"], "there is no folder 'no'"),
        (["--student", "a"], "is an exported folder; name the run"),
        (["task.text=[a"], "task.text=[a is not YAML"),
        (["task.quoted=7"], "'7' is not one of true, false"),
    ],
)
def test_options_that_there_are_not(
    words: list[str], message: str, exported: Path, reviews: Path, tmp_path: Path, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.csv").write_text("mine")
    ended = ends(kd.deploy.predict, exported, reviews / "test.csv", *words)
    assert ended.status == 2
    assert message in ended.errors
    assert [path.name for path in tmp_path.iterdir()] == ["there.csv"]


def test_folders_that_cannot_be_run_are_named(finished: Run, exported: Path, reviews: Path, tmp_path: Path, ends: Ends) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in {
        "{": "cannot be read",
        '{"version": 9}': "has version 9",
        '{"version": 1}': "cannot be read (KeyError: 'name')",
    }.items():
        (copy / "deployment.json").write_text(name)
        ended = ends(kd.deploy.predict, copy, reviews / "test.csv", "--out", tmp_path / "out.csv")
        assert (ended.status, content in ended.errors) == (2, True), ended.errors
    for folder, message in {
        finished.student: f"name the run that it is of: {finished.directory}",
        tmp_path: "is neither the directory of a finished run nor an exported folder",
    }.items():
        ended = ends(kd.deploy.predict, folder, reviews / "test.csv", "--out", tmp_path / "out.csv")
        assert (ended.status, message in ended.errors) == (2, True), ended.errors


def test_a_file_that_is_not_there_is_named_before_the_model_is_read(tmp_path: Path, ends: Ends) -> None:
    for file, message in {"no/a.csv": "does not exist", ".": "is a folder, not a file"}.items():
        ended = ends(kd.deploy.predict, tmp_path, tmp_path / file)
        assert (ended.status, message in ended.errors, "change: FILE" in ended.errors) == (2, True, True), ended.errors


def test_a_changed_file_of_an_exported_folder_is_refused(exported: Path, reviews: Path, tmp_path: Path, ends: Ends) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    file = copy / "onnx" / "model.onnx"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    ended = ends(kd.deploy.predict, copy, reviews / "test.csv", "--format", "onnx", "--out", tmp_path / "out.csv")
    assert ended.status == 2
    assert "is not as it was exported: onnx/model.onnx" in ended.errors


def test_outputs_that_are_not_finite_are_refused(texts: list[str], tmp_path: Path, pieces: int) -> None:
    def broken(rows: Table) -> np.ndarray:
        logits = shares_of(rows)
        logits[np.array(rows.numbers) == 12] = np.nan
        return logits

    with pytest.raises(InputError, match="line 12: the model's outputs are not finite"):
        predicted(write(tmp_path / "a.csv", texts, "csv"), tmp_path / "out.csv", broken)
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"], "something is half written"


TRAINING = (
    "lightning",
    "hydra",
    "torchmetrics",
    "kd.training",
    "kd.engines",
    "kd.methods",
    "kd.build",
    "kd.runs",
    "kd.results",
)


def test_an_exported_folder_is_run_without_what_trains(exported: Path, reviews: Path, tmp_path: Path) -> None:
    lines = ["import sys", "from kd.deploy.predict import main"]
    for format in ("torch", "onnx"):
        arguments = [str(exported), str(reviews / "test.csv"), "--format", format, "--out", str(tmp_path / f"{format}.csv")]
        lines += [f"sys.argv = {['kd-predict', *arguments]}", "main()"]
    code = "\n".join([*lines, "print(*sys.modules, sep='\\n')"])
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout
    loaded = set(shown.splitlines())
    assert {"kd.deploy.files", "transformers", "onnxruntime"} <= loaded
    assert not {module for module in loaded for name in TRAINING if module == name or module.startswith(f"{name}.")}
    assert len(table(tmp_path / "torch.csv")) == len(table(tmp_path / "onnx.csv")) == 32


def test_pairs_and_scores(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"one": word, "two": "a " + word}) + "\n" for word in FILLER[:3]))

    def lengths(rows: Table) -> np.ndarray:
        return np.array([[len(one) + 100 * len(two)] for one, two in rows.texts], dtype=np.float32)

    predict_file(path, tmp_path / "o.csv", ["one", "two"], Layout(), None, lengths, {}, lambda words: None)
    expected = [{"line": str(n + 1), "score": str(100 * (len(w) + 2) + len(w))} for n, w in enumerate(FILLER[:3])]
    assert table(tmp_path / "o.csv") == expected
    (tmp_path / "a.txt").write_text("a\n")
    with pytest.raises(InputError, match=r"pairs of texts, one and two, and '.*' has one text on each line"):
        predict_file(tmp_path / "a.txt", tmp_path / "p.csv", ["one", "two"], Layout(), None, lengths, {}, lambda words: None)
