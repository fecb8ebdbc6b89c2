"""Checks of the options of methods. An error names the option; the builder adds the key of the method."""

from kd.config.values import LARGEST_SEED, number, shown, switch, whole, word
from kd.data.held import checked_share as holds
from kd.errors import InputError
from kd.functional.logits import LOGIT_REDUCTIONS
from kd.schedules import Schedule, as_schedule, extremes

__all__ = [
    "BATCH_MEANS",
    "LARGEST_SEED",
    "TEMPERATURES",
    "holds",
    "number",
    "schedule",
    "switch",
    "temperature_schedule",
    "whole",
    "word",
]

TEMPERATURES = (1e-3, 1e4)
"""Lowest and highest temperature allowed."""

BATCH_MEANS = tuple(name for name in LOGIT_REDUCTIONS if name not in ("sum", "none"))
"""Reductions whose value does not depend on the batch size: a sum over the batch would change with ranks and accumulation."""


def held_share(share: float, why: str) -> float:
    """Check the share of train that is held for a reward, and return it.

    Args:
        share: the option `holds`.
        why: what needs a held part, for the error about a share of 0.

    Raises:
        InputError: for a share out of range, or 0.
    """
    checked = holds(share)
    if checked == 0:
        raise InputError(f"{why} on a held part of train; holds is 0", "holds")
    return checked


def schedule(value: "float | Schedule", key: str, least: float, most: float) -> Schedule:
    """Convert an option to a schedule and check that it stays in a range.

    Raises:
        InputError: for a value that is not a number, or is outside the range.
    """
    try:
        converted = as_schedule(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{key}={shown(value)} is not a number", key) from error
    for extreme in extremes(converted):
        number(extreme, key, least, most)
    return converted


def temperature_schedule(value: "float | Schedule", key: str = "temperature") -> Schedule:
    """Convert a temperature to a schedule and check that it stays in [0.001, 10000].

    At lower temperatures logits of ordinary size would overflow float32; at higher ones their differences vanish.

    Raises:
        InputError: for a value that is not a number, or is outside that range.
    """
    try:
        lowest = min(extremes(as_schedule(value)))
    except (TypeError, ValueError):
        lowest = TEMPERATURES[0]
    if not lowest > 0:
        raise InputError(f"{key} is {lowest}, it must be positive", key)
    return schedule(value, key, *TEMPERATURES)
