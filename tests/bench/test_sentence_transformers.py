"""sentence-transformers does the same work as `method=kd` with a cached teacher, for scores of pairs."""

import csv
import itertools
import random
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import BAD, GOOD, sentence
from gates import Recorder
from kd.bench.benchmark import benchmark
from kd.bench.candidates import CACHED, FINETUNE, SENTENCE_TRANSFORMERS, SENTENCE_TRANSFORMERS_BY_LENGTH, Candidate
from kd.bench.harness import prepare, train_candidate
from kd.bench.peers import choose_peer
from kd.bench.sentence_transformers import build_trainer, stored_scores, train_sentence_transformers
from kd.bench.workers import Finished, Job
from kd.build.engine import build_engine
from kd.config.compose import compose
from kd.errors import InputError
from kd.runs.plan import plan

Small = Callable[..., list[str]]
CANDIDATES = [SENTENCE_TRANSFORMERS, SENTENCE_TRANSFORMERS_BY_LENGTH]


@pytest.fixture(scope="module")
def scores(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Small:
    """Overrides of `method=kd` on scores of pairs."""
    folder, generator = tmp_path_factory.mktemp("pairs"), random.Random(0)
    for split, count in {"train": 96, "validation": 32, "test": 32}.items():
        rows = [
            (sentence(generator, GOOD), sentence(generator, (GOOD, BAD)[number % 2]), 5 * generator.random())
            for number in range(count)
        ]
        with (folder / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("first", "second", "score"), *rows])

    def overrides(*more: str) -> list[str]:
        return [
            *small("method=kd", "task.kind=regression", "task.metrics=[pearson]", "task.monitor=pearson"),
            *(f"task.{split}={folder / split}.csv" for split in ("train", "validation", "test")),
            "task.text=[first,second]",
            "task.label=score",
            *more,
        ]

    return overrides


def job(candidate: Candidate, overrides: list[str], folder: Path, steps: int = 2, turns: int = 3) -> Job:
    return Job(candidate, tuple(candidate.overrides(overrides)), steps, turns, folder)


def trainer_of(prepared: Any, folder: Path, *, by_length: bool = True) -> Any:
    pytest.importorskip("sentence_transformers")
    return build_trainer(prepared, folder, 3, by_length=by_length)


@pytest.mark.parametrize(
    "options",
    [[], ["method.weights.task=0", "method.weights.logits=1"], ["method.weights.task=0.8", "method.weights.logits=0.2"]],
    ids=" ".join,
)
def test_gradients_equal_the_methods(scores: Small, tmp_path: Path, options: list[str]) -> None:
    prepared = prepare(job(SENTENCE_TRANSFORMERS, scores(*options, "student.dropout=0"), tmp_path))
    engine = build_engine(prepared.run, prepared.models, prepared.examples.task)
    batch = next(iter(prepared.data.train_dataloader()))
    named = dict(prepared.models.student.model.named_parameters())
    loss = engine.loss(batch)
    assert all(float(term.detach()) > 1e-3 for term in loss.terms.values())
    ours = dict(zip(named, torch.autograd.grad(loss.total, list(named.values())), strict=True))
    trainer = trainer_of(prepared, tmp_path)
    rows = [trainer.train_dataset[row] for row in batch.index.tolist()]
    trainer.compute_loss(trainer.model.train(), trainer.data_collator(rows)).backward()
    theirs = {name: each.grad for name, each in trainer.model.model.named_parameters()}
    assert ours.keys() == theirs.keys()
    assert max(float(each.abs().max()) for each in ours.values()) > 1e-2
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6, rtol=1e-5) for name in ours)


