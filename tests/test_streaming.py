"""Runs whose text without labels is tokenised while they train: they end as those that have all of it in memory."""

import csv
import gc
import random
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import streamed
import torch

from conftest import BAD, GOOD, sentence, write_csv
from kd.build import data as building
from kd.build.parts import build_parts, examples_of
from kd.data import datamodule, sampler, stored_tokens
from kd.data.batch import Batch
from kd.data.examples import Examples
from kd.data.tasks import NO_CLASS
from kd.data.texts import Texts
from kd.errors import InputError
from kd.runs.run import Run
from kd.training import execute
from processes import Command, free_port
from whole_runs import broken_off, last_weights, made, planned, same_weights

Small = Callable[..., list[str]]
Mode = Callable[[str], None]

COUNT = 240


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of `COUNT` texts."""
    path, draw = tmp_path_factory.mktemp("more") / "more.txt", random.Random(7)
    path.write_text("".join(sentence(draw, GOOD + BAD) + "\n" for _ in range(COUNT)))
    return path


@pytest.fixture(scope="module")
def teacher(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with the teacher alone."""
    folder = tmp_path_factory.mktemp("teacher") / "runs"
    for _, needed in planned(small("method=kd", f"paths.runs={folder}")).inputs:
        execute.execute(needed)
    return folder


@pytest.fixture
def mode(monkeypatch: pytest.MonkeyPatch) -> Mode:
    """Let runs from now on have their text without labels in `memory`, on `disk`, or in the `background`."""
    load, most = building.load_examples, datamodule.MOST_BEFORE

    def in_memory(*given: Any, **named: Any) -> Examples:
        examples = load(*given, **named)
        if examples.stored is None:
            return examples
        texts, labels = Texts.of(list(examples.texts["train"])), list(examples.labels["train"])
        origins = None if examples.origins is None else Texts.of(list(examples.origins))
        return replace(
            examples, texts={**examples.texts, "train": texts}, labels={**examples.labels, "train": labels}, origins=origins
        )

    def set_mode(name: str) -> None:
        gc.collect()
        monkeypatch.setattr(building, "_examples", weakref.WeakValueDictionary())
        monkeypatch.setattr(building, "load_examples", in_memory if name == "memory" else load)
        monkeypatch.setattr(sampler, "POOL", streamed.POOL)
        monkeypatch.setattr(datamodule, "MOST_BEFORE", 0 if name == "background" else most)

    return set_mode


def losses(run: Run) -> list[tuple[str, ...]]:
    """The losses of a run in its history; the rest are times."""
    with (run.directory / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if "/" in name and "second" not in name and "lr" not in name]
    return [tuple(row[name] for name in ("step", *names)) for row in rows]


