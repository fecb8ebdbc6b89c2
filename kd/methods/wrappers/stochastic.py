"""Stochastic knowledge distillation: one teacher of a pool, drawn for each optimiser step."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from kd.forward import Needs
from kd.methods.base import Method, Step
from kd.methods.wrappers.per_teacher import bind_each, copies, inner_of, needs_of_each
from kd.models import Encoder, FrozenTeacher


class Stochastic(Method):
    r"""Stochastic knowledge distillation (SKDBERT: Ding et al., AAAI 2023, arXiv:2211.14466), around a method of one teacher.

    At each optimiser step a teacher :math:`i \sim Cat(p_1 .. p_N)` is drawn and the step is the inner method's with that
    teacher alone. The paper's inner loss is the soft cross entropy (`conf/method/skdbert.yaml`); any method of one teacher
    can be used. Ranks and accumulated batches share the draw, a resumed run repeats it, and only the drawn teacher runs.

    In expectation the gradient for `ce` and `kl` is that of distilling the probability-averaged ensemble (`Ensemble`).

    Parameters of the inner method (projections) are learned for each teacher separately. Those of teachers that are not drawn
    are added to the loss with weight zero, so that every rank has a gradient for every parameter.

    Terms: the inner method's.

    Args:
        inner: a method of one teacher; `bind` has not been called.
        probabilities: one for each teacher, adding up to 1.
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

    def drawn(self, step: Step) -> int:
        """Return the index of the teacher of this step."""
        return int(step.rng("teacher").choice(len(self.each), p=self.probabilities))

    def prepare(self, step: Step) -> Step:
        """Return the step with the drawn teacher alone."""
        index = self.drawn(step)
        return inner_of(self.each, index).prepare(step.replace(teachers=[step.teachers[index]]))

    def terms(self, step: Step) -> dict[str, Tensor]:
        """Return the inner method's terms for the drawn teacher."""
        index = self.drawn(step)
        one = step if len(step.teachers) == 1 else step.replace(teachers=[step.teachers[index]])
        terms = inner_of(self.each, index).terms(one)
        idle = [p for other in self.each if other is not self.each[index] for p in other.parameters() if p.requires_grad]
        first = self.names[0]
        for parameter in idle:
            terms[first] = terms[first] + 0.0 * parameter.sum()
        return terms

    def after_step(self, step: Step, terms: Mapping[str, Tensor]) -> None:
        """Call `after_step` of the drawn teacher's copy."""
        inner_of(self.each, self.drawn(step)).after_step(step, terms)

    def batch_dependence(self) -> str:
        """Return the inner method's reason."""
        return inner_of(self.each, 0).batch_dependence()

    def describe(self) -> dict[str, str]:
        """Describe the distribution of teachers, and the inner method."""
        shown = " ".join(f"{p:.3f}" for p in self.probabilities)
        return {"teacher of a step, probabilities": shown, **inner_of(self.each, 0).describe()}
