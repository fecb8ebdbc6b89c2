"""Differences between the predictions of two models: plain counts, identities, what equal models have, and slices."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import entropy, pearsonr, spearmanr
from torchmetrics.functional.classification import multiclass_calibration_error

from kd.probe.differences import Differences, churn_of, differences, slices_of
from kd.results.statistics import COUNTED, Draws, Estimate, counted_difference, drawn, jackknifed, mean_of
from kd.results.statistics.estimates import MOST_UNDEFINED

CLASSES = ("bad", "good", "so-so")
METRICS = ("accuracy", "matthews_corrcoef")


def models(count: int = 120, classes: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    """Labels, and logits of three models that know something of them, the teacher most."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=count)
    found: dict[str, np.ndarray] = {"labels": labels.astype(np.float64)}
    for name, skill in {"teacher": 2.0, "student": 1.2, "control": 0.8}.items():
        noise = generator.normal(size=(count, classes))
        found[name] = (noise + skill * np.eye(classes)[labels]).astype(np.float32)
    return found


def of(found: dict[str, np.ndarray], **more: Any) -> Differences:
    names = CLASSES[: found["teacher"].shape[1]]
    return differences(
        found["student"], found["teacher"], found.get("control"), found["labels"], METRICS, **{"classes": names, **more}
    )


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits.astype(np.float64))
    return powers / powers.sum(1, keepdims=True)


@pytest.mark.parametrize("model", ["student", "control"])
def test_figures_are_those_of_plain_counts(model: str) -> None:
    data = models()
    result = of(data)
    figures = {name: getattr(one, model) for name, one in result.figures.items()}
    ours, theirs, labels = data[model].argmax(1), data["teacher"].argmax(1), data["labels"]
    right, taught = ours == labels, theirs == labels
    p, q = softmax(data["teacher"]), softmax(data[model])
    mean = (p + q) / 2
    expected = {
        "score.accuracy": right.mean(),
        "delta.accuracy": taught.mean() - right.mean(),
        "retention.accuracy": right.mean() / taught.mean(),
        "agreement": (ours == theirs).mean(),
        "agreement_right": (ours == theirs)[taught].mean(),
        "agreement_wrong": (ours == theirs)[~taught].mean(),
        "lost": (~right)[taught].mean(),
        "gained": right[~taught].mean(),
        "kl": entropy(p, q, axis=1).mean(),
        "js": ((entropy(p, mean, axis=1) + entropy(q, mean, axis=1)) / 2 / math.log(2)).mean(),
        "total_variation": (np.abs(p - q).sum(1) / 2).mean(),
        "nll": -np.log(q[np.arange(len(labels)), labels.astype(int)]).mean(),
        "brier": ((q - np.eye(3)[labels.astype(int)]) ** 2).sum(1).mean(),
    }
    for name, value in expected.items():
        assert figures[name].value == pytest.approx(value, abs=1e-12), name
    truth = torch.from_numpy(labels).long()
    ece = multiclass_calibration_error(torch.from_numpy(q), truth, 3, n_bins=15)
    assert figures["ece"].value == pytest.approx(float(ece), abs=1e-6)
    assert figures["score.matthews_corrcoef"].value == pytest.approx(
        float(COUNTED["matthews_corrcoef"](ours, labels, np.ones((1, len(labels))))[0])
    )
    assert set(figures) == {
        *expected,
        "ece",
        "score.matthews_corrcoef",
        "delta.matthews_corrcoef",
        "retention.matthews_corrcoef",
    }
    assert figures["lost"].n == figures["agreement_right"].n == taught.sum()
    assert figures["gained"].n == figures["agreement_wrong"].n == (~taught).sum()
    assert figures["kl"].n == result.n == len(labels)
    assert result.teacher["score.accuracy"].value == pytest.approx(taught.mean())
    assert set(result.teacher) == {"score.accuracy", "score.matthews_corrcoef", "ece", "nll", "brier"}


@pytest.mark.parametrize("seed", range(5))
def test_churn_gives_the_accuracy_of_the_student(seed: int) -> None:
    data = models(seed=seed)
    result = of(data)
    figures = {name: one.student.value for name, one in result.figures.items()}
    teacher = result.teacher["score.accuracy"].value
    assert figures["score.accuracy"] == pytest.approx(
        teacher * (1 - figures["lost"]) + (1 - teacher) * figures["gained"], abs=1e-12
    )
    (both, lost), (gained, neither) = result.churn["student"]
    assert both + lost + gained + neither == result.n
    assert figures["lost"] == pytest.approx(lost / (both + lost))
    assert figures["gained"] == pytest.approx(gained / (gained + neither))