KD = ("method=kd", "trainer.embedding_rows=all", "student.dropout=0.1", "cache=off", "trainer.max_epochs=1")
SETTINGS = {
    "accumulation and two epochs": (*KD, "trainer.accumulate=3", "trainer.max_epochs=2"),
    "a cache of all": (*KD, "cache=on"),
    "two vocabularies": (*KD, "surgery=[cut_vocabulary]"),
    "a budget of tokens": (*KD, "trainer.batch_tokens=320"),
    "a reward on held examples": (
        *KD,
        "method._target_=engines.reward.Rewarded",
        *(f"~method.{key}" for key in ("temperature", "loss", "reduction")),
        "+method.holds=0.25",
        "+method.turns=1",
        "+method.weights.policy=1.0",
        "+method.weights.held=0.5",
    ),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_run_ends_as_one_with_all_text_in_memory(
    small: Small, more: Path, teacher: Path, tmp_path: Path, mode: Mode, setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = {}
    for name in ("memory", "background"):
        mode(name)
        shutil.copytree(teacher, tmp_path / name)
        runs[name] = made(small(*SETTINGS[setting], f"task.unlabelled={more}", f"paths.runs={tmp_path / name}"))
        output = capsys.readouterr().out
        background = f"{COUNT} texts without labels are tokenised in the background of the first epoch"
        assert (background in output) == (name == "background")
    (one, record), (other, theirs) = runs["memory"], runs["background"]
    assert one.digest == other.digest
    assert same_weights(last_weights(one), last_weights(other))
    assert record["metrics"] == theirs["metrics"]
    assert record["examples"] == theirs["examples"]
    assert losses(one) == losses(other)
    assert not list((tmp_path / "background" / ".tokens").rglob("*.part")), "all tokens were made and the store is finished"


def pair_table(path: Path, count: int, label: bool) -> Path:
    """Pairs of sentences."""
    draw = random.Random(count)
    with path.open("w", newline="") as file:
        rows = [[sentence(draw, (BAD, GOOD)[n % 2]), sentence(draw, GOOD), *["ab"[n % 2]] * label] for n in range(count)]
        csv.writer(file).writerows([["one", "other", *["label"] * label], *rows])
    return path


def batches_of(words: list[str]) -> list[list[Batch]]:
    """The batches of two epochs of a run without teachers."""
    run = planned(words)
    (part,) = build_parts(run, examples_of(run)).values()
    loader, epochs = part.data.train_dataloader(), []
    for epoch in range(2):
        loader.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
        epochs.append(list(loader))
    part.data.close()
    return epochs


def same_batch(one: Batch, other: Batch) -> bool:
    """Return whether two batches have the same content."""
    ours, theirs = ((*one.students, *one.teachers) for one in (one, other))
    equal = [first.keys() == second.keys() for first, second in zip(ours, theirs, strict=True)]
    equal += [torch.equal(first[name], second[name]) for first, second in zip(ours, theirs, strict=True) for name in first]
    equal += [torch.equal(one.index, other.index), torch.equal(one.labels, other.labels)]
    return all(equal) and (one.weight, one.label_weight) == (other.weight, other.label_weight)


DML = ("method=dml", "teacher=[]", "cohort.students=2")
BATCHES = {
    "loader processes": ("trainer.num_workers=2",),
    "accumulation": ("trainer.accumulate=3", "trainer.pad_multiple=4"),
    "a budget of tokens": ("trainer.batch_tokens=160",),
    "edits, a limit and a held out part": ("edit=[label_noise]", "task.limit_train=40", "task.holdout=0.3"),
}


@pytest.mark.parametrize("setting", BATCHES)
def test_batches_are_those_of_text_in_memory(small: Small, more: Path, tmp_path: Path, mode: Mode, setting: str) -> None:
    found = {}
    for name in ("memory", "background"):
        mode(name)
        found[name] = batches_of(small(*DML, *BATCHES[setting], f"task.unlabelled={more}", f"paths.runs={tmp_path / name}"))
    for ours, theirs in zip(found["memory"], found["background"], strict=True):
        assert len(ours) == len(theirs) > 5
        assert all(map(same_batch, ours, theirs))
    first, second = ([batch.index.tolist() for batch in epoch] for epoch in found["background"])
    assert first != second


def test_pairs_of_texts_from_shards_are_those_in_memory(small: Small, tmp_path: Path, mode: Mode) -> None:
    files = [f"task.{split}={pair_table(tmp_path / f'{split}.csv', 48, True)}" for split in ("train", "validation")]
    (tmp_path / "more").mkdir()
    for number in range(3):
        pair_table(tmp_path / "more" / f"{number}.csv", 70 + number, False)
    found = []
    for name in ("memory", "disk", "background"):
        mode(name)
        words = (*files, "task.test=null", "task.text=[one,other]", f"task.unlabelled={tmp_path / 'more'}")
        found.append(batches_of(small(*DML, *words, f"paths.runs={tmp_path / name}")))
    for other in found[1:]:
        assert all(same_batch(*pair) for epochs in zip(found[0], other, strict=True) for pair in zip(*epochs, strict=True))
    rows = sorted(row for batch in found[2][1] for row in batch.index.tolist())
    assert rows == list(range(48 + 70 + 71 + 72))


def test_a_mixture_is_that_of_text_in_memory(backbone: Path, reviews: Path, more: Path, tmp_path: Path, mode: Mode) -> None:
    write_csv(tmp_path / "kind.csv", 40, 9, ("bad", "fine"))
    words = ["student=2l", "task=mixture", *DML, "trainer.embedding_rows=all", "trainer.progress=none", "trainer.keep=all"]
    for name, file in (("mood", reviews / "train.csv"), ("kind", tmp_path / "kind.csv")):
        of = f"task.of.{name}"
        words += [f"+task@{of}=file", f"{of}.train={file}", f"{of}.validation={file}", f"{of}.max_length=32"]
    words += [f"task.of.kind.unlabelled={more}", f"backbone={backbone}", "trainer.max_epochs=1", "trainer.batch_size=16"]
    runs = []
    for name in ("memory", "background"):
        mode(name)
        runs.append(made([*words, f"paths.runs={tmp_path / name}"])[0])
    assert same_weights(last_weights(runs[0]), last_weights(runs[1]))


def test_results_do_not_depend_on_what_is_stored_already(
    small: Small, more: Path, tmp_path: Path, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run finds the tokens of one with another seed, and half of them of one that was killed."""
    mode("background")
    words = small(*DML, "trainer.embedding_rows=all", "trainer.max_epochs=1", f"task.unlabelled={more}")
    first, _ = made([*words, f"paths.runs={tmp_path / 'first'}"])
    made([*words, f"paths.runs={tmp_path / 'second'}", "seed=1"])
    encode = stored_tokens.encode
    with monkeypatch.context() as patch:
        patch.setattr(stored_tokens, "encode", lambda *given: pytest.fail("tokenised again"))
        again, _ = made([*words, f"paths.runs={tmp_path / 'second'}"])
    assert same_weights(last_weights(first), last_weights(again))
    calls = 0

    def broken(*given: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(28, "No space left on device")
        return encode(*given)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(stored_tokens, "encode", broken)
        patch.setattr(stored_tokens, "AT_ONCE", 50)
        with pytest.raises(OSError, match="No space left"):
            made([*words, f"paths.runs={tmp_path / 'third'}", "seed=1", "preflight=false"])
    assert len(list((tmp_path / "third").glob(".tokens/tokens-*/*.part"))) == 1
    third, _ = made([*words, f"paths.runs={tmp_path / 'third'}"])
    assert same_weights(last_weights(first), last_weights(third))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_in_the_middle_of_an_epoch(
    small: Small, more: Path, teacher: Path, tmp_path: Path, mode: Mode, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    mode("background")
    words = small(*KD, "trainer.accumulate=3", f"task.unlabelled={more}", f"trainer.num_workers={workers}")
    for name in ("unbroken", "broken"):
        shutil.copytree(teacher, tmp_path / name)
    unbroken, record = made([*words, f"paths.runs={tmp_path / 'unbroken'}"])
    run = planned([*words, f"paths.runs={tmp_path / 'broken'}", "trainer.checkpoint_minutes=0"])
    broken_off(run, 13, monkeypatch)
    shutil.rmtree(tmp_path / "broken" / ".tokens")  # as if it went on on another machine
    mode("background")
    resumed = execute.execute(run)
    assert resumed["resumed"]["from_steps"] == [4]
    assert same_weights(last_weights(run), last_weights(unbroken))
    assert resumed["metrics"] == record["metrics"]


def test_the_first_batch_waits_for_its_pool_alone(
    small: Small, more: Path, tmp_path: Path, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing made in the background, the preflight's trial batch looks at some texts, and a batch at its own pool."""
    mode("background")
    monkeypatch.setattr(datamodule, "TRIAL_TEXTS", 30)
    monkeypatch.setattr(stored_tokens.LengthsOnDemand, "expect", lambda *_: None)
    calls, encode = [], stored_tokens.encode

    def counting(rules: object, rows: list[tuple[str, ...]]) -> object:
        calls.append(len(rows))
        return encode(rules, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(stored_tokens, "encode", counting)
    run = planned(small(*DML, f"task.unlabelled={more}", f"paths.runs={tmp_path}", "trainer.batch_size=2"))
    (part,) = build_parts(run, examples_of(run)).values()
    assert not calls
    trial = part.data.trial(8)
    assert sum(calls) == 30
    assert (len(trial), int((trial.labels == NO_CLASS).sum()) > 0) == (8, True)
    assert part.data.epoch().examples == 96 + COUNT
    batches = iter(part.data.train_dataloader())
    assert not calls[1:]
    next(batches)
    assert 30 < sum(calls) <= 30 + streamed.POOL * 2
    assert (part.data.tokens["train"][part.data.student_key].stored.files.index == 0).sum() >= COUNT - 40


@pytest.mark.parametrize("setting", ["trainer.batch_tokens=160", "cache=on"])
def test_a_run_that_needs_all_tokens_first_says_so(
    small: Small, more: Path, teacher: Path, tmp_path: Path, mode: Mode, setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mode("background")
    shutil.copytree(teacher, tmp_path / "runs")
    run = planned(small("method=kd", "cache=off", setting, f"task.unlabelled={more}", f"paths.runs={tmp_path / 'runs'}"))
    (part,) = build_parts(run, examples_of(run)).values()
    part.data.train_dataloader()
    expected = f"  {COUNT} texts without labels are tokenised now, because all tokens are read before the training\n"
    assert capsys.readouterr().out.count(expected) == 1
    assert part.data.tokens["train"][part.data.student_key].stored.finished


def test_an_argument_that_cannot_work_is_refused_before_texts_are_read(
    small: Small, more: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "load_examples", lambda *_: pytest.fail("texts were read"))
    with pytest.raises(InputError) as refused:
        execute.execute(planned(small("method=kd", "method.loss=none", f"task.unlabelled={more}", f"paths.runs={tmp_path}")))
    assert refused.value.key == "method.loss"


def test_the_preflight_says_why_a_run_does_not_wait(
    small: Small, more: Path, teacher: Path, tmp_path: Path, mode: Mode, capsys: pytest.CaptureFixture[str]
) -> None:
    mode("background")
    shutil.copytree(teacher, tmp_path / "runs")
    made(small("method=kd", "trainer.max_epochs=1", f"task.unlabelled={more}", f"paths.runs={tmp_path / 'runs'}"))
    output = capsys.readouterr().out
    why = f"{COUNT} texts without labels are tokenised in the background of the first epoch"
    assert f"student: all rows of the embedding table are trained, because {why}" in output
    assert f"teacher 'minilm' runs at every step: {why}; cache=on or a size" in output
    assert "one batch: every trainable parameter gets a gradient" in output


def test_few_texts_are_tokenised_before_the_training_as_ever(
    small: Small, more: Path, teacher: Path, tmp_path: Path, mode: Mode, capsys: pytest.CaptureFixture[str]
) -> None:
    mode("disk")
    shutil.copytree(teacher, tmp_path / "disk")
    words = small("method=kd", "trainer.max_epochs=1", f"task.unlabelled={more}")
    run, _ = made([*words, f"paths.runs={tmp_path / 'disk'}"])
    output = capsys.readouterr().out
    assert "in the background" not in output
    assert "rows of the embedding table occur in train" in output
    assert "teacher 'minilm' is cached" in output
    mode("memory")
    cached = next(run.inputs.teachers["minilm"].cache.glob("train-*"))
    shutil.copytree(tmp_path / "disk", tmp_path / "memory", ignore=shutil.ignore_patterns("kd-*"))
    other, record = made(
        small("method=kd", "trainer.max_epochs=1", f"task.unlabelled={more}", f"paths.runs={tmp_path / 'memory'}")
    )
    assert record["cache"]["minilm"]["written"] == [], "caches of texts in memory are those of texts on disk"
    assert cached.name in [path.name for path in other.inputs.teachers["minilm"].cache.iterdir()]
    assert same_weights(last_weights(run), last_weights(other))


REFUSING = """
import sys
import streamed
from kd.data import stored_tokens
encode = stored_tokens.encode

def refuse(rules, rows):
    if any("1950" in text for row in rows for text in row):
        raise Exception("WordPiece error")
    return encode(rules, rows)

stored_tokens.encode = refuse
streamed.run()
"""


def test_a_text_that_cannot_be_tokenised_ends_the_run_and_nothing_looks_done(small: Small, more: Path, tmp_path: Path) -> None:
    texts, bad = more.read_text().splitlines(), tmp_path / "bad.txt"
    bad.write_text("\n".join([*texts[:150], "a film of 1950", *texts[150:]]) + "\n")
    given = (f"paths.runs={tmp_path / 'runs'}", f"task.unlabelled={bad}", "trainer.batch_size=2", "preflight=false")
    words = small(*DML, *given)
    process = Command(["-c", REFUSING, *words])
    output, _ = process.communicate(240)
    assert process.returncode == 2, output
    assert f"'{bad}', line 151: the tokenizer fails on this text (WordPiece error)" in output
    assert "task.unlabelled" in output
    assert "Traceback" not in output
    run = planned(words)
    assert run.result is None
    assert not (run.directory / "result.json").exists()
    assert not list((tmp_path / "runs" / ".tokens").glob("tokens-*/about.json"))


def test_a_bad_row_is_refused_before_anything_is_trained_and_leaves_no_folder(small: Small, more: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_text(more.read_text() + "fi\0lm\n")
    words = small("method=kd", f"task.unlabelled={bad}", f"paths.runs={tmp_path / 'new' / 'runs'}")
    with pytest.raises(InputError, match=f"line {COUNT + 1}: 'text' has a NUL"):
        execute.execute(planned(words))
    assert not (tmp_path / "new").exists()
    # Nor does another refusal, after the text was read.
    words = small("method=kd", f"task.unlabelled={more}", f"paths.runs={tmp_path / 'new' / 'runs'}", "task.max_length=99")
    with pytest.raises(InputError, match="must be from 3 to 64"):
        execute.execute(planned(words))
    assert not (tmp_path / "new").exists()
    (tmp_path / "new" / "runs").mkdir(parents=True)
    with pytest.raises(InputError):
        execute.execute(planned(words))
    assert (tmp_path / "new" / "runs").exists(), "a folder that was there before stays"


def ranks(words: list[str]) -> None:
    """Make a run in two processes."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}", streamed.__file__]
    process = Command([*launcher, *words])
    try:
        output, _ = process.communicate(240)
    finally:
        process.kill()
    assert process.returncode == 0, output


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("cache", ["on", "off"])
def test_two_ranks_end_as_one(small: Small, more: Path, teacher: Path, tmp_path: Path, mode: Mode, cache: str) -> None:
    mode("background")
    words = ("method=kd", f"cache={cache}", "trainer.embedding_rows=all", "student.dropout=0", "optimizer.factory.eps=1e-3")
    words = small(*words, f"task.unlabelled={more}", "trainer.max_epochs=1")
    for name in ("one", "two"):
        shutil.copytree(teacher, tmp_path / name)
    one, _ = made([*words, f"paths.runs={tmp_path / 'one'}"])
    two = [*words, f"paths.runs={tmp_path / 'two'}", "trainer=ddp", "trainer.accelerator=cpu"]
    ranks(two)
    run = planned(two)
    assert run.result is not None
    assert run.result["ranks"] == 2
    ours, theirs = last_weights(one), last_weights(run)
    # Sums of float32 in another order; `eps` keeps rounding from deciding a sign.
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-5
    assert len(list((tmp_path / "two" / ".tokens").glob("tokens-*/about.json"))) == 1
