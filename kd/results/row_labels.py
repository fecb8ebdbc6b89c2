"""Labels of the rows of a table of runs."""

from collections.abc import Mapping

OWN_COLUMNS = ("row", "method", "student", "teacher", "task", "seed")
"""Keys of a cell that its row does not name a second time."""


def row_label(labels: Mapping[str, str]) -> str:
    """Return the label of the row of a cell: its own, else method, student, and its point of a grid.

    Args:
        labels: key of kd-train -> label of its value, with those of method and student; `row` is a label of its own.

    >>> row_label({"method": "kd", "student": "3l", "task": "rte", "optimizer.lr": "5e-5", "seed": "0"})
    'kd 3l optimizer.lr=5e-5'
    """
    point = [f"{key}={label}" for key, label in labels.items() if key not in OWN_COLUMNS]
    return labels.get("row") or " ".join([labels["method"], labels["student"], *point])
