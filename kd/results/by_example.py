"""Tests by example of a comparison: the kept predictions of a method's runs beside those of its baseline's."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd.errors import InputError
from kd.results.comparison import Comparison, Entry, corrected_of_pairs, pairs_of
from kd.results.predictions import Predictions, read_predictions
from kd.results.statistics import (
    COUNTED,
    ExampleDifference,
    McNemar,
    corrected_by_example,
    counted_difference,
    mcnemar,
)
from kd.runs.run import predictions_file

ROUNDING = 1e-6
"""Largest difference between a metric in a record and the same of the kept logits, which are float32, that is rounding."""


@dataclass(frozen=True, eq=False)
class RunPredictions:
    """Predictions of a run's student on the labelled examples of one split.

    Attributes:
        texts: digest of the texts of the split.
        labels: (examples,) class indices or scores of all examples, NaN for none.
        values: (labelled examples,) predicted class indices or scores.
    """

    texts: str
    labels: NDArray[np.float64]
    values: NDArray[Any]

    @property
    def labelled(self) -> NDArray[np.float64]:
        """Labels of the labelled examples."""
        return self.labels[~np.isnan(self.labels)]

    def same_examples(self, other: "RunPredictions") -> bool:
        """Return whether two runs were evaluated on the same texts with the same labels."""
        return self.texts == other.texts and np.array_equal(self.labels, other.labels, equal_nan=True)


class KeptPredictions:
    """Predictions of the runs of a folder, each file of which is read once.

    Args:
        records: contents of `result.json`, with the names of the runs' folders as `run`.
        folder: folder of the runs.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]], folder: Path) -> None:
        self.records = {record["digest"]: record for record in records}
        self.folder = folder
        self.read = cache(read_predictions)

    def of(self, digest: str, split: str, metric: str) -> RunPredictions | None:
        """Return the predictions that a metric of a run is of; None if they are not at hand.

        Args:
            digest: digest of the run.
            split: name of the split.
            metric: name of the metric; that of a task of a mixture is `task/metric`.

        Raises:
            InputError: if the file is damaged.
        """
        record, task = self.records.get(digest), metric.rpartition("/")[0] or None
        if record is None or not predictions_file(self.folder / record["run"], task).is_file():
            return None
        predictions: Predictions = self.read(self.folder / record["run"], task)
        found = predictions.splits.get(split)
        logits = None if found is None else found.students.get(record.get("headline", ""))
        if found is None or logits is None:
            return None
        logits = logits[~np.isnan(found.labels)]
        values = logits[:, 0] if logits.shape[1] == 1 else logits.argmax(axis=1)
        return RunPredictions(found.texts, found.labels, values)


def with_tests_by_example(comparison: Comparison, records: Sequence[Mapping[str, Any]], folder: Path) -> Comparison:
    """Return a comparison with tests by example of each entry that has a baseline, where the predictions are at hand.

    The pairs are those of the test by seed: an entry and the baseline of its family, and the seeds that both have. Means over
    these seeds are compared by the paired bootstrap, and accuracies of one seed by McNemar's test too. p is corrected by Holm's
    procedure over the methods of the family. If a file of any of these runs is missing there is no test. If runs have
    other examples or labels, a file is damaged, or does not give the figure of its run, there is none either, and
    `Entry.incomparable` says why.

    Args:
        comparison: the comparison.
        records: contents of `result.json` of the runs at hand, with the names of the runs' folders as `run`.
        folder: folder of these runs.
    """
    kept, entries = KeptPredictions(records, folder), list(comparison.entries)
    bootstrap: dict[int, ExampleDifference] = {}
    exact: dict[int, McNemar] = {}
    pairs = pairs_of(entries, comparison.baseline, any_budget=comparison.any_budget)
    for index, pair in pairs.items():
        try:
            difference, test = tests_of(entries[index], pair.baseline, kept)
        except InputError as error:
            entries[index] = replace(entries[index], incomparable=error.message)
            continue
        if difference is not None:
            bootstrap[index] = difference
        if test is not None:
            exact[index] = test
    differences = corrected_of_pairs(pairs, bootstrap, corrected_by_example)
    counts = corrected_of_pairs(pairs, exact, corrected_by_example)
    tested = [
        replace(entry, by_example=differences.get(index), mcnemar=counts.get(index)) for index, entry in enumerate(entries)
    ]
    return replace(comparison, entries=tested)


def tests_of(entry: Entry, baseline: Entry, kept: KeptPredictions) -> tuple[ExampleDifference | None, McNemar | None]:
    """Return the paired bootstrap of an entry and its baseline, and McNemar's test if it applies; None without predictions.

    Raises:
        InputError: if the runs cannot be compared; see `paired_predictions`. Or if the metric is undefined in a sample.
    """
    runs = paired_predictions(entry, baseline, kept)
    if runs is None:
        return None, None
    ours, theirs = ([run.values for run in of_entry] for of_entry in runs)
    labels, metric = runs[0][0].labelled, metric_of(entry)
    difference = counted_difference(ours, theirs, labels, COUNTED[metric], higher_is_better=entry.higher_is_better)
    one_of_each = metric == "accuracy" and len(ours) == 1
    return difference, mcnemar(ours[0], theirs[0], labels) if one_of_each else None


def metric_of(entry: Entry) -> str:
    """Return the name of an entry's metric without that of a task of a mixture."""
    return entry.metric.rpartition("/")[2]


def paired_predictions(
    entry: Entry, baseline: Entry, kept: KeptPredictions
) -> tuple[list[RunPredictions], list[RunPredictions]] | None:
    """Return the predictions of the paired runs of an entry and of its baseline, in the order of their seeds.

    None if there is no pair, if predictions of a run are not at hand, or if the metric is not one of examples.

    Raises:
        InputError: if a file is damaged, runs have other examples or labels, or predictions do not give a run's figure.
    """
    seeds = [seed for seed in sorted(entry.values) if None not in (entry.values[seed], baseline.values.get(seed))]
    runs = [[kept.of(of.digests.get(seed, ""), of.split, of.metric) for seed in seeds] for of in (entry, baseline)]
    ours, theirs = ([run for run in of_entry if run is not None] for of_entry in runs)
    if not seeds or {len(ours), len(theirs)} != {len(seeds)} or metric_of(entry) not in COUNTED:
        return None
    for run in (*ours, *theirs):
        if not run.same_examples(ours[0]):
            raise InputError("the runs were evaluated on other examples, or with other labels")
    for of, found in ((entry, ours), (baseline, theirs)):
        for seed, run in zip(seeds, found, strict=True):
            check_figure(of, seed, run)
    return ours, theirs


def check_figure(entry: Entry, seed: int, run: RunPredictions) -> None:
    """Check that the predictions of a run give its figure.

    Raises:
        InputError: if they do not, as where a file was replaced.
    """
    metric, labels = metric_of(entry), run.labelled
    value = float(COUNTED[metric](run.values, labels, np.ones((1, len(labels))))[0]) if len(labels) else math.nan
    figure = entry.values[seed]
    if figure is None or not abs(value - figure) <= ROUNDING * max(1.0, abs(figure)):
        raise InputError(
            f"the predictions of {entry.method}, seed {seed}, give {metric} {value:.6f}, not its figure {figure:.6f}"
        )
