"""Distillation from several teachers, each weighted by its own error."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kd.errors import InputError
from kd.forward import Needs
from kd.forward.needs import Tap
from kd.functional import layer_maps
from kd.functional.hidden import PADDING, at_least_float32, mean_over_real
from kd.functional.logits import SOFT_LOSSES
from kd.methods import by_teacher
from kd.methods.base import ANY_TEACHERS, Bound, Method, Step
from kd.methods.features import STATES, tokens_of
from kd.methods.options import switch, temperature_schedule, word
from kd.schedules import Schedule

WEIGHTS = ("error", "uniform")
SIDES = ("teacher", "student")


class MTBERT(Method):
    r"""One Teacher is Enough? (MT-BERT: Wu, Wu, Huang, Findings of ACL-IJCNLP 2021, arXiv:2106.01023), the student's side.

    :math:`L = L_{Hid} + L_{Dis} + CE(y, y_S)` with N teachers,
    :math:`L_{Dis} = \sum_i CE(y_i / T, y_S / T) / (1 + CE(y, y_i))`, whose weights are constants of each example and do not add
    up to 1, and :math:`L_{Hid} = \sum_i \sum_j MSE(H_S^j, W_{ij} H_i^{g(j)})` over the student's layers j. There is no code of
    the authors; the formula of :math:`L_{Dis}` is as SKDBERT's supplement gives it (arXiv:2211.14466). The paper's teachers are
    fine-tuned together, on the sum of their losses, with a shared pooling and prediction layer, as those of
    `teacher=[joint_6l,joint_4l]` are (`kd.build.sharing`); the default ones here are fine-tuned each by itself (our choice).

    Terms, of weight 1 each:
        `task`: the task's hard loss.
        `logits`: :math:`L_{Dis}`, without temperature squared, mean over the batch.
        `hidden`: :math:`L_{Hid}`, a mean over tokens and width for each layer.

    Args:
        layers: g: `uniform` from layer 1 on, `skip`, `last`, or a list of [student layer, teacher layer], for each teacher.
        project: side with the learned linear maps, one for each teacher and layer, without bias: `teacher` (paper, as far as
            known) or `student`. If widths are equal a map starts as the identity (our choice).
        states: `tokens`, every token's, or `cls`, the first token's, for teachers with other tokenizers (the paper does not say
            how its RoBERTa and BERT teachers are aligned).
        padding: `strict` averages over real tokens of an example, then over examples (our choice); `reference` over all.
        weighting: weights of the teachers in `logits`: `error` (paper), or `uniform`, 1 / N each, its ablation.
        normalize_weights: scale an example's weights to add up to 1 (our option; the paper's sum grows with N).
        temperature: T > 0, a number or a schedule. Not published.
        loss: loss of the soft labels: `ce` (paper), `kl` or `mse`.
    """

    names = ("task", "logits", "hidden")
    teachers = ANY_TEACHERS

    def __init__(
        self,
        layers: str | Sequence[Sequence[int]] = "uniform",
        project: str = "teacher",
        states: str = "tokens",
        padding: str = "strict",
        weighting: str = "error",
        temperature: "float | Schedule" = 1.0,
        loss: str = "ce",
        *,
        normalize_weights: bool = False,
    ) -> None:
        super().__init__()
        self.layers = layers
        self.project = word(project, SIDES, "project")
        self.states = word(states, tuple(STATES), "states")
        self.padding = word(padding, PADDING, "padding")
        self.weighting = word(weighting, WEIGHTS, "weighting")
        self.temperature = temperature_schedule(temperature)
        self.loss = word(loss, SOFT_LOSSES, "loss")
        self.normalize_weights = switch(normalize_weights, "normalize_weights")
        self.pairs: list[layer_maps.Pairs] = []
        self.depths: list[tuple[int, int]] = []
        self.projections = nn.ModuleList()

    def bind(self, bound: Bound) -> None:
        """Resolve the layer map for each teacher, and create the linear maps.

        Raises:
            InputError: without a teacher, or for a layer map that does not suit the depths.
        """
        if not bound.teachers:
            raise InputError("this method learns from one teacher or more, teacher=[] has none", "teacher")
        student = bound.student
        self.teachers = len(bound.teachers)
        self.depths = [(student.depth, teacher.depth) for teacher in bound.teachers]
        self.pairs = [self._pairs(*depths) for depths in self.depths]
        self.projections = nn.ModuleList(
            nn.ModuleList(self._map(student.width, teacher.width) for _ in pairs)
            for pairs, teacher in zip(self.pairs, bound.teachers, strict=True)
        )

    def _pairs(self, student: int, teacher: int) -> layer_maps.Pairs:
        pairs = layer_maps.resolve(self.layers, student, teacher)
        return tuple(pair for pair in pairs if pair[0] > 0) if isinstance(self.layers, str) else pairs

    def _map(self, student: int, teacher: int) -> nn.Linear:
        sizes = (teacher, student) if self.project == "teacher" else (student, teacher)
        linear = nn.Linear(*sizes, bias=False)
        if student == teacher:
            nn.init.eye_(linear.weight)
        return linear

    def needs(self) -> tuple[Needs, Sequence[Needs]]:
        """Declare the states of the layers of the maps."""
        kind = STATES[self.states]
        ours = {layer for pairs in self.pairs for layer, _ in pairs}
        theirs = [Needs(taps=[Tap(kind, layer) for _, layer in pairs]) for pairs in self.pairs]
        return Needs(taps=[Tap(kind, layer) for layer in ours]), theirs

    def terms(self, step: Step) -> dict[str, Tensor]:
        """Return the hard loss, the weighted soft losses and the hidden losses of all teachers."""
        losses = by_teacher.soft_losses(step, self.temperature(step.progress.fraction), self.loss)
        return {
            "task": step.task.hard(step.student.outputs.logits, step.batch.labels),
            "logits": (self.weights(step) * losses).sum(dim=1).mean(),
            "hidden": self._hidden(step),
        }

    def weights(self, step: Step) -> Tensor:
        """Return the weights of the teachers, (batch, teachers), constants."""
        count = len(step.teachers)
        if self.weighting == "uniform":
            return torch.full((len(step.batch), count), 1 / count, device=step.batch.labels.device)
        weights = by_teacher.inverse_error_weights(by_teacher.errors(step))
        return weights / weights.sum(dim=1, keepdim=True) if self.normalize_weights else weights

    def _hidden(self, step: Step) -> Tensor:
        student = step.student.outputs
        errors = []
        for teacher, pairs, maps in zip(step.teachers, self.pairs, self.projections, strict=True):
            for (layer, other), linear in zip(pairs, maps, strict=True):  # type: ignore[call-overload]
                ours, mask = tokens_of(student, layer, self.states)
                theirs, _ = tokens_of(teacher.outputs, other, self.states)
                ours, theirs = (ours, linear(theirs)) if self.project == "teacher" else (linear(ours), theirs)
                # A map on the teacher's side is trained too, so that neither side is a constant here.
                squares = (at_least_float32(ours) - at_least_float32(theirs)) ** 2
                errors.append(mean_over_real(squares.mean(dim=-1), mask, self.padding))
        return torch.stack(errors).sum()

    def layer_maps(self) -> Sequence[Mapping[str, Tensor]]:
        """Return the layer map of each teacher."""
        both = zip(self.pairs, self.depths, strict=True)
        return [{"hidden": layer_maps.matrix(pairs, *depths)} for pairs, depths in both]

    def describe(self) -> dict[str, str]:
        """Describe the layer map of each teacher."""
        return {f"layer map (student<-teacher {n + 1})": layer_maps.describe(pairs) for n, pairs in enumerate(self.pairs)}

    def batch_dependence(self) -> str | None:
        """Return that a mean over padding depends on the batch, for `padding=reference` of all tokens."""
        reference = self.padding == "reference" and self.states == "tokens"
        return "padding=reference averages over padding, and the longest example says how much there is" if reference else None
