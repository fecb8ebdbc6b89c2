"""SKDBERT: the card's numbers, what is drawn and when, and that only the drawn teacher works."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conformance.bench import TASK as THREE
from conformance.bench import Bench, batch_of, encoder
from torch import Tensor

from kd.data.batch import Batch
from kd.data.tasks import Classification
from kd.errors import InputError
from kd.forward import Forward, Needs, Outputs
from kd.methods.base import Bound, Progress, Step
from kd.methods.kd import KD
from kd.methods.pkd import PKD
from kd.methods.wrappers.stochastic import Stochastic
from kd.models import FrozenTeacher
from kd.training import execute
from whole_runs import Small, broken_off, last_weights, made, planned, pool, same_weights

TASK = Classification("toy", ["no", "yes"], {}, ["accuracy"], "accuracy")
STUDENT = torch.tensor([[1.0, 0.0]]).double()
TEACHERS = [torch.tensor([[2.0, 0.0]]).double(), torch.tensor([[0.0, 0.0]]).double()]
CHANCES = [0.75, 0.25]
LOSSES = [0.432465, 0.813262]
PKD_POOL = "pkd pool=stochastic teacher=[minilm,minilm_4l]"


def forward(logits: Tensor) -> Forward:
    return Forward(lambda inputs, needs: Outputs(logits, torch.ones(len(logits), 1).bool(), needs), {}, Needs())


def step(done: int = 0, seed: int = 0, teachers: list[Tensor] = TEACHERS) -> Step:
    batch = Batch({}, ({},) * len(teachers), torch.tensor([0]), torch.arange(1))
    return Step(forward(STUDENT), [forward(each) for each in teachers], batch, TASK, Progress(done, 10_000), seed=seed)


def terms(method: Stochastic, at: Step) -> dict[str, Tensor]:
    return method.terms(method.prepare(at))


def draws(chances: list[float], steps: int, seed: int = 0) -> list[int]:
    method = Stochastic(KD(), chances)
    return [method.drawn(step(done, seed)) for done in range(steps)]


def test_losses_and_their_expectation_and_variance_are_the_numbers_of_the_card() -> None:
    method = Stochastic(KD(1.0, "ce"), CHANCES)
    found: dict[int, float] = {}
    for done in range(50):
        found[method.drawn(step(done))] = terms(method, step(done))["logits"].item()
    assert [found[place] for place in range(2)] == pytest.approx(LOSSES, abs=1e-6)
    mean = sum(p * found[place] for place, p in enumerate(CHANCES))
    assert mean == pytest.approx(0.527664, abs=1e-6)
    probabilities = sum(p * logits.softmax(-1) for p, logits in zip(CHANCES, TEACHERS, strict=True))
    assert mean == pytest.approx(-(probabilities * STUDENT.log_softmax(-1)).sum().item(), abs=1e-12)
    variance = sum(p * (found[place] - mean) ** 2 for place, p in enumerate(CHANCES))
    assert variance == pytest.approx(0.027189, abs=1e-6)


def test_a_pool_of_one_is_the_plain_method() -> None:
    found = terms(Stochastic(KD(2.0), [1.0]), step(teachers=TEACHERS[:1]))
    expected = KD(2.0).terms(step(teachers=TEACHERS[:1]))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("chances", [[0.75, 0.25], [0.2, 0.3, 0.5], [0.5, 0.0, 0.5]], ids=str)
def test_teachers_are_drawn_as_often_as_their_probabilities_say(chances: list[float]) -> None:
    count = 10_000
    found = Counter(draws(chances, count))
    for place, p in enumerate(chances):
        assert abs(found[place] - count * p) <= 3 * np.sqrt(count * p * (1 - p))


def test_a_draw_follows_from_seed_and_step_alone() -> None:
    method = Stochastic(KD(), [0.5, 0.5])
    first = draws([0.5, 0.5], 200)
    torch.manual_seed(5)  # as it is on another rank, and in another batch of the same step
    np.random.seed(5)
    before = torch.get_rng_state()
    assert draws([0.5, 0.5], 200) == first
    assert torch.equal(torch.get_rng_state(), before), "a draw must not move what dropout draws from"
    assert [method.drawn(step(done)) for done in reversed(range(200))] == first[::-1]
    other = step().replace(batch=Batch({}, ({},) * 2, torch.tensor([1, 0]), torch.tensor([7, 8])))
    other = [method.drawn(other.replace(progress=Progress(done, 17, epoch=3))) for done in range(200)]
    assert other == first


def test_other_steps_and_seeds_draw_anew() -> None:
    runs = [draws([0.5, 0.5], 200, seed) for seed in range(3)]
    assert runs[0] != runs[1] != runs[2] != runs[0]
    assert runs[0][1:] != runs[1][:-1], "the steps of one seed are not the next ones of another"
    for each in runs:
        assert len({tuple(each[start : start + 10]) for start in range(0, 200, 10)}) > 15


def test_what_is_drawn_for_different_things_is_independent() -> None:
    found = [(step(done).rng("teacher").random(), step(done).rng("layer").random()) for done in range(500)]
    assert abs(np.corrcoef(np.array(found).T)[0, 1]) < 0.15


def test_one_teacher_runs_in_a_step_and_it_is_the_drawn_one() -> None:
    bench = Bench("skdbert")
    (method,) = bench.methods.values()
    expected: Counter[int] = Counter()
    for done in range(20):
        at = Progress(done, 100)
        loss = bench.engine.loss(bench.batch(), at)
        loss.total.backward()
        expected[method.drawn(step(done))] += 1
        assert sum(teacher.passes for teacher in bench.teachers) == done + 1
    assert [teacher.passes for teacher in bench.teachers] == [expected[place] for place in range(3)]
    assert [teacher.examples for teacher in bench.teachers] == [8 * expected[place] for place in range(3)]
    assert len(expected) == 3


def test_a_step_is_the_plain_method_with_the_drawn_teacher() -> None:
    bench = Bench(PKD_POOL)
    bench.engine.eval()
    (method,) = bench.methods.values()
    (student,) = bench.students.values()
    batch = bench.batch()
    for done in range(8):
        found = bench.engine.loss(batch, Progress(done, 100)).terms
        place = method.drawn(step(done))
        plain = method.each[place]
        ours, (theirs,) = plain.needs()
        forwards = Forward(student, batch.student, ours), [Forward(bench.teachers[place], batch.student, theirs)]
        expected = plain.terms(Step(*forwards, batch, bench.engine.task, Progress(done, 100)))
        for name in expected:
            torch.testing.assert_close(found[name], expected[name])


def test_projections_of_teachers_that_are_not_drawn_get_gradients_of_zero() -> None:
    bench = Bench(PKD_POOL)
    (method,) = bench.methods.values()
    seen = set()
    for done in range(8):
        bench.engine.zero_grad(set_to_none=True)
        bench.engine.loss(bench.batch(), Progress(done, 100)).total.backward()
        drawn = method.drawn(step(done))
        seen.add(drawn)
        for place, own in enumerate(method.each):
            assert len(list(own.parameters())) == 2
            for parameter in own.parameters():
                assert parameter.grad is not None
                assert bool(parameter.grad.any()) is (place == drawn)
    assert seen == {0, 1}


def test_every_teacher_has_its_own_layer_map_and_projection() -> None:
    student = encoder(1, layers=2, width=24, heads=2)
    teachers = [FrozenTeacher(encoder(2, layers=4)), FrozenTeacher(encoder(3, layers=6, width=16, heads=2))]
    method = Stochastic(PKD(), [0.5, 0.5])
    method.bind(Bound(student, teachers, TASK))
    assert [own.pairs for own in method.each] == [((1, 2),), ((1, 3),)]
    assert [own.project.weight.shape for own in method.each] == [(32, 24), (16, 24)]
    ours, theirs = method.needs()
    assert ours == Needs(cls=[1])
    assert theirs == [Needs(cls=[2]), Needs(cls=[3])]
    assert teachers[0].passes == 0
    batch = batch_of(teachers=2)
    forwards = [Forward(teacher, batch.student, each) for teacher, each in zip(teachers, theirs, strict=True)]
    seen = set()
    for done in range(8):  # reading a layer that was not declared would raise
        at = Step(Forward(student, batch.student, ours), forwards, batch, THREE, Progress(done, 8))
        assert torch.isfinite(terms(method, at)["hidden"])
        seen.add(method.drawn(at))
    assert seen == {0, 1}


def test_a_method_of_several_teachers_is_no_inner_method() -> None:
    with pytest.raises(InputError, match="one teacher at a time") as caught:
        Stochastic(Stochastic(KD(), [0.5, 0.5]), [0.5, 0.5])
    assert caught.value.key == "pool"


# Whole runs: an epoch has 6 batches


def looks(result: dict, names: list[str]) -> list[int]:
    return [result["teacher_forwards"][name]["batches_used"] for name in names]


NAMES = ["minilm", "minilm_3l"]


@pytest.fixture(scope="module")
def words(small: Small, backbone: Path) -> list[str]:
    return small("method=skdbert", "seed=3", "cache=off", *pool(backbone, *NAMES))


def test_a_run_forwards_the_drawn_teacher_once_for_each_optimiser_step(words: list[str]) -> None:
    _, result = made(words)
    expected = Counter(draws([0.5, 0.5], 12, seed=3))
    assert [result["teacher_forwards"][name]["passes"] for name in NAMES] == looks(result, NAMES)
    assert looks(result, NAMES) == [expected[0], expected[1]]
    assert min(expected.values()) > 0
    assert result["teacher_forward_examples"] == 2 * 96
    assert (result["pool"], result["teacher"]) == ("stochastic", NAMES)


def test_batches_of_one_optimiser_step_share_the_draw(words: list[str]) -> None:
    _, result = made([*words, "trainer.accumulate=2"])
    expected = Counter(draws([0.5, 0.5], 6, seed=3))
    assert looks(result, NAMES) == [2 * expected[0], 2 * expected[1]]
    assert expected[0] != 3, "with as many of each a draw for every batch could go unseen"


def test_a_run_that_was_stopped_draws_the_same_teachers_as_an_unbroken_one(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken, result = made(words)
    run = planned([*words, f"paths.runs={tmp_path}", "trainer.checkpoint_minutes=0"])
    for _, needed in unbroken.inputs:
        (tmp_path / needed.name).symlink_to(needed.directory)
    broken_off(run, 8, monkeypatch)
    again = execute.execute(run)
    assert same_weights(last_weights(run), last_weights(unbroken))
    assert again["teacher_forwards"] == result["teacher_forwards"]
    assert sum(looks(again, NAMES)) == 12
    assert again["metrics"] == result["metrics"]


def test_all_probability_on_one_teacher_is_the_trajectory_of_plain_distillation(words: list[str], small: Small) -> None:
    pooled, result = made([*words, "pool.distribution=[1,0]"])
    like = ["method=kd", "method.temperature=1", "method.loss=ce", "method.weights.task=0", "method.weights.logits=1"]
    chosen = [word for word in words if word.startswith("teacher.minilm.")]
    plain, _ = made([*small(*like, "seed=3", "teacher=[minilm]", "cache=off"), *chosen])
    assert same_weights(last_weights(pooled), last_weights(plain))
    assert looks(result, NAMES) == [12, 0]
