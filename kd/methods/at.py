"""Attention transfer."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kd.forward import Needs
from kd.functional import layer_maps
from kd.functional.activation import ACTIVATION_REDUCTIONS, activation_error
from kd.functional.logits import SOFT_LOSSES
from kd.methods.base import Bound, Method, Step
from kd.methods.features import Layers, checked_layers, needs_of, pairs_of
from kd.methods.options import BATCH_MEANS, number, temperature_schedule, word
from kd.schedules import Schedule

ACTIVATION_MEANS = tuple(name for name in ACTIVATION_REDUCTIONS if name != "none")
POWERS = (1.0, 8.0)
"""Lowest and highest power; at 8 the map is nearly that of the largest entry alone."""


class AT(Method):
    r"""Attention transfer (Zagoruyko and Komodakis, ICLR 2017, arXiv:1612.03928), with maps of activations.

    :math:`L = L_{task} + \frac \beta 2 \sum_j \lVert \hat Q_S^j - \hat Q_T^j \rVert_2` (eq. 2), where
    :math:`Q = \sum_c |h_c|^p` has one value for each position of an image, scaled to unit length for each image. The paper is
    about images: tokens in place of positions are our adaptation, and an example's map is that of its real tokens. It is not
    the attention of a Transformer, whose maps are compared by `kd.methods.tinybert.TinyBERT`. Authors' code consulted for
    facts: szagoruyko/attention-transfer, `cifar.py`.

    Terms:
        `task`: hard loss. Weight 1.
        `logits`: soft loss, temperature squared included for `kl`. Weight 0, as in the authors' code for maps
            alone; with its alpha it has both.
        `activation`: the sum over the pairs of layers, reduced as below. Weight beta, of which eq. 2 has half.

    Args:
        layers: pairs of layers: `stages` compares every student layer with the last one of an equal block of the teacher's (our
            choice, for the ends of the groups of a residual network); another map of `kd.functional.layer_maps.NAMED_FEW`; or a
            list of [student layer, teacher layer] with 0 the embeddings.
        power: p in [1, 8]. The paper has 1 and higher ones, the authors' code 2.
        activation_reduction: `elements` averages squared differences over the real tokens of an example (authors' code, a mean
            over images and positions); `squares` sums them over the tokens; `norm` is the norm of eq. 2. All are means over the
            examples. Squares of unit vectors of n tokens are of the order of 1 / n, and their mean of that of 1 / n squared,
            so that `elements` has less weight on long texts.
        temperature: T > 0, a number or a schedule. 4 in the authors' code.
        loss: loss of the soft labels: `kl`, `ce` or `mse`.
        reduction: reduction of the soft loss: `batchmean` or `elementmean`.

    The map of a text of one token is 1, whatever its states are. Widths may differ, and nothing is learned beside the student.
    """

    names = ("task", "logits", "activation")

    def __init__(
        self,
        layers: Layers = "stages",
        power: float = 2.0,
        activation_reduction: str = "elements",
        temperature: "float | Schedule" = 4.0,
        loss: str = "kl",
        reduction: str = "batchmean",
    ) -> None:
        super().__init__()
        self.layers = checked_layers(layers)
        self.power = number(power, "power", *POWERS)
        self.activation_reduction = word(activation_reduction, ACTIVATION_MEANS, "activation_reduction")
        self.temperature = temperature_schedule(temperature)
        self.loss = word(loss, SOFT_LOSSES, "loss")
        self.reduction = word(reduction, BATCH_MEANS, "reduction")
        self.pairs: layer_maps.Pairs = ()
        self.depths = (0, 0)

    def bind(self, bound: Bound) -> None:
        """Resolve the layer map.

        Raises:
            InputError: for a layer map that does not suit the depths.
        """
        self.pairs = pairs_of(self.layers, bound)
        self.depths = (bound.student.depth, bound.teacher.depth)

    def needs(self) -> tuple[Needs, Sequence[Needs]]:
        """Declare the states of the paired layers."""
        return needs_of("hidden", self.pairs)

    def terms(self, step: Step) -> dict[str, Tensor]:
        """Return the loss terms listed in the class docstring."""
        student, teacher = step.student.outputs, step.teacher.outputs
        temperature = self.temperature(step.progress.fraction)
        errors = [
            activation_error(student.hidden(ours), teacher.hidden(theirs), student.mask, self.power, self.activation_reduction)
            for ours, theirs in self.pairs
        ]
        return {
            "task": step.task.hard(student.logits, step.batch.labels),
            "logits": step.task.soft(student.logits, teacher.logits, temperature, self.loss, self.reduction),
            "activation": torch.stack(errors).sum(),
        }

    def layer_maps(self) -> Sequence[Mapping[str, Tensor]]:
        """Return the layer map."""
        return [{"activation": layer_maps.matrix(self.pairs, *self.depths)}]

    def describe(self) -> dict[str, str]:
        """Describe the layer map."""
        return {"layer map (student<-teacher)": layer_maps.describe(self.pairs)}
