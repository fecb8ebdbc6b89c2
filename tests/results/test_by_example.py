"""Tests by example in comparisons: whose predictions are compared, what is refused, and where it is shown."""

import csv
import io
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, bootstrap

from kd import report
from kd.data.metrics import CLASSIFICATION, REGRESSION
from kd.results.by_example import with_tests_by_example
from kd.results.columns import probability
from kd.results.comparison import Comparison, Entry, compare, entries_of
from kd.results.figures import Figure
from kd.results.page import page
from kd.results.predictions import Predictions, SplitPredictions, read_predictions, write_predictions
from kd.results.renderings import FORMATS, as_rows
from kd.results.statistics import COUNTED, Verdict, counted_difference, example_difference, holm
from kd.results.statistics.examples import BLOCK, blocks, draw_counts
from whole_runs import Small, made

EXAMPLES = 300
LABELS = np.random.default_rng(7).integers(0, 2, EXAMPLES).astype(float)


def figure(method: str, value: float, seed: int, **more: Any) -> Figure:
    labels = {"paper": "toy", "table": "1", "row": method, "method": method, "student": "3l", "teacher": "minilm"}
    where = {"task": "rte", "split": "validation", "metric": "accuracy", "value": value, "std": None, "n": 1}
    about = {"seeds": str(seed), "selection": "best", "init": "first layers", "source": "kd", "confidence": "measured"}
    run = {"digest": f"{method}{seed}", "commit": "abc", "command": f"method={method} seed={seed}"}
    return Figure(**{**labels, **where, **about, **run, **more})


def logits_of(method: str, seed: int, skill: float) -> np.ndarray:
    """Logits that are the right ones more often the larger the skill."""
    rng = np.random.default_rng([seed, *map(ord, method)])
    logits = rng.normal(size=(EXAMPLES, 2)).astype(np.float32)
    logits[np.arange(EXAMPLES), LABELS.astype(int)] += skill
    return logits


class Runs:
    """Runs of a folder, with figures that follow from their predictions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: list[dict[str, Any]] = []
        self.figures: list[Figure] = []
        self.values: dict[tuple[str, int], np.ndarray] = {}

    def add(self, method: str, seed: int, skill: float, labels: np.ndarray = LABELS, texts: str = "same") -> None:
        logits = logits_of(method, seed, skill)
        self.values[method, seed] = logits.argmax(axis=1)
        value = float((logits.argmax(axis=1) == labels)[~np.isnan(labels)].mean())
        self.figures.append(figure(method, value, seed))
        self.records.append({"digest": f"{method}{seed}", "run": f"{method}-s{seed}", "headline": "best"})
        students = {"other": -logits, "best": logits}
        split = SplitPredictions(np.arange(EXAMPLES), labels, students, {}, texts)
        write_predictions(self.file(method, seed), Predictions({"validation": split}))

    def file(self, method: str, seed: int) -> Path:
        return self.folder / f"{method}-s{seed}" / "predictions.npz"

    def comparison(self) -> Comparison:
        return with_tests_by_example(compare(entries_of(self.figures)), self.records, self.folder)

    def entry(self, method: str) -> Entry:
        (found,) = (entry for entry in self.comparison().entries if entry.method == method)
        return found


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    """Three methods with two seeds; the seeds of `kd` are not all the baseline's."""
    found = Runs(tmp_path)
    for method, seeds, skill in (("finetune", (0, 1), 0.5), ("kd", (1, 0, 2), 1.1), ("pkd", (0, 1), 0.9)):
        for seed in seeds:
            found.add(method, seed, skill)
    return found


@pytest.fixture
def one_seed(tmp_path: Path) -> Runs:
    """The same methods with one seed."""
    found = Runs(tmp_path / "one")
    for method, skill in (("finetune", 0.5), ("kd", 1.1), ("pkd", 0.6)):
        found.add(method, 0, skill)
    return found


