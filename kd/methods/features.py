"""Layers and features that methods of the same options read: pairs of layers, and one vector for each example."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kd.errors import InputError
from kd.forward import Needs, Outputs
from kd.forward.needs import Tap
from kd.functional import layer_maps
from kd.functional.geometry import mean_of_tokens
from kd.methods.base import Bound
from kd.methods.options import word

Layers = str | Sequence[Sequence[int]]

STATES = {"tokens": "hidden", "cls": "cls"}
"""States of a layer, every token's or the first token's -> the kind of tensor that they are."""

FEATURES = ("cls", "mean", "pooled", "logits")
"""Vectors of an example: a layer's first state, the mean of its real tokens' states, the input of the last linear layer, and
its output."""

OF_LAYERS = {"cls": "cls", "mean": "hidden"}
"""Feature of a layer -> the kind of tensor that it is computed from."""


def checked_layers(layers: Layers) -> Layers:
    """Return a layer map, after checking its name if it has one.

    Raises:
        InputError: for an unknown name.
    """
    return word(layers, tuple(layer_maps.NAMED_FEW), "layers") if isinstance(layers, str) else layers


def pairs_of(layers: Layers, bound: Bound) -> layer_maps.Pairs:
    """Return the pairs of a layer map, of which there is at least one.

    Raises:
        InputError: for a map that does not suit the depths, or without a pair.
    """
    student, teacher = bound.student.depth, bound.teacher.depth
    pairs = layer_maps.resolve(layers, student, teacher, named=layer_maps.NAMED_FEW)
    if not pairs:
        raise InputError(
            f"layers={layers} has no pair for a student of {student} layers; use layers=final, or give pairs, as [[1, 2]]",
            "layers",
        )
    return pairs


def needs_of(kind: str, pairs: layer_maps.Pairs) -> tuple[Needs, Sequence[Needs]]:
    """Return the needs of a student and its teacher for tensors of a kind, of paired layers."""
    ours, theirs = (Needs(taps=[Tap(kind, layer) for layer in layers]) for layers in zip(*pairs, strict=True))
    return ours, [theirs]


def tokens_of(outputs: Outputs, layer: int, states: str) -> tuple[Tensor, Tensor]:
    """Return a layer's states, (batch, tokens, width), and their mask, (batch, tokens); of one token for `cls`."""
    if states == "cls":
        return outputs.cls(layer)[:, None], torch.ones_like(outputs.mask[:, :1])
    return outputs.hidden(layer), outputs.mask


class Features:
    """Vectors of the examples of a batch, one or, of layers, one for each pair.

    Args:
        feature: a word of `FEATURES`.
        layers: layers that `cls` and `mean` are of: a name of `kd.functional.layer_maps.NAMED_FEW`, or a list of
            [student layer, teacher layer].

    Raises:
        InputError: for an unknown word, or layers of a feature that has none.
    """

    def __init__(self, feature: str, layers: Layers) -> None:
        self.feature = word(feature, FEATURES, "feature")
        self.layers = checked_layers(layers)
        self.pairs: layer_maps.Pairs = ()
        self.depths = (0, 0)
        if feature not in OF_LAYERS and layers != "final":
            raise InputError(
                f"layers={layers} is about feature=cls and feature=mean; feature={feature} has none, use layers=final",
                "layers",
            )

    def bind(self, bound: Bound) -> None:
        """Resolve the layer map, and check that the models and the task have the feature.

        Raises:
            InputError: for a layer map that does not suit the depths; for models without a classifier; or for logits of a
                regression, of which there is one.
        """
        if self.feature in OF_LAYERS:
            self.pairs = pairs_of(self.layers, bound)
            self.depths = (bound.student.depth, bound.teacher.depth)
        elif not bound.student.classifies:
            raise InputError(
                f"feature={self.feature} is one vector for each example, which a masked language model does not have; use "
                "feature=cls or feature=mean",
                "feature",
            )
        elif self.feature == "logits" and bound.task.labels is None:
            raise InputError(
                "feature=logits is one number for each example of a regression, and numbers have no direction; use feature=cls",
                "feature",
            )

    def needs(self) -> tuple[Needs, Sequence[Needs]]:
        """Return the needs of student and teacher."""
        if self.feature in OF_LAYERS:
            return needs_of(OF_LAYERS[self.feature], self.pairs)
        needs = Needs(pooled=self.feature == "pooled")
        return needs, [needs]

    def of(self, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
        """Return the student's and the teacher's vectors, (batch, width) each, of every pair of layers."""
        if self.feature == "cls":
            return [(student.cls(ours), teacher.cls(theirs)) for ours, theirs in self.pairs]
        if self.feature == "mean":
            return [
                (mean_of_tokens(student.hidden(ours), student.mask), mean_of_tokens(teacher.hidden(theirs), teacher.mask))
                for ours, theirs in self.pairs
            ]
        if self.feature == "pooled":
            return [(student.pooled, teacher.pooled)]
        return [(student.logits, teacher.logits)]

    def layer_map(self) -> Tensor | None:
        """Return the layer map as a matrix; None for features that are of no layer."""
        return layer_maps.matrix(self.pairs, *self.depths) if self.pairs else None

    def describe(self) -> dict[str, str]:
        """Describe the layer map, if there is one."""
        return {"layer map (student<-teacher)": layer_maps.describe(self.pairs)} if self.pairs else {}
