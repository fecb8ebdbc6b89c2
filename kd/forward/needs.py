"""Declaration of the tensors that a forward pass must return."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

KINDS = ("hidden", "cls", "attention", "value", "derived")

Derived = Callable[[Any, Mapping[str, Tensor]], Tensor]
"""Function that derives a tensor from further passes of a frozen model: (model, inputs) -> (batch, tokens, any number)."""


def _layers(layers: Iterable[int]) -> frozenset[int]:
    return frozenset(int(layer) for layer in layers)


@dataclass(frozen=True, slots=True)
class Needs:
    """The tensors a method reads from one forward pass, declared before it runs.

    Layer 0 is the embedding output, layer *l* the output of block *l*. Attention and values exist for layers 1 and up.

    Attributes:
        hidden: layers whose hidden states are returned, for every token.
        cls: layers of which only the first token's state is returned. An example has one such vector however many tokens it
            has, so models with different tokenizers can be compared, and a cache needs about a hundredth of the space.
        attention: layers whose queries and keys are returned; scores, probabilities and relations follow from them.
        value: layers whose values are returned.
        pooled: whether the input of the last linear layer is returned, (batch, width), after its dropout in training.
        derived: name -> function that computes a tensor from further passes of a frozen model, with gradients if it needs
            them. The tensor is cached like any other, so its name must encode everything that it depends on but the text.
        gradient: whether gradients are taken with respect to the returned tensors (integrated gradients, double
            backward). A frozen model then runs with gradients enabled, and attention runs its plain kernel, because the
            fused one cannot be differentiated twice.
        dropout: whether a frozen model runs with dropout, as in some authors' code; it then runs at every step.
        uncacheable_reason: why a frozen model has to run at every step: its text changes, or its dropout is on. Empty if its
            outputs for an example are the same each time, so that they may be cached (`kd.teacher_cache.cache`).

    >>> sorted((Needs(hidden=[1]) | Needs(hidden=[2])).hidden)
    [1, 2]
    """

    hidden: frozenset[int] = frozenset()
    cls: frozenset[int] = frozenset()
    attention: frozenset[int] = frozenset()
    value: frozenset[int] = frozenset()
    pooled: bool = False
    derived: Mapping[str, Derived] = field(default_factory=dict, hash=False)
    gradient: bool = False
    dropout: bool = False
    uncacheable_reason: str = ""

    def __init__(
        self,
        hidden: Iterable[int] = (),
        attention: Iterable[int] = (),
        value: Iterable[int] = (),
        gradient: bool = False,
        cls: Iterable[int] = (),
        uncacheable_reason: str = "",
        pooled: bool = False,
        derived: Mapping[str, Derived] | None = None,
        dropout: bool = False,
    ) -> None:
        object.__setattr__(self, "hidden", _layers(hidden))
        object.__setattr__(self, "cls", _layers(cls))
        object.__setattr__(self, "attention", _layers(attention))
        object.__setattr__(self, "value", _layers(value))
        object.__setattr__(self, "pooled", bool(pooled))
        object.__setattr__(self, "derived", dict(derived or {}))
        object.__setattr__(self, "gradient", bool(gradient))
        object.__setattr__(self, "dropout", bool(dropout))
        object.__setattr__(self, "uncacheable_reason", uncacheable_reason or ("its dropout is on" if dropout else ""))
        for kind, lowest in (("hidden", 0), ("cls", 0), ("attention", 1), ("value", 1)):
            if below := [layer for layer in getattr(self, kind) if layer < lowest]:
                raise ValueError(f"{kind} of layer {min(below)} does not exist; its layers begin at {lowest}")

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(
            self.hidden | other.hidden,
            self.attention | other.attention,
            self.value | other.value,
            self.gradient or other.gradient,
            self.cls | other.cls,
            "; ".join(dict.fromkeys(why for why in (self.uncacheable_reason, other.uncacheable_reason) if why)),
            self.pooled or other.pooled,
            {**self.derived, **other.derived},
            self.dropout or other.dropout,
        )

    @property
    def tensors(self) -> list[str]:
        """Names of the tensors that a forward pass with these needs returns.

        >>> Needs(cls=[2, 4], attention=[3]).tensors
        ['logits', 'cls-2', 'cls-4', 'query-3', 'key-3']
        """
        kinds = {"hidden": self.hidden, "cls": self.cls, "query": self.attention, "key": self.attention, "value": self.value}
        layered = (f"{kind}-{layer}" for kind, layers in kinds.items() for layer in sorted(layers))
        return ["logits", *["pooled"] * self.pooled, *layered, *(f"derived-{name}" for name in sorted(self.derived))]

    @property
    def tokens(self) -> bool:
        """True if a tensor with an entry for every token is declared."""
        return bool(self.hidden or self.attention or self.value or self.derived)

    def deepest(self) -> int:
        """Return the deepest layer declared, or 0 if there is none."""
        return max(self.hidden | self.cls | self.attention | self.value, default=0)

    def __str__(self) -> str:
        parts = [f"{kind}={sorted(getattr(self, kind))}" for kind in KINDS if getattr(self, kind)]
        flags = {"pooled": self.pooled, "gradient": self.gradient, "uncacheable_reason": self.uncacheable_reason}
        return ", ".join([*parts, *(name for name, given in flags.items() if given)]) or "logits only"
