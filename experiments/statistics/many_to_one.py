"""Tests of many methods against one baseline that use all of a table at once, by simulation.

    python experiments/statistics/many_to_one.py

prints the last tables of README.md, from generators with seed 0: 25 methods and a baseline with six seeds each, compared by

- the paired t-test with Holm's correction, which `kd.results.statistics` uses for these numbers;
- Dunnett's test in a design of randomised blocks (Dunnett, JASA 50, 1955): a seed is a block, the variance is that of the
  residuals of all methods together, and the critical value is the 95 % quantile of its largest t under the null, simulated;
- the sign-flip test of the largest t (Westfall and Young, Resampling-Based Multiple Testing, 1993): all methods' differences of
  a seed change their sign together, and p of a method is the fraction of the 2^6 ways in which the largest t of the table is
  at least that of the method.
"""

import itertools
from collections.abc import Callable

import numpy as np
from simulate import ALPHA, METHODS, Array, header, percent, row

from kd.results.statistics import SeedTest, p_values

SEEDS, TABLES, GAINS = 6, 2_000, (1, 2, 3)
SIGNS = np.array([signs for signs in itertools.product((1.0, -1.0), repeat=SEEDS) if signs[0] > 0])
"""Ways to exchange pairs; the opposite of each gives the same t."""


def holm_of_t(scores: Array) -> Array:
    """Return whether the t-test with the first step of Holm's correction rejects, (tables, methods).

    Args:
        scores: (tables, 1 + methods, seeds), the baseline first.
    """
    differences = scores[:, 1:] - scores[:, :1]
    tables, methods, seeds = differences.shape
    p: Array = p_values(SeedTest.T, differences.reshape(-1, seeds)).reshape(tables, methods)
    return p <= ALPHA / methods


def dunnett_t(scores: Array) -> Array:
    """Return t of each method with the variance of the residuals of all, without effects of method and seed."""
    residuals = scores - scores.mean(axis=2, keepdims=True) - scores.mean(axis=1, keepdims=True)
    residuals += scores.mean(axis=(1, 2), keepdims=True)
    _, models, seeds = scores.shape
    variance = np.square(residuals).sum(axis=(1, 2)) / ((models - 1) * (seeds - 1))
    means = scores.mean(axis=2)
    return np.abs(means[:, 1:] - means[:, :1]) / np.sqrt(2 * variance / seeds)[:, None]


def largest_of_flips(scores: Array) -> Array:
    """Return whether the sign-flip test of the largest t rejects, (tables, methods)."""
    differences = scores[:, 1:] - scores[:, :1]
    # For given squares t grows with the absolute sum over the root of the sum of squares, which no sign changes.
    sums = np.abs(np.einsum("fs,tms->tfm", SIGNS, differences))
    statistic = sums / np.sqrt(np.square(differences).sum(axis=2))[:, None]
    return (statistic.max(axis=2)[:, :, None] >= statistic[:, :1] - 1e-12).mean(axis=1) <= ALPHA


def cases() -> dict[str, Callable[[np.random.Generator], Array]]:
    """Return distributions of the scores of tables without any true difference, the baseline first."""
    shape, collapsing = (TABLES, 1 + METHODS, SEEDS), np.ones(1 + METHODS)
    collapsing[-3:] = 10
    baseline = np.eye(1 + METHODS)[0]

    def collapsed(rng: np.random.Generator) -> Array:
        return 10 * ((rng.random(shape) < 0.1) - 0.1)

    return {
        "one spread": lambda rng: rng.normal(size=shape),
        "spreads from 0.6 to 1.4": lambda rng: rng.normal(size=shape) * np.linspace(0.6, 1.4, 1 + METHODS)[:, None],
        "three methods with ten times the spread": lambda rng: rng.normal(size=shape) * collapsing[:, None],
        "a baseline with three times the spread": lambda rng: rng.normal(size=shape) * (1 + 2 * baseline)[:, None],
        "one in ten runs of the baseline collapses": lambda rng: rng.normal(size=shape) - collapsed(rng) * baseline[:, None],
        "one in ten runs of any method collapses": lambda rng: rng.normal(size=shape) - collapsed(rng),
        "differences are skewed (exponential)": lambda rng: (rng.exponential(size=shape) - 1) * (1 - baseline)[:, None],
    }


def main() -> None:
    """Print the tables."""
    rng = np.random.default_rng(0)
    nulls = [dunnett_t(rng.normal(size=(2_000, 1 + METHODS, SEEDS))).max(axis=1) for _ in range(20)]
    critical = np.quantile(np.concatenate(nulls), 1 - ALPHA)
    tests = {
        "t-test, Holm": holm_of_t,
        "Dunnett, blocks": lambda scores: dunnett_t(scores) >= critical,
        "sign flips, largest t": largest_of_flips,
    }
    print(f"Critical value of Dunnett's t: {critical:.2f}")
    header(f"Any false positive, percent of {TABLES:,} tables", "scores", *tests)
    for name, draw in cases().items():
        scores = draw(np.random.default_rng(0))
        row(name, *[percent(np.count_nonzero(test(scores).any(axis=1)), TABLES) for test in tests.values()])

    columns = [f"{name}, {gain}" for gain in GAINS for name in tests]
    header("Power for a true gain of the first method of one, two and three spreads, percent", "scores", *columns)
    for name, draw in list(cases().items())[:4]:
        cells = []
        for gain in GAINS:
            scores = draw(np.random.default_rng(0))
            scores[:, 1] += gain * np.sqrt(2)
            cells += [f"{100 * np.mean(test(scores)[:, 0]):.0f}" for test in tests.values()]
        row(name, *cells)


if __name__ == "__main__":
    main()
