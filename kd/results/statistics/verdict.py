"""Outcomes of comparisons, in the words that all tests share."""

from enum import StrEnum

ALPHA = 0.05
"""Largest p of a test that shows a difference; intervals cover 1 - ALPHA."""

ROUNDING = 1e-9
"""Fraction of the scale of the values below which two of them count as equal: sums that differ by rounding are ties."""


class Verdict(StrEnum):
    """Outcome of a comparison."""

    BETTER = "better"
    WORSE = "worse"
    NOT_SHOWN = "no difference shown"
    TOO_FEW_SEEDS = "too few seeds to decide"
    TOO_FEW_TASKS = "too few tasks to decide"
    NO_SPREAD = "undecided: all differences are equal"


def decided(gain: float, p: float, otherwise: Verdict = Verdict.NOT_SHOWN) -> Verdict:
    """Return the outcome of a test.

    Args:
        gain: difference with the sign of an improvement; only its sign is used.
        p: two-sided p.
        otherwise: outcome if p is above ALPHA.

    >>> str(decided(-0.02, p=0.03)), str(decided(-0.02, p=0.2))
    ('worse', 'no difference shown')
    """
    if p > ALPHA:
        return otherwise
    return Verdict.BETTER if gain > 0 else Verdict.WORSE
