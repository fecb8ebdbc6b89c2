"""Copies of a one-teacher method for several teachers: helpers of the methods for teacher pools."""

import copy
from collections.abc import Sequence

from torch import nn

from kd.errors import InputError
from kd.forward import Needs
from kd.methods.base import Method
from kd.models import Encoder, FrozenTeacher


def copies(inner: Method, count: int) -> nn.ModuleList:
    """Return one copy of a one-teacher method for each of `count` teachers.

    Raises:
        InputError: if the method takes several teachers.
    """
    if inner.teachers is not None and inner.teachers != 1:
        raise InputError(f"a pool shows a method one teacher at a time, this method takes {inner.teachers}", "pool")
    return nn.ModuleList(copy.deepcopy(inner) for _ in range(count))


def inner_of(each: nn.ModuleList, index: int) -> Method:
    """Return the copy that is bound to the teacher with this index."""
    method = each[index]
    assert isinstance(method, Method)
    return method


def bind_each(each: nn.ModuleList, student: Encoder, teachers: Sequence[FrozenTeacher]) -> None:
    """Bind each copy to its teacher."""
    for index, teacher in enumerate(teachers):
        inner_of(each, index).bind(student, [teacher])


def needs_of_each(each: nn.ModuleList) -> tuple[Needs, Sequence[Needs]]:
    """Return the union of the copies' needs of the student, and each copy's needs of its teacher."""
    ours, theirs = Needs(), []
    for index in range(len(each)):
        of_student, of_teacher = inner_of(each, index).needs()
        ours = ours | of_student
        theirs.append(of_teacher[0] if of_teacher else Needs())
    return ours, theirs
