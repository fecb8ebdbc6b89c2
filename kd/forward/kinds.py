"""Kinds of tensors that a forward pass can return beside its logits. A new kind is a new row in `KINDS`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

Layer = int | str | None
"""Layer of a tensor; a name for tensors that are derived from further passes, None for those that belong to no layer."""


def _all_tokens(states: Tensor) -> Tensor:
    return states


def _first_token(states: Tensor) -> Tensor:
    return states[:, 0]


@dataclass(frozen=True, slots=True)
class Kind:
    """Kind of tensor that `Needs` can declare.

    Attributes:
        tensors: names of the tensors that are returned for each declared layer.
        lowest: lowest layer that has it, 0 if the embeddings' output does; None if it belongs to no layer.
        by_token: True for tensors with a row for every token, (batch, tokens, any number); False for (batch, width).
        of_states: function that takes the tensor from a layer's hidden states, (batch, tokens, width). None for tensors that
            do not follow from them: those with layers are the outputs of the submodules whose paths
            `kd.forward.taps.Family` lists under their names.
        of_text: True for tensors that follow from the text and not from the states of a layer, so that a pass that starts at a
            layer (`kd.forward.inputs.Inputs`) has none.
    """

    tensors: tuple[str, ...]
    lowest: int | None = None
    by_token: bool = True
    of_states: Callable[[Tensor], Tensor] | None = None
    of_text: bool = False

    @property
    def inside_blocks(self) -> bool:
        """True if the tensors are outputs of submodules of a block, not of the block."""
        return self.lowest is not None and self.of_states is None

    def exists(self, layer: Layer, start: int) -> bool:
        """Return whether a pass that starts at the states of layer `start` has the tensors of a layer.

        >>> KINDS["hidden"].exists(2, start=2), KINDS["attention"].exists(2, start=2)
        (True, False)
        """
        if self.lowest is None:
            return not self.of_text
        return isinstance(layer, int) and layer >= start + self.lowest


KINDS: Mapping[str, Kind] = {
    "pooled": Kind(("pooled",), by_token=False),
    "hidden": Kind(("hidden",), lowest=0, of_states=_all_tokens),
    "cls": Kind(("cls",), lowest=0, by_token=False, of_states=_first_token),
    "attention": Kind(("query", "key"), lowest=1),
    "value": Kind(("value",), lowest=1),
    "words": Kind(("words",), of_text=True),
    "derived": Kind(("derived",), of_text=True),
}
"""Kinds by the name under which `Needs` declares them."""

KIND_OF: Mapping[str, str] = {tensor: name for name, kind in KINDS.items() for tensor in kind.tensors}
"""Kind that declares a tensor: name of the tensor -> name of the kind."""


def tensor_name(tensor: str, layer: Layer) -> str:
    """Return the name of a tensor of a layer, as in `Needs.tensors`.

    >>> tensor_name("query", 3), tensor_name("pooled", None)
    ('query-3', 'pooled')
    """
    return tensor if layer is None else f"{tensor}-{layer}"


def split_name(name: str) -> tuple[str, Layer]:
    """Return the tensor and the layer of a name: the reverse of `tensor_name`.

    >>> split_name("query-3"), split_name("pooled"), split_name("derived-maps-k10")
    (('query', 3), ('pooled', None), ('derived', 'maps-k10'))
    """
    tensor, _, layer = name.partition("-")
    if not layer:
        return tensor, None
    return tensor, layer if KINDS[KIND_OF[tensor]].lowest is None else int(layer)


def by_token(name: str) -> bool:
    """Return whether the tensor with this name has a row for every token; logits and some others have one for every example."""
    tensor = name.partition("-")[0]
    return tensor in KIND_OF and KINDS[KIND_OF[tensor]].by_token
