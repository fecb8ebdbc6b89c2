"""CUDA graphs on a CPU: compiled blocks whose outputs and gradients are overwritten when the next step begins.

A graph writes to the same memory at every replay. Here all that a compiled block has returned in a step, and all gradients of
the parameters of blocks, become NaN when the next step is marked, so that whatever is still read then shows in the result.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd.models import compiled as compilation


class Written(torch.autograd.Function):
    """Identity whose output, and whose gradient, are in memory of a graph."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, graphs: "Overwriting") -> Tensor:
        ctx.graphs = graphs
        return graphs.own(states.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.graphs.own(gradient.clone()), None


class Overwriting:
    """Stand-in for `torch.compile` and `torch.compiler.cudagraph_mark_step_begin`.

    Attributes:
        asked: keyword arguments of each call of `torch.compile`.
        events: `step` for each mark, and for each pass of a compiled block its shape, (batch, tokens), and whether it has a
            graph of autograd.
    """

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.events: list[Any] = []
        self.storages: list[torch.UntypedStorage] = []
        self.hooked: set[nn.Parameter] = set()

    def own(self, tensor: Tensor) -> Tensor:
        """Return a tensor that is overwritten when the next step begins."""
        self.storages.append(tensor.untyped_storage())
        return tensor

    def compile(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """Return a function that gives what the given one gives, in memory that is overwritten."""
        self.asked.append(options)

        def run(block: nn.Module, states: Tensor, *given: Any, **more: Any) -> Any:
            for parameter in block.parameters():
                if parameter.requires_grad and parameter not in self.hooked:
                    self.hooked.add(parameter)
                    parameter.register_hook(lambda gradient: self.own(gradient.clone()))
            output = function(block, states, *given, **more)
            first = output[0] if isinstance(output, tuple) else output
            self.events.append((*first.shape[:2], torch.is_grad_enabled()))
            written = Written.apply(first, self)
            return (written, *output[1:]) if isinstance(output, tuple) else written

        return run

    def mark(self) -> None:
        """Begin a step."""
        for storage in self.storages:
            torch.empty(0, dtype=torch.uint8).set_(storage).fill_(0xFF)
        self.storages.clear()
        self.events.append("step")

    @property
    def steps(self) -> list[list[Any]]:
        """The passes of each step."""
        found: list[list[Any]] = []
        for event in self.events:
            found.append([]) if event == "step" else found[-1].append(event)
        return found


@pytest.fixture
def overwriting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Overwriting]:
    """Stand-ins in the place of torch's."""
    graphs = Overwriting()
    monkeypatch.setattr(torch, "compile", graphs.compile)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", graphs.mark)
    compilation.compiled_forward.cache_clear()
    yield graphs
    compilation.compiled_forward.cache_clear()
