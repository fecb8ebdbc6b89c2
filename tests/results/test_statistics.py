"""Tests of a method against a baseline: p, intervals, corrections and verdicts, against exact arithmetic and SciPy."""

import itertools
import math
import warnings
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom, norm, permutation_test, t, ttest_rel

from kd.errors import InputError
from kd.results.statistics import (
    ALPHA,
    MIN_SEEDS,
    PairedDifference,
    SeedTest,
    Verdict,
    bonferroni,
    corrected,
    corrected_by_example,
    example_difference,
    holm,
    mcnemar,
    p_values,
    seed_difference,
    seed_test,
    seeds,
    seeds_needed,
    sign_flip_p,
    t_interval,
    t_p,
    task_summary,
)

SAMPLES = {
    "normal": lambda rng, n: rng.normal(0.3, 1, n),
    "skewed": lambda rng, n: rng.exponential(1, n) - 0.7,
    "ties": lambda rng, n: rng.integers(-2, 3, n).astype(float),
}
samples = pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
Draw = Callable[[np.random.Generator, int], NDArray[np.float64]]


def by_seed(scores: list[float]) -> dict[int, float | None]:
    return dict(enumerate(scores))


def difference(values: list[float], **more: bool) -> PairedDifference:
    return seed_difference(by_seed(values), by_seed([0.0] * len(values)), **more)


