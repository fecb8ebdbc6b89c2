"""Labels: one class for the same label in every format, or an error that names file and line."""

import json
import math
from pathlib import Path

import pytest
import torch

from conftest import tiny_config
from kd.build.teachers import teacher_labels
from kd.config.schema import TaskSpec, TeacherSpec
from kd.data.examples import Examples, load_examples
from kd.data.labels import label_name
from kd.data.metrics import CLASSIFICATION, REGRESSION, ranks
from kd.data.sources import Files
from kd.data.tasks import Classification, Regression
from kd.data.texts import Example
from kd.errors import InputError
from kd.models.pretrained import label_names
from kd.models.teachers import match_labels

WORDS = ("sunny day", "gloomy day", "merry walk", "grim walk", "jolly park", "murky park")


def load(path: Path, validation: Path | None = None, **more: object) -> Examples:
    given = {"text": ["text"], "label": "label", "metrics": ["accuracy"], "monitor": "accuracy", **more}
    return load_examples(
        TaskSpec(name="t", source={}, **given), Files(str(path), ["text"], given["label"], validation=str(validation or path))
    )


def jsonl(folder: Path, labels: list[object], name: str = "a.jsonl") -> Path:
    path = folder / name
    rows = [{"text": f"{WORDS[row % 6]} {row}", "label": label} for row, label in enumerate(labels)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def table(folder: Path, labels: list[str], name: str = "a.csv") -> Path:
    path = folder / name
    path.write_text("text,label\n" + "".join(f"{WORDS[row % 6]} {row},{label}\n" for row, label in enumerate(labels)))
    return path


@pytest.mark.parametrize("label", [math.nan, None, "", "  ", "nan", "NaN", "NA", "N/A", "null", "None", "<NA>"])
def test_a_missing_label_is_no_class_in_any_format(tmp_path: Path, label: object) -> None:
    word = "NaN" if isinstance(label, float) else label
    for path, line in (
        (jsonl(tmp_path, ["1", "0", label, "1"]), 3),
        (table(tmp_path, ["1", "0", str(word or ""), "1"]), 4),
    ):
        for labels in (None, ["0", "1"]):
            with pytest.raises(InputError, match=f"'{path}', line {line}: the label is missing") as caught:
                load(path, labels=labels)
            assert caught.value.key == "label"


def test_a_word_for_nothing_is_a_class_where_the_task_lists_it(tmp_path: Path) -> None:
    path = table(tmp_path, ["none", "pro", "none"])
    with pytest.raises(InputError, match=r"labels=\[\.\.\.\]"):
        load(path)
    assert load(path, labels=["none", "pro"]).labels["train"] == [0, 1, 0]
    with pytest.raises(InputError, match="missing"):
        load(jsonl(tmp_path, [None, "pro", "none"]), labels=["None", "pro"])


def test_a_number_is_one_class_in_every_format_and_spelling(tmp_path: Path) -> None:
    files = [
        jsonl(tmp_path, [1, 0, 1.0, 0.0, "1", "0.0"]),
        jsonl(tmp_path, [True, False, True, False, True, False], "b.jsonl"),
        table(tmp_path, ["1", "0", "1.0", "0", "1.", "0.00"]),
    ]
    mixed, booleans, csv = (load(path) for path in files)
    assert mixed.task.labels == csv.task.labels == ["0", "1"]
    assert booleans.task.labels == ["False", "True"]
    assert mixed.labels["train"] == csv.labels["train"] == booleans.labels["train"] == [1, 0, 1, 0, 1, 0]
    assert load(files[0], validation=files[2]).labels["validation"] == [1, 0, 1, 0, 1, 0]
    assert load(files[0], labels=["0.0", "1.0"]).labels["train"] == [1, 0, 1, 0, 1, 0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("yes", "Yes"),
        ("very good", "very  good"),
        ("1", "01"),
        (1, True),
        ("0", False),
        ("caf\u00e9", "cafe\u0301"),
        ("a", "a\u200b"),
    ],
)
def test_classes_that_differ_by_their_spelling_alone_are_refused_unless_they_are_listed(
    tmp_path: Path, one: object, other: object
) -> None:
    path = jsonl(tmp_path, [one, "x", other, "x"])
    with pytest.raises(InputError, match=r"line 1 has the label .* and .*line 3") as caught:
        load(path)
    assert caught.value.key == "labels"
    if isinstance(one, str) and isinstance(other, str):
        assert load(path, labels=[one, other, "x"]).labels["train"] == [0, 2, 1, 2]


