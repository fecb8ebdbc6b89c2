"""Dropout that is cheaper than torch's on a CPU."""

import numpy as np
import torch
from torch import Tensor, nn

LEVELS = 1 << 16
"""Number of values that the random bits of one element can take; the dropout probability is a multiple of its inverse."""


class Dropout(nn.Dropout):
    """Dropout whose mask takes 16 random bits for each element, where torch draws a floating-point number.

    Torch's masks take four times as long on a CPU: they were a tenth of a bfloat16 step of a small student. The probability
    is rounded to a multiple of 2^-16 and the scale is computed from the rounded value, so the expectation is exact. The bits
    come from numpy's SFC64, seeded by torch's generator, so they still follow from torch's seed. On other devices, and in
    compiled code, torch's own dropout runs.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Set random elements of the input to zero and scale the others; in evaluation, return the input unchanged."""
        dropped = round(self.p * LEVELS)
        applies = self.training and 0 < dropped < LEVELS and input.device.type == "cpu" and not torch.compiler.is_compiling()
        if not applies:
            return super().forward(input)
        bits = np.random.SFC64(int(torch.randint(1 << 62, ()))).random_raw(-(-input.numel() // 4))
        # Signed, because torch compares no unsigned 16-bit integers; the smallest `dropped` of the 2^16 values are dropped.
        numbers = torch.from_numpy(bits.view(np.int16)[: input.numel()]).view(input.shape)
        mask = (numbers >= dropped - LEVELS // 2).to(input.dtype).mul_(LEVELS / (LEVELS - dropped))
        return input * mask

    def plain(self) -> nn.Dropout:
        """Return the equivalent `nn.Dropout`."""
        return nn.Dropout(self.p, self.inplace)


def with_cheaper_dropout(model: nn.Module) -> nn.Module:
    """Replace a model's `nn.Dropout` modules and return the model; dropout inside an attention kernel is not changed."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Dropout:
                setattr(parent, name, Dropout(child.p, child.inplace).train(child.training))
    return model
