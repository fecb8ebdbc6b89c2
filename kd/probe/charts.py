"""Charts of an analysis: heat maps of layers and heads, and curves of linear probes, the control beside the student."""

from collections.abc import Iterable, Sequence
from html import escape

from kd.probe.result import Case
from kd.probe.summary import Summary, by_role
from kd.probe.words import estimate, percent, table
from kd.results.page import svg


def figure(caption: str, chart: str) -> str:
    """Return a chart with a caption."""
    return f"<figure><figcaption>{escape(caption)}</figcaption>{chart}</figure>"


def means(cases: Sequence[Case]) -> str:
    """Return words about means over seeds; empty for one seed."""
    return f" Means over {len(cases)} seeds." if len(cases) > 1 else ""


def largest(matrices: Iterable[Sequence[Sequence[float | None]]]) -> float:
    """Return the largest absolute value of matrices, 0 without any."""
    return max((abs(v) for matrix in matrices for row in matrix for v in row if v is not None), default=0.0)


def alignments(summary: Summary) -> str:
    """Return heat maps of the similarity of layers."""
    matrices = by_role(summary.cases, "cka", lambda one: [[cell.value for cell in row] for row in one.matrix])
    unrelated = by_role(summary.cases, "cka", lambda one: one.unrelated)
    if not matrices:
        return ""
    n = next(iter(summary.cases[0].cka.values())).n if summary.cases[0].cka else 0
    charts = []
    for role, matrix in matrices.items():
        chance = largest([unrelated[role]])
        rows, columns = range(len(matrix)), range(len(matrix[0]))
        chart = svg.heat_map(matrix, "teacher layer", f"{role} layer", f"CKA of {role}", rows, columns, most=1.0, numbers=".2f")
        charts.append(figure(f"{role}, by chance up to {chance:.2f}", chart))
    note = (
        f"Linear CKA of {n} examples, 1 for representations that are equal but for rotation and scale; layer 0 is the "
        "embeddings. By chance: the largest value of the same layers with the examples of one model in another order."
        f"{means(summary.cases)}"
    )
    return f'<h3>Similarity of layers</h3><p class="quiet">{escape(note)}</p><div class="maps">{"".join(charts)}</div>'


def probes(summary: Summary) -> str:
    """Return a chart and a table of the accuracy of linear probes."""
    found = by_role(summary.cases, "probes", lambda one: [[layer.value for layer in one.layers]])
    if not found:
        return ""
    first = summary.cases[0].probes
    series = {role: [(float(x), 100 * y) for x, y in enumerate(matrix[0]) if y is not None] for role, matrix in found.items()}
    chart = svg.lines(series, "layer", "accuracy of the probe", "accuracy of linear probes by layer")
    depth = max(len(matrix[0]) for matrix in found.values())
    rows = [
        [str(layer), *(estimate("lost", one.layers[layer]) if layer < len(one.layers) else "" for one in first.values())]
        for layer in range(depth)
    ]
    one = next(iter(first.values()), None)
    budget = "" if one is None else f": {one.train} training and {one.layers[0].n} other examples, C = {one.c:g}"
    seed = f", seed {summary.cases[0].about.seed}" if len(summary.cases) > 1 else ""
    widths = [layer.high - layer.low for layer in one.layers if layer.low is not None and layer.high is not None] if one else []
    certain = f" Intervals are about ± {50 * sum(widths) / len(widths):.0f} points for one seed." if widths else ""
    note = (
        "Accuracy of logistic regression on frozen, standardised vectors; the same examples and budget for every layer and "
        f"model{budget}.{certain}{means(summary.cases)}"
    )
    detail = f"<details><summary>accuracy with intervals{seed}</summary>{table(['layer', *first], rows)}</details>"
    return (
        f'<h3>Linear probes</h3><p class="quiet">{escape(note)}</p><div class="charts">'
        f"{figure('accuracy by layer', chart)}</div>{detail}"
    )


def attention(summary: Summary) -> str:
    """Return heat maps of the divergence of attention."""
    matrices = by_role(summary.cases, "attention", lambda one: [[cell.value for cell in row] for row in one.matrix])
    if not matrices:
        return ""
    n = next(iter(summary.cases[0].attention.values())).n if summary.cases[0].attention else 0
    most = largest(matrices.values())
    charts = [
        figure(
            role,
            svg.heat_map(
                matrix,
                "teacher layer",
                f"{role} layer",
                f"divergence of the attention of {role}",
                range(1, len(matrix) + 1),
                range(1, len(matrix[0]) + 1),
                most=most,
                numbers=".2f",
            ),
        )
        for role, matrix in matrices.items()
    ]
    note = (
        "Jensen-Shannon divergence in bits, 0 for equal attention: mean over the best-matched pairs of heads, the queries of "
        f"an example, and {n} examples.{means(summary.cases)}"
    )
    return f'<h3>Attention</h3><p class="quiet">{escape(note)}</p><div class="maps">{"".join(charts)}</div>'


def ablations(summary: Summary) -> str:
    """Return heat maps of the drops without a head, and a table of those without a layer."""
    found = by_role(summary.cases, "ablation", lambda one: [[cell.value for cell in row] for row in one.heads])
    if not found:
        return ""
    first = summary.cases[0].ablation
    one = next(iter(first.values()))
    name = f"score.{one.metric}"
    scale = 100.0 if percent(name) else 1.0
    scaled = {role: [[None if v is None else scale * v for v in row] for row in matrix] for role, matrix in found.items()}
    most = largest(scaled.values())
    charts = [
        figure(
            f"{role} without a head",
            svg.heat_map(
                matrix,
                "head",
                "layer",
                f"drops of {role} without a head",
                range(1, len(matrix) + 1),
                range(len(matrix[0])),
                most=most,
                numbers=".1f" if scale == 100.0 else ".2f",
            ),
        )
        for role, matrix in scaled.items()
    ]
    depth = max(len(of_model.layers) for of_model in first.values())
    rows = [["none (the score)", *(estimate(name, of_model.score) for of_model in first.values())]] + [
        [str(layer + 1), *(estimate(name, m.layers[layer]) if layer < len(m.layers) else "" for m in first.values())]
        for layer in range(depth)
    ]
    seed = f" (seed {summary.cases[0].about.seed})" if len(summary.cases) > 1 else ""
    least = f" One example is {100 / one.n:.1f} points; intervals are in probe.json." if one.metric == "accuracy" else ""
    note = (
        f"Drop of {one.metric} over {one.n} examples, in {'points' if scale == 100.0 else 'its unit'}: the score of the whole "
        f"model less that without a part; below 0, in the other colour, the model is better without it.{least}"
        f"{means(summary.cases)}"
    )
    return (
        f'<h3>Without a head or a layer</h3><p class="quiet">{escape(note)}</p><div class="maps">{"".join(charts)}</div>'
        f"<h3>Drop without a layer{seed}</h3>{table(['layer', *first], rows)}"
    )
