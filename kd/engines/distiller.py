"""Engine for one student and any number of frozen teachers."""

from collections.abc import Iterable, Mapping, Sequence

from kd.data.batch import Batch
from kd.data.tasks import Task
from kd.engines.base import Engine, Learner, Loss, check_terms
from kd.engines.models import Models
from kd.engines.optimizer import OptimizerFactory
from kd.errors import InputError
from kd.forward import Forward
from kd.methods.base import Method, Progress, Step, needs_of_teachers
from kd.models import FrozenTeacher


class Distiller(Engine):
    """Engine that trains one student on the weighted sum of a method's terms.

    Args:
        models: exactly one student and its method; all teachers are frozen, and there may be none.
        task: losses and metrics.
        optimizer: factory.
        seed: every random draw of a training step follows from it, the rank and the step.
        clip: not used; the trainer clips gradients.

    Raises:
        InputError: for several students, or a teacher that is trained.
    """

    def __init__(
        self,
        models: Models,
        task: Task,
        optimizer: OptimizerFactory,
        seed: int = 0,
        clip: float | None = None,
    ) -> None:
        super().__init__(models, task, optimizer, seed, clip)
        if len(models.students) != 1 or models.online is not None:
            raise InputError(
                "engine=distiller trains one student and no teacher; cohort=mutual brings its own engine", "engine"
            )
        (self.student,), (self.method,) = models.students.values(), models.methods.values()
        check_terms(self.method.names, models.weights)

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
