"""Several comparisons at once: corrections of p, several methods against one baseline, and a method over tasks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from kd.results.statistics.examples import ExampleDifference, McNemar, sign_p
from kd.results.statistics.seeds import MIN_SEEDS, PairedDifference, seeds_needed
from kd.results.statistics.verdict import ALPHA, Verdict, decided

ExampleTest = TypeVar("ExampleTest", ExampleDifference, McNemar)

MIN_TASKS = 5
"""Smallest number of tasks for statements over tasks."""


@dataclass(frozen=True)
class TaskSummary:
    """Comparison of a method with a baseline over tasks.

    Args:
        better: number of tasks on which the mean difference is an improvement.
        worse: number of tasks on which it is the opposite.
        equal: number of tasks on which it is 0; the sign test leaves them out.
        missing: tasks without a pair of runs.
        p: two-sided p of the sign test; None with fewer than MIN_TASKS tasks.
        verdict: outcome of the sign test.
        by_task: differences with Holm's correction over the tasks; empty with fewer than MIN_TASKS tasks.
    """

    better: int
    worse: int
    equal: int
    missing: tuple[str, ...]
    p: float | None
    verdict: Verdict
    by_task: Mapping[str, PairedDifference]


def bonferroni(p_values: Sequence[float]) -> list[float]:
    """Return p times the number of tests, at most 1, in the order given.

    Source: Dunn, Journal of the American Statistical Association 56(293), 1961.

    Raises:
        ValueError: if a p is not in [0, 1].

    >>> bonferroni([0.25, 0.5])
    [0.5, 1.0]
    """
    _check_probabilities(p_values)
    return [min(1.0, len(p_values) * p) for p in p_values]


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p adjusted by Holm's step-down procedure, in the order given.

    The smallest of m is multiplied by m, the next by m - 1, and so on; an adjusted p is at least that of any smaller p, and
    at most 1. The probability of any false rejection is bounded as by `bonferroni`, and no adjusted p is larger than there.

    Source: Holm, Scandinavian Journal of Statistics 6(2), 1979.

    Raises:
        ValueError: if a p is not in [0, 1].

    >>> holm([0.25, 0.0625, 0.125])
    [0.25, 0.1875, 0.25]
    """
    _check_probabilities(p_values)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _check_probabilities(p_values: Sequence[float]) -> None:
    if wrong := [p for p in p_values if not 0 <= p <= 1]:
        raise ValueError(f"p values {wrong} are not in [0, 1]")


def corrected(
    differences: Mapping[str, PairedDifference], correction: Callable[[Sequence[float]], list[float]] = holm
) -> dict[str, PairedDifference]:
    """Return differences with p corrected for several tests, and verdicts by the corrected p.

    For several methods against one baseline, or one method on several tasks. Differences of fewer than MIN_SEEDS pairs are
    returned as they are and not counted: the number of pairs alone, whatever the scores, excludes that they are shown, so they
    add no false rejection. Each of the others has the p of the test that `seed_test` gives for its number of pairs and the
    number of differences that are counted. Where that is the t-test and all differences of seeds are equal, there is no p: it
    counts as a test with a p of 1, and the verdict is that it is undecided.

    Args:
        differences: by method, or by task.
        correction: `holm` or `bonferroni`.
    """
    counted = [name for name, difference in differences.items() if difference.n >= MIN_SEEDS]
    tested = {name: differences[name].tested(len(counted)) for name in counted}
    adjusted = correction([1.0 if difference.p is None else difference.p for difference in tested.values()])
    decisions = {
        name: difference
        if difference.p is None
        else replace(difference, adjusted=p, verdict=decided(difference.gain, p), comparisons=len(counted))
        for (name, difference), p in zip(tested.items(), adjusted, strict=True)
    }
    return {name: decisions.get(name, difference) for name, difference in differences.items()}


def corrected_by_example(tests: Mapping[str, ExampleTest]) -> dict[str, ExampleTest]:
    """Return tests by example with p corrected by `holm` for their number, and verdicts by the corrected p.

    Args:
        tests: by method, against one baseline.
    """
    adjusted = holm([test.p for test in tests.values()])
    return {
        name: replace(test, adjusted=p, verdict=test.verdict if p <= ALPHA else Verdict.NOT_SHOWN)
        for (name, test), p in zip(tests.items(), adjusted, strict=True)
    }


def task_summary(differences: Mapping[str, PairedDifference]) -> TaskSummary:
    """Return the sign test of a method against a baseline over tasks, and Holm's correction of the tests of each task.

    The unit of the sign test is a task, whatever the number of its seeds and the scale of its metric: it counts the tasks that
    improve, not by how much. Both parts need MIN_TASKS tasks. Five tasks still cannot reach ALPHA (2 / 2^5 = .0625), so the
    verdict is "too few tasks to decide" below six tasks with a difference.

    Source: Dixon and Mood, Journal of the American Statistical Association 41(236), 1946; over data sets: Demšar, Journal of
    Machine Learning Research 7, 2006, section 3.1.4, who gives half of the ties to each side; we leave them out.

    Args:
        differences: by task, of one metric each.
    """
    gains = {task: difference.gain for task, difference in differences.items() if difference.n}
    missing = tuple(task for task in differences if task not in gains)
    better, worse = sum(gain > 0 for gain in gains.values()), sum(gain < 0 for gain in gains.values())
    equal = len(gains) - better - worse
    if len(gains) < MIN_TASKS:
        return TaskSummary(better, worse, equal, missing, None, Verdict.TOO_FEW_TASKS, {})
    p = sign_p(better, worse)
    few = Verdict.TOO_FEW_TASKS if better + worse < seeds_needed() else Verdict.NOT_SHOWN
    return TaskSummary(better, worse, equal, missing, p, decided(better - worse, p, few), corrected(differences))
