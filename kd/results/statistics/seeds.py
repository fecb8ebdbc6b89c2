"""Comparison of a method with a baseline by pairs of runs with one seed: sign-flip test and BCa interval."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import bootstrap

from kd.errors import InputError
from kd.results.statistics.verdict import ALPHA, ROUNDING, Verdict, decided

MIN_SEEDS = 6
"""Smallest number of pairs with which a sign-flip test can reach ALPHA; see `seeds_needed`."""

EXACT_SEEDS = 20
"""Largest number of pairs for which all sign assignments are enumerated, about a million; with more, some are drawn."""

FLIPS = 99_999
"""Number of sign assignments that are drawn. The standard error of a p of .05 is 0.0007."""

DRAWS = 9_999
"""Number of bootstrap samples of an interval."""


@dataclass(frozen=True)
class PairedDifference:
    """Difference of a method and a baseline over pairs of runs with one seed.

    Args:
        n: number of pairs.
        mean: mean difference, method minus baseline; None without pairs.
        low: lower end of the 95 % interval of the mean, `bca_interval`; None with fewer than MIN_SEEDS pairs, and if all
            differences are equal.
        high: upper end.
        p: two-sided p of `sign_flip_p`; None without pairs.
        verdict: outcome at ALPHA, by `adjusted` if it is set, else by `p`, never by the interval.
        unpaired: seeds without a pair: only one of the two was run, or a score is undefined.
        higher_is_better: whether a positive difference is an improvement.
        adjusted: p corrected for several tests; None if it is not corrected.
    """

    n: int
    mean: float | None
    low: float | None
    high: float | None
    p: float | None
    verdict: Verdict
    unpaired: tuple[int, ...] = ()
    higher_is_better: bool = True
    adjusted: float | None = None

    @property
    def gain(self) -> float:
        """The mean difference, positive for an improvement; 0 without pairs."""
        return (self.mean or 0.0) * (1 if self.higher_is_better else -1)


def seeds_needed(comparisons: int = 1) -> int:
    """Return the smallest number of pairs with which a two-sided sign-flip test can reach ALPHA.

    With n pairs there are 2^n sign assignments, and two of them, all positive and all negative, are as extreme as can be. So
    no p is below 2 / 2^n: three pairs never give less than .25, five never less than .0625, six may give .031. A correction
    multiplies the smallest p by the number of comparisons.

    Args:
        comparisons: number of tests that are corrected together.

    >>> seeds_needed(), seeds_needed(3), seeds_needed(27)
    (6, 7, 11)
    """
    return next(n for n in itertools.count(1) if comparisons * 2 / 2**n <= ALPHA)


def sign_flip_p(differences: ArrayLike) -> float:
    """Return the two-sided p of the sign-flip test, a permutation test of differences that are symmetric about 0.

    If method and baseline are interchangeable, each pair could as well have given the negative difference. p is the fraction
    of all 2^n assignments of signs whose sum is, in absolute value, at least the observed sum. The observed assignment is one
    of them, so p is at least 2 / 2^n (1 if all differences are 0). With more than EXACT_SEEDS differences, FLIPS assignments
    are drawn by a fixed generator, and the observed one is counted besides: (1 + extreme) / (1 + FLIPS).

    Source: Fisher, The Design of Experiments, 1935, section 21; the count of the observed one among random assignments:
    Phipson and Smyth, Statistical Applications in Genetics and Molecular Biology 9(1), 2010, arXiv:1603.05766.

    Args:
        differences: (pairs,), in any unit. Sums that differ by less than ROUNDING of the sum of absolute differences count as
            equal, which can only increase p.

    Raises:
        InputError: if a difference is not finite.

    >>> sign_flip_p([1, 2, 3, 4, 5, 6]), sign_flip_p([1, 2, 3])
    (0.03125, 0.25)
    """
    values = _finite(differences)
    observed = abs(values.sum()) - ROUNDING * np.abs(values).sum()
    if len(values) <= EXACT_SEEDS:
        sums = np.zeros(1)
        for value in values:
            sums = np.concatenate([sums + value, sums - value])
        return float(np.mean(np.abs(sums) >= observed))
    generator, sums = np.random.default_rng(0), np.zeros(FLIPS)
    for value in values:
        sums += generator.choice([-value, value], FLIPS)
    return float((1 + np.count_nonzero(np.abs(sums) >= observed)) / (1 + FLIPS))


def bca_interval(differences: ArrayLike) -> tuple[float, float] | None:
    """Return the 95 % bias-corrected and accelerated bootstrap interval of the mean, from a fixed generator.

    None if there are fewer than two differences, or if all are equal: the acceleration is then 0 / 0, and a bootstrap would
    return a single point, as if nothing were uncertain. With few differences intervals are too short, because so small a
    sample shows too little of the spread: `docs/statistics.md` has the measured coverage.

    Source: Efron, Journal of the American Statistical Association 82(397), 1987; computed by `scipy.stats.bootstrap`.

    Args:
        differences: (pairs,), in any unit.

    Raises:
        InputError: if a difference is not finite.
    """
    values = _finite(differences)
    if len(values) < 2 or np.ptp(values) <= ROUNDING * np.abs(values).max():
        return None
    generator = np.random.default_rng(0)
    drawn = bootstrap((values,), np.mean, n_resamples=DRAWS, confidence_level=1 - ALPHA, method="BCa", rng=generator)
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    """Return values as an array, and raise an InputError if one is not finite."""
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise InputError(f"differences {array.tolist()} are not all finite: leave out pairs with an undefined score")
    return array


def seed_difference(
    method: Mapping[int, float | None], baseline: Mapping[int, float | None], *, higher_is_better: bool = True
) -> PairedDifference:
    """Return the mean difference of a method and a baseline over seeds, its interval, p and verdict.

    The unit is a pair of runs that differ in the method alone: seed, initialisation, order of the examples and teacher are the
    same. This function sees only seeds; the caller pairs what else has to agree. Statements are about further seeds on the
    same data and with the same teacher: they do not extend to another teacher if all seeds share one.

    With fewer than MIN_SEEDS pairs p cannot reach ALPHA whatever the scores (see `seeds_needed`), and the verdict is
    "too few seeds to decide". There is no interval then either: that of three pairs often excludes 0, and would be read as a
    verdict.

    Args:
        method: score of each seed of the method; None or NaN if it is undefined.
        baseline: score of each seed of the baseline.
        higher_is_better: whether a higher score is better; False for errors and losses.

    Returns:
        The difference. Seeds that only one of the two has, or whose score is undefined, are in `unpaired` and have to be
        reported: if undefined scores are those of runs that collapsed, leaving them out favours what collapses.

    >>> seed_difference({0: 0.75, 1: 0.5}, {0: 0.5, 1: 0.5, 2: 0.5}).unpaired
    (2,)
    """
    scores = {seed: (_defined(method.get(seed)), _defined(baseline.get(seed))) for seed in sorted({*method, *baseline})}
    pairs = [(one, other) for one, other in scores.values() if one is not None and other is not None]
    unpaired = tuple(seed for seed, pair in scores.items() if None in pair)
    if not pairs:
        return PairedDifference(0, None, None, None, None, Verdict.TOO_FEW_SEEDS, unpaired, higher_is_better)
    ours, theirs = np.asarray(pairs, dtype=np.float64).T
    differences = ours - theirs
    differences[np.abs(differences) <= ROUNDING * np.maximum(np.abs(ours), np.abs(theirs))] = 0
    total = differences.sum()
    mean = float(total / len(pairs)) if abs(total) > ROUNDING * np.abs(differences).sum() else 0.0
    low, high = (bca_interval(differences) if len(pairs) >= MIN_SEEDS else None) or (None, None)
    p = sign_flip_p(differences)
    few = Verdict.TOO_FEW_SEEDS if len(pairs) < MIN_SEEDS else Verdict.NOT_SHOWN
    verdict = decided(mean if higher_is_better else -mean, p, few)
    return PairedDifference(len(pairs), mean, low, high, p, verdict, unpaired, higher_is_better)


def _defined(score: float | None) -> float | None:
    return score if score is not None and math.isfinite(score) else None
