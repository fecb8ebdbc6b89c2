"""Parts of the methods of several domains: the head that reads a text together with its domain, and the columns."""

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from kd.errors import InputError
from kd.functional.hidden import at_least_float32
from kd.methods.base import Bound, Step
from kd.models import Encoder


class DomainHead(nn.Module):
    """The part of Meta-KD's models that reads a domain: :math:`u = W (e_{domain} + c(x)) + b`, c a vector of the text.

    Source: Pan et al., Meta-KD, ACL 2021, arXiv:2012.01266; authors' code.

    Args:
        domains: number of domains.
        width: of the vectors.
        spread: standard deviation of the initial weights; that of the model's own layers in BERT's code.
    """

    def __init__(self, domains: int, width: int, spread: float = 0.02) -> None:
        super().__init__()
        self.embedding = nn.Embedding(domains, width)
        self.dense = nn.Linear(width, width)
        for weight in (self.embedding.weight, self.dense.weight):
            nn.init.normal_(weight, std=spread)
        nn.init.zeros_(self.dense.bias)

    def forward(self, content: Tensor, domains: Tensor) -> Tensor:
        """Return u, (batch, width), for vectors (batch, width) and domains (batch,)."""
        return domain_vector(self.state(), content, domains)

    def state(self) -> dict[str, Tensor]:
        """Return the parameters by name."""
        return dict(self.named_parameters())


def domain_vector(state: Mapping[str, Tensor], content: Tensor, domains: Tensor) -> Tensor:
    """Return u, (batch, width), of the head with these parameters, in float32 at least."""
    weights = {name: at_least_float32(tensor) for name, tensor in state.items()}
    both = weights["embedding.weight"][domains] + at_least_float32(content)
    return in_full(linear, both, weights["dense.weight"], weights["dense.bias"])


def in_full(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Return a function of tensors without mixed precision: they are few and small, and a difference of two is taken."""
    with torch.autocast(tensors[0].device.type, enabled=False):
        return function(*tensors)


def spread_of(model: Encoder) -> float:
    """Return the standard deviation that a model's configuration gives for initial weights, BERT's 0.02 if it gives none."""
    return float(getattr(model.config, "initializer_range", 0.02))


def domains_of(bound: Bound, column: str) -> list[str]:
    """Return the names of a task's domains.

    Raises:
        InputError: if the task has no such column of classes, of two or more.
    """
    names = bound.task.column_classes.get(column)
    if names is None or len(names) < 2:
        others = ", ".join(bound.task.column_classes) or "none"
        raise InputError(
            f"domain={column} is not a column of two domains or more: 'task.extra={{{column}: classes}}'. The task's columns "
            f"of classes: {others}",
            "domain",
        )
    return names


def marks_of(names: Sequence[str]) -> Tensor:
    """Return a number for each name, (names,), long, by which another run recognises it."""
    return torch.tensor([int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest()) for name in names])


def check_column(bound: Bound, column: str | None) -> None:
    """Check that train has a column of weights.

    Raises:
        InputError: if it has not.
    """
    if column is not None and column not in bound.task.columns:
        raise InputError(
            f"train has no column '{column}': edit=[prototype_weights] adds transferability; null weighs all examples alike",
            "transferability",
        )


def transferability_of(step: Step, column: str | None, absent: float) -> Tensor:
    """Return the transferability of each example, (batch,), a constant; `absent` for each if no column is named."""
    if column is None:
        return torch.full((len(step.batch),), absent, device=step.batch.labels.device)
    return at_least_float32(step.batch.columns[column])
