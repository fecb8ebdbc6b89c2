"""Wrappers: every call reaches the inner methods, with the teachers and the terms that are theirs."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kd.data.batch import Batch
from kd.data.tasks import Classification
from kd.forward import Forward, Needs, Outputs
from kd.methods.base import Bound, Method, Progress, Step, Turn
from kd.methods.finetune import Finetune
from kd.methods.wrappers.ensemble import Ensemble
from kd.methods.wrappers.mutual import Mutual
from kd.methods.wrappers.per_teacher import PerTeacher
from kd.methods.wrappers.stochastic import Stochastic

TASK = Classification("toy", ["no", "yes"], {}, ["accuracy"], "accuracy")
LOGITS = torch.tensor([[1.0, 0.0]])


class Recorder(Method):
    """Records every call with the teachers that it was shown."""

    names = ("task", "seen")

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Any]] = []

    def bind(self, bound: Bound) -> None:
        self.calls.append(("bind", list(bound.teachers)))
        self.layer = len(bound.teacher)  # type: ignore[arg-type]

    def needs(self) -> tuple[Needs, Sequence[Needs]]:
        return Needs(hidden=[self.layer]), [Needs(cls=[self.layer])]

    def prepare(self, step: Step) -> Step:
        self.calls.append(("prepare", step.teacher))
        return step.replace(seed=7)

    def terms(self, step: Step) -> dict[str, Tensor]:
        self.calls.append(("terms", step.teacher))
        assert step.seed == 7, "the step was prepared"
        return {"task": torch.ones(()), "seen": 2 * torch.ones(())}

    def after_step(self, step: Step, terms: Mapping[str, Tensor]) -> None:
        self.calls.append(("after_step", step.teacher))
        assert set(terms) == {"task", "seen"}

    def batch_dependence(self) -> str:
        return "a reason"

    def describe(self) -> dict[str, str]:
        return {"inner": "text"}


def forward() -> Forward:
    return Forward(lambda inputs, needs: Outputs(LOGITS, torch.ones(1, 1).bool(), needs), {}, Needs())


def step(teachers: int) -> Step:
    batch = Batch({}, ({},) * teachers, torch.tensor([0]), torch.arange(1))
    return Step(forward(), [forward() for _ in range(teachers)], batch, TASK, Progress(3, 10), [forward()])


WRAPPERS = {
    "mutual": (lambda: Mutual(Recorder()), 1),
    "stochastic": (lambda: Stochastic(Recorder(), [0.5, 0.5]), 2),
    "ensemble": (lambda: Ensemble(Recorder(), [0.5, 0.5]), 2),
    "mutual stochastic": (lambda: Mutual(Stochastic(Recorder(), [0.5, 0.5])), 2),
    "mutual ensemble": (lambda: Mutual(Ensemble(Recorder(), [0.5, 0.5])), 2),
}


def recorders(method: Method) -> list[Recorder]:
    return [module for module in method.modules() if isinstance(module, Recorder)]


@pytest.mark.parametrize("name", WRAPPERS)
def test_every_call_reaches_the_inner_methods_with_their_own_teacher(name: str) -> None:
    make, teachers = WRAPPERS[name]
    method, at = make(), step(teachers)
    method.bind(Bound(None, ["a", "bb"][:teachers], TASK))  # type: ignore[arg-type]
    prepared = method.prepare(at)
    terms = method.terms(prepared)
    method.after_step(prepared, terms)
    inner = recorders(method)
    assert [one.calls.pop(0) for one in inner] == [("bind", [name]) for name in ["a", "bb"][:teachers]]
    used = {n for n, one in enumerate(inner) if one.calls}
    assert len(used) == (teachers if "ensemble" in name else 1)
    for n in used:
        assert inner[n].calls == [(call, at.teachers[n]) for call in ("prepare", "terms", "after_step")]
    assert list(terms) == list(method.names)
    assert (terms["task"], terms["seen"]) == (1, 2)


@pytest.mark.parametrize("name", WRAPPERS)
def test_declarations_are_those_of_the_inner_methods(name: str) -> None:
    make, teachers = WRAPPERS[name]
    method = make()
    assert method.teachers == teachers
    assert method.uses_teachers
    method.bind(Bound(None, ["a", "bb"][:teachers], TASK))  # type: ignore[arg-type]
    layers = [1, 2][:teachers]
    assert method.needs() == (Needs(hidden=layers), [Needs(cls=[layer]) for layer in layers])
    assert method.batch_dependence() == "a reason"
    assert method.describe()["inner"] == "text"


class Rare(Recorder):
    """A method whose second turn has a rate of its own and moves in every third step."""

    def __init__(self) -> None:
        super().__init__()
        self.own = torch.nn.Linear(1, 1)

    def turns(self) -> Sequence[Turn]:
        rare = Turn(
            "rare", lambda _: {"seen": self.own.weight.sum()}, list(self.own.parameters()), 0.5, lambda at: at.step % 3 == 0
        )
        return [Turn("student", lambda _: {"task": torch.ones(())}), rare]


@pytest.mark.parametrize("name", WRAPPERS)
def test_turns_are_due_where_those_of_the_inner_methods_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "Recorder", Rare)
    first, second = WRAPPERS[name][0]().turns()
    assert first.due is None
    assert second.lr == 0.5
    assert second.due is not None
    assert [second.due(Progress(number)) for number in range(4)] == [True, False, False, True]


def test_every_wrapper_of_a_pool_refuses_a_number_of_teachers_that_is_not_its_own() -> None:
    for wrapper in (Stochastic, Ensemble):
        method: PerTeacher = wrapper(Recorder(), [0.5, 0.5])
        with pytest.raises(ValueError, match="zip"):
            method.bind(Bound(None, ["a"], TASK))  # type: ignore[arg-type]


@pytest.mark.parametrize("teachers", [0, 1, 3])
def test_a_method_of_any_number_of_teachers_declares_needs_for_each(teachers: int) -> None:
    method = Mutual(Finetune())
    assert method.teachers is None
    method.bind(Bound(None, [None] * teachers, TASK))  # type: ignore[arg-type]
    assert method.needs() == (Needs(), [Needs()] * teachers)
