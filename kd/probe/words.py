"""Figures of an analysis as text, for the page and the terminal."""

from collections.abc import Iterable, Sequence
from html import escape

from kd.probe.summary import Spread
from kd.results.statistics import Estimate
from kd.results.tables import in_own_units

LABELS = {
    "agreement": "agreement with the teacher",
    "agreement_right": "agreement, teacher right",
    "agreement_wrong": "agreement, teacher wrong",
    "lost": "lost: wrong, teacher right",
    "gained": "gained: right, teacher wrong",
    "kl": "KL(teacher || model), nats",
    "js": "Jensen-Shannon, bits",
    "total_variation": "total variation",
    "ece": "calibration error (15 bins)",
    "nll": "negative log-likelihood, nats",
    "brier": "Brier score (sum over classes)",
    "rank_agreement": "rank agreement with the teacher",
    "distance": "mean absolute difference from the teacher",
}
"""Names of figures in tables; those with a metric are `score`, `delta` and `retention`."""

OWN_UNITS = ("kl", "js", "total_variation", "nll", "brier", "distance")
"""Figures that are not shown in percent."""

NO_VALUE = "undefined"


KINDS = ("score", "delta", "retention")
"""Figures that there is one of for each metric."""


def ordered(names: Iterable[str]) -> list[str]:
    """Return names of figures in the order of tables: those of each metric side by side, then the others.

    >>> ordered(["ece", "delta.f1", "score.f1", "agreement"])
    ['score.f1', 'delta.f1', 'agreement', 'ece']
    """
    listed, others = list(names), list(LABELS)
    metrics = list(dict.fromkeys(name.partition(".")[2] for name in listed if "." in name))

    def rank(name: str) -> tuple[int, int]:
        kind, _, metric = name.partition(".")
        return (metrics.index(metric), KINDS.index(kind)) if metric else (len(metrics), others.index(name))

    return sorted(listed, key=rank)


def label(name: str) -> str:
    """Return the name of a figure in tables.

    >>> label("delta.accuracy"), label("js")
    ('teacher minus model, accuracy', 'Jensen-Shannon, bits')
    """
    kind, _, metric = name.partition(".")
    words = {"score": metric, "delta": f"teacher minus model, {metric}", "retention": f"model / teacher, {metric}"}
    return words.get(kind) or LABELS[name]


def percent(name: str) -> bool:
    """Return whether a figure is shown in percent."""
    kind, _, metric = name.partition(".")
    return name not in OWN_UNITS and (kind == "retention" or not in_own_units(metric))


def number(name: str, value: float | None) -> str:
    """Return a value of a figure as text.

    >>> number("lost", 0.1234), number("js", 0.1234), number("kl", None)
    ('12.3', '0.123', 'undefined')
    """
    if value is None:
        return NO_VALUE
    text = f"{100 * value:.1f}" if percent(name) else f"{value:.3f}"
    return text.removeprefix("-") if not float(text) else text


def over_seeds(name: str, value: Spread | None, seeds: int | None = None) -> str:
    """Return a figure over seeds as text: with its standard deviation, if there are several.

    Args:
        name: name of the figure.
        value: the figure.
        seeds: number of seeds of the figures beside it; if this one has fewer, the text says so.

    >>> over_seeds("lost", Spread(0.25, None, 1), 2)
    '25.0 (1 of 2 seeds)'
    """
    if value is None:
        return ""
    text = number(name, value.mean)
    text = text if value.sd is None else f"{text} ± {number(name, value.sd)}"
    return f"{text} ({value.seeds} of {seeds} seeds)" if seeds is not None and value.seeds < seeds else text


def spread(name: str, value: Spread | None, seeds: int | None = None) -> str:
    """Return a figure over seeds as text: with its standard deviation, or for one of one seed its interval."""
    if value is None or value.low is None or (seeds or 1) > 1:
        return over_seeds(name, value, seeds)
    return f"{over_seeds(name, value)} [{number(name, value.low)}, {number(name, value.high)}]"


def estimate(name: str, value: Estimate | None) -> str:
    """Return a figure of one seed as text."""
    return "" if value is None else spread(name, Spread(value.value, None, 1, value.low, value.high))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; columns whose cells are all numbers, but for the first column, are set to the right."""
    body = [list(row) for row in rows]
    numbers = [index > 0 and all(is_number(row[index]) for row in body) for index in range(len(header))]
    kinds = [' class="number"' if number else "" for number in numbers]
    head = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(header, kinds, strict=True))
    lines = []
    for row in body:
        own = [' class="number missing"' if text == NO_VALUE else kind for text, kind in zip(row, kinds, strict=True)]
        cells = "".join(f"<td{kind}>{escape(text)}</td>" for text, kind in zip(row, own, strict=True))
        lines.append(f"<tr>{cells}</tr>")
    parts = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="wide"><table class="figures">{parts}</table></div>'


def is_number(text: str) -> bool:
    """Return whether a cell is a number, with or without its interval, or has none.

    >>> is_number("-0.5 [-0.7, 0.1]"), is_number(""), is_number("undefined"), is_number("3 to 17"), is_number("a")
    (True, True, True, True, False)
    """
    return text in ("", NO_VALUE) or text[0] in "-0123456789"