def test_churn_of_given_shares_gives_the_accuracy_that_follows() -> None:
    """Accuracy of the teacher .9, a tenth of that lost, a fifth of the rest gained: .9 * .9 + .1 * .2 = .83."""
    taught = np.arange(1000) < 900
    right = np.where(taught, np.arange(1000) >= 90, np.arange(1000) < 920)
    labels = np.zeros(1000)
    one, other = (np.where(correct[:, None], [[1.0, 0.0]], [[0.0, 1.0]]).astype(np.float32) for correct in (right, taught))
    assert churn_of(one, other, labels) == [[810, 90], [20, 80]]
    result = differences(one, other, None, labels, ["accuracy"], classes=CLASSES[:2])
    assert result.figures["lost"].student.value == pytest.approx(0.1)
    assert result.figures["gained"].student.value == pytest.approx(0.2)
    assert result.figures["score.accuracy"].student.value == pytest.approx(0.83)
    assert result.figures["delta.accuracy"].student.value == pytest.approx(0.07)


def test_a_model_beside_itself_differs_in_nothing() -> None:
    data = models()
    same = {**data, "student": data["teacher"], "control": data["teacher"]}
    result = of(same, lengths=np.arange(120))
    for figures in (result.figures, *(one.figures for one in result.slices)):
        for name, value in {"agreement": 1, "kl": 0, "js": 0, "total_variation": 0, "lost": 0, "delta.accuracy": 0}.items():
            if figures[name].student.n:
                for model in ("student", "control"):
                    found = getattr(figures[name], model)
                    assert (found.value, found.low, found.high) == (value, value, value), name
                difference = figures[name].difference
                assert (difference.value, difference.low, difference.high) == (0, 0, 0)
        assert figures["retention.accuracy"].student.value == 1
    assert result.figures["gained"].student.value == 0
    assert result.churn["student"][0][1] == result.churn["student"][1][0] == 0


def test_the_difference_from_the_control_is_a_paired_bootstrap() -> None:
    data = models()
    found = of(data).figures["score.accuracy"].difference
    ours, theirs = data["student"].argmax(1), data["control"].argmax(1)
    expected = counted_difference(ours, theirs, data["labels"], COUNTED["accuracy"])
    assert (found.value, found.low, found.high) == pytest.approx((expected.difference, expected.low, expected.high), abs=1e-12)
    agreement = of(data).figures["agreement"].difference
    taught = data["teacher"].argmax(1)
    expected = counted_difference(ours, theirs, taught, COUNTED["accuracy"])
    assert (agreement.value, agreement.low, agreement.high) == pytest.approx(
        (expected.difference, expected.low, expected.high), abs=1e-12
    )


def test_without_a_control_there_is_no_difference_from_it() -> None:
    data = models()
    alone, both = of({**data, "control": None}), of(data)
    assert all(one.control is None and one.difference is None for one in alone.figures.values())
    assert {name: one.student for name, one in alone.figures.items()} == {n: one.student for n, one in both.figures.items()}
    assert set(alone.churn) == {"student"}


def test_a_condition_that_no_example_meets_leaves_a_figure_undefined() -> None:
    data = models()
    data["teacher"] = (9 * np.eye(3)[data["labels"].astype(int)]).astype(np.float32)
    figures = of(data).figures
    for name in ("gained", "agreement_wrong"):
        assert (figures[name].student.value, figures[name].student.low, figures[name].student.n) == (None, None, 0)
    assert figures["lost"].student.value == pytest.approx(figures["delta.accuracy"].student.value)


def test_a_correlation_that_is_not_positive_retains_nothing_that_is_defined() -> None:
    data = models()
    data["teacher"] = -data["teacher"]
    figures = of(data).figures
    assert figures["retention.matthews_corrcoef"].student.value is None
    assert figures["delta.matthews_corrcoef"].student.value < 0


def test_scores_have_correlations_and_no_classes() -> None:
    generator = np.random.default_rng(0)
    labels = generator.normal(size=80)
    noisy = {
        name: (labels + size * generator.normal(size=80))[:, None] for name, size in {"t": 0.3, "s": 0.8, "c": 1.5}.items()
    }
    metrics = ("pearson", "spearman", "mse")
    result = differences(noisy["s"], noisy["t"], noisy["c"], labels, metrics, classes=None)
    figures = {name: one.student.value for name, one in result.figures.items()}
    ours, theirs = noisy["s"][:, 0], noisy["t"][:, 0]
    assert figures["delta.pearson"] == pytest.approx(pearsonr(theirs, labels)[0] - pearsonr(ours, labels)[0])
    assert figures["delta.spearman"] == pytest.approx(spearmanr(theirs, labels)[0] - spearmanr(ours, labels)[0])
    assert figures["delta.mse"] == pytest.approx(((theirs - labels) ** 2).mean() - ((ours - labels) ** 2).mean())
    assert figures["agreement"] == pytest.approx(pearsonr(ours, theirs)[0])
    assert figures["rank_agreement"] == pytest.approx(spearmanr(ours, theirs)[0])
    assert figures["distance"] == pytest.approx(np.abs(ours - theirs).mean())
    assert not {"lost", "kl", "ece", "brier", "retention.mse"} & set(figures)
    assert {"retention.mse", "classes", "slices"} == set(result.absent)
    assert (result.churn, result.slices) == ({}, ())


