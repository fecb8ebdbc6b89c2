"""Search spaces: their files, what a command adds to them, and what is refused."""

import itertools
from typing import Any

import pytest

from kd.config.compose import compose, conf_folder, typed
from kd.config.schema import check_values
from kd.errors import InputError
from kd.tune.space import Range, Space, load_space, parse_space, space_names, with_command


def points(space: Space) -> set[tuple[str, ...]]:
    return {space.overrides(point) for point in space.points()}


def test_the_published_grid_of_pkd_is_the_product_of_its_authors() -> None:
    space = load_space("pkd")
    expected = {
        (
            f"method.temperature={temperature}",
            f"method.weights.task={round(1 - alpha, 1)}",
            f"method.weights.logits={alpha}",
            f"method.weights.hidden={beta}",
            f"method.normalize={normalize}",
            f"optimizer.lr={lr}",
        )
        for temperature, alpha, beta, normalize, lr in itertools.product(
            (5, 10, 20), (0.2, 0.5, 0.7), (10, 100, 500, 1000), ("true", "false"), ("5e-5", "2e-5", "1e-5")
        )
    }
    assert points(space) == expected
    assert (space.fixed, space.size) == (("method=pkd",), 216)


@pytest.mark.parametrize("name", space_names())
def test_every_value_of_the_spaces_of_the_package_is_valid_and_its_source_is_named(name: str) -> None:
    space = load_space(name)
    for parameter in space.parameters.values():
        for value in parameter.bounds:
            check_values(typed(compose([*space.fixed, *parameter.overrides(value)])))
    assert space.fixed[0] == f"method={name}"
    assert "arXiv:" in (conf_folder() / "tune" / f"{name}.yaml").read_text()


@pytest.mark.parametrize(
    ("content", "key", "message"),
    [
        ([1], "space", "a mapping"),
        ({"a": []}, "a", "no choices"),
        ({"a": 3}, "a", "a list"),
        ({"a": [1, 1.0, "1"]}, "a", "lists '1' twice"),
        ({"a": [{"x": ["b=1"], "y": ["b=2"]}]}, "a", "one list of overrides at a time"),
        ({"a": {"low": 2, "high": 1}}, "a.low", "more than"),
        ({"a": {"low": 1}}, "a", "no 'high'"),
        ({"a": {"low": "x", "high": 1}}, "a.low", "not a number"),
        ({"a": {"low": True, "high": 1}}, "a.low", "not a number"),
        ({"a": {"low": 0, "high": float("inf")}}, "a.high", "not a number"),
        ({"a": {"low": 0, "high": 1, "log": True}}, "a.low", "positive"),
        ({"a": {"low": 1, "high": 2, "log": "yes"}}, "a.log", "true nor false"),
        ({"a": {"low": 1, "high": 2, "step": 0}}, "a.step", "positive"),
        ({"a": {"low": 1, "high": 2, "step": 1, "log": True}}, "a.step", "log"),
        ({"a": {"low": 1.5, "high": 2, "int": True}}, "a.low", "whole"),
        ({"a": {"low": 1, "high": 2, "stride": 1}}, "a.stride", "may have low"),
    ],
)
def test_a_space_that_is_not_valid_is_refused_with_its_key(content: Any, key: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        parse_space("mine", content)
    assert refused.value.key == key


def test_an_unknown_space_is_refused_with_the_one_that_was_meant() -> None:
    with pytest.raises(InputError, match="did you mean 'pkd'"):
        load_space("pkdd")
    with pytest.raises(InputError, match="No such file"):
        load_space("nowhere/mine.yaml")


def test_values_of_ranges_are_those_of_their_steps() -> None:
    space = parse_space("mine", {"a": {"low": 0, "high": 0.3, "step": "1e-1"}, "b": {"low": 2, "high": 5, "int": True}})
    assert [parameter.values for parameter in space.parameters.values()] == [[0.0, 0.1, 0.2, 0.3], [2, 3, 4, 5]]
    assert space.size == 16
    assert ("a=0.3", "b=5") in points(space)


def test_numbers_of_a_range_without_steps_have_few_digits_and_stay_in_it() -> None:
    free = Range("a", 1.23456e-5, 1e-3, log=True)
    assert free.values is None
    assert free.overrides(0.000345678) == ("a=0.000346",)
    assert free.overrides(1.23456e-5) == ("a=1.23456e-05",)
    assert parse_space("mine", {"a": {"low": 1, "high": 9, "int": True, "log": True}}).size is None


def test_a_command_searches_keys_of_its_own_and_fixes_those_of_the_space() -> None:
    words = ["alpha=0.7", "method.temperature=7", "optimizer.lr=1e-4,2e-4", "student=3l", "method.weights.hidden=10"]
    space, command = with_command(load_space("pkd"), [*words, "trainer.max_epochs=int(interval(1,4))"])
    assert list(space.parameters) == ["method.normalize", "optimizer.lr", "trainer.max_epochs"]
    fixed = (
        "method.weights.task=0.3",
        "method.weights.logits=0.7",
        "method.temperature=7",
        "student=3l",
        "method.weights.hidden=10",
    )
    assert command == fixed
    assert space.parameters["trainer.max_epochs"].values == [1, 2, 3, 4]
    assert space.size == 2 * 2 * 4


def test_a_range_in_a_command_is_hydras() -> None:
    space, command = with_command(Space(), ["optimizer.lr=tag(log,interval(1e-5,1e-3))", "seed=1"])
    assert space.parameters == {"optimizer.lr": Range("optimizer.lr", 1e-5, 1e-3, log=True)}
    assert command == ("seed=1",)


def test_the_word_of_a_space_is_replaced_by_that_of_a_command() -> None:
    space, command = with_command(load_space("kd"), ["method=pkd"])
    assert (space.fixed, command) == (("method.reduction=elementmean",), ("method=pkd",))


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("method.weights.task=0.1", "alpha"),  # the parameter's own word would silently win
        ("alpha=0.3", "alpha"),
        ("optimizer.lr=glob(*)", "optimizer.lr"),
        ("optimizer.lr=interval(1e-3,1e-5)", "optimizer.lr.low"),
        ("optimizer.lr=1e-4,1e-4", "optimizer.lr"),
        ("optimizer.lr=[1", "optimizer.lr"),
    ],
)
def test_a_word_that_does_not_fit_the_space_is_refused(word: str, key: str) -> None:
    with pytest.raises(InputError) as refused:
        with_command(load_space("pkd"), [word])
    assert refused.value.key == key
