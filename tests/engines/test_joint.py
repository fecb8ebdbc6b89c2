"""Students that share their pooling and prediction layer: one set of parameters, summed gradients, one clipped group."""

import copy
from typing import Any

import pytest
import torch
from conformance.bench import TASK, batch_of, encoder
from engines.test_mutual import fitted, rate
from engines.test_turns import Judge, close
from torch import Tensor, nn
from torch.nn import functional as F

from kd.data.batch import Batch
from kd.engines.distiller import Distiller, LearnerTurn, clipped_together
from kd.engines.models import Models
from kd.engines.optimizer import OptimizerFactory
from kd.errors import InputError
from kd.forward import Needs
from kd.methods.base import Bound, Method
from kd.methods.finetune import Finetune
from kd.models import Encoder, FrozenTeacher
from kd.schedules import Constant

OFF = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SHAPES: dict[str, dict[str, Any]] = {
    "deep": {"layers": 3},
    "flat": {"layers": 2, "heads": 2},
    "other": {"layers": 2, "model_type": "roberta"},
}
"""Members of one width, of two families."""


class Joint:
    """Members with a method each, in their engine, in float64."""

    def __init__(
        self, shares: bool = True, method: Method | None = None, update: str = "simultaneous", teachers: int = 0
    ) -> None:
        self.students = {
            name: encoder(index + 1, **{"width": 16, "heads": 4, **OFF, **shape})
            for index, (name, shape) in enumerate(SHAPES.items())
        }
        if shares:
            first, *others = self.students.values()
            for other in others:
                other.share_head(first.head_layers)
        frozen = [FrozenTeacher(encoder(9, layers=2, width=16, heads=4), "t")][:teachers]
        method = method or Finetune()
        self.methods = {name: copy.deepcopy(method) for name in self.students}
        for name, own in self.methods.items():
            own.bind(Bound(self.students[name], frozen, TASK))
        self.weights: Any = {name: Constant(0.5 if name == "logits" else 1.0) for name in method.names}
        factory = OptimizerFactory(torch.optim.SGD, lr=0.05, weight_decay=0.1, schedule="constant", warmup=0.0)
        models = Models(self.students, self.methods, frozen, None, self.weights)
        self.engine = Distiller(models, TASK, factory, update=update)
        self.engine.double().train()
        self.teachers = teachers

    def batch(self, seed: int = 0) -> Batch:
        """A batch for all members."""
        return batch_of(seed=seed, students=len(self.students), teachers=self.teachers)

    def shared(self) -> list[nn.Parameter]:
        """The first member's pooling and prediction layer."""
        return head_of(next(iter(self.students.values())))


def head_of(student: Encoder) -> list[nn.Parameter]:
    return [parameter for layer in student.head_layers for parameter in layer.parameters()]


def body_of(student: Encoder) -> list[nn.Parameter]:
    head = set(head_of(student))
    return [parameter for parameter in student.parameters() if parameter not in head]


def apart(joint: Joint) -> list[Encoder]:
    """Copies of the members that share nothing: each has a head of its own, with the same values."""
    return [copy.deepcopy(student) for student in joint.students.values()]


def term(student: Encoder, batch: Batch) -> Tensor:
    return F.cross_entropy(student(batch.student, Needs()).logits, batch.labels)


def test_the_layers_are_one_tensor_and_occur_once_in_the_optimizer_and_in_a_checkpoint() -> None:
    joint = Joint()
    first, *others = (head_of(student) for student in joint.students.values())
    assert len(first) == 4
    for other in others:
        assert all(one is same for one, same in zip(first, other, strict=True))
    groups = joint.engine.optimizer().param_groups
    parameters = [parameter for group in groups for parameter in group["params"]]
    assert len(parameters) == len(set(parameters))
    assert set(parameters) == set(joint.engine.parameters())
    state = joint.engine.state_dict()
    places = {state[f"student-{name}.model.{s.family.pooler}.weight"].data_ptr() for name, s in joint.students.items()}
    assert len(places) == 1


def test_a_shared_layer_gets_the_sum_of_the_members_gradients_and_a_body_its_own() -> None:
    joint, batch = Joint(), batch_of(students=len(SHAPES), teachers=0)
    copies = apart(joint)
    for member in copies:
        term(member, batch).backward()
    loss = joint.engine.loss(batch)
    torch.testing.assert_close(loss.total, torch.stack([term(member, batch) for member in copies]).sum(), rtol=1e-6, atol=0)
    loss.total.backward()
    for index, parameter in enumerate(joint.shared()):
        expected = torch.stack([head_of(member)[index].grad for member in copies]).sum(0)
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-6, atol=1e-12)
    for student, member in zip(joint.students.values(), copies, strict=True):
        for parameter, own in zip(body_of(student), body_of(member), strict=True):
            torch.testing.assert_close(parameter.grad, own.grad, rtol=1e-6, atol=1e-12)