def test_stored_scores_are_the_teachers_or_a_mean_with_the_labels(scores: Small, tmp_path: Path) -> None:
    alone, mixed = (
        prepare(
            job(SENTENCE_TRANSFORMERS, scores(f"method.weights.task={1 - share}", f"method.weights.logits={share}"), folder)
        )
        for share, folder in ((1.0, tmp_path / "alone"), (0.25, tmp_path / "mixed"))
    )
    rows = range(len(alone.lengths))
    labels = [alone.examples.labels["train"][row] for row in rows]
    teachers = stored_scores(alone)
    assert len(set(teachers)) > 10
    assert stored_scores(mixed) == pytest.approx([0.75 * labels[row] + 0.25 * teachers[row] for row in rows])


@pytest.mark.parametrize("max_length", [32, 14], ids=["whole", "truncated"])
def test_the_student_and_its_inputs_are_the_runs(scores: Small, tmp_path: Path, max_length: int) -> None:
    asked = scores("student.dropout=0.2", f"task.max_length={max_length}")
    prepared = prepare(job(SENTENCE_TRANSFORMERS, asked, tmp_path))
    trainer = trainer_of(prepared, tmp_path)
    ours, theirs = prepared.models.student.model.state_dict(), trainer.model.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert trainer.model.config.hidden_dropout_prob == trainer.model.config.attention_probs_dropout_prob == 0.2
    rows = list(range(8))
    batch = prepared.data.collate("train")(rows)
    pairs = [(each["sentence1"], each["sentence2"]) for each in (trainer.train_dataset[row] for row in rows)]
    inputs = trainer.model.preprocess(pairs)
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert torch.equal(inputs[name], batch.student[name]), name  # padded to the longest of the batch
    assert inputs["token_type_ids"].max() == 1
    assert (inputs["input_ids"].shape[1] == max_length) == (max_length == 14)


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda each: each.name)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_turn_is_all_its_steps_and_saves_nothing(
    scores: Small,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    candidate: Candidate,
    accumulate: int,
) -> None:
    pytest.importorskip("sentence_transformers")
    gate = Recorder(3, monkeypatch)
    with pytest.raises(Finished):
        train_sentence_transformers(job(candidate, scores(f"trainer.accumulate={accumulate}"), tmp_path), gate)  # type: ignore[arg-type]
    assert gate.opened == [0, 2, 4]
    assert gate.closed == [(2, 32 * accumulate), (4, 32 * accumulate), (6, 32 * accumulate)]
    assert gate.facts["examples"] == 32 * accumulate
    assert gate.facts["losses"] == {"loss": "MSELoss", "score": {"task": 0.5, "logits": 0.5}}
    assert not [path for path in tmp_path.rglob("*.*") if path.suffix in (".pt", ".bin")]
    assert not capsys.readouterr().out  # standard output holds the figures alone


