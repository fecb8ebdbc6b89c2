"""One student, any number of frozen teachers, one optimiser."""

from collections.abc import Iterable, Mapping, Sequence

from kd.data.batch import Batch
from kd.data.tasks import Task
from kd.engines.base import Engine, Learner, Loss, check_terms
from kd.errors import InputError
from kd.forward import Forward
from kd.methods.base import Method, Progress, Step, needs_of_teachers
from kd.models import Encoder, FrozenTeacher
from kd.optimizers import OptimizerFactory
from kd.schedules import Schedule


class Distiller(Engine):
    """Trains a student by the weighted sum of a method's terms.

    Args:
        students: one, trained.
        methods: its method, bound to these models.
        teachers: frozen; may be empty.
        task: losses and metrics.
        weights: term -> schedule.
        optimizer: factory.
        seed: every random draw of a training step follows from it, the rank and the step.
        clip: not used; the trainer clips.
        online: none; teachers are frozen.

    Raises:
        InputError: for several students, or a teacher that is to be trained.
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
        """The student."""
        return {"student": Learner(self.student, self.method)}

    def step(self, batch: Batch, progress: Progress) -> Step:
        """A step over a batch: forwards bound to inputs and needs, none of them run."""
        teachers = bound_teachers(self.teachers, batch, [self.method])
        student, task = Forward(self.student, batch.student, self.method.needs()[0]), self.task.of(batch.labels)
        return Step(student, teachers, batch, task, progress, seed=self.seed)

    def loss(self, batch: Batch, progress: Progress | None = None) -> Loss:
        """The weighted sum of the method's terms over a batch."""
        progress = progress or Progress()
        step = self.method.prepare(self.step(batch, progress))
        terms = self.method.terms(step)
        return Loss(self.weighted(terms, progress), terms, [(self.method, step, terms)])


def bound_teachers(teachers: Sequence[FrozenTeacher], batch: Batch, methods: Iterable[Method]) -> list[Forward]:
    """Each teacher's forward over a batch; it keeps what any of the methods declares.

    Args:
        teachers: in the order of `batch.teachers`.
        batch: their inputs.
        methods: that will look.
    """
    needs = needs_of_teachers(methods, len(teachers))
    return [Forward(*each) for each in zip(teachers, batch.teachers, needs, strict=True)]
