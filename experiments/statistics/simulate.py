"""Error rates, coverage and power of the tests in `kd.results.statistics`, by simulation.

    python experiments/statistics/simulate.py

prints the tables of README.md, each from a generator with seed 0. Differences of pairs are drawn directly, with a standard
deviation of 1 and a mean of 0, or of 1 for a true gain:

- `normal`;
- `accuracies`: normal, rounded to multiples of a quarter, so that there are ties and zeros, as between accuracies on the 277
  examples of RTE with a standard deviation of 1.4 points;
- `skewed`: exponential, shifted. Method and baseline are not interchangeable then, and no permutation test is exact.

For pairs by example, two classifiers are drawn that agree on most examples and are right equally often.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import binomtest, bootstrap, nct, skew, t

from kd.results.comparison import entries_of, pairs_of
from kd.results.figures import read_figures
from kd.results.statistics import ALPHA, SeedTest, example_difference, holm, mcnemar, p_values, t_interval

Array = NDArray[np.float64]
Sample = Callable[[np.random.Generator, tuple[int, ...]], Array]
SIZES = (3, 6, 10)
METHODS = 25
DISTRIBUTIONS: dict[str, Sample] = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "accuracies": lambda rng, shape: np.rint(4 * rng.normal(size=shape)) / 4,
    "skewed": lambda rng, shape: rng.exponential(size=shape) - 1,
}
TESTS = {"sign-flip": SeedTest.SIGN_FLIP, "t": SeedTest.T}


def percent(count: int, draws: int) -> str:
    """Return a rate in percent with its exact 95 % interval (Clopper and Pearson)."""
    interval = binomtest(int(count), draws).proportion_ci()
    return f"{100 * count / draws:.1f} ({100 * interval.low:.1f} to {100 * interval.high:.1f})"


def row(*cells: object) -> None:
    """Print a row of a table."""
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def header(title: str, *cells: str) -> None:
    """Print the title and the head of a table."""
    print(f"\n{title}\n")
    row(*cells)
    row(*["---"] * len(cells))


def rejections(test: SeedTest, differences: Array, level: float = ALPHA) -> int:
    """Return the number of samples, (samples, pairs), that a test rejects; one without a p is not rejected."""
    return int(np.count_nonzero(p_values(test, differences) <= level))


def bca(values: Array) -> tuple[float, float] | None:
    """Return the 95 % BCa bootstrap interval of the mean (Efron, JASA 82(397), 1987), from 9,999 samples."""
    if not np.ptp(values):
        return None
    drawn = bootstrap((values,), np.mean, n_resamples=9_999, method="BCa", rng=np.random.default_rng(0))
    return drawn.confidence_interval.low, drawn.confidence_interval.high


def coverage(rng: np.random.Generator, sample: Sample, n: int, draws: int) -> list[object]:
    """Return how often the BCa interval and that of Student's t cover the true mean 0, and the mean ratio of their widths."""
    covered, student, ratios = 0, 0, []
    for values in sample(rng, (draws, n)):
        both = [interval(values) or (values[0], values[0]) for interval in (bca, t_interval)]
        covered, student = (count + (low <= 0 <= high) for count, (low, high) in zip((covered, student), both, strict=True))
        widths = [high - low for low, high in both]
        ratios.append(widths[0] / widths[1] if widths[1] else 1.0)
    return [percent(covered, draws), percent(student, draws), f"{np.mean(ratios):.2f}"]


def power_of_t(n: int, gain: float, level: float = ALPHA) -> tuple[float, float]:
    """Return the exact probabilities that a paired t-test shows a gain, in spreads, with its sign and with the wrong one."""
    critical, shift = t.ppf(1 - level / 2, n - 1), gain * np.sqrt(n)
    return float(nct.sf(critical, n - 1, shift)), float(nct.cdf(-critical, n - 1, shift))


