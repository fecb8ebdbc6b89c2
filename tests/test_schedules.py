"""Schedules: values at chosen fractions, and what cannot be a schedule."""

import math

import pytest

from kd import schedules
from kd.build.instantiate import build_schedule
from kd.errors import InputError
from kd.schedules import Constant, Cosine, Linear, Piecewise, RampUp, ScheduleNode, Staircase, as_schedule


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Constant(3.0), {0.0: 3, 0.4: 3, 1.0: 3}),
        (Linear(1.0, 0.0), {0.0: 1, 0.25: 0.75, 1.0: 0}),
        (Linear(2.0, 6.0, begin=0.2, until=0.6), {0.0: 2, 0.2: 2, 0.3: 3, 0.4: 4, 0.6: 6, 1.0: 6}),
        (Cosine(1.0, 0.0), {0.0: 1, 0.25: 0.8535533906, 0.5: 0.5, 1.0: 0}),
        (Cosine(2.0, 10.0), {0.0: 2, 1 / 3: 4, 0.5: 6, 1.0: 10}),
        (RampUp(1.0, until=0.8), {0.0: 0.006737947, 0.4: 0.2865047969, 0.8: 1, 1.0: 1}),
        (RampUp(3.0), {0.0: 3 * 0.006737947, 0.5: 3 * 0.2865047969, 1.0: 3}),
        (Piecewise([0.3, 0.6], [5.0, 7.0, 9.0]), {0.0: 5, 0.29: 5, 0.3: 7, 0.59: 7, 0.6: 9, 1.0: 9}),
        (Piecewise([], [5.0]), {0.0: 5, 1.0: 5}),
    ],
    ids=str,
)
def test_schedule_has_these_values(schedule, values: dict[float, float]) -> None:
    assert {fraction: schedule(fraction) for fraction in values} == pytest.approx(values)


@pytest.mark.parametrize("schedule", [Linear(1.0, 4.0), Cosine(1.0, 4.0)], ids=str)
def test_schedules_stay_flat_outside_of_training(schedule) -> None:
    assert schedule(-0.5) == pytest.approx(1)
    assert schedule(1.5) == pytest.approx(4)


@pytest.mark.parametrize(("begin", "until"), [(0.5, 0.5), (0.6, 0.4), (-0.1, 1.0), (0.0, 1.1)])
def test_linear_refuses_an_interval_that_is_none(begin: float, until: float) -> None:
    with pytest.raises(ValueError, match=f"got begin={begin} until={until}"):
        Linear(1.0, 0.0, begin=begin, until=until)


@pytest.mark.parametrize("until", [0.0, -0.1, 1.1])
def test_a_ramp_refuses_an_end_outside_of_training(until: float) -> None:
    with pytest.raises(ValueError, match=f"got until={until}"):
        RampUp(1.0, until)


@pytest.mark.parametrize(
    ("boundaries", "values"), [([0.5], [1.0]), ([0.5], [1.0, 2.0, 3.0]), ([0.6, 0.3], [1.0, 2.0, 3.0])], ids=str
)
def test_piecewise_refuses_what_does_not_fit(boundaries: list[float], values: list[float]) -> None:
    with pytest.raises(ValueError, match="ascending boundaries and one value more"):
        Piecewise(boundaries, values)


@pytest.mark.parametrize("value", [2, 2.0])
def test_a_number_is_a_constant_schedule(value: object) -> None:
    assert as_schedule(value) == Constant(2.0)


def test_a_schedule_stays_what_it_is() -> None:
    schedule = Linear(1.0, 0.0)
    assert as_schedule(schedule) is schedule


@pytest.mark.parametrize("value", ["warm", None, [1.0]])
def test_what_is_neither_is_refused(value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        as_schedule(value)


def test_a_staircase_has_as_many_values_as_steps_and_ends_at_its_end() -> None:
    falling = Staircase(start=4.0, end=1.0, steps=10)
    assert [falling(n / 10) for n in range(10)] == pytest.approx([4 - n / 3 for n in range(10)])
    assert falling(1.0) == 1.0
    for steps in range(1, 30):
        stairs = Staircase(start=1 / steps, end=1.0, steps=steps)
        for length in (steps, 7 * steps, 13 * steps):
            found = [stairs(step / length) for step in range(length)]
            assert found == pytest.approx([(1 + step * steps // length) / steps for step in range(length)])


@pytest.mark.parametrize("steps", [0, -1, 2.5, True])
def test_a_staircase_has_a_whole_number_of_steps(steps: float) -> None:
    with pytest.raises(ValueError, match="whole number"):
        Staircase(1.0, 0.0, steps)  # type: ignore[arg-type]


class Decay(ScheduleNode):
    """Exponential, which comes closer to zero than any bound."""

    def __init__(self, start: float) -> None:
        self.start = start

    def __call__(self, fraction: float) -> float:
        return self.start * math.exp(-60 * fraction)


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "kd.schedules.Decay", "start": 1.0},
        {"_target_": "kd.schedules.Linear", "start": 1.0, "end": 1e-20},
        {"_target_": "kd.schedules.Piecewise", "boundaries": [0.5], "values": [1e-13, 0.5]},
    ],
    ids=lambda node: node["_target_"],
)
def test_a_weight_may_come_as_close_to_zero_as_it_likes(node: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "Decay", Decay, raising=False)
    schedule = build_schedule(node, "method.weights.task")
    assert 0 <= min(schedule(step / 1000) for step in range(1001)) < 1e-12


@pytest.mark.parametrize(
    "node",
    [
        1e-13,
        {"_target_": "kd.schedules.Decay", "start": 1e-13},
        {"_target_": "kd.schedules.Linear", "start": 1.0, "end": -1e-20},
        {"_target_": "kd.schedules.Linear", "start": 1.0, "end": 1e10},
    ],
    ids=str,
)
def test_a_weight_that_moves_nothing_is_negative_or_too_large_is_refused(node: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "Decay", Decay, raising=False)
    with pytest.raises(InputError) as caught:
        build_schedule(node, "method.weights.task")
    assert caught.value.key == "method.weights.task"
