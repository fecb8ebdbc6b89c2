"""Optimisers and learning-rate schedules."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from kd.config.schema import check_optimizer

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda fraction: 1.0 - fraction,
    "cosine": lambda fraction: (1.0 + math.cos(math.pi * fraction)) / 2,
    "constant": lambda fraction: 1.0,
}
"""Factors of the peak learning rate after the warm-up, by the fraction of the remaining steps, in [0, 1]."""


class OptimizerFactory:
    """Factory of an optimiser over modules, and of its learning-rate schedule.

    Biases and normalisation weights get no weight decay, as in BERT's training code.

    Args:
        make: function of parameter groups and `lr` that returns an optimiser, such as a partial of `torch.optim.AdamW`.
        lr: peak learning rate, from 1e-12 to 100: smaller rates change nothing in float32, larger ones diverge.
        weight_decay: weight decay of matrices, 0 or from 1e-12 to 100.
        schedule: learning rate after the warm-up: `linear` to zero, `cosine` to zero, or `constant`.
        warmup: fraction of all steps in which the rate rises linearly from zero.
    """

    def __init__(self, make: Callable[..., Optimizer], lr: float, weight_decay: float, schedule: str, warmup: float) -> None:
        check_optimizer(lr, weight_decay, schedule, warmup)
        self.make, self.lr, self.weight_decay, self.warmup = make, lr, weight_decay, warmup
        self.decay = SCHEDULES[schedule]

    def groups(self, modules: Iterable[nn.Module], rates: Mapping[nn.Parameter, float] | None = None) -> list[dict[str, Any]]:
        """Return trainable parameters in groups: for each peak learning rate one with and one without weight decay.

        Args:
            modules: modules with the parameters; shared parameters occur once.
            rates: peak learning rates of parameters that do not have `lr`.
        """
        parameters = dict.fromkeys(p for module in modules for p in module.parameters() if p.requires_grad)
        rates = rates or {}
        groups = []
        for rate in dict.fromkeys([None, *rates.values()]):
            own = {} if rate is None else {"lr": rate}
            these = [parameter for parameter in parameters if rates.get(parameter) == rate]
            groups += [
                {"params": [p for p in these if p.ndim >= 2], "weight_decay": self.weight_decay, **own},
                {"params": [p for p in these if p.ndim < 2], "weight_decay": 0.0, **own},
            ]
        return [group for group in groups if group["params"]]

    def optimizer(self, *modules: nn.Module, rates: Mapping[nn.Parameter, float] | None = None) -> Optimizer:
        """Create an optimiser over all trainable parameters of the modules; `rates` as in `groups`."""
        return self.make(self.groups(modules, rates), lr=self.lr)

    def factor(self, step: int, total: int) -> float:
        """Return the factor of the peak learning rate at an optimiser step, counted from 0, of `total`.

        The warm-up begins at 1 / (steps of the warm-up + 1). That of `transformers.get_scheduler` begins at zero, so that its
        first step changes nothing.
        """
        warm = round(self.warmup * total)
        if step < warm:
            return (step + 1) / (warm + 1)
        return self.decay(min((step - warm) / max(total - warm, 1), 1.0))

    def scheduler(self, optimizer: Optimizer, total: int) -> LambdaLR:
        """Create the learning-rate scheduler over `total` optimiser steps."""
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.factor(step, total))
