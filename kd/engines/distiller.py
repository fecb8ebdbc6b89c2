"""Engine that trains one or more students, each in one or more turns, optionally with their teacher."""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kd.data.batch import Batch
from kd.data.tasks import Task
from kd.engines.base import Engine, Learner, Loss, check_terms
from kd.engines.models import Models
from kd.engines.nonfinite import clip_gradients
from kd.engines.optimizer import OptimizerFactory
from kd.errors import InputError, one_of
from kd.forward import Forward, Needs
from kd.forward.lazy import Detached
from kd.methods.base import Method, Progress, Step, Turn, needs_of_teachers
from kd.models import Encoder, FrozenTeacher
from kd.system import distributed

UPDATE_ORDERS = ("simultaneous", "sequential")
TEACHER = "teacher"


@dataclass(frozen=True)
class LearnerTurn:
    """Turn of one learner: the parameters that move in it, and the loss terms that move them.

    Attributes:
        learner: name of the student, or `teacher` for an online teacher.
        turn: turn of the student's method; None for an online teacher, which learns from the labels alone.
        parameters: trainable parameters that move.
    """

    learner: str
    turn: Turn | None
    parameters: Sequence[nn.Parameter]

    def due(self, progress: Progress) -> bool:
        """Return whether the parameters move in a step."""
        return self.turn is None or self.turn.due is None or self.turn.due(progress)