def accuracy(predictions: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
    return float(np.mean(predictions == labels))


def f1(predictions: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
    both = int(np.sum(predictions & labels))
    return 2 * both / max(1, int(predictions.sum() + labels.sum()))


def matthews(predictions: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
    p, y, both = predictions.mean(), labels.mean(), np.mean(predictions & labels)
    return float((both - p * y) / math.sqrt(p * (1 - p) * y * (1 - y)))


# Pairs by seed


@samples
@pytest.mark.parametrize("n", [2, 3, 6, 8])
def test_sign_flip_is_the_permutation_test_of_scipy(sample: Draw, n: int) -> None:
    rng = np.random.default_rng(n)
    for _ in range(20):
        values = sample(rng, n)
        expected = permutation_test((values,), np.sum, permutation_type="samples", n_resamples=np.inf).pvalue
        assert sign_flip_p(values) == pytest.approx(expected, abs=1e-12)


def test_sign_flip_counts_ties_of_accuracies_as_in_integers() -> None:
    """Compare with numbers of correct examples: equal differences of accuracies differ by rounding."""
    rng = np.random.default_rng(0)
    signs = np.array(list(itertools.product((1, -1), repeat=7)))
    for _ in range(40):
        ours, theirs = rng.integers(180, 190, (2, 7))
        exact = ours - theirs
        found = seed_difference(by_seed(list(ours / 277)), by_seed(list(theirs / 277)))
        assert found.p == np.mean(np.abs(signs @ exact) >= abs(exact.sum()))
        assert found.mean == pytest.approx(exact.mean() / 277, abs=1e-15)
        assert (found.mean == 0) == (exact.sum() == 0)


def test_smallest_p_is_two_of_all_assignments_and_three_seeds_never_decide() -> None:
    for n in range(1, 12):
        assert sign_flip_p(np.arange(1, n + 1)) == 2 / 2**n
        assert sign_flip_p(-np.arange(1, n + 1)) == 2 / 2**n
    assert next(n for n in range(1, 12) if sign_flip_p(np.ones(n)) <= ALPHA) == MIN_SEEDS == seeds_needed() == 6
    assert [seeds_needed(m) for m in (1, 2, 3, 10, 27)] == [6, 7, 7, 9, 11]
    for n in range(6):
        assert difference([1.0 + k for k in range(n)]).verdict == "too few seeds to decide"


def test_random_flips_estimate_the_exact_p_and_count_the_observed_assignment() -> None:
    rng = np.random.default_rng(3)
    for shift in (0.0, 1.0, 2.0):
        values = np.rint(rng.normal(shift, 4, 30)).astype(int)
        sums = Counter({0: 1})
        for value in values.tolist():
            step: Counter[int] = Counter()
            for total, count in sums.items():
                step[total + value] += count
                step[total - value] += count
            sums = step
        exact = sum(count for total, count in sums.items() if abs(total) >= abs(values.sum())) / 2**30
        # Binomial error of the drawn fraction, four standard deviations.
        assert sign_flip_p(values) == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / seeds.FLIPS) + 1e-5)
    assert sign_flip_p(np.ones(60)) == 1 / (1 + seeds.FLIPS)


@pytest.mark.parametrize("n", [6, 10])
def test_no_more_than_five_in_a_hundred_nulls_are_rejected(n: int) -> None:
    """Compare 1,000 null samples with the level that 2^n assignments can have, 1/32 and 25/512.

    p of continuous differences is k / 2^(n-1), each k with one probability, so rejections are binomial at the largest such
    value up to .05; the bounds are its quantiles of 0.05 % and 99.95 %.
    """
    level = math.floor(ALPHA * 2 ** (n - 1)) / 2 ** (n - 1)
    assert level == {6: 1 / 32, 10: 25 / 512}[n]
    rng = np.random.default_rng(15)
    rejected = sum(sign_flip_p(rng.normal(size=n)) <= ALPHA for _ in range(1000))
    assert binom.ppf(0.0005, 1000, level) <= rejected <= binom.ppf(0.9995, 1000, level)
    assert rejected <= binom.ppf(0.9995, 1000, ALPHA)


def test_six_seeds_find_a_gain_of_one_spread_if_all_have_its_sign() -> None:
    """Compare with the probability that six normal differences have one sign, within its quantiles of 0.05 % and 99.95 %."""
    power = norm.cdf(1) ** 6 + norm.cdf(-1) ** 6
    rng = np.random.default_rng(16)
    found = sum(sign_flip_p(1 + rng.normal(size=6)) <= ALPHA for _ in range(1000))
    assert binom.ppf(0.0005, 1000, power) <= found <= binom.ppf(0.9995, 1000, power)


def naive_t(values: NDArray[np.float64]) -> float:
    """Transcribe Student 1908: the mean over its estimated standard error."""
    n, mean = len(values), sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (n - 1)
    return float(mean / math.sqrt(variance / n))


@samples
@pytest.mark.parametrize("n", [2, 3, 6, 11])
def test_t_test_is_that_of_scipy_on_scores_and_a_naive_formula(sample: Draw, n: int) -> None:
    rng = np.random.default_rng(n)
    for _ in range(20):
        ours, theirs = sample(rng, n), rng.integers(-3, 4, n).astype(float)
        differences = ours - theirs
        if np.ptp(differences):
            assert t_p(differences) == pytest.approx(ttest_rel(ours, theirs).pvalue, rel=1e-9)
            assert t_p(differences) == pytest.approx(2 * t.sf(abs(naive_t(differences)), n - 1), rel=1e-9)


def test_t_test_has_the_p_of_a_table() -> None:
    """Compare with the critical values of Student's distribution for 5 and 2 degrees of freedom, which tables print."""
    for critical, n, p in ((2.571, 6, 0.05), (4.032, 6, 0.01), (4.303, 3, 0.05), (9.925, 3, 0.01)):
        apart = np.array([1.0, -1.0] * 3 if n == 6 else [1.0, 0.0, -1.0])
        values = apart + critical * apart.std(ddof=1) / math.sqrt(n)
        assert t_p(values) == pytest.approx(p, rel=2e-3)  # critical values have four digits
        assert t_p(-values) == pytest.approx(p, rel=2e-3)
        assert t_p(values / 128) == pytest.approx(t_p(values))


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
def test_interval_is_that_of_student_and_agrees_with_the_t_test(sample: Draw) -> None:
    rng = np.random.default_rng(4)
    for n in (2, 6, 12):
        for _ in range(10):
            values = sample(rng, n)
            if not np.ptp(values):
                continue
            half = t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n)
            low, high = t_interval(values) or (math.nan, math.nan)
            assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half))
            assert (low > 0 or high < 0) == ((t_p(values) or 0) < ALPHA)
            assert t_interval(-values) == pytest.approx((-high, -low))


def test_no_more_than_five_in_a_hundred_normal_nulls_are_rejected_by_the_t_test() -> None:
    """Compare with a binomial at the level itself, within its quantiles of 0.05 % and 99.95 %; Holm's of 25 methods too."""
    for n in (3, 6):
        p = p_values(SeedTest.T, np.random.default_rng(n).normal(size=(50_000, n)))
        for level in (ALPHA, ALPHA / 25):
            assert binom.ppf(0.0005, 50_000, level) <= np.count_nonzero(p <= level) <= binom.ppf(0.9995, 50_000, level)


