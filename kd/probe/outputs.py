"""Forward passes of models over examples: logits, and one vector for each example and layer."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kd.data.tokenized import Tokens, batches_by_length, tokenizer_fingerprint
from kd.errors import one_of
from kd.forward import Needs, Outputs
from kd.functional.geometry import mean_of_tokens
from kd.models import FrozenTeacher
from kd.system import distributed

VECTORS = ("mean", "cls")
"""Vector of an example in a layer: the mean state of its real tokens, or the first token's."""

Rows = Sequence[tuple[str, ...]]
"""One or two texts for each example."""


def batches(model: FrozenTeacher, texts: Rows, max_length: int) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Yield examples in batches of similar length: their indices, and the inputs of a model on its device.

    Args:
        model: the model, which is moved to the GPU if there is one.
        texts: the examples.
        max_length: number of tokens to which they are truncated, as in training.
    """
    device = distributed.device("auto")
    model.encoder.to(device)
    tokens = Tokens(model.tokenizer, texts, max_length)  # type: ignore[arg-type]
    for rows in batches_by_length(tokens.offsets, (0, len(texts))):
        yield rows, {name: tensor.to(device) for name, tensor in tokens.pad(rows).items()}


def run(model: FrozenTeacher, inputs: dict[str, Tensor], needs: Needs) -> Outputs:
    """Return the outputs of one pass without gradients, with logits in the task's order of classes."""
    return model.in_order(model.run(inputs, needs))


def in_rows(batches: Sequence[tuple[list[int], Tensor]]) -> Tensor:
    """Return tensors of batches, each with a row for each example, in the order of the examples, on the CPU."""
    order = torch.tensor([row for rows, _ in batches for row in rows])
    return torch.cat([values.cpu() for _, values in batches])[order.argsort()]


def logits_of(model: FrozenTeacher, texts: Rows, max_length: int) -> Tensor:
    """Return the logits of a model, (examples, classes), float32."""
    return in_rows([(rows, run(model, inputs, Needs()).logits.float()) for rows, inputs in batches(model, texts, max_length)])


def vectors_of(model: FrozenTeacher, texts: Rows, max_length: int, kind: str) -> list[Tensor]:
    """Return the vectors of examples in each layer, from layer 0 on: each (examples, width), float64.

    Args:
        model: the model.
        texts: the examples.
        max_length: number of tokens to which they are truncated.
        kind: one of `VECTORS`.

    Raises:
        InputError: for another kind.
    """
    if kind not in VECTORS:
        raise one_of(kind, VECTORS, "--vectors")
    layers = range(model.depth + 1)
    needs = Needs(hidden=layers) if kind == "mean" else Needs(cls=layers)
    found: list[list[tuple[list[int], Tensor]]] = [[] for _ in layers]
    for rows, inputs in batches(model, texts, max_length):
        outputs = run(model, inputs, needs)
        for layer in layers:
            vectors = mean_of_tokens(outputs.hidden(layer), outputs.mask) if kind == "mean" else outputs.cls(layer)
            found[layer].append((rows, vectors.double()))
    return [in_rows(of_layer) for of_layer in found]


def same_tokens(one: FrozenTeacher, other: FrozenTeacher) -> bool:
    """Return whether two models cut texts into the same tokens."""
    return tokenizer_fingerprint(one.tokenizer) == tokenizer_fingerprint(other.tokenizer)