class Distiller(Engine):
    """Engine that trains K students together; each has its own method, which reads its peers' outputs as constants.

    An update is a list of rounds. In a round one or more learners take a turn: the gradient of each turn's loss, with respect
    to the turn's parameters, is averaged over ranks and clipped separately, and the optimiser steps. Later rounds read the
    outputs of the models that have moved. With one round, an update is Lightning's automatic optimisation; with more, the
    engine steps the optimiser itself. One optimiser is enough: its state is kept for each parameter, and in a round only the
    parameters of the round have gradients. With peers held constant, the gradient of the sum of the losses with respect to a
    student is that of the student's loss; parameters that several students share get the sum of theirs, and move once.

    Args:
        models: students, with a method for each. The teachers are shared by all students. A teacher that is trained at the same
            time, `online`, learns from the labels alone: the peer-to-peer paper does not describe the students' feedback to it;
            ours gets none.
        task: losses and metrics.
        optimizer: factory.
        seed: every random draw of a training step follows from it, the rank and the step.
        clip: largest gradient norm of a turn, if there are several rounds; otherwise the trainer clips. None does not clip.
        update: `simultaneous`: the learners take their first turns together, then their second ones. `sequential`: one learner
            after the other on the same batch, an online teacher first (the algorithm of DML's paper).
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
        if update not in UPDATE_ORDERS:
            raise one_of(update, UPDATE_ORDERS, "update")
        self.names = list(models.students)
        self.online = models.online
        for name, student in models.students.items():
            method = models.methods[name]
            check_terms(method.names, models.weights)
            if models.online is not None and any(needs.gradient for needs in method.needs()[1]):
                raise InputError(
                    "the method takes gradients through its teacher, and one that is trained at the same time is a constant "
                    "to its students; use cohort.teacher=frozen",
                    "cohort.teacher",
                )
            self.add_module(self._key("student", name), student)
            self.add_module(self._key("method", name), method)
        self.update_order = update
        self._rounds = self._order_turns()
        self._clipped = [group for turns in self._rounds for group in clipped_together(turns)]
        self.automatic_optimization = len(self._rounds) == 1

    def _key(self, kind: str, name: str) -> str:
        """Return the attribute of a student or a method: `student`, or `student-<name>` if there are several."""
        return kind if len(self.names) == 1 else f"{kind}-{name}"

    @property
    def learners(self) -> Mapping[str, Learner]:
        """Students with their methods, by name; a single student is named `student`."""
        return {
            name: Learner(getattr(self, self._key("student", name)), getattr(self, self._key("method", name)))
            for name in self.names
        }

    def rounds(self) -> list[list[LearnerTurn]]:
        """Return the turns of an update, in the order in which they are taken; those of a round are taken together."""
        return self._rounds

    def _order_turns(self) -> list[list[LearnerTurn]]:
        """Return the rounds of an update.

        Raises:
            ValueError: for a method whose turns share parameters or names, or leave parameters out.
            InputError: for learners that share parameters and are updated one after the other.
        """
        turns = [turns_of(name, learner) for name, learner in self.learners.items()]
        if self.online is not None:
            parameters = [parameter for parameter in self.online.parameters() if parameter.requires_grad]
            turns.insert(0, [LearnerTurn(TEACHER, None, parameters)])
        if self.update_order == "sequential":
            check_nothing_shared(turn for each in turns for turn in each)
            return [[turn] for each in turns for turn in each]
        return [[each[index] for each in turns if index < len(each)] for index in range(max(map(len, turns)))]

    def weight_of(self, name: str, progress: Progress) -> float:
        """Return the weight of a logged term; 1 for the loss of the online teacher, which has no configured weight."""
        return 1.0 if name == f"{TEACHER}/task" else super().weight_of(name, progress)

    def trained(self) -> list[list[nn.Parameter]]:
        """Return the trainable parameters in groups whose gradients are clipped together; see `clipped_together`."""
        return self._clipped

    def rates(self) -> dict[nn.Parameter, float]:
        """Return the peak learning rates of parameters whose turn has its own."""
        turns = [turn for turns in self.rounds() for turn in turns]
        return {p: each.turn.lr for each in turns if each.turn and each.turn.lr is not None for p in each.parameters}

    def loss(self, batch: Batch, progress: Progress | None = None) -> Loss:
        """Compute the sum of all turns' losses over a batch, before anything is updated."""
        passes = Passes(self, batch, progress or Progress())
        return self._complete(Loss.sum([passes.loss(turn) for turns in self.rounds() for turn in turns]))

    def _complete(self, loss: Loss) -> Loss:
        """Return a loss after a check that the turns of each method have all its terms."""
        for _, _, terms in loss.steps:
            check_terms(list(terms), self.weights)
        return loss

    def update(self, batch: Batch, optimizer: Any, progress: Progress | None = None) -> Loss:
        """Update all learners on one batch, round by round; `Method.after_step` is not called.

        Training calls this if there are several rounds; with one, Lightning's automatic optimisation takes the same steps.

        Args:
            batch: the batch.
            optimizer: an optimiser of `OptimizerFactory`, or Lightning's wrapper of it, which counts its steps: it is used in
                the last round only, so that a batch is one step.
            progress: progress of training.

        Returns:
            Sum of the losses, detached.

        Raises:
            NonFiniteLoss: naming the term and the step.
        """
        passes, losses, rounds = Passes(self, batch, progress or Progress()), [], self.rounds()
        for number, turns in enumerate(rounds, start=1):
            each = [(turn, passes.loss(turn)) for turn in turns]
            loss = Loss.sum([one for _, one in each])
            self.check(loss)
            losses.append(loss)
            moving = [(turn, one.total) for turn, one in each if turn.due(passes.progress)]
            due = [turn for turn, _ in moving]
            parameters = list(dict.fromkeys(parameter for turn in due for parameter in turn.parameters))
            with torch.autocast(self.device.type, enabled=False):
                total = torch.stack([one for _, one in moving] or [loss.total]).sum() * batch.weight
                gradients = torch.autograd.grad(total, parameters) if parameters else ()
            for parameter, gradient in zip(parameters, distributed.mean(gradients), strict=True):
                parameter.grad = gradient.contiguous()  # of a sum it is one number, expanded, which clipping could not scale
            if self.clip:
                for group in clipped_together(due):
                    self.guard.check_gradient(clip_gradients(group, self.clip), self.global_step)
            last = number == len(rounds)
            (optimizer if last else getattr(optimizer, "optimizer", optimizer)).step()
            optimizer.zero_grad(set_to_none=True)
            if not last:
                passes.renew(parameters, later={turn.learner for later in rounds[number:] for turn in later})
        return self._complete(Loss.sum(losses).detached())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Train on one batch.

        Raises:
            NonFiniteLoss: naming the term and the step.
        """
        if self.automatic_optimization:
            return super().training_step(batch, batch_idx)
        loss = self.update(batch, self.optimizers(), self.progress())
        self.lr_schedulers().step()  # type: ignore[union-attr,call-arg]
        self.note(loss, batch)
        return None


class Passes:
    """Forward passes of all models over one batch, shared by the turns of an update.

    Args:
        engine: the engine with the models.
        batch: the batch.
        progress: progress of training.
    """

    def __init__(self, engine: Distiller, batch: Batch, progress: Progress) -> None:
        self.engine, self.batch, self.progress = engine, batch, progress
        self.task = engine.task.of(batch.labels, batch.label_weight)
        self.learners = engine.learners
        self.methods = [learner.method for learner in self.learners.values()]
        self.trained = {name: self._trained(name) for name in ([] if engine.online is None else [TEACHER]) + engine.names}
        self.frozen = bound_teachers(engine.teachers, batch, self.methods) if engine.teachers else []
        self.given: dict[str, Step] = {}
        """Steps before `Method.prepare`, by student."""
        self.prepared: dict[str, Step] = {}

    def _trained(self, name: str) -> Forward[Encoder]:
        """Return a new forward pass of a model that is trained."""
        if name != TEACHER or self.engine.online is None:
            learner, inputs = self.learners[name], self.batch.students[self.engine.names.index(name)]
            return Forward(learner.student, inputs, learner.method.needs()[0])
        needs = Needs()
        for method in self.methods:
            for theirs in method.needs()[1]:
                needs = needs | theirs
        return Forward(self.engine.online, self.batch.teachers[0], needs)

    def step(self, name: str) -> Step:
        """Return the inputs of a student's method; all other models are constants in it."""
        online = self.trained.get(TEACHER)
        batch = self.batch.seen_by(self.engine.names.index(name))
        return Step(
            self.trained[name],
            self.frozen if online is None else [Detached(online)],
            batch,
            self.task,
            self.progress,
            [Detached(self.trained[other]) for other in self.engine.names if other != name],
            self.engine.seed,
            {name: Forward(aid, batch.student, Needs()) for name, aid in self.engine.aids.items()},
        )

    def loss(self, turn: LearnerTurn) -> Loss:
        """Compute the loss of one turn."""
        if turn.turn is None:
            term = self.task.hard(self.trained[TEACHER].outputs.logits, self.batch.labels)
            return Loss(term, {f"{TEACHER}/task": term})
        name, method = turn.learner, self.learners[turn.learner].method
        given = self.step(name)
        step = self._renewed(name, given) if name in self.prepared else method.prepare(given)
        self.given[name], self.prepared[name] = given, step
        terms = turn.turn.terms(step)
        shown = terms if len(self.engine.names) == 1 else {f"{name}/{term}": value for term, value in terms.items()}
        return Loss(self.engine.weighted(terms, self.progress), shown, [(method, step, terms)])

    def _renewed(self, name: str, given: Step) -> Step:
        """Return the step of a student's earlier turn, with the passes of models that have moved replaced by new ones."""
        before, prepared = self.given[name], self.prepared[name]
        student = prepared.student
        if given.student is not before.student:  # it has moved; its method may have prepared other inputs for it
            same = prepared.student is before.student
            student = given.student if same else Forward(student.model, student.inputs, student.needs)
        teachers = prepared.teachers if self.engine.online is None else given.teachers
        return prepared.replace(student=student, teachers=teachers, peers=given.peers)

    def renew(self, moved: Iterable[nn.Parameter], later: Container[str]) -> None:
        """Replace the passes of models that have moved.

        Args:
            moved: parameters that have moved.
            later: learners that have another turn. The others are constants from here on, and run without a graph.
        """
        parameters = set(moved)
        for name, forward in self.trained.items():
            if parameters.isdisjoint(forward.model.parameters()):
                continue
            self.trained[name] = self._trained(name)
            if name not in later:
                with torch.no_grad():
                    _ = self.trained[name].outputs


