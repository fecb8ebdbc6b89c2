"""What leaves a forward pass, and when it runs."""

from kd.forward.lazy import Forward, Inputs
from kd.forward.needs import Needs
from kd.forward.outputs import Outputs, UndeclaredRead

__all__ = ["Forward", "Inputs", "Needs", "Outputs", "UndeclaredRead"]
