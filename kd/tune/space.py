"""Search spaces: which keys of kd-train a study searches, and among which values. In `conf/tune/<name>.yaml`, or in a command.

```yaml
method: [pkd]                                          # one choice: every trial has it
method.temperature: [5, 10, 20]                        # choices
alpha:                                                 # choices of several keys at once, by a name and labels of ours
  - 0.2: [method.weights.task=0.8, method.weights.logits=0.2]
  - 0.5: [method.weights.task=0.5, method.weights.logits=0.5]
optimizer.lr: {low: 1.0e-5, high: 1.0e-3, log: true}   # a range
student.layers: {low: 2, high: 4, int: true}           # of whole numbers
student.dropout: {low: 0.0, high: 0.3, step: 0.1}      # in steps
```

In a command, choices are separated by commas, as in a sweep, and a range is Hydra's: `optimizer.lr=1e-5,3e-5` and
`optimizer.lr=tag(log,interval(1e-5,1e-3))`.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from kd.config.choices import choice, definition_names, entries, mapping, read_definition
from kd.config.compose import explain, parsed_override
from kd.config.values import shown
from kd.errors import InputError

RANGE_KEYS = ("low", "high", "log", "step", "int")

DIGITS = 3
"""Significant digits of the values of a range that has no steps. Our choice: more of them make commands hard to read."""

MOST_POINTS = 100_000
"""Number of points up to which a space is enumerated. Our choice: no study has as many trials."""

Value = str | float
"""Value of a parameter as a study stores it: the label of a choice, or a number of a range."""


class Parameter(Protocol):
    """A key of kd-train, or several, that a study searches."""

    @property
    def values(self) -> Sequence[Value] | None:
        """All values; None if they are not counted."""
        ...

    @property
    def bounds(self) -> Sequence[Value]:
        """Values whose validity implies that of the others."""
        ...

    def overrides(self, value: Value) -> tuple[str, ...]:
        """Return the overrides of kd-train for a value."""
        ...

    def describe(self) -> Any:
        """Return what identifies the parameter, as plain values."""
        ...


@dataclass(frozen=True)
class Choices:
    """Choices by label.

    Attributes:
        options: label -> overrides of kd-train.
    """

    options: Mapping[str, tuple[str, ...]]

    @property
    def values(self) -> Sequence[str]:
        """The labels."""
        return list(self.options)

    @property
    def bounds(self) -> Sequence[str]:
        """The labels."""
        return self.values

    def overrides(self, value: Value) -> tuple[str, ...]:
        """Return the overrides of a label."""
        return self.options[str(value)]

    def describe(self) -> Any:
        """Return the overrides by label."""
        return {label: list(overrides) for label, overrides in self.options.items()}


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included.

    Attributes:
        key: key of kd-train.
        low: the smallest.
        high: the largest.
        log: True if equal ratios, not equal differences, are equally likely.
        step: distance between neighbours; None if every number is possible.
        whole: True for whole numbers.
    """

    key: str
    low: float
    high: float
    log: bool = False
    step: float | None = None
    whole: bool = False

    @property
    def values(self) -> Sequence[float] | None:
        """The numbers, if they have steps."""
        if self.step is None or self.log:
            return None
        count = math.floor((self.high - self.low) / self.step + 1e-9) + 1
        if count > MOST_POINTS:
            return None
        numbers = [self.low + index * self.step for index in range(count)]
        return [int(number) if self.whole else float(f"{number:.12g}") for number in numbers]

    @property
    def bounds(self) -> Sequence[float]:
        """The smallest and the largest number."""
        return (self.low, self.high)

    def overrides(self, value: Value) -> tuple[str, ...]:
        """Return the override of a number, in few digits."""
        number = float(value)
        if self.whole:
            return (f"{self.key}={round(number)}",)
        if self.step is None:
            number = min(max(float(f"{number:.{DIGITS}g}"), self.low), self.high)
        return (f"{self.key}={number:.12g}",)

    def describe(self) -> Any:
        """Return the bounds and the kind of the range."""
        return {"low": self.low, "high": self.high, "log": self.log, "step": self.step, "int": self.whole}


