"""What one forward pass must keep."""

from collections.abc import Iterable
from dataclasses import dataclass

KINDS = ("hidden", "cls", "attention", "value")


def _layers(layers: Iterable[int]) -> frozenset[int]:
    return frozenset(int(layer) for layer in layers)


@dataclass(frozen=True, slots=True)
class Needs:
    """The tensors a method reads from one forward pass, declared before it runs.

    Layer 0 is the embedding output, layer *l* the output of block *l*. Attention and values exist for layers 1 and up.

    Attributes:
        hidden: layers whose states are kept, of every token.
        cls: layers of which the first token's state alone is kept: of a sentence vector there is one whatever the tokens,
            so models with other tokenizers can be compared, and a cache stores a hundredth.
        attention: layers whose queries and keys are kept; scores, probabilities and relations follow from them.
        value: layers whose values are kept.
        gradient: whether gradients are taken with respect to what the forward shows (integrated gradients, double
            backward). A frozen model then runs with gradients enabled, and attention runs its plain kernel, because the
            fused one cannot be differentiated twice.

    >>> sorted((Needs(hidden=[1]) | Needs(hidden=[2])).hidden)
    [1, 2]
    """

    hidden: frozenset[int] = frozenset()
    cls: frozenset[int] = frozenset()
    attention: frozenset[int] = frozenset()
    value: frozenset[int] = frozenset()
    gradient: bool = False

    def __init__(
        self,
        hidden: Iterable[int] = (),
        attention: Iterable[int] = (),
        value: Iterable[int] = (),
        gradient: bool = False,
        cls: Iterable[int] = (),
    ) -> None:
        object.__setattr__(self, "hidden", _layers(hidden))
        object.__setattr__(self, "cls", _layers(cls))
        object.__setattr__(self, "attention", _layers(attention))
        object.__setattr__(self, "value", _layers(value))
        object.__setattr__(self, "gradient", bool(gradient))
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
        )

    @property
    def tokens(self) -> bool:
        """Whether a tensor is declared that has a place for every token."""
        return bool(self.hidden or self.attention or self.value)

    def deepest(self) -> int:
        """The deepest layer declared; 0 if there is none."""
        return max(self.hidden | self.cls | self.attention | self.value, default=0)

    def __str__(self) -> str:
        parts = [f"{kind}={sorted(getattr(self, kind))}" for kind in KINDS if getattr(self, kind)]
        return ", ".join(parts + ["gradient"] * self.gradient) or "logits only"
