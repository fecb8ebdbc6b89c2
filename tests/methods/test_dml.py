"""DML: the card's numbers, and that peers are constants."""

import copy

import pytest
import torch
from conformance.bench import Bench
from torch import Tensor
from torch.nn import functional as F

from kd.data.batch import Batch
from kd.data.tasks import Classification, Regression
from kd.errors import InputError
from kd.forward import Forward, Needs, Outputs
from kd.methods.base import Progress, Step
from kd.methods.finetune import Finetune
from kd.methods.wrappers.mutual import Mutual
from kd.schedules import Linear

TASK = Classification("toy", ["no", "yes"], {}, ["accuracy"], "accuracy")
SCORES = Regression("toy", ["pearson"], "pearson")
ONE, TWO, THREE = (torch.tensor([p]).double().log() for p in ([0.8, 0.2], [0.6, 0.4], [0.5, 0.5]))
MINE, *PEERS = 2 * torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([0, 2, 1, 1, 0])


def forward(logits: Tensor) -> Forward:
    return Forward(lambda inputs, needs: Outputs(logits, torch.ones(len(logits), 1).bool(), needs), {}, Needs())


def step(own: Tensor, peers: list[Tensor], labels: Tensor, task: object = TASK, done: int = 0) -> Step:
    batch = Batch({}, (), labels, torch.arange(len(labels)), 1.0, ({},) * len(peers))
    return Step(forward(own), [], batch, task, Progress(done, 100), [forward(logits) for logits in peers])


def mutual(own: Tensor, peers: list[Tensor], **options: object) -> float:
    labels = torch.zeros(len(own), dtype=torch.long)
    return Mutual(Finetune(), **options).terms(step(own, peers, labels))["mutual"].item()


def test_the_divergence_is_from_the_peers_prediction_to_ones_own() -> None:
    assert mutual(ONE, [TWO]) == pytest.approx(0.104650, abs=1e-6)
    assert mutual(TWO, [ONE]) == pytest.approx(0.091516, abs=1e-6)