@dataclass(frozen=True)
class Space:
    """A search space.

    Attributes:
        name: stem of its file; None for one that a command gives.
        fixed: overrides that every trial has, before those of the command.
        parameters: name -> what is searched.
    """

    name: str | None = None
    fixed: tuple[str, ...] = ()
    parameters: Mapping[str, Parameter] = field(default_factory=dict)

    @property
    def size(self) -> int | None:
        """Number of points; None if they are not counted."""
        counts = [None if parameter.values is None else len(parameter.values) for parameter in self.parameters.values()]
        known = [count for count in counts if count is not None]
        size = math.prod(known)
        return None if len(known) < len(counts) or size > MOST_POINTS else size

    def points(self) -> Iterator[dict[str, Value]]:
        """Yield all points of a space whose points are counted."""
        axes = [[(name, value) for value in parameter.values or ()] for name, parameter in self.parameters.items()]
        for point in itertools.product(*axes):
            yield dict(point)

    def overrides(self, point: Mapping[str, Value]) -> tuple[str, ...]:
        """Return the overrides of kd-train of a point."""
        return tuple(word for name, parameter in self.parameters.items() for word in parameter.overrides(point[name]))

    def describe(self) -> dict[str, Any]:
        """Return what identifies the space, as plain values."""
        return {name: parameter.describe() for name, parameter in self.parameters.items()}


def space_names() -> list[str]:
    """Return the names of the spaces that come with the package."""
    return definition_names("tune")


def load_space(name: str) -> Space:
    """Read a search space.

    Args:
        name: name of a space of the package, or the path of a YAML file.

    Raises:
        InputError: if there is no such space, or its file is not valid.
    """
    return parse_space(*read_definition(name, "tune", "search space", "space"))


def parse_space(name: str, content: Any) -> Space:
    """Return the space of a YAML file's content.

    Raises:
        InputError: naming the key of a list without choices, of a label that is there twice, or of a range that is not valid.
    """
    parameters = {str(key): parameter_of(str(key), value) for key, value in mapping(content, "space").items()}
    return with_fixed(Space(name, (), parameters))


def parameter_of(key: str, value: Any) -> Parameter:
    """Return the parameter of an entry of a file.

    Raises:
        InputError: naming the key, for an entry that is not valid.
    """
    if isinstance(value, Mapping):
        return range_of(key, value)
    options: dict[str, tuple[str, ...]] = {}
    for entry in entries(value, key):
        label, overrides = choice(key, entry, key)
        if label in options:
            raise InputError(f"{key} lists '{label}' twice", key)
        options[label] = tuple(overrides)
    if not options:
        raise InputError(f"{key} lists no choices", key)
    return Choices(options)


def range_of(key: str, values: Mapping[str, Any]) -> Parameter:
    """Return the range of a mapping with `RANGE_KEYS`.

    Raises:
        InputError: naming the key, for a range that is not valid.
    """
    mapping(values, key, RANGE_KEYS)
    for bound in ("low", "high"):
        if bound not in values:
            raise InputError(f"{key} has no '{bound}': a range is {{low: 1e-5, high: 1e-3, log: true}}, choices a list", key)
    low, high = (_number(values[bound], f"{key}.{bound}") for bound in ("low", "high"))
    step = None if values.get("step") is None else _number(values["step"], f"{key}.step")
    log, whole = (values.get(name, False) for name in ("log", "int"))
    for name, value in (("log", log), ("int", whole)):
        if not isinstance(value, bool):
            raise InputError(f"{key}.{name}={shown(value)} is neither true nor false", f"{key}.{name}")
    if low > high:
        raise InputError(f"{key}.low={low:g} is more than {key}.high={high:g}", f"{key}.low")
    if log and low <= 0:
        raise InputError(f"{key}.low={low:g} must be positive, as {key}.log is true", f"{key}.low")
    if step is not None and (step <= 0 or log):
        raise InputError(f"{key}.step={step:g} must be positive, and cannot be with {key}.log", f"{key}.step")
    if whole:
        step = 1.0 if step is None and not log else step
        for name, number in (("low", low), ("high", high), ("step", step)):
            if number is not None and number != int(number):
                raise InputError(f"{key}.{name}={number:g} is not whole, and {key}.int is true", f"{key}.{name}")
    return Range(key, low, high, log, step, whole)


