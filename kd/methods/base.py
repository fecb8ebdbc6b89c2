"""Interface of a distillation method, and helpers that several methods share."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kd.data.batch import Batch
from kd.data.tasks import Task
from kd.errors import InputError
from kd.forward import Forward, Model, Needs
from kd.forward.lazy import Detached
from kd.methods.draws import uniform
from kd.models import Encoder, FrozenTeacher
from kd.system import distributed

ANY_TEACHERS = None


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of training.

    Attributes:
        step: number of optimiser steps done.
        total: number of optimiser steps of the whole run.
        epoch: number of epochs done.
    """

    step: int = 0
    total: int = 1
    epoch: int = 0

    @property
    def fraction(self) -> float:
        """Fraction of training that is done, in [0, 1]."""
        return min(self.step / max(self.total, 1), 1.0)


@dataclass
class Step:
    """Inputs of a method in one training step. Forward passes run when their outputs are first read."""

    student: Forward[Encoder]
    """Forward pass of the student; `step.student.outputs` has what `Method.needs` declares (`kd.forward.outputs.Outputs`)."""
    teachers: Sequence[Forward[Model]]
    """Forward passes of the teachers, in the order of `Bound.teachers`; of a method of one teacher it is `step.teacher`."""
    batch: Batch
    """Inputs and labels of the examples (`kd.data.batch.Batch`)."""
    task: Task
    """The task, whose losses against labels and soft labels are `step.task.hard` and `step.task.soft`."""
    progress: Progress
    """Progress of training, which schedules read."""
    peers: Sequence[Forward[Encoder]] = ()
    """Forward passes of the other students over the same examples, detached; empty unless several students train together."""
    seed: int = 0
    aids: Mapping[str, Forward[Model]] = field(default_factory=dict)
    """Frozen models that are no teachers (`Method.aids`), over the student's inputs. They run at every step, with the inputs
    and needs that the method gives, `step.aids["mlm"].run(inputs, needs)`."""
    training: Batch | None = None
    """Training batch beside the held one that this step is over, as `on_held` returns it; None for the training step itself."""

    @property
    def held(self) -> Batch | None:
        """Batch of examples of train that the student is not trained on; None unless the method holds some (`Method.holds`)."""
        return self.batch.held

    def on_held(self) -> "Step":
        """Return a step over the held batch, with new forward passes of this step's models as they are now.

        No pass has run yet, and each call returns new ones, so that a reward of before a turn and one of after it are of two
        calls. `Method.prepare` is not called on the step. A student's pass has a graph, and dropout, like those of the training
        batch; a reward reads `held.student.evaluate()`, a pass without either.

        Ranks have disjoint shares of the global held batch. The rule is that of `across`: what is averaged over the held
        examples is averaged over the rows that come through the returned step's `across`, `held.across(correct).mean()`. All
        ranks then have the value of one process, for a reward as for a term with a gradient.

        Raises:
            ValueError: if no examples are held, or `Method.prepare` has given a teacher other inputs than the batch's.
        """
        held = self.batch.held
        if held is None:
            raise ValueError("no examples are held; `Method.holds` is the share of train to hold")

        def over(forward: Forward[Any], inputs: Mapping[str, Tensor]) -> Forward[Any]:
            new = Forward(forward.model, inputs, forward.needs)
            return Detached(new) if isinstance(forward, Detached) else new

        teachers = []
        for teacher in self.teachers:  # a pool may show one of those that the batch has inputs of
            index = next((n for n, inputs in enumerate(self.batch.teachers) if inputs is teacher.inputs), None)
            if index is None:
                raise ValueError("a teacher's inputs are not the batch's; pass it those of `step.held` that it should read")
            teachers.append(over(teacher, held.teachers[index]))
        return self.replace(
            student=over(self.student, held.student),
            teachers=teachers,
            batch=held,
            task=self.task.of(held.labels),
            peers=[over(*both) for both in zip(self.peers, held.peers, strict=True)],
            aids={name: over(aid, held.student) for name, aid in self.aids.items()},
            training=self.batch,
        )

    def rng(self, what: str) -> np.random.Generator:
        """Return a generator with the same state on all ranks, in all batches of an optimiser step, and in a resumed run.

        Args:
            what: name of the random decision; generators with different names are independent.
        """
        return np.random.default_rng([self.seed, self.progress.step, *what.encode()])

    def draws(self, what: str, count: int) -> Tensor:
        """Return random numbers of each example, independent between names, optimiser steps, examples and columns.

        They are functions of the seed, the optimiser step, the name and `Batch.index` alone: the same whatever the rank, the
        number of ranks, the other examples of the batch and their order, the accumulation, and in a resumed run. They are the
        same on every device, and computed on the batch's without waiting for it. An example is what `Batch.index` counts: for
        a masked language model a chunk of a text, so that another `task.max_length` or tokenizer gives other examples.

        Args:
            what: name of the random decision, as for `rng`, of which the numbers are independent.
            count: numbers for each example.

        Returns:
            (batch, count), uniform in [0, 1), float64, so that no number is rounded to 1 and a comparison with a small
            probability is exact.
        """
        # The spawn key sets it apart from `rng` of the same name.
        key = np.random.SeedSequence([self.seed, self.progress.step, *what.encode()], spawn_key=(0,))
        return uniform(key, self.batch.index, count)

    def across(self, rows: Tensor) -> Tensor:
        """Return the rows of all ranks, for a loss that compares the examples of a batch with each other.

        The rule: every row of such a term comes through `across`, this rank's own ones too, so that every rank computes the
        loss of the global batch. The term is then like any other and is multiplied by nothing: the gradient of a step is that
        of one process with the global batch, also if the ranks have different numbers of examples. A term in which rows that
        came through `across` meet rows that did not has another gradient than in one process.

        Gradient flows to this rank's rows alone, multiplied by N / n, with n of the N examples of the global batch on this
        rank: `Batch.weight`, which is proportional to n, and the mean over ranks multiply it by n / N. Parameters that are
        applied to the result, such as a projection, have their whole gradient on every rank, and the mean over ranks of the
        batches' weights is the weight in one process.

        In a step over held examples (`on_held`) rows are one for each held example of this rank, and the gradient of this
        rank's is multiplied by the N / n of the training batch, whose weight multiplies the loss; the rule is the same.

        With one process, inside `on_rank_zero`, and before there is a process group, the result is `rows` itself. Otherwise
        it is a collective call: every rank has to make the same calls in the same order, so that none may depend on what the
        examples of a rank are. Accumulated batches are not joined.

        Args:
            rows: (batch, ...), one row for each example of this rank, of any type; labels and indices as well as outputs.

        Returns:
            (global batch, ...), the ranks' rows in the order of ranks. One process has the same rows in another order. Rows of
            two calls correspond; `torch.isin(step.across(step.batch.index), step.batch.index)` is True for this rank's.

        Raises:
            ValueError: if there is not one row for each example, or the ranks' rows differ in their further dimensions, such
                as tokens, which each rank pads to a length of its own.
        """
        count, weighted = len(self.batch), self.batch if self.training is None else self.training
        if rows.shape[:1] != (count,):
            raise ValueError(f"there is one row for each of the {count} examples of the batch, not {tuple(rows.shape)}")
        parts = distributed.gather_rows(rows)
        if len(parts) == 1:
            return rows
        # The engine multiplies the loss by the weight of the training batch, also a loss of held examples.
        factor = sum(map(len, parts)) / count if weighted is self.batch else distributed.total(len(weighted)) / len(weighted)
        own = rows.view_as(rows)  # so that the gradient of other uses of the rows is not multiplied
        if own.requires_grad:
            own.register_hook(lambda gradient: gradient * factor)
        return torch.cat([own if part is rows else part for part in parts])

    @property
    def teacher(self) -> Forward[Model]:
        """Forward pass of the only teacher.

        Raises:
            ValueError: if there is none or more than one.
        """
        if len(self.teachers) != 1:
            raise ValueError(f"this step has {len(self.teachers)} teachers, not one")
        return self.teachers[0]

    def replace(self, **changes: object) -> "Step":
        """Return a copy with some fields replaced; for `Method.prepare`."""
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Bound:
    """The models that a method is bound to, and the task; see `Method.bind`.

    Attributes:
        student: the student.
        teachers: its teachers, in the order of `Step.teachers`.
        task: the task, whose labels name the outputs.
        aids: name -> frozen model that is no teacher; see `Method.aids`.
    """

    student: Encoder
    teachers: Sequence[FrozenTeacher]
    task: Task
    aids: Mapping[str, FrozenTeacher] = field(default_factory=dict)

    @property
    def teacher(self) -> FrozenTeacher:
        """The only teacher.

        Raises:
            ValueError: if there is none or more than one.
        """
        (teacher,) = self.teachers
        return teacher


