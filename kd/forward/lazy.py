"""A model bound to the inputs of one step, run on first look."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from kd.forward.needs import Needs
from kd.forward.outputs import Outputs

Inputs = Mapping[str, Tensor]
"""What a tokenizer made: `input_ids`, `attention_mask` and, for some, `token_type_ids`, each (batch, tokens)."""


class Model(Protocol):
    """What a forward needs of a model."""

    def __call__(self, inputs: Inputs, needs: Needs) -> Outputs:
        """One pass."""
        ...


class Forward:
    """One model's forward pass of one step: it runs when `outputs` is first read, and only once.

    A teacher that no term looks at costs nothing, which is how a stochastic choice among teachers stays cheap.
    """

    def __init__(self, model: Model, inputs: Inputs, needs: Needs) -> None:
        self.model = model
        self.inputs = inputs
        self.needs = needs
        self._outputs: Outputs | None = None

    @property
    def outputs(self) -> Outputs:
        """What the pass over the step's own inputs showed."""
        if self._outputs is None:
            self._outputs = self.run()
        return self._outputs

    @property
    def ran(self) -> bool:
        """Return whether the pass has happened."""
        return self._outputs is not None

    def run(self, inputs: Inputs | None = None, needs: Needs | None = None) -> Outputs:
        """A further pass, by default over the same inputs with the same needs; not kept."""
        return self.model(self.inputs if inputs is None else inputs, self.needs if needs is None else needs)


class Detached(Forward):
    """Another model's forward, as a constant: nobody learns through it. The pass itself is shared with its owner."""

    def __init__(self, forward: Forward) -> None:
        super().__init__(forward.model, forward.inputs, forward.needs)
        self.shared = forward

    @property
    def outputs(self) -> Outputs:
        """What the owner's pass showed, without its graph."""
        return self.shared.outputs.detached()

    @property
    def ran(self) -> bool:
        """Return whether the pass has happened."""
        return self.shared.ran

    def run(self, inputs: Inputs | None = None, needs: Needs | None = None) -> Outputs:
        """A further pass, without a graph."""
        with torch.no_grad():
            return super().run(inputs, needs)
