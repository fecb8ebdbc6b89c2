"""Comparison of trained models by example, on predictions for the same examples: paired bootstrap and McNemar's test."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest

from kd.errors import InputError
from kd.results.statistics.verdict import ALPHA, ROUNDING, Verdict, decided

Metric = Callable[[NDArray[Any], NDArray[Any]], float]
"""Metric of (examples,) predictions and (examples,) labels."""

EXAMPLE_DRAWS = 1_999
"""Number of bootstrap samples of examples, each of which computes the metric of every run."""


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
        verdict: outcome at ALPHA.
    """

    n: int
    differing: int
    difference: float
    low: float
    high: float
    p: float
    verdict: Verdict


@dataclass(frozen=True)
class McNemar:
    """Result of McNemar's test.

    Args:
        method_only: number of examples that only the method predicts correctly.
        baseline_only: number of examples that only the baseline predicts correctly.
        p: two-sided p.
        verdict: outcome at ALPHA.
    """

    method_only: int
    baseline_only: int
    p: float
    verdict: Verdict


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
        metric: function of (examples,) predictions and labels, such as accuracy, F1 or the Matthews correlation.
        higher_is_better: whether a higher value of the metric is better.
        draws: number of bootstrap samples, from a fixed generator.

    Raises:
        InputError: if the numbers of examples differ or are 0, or if the metric is not finite in the sample or in a draw.
    """
    ours, theirs, truth = np.atleast_2d(method), np.atleast_2d(baseline), np.asarray(labels)
    n = truth.size
    if not n or {ours.shape[1:], theirs.shape[1:]} != {truth.shape}:
        raise InputError(
            f"predictions and labels need the same examples, at least one, not {_shapes(method, baseline, labels)}"
        )

    def difference(rows: NDArray[np.intp]) -> float:
        ours_mean, theirs_mean = (np.mean([metric(run[rows], truth[rows]) for run in runs]) for runs in (ours, theirs))
        # A mean over runs that is equal but for rounding is equal, so that it counts on both sides of 0.
        equal = abs(ours_mean - theirs_mean) <= ROUNDING * max(abs(ours_mean), abs(theirs_mean))
        return 0.0 if equal else float(ours_mean - theirs_mean)

    generator = np.random.default_rng(0)
    observed = difference(np.arange(n))
    values = np.sort([difference(generator.integers(n, size=n)) for _ in range(draws)])
    if undefined := int(np.count_nonzero(~np.isfinite([observed, *values]))):
        raise InputError(f"the metric is undefined (not finite) in {undefined} of {1 + draws} samples of the {n} examples")
    differing = int(np.count_nonzero((np.concatenate([ours, theirs]) != ours[0]).any(axis=0)))
    sides = 1 + int(np.count_nonzero(values <= 0)), 1 + int(np.count_nonzero(values >= 0))
    p = min(1.0, max(2 * min(sides) / (1 + draws), 2.0 ** (1 - differing)))
    # The k-th of n draws is the quantile k / (n + 1), which is how p counts.
    rank = max(1, int(ALPHA / 2 * (1 + draws) + ROUNDING))
    verdict = decided(observed if higher_is_better else -observed, p)
    return ExampleDifference(n, differing, observed, float(values[rank - 1]), float(values[-rank]), p, verdict)


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
