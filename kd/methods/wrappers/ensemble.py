"""Weighted ensembles of teachers."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from kd.forward import Needs
from kd.methods.base import Method, Step
from kd.methods.wrappers.per_teacher import bind_each, copies, inner_of, needs_of_each
from kd.models import Encoder, FrozenTeacher


class Ensemble(Method):
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

    def __init__(self, inner: Method, probabilities: Sequence[float]) -> None:
        super().__init__()
        self.names, self.uses_teachers = inner.names, inner.uses_teachers
        self.teachers = len(probabilities)
        self.probabilities = list(probabilities)
        self.each = copies(inner, len(probabilities))

    def bind(self, student: Encoder, teachers: Sequence[FrozenTeacher]) -> None:
        """Bind one copy of the inner method to each teacher."""
        bind_each(self.each, student, teachers)

    def needs(self) -> tuple[Needs, Sequence[Needs]]:
        """Declare the union of what the copies read from the student, and from each teacher what its copy reads."""
        return needs_of_each(self.each)

    def terms(self, step: Step) -> dict[str, Tensor]:
        """Return the weighted mean over teachers of each of the inner method's terms."""
        terms: dict[str, Tensor] = {}
        for index, weight in enumerate(self.probabilities):
            inner = inner_of(self.each, index)
            inner_terms = inner.terms(inner.prepare(step.replace(teachers=[step.teachers[index]])))
            terms = {name: weight * term + terms.get(name, 0.0) for name, term in inner_terms.items()}
        return terms

    def after_step(self, step: Step, terms: Mapping[str, Tensor]) -> None:
        """Call `after_step` of every copy."""
        for index in range(len(self.each)):
            inner_of(self.each, index).after_step(step.replace(teachers=[step.teachers[index]]), terms)

    def batch_dependence(self) -> str:
        """Return the inner method's reason."""
        return inner_of(self.each, 0).batch_dependence()

    def describe(self) -> dict[str, str]:
        """Describe the weights of the teachers, and the inner method."""
        return {
            "weights of the teachers": " ".join(f"{p:.3f}" for p in self.probabilities),
            **inner_of(self.each, 0).describe(),
        }