def test_of_three_students_the_numbers_are_those_of_the_card() -> None:
    each = mutual(ONE, [TWO, THREE])
    assert each == pytest.approx(0.163897, abs=1e-6)
    assert mutual(ONE, [TWO, THREE], target="sum") == pytest.approx(2 * 0.163897, abs=2e-6)
    assert mutual(ONE, [TWO, THREE], target="mean") == pytest.approx(0.158837, abs=1e-6)
    terms = Mutual(Finetune()).terms(step(ONE, [TWO, THREE], torch.tensor([0])))
    assert terms["task"].item() == pytest.approx(0.223144, abs=1e-6)
    assert (terms["task"] + terms["mutual"]).item() == pytest.approx(0.387040, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_terms_equal_the_papers_formula_written_as_loops(temperature: float) -> None:
    each = []
    for peer in PEERS:
        total = 0.0
        for example in range(5):
            p, q = ((logits[example] / temperature).softmax(-1) for logits in (peer, MINE))
            total += sum((p[label] * (p[label] / q[label]).log()).item() for label in range(3))
        each.append(temperature**2 * total / 5)
    found = {target: mutual(MINE, PEERS, temperature=temperature, target=target) for target in ("each", "sum", "mean")}
    assert found["each"] == pytest.approx(sum(each) / 3, rel=1e-9)
    assert found["sum"] == pytest.approx(sum(each), rel=1e-9)
    average = torch.stack([(peer / temperature).softmax(-1) for peer in PEERS]).mean(0)
    own = (MINE / temperature).softmax(-1)
    assert found["mean"] == pytest.approx(temperature**2 * (average * (average / own).log()).sum(-1).mean().item(), rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_the_divergence_from_the_mean_is_at_most_the_mean_of_the_divergences(seed: int) -> None:
    own, *peers = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert 0 < mutual(own, peers, target="mean") <= mutual(own, peers)
    assert mutual(own, [own, own], target="mean") == pytest.approx(0, abs=1e-12)
    for target in ("sum", "mean"):  # of a single peer all targets are one
        assert mutual(own, peers[:1], target=target) == pytest.approx(mutual(own, peers[:1]), rel=1e-9)


@pytest.mark.parametrize("target", ["each", "sum", "mean"])
def test_the_order_of_peers_changes_nothing_and_students_that_agree_differ_by_nothing(target: str) -> None:
    assert mutual(MINE, PEERS[::-1], target=target) == pytest.approx(mutual(MINE, PEERS, target=target), rel=1e-12)
    assert mutual(MINE, [MINE + 3.0] * 2, target=target) == pytest.approx(0, abs=1e-12)


def test_the_temperature_follows_the_moment() -> None:
    method = Mutual(Finetune(), Linear(4.0, 2.0))
    for done, temperature in ((0, 4.0), (50, 3.0)):
        found = method.terms(step(MINE, PEERS, LABELS, done=done))["mutual"].item()
        assert found == pytest.approx(mutual(MINE, PEERS, temperature=temperature), rel=1e-12)


@pytest.mark.parametrize("target", ["each", "sum", "mean"])
def test_peers_of_a_regression_differ_by_squared_error(target: str) -> None:
    own, *peers = (logits[:, :1] for logits in (MINE, *PEERS))
    found = Mutual(Finetune(), 3.0, target).terms(step(own, peers, torch.zeros(5), SCORES))
    each = [F.mse_loss(own, peer) for peer in peers]
    expected = {"each": sum(each) / 3, "sum": sum(each), "mean": F.mse_loss(own, sum(peers) / 3)}[target]
    torch.testing.assert_close(found["mutual"], expected)
    torch.testing.assert_close(found["task"], (own**2).mean())


@pytest.mark.parametrize("target", ["each", "sum", "mean"])
def test_a_loss_has_no_gradient_for_peers_even_where_they_are_not_detached(target: str) -> None:
    own, peers = MINE.clone().requires_grad_(), [peer.clone().requires_grad_() for peer in PEERS]
    Mutual(Finetune(), 2.0, target).terms(step(own, peers, LABELS))["mutual"].backward()
    assert own.grad.abs().sum() > 0
    assert all(peer.grad is None or not peer.grad.any() for peer in peers)


@pytest.mark.parametrize("case", ["dml", "dml cohort.students=3", "pkd cohort.students=3 cohort=mutual", "p2p_mutual"])
def test_a_students_loss_gives_the_others_no_gradient_at_all(case: str) -> None:
    bench = Bench(case)
    steps = bench.engine.loss(bench.batch()).steps
    for place, (_, _, terms) in enumerate(steps):
        total = sum(terms.values())
        for other, student in enumerate(bench.students.values()):
            found = torch.autograd.grad(total, list(student.parameters()), retain_graph=True, allow_unused=True)
            assert all(gradient is None for gradient in found) is (other != place)


def test_a_step_shows_the_peers_as_constants_and_not_oneself() -> None:
    bench = Bench("dml cohort.students=3")
    students = list(bench.students.values())
    steps = [step for _, step, _ in bench.engine.loss(bench.batch()).steps]
    for place, each in enumerate(steps):
        assert [peer.model for peer in each.peers] == students[:place] + students[place + 1 :]
        for peer in each.peers:
            assert not peer.outputs.logits.requires_grad
            assert not peer.run().logits.requires_grad
            (owner,) = (other.student for other in steps if other.student.model is peer.model)
            assert torch.equal(peer.outputs.logits, owner.outputs.logits)


@pytest.mark.parametrize("case", ["dml", "p2p_mutual", "dml cohort.students=3 cohort.peers.target=mean"])
def test_identical_students_have_nothing_to_say_to_each_other(case: str) -> None:
    bench = Bench(case, same=True)
    if bench.teachers:  # a teacher that differs
        bench.teachers[0].encoder.load_state_dict(Bench(case, same=True, seed=7).students["s0"].state_dict())
    bench.engine.eval()
    loss = bench.engine.loss(bench.batch())
    for name, term in loss.terms.items():
        if name.endswith("/mutual"):
            assert term.item() == pytest.approx(0, abs=1e-6)
    loss.total.backward()
    first, *others = ([p.grad for p in student.parameters()] for student in bench.students.values())
    assert any(gradient.any() for gradient in first)
    for other in others:
        assert all(torch.equal(one, two) for one, two in zip(first, other, strict=True))


def test_without_weight_on_the_peers_students_are_independent() -> None:
    bench = Bench("dml cohort.students=3", more=["method.weights.mutual=0"])
    batch = bench.batch()
    alone = [copy.deepcopy(student) for student in bench.students.values()]
    bench.engine.loss(batch).total.backward()
    for student, copied in zip(bench.students.values(), alone, strict=True):
        F.cross_entropy(copied(batch.student, Needs()).logits, batch.labels).backward()
        for one, other in zip(student.parameters(), copied.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-7)


def test_an_unknown_target_and_an_impossible_temperature_name_their_keys() -> None:
    with pytest.raises(InputError, match="each, sum, mean") as target:
        Mutual(Finetune(), target="all")
    with pytest.raises(InputError, match="positive") as temperature:
        Mutual(Finetune(), temperature=0)
    assert (target.value.key, temperature.value.key) == ("target", "temperature")
