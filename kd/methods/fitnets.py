"""Hints: states of a middle layer of the teacher."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kd.forward import Needs
from kd.functional import layer_maps
from kd.functional.activation import HINT_REDUCTIONS, hint_error
from kd.functional.logits import SOFT_LOSSES
from kd.methods.base import Bound, Method, Step, freeze_above, projection
from kd.methods.features import STATES, Layers, checked_layers, needs_of, pairs_of, tokens_of
from kd.methods.options import BATCH_MEANS, switch, temperature_schedule, word
from kd.schedules import Schedule

HINT_MEANS = tuple(name for name in HINT_REDUCTIONS if name != "none")


class FitNets(Method):
    r"""FitNets: hints for thin deep nets (Romero, Ballas, Kahou, Chassang, Gatta, Bengio, ICLR 2015, arXiv:1412.6550).

    A regressor r of the student's guided layer predicts the teacher's hint layer,
    :math:`L_{HT} = \frac 1 2 \lVert u_h - r(v_g) \rVert^2` (eq. 3). The paper is about images, and has two stages: the
    student up to the guided layer is trained on :math:`L_{HT}` alone, and then the whole student on labels and soft labels
    (eq. 2). Both are `conf/method/fitnets_stages.yaml`. In one run all terms are trained together, as in the benchmark of
    RepDistiller (`train_student.py` and its scripts consulted for facts), which compares it with other methods. States of
    tokens in place of feature maps are our adaptation.

    Terms:
        `task`: hard loss. Weight 1.
        `logits`: soft loss, temperature squared included for `kl`. Weight 0 in one run, as in RepDistiller.
        `hidden`: :math:`\lVert u_h - r(v_g) \rVert^2`, reduced as below; the factor of 1/2 belongs to its weight.

    Args:
        layers: guided and hint layer: `middle` (paper), or another map of `kd.functional.layer_maps.NAMED_FEW`, or a list of
            [student layer, teacher layer] with 0 the embeddings. Several pairs have a regressor each, and their losses are
            added (our choice: the paper has one hint).
        states: `tokens`, every token's (our choice: a feature map has all positions); or `cls`, the first token's, for models
            with different tokenizers.
        hidden_reduction: `elements` averages over width and an example's real tokens, then over the examples (RepDistiller has
            the mean over all elements); `vectors` sums over width; `examples` sums over width and tokens (eq. 3).
        hints_only: whether `hidden` is the only term, for the paper's first stage. Layers above the highest guided one and the
            head, which it does not reach, are then frozen.
        temperature: T > 0, a number or a schedule.
        loss: loss of the soft labels: `kl`, `ce` (eq. 2) or `mse`.
        reduction: reduction of the soft loss: `batchmean` or `elementmean`.

    The regressor is a linear map of each token, the paper's for layers without convolutions. Its nonlinearity, which is that of
    the hint layer, is left out, because states are outputs of a LayerNorm. It is initialised as the identity if widths are
    equal (our choice).
    """

    names: tuple[str, ...] = ("task", "logits", "hidden")

    def __init__(
        self,
        layers: Layers = "middle",
        states: str = "tokens",
        hidden_reduction: str = "elements",
        temperature: "float | Schedule" = 4.0,
        loss: str = "kl",
        reduction: str = "batchmean",
        *,
        hints_only: bool = False,
    ) -> None:
        super().__init__()
        self.layers = checked_layers(layers)
        self.states = word(states, tuple(STATES), "states")
        self.hidden_reduction = word(hidden_reduction, HINT_MEANS, "hidden_reduction")
        self.temperature = temperature_schedule(temperature)
        self.loss = word(loss, SOFT_LOSSES, "loss")
        self.reduction = word(reduction, BATCH_MEANS, "reduction")
        self.hints_only = switch(hints_only, "hints_only")
        if hints_only:
            self.names = ("hidden",)
        self.pairs: layer_maps.Pairs = ()
        self.depths = (0, 0)
        self.regressors = nn.ModuleList()

    def bind(self, bound: Bound) -> None:
        """Resolve the layer map, build a regressor for each pair, and freeze what hints alone do not reach.

        Raises:
            InputError: for a layer map that does not suit the depths.
        """
        self.pairs = pairs_of(self.layers, bound)
        self.depths = (bound.student.depth, bound.teacher.depth)
        if self.hints_only:
            freeze_above(bound.student, max(layer for layer, _ in self.pairs))
        self.regressors = nn.ModuleList(projection(bound.student.width, bound.teacher.width) for _ in self.pairs)

    def needs(self) -> tuple[Needs, Sequence[Needs]]:
        """Declare the states of guided and hint layers."""
        return needs_of(STATES[self.states], self.pairs)

    def terms(self, step: Step) -> dict[str, Tensor]:
        """Return the loss terms listed in the class docstring."""
        student, teacher = step.student.outputs, step.teacher.outputs
        hints = []
        for (ours, theirs), regressor in zip(self.pairs, self.regressors, strict=True):
            states, mask = tokens_of(student, ours, self.states)
            hint, _ = tokens_of(teacher, theirs, self.states)
            hints.append(hint_error(regressor(states), hint, mask, self.hidden_reduction))
        hidden = {"hidden": torch.stack(hints).sum()}
        if self.hints_only:
            return hidden
        temperature = self.temperature(step.progress.fraction)
        return {
            "task": step.task.hard(student.logits, step.batch.labels),
            "logits": step.task.soft(student.logits, teacher.logits, temperature, self.loss, self.reduction),
            **hidden,
        }

    def layer_maps(self) -> Sequence[Mapping[str, Tensor]]:
        """Return the layer map."""
        return [{"hidden": layer_maps.matrix(self.pairs, *self.depths)}]

    def describe(self) -> dict[str, str]:
        """Describe the layer map."""
        return {"layer map (guided<-hint)": layer_maps.describe(self.pairs)}
