"""Figures over examples with bootstrap intervals, from the same samples for all figures of the same examples."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from kd.results.statistics.counted import Floats, Statistic
from kd.results.statistics.examples import EXAMPLE_DRAWS, blocks, draw_counts, percentiles
from kd.results.statistics.verdict import ALPHA

MOST_UNDEFINED = 0.05
"""Largest share of samples in which a figure may be undefined; with more it has no interval."""


@dataclass(frozen=True)
class Estimate:
    """Figure with a 95 % interval.

    Attributes:
        value: the figure; None if it is undefined.
        low: lower end of the interval over examples; None without one.
        high: upper end.
        n: number of examples that the figure is a mean over, or that its condition leaves.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True, eq=False)
class Draws:
    """Figure of all examples, and of each bootstrap sample; NaN where it is undefined.

    Attributes:
        observed: the figure.
        values: (draws,).
        n: number of examples that it is over.
    """

    observed: float
    values: NDArray[np.float64]
    n: int

    def minus(self, other: "Draws") -> "Draws":
        """Return the difference from another figure of the same samples; its `n` is the smaller of both."""
        return Draws(self.observed - other.observed, self.values - other.values, min(self.n, other.n))

    def estimate(self) -> Estimate:
        """Return the figure with its percentile interval, over the samples in which it is defined.

        There is none if the figure, or more than `MOST_UNDEFINED` of its samples, are undefined. It is about other examples
        of the same kind, for these trained models: see `kd.results.statistics.example_difference`.
        """
        if not math.isfinite(self.observed):
            return Estimate(None, None, None, self.n)
        defined = np.sort(self.values[np.isfinite(self.values)])
        if len(defined) < (1 - MOST_UNDEFINED) * len(self.values):
            return Estimate(self.observed, None, None, self.n)
        return Estimate(self.observed, *percentiles(defined), self.n)


def drawn(statistics: Mapping[str, tuple[Statistic, int]], examples: int, draws: int = EXAMPLE_DRAWS) -> dict[str, Draws]:
    """Return figures of all examples and of bootstrap samples of them, which are the same for every figure.

    Args:
        statistics: name -> function of (samples, examples) counts that returns (samples,) values, and the number of examples
            that the figure is over.
        examples: number of examples, at least one.
        draws: number of samples, from a fixed generator.
    """
    every = np.ones((1, examples))
    values: dict[str, list[Floats]] = {name: [] for name in statistics}
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0 is an undefined figure
        observed = {name: float(statistic(every)[0]) for name, (statistic, _) in statistics.items()}
        for block in blocks(draw_counts(examples, draws)):
            for name, (statistic, _) in statistics.items():
                values[name].append(statistic(block))
    return {name: Draws(observed[name], np.concatenate(values[name]), n) for name, (_, n) in statistics.items()}


def jackknifed(value: float, without: NDArray[np.float64], ends: tuple[float, float] = (-math.inf, math.inf)) -> Estimate:
    """Return a figure with a normal 95 % interval of the jackknife, for one that repeated examples would change.

    The standard error is the root of (n - 1) / n times the sum of squared deviations of the figures without one example from
    their mean.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, eq. 11.5. It is for smooth figures, no quantiles.

    Args:
        value: the figure of all examples.
        without: (examples,), the figure without each example.
        ends: ends of the figure's range, at which the interval is cut.
    """
    n = len(without)
    if not math.isfinite(value):
        return Estimate(None, None, None, n)
    if not np.isfinite(without).all():
        return Estimate(value, None, None, n)
    half = float(norm.ppf(1 - ALPHA / 2)) * math.sqrt((n - 1) / n * float(np.square(without - without.mean()).sum()))
    return Estimate(value, max(value - half, ends[0]), min(value + half, ends[1]), n)


def mean_of(values: NDArray[np.floating] | NDArray[np.bool_], where: NDArray[np.bool_] | None = None) -> Statistic:
    """Return the mean of values over examples as a statistic; over those of a condition, which are other ones in each sample.

    Args:
        values: (examples,).
        where: (examples,); None for all examples. NaN where a sample has none of them.
    """
    weights = np.ones(len(values)) if where is None else where.astype(np.float64)
    weighted = np.where(weights > 0, values, 0.0) * weights

    def mean(counts: Floats) -> Floats:
        result: Floats = (counts @ weighted) / (counts @ weights)
        return result

    return mean
