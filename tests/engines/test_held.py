"""A reward on a held part of train: through the data module, the trainer and whole runs."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conformance import test_contract as contract
from conformance.bench import TASK, Bench, batch_of, encoder
from engines.reward import CASES, SEEN, Rewarded, held_mask, save_rank, trained

from kd.build.data import build_data, build_examples, check_held, share_held
from kd.build.models import build_models
from kd.config.compose import compose
from kd.config.schema import StudentSpec
from kd.data.examples import Examples
from kd.errors import InputError
from kd.forward import Forward, Needs
from kd.forward.lazy import Detached
from kd.methods.base import Progress, Step
from kd.methods.wrappers.ensemble import Ensemble
from kd.methods.wrappers.mutual import Mutual
from kd.methods.wrappers.stochastic import Stochastic
from kd.models import FrozenTeacher
from kd.system import distributed
from kd.training import execute
from kd.training.preflight import Report, check_held_part
from processes import fork_server, free_port
from whole_runs import broken_off, checked, last_weights, made, over, planned, same_weights

Small = Callable[..., list[str]]

TOY = (
    "method=kd",
    "method._target_=engines.reward.Rewarded",
    *(f"~method.{key}" for key in ("temperature", "loss", "reduction")),
    "+method.holds=0.25",
    "+method.turns=2",
    "+method.weights.policy=1.0",
    "+method.weights.held=0.5",
)
SUMS = 1e-9
"""Sums of float64 in another order, through two epochs; with the reward of a rank's own examples results are off by 1e-4."""


@pytest.fixture(scope="module")
def finished(small: Small) -> tuple[Any, dict, list[dict]]:
    """A run with a reward, its record, and what its batches saw."""
    words = small(*TOY)
    for _, needed in planned(words).inputs:
        execute.execute(needed)
    SEEN.clear()
    run, result = made(words)
    return run, result, copy.deepcopy(SEEN)


def test_held_texts_are_in_no_training_batch_and_come_in_turn(finished: tuple) -> None:
    run, _, seen = finished
    texts = build_examples(run).texts["train"]
    mask = held_mask(texts, 0.25)
    held = {text for text, is_held in zip(texts, mask, strict=True) if is_held}
    for epoch in range(2):
        rows = [row for batch in seen if batch["epoch"] == epoch for row in batch["index"]]
        assert len(rows) == len(set(rows)) == len(texts) - mask.sum(), "every other example is trained on once"
        assert {texts[row] for row in rows}.isdisjoint(held)
    rewarded = [row for batch in seen for row in batch["held"]]
    assert {texts[row] for row in rewarded} == held
    counts = [rewarded.count(row) for row in set(rewarded)]
    assert max(counts) - min(counts) <= 1
    assert {len(batch["held"]) for batch in seen} == {16}
    assert len({batch["policy"] for batch in seen}) > 3, "the reward changes"


def test_record_counts_what_was_trained_on_and_what_was_held_and_nothing_is_evaluated_on_it(finished: tuple) -> None:
    run, result, seen = finished
    held = int(held_mask(build_examples(run).texts["train"], 0.25).sum())
    assert result["examples"] == {"train": 96 - held, "validation": 32, "test": 32, "held": held}
    assert (result["steps"], result["batch_size"]) == (len(seen), 16)
    assert result["examples_per_second"] * result["seconds"]["train"] == pytest.approx(2 * (96 - held), rel=1e-2)
    assert set(result["metrics"]) == set(result["agreement"]) == {"validation", "test"}
    assert f"{96 - held} train, 32 validation, 32 test, {held} held examples" in (run.student / "README.md").read_text()


def test_a_run_that_holds_nothing_has_the_record_and_the_digest_of_before(small: Small) -> None:
    run, result = made(small("method=finetune", "teacher=[]", "trainer.max_epochs=1"))
    assert result["examples"] == {"train": 96, "validation": 32, "test": 32}
    assert "holds" not in str(run.digest_inputs)


def test_share_is_part_of_the_digest_of_the_run_and_not_of_its_teacher(small: Small) -> None:
    one, other = planned(small(*TOY)), planned(small(*TOY, "method.holds=0.3"))
    assert one.digest != other.digest
    assert (
        one.inputs.teachers["minilm"].digest
        == other.inputs.teachers["minilm"].digest
        == (planned(small("method=kd")).inputs.teachers["minilm"].digest)
    )