@samples
@pytest.mark.parametrize("n", [2, 3, 7, 22])
def test_p_of_many_samples_is_that_of_each(sample: Draw, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeds, "FLIPS", 999)
    monkeypatch.setattr(seeds, "BLOCK", 5 * 2**n if n <= seeds.EXACT_SEEDS else 3 * 999)  # several blocks, the last not full
    rows = np.stack([sample(np.random.default_rng(seed), n) for seed in range(12)])
    rows[3], rows[7] = 0.25, 0
    assert p_values(SeedTest.SIGN_FLIP, rows).tolist() == [sign_flip_p(row) for row in rows]
    each = [t_p(row) for row in rows]
    assert (each[3], each[7]) == (None, 1)
    np.testing.assert_allclose(p_values(SeedTest.T, rows), [math.nan if p is None else p for p in each], rtol=1e-12)
    for test in SeedTest:
        assert p_values(test, np.zeros((0, n))).shape == (0,)


def test_equal_differences_have_no_interval_no_p_of_a_t_test_and_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for ours, theirs in ([0.9] * 6, [0.8] * 6), ([0.7] * 6, [0.7] * 6), ([0.3, 0.7] * 3, [0.2, 0.6] * 3):
            found = seed_difference(by_seed(ours), by_seed(theirs))
            assert (found.low, found.high, found.spread) == (None, None, 0)
            assert found.verdict == (Verdict.NOT_SHOWN if ours == theirs else Verdict.BETTER)
            assert found.p == found.sign_flip == (1 if ours == theirs else 2 / 64)
            assert found.t == (1 if ours == theirs else None)
        for function in (t_p, t_interval):
            assert function([1.0]) is None
            assert function([]) is None


def test_equal_differences_are_undecided_where_the_t_test_decides() -> None:
    """A quarter point for each of six seeds shows no spread, and no p that is 0; the other methods are corrected as before."""
    equal, same, other = difference([0.0025] * 6), difference([0.0] * 6), difference([0.011, 0.012, 0.013, 0.01, 0.012, 0.014])
    found = corrected({"equal": equal, "same": same, "other": other})
    assert {one.test for one in found.values()} == {SeedTest.T}
    assert (found["equal"].p, found["equal"].adjusted) == (None, None)
    assert str(found["equal"].verdict) == "undecided: all differences are equal"
    assert found["equal"].sign_flip == 2 / 64
    assert (found["same"].p, found["same"].verdict) == (1, Verdict.NOT_SHOWN)
    assert found["other"].adjusted == pytest.approx(3 * other.t)
    assert found["other"].verdict == Verdict.BETTER
    # One seed off by an example of 400 is a spread, and decides.
    assert corrected({"a": difference([0.0025] * 5 + [0.005]), "b": same})["a"].adjusted == pytest.approx(
        2 * 2 * t.sf(7, 5)  # mean 7 / 6 and standard error 1 / 6 of the unit
    )


def test_differences_by_rounding_are_none() -> None:
    found = seed_difference(by_seed([0.1 + 0.2] * 6), by_seed([0.3] * 6))
    assert (found.mean, found.p, found.verdict) == (0.0, 1.0, Verdict.NOT_SHOWN)


def test_verdict_goes_by_p_and_knows_the_direction() -> None:
    values = [0.01, 0.02, 0.015, 0.03, 0.005, 0.01]
    assert difference(values).verdict == Verdict.BETTER
    assert difference([-v for v in values]).verdict == Verdict.WORSE
    error = difference(values, higher_is_better=False)
    assert (error.verdict, error.mean) == (Verdict.WORSE, difference(values).mean)
    assert error.gain == -difference(values).gain < 0
    mixed = difference([*values[:5], -0.02])
    assert mixed.verdict == Verdict.NOT_SHOWN
    assert mixed.low is not None
    assert mixed.high is not None
    assert mixed.mean is not None
    assert mixed.low < mixed.mean < mixed.high


