"""Attention masks that are made without reading their values."""

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def expanded_mask(model: "PreTrainedModel", mask: Tensor) -> Tensor:
    """Return the mask that a model's attention takes, in the form that transformers passes on as it is.

    Given a mask of tokens, transformers asks whether it hides any, to leave it out if it does not: the answer is read from the
    device, so that every forward pass waits for all work queued before it. Values are the same with this mask, up to another
    kernel's rounding in a batch without padding.

    Args:
        model: the model, whose attention decides the form: bool where it is fused, else a number to add to the scores.
        mask: (batch, tokens), of the real tokens.

    Returns:
        (batch, 1, tokens, tokens).
    """
    from transformers.masking_utils import create_bidirectional_mask

    states = mask.new_empty((*mask.shape, 0), dtype=model.dtype)  # of which shape, type and device are read
    return create_bidirectional_mask(model.config, states, mask, allow_is_bidirectional_skip=False)  # type: ignore[return-value]
