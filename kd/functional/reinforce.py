"""Policy gradients for independent yes-or-no decisions."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kd.functional.hidden import at_least_float32


def log_probability(logits: Tensor, actions: Tensor) -> Tensor:
    r"""Return the log-probability of actions under independent Bernoulli decisions, in nats.

    :math:`\sum_k a_k \ln \sigma(l_k) + (1 - a_k) \ln (1 - \sigma(l_k))`.

    Args:
        logits: (batch, decisions).
        actions: (batch, decisions), 0 or 1, constants.

    Returns:
        (batch,).

    >>> log_probability(torch.zeros(1, 3), torch.tensor([[1.0, 0.0, 1.0]]))  # - 3 ln 2
    tensor([-2.0794])
    """
    logits = at_least_float32(logits)
    return -F.binary_cross_entropy_with_logits(logits, actions.detach().to(logits.dtype), reduction="none").sum(dim=1)


def selected_weights(probabilities: Tensor, actions: Tensor) -> Tensor:
    """Return equal weights of the selected teachers, adding up to 1; if none is selected, weight 1 of the most probable one.

    Args:
        probabilities: (batch, teachers), of being selected.
        actions: (batch, teachers), 0 or 1.

    >>> selected_weights(torch.tensor([[0.2, 0.4], [0.2, 0.4]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    tensor([[0.5000, 0.5000],
            [0.0000, 1.0000]])
    """
    actions = at_least_float32(actions)
    likeliest = F.one_hot(probabilities.argmax(dim=1), probabilities.shape[1]).to(actions.dtype)
    selected = torch.where(actions.sum(dim=1, keepdim=True) > 0, actions, likeliest)
    return selected / selected.sum(dim=1, keepdim=True)


def stacked_weights(logits: list[Tensor], labels: Tensor, steps: int = 100) -> list[float]:
    r"""Return weights of teachers from a logistic regression of the labels on their log-probabilities.

    The model is :math:`p(c) \propto \exp \sum_k \beta_k \ln p_k(c)`, with one coefficient for each teacher, fitted to the
    greatest likelihood by Newton's method. Negative coefficients count as zero, and the rest is scaled to add up to 1; if none
    is positive, weights are equal. (The form of the regression is our choice.)

    Args:
        logits: (examples, classes) of each teacher.
        labels: (examples,), class indices; negative ones are left out.
        steps: most steps of Newton's method.

    >>> right, wrong = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0]])
    >>> stacked_weights([right, wrong], torch.tensor([0, 1, 1]))
    [1.0, 0.0]
    """
    labelled = labels >= 0
    scores = torch.stack([one.double().log_softmax(dim=-1)[labelled] for one in logits], dim=1)  # (examples, teachers, classes)
    target = scores.gather(2, labels[labelled].long()[:, None, None].expand(-1, len(logits), 1)).squeeze(2)
    # A small penalty keeps the coefficients finite where the labels can be told apart without an error.
    penalty = 1e-3
    coefficients = torch.zeros(len(logits), dtype=torch.double)
    for _ in range(steps):
        probabilities = torch.einsum("k,nkc->nc", coefficients, scores).softmax(dim=-1)
        means = torch.einsum("nc,nkc->nk", probabilities, scores)
        slope = (target - means).mean(dim=0) - penalty * coefficients
        second = torch.einsum("nc,nkc,nlc->kl", probabilities, scores, scores) - means.T @ means
        curvature = second / len(means) + penalty * torch.eye(len(logits), dtype=torch.double)
        change = torch.linalg.solve(curvature, slope)
        coefficients = coefficients + change
        if float(change.abs().max()) < 1e-10:
            break
    positive = coefficients.clamp(min=0)
    if float(positive.sum()) == 0:
        return [1 / len(logits)] * len(logits)
    return (positive / positive.sum()).tolist()  # type: ignore[no-any-return]


def selected_mean(values: Tensor, selected: Tensor) -> Tensor:
    r"""Return the mean of the selected values, :math:`\sum_i a_i v_i / \max(1, \sum_i a_i)`; 0 if none is selected.

    Args:
        values: (batch,).
        selected: (batch,), 0 or 1, constants.

    >>> selected_mean(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1.0, 0.0, 1.0]))
    tensor(3.5000)
    """
    values = at_least_float32(values)
    selected = selected.detach().to(values.dtype)
    return (values * selected).sum() / selected.sum().clamp(min=1)
