"""Figures of a paper beside ours: of which runs they are, and which of several a mean over seeds is compared with."""

import re
from collections.abc import Sequence

from kd.results.figures import Figure


def is_best_run(figure: Figure) -> bool:
    """Return whether a figure is that of one run that was selected among several, and so higher than a run is expected to be.

    Such a figure has n=1, and its selection names the run: "best: epoch, and run of the grid, by dev accuracy". One run that
    nothing was selected from but its checkpoint has n=1, and no such word.
    """
    return figure.n == 1 and "run" in re.findall(r"\w+", figure.selection)


def aggregate(figure: Figure) -> str:
    """Return what a figure is of, in a word or two, by its number of runs and its selection; empty if neither tells."""
    if figure.n is None:
        return "mean of runs" if re.search(r"\bmean of (its )?runs\b", figure.selection) else ""
    if figure.n > 1:
        return f"mean of {figure.n} runs"
    return "best run" if is_best_run(figure) else "one run"


def compared_with(figures: Sequence[Figure]) -> Figure | None:
    """Return the figure of a paper that our mean over seeds is compared with; None if there is none, or several would do.

    A best run is never one. Otherwise a figure of several, or of an unknown number of runs, goes before that of one run; and
    among several the one that is printed in the paper or in its authors' files goes before those from elsewhere.

    Args:
        figures: figures of one method, student, task, split and metric.
    """
    apt = [figure for figure in figures if figure.value is not None and not is_best_run(figure)]
    apt = [figure for figure in apt if figure.n != 1] or apt
    if len(apt) > 1:
        apt = [figure for figure in apt if figure.confidence == "printed"]
    return apt[0] if len(apt) == 1 else None