def test_fewer_than_six_seeds_have_a_mean_and_p_but_no_interval() -> None:
    found = difference([0.1, 0.2, 0.3])
    assert (found.n, found.mean, found.p) == (3, pytest.approx(0.2), 0.25)
    assert (found.low, found.high, found.verdict, found.test) == (None, None, Verdict.TOO_FEW_SEEDS, SeedTest.SIGN_FLIP)
    assert found.spread == pytest.approx(0.1)
    assert found.t == pytest.approx(2 * t.sf(2 * math.sqrt(3), 2))
    strong = difference([0.1, 0.1001, 0.1002, 0.1, 0.1001])
    assert (strong.t or 1) < 1e-6
    assert corrected(dict.fromkeys("abcdefg", strong)) == dict.fromkeys("abcdefg", strong)
    assert strong.verdict == Verdict.TOO_FEW_SEEDS


def test_the_test_that_decides_depends_on_numbers_of_pairs_and_methods_alone() -> None:
    rule = {(pairs, methods): seed_test(pairs, methods) for pairs in range(1, 15) for methods in (1, 2, 3, 10, 25, 27)}
    decided_by_t = {methods: [pairs for pairs in range(1, 15) if rule[pairs, methods] is SeedTest.T] for _, methods in rule}
    assert decided_by_t == {1: [], 2: [6], 3: [6], 10: [6, 7, 8], 25: [6, 7, 8, 9], 27: [6, 7, 8, 9, 10]}
    rng = np.random.default_rng(20)
    for pairs, methods in ((6, 3), (7, 3), (6, 25), (10, 25)):
        shifts = (0.0, 0.3, 3.0)
        drawn = {str(k): difference((shifts[k % 3] + rng.normal(size=pairs)).tolist()) for k in range(methods)}
        for one in corrected(drawn).values():
            assert one.test == rule[pairs, methods]
            assert one.p == (one.t if one.test is SeedTest.T else one.sign_flip)


def test_six_seeds_decide_twenty_five_methods() -> None:
    """Gains of five spreads are shown, p is 25, 24, ... times that of the t-test, and no sign-flip test could show any."""
    rng = np.random.default_rng(21)
    drawn = {f"m{k}": difference((rng.normal(5.0 if k < 2 else 0.0, 1, 6)).tolist()) for k in range(25)}
    found = corrected(drawn)
    raw = [drawn[name].t or 0.0 for name in drawn]
    assert [one.adjusted for one in found.values()] == holm(raw)
    assert [name for name, one in found.items() if one.verdict == Verdict.BETTER] == ["m0", "m1"]
    assert {one.verdict for name, one in found.items() if name not in ("m0", "m1")} == {Verdict.NOT_SHOWN}
    assert 25 * min(one.sign_flip or 1 for one in found.values()) > ALPHA


def test_methods_with_other_numbers_of_seeds_are_tested_by_their_own_test_and_corrected_together() -> None:
    many = difference([float(k) for k in range(1, 12)])
    some = difference([5.0, 6, 7, 5, 6, 8])
    few = difference([1.0, 2, 3])
    found = corrected({**{f"m{k}": many for k in range(24)}, "some": some, "few": few})
    assert (found["m0"].test, found["some"].test, found["few"]) == (SeedTest.SIGN_FLIP, SeedTest.T, few)
    assert found["some"].adjusted == pytest.approx(25 * some.t)
    assert found["m0"].adjusted == pytest.approx(24 * many.sign_flip)


def test_a_family_of_both_tests_has_a_false_positive_in_no_more_than_five_tables_in_a_hundred() -> None:
    """Decide 300 null tables of eight methods, four of six and four of nine seeds, of one baseline; three more have five.

    The bound is the quantile of 99.95 % of a binomial at ALPHA. Uncorrected p would be below ALPHA in a quarter of the tables.
    """
    rng, tables, seeds_of = np.random.default_rng(23), 300, [6] * 4 + [9] * 4 + [5] * 3
    assert [seed_test(pairs, 8) for pairs in (6, 9)] == [SeedTest.T, SeedTest.SIGN_FLIP]
    rejected = uncorrected = 0
    for _ in range(tables):
        baseline, *scores = rng.normal(size=(1 + len(seeds_of), 9)).tolist()
        named = {
            str(k): seed_difference(by_seed(values[:pairs]), by_seed(baseline[:pairs]))
            for k, (values, pairs) in enumerate(zip(scores, seeds_of, strict=True))
        }
        found = list(corrected(named).values())
        assert {one.test for one in found[:4]} | {one.test for one in found[4:8]} == set(SeedTest)
        assert {one.verdict for one in found[8:]} == {Verdict.TOO_FEW_SEEDS}
        rejected += any(one.verdict in (Verdict.BETTER, Verdict.WORSE) for one in found)
        uncorrected += min(one.p for one in found[:8] if one.p is not None) <= ALPHA
    assert rejected <= binom.ppf(0.9995, tables, ALPHA)
    assert uncorrected > 2 * binom.ppf(0.9995, tables, ALPHA)