@dataclass(frozen=True)
class Turn:
    """Part of an update in which some parameters move: a policy and then the student, or a generator and then the student.

    Attributes:
        name: name of the turn, different for each turn of a method.
        terms: function of the step that returns the turn's unweighted loss terms. The step shows what earlier turns have moved.
        parameters: parameters that move, submodules' of the method or the student's; None for all that no other turn moves.
        lr: peak learning rate of the parameters; None for the run's.
        due: function of the progress that tells whether the parameters move in this step; None for every step. The terms of a
            turn that is not due are computed and logged, and move nothing. A method of one turn moves in every step.
    """

    name: str
    terms: "Callable[[Step], dict[str, Tensor]]"
    parameters: Sequence[nn.Parameter] | None = None
    lr: float | None = None
    due: Callable[[Progress], bool] | None = None


class Method(nn.Module):
    """A distillation method: the loss terms that one paper adds to fine-tuning, and the modules they need.

    A subclass sets the names of its terms in `names` and its number of teachers in `teachers`, builds the parts that depend on
    the models in `bind`, declares the outputs it reads in `needs`, and computes unweighted scalars in `terms`. Weights come
    from the configuration. Its learned parts are its submodules, and are not part of the exported student.
    """

    names: tuple[str, ...] = ("task",)
    """Names of the loss terms, in the order of logs and tables."""

    teachers: int | None = 1
    """Number of teachers that the method needs; None for any number, until `bind` sets that of the teachers given."""

    uses_teachers = True
    """True if the method reads its teachers' outputs; a teacher of plain fine-tuning is only evaluated for comparison."""

    pools = True
    """False if a pool of teachers cannot hold a copy of the method for each of them, because it reads no teacher and has parts
    that every step trains; such a composition is refused."""

    distances: Sequence[str] | None = None
    """Terms that are smallest where the student equals its teachers; None for all but `task`, `()` if there are none, as in the
    reward of a policy. The conformance suite tests each of them."""

    across_ranks = False
    """True if `Step.across` joins the examples of all ranks wherever a loss depends on the batch, so that ranks change nothing
    and only accumulation does."""

    aids: Mapping[str, str | None] = MappingProxyType({})
    """Frozen models that the method runs and that are no teachers: name -> head, a key of `kd.models.heads.HEADS`, or None if
    only states are read. Their models are configured by these names in `aids` of the method's file. They read the student's
    tokens, so that a student with another vocabulary is refused."""

    holds: float = 0.0
    """Share of train, in [0, 1), that the student is not trained on, for rewards: its examples are in no training batch, and
    `Step.held` shows a batch of them in each step. A method sets it in its constructor from an option `holds`, checked by
    `kd.methods.options.holds`, so that it enters the run's digest. The students of a cohort hold the same part."""

    keeps: Sequence[str] = ()
    """Names of submodules, parameters and buffers of the method that later runs may use. Their state is written beside the
    exported student. A run that starts from this one inherits it (`inherit`); a run that this student teaches reads it as
    `FrozenTeacher.kept`."""

    prefits = False
    """True if `prefit` has to be called before training. A method whose options decide sets it in its constructor."""

    same_vocabulary = False
    """True if student and teachers must have one vocabulary although no token-level tensor of a teacher is declared, because
    the method runs a model on another one's tokens. A run whose student has another vocabulary is then refused."""

    other_words = False
    """True if a training step may read rows of the student's word embeddings that no training text has, as those of words that
    the method draws or mixes, or the whole table; then all rows are trained (`trainer.embedding_rows`)."""

    def bind(self, bound: Bound) -> None:
        """Adapt the method to the models: build projections, resolve layer maps, freeze parameters that are not trained.

        Also called with models on the meta device, to check a configuration before anything is loaded or trained.

        Raises:
            InputError: if the method cannot work with these models.
        """

    def needs(self) -> tuple[Needs, Sequence[Needs]]:
        """Declare the outputs that the method reads from the student, and from each teacher; by default the logits.

        Called after `bind`.
        """
        return Needs(), [Needs()] * (self.teachers or 0)

    def prefit(self, logits: Sequence[Tensor], labels: Tensor) -> None:
        """Compute what depends on the teachers' outputs over all of train, such as a median or fitted weights of teachers.

        Called after `bind` and before training, if `prefits` is True, also when a run is resumed, with the same values on all
        ranks and in all starts of a run; what it stores in buffers is then replaced by that of the checkpoint. The teachers are
        frozen, and have no dropout. Held examples (`holds`) are not among those given.

        Args:
            logits: (examples, classes) of each teacher, in the order of `Step.teachers`, on the CPU. They are those that steps
                show if the teacher is cached, otherwise up to rounding.
            labels: (examples,), those of the same examples, as `Batch.labels` has them.
        """

    def prepare(self, step: Step) -> Step:
        """Return the step with other inputs or teachers; called on the device, before any forward pass has run."""
        return step

    def terms(self, step: Step) -> dict[str, Tensor]:
        """Return the loss terms: name -> unweighted scalar, one for each of `names`."""
        raise NotImplementedError

    def turns(self) -> Sequence[Turn]:
        """Return the turns of an update, in their order; by default one, in which everything moves. Called after `bind`.

        Together their terms are those of `names`. Gradients of a turn's loss are taken with respect to its parameters alone,
        averaged over ranks and clipped separately.
        """
        return (Turn("student", self.terms),)

    def after_step(self, step: Step, terms: Mapping[str, Tensor]) -> None:
        """Update rewards or running statistics after a batch, and its optimiser step if any. `terms` are detached."""

    def kept(self) -> dict[str, Tensor]:
        """Return the part of the state that the method keeps for later runs: name in `state_dict` -> tensor."""
        return {name: tensor for name, tensor in self.state_dict().items() if name.partition(".")[0] in self.keeps}

    def inherit(self, state: Mapping[str, Tensor]) -> None:
        """Take over what the method of the run that this one starts from kept; called after `bind` if that is anything.

        By default the state of all that this method keeps too is loaded.

        Args:
            state: as that method's `kept` returned it.

        Raises:
            InputError: for a part that was not kept, or has another shape.
        """
        own = self.kept()
        for name, tensor in own.items():
            if name not in state or state[name].shape != tensor.shape:
                kept = f"{tuple(state[name].shape)}" if name in state else "not at all"
                raise InputError(f"'{name}' is {tuple(tensor.shape)} here, and the run before kept it {kept}", "before")
        self.load_state_dict({**self.state_dict(), **{name: state[name] for name in own}})

    def layer_maps(self) -> Sequence[Mapping[str, Tensor]]:
        """Return the maps from the student's layers to those of each teacher that the method uses, or has learnt.

        Called after `bind`, and at the end of training with the state of the checkpoint that is evaluated; they are written to
        the run's `maps.json`. What depends on the batch is a mean over an epoch (`kd.methods.epoch_mean`), and equal on all
        ranks. By default there are none.

        Returns:
            For each teacher, in the order of `Step.teachers`: name, that of the loss term if there is one -> weights >= 0,
            (student layers, teacher layers), with layer 0, the embeddings, in both. A layer that is not compared has zeros.
        """
        return [{}] * (self.teachers or 0)

    def describe(self) -> dict[str, str]:
        """Describe what `bind` resolved, for the preflight: name -> text."""
        return {}

    def batch_dependence(self) -> str | None:
        """Return the reason why the loss of an example depends on the others of its batch; None if it does not.

        If it does, results depend on how a global batch is split over ranks or accumulated, and the preflight reports it. With
        `Step.across` they do not depend on the ranks, but still on the accumulation.
        """
        return None

    def unlabelled_dependence(self) -> str | None:
        """Return the reason why the method needs training examples without labels; None if it does not.

        If it does, a task without any (`task.unlabelled`, or an edit that makes some) is refused.
        """
        return None

    def label_dependence(self) -> str | None:
        """Return the reason why the method needs every example's label besides for `Task.hard`; None if it does not.

        If it does, training text without labels (`task.unlabelled`) is refused.
        """
        return None


