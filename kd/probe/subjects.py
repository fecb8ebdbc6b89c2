"""Models that are compared, with their logits, and the examples that they are compared on."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kd.data.examples import Examples
from kd.data.tasks import Task
from kd.data.texts import Texts
from kd.errors import InputError, one_of
from kd.probe.differences import counted, predictions
from kd.probe.result import Settings
from kd.results.finished import KEY, Finished, ModelSource, examples_of
from kd.results.predictions import SplitPredictions, read_predictions
from kd.runs.run import predictions_file

CHOICE_SEED = 0
"""Seed of the choice of examples that models are run on, so that all models and runs have the same."""

ROUNDING = 1e-6
"""Largest relative difference between a score in a record and that of the stored logits, which are float32."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model that is compared.

    Attributes:
        place: where it is loaded from, or a reason why it cannot be.
        logits: of the examples of the split, (examples, classes).
        stored: whether the logits are those that its run stored.
    """

    place: ModelSource | str
    logits: NDArray[np.float32]
    stored: bool


@dataclass(frozen=True, eq=False)
class Chosen:
    """Examples of a task.

    Attributes:
        key: digest of the task and its data, which names what is computed of them.
        examples: all of them.
        split: the split that is compared.
        labelled: indices of those of the split that have a label.
        rows: indices of those whose vectors are compared.
        part_rows: indices of those that models are run on without their parts; the first of `rows` in the order of the draw.
        train_rows: indices of the training examples of linear probes.
        digest: digest of the texts of the split.
    """

    key: str
    examples: Examples
    split: str
    labelled: NDArray[np.int64]
    rows: NDArray[np.int64]
    part_rows: NDArray[np.int64]
    train_rows: NDArray[np.int64]
    digest: str

    @property
    def task(self) -> Task:
        """Labels and metrics."""
        return self.examples.task

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes, in the order of the logits; None for scores."""
        return None if self.task.labels is None else tuple(self.task.labels)

    @property
    def labels(self) -> NDArray[np.float64]:
        """Labels of the split, (examples,), NaN for a missing one."""
        return np.asarray(self.examples.labels[self.split], dtype=np.float64)

    def texts(self, rows: NDArray[np.int64], split: str | None = None) -> list[tuple[str, ...]]:
        """Return the texts of examples of the split, or of another one."""
        texts = self.examples.texts[split or self.split]
        return [texts[row] for row in rows.tolist()]


def choose(run: Finished, settings: Settings, key: str) -> Chosen:
    """Read the examples of a run, and choose those that models are run on.

    Args:
        run: the run.
        settings: the settings.
        key: `Chosen.key`.

    Raises:
        InputError: if the run was not evaluated on the split, or its data have other classes now.
    """
    examples, split = examples_of(run), settings.split
    if examples.task.labels != run.record["labels"]:
        raise InputError(
            f"the classes of '{run.directory}' are {run.record['labels']}, its data has {examples.task.labels} now", KEY
        )
    if split not in examples.evaluated:
        raise one_of(split, tuple(examples.evaluated), "--split")
    labelled, trained = (
        np.flatnonzero(~np.isnan(np.asarray(examples.labels[part], dtype=np.float64))) for part in (split, "train")
    )
    if not len(labelled):
        raise InputError(f"the split '{split}' of {run.task.name} has no labels", "--split")
    return Chosen(
        key,
        examples,
        split,
        labelled,
        some(labelled, settings.examples),
        some(labelled, settings.part_examples),
        some(trained, settings.train_examples),
        Texts.of(examples.texts[split]).digest(),
    )


def some(rows: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Return at most so many of some rows, drawn with a fixed seed, in their order.

    >>> some(np.arange(5), 9).tolist()
    [0, 1, 2, 3, 4]
    """
    order = np.random.default_rng(CHOICE_SEED).permutation(len(rows))[:most]
    chosen: NDArray[np.int64] = rows[np.sort(order)]
    return chosen


def stored_predictions(run: Finished, chosen: Chosen, *, same: bool) -> SplitPredictions | None:
    """Return the predictions that a run stored for a split; None if it stored none.

    Args:
        run: the run.
        chosen: the examples.
        same: whether the run has to be one of these examples; otherwise it has stored none if it is of others.

    Raises:
        InputError: if the file is damaged, or is of other examples than those that the run's configuration reads now.
    """
    if not predictions_file(run.directory, run.member).is_file():
        return None
    stored = read_predictions(run.directory, run.member).splits.get(chosen.split)
    if stored is None or (stored.texts == chosen.digest and np.array_equal(stored.labels, chosen.labels, equal_nan=True)):
        return stored
    if same:
        raise InputError(
            f"'{run.directory}' was evaluated on other examples, or labels, than its configuration reads now: its data has "
            "changed; paths.glue=... names GLUE's folder",
            KEY,
        )
    return None


def check_scores(name: str, logits: NDArray[np.float32], chosen: Chosen, scores: Mapping[str, float | None]) -> None:
    """Check that stored predictions give the scores of a record.

    Raises:
        InputError: if they do not, as where a file was replaced.
    """
    labelled = chosen.labelled
    predicted = predictions(logits[labelled], chosen.classes is not None)
    for metric, score in scores.items():
        value = float(counted(metric, predicted, chosen.labels[labelled])(np.ones((1, len(labelled))))[0])
        if score is not None and not math.isclose(value, score, rel_tol=ROUNDING, abs_tol=ROUNDING):
            raise InputError(
                f"the stored predictions of {name} give {metric} {value:.6f}, its result.json has {score:.6f}", KEY
            )
