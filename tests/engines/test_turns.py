"""Methods whose updates have several turns: what moves in each, by which rate, and what later turns read."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conformance.bench import TASK, Bench, encoder
from engines.test_mutual import fitted
from torch import Tensor, nn
from torch.nn import functional as F

from kd.config.cohort import PEERS
from kd.data.batch import Batch
from kd.engines.distiller import Distiller, turns_of
from kd.engines.models import Models
from kd.engines.optimizer import OptimizerFactory
from kd.forward import Needs
from kd.methods.base import Bound, Method, Step, Turn
from kd.methods.wrappers.ensemble import Ensemble
from kd.methods.wrappers.mutual import Mutual
from kd.methods.wrappers.stochastic import Stochastic
from kd.models import FrozenTeacher
from kd.schedules import Constant


class Judge(Method):
    """A toy policy: a scale of the teacher's logits that is fitted to the student's, and a student that learns from it.

    Args:
        first: the turn that comes first.
        lr: peak rate of the policy.
    """

    names = ("task", "logits", "policy")

    def __init__(self, first: str = "policy", lr: float | None = None) -> None:
        super().__init__()
        self.scale = nn.Linear(3, 3, bias=False)
        self.first, self.lr = first, lr
        self.batches = 0

    def bind(self, bound: Bound) -> None:
        nn.init.eye_(self.scale.weight)

    def turns(self) -> Sequence[Turn]:
        policy = Turn("policy", self.policy, list(self.scale.parameters()), self.lr)
        student = Turn("student", self.of_student)
        return [policy, student] if self.first == "policy" else [student, policy]

    def policy(self, step: Step) -> dict[str, Tensor]:
        """The policy's loss reads the student's logits with their graph: their gradient must not reach the student."""
        return {"policy": F.mse_loss(self.scale(step.teacher.outputs.logits), step.student.outputs.logits)}

    def of_student(self, step: Step) -> dict[str, Tensor]:
        logits = step.student.outputs.logits
        return {
            "task": step.task.hard(logits, step.batch.labels),
            "logits": F.mse_loss(logits, self.scale(step.teacher.outputs.logits)),
        }

    def after_step(self, step: Step, terms: Any) -> None:
        assert list(terms) == (list(self.names) if self.first != "policy" else ["policy", "task", "logits"])
        self.batches += 1


WEIGHTS = {"task": 1.0, "logits": 0.5, "policy": 2.0, PEERS: 1.0}
UPDATE_ORDERS = ("simultaneous", "sequential")


class Trial:
    """Students with `Judge`, in their engine, in float64."""

    def __init__(self, method: Method, count: int = 1, teachers: int = 1, update: str = "simultaneous") -> None:
        names = ["student"] if count == 1 else [f"s{index}" for index in range(count)]
        off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.students = {name: encoder(1 + index, layers=2, width=16, heads=4, **off) for index, name in enumerate(names)}
        self.teachers = [FrozenTeacher(encoder(9 + n, layers=3, width=16, heads=4), f"t{n}") for n in range(teachers)]
        self.methods = {name: copy.deepcopy(method) for name in names}
        for name, own in self.methods.items():
            own.bind(Bound(self.students[name], self.teachers, TASK))
        weights: Any = {name: Constant(weight) for name, weight in WEIGHTS.items() if name in method.names}
        factory = OptimizerFactory(torch.optim.SGD, lr=0.05, weight_decay=0.0, schedule="constant", warmup=0.0)
        models = Models(self.students, self.methods, self.teachers, None, weights)
        self.engine = Distiller(models, TASK, factory, update=update)
        self.engine.double().train()
        self.counts = {"teachers": teachers, "students": count}

    task = TASK
    batch = Bench.batch


def close(one: nn.Module, other: nn.Module) -> None:
    for (name, parameter), expected in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-6, atol=1e-8, msg=name)


def transcribed(
    trial: Trial, batches: list[Batch], make: Any, clip: float | None, first: str, lr: float
) -> tuple[nn.Module, nn.Module]:
    """Train copies of one student and its policy with an optimiser for each; return both."""
    student, scale = copy.deepcopy(trial.students["student"]), copy.deepcopy(trial.methods["student"].scale)
    teacher = copy.deepcopy(trial.teachers[0].encoder)
    matrices, vectors = ([p for p in student.parameters() if (p.ndim >= 2) is wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizers = {"student": make(groups, lr=0.05), "policy": make(scale.parameters(), lr=lr, weight_decay=0.1)}
    total = 2 * len(batches)
    for done in range(total):
        batch = batches[done % len(batches)]
        with torch.no_grad():
            target = teacher(batch.student, Needs()).logits
        for turn in (first, "student" if first == "policy" else "policy"):
            logits = student(batch.student, Needs()).logits
            module = scale if turn == "policy" else student
            if turn == "policy":
                loss = 2.0 * F.mse_loss(scale(target), logits.detach())
            else:
                loss = F.cross_entropy(logits, batch.labels) + 0.5 * F.mse_loss(logits, scale(target).detach())
            gradients = torch.autograd.grad(loss, list(module.parameters()))
            norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
            factor = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
            for parameter, gradient in zip(module.parameters(), gradients, strict=True):
                parameter.grad = gradient * factor
            for group in optimizers[turn].param_groups:
                group["lr"] = (lr if turn == "policy" else 0.05) * (1 - done / total)
            optimizers[turn].step()
    return student, scale


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("first", ["policy", "student"])
def test_turns_equal_loops_with_an_optimizer_for_each(first: str, make: Any, clip: float | None) -> None:
    trial = Trial(Judge(first, lr=0.2))
    batches = [trial.batch(seed=seed) for seed in range(2)]
    student, scale = transcribed(trial, batches, make, clip, first, 0.2)
    trainer = fitted(trial, batches, make, clip)  # type: ignore[arg-type]
    assert trainer.global_step == 4
    close(trial.students["student"], student)
    close(trial.methods["student"].scale, scale)
    assert trial.methods["student"].batches == 4
    assert trial.teachers[0].passes == 4, "turns share a frozen teacher's pass"


@pytest.mark.parametrize("update", UPDATE_ORDERS)
def test_a_cohort_of_methods_with_turns_equals_loops(update: str) -> None:
    trial = Trial(Mutual(Judge()), count=2, update=update)
    batch = trial.batch()
    students = [copy.deepcopy(student) for student in trial.students.values()]
    scales = [copy.deepcopy(method.inner.scale) for method in trial.methods.values()]
    target = trial.teachers[0].encoder(batch.student, Needs()).logits.detach()

    def move(module: nn.Module, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(module.parameters())))

    def apply(module: nn.Module, gradients: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, gradient in zip(module.parameters(), gradients, strict=True):
                parameter -= 0.05 * gradient

    def policy(k: int) -> list[Tensor]:
        logits = students[k](batch.student, Needs()).logits.detach()
        return move(scales[k], 2.0 * F.mse_loss(scales[k](target), logits))

    def student(k: int) -> list[Tensor]:
        own, peer = (students[i](batch.student, Needs()).logits for i in (k, 1 - k))
        mutual = F.kl_div(own.log_softmax(-1), peer.detach().softmax(-1), reduction="batchmean")
        guided = 0.5 * F.mse_loss(own, scales[k](target).detach())
        return move(students[k], F.cross_entropy(own, batch.labels) + guided + mutual)

    if update == "simultaneous":
        for module, gradients in zip(scales, [policy(0), policy(1)], strict=True):
            apply(module, gradients)
        for module, gradients in zip(students, [student(0), student(1)], strict=True):
            apply(module, gradients)
    else:
        for k in range(2):
            apply(scales[k], policy(k))
            apply(students[k], student(k))
    trial.engine.update(batch, trial.engine.optimizer())
    for own, expected, method, scale in zip(trial.students.values(), students, trial.methods.values(), scales, strict=True):
        close(own, expected)
        close(method.inner.scale, scale)


@pytest.mark.parametrize("wrapper", [Stochastic, Ensemble])
def test_pools_pass_turns_on(wrapper: type) -> None:
    trial = Trial(wrapper(Judge(), [0.25, 0.75]), teachers=2)
    batch, method = trial.batch(), trial.methods["student"]
    assert [turn.name for turn in method.turns()] == ["policy", "student"]
    before = copy.deepcopy(method.state_dict())
    loss = trial.engine.update(batch, trial.engine.optimizer())
    assert list(loss.terms) == ["policy", "task", "logits"]
    moved = [not torch.equal(before[f"each.{k}.scale.weight"], method.each[k].scale.weight) for k in range(2)]
    if wrapper is Ensemble:
        assert moved == [True, True]
    else:
        drawn = method.drawn(loss.steps[0][1])
        assert moved == [drawn == 0, drawn == 1]


def test_each_turn_has_its_own_gradients_and_leaves_none() -> None:
    trial = Trial(Judge())
    trial.engine.update(trial.batch(), trial.engine.optimizer())
    assert all(parameter.grad is None for parameter in trial.engine.parameters())
    assert [len(turns) for turns in trial.engine.rounds()] == [1, 1]
    assert not trial.engine.automatic_optimization


def test_one_turn_stays_with_the_trainer_and_an_update_takes_the_same_step() -> None:
    one, other = Bench("pkd", double=True), Bench("pkd", double=True)
    assert one.engine.automatic_optimization
    batch = one.batch()
    fitted(one, [batch], torch.optim.SGD, None)
    other.engine.optimizer_factory = OptimizerFactory(torch.optim.SGD, 0.05, 0.1, "linear", 0.0)
    other.engine.optimizer_factory = one.engine.optimizer_factory
    optimizer = other.engine.optimizer()
    for done in range(2):
        rate = other.engine.optimizer_factory.factor(done, 2) * 0.05
        for group in optimizer.param_groups:
            group["lr"] = rate
        other.engine.update(batch, optimizer)
    for one_student, other_student in zip(one.students.values(), other.students.values(), strict=True):
        close(one_student, other_student)


class Faulty(Judge):
    """A policy whose turns contradict each other."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def turns(self) -> Sequence[Turn]:
        policy, student = super().turns()
        own = list(self.scale.parameters())
        return {
            "one name": [policy, Turn("policy", self.of_student)],
            "shared": [policy, student, Turn("again", self.policy, own)],
            "nothing for the rest": [policy],
            "two for the rest": [student, Turn("again", self.policy)],
            "foreign": [student, Turn("policy", self.policy, [nn.Parameter(torch.zeros(1))])],
        }[self.fault]


@pytest.mark.parametrize("fault", ["one name", "shared", "nothing for the rest", "two for the rest", "foreign"])
def test_turns_that_contradict_each_other_are_refused(fault: str) -> None:
    with pytest.raises(ValueError, match="turn"):
        Trial(Faulty(fault))


def test_the_turn_for_the_rest_moves_what_no_other_one_moves() -> None:
    trial = Trial(Judge())
    (learner,) = trial.engine.learners.values()
    policy, student = turns_of("student", learner)
    assert policy.parameters == list(learner.method.scale.parameters())
    assert set(policy.parameters) | set(student.parameters) == set(learner.parameters)
    assert set(policy.parameters).isdisjoint(student.parameters)
