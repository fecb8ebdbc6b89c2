"""Direction of metrics."""


def higher_is_better(metric: str) -> bool:
    """Return whether a larger value of a metric is better: True for all metrics except `mse` and `loss`.

    >>> higher_is_better("accuracy"), higher_is_better("stsb/mse")
    (True, False)
    """
    return metric.rpartition("/")[2] not in ("mse", "loss")
