"""Patient knowledge distillation."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kd.errors import InputError
from kd.forward import Needs
from kd.functional import hidden, layer_maps
from kd.functional.logits import SOFT_LOSSES
from kd.methods.base import Bound, Method, Step, match_width
from kd.methods.options import BATCH_MEANS, switch, temperature_schedule, word
from kd.schedules import Schedule

HIDDEN_MEANS = tuple(name for name in hidden.HIDDEN_REDUCTIONS if name not in ("sum", "none"))


class PKD(Method):
    r"""Patient knowledge distillation (Sun, Cheng, Gan, Liu, EMNLP-IJCNLP 2019, arXiv:1908.09355), eq. 7-8.

    :math:`L = (1 - \alpha) L_{CE} + \alpha L_{DS} + \beta L_{PT}`: fine-tuning, soft labels, and the [CLS] states of all
    student layers but the last pulled to chosen teacher layers. Authors' code consulted for facts:
    intersun/PKD-for-BERT-Model-Compression, `src/KD_loss.py`.

    Terms:
        `task`: :math:`L_{CE}`. Weight 1 - alpha.
        `logits`: :math:`L_{DS}`. Weight alpha.
        `hidden`: :math:`L_{PT}`. Weight beta.

    Args:
        layers: `skip` (every k-th teacher layer), `last` (the layers below the teacher's last), `uniform`, `proportional` (at
            equal fractions of the depths, as in Pea-KD), or a list of [student layer, teacher layer] with 0 the embeddings;
            the last layer is allowed there.
        temperature: T > 0, a number or a schedule.
        normalize: scale [CLS] to unit length. Eq. 7 does; in the authors' code it is a switch, and four of their seven
            best runs have it off.
        loss: loss of the soft labels. The paper uses the cross entropy (`ce`); the authors' code takes the divergence times
            T squared (`kl`, the default).
        reduction: reduction of the soft loss. The default `elementmean` is that of the authors' code, so the alphas they
            publish apply; `batchmean` is the divergence proper.
        hidden_reduction: reduction of the patience term. The default `elements` is that of the authors' code, so the betas they
            publish apply; `vectors` averages over batch and layers only; `examples` averages over the batch only, which is
            eq. 7 divided by the batch size.

    The paper sums its terms over the batch. We offer means over the batch only, because a sum changes with the number of
    ranks and of accumulated batches; the weight times the batch size gives the sum.

    The paper needs student and teacher of one width. Where widths differ we learn one linear map for all pairs from the
    student's width to the teacher's (our choice).
    """

    names = ("task", "logits", "hidden")

    def __init__(
        self,
        layers: str | Sequence[Sequence[int]] = "skip",
        temperature: "float | Schedule" = 10.0,
        *,
        normalize: bool = True,
        loss: str = "kl",
        reduction: str = "elementmean",
        hidden_reduction: str = "elements",
    ) -> None:
        super().__init__()
        self.layers = layers
        self.temperature = temperature_schedule(temperature)
        self.normalize = switch(normalize, "normalize")
        self.loss = word(loss, SOFT_LOSSES, "loss")
        self.reduction = word(reduction, BATCH_MEANS, "reduction")
        self.hidden_reduction = word(hidden_reduction, HIDDEN_MEANS, "hidden_reduction")
        self.pairs: layer_maps.Pairs = ()
        self.depths = (0, 0)
        self.project: nn.Module = nn.Identity()

    def bind(self, bound: Bound) -> None:
        """Resolve the layer map, and create the map between widths.

        Raises:
            InputError: for a layer map that does not suit the depths, or that has no pairs.
        """
        student, teacher = bound.student, bound.teacher
        self.depths = (student.depth, teacher.depth)
        self.pairs = layer_maps.resolve(self.layers, *self.depths)
        if not self.pairs:
            raise InputError(
                f"the layer map '{self.layers}' leaves a student of {student.depth} layer(s) nothing to match: it passes "
                "over the last layer. Give pairs, as [[1, 2]], or use more layers",
                "layers",
            )
        self.project = match_width(student.width, teacher.width)

    def needs(self) -> tuple[Needs, Sequence[Needs]]:
        """Declare the [CLS] states of the paired layers."""
        return Needs(cls=[ours for ours, _ in self.pairs]), [Needs(cls=[theirs for _, theirs in self.pairs])]

    def terms(self, step: Step) -> dict[str, Tensor]:
        """Return the terms of eq. 8."""
        student, teacher = step.student.outputs, step.teacher.outputs
        temperature = self.temperature(step.progress.fraction)
        ours = torch.stack([student.cls(layer) for layer, _ in self.pairs], dim=1)
        theirs = torch.stack([teacher.cls(layer) for _, layer in self.pairs], dim=1)
        return {
            "task": step.task.hard(student.logits, step.batch.labels),
            "logits": step.task.soft(student.logits, teacher.logits, temperature, self.loss, self.reduction),
            "hidden": hidden.patience(self.project(ours), theirs, normalize=self.normalize, reduction=self.hidden_reduction),
        }

    def layer_maps(self) -> Sequence[Mapping[str, Tensor]]:
        """Return the layer map."""
        return [{"hidden": layer_maps.matrix(self.pairs, *self.depths)}]

    def describe(self) -> dict[str, str]:
        """Describe the layer map."""
        return {"layer map (student<-teacher)": layer_maps.describe(self.pairs)}