def f1(predictions: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
    """Return F1 of class 1."""
    return 2 * float(np.sum(predictions & labels)) / max(1, int(predictions.sum() + labels.sum()))


def by_example(rng: np.random.Generator, n: int, draws: int) -> list[object]:
    """Return how often the paired bootstrap of F1 and McNemar's test reject, for two classifiers that are equally good."""
    bootstrapped, exact = 0, 0
    for _ in range(draws):
        labels = (rng.random(n) < 0.5).astype(int)
        shared = rng.random(n) < 0.8
        common = rng.random(n) < 0.75
        models = [np.where(np.where(shared, common, rng.random(n) < 0.75), labels, 1 - labels) for _ in range(2)]
        bootstrapped += example_difference(*models, labels, f1, draws=399).p <= ALPHA
        exact += mcnemar(*models, labels).p <= ALPHA
    return [percent(bootstrapped, draws), percent(exact, draws)]


def null_tables(rng: np.random.Generator, name: str, methods: int, n: int, draws: int) -> Array:
    """Return differences of methods from one baseline that are all 0 in the mean, (draws, methods, pairs).

    `normal` and `accuracies` are distributions of the scores of methods and baseline, so that the differences of two methods
    have a correlation of 1/2; `skewed` is that of the differences themselves, which are independent.
    """
    if name == "skewed":
        return DISTRIBUTIONS[name](rng, (draws, methods, n))
    scores = DISTRIBUTIONS[name](rng, (draws, 1 + methods, n))
    return scores[:, 1:] - scores[:, :1]


def p_of(test: SeedTest, differences: Array) -> Array:
    """Return p of each method, (tables, methods), for differences (tables, methods, pairs); 1 where the test has none."""
    p: Array = np.nan_to_num(p_values(test, differences.reshape(-1, differences.shape[2])), nan=1.0)
    return p.reshape(differences.shape[:2])


def any_rejection(p: Array) -> list[object]:
    """Return how often some p of a table, (tables, methods), is at most ALPHA, uncorrected and by Holm."""
    corrected = sum(min(holm(of_table.tolist())) <= ALPHA for of_table in p)
    return [percent(int(np.count_nonzero(p.min(axis=1) <= ALPHA)), len(p)), percent(corrected, len(p))]


def smallest_number_of_pairs() -> None:
    """Print what speaks for and against deciding by a t-test of three, four, five or six pairs."""
    pairs, draws = (3, 4, 5, 6), 100_000

    def rounded(examples: int, spread: float) -> Sample:
        return lambda rng, shape: np.rint(spread / 100 * examples * rng.normal(size=shape)) / examples

    def collapsing(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        return 0.7 * rng.normal(size=shape) - 7 * ((rng.random(shape) < 0.1) - 0.1)

    cases = {
        **{f"{n:,} examples, spread {s}": rounded(n, s) for n in (300, 850, 5100) for s in (0.5, 1.4)},
        "skewed (exponential)": DISTRIBUTIONS["skewed"],
        "one in ten runs collapses": collapsing,
    }
    found: dict[str, list[Array]] = {}
    equal: dict[str, list[str]] = {}
    for name, sample in cases.items():
        rng = np.random.default_rng(0)
        samples = [sample(rng, (draws, n)) for n in pairs]
        found[name] = [*(p_values(SeedTest.T, values) for values in samples), p_values(SeedTest.SIGN_FLIP, samples[-1])]
        equal[name] = [f"{100 * np.mean(np.ptp(values, axis=1) == 0):.2f}" for values in samples]
    columns = ["differences", *(f"t, {n}" for n in pairs), "sign-flip, 6"]
    for level, title in ((ALPHA, ".05"), (ALPHA / METHODS, ".002, Holm's of 25 methods")):
        header(f"False positives at {title}, percent of {draws:,}", *columns)
        for name, p in found.items():
            row(name, *[f"{100 * np.mean(values <= level):.2f}" for values in p])
    header(f"All differences equal, percent of {draws:,}", "differences", *map(str, pairs))
    for name in list(cases)[:3]:
        row(name, *equal[name])

    header("Power of the t-test of normal differences, exact", "", *map(str, pairs))
    for methods in (1, METHODS):
        level = ALPHA / methods
        gains = [brentq(lambda gain, n=n, level=level: power_of_t(n, gain, level)[0] - 0.8, 0.1, 100) for n in pairs]
        row(f"gain in spreads that is shown in 80 %, {methods} method(s)", *[f"{gain:.1f}" for gain in gains])
    wrong = [power_of_t(n, 0.5) for n in pairs]
    row(
        "gain of half a spread: percent of what is shown that has the wrong sign",
        *[f"{100 * w / (r + w):.1f}" for r, w in wrong],
    )


def measured_skewness() -> None:
    """Print the skewness of the differences from the baseline in pkd_dev, each group less its mean and over its spread."""
    entries = entries_of(read_figures(Path(__file__).parents[1] / "pkd_dev" / "ours.csv"))
    groups = []
    for index, (_, baseline) in pairs_of(entries, "finetune").items():
        if entries[index].metric == "accuracy":
            groups.append([entries[index].values[seed] - baseline.values[seed] for seed in sorted(baseline.values)])
    shape, draws = np.shape(groups), 2_000

    def pooled(values: Array) -> Array:
        centred = values - values.mean(axis=-1, keepdims=True)
        return skew((centred / centred.std(axis=-1, keepdims=True)).reshape(*values.shape[:-2], -1), axis=-1)

    header(f"Skewness of {shape[0]} groups of {shape[1]} differences of accuracies in pkd_dev", "differences", "skewness")
    row("measured", f"{pooled(np.array(groups)):.2f}")
    for name in ("normal", "skewed"):
        low, high = np.quantile(pooled(DISTRIBUTIONS[name](np.random.default_rng(0), (draws, *shape))), (0.025, 0.975))
        row(f"{name}, 95 % of {draws:,}", f"{low:.2f} to {high:.2f}")


def main() -> None:
    """Print the tables."""
    draws = 10_000
    columns = [f"{test}, {name}" for test in TESTS for name in DISTRIBUTIONS]
    header(f"False positives by seed at .05, percent of {draws:,} nulls", "pairs", *columns)
    rng = np.random.default_rng(0)
    for n in SIZES:
        samples = [sample(rng, (draws, n)) for sample in DISTRIBUTIONS.values()]
        row(n, *[percent(rejections(test, values), draws) for test in TESTS.values() for values in samples])

    rng = np.random.default_rng(0)
    columns = [f"{test}, {name}" for test in TESTS for name in ("normal", "accuracies")]
    header(f"Power for a true gain of one standard deviation, percent of {draws:,}", "pairs", *columns, "t, normal, exact")
    for n in SIZES:
        samples = [1 + DISTRIBUTIONS[name](rng, (draws, n)) for name in ("normal", "accuracies")]
        measured = [percent(rejections(test, values), draws) for test in TESTS.values() for values in samples]
        row(n, *measured, f"{100 * sum(power_of_t(n, 1.0)):.1f}")

    measured_skewness()
    smallest_number_of_pairs()

    rng = np.random.default_rng(0)
    columns = ["pairs", "differences", "BCa", "Student's t", "width, BCa to t"]
    header("Coverage of 95 % intervals of the mean, percent of 2,000", *columns)
    for n in SIZES:
        for name in ("normal", "skewed"):
            row(n, name, *coverage(rng, DISTRIBUTIONS[name], n, 2000))

    rng = np.random.default_rng(0)
    title = "Any false positive among methods with one baseline, percent of 1,000 tables"
    header(title, "methods", "pairs", "test", "scores", "uncorrected", "Holm")
    for methods, n, test, names in (
        *((methods, 10, "sign-flip", ("normal",)) for methods in (3, 10)),
        *((METHODS, n, "sign-flip", tuple(DISTRIBUTIONS)) for n in (6, 10, 11)),
        *((METHODS, n, "t", tuple(DISTRIBUTIONS)) for n in (6, 9)),
    ):
        for name in names:
            row(methods, n, test, name, *any_rejection(p_of(TESTS[test], null_tables(rng, name, methods, n, 1000))))
    for name in ("normal", "accuracies"):
        differences, few = null_tables(rng, name, METHODS, 11, 1000), METHODS // 2
        p = [p_of(SeedTest.T, differences[:, :few, :6]), p_of(SeedTest.SIGN_FLIP, differences[:, few:])]
        row(METHODS, "6 and 11", "t and sign-flip", name, *any_rejection(np.concatenate(p, axis=1)))

    rng = np.random.default_rng(0)
    header("False positives by example at .05, percent of 300 nulls", "examples", "paired bootstrap of F1", "McNemar")
    for n in (100, 277, 1000):
        row(n, *by_example(rng, n, 300))


if __name__ == "__main__":
    main()
