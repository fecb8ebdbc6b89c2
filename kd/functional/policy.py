"""Probabilities of drawing each of several teachers, from their scores."""

from collections.abc import Sequence

import numpy as np


def rank_probabilities(scores: Sequence[float], *, higher_is_better: bool = True, sharpness: float = 1.0) -> list[float]:
    """Return probabilities proportional to rank ** sharpness of a score, where the worst has rank 1.

    Equal scores share the mean of their ranks. Ding et al. (SKDBERT, AAAI 2023, arXiv:2211.14466) draw by teacher rank and by
    student rank but do not state how a rank becomes a probability; the linear rank (sharpness 1) is our choice.

    Args:
        scores: one for each teacher.
        higher_is_better: false for errors.
        sharpness: 0 is uniform; larger favours the best.

    >>> rank_probabilities([0.7, 0.9, 0.8])
    [0.16666666666666666, 0.5, 0.3333333333333333]
    """
    values = np.asarray(scores, dtype=float) * (1 if higher_is_better else -1)
    below = (values[None, :] < values[:, None]).sum(axis=1)
    equal = (values[None, :] == values[:, None]).sum(axis=1)
    shares = ((below + (equal + 1) / 2) / len(values)) ** sharpness
    return [float(share) for share in shares / shares.sum()]


def best(scores: Sequence[float], *, higher_is_better: bool = True) -> list[float]:
    """Return probability 1 for the best score, or the first of equal ones, and 0 for the others.

    >>> best([0.7, 0.9, 0.9])
    [0.0, 1.0, 0.0]
    """
    values = np.asarray(scores, dtype=float) * (1 if higher_is_better else -1)
    return [float(index == int(values.argmax())) for index in range(len(values))]
