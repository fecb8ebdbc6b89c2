"""Comparisons as one HTML page that loads nothing: a table to sort and filter, charts, and the commands of every run."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

from kd.errors import InputError
from kd.results.columns import COLUMNS, gap_of, notes, p_of, used_columns
from kd.results.comparison import Comparison, Entry
from kd.results.maps import LayerMap
from kd.results.page import svg
from kd.results.published import compared_with
from kd.results.tables import in_own_units

FOLDER = Path(__file__).parent
"""Folder of the style sheets and of the script: `charts.css` has the colours too, and is all that a picture needs."""

Curves = Mapping[str, Sequence[tuple[float, float]]]
"""Digest of a run -> epoch and validation score, as in its `metrics.csv`."""

NUMBERS = (
    *("ours", "paper", "ours - paper", "against baseline", "p"),
    *("by example", "p by example", "p of McNemar", "parameters", "speed-up"),
)
"""Columns that are sorted by number."""

COLUMN = ("task", "split", "metric")
"""Attributes of entries whose tables are one below the other in Markdown, and columns here."""

TELLING = ("student", "teacher", "selection", "init")
"""Attributes of entries that tell those of one row and the same settings apart, as they do in one table of a paper."""

NAMED = 3
"""Number of rows that the caption of a map names; further rows are folded."""


def page(
    comparison: Comparison,
    curves: Curves | None = None,
    maps: Mapping[str, Sequence[LayerMap]] | None = None,
    about: str = "",
) -> str:
    """Return a comparison as an HTML page.

    Args:
        comparison: the comparison.
        curves: validation scores of the runs over the epochs.
        maps: digest of a run -> its maps from layers of students to layers of teachers.
        about: sentence about what made the page.
    """
    title = comparison.title or "Results"
    sections = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="quiet">{escape(about)}</p>' if about else "",
        "<h2>Results</h2>",
        filters(comparison),
        table(comparison),
        f'<ul class="quiet">{"".join(f"<li>{escape(note)}</li>" for note in notes(comparison))}</ul>',
        charts("Size against quality", quality_charts(comparison), "Dashed: the Pareto front. Bars: one standard deviation."),
        charts("Training curves", curve_charts(comparison, curves or {}), "Validation scores, means over seeds."),
        charts("Cost of training", cost_charts(comparison), "Median seconds of a run; comparable on one quiet machine alone."),
        charts("Agreement with the teacher", agreement_charts(comparison), "On the validation split, in percent."),
        layer_maps(comparison, maps or {}),
        commands(comparison),
    ]
    return document(title, sections, (FOLDER / "script.js").read_text(encoding="utf-8"))


def document(title: str, sections: Iterable[str], script: str = "") -> str:
    """Return an HTML page in the style of the reports, which loads nothing.

    Args:
        title: title of the page.
        sections: its sections, in HTML; empty ones are left out.
        script: JavaScript at its end; empty for none.
    """
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    style = "".join((FOLDER / name).read_text(encoding="utf-8") for name in ("charts.css", "style.css"))
    body = "\n".join([*filter(None, sections), *([f"<script>\n{script}</script>"] if script else [])])
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>\n{style}</style></head>\n<body>\n{body}</body></html>\n'


def filters(comparison: Comparison) -> str:
    """Return the controls that choose rows of the table."""
    controls = []
    for name in ("task", "split", "metric", "method", "student"):
        values = list(dict.fromkeys(filter(None, (getattr(entry, name) for entry in comparison.entries))))
        if len(values) > 1:
            options = "".join(f"<option>{escape(value)}</option>" for value in values)
            controls.append(f'<label>{name}<select name="{name}"><option value="">all</option>{options}</select></label>')
    controls.append('<label>search<input type="search" placeholder="words"></label>')
    return f'<div class="filters">{"".join(controls)}<span id="count" class="quiet" role="status"></span></div>'


def table(comparison: Comparison) -> str:
    """Return the table of all entries."""
    (row, *others) = used_columns(comparison)
    names = [row, *COLUMN, *others]
    header = "".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in names)
    rows = []
    for entry in comparison.entries:
        cells = []
        for name in names:
            text = getattr(entry, name) if name in COLUMN else COLUMNS[name](entry, comparison)
            value = sort_value(entry, name)
            kind = ' class="number"' if name in NUMBERS else ' class="missing"' if text == "missing" else ""
            if text == "missing":
                kind = ' class="number missing"'
            data = "" if value is None else f' data-value="{value!r}"'
            cells.append(f"<td{kind}{data}>{escape(text)}</td>")
        data = " ".join(
            f'data-{name}="{escape(getattr(entry, name))}"' for name in ("task", "split", "metric", "method", "student")
        )
        rows.append(f"<tr {data}>{''.join(cells)}</tr>")
    return f'<div class="wide"><table id="results"><thead><tr>{header}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def sort_value(entry: Entry, name: str) -> float | None:
    """Return the number by which a column of numbers is sorted."""
    figure = compared_with(entry.paper) or next(iter(entry.paper), None)
    values = {
        "ours": entry.mean,
        "paper": None if figure is None else figure.value,
        "ours - paper": gap_of(entry),
        "against baseline": None if entry.difference is None else entry.difference.mean,
        "p": p_of(entry.difference),
        "by example": None if entry.by_example is None else entry.by_example.difference,
        "p by example": p_of(entry.by_example),
        "p of McNemar": p_of(entry.mcnemar),
        "parameters": entry.details.get("parameters"),
        "speed-up": entry.details.get("speed_up"),
    }
    return values.get(name)


def charts(heading: str, figures: Sequence[tuple[str, str]], note: str) -> str:
    """Return a section of charts with captions; empty without any."""
    if not figures:
        return ""
    shown = "".join(f"<figure><figcaption>{escape(caption)}</figcaption>{chart}</figure>" for caption, chart in figures)
    return f'<h2>{escape(heading)}</h2><p class="quiet">{escape(note)}</p><div class="charts">{shown}</div>'


def scaled(entry: Entry, value: float) -> float:
    """Return a value in percent, or in its own unit for errors."""
    return value if in_own_units(entry.metric) else 100 * value


def label_of(entry: Entry) -> str:
    """Return the label of an entry, which others may share."""
    return entry.row + (f" {entry.settings}" if entry.settings else "")


Series = tuple[str, ...]


def series_of(entry: Entry) -> Series:
    """Return what entries of the same runs share, whatever their task, split and metric, and others do not."""
    return (*entry.key, entry.selection, entry.init, entry.budget)


def labels_of(entries: Iterable[Entry]) -> dict[Series, str]:
    """Return labels of the entries of a chart, of which no two are equal.

    Where entries share row and settings, the label has those of `TELLING` that tell them apart as well, and else a number.
    """
    firsts: dict[Series, Entry] = {}
    for entry in entries:
        firsts.setdefault(series_of(entry), entry)
    labels = {series: label_of(entry) for series, entry in firsts.items()}
    for name in TELLING:
        for alike in of_equal_labels(labels):
            values = {series: getattr(firsts[series], name) for series in alike}
            if len(set(values.values())) > 1:
                labels |= {series: f"{labels[series]}, {values[series] or f'no {name}'}" for series in alike}
    for alike in of_equal_labels(labels):
        labels |= {series: f"{labels[series]} ({number})" for number, series in enumerate(alike, start=1)}
    return labels


def of_equal_labels(labels: Mapping[Series, str]) -> list[list[Series]]:
    """Return the series that share a label with others, by label."""
    groups: dict[str, list[Series]] = {}
    for series, label in labels.items():
        groups.setdefault(label, []).append(series)
    return [alike for alike in groups.values() if len(alike) > 1]


def by_column(comparison: Comparison) -> dict[str, list[Entry]]:
    """Return the entries with values of each column; of each task and split only the first metric."""
    groups: dict[str, list[Entry]] = {}
    firsts: dict[tuple[str, str], str] = {}
    for entry in comparison.entries:
        if entry.mean is None:
            continue
        if firsts.setdefault((entry.task, entry.split), entry.metric) != entry.metric:
            continue
        groups.setdefault(f"{entry.task}: {entry.split} {entry.metric}", []).append(entry)
    return groups


def quality_charts(comparison: Comparison) -> list[tuple[str, str]]:
    """Return a chart of size against quality for each column of which sizes are known; a method has one colour."""
    found = []
    for caption, entries in by_column(comparison).items():
        labels = labels_of(entries)
        colours = {method: number for number, method in enumerate(dict.fromkeys(entry.method for entry in entries))}
        points = [
            svg.Point(
                entry.details["parameters"] / 1e6,
                scaled(entry, entry.mean),
                labels[series_of(entry)],
                colours[entry.method],
                None if entry.std is None else scaled(entry, entry.std),
            )
            for entry in entries
            if "parameters" in entry.details and entry.mean is not None and entry.higher_is_better
        ]
        if points:
            found.append((caption, svg.scatter(points, "million parameters", entries[0].metric, caption)))
    return found


def picture(comparison: Comparison) -> str:
    """Return size against quality as one SVG picture, which loads nothing.

    It has a chart for each task, of its test split if it has one.

    Raises:
        InputError: if there is no entry of which the size is known and more is better.
    """
    tested = {entry.task for entry in comparison.entries if entry.split == "test"}
    entries = [entry for entry in comparison.entries if entry.split == "test" or entry.task not in tested]
    shown = quality_charts(replace(comparison, entries=entries))
    if not shown:
        words = "sizes are those of runs at hand, which --runs names for a table, and there is no chart of errors"
        raise InputError(f"there is nothing to draw: {words}")
    return svg.stacked(shown, (FOLDER / "charts.css").read_text(encoding="utf-8"))


def curve_charts(comparison: Comparison, curves: Curves) -> list[tuple[str, str]]:
    """Return a chart of validation scores over epochs for each task."""
    found = []
    for caption, entries in by_column(comparison).items():
        if entries[0].split != "validation":
            continue
        series, labels = {}, labels_of(entries)
        for entry in entries:
            runs = [curves[digest] for digest in entry.digests.values() if curves.get(digest)]
            shared = sorted(set.intersection(*({epoch for epoch, _ in run} for run in runs))) if runs else []
            if shared:
                means = {epoch: sum(dict(run)[epoch] for run in runs) / len(runs) for epoch in shared}
                series[labels[series_of(entry)]] = [(epoch, scaled(entry, value)) for epoch, value in means.items()]
        if series and any(len(points) > 1 for points in series.values()):
            found.append((caption, svg.lines(series, "epoch", entries[0].metric, caption)))
    return found


def cost_charts(comparison: Comparison) -> list[tuple[str, str]]:
    """Return bars of training seconds for each task."""
    return _bars(comparison, "train_seconds", "s", 1.0)


def agreement_charts(comparison: Comparison) -> list[tuple[str, str]]:
    """Return bars of the agreement with the first teacher for each task."""
    return _bars(comparison, "agreement", "%", 100.0)


def _bars(comparison: Comparison, name: str, unit: str, factor: float) -> list[tuple[str, str]]:
    found = []
    for task, entries in by_task(comparison).items():
        known = [entry for entry in entries if name in entry.details]
        labels = labels_of(known)
        if values := {labels[series_of(entry)]: factor * entry.details[name] for entry in known}:
            found.append((task, svg.bars(values, unit, f"{name} on {task}")))
    return found


def by_task(comparison: Comparison) -> dict[str, list[Entry]]:
    """Return the entries of each task, of all its splits and metrics."""
    groups: dict[str, list[Entry]] = {}
    for entry in comparison.entries:
        groups.setdefault(entry.task, []).append(entry)
    return groups


def layer_maps(comparison: Comparison, maps: Mapping[str, Sequence[LayerMap]]) -> str:
    """Return the section of maps of layers, in which equal maps are one figure; empty without any."""
    figures = []
    for (weights, rows, columns), captions in map_groups(comparison, maps).items():
        shown = "".join(f"<div>{escape(caption)}</div>" for caption in captions[:NAMED])
        if folded := captions[NAMED:]:
            lines = "".join(f"<div>{escape(caption)}</div>" for caption in folded)
            shown += f"<details><summary>and {len(folded)} more</summary>{lines}</details>"
        chart = svg.heat_map(weights, "teacher layer", "student layer", captions[0], rows, columns)
        figures.append(f"<figure><figcaption>{shown}</figcaption>{chart}</figure>")
    if not figures:
        return ""
    note = (
        "Weights of the teacher's layers for each layer of the student, of the first seed at hand and the checkpoint that was "
        "evaluated; layer 0 is the embeddings. Each colour scale ends at the largest weight of its map. Equal maps are shown "
        "once."
    )
    return f'<h2>Maps of layers</h2><p class="quiet">{note}</p><div class="maps">{"".join(figures)}</div>'


Matrix = tuple[tuple[tuple[float, ...], ...], Sequence[int], Sequence[int]]
"""Weights, and the layers that their rows and columns are of."""


def map_groups(comparison: Comparison, maps: Mapping[str, Sequence[LayerMap]]) -> dict[Matrix, list[str]]:
    """Return the different maps, each with captions that say which rows, tasks, teachers and names it is of."""
    groups: dict[Matrix, dict[str, dict[str, None]]] = {}
    for entries in by_task(comparison).values():
        labels = labels_of(entries)
        for entry in entries:
            at_hand = [maps[digest] for _, digest in sorted(entry.digests.items()) if maps.get(digest)]
            for found in at_hand[:1]:
                several = len({one.student for one in found}) > 1
                for one in found:
                    student = f", student {one.student}" if several else ""
                    whose = f"{labels[series_of(entry)]} on {one.task}{student}, teacher {one.teacher}"
                    groups.setdefault(compared(one.weights), {}).setdefault(whose, {})[one.name] = None
    return {
        matrix: [f"{whose}: {', '.join(names)}" for whose, names in of_matrix.items()] for matrix, of_matrix in groups.items()
    }


def compared(weights: Sequence[Sequence[float]]) -> Matrix:
    """Return a map without the embeddings' row, or column, if these are not compared.

    >>> compared([[0, 0, 0], [0, 0.5, 0.5]])
    (((0.5, 0.5),), range(1, 2), range(1, 3))
    """
    rows, columns = range(len(weights)), range(len(weights[0]))
    rows = rows if any(weights[0]) or len(rows) == 1 else rows[1:]
    columns = columns if any(row[0] for row in weights) or len(columns) == 1 else columns[1:]
    return tuple(tuple(weights[row][column] for column in columns) for row in rows), rows, columns


def commands(comparison: Comparison) -> str:
    """Return the commands and digests of all runs."""
    lines = []
    seen: set[str] = set()
    for entry in comparison.entries:
        for seed, digest in sorted(entry.digests.items()):
            if digest not in seen:
                seen.add(digest)
                command = entry.commands.get(seed, "")
                shown = f"<code>kd-train {escape(command)}</code>" if command else ""
                lines.append(
                    f"<tr><td>{escape(label_of(entry))}</td><td>{seed}</td><td><code>{digest}</code></td><td>{shown}</td></tr>"
                )
    if not lines:
        return ""
    header = "<tr><th>row</th><th>seed</th><th>digest</th><th>command</th></tr>"
    inner = f'<div class="wide"><table><thead>{header}</thead><tbody>{"".join(lines)}</tbody></table></div>'
    return f"<h2>Commands and digests</h2><details><summary>{len(lines)} runs</summary>{inner}</details>"
