"""Distillation that reuses the teacher's classifier."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kd.errors import InputError
from kd.forward import Needs
from kd.functional import layer_maps
from kd.functional.hidden import PADDING, at_least_float32, token_error
from kd.functional.logits import SOFT_LOSSES
from kd.methods.base import Bound, Method, Step, projection
from kd.methods.options import BATCH_MEANS, temperature_schedule, whole, word
from kd.models import FrozenTeacher
from kd.schedules import Schedule

FEATURES = ("pooled", "cls", "tokens")


class Reused(nn.Module):
    """Learned linear maps to the teacher's width, followed by a frozen linear layer of the teacher.

    Args:
        layer: the layer whose weights are copied.
        project: the maps.
        rows: indices of the layer's outputs in their new order; None keeps the order.
    """

    def __init__(self, layer: nn.Linear, project: nn.Sequential, rows: Sequence[int] | None = None) -> None:
        super().__init__()
        self.project = project
        self.layer = nn.Linear(layer.in_features, layer.out_features, device=layer.weight.device, dtype=layer.weight.dtype)
        with torch.no_grad():
            self.layer.weight.copy_(layer.weight if rows is None else layer.weight[list(rows)])
            self.layer.bias.copy_(layer.bias if rows is None else layer.bias[list(rows)])
        self.layer.requires_grad_(False)

    def forward(self, states: Tensor) -> Tensor:
        """Apply the maps and the layer: (..., student's width) -> (..., outputs of the layer)."""
        outputs: Tensor = self.layer(self.project(states))
        return outputs

    @torch.no_grad()
    def plain(self) -> nn.Linear:
        """Return one linear layer with the same outputs: the product of all maps."""
        maps = [module for module in (*self.project, self.layer) if isinstance(module, nn.Linear)]
        weight, bias = maps[0].weight.double(), maps[0].bias.double()
        for following in maps[1:]:
            weight, bias = following.weight.double() @ weight, following.weight.double() @ bias + following.bias.double()
        folded = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=maps[0].weight.dtype)
        folded.weight.copy_(weight)
        folded.bias.copy_(bias)
        return folded


