"""Comparison of a method with a baseline by pairs of runs with one seed: sign-flip test, paired t-test and t interval."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import ttest_1samp

from kd.errors import InputError
from kd.results.statistics.verdict import ALPHA, ROUNDING, Verdict, decided

Floats = NDArray[np.float64]

MIN_SEEDS = 6
"""Smallest number of pairs that decide anything: with fewer a sign-flip test cannot reach ALPHA, see `seeds_needed`, and could
not contradict a t-test. `experiments/statistics` has the simulations."""

EXACT_SEEDS = 20
"""Largest number of pairs for which all sign assignments are enumerated, about a million; with more, some are drawn."""

FLIPS = 99_999
"""Number of sign assignments that are drawn. The standard error of a p of .05 is 0.0007."""

BLOCK = 2**21
"""Largest number of sums of sign assignments that are held at once: 16 MB."""


class SeedTest(StrEnum):
    """Test by seed that gives p and verdict."""

    SIGN_FLIP = "sign-flip test"
    T = "paired t-test"


@dataclass(frozen=True)
class PairedDifference:
    """Difference of a method and a baseline over pairs of runs with one seed.

    Args:
        n: number of pairs.
        mean: mean difference, method minus baseline; None without pairs.
        low: lower end of the 95 % interval of the mean, `t_interval`; None with fewer than MIN_SEEDS pairs, and if all
            differences are equal. It is not corrected for several tests.
        high: upper end.
        p: two-sided p of `test`; None without pairs, and where that test has none.
        verdict: outcome at ALPHA, by `adjusted` if it is set, else by `p`, never by the interval.
        unpaired: seeds without a pair: only one of the two was run, or a score is undefined.
        higher_is_better: whether a positive difference is an improvement.
        adjusted: p corrected for several tests; None if it is not corrected.
        test: test that `p` is of, see `seed_test`; None without pairs.
        sign_flip: two-sided p of `sign_flip_p`; None without pairs.
        t: two-sided p of `t_p`; None where that is undefined.
        spread: standard deviation of the differences, with n - 1; None with fewer than two pairs.
        comparisons: number of tests that `adjusted` is corrected for; 1 if it is not corrected.
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
    test: SeedTest | None = None
    sign_flip: float | None = None
    t: float | None = None
    spread: float | None = None
    comparisons: int = 1

    @property
    def gain(self) -> float:
        """The mean difference, positive for an improvement; 0 without pairs."""
        return (self.mean or 0.0) * (1 if self.higher_is_better else -1)

    def tested(self, comparisons: int = 1) -> "PairedDifference":
        """Return the difference with the p and the verdict of the test for so many comparisons, not yet corrected.

        Args:
            comparisons: number of tests that are corrected together.
        """
        test = seed_test(self.n, comparisons)
        p = self.sign_flip if test is SeedTest.SIGN_FLIP else self.t
        verdict = Verdict.TOO_FEW_SEEDS if self.n < MIN_SEEDS else Verdict.NO_SPREAD if p is None else decided(self.gain, p)
        return replace(self, test=test, p=p, adjusted=None, verdict=verdict, comparisons=1)


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


def seed_test(pairs: int, comparisons: int = 1) -> SeedTest:
    """Return the test that decides: by the numbers of pairs and comparisons alone, never by the scores.

    It is the sign-flip test if that can decide, with `seeds_needed` pairs or more, because it supposes less. With fewer it is
    the paired t-test, from MIN_SEEDS pairs on. Below MIN_SEEDS pairs nothing decides, and the p that is shown is that of the
    sign-flip test. Our choice; `docs/statistics.md` has the reasons, and the price: `seeds_needed` pairs show less than one
    pair fewer does by the t-test. Pairs with an undefined score do not count, so that a run without one may change the
    test; such seeds are reported as unpaired.

    Args:
        pairs: number of pairs.
        comparisons: number of tests that are corrected together.

    >>> [str(seed_test(pairs, 25)) for pairs in (5, 6, 9, 10)]
    ['sign-flip test', 'paired t-test', 'paired t-test', 'sign-flip test']
    """
    return SeedTest.T if MIN_SEEDS <= pairs < seeds_needed(comparisons) else SeedTest.SIGN_FLIP


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
    return float(p_values(SeedTest.SIGN_FLIP, _finite(differences)[None])[0])


