"""Distillation of logits."""

from torch import Tensor

from kd.errors import InputError, one_of
from kd.functional.logits import REDUCTIONS, SOFT_LOSSES
from kd.methods.base import Method, Step
from kd.schedules import Schedule, as_schedule

BATCH_MEANS = tuple(name for name in REDUCTIONS if name not in ("sum", "none"))
"""Reductions whose value does not depend on the batch size: a sum over the batch would change with ranks and accumulation."""


class KD(Method):
    r"""Knowledge distillation (Hinton, Vinyals, Dean, NeurIPS DL workshop 2014, arXiv:1503.02531).

    :math:`L = w_{logits} T^2 KL(p_t^T \| p_s^T) + w_{task} CE(z_s, y)`, both means over the batch; with
    :math:`w_{logits} = \alpha` and :math:`w_{task} = 1 - \alpha` it is the loss of attention-transfer and RepDistiller.

    Terms:
        `task`: hard loss, temperature 1. Weight 1 - alpha.
        `logits`: soft loss, temperature squared included for `kl`. Weight alpha.

    For regression both are mean squared errors of scores and the temperature does not apply.

    Args:
        temperature: T > 0, on both sides; a number or a schedule.
        loss: `kl`; `ce`, the soft cross entropy without T squared; or `mse` of raw logits.
        reduction: `batchmean`; or `elementmean`, which PKD's code uses and which divides the soft loss by the classes.
    """

    names = ("task", "logits")

    def __init__(self, temperature: "float | Schedule" = 4.0, loss: str = "kl", reduction: str = "batchmean") -> None:
        super().__init__()
        self.temperature = checked_temperature(temperature)
        self.loss = checked(loss, SOFT_LOSSES, "method.loss")
        self.reduction = checked(reduction, BATCH_MEANS, "method.reduction")

    def terms(self, step: Step) -> dict[str, Tensor]:
        """The hard and the soft loss."""
        student, teacher = step.student.outputs, step.teacher.outputs
        temperature = self.temperature(step.progress.fraction)
        return {
            "task": step.task.hard(student.logits, step.batch.labels),
            "logits": step.task.soft(student.logits, teacher.logits, temperature, self.loss, self.reduction),
        }


def checked(value: str, allowed: tuple[str, ...], key: str) -> str:
    """A word of a closed list.

    Raises:
        InputError: for another word.
    """
    if value not in allowed:
        raise one_of(value, allowed, key)
    return value


def checked_switch(value: bool, key: str) -> bool:
    """A truth value.

    Raises:
        InputError: for anything else.
    """
    if not isinstance(value, bool):
        raise one_of(value, ("true", "false"), key)
    return value


def checked_temperature(value: "float | Schedule", key: str = "method.temperature") -> Schedule:
    """A temperature as a schedule, positive throughout.

    Raises:
        InputError: for something that is no number, or not positive.
    """
    try:
        schedule = as_schedule(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{key}={value!r} is not a number", key) from error
    for fraction in (step / 100 for step in range(101)):
        if not schedule(fraction) > 0:
            raise InputError(f"{key} is {schedule(fraction)}, it must be positive", key)
    return schedule
