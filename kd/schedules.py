"""Schedules: a number that depends on the fraction of training done, in [0, 1].

A weight or a temperature in a configuration is a plain number or a node such as
`{_target_: kd.schedules.Linear, start: 1.0, end: 0.0}`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

Schedule = Callable[[float], float]


@dataclass(frozen=True, slots=True)
class Constant:
    """The same value throughout."""

    value: float

    def __call__(self, fraction: float) -> float:
        """The value at a fraction of training."""
        return self.value


@dataclass(frozen=True, slots=True)
class Linear:
    """A straight line from `start` at fraction `begin` to `end` at fraction `until`, flat outside.

    >>> Linear(start=1.0, end=0.0)(0.25)
    0.75
    """

    start: float
    end: float
    begin: float = 0.0
    until: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.begin < self.until <= 1.0:
            raise ValueError(f"a linear schedule needs 0 <= begin < until <= 1, got begin={self.begin} until={self.until}")

    def __call__(self, fraction: float) -> float:
        """The value at a fraction of training."""
        share = (fraction - self.begin) / (self.until - self.begin)
        return self.start + (self.end - self.start) * min(max(share, 0.0), 1.0)


@dataclass(frozen=True, slots=True)
class Cosine:
    """Half a cosine from `start` to `end`."""

    start: float
    end: float

    def __call__(self, fraction: float) -> float:
        """The value at a fraction of training."""
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * min(max(fraction, 0.0), 1.0))) / 2


@dataclass(frozen=True, slots=True)
class Piecewise:
    """`values[i]` from fraction `boundaries[i - 1]` up to, not including, `boundaries[i]`."""

    boundaries: list[float]
    values: list[float]

    def __post_init__(self) -> None:
        if len(self.values) != len(self.boundaries) + 1 or sorted(self.boundaries) != list(self.boundaries):
            raise ValueError(
                f"a piecewise schedule needs ascending boundaries and one value more than boundaries, "
                f"got boundaries={list(self.boundaries)} values={list(self.values)}"
            )

    def __call__(self, fraction: float) -> float:
        """The value at a fraction of training."""
        return self.values[sum(fraction >= boundary for boundary in self.boundaries)]


@dataclass(frozen=True, slots=True)
class Staircase:
    """`steps` values at even distances from `start` to `end`, each for an equal part of training; one step is `end` alone.

    With as many steps as epochs it changes from epoch to epoch, as in AD-KD's annealed temperature.

    >>> [Staircase(start=4.0, end=1.0, steps=3)(fraction) for fraction in (0.0, 0.3, 0.4, 0.7, 1.0)]
    [4.0, 4.0, 2.5, 1.0, 1.0]
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        if type(self.steps) is not int or self.steps < 1:
            raise ValueError(f"a staircase needs a whole number of steps, one or more, got steps={self.steps}")

    def __call__(self, fraction: float) -> float:
        """The value at a fraction of training."""
        # A step begins at step / steps; the fraction comes from a division that may fall short of it by rounding.
        step = min(math.floor(min(max(fraction, 0.0), 1.0) * self.steps + 1e-9), self.steps - 1)
        share = 1.0 if self.steps == 1 else step / (self.steps - 1)
        return self.start * (1 - share) + self.end * share


def as_schedule(value: "float | Schedule") -> Schedule:
    """A number as a constant schedule; a schedule as it is."""
    return value if callable(value) else Constant(float(value))