def test_only_seeds_that_both_have_are_paired_and_the_rest_is_returned() -> None:
    ours = {5: 0.5, 0: 0.9, 2: 0.8, 3: None, 4: math.nan}
    theirs = {0: 0.8, 1: 0.1, 2: 0.6, 3: 0.7, 4: 0.7}
    found = seed_difference(ours, theirs)
    assert (found.n, found.mean, found.unpaired) == (2, pytest.approx(0.15), (1, 3, 4, 5))
    none = seed_difference({0: 1.0}, {1: 1.0})
    assert (none.n, none.mean, none.p, none.verdict, none.unpaired) == (0, None, None, Verdict.TOO_FEW_SEEDS, (0, 1))


def test_order_of_the_seeds_changes_nothing() -> None:
    rng = np.random.default_rng(6)
    ours, theirs = by_seed(list(rng.random(8))), by_seed(list(rng.random(8)))
    assert seed_difference(dict(reversed(ours.items())), theirs) == seed_difference(ours, theirs)


@pytest.mark.parametrize("function", [sign_flip_p, t_p, t_interval])
def test_differences_that_are_not_finite_are_refused(function: Callable[[list[float]], object]) -> None:
    with pytest.raises(InputError, match="not all finite"):
        function([0.1, math.nan, 0.2])


# Pairs by example


