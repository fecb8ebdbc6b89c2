"""Base class of the methods around methods, which passes every call on to the inner ones."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

from torch import Tensor

from kd.forward import Needs
from kd.methods.base import Bound, Method, Step, Turn

T = TypeVar("T")


class Wrapper(Method):
    """Method around another one, or around several copies of it: it passes every call on, and subclasses change a part.

    A subclass registers its inner methods as submodules and returns them from `inners`. If not every inner method sees every
    teacher, it also overrides `split`, and if a step does not use every inner method, `parts`.

    Args:
        inner: the method; `bind` has not been called.
    """

    def __init__(self, inner: Method) -> None:
        super().__init__()
        self.names, self.teachers, self.uses_teachers = inner.names, inner.teachers, inner.uses_teachers
        self.distances, self.across_ranks = inner.distances, inner.across_ranks
        self.same_vocabulary, self.holds, self.aids = inner.same_vocabulary, inner.holds, dict(inner.aids)
        self.prefits, self.other_words = inner.prefits, inner.other_words

    @property
    def inners(self) -> Sequence[Method]:
        """Inner methods."""
        raise NotImplementedError

    def split(self, teachers: Sequence[T]) -> Sequence[Sequence[T]]:
        """Return the teachers that each inner method sees; by default all of them."""
        return [teachers] * len(self.inners)

    def parts(self, step: Step) -> Sequence[tuple[Method, Step]]:
        """Return the inner methods that a step uses, each with the step that it sees; by default all of them."""
        steps = [step.replace(teachers=teachers) for teachers in self.split(step.teachers)]
        return list(zip(self.inners, steps, strict=True))

    def bind(self, bound: Bound) -> None:
        """Bind each inner method to the student and its teachers."""
        for inner, own in zip(self.inners, self.split(bound.teachers), strict=True):
            inner.bind(replace(bound, teachers=own))

    def prefit(self, logits: Sequence[Tensor], labels: Tensor) -> None:
        """Pass each inner method the logits of its teachers."""
        for inner, own in zip(self.inners, self.split(logits), strict=True):
            inner.prefit(own, labels)

    def needs(self) -> tuple[Needs, Sequence[Needs]]:
        """Declare the union of what the inner methods read from the student, and what each reads from its teachers."""
        needs = [inner.needs() for inner in self.inners]
        ours = needs[0][0]
        for of_student, _ in needs[1:]:
            ours = ours | of_student
        return ours, [of_teacher for _, of_teachers in needs for of_teacher in of_teachers]

    def prepare(self, step: Step) -> Step:
        """Return the step as the inner method prepares it; a subclass whose steps use several overrides this."""
        ((inner, own),) = self.parts(step)
        return inner.prepare(own)

    def turns(self) -> Sequence[Turn]:
        """Return the turns of the inner methods, which all have the same ones; each moves the parameters of all."""
        each = [inner.turns() for inner in self.inners]
        return [
            Turn(
                turns[0].name,
                partial(self.turn_terms, index),
                None if turns[0].parameters is None else [p for turn in turns for p in turn.parameters or ()],
                turns[0].lr,
                turns[0].due,
            )
            for index, turns in enumerate(zip(*each, strict=True))
        ]

    def terms(self, step: Step) -> dict[str, Tensor]:
        """Return the terms of all turns."""
        return {name: term for turn in self.turns() for name, term in turn.terms(step).items()}

    def turn_terms(self, index: int, step: Step) -> dict[str, Tensor]:
        """Return the inner method's terms in the turn at this index; a subclass whose steps use several overrides this."""
        ((inner, own),) = self.parts(step)
        return inner.turns()[index].terms(own)

    def after_step(self, step: Step, terms: Mapping[str, Tensor]) -> None:
        """Pass its own terms to each inner method that the step used."""
        for inner, own in self.parts(step):
            inner.after_step(own, {name: terms[name] for name in inner.names})

    def kept(self) -> dict[str, Tensor]:
        """Return what the inner methods keep, after their numbers if they are several."""
        if len(self.inners) == 1:
            return self.inners[0].kept()
        return {f"{n}.{name}": tensor for n, inner in enumerate(self.inners) for name, tensor in inner.kept().items()}

    def inherit(self, state: Mapping[str, Tensor]) -> None:
        """Pass each inner method what it kept."""
        if len(self.inners) == 1:
            self.inners[0].inherit(state)
            return
        for n, inner in enumerate(self.inners):
            start = f"{n}."
            inner.inherit({name.removeprefix(start): tensor for name, tensor in state.items() if name.startswith(start)})

    def layer_maps(self) -> Sequence[Mapping[str, Tensor]]:
        """Return the maps of the inner methods to the teachers of each."""
        return [maps for inner in self.inners for maps in inner.layer_maps()]

    def batch_dependence(self) -> str | None:
        """Return the inner method's reason."""
        return self.inners[0].batch_dependence()

    def unlabelled_dependence(self) -> str | None:
        """Return the reason of the inner method."""
        return self.inners[0].unlabelled_dependence()

    def label_dependence(self) -> str | None:
        """Return the reason of the inner method."""
        return self.inners[0].label_dependence()

    def describe(self) -> dict[str, str]:
        """Return the inner method's description."""
        return self.inners[0].describe()
