"""Relational knowledge distillation."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kd.forward import Needs
from kd.functional.geometry import angle_error, distance_error
from kd.functional.logits import SOFT_LOSSES
from kd.methods.base import Bound, Method, Step
from kd.methods.features import Features, Layers
from kd.methods.options import BATCH_MEANS, temperature_schedule, whole, word
from kd.schedules import Schedule

FEWEST = 3
"""Examples of an angle."""


class RKD(Method):
    r"""Relational knowledge distillation (Park, Kim, Lu, Cho, CVPR 2019, arXiv:1904.05068).

    :math:`L = L_{task} + \lambda_D L_{RKD-D} + \lambda_A L_{RKD-A}`: Huber losses between the distances of all pairs of
    examples, divided by their mean, and between the angles of all triplets. A weight of 0 gives RKD-D or RKD-A. The paper is
    about images. Authors' code consulted for facts: lenscloth/RKD, `metric/loss.py` and `metric/utils.py`.

    Terms:
        `task`: hard loss. Weight 1.
        `logits`: soft loss, temperature squared included for `kl`. Weight 0: the paper has it in some comparisons.
        `distance`: :math:`L_{RKD-D}`, a mean over all pairs, as in the authors' code. Weight lambda_D.
        `angle`: :math:`L_{RKD-A}`, a mean over all triplets, as in the authors' code. Weight lambda_A.

    Args:
        feature: vectors of the examples, our adaptation to text: `cls`, a layer's first state; `mean`, the mean of a layer's
            states over an example's real tokens; `pooled`, the input of the last linear layer; or `logits`. The paper has the
            final embedding, or the last feature.
        layers: pairs of layers, of which `cls` and `mean` are: `final`, the last ones; another map of
            `kd.functional.layer_maps.NAMED_FEW`; or a list of [student layer, teacher layer] with 0 the embeddings. Losses of
            several pairs are added.
        most: largest number of examples whose angles are compared, at least 3, because memory grows with its cube; null for all
            of the batch (authors' code). Of a larger batch others are drawn in each step, the same whatever the number of ranks
            (our choice).
        temperature: T > 0, a number or a schedule.
        loss: loss of the soft labels: `kl`, `ce` or `mse`.
        reduction: reduction of the soft loss: `batchmean` or `elementmean`.

    Examples are those of the global batch, so that ranks change nothing; accumulated batches are not joined. Distances and
    angles have no scale, so that widths may differ and nothing is learned beside the student. Equal examples have a distance of
    0 and no angle; in the authors' code it is 1e-6 before division by the mean.
    """

    names = ("task", "logits", "distance", "angle")
    across_ranks = True

    def __init__(
        self,
        feature: str = "cls",
        layers: Layers = "final",
        most: int | None = 64,
        temperature: "float | Schedule" = 4.0,
        loss: str = "kl",
        reduction: str = "batchmean",
    ) -> None:
        super().__init__()
        self.features = Features(feature, layers)
        self.most = None if most is None else whole(most, "most", FEWEST)
        self.temperature = temperature_schedule(temperature)
        self.loss = word(loss, SOFT_LOSSES, "loss")
        self.reduction = word(reduction, BATCH_MEANS, "reduction")

    def bind(self, bound: Bound) -> None:
        """Resolve the layer map.

        Raises:
            InputError: for a layer map that does not suit the depths, or a feature that the models or the task do not have.
        """
        self.features.bind(bound)

    def needs(self) -> tuple[Needs, Sequence[Needs]]:
        """Declare the features."""
        return self.features.needs()

    def terms(self, step: Step) -> dict[str, Tensor]:
        """Return the loss terms listed in the class docstring."""
        student, teacher = step.student.outputs, step.teacher.outputs
        temperature = self.temperature(step.progress.fraction)
        rows = [tuple(map(step.across, pair)) for pair in self.features.of(student, teacher)]
        chosen = self._drawn(step, len(rows[0][0]))
        return {
            "task": step.task.hard(student.logits, step.batch.labels),
            "logits": step.task.soft(student.logits, teacher.logits, temperature, self.loss, self.reduction),
            "distance": torch.stack([distance_error(ours, theirs) for ours, theirs in rows]).sum(),
            "angle": torch.stack([angle_error(ours[chosen], theirs[chosen]) for ours, theirs in rows]).sum(),
        }

    def _drawn(self, step: Step, count: int) -> Tensor | slice:
        """Return the indices of the examples whose angles are compared, among the `count` of the global batch."""
        if self.most is None or count <= self.most:
            return slice(None)
        return step.across(step.draws("angles", 1))[:, 0].topk(self.most, largest=False).indices

    def layer_maps(self) -> Sequence[Mapping[str, Tensor]]:
        """Return the layer map, if there is one."""
        matrix = self.features.layer_map()
        return [{} if matrix is None else {"distance": matrix, "angle": matrix}]

    def describe(self) -> dict[str, str]:
        """Describe the layer map."""
        return self.features.describe()

    def batch_dependence(self) -> str:
        """Return that distances and angles are of the examples of a batch."""
        return "distances and angles are of the examples of a batch with each other"
