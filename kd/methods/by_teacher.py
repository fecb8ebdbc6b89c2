"""Losses of each example by teacher, (batch, teachers), and weights of the teachers that are made of them."""

import torch
from torch import Tensor

from kd.methods.base import Step


def soft_losses(step: Step, temperature: float, loss: str) -> Tensor:
    """Return the soft loss of each example against each teacher, (batch, teachers); arguments as for `Task.soft`."""
    ours = step.student.outputs.logits
    losses = [step.task.soft(ours, teacher.outputs.logits, temperature, loss, "none") for teacher in step.teachers]
    return torch.stack(losses, dim=1)


def errors(step: Step) -> Tensor:
    """Return the loss of each teacher against the label of each example, (batch, teachers), constants.

    NaN where an example has no label.
    """
    return torch.stack(
        [step.task.errors(teacher.outputs.logits, step.batch.labels) for teacher in step.teachers], dim=1
    ).detach()


def inverse_error_weights(errors: Tensor) -> Tensor:
    r"""Return :math:`1 / (1 + e)` for errors e, (batch, teachers), in (0, 1]; 1 / teachers where an example has no label.

    Source: Wu, Wu, Huang, Findings of ACL-IJCNLP 2021, arXiv:2106.01023, the weights of its distillation loss; the weight
    without a label is our choice.

    >>> inverse_error_weights(torch.tensor([[0.0, 1.0], [torch.nan, torch.nan]]))
    tensor([[1.0000, 0.5000],
            [0.5000, 0.5000]])
    """
    return torch.where(errors.isnan(), 1 / errors.shape[1], 1 / (1 + errors))


def least_error(errors: Tensor) -> Tensor:
    """Return weight 1 for the teacher with the least error on an example, the first of equal ones; equal ones without a label.

    >>> least_error(torch.tensor([[0.2, 0.1], [torch.nan, torch.nan]]))
    tensor([[0.0000, 1.0000],
            [0.5000, 0.5000]])
    """
    chosen = torch.nn.functional.one_hot(errors.nan_to_num().argmin(dim=1), errors.shape[1]).to(errors.dtype)
    return torch.where(errors.isnan(), 1 / errors.shape[1], chosen)
