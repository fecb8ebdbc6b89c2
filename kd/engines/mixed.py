"""Engine for a mixture of tasks: an engine for each task, whose students share a body."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from kd.data.batch import Batch
from kd.data.mixture import Mixture
from kd.engines.base import Engine, Learner, Loss
from kd.engines.distiller import Distiller
from kd.engines.models import Models
from kd.methods.base import Progress
from kd.models import FrozenTeacher


class MixedEngine(Engine):
    """Engine that trains students with a head for each task, a batch of one task at a time.

    Each task has an engine of its own, with its teachers, its methods, and students whose heads are its own and whose bodies
    are those of all tasks. A step moves the body, and the head and the method of the batch's task; those of other tasks have
    no gradient, and the optimiser leaves them as they are, without weight decay.

    Args:
        parts: the engine of each task by name. They have the same number of students and of turns, and one optimiser factory.
        task: the mixture.
    """

    idles = True
    tasks: Sequence[str] = ()

    def __init__(self, parts: Mapping[str, Distiller], task: Mixture) -> None:
        first = next(iter(parts.values()))
        nothing = Models({}, {}, [], None, first.weights)
        super().__init__(nothing, task, first.optimizer_factory, first.seed, first.clip)  # type: ignore[arg-type]
        self.mixture = task
        self.tasks = list(parts)
        for name, part in parts.items():
            self.add_module(f"of-{name}", part)
            part.guard = self.guard
        groups = zip(*(part.trained() for part in parts.values()), strict=True)
        self._clipped = [list(dict.fromkeys(parameter for part in group for parameter in part)) for group in groups]
        self.automatic_optimization = first.automatic_optimization
        self.filled = self.work_of_teachers()

    @property
    def parts(self) -> dict[str, Distiller]:
        """The engine of each task by name."""
        return {name: self.get_submodule(f"of-{name}") for name in self.tasks}  # type: ignore[misc]

    @property
    def learners(self) -> Mapping[str, Learner]:
        """Students by name, with the method and the head of the first task."""
        return self.parts[self.tasks[0]].learners

    @property
    def counted(self) -> dict[str, FrozenTeacher]:
        """Teachers whose work is counted, each by its task and its name."""
        return {f"{task}/{name}": teacher for task, part in self.parts.items() for name, teacher in part.counted.items()}

    def trained(self) -> list[list[nn.Parameter]]:
        """Return the trainable parameters in groups whose gradients are clipped together: those of a learner, of all tasks."""
        return self._clipped

    def rates(self) -> Mapping[nn.Parameter, float]:
        """Return the peak learning rates of parameters that do not have the run's."""
        return {parameter: rate for part in self.parts.values() for parameter, rate in part.rates().items()}

    def loss(self, batch: Batch, progress: Progress | None = None) -> Loss:
        """Compute the loss of a batch by the engine of its task; terms are named `task/term`."""
        return self._named(batch, self.part_of(batch).loss(batch, progress))

    def part_of(self, batch: Batch) -> Distiller:
        """Return the engine of a batch's task."""
        return self.parts[str(batch.task)]

    def _named(self, batch: Batch, loss: Loss) -> Loss:
        return Loss(loss.total, {f"{batch.task}/{name}": term for name, term in loss.terms.items()}, loss.steps)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Train on one batch.

        Raises:
            NonFiniteLoss: naming the term and the step.
        """
        if self.automatic_optimization:
            return super().training_step(batch, batch_idx)
        loss = self.part_of(batch).update(batch, self.optimizers(), self.progress())
        self.lr_schedulers().step()  # type: ignore[union-attr,call-arg]
        self.note(self._named(batch, loss), batch)
        return None

    def begin_validation(self) -> None:
        """Reset the metrics of every task."""
        for part in self.parts.values():
            part.begin_validation()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score the students on a batch of one task."""
        self.part_of(batch).validation_step(batch, batch_idx)

    def end_validation(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
        """Return the metrics of all tasks by model, and descriptions of students that predict one class of a task."""
        ended = {task: part.end_validation() for task, part in self.parts.items()}
        results = {
            model: self.mixture.joined({task: metrics[model] for task, (metrics, _) in ended.items()})
            for model in self.evaluated
        }
        constant: dict[str, list[str]] = {}
        for task, (_, collapsed) in ended.items():
            for student, words in collapsed.items():
                constant.setdefault(student, []).append(f"{task}: {words}")
        return results, {student: "; ".join(words) for student, words in constant.items()}
