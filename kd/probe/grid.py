"""Heat maps of what is lost by number of layers and of attention heads, over students of several sizes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from kd.probe.charts import figure, largest
from kd.probe.result import Shape
from kd.probe.summary import Summary
from kd.probe.words import percent
from kd.results.page import svg

MODELS = ("student", "control")


@dataclass(frozen=True)
class Grid:
    """Students of one method, task, teacher and start that differ in their numbers of layers and heads.

    Attributes:
        task: name of the task.
        method: name of the method.
        teacher: name of the teacher.
        metric: metric of what is lost.
        init: initial weights, as records have them, without the numbers of the layers.
        fixed: `width` or `head size`, which all of them share.
        size: that width or head size.
        cells: layers and heads -> students of this size; one but for runs that differ in more than their size.
    """

    task: str
    method: str
    teacher: str
    metric: str
    init: str
    fixed: str
    size: int
    cells: Mapping[tuple[int, int], Sequence[Summary]]

    @property
    def layers(self) -> list[int]:
        """Numbers of layers, in ascending order."""
        return sorted({layers for layers, _ in self.cells})

    @property
    def heads(self) -> list[int]:
        """Numbers of heads, in ascending order."""
        return sorted({heads for _, heads in self.cells})

    @property
    def ambiguous(self) -> list[tuple[int, int]]:
        """Layers and heads that several students have."""
        return sorted(size for size, students in self.cells.items() if len(students) > 1)

    def lost(self, model: str) -> list[list[float | None]]:
        """Return the teacher's score less that of `student` or `control`, mean over seeds, by layers (rows) and heads."""
        return [[self.cell(layers, heads, model) for heads in self.heads] for layers in self.layers]

    def cell(self, layers: int, heads: int, model: str) -> float | None:
        """Return what is lost by a size; None where there is none."""
        (summary,) = self.cells.get((layers, heads)) or (None,)
        figures = {} if summary is None else summary.figures.get(f"delta.{self.metric}", {})
        return figures[model].mean if model in figures else None


def start(init: str) -> str:
    """Return the description of initial weights without the numbers of the layers, which follow from the depth.

    >>> start("first layers [1, 2] of the pre-trained backbone")
    'first layers of the pre-trained backbone'
    """
    before, bracket, rest = init.partition(" [")
    return before + rest.partition("]")[2] if bracket else init


def grids(summaries: Sequence[Summary]) -> list[Grid]:
    """Return the grids of students that differ in layers and in heads, at a fixed width and at a fixed head size.

    Students whose size is not known are in none, and those that differ in layers alone in one of a fixed width.
    """
    found: dict[tuple[str, str, str, str, str, str, int], dict[tuple[int, int], list[Summary]]] = {}
    for summary in summaries:
        about, shape = summary.cases[0].about, summary.cases[0].about.shape
        if shape is None or not summary.figures:
            continue
        for fixed, size in fixed_sizes(shape):
            key = (about.task, about.method, about.teacher, about.metrics[0], start(about.init), fixed, size)
            found.setdefault(key, {}).setdefault((shape.layers, shape.heads), []).append(summary)
    every = [Grid(*key, cells) for key, cells in found.items()]
    return [grid for grid in every if len(grid.heads) > 1 or (grid.fixed == "width" and len(grid.layers) > 1)]


def fixed_sizes(shape: Shape) -> Iterator[tuple[str, int]]:
    """Yield the sizes that students of several numbers of heads can share."""
    yield "width", shape.width
    yield "head size", shape.width // shape.heads


def by_size(summaries: Sequence[Summary]) -> str:
    """Return the section with the heat maps of all grids; empty without any."""
    charts, several = [], []
    every = grids(summaries)
    scale = {grid.metric: 100.0 if percent(f"delta.{grid.metric}") else 1.0 for grid in every}
    clear = [grid for grid in every if not grid.ambiguous]
    most = {
        metric: factor * largest(grid.lost(model) for grid in clear if grid.metric == metric for model in MODELS)
        for metric, factor in scale.items()
    }
    for grid in every:
        name = f"{grid.task}: {grid.method} from {grid.teacher}, {grid.init}, {grid.fixed} {grid.size}"
        if grid.ambiguous:
            sizes = ", ".join(f"{layers} layers and {heads} heads" for layers, heads in grid.ambiguous)
            several.append(f"{name}: several students of {sizes}, which differ in more than their size; name the runs of one.")
            continue
        for model in MODELS:
            values = [[None if v is None else scale[grid.metric] * v for v in row] for row in grid.lost(model)]
            if any(value is not None for row in values for value in row):
                caption = f"{name}: lost by the {model}, {grid.metric}"
                chart = svg.heat_map(
                    values,
                    "heads",
                    "layers",
                    f"what the {model} lost by layers and heads",
                    grid.layers,
                    grid.heads,
                    most=most[grid.metric],
                    numbers=".1f" if scale[grid.metric] == 100.0 else ".2f",
                )
                charts.append(figure(caption, chart))
    if not every:
        return ""
    note = (
        "The teacher's score less the model's, mean over seeds, as in the table; below 0 the model is better than its teacher. "
        "At a fixed width the number of heads changes no number of parameters, at a fixed head size it changes the width. "
        "A difference between cells is one of distillation only as far as the control's cells do not have it."
    )
    left = f'<ul class="quiet">{"".join(f"<li>{escape(words)}</li>" for words in several)}</ul>' if several else ""
    return f'<h2>By layers and heads</h2><p class="quiet">{escape(note)}</p><div class="maps">{"".join(charts)}</div>{left}'
