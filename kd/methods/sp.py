"""Similarity-preserving distillation."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kd.forward import Needs
from kd.functional.geometry import similarity_error
from kd.functional.logits import SOFT_LOSSES
from kd.methods.base import Bound, Method, Step
from kd.methods.features import Features, Layers
from kd.methods.options import BATCH_MEANS, temperature_schedule, word
from kd.schedules import Schedule


class SP(Method):
    r"""Similarity-preserving knowledge distillation (Tung and Mori, ICCV 2019, arXiv:1907.09682).

    :math:`L = L_{task} + \gamma \frac 1 {b^2} \sum_{(l, l')} \lVert \tilde G_T^{l} - \tilde G_S^{l'} \rVert_F^2`, where
    :math:`G = F F^T` has the similarities of all pairs of the b examples of a batch, and each row of :math:`\tilde G` has unit
    length: pairs that are similar to the teacher shall be similar to the student. The paper is about images. RepDistiller's
    `distiller_zoo/SP.py` and `train_student.py`, consulted for facts, have the last feature map, flattened, as F.

    Terms:
        `task`: hard loss. Weight 1.
        `logits`: soft loss, temperature squared included for `kl`. Weight 0: the paper has none.
        `similarity`: the sum over the pairs of layers. Weight gamma, 3000 in the paper.

    Args:
        feature: rows of F, our adaptation to text: `cls`, a layer's first state; `mean`, the mean of a layer's states over an
            example's real tokens; `pooled`, the input of the last linear layer; or `logits`. Flattened states would compare the
            n-th token of a text with the n-th of another one, and are not offered.
        layers: pairs of layers, of which `cls` and `mean` are: `final`, the last ones; another map of
            `kd.functional.layer_maps.NAMED_FEW`; or a list of [student layer, teacher layer] with 0 the embeddings.
        temperature: T > 0, a number or a schedule.
        loss: loss of the soft labels: `kl`, `ce` or `mse`.
        reduction: reduction of the soft loss: `batchmean` or `elementmean`.

    Examples are those of the global batch, so that ranks change nothing. The value falls with the size of the batch, of which
    the weight has to be a function; accumulated batches are not joined.
    """

    names = ("task", "logits", "similarity")
    across_ranks = True

    def __init__(
        self,
        feature: str = "cls",
        layers: Layers = "final",
        temperature: "float | Schedule" = 4.0,
        loss: str = "kl",
        reduction: str = "batchmean",
    ) -> None:
        super().__init__()
        self.features = Features(feature, layers)
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
        return {
            "task": step.task.hard(student.logits, step.batch.labels),
            "logits": step.task.soft(student.logits, teacher.logits, temperature, self.loss, self.reduction),
            "similarity": torch.stack([similarity_error(ours, theirs) for ours, theirs in rows]).sum(),
        }

    def layer_maps(self) -> Sequence[Mapping[str, Tensor]]:
        """Return the layer map, if there is one."""
        matrix = self.features.layer_map()
        return [{} if matrix is None else {"similarity": matrix}]

    def describe(self) -> dict[str, str]:
        """Describe the layer map."""
        return self.features.describe()

    def batch_dependence(self) -> str:
        """Return that similarities are of the examples of a batch."""
        return "similarities are of the examples of a batch with each other"
