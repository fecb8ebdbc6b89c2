"""Declaration of the tensors that a forward pass must return."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from kd.forward.kinds import KINDS, Layer, tensor_name

Derived = Callable[[Any, Mapping[str, Tensor]], Tensor]
"""Function that derives a tensor from further passes of a frozen model: (model, inputs) -> (batch, tokens, any number)."""


@dataclass(frozen=True, slots=True)
class Tap:
    """Tensors of one kind and one layer.

    Attributes:
        kind: a name in `kd.forward.kinds.KINDS`.
        layer: layer, or name of a derived tensor; None for a kind that has no layers.
        compute: function that computes a derived tensor; None for the other kinds. It is not compared, because the name of a
            derived tensor encodes everything that it depends on but the text.

    Raises:
        ValueError: for an unknown kind, or a layer that no model has.
    """

    kind: str
    layer: Layer = None
    compute: Derived | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"'{self.kind}' is not a kind of tensor; the kinds are {', '.join(KINDS)}")
        lowest = KINDS[self.kind].lowest
        if lowest is not None and not (isinstance(self.layer, int) and self.layer >= lowest):
            raise ValueError(f"{self.kind} of layer {self.layer} does not exist; its layers begin at {lowest}")


@dataclass(frozen=True, slots=True)
class Needs:
    """The tensors a method reads from one forward pass, declared before it runs.

    Layer 0 is the embedding output, layer *l* the output of block *l*. Attention and values exist for layers 1 and up.

    Args:
        hidden: layers whose hidden states are returned, for every token.
        cls: layers of which only the first token's state is returned. An example has one such vector however many tokens it
            has, so models with different tokenizers can be compared, and a cache needs about a hundredth of the space.
        attention: layers whose queries and keys are returned; scores, probabilities and relations follow from them.
        value: layers whose values are returned.
        words: whether the word embeddings are returned, (batch, tokens, width): those that the pass was given, or looked up.
        pooled: whether the input of the last linear layer is returned, (batch, width), after its dropout in training.
        derived: name -> function that computes a tensor from further passes of a frozen model, with gradients if it needs
            them. The tensor is cached like any other, so its name must encode everything that it depends on but the text.
        gradient: whether gradients are taken with respect to the returned tensors (integrated gradients, double
            backward). A frozen model then runs with gradients enabled, and attention runs its plain kernel, because the
            fused one cannot be differentiated twice.
        dropout: whether a frozen model runs with dropout, as in some authors' code; it then runs at every step.
        uncacheable_reason: why a frozen model has to run at every step: its text changes, or its dropout is on. None if its
            outputs for an example are the same each time, so that they may be cached (`kd.teacher_cache.cache`).
        taps: further tensors, of any kind.

    Attributes:
        taps: everything that is declared, beside the logits.

    >>> sorted((Needs(hidden=[1]) | Needs(hidden=[2])).hidden)
    [1, 2]
    >>> Needs(hidden=[1]) == Needs(taps=[Tap("hidden", 1)])
    True
    """

    taps: frozenset[Tap] = frozenset()
    gradient: bool = False
    dropout: bool = False
    uncacheable_reason: str | None = None

    def __init__(
        self,
        hidden: Iterable[int] = (),
        attention: Iterable[int] = (),
        value: Iterable[int] = (),
        *,
        gradient: bool = False,
        cls: Iterable[int] = (),
        uncacheable_reason: str | None = None,
        pooled: bool = False,
        words: bool = False,
        derived: Mapping[str, Derived] | None = None,
        dropout: bool = False,
        taps: Iterable[Tap] = (),
    ) -> None:
        layers = {"hidden": hidden, "cls": cls, "attention": attention, "value": value}
        declared = {Tap(kind, int(layer)) for kind, given in layers.items() for layer in sorted(given)}
        declared |= {Tap("pooled")} if pooled else set()
        declared |= {Tap("words")} if words else set()
        declared |= {Tap("derived", name, compute) for name, compute in (derived or {}).items()}
        object.__setattr__(self, "taps", frozenset(taps) | declared)
        object.__setattr__(self, "gradient", bool(gradient))
        object.__setattr__(self, "dropout", bool(dropout))
        object.__setattr__(self, "uncacheable_reason", uncacheable_reason or ("its dropout is on" if dropout else None))

    def __or__(self, other: "Needs") -> "Needs":
        reasons = dict.fromkeys(why for why in (self.uncacheable_reason, other.uncacheable_reason) if why is not None)
        return Needs(
            taps=self.taps | other.taps,
            gradient=self.gradient or other.gradient,
            dropout=self.dropout or other.dropout,
            uncacheable_reason="; ".join(reasons) or None,
        )

    @property
    def reason_to_run(self) -> str | None:
        """Reason why a frozen model with these needs runs at every step; None if its outputs may be computed once.

        >>> Needs(gradient=True).reason_to_run
        'the method takes gradients through it'
        """
        if self.uncacheable_reason is not None:
            return self.uncacheable_reason
        if self.gradient:
            return "the method takes gradients through it"
        return "word embeddings are not stored" if self.words else None

    def available_from(self, start: int | None) -> "Needs":
        """Return the needs without the tensors that a pass does not have which starts at the states of a layer.

        Args:
            start: the layer; None for a pass that starts at the text, which has all tensors.

        >>> Needs(hidden=[0, 2], attention=[2, 3], words=True).available_from(2) == Needs(hidden=[2], attention=[3])
        True
        """
        if start is None:
            return self
        return replace(self, taps=frozenset(tap for tap in self.taps if KINDS[tap.kind].exists(tap.layer, start)))

    def layers(self, kind: str) -> frozenset[Any]:
        """Return the declared layers of a kind; names for derived tensors, None for a declared kind without layers."""
        return frozenset(tap.layer for tap in self.taps if tap.kind == kind)

    @property
    def hidden(self) -> frozenset[int]:
        """Layers whose hidden states are declared."""
        return self.layers("hidden")

    @property
    def cls(self) -> frozenset[int]:
        """Layers whose first token's state is declared."""
        return self.layers("cls")

    @property
    def attention(self) -> frozenset[int]:
        """Layers whose queries and keys are declared."""
        return self.layers("attention")

    @property
    def value(self) -> frozenset[int]:
        """Layers whose values are declared."""
        return self.layers("value")

    @property
    def pooled(self) -> bool:
        """True if the input of the last linear layer is declared."""
        return bool(self.layers("pooled"))

    @property
    def words(self) -> bool:
        """True if the word embeddings are declared."""
        return bool(self.layers("words"))

    @property
    def derived(self) -> dict[str, Derived]:
        """Functions of the derived tensors, by name."""
        functions = {str(tap.layer): tap.compute for tap in self.taps if tap.compute is not None}
        return dict(sorted(functions.items()))

    @property
    def tensors(self) -> list[str]:
        """Names of the tensors that a forward pass with these needs returns.

        >>> Needs(cls=[2, 4], attention=[3]).tensors
        ['logits', 'cls-2', 'cls-4', 'query-3', 'key-3']
        """
        names = [
            tensor_name(tensor, layer)
            for name, kind in KINDS.items()
            for tensor in kind.tensors
            for layer in sorted(self.layers(name))
        ]
        return ["logits", *names]

    @property
    def tokens(self) -> bool:
        """True if a tensor with an entry for every token is declared."""
        return any(KINDS[tap.kind].by_token for tap in self.taps)

    @property
    def inside_blocks(self) -> bool:
        """True if a tensor is declared that is the output of a submodule of a block."""
        return any(KINDS[tap.kind].inside_blocks for tap in self.taps)

    def deepest(self) -> int:
        """Return the deepest layer declared, or 0 if there is none."""
        return max((tap.layer for tap in self.taps if isinstance(tap.layer, int)), default=0)

    def __str__(self) -> str:
        declared = {kind: self.layers(kind) for kind in KINDS}
        parts = [f"{kind}={sorted(layers)}" for kind, layers in declared.items() if layers - {None}]
        parts += [kind for kind, layers in declared.items() if None in layers]
        flags = {"gradient": self.gradient, "uncacheable_reason": self.uncacheable_reason is not None}
        return ", ".join([*parts, *(name for name, given in flags.items() if given)]) or "logits only"
