"""Attribution-driven distillation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kd.errors import InputError
from kd.forward import Needs, Outputs
from kd.functional import attribution, layer_maps
from kd.functional.hidden import near_one
from kd.functional.logits import SOFT_LOSSES
from kd.methods.base import Bound, Method, Step
from kd.methods.options import BATCH_MEANS, temperature_schedule, whole, word
from kd.models.labels import reordered
from kd.schedules import Schedule

VIEWS = ("all", "gold")
ATTRIBUTION_MEANS = tuple(name for name in attribution.ATTRIBUTION_REDUCTIONS if name != "none")
ForwardPass = Callable[[Mapping[str, Tensor], Needs], Outputs]


def passes(
    run: ForwardPass, inputs: Mapping[str, Tensor], outputs: Outputs, steps: int, layer: int
) -> list[tuple[Tensor, Tensor]]:
    """Return logits and states of forward passes with a layer's states scaled by 1/m, 2/m, ..., 1; only the last is given.

    Args:
        run: function that runs a forward pass.
        inputs: inputs of the pass with unscaled states.
        outputs: outputs of that pass.
        steps: m.
        layer: layer of the states; 0 if there is more than one step.
    """
    whole = outputs.hidden(layer)
    results = []
    for step in range(1, steps):
        scaled = run({**inputs, "embedded": whole * (step / steps)}, outputs.needs.available_from(0))
        results.append((scaled.logits, scaled.hidden(layer)))
    return [*results, (outputs.logits, whole)]


@dataclass(frozen=True)
class TeacherMaps:
    """Function that computes a frozen teacher's attribution maps, (batch, tokens, views); see `attribution.token_maps`.

    Attributes:
        layer: layer whose states the decision is attributed to.
        steps: m of the integral.
        keep: K, number of entries of a token's attribution that count, the largest; None for all.
        target: the quantity that is attributed, one of `kd.functional.attribution.DIFFERENTIATED`.
        first: for two classes, the index in the teacher's label order of the class whose loss is attributed.
    """

    layer: int
    steps: int
    keep: int | None
    target: str
    first: int = 0

    @property
    def name(self) -> str:
        """Name that encodes everything that the maps depend on except the teacher and the text."""
        of = f"-class{self.first}" if self.first else ""
        return f"attributions-{self.target}-layer{self.layer}-m{self.steps}-k{self.keep or 'all'}{of}"

    def __call__(self, model: ForwardPass, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the maps of a batch of inputs."""
        with torch.enable_grad():
            outputs = model(inputs, Needs(hidden=[self.layer], gradient=True))
            results = passes(model, inputs, outputs, self.steps, self.layer)
            maps = attribution.token_maps(attribution.attributions(results, self.target, first=self.first), self.keep)
            # Maps may be cached in float16, whose smallest positive number is 6e-8. They are normalised when they are
            # compared, so a factor for each example makes no difference.
            return near_one(maps, dim=1)


MOST_STEPS = 1000
"""Largest number of steps of the integrated gradients; each step is one forward pass of both models."""