@pytest.mark.parametrize(
    ("label", "words"), [([1], "neither"), ({"a": 1}, "neither"), (math.inf, "neither"), ("\ud83d", "half")]
)
def test_what_is_no_label_names_its_line(tmp_path: Path, label: object, words: str) -> None:
    for labels in (None, ["a", "b"]):
        with pytest.raises(InputError, match=f"line 2: the label .* {words}") as caught:
            load(jsonl(tmp_path, ["a", label, "b"]), labels=labels)
        assert caught.value.key == "label"


def test_labels_that_are_the_same_number_are_no_two_classes() -> None:
    with pytest.raises(InputError, match="the same number") as caught:
        Classification("t", ["1", "1.0"], {}, ["accuracy"], "accuracy")
    assert caught.value.key == "labels"


def test_scores_are_told_from_classes(tmp_path: Path) -> None:
    scores = [f"{number / 40:.3f}" for number in range(200)]
    with pytest.raises(InputError, match=r"200 different numbers.*kind=regression .*pearson") as caught:
        load(table(tmp_path, scores))
    assert caught.value.key == "kind"
    assert "0.25, ..." not in caught.value.message
    assert caught.value.message.count(",") < 20, "not all 200 of them"
    listed = load(table(tmp_path, ["0.5", "1", "1.5"]), labels=["0.5", "1", "1.5"])
    assert listed.labels["train"] == [0, 1, 2]


