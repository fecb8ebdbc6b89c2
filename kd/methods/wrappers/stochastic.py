"""Stochastic knowledge distillation: one teacher of a pool, drawn for each optimiser step."""

from collections.abc import Sequence

from torch import Tensor, nn

from kd.methods.base import Method, Step
from kd.methods.wrappers.per_teacher import PerTeacher


class Stochastic(PerTeacher):
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

    def drawn(self, step: Step) -> int:
        """Return the index of the teacher of this step."""
        return int(step.rng("teacher").choice(len(self.each), p=self.probabilities))

    def parts(self, step: Step) -> Sequence[tuple[Method, Step]]:
        """Return one pair: the inner method's copy for the drawn teacher, and the step with this teacher alone."""
        index = self.drawn(step)
        one = step if len(step.teachers) == 1 else step.replace(teachers=[step.teachers[index]])
        return [(self.inners[index], one)]

    def turn_terms(self, index: int, step: Step) -> dict[str, Tensor]:
        """Return the inner method's terms in a turn, for the drawn teacher."""
        terms, drawn = super().turn_terms(index, step), self.inners[self.drawn(step)]
        idle = [p for other in self.inners if other is not drawn for p in moved_by(other, index)]
        first = next(iter(terms))
        for parameter in idle:
            terms[first] = terms[first] + 0.0 * parameter.sum()
        return terms

    def describe(self) -> dict[str, str]:
        """Describe the distribution of teachers, and the inner method."""
        shown = " ".join(f"{p:.3f}" for p in self.probabilities)
        return {"teacher of a step, probabilities": shown, **super().describe()}


def moved_by(method: Method, index: int) -> list[nn.Parameter]:
    """Return the parameters of a method that move in the turn at this index."""
    turns = method.turns()
    given = {parameter for turn in turns for parameter in turn.parameters or ()}
    parameters = turns[index].parameters
    rest = [parameter for parameter in method.parameters() if parameter not in given]
    return [parameter for parameter in (rest if parameters is None else parameters) if parameter.requires_grad]
