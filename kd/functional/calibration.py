"""Quality of predicted probabilities, for reports: calibration error and proper scores. No gradient flows to the logits."""

import torch
from torch import Tensor
from torch.nn import functional as F

BINS = 15
"""Number of bins of the calibration error in Guo et al., ICML 2017, arXiv:1706.04599."""


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the negative logarithm of the probability of each true class.

    Args:
        logits: (examples, classes).
        labels: (examples,), class indices.

    Returns:
        (examples,), in nats, 0 and up, float64. No reduction.
    """
    return F.cross_entropy(logits.detach().double(), labels, reduction="none")


def brier_score(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Return the Brier score of each prediction, :math:`\sum_c (p_c - 1[c = y])^2`, a sum over all classes.

    Source: Brier, Monthly Weather Review 78(1), 1950. For two classes it is twice the squared error of one probability.

    Args:
        logits: (examples, classes).
        labels: (examples,), class indices.

    Returns:
        (examples,), from 0 to 2, float64. No reduction.

    >>> brier_score(torch.tensor([[0.0, 0.0]]), torch.tensor([1])).item()
    0.5
    """
    return (logits.detach().double().softmax(dim=-1) - F.one_hot(labels, logits.shape[-1])).square().sum(dim=-1)


def calibration_error(logits: Tensor, labels: Tensor, counts: Tensor | None = None, bins: int = BINS) -> Tensor:
    r"""Return the expected calibration error, :math:`\sum_b \frac{n_b}{n} |acc_b - conf_b|` over bins of the confidence.

    Source: Naeini, Cooper and Hauskrecht, AAAI 2015; bins of equal width as in Guo et al., ICML 2017, arXiv:1706.04599, eq. 3:
    bin b holds confidences in ((b - 1) / bins, b / bins]. The error of few examples is biased upwards: a bin's accuracy is
    compared with its confidence however few examples are in it.

    Args:
        logits: (examples, classes).
        labels: (examples,), class indices.
        counts: (samples, examples), the number of times that each sample has each example, as for a bootstrap; None for one
            sample with each example once.
        bins: number of bins.

    Returns:
        (samples,), or a scalar without counts; from 0 to 1, float64. A mean over the examples of a sample; NaN for a sample
        without any.

    >>> calibration_error(torch.tensor([[100.0, 0.0], [100.0, 0.0]]), torch.tensor([0, 0])).item()
    0.0
    """
    confidence, predicted = logits.detach().double().softmax(dim=-1).max(dim=-1)
    gaps = (predicted == labels).double() - confidence
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.double)[1:-1]
    by_bin = gaps[:, None] * F.one_hot(torch.bucketize(confidence, edges), bins)
    given = torch.ones(1, len(gaps), dtype=torch.double) if counts is None else counts.double()
    errors = (given @ by_bin).abs().sum(dim=-1) / given.sum(dim=-1)
    return errors[0] if counts is None else errors