class ADKD(Method):
    r"""Attribution-driven knowledge distillation (Wu, Chen, Quan, Wang, Wang, ACL 2023, arXiv:2305.10010).

    :math:`L = (1 - \alpha) L_{ce} + \alpha L_{logit} + \beta L_{attr}`: beside logits, the student imitates which tokens drive
    each decision of the teacher. A token's attribution is the norm of its integrated gradients with respect to the embedding
    layer's output, for the teacher of their K largest entries only; maps are normalised over the tokens and compared for
    every class. Authors' code consulted for facts: brucewsy/AD-KD, `loss.py`, `glue_train.py`.

    Terms:
        `task`: :math:`L_{ce}`. Weight 1 - alpha.
        `logits`: :math:`L_{logit}`, the soft cross entropy, without T squared (authors' code). Weight alpha.
        `attribution`: :math:`L_{attr}`. Weight beta.

    Args:
        temperature: T > 0, a number or a schedule; the authors' `kd_anneal` is a `kd.schedules.Staircase` from T to 1 with as
            many steps as epochs.
        loss: loss of the soft labels: `ce`, `kl` or `mse`. For regression it is the mean squared error of scores; the authors'
            code divides both by T first, which is equivalent to a weight divided by T squared.
        reduction: reduction of the soft loss: `batchmean` (authors' code) or `elementmean`.
        steps: m of the integral. 1, the gradient times the input, in all published settings. Each further step is a further
            forward pass of the student, with new dropout masks; the gradient is taken at each scaled point, so that the
            attributions add up to the difference of F.
        topk: K, at most the teacher's width; null for all entries.
        target: `loss`, the negative log-probability of every class (authors' code; one class of two, because both views then
            coincide), or `logit`. For regression it is the score. The authors' code takes the loss with the gold label for two
            classes and for regression. It differs from ours by a factor for each example and step of the integral, which
            normalisation removes if there is one step; but their maps of a regression vanish if the residual is 0, ours do not.
        views: `all` compares the maps of all classes (multi-view), `gold` only that of an example's label (single view).
        layers: [student layer, teacher layer] whose states the decision is attributed to; [0, 0], the embeddings, is the
            method, others are its ablation, with one step.
        norm: p of the norm over tokens, 1 or 2.
        distance: distance of maps: `l2`, the square (authors' default), `l1`, `smooth_l1`.
        attribution_reduction: `examples` (our choice), `tokens` (authors' code: tokens of the whole batch, so that ranks
            matter) or `norm` (paper); see `kd.functional.attribution.map_error`.

    The student is differentiated twice. The teacher's maps are cached like its logits, so its gradients are computed once.
    """

    names = ("task", "logits", "attribution")

    def __init__(
        self,
        temperature: "float | Schedule" = 2.0,
        loss: str = "ce",
        reduction: str = "batchmean",
        steps: int = 1,
        topk: int | None = None,
        target: str = "loss",
        views: str = "all",
        layers: Sequence[int] = (0, 0),
        norm: float = 2,
        distance: str = "l2",
        attribution_reduction: str = "examples",
    ) -> None:
        super().__init__()
        self.temperature = temperature_schedule(temperature)
        self.loss = word(loss, SOFT_LOSSES, "loss")
        self.reduction = word(reduction, BATCH_MEANS, "reduction")
        whole(steps, "steps", 1, MOST_STEPS)
        if topk is not None:
            whole(topk, "topk")
        self.steps, self.topk = steps, topk
        if not isinstance(layers, Sequence) or len(layers) != 2 or not all(type(layer) is int for layer in layers):
            raise InputError(f"layers={layers} is not a pair [student layer, teacher layer]", "layers")
        self.layers = (layers[0], layers[1])
        if steps > 1 and self.layers != (0, 0):
            raise InputError(
                f"steps={steps} scales the embeddings' output; with layers={list(layers)} use steps=1",
                "steps",
            )
        self.target = word(target, attribution.DIFFERENTIATED, "target")
        if isinstance(norm, bool) or norm not in (1, 2):
            raise InputError(f"norm={norm} must be 1 or 2", "norm")
        self.norm = float(norm)
        self.views = word(views, VIEWS, "views")
        self.distance = word(distance, attribution.DISTANCES, "distance")
        if attribution_reduction == "norm" and distance != "l2":
            raise InputError("attribution_reduction=norm is the Euclidean norm; with it, use distance=l2", "distance")
        self.attribution_reduction = word(attribution_reduction, ATTRIBUTION_MEANS, "attribution_reduction")
        self.columns: list[int] | None = None
        self.depths = (0, 0)

    def bind(self, bound: Bound) -> None:
        """Check K and the layers, and read the order of the teacher's classes.

        Raises:
            InputError: if K exceeds the teacher's width, a model lacks a layer, or the student is not a classifier.
        """
        student, teacher = bound.student, bound.teacher
        if self.topk is not None and self.topk > teacher.width:
            raise InputError(f"topk={self.topk} is more than the teacher's width of {teacher.width}; null keeps all", "topk")
        for layer, depth, whose in ((self.layers[0], student.depth, "student"), (self.layers[1], teacher.depth, "teacher")):
            if not 0 <= layer < depth:
                raise InputError(
                    f"layers={list(self.layers)}: the {whose}'s decisions are attributed to layers 0 (embeddings) to "
                    f"{depth - 1}",
                    "layers",
                )
        if not student.classifies:
            raise InputError("method=ad_kd attributes the decisions of a classifier, and this student has none", "method")
        self.columns = getattr(teacher, "columns", None)
        self.depths = (student.depth, teacher.depth)

    @property
    def maps(self) -> TeacherMaps:
        """Function that computes the teacher's maps."""
        # With one step the maps of two classes are equal after normalisation, so the order does not matter.
        reversed_pair = self.steps > 1 and self.target == "loss" and self.columns == [1, 0]
        return TeacherMaps(self.layers[1], self.steps, self.topk, self.target, int(reversed_pair))

    def needs(self) -> tuple[Needs, Sequence[Needs]]:
        """Declare the student's states, for differentiation, and the teacher's maps."""
        return Needs(hidden=[self.layers[0]], gradient=True), [Needs(derived={self.maps.name: self.maps})]

    def terms(self, step: Step) -> dict[str, Tensor]:
        """Return the three losses."""
        student, teacher = step.student.outputs, step.teacher.outputs
        temperature = self.temperature(step.progress.fraction)
        results = passes(step.student.run, step.student.inputs, student, self.steps, self.layers[0])
        ours = attribution.token_maps(attribution.attributions(results, self.target, create_graph=True))
        theirs = teacher.derived(self.maps.name)
        if self.columns is not None and theirs.shape[-1] == len(self.columns):
            theirs = reordered(theirs, self.columns)
        if self.views == "gold" and theirs.shape[-1] > 1:
            ours, theirs = (view_of(maps, step.batch.labels) for maps in (ours, theirs))
        return {
            "task": step.task.hard(student.logits, step.batch.labels),
            "logits": step.task.soft(student.logits, teacher.logits, temperature, self.loss, self.reduction),
            "attribution": attribution.map_error(
                ours, theirs, student.mask, self.distance, self.norm, self.attribution_reduction
            ),
        }

    def layer_maps(self) -> Sequence[Mapping[str, Tensor]]:
        """Return the pair of layers that decisions are attributed to."""
        return [{"attribution": layer_maps.matrix((self.layers,), *self.depths)}]

    def batch_dependence(self) -> str | None:
        """Return that `attribution_reduction=tokens` averages over the tokens of a batch."""
        counted = self.attribution_reduction == "tokens"
        return "attribution_reduction=tokens is a mean over the tokens of a batch" if counted else None

    def label_dependence(self) -> str | None:
        """Return that `views=gold` compares the maps of the labels."""
        return "views=gold compares attribution maps of the labels" if self.views == "gold" else None


def view_of(maps: Tensor, labels: Tensor) -> Tensor:
    """Select the maps of the labels: (batch, tokens, classes) -> (batch, tokens, 1)."""
    return maps.gather(-1, labels[:, None, None].expand(-1, maps.shape[1], 1))
