"""Comparison of trained models by example, on predictions for the same examples: paired bootstrap and McNemar's test."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest

from kd.errors import InputError
from kd.results.statistics.counted import CountedMetric, Floats, one_by_one
from kd.results.statistics.verdict import ALPHA, ROUNDING, Verdict, decided

Metric = Callable[[NDArray[Any], NDArray[Any]], float]
"""Metric of (examples,) predictions and (examples,) labels."""

EXAMPLE_DRAWS = 1_999
"""Number of bootstrap samples of examples, each of which computes the metric of every run."""

SEED = 0
"""Seed of the generator of the samples: for a number of examples they are always the same."""

BLOCK = 2**21
"""Largest number of counts that are used at once: 16 MB."""


@dataclass(frozen=True)
class ExampleDifference:
    """Difference of a metric over examples, for given trained models.

    Args:
        n: number of examples.
        differing: number of examples for which the predictions of method and baseline, of all their runs, are not all equal.
        difference: difference of the metric, method minus baseline, each the mean over its runs.
        low: lower end of the 95 % percentile interval.
        high: upper end.
        p: two-sided p; see `example_difference`.
        verdict: outcome at ALPHA, by `adjusted` if it is set, else by `p`.
        adjusted: p corrected for several tests; None if it is not corrected.
    """

    n: int
    differing: int
    difference: float
    low: float
    high: float
    p: float
    verdict: Verdict
    adjusted: float | None = None


@dataclass(frozen=True)
class McNemar:
    """Result of McNemar's test.

    Args:
        method_only: number of examples that only the method predicts correctly.
        baseline_only: number of examples that only the baseline predicts correctly.
        p: two-sided p.
        verdict: outcome at ALPHA, by `adjusted` if it is set, else by `p`.
        adjusted: p corrected for several tests; None if it is not corrected.
    """

    method_only: int
    baseline_only: int
    p: float
    verdict: Verdict
    adjusted: float | None = None


def example_difference(
    method: ArrayLike,
    baseline: ArrayLike,
    labels: ArrayLike,
    metric: Metric,
    *,
    higher_is_better: bool = True,
    draws: int = EXAMPLE_DRAWS,
) -> ExampleDifference:
    """Return the difference of a metric over examples with a paired bootstrap interval, p and verdict.

    The unit is an example. Each draw takes as many examples with replacement, the same for both models and all their runs,
    and computes the difference of the metric. Statements are about other examples of the same kind, for these trained models.
    The interval does not cover what another seed, teacher or training set would change. That holds for several runs too:
    their mean is one fixed quantity here, and more runs shorten the interval only by averaging. For the question whether
    training with the method gives better models, see `kd.results.statistics.seed_difference`.

    p is twice the smaller fraction of draws on either side of 0, the observed sample counted as a draw, so that it is at most
    ALPHA where the interval excludes 0. But p is at least 2 / 2^differing, the smallest p of a test that exchanges the
    predictions of an example: with predictions that differ for four examples a bootstrap is too sure.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13; paired over test examples: Koehn,
    EMNLP 2004; Berg-Kirkpatrick, Burkett and Klein, EMNLP 2012. The lower bound of p is our choice.

    Args:
        method: (examples,) predictions of one run, or (runs, examples): classes, or scores of a regression.
        baseline: the same for the baseline, of any number of runs.
        labels: (examples,).
        metric: function of (examples,) predictions and labels, such as accuracy, F1 or the Matthews correlation. It is called
            for each run and draw; `counted_difference` is faster for the metrics of `kd.results.statistics.counted`.
        higher_is_better: whether a higher value of the metric is better.
        draws: number of bootstrap samples, from a fixed generator.

    Raises:
        InputError: if the numbers of examples differ or are 0, or if the metric is not finite in the sample or in a draw.
    """
    return counted_difference(method, baseline, labels, one_by_one(metric), higher_is_better=higher_is_better, draws=draws)


def counted_difference(
    method: ArrayLike,
    baseline: ArrayLike,
    labels: ArrayLike,
    metric: CountedMetric,
    *,
    higher_is_better: bool = True,
    draws: int = EXAMPLE_DRAWS,
) -> ExampleDifference:
    """Return what `example_difference` returns, by a metric that is computed for many samples at once.

    The samples of a number of examples are drawn once, and kept for the next call.

    Args:
        method: as for `example_difference`.
        baseline: as for `example_difference`.
        labels: as for `example_difference`.
        metric: a value of `kd.results.statistics.counted.COUNTED`.
        higher_is_better: whether a higher value of the metric is better.
        draws: number of bootstrap samples.

    Raises:
        InputError: as for `example_difference`.
    """
    ours, theirs, truth = np.atleast_2d(method), np.atleast_2d(baseline), np.asarray(labels)
    n = truth.size
    if not n or {ours.shape[1:], theirs.shape[1:]} != {truth.shape}:
        raise InputError(
            f"predictions and labels need the same examples, at least one, not {_shapes(method, baseline, labels)}"
        )

    def differences(counts: Floats) -> Floats:
        ours_mean, theirs_mean = (np.mean([metric(run, truth, counts) for run in runs], axis=0) for runs in (ours, theirs))
        # A mean over runs that is equal but for rounding is equal, so that it counts on both sides of 0.
        equal = np.abs(ours_mean - theirs_mean) <= ROUNDING * np.maximum(np.abs(ours_mean), np.abs(theirs_mean))
        return np.where(equal, 0.0, ours_mean - theirs_mean)

    observed = float(differences(np.ones((1, n)))[0])
    values = np.sort(np.concatenate([differences(block) for block in blocks(draw_counts(n, draws))]))
    if undefined := int(np.count_nonzero(~np.isfinite([observed, *values]))):
        raise InputError(f"the metric is undefined (not finite) in {undefined} of {1 + draws} samples of the {n} examples")
    differing = int(np.count_nonzero((np.concatenate([ours, theirs]) != ours[0]).any(axis=0)))
    sides = 1 + int(np.count_nonzero(values <= 0)), 1 + int(np.count_nonzero(values >= 0))
    p = min(1.0, max(2 * min(sides) / (1 + draws), 2.0 ** (1 - differing)))
    verdict = decided(observed if higher_is_better else -observed, p)
    return ExampleDifference(n, differing, observed, *percentiles(values), p, verdict)


def percentiles(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the ends of the 95 % percentile interval of the values of bootstrap samples, (draws,), which are sorted.

    The k-th of n draws is the quantile k / (n + 1), which is how p counts.
    """
    rank = max(1, int(ALPHA / 2 * (1 + len(values)) + ROUNDING))
    return float(values[rank - 1]), float(values[-rank])


