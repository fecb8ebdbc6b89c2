"""MLKD-BERT: representations by relations of tokens, then predictions by relations of examples."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kd.errors import InputError
from kd.forward import Needs, Outputs
from kd.functional import layer_maps
from kd.functional.hidden import PADDING, token_error
from kd.functional.logits import SOFT_LOSSES
from kd.functional.relations import ANCHORS, context, relation_divergence, similarity_divergence, supervised_contrast
from kd.methods.base import Bound, Method, Progress, Step, freeze_above, projection
from kd.methods.options import BATCH_MEANS, LARGEST_SEED, TEMPERATURES, number, switch, temperature_schedule, whole, word
from kd.schedules import Schedule

REPRESENTATION = ("embedding", "attention", "hidden")
PREDICTION = ("task", "logits", "similarity", "contrast")
STAGES = {"prediction": PREDICTION, "representation": REPRESENTATION, "both": (*PREDICTION, *REPRESENTATION)}
WORDS = ("normalized", "raw")
KNOWLEDGE = ("relation", "feature")
SOURCES = ("context", "query", "key", "value")
MERGES = ("concat", "random")
REDRAWS = ("run", "epoch", "step")
PROJECTIONS = ("layer", "shared")
POSITIVES = ("classes", "labels", "pairs")


class MLKDBERT(Method):
    r"""Multi-level distillation (Zhang, Yang, Ji, 2024, arXiv:2407.02775), one of its two stages, or both at once.

    Stage `representation`: :math:`L_{EMB} + L_{MHA} + L_{FFN}`, where :math:`R(X) = softmax(X X^T / \sqrt{d})`, row by row, are
    the relations of the tokens of a text. They need neither equal widths nor equal numbers of heads. Stage `prediction`, whose
    student starts from that of the first: :math:`L_{SS} + L_{SC} + L_{KD}`. Only summaries of the paper were available.
    Authors' code consulted for facts: the repository of MLKD-BERT, its `task_distill.py` and `transformer/modeling.py`.

    Terms of `representation`, sums over the pairs of layers n, g(n) of means over splits and tokens, weight 1 each:
        `embedding`: :math:`L_{EMB} = KL(R(E_T) \| R(E_S))` of the word embeddings, with one split.
        `attention`: :math:`L_{MHA} = KL(R(O_T^{g(n)}) \| R(O_S^n))` of the concatenated outputs of the heads, before the output
            layer and without dropout, in `splits` parts.
        `hidden`: :math:`L_{FFN} = MSE(h_S^n W_n, h_T^{g(n)})` of the states.

    Terms of `prediction`, weight 1 each:
        `task`: the hard loss, which the paper does not have. Weight 0.
        `logits`: :math:`L_{KD}`. Without it nothing trains the head.
        `similarity`: :math:`L_{SS} = KL(R(c_T) \| R(c_S))` of the last [CLS] states of a batch, B x B.
        `contrast`: :math:`L_{SC}`, in which each of the 2B vectors, the teacher's [CLS] states and the student's mapped to its
            width, is attracted by the others of its class, and by those of no other.

    Args:
        stage: `representation`, `prediction`, or `both` for training in one stage (the paper's ablation).
        layers: g. `uniform` is :math:`n N_T / N_S`, rounded down if the depths do not divide (our choice; the authors' code
            refuses them), or a list of [student layer, teacher layer], from 1.
        words: `normalized` sends word embeddings through the LayerNorm of the model's embeddings, without positions and
            segments (authors' code); `raw` compares them as they are looked up (paper).
        attention: `relation`, or `feature` for the error MSE of mapped states, as in `hidden` (the paper's ablation).
        source: what `attention` compares: `context`, the outputs of the heads, or `query`, `key`, `value` (ablations).
        splits: :math:`A_S`, which divides both widths; null for the student's number of heads (paper).
        merge: teacher's part for each split: `concat`, all heads of a group of neighbours; `random`, one head of each group
            (ablation). How it is drawn is our choice.
        redraw: `run`, `epoch` or `step`: how often heads are drawn.
        draw_seed: seed of `random`, which depends on it and the epoch or step only.
        hidden: `feature`, or `relation` (ablation), whose form is our choice: as `attention`, with `hidden_splits` splits.
        hidden_splits: splits of `hidden=relation`.
        embedding_output: whether `hidden` compares the embeddings' outputs too, layer 0 with layer 0 (authors' code).
        padding: `strict` takes relations and means over the real tokens of an example, then the mean over examples (our
            choice); `reference` treats padding as tokens (authors' code), with a teacher that runs at every step.
        project: linear maps to the teacher's width: `layer`, one for each layer (authors' code), or `shared`, one for all.
        temperature: T > 0 of `logits`, a number or a schedule; 1 in the authors' code.
        loss: `kl` (paper), `ce` (authors' code) or `mse`. For regression it is the mean squared error of scores.
        reduction: `batchmean` (paper) or `elementmean` (authors' code: over batch and classes).
        temperature_squared: whether `kl` is multiplied by T squared. The paper's is not.
        positives: `classes`, the examples of an anchor's class (paper), which regression is refused; `labels`, those of equal
            labels, which may be scores (authors' code for STS-B); `pairs`, the other view of the same example (our choice).
        anchors: `both`, student's and teacher's vectors (paper), or `student` (a later branch of the authors' code).
        contrast_temperature: :math:`\tau` of `contrast`, 0.07 in the authors' code.
        contrast_scaled: whether `contrast` is multiplied by :math:`\tau` (authors' code), which belongs to the weight 1 of
            their results.
        teacher_dropout: whether the teacher runs with dropout, and therefore at every step. The authors' code leaves it on, by
            oversight; ours is off.

    The authors' map of [CLS] for `contrast` is the one that the first stage has trained for the last layer. Ours is new in the
    second stage, and the same only with `stage=both`, because maps are no part of the student that a stage starts from. For
    equal widths maps begin as the identity (our choice). In the stage `representation` parameters that no term depends on are
    frozen.

    Raises:
        InputError: for an option that does not have one of its allowed values, or `merge=random` with `attention=feature`.
    """

    names: tuple[str, ...] = PREDICTION

    def __init__(
        self,
        stage: str = "prediction",
        layers: str | Sequence[Sequence[int]] = "uniform",
        words: str = "normalized",
        attention: str = "relation",
        source: str = "context",
        splits: int | None = None,
        merge: str = "concat",
        redraw: str = "run",
        draw_seed: int = 0,
        hidden: str = "feature",
        hidden_splits: int = 1,
        padding: str = "strict",
        project: str = "layer",
        temperature: "float | Schedule" = 1.0,
        loss: str = "kl",
        reduction: str = "batchmean",
        positives: str = "classes",
        anchors: str = "both",
        contrast_temperature: float = 0.07,
        *,
        embedding_output: bool = True,
        temperature_squared: bool = False,
        contrast_scaled: bool = True,
        teacher_dropout: bool = False,
    ) -> None:
        super().__init__()
        self.stage = word(stage, tuple(STAGES), "stage")
        self.layers = word(layers, ("uniform",), "layers") if isinstance(layers, str) else layers
        self.words = word(words, WORDS, "words")
        self.attention = word(attention, KNOWLEDGE, "attention")
        self.source = word(source, SOURCES, "source")
        self.splits = None if splits is None else whole(splits, "splits")
        self.merge = word(merge, MERGES, "merge")
        self.redraw = word(redraw, REDRAWS, "redraw")
        self.draw_seed = whole(draw_seed, "draw_seed", 0, LARGEST_SEED)
        self.hidden = word(hidden, KNOWLEDGE, "hidden")
        self.hidden_splits = whole(hidden_splits, "hidden_splits")
        self.embedding_output = switch(embedding_output, "embedding_output")
        self.padding = word(padding, PADDING, "padding")
        self.project = word(project, PROJECTIONS, "project")
        self.temperature = temperature_schedule(temperature)
        self.loss = word(loss, SOFT_LOSSES, "loss")
        self.reduction = word(reduction, BATCH_MEANS, "reduction")
        self.temperature_squared = switch(temperature_squared, "temperature_squared")
        self.positives = word(positives, POSITIVES, "positives")
        self.anchors = word(anchors, ANCHORS, "anchors")
        self.contrast_temperature = number(contrast_temperature, "contrast_temperature", *TEMPERATURES)
        self.contrast_scaled = switch(contrast_scaled, "contrast_scaled")
        self.teacher_dropout = switch(teacher_dropout, "teacher_dropout")
        if merge == "random" and attention == "feature":
            raise InputError("merge=random chooses heads of a relation; with attention=feature use merge=concat", "merge")
        self.names = STAGES[stage]
        drawn = ("attention",) if merge == "random" else ()  # a relation of one head is not that of several
        self.distances = [name for name in self.names if name not in ("task", "contrast", *drawn)]
        self.represents, self.predicts = stage != "prediction", stage != "representation"
        # A rank pads to a length of its own, which `across` does not join.
        self.across_ranks = not (self.represents and padding == "reference")
        self.pairs: layer_maps.Pairs = ()
        self.parts = 1
        self.depths = (0, 0)
        self.teacher_heads = 1
        self.unsquared = False
        self.projections = nn.ModuleDict()

    def bind(self, bound: Bound) -> None:
        """Resolve layers and splits, build the maps, and freeze what the stage `representation` does not train.

        Raises:
            InputError: if layers or splits do not suit the models, or the task has no classes for `positives=classes`.
        """
        student, teacher = bound.student, bound.teacher
        self.depths = (student.depth, teacher.depth)
        places: list[str] = []
        if self.represents:
            self._resolve(bound)
            if self.hidden == "feature":
                places += [self._place("hidden", layer) for layer, _ in self._hidden_pairs()]
            if self.attention == "feature":
                places += [self._place("attention", layer) for layer, _ in self.pairs]
        if self.predicts:
            self._check_positives(bound)
            regression = bound.task.labels is None and student.classifies  # whose loss has no temperature
            self.unsquared = self.loss == "kl" and not self.temperature_squared and not regression
            places.append(self._place("hidden", student.depth))
        else:
            freeze_above(student, max(layer for layer, _ in self.pairs))
        self.projections = nn.ModuleDict({name: projection(student.width, teacher.width) for name in dict.fromkeys(places)})

    def _resolve(self, bound: Bound) -> None:
        """Resolve the layer map and the splits."""
        student, teacher = bound.student, bound.teacher
        pairs = layer_maps.resolve(self.layers, *self.depths)
        self.pairs = pairs[1:] if isinstance(self.layers, str) else pairs
        if not self.pairs or any(0 in pair for pair in self.pairs):
            raise InputError(
                f"the layer map {[list(pair) for pair in pairs]} must list pairs, and of layers from 1: "
                "embedding_output=true compares the embeddings",
                "layers",
            )
        self.parts, self.teacher_heads = self.splits or student.heads, teacher.heads
        counts = [("splits", self.parts, self.attention), ("hidden_splits", self.hidden_splits, self.hidden)]
        for key, count, knowledge in counts:
            if knowledge == "relation" and (student.width % count or teacher.width % count):
                raise InputError(
                    f"{count} splits do not divide the widths of student and teacher, {student.width} and {teacher.width}; "
                    f"set {key} to one of {', '.join(map(str, divisors(math.gcd(student.width, teacher.width))))}",
                    key,
                )
        if self.merge == "random" and teacher.heads % self.parts:
            raise InputError(
                f"{self.parts} splits do not divide the teacher's {teacher.heads} heads into groups, of which merge=random "
                f"draws one each; set splits to one of "
                f"{', '.join(map(str, divisors(teacher.heads)))}",
                "splits",
            )

    def _check_positives(self, bound: Bound) -> None:
        """Check that the task has the labels that the positives are found by."""
        if self.positives == "pairs" or bound.task.labels is not None:
            return
        if not bound.student.classifies:
            raise InputError(f"positives={self.positives} needs a label for each text; use positives=pairs", "positives")
        if self.positives == "classes":
            raise InputError(
                f"the task '{bound.task.name}' has scores and no classes, so that positives=classes has none; use "
                "positives=pairs, or positives=labels for texts of equal scores, and a weight of 0 to leave contrast out",
                "positives",
            )

    def _hidden_pairs(self) -> layer_maps.Pairs:
        """Return the pairs of layers whose states are compared."""
        return ((0, 0), *self.pairs) if self.embedding_output else self.pairs

    def _place(self, kind: str, layer: int) -> str:
        """Return the name of a student layer's map."""
        return kind if self.project == "shared" else f"{kind}_{layer}"

    def needs(self) -> tuple[Needs, Sequence[Needs]]:
        """Declare the outputs of the stage. The teacher's word embeddings are derived, so that they can be cached."""
        needs = [Needs(), Needs(dropout=self.teacher_dropout)]
        for side in (0, 1):
            if self.predicts:
                needs[side] |= Needs(cls=[self.depths[side]])
            if self.represents:
                layers = {pair[side] for pair in self.pairs}
                needs[side] |= Needs(
                    hidden={pair[side] for pair in self._hidden_pairs()},
                    attention=layers if self.source != "value" else (),
                    value=layers if self.source in ("context", "value") else (),
                )
        if self.represents:
            reason = "the states of padding are not cached" if self.padding == "reference" else None
            needs[0] |= Needs(words=True)
            needs[1] |= Needs(derived={self._derived: LOOK_UPS[self.words]}, uncacheable_reason=reason)
        return needs[0], [needs[1]]

    @property
    def _derived(self) -> str:
        """Name of the teacher's word embeddings, by which they are cached."""
        return f"words-{self.words}"

    def terms(self, step: Step) -> dict[str, Tensor]:
        """Return the loss terms of the stage, listed in the class docstring."""
        terms: dict[str, Tensor] = {}
        if self.predicts:
            terms |= self._prediction(step)
        if self.represents:
            terms |= self._representation(step)
        return terms

    def _representation(self, step: Step) -> dict[str, Tensor]:
        """Return the terms of the stage `representation`."""
        student, teacher = step.student.outputs, step.teacher.outputs
        words = student.words if self.words == "raw" else normalized(step.student.model, student.words)
        heads = self.heads_at(step.progress)
        attention = [self._attention(student, teacher, *pair, row) for pair, row in zip(self.pairs, heads, strict=True)]
        hidden = [self._hidden(student, teacher, *pair) for pair in self._hidden_pairs()]
        return {
            "embedding": relation_divergence(words, teacher.derived(self._derived), student.mask, 1, self.padding),
            "attention": torch.stack(attention).sum(),
            "hidden": torch.stack(hidden).sum(),
        }

    def _attention(self, student: Outputs, teacher: Outputs, layer: int, other: int, heads: Sequence[int] | None) -> Tensor:
        """Return the attention loss of a pair of layers."""
        ours, theirs = attended(student, self.source, layer), attended(teacher, self.source, other)
        if self.attention == "feature":
            ours = self.projections[self._place("attention", layer)](ours)
            return token_error(ours, theirs, student.mask, self.padding)
        if heads is not None:
            theirs = theirs.unflatten(-1, (teacher.heads, -1))[:, :, heads].flatten(2)
        return relation_divergence(ours, theirs, student.mask, self.parts, self.padding)

    def _hidden(self, student: Outputs, teacher: Outputs, layer: int, other: int) -> Tensor:
        """Return the loss of the states of a pair of layers."""
        ours, theirs = student.hidden(layer), teacher.hidden(other)
        if self.hidden == "relation":
            return relation_divergence(ours, theirs, student.mask, self.hidden_splits, self.padding)
        return token_error(self.projections[self._place("hidden", layer)](ours), theirs, student.mask, self.padding)

    def heads_at(self, progress: Progress) -> list[list[int] | None]:
        """Return for each pair of layers the teacher's head, from 0, that each split is compared with; None for all."""
        if self.merge == "concat":
            return [None] * len(self.pairs)
        index = {"run": 0, "epoch": progress.epoch, "step": progress.step}[self.redraw]
        generator = np.random.default_rng([self.draw_seed, index, *b"heads"])
        size = self.teacher_heads // self.parts
        chosen = generator.integers(size, size=(len(self.pairs), self.parts)) + np.arange(self.parts) * size
        return [[int(head) for head in row] for row in chosen]

    def _prediction(self, step: Step) -> dict[str, Tensor]:
        """Return the terms of the stage `prediction`; every rank computes those of the global batch."""
        student, teacher, tau = step.student.outputs, step.teacher.outputs, self.contrast_temperature
        temperature = self.temperature(step.progress.fraction)
        logits = step.task.soft(student.logits, teacher.logits, temperature, self.loss, self.reduction)
        ours, theirs = step.across(student.cls(self.depths[0])), step.across(teacher.cls(self.depths[1]))
        labels = step.across(step.batch.index if self.positives == "pairs" else step.batch.labels)
        projected = self.projections[self._place("hidden", self.depths[0])](ours)
        contrast = supervised_contrast(projected, theirs, labels, tau, self.anchors)
        return {
            "task": step.task.hard(student.logits, step.batch.labels),
            "logits": logits / temperature**2 if self.unsquared else logits,
            "similarity": similarity_divergence(ours, theirs),
            "contrast": contrast * tau if self.contrast_scaled else contrast,
        }

    def layer_maps(self) -> Sequence[Mapping[str, Tensor]]:
        """Return the pairs of layers of each term that compares any."""
        pairs: dict[str, layer_maps.Pairs] = {}
        if self.represents:
            pairs |= {"attention": self.pairs, "hidden": self._hidden_pairs()}
        if self.predicts:
            pairs |= {"similarity": (self.depths,), "contrast": (self.depths,)}
        return [{name: layer_maps.matrix(of_term, *self.depths) for name, of_term in pairs.items()}]

    def describe(self) -> dict[str, str]:
        """Describe the layer map, the splits and, if they are drawn, the teacher's heads."""
        if not self.represents:
            return {}
        description = {"layer map (student<-teacher)": layer_maps.describe(self.pairs)}
        if self.embedding_output:
            description["layer map (student<-teacher)"] = f"0<-0 (hidden), {layer_maps.describe(self.pairs)}"
        if self.attention == "relation":
            description["splits of attention"] = str(self.parts)
        if self.merge == "random":
            often = "once" if self.redraw == "run" else f"for every {self.redraw}, these are the first"
            drawn = "; ".join(
                f"layer {pair[0]}: {heads}" for pair, heads in zip(self.pairs, self.heads_at(Progress()), strict=True)
            )
            description["teacher's heads are drawn"] = f"{often}, {drawn}"
        return description

    def batch_dependence(self) -> str | None:
        """Return that examples are compared with each other, or that padding, of the batch's longest example, counts."""
        reasons = []
        if self.predicts:
            reasons.append("similarity and contrast compare the examples of a batch with each other")
        if self.represents and self.padding == "reference":
            reasons.append("padding=reference takes padding for tokens, of which the longest example says how many there are")
        return "; ".join(reasons) or None

    def label_dependence(self) -> str | None:
        """Return that the contrast finds its positives by their labels, unless they are pairs."""
        if not self.predicts or self.positives == "pairs":
            return None
        return "contrast attracts examples of equal labels; positives=pairs needs none"


def divisors(count: int) -> list[int]:
    """Return the numbers that divide a count, in ascending order."""
    return [number for number in range(1, count + 1) if count % number == 0]


def attended(outputs: Outputs, source: str, layer: int) -> Tensor:
    """Return queries, keys, values or the concatenated outputs of the heads of a layer, (batch, tokens, width)."""
    if source != "context":
        return outputs.read(source, layer)
    return context(outputs.attention(layer), outputs.value(layer))


def normalized(encoder: Any, words: Tensor) -> Tensor:
    """Return word embeddings, (batch, tokens, width), after the LayerNorm of the embeddings, which autocast does not round.

    All families have it under one name.
    """
    norm: Any = encoder.base.get_submodule(f"{encoder.family.embeddings}.LayerNorm")
    with torch.autocast(words.device.type, enabled=False):
        states: Tensor = norm(words.to(norm.weight.dtype))
    return states


def raw_words(encoder: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the word embeddings of a text, (batch, tokens, width)."""
    words: Tensor = encoder.word_embeddings(inputs["input_ids"])
    return words


def normalized_words(encoder: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the word embeddings of a text after the LayerNorm of the embeddings, (batch, tokens, width)."""
    return normalized(encoder, raw_words(encoder, inputs))


LOOK_UPS = {"normalized": normalized_words, "raw": raw_words}