def test_preflight_reports_the_held_part_and_where_it_was_learnt_from(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: tuple
) -> None:
    held = finished[1]["examples"]["held"]
    made(small(*TOY, "trainer.max_epochs=1", "seed=4"))
    output = capsys.readouterr().out
    assert f"held part of train: {held} of 96 examples are not trained on, 16 of them beside each batch" in output
    assert "layers of its teacher" not in output
    made(small(*TOY, "trainer.max_epochs=1", "student.init_from=teacher"))
    assert "layers of its teacher, which was trained on the held part" in capsys.readouterr().out


@pytest.mark.parametrize(("batches", "words"), [(3, ()), (8, ()), (8, ("method.turns=1", "trainer.accumulate=2"))])
def test_a_stopped_run_goes_on_with_the_held_batches_of_an_unbroken_one(
    finished: tuple, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: int, words: tuple[str, ...]
) -> None:
    unbroken, seen = finished[0], finished[2]
    if words:
        SEEN.clear()
        unbroken, _ = made(small(*TOY, *words))
        seen = copy.deepcopy(SEEN)
    run = planned(small(*TOY, *words, f"paths.runs={tmp_path}", "trainer.checkpoint_minutes=0"))
    assert run.digest == unbroken.digest
    for _, needed in run.inputs:
        execute.execute(needed)
    SEEN.clear()
    broken_off(run, batches, monkeypatch)
    first = len(SEEN)
    execute.execute(run)
    again = copy.deepcopy(SEEN)
    begin = len(seen) - (len(again) - first)
    assert 0 < begin <= first
    assert again[first:] == seen[begin:]
    assert again[:first] == seen[:first]
    assert same_weights(last_weights(run), last_weights(unbroken))


def test_cached_outputs_of_teachers_are_there_for_held_examples_and_serve_runs_that_hold_others(
    small: Small, tmp_path: Path
) -> None:
    words = f"paths.runs={tmp_path}"
    made(small("method=kd", "trainer.max_epochs=1", words))
    run = planned(small(*TOY, words))
    examples = build_examples(run)
    models = build_models(run, examples.task, texts=examples.texts["train"])
    teacher = models.teachers[0]
    data, models = build_data(run, examples, models)
    assert models.caches["minilm"].used
    assert models.caches["minilm"].written == [], "the cache is of all of train, whatever is held"
    batch = next(iter(data.train_dataloader()))
    assert "input_ids" not in batch.held.teachers[0]
    step = Step(
        Forward(models.student, batch.student, Needs()),
        [Forward(models.teachers[0], batch.teachers[0], Needs())],
        batch,
        examples.task,
        Progress(),
    )
    found = step.on_held().teacher.outputs.logits
    with torch.no_grad():
        expected = teacher(batch.held.student, Needs()).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # precomputed in other batches


@pytest.mark.parametrize("share", ["0.0001", "0.9999", "1", "-0.1", "true"])
def test_a_share_that_cannot_be_is_refused_before_anything_is_trained(small: Small, tmp_path: Path, share: str) -> None:
    with pytest.raises(InputError, match=r"share|either part") as caught:
        checked(over(small(*TOY, f"paths.runs={tmp_path}")), f"method.holds={share}")
    assert caught.value.key == "method.holds"
    assert caught.value.message.startswith("method.holds=")
    assert not list(tmp_path.iterdir())


