"""Statistical tests of a method against a baseline: by seed, by example, over tasks, and their correction for several tests.

All tests are two-sided, and a difference is always that of the method minus the baseline, in the unit of the scores.
`docs/statistics.md` explains which test answers which question, and has simulated error rates.
"""

from kd.results.statistics.counted import COUNTED, Statistic
from kd.results.statistics.estimates import Draws, Estimate, drawn, jackknifed, mean_of
from kd.results.statistics.examples import (
    ExampleDifference,
    McNemar,
    counted_difference,
    example_difference,
    mcnemar,
)
from kd.results.statistics.power import detectable_difference, median_spread
from kd.results.statistics.seeds import (
    MIN_SEEDS,
    PairedDifference,
    SeedTest,
    p_values,
    seed_difference,
    seed_test,
    seeds_needed,
    sign_flip_p,
    t_interval,
    t_p,
)
from kd.results.statistics.several import TaskSummary, bonferroni, corrected, corrected_by_example, holm, task_summary
from kd.results.statistics.verdict import ALPHA, Verdict

__all__ = [
    "ALPHA",
    "COUNTED",
    "MIN_SEEDS",
    "Draws",
    "Estimate",
    "ExampleDifference",
    "McNemar",
    "PairedDifference",
    "SeedTest",
    "Statistic",
    "TaskSummary",
    "Verdict",
    "bonferroni",
    "corrected",
    "corrected_by_example",
    "counted_difference",
    "detectable_difference",
    "drawn",
    "example_difference",
    "holm",
    "jackknifed",
    "mcnemar",
    "mean_of",
    "median_spread",
    "p_values",
    "seed_difference",
    "seed_test",
    "seeds_needed",
    "sign_flip_p",
    "t_interval",
    "t_p",
    "task_summary",
]
