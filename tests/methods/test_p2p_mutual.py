"""Peer-to-peer mutual learning: distillation from a teacher, and from peers."""

import pytest
import torch
from conformance.bench import TASK, Bench
from torch import Tensor
from torch.nn import functional as F

from kd.data.batch import Batch
from kd.data.tasks import Regression
from kd.forward import Forward, Needs, Outputs
from kd.methods.base import Progress, Step
from kd.methods.kd import KD
from kd.methods.wrappers.mutual import Mutual

SCORES = Regression("toy", ["mse"], "mse")


def divergence(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    own, target = (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1)
    return F.kl_div(own, target, reduction="batchmean") * temperature**2


def shown(logits: Tensor) -> Forward:
    return Forward(lambda inputs, needs: Outputs(logits, torch.ones(len(logits), 1).bool(), needs), {}, Needs())


def gradients(bench: Bench, batch: Batch, place: int | None = None) -> list[Tensor]:
    bench.engine.zero_grad(set_to_none=True)
    bench.engine.loss(batch).total.backward()
    students = list(bench.students.values()) if place is None else [list(bench.students.values())[place]]
    return [parameter.grad for student in students for parameter in student.parameters()]


@pytest.mark.parametrize("online", [False, True])
def test_every_students_loss_is_the_formula_of_the_card(online: bool) -> None:
    weights = ["method.weights.task=0.3", "method.weights.logits=0.6", "method.weights.mutual=1.7"]
    options = ["cohort.students=3", "cohort.peers.temperature=1.5", f"cohort.teacher={'online' if online else 'frozen'}"]
    bench = Bench("p2p_mutual", more=[*weights, *options])
    bench.engine.eval()
    batch = bench.batch()
    loss = bench.engine.loss(batch)
    with torch.no_grad():
        teacher = bench.engine.online if online else bench.teachers[0].encoder
        z_t = teacher(batch.student, Needs()).logits
        z = [student(batch.student, Needs()).logits for student in bench.students.values()]
        expected = []
        for k in range(3):
            peers = sum(divergence(z[other], z[k], 1.5) for other in range(3) if other != k) / 2
            expected.append(0.3 * F.cross_entropy(z[k], batch.labels) + 0.6 * divergence(z_t, z[k], 2.0) + 1.7 * peers)
        if online:
            expected.append(F.cross_entropy(z_t, batch.labels))
    torch.testing.assert_close(loss.total.detach(), torch.stack(expected).sum())
    assert ("teacher/task" in loss.terms) is online


def test_without_weight_on_the_teacher_it_is_dml() -> None:
    batch = (bench := Bench("p2p_mutual", more=["method.weights.logits=0"])).batch()
    for one, other in zip(gradients(bench, batch), gradients(Bench("dml"), batch), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("place", [0, 1])
def test_without_weight_on_the_peers_each_student_is_distilled_alone(place: int) -> None:
    bench = Bench("p2p_mutual", more=["method.weights.mutual=0"])
    batch = bench.batch()
    found = gradients(bench, batch, place)
    student, teacher = bench.students[f"s{place}"], bench.teachers[0]
    forwards = [shown(model(batch.student, Needs()).logits) for model in (student, teacher)]
    own = KD(2.0).terms(Step(forwards[0], forwards[1:], batch, TASK, Progress()))
    expected = torch.autograd.grad(own["task"] + own["logits"], list(student.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_the_peers_temperature_is_not_the_teachers() -> None:
    batch = (bench := Bench("p2p_mutual")).batch()
    plain = bench.terms(batch)
    softer = Bench("p2p_mutual", more=["cohort.peers.temperature=4"]).terms(batch)
    for name, value in plain.items():
        assert torch.equal(value, softer[name]) is not name.endswith("/mutual")
    hotter = Bench("p2p_mutual", more=["method.temperature=4"]).terms(batch)
    for name, value in plain.items():
        assert torch.equal(value, hotter[name]) is not name.endswith("/logits")


@pytest.mark.parametrize("target", ["each", "mean"])
def test_the_square_keeps_the_gradients_scale_as_the_peers_temperature_rises(target: str) -> None:
    own, *peers = 0.1 * torch.randn(3, 6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for temperature in (100.0, 200.0):
        student = own.clone().requires_grad_()
        batch = Batch({}, ({},), torch.zeros(6).long(), torch.arange(6))
        method = Mutual(KD(), temperature, target)
        at = Step(shown(student), [shown(own)], batch, TASK, Progress(), [shown(peer) for peer in peers])
        found.append(torch.autograd.grad(method.terms(at)["mutual"], student)[0])
    torch.testing.assert_close(*found, rtol=0.1, atol=1e-5)  # equal in the limit of high temperature


def test_one_pass_of_the_frozen_teacher_serves_all_students() -> None:
    bench = Bench("p2p_mutual", more=["cohort.students=3"])
    bench.engine.loss(bench.batch()).total.backward()
    assert bench.teachers[0].passes == 1


def test_a_pool_is_drawn_from_once_for_all_students() -> None:
    bench = Bench("p2p_mutual pool=stochastic teacher=[minilm,minilm_4l]")
    for done in range(8):
        bench.engine.loss(bench.batch(), Progress(done, 100))
        assert sum(teacher.passes for teacher in bench.teachers) == done + 1


def test_of_a_regression_teacher_and_peers_are_both_matched_by_squared_error() -> None:
    own, teacher, *peers = torch.randn(4, 5, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(5).double()
    batch = Batch({}, ({},), labels, torch.arange(5))
    at = Step(shown(own), [shown(teacher)], batch, SCORES, Progress(), [shown(peer) for peer in peers])
    found = Mutual(KD(2.0), 3.0).terms(at)
    torch.testing.assert_close(found["task"], F.mse_loss(own[:, 0], labels))
    torch.testing.assert_close(found["logits"], F.mse_loss(own, teacher))
    torch.testing.assert_close(found["mutual"], sum(F.mse_loss(own, peer) for peer in peers) / 2)