def transcribed(joint: Joint, batches: list[Batch], make: Any, clip: float | None, shares: bool) -> list[Encoder]:
    """Train copies by hand: heads that are shared are copied after each step from the first one, whose gradient is the sum."""
    members = apart(joint)
    owned = [[*body_of(member), *(head_of(member) if index == 0 or not shares else [])] for index, member in enumerate(members)]
    optimizers = []
    for own in [[p for each in owned for p in each]] if shares else owned:
        decayed, others = ([p for p in own if (p.ndim >= 2) is wide] for wide in (True, False))
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizers.append((own, make(groups, lr=0.05)))
    total = 2 * len(batches)
    for done in range(total):
        for member in members:
            member.zero_grad()
            term(member, batches[done % len(batches)]).backward()
        if shares:
            for index, parameter in enumerate(head_of(members[0])):
                parameter.grad = torch.stack([head_of(member)[index].grad for member in members]).sum(0)
        for own, optimizer in optimizers:
            norm = torch.cat([parameter.grad.flatten() for parameter in own]).norm()
            factor = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))  # torch's own 1e-6
            for parameter in own:
                parameter.grad *= factor
            rate(optimizer, 0.05 * (1 - done / total))
            optimizer.step()
        for member in members[1:] if shares else []:
            for parameter, value in zip(head_of(member), head_of(members[0]), strict=True):
                parameter.data.copy_(value.data)
    return members


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("shares", [True, False])
def test_training_equals_loops_by_hand(shares: bool, make: Any, clip: float | None) -> None:
    """Without sharing the loops are those of members that are fine-tuned each on its own."""
    joint = Joint(shares)
    batches = [joint.batch(seed) for seed in range(2)]
    expected = transcribed(joint, batches, make, clip, shares)
    trainer = fitted(joint, batches, make, clip)  # type: ignore[arg-type]
    assert trainer.global_step == 4
    for student, member in zip(joint.students.values(), expected, strict=True):
        close(student, member)
    assert (joint.shared()[0] is head_of(joint.students["flat"])[0]) is shares


def test_an_update_takes_the_step_that_the_trainer_takes() -> None:
    one, other = Joint(), Joint()
    batch = one.batch()
    expected = transcribed(one, [batch], torch.optim.SGD, 0.3, shares=True)
    other.engine.clip = 0.3
    optimizer = other.engine.optimizer()
    for done in range(2):
        rate(optimizer, 0.05 * (1 - done / 2))
        other.engine.update(batch, optimizer)
    for student, member in zip(other.students.values(), expected, strict=True):
        close(student, member)
    assert all(parameter.grad is None for parameter in other.engine.parameters())


def test_methods_of_several_turns_move_a_shared_layer_once() -> None:
    joint = Joint(method=Judge(), teachers=1)
    batch, copies = joint.batch(), apart(joint)
    assert [len(turns) for turns in joint.engine.rounds()] == [3, 3]
    scales = [copy.deepcopy(method.scale) for method in joint.methods.values()]
    target = joint.engine.teachers[0].encoder(batch.student, Needs()).logits.detach()
    sums = [torch.zeros_like(parameter) for parameter in joint.shared()]
    for scale, member in zip(scales, copies, strict=True):
        logits = member(batch.student, Needs()).logits
        gradients = torch.autograd.grad(F.mse_loss(scale(target), logits.detach()), list(scale.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(scale.parameters(), gradients, strict=True):
                parameter -= 0.05 * gradient
        loss = F.cross_entropy(logits, batch.labels) + 0.5 * F.mse_loss(logits, scale(target).detach())
        for total, gradient in zip(sums, torch.autograd.grad(loss, head_of(member)), strict=True):
            total += gradient
    joint.engine.optimizer_factory = OptimizerFactory(torch.optim.SGD, 0.05, 0.0, "constant", 0.0)
    before = [parameter.detach().clone() for parameter in joint.shared()]
    joint.engine.update(batch, joint.engine.optimizer())
    for parameter, old, total in zip(joint.shared(), before, sums, strict=True):
        torch.testing.assert_close(parameter.data, old - 0.05 * total, rtol=1e-6, atol=1e-12)


def test_members_are_clipped_together_if_they_share_layers_and_each_alone_if_not() -> None:
    shared, separate = Joint(), Joint(shares=False)
    (group,) = shared.engine.trained()
    assert len(group) == len(set(group))
    assert set(group) == set(shared.engine.parameters())
    assert [set(own) for own in separate.engine.trained()] == [set(s.parameters()) for s in separate.students.values()]


def test_turns_are_clipped_together_through_a_third_one() -> None:
    a, b, c, d = (nn.Parameter(torch.zeros(1)) for _ in range(4))
    turns = [LearnerTurn(str(n), None, own) for n, own in enumerate([[a], [b], [c], [d, a, c]])]
    assert clipped_together(turns[:3]) == [[a], [b], [c]]
    groups = clipped_together(turns)
    assert [set(group) for group in groups] == [{b}, {a, c, d}]
    assert sum(map(len, groups)) == 4


def test_one_after_the_other_is_refused_for_members_that_share_layers() -> None:
    Joint(shares=False, update="sequential")
    with pytest.raises(InputError, match="share parameters") as caught:
        Joint(update="sequential")
    assert caught.value.key == "update"
