"""Paths of the modules whose outputs methods may read, for each backbone family, and the hooks that record them.

A new family is a new row in `FAMILIES`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from kd.errors import one_of
from kd.forward.kinds import KINDS, Layer
from kd.forward.needs import Needs


def _relative_positions(base: nn.Module, states: Tensor) -> Tensor:
    bias: Tensor = base.get_submodule("encoder").compute_position_bias(states)  # type: ignore[operator]
    return bias


@dataclass(frozen=True, slots=True)
class Family:
    """Module paths and configuration names of one backbone family of transformers 5.

    `base`, `pooler` (the linear layer that reads the first token's last state) and `outputs` (the last linear layer; the
    dropout of its input is a sibling module) are paths in the classifier, `masked_lm` is the path of the whole masked-LM
    head in a model that has one (None if the family has no single module for it), `blocks` and `embeddings` are paths in the
    base model, `query`, `key`, `value` and `context` (the projection of attention times values, whose input has the heads side
    by side) in a block; `intermediate`, `activation` and `dropouts` are names in the configuration. If
    `positions_skip_padding`, positions are counted over non-padding tokens only, starting after the padding token's id.
    """

    base: str
    blocks: str
    query: str
    key: str
    value: str
    context: str
    inputs: tuple[str, ...]
    dropouts: tuple[str, ...]
    intermediate: str = "intermediate_size"
    activation: str = "hidden_act"
    embeddings: str = "embeddings"
    outputs: str = "classifier"
    pooler: str = "classifier.dense"
    masked_lm: str | None = None
    score_bias: Callable[[nn.Module, Tensor], Tensor] | None = None
    positions_skip_padding: bool = False


_BERT_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")

FAMILIES: Mapping[str, Family] = {
    "bert": Family(
        base="bert",
        blocks="encoder.layer",
        query="attention.self.query",
        key="attention.self.key",
        value="attention.self.value",
        context="attention.output.dense",
        inputs=("input_ids", "attention_mask", "token_type_ids"),
        dropouts=_BERT_DROPOUTS,
        pooler="bert.pooler.dense",
        masked_lm="cls",
    ),
    "roberta": Family(
        base="roberta",
        blocks="encoder.layer",
        query="attention.self.query",
        key="attention.self.key",
        value="attention.self.value",
        context="attention.output.dense",
        inputs=("input_ids", "attention_mask"),
        dropouts=_BERT_DROPOUTS,
        outputs="classifier.out_proj",
        masked_lm="lm_head",
        positions_skip_padding=True,
    ),
    "distilbert": Family(
        base="distilbert",
        blocks="transformer.layer",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        context="attention.out_lin",
        inputs=("input_ids", "attention_mask"),
        dropouts=("dropout", "attention_dropout", "seq_classif_dropout"),
        intermediate="hidden_dim",
        activation="activation",
        pooler="pre_classifier",
    ),
    "mpnet": Family(
        base="mpnet",
        blocks="encoder.layer",
        query="attention.attn.q",
        key="attention.attn.k",
        value="attention.attn.v",
        context="attention.attn.o",
        inputs=("input_ids", "attention_mask"),
        dropouts=("hidden_dropout_prob", "attention_probs_dropout_prob"),
        outputs="classifier.out_proj",
        masked_lm="lm_head",
        positions_skip_padding=True,
        score_bias=_relative_positions,
    ),
}


def family_of(model_type: str, key: str = "model_type") -> Family:
    """Return the family of a transformers `model_type`.

    Raises:
        InputError: for a `model_type` that is not in `FAMILIES`.
    """
    if model_type not in FAMILIES:
        raise one_of(model_type, tuple(FAMILIES), key)
    return FAMILIES[model_type]


def _first(output: Any) -> Tensor:
    # A BERT block returns a tensor, an MPNet block a tuple whose first entry is that tensor.
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def differentiable(states: Tensor) -> Tensor:
    """Return a tensor that requires a gradient: the one given if it does, otherwise a leaf with the same values."""
    return states if states.requires_grad else states.detach().requires_grad_()


@contextmanager
def record(
    base: nn.Module, family: Family, needs: Needs, embedded: Tensor | None = None, from_layer: int = 0
) -> Iterator[dict[str, dict[Layer, Tensor]]]:
    """Record the tensors that `needs` declares while the base model runs once inside this context.

    Layers are counted by calls of blocks, not by modules, so that a block that several layers share is recorded at the right
    one. A projection that several blocks share is recorded as what the block that is running uses it for: the query
    projection of one block may be the key projection of another.

    Args:
        base: the model without its head.
        family: the module paths of its family.
        needs: the tensors to record.
        embedded: (batch, tokens, width), replaces the output of the embeddings.
        from_layer: layer of which `embedded` are the states; the model runs the blocks above it (`blocks_above`).

    Yields:
        `tensor -> layer -> (batch, tokens, width)`, or (batch, width) for `cls`, filled as the model runs.
    """
    layered = {name: kind for name, kind in KINDS.items() if kind.lowest is not None}
    declared = {name: needs.layers(name) for name in layered}
    seen: dict[str, dict[Layer, Tensor]] = {tensor: {} for kind in layered.values() for tensor in kind.tensors}
    inside = {tensor: declared[name] for name, kind in layered.items() if kind.inside_blocks for tensor in kind.tensors}
    layer = from_layer
    pending: dict[nn.Module, list[str]] = {}  # projection -> tensors of the running block that are its outputs

    def keep_states(states: Tensor) -> None:
        for name, kind in layered.items():
            if kind.of_states is not None and layer in declared[name]:
                (tensor,) = kind.tensors
                seen[tensor][layer] = kind.of_states(states)

    def keep_embeddings(_: nn.Module, __: Any, output: Any) -> Any:
        nonlocal layer
        layer = from_layer
        given = _first(output) if embedded is None else embedded
        # No parameter of a frozen model requires a gradient, so its graph has to start at the output of the embeddings.
        states = differentiable(given) if needs.gradient else given
        keep_states(states)
        return states if states is not given or embedded is not None else None

    def enter_block(block: nn.Module, _: Any) -> None:
        pending.clear()
        for tensor in inside:
            pending.setdefault(block.get_submodule(getattr(family, tensor)), []).append(tensor)

    def keep_block(_: nn.Module, __: Any, output: Any) -> None:
        nonlocal layer
        layer += 1
        keep_states(_first(output))

    def keep_projection(module: nn.Module, _: Any, output: Any) -> None:
        tensors = pending.get(module, [])
        for tensor in tensors:
            if layer + 1 in inside[tensor]:
                seen[tensor][layer + 1] = _first(output)
        # A module that is two projections of one block is called once for each, in the order of the table.
        if len(tensors) > 1:
            del tensors[0]

    if embedded is None and not any(declared.values()):
        yield seen
        return
    with ExitStack() as stack:

        def hook(module: nn.Module, function: Callable[[nn.Module, Any, Any], None]) -> None:
            stack.callback(module.register_forward_hook(function).remove)

        hook(base.get_submodule(family.embeddings), keep_embeddings)
        blocks = list(base.get_submodule(family.blocks).children())  # each module once
        paths = [getattr(family, tensor) for tensor, layers in inside.items() if layers]
        for block in blocks:
            hook(block, keep_block)
            if paths:
                stack.callback(block.register_forward_pre_hook(enter_block).remove)
        for projection in dict.fromkeys(block.get_submodule(path) for block in blocks for path in paths):
            hook(projection, keep_projection)
        yield seen


@dataclass(frozen=True)
class LeftOut:
    """Parts of a model that its passes are made without.

    Attributes:
        heads: layer, from 1, and head, from 0, of each attention head whose output is zero.
        layers: layers, from 1, whose output is their input.
    """

    heads: frozenset[tuple[int, int]] = field(default_factory=frozenset)
    layers: frozenset[int] = field(default_factory=frozenset)

    def __or__(self, other: "LeftOut") -> "LeftOut":
        return LeftOut(self.heads | other.heads, self.layers | other.layers)

    def __bool__(self) -> bool:
        return bool(self.heads or self.layers)


@contextmanager
def leave_out(base: nn.Module, family: Family, parts: LeftOut, heads: int, from_layer: int = 0) -> Iterator[None]:
    """Leave out attention heads and layers while the base model runs once inside this context.

    A head's part of attention times values is set to zero before the projection that mixes the heads; the bias of that
    projection, and the residual connection around it, stay. A layer that is left out returns its input, residual connections
    and LayerNorms included. Layers are counted by calls of blocks, not by modules, so that of a block that several layers share
    only the given one is changed. Without any part no hook is registered.

    Enter it before `record`, which then records the states that the pass goes on with.

    Args:
        base: the model without its head.
        family: the module paths of its family.
        parts: the heads and layers.
        heads: attention heads of a block.
        from_layer: layer at whose states the pass starts (`blocks_above`).
    """
    if not parts:
        yield
        return
    layer = from_layer

    def enter_block(_: nn.Module, __: Any) -> None:
        nonlocal layer
        layer += 1

    def zero_heads(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        chosen = [head for of, head in parts.heads if of == layer]
        if not chosen:
            return None
        by_head = arguments[0].unflatten(-1, (heads, -1)).clone()
        for head in chosen:
            by_head[..., head, :] = 0
        return (by_head.flatten(-2), *arguments[1:])

    def return_input(_: nn.Module, arguments: tuple[Tensor, ...], output: Any) -> Any:
        if layer not in parts.layers:
            return None
        return (arguments[0], *output[1:]) if isinstance(output, tuple) else arguments[0]

    with ExitStack() as stack:
        blocks = list(base.get_submodule(family.blocks).children())  # each module once
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(enter_block).remove)
            stack.callback(block.register_forward_hook(return_input).remove)
        for projection in dict.fromkeys(block.get_submodule(family.context) for block in blocks):
            stack.callback(projection.register_forward_pre_hook(zero_heads).remove)
        yield


@contextmanager
def blocks_above(base: nn.Module, family: Family, layer: int) -> Iterator[None]:
    """Let a base model have only its blocks above a layer inside this context; with layer 0 it has all of them."""
    if layer == 0:
        yield
        return
    path, _, name = family.blocks.rpartition(".")
    owner = base.get_submodule(path)
    blocks = owner.get_submodule(name)
    setattr(owner, name, blocks[layer:])  # type: ignore[index]
    try:
        yield
    finally:
        setattr(owner, name, blocks)
