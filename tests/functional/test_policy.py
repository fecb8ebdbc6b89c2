"""Probabilities from ranks."""

import itertools
import math

import pytest

from kd.functional.policy import best, rank_probabilities

SCORES = [0.71, 0.93, 0.88, 0.64]


@pytest.mark.parametrize("sharpness", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("scores", [SCORES, [0.5], [0.5, 0.5], [1, 2, 2, 3, 3, 3], [-math.inf, 0.2, 0.1]], ids=str)
def test_probabilities_add_up_to_one_and_rise_with_the_score(scores: list[float], sharpness: float) -> None:
    found = rank_probabilities(scores, sharpness=sharpness)
    assert sum(found) == pytest.approx(1, abs=1e-12)
    assert all(p > 0 for p in found)
    for (score, p), (other, q) in itertools.permutations(zip(scores, found, strict=True), 2):
        if score == other or sharpness == 0:
            assert p == pytest.approx(q, abs=1e-12)
        elif score < other:
            assert p < q


def test_the_linear_rank_is_rank_over_the_sum_of_ranks() -> None:
    assert rank_probabilities(SCORES) == pytest.approx([2 / 10, 4 / 10, 3 / 10, 1 / 10])
    assert rank_probabilities(SCORES, sharpness=2.0) == pytest.approx([4 / 30, 16 / 30, 9 / 30, 1 / 30])


def test_equal_scores_share_the_mean_of_their_ranks() -> None:
    assert rank_probabilities([0.9, 0.8, 0.9]) == pytest.approx([2.5 / 6, 1 / 6, 2.5 / 6])


def test_only_the_order_of_the_scores_counts() -> None:
    assert rank_probabilities(SCORES) == rank_probabilities([math.exp(9 * score) for score in SCORES])


@pytest.mark.parametrize("scores", [SCORES, [0.2, 0.2, 0.1]], ids=str)
def test_of_errors_the_lowest_is_the_best(scores: list[float]) -> None:
    assert rank_probabilities(scores, higher_is_better=False) == rank_probabilities([-score for score in scores])
    assert best(scores, higher_is_better=False) == best([-score for score in scores])
    assert best(SCORES, higher_is_better=False) == [0.0, 0.0, 0.0, 1.0]


def test_no_sharpness_is_uniform() -> None:
    assert rank_probabilities(SCORES, sharpness=0.0) == [0.25] * 4


def test_much_sharpness_is_the_best_alone() -> None:
    assert rank_probabilities(SCORES, sharpness=60.0) == pytest.approx(best(SCORES), abs=1e-6)


def test_the_best_has_all_probability_and_of_equal_ones_the_first() -> None:
    assert best(SCORES) == [0.0, 1.0, 0.0, 0.0]
    assert best([0.3, 0.7, 0.7]) == [0.0, 1.0, 0.0]
    assert best([-math.inf, -math.inf]) == [1.0, 0.0]


def test_any_sharpness_gives_numbers() -> None:
    assert rank_probabilities(SCORES, sharpness=1000.0) == pytest.approx(best(SCORES), abs=1e-6)