@pytest.mark.parametrize(
    "options", [[], ["trainer.accumulate=2"], ["trainer.clip=null", "optimizer.schedule=cosine"]], ids=" ".join
)
def test_three_turns_end_at_the_weights_of_the_runs_own_loop(
    scores: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    pytest.importorskip("sentence_transformers")
    # Without this epsilon, Adam makes steps of the noise in gradients that are zero, such as those of the keys' biases.
    asked = scores(*options, "student.dropout=0", "trainer.embedding_rows=all", "optimizer.factory.eps=1e-3")
    gates = []
    for candidate, worker in ((CACHED, train_candidate), (SENTENCE_TRANSFORMERS_BY_LENGTH, train_sentence_transformers)):
        with monkeypatch.context() as patch:
            gates.append(Recorder(3, patch))
            with pytest.raises(Finished):
                worker(job(candidate, asked, tmp_path), gates[-1])  # type: ignore[arg-type]
    ours, theirs = gates
    assert len(ours.rates) == 6
    assert ours.rates == pytest.approx(theirs.rates)
    assert max(ours.rates) > 1e-3
    assert [each.shape for each in ours.weights] == [each.shape for each in theirs.weights]
    assert max(float((one - two).abs().max()) for one, two in zip(ours.weights, theirs.weights, strict=True)) < 1e-5


def test_batches_are_the_runs_or_drawn_at_random(scores: Small, tmp_path: Path) -> None:
    prepared = prepare(job(SENTENCE_TRANSFORMERS, scores(), tmp_path, steps=6))
    sampler = prepared.data.sampler("train", prepared.run.spec.seed)
    theirs, random_ones = (
        trainer_of(prepared, tmp_path / str(by_length), by_length=by_length).get_train_dataloader().batch_sampler
        for by_length in (True, False)
    )
    for epoch in range(2):
        for each in (sampler, theirs):
            each.set_epoch(epoch)
        ours = [list(rows) for rows in sampler]
        assert [list(rows) for rows in theirs] == ours
        drawn = [list(rows) for rows in random_ones]
        assert sorted(itertools.chain(*drawn)) == sorted(itertools.chain(*ours)) == list(range(96))
        assert drawn != ours

    def padded(batches: list[list[int]]) -> int:
        return sum(len(rows) * int(prepared.lengths[rows].max()) for rows in batches)

    assert padded(ours) < padded(drawn)


def test_precision_is_the_runs(scores: Small, tmp_path: Path) -> None:
    prepared = prepare(job(SENTENCE_TRANSFORMERS, scores("trainer.precision=bf16-mixed"), tmp_path))
    trainer = trainer_of(prepared, tmp_path)
    seen = []
    layer = trainer.model.model.get_submodule("bert.encoder.layer.0.output.dense")
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    trainer.args.max_steps = 1
    trainer.train()
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize(
    ("options", "words", "key"),
    [
        (["method=pkd"], "not for method=pkd", "--peer"),
        (["cohort=mutual"], "one frozen teacher and one student", "--peer"),
        (["task.text=[first]"], "pairs of texts", "task.text"),
        (["trainer.batch_tokens=512"], "trainer.batch_size examples only", "trainer.batch_tokens"),
        (["trainer.precision=64-true"], "32-true or bf16-mixed", "trainer.precision"),
    ],
)
def test_what_the_peer_cannot_do_is_refused(scores: Small, options: list[str], words: str, key: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        choose_peer(plan(compose(scores(*options))))
    assert caught.value.key == key


@pytest.mark.parametrize(
    "options",
    [
        ["method.weights.task=1", "method.weights.logits=1"],
        ["method.weights.task=0.5", "method.weights.logits={_target_: kd.schedules.Linear, start: 0.5, end: 0.1}"],
    ],
    ids=["sum", "schedule"],
)
def test_weights_that_one_squared_error_lacks_are_refused(scores: Small, tmp_path: Path, options: list[str]) -> None:
    prepared = prepare(job(SENTENCE_TRANSFORMERS, scores(*options), tmp_path))
    with pytest.raises(InputError, match="one squared error") as caught:
        stored_scores(prepared)
    assert caught.value.key == "method.weights"


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_bench_compares_it_with_fine_tuning(scores: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sentence_transformers")
    monkeypatch.setattr("kd.bench.cost.MATRIX_SIZES", {"cpu": (64,)})
    found = benchmark(scores(), 1, 1, peer=True, candidates=[FINETUNE])
    names = ["finetune", "sentence_transformers", "sentence_transformers_by_length"]
    assert list(found["candidates"]) == names
    for name in names:
        assert {f"speed_relative_to_{peer}" for peer in names[1:]} <= set(found["candidates"][name])
    assert found["versions"]["sentence-transformers"] == metadata.version("sentence-transformers")
    assert {"datasets", "accelerate"} <= set(found["versions"])


def test_a_missing_package_names_the_extra(scores: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(job(SENTENCE_TRANSFORMERS, scores(), tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for build in (
        lambda: choose_peer(plan(compose(scores()))),
        lambda: build_trainer(prepared, tmp_path, 1, by_length=False),
    ):
        with pytest.raises(InputError, match="sentence_transformers, which is not installed: pip install") as caught:
            build()
        assert "'kd[sentence-transformers]'" in caught.value.message
