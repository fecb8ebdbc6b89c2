"""Knowledge distillation of logits."""

from torch import Tensor

from kd.functional.logits import SOFT_LOSSES
from kd.methods.base import Method, Step
from kd.methods.options import BATCH_MEANS, temperature_schedule, word
from kd.schedules import Schedule


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
        self.temperature = temperature_schedule(temperature)
        self.loss = word(loss, SOFT_LOSSES, "loss")
        self.reduction = word(reduction, BATCH_MEANS, "reduction")

    def terms(self, step: Step) -> dict[str, Tensor]:
        """Return the hard and the soft loss."""
        student, teacher = step.student.outputs, step.teacher.outputs
        temperature = self.temperature(step.progress.fraction)
        return {
            "task": step.task.hard(student.logits, step.batch.labels),
            "logits": step.task.soft(student.logits, teacher.logits, temperature, self.loss, self.reduction),
        }
