"""Charts as inline SVG; colours are variables of the page's style sheet, so that they follow light and dark themes."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 320
"""Size of a chart in pixels; one with more labels than that takes is higher, one with longer labels is wider."""

LEFT, RIGHT, TOP, BOTTOM = 56, 130, 16, 44
"""Margins in pixels; labels of points and lines stand in the right one."""

LINE, LETTER = 13.0, 6.5
"""Distance in pixels between the labels of a chart, and the width of a letter of them: an upper mean of common fonts."""

COLOURS = 8
"""Number of colours of the style sheet; further series repeat them, and are told apart by their labels."""


@dataclass(frozen=True)
class Point:
    """Point of a chart.

    Attributes:
        x: horizontal value.
        y: vertical value.
        label: text beside it and in its tooltip.
        colour: number of its colour.
        spread: half the length of its vertical bar; None draws none.
    """

    x: float
    y: float
    label: str
    colour: int = 0
    spread: float | None = None


@dataclass(frozen=True)
class Scale:
    """Linear scale of values to pixels."""

    low: float
    high: float
    start: float
    end: float
    whole: bool = False
    """True if ticks are whole numbers, such as epochs."""

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        return self.start + (value - self.low) / ((self.high - self.low) or 1.0) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return about five round values of the range."""
        rough = (self.high - self.low) / 5 or 1.0
        rough = max(rough, 1.0) if self.whole else rough
        power = 10 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def padded(values: Sequence[float], share: float = 0.08) -> tuple[float, float]:
    """Return the range of values, a little widened."""
    low, high = min(values), max(values)
    extra = (high - low) * share or abs(high) * share or 1.0
    return low - extra, high + extra


def height_of(labels: int) -> float:
    """Return the height in pixels of a chart with a number of labels, one below the other."""
    return max(HEIGHT, TOP + BOTTOM + LINE * labels)


def margin_of(labels: Iterable[str]) -> float:
    """Return the width in pixels of the margin that labels stand in."""
    return max(RIGHT, 12 + LETTER * max(map(len, labels), default=0))


def frame(x: Scale, y: Scale, across: str, up: str, body: Sequence[str], name: str, margin: float) -> str:
    """Return a chart: axes with ticks and titles around a body, and a right margin."""
    bottom, wide = y.start, x.end + margin
    whole = bottom + BOTTOM
    parts = [f'<svg viewBox="0 0 {wide:g} {whole:g}" role="img" aria-label="{escape(name)}">']
    for value in y.ticks():
        at = y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in x.ticks():
        at = x(value)
        parts.append(f'<text class="tick" x="{at:.1f}" y="{bottom + 16:g}" text-anchor="middle">{value:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{whole - 8:g}" text-anchor="middle">{escape(across)}</text>')
    turned = f'transform="translate(14 {(TOP + bottom) / 2:g}) rotate(-90)"'
    parts.append(f'<text class="axis" {turned} text-anchor="middle">{escape(up)}</text>')
    return "".join([*parts, *body, "</svg>"])


def apart(heights: Sequence[float], end: float = math.inf) -> list[float]:
    """Return heights of labels moved so that none covers another, in the order given.

    Args:
        heights: heights of what the labels are of, in pixels from the top.
        end: the lowest label's lowest height, if there is room for all above it.

    >>> apart([10.0, 12.0, 50.0])
    [10.0, 23.0, 50.0]
    >>> apart([40.0, 48.0, 50.0], end=50.0)
    [24.0, 37.0, 50.0]
    """
    moved, last, order = [0.0] * len(heights), -math.inf, sorted(range(len(heights)), key=heights.__getitem__)
    for index in order:
        last = moved[index] = max(heights[index], last + LINE)
    for index in reversed(order):
        end = moved[index] = min(moved[index], end)
        end -= LINE
    return moved


def pareto(points: Sequence[Point]) -> list[Point]:
    """Return the points of which none has a smaller or equal x and a larger or equal y, and differs; by increasing x.

    >>> [p.label for p in pareto([Point(1, 1, "a"), Point(2, 3, "b"), Point(3, 2, "c")])]
    ['a', 'b']
    """
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, -point.y)):
        if not front or point.y > front[-1].y:
            front.append(point)
    return front


