"""Deep mutual learning: a wrapper that adds a loss against the peers' predictions to a method."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kd.config.values import word
from kd.forward import Needs
from kd.functional.logits import widened
from kd.methods.base import Method, Step
from kd.methods.kd import checked_temperature
from kd.models import Encoder, FrozenTeacher
from kd.schedules import Schedule

PEER_TARGETS = ("each", "sum", "mean")


class Mutual(Method):
    r"""Deep mutual learning (Zhang, Xiang, Hospedales, Lu, CVPR 2018, arXiv:1706.00384) around any method.

    Each of K students adds to its loss the divergence from its peers' predictions to its own predictions,
    :math:`\frac{1}{K-1} \sum_{l \ne k} KL(p_l \| p_k)`, peers held constant. Around plain fine-tuning this is DML
    (`conf/method/dml.yaml`); around distillation from a teacher it is peer-to-peer mutual learning (Niyaz and Bathula, 2021,
    arXiv:2110.11023; `conf/method/p2p_mutual.yaml`); around a patient method it is mutual learning with a patient term.

    Terms: the inner method's, and
        `mutual`: the divergence from the peers, in nats, summed over classes, mean over the batch. Weight gamma.

    Args:
        inner: any method; `bind` has not been called.
        temperature: T' > 0 of the peer term, a number or a schedule; 1 in DML. The term is multiplied by T' squared,
            as in distillation (our choice; the peer-to-peer paper does not say).
        target: `each` averages over the peers; `sum` adds them up, as DML's own code does for more than two; `mean` takes the
            divergence from the peers' mean prediction (DML_e).
    """

    def __init__(self, inner: Method, temperature: "float | Schedule" = 1.0, target: str = "each") -> None:
        super().__init__()
        word(target, PEER_TARGETS, "cohort.peers.target")
        self.inner = inner
        self.names = (*inner.names, "mutual")
        self.teachers, self.uses_teachers = inner.teachers, inner.uses_teachers
        self.temperature = checked_temperature(temperature, "cohort.peers.temperature")
        self.target = target

    def bind(self, student: Encoder, teachers: Sequence[FrozenTeacher]) -> None:
        """Bind the inner method."""
        self.inner.bind(student, teachers)

    def needs(self) -> tuple[Needs, Sequence[Needs]]:
        """Return the needs of the inner method; the peers' logits need no declaration."""
        return self.inner.needs()

    def prepare(self, step: Step) -> Step:
        """Prepare the step as the inner method does."""
        return self.inner.prepare(step)

    def terms(self, step: Step) -> dict[str, Tensor]:
        """Return the inner method's terms and the term `mutual`."""
        own, temperature = step.student.outputs.logits, self.temperature(step.progress.fraction)
        peers = [peer.outputs.logits for peer in step.peers]
        if self.target == "mean":
            # The mean is taken of tempered probabilities; `soft` divides by the temperature again.
            peers = [step.task.ensemble([widened(logits) / temperature for logits in peers]) * temperature]
        terms = torch.stack([step.task.soft(own, logits, temperature, "kl", "batchmean") for logits in peers])
        return {**self.inner.terms(step), "mutual": terms.sum() if self.target == "sum" else terms.mean()}

    def after_step(self, step: Step, terms: Mapping[str, Tensor]) -> None:
        """Pass the inner method its terms after a batch."""
        self.inner.after_step(step, {name: terms[name] for name in self.inner.names})

    def batch_dependence(self) -> str:
        """Return the inner method's reason."""
        return self.inner.batch_dependence()

    def describe(self) -> dict[str, str]:
        """Return the inner method's description."""
        return self.inner.describe()
