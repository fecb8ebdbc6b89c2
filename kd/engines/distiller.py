"""Engine for one student and any number of frozen teachers."""

from collections.abc import Iterable, Mapping, Sequence

from kd.data.batch import Batch
from kd.data.tasks import Task
from kd.engines.base import Engine, Learner, Loss, check_terms
from kd.engines.optimizer import OptimizerFactory
from kd.errors import InputError
from kd.forward import Forward
from kd.methods.base import Method, Progress, Step, needs_of_teachers
from kd.models import Encoder, FrozenTeacher
from kd.schedules import Schedule


class Distiller(Engine):
    """Engine that trains one student on the weighted sum of a method's terms.

    Args:
        students: the student, by name; exactly one.
        methods: its method, bound to the student and the teachers.
        teachers: frozen; may be empty.
        task: losses and metrics.
        weights: term -> schedule.
        optimizer: factory.
        seed: every random draw of a training step follows from it, the rank and the step.
        clip: not used; the trainer clips gradients.
        online: must be None; all teachers are frozen.

    Raises:
        InputError: for several students, or a teacher that is trained.
    """

    def __init__(
        self,
        students: Mapping[str, Encoder],
        methods: Mapping[str, Method],
        teachers: Sequence[FrozenTeacher],
        task: Task,
        weights: Mapping[str, Schedule],
        optimizer: OptimizerFactory,
        seed: int = 0,
        clip: float | None = None,
        online: Encoder | None = None,
    ) -> None:
        super().__init__(teachers, task, weights, optimizer, seed, clip)
        if len(students) != 1 or online is not None:
            raise InputError(
                "engine=distiller trains one student and no teacher; cohort=mutual brings its own engine", "engine"
            )
        (self.student,), (self.method,) = students.values(), methods.values()
        check_terms(self.method.names, weights)

    @property
    def learners(self) -> Mapping[str, Learner]:
        """Student with its method, under the name `student`."""
        return {"student": Learner(self.student, self.method)}

    def step(self, batch: Batch, progress: Progress) -> Step:
        """Return the inputs of the method for a batch, with forward passes that have not run yet."""
        teachers = bound_teachers(self.teachers, batch, [self.method])
        student, task = Forward(self.student, batch.student, self.method.needs()[0]), self.task.of(batch.labels)
        return Step(student, teachers, batch, task, progress, seed=self.seed)

    def loss(self, batch: Batch, progress: Progress | None = None) -> Loss:
        """Compute the weighted sum of the method's terms for a batch."""
        progress = progress or Progress()
        step = self.method.prepare(self.step(batch, progress))
        terms = self.method.terms(step)
        return Loss(self.weighted(terms, progress), terms, [(self.method, step, terms)])


def bound_teachers(teachers: Sequence[FrozenTeacher], batch: Batch, methods: Iterable[Method]) -> list[Forward[FrozenTeacher]]:
    """Return the teachers' forward passes over a batch, not run yet, with the union of the methods' needs.

    Args:
        teachers: in the order of `batch.teachers`.
        batch: the batch with the teachers' inputs.
        methods: the methods that may read the outputs.
    """
    needs = needs_of_teachers(methods, len(teachers))
    return [Forward(*arguments) for arguments in zip(teachers, batch.teachers, needs, strict=True)]
