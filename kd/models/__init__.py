"""Students and teachers."""

from kd.models.encoder import Encoder
from kd.models.teachers import FrozenTeacher

__all__ = ["Encoder", "FrozenTeacher"]
