"""Labels of a teacher's outcomes: whether its prediction is correct, and how confident it is."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kd.functional.logits import widened

SCHEMES: dict[str, tuple[str, ...]] = {
    "four": ("confident and correct", "unconfident and correct", "confident and wrong", "unconfident and wrong"),
    "correct": ("correct", "wrong"),
    "confident": ("confident", "unconfident"),
}
"""Name of a scheme -> its labels."""


def confidence(logits: Tensor) -> Tensor:
    """Return the largest probability of each prediction, (batch,), for logits (batch, classes), at temperature 1.

    >>> confidence(torch.tensor([[0.0, 0.0]]))
    tensor([0.5000])
    """
    return F.softmax(widened(logits), dim=-1).amax(dim=-1)


def outcome_labels(logits: Tensor, labels: Tensor, thresholds: Tensor | Sequence[float], scheme: str = "four") -> Tensor:
    """Return the label of each of a teacher's predictions, an index into `SCHEMES[scheme]`.

    Source: Cho and Kang, Pea-KD, arXiv:2009.14822, section 3.3; authors' code, where a confidence equal to its threshold is not
    confident either.

    Args:
        logits: (batch, classes), the teacher's; no gradient flows to them.
        labels: (batch,), indices of the true classes.
        thresholds: (2,), confidence above which a prediction is confident, if it is correct, and if it is wrong.
        scheme: `four`: both distinctions; `correct` or `confident`: one of them.

    Returns:
        (batch,), long.

    >>> outcome_labels(torch.tensor([[4.0, 0.0], [0.5, 0.0]]), torch.tensor([0, 1]), (0.9, 0.7))
    tensor([0, 3])
    """
    logits = widened(logits.detach())
    if scheme not in SCHEMES:
        raise ValueError(f"scheme '{scheme}' is not one of {', '.join(SCHEMES)}")
    wrong = logits.argmax(dim=-1) != labels
    if scheme == "correct":
        return wrong.long()
    if_correct, if_wrong = thresholds
    certainty = confidence(logits)
    unconfident = torch.where(wrong, ~(certainty > if_wrong), ~(certainty > if_correct))
    return unconfident.long() if scheme == "confident" else 2 * wrong.long() + unconfident.long()


def median_thresholds(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the medians of the confidence of correct and of wrong predictions, (2,), float64.

    Source: Cho and Kang, Pea-KD, arXiv:2009.14822, authors' code. The median of an even number is the mean of the two in the
    middle; where there is no prediction, the threshold is 0, and has no effect (our choices).

    Args:
        logits: (examples, classes), the teacher's, of the whole training set; no gradient flows to them.
        labels: (examples,), indices of the true classes.
    """
    correct = logits.argmax(dim=-1) == labels
    certainty = confidence(logits.detach()).double()
    return torch.stack([_median(certainty[correct]), _median(certainty[~correct])])


def _median(values: Tensor) -> Tensor:
    """Return the median of (values,), the mean of the two in the middle of an even number; 0 without values."""
    count = len(values)
    ordered = values.sort().values
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2 if count else values.new_zeros(())
