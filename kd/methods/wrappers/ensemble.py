"""Weighted ensembles of teachers."""

from torch import Tensor

from kd.methods.base import Step
from kd.methods.wrappers.per_teacher import PerTeacher


class Ensemble(PerTeacher):
    r"""Distillation of a fixed weighted ensemble: :math:`\sum_i w_i L_i`, with :math:`L_i` the inner loss with teacher i.

    It is the baseline WKD of SKDBERT (Ding et al., AAAI 2023, arXiv:2211.14466, their table 5). For `ce` it equals the cross
    entropy against the weighted mean of the teachers' probabilities, because the cross entropy is linear in its target; for
    `kl` it differs from that by a constant, so the gradient is the same. It is not the mean of the teachers' logits. As a
    sum of losses it also applies to methods that compare layers.

    Terms: the inner method's, each averaged over teachers with these weights.

    Args:
        inner: a method of one teacher; `bind` has not been called.
        probabilities: one weight for each teacher, adding up to 1.
    """

    def prepare(self, step: Step) -> Step:
        """Return the step unchanged: `turn_terms` calls `prepare` of the inner method's copy for each teacher."""
        return step

    def turn_terms(self, index: int, step: Step) -> dict[str, Tensor]:
        """Return the weighted mean over teachers of each of the inner method's terms in a turn."""
        terms: dict[str, Tensor] = {}
        for weight, (inner, own) in zip(self.probabilities, self.parts(step), strict=True):
            inner_terms = inner.turns()[index].terms(inner.prepare(own))
            terms = {name: weight * term + terms.get(name, 0.0) for name, term in inner_terms.items()}
        return terms

    def describe(self) -> dict[str, str]:
        """Describe the weights of the teachers, and the inner method."""
        return {"weights of the teachers": " ".join(f"{p:.3f}" for p in self.probabilities), **super().describe()}
