"""The page of an analysis, from figures that are given: maps by layers and heads, notes, and numbers of seeds."""

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest

from kd.probe.differences import Compared, Differences
from kd.probe.grid import by_size, grids
from kd.probe.page import page
from kd.probe.result import About, Case, Settings, Shape
from kd.probe.summary import Summary, summaries_of
from kd.results.statistics import Estimate

FIRST = "first layers {} of the pre-trained backbone"

ABOUT = About(
    task="a",
    split="validation",
    metrics=("accuracy",),
    method="kd",
    student="s",
    settings="",
    teacher="t",
    seed=0,
    run="run",
    digest="0",
    family="",
    selection="best",
    init="random",
    shape=None,
    majority={"accuracy": 0.52},
    max_length=8,
    control=None,
    control_init="",
    without_control="why",
    logits={},
)


def case(
    delta: float | None, shape: Shape | None, control: float | None = None, seed: int = 0, init: str = "random", **more: object
) -> Case:
    """A case in which the student has lost so much, and its control; more are values of `About`."""
    values = {"score.accuracy": 0.8, "delta.accuracy": delta, "retention.accuracy": 1.0}
    figures = {
        name: Compared(
            Estimate(value, value, value, 9), None if control is None else Estimate(control, control, control, 9), None
        )
        for name, value in values.items()
    }
    size = "" if shape is None else f"{shape.layers} {shape.heads} {shape.width}"
    own = {"seed": seed, "init": init, "shape": shape, "settings": size, "family": size + init, **more}
    return Case(replace(ABOUT, **own), Differences(9, figures, {}))


def maps_of(summaries: Sequence[Summary]) -> dict[str, list[str]]:
    """The captions of the maps, and the texts of their cells."""
    figures = re.findall(r"<figcaption>(.*?)</figcaption>(.*?)</svg>", by_size(summaries))
    return {caption: re.findall(r'<text class="value.*?>(.*?)<', chart) for caption, chart in figures}


def test_what_is_lost_is_mapped_by_layers_and_heads_at_a_fixed_width_and_at_a_fixed_head_size() -> None:
    sizes = {(1, 2, 64): 0.10, (1, 4, 64): 0.08, (3, 2, 64): -0.05, (1, 4, 128): 0.02, (3, 4, 128): 0.01}
    summaries = summaries_of([case(delta, Shape(*size), control=2 * delta) for size, delta in sizes.items()])
    by_name = {(grid.fixed, grid.size): grid for grid in grids(summaries)}
    assert set(by_name) == {("width", 64), ("width", 128), ("head size", 32)}
    wide = by_name["width", 64]
    assert (wide.layers, wide.heads) == ([1, 3], [2, 4])
    assert wide.lost("student") == [[0.10, 0.08], [-0.05, None]]
    assert wide.lost("control") == [[0.20, 0.16], [-0.10, None]]
    sized = by_name["head size", 32]
    assert (sized.layers, sized.heads, sized.lost("student")) == ([1, 3], [2, 4], [[0.10, 0.02], [-0.05, 0.01]])
    maps = maps_of(summaries)
    assert maps["a: kd from t, random, width 64: lost by the student, accuracy"] == ["10.0", "8.0", "-5.0", "-"]
    assert maps["a: kd from t, random, width 64: lost by the control, accuracy"] == ["20.0", "16.0", "-10.0", "-"]
    assert maps["a: kd from t, random, head size 32: lost by the student, accuracy"] == ["10.0", "2.0", "-5.0", "1.0"]
    assert len(maps) == 6


def test_a_cell_is_the_mean_over_seeds() -> None:
    cases = [case(delta, Shape(layers, 2, 64), seed=seed) for layers, seed, delta in ((1, 0, 0.1), (1, 1, 0.3), (2, 0, 0.5))]
    (grid,) = grids(summaries_of(cases))
    assert (grid.fixed, grid.lost("student")) == ("width", [[pytest.approx(0.2)], [0.5]])
    assert grid.lost("control") == [[None], [None]]
    assert list(maps_of(summaries_of(cases))) == ["a: kd from t, random, width 64: lost by the student, accuracy"]


def test_students_that_start_elsewhere_or_have_another_teacher_are_in_maps_of_their_own() -> None:
    first = [case(0.1, Shape(n, 2, 64), init=FIRST.format(list(range(1, n + 1)))) for n in (1, 2)]
    second = [case(0.2, Shape(n, 2, 64)) for n in (1, 2)]
    third = [case(0.3, Shape(n, 2, 64), teacher="u") for n in (1, 2)]
    found = grids(summaries_of([*first, *second, *third]))
    assert [(grid.init, grid.teacher, grid.lost("student")) for grid in found] == [
        ("first layers of the pre-trained backbone", "t", [[0.1], [0.1]]),
        ("random", "t", [[0.2], [0.2]]),
        ("random", "u", [[0.3], [0.3]]),
    ]


def test_students_of_one_size_that_differ_otherwise_are_not_mapped_and_named() -> None:
    cases = [case(0.1, Shape(1, 2, 64)), case(0.2, Shape(1, 2, 64), family="other"), case(0.3, Shape(2, 2, 64))]
    text = by_size(summaries_of(cases))
    assert "<svg" not in text
    assert "several students of 1 layers and 2 heads" in text


def test_one_size_or_an_unknown_one_has_no_map() -> None:
    assert by_size(summaries_of([case(0.1, Shape(1, 2, 64)), case(0.2, Shape(1, 2, 64), seed=1)])) == ""
    assert by_size(summaries_of([case(0.1, None), case(0.2, None, student="other")])) == ""


def test_the_page_names_what_predicts_one_class_and_escapes_its_words() -> None:
    (summary,) = summaries_of([case(0.1, None, teacher="<b>")])
    one = summary.cases[0]
    collapsed = Case(one.about, Differences(9, one.differences.figures, {}, one_class={"control": "<i>"}))
    text = page([Summary([collapsed], summary.figures, summary.teacher)], Settings(), "about")
    assert "Of the control all predictions are &#x27;&lt;i&gt;&#x27;" in text
    assert "<b>" not in text
    assert "<i>" not in text
    assert "52.0</td>" in text, "the constant prediction"
