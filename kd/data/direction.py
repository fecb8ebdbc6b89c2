"""The direction in which a metric improves. Nothing heavy is imported, so that commands that only read figures use it too."""

LOWER_IS_BETTER = ("mse", "loss")
"""Metrics of errors, which improve as they fall."""


def higher_is_better(metric: str) -> bool:
    """Return whether a larger value of a metric is better: True for all metrics except those of errors.

    Args:
        metric: name of the metric, perhaps behind a split or a task of a mixture, as in `stsb/mse`.

    >>> higher_is_better("accuracy"), higher_is_better("stsb/mse")
    (True, False)
    """
    return metric.rpartition("/")[2] not in LOWER_IS_BETTER
