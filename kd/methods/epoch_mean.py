"""Mean over the batches of an epoch, of what a method computes in each of them."""

import torch
from torch import Tensor, nn


class EpochMean(nn.Module):
    """Mean of a tensor over the batches of the latest epoch in which there were any.

    It is state of the method, so that it is in every checkpoint, and a run that resumes within an epoch goes on with it. An
    addition is computed on the device, and nothing waits for it.

    Under DDP every rank adds the same values, so that the state of all ranks is equal.

    Args:
        shape: shape of the tensor.

    >>> mean = EpochMean(2)
    >>> for epoch, values in ((0, [8.0, 8.0]), (1, [1.0, 0.0]), (1, [0.0, 1.0])):
    ...     mean.add(torch.tensor(values), epoch)
    >>> mean.values
    tensor([0.5000, 0.5000])
    """

    values: Tensor
    weight: Tensor
    epoch: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("values", torch.zeros(shape))
        self.register_buffer("weight", torch.zeros(()))
        self.register_buffer("epoch", torch.full((), -1, dtype=torch.long))

    @torch.no_grad()
    def add(self, values: Tensor, epoch: int, weight: Tensor | float = 1.0) -> None:
        """Add the values of a batch; those of another epoch than the last ones are the first of a new mean.

        Args:
            values: values of the batch, of the shape of the mean.
            epoch: number of the epoch.
            weight: weight > 0 of the batch in the mean; a tensor of one number or a number.
        """
        self.weight.mul_(self.epoch == epoch).add_(weight)  # of a new epoch the batch has the whole weight
        before = self.values.where(self.epoch == epoch, 0.0)  # of another epoch nothing is left, also if it was not finite
        self.values.copy_(before + (values.to(before) - before) * (weight / self.weight))
        self.epoch.fill_(epoch)