def scatter(points: Sequence[Point], across: str, up: str, name: str) -> str:
    """Return a scatter plot with the Pareto front of small x and large y."""
    xs = [point.x for point in points]
    ends = [end for point in points for end in (point.y - (point.spread or 0), point.y + (point.spread or 0))]
    low, high = min(xs) * 0.9, max(xs) * 1.1
    bottom = height_of(len(points)) - BOTTOM
    x, y = Scale(low, high, LEFT, WIDTH - RIGHT), Scale(*padded(ends), bottom, TOP)
    front = [f"{x(point.x):.1f},{y(point.y):.1f}" for point in pareto(points)]
    body = [f'<polyline class="front" points="{" ".join(front)}"/>'] if len(front) > 1 else []
    heights = apart([y(point.y) for point in points], bottom)
    for point, height in zip(points, heights, strict=True):
        across_at, up_at, colour = x(point.x), y(point.y), point.colour % COLOURS
        tooltip = f"<title>{escape(point.label)}: {point.y:.2f} at {point.x:.2f}</title>"
        if point.spread:
            top, bottom = y(point.y + point.spread), y(point.y - point.spread)
            body.append(f'<line class="s{colour}" x1="{across_at:.1f}" x2="{across_at:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>')
        body.append(f'<circle class="s{colour}" cx="{across_at:.1f}" cy="{up_at:.1f}" r="5">{tooltip}</circle>')
        edge = WIDTH - RIGHT + 8
        body.append(f'<line class="lead" x1="{across_at + 6:.1f}" x2="{edge - 2}" y1="{up_at:.1f}" y2="{height:.1f}"/>')
        body.append(f'<text class="label" x="{edge}" y="{height + 4:.1f}">{escape(point.label)}</text>')
    return frame(x, y, across, up, body, name, margin_of(point.label for point in points))


CAPTION = 24
"""Height in pixels of the caption of a chart in a picture of several."""


def stacked(charts: Sequence[tuple[str, str]], style: str) -> str:
    """Return charts with captions, one below the other, as the text of an SVG file.

    Args:
        charts: captions and charts, as `scatter` and `lines` return them.
        style: style sheet; its colours of a page hold for the picture, whose ground is transparent.
    """
    parts, top, widest = [], 0.0, 0.0
    for caption, chart in charts:
        found = re.match(r'<svg viewBox="0 0 (\S+) (\S+)"', chart)
        assert found is not None
        wide, high = float(found[1]), float(found[2])
        parts.append(f'<text class="caption" x="{LEFT}" y="{top + 16:g}">{escape(caption)}</text>')
        parts.append(chart.replace("<svg", f'<svg y="{top + CAPTION:g}" width="{wide:g}" height="{high:g}"', 1))
        top, widest = top + CAPTION + high, max(widest, wide)
    size = f'viewBox="0 0 {widest:g} {top:g}" width="{widest:g}" height="{top:g}"'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    return "\n".join([opening, f"<style>\n{style}</style>", *parts, "</svg>"]) + "\n"


def lines(series: Mapping[str, Sequence[tuple[float, float]]], across: str, up: str, name: str) -> str:
    """Return a line chart of series by name, each a sequence of x and y."""
    every = [point for points in series.values() for point in points]
    xs = [point[0] for point in every]
    x = Scale(min(xs), max(xs), LEFT, WIDTH - RIGHT, whole=all(value == round(value) for value in xs))
    bottom = height_of(len(series)) - BOTTOM
    y = Scale(*padded([p[1] for p in every]), bottom, TOP)
    heights = apart([y(points[-1][1]) for points in series.values()], bottom)
    body = []
    for number, ((label, points), height) in enumerate(zip(series.items(), heights, strict=True)):
        colour = number % COLOURS
        path = " ".join(f"{x(across_at):.1f},{y(up_at):.1f}" for across_at, up_at in points)
        body.append(f'<polyline class="line s{colour}" points="{path}"><title>{escape(label)}</title></polyline>')
        for across_at, up_at in points:
            tooltip = f"<title>{escape(label)}: {up_at:.2f} at {across_at:g}</title>"
            body.append(f'<circle class="s{colour}" cx="{x(across_at):.1f}" cy="{y(up_at):.1f}" r="3">{tooltip}</circle>')
        body.append(f'<text class="label s{colour}" x="{WIDTH - RIGHT + 8}" y="{height + 4:.1f}">{escape(label)}</text>')
    return frame(x, y, across, up, body, name, margin_of(series))


def bars(values: Mapping[str, float], unit: str, name: str) -> str:
    """Return horizontal bars of values by name."""
    step, left = 24, 190
    height = step * len(values) + 8
    scale = Scale(0.0, max(values.values()) or 1.0, left, WIDTH - 80)
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(name)}">']
    for number, (label, value) in enumerate(values.items()):
        top = step * number + 4
        text = f"{value:,.0f} {unit}" if value >= 10 else f"{value:.2f} {unit}"
        parts.append(f'<text class="label" x="{left - 8}" y="{top + 14}" text-anchor="end">{escape(label)}</text>')
        parts.append(f'<rect class="s0" x="{left}" y="{top}" width="{max(1.0, scale(value) - left):.1f}" height="16" rx="2"/>')
        parts.append(f'<text class="tick" x="{scale(value) + 6:.1f}" y="{top + 13}">{text}</text>')
    return "".join([*parts, "</svg>"])


Values = Sequence[Sequence[float | None]]
"""Values of a heat map by row and column; None where there is none."""


