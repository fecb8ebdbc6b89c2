"""Deep mutual learning: a wrapper that adds a loss against the peers' predictions to a method."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kd.functional.logits import widened
from kd.methods.base import Method, Step
from kd.methods.options import temperature_schedule, word
from kd.methods.wrappers.base import Wrapper
from kd.schedules import Schedule

PEER_TARGETS = ("each", "sum", "mean")


class Mutual(Wrapper):
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
        super().__init__(inner)
        word(target, PEER_TARGETS, "target")
        self.inner = inner
        self.names = (*inner.names, "mutual")
        self.distances = None if inner.distances is None else (*inner.distances, "mutual")
        self.temperature = temperature_schedule(temperature)
        self.target = target

    @property
    def inners(self) -> Sequence[Method]:
        """Inner method."""
        return [self.inner]

    def turn_terms(self, index: int, step: Step) -> dict[str, Tensor]:
        """Return the inner method's terms in a turn, and in the student's the term `mutual`."""
        terms = super().turn_terms(index, step)
        return terms if self.inner.turns()[index].parameters is not None else {**terms, "mutual": self.divergence(step)}

    def divergence(self, step: Step) -> Tensor:
        """Return the divergence from the peers' predictions."""
        own, temperature = step.student.outputs.logits, self.temperature(step.progress.fraction)
        peers = [peer.outputs.logits for peer in step.peers]
        if self.target == "mean":
            # The mean is taken of tempered probabilities; `soft` divides by the temperature again.
            peers = [step.task.ensemble([widened(logits) / temperature for logits in peers]) * temperature]
        terms = torch.stack([step.task.soft(own, logits, temperature, "kl", "batchmean") for logits in peers])
        return terms.sum() if self.target == "sum" else terms.mean()
