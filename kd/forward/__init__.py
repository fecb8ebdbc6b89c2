"""Outputs of a forward pass, the declaration of what it must return, and its deferred execution."""

from kd.forward.inputs import Inputs
from kd.forward.lazy import Forward, Model
from kd.forward.needs import Needs, Tap
from kd.forward.outputs import Outputs, UndeclaredRead

__all__ = ["Forward", "Inputs", "Model", "Needs", "Outputs", "Tap", "UndeclaredRead"]
