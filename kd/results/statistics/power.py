"""Power of the tests by seed: the smallest true difference that a table of so many seeds and methods shows."""

import math
import statistics
from collections.abc import Callable, Iterable
from functools import lru_cache

import numpy as np

from kd.errors import InputError
from kd.results.statistics.seeds import MIN_SEEDS, Floats, PairedDifference, p_values, seed_test
from kd.results.statistics.several import holm
from kd.results.statistics.verdict import ALPHA

TABLES = 2_000
"""Number of simulated tables. The standard error of a share of 80 % is 0.9 points."""

SHARE = 0.8
"""Share of the tables in which a difference has to be shown: the usual power, Cohen, Statistical Power Analysis, 1988."""

STEP = 0.01
"""Step in which differences are searched, in spreads."""

LARGEST = 1024
"""Largest difference that is tried, in spreads."""


def median_spread(differences: Iterable[PairedDifference]) -> float | None:
    """Return the median spread of differences from a baseline, of those that have one; None without any.

    The median, because a method that collapses in some runs has ten times the spread of the others.
    """
    spreads = [difference.spread for difference in differences if difference.spread is not None]
    return statistics.median(spreads) if spreads else None


def detectable_difference(
    spread: float,
    pairs: int,
    methods: int = 1,
    *,
    examples: int | None = None,
    share: float = SHARE,
    tables: int = TABLES,
) -> float | None:
    """Return the smallest true difference that is shown in a share of simulated tables, by the rule of `seed_test`.

    A table has one baseline and `methods` methods with `pairs` seeds each. One method differs from the baseline, the others do
    not; it is shown if p of the test that decides so many methods, corrected by Holm, is at most ALPHA, and its mean difference
    has the right sign. Scores are normal, with one spread, independent over models and seeds, and so that differences from the
    baseline have the standard deviation `spread`; two methods' differences then have a correlation of 1/2. Our choice: a
    method that collapses in some runs needs more. Random numbers are those of a fixed generator.

    Args:
        spread: standard deviation of the differences of a method from the baseline over seeds, above 0, in any unit.
        pairs: number of seeds.
        methods: number of methods that are compared with the baseline.
        examples: number of evaluated examples: scores are multiples of 1 / examples, and `spread` is a fraction. None for
            scores that are not rounded.
        share: share of the tables in which the difference has to be shown.
        tables: number of tables.

    Returns:
        The difference in the unit of `spread`, the largest of a step of 0.01 spreads; None if no difference is shown that
        often, as with fewer than MIN_SEEDS pairs.

    Raises:
        InputError: for a number out of its range.
    """
    if not (spread > 0 and math.isfinite(spread)):
        raise InputError(f"spread={spread} is not a number above 0", "spread")
    for name, value in {
        "pairs": pairs,
        "methods": methods,
        "tables": tables,
        "examples": 1 if examples is None else examples,
    }.items():
        if value < 1:
            raise InputError(f"{name}={value} is not 1 or more", name)
    if not 0 < share < 1:
        raise InputError(f"share={share} is not between 0 and 1", "share")
    if pairs < MIN_SEEDS:
        return None
    smallest = _in_spreads(pairs, methods, None if examples is None else 1 / (examples * spread), share, tables)
    return None if smallest is None else spread * smallest


@lru_cache(maxsize=256)
def _in_spreads(pairs: int, methods: int, unit: float | None, share: float, tables: int) -> float | None:
    """Return the smallest difference in spreads, for scores that are multiples of a unit in spreads, or not rounded."""
    shown = _share_shown(pairs, methods, unit, tables)
    high = 1.0
    while shown(high) < share:
        high *= 2
        if high > LARGEST:
            return None
    low = 0.0 if high == 1 else high / 2
    while high - low > STEP:
        middle = (low + high) / 2
        low, high = (low, middle) if shown(middle) >= share else (middle, high)
    return high


def _share_shown(pairs: int, methods: int, unit: float | None, tables: int) -> Callable[[float], float]:
    """Return the share of tables that show a difference, as a function of the difference; all in spreads."""
    generator, test = np.random.default_rng(0), seed_test(pairs, methods)
    noise = generator.normal(size=(1 + methods, tables, pairs)) / math.sqrt(2)
    # The grid of the scores may lie anywhere beside their mean.
    start = generator.random((tables, 1))

    def scores(values: Floats) -> Floats:
        return values if unit is None else np.rint(values / unit + start)

    def p_of(differences: Floats) -> Floats:
        return np.nan_to_num(p_values(test, differences), nan=1.0)

    baseline = scores(noise[0])
    others = [p_of(scores(values) - baseline) for values in noise[2:]]

    def share_shown(difference: float) -> float:
        differences = scores(noise[1] + difference) - baseline
        found = np.stack([p_of(differences), *others], axis=1)
        adjusted = np.array([holm(of_table)[0] for of_table in found.tolist()])
        return float(np.mean((adjusted <= ALPHA) & (differences.sum(axis=1) > 0)))

    return share_shown
