"""Combinatorial knowledge distillation."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kd.forward import Needs, Outputs
from kd.forward.needs import Tap
from kd.functional import combination, layer_maps
from kd.functional.attention import probability_error
from kd.functional.hidden import at_least_float32
from kd.functional.logits import SOFT_LOSSES
from kd.methods.base import Bound, Method, Step
from kd.methods.features import STATES, tokens_of
from kd.methods.options import BATCH_MEANS, switch, temperature_schedule, word
from kd.schedules import Schedule

MAPS = {
    "rc": combination.regular,
    "oc": combination.overlap,
    "sc": combination.skip_middle,
    "cc": combination.ends,
    "skip_comb": combination.comb,
    "skip": combination.lasts,
}
SIDES = ("student", "teacher")
HIDDEN_MEANS = tuple(name for name in combination.REDUCTIONS if name not in ("sum", "none"))


class CKD(Method):
    r"""Why Skip If You Can Combine (Wu, Passban, Rezagholizadeh, Liu, EMNLP 2020, arXiv:2010.03034).

    :math:`L = (1 - \alpha - \beta) L_{hard} + \alpha L_{soft} + \beta L_{inter}`: each student layer j learns from the
    concatenation of a set M(j) of teacher layers,
    :math:`L_{inter} = \sum_i \sum_j \| n(P_j h_S^j) - n([h_T^k]_{k \in M(j)}) \|^2` over the tokens i, where n scales to unit
    length. The paper is about machine translation, and has no result for classifiers: the use for these is our adaptation.
    Authors' code consulted for facts: its `onmt/utils/loss.py` and `train_single.py`.

    Terms:
        `task`: the task's hard loss, without the authors' label smoothing. Weight 1 - alpha - beta, at least 0.
        `logits`: :math:`L_{soft}`, temperature squared times the divergence. Weight alpha.
        `hidden`: :math:`L_{inter}`. Weight beta.
        `attention`: only with `attention=true`. Weight theta, `+method.weights.attention=...`.

    Args:
        layers: M. `rc`, regular: consecutive groups; `oc`, overlap: each with one more layer of each neighbouring group; `sc`,
            skip: each without its layer that is nearest to the teacher's middle; `cc`, cross: first and last layer of a group;
            `skip_comb` (authors' code): every N-th layer; `skip`: the last layer of a group; or a list of
            [student layer, [teacher layer, ...]] with 0 the embeddings. The authors' code has them for 2 of 6 layers; what
            they are for other depths is our choice (`kd.functional.combination`), and so is the default.
        project: side with a learned linear map. `student` maps its state to the concatenation's width (authors' code);
            `teacher` fuses the concatenation, :math:`W [h_T^k] + b` (paper), to the student's width (our choice). A map on
            the teacher's side is trained to make the loss small too, so student and map may agree on a constant, which
            normalisation does not prevent; so `student` is the default.
        normalize: `concatenation` scales both sides' whole vectors (authors' code); `layers` scales each layer's part: for
            `project=teacher` each layer before the map, and both sides after it; `none` scales nothing.
        states: `tokens` (paper), every token's, or `cls`, the first token's, for models with different tokenizers.
        attention: whether attention maps are compared too: the mean over heads of student layer j with the mean over heads
            and layers of M(j), as a mean over pairs of real tokens (mean over M(j) and reduction are our choice).
        hidden_reduction: `examples` sums over width and layers and averages over an example's tokens, then over the examples
            (our choice: neither padding nor ranks matter); `tokens` averages over the tokens of the batch (authors' code, whose
            normaliser counts tokens of the translation). Otherwise as `examples`, `vectors` averages over layers, `layers` over
            width, `elements` over both, which is the mean squared error that the authors' README names.
        temperature: T > 0, a number or a schedule.
        loss: loss of the soft labels: `kl` (authors' code), `ce` or `mse`.
        reduction: reduction of the soft loss: `batchmean` or `elementmean`.

    There is one map for each entry of M. If widths are equal it is initialised as copies of the identity, on the teacher's side
    as the mean of the layers (our choice: the states of a student initialised with the teacher's layers are already in the
    teacher's space).
    """

    names: tuple[str, ...] = ("task", "logits", "hidden")
    # A student that equals its teacher has a state for each layer, not one that is several layers at once.
    distances = ("logits",)

    def __init__(
        self,
        layers: str | Sequence[Sequence[object]] = "rc",
        project: str = "student",
        normalize: str = "concatenation",
        states: str = "tokens",
        hidden_reduction: str = "examples",
        temperature: "float | Schedule" = 1.0,
        loss: str = "kl",
        reduction: str = "batchmean",
        *,
        attention: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(layers, str):
            word(layers, tuple(MAPS), "layers")
        self.layers = layers
        self.project = word(project, SIDES, "project")
        self.normalize = word(normalize, combination.NORMALIZATIONS, "normalize")
        self.states = word(states, tuple(STATES), "states")
        self.hidden_reduction = word(hidden_reduction, HIDDEN_MEANS, "hidden_reduction")
        self.temperature = temperature_schedule(temperature)
        self.loss = word(loss, SOFT_LOSSES, "loss")
        self.reduction = word(reduction, BATCH_MEANS, "reduction")
        self.attention = switch(attention, "attention")
        if attention:
            self.names = (*self.names, "attention")
        self.groups: layer_maps.Blocks = ()
        self.depths = (0, 0)
        self.projections = nn.ModuleList()

    def bind(self, bound: Bound) -> None:
        """Resolve the layer map, and create a linear map for each of its entries.

        Raises:
            InputError: for a layer map that does not suit the depths, or embeddings in it with `attention=true`.
        """
        student, teacher = bound.student, bound.teacher
        self.depths = (student.depth, teacher.depth)
        lowest = 1 if self.attention else 0
        self.groups = combination.resolve_groups(self.layers, MAPS, *self.depths, lowest=lowest)
        build = widening if self.project == "student" else fusion
        self.projections = nn.ModuleList(build(student.width, teacher.width, len(group)) for _, group in self.groups)

    def needs(self) -> tuple[Needs, Sequence[Needs]]:
        """Declare the states of the layers of the map, and their attention if it is compared."""
        ours, theirs = {layer for layer, _ in self.groups}, {layer for _, group in self.groups for layer in group}
        student, teacher = (Needs(taps=[Tap(STATES[self.states], layer) for layer in layers]) for layers in (ours, theirs))
        if self.attention:
            student, teacher = student | Needs(attention=ours), teacher | Needs(attention=theirs)
        return student, [teacher]

    def terms(self, step: Step) -> dict[str, Tensor]:
        """Return the loss terms listed in the class docstring."""
        student, teacher = step.student.outputs, step.teacher.outputs
        temperature = self.temperature(step.progress.fraction)
        squares = []
        for (layer, group), project in zip(self.groups, self.projections, strict=True):
            states, mask = tokens_of(student, layer, self.states)
            squares.append(self._squares(states, [tokens_of(teacher, other, self.states)[0] for other in group], project))
        terms = {
            "task": step.task.hard(student.logits, step.batch.labels),
            "logits": step.task.soft(student.logits, teacher.logits, temperature, self.loss, self.reduction),
            "hidden": combination.reduce_layers(squares, mask, self.hidden_reduction),
        }
        if self.attention:
            terms["attention"] = torch.stack([self._attention(student, teacher, *pair) for pair in self.groups]).sum()
        return terms

    def _squares(self, ours: Tensor, theirs: Sequence[Tensor], project: nn.Module) -> Tensor:
        target = combination.concatenate(theirs, normalize=self.project == "teacher" and self.normalize == "layers")
        if self.project == "teacher":
            return combination.combination_squares(ours, project(target.to(theirs[0].dtype)), self.normalize)
        return combination.combination_squares(project(ours), target, self.normalize, len(theirs))

    @staticmethod
    def _attention(student: Outputs, teacher: Outputs, layer: int, group: Sequence[int]) -> Tensor:
        ours = over_heads(student.attention(layer))
        theirs = torch.stack([over_heads(teacher.attention(other)) for other in group]).mean(dim=0)
        return probability_error(ours, theirs, student.mask)

    def layer_maps(self) -> Sequence[Mapping[str, Tensor]]:
        """Return the layer map, with equal weights of the layers that are concatenated for a student layer."""
        names = [name for name in self.names if name in ("hidden", "attention")]
        return [{name: layer_maps.block_matrix(self.groups, *self.depths) for name in names}]

    def describe(self) -> dict[str, str]:
        """Describe the layer map."""
        return {"layer map (student<-teacher)": layer_maps.describe_blocks(self.groups)}

    def batch_dependence(self) -> str | None:
        """Return that `hidden_reduction=tokens` averages over the tokens of a batch."""
        counted = self.hidden_reduction == "tokens" and self.states == "tokens"
        return "hidden_reduction=tokens is a mean over the tokens of a batch" if counted else None


def over_heads(attention: Tensor) -> Tensor:
    """Return the mean over heads, in float32 at least: (batch, heads, tokens, tokens) -> (batch, 1, tokens, tokens)."""
    return at_least_float32(attention).mean(dim=1, keepdim=True)


def widening(student: int, teacher: int, count: int) -> nn.Linear:
    """Return a learned linear map from the student's width to that of `count` teacher layers; copies of the identity."""
    linear = nn.Linear(student, count * teacher)
    if student == teacher:
        with torch.no_grad():
            linear.weight.copy_(torch.eye(student, device=linear.weight.device).repeat(count, 1))
        nn.init.zeros_(linear.bias)
    return linear


def fusion(student: int, teacher: int, count: int) -> nn.Linear:
    """Return a learned linear map from `count` concatenated teacher layers to the student's width; the mean of the layers."""
    linear = nn.Linear(count * teacher, student)
    if student == teacher:
        with torch.no_grad():
            linear.weight.copy_(torch.eye(student, device=linear.weight.device).repeat(1, count) / count)
        nn.init.zeros_(linear.bias)
    return linear
