"""Models that an engine trains, with their methods and teachers."""

from dataclasses import dataclass, field

from kd.methods.base import Method
from kd.models import Encoder, FrozenTeacher
from kd.schedules import Schedule


@dataclass(frozen=True)
class Models:
    """Students with their methods, and the teachers.

    Attributes:
        students: name -> student; a single student is named `student`.
        methods: name of the student -> its method, bound.
        teachers: the frozen teachers.
        online: a teacher that is trained together with the students; None if there is none.
        weights: term -> schedule of its weight, the same for every student.
        aids: name -> frozen model that is no teacher (`Method.aids`), the same for every student.
    """

    students: dict[str, Encoder]
    methods: dict[str, Method]
    teachers: list[FrozenTeacher]
    online: Encoder | None
    weights: dict[str, Schedule]
    aids: dict[str, FrozenTeacher] = field(default_factory=dict)

    @property
    def student(self) -> Encoder:
        """First student."""
        return next(iter(self.students.values()))

    @property
    def teaching(self) -> list[Encoder]:
        """Models of all teachers, possibly without weights, in the order of `Batch.teachers`."""
        return [teacher.shape for teacher in self.teachers] + ([] if self.online is None else [self.online])
