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

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, nct, t

from kd.results.statistics import ALPHA, bca_interval, example_difference, holm, mcnemar, sign_flip_p

Array = NDArray[np.float64]
Sample = Callable[[np.random.Generator, int], Array]
SIZES = (3, 6, 10)
DISTRIBUTIONS: dict[str, Sample] = {
    "normal": lambda rng, n: rng.normal(size=n),
    "accuracies": lambda rng, n: np.rint(4 * rng.normal(size=n)) / 4,
    "skewed": lambda rng, n: rng.exponential(size=n) - 1,
}


def percent(count: int, draws: int) -> str:
    """Return a rate in percent with its exact 95 % interval (Clopper and Pearson)."""
    interval = binomtest(count, draws).proportion_ci()
    return f"{100 * count / draws:.1f} ({100 * interval.low:.1f} to {100 * interval.high:.1f})"


def row(*cells: object) -> None:
    """Print a row of a table."""
    print("|", " | ".join(map(str, cells)), "|")


def header(title: str, *cells: str) -> None:
    """Print the title and the head of a table."""
    print(f"\n{title}\n")
    row(*cells)
    row(*["---"] * len(cells))


def rejections(rng: np.random.Generator, sample: Sample, n: int, draws: int) -> str:
    """Return how often the sign-flip test rejects at .05."""
    return percent(sum(sign_flip_p(sample(rng, n)) <= ALPHA for _ in range(draws)), draws)


def coverage(rng: np.random.Generator, sample: Sample, n: int, draws: int) -> list[object]:
    """Return how often the BCa interval and that of Student's t cover the true mean 0, and the mean ratio of their widths."""
    covered, student, ratios = 0, 0, []
    for _ in range(draws):
        values = sample(rng, n)
        half = t.ppf(1 - ALPHA / 2, n - 1) * values.std(ddof=1) / np.sqrt(n)
        low, high = bca_interval(values) or (values[0], values[0])
        covered += low <= 0 <= high
        student += abs(values.mean()) <= half
        ratios.append((high - low) / (2 * half) if half else 1.0)
    return [percent(covered, draws), percent(student, draws), f"{np.mean(ratios):.2f}"]


def power_of_t(n: int) -> str:
    """Return the power of a paired t test for a gain of one standard deviation, exactly."""
    critical = t.ppf(1 - ALPHA / 2, n - 1)
    return f"{100 * (nct.sf(critical, n - 1, np.sqrt(n)) + nct.cdf(-critical, n - 1, np.sqrt(n))):.1f}"


def f1(predictions: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
    """Return F1 of class 1."""
    return 2 * float(np.sum(predictions & labels)) / max(1, int(predictions.sum() + labels.sum()))


def by_example(rng: np.random.Generator, n: int, draws: int) -> list[object]:
    """Return how often the paired bootstrap of F1 and McNemar's test reject, for two classifiers that are equally good."""
    bootstrap, exact = 0, 0
    for _ in range(draws):
        labels = (rng.random(n) < 0.5).astype(int)
        shared = rng.random(n) < 0.8
        common = rng.random(n) < 0.75
        models = [np.where(np.where(shared, common, rng.random(n) < 0.75), labels, 1 - labels) for _ in range(2)]
        bootstrap += example_difference(*models, labels, f1, draws=399).p <= ALPHA
        exact += mcnemar(*models, labels).p <= ALPHA
    return [percent(bootstrap, draws), percent(exact, draws)]


def any_rejection(rng: np.random.Generator, methods: int, n: int, draws: int) -> list[object]:
    """Return how often some method is told apart from the baseline if all have equal means, uncorrected and by Holm."""
    plain, corrected = 0, 0
    for _ in range(draws):
        baseline, *others = rng.normal(size=(1 + methods, n))
        p_values = [sign_flip_p(scores - baseline) for scores in others]
        plain += min(p_values) <= ALPHA
        corrected += min(holm(p_values)) <= ALPHA
    return [percent(plain, draws), percent(corrected, draws)]


def main() -> None:
    """Print the tables."""
    rng = np.random.default_rng(0)
    header("False positives of the sign-flip test at .05, percent of 1,000 nulls", "pairs", *DISTRIBUTIONS)
    for n in SIZES:
        row(n, *[rejections(rng, sample, n, 1000) for sample in DISTRIBUTIONS.values()])

    rng = np.random.default_rng(0)
    gains = ("normal", "accuracies")
    header("Power for a true gain of one standard deviation, percent of 1,000", "pairs", *gains, "t test of normal, exact")
    for n in SIZES:
        row(
            n,
            *[rejections(rng, lambda rng, n, of=name: 1 + DISTRIBUTIONS[of](rng, n), n, 1000) for name in gains],
            power_of_t(n),
        )

    rng = np.random.default_rng(0)
    columns = ("pairs", "differences", "BCa", "Student's t", "width, BCa to t")
    header("Coverage of 95 % intervals of the mean, percent of 2,000", *columns)
    for n in SIZES:
        for name in ("normal", "skewed"):
            row(n, name, *coverage(rng, DISTRIBUTIONS[name], n, 2000))

    rng = np.random.default_rng(0)
    title = "Any false positive among methods with one baseline, ten pairs each, percent of 1,000"
    header(title, "methods", "uncorrected", "Holm")
    for methods in (3, 10):
        row(methods, *any_rejection(rng, methods, 10, 1000))

    rng = np.random.default_rng(0)
    header("False positives by example at .05, percent of 300 nulls", "examples", "paired bootstrap of F1", "McNemar")
    for n in (100, 277, 1000):
        row(n, *by_example(rng, n, 300))


if __name__ == "__main__":
    main()
