"""Base class of the methods for teacher pools: a copy of a one-teacher method for each teacher."""

import copy
from collections.abc import Sequence
from typing import TypeVar

from torch import nn

from kd.errors import InputError
from kd.methods.base import Method
from kd.methods.wrappers.base import Wrapper

T = TypeVar("T")


class PerTeacher(Wrapper):
    """Method around one copy of a one-teacher method for each teacher of a pool.

    Args:
        inner: a method of one teacher; `bind` has not been called.
        probabilities: one for each teacher, adding up to 1.

    Raises:
        InputError: if the method takes several teachers, or cannot be copied for each.
    """

    def __init__(self, inner: Method, probabilities: Sequence[float]) -> None:
        super().__init__(inner)
        if not inner.pools:
            raise InputError("this method reads no teacher, so that it is trained without a pool; use pool=none", "pool")
        if inner.teachers is not None and inner.teachers != 1:
            raise InputError(f"a pool shows a method one teacher at a time, this method takes {inner.teachers}", "pool")
        self.teachers = len(probabilities)
        self.probabilities = list(probabilities)
        self.each = nn.ModuleList(copy.deepcopy(inner) for _ in probabilities)

    @property
    def inners(self) -> Sequence[Method]:
        """Copies of the inner method, in the order of the teachers."""
        return list(self.each)  # type: ignore[arg-type]

    def split(self, teachers: Sequence[T]) -> Sequence[Sequence[T]]:
        """Return each teacher by itself."""
        return [[teacher] for teacher in teachers]
