"""Statistical tests of a method against a baseline: by seed, by example, over tasks, and their correction for several tests.

All tests are two-sided, and a difference is always that of the method minus the baseline, in the unit of the scores.
`docs/statistics.md` explains which test answers which question, and has simulated error rates.
"""

from kd.results.statistics.examples import ExampleDifference, McNemar, example_difference, mcnemar
from kd.results.statistics.seeds import (
    MIN_SEEDS,
    PairedDifference,
    bca_interval,
    seed_difference,
    seeds_needed,
    sign_flip_p,
)
from kd.results.statistics.several import TaskSummary, bonferroni, corrected, holm, task_summary
from kd.results.statistics.verdict import ALPHA, Verdict

__all__ = [
    "ALPHA",
    "MIN_SEEDS",
    "ExampleDifference",
    "McNemar",
    "PairedDifference",
    "TaskSummary",
    "Verdict",
    "bca_interval",
    "bonferroni",
    "corrected",
    "example_difference",
    "holm",
    "mcnemar",
    "seed_difference",
    "seeds_needed",
    "sign_flip_p",
    "task_summary",
]
