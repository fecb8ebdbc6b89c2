"""TinyBERT's Transformer-layer distillation, with the loss functions and layer maps of a later study."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from kd.errors import InputError
from kd.forward import Needs, Outputs
from kd.functional import layer_maps
from kd.functional.attention import DIRECTIONS, attention_divergence, mean_distribution, probability_error, score_error
from kd.functional.hidden import PADDING, at_least_float32, token_error
from kd.methods.base import Bound, Method, Progress, Step, check_heads, freeze_above, projection
from kd.methods.epoch_mean import EpochMean
from kd.methods.options import LARGEST_SEED, switch, whole, word

MAPS = ("uniform", "top", "last", "bottom", "mean", "random")
ATTENTION_TARGETS = ("scores", "probabilities", "kl")
PROJECTIONS = ("shared", "paper", "layer")
REDRAWS = ("run", "epoch", "step")


class TinyBERT(Method):
    r"""TinyBERT's stage `intermediate` (Jiao et al., Findings of EMNLP 2020, arXiv:1909.10351), eq. 7-9 and 11.

    Attention scores and hidden states of every student layer m are compared with those of the teacher's layer g(m), and
    embeddings with embeddings: :math:`L = \sum_{m=1}^{M} (L_{attn}^m + L_{hidn}^m) + L_{embd}`. Logits and labels are not used
    here but in the next stage, the soft cross entropy of eq. 10, which is `kd.methods.kd.KD`; `conf/method/tinybert.yaml` has
    both. Authors' code consulted for facts: huawei-noah/Pretrained-Language-Model, `TinyBERT/task_distill.py`.

    Other losses, maps and weights on top of it: Improving Knowledge Distillation for BERT Models: Loss Functions, Mapping
    Methods, and Weight Tuning (Dankar, Jassani, Kumar, 2023, arXiv:2308.13958). Only its abstract was available, so the
    divergence and the maps `random` and `mean` below are our choice.

    Terms, each a mean within a layer and a sum over layers, as in the authors' code:
        `attention`: :math:`L_{attn}`, eq. 7. Weight lambda, alpha in the later study.
        `hidden`: :math:`L_{hidn}`, eq. 8. Weight lambda, beta in the later study.
        `embedding`: :math:`L_{embd}`, eq. 9; the authors' code adds it to the hidden loss, so beta again.

    Args:
        layers: g. `uniform` is :math:`mN/M`, `top`, or `last` (not PKD's, which stops below the teacher's last layer), is
            :math:`m + N - M`, `bottom` is m; `mean` divides the teacher's N layers into M blocks and compares m with the
            mean of block m, of scores, of probabilities (also for `kl`) and of states; `random` draws M different teacher
            layers, in ascending order. Or a list of [student layer, teacher layer], from 1.
        redraw: `run`, `epoch` or `step`: how often `random` is drawn. With the latter two all teacher layers are read.
        draw_seed: seed of `random`, which depends on it and the epoch or step only: the same on all ranks and after a resume.
        attention: `scores` before softmax (paper and code), `probabilities` after it, both by their squared error; or `kl`, the
            divergence of probabilities.
        direction: direction of `kl`: `forward` is :math:`KL(p_t \| p_s)`, `reverse` is :math:`KL(p_s \| p_t)`.
        padding: `strict` averages over real tokens of an example, then over examples (our choice: the default); `reference`
            averages over everything, padding included, as the authors' code does.
        project: maps from the student's width to the teacher's. `shared` is one for embeddings and all layers (authors'
            code), `paper` is one for embeddings and one for layers (its W_e and W_h), `layer` is one for each.
        teacher_dropout: whether the teacher runs with dropout, and therefore at every step. The authors' code leaves it on, by
            oversight; ours is off.

    Head i is compared with head i, so student and teacher need the same number of heads. The paper's W_e and W_h have no bias;
    the authors' code and we have one. Parameters that no term depends on, the head and everything above the highest layer of
    the map, are frozen, so weight decay does not change them either.

    Raises:
        InputError: for an option that does not have one of its allowed values.
    """

    names: tuple[str, ...] = ("attention", "hidden", "embedding")

    def __init__(
        self,
        layers: str | Sequence[Sequence[int]] = "uniform",
        redraw: str = "run",
        draw_seed: int = 0,
        attention: str = "scores",
        direction: str = "forward",
        padding: str = "strict",
        project: str = "shared",
        *,
        teacher_dropout: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(layers, str):
            word(layers, MAPS, "layers")
        self.layers = layers
        self.redraw = word(redraw, REDRAWS, "redraw")
        self.draw_seed = whole(draw_seed, "draw_seed", 0, LARGEST_SEED)
        self.attention = word(attention, ATTENTION_TARGETS, "attention")
        self.direction = word(direction, DIRECTIONS, "direction")
        self.padding = word(padding, PADDING, "padding")
        self.project = word(project, PROJECTIONS, "project")
        self.teacher_dropout = switch(teacher_dropout, "teacher_dropout")
        self.depths = (0, 0)
        self.drawn: EpochMean | None = None
        self.projections = nn.ModuleDict()

    def bind(self, bound: Bound) -> None:
        """Check the heads, resolve the layer map, build the projections, and freeze everything above the layers of the map.

        Raises:
            InputError: if the numbers of heads differ, or the depths do not suit the map.
        """
        self.bind_layers(bound)
        freeze_above(bound.student, max(self._ours()))

    def bind_layers(self, bound: Bound) -> None:
        """Check the heads, resolve the layer map and build the projections.

        Raises:
            InputError: if the numbers of heads differ, or the depths do not suit the map.
        """
        student, teacher = bound.student, bound.teacher
        check_heads(student, teacher)
        self.depths = (student.depth, teacher.depth)
        if isinstance(self.layers, str) and student.depth > teacher.depth:
            raise InputError(
                f"the layer map '{self.layers}' needs a student no deeper than its teacher, got {student.depth} and "
                f"{teacher.depth} layers; give the pairs instead, as [[student, teacher], ...]",
                "layers",
            )
        names = dict.fromkeys(self._place(layer) for layer in (0, *self._ours()))
        self.projections = nn.ModuleDict({name: projection(student.width, teacher.width) for name in names})
        if self.layers == "random" and self.redraw != "run":
            self.drawn = EpochMean(student.depth + 1, teacher.depth + 1)

    def map_at(self, progress: Progress) -> layer_maps.Blocks:
        """Return the teacher layers that each student layer is compared with: several for `mean`, otherwise one.

        Raises:
            InputError: if the depths do not suit the map.
        """
        if not isinstance(self.layers, str):
            pairs = layer_maps.resolve(self.layers, *self.depths)
            if not pairs or any(0 in pair for pair in pairs):
                raise InputError(
                    f"the layer map {[list(pair) for pair in pairs]} must list pairs, and of layers from 1: embeddings meet "
                    "embeddings without being listed",
                    "layers",
                )
        elif self.layers in ("uniform", "mean"):
            blocks = layer_maps.blocks(*self.depths)
            return blocks if self.layers == "mean" else tuple((layer, block[-1:]) for layer, block in blocks)
        elif self.layers == "random":
            index = {"run": 0, "epoch": progress.epoch, "step": progress.step}[self.redraw]
            generator = np.random.default_rng([self.draw_seed, index, *b"layers"])
            pairs = layer_maps.drawn(*self.depths, generator)
        else:
            pairs = {"bottom": layer_maps.bottom}.get(self.layers, layer_maps.top)(*self.depths)
        return tuple((ours, (theirs,)) for ours, theirs in pairs)

    def needs(self) -> tuple[Needs, Sequence[Needs]]:
        """Declare embeddings, and states and attention of the paired layers; of the teacher all layers that may be drawn."""
        ours, theirs = self._ours(), {layer for _, block in self.map_at(Progress()) for layer in block}
        if self.layers == "random" and self.redraw != "run":
            theirs = set(range(1, self.depths[1] + 1))
        return Needs(hidden={0, *ours}, attention=ours), [
            Needs(hidden={0, *theirs}, attention=theirs, dropout=self.teacher_dropout)
        ]

    def terms(self, step: Step) -> dict[str, Tensor]:
        """Return the losses of eq. 7, 8 and 9, each summed over layers."""
        return self.layer_losses(step)

    def layer_losses(self, step: Step, reduction: str = "mean") -> dict[str, Tensor]:
        """Return the losses of eq. 7, 8 and 9, summed over layers: means, or with `none` those of each example, (batch,)."""
        student, teacher = step.student.outputs, step.teacher.outputs
        blocks = self.map_at(step.progress)
        hidden = [self._hidden(student, teacher, layer, block, reduction) for layer, block in blocks]
        attention = [self._attention(student, teacher, layer, block, reduction) for layer, block in blocks]
        return {
            "attention": torch.stack(attention).sum(dim=0),
            "hidden": torch.stack(hidden).sum(dim=0),
            "embedding": self._hidden(student, teacher, 0, (0,), reduction),
        }

    def _hidden(self, student: Outputs, teacher: Outputs, layer: int, block: Sequence[int], reduction: str = "mean") -> Tensor:
        ours, theirs = student.hidden(layer), mean_of_layers([teacher.hidden(other) for other in block])
        return token_error(self.projections[self._place(layer)](ours), theirs, student.mask, self.padding, reduction)

    def _attention(
        self, student: Outputs, teacher: Outputs, layer: int, block: Sequence[int], reduction: str = "mean"
    ) -> Tensor:
        mask = student.mask
        if self.attention == "probabilities":
            theirs = mean_of_layers([teacher.attention(other) for other in block])
            return probability_error(student.attention(layer), theirs, mask, self.padding, reduction)
        scores = [teacher.scores(other) for other in block]
        if self.attention == "scores":
            return score_error(student.scores(layer), mean_of_layers(scores), mask, self.padding, reduction)
        theirs = scores[0] if len(scores) == 1 else mean_distribution(scores, mask)
        return attention_divergence(student.scores(layer), theirs, mask, self.direction, self.padding, reduction)

    def after_step(self, step: Step, terms: Mapping[str, Tensor]) -> None:
        """Add a map that is drawn anew to those of the epoch."""
        if self.drawn is not None:
            self.drawn.add(layer_maps.block_matrix(self.map_at(step.progress), *self.depths), step.progress.epoch)

    def _ours(self) -> list[int]:
        """Return the student layers that are compared with a teacher layer; they are the same in every draw."""
        return sorted({layer for layer, _ in self.map_at(Progress())})

    def _place(self, layer: int) -> str:
        """Return the name of a student layer's projection."""
        names = {"shared": "all", "paper": "layers" if layer else "embedding", "layer": str(layer)}
        return names[self.project]

    def layer_maps(self) -> Sequence[Mapping[str, Tensor]]:
        """Return the layer map, for `hidden` with the embeddings; one that is drawn anew as the mean over an epoch."""
        drawn = self.drawn
        blocks = layer_maps.block_matrix(self.map_at(Progress()), *self.depths) if drawn is None else drawn.values.clone()
        embeddings = layer_maps.matrix(((0, 0),), *self.depths).to(blocks)
        return [{"attention": blocks, "hidden": blocks + embeddings}]

    def describe(self) -> dict[str, str]:
        """Describe the layer map and, if it is random, its seed and how often it is drawn."""
        description = {"layer map (student<-teacher)": f"0<-0, {layer_maps.describe_blocks(self.map_at(Progress()))}"}
        if self.layers == "random":
            often = "once" if self.redraw == "run" else f"for every {self.redraw}, this is the first"
            description["layer map is drawn"] = f"{often}; draw_seed={self.draw_seed}"
        return description

    def batch_dependence(self) -> str | None:
        """Return that a mean over padding depends on the batch's longest example, for `padding=reference`."""
        if self.padding == "strict":
            return None
        return "padding=reference averages over padding too, and the longest example of a batch says how much there is"


def mean_of_layers(layers: Sequence[Tensor]) -> Tensor:
    """Return the mean of tensors of one shape, in float32 at least; a single tensor is returned unchanged."""
    return layers[0] if len(layers) == 1 else torch.stack([at_least_float32(layer) for layer in layers]).mean(dim=0)