def models(n: int, seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Predictions of two models that agree more often than not, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(2, size=n)
    shared = rng.random(n) < 0.6
    ours, theirs = (np.where(shared | (rng.random(n) < right), labels, 1 - labels) for right in (0.5, 0.4))
    return ours, theirs, labels


@pytest.mark.parametrize("metric", [accuracy, f1])
def test_interval_by_example_is_that_of_all_samples_with_replacement(
    metric: Callable[[NDArray[np.int64], NDArray[np.int64]], float],
) -> None:
    ours, theirs, labels = np.array([1, 1, 0, 0, 1]), np.array([0, 0, 0, 1, 0]), np.array([1, 0, 1, 0, 1])
    rows = itertools.product(range(5), repeat=5)
    exact = np.array([metric(ours[r], labels[r]) - metric(theirs[r], labels[r]) for r in map(list, rows)])
    found = example_difference(ours, theirs, labels, metric, draws=4_999)
    assert found.difference == metric(ours, labels) - metric(theirs, labels)
    assert (found.n, found.differing) == (5, 4)
    # The drawn fraction below an end of the interval, within four binomial standard deviations of 2.5 %.
    spread = 4 * math.sqrt(0.025 * 0.975 / 4_999)
    assert np.mean(exact < found.low) <= 0.025 + spread
    assert np.mean(exact <= found.low) >= 0.025 - spread
    assert np.mean(exact > found.high) <= 0.025 + spread
    assert np.mean(exact >= found.high) >= 0.025 - spread
    p = 2 * min(np.mean(exact <= 0), np.mean(exact >= 0))
    assert found.p == pytest.approx(p, abs=8 * math.sqrt(p / 2 * (1 - p / 2) / 4_999))


def test_interval_of_accuracy_is_that_of_paired_proportions() -> None:
    """Compare with the normal interval of the mean gain of an example, which is 1, 0 or -1."""
    ours, theirs, labels = models(4000)
    found = example_difference(ours, theirs, labels, accuracy)
    gains = (ours == labels).astype(float) - (theirs == labels)
    half = norm.ppf(0.975) * gains.std() / math.sqrt(4000)
    # Quantiles of 1,999 draws have a standard error of about 5 % of the half width.
    assert (found.low, found.high) == pytest.approx((gains.mean() - half, gains.mean() + half), abs=0.2 * half)
    unpaired = norm.ppf(0.975) * math.sqrt(sum(np.var(p == labels) for p in (ours, theirs)) / 4000)
    assert found.high - found.low < 1.7 * unpaired


@pytest.mark.parametrize("metric", [accuracy, f1, matthews])
@pytest.mark.parametrize("seed", range(6))
def test_verdict_by_example_is_that_of_the_interval(
    metric: Callable[[NDArray[np.int64], NDArray[np.int64]], float], seed: int
) -> None:
    ours, theirs, labels = models(600, seed)
    found = example_difference(ours, theirs, labels, metric, draws=399)
    swapped = example_difference(theirs, ours, labels, metric, draws=399)
    assert (found.p <= ALPHA) == (found.low > 0 or found.high < 0)
    expected = {True: Verdict.BETTER, False: Verdict.WORSE}[found.difference > 0] if found.p <= ALPHA else Verdict.NOT_SHOWN
    assert found.verdict == expected
    assert (swapped.p, swapped.low, swapped.high) == pytest.approx((found.p, -found.high, -found.low))
    assert example_difference(ours, theirs, labels, metric, higher_is_better=False, draws=399).verdict == swapped.verdict


def test_runs_are_averaged_and_do_not_count_as_examples() -> None:
    ours, theirs, labels = models(200)
    one = example_difference(ours, theirs, labels, f1, draws=399)
    assert example_difference([ours] * 3, [theirs] * 2, labels, f1, draws=399) == one
    both = example_difference([ours, theirs], theirs, labels, f1, draws=399)
    assert both.difference == pytest.approx(one.difference / 2)
    assert (both.low, both.high) == pytest.approx((one.low / 2, one.high / 2))


@pytest.mark.parametrize("differing", [0, 1, 4, 5, 6, 20])
def test_few_differing_predictions_show_nothing(differing: int) -> None:
    labels = np.ones(1000, dtype=int)
    theirs = np.where(np.arange(1000) < differing, 0, 1)
    found = example_difference(labels, theirs, labels, accuracy)
    assert (found.n, found.differing) == (1000, differing)
    assert found.p >= min(1, 2 / 2**differing)
    assert found.verdict == mcnemar(labels, theirs, labels).verdict
    assert found.verdict == (Verdict.BETTER if differing >= 6 else Verdict.NOT_SHOWN)


def test_equal_means_over_runs_are_equal_whatever_their_rounding() -> None:
    values = {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4}

    def looked_up(predictions: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
        return values[int(predictions[0])]

    ones = np.ones(9, dtype=int)
    assert 0.1 + 0.2 + 0.3 != 0.3 + 0.2 + 0.1
    found = example_difference([0 * ones, ones, 2 * ones], [2 * ones, ones, 0 * ones], ones, looked_up, draws=99)
    assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_a_lower_error_by_example_is_better() -> None:
    labels = np.ones(50, dtype=int)
    theirs = np.where(np.arange(50) < 10, 0, 1)

    def error(predictions: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
        return 1 - accuracy(predictions, labels)

    found = example_difference(labels, theirs, labels, error, higher_is_better=False, draws=399)
    assert (found.difference, found.verdict) == (pytest.approx(-0.2), Verdict.BETTER)


def test_mcnemar_is_a_binomial_test_of_discordant_examples() -> None:
    ours = [1] * 9 + [0] * 1 + [1] * 5 + [0] * 3
    theirs = [0] * 9 + [1] * 1 + [1] * 5 + [0] * 3
    found = mcnemar(ours, theirs, [1] * 18)
    # 9 against 1: both tails of ten throws, 2 (1 + 10) / 2^10.
    assert (found.method_only, found.baseline_only, found.p) == (9, 1, pytest.approx(22 / 1024))
    assert found.verdict == Verdict.BETTER
    assert mcnemar(theirs, ours, [1] * 18).verdict == Verdict.WORSE
    assert mcnemar(ours, ours, [1] * 18).p == 1
    for gained, lost in itertools.product(range(7), repeat=2):
        count, least = gained + lost, min(gained, lost)
        p = mcnemar([1] * gained + [0] * lost, [0] * gained + [1] * lost, [1] * count).p if count else 1
        assert p == pytest.approx(min(1, 2 * sum(math.comb(count, k) for k in range(least + 1)) / 2**count))


def test_other_examples_and_undefined_metrics_are_refused() -> None:
    ours, theirs, labels = models(20)
    for wrong in ((ours[:19], theirs, labels), (ours, theirs[:19], labels), (ours, theirs, labels[:19]), ([], [], [])):
        with pytest.raises(InputError, match="same examples"):
            example_difference(*wrong, accuracy)
        if len(wrong[0]):
            with pytest.raises(InputError, match="same examples"):
                mcnemar(*wrong)
    with pytest.raises(InputError, match="one run of each"):
        mcnemar([ours], [theirs], labels)
    with pytest.raises(InputError, match=r"undefined \(not finite\) in 2000 of 2000 samples of the 20 examples"):
        example_difference(ours, theirs, labels, lambda *_: math.nan)


# Several tests at once


def test_corrected_tests_by_example_have_the_verdict_of_the_corrected_p() -> None:
    labels = np.ones(100, dtype=int)
    tests = {str(lost): mcnemar(labels, np.where(np.arange(100) < lost, 0, 1), labels) for lost in (6, 7, 20)}
    # 2 / 2^6 = .03125 and 2 / 2^7 = .015625, of which Holm makes .03125, since 2 x .015625 is as much.
    found = corrected_by_example(tests)
    assert [test.adjusted for test in found.values()] == pytest.approx([0.03125, 0.03125, 3 * 2 / 2**20])
    assert {test.verdict for test in found.values()} == {Verdict.BETTER}
    fewer = corrected_by_example(dict.fromkeys("ab", tests["6"]))
    assert [(test.p, test.adjusted, test.verdict) for test in fewer.values()] == [(0.03125, 0.0625, Verdict.NOT_SHOWN)] * 2
    bootstrap = corrected_by_example({"a": example_difference(labels, np.where(np.arange(100) < 20, 0, 1), labels, accuracy)})
    assert bootstrap["a"].adjusted == bootstrap["a"].p


def test_corrections_are_those_worked_by_hand() -> None:
    p_values = [0.01, 0.04, 0.03, 0.005]
    # Holm: 4 x .005 = .02, 3 x .01 = .03, 2 x .03 = .06, and 1 x .04, which is raised to the .06 before it.
    assert holm(p_values) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert bonferroni(p_values) == pytest.approx([0.04, 0.16, 0.12, 0.02])
    # 3 x .3 = .9, 2 x .6 = 1.2, capped, and .7, raised.
    assert holm([0.6, 0.3, 0.7]) == pytest.approx([1, 0.9, 1])
    assert bonferroni([0.6, 0.3, 0.7]) == pytest.approx([1, 0.9, 1])
    assert holm([0.03]) == bonferroni([0.03]) == [0.03]
    assert holm([]) == bonferroni([]) == []


@pytest.mark.parametrize("seed", range(20))
def test_holm_is_the_closed_test_of_bonferroni(seed: int) -> None:
    """Compare with the closure principle: a hypothesis is rejected if every set of hypotheses that holds it is."""
    rng = np.random.default_rng(seed)
    p_values = np.round(rng.random(5) ** 3, 2).tolist()  # rounded, so that some are equal
    sets = [s for k in range(1, 6) for s in itertools.combinations(range(5), k)]
    expected = [max(min(1, len(s) * min(p_values[j] for j in s)) for s in sets if i in s) for i in range(5)]
    found = holm(p_values)
    assert found == pytest.approx(expected)
    order = np.argsort(p_values)
    assert (np.diff(np.array(found)[order]) >= 0).all()
    assert all(p <= h <= b <= 1 for p, h, b in zip(p_values, found, bonferroni(p_values), strict=True))


@pytest.mark.parametrize("correction", [holm, bonferroni])
@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
def test_p_outside_the_unit_interval_is_refused(correction: Callable[[list[float]], list[float]], p: float) -> None:
    with pytest.raises(ValueError, match=r"not in \[0, 1\]"):
        correction([0.5, p])


def test_methods_against_one_baseline_are_corrected_and_decided_anew() -> None:
    strong, weak = [float(k) for k in range(1, 9)], [1.0, -2, 3, 4, 5, 6, 7, 8]
    methods = {"a": difference(strong), "b": difference(weak), "c": difference([-v for v in weak])}
    found = corrected(methods)
    p = [d.p for d in methods.values()]
    assert p == [2 / 256, 6 / 256, 6 / 256]
    assert [d.adjusted for d in found.values()] == pytest.approx([6 / 256, 12 / 256, 12 / 256])
    assert [d.verdict for d in found.values()] == [Verdict.BETTER, Verdict.BETTER, Verdict.WORSE]
    found = corrected(methods, bonferroni)
    assert [d.adjusted for d in found.values()] == pytest.approx([6 / 256, 18 / 256, 18 / 256])
    assert [d.verdict for d in found.values()] == [Verdict.BETTER, Verdict.NOT_SHOWN, Verdict.NOT_SHOWN]
    assert [d.p for d in found.values()] == p


def test_a_correction_may_need_the_t_test() -> None:
    six = difference([1.0, 2, 3, 4, 5, 6])
    assert (six.test, six.verdict) == (SeedTest.SIGN_FLIP, Verdict.BETTER)
    found = corrected({"a": six, "b": six, "c": six})
    assert {(d.test, d.verdict) for d in found.values()} == {(SeedTest.T, Verdict.BETTER)}
    assert {d.adjusted for d in found.values()} == {3 * six.t}
    assert corrected(found) == found
    assert corrected({"a": found["a"]}) == {"a": corrected({"a": six})["a"]}


def test_differences_of_few_seeds_are_not_counted_by_a_correction() -> None:
    six, three = difference([1.0, 2, 3, 4, 5, 6]), difference([1.0, 2, 3])
    found = corrected({"a": six, "b": three, "c": seed_difference({}, {})})
    assert (found["a"].adjusted, found["a"].verdict) == (six.p, Verdict.BETTER)
    assert found["b"] == three
    assert found["c"].verdict == Verdict.TOO_FEW_SEEDS
    assert corrected({}) == {}


def tasks(gains: list[float]) -> dict[str, PairedDifference]:
    return {f"task{k}": difference([gain]) for k, gain in enumerate(gains)}


@pytest.mark.parametrize(
    ("gains", "p", "verdict"),
    [
        ([1, 1, 1, 1], None, Verdict.TOO_FEW_TASKS),
        ([1, 1, 1, 1, 1], 2 / 32, Verdict.TOO_FEW_TASKS),
        ([1, 1, 1, 1, 1, 0], 2 / 32, Verdict.TOO_FEW_TASKS),
        ([1, 1, 1, 1, 1, 1], 2 / 64, Verdict.BETTER),
        ([-1, -1, -1, -1, -1, -1, 0], 2 / 64, Verdict.WORSE),
        ([1, 1, 1, 1, 1, -1], 14 / 64, Verdict.NOT_SHOWN),
        ([1, 1, 1, 1, 1, 1, 1, 1, -1], 20 / 512, Verdict.BETTER),
        ([0, 0, 0, 0, 0], 1, Verdict.TOO_FEW_TASKS),
    ],
)
def test_sign_test_counts_tasks(gains: list[float], p: float | None, verdict: Verdict) -> None:
    found = task_summary(tasks(gains))
    assert (found.p, found.verdict) == (pytest.approx(p), verdict)
    assert (found.better, found.worse, found.equal) == (gains.count(1), gains.count(-1), gains.count(0))


def test_tasks_have_the_direction_of_their_metric() -> None:
    errors = {f"error{k}": difference([-0.5], higher_is_better=False) for k in range(3)}
    found = task_summary({**tasks([1, 1, 1]), **errors, "none": seed_difference({0: 1.0}, {})})
    assert (found.better, found.worse, found.missing, found.verdict) == (6, 0, ("none",), Verdict.BETTER)


def test_tests_of_tasks_are_corrected_from_five_tasks_on() -> None:
    gains = [[float(k) for k in range(1, 11)]] * 5
    named = {f"task{k}": difference(values) for k, values in enumerate(gains)}
    found = task_summary(named)
    assert found.by_task == corrected(named, holm)
    assert {d.adjusted for d in found.by_task.values()} == {5 * 2 / 1024}
    assert task_summary(dict(list(named.items())[:4])).by_task == {}
