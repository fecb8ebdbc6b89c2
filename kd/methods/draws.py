"""Random numbers of examples: hashes, so that they depend on nothing else in a batch."""

import numpy as np
import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
"""Increment of SplitMix64: 2^64 divided by the golden ratio, rounded to an odd number."""


def uniform(key: np.random.SeedSequence, index: Tensor, count: int) -> Tensor:
    """Return numbers that are uniform in [0, 1), each a function of the key, one index and a column alone.

    Two rounds of the SplitMix64 generator in 64-bit integers, one that makes a state of each index and one that makes numbers
    of the state: exact, so that all devices give the same numbers, and computed where the indices are.

    Source: Steele, Lea, Flood, OOPSLA 2014, doi:10.1145/2660193.2660195, fig. 17, with the constants of Vigna's
    `splitmix64.c` (Stafford's variant 13).

    Args:
        key: entropy; numbers of different keys are independent.
        index: (batch,), integers.
        count: number of columns.

    Returns:
        (batch, count), float64, multiples of 2^-53.
    """
    first, second = (_signed(int(word)) for word in key.generate_state(2, np.uint64))
    states = _mix(index.long() * _signed(GOLDEN) + first) ^ second
    columns = torch.arange(1, count + 1, device=index.device) * _signed(GOLDEN)
    return _shifted(_mix(states[:, None] + columns), 11).double() * 2.0**-53


def _mix(bits: Tensor) -> Tensor:
    """Return the output function of SplitMix64, a bijection of 64-bit integers; products wrap around."""
    bits = (bits ^ _shifted(bits, 30)) * _signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ _shifted(bits, 27)) * _signed(0x94D049BB133111EB)
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, places: int) -> Tensor:
    """Shift unsigned 64-bit integers, held in signed ones, to the right."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def _signed(word: int) -> int:
    """Return the signed 64-bit integer with the same bits."""
    return word - (1 << 64) if word >= 1 << 63 else word