def test_a_model_that_predicts_one_class_is_named() -> None:
    data = models()
    assert of(data).one_class == {}
    data["control"] = np.tile(np.array([[0.0, 1.0, 0.5]], dtype=np.float32), (120, 1))
    assert of(data).one_class == {"control": "good"}
    data["teacher"] = data["student"] = 0 * data["control"]
    assert of(data).one_class == {"teacher": "bad", "student": "bad", "control": "good"}


# Slices


def test_slices_of_each_kind_hold_every_example_once() -> None:
    data, lengths = models(), np.random.default_rng(1).integers(3, 30, size=120)
    by: dict[str, list[np.ndarray]] = {}
    for kind, _, chosen in slices_of(data["teacher"], data["labels"], CLASSES, lengths):
        by.setdefault(kind, []).append(chosen)
    assert {kind: len(slices) for kind, slices in by.items()} == {"label": 3, "length": 3, "confidence": 3}
    for slices in by.values():
        assert (np.sum(slices, axis=0) == 1).all()
    confidence = softmax(data["teacher"]).max(1)
    for values, kind in ((lengths, "length"), (confidence, "confidence")):
        tops = [values[chosen].max() for chosen in by[kind]]
        assert tops == sorted(tops)
        assert all(values[after].min() > top for after, top in zip(by[kind][1:], tops, strict=False))
    assert [chosen.sum() for chosen in by["confidence"]] == [40, 40, 40]
    assert [data["labels"][chosen].tolist() for chosen in by["label"]] == [
        [float(number)] * int((data["labels"] == number).sum()) for number in range(3)
    ]


def test_figures_of_a_slice_are_those_of_its_examples() -> None:
    data, lengths = models(), np.arange(120)
    result = of(data, lengths=lengths)
    masks = {(kind, name): chosen for kind, name, chosen in slices_of(data["teacher"], data["labels"], CLASSES, lengths)}
    assert {(one.by, one.name) for one in result.slices} == set(masks)
    for one in result.slices:
        some = {name: values[masks[one.by, one.name]] for name, values in data.items()}
        alone = differences(some["student"], some["teacher"], some["control"], some["labels"], ["accuracy"], classes=CLASSES)
        assert (one.n, one.figures, one.teacher) == (alone.n, alone.figures, alone.teacher)
        assert "score.matthews_corrcoef" not in one.figures


def test_equal_lengths_are_one_slice() -> None:
    data = models()
    kinds = [(kind, name) for kind, name, _ in slices_of(data["teacher"], data["labels"], CLASSES, np.full(120, 7))]
    assert [name for kind, name in kinds if kind == "length"] == ["7"]


# Intervals


def test_a_mean_has_the_interval_of_its_resampled_examples() -> None:
    values = np.random.default_rng(3).normal(size=50)
    found = drawn({"mean": (mean_of(values), 50)}, 50)["mean"].estimate()
    generator = np.random.default_rng(0)
    means = np.sort([values[generator.integers(50, size=50)].mean() for _ in range(1999)])
    assert (found.low, found.high) == pytest.approx((means[49], means[-50]), abs=1e-12)
    assert found.value == pytest.approx(values.mean())


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(4).normal(size=30)
    without = np.array([np.delete(values, row).mean() for row in range(30)])
    found = jackknifed(values.mean(), without)
    half = 1.959964 * values.std(ddof=1) / math.sqrt(30)
    assert (found.low, found.high, found.n) == (pytest.approx(values.mean() - half), pytest.approx(values.mean() + half), 30)
    assert jackknifed(0.99, np.linspace(0.9, 1.0, 30), (0.0, 1.0)).high == 1.0
    without[3] = math.nan
    assert jackknifed(0.5, without) == Estimate(0.5, None, None, 30)
    assert jackknifed(math.nan, values) == Estimate(None, None, None, 30)


def test_a_figure_that_few_samples_have_has_no_interval() -> None:
    where = np.arange(40) < 3  # none of them is in a sample with probability (37 / 40) ** 40, .044
    values = np.arange(40.0)
    few = drawn({"some": (mean_of(values, where), 3)}, 40)["some"]
    share = float(np.isnan(few.values).mean())
    assert 0 < share <= MOST_UNDEFINED
    assert few.estimate().low is not None
    fewer = drawn({"one": (mean_of(values, np.arange(40) == 2), 1)}, 40)["one"].estimate()
    assert (fewer.value, fewer.low, fewer.high, fewer.n) == (2.0, None, None, 1)
    undefined = Draws(math.nan, np.zeros(9), 0).estimate()
    assert (undefined.value, undefined.low) == (None, None)