def _number(value: Any, key: str) -> float:
    """Return a finite number; YAML reads 1e-5, which has no point, as a text.

    Raises:
        InputError: for anything else.
    """
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{key}={shown(value)} is not a number", key)
    return number


def with_fixed(space: Space) -> Space:
    """Return a space whose parameters of a single value are fixed."""
    fixed, searched = list(space.fixed), {}
    for name, parameter in space.parameters.items():
        if len(values := parameter.values or ()) == 1:
            fixed += parameter.overrides(values[0])
        else:
            searched[name] = parameter
    return Space(space.name, tuple(fixed), searched)


def with_command(space: Space, words: Sequence[str]) -> tuple[Space, tuple[str, ...]]:
    """Return a space with the parameters of a command, and the command's other overrides.

    A parameter of the space to which the command gives one value is not searched: with the label of a choice, it is that one.

    Raises:
        InputError: for an override that is not valid, or that a parameter of the space sets too.
    """
    parameters, fixed = dict(space.parameters), []
    for word in words:
        name = word.partition("=")[0]
        if (searched := searched_in(word)) is not None:
            parameters[name] = searched
            continue
        known = parameters.pop(name, None)
        fixed += [word] if known is None else fixed_to(known, word)
    for name, parameter in parameters.items():
        for value in (parameter.values or ()) if isinstance(parameter, Choices) else ():
            keys = {override.partition("=")[0] for override in parameter.overrides(value)}
            if taken := [word for word in fixed if word.partition("=")[0] in keys]:
                raise InputError(f"'{taken[0]}' is set by {name} too, which the space searches; give {name} a value", name)
    given = {word.partition("=")[0] for word in words}
    kept = tuple(word for word in space.fixed if word.partition("=")[0] not in given)
    return with_fixed(Space(space.name, kept, parameters)), tuple(fixed)


def fixed_to(parameter: Parameter, word: str) -> list[str]:
    """Return the overrides of a parameter to which a command gives a value.

    Raises:
        InputError: for a value that is no label, if the parameter's name is no key of kd-train.
    """
    name, _, value = word.partition("=")
    if not isinstance(parameter, Choices):
        return [word]
    if value in parameter.options:
        return list(parameter.options[value])
    if not any(override.startswith(f"{name}=") for overrides in parameter.options.values() for override in overrides):
        raise InputError(f"'{word}' is none of the space's choices, {', '.join(parameter.options)}", name)
    return [word]


def searched_in(word: str) -> Parameter | None:
    """Return the parameter that an override with several values is; None for one with a single value.

    >>> searched_in("seed=1"), searched_in("optimizer.lr=1e-4,2e-4").values
    (None, ['0.0001', '0.0002'])
    >>> searched_in("optimizer.lr=tag(log,interval(1e-5,1e-3))").log
    True

    Raises:
        InputError: for an override that is not valid.
    """
    from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, RangeSweep
    from hydra.errors import HydraException

    try:
        parsed = parsed_override(word)
    except HydraException as error:
        raise explain(error) from error
    if not parsed.is_sweep_override():
        return None
    key, sweep = parsed.get_key_element(), parsed.value()
    if isinstance(sweep, IntervalSweep):
        whole = all(isinstance(bound, int) for bound in (sweep.start, sweep.end))  # int(interval(1,4))
        return range_of(key, {"low": sweep.start, "high": sweep.end, "log": "log" in sweep.tags, "int": whole})
    if not isinstance(sweep, ChoiceSweep | RangeSweep):
        raise InputError(f"'{shown(word)}': give choices, {key}=a,b, or a range, {key}=interval(1e-5,1e-3)", key)
    labels = [str(value) for value in parsed.sweep_string_iterator()]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise InputError(f"'{shown(word)}' lists '{twice[0]}' twice", key)
    return Choices({label: (f"{key}={label}",) for label in labels})
