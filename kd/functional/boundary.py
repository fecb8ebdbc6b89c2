"""Examples that are moved toward a classifier's decision boundary.

Source: Heo, Lee, Yun, Choi, Knowledge Distillation with Adversarial Samples Supporting Decision Boundary, AAAI 2019,
arXiv:1805.05532; authors' code `attacks/attack_BSS.py` and `train_BSS_distillation.py`.
"""

import torch
from torch import Tensor

from kd.functional.hidden import at_least_float32, unit
from kd.functional.logits import widened

OVERSHOOT = 1e-4
"""Number that is added to the margin, so that an example on the boundary crosses it (authors' code)."""


def other_classes(logits: Tensor, labels: Tensor, draws: Tensor) -> Tensor:
    """Return a class of each example other than its label, drawn with a probability proportional to the softmax.

    Args:
        logits: (batch, classes), two classes at least.
        labels: (batch,), class indices.
        draws: (batch,), uniform in [0, 1).

    Returns:
        (batch,), class indices.

    >>> logits = torch.tensor([[5.0, 0.0, 0.0]]).expand(2, 3)
    >>> other_classes(logits, torch.tensor([0, 0]), torch.tensor([0.4, 0.6]))
    tensor([1, 2])
    """
    # The softmax over the other classes alone is in the same proportions, and does not underflow if the label is certain.
    others = widened(logits).double().scatter(1, labels[:, None], -torch.inf).softmax(dim=-1).cumsum(dim=-1)
    return (others / others[:, -1:] <= draws[:, None]).sum(dim=-1)


def disagreement(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    r"""Return :math:`\sum_{c \ne y} (p_t^c - p_s^c)^2`, (batch,), of logits (batch, classes); the temperature is 1."""
    squares = (widened(teacher).softmax(dim=-1) - widened(student).softmax(dim=-1)) ** 2
    return squares.scatter(1, labels[:, None], 0.0).sum(dim=-1)


def difference(logits: Tensor, classes: Tensor, labels: Tensor) -> Tensor:
    """Return the logit of a class minus that of the label, (batch,), negative while the label's is larger."""
    logits = widened(logits)
    columns = torch.stack([classes, labels], dim=1)
    chosen = logits.gather(1, columns)
    return chosen[:, 0] - chosen[:, 1]


def toward_boundary(states: Tensor, gradient: Tensor, margin: Tensor, rate: float) -> Tensor:
    r"""Return :math:`x + \eta (|m| + 10^{-4}) \nabla / \lVert \nabla \rVert_2`, a step toward the boundary of two classes.

    Args:
        states: x, (batch, tokens, width).
        gradient: that of the other class's logit minus the label's, the same shape; its norm is over all tokens of an example,
            and where it is 0 nothing moves.
        margin: m, (batch,), the difference of the two logits.
        rate: eta, >= 0.

    Returns:
        The same shape, in float32 at least.
    """
    states = at_least_float32(states)
    direction = unit(at_least_float32(gradient).flatten(1)).view_as(gradient)
    return states + rate * (margin.abs() + OVERSHOOT).to(states.dtype)[:, None, None] * direction.to(states.dtype)


def least_squares_map(inputs: Tensor, outputs: Tensor) -> Tensor:
    r"""Return the matrix W, (width, other width), for which :math:`\lVert E W - F \rVert` is least, in float32 at least.

    Args:
        inputs: E, (words, width), the table of one model's word embeddings.
        outputs: F, (words, other width), those of the same words in another model.
    """
    table, other = inputs.detach().double(), outputs.detach().double()
    solution: Tensor = torch.linalg.pinv(table.T @ table, hermitian=True) @ (table.T @ other)
    return solution.to(at_least_float32(inputs).dtype)
