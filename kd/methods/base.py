"""The contract of a method: what one paper adds to fine-tuning."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor, nn

from kd.data.batch import Batch
from kd.data.tasks import Task
from kd.errors import InputError
from kd.forward import Forward, Needs
from kd.models import Encoder, FrozenTeacher

ANY_TEACHERS = None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far training has come.

    Attributes:
        step: optimiser steps done.
        total: optimiser steps of the whole run.
        epoch: epochs done.
    """

    step: int = 0
    total: int = 1
    epoch: int = 0

    @property
    def fraction(self) -> float:
        """Fraction of training done, in [0, 1]."""
        return min(self.step / max(self.total, 1), 1.0)


@dataclass
class Step:
    """One training step as a method sees it. Forwards run when their outputs are first read."""

    student: Forward
    teachers: Sequence[Forward]
    batch: Batch
    task: Task
    progress: Progress
    peers: Sequence[Forward] = ()
    """The other students' forwards over the same examples, detached; only where several learn together."""
    seed: int = 0

    def rng(self, what: str) -> np.random.Generator:
        """A generator that all ranks and all batches of one optimiser step share, and that a resumed run finds again.

        Args:
            what: is decided; draws for different things are independent.
        """
        return np.random.default_rng([self.seed, self.progress.step, *what.encode()])

    @property
    def teacher(self) -> Forward:
        """The only teacher.

        Raises:
            ValueError: if there is none or more than one.
        """
        if len(self.teachers) != 1:
            raise ValueError(f"this step has {len(self.teachers)} teachers, not one")
        return self.teachers[0]

    def replace(self, **changes: object) -> "Step":
        """A copy with some parts replaced; for `Method.prepare`."""
        return replace(self, **changes)  # type: ignore[arg-type]


class Method(nn.Module):
    """What one paper adds to fine-tuning.

    A subclass names its terms in `names`, says how many teachers it takes in `teachers`, builds what depends on the models
    in `bind`, declares what it reads in `needs`, and computes unweighted scalars in `terms`. Weights come from the
    configuration. What it learns is a submodule of it, and is not part of the exported student.
    """

    names: tuple[str, ...] = ("task",)
    """Names of the terms, in the order they are shown."""

    teachers: int | None = 1
    """How many teachers it takes; None for any number."""

    uses_teachers = True
    """Whether it looks at its teachers at all; those of fine-tuning are there to be compared with."""

    def bind(self, student: Encoder, teachers: Sequence[FrozenTeacher]) -> None:
        """Look at the models: build projections, resolve layer maps, freeze what is not trained.

        It is also called with models that have shapes but no weights, to check a configuration before it costs anything.

        Raises:
            InputError: if the method cannot work with these models.
        """

    def needs(self) -> tuple[Needs, Sequence[Needs]]:
        """What the student's forward must keep, and each teacher's; no entries where only logits are read.

        Called after `bind`.
        """
        return Needs(), ()

    def prepare(self, step: Step) -> Step:
        """The step with other inputs or teachers; on the device, before anything ran."""
        return step

    def terms(self, step: Step) -> dict[str, Tensor]:
        """The loss terms: name -> unweighted scalar, one for each of `names`."""
        raise NotImplementedError

    def after_step(self, step: Step, terms: Mapping[str, Tensor]) -> None:
        """After a batch, and the optimiser step if there was one: delayed rewards, running statistics. `terms` are detached."""

    def describe(self) -> dict[str, str]:
        """What `bind` resolved, in words, for the preflight."""
        return {}

    def batch_dependence(self) -> str:
        """Why the examples of a batch are not independent of each other in its terms; empty where they are.

        Where it says something, the result depends on how a global batch is split over ranks or accumulated, and the
        preflight tells.
        """
        return ""


def needs_of_teachers(methods: Iterable[Method], count: int) -> list[Needs]:
    """What each of some frozen teachers must keep: whatever any of the methods declares."""
    found = [Needs()] * count
    for method in methods if count else ():  # one that is trained with the students is not frozen
        theirs = method.needs()[1] or [Needs()] * count
        found = [both | needs for both, needs in zip(found, theirs, strict=True)]
    return found


def match_width(student: int, teacher: int) -> nn.Module:
    """A learned linear map from the student's width to the teacher's; the identity where they are equal.

    Papers that need equal widths get the identity, so the map adds nothing to them (our choice for the others).
    """
    return nn.Identity() if student == teacher else nn.Linear(student, teacher)


def projection(student: int, teacher: int) -> nn.Linear:
    """A learned linear map from the student's width to the teacher's, also where they are equal.

    There it begins as the identity (our choice: a student that begins with the teacher's layers begins in its space), else as
    `torch.nn.Linear` does.
    """
    linear = nn.Linear(student, teacher)
    if student == teacher:
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
    return linear


def freeze_above(student: Encoder, layer: int) -> None:
    """Freeze what no loss on layers up to this one reaches: later blocks, the pooler and the head.

    What these share with the part below stays trained, as the word embeddings of a masked language model.
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
    """Whether attention can be compared head by head.

    Raises:
        InputError: if one has more heads than the other.
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
