"""Inputs of a forward pass: text, word embeddings in its place, or the states of a layer to start at."""

from collections.abc import Mapping

from torch import Tensor

Inputs = Mapping[str, Tensor | int]
"""Inputs of a forward pass by name.

Output of a tokenizer:
    `attention_mask`: (batch, tokens); always needed.
    `input_ids`: (batch, tokens).
    `token_type_ids`: (batch, tokens); families without segments ignore it.

In place of `input_ids`, which may still be there; the last of these keys that is given counts:
    `words`: (batch, tokens, width), word embeddings. Positions, segments and LayerNorm are added as for ids. RoBERTa and MPNet
        count positions over the tokens that are not padding: those whose id is not the padding token's or, without
        `input_ids`, those that `attention_mask` includes.
    `embedded`: (batch, tokens, width), states of a layer, the output of the embeddings by default. Only the blocks above
        that layer and the head run on them.
    `from_layer`: the layer of `embedded`, a number from 0 (default) to the depth.

For a masked language model:
    `predicted`: (batch, tokens), bool; logits are computed at these positions only.

For a teacher whose outputs are cached (`kd.models.teachers.CachedTeacher`), in place of all of these but `attention_mask`:
    names of `Needs.tensors`: (cached examples, ...), the cached outputs, in the order of the batch.
    `LIVE` and the name of an output of the tokenizer: (live examples, tokens), of the examples that are not cached, in the
        order of the batch and padded to the longest of them.
    `ORDER`: (batch,), for each example its index among the cached ones followed by the live ones. Where it is missing, all
        examples are cached.
"""

LIVE = "live "
"""Beginning of the names of the inputs that a cached teacher has for examples which are not cached."""

ORDER = "order"
"""Name of the input that puts cached and live examples in the order of the batch."""


def tensors_of(inputs: Inputs) -> dict[str, Tensor]:
    """Return the tensors among the inputs of a pass."""
    return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}


def start_of(inputs: Inputs) -> int | None:
    """Return the layer whose states a pass starts at; None if it starts at text or word embeddings.

    Raises:
        ValueError: if `from_layer` is no layer, or is given without `embedded`.

    >>> import torch
    >>> start_of({"embedded": torch.zeros(1, 2, 4), "from_layer": 3}), start_of({"input_ids": torch.zeros(1, 2)})
    (3, None)
    """
    layer = inputs.get("from_layer", 0)
    if type(layer) is not int or layer < 0:
        raise ValueError(f"from_layer={layer} is not a layer, which is a whole number from 0")
    if "embedded" in inputs:
        return layer
    if "from_layer" in inputs:
        raise ValueError(f"from_layer={layer} was given without 'embedded', the states of that layer")
    return None