def t_p(differences: ArrayLike) -> float | None:
    """Return the two-sided p of Student's paired t-test, which supposes that differences are normal.

    Unlike that of the sign-flip test it can be small with few pairs, and rests on a shape of the differences that so few
    cannot show. Differences that are all equal give none: t is then infinite, as if nothing were uncertain, where all that is
    known is that the spread is below the resolution of the scores. If all are 0, p is 1, as that of any test.

    Source: Student, Biometrika 6(1), 1908; computed by `scipy.stats.ttest_1samp`.

    Args:
        differences: (pairs,), in any unit.

    Returns:
        p; None with fewer than two differences, and if all are equal to one another and not 0.

    Raises:
        InputError: if a difference is not finite.

    >>> round(t_p([1, 2, 3, 4, 5, 6]), 4), t_p([0, 0, 0]), t_p([0.25, 0.25, 0.25])
    (0.0059, 1.0, None)
    """
    values = _finite(differences)
    if len(values) < 2:
        return None
    p = float(p_values(SeedTest.T, values[None])[0])
    return None if math.isnan(p) else p


def t_interval(differences: ArrayLike) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean by Student's t; None with fewer than two differences, and if all are equal.

    It supposes normal differences. It covers the mean more often than a bootstrap interval (BCa) for six and for ten pairs, of
    normal differences and of skewed ones: `experiments/statistics` has the rates.

    Source: Student, Biometrika 6(1), 1908; computed by `scipy.stats.ttest_1samp`.

    Args:
        differences: (pairs,), in any unit.

    Raises:
        InputError: if a difference is not finite.
    """
    values = _finite(differences)
    if len(values) < 2 or _all_equal(values[None])[0]:
        return None
    interval = ttest_1samp(values, 0).confidence_interval(1 - ALPHA)
    return float(interval.low), float(interval.high)


def _all_equal(rows: Floats) -> NDArray[np.bool_]:
    """Return whether the differences of a row, (samples, pairs), are equal but for rounding, (samples,)."""
    equal: NDArray[np.bool_] = np.ptp(rows, axis=1) <= ROUNDING * np.abs(rows).max(axis=1)
    return equal


def p_values(test: SeedTest, differences: Floats) -> Floats:
    """Return two-sided p of many samples of differences at once: those of `sign_flip_p` or `t_p`, with NaN for None.

    Args:
        test: the test.
        differences: (samples, pairs) finite differences, two or more pairs for the t-test.

    Returns:
        p of each sample, (samples,).
    """
    if test is SeedTest.T:
        equal = _all_equal(differences)
        found = np.where(equal & ~differences.any(axis=1), 1.0, np.nan)
        if not equal.all():
            found[~equal] = ttest_1samp(differences[~equal], 0, axis=1).pvalue
        return found
    size = max(1, BLOCK // 2 ** differences.shape[1] if differences.shape[1] <= EXACT_SEEDS else BLOCK // FLIPS)
    blocks = [_sign_flip(differences[start : start + size]) for start in range(0, len(differences), size)]
    return np.concatenate([np.zeros(0), *blocks])


def _sign_flip(rows: Floats) -> Floats:
    """Return the p of the sign-flip test of each row, (samples, pairs)."""
    observed = np.abs(rows.sum(axis=1)) - ROUNDING * np.abs(rows).sum(axis=1)
    if rows.shape[1] <= EXACT_SEEDS:
        sums = np.zeros((len(rows), 1))
        for column in rows.T[:, :, None]:
            sums = np.concatenate([sums + column, sums - column], axis=1)
        exact: Floats = (np.abs(sums) >= observed[:, None]).mean(axis=1)
        return exact
    generator, sums = np.random.default_rng(0), np.zeros((len(rows), FLIPS))
    for column in rows.T[:, :, None]:
        sums += column * generator.choice([-1.0, 1.0], FLIPS)
    drawn: Floats = (1 + np.count_nonzero(np.abs(sums) >= observed[:, None], axis=1)) / (1 + FLIPS)
    return drawn


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

    With fewer than MIN_SEEDS pairs the verdict is "too few seeds to decide": p of the sign-flip test cannot reach ALPHA
    whatever the scores (see `seeds_needed`). There is no interval then either, because one would be read as a verdict. p and
    verdict are those of a single test; `kd.results.statistics.corrected` decides several, by the test that can.

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
    low, high = (t_interval(differences) if len(pairs) >= MIN_SEEDS else None) or (None, None)
    untested = PairedDifference(
        *(len(pairs), mean, low, high, None, Verdict.TOO_FEW_SEEDS, unpaired, higher_is_better),
        sign_flip=sign_flip_p(differences),
        t=t_p(differences),
        spread=_spread(differences),
    )
    return untested.tested()


def _spread(values: Floats) -> float | None:
    """Return the standard deviation of differences, 0 if they are equal but for rounding; None for fewer than two."""
    if len(values) < 2:
        return None
    return 0.0 if _all_equal(values[None])[0] else float(values.std(ddof=1))


def _defined(score: float | None) -> float | None:
    return score if score is not None and math.isfinite(score) else None