def test_more_ranks_than_held_examples_are_refused_before_anything_is_trained(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = int(held_mask(build_examples(planned(small(*TOY))).texts["train"], 0.25).sum())
    plan_of = over(small(*TOY, "trainer.batch_size=128"))
    for ranks in (held, held + 1):
        monkeypatch.setattr(distributed, "world", lambda ranks=ranks: ranks)
        monkeypatch.setattr(distributed, "gather", lambda value, ranks=ranks: [value] * ranks)
        if ranks == held:
            checked(plan_of)
            continue
        with pytest.raises(InputError, match=f"an example for each of {ranks} ranks") as caught:
            checked(plan_of)
        assert caught.value.key == "method.holds"


def test_a_limit_on_train_comes_before_the_cut_and_a_batch_is_at_most_what_is_left(small: Small) -> None:
    words = ("task.limit_train=40", "trainer.batch_size=512", "trainer.max_epochs=1", "teacher.minilm.run.trainer.max_epochs=1")
    run, result = made(small(*TOY, *words))
    held = int(held_mask(build_examples(run).texts["train"], 0.25).sum())
    assert 0 < held < 40
    assert (result["examples"]["train"], result["examples"]["held"]) == (40 - held, held)
    assert (result["batch_size"], len(SEEN[-1]["index"]), len(SEEN[-1]["held"])) == (40 - held, 40 - held, held)


@pytest.mark.parametrize(("share", "warned"), [(None, 1), (0.1, 1), (0.25, 0), (0.3, 0)])
def test_preflight_warns_of_a_first_run_that_trained_on_the_held_part(share: float | None, warned: int) -> None:
    node = dict(compose(["method=kd"]).method) if share is None else {"holds": share, "_target_": "engines.reward.Rewarded"}
    node["weights"] = dict.fromkeys(("task", "logits") if share is None else Rewarded.names, 1.0)
    before = SimpleNamespace(spec=SimpleNamespace(method=node))
    student = StudentSpec(name="student", init="run", init_from="pretrained")
    run: Any = SimpleNamespace(inputs=SimpleNamespace(before=before), spec=SimpleNamespace(student=student))
    engine: Any = SimpleNamespace(learners={"student": SimpleNamespace(method=Rewarded(0.25))})
    of_train = SimpleNamespace(texts={"train": range(20)})
    data: Any = SimpleNamespace(held_count=5, trained_count=15, held_size=lambda: 4, examples=of_train)
    report = Report()
    check_held_part(report, run, engine, data)
    assert report.warnings == warned
    assert "5 of 20 examples are not trained on, 4 of them beside each batch" in report.lines[0]


def test_classes_that_are_left_out_by_the_cut_are_refused() -> None:
    texts = [(f"text {number}",) for number in range(40)]
    mask = held_mask(texts, 0.5)
    examples = Examples(TASK, {"train": texts}, {"train": [float(held) for held in mask]})
    models: Any = SimpleNamespace(methods={"student": Rewarded(0.5)})
    for method, key in (({"holds": 0.5}, "method.holds"), ({}, "method")):
        with pytest.raises(InputError, match="without the held part of train, every training example has the label") as caught:
            check_held(SimpleNamespace(spec=SimpleNamespace(method=method)), examples, models)  # type: ignore[arg-type]
        assert caught.value.key == key


def test_students_that_are_trained_together_hold_one_part() -> None:
    def models(*shares: float) -> Any:
        return SimpleNamespace(methods={f"s{n}": Rewarded(share) for n, share in enumerate(shares)})

    assert share_held(models(0.25, 0.25)) == 0.25
    with pytest.raises(InputError, match=r"these hold s0 0.25, s1 0.0") as caught:
        share_held(models(0.25, 0.0))
    assert caught.value.key == "cohort.students"


# Steps over held examples


@pytest.mark.parametrize("wrap", [lambda m: Stochastic(m, [0.5, 0.5]), lambda m: Ensemble(m, [0.5, 0.5]), Mutual])
def test_a_wrapper_holds_what_its_method_holds(wrap: Callable) -> None:
    assert wrap(Rewarded(0.2)).holds == 0.2


def step_over(teachers: int = 2, peers: int = 1, held: bool = True) -> tuple[Step, list]:
    """A step of models of one shape, whose batch and held batch differ."""
    models = [encoder(seed, layers=2, width=16, heads=4) for seed in range(2 + teachers)]
    batches = [batch_of(count, seed=count, students=1 + peers) for count in (6, 4)]
    for number, batch in enumerate(batches):  # each model reads text of its own
        own = [batch_of(len(batch), seed=40 + 10 * number + k).student for k in range(teachers + peers)]
        batches[number] = replace(batch, teachers=tuple(own[:teachers]), peers=tuple(own[teachers:]))
    batch = replace(batches[0], held=batches[1] if held else None)
    frozen = [
        Forward(FrozenTeacher(model, "t"), inputs, Needs()) for model, inputs in zip(models[2:], batch.teachers, strict=True)
    ]
    others = [Detached(Forward(models[1], inputs, Needs())) for inputs in batch.peers]
    return Step(Forward(models[0], batch.student, Needs()), frozen, batch, TASK, Progress(), others), models


def test_a_step_over_held_examples_runs_every_model_on_them() -> None:
    step, models = step_over()
    held = step.on_held()
    assert held.batch is step.held
    expected = [models[0](held.batch.student, Needs()).logits]
    expected += [model(inputs, Needs()).logits for model, inputs in zip(models[2:], held.batch.teachers, strict=True)]
    expected += [models[1](inputs, Needs()).logits for inputs in held.batch.peers]
    forwards = [held.student, *held.teachers, *held.peers]
    assert not any(forward.ran for forward in forwards)
    for forward, logits in zip(forwards, expected, strict=True):
        assert torch.equal(forward.outputs.logits, logits)
    assert [forward.outputs.logits.requires_grad for forward in forwards] == [True, False, False, False]
    assert not step.student.ran


def test_a_step_over_held_examples_shows_the_student_as_it_is_now() -> None:
    step, models = step_over()
    before = step.on_held().student.outputs.logits
    with torch.no_grad():
        for parameter in models[0].parameters():
            parameter.mul_(1.5)
    assert not torch.equal(before, step.on_held().student.outputs.logits)


def test_a_pool_that_shows_one_teacher_shows_its_held_inputs() -> None:
    step, models = step_over()
    for index in range(2):
        held = step.replace(teachers=[step.teachers[index]]).on_held()
        assert torch.equal(held.teacher.outputs.logits, models[2 + index](held.batch.teachers[index], Needs()).logits)


def test_a_step_without_held_examples_or_with_other_inputs_of_a_teacher_is_refused() -> None:
    step, _ = step_over(held=False)
    assert step.held is None
    with pytest.raises(ValueError, match="no examples are held"):
        step.on_held()
    step, _ = step_over()
    other = Forward(step.teachers[0].model, dict(step.batch.teachers[0]), Needs())
    with pytest.raises(ValueError, match="a teacher's inputs are not the batch's"):
        step.replace(teachers=[other]).on_held()


def test_rows_of_held_examples_are_one_for_each() -> None:
    step, _ = step_over()
    rows = torch.zeros(4, 2)
    assert step.on_held().across(rows) is rows
    with pytest.raises(ValueError, match="one row for each of the 6"):
        step.across(rows)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Return the parameters of each of two ranks, and what they saw."""
    folder, port, server = tmp_path_factory.mktemp("ranks"), free_port(), fork_server()
    ranks = [server.Process(target=save_rank, args=(rank, port, folder)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=300)
        process.kill()  # one that waits for the other for good
    assert [process.exitcode for process in ranks] == [0, 0]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.ddp
@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_ranks_with_their_shares_of_held_examples_equal_one(case: tuple[int, int, int], two_ranks: list) -> None:
    exact, (one, other) = trained(*case), (rank[case] for rank in two_ranks)
    for whole, *parts in zip(exact["seen"], one["seen"], other["seen"], strict=True):
        for kind in ("index", "held"):
            assert sorted(row for part in parts for row in part[kind]) == sorted(whole[kind])
        assert sum(part["weight"] for part in parts) / 2 == pytest.approx(1.0)
    for name, tensor in exact["state"].items():
        assert torch.equal(one["state"][name], other["state"][name]), f"{name}: the ranks drifted apart"
        torch.testing.assert_close(one["state"][name], tensor, rtol=0, atol=SUMS, msg=name)


CASE = " ".join(TOY).replace("method=kd", "kd")


@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize("words", ["", "cohort=mutual", "pool=stochastic teacher=[minilm,minilm_4l]", "task=stsb"])
def test_a_method_with_a_reward_is_tried_by_the_conformance_suite(words: str, turns: int) -> None:
    case = f"{CASE} {words} method.turns={turns}"
    bench = Bench(case)
    assert len(bench.batch().held) < len(bench.batch())
    for check in (contract.test_terms_are_finite_scalars_named_like_the_weights, *contract.CHECKS):
        check(case)


def test_the_conformance_suite_caches_outputs_for_held_examples_too(tmp_path: Path) -> None:
    live, cached = Bench(CASE, double=True), Bench(CASE, double=True)
    expected = live.terms(live.batch())
    found = cached.terms(cached.use_cached(cached.batch(), tmp_path))
    contract.close(expected, found, 0.0)
    both = Bench(CASE, double=True)
    contract.close(expected, both.terms(both.use_cached(both.batch(), tmp_path / "three", 3)), contract.SUMS)