def needs_of_teachers(methods: Iterable[Method], count: int) -> list[Needs]:
    """Return, for each frozen teacher, the union of the needs that the methods declare for it."""
    union = [Needs()] * count
    for method in methods if count else ():  # the needs of a teacher that is trained with the students are not counted here
        union = [both | needs for both, needs in zip(union, method.needs()[1], strict=True)]
    return union


def match_width(student: int, teacher: int) -> nn.Module:
    """Return a learned linear map from the student's width to the teacher's; the identity if they are equal.

    For papers that require equal widths this adds nothing; the map for other widths is our choice.
    """
    return nn.Identity() if student == teacher else nn.Linear(student, teacher)


def projection(student: int, teacher: int) -> nn.Linear:
    """Return a learned linear map from the student's width to the teacher's, also if they are equal.

    For equal widths it is initialised as the identity (our choice: the states of a student initialised with the teacher's
    layers are already in the teacher's space), otherwise as `torch.nn.Linear` is.
    """
    linear = nn.Linear(student, teacher)
    if student == teacher:
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
    return linear


def freeze_above(student: Encoder, layer: int) -> None:
    """Freeze the parameters that a loss on layers up to `layer` cannot reach: later blocks, the pooler and the head.

    Parameters that these share with the layers below stay trainable, like the word embeddings of a masked language model.
    """
    blocks = [student.base.get_submodule(f"{student.family.blocks}.{index}") for index in range(student.depth)]
    below = [student.base.get_submodule(student.family.embeddings), *blocks[:layer]]
    above = [*blocks[layer:], *(module for name, module in student.base.named_children() if name == "pooler")]
    reached = set(student.base.parameters()) - {parameter for module in above for parameter in module.parameters()}
    reached |= {parameter for module in below for parameter in module.parameters()}
    for parameter in student.parameters():
        if parameter not in reached:
            parameter.requires_grad_(False)


def check_heads(student: Encoder, teacher: FrozenTeacher) -> None:
    """Check that attention can be compared head by head.

    Raises:
        InputError: if student and teacher have different numbers of heads.
    """
    if student.heads != teacher.heads:
        cure = f"set student.heads={teacher.heads}"
        if student.width % teacher.heads:
            cure += f" and student.width to a multiple of it, which {student.width} is not"
        raise InputError(
            f"attention is compared head by head, and the student has {student.heads} heads, the teacher {teacher.heads}; "
            f"{cure}",
            "student.heads",
        )
