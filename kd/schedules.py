"""Schedules: a number that depends on the fraction of training done, in [0, 1].

A weight or a temperature in a configuration is a plain number or a node such as
`{_target_: kd.schedules.Linear, start: 1.0, end: 0.0}`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

Schedule = Callable[[float], float]


class ScheduleNode:
    """Base class of the schedules that a configuration can name; custom schedules inherit from it."""

    __slots__ = ()

    def __call__(self, fraction: float) -> float:
        """Return the value at a fraction of training."""
        raise NotImplementedError

    @property
    def extremes(self) -> Sequence[float]:
        """Values between which all values of the schedule lie; by default 1001 samples."""
        return [self(step / 1000) for step in range(1001)]


def check_finite(schedule: "ScheduleNode") -> None:
    """Check that the arguments of a schedule are finite numbers, or lists of them.

    Raises:
        ValueError: naming one that is not.
    """
    for name in (argument.name for argument in fields(schedule)):  # type: ignore[arg-type]
        value = getattr(schedule, name)
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, bool) or not isinstance(item, int | float) or not math.isfinite(item):
                raise ValueError(f"a schedule is made of finite numbers, got {name}={value!r}")


@dataclass(frozen=True, slots=True)
class Constant(ScheduleNode):
    """Schedule with the same value throughout."""

    value: float

    def __post_init__(self) -> None:
        check_finite(self)

    @property
    def extremes(self) -> Sequence[float]:
        """The value."""
        return [self.value]

    def __call__(self, fraction: float) -> float:
        """Return the value at a fraction of training."""
        return self.value


@dataclass(frozen=True, slots=True)
class Linear(ScheduleNode):
    """Schedule along a straight line from `start` at fraction `begin` to `end` at fraction `until`, flat outside.

    >>> Linear(start=1.0, end=0.0)(0.25)
    0.75
    """

    start: float
    end: float
    begin: float = 0.0
    until: float = 1.0

    def __post_init__(self) -> None:
        check_finite(self)
        if not 0.0 <= self.begin < self.until <= 1.0:
            raise ValueError(f"a linear schedule needs 0 <= begin < until <= 1, got begin={self.begin} until={self.until}")

    @property
    def extremes(self) -> Sequence[float]:
        """Values at both ends."""
        return [self.start, self.end]

    def __call__(self, fraction: float) -> float:
        """Return the value at a fraction of training."""
        share = (fraction - self.begin) / (self.until - self.begin)
        return self.start + (self.end - self.start) * min(max(share, 0.0), 1.0)


@dataclass(frozen=True, slots=True)
class Cosine(ScheduleNode):
    """Schedule along half a cosine wave from `start` to `end`."""

    start: float
    end: float

    def __post_init__(self) -> None:
        check_finite(self)

    @property
    def extremes(self) -> Sequence[float]:
        """Values at both ends."""
        return [self.start, self.end]

    def __call__(self, fraction: float) -> float:
        """Return the value at a fraction of training."""
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * min(max(fraction, 0.0), 1.0))) / 2


@dataclass(frozen=True, slots=True)
class RampUp(ScheduleNode):
    r"""Schedule that rises as :math:`e^{-5 (1 - x)^2}` times `end`; x goes from 0 to 1 at fraction `until`, and stays there.

    Source: the sigmoid-shaped ramp-up of Laine and Aila, ICLR 2017, arXiv:1610.02242.

    >>> [round(RampUp(end=1.0)(fraction), 6) for fraction in (0.0, 0.5, 1.0)]
    [0.006738, 0.286505, 1.0]
    """

    end: float
    until: float = 1.0

    def __post_init__(self) -> None:
        check_finite(self)
        if not 0.0 < self.until <= 1.0:
            raise ValueError(f"a ramp needs 0 < until <= 1, got until={self.until}")

    @property
    def extremes(self) -> Sequence[float]:
        """Values at both ends."""
        return [self(0.0), self.end]

    def __call__(self, fraction: float) -> float:
        """Return the value at a fraction of training."""
        return self.end * math.exp(-5.0 * (1.0 - min(max(fraction / self.until, 0.0), 1.0)) ** 2)


@dataclass(frozen=True, slots=True)
class Piecewise(ScheduleNode):
    """Schedule with `values[i]` from fraction `boundaries[i - 1]` up to, not including, `boundaries[i]`."""

    boundaries: list[float]
    values: list[float]

    def __post_init__(self) -> None:
        if not all(isinstance(argument, list | tuple) for argument in (self.boundaries, self.values)):
            raise ValueError(f"boundaries and values are lists, got {self.boundaries!r} and {self.values!r}")
        check_finite(self)
        if len(self.values) != len(self.boundaries) + 1 or sorted(self.boundaries) != list(self.boundaries):
            raise ValueError(
                f"a piecewise schedule needs ascending boundaries and one value more than boundaries, "
                f"got boundaries={list(self.boundaries)} values={list(self.values)}"
            )

    @property
    def extremes(self) -> Sequence[float]:
        """The values."""
        return self.values

    def __call__(self, fraction: float) -> float:
        """Return the value at a fraction of training."""
        return self.values[sum(fraction >= boundary for boundary in self.boundaries)]


@dataclass(frozen=True, slots=True)
class Staircase(ScheduleNode):
    """Schedule of `steps` evenly spaced values from `start` to `end`, each for an equal part of training; one step is `end`.

    With as many steps as epochs it changes from epoch to epoch, as in AD-KD's annealed temperature.

    >>> [Staircase(start=4.0, end=1.0, steps=3)(fraction) for fraction in (0.0, 0.3, 0.4, 0.7, 1.0)]
    [4.0, 4.0, 2.5, 1.0, 1.0]
    """

    start: float
    end: float
    steps: int

    @property
    def extremes(self) -> Sequence[float]:
        """Values at both ends; with one step only `end`."""
        return [self.end] if self.steps == 1 else [self.start, self.end]

    def __post_init__(self) -> None:
        if type(self.steps) is not int or self.steps < 1:
            raise ValueError(f"a staircase needs a whole number of steps, one or more, got steps={self.steps}")
        check_finite(self)

    def __call__(self, fraction: float) -> float:
        """Return the value at a fraction of training."""
        # A step begins at step / steps; the fraction comes from a division that may fall short of it by rounding.
        step = min(math.floor(min(max(fraction, 0.0), 1.0) * self.steps + 1e-9), self.steps - 1)
        share = 1.0 if self.steps == 1 else step / (self.steps - 1)
        return self.start * (1 - share) + self.end * share


def as_schedule(value: "float | Schedule") -> Schedule:
    """Return a number as a constant schedule, and a schedule unchanged.

    Raises:
        TypeError: for a boolean or a string.
        ValueError: for a number that is not finite.
    """
    if isinstance(value, bool | str):
        raise TypeError(f"{value!r} is not a number")
    return value if callable(value) else Constant(float(value))


def extremes(schedule: Schedule) -> Sequence[float]:
    """Return values between which all values of a schedule lie; for a plain function 1001 samples."""
    if isinstance(schedule, ScheduleNode):
        return schedule.extremes
    return [schedule(step / 1000) for step in range(1001)]