def test_means_over_the_paired_seeds_are_compared_by_the_bootstrap_of_scipy(runs: Runs) -> None:
    test = runs.entry("kd").by_example
    right = {key: (values == LABELS).astype(float) for key, values in runs.values.items()}
    gains = (right["kd", 0] + right["kd", 1] - right["finetune", 0] - right["finetune", 1]) / 2
    assert test is not None
    assert (test.n, test.difference) == (EXAMPLES, pytest.approx(gains.mean(), abs=1e-12))
    drawn = bootstrap((gains,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(3))
    width = drawn.confidence_interval.high - drawn.confidence_interval.low
    # Quantiles of 1,999 draws have a standard error of about 3 % of the width.
    assert (test.low, test.high) == pytest.approx(tuple(drawn.confidence_interval), abs=0.1 * width)
    assert test.verdict == Verdict.BETTER


def test_p_is_corrected_over_the_methods_of_a_baseline(runs: Runs) -> None:
    tests = [runs.entry(method).by_example for method in ("kd", "pkd")]
    raw = [test.p for test in tests if test is not None]
    assert [test.adjusted for test in tests if test is not None] == holm(raw) != raw
    assert runs.entry("finetune").by_example is None


def test_any_budget_has_the_pairs_of_the_test_by_seed(one_seed: Runs) -> None:
    figures = [replace(one, budget="long") if one.method == "pkd" else one for one in one_seed.figures]
    tested = {}
    for any_budget in (False, True):
        compared = compare(entries_of(figures), any_budget=any_budget)
        found = with_tests_by_example(compared, one_seed.records, one_seed.folder).entries
        tested[any_budget] = {entry.method for entry in found if entry.by_example is not None and entry.mcnemar is not None}
    assert tested == {False: {"kd"}, True: {"kd", "pkd"}}
    kd = next(entry for entry in found if entry.method == "kd")
    assert (kd.mcnemar.adjusted, kd.by_example.adjusted) == (kd.mcnemar.p, kd.by_example.p)
    text = FORMATS["latex"](replace(compared, entries=found))
    told = {line.split()[3]: line for line in text.splitlines() if line.startswith("% By example, ")}
    assert told.keys() == {"kd", "pkd"}
    assert told["pkd"].endswith("; another budget.")
    assert "another" not in told["kd"]


def test_mcnemar_is_of_one_seed_alone_and_corrected_too(runs: Runs, one_seed: Runs) -> None:
    assert runs.entry("pkd").by_example is not None
    assert runs.entry("pkd").mcnemar is None
    raw = []
    for method in ("kd", "pkd"):
        ours, theirs = (one_seed.values[name, 0] == LABELS for name in (method, "finetune"))
        gained, lost = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
        test = one_seed.entry(method).mcnemar
        assert test is not None
        assert (test.method_only, test.baseline_only) == (gained, lost)
        raw.append(binomtest(gained, gained + lost).pvalue)
    tests = [one_seed.entry(method).mcnemar for method in ("kd", "pkd")]
    assert [test.adjusted for test in tests if test is not None] == pytest.approx(holm(raw))
    assert tests[1] is not None
    assert (tests[1].verdict == Verdict.NOT_SHOWN) == (holm(raw)[1] > 0.05)


def test_without_all_predictions_there_is_no_test_and_no_complaint(runs: Runs) -> None:
    runs.file("finetune", 1).unlink()
    for method in ("kd", "pkd"):
        entry = runs.entry(method)
        assert (entry.by_example, entry.mcnemar, entry.incomparable) == (None, None, "")
        assert entry.difference is not None
    assert "by example" not in FORMATS["markdown"](runs.comparison()).lower()


def test_runs_that_are_elsewhere_give_no_test(runs: Runs) -> None:
    runs.records = [record for record in runs.records if record["digest"] != "kd1"]
    assert runs.entry("kd").by_example is None
    assert runs.entry("pkd").by_example is not None


@pytest.mark.parametrize("change", [{"texts": "other"}, {"labels": 1 - LABELS}, {"labels": np.where(LABELS, np.nan, 0.0)}])
def test_other_examples_or_labels_are_refused_with_a_note(one_seed: Runs, change: dict[str, Any]) -> None:
    one_seed.figures, one_seed.records = one_seed.figures[:1], one_seed.records[:1]
    one_seed.add("kd", 0, 1.1, **change)
    entry = one_seed.entry("kd")
    assert (entry.by_example, entry.mcnemar) == (None, None)
    assert "other examples" in entry.incomparable
    text = FORMATS["markdown"](one_seed.comparison())
    assert "| not comparable |" in text
    assert "- Not compared by example: kd on rte: validation accuracy: the runs were evaluated on other examples" in text


def test_predictions_that_do_not_give_the_figure_are_refused(one_seed: Runs) -> None:
    one_seed.file("kd", 0).write_bytes(one_seed.file("pkd", 0).read_bytes())
    assert "not its figure" in one_seed.entry("kd").incomparable
    one_seed.file("pkd", 0).write_bytes(b"PK broken")
    assert "damaged" in one_seed.entry("pkd").incomparable


def test_examples_without_a_label_do_not_count(tmp_path: Path) -> None:
    labels = np.where(np.arange(EXAMPLES) < 50, np.nan, LABELS)
    runs = Runs(tmp_path)
    runs.add("finetune", 0, 0.5, labels)
    runs.add("kd", 0, 1.1, labels)
    test = runs.entry("kd").by_example
    assert test is not None
    assert test.n == EXAMPLES - 50


def test_a_metric_of_a_mixture_is_read_from_the_file_of_its_task(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    for method, skill in (("finetune", 0.5), ("kd", 1.1)):
        runs.add(method, 0, skill)
        target = runs.folder / f"{method}-s0" / "predictions" / "rte.npz"
        target.parent.mkdir()
        runs.file(method, 0).rename(target)
    assert runs.entry("kd").by_example is None
    runs.figures = [figure(f.method, f.value or 0.0, 0, metric="rte/accuracy", task="rte+mrpc") for f in runs.figures]
    assert runs.entry("kd").by_example is not None
    assert runs.entry("kd").mcnemar is not None


def test_every_format_shows_the_tests_and_that_they_are_about_these_models(one_seed: Runs) -> None:
    comparison = one_seed.comparison()
    entry = one_seed.entry("kd")
    assert entry.by_example is not None
    assert entry.mcnemar is not None
    shown = f"{100 * entry.by_example.difference:+.1f} [{100 * entry.by_example.low:+.1f}, {100 * entry.by_example.high:+.1f}]"
    sentence = "about these trained models on other examples of the same kind, not about the method"
    texts = {**{name: write(comparison) for name, write in FORMATS.items()}, "html": page(comparison)}
    for name in ("markdown", "latex", "html"):
        assert shown in texts[name]
        assert sentence in texts[name]
    assert sentence in texts["json"]
    assert "| by example | p by example | p of McNemar |" in texts["markdown"]
    assert ">p by example</button>" in texts["html"]
    assert f'data-value="{entry.mcnemar.adjusted!r}"' in texts["html"]
    pkd = one_seed.entry("pkd")
    assert probability(pkd.by_example) != probability(pkd.mcnemar)
    assert f" {probability(pkd.by_example)} | {probability(pkd.mcnemar)} | 0 |\n" in texts["markdown"]
    (row,) = (row for row in as_rows(comparison) if row["method"] == "kd")
    assert (row["by_example_difference"], row["by_example_n"]) == (entry.by_example.difference, EXAMPLES)
    assert (row["by_example_p"], row["by_example_p_corrected"]) == (entry.by_example.p, entry.by_example.adjusted)
    assert (row["mcnemar_method_only"], row["mcnemar_p_corrected"]) == (entry.mcnemar.method_only, entry.mcnemar.adjusted)
    assert row["by_example_verdict"] == "better"
    (line,) = (line for line in csv.DictReader(io.StringIO(texts["csv"])) if line["method"] == "kd")
    assert line["by_example_low"] == str(entry.by_example.low)
    json.loads(texts["json"])


def test_a_difference_that_nothing_makes_is_rarely_shown() -> None:
    """At .05, of 400 pairs of three runs that are equally good, 20 are expected; 33 or more have a probability of .4 %."""
    rng, shown = np.random.default_rng(11), 0
    for _ in range(400):
        labels = rng.integers(0, 2, 200)
        hard = rng.random(200) < 0.4
        guesses = [np.where(hard & (rng.random((3, 200)) < 0.5), 1 - labels, labels) for _ in range(2)]
        shown += counted_difference(*guesses, labels, COUNTED["accuracy"], draws=399).verdict != Verdict.NOT_SHOWN
    assert shown < 33
    assert shown > 4


@pytest.mark.parametrize("name", COUNTED)
def test_metrics_of_many_samples_are_those_of_runs(name: str) -> None:
    """Compare with the metrics that write the figures, on each sample; some have constant predictions or lack a class."""
    rng = np.random.default_rng(5)
    for trial in range(12):
        n, classes = int(rng.integers(2, 40)), 2 if name == "f1" else int(rng.integers(2, 5))
        if name in CLASSIFICATION:
            predictions, labels = rng.integers(0, classes, n), rng.integers(0, int(rng.integers(1, classes + 1)), n)
            predictions = predictions if trial % 4 else np.full(n, predictions[0])
        else:
            predictions = np.round(rng.normal(size=n), 1)
            labels = np.round(predictions + rng.normal(size=n), 1)
        counts = np.stack([np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(4)])
        values = COUNTED[name](predictions, labels, counts.astype(float))
        for value, row in zip(values, counts, strict=True):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                metric = CLASSIFICATION[name](classes) if name in CLASSIFICATION else REGRESSION[name]()
                metric.update(*(torch.tensor(np.repeat(side, row)) for side in (predictions, labels)))
                assert value == pytest.approx(float(metric.compute()), abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("name", ["accuracy", "f1", "matthews_corrcoef"])
def test_many_samples_at_once_give_what_one_by_one_gives(name: str) -> None:
    rng = np.random.default_rng(2)
    ours, theirs, labels = rng.integers(0, 2, (3, 80)), rng.integers(0, 2, (2, 80)), rng.integers(0, 2, 80)

    def one(predictions: np.ndarray, truth: np.ndarray) -> float:
        return float(COUNTED[name](predictions, truth, np.ones((1, len(truth))))[0])

    fast = counted_difference(ours, theirs, labels, COUNTED[name], draws=199)
    slow = example_difference(ours, theirs, labels, one, draws=199)
    assert (fast.difference, fast.low, fast.high) == pytest.approx((slow.difference, slow.low, slow.high))
    assert (fast.p, fast.differing, fast.verdict) == (slow.p, slow.differing, slow.verdict)


def test_samples_are_used_in_blocks_and_none_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = draw_counts(30, 101)
    assert counts.sum(axis=1).tolist() == [30] * 101
    assert len(np.unique(counts, axis=0)) == 101
    assert BLOCK >= 30
    monkeypatch.setattr("kd.results.statistics.examples.BLOCK", 100)
    found = list(blocks(counts))
    assert {len(block) for block in found} == {3, 2}
    assert np.array_equal(np.concatenate(found), counts)


def test_a_report_of_runs_has_the_tests(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Make whole runs, in a folder without others: predictions and figures are those that runs write."""
    more = (f"paths.runs={tmp_path}", "trainer.keep=figures")
    (finetune, _), (kd, _) = (made(small(f"method={method}", *more)) for method in ("finetune", "kd"))
    words = ["kd-report", str(tmp_path), "--method=finetune,kd", "--format=json"]
    monkeypatch.setattr(sys, "argv", words)
    capsys.readouterr()
    report.main()
    rows = json.loads(capsys.readouterr().out)["rows"]
    found = [row for row in rows if row["digests"] == kd.digest]
    assert {row["split"] for row in found} == {"validation", "test"}
    for row in found:
        ours, theirs = (read_predictions(run.directory).splits[row["split"]] for run in (kd, finetune))
        right, other = (split.students["student"].argmax(1) == split.labels for split in (ours, theirs))
        assert row["by_example_n"] == len(right) == 32
        assert row["by_example_difference"] == pytest.approx(right.mean() - other.mean())
        assert row["mcnemar_method_only"] == (right & ~other).sum()
        assert row["by_example_note"] == ""
