"""Dropout that costs less on a CPU."""

import numpy as np
import torch
from torch import Tensor, nn

LEVELS = 1 << 16


class Dropout(nn.Dropout):
    """Dropout whose masks are made of 16 random bits an element, where torch draws a number for each.

    A mask of torch's takes four times as long on a CPU: together they were a tenth of a bfloat16 step of a small student. The
    probability is rounded to a multiple of 2^-16, and the scale follows the rounded one, so the expectation is exact. The bits
    are those of numpy's SFC64, seeded by torch's generator, so what follows from torch's seed follows from it still. On other
    devices, and in code that is compiled, it is torch's own.
    """

    def forward(self, input: Tensor) -> Tensor:
        """The input with elements set to zero at random and the others scaled; the input itself in evaluation."""
        dropped = round(self.p * LEVELS)
        ours = self.training and 0 < dropped < LEVELS and input.device.type == "cpu" and not torch.compiler.is_compiling()
        if not ours:
            return super().forward(input)
        bits = np.random.SFC64(int(torch.randint(1 << 62, ()))).random_raw(-(-input.numel() // 4))
        # As signed numbers, because torch compares no others of 16 bits: the smallest `dropped` of them are dropped.
        numbers = torch.from_numpy(bits.view(np.int16)[: input.numel()]).view(input.shape)
        mask = (numbers >= dropped - LEVELS // 2).to(input.dtype).mul_(LEVELS / (LEVELS - dropped))
        return input * mask

    def plain(self) -> nn.Dropout:
        """Torch's own."""
        return nn.Dropout(self.p, self.inplace)


def with_cheaper_dropout(model: nn.Module) -> nn.Module:
    """The model with its `nn.Dropout` modules replaced; what drops attention inside a kernel stays."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Dropout:
                setattr(parent, name, Dropout(child.p, child.inplace).train(child.training))
    return model
