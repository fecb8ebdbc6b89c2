"""Figures of a paper beside ours: of which runs they are, and which of several a mean over seeds is compared with."""

from collections.abc import Sequence

from kd.results.figures import Figure


def is_best_run(figure: Figure) -> bool:
    """Return whether a figure is that of one run, selected among several, and so higher than a run is expected to be."""
    return figure.aggregate == "best run"


def aggregate(figure: Figure) -> str:
    """Return what a figure is of, in a word or two, with its number of runs if there are several; empty if it is not known."""
    if figure.aggregate == "unknown":
        return ""
    return figure.aggregate if figure.n in (None, 1) else figure.aggregate.replace("of runs", f"of {figure.n} runs")


def compared_with(figures: Sequence[Figure]) -> Figure | None:
    """Return the figure of a paper that our mean over seeds is compared with; None if there is none, or several would do.

    A best run is never one. Otherwise a figure of several, or of an unknown number of runs, goes before that of one run; and
    among several the one that is printed in the paper or in its authors' files goes before those from elsewhere.

    Args:
        figures: figures of one method, student, task, split and metric.
    """
    apt = [figure for figure in figures if figure.value is not None and not is_best_run(figure)]
    apt = [figure for figure in apt if figure.aggregate != "one run"] or apt
    if len(apt) > 1:
        apt = [figure for figure in apt if figure.confidence == "printed"]
    return apt[0] if len(apt) == 1 else None
