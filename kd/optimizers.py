"""Optimisers and learning-rate schedules."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from kd.errors import InputError
from kd.schema import check_optimizer

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda fraction: 1.0 - fraction,
    "cosine": lambda fraction: (1.0 + math.cos(math.pi * fraction)) / 2,
    "constant": lambda fraction: 1.0,
}


class OptimizerFactory:
    """Makes an optimiser over modules, and its schedule.

    Biases and normalisation weights get no weight decay, as in BERT's own training code.

    Args:
        make: takes parameter groups and `lr`, gives an optimiser; for example a partial of `torch.optim.AdamW`.
        lr: peak learning rate, from 1e-12 to 100: below it nothing moves, above it nothing converges.
        weight_decay: of matrices, 0 or from 1e-12 to 100.
        schedule: after the warm-up: `linear` to zero, `cosine` to zero, or `constant`.
        warmup: fraction of all steps in which the rate rises linearly from zero.
    """

    def __init__(self, make: Callable[..., Optimizer], lr: float, weight_decay: float, schedule: str, warmup: float) -> None:
        check_optimizer(lr, weight_decay, schedule, warmup)
        self.make, self.lr, self.weight_decay, self.warmup = make, lr, weight_decay, warmup
        self.decay = SCHEDULES[schedule]

    def groups(self, modules: Iterable[nn.Module]) -> list[dict[str, Any]]:
        """Trainable parameters in two groups: with and without weight decay. Shared ones once."""
        parameters = dict.fromkeys(p for module in modules for p in module.parameters() if p.requires_grad)
        matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
        vectors = [parameter for parameter in parameters if parameter.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": self.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def optimizer(self, *modules: nn.Module) -> Optimizer:
        """An optimiser over all trainable parameters of the modules.

        Raises:
            InputError: if what was made is none.
        """
        made = self.make(self.groups(modules), lr=self.lr)
        if not isinstance(made, Optimizer):
            found = type(made).__name__
            raise InputError(f"optimizer.factory made a {found}, not a torch.optim.Optimizer", "optimizer.factory._target_")
        return made

    def factor(self, step: int, total: int) -> float:
        """What the peak rate is multiplied by at an optimiser step, counted from 0, of `total`."""
        warm = round(self.warmup * total)
        if step < warm:
            return (step + 1) / (warm + 1)
        return self.decay(min((step - warm) / max(total - warm, 1), 1.0))

    def scheduler(self, optimizer: Optimizer, total: int) -> LambdaLR:
        """The schedule over `total` optimiser steps."""
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.factor(step, total))
