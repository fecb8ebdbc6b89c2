"""Engine for several students that are trained together, optionally with their teacher."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kd.data.batch import Batch
from kd.data.tasks import Task
from kd.engines.base import Engine, Learner, Loss, check_terms
from kd.engines.distiller import bound_teachers
from kd.engines.models import Models
from kd.engines.nonfinite import clip_gradients
from kd.engines.optimizer import OptimizerFactory
from kd.errors import InputError, one_of
from kd.forward import Forward, Needs
from kd.forward.lazy import Detached
from kd.methods.base import Progress, Step
from kd.models import Encoder, FrozenTeacher
from kd.system import distributed

UPDATE_ORDERS = ("simultaneous", "sequential")
TEACHER = "teacher"


class MutualDistiller(Engine):
    """Engine that trains K students together; each has its own method, which reads its peers' outputs as constants.

    With peers held constant, the gradient of the sum of the losses with respect to a student is that of the student's loss, so
    one optimiser is enough. Gradients are clipped for each student separately.

    Args:
        models: two or more students, with a method for each. The teachers are shared by all students. A teacher that is trained
            at the same time, `online`, learns from the labels alone: the peer-to-peer paper does not describe the students'
            feedback to it; ours gets none.
        task: losses and metrics.
        optimizer: factory.
        seed: every random draw of a training step follows from it, the rank and the step.
        clip: largest gradient norm of a student, if updates are sequential; None does not clip.
        update: `simultaneous`: all students are updated after all have predicted. `sequential`: they are updated one after
            the other on the same batch, and later ones read the predictions of the updated ones (the algorithm of DML's paper).
    """

    def __init__(
        self,
        models: Models,
        task: Task,
        optimizer: OptimizerFactory,
        seed: int = 0,
        clip: float | None = None,
        update: str = "simultaneous",
    ) -> None:
        super().__init__(models, task, optimizer, seed, clip)
        students, methods, online = models.students, models.methods, models.online
        if len(students) < 2:
            raise InputError(f"mutual learning needs two or more students, not {len(students)}", "cohort.students")
        if update not in UPDATE_ORDERS:
            raise one_of(update, UPDATE_ORDERS, "update")
        for method in methods.values():
            check_terms(method.names, models.weights)
            if online is not None and any(needs.gradient for needs in method.needs()[1]):
                raise InputError(
                    "the method takes gradients through its teacher, and one that is trained at the same time is a constant "
                    "to its students; use cohort.teacher=frozen",
                    "cohort.teacher",
                )
        self.names = list(students)
        # Prefixed, because a ModuleDict rejects names of its own attributes.
        self.students = nn.ModuleDict({f"student-{name}": student for name, student in students.items()})
        self.methods = nn.ModuleDict({f"student-{name}": method for name, method in methods.items()})
        self.online = online
        self.update = update
        self.automatic_optimization = update == "simultaneous"

    @property
    def learners(self) -> Mapping[str, Learner]:
        """Students with their methods, by name."""
        pairs = zip(self.students.values(), self.methods.values(), strict=True)
        return {name: Learner(*pair) for name, pair in zip(self.names, pairs, strict=True)}  # type: ignore[arg-type]

    def weight_of(self, name: str, progress: Progress) -> float:
        """Return the weight of a logged term; 1 for the loss of the online teacher, which has no configured weight."""
        return 1.0 if name == f"{TEACHER}/task" else super().weight_of(name, progress)

    def trained(self) -> list[list[nn.Parameter]]:
        """Return the trainable parameters in groups: one for an online teacher, and one for each student."""
        groups = super().trained()
        return groups if self.online is None else [list(self.online.parameters()), *groups]

    def forwards(self, batch: Batch) -> dict[str, Forward[Encoder]]:
        """Return the forward passes of all trained models over a batch, not run yet, by name."""
        learners = self.learners
        forwards = {
            name: Forward(learner.student, inputs, learner.method.needs()[0])
            for (name, learner), inputs in zip(learners.items(), batch.students, strict=True)
        }
        if self.online is not None:
            needs = Needs()
            for learner in learners.values():
                for theirs in learner.method.needs()[1]:
                    needs = needs | theirs
            forwards[TEACHER] = Forward(self.online, batch.teachers[0], needs)
        return forwards

    def frozen(self, batch: Batch) -> list[Forward[FrozenTeacher]]:
        """Return the frozen teachers' forward passes over a batch, not run yet, shared by all students."""
        methods = [learner.method for learner in self.learners.values()]
        return bound_teachers(self.teachers, batch, methods) if self.teachers else []

    def loss_of(
        self,
        name: str,
        forwards: Mapping[str, Forward[Encoder]],
        frozen: Sequence[Forward[FrozenTeacher]],
        batch: Batch,
        progress: Progress,
    ) -> Loss:
        """Compute one learner's loss; all other models are constants in it."""
        if name == TEACHER:
            term = self.task.hard(forwards[TEACHER].outputs.logits, batch.labels)
            return Loss(term, {f"{TEACHER}/task": term})
        position = self.names.index(name)
        step = Step(
            forwards[name],
            [Detached(forwards[TEACHER])] if self.online is not None else frozen,
            batch.seen_by(position),
            self.task.of(batch.labels),
            progress,
            [Detached(forwards[other]) for other in self.names if other != name],
            self.seed,
        )
        method = self.learners[name].method
        step = method.prepare(step)
        terms = method.terms(step)
        return Loss(
            self.weighted(terms, progress), {f"{name}/{term}": value for term, value in terms.items()}, [(method, step, terms)]
        )

    def loss(self, batch: Batch, progress: Progress | None = None) -> Loss:
        """Compute the sum of all learners' losses over a batch, before any of them is updated."""
        progress = progress or Progress()
        forwards, frozen = self.forwards(batch), self.frozen(batch)
        losses = [self.loss_of(name, forwards, frozen, batch, progress) for name in forwards]
        total = torch.stack([loss.total for loss in losses]).sum()
        return Loss(
            total,
            {name: term for loss in losses for name, term in loss.terms.items()},
            [step for loss in losses for step in loss.steps],
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Train on one batch: all learners at once, or one after the other.

        Raises:
            NonFiniteLoss: naming the term and the step.
        """
        if self.automatic_optimization:
            return super().training_step(batch, batch_idx)
        self.take_turns(batch)
        return None

    def take_turns(self, batch: Batch) -> None:
        """Update the learners one after the other, the teacher first; each reads the outputs of those already updated.

        When the optimiser steps, only one learner's parameters have gradients, and the optimiser's state is kept for each
        parameter, so one optimiser is equivalent to one for each learner.
        """
        progress = self.progress()
        forwards, frozen = self.forwards(batch), self.frozen(batch)
        order = sorted(forwards, key=lambda name: name != TEACHER)
        optimizer = self.optimizers()
        losses = []
        for name in order:
            loss = self.loss_of(name, forwards, frozen, batch, progress)
            self.check(loss)
            losses.append(loss)
            parameters = self.parameters_of(name)
            with torch.autocast(self.device.type, enabled=False):
                gradients = torch.autograd.grad(loss.total * batch.weight, parameters)
            for parameter, gradient in zip(parameters, distributed.mean(gradients), strict=True):
                parameter.grad = gradient
            if self.clip:
                self.guard.check_gradient(clip_gradients(parameters, self.clip), self.global_step)
            # Lightning counts the steps of its optimiser wrapper; only the last learner uses it, so that a batch is one step.
            stepper = optimizer if name == order[-1] else optimizer.optimizer  # type: ignore[union-attr]
            stepper.step()  # type: ignore[union-attr]
            optimizer.zero_grad(set_to_none=True)  # type: ignore[union-attr]
            if name != order[-1]:  # the remaining learners read the updated model, as a constant
                forwards[name] = self.forwards(batch)[name]
                with torch.no_grad():
                    _ = forwards[name].outputs
        scheduler = self.lr_schedulers()
        scheduler.step()  # type: ignore[union-attr,call-arg]
        total = torch.stack([loss.total.detach() for loss in losses]).sum()
        terms = {name: term.detach() for loss in losses for name, term in loss.terms.items()}
        self.note(Loss(total, terms, [step for loss in losses for step in loss.steps]), batch)

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        """Return the parameters that are updated in one learner's turn."""
        if name == TEACHER:
            assert self.online is not None
            return [parameter for parameter in self.online.parameters() if parameter.requires_grad]
        return self.learners[name].parameters
