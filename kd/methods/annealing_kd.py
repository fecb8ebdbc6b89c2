"""Annealing knowledge distillation, phase I, which has a teacher."""

from torch import Tensor

from kd.errors import InputError
from kd.functional.logits import SOFT_LOSSES, widened
from kd.methods.base import Method, Step
from kd.methods.options import BATCH_MEANS, whole, word
from kd.schedules import Staircase

LOSSES = tuple(name for name in SOFT_LOSSES if name != "ce")


class AnnealingKD(Method):
    r"""Annealing knowledge distillation, phase I (Jafari, Rezagholizadeh, Sharma, Ghodsi, EACL 2021, arXiv:2104.07163).

    In epoch i the student's logits are pulled to the teacher's, scaled down:
    :math:`L_I(i) = \lVert z_s - \Phi(\mathcal{T}_i)\, z_t \rVert^2` with :math:`\Phi(\mathcal{T}) = 1 - (\mathcal{T} - 1) /
    \tau_{max}`, where the temperature :math:`\mathcal{T}` falls from :math:`\tau_{max}` to 1 in whole steps, so that the factor
    takes the values :math:`1/\tau_{max}, 2/\tau_{max}, \dots, 1`, each for as many epochs. The student's logits are not
    scaled, and labels are not used. Phase II is `kd.methods.finetune.Finetune` in a run initialised from this one, with a new
    optimiser and learning-rate schedule: `conf/method/annealing_kd.yaml`. Authors' code consulted for facts:
    huawei-noah/Efficient-NLP, `Annealing_KD/NLP_glue_tasks/annealing_kd_glue.py`.

    Terms:
        `logits`: :math:`L_I`.

    Args:
        tau_max: :math:`\tau_{max}`, a whole number; 1 is plain regression of logits. 7 in the published GLUE command, 10 is the
            script's default.
        epochs: number of epochs of this phase; in the authors' code the factor exceeds 1 if `tau_max` does not divide them,
            here that is an error.
        loss: `mse`, or `kl`, the divergence from the softmax of the scaled teacher, which the paper finds worse.
        reduction: `elementmean` (authors' code, the default), or `batchmean`, the squared norm averaged over the batch.

    Raises:
        InputError: for a `tau_max` that does not divide `epochs`.
    """

    names = ("logits",)

    def __init__(self, tau_max: int = 7, epochs: int = 14, loss: str = "mse", reduction: str = "elementmean") -> None:
        super().__init__()
        whole(tau_max, "tau_max")
        whole(epochs, "epochs")
        if epochs % tau_max:
            raise InputError(
                f"the temperature falls in tau_max={tau_max} steps of equal length, which {epochs} epochs cannot be divided "
                f"into; take a tau_max that divides the epochs, or {-(-epochs // tau_max) * tau_max} epochs",
                "tau_max",
            )
        self.factor = Staircase(1 / tau_max, 1.0, tau_max)
        self.tau_max = tau_max
        self.loss = word(loss, LOSSES, "loss")
        self.reduction = word(reduction, BATCH_MEANS, "reduction")

    def terms(self, step: Step) -> dict[str, Tensor]:
        """Return the regression loss of the scaled logits."""
        target = self.factor(step.progress.fraction) * widened(step.teacher.outputs.logits)
        return {"logits": step.task.soft(step.student.outputs.logits, target, 1.0, self.loss, self.reduction)}

    def describe(self) -> dict[str, str]:
        """Describe the factors of the teacher's logits."""
        return {"factors of the teacher's logits": ", ".join(f"{n + 1}/{self.tau_max}" for n in range(self.tau_max))}
