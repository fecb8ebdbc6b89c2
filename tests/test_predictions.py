"""Predictions that a run keeps: their order, what follows from them, and runs without them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from kd.build.parts import examples_of
from kd.errors import InputError
from kd.report import load_results
from kd.results.predictions import (
    Logits,
    Predictions,
    SplitPredictions,
    predictions_of,
    read_predictions,
    write_predictions,
)
from kd.runs.run import Run, predictions_file
from kd.training import execute
from kd.training import fit as fitting
from whole_runs import Small, check_predictions, made, planned

TEXTS = [("a",), ("b",), ("c",), ("d",)]
LABELS = [0.0, 1.0, float("nan"), 1.0]
COHORT = (
    "method=kd",
    "cohort=mutual",
    "cohort.students=[2l,{layers: 1,name: small}]",
    "task.metrics=[accuracy,f1,matthews_corrcoef]",
    "teacher.minilm.run.trainer.max_epochs=8",
    "trainer.max_epochs=4",
    "trainer.eval_batch_size=5",
)
"""Two students and a teacher; batches of evaluation are formed by length, and differ in size."""


def logits_of(*index: int) -> Logits:
    """Logits of a student and a teacher, in which the row of an example holds its index."""
    rows = np.array(index)
    return Logits(rows, {"s": np.stack([rows, -rows], 1)}, {"t": np.stack([-rows, rows], 1)})


@pytest.fixture(scope="module")
def finished(small: Small) -> tuple[Run, dict]:
    """A cohort whose predictions are written when its record is."""
    original = Run.finish

    def finish(run: Run, record: dict) -> dict:
        if run.directory.name.startswith("kd-"):
            assert run.predictions.is_file(), "the record is written last"
        return original(run, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "finish", finish)
        return made(small(*COHORT))


def test_metrics_follow_from_the_predictions_of_every_student_and_teacher(finished: tuple[Run, dict]) -> None:
    run, record = finished
    check_predictions(run, record)
    predictions = read_predictions(run.directory)
    assert list(predictions.splits) == ["validation", "test"]
    assert list(predictions.splits["test"].students) == ["2l", "small"]


def test_the_metrics_of_the_ensemble_follow_from_the_predictions(finished: tuple[Run, dict]) -> None:
    run, record = finished
    for name, split in read_predictions(run.directory).splits.items():
        shares = np.mean([torch.from_numpy(one).softmax(1).numpy() for one in split.students.values()], axis=0)
        accuracy = float((shares.argmax(1) == split.labels).mean())
        assert accuracy == pytest.approx(record["metrics_ensemble"][name]["accuracy"])


def test_rows_are_in_the_order_of_the_examples(finished: tuple[Run, dict]) -> None:
    """The exported models, which read one text after the other, have the same logits."""
    run, record = finished
    examples = examples_of(run)["file"]
    folders = {name: run.directory / student["folder"] for name, student in record["students"].items()}
    folders["minilm"] = run.inputs.teachers["minilm"].student
    for split, predictions in read_predictions(run.directory).splits.items():
        assert predictions.labels.tolist() == list(examples.labels[split])
        for name, logits in {**predictions.students, **predictions.teachers}.items():
            model, tokenizer = (
                auto.from_pretrained(folders[name]) for auto in (AutoModelForSequenceClassification, AutoTokenizer)
            )
            with torch.no_grad():
                found = [model.eval()(**tokenizer(text, return_tensors="pt")).logits[0] for (text,) in examples.texts[split]]
            np.testing.assert_allclose(logits, torch.stack(found).numpy(), atol=1e-5)


def test_equal_predictions_are_equal_bytes(finished: tuple[Run, dict], tmp_path: Path) -> None:
    run, _ = finished
    write_predictions(tmp_path / "again.npz", read_predictions(run.directory))
    assert (tmp_path / "again.npz").read_bytes() == run.predictions.read_bytes()
    assert not list(run.directory.glob("*.part"))


def test_run_whose_predictions_were_removed_is_done_and_reported(
    finished: tuple[Run, dict], small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, record = finished
    left_out = shutil.ignore_patterns("predictions.npz", "checkpoints")
    copy = shutil.copytree(run.directory, tmp_path / run.name, ignore=left_out)
    monkeypatch.setattr(fitting, "fit", lambda *_: pytest.fail("the run is done"))
    assert execute.execute(planned(small(*COHORT, f"paths.runs={tmp_path}"))) == record
    assert load_results(tmp_path) == [{**record, "run": run.name}]
    with pytest.raises(InputError, match=r"the run has no predictions: the file '.*predictions.npz' does not exist") as caught:
        read_predictions(copy)
    assert caught.value.key == "paths.runs"


def test_run_without_record_and_predictions_writes_the_same_again(finished: tuple[Run, dict]) -> None:
    run, record = finished
    before = run.predictions.read_bytes()
    for path in (run.predictions, run.directory / "result.json"):
        path.unlink()
    again = execute.execute(run)
    assert again["resumed"] == {"starts": 2, "from_steps": [record["steps"]]}, "nothing is trained again"
    assert run.predictions.read_bytes() == before


def test_run_that_starts_again_leaves_no_predictions_of_before(small: Small, tmp_path: Path) -> None:
    run = planned(small("method=finetune", "teacher=[]", f"paths.runs={tmp_path}"))
    split = SplitPredictions.of(logits_of(0, 1, 2, 3), LABELS, TEXTS)
    for task in ("rte", None):
        write_predictions(predictions_file(run.directory, task), Predictions({"test": split}))
    run.begin(resume=True)
    assert run.predictions.is_file()
    run.begin(resume=False)
    assert {path.name for path in run.directory.iterdir()} == {"checkpoints", "config.yaml"}


# Without a run


def test_rows_of_all_ranks_are_put_in_order() -> None:
    split = SplitPredictions.of(logits_of(1, 3, 0, 2), LABELS, TEXTS)
    assert split.index.tolist() == [0, 1, 2, 3]
    assert split.students["s"].tolist() == [[0, 0], [1, -1], [2, -2], [3, -3]]
    assert split.teachers["t"].tolist() == [[0, 0], [-1, 1], [-2, 2], [-3, 3]]
    np.testing.assert_equal(split.labels, LABELS)


@pytest.mark.parametrize("index", [(0, 2), (0, 1, 2, 2), (0, 1, 2, 3, 3), (1, 2, 3, 4)])
def test_missing_or_repeated_example_is_an_error(index: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match="examples for a split of 4"):
        SplitPredictions.of(logits_of(*index), LABELS, TEXTS)


def test_predictions_of_other_texts_are_told_apart() -> None:
    one, same, other = (
        SplitPredictions.of(logits_of(0, 1, 2, 3), LABELS, texts) for texts in (TEXTS, list(TEXTS), TEXTS[::-1])
    )
    assert one.texts == same.texts != other.texts


def test_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    splits = {
        "validation": SplitPredictions.of(logits_of(2, 0, 1, 3), LABELS, TEXTS),
        "validation_mismatched": SplitPredictions.of(logits_of(1, 0), LABELS[:2], TEXTS[:2]),
    }
    write_predictions(predictions_file(tmp_path, "rte"), Predictions(splits))
    found = read_predictions(tmp_path, "rte").splits
    assert list(found) == list(splits)
    for name, split in splits.items():
        for part in ("index", "labels", "texts", "students", "teachers"):
            np.testing.assert_equal(getattr(found[name], part), getattr(split, part))
            assert np.asarray(found[name].students["s"]).dtype == np.float32
    for task in (None, "mrpc"):
        with pytest.raises(InputError, match="there are those of the tasks rte"):
            read_predictions(tmp_path, task)


def test_task_without_a_row_for_each_example_has_no_file(tmp_path: Path) -> None:
    path = predictions_file(tmp_path)
    path.write_bytes(b"of an earlier start")
    write_predictions(path, predictions_of(None, {"validation": None}))
    assert not path.exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)


def shortened(path: Path) -> None:
    with np.load(path) as content:
        arrays = dict(content)
    np.savez(path, **{**arrays, "test/students/s": arrays["test/students/s"][1:]})


def without_labels(path: Path) -> None:
    with np.load(path) as content:
        np.savez(path, **{name: array for name, array in content.items() if name != "test/labels"})


def pickled(path: Path) -> None:
    np.savez(path, **{"test/index": np.array([None, {}], dtype=object)})


DAMAGES = (cut, flipped, shortened, without_labels, pickled, lambda path: path.write_text("no archive"), Path.touch)


@pytest.mark.parametrize("damage", range(len(DAMAGES)))
def test_damaged_file_is_an_error(tmp_path: Path, damage: int) -> None:
    path = predictions_file(tmp_path)
    if damage < len(DAMAGES) - 1:
        write_predictions(path, Predictions({"test": SplitPredictions.of(logits_of(0, 1, 2, 3), LABELS, TEXTS)}))
    DAMAGES[damage](path)
    with pytest.raises(InputError, match="are damaged"):
        read_predictions(tmp_path)