def heat_map(
    matrix: Values,
    across: str,
    up: str,
    name: str,
    rows: Sequence[int],
    columns: Sequence[int],
    *,
    most: float | None = None,
    numbers: str = "",
) -> str:
    """Return a heat map, rows from top to bottom, with the scale of its colours: from 0 on, and if a value is negative below.

    Args:
        matrix: the values.
        across: title of the horizontal axis.
        up: title of the vertical axis.
        name: name of the chart.
        rows: numbers of the rows.
        columns: numbers of the columns.
        most: value of the strongest colour, for maps that are compared; None for the largest absolute value.
        numbers: format of a value, as `.2f`, that is written in each cell; empty writes none.
    """
    left, top = 58, 10
    side = 30.0 if numbers else max(14.0, min(28.0, 300.0 / len(columns)))
    defined = [value for values in matrix for value in values if value is not None]
    most = most or max((abs(value) for value in defined), default=0.0) or 1.0
    signed = min(defined, default=0.0) < 0
    across_end, up_end = left + side * len(columns), top + side * len(rows)
    # The turned title of the vertical axis is about 70 pixels long, whatever the number of rows.
    width, height = max(across_end + 8, 270 if signed else 190), max(up_end, top + 60) + 64
    parts = [
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:{width:.0f}px" role="img" aria-label="{escape(name)}">',
        f'<rect class="cells" x="{left}" y="{top}" width="{side * len(columns):.1f}" height="{side * len(rows):.1f}"/>',
        '<g class="cell">',
    ]
    texts = []
    for row, (layer, values) in enumerate(zip(rows, matrix, strict=True)):
        for column, (other, value) in enumerate(zip(columns, values, strict=True)):
            strength = 0.0 if value is None else min(abs(value) / most, 1.0)
            if value:
                tooltip = f"<title>{escape(up)} {layer}, {escape(across)} {other}: {value:.3g}</title>"
                at = f'x="{left + side * column:.1f}" y="{top + side * row:.1f}"'
                size = f'width="{side:.1f}" height="{side:.1f}"'
                kind = ' class="less"' if value < 0 else ""
                parts.append(f'<rect {at} {size}{kind} fill-opacity="{strength:.3f}">{tooltip}</rect>')
            if numbers:
                text = "-" if value is None else short(value, numbers)
                at = f'x="{left + side * (column + 0.5):.1f}" y="{top + side * (row + 0.5) + 3.5:.1f}"'
                kind = "value on" if strength > 0.6 else "value"  # written in the colour of the ground
                texts.append(f'<text class="{kind}" {at} text-anchor="middle">{text}</text>')
    parts += ["</g>", *texts]
    for row, layer in enumerate(rows):
        down = top + side * (row + 0.5) + 4
        parts.append(f'<text class="tick" x="{left - 6}" y="{down:.1f}" text-anchor="end">{layer}</text>')
    every = 1 if side >= 18 else 2  # two digits and a gap
    for column, layer in list(enumerate(columns))[::every]:
        right = left + side * (column + 0.5)
        parts.append(f'<text class="tick" x="{right:.1f}" y="{up_end + 14:.1f}" text-anchor="middle">{layer}</text>')
    middle, centre = max((left + across_end) / 2, left + 36), max((top + up_end) / 2, top + 30)
    parts.append(f'<text class="axis" x="{middle:.1f}" y="{up_end + 30:.1f}" text-anchor="middle">{escape(across)}</text>')
    turned = f'transform="translate(14 {centre:.1f}) rotate(-90)"'
    parts.append(f'<text class="axis" {turned} text-anchor="middle">{escape(up)}</text>')
    return "".join([*parts, *colour_scale(left, height - 18, most, signed=signed), "</svg>"])


def short(value: float, kind: str) -> str:
    """Return a number in a format, without the zero before its point.

    >>> short(0.25, ".2f"), short(-0.25, ".1f"), short(-0.001, ".2f"), short(1.0, ".2f")
    ('.25', '-.2', '0', '1.00')
    """
    text = format(value, kind)
    if not float(text):
        return "0"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def colour_scale(left: float, top: float, most: float, *, signed: bool = False) -> list[str]:
    """Return a bar of the colours of a heat map, from 0, or from below it, to its largest value, with the numbers."""
    steps, step = 20, 4
    shades = [*range(steps, 0, -1)] * signed, range(1, steps + 1)
    end = left + (len(shades[0]) + steps) * step
    parts = [
        f'<text class="tick" x="{left - 6}" y="{top + 10:.1f}" text-anchor="end">{f"{-most:.3g}" if signed else 0}</text>',
        f'<rect class="cells" x="{left}" y="{top:.1f}" width="{end - left}" height="12"/><g class="cell">',
    ]
    for index, (shade, kind) in enumerate([(s, "step less") for s in shades[0]] + [(s, "step") for s in shades[1]]):
        parts.append(
            f'<rect class="{kind}" x="{left + step * index}" y="{top:.1f}" width="{step}" height="12" '
            f'fill-opacity="{(shade - 0.5) / steps:.3f}"/>'
        )
    return [*parts, f'</g><text class="tick" x="{end + 6}" y="{top + 10:.1f}">{most:.3g}</text>']
