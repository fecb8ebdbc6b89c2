"""Knowledge distillation of logits, and checks of options that several methods share."""

from torch import Tensor

from kd.config.values import number, shown, switch, word
from kd.errors import InputError
from kd.functional.logits import REDUCTIONS, SOFT_LOSSES
from kd.methods.base import Method, Step
from kd.schedules import Schedule, as_schedule, extremes

TEMPERATURES = (1e-3, 1e4)
"""Lowest and highest temperature allowed."""

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
        reduction: `batchmean`; or `elementmean`, which PKD's code uses: it divides the soft loss by the number of classes.
    """

    names = ("task", "logits")

    def __init__(self, temperature: "float | Schedule" = 4.0, loss: str = "kl", reduction: str = "batchmean") -> None:
        super().__init__()
        self.temperature = checked_temperature(temperature)
        self.loss = checked(loss, SOFT_LOSSES, "method.loss")
        self.reduction = checked(reduction, BATCH_MEANS, "method.reduction")

    def terms(self, step: Step) -> dict[str, Tensor]:
        """Return the hard and the soft loss."""
        student, teacher = step.student.outputs, step.teacher.outputs
        temperature = self.temperature(step.progress.fraction)
        return {
            "task": step.task.hard(student.logits, step.batch.labels),
            "logits": step.task.soft(student.logits, teacher.logits, temperature, self.loss, self.reduction),
        }


def checked(value: str, allowed: tuple[str, ...], key: str) -> str:
    """Check that an option has one of the allowed values, and return it.

    Raises:
        InputError: for any other value.
    """
    return word(value, allowed, key)


def checked_switch(value: object, key: str) -> bool:
    """Check that an option is true or false, and return it.

    Raises:
        InputError: for anything else.
    """
    return switch(value, key)


def checked_temperature(value: "float | Schedule", key: str = "method.temperature") -> Schedule:
    """Convert a temperature to a schedule and check that it stays in [0.001, 10000].

    At lower temperatures logits of ordinary size would overflow float32; at higher ones their differences vanish.

    Raises:
        InputError: for a value that is not a number, or is outside that range.
    """
    try:
        schedule = as_schedule(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{key}={shown(value)} is not a number", key) from error
    for extreme in extremes(schedule):
        if not extreme > 0:
            raise InputError(f"{key} is {extreme}, it must be positive", key)
        number(extreme, key, *TEMPERATURES)
    return schedule
