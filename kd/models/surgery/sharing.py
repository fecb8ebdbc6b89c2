"""Parameter sharing: layers of a student run a second time, which makes it deeper without further parameters."""

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from kd.config.values import switch
from kd.errors import InputError, one_of
from kd.forward.taps import Family
from kd.models.encoder import Encoder
from kd.models.surgery.embeddings import SurgeryInputs

REPEATS = ("top", "all")
TOP = 3
"""Number of layers that `top` repeats: of six layers the authors repeat the top three, of up to three layers all."""


class ShuffledSharing:
    """Shuffled parameter sharing: after its layers, a student runs some of them again, with queries and keys exchanged.

    Source: Cho and Kang, "Pea-KD: Parameter-efficient and Accurate Knowledge Distillation on BERT", arXiv:2009.14822, section
    3.2 (SPS). In the second pass a layer's key projection computes the queries and its query projection the keys; values,
    output, feed-forward part and layer norms are the same. The order is that of the whole stack, 1, 2, 3, 1', 2', 3'.

    A repeated layer is a further layer of the model, with parameters that it shares: `parameters()` lists a shared tensor
    once, its gradient is the sum of both passes', and weight decay applies once. The exported folder holds the copies, because
    transformers has no models that share layers; a run that starts from such a folder, with this surgery, shares them again.

    Args:
        repeat: `top`, the top three layers, or all if there are fewer (the authors' models of 1, 2, 3 and 6 layers); `all`; or
            a list of different layers, from 1, in the order in which they run again. Other depths are our choice.
        shuffle: whether queries and keys are exchanged; without, the layers run again as they are (the paper's paired
            sharing).

    Raises:
        InputError: for an option that does not have one of its allowed values.
    """

    changes_vocabulary = False

    def __init__(self, repeat: str | Sequence[int] = "top", *, shuffle: bool = True) -> None:
        if isinstance(repeat, str) and repeat not in REPEATS:
            raise one_of(repeat, (*REPEATS, "[layer, ...]"), "repeat")
        self.repeat = repeat
        self.shuffle = switch(shuffle, "shuffle")

    def layers(self, depth: int) -> list[int]:
        """Return the layers that run again, from 1, in their order.

        Args:
            depth: number of layers before the surgery.

        Raises:
            InputError: for a list that is not one of different layers of a student of this depth.

        >>> ShuffledSharing("top").layers(6), ShuffledSharing("top").layers(2)
        ([4, 5, 6], [1, 2])
        """
        if isinstance(self.repeat, str):
            first = max(depth - TOP, 0) + 1 if self.repeat == "top" else 1
            return list(range(first, depth + 1))
        layers: list[Any] = list(self.repeat) if isinstance(self.repeat, Sequence) else []
        fits = all(type(layer) is int and 1 <= layer <= depth for layer in layers)
        if not layers or not fits or len(set(layers)) < len(layers):
            raise InputError(f"repeat={self.repeat} must list different layers, each from 1 to {depth}", "repeat")
        return layers

    def config(self, config: PretrainedConfig) -> PretrainedConfig:
        """Return the configuration of the deeper student."""
        deeper = copy.deepcopy(config)
        deeper.num_hidden_layers = config.num_hidden_layers + len(self.layers(config.num_hidden_layers))
        return deeper

    def shape(self, student: Encoder) -> Encoder:
        """Return the student with the repeated layers."""
        self.repeat_layers(student)
        return student

    def __call__(self, student: Encoder, inputs: SurgeryInputs) -> tuple[Encoder, str]:
        """Return the student with the repeated layers, and a description of the change."""
        layers = self.repeat_layers(student)
        how = "queries and keys exchanged" if self.shuffle else "unchanged"
        return student, f"layers {layers} shared: they run a second time, {how}, which makes {student.depth} layers"

    def repeat_layers(self, student: Encoder) -> list[int]:
        """Append the repeated layers to a student's; return them as they are counted before."""
        layers = self.layers(student.depth)
        blocks = student.blocks
        for layer in layers:
            blocks.append(sharing_block(blocks[layer - 1], student.family, shuffle=self.shuffle))
        student.config.num_hidden_layers = len(blocks)
        return layers


def sharing_block(block: nn.Module, family: Family, *, shuffle: bool) -> nn.Module:
    """Return a block that has modules of its own and shares the parameters of another.

    Args:
        block: the other block.
        family: module paths of its family.
        shuffle: exchange the projections of queries and keys.
    """
    # What deepcopy finds here it does not copy.
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers())}
    for module in block.modules():
        shared |= {id(value): value for value in vars(module).values() if isinstance(value, PretrainedConfig)}
    again = copy.deepcopy(block, shared)
    if shuffle:
        query, key = again.get_submodule(family.query), again.get_submodule(family.key)
        again.set_submodule(family.query, key)
        again.set_submodule(family.key, query)
    return again