def test_a_column_with_another_label_for_every_example_is_questioned(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is this the column of the label") as caught:
        load(table(tmp_path, [f"id{number}" for number in range(60)]))
    assert caught.value.key == "label"


def test_an_unknown_label_lists_the_first_labels_only(tmp_path: Path) -> None:
    train = table(tmp_path, [f"c{number % 40}" for number in range(200)])
    with pytest.raises(InputError, match=r"line 2: unknown label 'z'.*\(40 in all\)"):
        load(train, validation=table(tmp_path, ["z"], "b.csv"))


def test_a_classification_without_a_label_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs the column") as caught:
        load(table(tmp_path, ["a", "b"]), label=None)
    assert caught.value.key == "label"


# Scores

SCORED = {"kind": "regression", "metrics": ["pearson", "spearman", "mse"], "monitor": "mse"}


@pytest.mark.parametrize(
    "raw", [True, "1_000", "\u0661", "0x10", math.inf, -math.inf, "Infinity", "1,5", "--1", [1.0], {"a": 1}]
)
def test_what_is_no_score_names_its_line(tmp_path: Path, raw: object) -> None:
    with pytest.raises(InputError, match=r"line 2: the score .* is not a finite number") as caught:
        load(jsonl(tmp_path, [1.0, raw, 3.0]), **SCORED)
    assert caught.value.key == "label"


@pytest.mark.parametrize("raw", [None, math.nan, "", "nan", "NULL"])
def test_a_missing_score_is_called_missing(tmp_path: Path, raw: object) -> None:
    with pytest.raises(InputError, match=r"line 2: the score .* is not a finite number; the label is missing"):
        load(jsonl(tmp_path, [1.0, raw, 3.0]), **SCORED)


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ([1.0, 1e18, 2.0], "line 2: the score 1e.18 is too large"),
        ([1.0, "1e400", 2.0], "line 2: the score '1e400' is too large"),
        ([1.0, -(10**400), 2.0], "line 2: the score -1000.* is too large"),
        ([1.7e9, 1.7e9 + 1, 1.7e9 + 2], "too close for float32"),
        ([1e-30, 2e-30, 3e-30], "too close for float32"),
    ],
)
def test_scores_that_float32_cannot_learn_are_refused(tmp_path: Path, scores: list[object], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        load(jsonl(tmp_path, scores), **SCORED)
    assert caught.value.key == "label"


def test_equal_scores_are_a_poor_task_and_no_error(tmp_path: Path) -> None:
    assert load(jsonl(tmp_path, [3, 3.0, "3"]), **SCORED).labels["train"] == [3.0, 3.0, 3.0]


def test_a_score_reaches_its_metric_as_the_file_has_it(tmp_path: Path) -> None:
    examples = load(table(tmp_path, ["0.1", "0.2", "0.30000000000000004"]), **SCORED)
    labels = examples.task.label_tensor(examples.labels["train"])
    metric = examples.task.metric("mse")
    metric.update(torch.tensor([0.1, 0.2, 0.3], dtype=torch.double), labels)
    assert float(metric.compute()) == (0.30000000000000004 - 0.3) ** 2 / 3


@pytest.mark.parametrize("name", ["pearson", "spearman"])
@pytest.mark.parametrize("values", [[2.0, 2.0, 2.0], [1.0]])
def test_a_correlation_with_what_is_constant_is_undefined(name: str, values: list[float]) -> None:
    metric = REGRESSION[name]()
    metric.update(torch.tensor(values), torch.arange(len(values)).double())
    assert math.isnan(float(metric.compute()))


def test_correlations_are_exact_for_two_examples_outliers_and_many_ties() -> None:
    for name in ("pearson", "spearman"):
        metric = REGRESSION[name]()
        metric.update(torch.tensor([1.0, 2.0]), torch.tensor([5.0, 7.0]))
        assert float(metric.compute()) == 1.0
    scores = torch.zeros(20_000)
    scores[::100], scores[0] = 1.0, 1e4  # in float32 the variance is too small a part of the largest deviation
    metric = REGRESSION["pearson"]()
    metric.update(scores, 2 * scores)
    assert float(metric.compute()) == pytest.approx(1.0, abs=1e-12)
    tied = (torch.arange(200_000) % 2).float()  # their ranks add up to more than 2^31
    assert ranks(tied).unique().tolist() == [50_000.5, 150_000.5]
    metric = REGRESSION["spearman"]()
    metric.update(tied, -tied)
    assert float(metric.compute()) == pytest.approx(-1.0, abs=1e-12)


def test_shares_are_divided_in_double() -> None:
    predicted, labels = torch.zeros(100, dtype=torch.long), torch.zeros(100, dtype=torch.long)
    labels[:11] = 1
    task = Classification("t", ["a", "b"], {}, ["accuracy"], "accuracy")
    metric = CLASSIFICATION["accuracy"](2)
    metric.update(predicted, labels)
    assert float(metric.compute()) == task.majority_baseline(labels)["accuracy"] == 0.89


def test_matthews_of_a_million_examples_keeps_its_digits() -> None:
    metric = CLASSIFICATION["matthews_corrcoef"](2)
    metric.update(torch.tensor([0]), torch.tensor([0]))
    metric.confmat = torch.tensor([[600_000, 200_001], [149_999, 50_000]])
    a, b, c, d = 600_000, 200_001, 149_999, 50_000
    exact = (a * d - b * c) / math.sqrt((a + b) * (c + d) * (a + c) * (b + d))
    assert float(metric.compute()) == pytest.approx(exact, rel=1e-9)


def test_a_regression_takes_the_scores_of_any_number_format() -> None:
    task = Regression("t", ["mse"], "mse")
    raws = ("1e3", " .5", "-2.", 7, 0.1)
    assert [task.encode(Example(("a",), raw, "")) for raw in raws] == [1000.0, 0.5, -2.0, 7.0, 0.1]


@pytest.mark.parametrize("value", ["1.0", "1", 1, 1.0, " 1 ", "1.", "-0.5", 0.25, True, "v1.0", " good "], ids=repr)
def test_a_label_has_the_same_name_in_a_file_and_in_a_model(value: object) -> None:
    name = label_name(value, "here")
    task, model = ["other", name], [value, "other"]
    assert label_names(tiny_config(id2label=dict(enumerate(model)), label2id={}), "teacher.x.labels") == [name, "other"]
    assert match_labels(task, [name, "other"], "teacher.x.labels") == [1, 0]
    assert match_labels(["other", str(value)], [name, "other"], "teacher.x.labels") == [1, 0]  # as `task.labels` lists it


def test_two_names_of_one_number_are_one_label_of_a_model_as_of_a_file() -> None:
    with pytest.raises(InputError, match=r"two of the model's outputs '1'"):
        label_names(tiny_config(id2label={0: "1.0", 1: "1"}, label2id={}), "teacher.x.labels")
    spec = TeacherSpec(model="a", labels=["1", "1.0"])
    with pytest.raises(InputError, match="must name each of the 2 outputs"):
        teacher_labels(tiny_config(num_labels=2), spec, "x")
