"""A model bound to the inputs of one step; its forward pass runs when its outputs are first read."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from kd.forward.inputs import Inputs, start_of
from kd.forward.needs import Needs
from kd.forward.outputs import Outputs


class Model(Protocol):
    """Interface of a model that `Forward` can run."""

    def __call__(self, inputs: Inputs, needs: Needs) -> Outputs:
        """Run one forward pass and return the outputs that `needs` declares."""
        ...


ModelT = TypeVar("ModelT", bound=Model, covariant=True)


class Forward(Generic[ModelT]):
    """Forward pass of one model in one step: it runs when `outputs` is first read, and only once.

    A teacher that no loss term reads is not run, which is how a stochastic choice among teachers stays cheap.
    """

    def __init__(self, model: ModelT, inputs: Mapping[str, Tensor], needs: Needs) -> None:
        self.model = model
        self.inputs = inputs
        self.needs = needs
        self._outputs: Outputs | None = None

    @property
    def outputs(self) -> Outputs:
        """Outputs of the forward pass over the inputs of the step."""
        if self._outputs is None:
            self._outputs = self.run()
        return self._outputs

    @property
    def ran(self) -> bool:
        """Return whether the pass has happened."""
        return self._outputs is not None

    def run(self, inputs: Inputs | None = None, needs: Needs | None = None) -> Outputs:
        """Run a further forward pass, by default with the same inputs and needs; its outputs are not cached.

        Of the same needs, a pass that starts at the states of a layer returns what it has.
        """
        if inputs is None:
            return self.model(self.inputs, self.needs if needs is None else needs)
        return self.model(inputs, self.needs.available_from(start_of(inputs)) if needs is None else needs)

    @torch.no_grad()
    def evaluate(self, inputs: Inputs | None = None, needs: Needs | None = None) -> Outputs:
        """Run a further forward pass without dropout and without recording a graph, for a reward; arguments as for `run`."""
        wanted = self.needs if needs is None else needs
        plain = Needs(taps=wanted.taps, uncacheable_reason=wanted.uncacheable_reason)
        with evaluating(self.model):
            return self.run(self.inputs if inputs is None else inputs, plain)


@contextlib.contextmanager
def evaluating(model: object) -> Iterator[None]:
    """Put a model into eval mode, and each of its modules back into its own mode on exit."""
    modes = {module: module.training for module in model.modules()} if isinstance(model, nn.Module) else {}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, training in modes.items():
            module.training = training


class Detached(Forward[ModelT]):
    """Forward pass of another model, read without gradients; `outputs` shares the pass with the `Forward` given."""

    def __init__(self, forward: Forward[ModelT]) -> None:
        super().__init__(forward.model, forward.inputs, forward.needs)
        self.shared = forward

    @property
    def outputs(self) -> Outputs:
        """Outputs of the shared forward pass, detached from its graph."""
        return self.shared.outputs.detached()

    @property
    def ran(self) -> bool:
        """Return whether the pass has happened."""
        return self.shared.ran

    def run(self, inputs: Inputs | None = None, needs: Needs | None = None) -> Outputs:
        """Run a further forward pass without recording a graph."""
        with torch.no_grad():
            return super().run(inputs, needs)
