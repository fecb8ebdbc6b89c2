"""Attention-based layer projection for knowledge distillation."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kd.forward import Needs
from kd.forward.needs import Tap
from kd.functional import combination, layer_maps
from kd.functional.logits import SOFT_LOSSES
from kd.methods.base import Bound, Method, Step, match_width
from kd.methods.epoch_mean import EpochMean
from kd.methods.features import STATES, tokens_of
from kd.methods.options import BATCH_MEANS, switch, temperature_schedule, word
from kd.schedules import Schedule
from kd.system import distributed

MAPS = {
    "all": combination.every,
    "no_overlap": combination.regular,
    "partial_overlap": combination.overlap,
}
HIDDEN_MEANS = tuple(name for name in combination.REDUCTIONS if name not in ("sum", "none"))


class ALPKD(Method):
    r"""ALP-KD (Passban, Wu, Rezagholizadeh, Liu, AAAI 2021, arXiv:2012.14022): attention over the teacher's layers.

    :math:`L = \beta L_{ce} + \eta L_{KD} + \lambda L_{ALP}`, with
    :math:`L_{ALP} = \sum_i \sum_j MSE(c_{S,i}^j, \sum_{k \in A(j)} \alpha_{jk} c_{T,i}^k)` over examples i and all student
    layers j, and :math:`\alpha_{jk}` the softmax over A(j) of :math:`c_S^j \cdot c_T^k`. Nothing is learned but the student.

    Terms:
        `task`: :math:`L_{ce}`. Weight beta.
        `logits`: :math:`L_{KD}`, eq. 2. Weight eta.
        `hidden`: :math:`L_{ALP}`. Weight lambda.

    Args:
        layers: A. `all` teacher layers without the embeddings (ALP-KD); `no_overlap`, consecutive buckets (ALP-NO);
            `partial_overlap`, buckets with one more layer of each neighbouring one (ALP-PO; how many is our choice); or a list
            of [student layer, [teacher layer, ...]] with 0 the embeddings. If depths do not divide we round down (our choice).
        states: `cls`, the first token's states, as in patient distillation (our choice: which the paper takes is unknown to
            us), or `tokens`, every token's, each with an attention of its own.
        scaled: divide dot products by the root of the width. The paper does not; those of [CLS] states are large, and the
            weights near 0 and 1.
        detach_attention: whether no gradient flows through the weights. Otherwise (the default: the paper trains end to end)
            the student may also lower the loss by the choice of the layers it attends to.
        hidden_reduction: `layers` averages over width and sums over layers, then averages over tokens and examples: the paper's
            loss divided by the batch. `elements` averages over width and layers, `vectors` over layers only, `examples` over
            neither; `tokens` sums as `examples` does and averages over the tokens of a batch.
        temperature: T > 0, a number or a schedule. The default is our choice: the paper's is unknown to us.
        loss: loss of the soft labels: `ce`, the cross entropy of eq. 2, without temperature squared (our choice: the paper's
            factor is unknown to us); `kl`, the divergence with it; or `mse`.
        reduction: reduction of the soft loss: `batchmean` or `elementmean`.

    The paper sums over the batch. We offer means over it, because a sum changes with ranks and accumulation.

    Dot products need one width. Where widths differ we learn one linear map for all layers from the student's width to the
    teacher's (our choice), and its result is what attends and what is compared.
    """

    names = ("task", "logits", "hidden")
    # A student that equals its teacher has one layer where the target is a mean of several.
    distances = ("logits",)

    def __init__(
        self,
        layers: str | Sequence[Sequence[object]] = "all",
        states: str = "cls",
        hidden_reduction: str = "layers",
        temperature: "float | Schedule" = 1.0,
        loss: str = "ce",
        reduction: str = "batchmean",
        *,
        scaled: bool = False,
        detach_attention: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(layers, str):
            word(layers, tuple(MAPS), "layers")
        self.layers = layers
        self.states = word(states, tuple(STATES), "states")
        self.hidden_reduction = word(hidden_reduction, HIDDEN_MEANS, "hidden_reduction")
        self.temperature = temperature_schedule(temperature)
        self.loss = word(loss, SOFT_LOSSES, "loss")
        self.reduction = word(reduction, BATCH_MEANS, "reduction")
        self.scaled = switch(scaled, "scaled")
        self.detach_attention = switch(detach_attention, "detach_attention")
        self.groups: layer_maps.Blocks = ()
        self.depths = (0, 0)
        self.attention = EpochMean()
        """Weights of the teacher layers of all groups, one group after the other."""
        self.attended: Tensor | None = None
        """The same of the last batch, until `after_step`."""
        self.project: nn.Module = nn.Identity()

    def bind(self, bound: Bound) -> None:
        """Resolve the buckets, and create the map between widths.

        Raises:
            InputError: for buckets that do not suit the depths.
        """
        student, teacher = bound.student, bound.teacher
        self.depths = (student.depth, teacher.depth)
        self.groups = combination.resolve_groups(self.layers, MAPS, *self.depths)
        self.attention = EpochMean(sum(len(group) for _, group in self.groups))
        self.project = match_width(student.width, teacher.width)

    def needs(self) -> tuple[Needs, Sequence[Needs]]:
        """Declare the states of the student's layers, and of all layers in their buckets."""
        ours, theirs = {layer for layer, _ in self.groups}, {layer for _, group in self.groups for layer in group}
        kind = STATES[self.states]
        return Needs(taps=[Tap(kind, layer) for layer in ours]), [Needs(taps=[Tap(kind, layer) for layer in theirs])]

    def terms(self, step: Step) -> dict[str, Tensor]:
        """Return the loss terms listed in the class docstring."""
        student, teacher = step.student.outputs, step.teacher.outputs
        temperature = self.temperature(step.progress.fraction)
        squares, attention = [], []
        for layer, group in self.groups:
            ours, mask = tokens_of(student, layer, self.states)
            theirs = [tokens_of(teacher, other, self.states)[0] for other in group]
            projected, layers = self.project(ours), torch.stack(theirs, dim=-2)
            weights = combination.layer_attention(projected, layers, scaled=self.scaled)
            target = combination.attended(weights.detach() if self.detach_attention else weights, layers)
            squares.append(combination.combination_squares(projected, target, "none"))
            attention.append(means_over_real(weights.detach(), mask))
        self.attended = torch.cat(attention)
        return {
            "task": step.task.hard(student.logits, step.batch.labels),
            "logits": step.task.soft(student.logits, teacher.logits, temperature, self.loss, self.reduction),
            "hidden": combination.reduce_layers(squares, mask, self.hidden_reduction),
        }

    def after_step(self, step: Step, terms: Mapping[str, Tensor]) -> None:
        """Add the weights of the batch to those of the epoch; under DDP they are those of the global batch."""
        if self.attended is None:
            return
        weight = self.attended.new_full((), step.batch.weight)
        weighted, weight = distributed.mean([self.attended * weight, weight])
        self.attention.add(weighted / weight, step.progress.epoch, weight)
        self.attended = None

    def layer_maps(self) -> Sequence[Mapping[str, Tensor]]:
        """Return the attention over the teacher's layers: its mean over tokens, examples and the batches of an epoch."""
        matrix = layer_maps.block_matrix((), *self.depths)
        pairs = [(layer, other) for layer, group in self.groups for other in group]
        for pair, weight in zip(pairs, self.attention.values.tolist(), strict=True):
            matrix[pair] = weight
        return [{"hidden": matrix}]

    def describe(self) -> dict[str, str]:
        """Describe the buckets."""
        return {"layer map (student<-teacher)": layer_maps.describe_blocks(self.groups)}

    def batch_dependence(self) -> str | None:
        """Return that `hidden_reduction=tokens` averages over the tokens of a batch."""
        counted = self.hidden_reduction == "tokens" and self.states == "tokens"
        return "hidden_reduction=tokens is a mean over the tokens of a batch" if counted else None


def means_over_real(values: Tensor, mask: Tensor) -> Tensor:
    """Return means over the real tokens of an example, and then over examples: (batch, tokens, layers) -> (layers,)."""
    totals = values.masked_fill(~mask[..., None], 0).sum(dim=1)
    return (totals / mask.sum(dim=1, keepdim=True)).mean(dim=0)