class SimKD(Method):
    r"""Knowledge distillation with the reused teacher classifier (Chen et al., CVPR 2022, arXiv:2203.14001), for BERT.

    :math:`L = \lVert P(f_s) - f_t \rVert^2` alone: the student's classifier is discarded, its features are projected to
    the teacher's, and predictions, in validation, evaluation and the exported model, come from the teacher's frozen classifier
    applied to the output of the projector P. The paper is about images, and has no result for text: everything below is our
    adaptation.
    Authors' code consulted for facts: DefangChen/SimKD, `models/util.py`.

    Terms:
        `feature`: the loss above, a mean over the elements of a vector and over the examples; of `tokens` over the tokens that
            `padding` names as well. The authors' code takes the mean over all elements of its feature maps. Weight 1.
        `task`, `logits`: hard and soft loss of the reused classifier's logits; the authors' switches -c and -d. Weights 0.

    Args:
        feature: `pooled`, the vector that the classifier reads, so that only the classifier is reused; `cls`, the last state
            of [CLS], or `tokens`, all last states, so that the teacher's pooler is reused too. The two latter need a student
            of the teacher's width: the pooler of a plain BERT is square.
        padding: reduction for `tokens`: `strict` averages over real tokens of an example, then over examples (our choice;
            images have no padding); `reference` averages over all elements, padding included, which is the authors' mean.
        factor: r; 1 is one linear map, larger values are two linear maps through the teacher's width / r, null is no projector,
            for a student of the teacher's width. The paper's projector is convolutions with ReLU, and r = 2.
        temperature: temperature of `logits`, T > 0, a number or a schedule. 4 in the authors' toolbox.
        loss: loss of `logits`: `kl`, `ce` or `mse`.
        reduction: reduction of `logits`: `batchmean` or `elementmean`.

    The projector is linear (our choice) because the product of linear maps and a classifier is a classifier: the export is a
    plain transformers model of the student's shape. With `pooled` the student's pooler, a linear layer and tanh (in
    DistilBERT ReLU), is the projector's nonlinear part. There is no ReLU at its end: features of BERT are signed. A single map
    is initialised as the identity if widths are equal (our choice). Dropout before the reused layers is off.
    """

    names = ("task", "logits", "feature")

    def __init__(
        self,
        feature: str = "pooled",
        factor: int | None = 1,
        temperature: "float | Schedule" = 4.0,
        loss: str = "kl",
        reduction: str = "batchmean",
        padding: str = "strict",
    ) -> None:
        super().__init__()
        self.feature = word(feature, FEATURES, "feature")
        self.padding = word(padding, PADDING, "padding")
        if padding != "strict" and feature != "tokens":
            raise InputError(
                f"padding={padding} is about the tokens of feature=tokens; feature={feature} has one vector for each example",
                "padding",
            )
        if factor is not None:
            whole(factor, "factor")
        self.factor = factor
        self.temperature = temperature_schedule(temperature)
        self.loss = word(loss, SOFT_LOSSES, "loss")
        self.reduction = word(reduction, BATCH_MEANS, "reduction")
        self.depths = (0, 0)

    def bind(self, bound: Bound) -> None:
        """Replace the student's last layers by the projector and the teacher's frozen layers.

        Raises:
            InputError: for models without a classifier, a teacher that is trained, several teachers, or widths or families that
                cannot be exported.
        """
        student, teacher = bound.student, bound.teacher
        if self.feature != "pooled" and student.width != teacher.width:
            raise InputError(
                f"feature={self.feature} reuses the teacher's pooler, which a plain model has at its own width only: "
                f"the student has {student.width}, the teacher {teacher.width}; use feature=pooled",
                "feature",
            )
        if self.factor is None and student.width != teacher.width:
            raise InputError(
                f"without a projector the student's width of {student.width} must be the teacher's, {teacher.width}",
                "factor",
            )
        if self.factor is not None and teacher.width % self.factor:
            raise InputError(f"factor={self.factor} does not divide the teacher's width of {teacher.width}", "factor")
        if not isinstance(teacher, FrozenTeacher):
            raise InputError(
                "method=simkd reuses the classifier of a teacher that stays as it is; use cohort.teacher=frozen",
                "cohort.teacher",
            )
        theirs = teacher.encoder
        if self.feature != "pooled" and student.config.model_type != theirs.config.model_type:
            raise InputError(
                f"feature={self.feature} reuses the teacher's pooler, and the families differ in what follows it: the "
                f"student is {student.config.model_type}, the teacher {theirs.config.model_type}; use feature=pooled",
                "feature",
            )
        if not student.classifies or not theirs.classifies:
            raise InputError("method=simkd reuses a teacher's classifier, and these models have none", "method")
        if isinstance(student.outputs, Reused):
            raise InputError("method=simkd reuses one teacher's classifier; use pool=none with one teacher", "pool")
        assert isinstance(theirs.outputs, nn.Linear)
        project, columns = projector(student.width, teacher.width, self.factor), teacher.columns
        if self.feature == "pooled":
            student.replace_submodule(student.family.outputs, Reused(theirs.outputs, project, columns))
        else:
            pooler = theirs.model.get_submodule(theirs.family.pooler)
            student.replace_submodule(student.family.pooler, Reused(pooler, project))
            student.replace_submodule(student.family.outputs, Reused(theirs.outputs, nn.Sequential(), columns))
        student.replace_submodule((student.family.outputs.rpartition(".")[0] + ".dropout").lstrip("."), nn.Identity())
        self.depths = (student.depth, teacher.depth)

    def needs(self) -> tuple[Needs, Sequence[Needs]]:
        """Declare the feature of student and teacher."""
        ours, theirs = (
            {
                "pooled": Needs(pooled=True),
                "cls": Needs(cls=[depth]),
                "tokens": Needs(hidden=[depth]),
            }[self.feature]
            for depth in self.depths
        )
        return ours, [theirs]

    def terms(self, step: Step) -> dict[str, Tensor]:
        """Return the distance of features, and the losses of the reused classifier's logits."""
        student, teacher = step.student.outputs, step.teacher.outputs
        encoder = step.student.model
        reused = encoder.model.get_submodule(encoder.family.outputs if self.feature == "pooled" else encoder.family.pooler)
        project = reused.project
        if self.feature == "tokens":
            ours = project(student.hidden(self.depths[0]))
            distance = token_error(ours, teacher.hidden(self.depths[1]), student.mask, self.padding)
        elif self.feature == "cls":
            distance = squared_distance(project(student.cls(self.depths[0])), teacher.cls(self.depths[1]))
        else:
            distance = squared_distance(project(student.pooled), teacher.pooled)
        temperature = self.temperature(step.progress.fraction)
        return {
            "task": step.task.hard(student.logits, step.batch.labels),
            "logits": step.task.soft(student.logits, teacher.logits, temperature, self.loss, self.reduction),
            "feature": distance,
        }

    def batch_dependence(self) -> str | None:
        """Return that a mean over padding depends on the batch, for `padding=reference`."""
        return "padding=reference averages over padding too" if self.padding == "reference" else None

    def layer_maps(self) -> Sequence[Mapping[str, Tensor]]:
        """Return the pair of last layers, unless `feature` is what the classifier reads."""
        return [{} if self.feature == "pooled" else {"feature": layer_maps.matrix((self.depths,), *self.depths)}]

    def describe(self) -> dict[str, str]:
        """Describe the layers that make predictions."""
        reused = "classifier" if self.feature == "pooled" else "pooler and classifier"
        return {"what predicts": f"the teacher's frozen {reused}, behind a learned linear map of the student's features"}


def projector(student: int, teacher: int, factor: int | None) -> nn.Sequential:
    """Build the linear maps from student to teacher width: one, or two through the teacher's width / factor, or none."""
    if factor is None:
        return nn.Sequential()
    if factor == 1:
        return nn.Sequential(projection(student, teacher))
    return nn.Sequential(nn.Linear(student, teacher // factor), nn.Linear(teacher // factor, teacher))


def squared_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of vectors (batch, width); no gradient flows to the teacher's."""
    student = at_least_float32(student)
    return nn.functional.mse_loss(student, teacher.detach().to(student.dtype))