@lru_cache(maxsize=8)
def draw_counts(n: int, draws: int) -> NDArray[np.uint8]:
    """Return the number of times that each of n examples is in each bootstrap sample, (draws, n).

    More than 255 times, the limit of uint8, needs more than 255 examples, and has then a probability below 1 / 255!.
    """
    generator = np.random.default_rng(SEED)
    return np.stack([np.bincount(generator.integers(n, size=n), minlength=n).astype(np.uint8) for _ in range(draws)])


def blocks(counts: NDArray[np.uint8]) -> Iterator[Floats]:
    """Yield counts in blocks of rows, as float64."""
    rows = max(1, BLOCK // counts.shape[1])
    for start in range(0, len(counts), rows):
        yield counts[start : start + rows].astype(np.float64)


def mcnemar(method: ArrayLike, baseline: ArrayLike, labels: ArrayLike) -> McNemar:
    """Return McNemar's exact test of the hypothesis that two models are correct equally often.

    Only examples that one of the two alone predicts correctly count; under the hypothesis each is the method's with
    probability 1/2. The unit is an example, and the statement is about these two trained models, as for `example_difference`.
    One run of each is taken: with several seeds an example would count several times as if it were several examples, which
    makes p too small. `example_difference` compares means over seeds.

    Source: McNemar, Psychometrika 12(2), 1947; the exact test is `scipy.stats.binomtest`.

    Args:
        method: (examples,), predicted classes of one run of the method.
        baseline: (examples,), of one run of the baseline.
        labels: (examples,).

    Raises:
        InputError: if the shapes differ, or are those of several runs.

    >>> mcnemar([1, 1, 1, 0], [1, 0, 0, 1], [1, 1, 1, 1]).p
    1.0
    """
    ours, theirs, truth = np.asarray(method), np.asarray(baseline), np.asarray(labels)
    if truth.ndim != 1 or {ours.shape, theirs.shape} != {truth.shape}:
        shapes = _shapes(method, baseline, labels)
        raise InputError(f"McNemar's test takes one run of each, on the same examples: {shapes}")
    right, other_right = ours == truth, theirs == truth
    gained, lost = int(np.count_nonzero(right & ~other_right)), int(np.count_nonzero(other_right & ~right))
    p = sign_p(gained, lost)
    return McNemar(gained, lost, p, decided(gained - lost, p))


def sign_p(positive: int, negative: int) -> float:
    """Return the two-sided p of the sign test, that two counts are equally probable; 1 if both are 0.

    >>> sign_p(6, 0), sign_p(1, 8)
    (0.03125, 0.0390625)
    """
    return float(binomtest(positive, positive + negative).pvalue) if positive + negative else 1.0


def _shapes(method: ArrayLike, baseline: ArrayLike, labels: ArrayLike) -> str:
    return f"method {np.shape(method)}, baseline {np.shape(baseline)}, labels {np.shape(labels)}"
