"""Construction of students: a plan of shape and initialisation, derived from a backbone, and then the weights.

Errors name fields of `StudentSpec`; the builder adds where the specification stands.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights

from kd.config.schema import StudentSpec
from kd.errors import InputError, one_of
from kd.forward.taps import Family, family_of
from kd.models.dropout import with_cheaper_dropout
from kd.models.encoder import Encoder
from kd.models.heads import HEADS
from kd.models.labels import columns
from kd.models.pretrained import (
    check_head,
    check_tokenizer,
    check_weights,
    label_names,
    load_config,
    load_model,
    load_tokenizer,
)

INITS = ("random", "first", "every", "last", "checkpoint", "run")
INIT_FROM = ("pretrained", "teacher", "auto")


def chosen_layers(init: str | Sequence[int], student: int, source: int) -> list[int]:
    """Return the source blocks, counted from 1, that the student's blocks are copied from.

    Args:
        init: `first`, `every`, `last`, or a list of layers.
        student: number of blocks of the student.
        source: number of blocks of the model that is copied.

    Raises:
        InputError: if the source is too shallow, or the list does not fit.

    >>> chosen_layers("every", 3, 6)
    [2, 4, 6]
    """
    if isinstance(init, str):
        if init not in ("first", "every", "last"):
            raise one_of(init, (*INITS, "[layer, ...]"), "init")
        if student > source:
            raise InputError(
                f"init={init} takes {student} layers from a model that has {source}; use init=random, or fewer student.layers",
                "init",
            )
        if init == "first":
            return list(range(1, student + 1))
        if init == "last":
            return list(range(source - student + 1, source + 1))
        return [source * layer // student for layer in range(1, student + 1)]
    if not isinstance(init, Sequence):
        raise one_of(init, (*INITS, "[layer, ...]"), "init")
    layers: list[Any] = list(init)  # as YAML gave it
    if len(layers) != student or not all(type(layer) is int and 1 <= layer <= source for layer in layers):
        raise InputError(
            f"init={layers} must list {student} layers, each from 1 to {source}, one for every student layer",
            "init",
        )
    return layers


def student_config(
    spec: StudentSpec,
    backbone: str,
    labels: Sequence[str] | None,
    key: str = "backbone",
    head: str = "classifier",
) -> PretrainedConfig:
    """Return the transformers configuration of a student.

    Args:
        spec: sizes; null means the backbone's.
        backbone: source of the backbone.
        labels: label names in the task's order; None for regression.
        key: the configuration key that names the backbone.
        head: a key of `kd.models.heads.HEADS`.

    Raises:
        InputError: for a size that is not positive, or heads that do not divide the width.
    """
    source = load_config(backbone, key)
    family_of(source.model_type, key)
    if spec.family is not None and spec.family != source.model_type:
        family_of(spec.family, "family")
        config = AutoConfig.for_model(spec.family)
        for name in ("vocab_size", "max_position_embeddings", "hidden_size", "num_attention_heads", "pad_token_id"):
            setattr(config, name, getattr(source, name))
        config.num_hidden_layers = source.num_hidden_layers
        source_family, family = family_of(source.model_type), family_of(spec.family)
        setattr(config, family.intermediate, getattr(source, source_family.intermediate))
    else:
        config, family = source, family_of(source.model_type)
    sizes = {"layers": "num_hidden_layers", "width": "hidden_size", "heads": "num_attention_heads"}
    for ours, theirs in {**sizes, "intermediate": family.intermediate}.items():
        value = getattr(spec, ours)
        if value is not None and value < 1:
            raise InputError(f"{ours}={value} must be at least 1", ours)
        if value is not None:
            setattr(config, theirs, value)
    if spec.width is not None and spec.intermediate is None:
        setattr(config, family.intermediate, 4 * spec.width)  # the ratio of every published BERT
    if config.hidden_size % config.num_attention_heads:
        raise InputError(f"{config.num_attention_heads} heads do not divide a width of {config.hidden_size}", "heads")
    if spec.dropout is not None:
        if not 0.0 <= spec.dropout < 1.0:
            raise InputError(f"dropout={spec.dropout} must be in [0, 1)", "dropout")
        for name in family.dropouts:
            setattr(config, name, spec.dropout)
    check_head(config, head, key if spec.family is None else "family")
    return with_labels(config, labels, head)


def with_labels(config: PretrainedConfig, labels: Sequence[str] | None, head: str = "classifier") -> PretrainedConfig:
    """Set the number and names of a configuration's labels, in this order, and return it; None for regression.

    For a head whose outputs are not labels the configuration is not changed.
    """
    if not HEADS[head].labelled:
        return config
    names = list(labels) if labels is not None else ["score"]
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    config.problem_type = "regression" if labels is None else "single_label_classification"
    return config


def new_model(config: PretrainedConfig, head: str = "classifier") -> nn.Module:
    """Build a model with random weights, on the CPU, and a copy of the configuration, which a surgery may change."""
    with torch.device("cpu"):
        return HEADS[head].auto.from_config(copy.deepcopy(config))  # type: ignore[no-any-return]


def empty_model(config: PretrainedConfig, head: str = "classifier") -> nn.Module:
    """Build a model on the meta device, with shapes but no weights, and a copy of the configuration."""
    # Modules of torch initialise their weights on the meta device too, which takes twice as long as all else.
    with torch.device("meta"), no_init_weights():
        model: PreTrainedModel = HEADS[head].auto.from_config(copy.deepcopy(config))
    model.tie_weights()  # which initialisation does
    return model


@torch.no_grad()
def copy_layers(
    target: nn.Module, source: nn.Module, family: Family, layers: Sequence[int], head: Sequence[int] | None
) -> None:
    """Copy the embeddings, everything else outside the blocks, and the chosen blocks; the head only if `head` is given.

    Args:
        target: the student.
        source: the model that is copied, of the same family and width.
        family: module paths of their family.
        layers: for each block of the target, the block of the source, counted from 1.
        head: for each output of the target, the output of the source; None leaves the head unchanged. The outputs of a
            masked language model are its vocabulary, which is tied to the embeddings and copied unchanged.
    """
    blocks = f"{family.base}.{family.blocks}."
    origin = {f"{blocks}{ours}.": f"{blocks}{theirs - 1}." for ours, theirs in enumerate(layers)}
    weights = source.state_dict()
    for name, tensor in target.state_dict().items():
        prefix = next((prefix for prefix in origin if name.startswith(prefix)), "")
        if prefix:
            tensor.copy_(weights[name.replace(prefix, origin[prefix], 1)])
        elif name.startswith(f"{family.base}."):
            tensor.copy_(weights[name])
        elif head is not None:
            tensor.copy_(weights[name][list(head)] if name.startswith(f"{family.outputs}.") else weights[name])


def check_copy(
    config: PretrainedConfig,
    source: PretrainedConfig,
    spec: StudentSpec,
    key: str = "init",
    *,
    deepened: PretrainedConfig | None = None,
) -> None:
    """Check that the weights of a model with configuration `source` fit a student with configuration `config`.

    The tensors of copied layers have the same shapes whatever the number of heads, unless the family has a positional bias for
    each head. A checkpoint or a run that is continued has the student's number of heads.

    Args:
        config: configuration of the student.
        source: configuration of the model that is copied.
        spec: the student's initialisation.
        key: the configuration key that an error names.
        deepened: configuration of the student after its surgeries; None if these do not change it.

    Raises:
        InputError: if they do not, naming the size that differs.
    """
    family = family_of(config.model_type)
    by_head = spec.init in ("checkpoint", "run") or family.score_bias is not None
    sizes = ("hidden_size", *(("num_attention_heads",) if by_head else ()), family.intermediate)
    tables = ("vocab_size", "max_position_embeddings", "type_vocab_size", "relative_attention_num_buckets")
    for name in ("model_type", *sizes, *tables):
        ours, theirs = getattr(config, name, None), getattr(source, name, None)
        if ours != theirs:
            raise InputError(
                f"init={spec.init} copies weights, which needs the same {name}: the student has {ours}, "
                f"the model it copies from {theirs}; use init=random",
                key,
            )
    layers_to_copy(spec, config, source, deepened)


@dataclass(frozen=True, slots=True)
class Copied:
    """Weights that a student starts from.

    Attributes:
        source: folder or model on the hub.
        key: the configuration key that names it.
        config: its configuration.
        layers: for each block of the student, the source's block, counted from 1.
        rows: for each output of the student, the source's output; None for a randomly initialised head.
        head_needed: whether the source must contain the head.
        derived: whether the source has further layers above these, which follow from them by the student's surgeries.
    """

    source: str
    key: str
    config: PretrainedConfig
    layers: Sequence[int]
    rows: Sequence[int] | None
    head_needed: bool
    derived: bool = False


@dataclass(frozen=True, slots=True)
class StudentPlan:
    """A student that passed all checks of its configuration; none of its weights are loaded or drawn.

    Attributes:
        config: its configuration.
        tokenizer: the tokenizer of its inputs.
        head: a key of `kd.models.heads.HEADS`.
        copied: weights that it starts from; None if all are random.
        start: initial bias of a randomly initialised head; None for zero.
        notes: remarks on the initial weights that affect results.
        asides: remarks on the initial weights that do not affect results.
    """

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerFast
    head: str = "classifier"
    copied: Copied | None = None
    start: float | None = None
    notes: Sequence[str] = ()
    asides: Sequence[str] = ()

    def shape(self) -> Encoder:
        """Return the student on the meta device: shapes without weights."""
        return self._encoder(empty_model(self.config, self.head))

    def materialise(self) -> Encoder:
        """Return the student with its initial weights; the random ones are drawn from torch's generator.

        Raises:
            InputError: if the weights that it starts from cannot be loaded.
        """
        model, family = new_model(self.config, self.head), family_of(self.config.model_type)
        if (copied := self.copied) is not None:
            source = load_model(copied.source, copied.key, copied.config, self.head, head_needed=copied.head_needed)
            copy_layers(model, source, family, copied.layers, copied.rows)
        if self.start is not None:
            nn.init.constant_(model.get_submodule(family.outputs).bias, self.start)  # type: ignore[arg-type]
        return self._encoder(with_cheaper_dropout(model))

    def check_derived(self, student: Encoder) -> None:
        """Check, if the source has layers that follow from the copied ones, that the student's surgeries made the same layers.

        Args:
            student: the student after its surgeries.

        Raises:
            InputError: if a layer differs.
        """
        copied = self.copied
        if copied is None or not copied.derived:
            return
        source = load_model(copied.source, copied.key, copied.config, self.head, head_needed=copied.head_needed)
        expected = Encoder(source).blocks
        for index in range(len(copied.layers), len(expected)):
            theirs = expected[index].state_dict()
            if any(not torch.equal(tensor.cpu(), theirs[name]) for name, tensor in student.blocks[index].state_dict().items()):
                raise InputError(
                    f"layer {index + 1} of the model that the student begins from is not what the student's surgeries make of "
                    f"its first {len(copied.layers)} layers, so they cannot be shared; begin from a run with the same "
                    f"surgeries, or use surgery=[] and student.layers={len(expected)}",
                    copied.key,
                )

    def _encoder(self, model: nn.Module) -> Encoder:
        encoder = Encoder(model, self.tokenizer)
        encoder.notes, encoder.asides = list(self.notes), list(self.asides)
        return encoder


def plan_student(
    spec: StudentSpec,
    backbone: str,
    labels: Sequence[str] | None,
    initial: str | None = None,
    *,
    key: str = "backbone",
    head: str = "classifier",
    initial_key: str | None = None,
    initial_labels: Sequence[str] | None = None,
    pairs: bool = False,
    start: float | None = None,
    deepen: Callable[[PretrainedConfig], PretrainedConfig] | None = None,
) -> StudentPlan:
    """Plan a student and its initialisation; of weights, only names, shapes and whether they are finite are read.

    Args:
        spec: sizes and initialisation.
        backbone: source of its shape, and of vocabulary and tokenizer unless a checkpoint or a run has its own.
        labels: label names in the task's order; None for regression.
        initial: source of its weights: the backbone, the fine-tuned teacher, a checkpoint or a run; None for random.
        key: the configuration key that names the backbone.
        head: a key of `kd.models.heads.HEADS`.
        initial_key: the configuration key that names `initial`.
        initial_labels: names of the outputs of `initial`, if its configuration names them wrongly.
        pairs: whether it will read pairs of texts.
        start: initial bias of a randomly initialised head, the mean of the scores; None leaves it at zero.
        deepen: function from the student's configuration to the one after its surgeries; None if there are none.

    Raises:
        InputError: for sizes or an initialisation that do not fit.
    """
    config = student_config(spec, backbone, labels, key, head)
    deepened = None if deepen is None else deepen(config)
    whole = spec.init in ("checkpoint", "run")
    given = initial_key or (str(spec.init) if whole else "init_from")
    copied: Copied | None = None
    notes: list[str] = []
    asides: list[str] = []
    if initial is not None:
        initial_config = load_config(initial, given)
        if whole:  # a checkpoint's vocabulary may differ from the backbone's, and its weights belong to it
            config.vocab_size, config.pad_token_id = initial_config.vocab_size, initial_config.pad_token_id
        check_copy(config, initial_config, spec, given if whole else "init", deepened=deepened)
        backbone_alone = spec.init_from != "teacher" and not whole
        rows = head_rows(config, initial_config, head, given, initial_labels, pretrained=backbone_alone)
        weights = check_weights(initial, given, initial_config, head)
        # If the configuration names no architecture, the weights may have no head.
        needed = rows is not None and (bool(initial_config.architectures) or weights.has_head)
        if needed:
            weights = check_weights(initial, given, initial_config, head, head_needed=True)
        layers = layers_to_copy(spec, config, initial_config, deepened)
        derived = whole and len(layers) < initial_config.num_hidden_layers
        copied = Copied(initial, given, initial_config, layers, rows, needed, derived)
        notes, asides = list(weights.notes), list(weights.asides)
        if not needed and not (backbone_alone and HEADS[head].labelled):
            notes.append("head drawn afresh")
        from_teacher = spec.init_from == "teacher" and not whole
        if from_teacher and layers == list(range(1, initial_config.num_hidden_layers + 1)):
            asides.append("all layers of the fine-tuned teacher; fewer student.layers are smaller than it")
    if copied is not None and copied.head_needed:
        start = None
    if start is not None:
        notes.append(f"head at the mean of the scores, {start:.4g}")
    own, own_key = (initial, given) if whole and initial is not None else (backbone, key)
    tokenizer = load_tokenizer(own, own_key)
    check_tokenizer(tokenizer, config, own_key, head, pairs=pairs)
    return StudentPlan(config, tokenizer, head, copied, start, notes, asides)


def layers_to_copy(
    spec: StudentSpec, config: PretrainedConfig, source: PretrainedConfig, deepened: PretrainedConfig | None = None
) -> list[int]:
    """Return, for each block of the student, the source's block, counted from 1; a checkpoint is copied block by block.

    A checkpoint may also have the depth that the student has after its surgeries, if these add layers: it is then the export of
    such a student, and its lower layers are copied.

    Raises:
        InputError: if the source is too shallow, or a checkpoint has another depth.
    """
    depth, theirs = config.num_hidden_layers, source.num_hidden_layers
    if spec.init not in ("checkpoint", "run"):
        return chosen_layers(spec.init, depth, theirs)
    after = depth if deepened is None else deepened.num_hidden_layers
    if theirs not in (depth, after):
        further = "" if after == depth else f", {after} after its surgeries"
        raise InputError(f"the student has {depth} layers{further}, the model it begins from {theirs}", str(spec.init))
    return list(range(1, depth + 1))


def head_rows(
    config: PretrainedConfig,
    source: PretrainedConfig,
    head: str = "classifier",
    key: str = "init_from",
    names: Sequence[str] | None = None,
    *,
    pretrained: bool = False,
) -> list[int] | None:
    """Return, for each output of the student, the source's output of the same name; None for a randomly initialised head.

    The head is initialised at random if the source has no such head, if its outputs have other names, or if it is a backbone
    with a classifier, which was trained on another task. The masked-LM head of a pre-trained backbone is copied.

    Raises:
        InputError: if the source's configuration names its outputs ambiguously.
    """
    if not HEADS[head].is_in(source) or (pretrained and HEADS[head].labelled):
        return None
    if not HEADS[head].labelled:
        return list(range(config.vocab_size))
    return columns(label_names(config, key), names or label_names(source, key))


def describe_init(spec: StudentSpec, config: PretrainedConfig, source: PretrainedConfig | None) -> str:
    """Describe the initialisation, as every row of results states it.

    Args:
        spec: the student's initialisation.
        config: configuration of the student, before its surgeries.
        source: configuration of the model that is copied; None if there is none.
    """
    if spec.init == "random":
        return "random"
    if spec.init in ("checkpoint", "run"):
        return f"{spec.init} {spec.checkpoint if spec.init == 'checkpoint' else run_in_words(spec.run)}".strip()
    source = source or config
    layers = chosen_layers(spec.init, config.num_hidden_layers, source.num_hidden_layers)
    kind = spec.init if isinstance(spec.init, str) else "explicit"
    ours, theirs = config.num_attention_heads, source.num_attention_heads
    heads = "" if ours == theirs else f", {ours} heads in place of {theirs}"
    return f"{kind} layers {layers} of the {'fine-tuned' if spec.init_from == 'teacher' else 'pre-trained'} backbone{heads}"


def run_in_words(run: Mapping[str, Any] | Sequence[str] | None) -> str:
    """Describe `student.run`: its name if it is a mapping with one, otherwise its overrides."""
    parts = run if isinstance(run, Mapping) else {"overrides": run or []}
    return str(parts.get("name") or " ".join(map(str, parts.get("overrides", []))))