def turns_of(name: str, learner: Learner) -> list[LearnerTurn]:
    """Return the turns of a learner with the parameters that move in each.

    Raises:
        ValueError: if turns share parameters or names, or none is for the remaining parameters.
    """
    turns = learner.method.turns()
    given = [parameter for turn in turns for parameter in turn.parameters or ()]
    trainable = set(learner.parameters)
    if len({turn.name for turn in turns}) != len(turns) or len(set(given)) != len(given):
        raise ValueError("the turns of a method have different names, and share no parameters")
    if sum(turn.parameters is None for turn in turns) != 1 or not trainable.issuperset(given):
        raise ValueError("one turn of a method has `parameters=None`, for what no other one moves; the others move its own")
    rest = [parameter for parameter in learner.parameters if parameter not in set(given)]
    if len(turns) == 1 and turns[0].due is not None:
        raise ValueError("the only turn of a method moves in every step")
    return [LearnerTurn(name, turn, rest if turn.parameters is None else list(turn.parameters)) for turn in turns]


def clipped_together(turns: Iterable[LearnerTurn]) -> list[list[nn.Parameter]]:
    """Return the parameters of a round in groups whose gradients are clipped together.

    A group is one turn. Turns that share parameters are one group (our choice): their losses are added up, so that their
    gradient is one, as if the learners were one model.
    """
    groups: list[list[nn.Parameter]] = []
    for turn in turns:
        own = set(turn.parameters)
        joined = [group for group in groups if not own.isdisjoint(group)]
        merged = dict.fromkeys(parameter for group in (*joined, turn.parameters) for parameter in group)
        groups = [*(group for group in groups if own.isdisjoint(group)), list(merged)]
    return groups


def check_nothing_shared(turns: Iterable[LearnerTurn]) -> None:
    """Check that learners which are updated one after the other share no parameters.

    A shared one would move several times for a batch, each time along the gradient of one learner's loss; the loss of learners
    that share parameters is the sum of theirs.

    Raises:
        InputError: if they do.
    """
    owners: dict[nn.Parameter, str] = {}
    for turn in turns:
        if any(owners.setdefault(parameter, turn.learner) != turn.learner for parameter in turn.parameters):
            raise InputError(
                "update=sequential updates one student after the other, and these share parameters (cohort.share); use "
                "update=simultaneous",
                "update",
            )


def bound_teachers(teachers: Sequence[FrozenTeacher], batch: Batch, methods: Iterable[Method]) -> list[Forward[FrozenTeacher]]:
    """Return the teachers' forward passes over a batch, not run yet, with the union of the methods' needs.

    Args:
        teachers: in the order of `batch.teachers`.
        batch: the batch with the teachers' inputs.
        methods: the methods that may read the outputs.
    """
    needs = needs_of_teachers(methods, len(teachers))
    return [Forward(*arguments) for arguments in zip(teachers, batch.teachers, needs, strict=True)]
