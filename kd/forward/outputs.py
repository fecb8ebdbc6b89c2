"""Outputs of one forward pass."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kd.forward.kinds import KIND_OF, Layer, split_name, tensor_name
from kd.forward.needs import Needs
from kd.functional.hidden import at_least_float32


class UndeclaredRead(RuntimeError):
    """Error raised when a method reads a tensor that its `needs()` did not declare."""


def _heads(states: Tensor, heads: int) -> Tensor:
    """Split the width into heads: (batch, tokens, width) -> (batch, heads, tokens, width / heads)."""
    batch, tokens, width = states.shape
    if width % heads:
        raise ValueError(f"{heads} heads do not divide a width of {width}")
    return states.view(batch, tokens, heads, width // heads).transpose(1, 2)


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Return the scaled dot products of all pairs of tokens, (batch, heads, tokens, tokens)."""
    products: Tensor = left @ right.transpose(-1, -2) / math.sqrt(left.shape[-1])
    return products


@dataclass
class Outputs:
    """Logits of one forward pass, and the tensors that its `needs` declared.

    Attributes:
        logits: (batch, classes); classes is 1 for regression. For a masked language model (predicted positions, vocabulary).
        mask: (batch, tokens), bool, False on padding.
        needs: the declaration that the pass ran with.
        heads: attention heads of the model.
        tensors: `tensor -> layer -> (batch, tokens, width)` for hidden, query, key, value and words, whose layer is None;
            (batch, width) for cls and pooled, whose layer is None; (batch, tokens, any number) for derived, with names in place
            of layers. The tensors of each kind are those of `kd.forward.kinds.KINDS`.
        score_bias: (1 or batch, heads, tokens, tokens) added to the attention scores, for relative positions; or None.
        start: layer at whose states the pass started; None for a pass that started at text or word embeddings.
    """

    logits: Tensor
    mask: Tensor
    needs: Needs = field(default_factory=Needs)
    heads: int = 1
    tensors: Mapping[str, Mapping[Layer, Tensor]] = field(default_factory=dict)
    score_bias: Callable[[], Tensor] | None = None
    start: int | None = None

    def read(self, tensor: str, layer: Layer = None) -> Tensor:
        """Return a tensor of a layer.

        Args:
            tensor: a name in `kd.forward.kinds.KIND_OF`.
            layer: layer, or name of a derived tensor; None for a tensor that belongs to no layer.

        Raises:
            UndeclaredRead: if `needs` did not declare it; so do the accessors below.
        """
        if layer not in self.needs.layers(KIND_OF[tensor]):
            what = tensor if layer is None else f"{tensor} of layer {layer}"
            started = "" if self.start is None else f"; this pass started at the states of layer {self.start}"
            raise UndeclaredRead(f"{what} was read, but needs() declares only: {self.needs}{started}")
        return self.tensors[tensor][layer]

    def hidden(self, layer: int) -> Tensor:
        """Return the hidden states of a layer, (batch, tokens, width). Padding is not masked."""
        return self.read("hidden", layer)

    def cls(self, layer: int) -> Tensor:
        """Return the first token's hidden state of a layer, (batch, width); `Needs.cls` declares it."""
        return self.read("cls", layer)

    @property
    def pooled(self) -> Tensor:
        """Input of the last linear layer, (batch, width); `Needs.pooled` declares it."""
        return self.read("pooled")

    @property
    def words(self) -> Tensor:
        """Word embeddings, (batch, tokens, width), before positions and LayerNorm; `Needs.words` declares them."""
        return self.read("words")

    def derived(self, name: str) -> Tensor:
        """Return the tensor that `Needs.derived` computes under this name, (batch, tokens, any number), without a gradient."""
        return self.read("derived", name)

    def query(self, layer: int) -> Tensor:
        """Return the queries of a layer, (batch, tokens, width); `Needs.attention` declares them."""
        return self.read("query", layer)

    def key(self, layer: int) -> Tensor:
        """Return the keys of a layer, (batch, tokens, width); `Needs.attention` declares them."""
        return self.read("key", layer)

    def value(self, layer: int) -> Tensor:
        """Return the values of a layer, (batch, tokens, width)."""
        return self.read("value", layer)

    def scores(self, layer: int) -> Tensor:
        """Return attention scores before softmax and before the padding mask, (batch, heads, tokens, tokens)."""
        scores = _products(_heads(self.query(layer), self.heads), _heads(self.key(layer), self.heads))
        return scores if self.score_bias is None else scores + self.score_bias()

    def attention(self, layer: int) -> Tensor:
        """Return attention probabilities, (batch, heads, tokens, tokens): softmax of scores over real tokens, no dropout."""
        scores = at_least_float32(self.scores(layer))
        blocked = ~self.mask[:, None, None, :]
        return scores.masked_fill(blocked, torch.finfo(scores.dtype).min).softmax(dim=-1)

    def relation(self, kind: str, layer: int, heads: int) -> Tensor:
        """Return scaled dot products among queries, keys or values, (batch, heads, tokens, tokens), before softmax and mask.

        Args:
            kind: `query`, `key` or `value`.
            layer: 1 and up.
            heads: relation heads; any divisor of the width, so that models of different width and heads can be compared.

        Source: Wang et al., MiniLMv2, Findings of ACL 2021, arXiv:2012.15828, section 3.1.
        """
        states = _heads(self.read(kind, layer), heads)
        return _products(states, states)

    def detached(self) -> "Outputs":
        """Return the same outputs with every tensor detached."""
        tensors = {name: {layer: t.detach() for layer, t in layers.items()} for name, layers in self.tensors.items()}
        return replace(self, logits=self.logits.detach(), tensors=tensors)

    def named(self) -> dict[str, Tensor]:
        """Return every tensor by its name, as in `Needs.tensors`."""
        tensors = {
            tensor_name(name, layer): tensor for name, layers in self.tensors.items() for layer, tensor in layers.items()
        }
        return {"logits": self.logits, **tensors}

    @classmethod
    def from_named(cls, named: Mapping[str, Tensor], mask: Tensor, needs: Needs, heads: int) -> "Outputs":
        """Rebuild outputs from named tensors: the reverse of `named`, for attention without a positional bias.

        Raises:
            UndeclaredRead: if `needs` declares a tensor that `named` lacks.
        """
        if absent := [name for name in needs.tensors if name not in named]:
            raise UndeclaredRead(f"{absent[0]} is not among what is there: {', '.join(named)}")
        tensors: dict[str, dict[Layer, Tensor]] = {}
        for name in needs.tensors[1:]:
            tensor, layer = split_name(name)
            tensors.setdefault(tensor, {})[layer] = named[name]
        return cls(named["logits"], mask, needs, heads, tensors)

    def with_logits(self, logits: Tensor) -> "Outputs":
        """Return the same outputs with other logits, (batch, classes)."""
        return replace(self, logits=logits)
