"""Students and teachers."""

from kd.models.encoder import Encoder
from kd.models.teachers import CachedTeacher, FrozenTeacher

__all__ = ["CachedTeacher", "Encoder", "FrozenTeacher"]
