"""Training text without labels: a teacher teaches on it, and the loss against the labels is the mean over the others."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kd.build.check import check_arguments
from kd.build.data import build_examples
from kd.config.compose import compose
from kd.data.batch import Batch
from kd.data.examples import Examples
from kd.data.sampler import LengthBatches, TokenBatches
from kd.data.tasks import NO_CLASS, Classification, Regression, Task
from kd.engines.base import Engine
from kd.engines.distiller import Distiller
from kd.errors import InputError
from kd.results.comparison import budget_of
from kd.runs.plan import plan
from kd.runs.run import Run
from kd.training import execute
from whole_runs import made, planned

BOTH = ("task.train={folder}/more.txt", "task.validation={folder}/more.txt")
LENGTHS = [3 + place * 7 % 11 for place in range(94)]


@pytest.fixture
def more(tmp_path: Path) -> Path:
    """A file of 31 texts, one of which train has too."""
    path = tmp_path / "more.txt"
    path.write_text("".join(f"a film nobody has labelled {'so ' * (row % 5)}far\n\n" for row in range(31)))
    return path


@pytest.fixture
def run(small: Callable[..., list[str]], more: Path) -> Callable[..., Run]:
    """Plan a run with these texts."""

    def run(*overrides: str) -> Run:
        return plan(compose(small("method=kd", f"task.unlabelled={more}", *overrides)))

    return run


def labels_of(examples: Examples) -> list[float]:
    return [label for label in examples.labels["train"] if not math.isnan(label)]


# Data


def test_texts_without_labels_follow_those_of_train(run: Callable[..., Run], small: Callable[..., list[str]]) -> None:
    examples, labelled = build_examples(run()), build_examples(plan(compose(small("method=kd"))))
    assert examples.texts["train"][:96] == labelled.texts["train"][:]
    assert examples.texts["train"][96:] == [(f"a film nobody has labelled {'so ' * (row % 5)}far",) for row in range(31)]
    assert labels_of(examples) == examples.labels["train"][:96] == labelled.labels["train"]
    assert examples.labels["validation"] == labelled.labels["validation"]
    assert (examples.task.partly_labelled, labelled.task.partly_labelled) == (True, False)


@pytest.mark.parametrize(
    ("words", "count"), [("task.limit_train=40", 40), ("task.holdout=0.3", None), ("edit=[imbalance]", None)]
)
def test_limits_holdout_and_edits_are_for_labelled_examples(
    run: Callable[..., Run], small: Callable[..., list[str]], words: str, count: int | None
) -> None:
    examples, labelled = build_examples(run(words)), build_examples(plan(compose(small("method=kd", words))))
    assert labels_of(examples) == labelled.labels["train"]
    assert count is None or len(labels_of(examples)) == count
    assert len(examples.texts["train"]) == len(labelled.texts["train"]) + 31
    assert {split: examples.texts[split] for split in examples.evaluated} == {
        split: labelled.texts[split] for split in labelled.evaluated
    }


def test_tables_have_the_columns_of_the_task(run: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("label\ttext\npositive\tone\nnegative\ttwo\n")
    (tmp_path / "a.jsonl").write_text('{"text": "one", "label": "positive"}\n{"text": "two", "label": "negative"}\n')
    for name in ("a.tsv", "a.jsonl"):
        examples = build_examples(run(f"task.unlabelled={tmp_path / name}", "task.extra={label: classes}"))
        assert examples.texts["train"][96:] == [("one",), ("two",)]
        assert np.isnan(examples.labels["train"][96:]).all(), "a label in the file is not read"
        assert examples.columns["train"]["label"][96:].tolist() == [1, 0]


# Losses


def tasks() -> list[tuple[Task, Tensor, Tensor]]:
    """Tasks with logits and labels, of which two of five are missing."""
    generator = torch.Generator().manual_seed(0)
    classes, scores = Classification("t", ["a", "b", "c"], {}, ["accuracy"], "accuracy"), Regression("t", ["mse"], "mse")
    classes.partly_labelled = scores.partly_labelled = True
    return [
        (task, torch.randn(5, width, generator=generator), task.label_tensor([1, math.nan, 2, 0, math.nan]))
        for task, width in ((classes, 3), (scores, 1))
    ]


def naive(task: Task, logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labelled rows of the loss without missing labels."""
    rows = torch.tensor([0, 2, 3])
    if task.labels is None:
        return ((logits[rows, 0] - labels[rows]) ** 2).float().mean()
    return F.nll_loss(logits[rows].log_softmax(-1), labels[rows])


@pytest.mark.parametrize("number", [0, 1])
def test_the_hard_loss_is_the_mean_over_the_labelled_times_their_weight(number: int) -> None:
    task, logits, labels = tasks()[number]
    logits.requires_grad_()
    loss = task.of(labels, 1.5).hard(logits, labels)
    torch.testing.assert_close(loss, 1.5 * naive(task, logits, labels))
    (gradient,) = torch.autograd.grad(loss, logits)
    (expected,) = torch.autograd.grad(1.5 * naive(task, logits, labels), logits)
    torch.testing.assert_close(gradient, expected)
    assert torch.equal(gradient[[1, 4]], torch.zeros_like(gradient[[1, 4]]))


@pytest.mark.parametrize("number", [0, 1])
def test_a_batch_without_labels_has_a_hard_loss_of_zero_in_the_graph(number: int) -> None:
    task, logits, labels = tasks()[number]
    logits, labels = logits[[1, 4]].requires_grad_(), labels[[1, 4]]
    loss = task.of(labels, 0.0).hard(logits, labels)
    assert float(loss.detach()) == 0
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.equal(gradient, torch.zeros_like(logits))


def test_a_task_with_all_labels_is_itself() -> None:
    task = Classification("t", ["a", "b"], {}, ["accuracy"], "accuracy")
    assert task.of(torch.tensor([0, 1]), 1.0) is task


def test_missing_labels_are_told_apart_from_others() -> None:
    (_, _, one), (_, _, other) = tasks()
    assert one.tolist() == [1, NO_CLASS, 2, 0, NO_CLASS]
    assert other.isnan().tolist() == [False, True, False, False, True]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("accumulate", [1, 2, 4, 64])
@pytest.mark.parametrize("share", [0.1, 0.7])
def test_weighted_means_over_ranks_and_batches_are_the_mean_over_the_labelled_of_the_step(
    accumulate: int, world: int, share: float
) -> None:
    labelled = np.random.default_rng(0).random(len(LENGTHS)) < share
    losses = torch.arange(len(LENGTHS), dtype=torch.float64).exp2().remainder(97)
    for kind, arguments in ((LengthBatches, (16,)), (TokenBatches, (130, (1, 32)))):
        shards = [kind(LENGTHS, *arguments, 0, rank, world, accumulate) for rank in range(world)]
        for shard in shards:
            shard.labelled = labelled
        batches = list(zip(*(list(shard) for shard in shards), strict=True))
        for begin in range(0, len(batches), accumulate):
            step = [rows for batch in batches[begin : begin + accumulate] for rows in batch]
            found = 0.0
            for rows in step:
                mine = losses[[row for row in rows if labelled[row]]]
                mean = float(mine.mean()) if len(mine) else 0.0
                found += mean * rows.label_weight * rows.weight / accumulate / world
            whole = losses[[row for rows in step for row in rows if labelled[row]]]
            assert found == pytest.approx(float(whole.mean()) if len(whole) else 0.0, rel=1e-12)


def test_a_batch_keeps_the_weight_of_its_labels() -> None:
    batch = Batch({}, (), torch.zeros(2), torch.arange(2), 0.5, ({},), label_weight=0.25)
    assert (batch.to("cpu").label_weight, batch.seen_by(1).label_weight) == (0.25, 0.25)


# Whole runs


@pytest.mark.parametrize("words", [("method=kd",), ("method=dml", "teacher=[]", "cohort.students=2")], ids=" ".join)
def test_gradient_of_a_step_is_that_of_one_batch_of_its_examples(
    small: Callable[..., list[str]], more: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    rows: list[int] = []
    steps: list[int] = []

    def before(engine: Engine, batch: Any, batch_idx: int) -> None:
        rows.extend(batch.index.tolist())

    def compare(engine: Engine, optimizer: object) -> None:
        parameters = [parameter for group in engine.trained() for parameter in group]
        batch = engine.trainer.datamodule.collate("train")(rows)  # type: ignore[attr-defined]
        assert int((batch.labels == NO_CLASS).sum()) > 0
        expected = torch.autograd.grad(engine.loss(batch, engine.progress()).total, parameters)
        for parameter, wanted in zip(parameters, expected, strict=True):
            assert parameter.grad is not None
            # Another padding and order of summation; 1e-5 of the largest gradient is their rounding in float32.
            assert float((parameter.grad - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max()) + 1e-7
        steps.append(len(rows))
        rows.clear()

    overrides = small(*words, f"task.unlabelled={more}")
    for _, needed in planned(overrides).inputs:
        execute.execute(needed)
    monkeypatch.setattr(Distiller, "on_train_batch_start", before)
    monkeypatch.setattr(Distiller, "on_before_optimizer_step", compare)
    common = ("trainer.batch_size=20", "trainer.accumulate=4", "student.dropout=0", "trainer.max_epochs=1", "trainer.clip=null")
    result = execute.execute(planned([*overrides, *common, "preflight=false"]))
    assert (sum(steps), len(steps)) == (127, result["steps"])


def test_a_run_with_texts_without_labels_ends_with_a_record(
    small: Callable[..., list[str]], more: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, result = made(small("method=pkd", f"task.unlabelled={more}", "trainer.max_epochs=1", f"paths.runs={tmp_path}"))
    assert "96 examples of train have labels, 31 have none" in capsys.readouterr().out
    assert result["metrics"]["validation"]["accuracy"] is not None
    (teacher,) = run.inputs.teachers.values()
    assert not build_examples(teacher).task.partly_labelled


@pytest.mark.parametrize("words", [["method=finetune", "teacher=[]"], ["method=finetune"], ["method.weights.logits=0"]])
def test_what_learns_from_labels_alone_leaves_the_other_text_out(run: Callable[..., Run], words: list[str]) -> None:
    check_arguments(run(*words))
    examples, labelled = build_examples(run(*words)), build_examples(run(*words, "task.unlabelled=null"))
    assert examples.texts["train"][:] == labelled.texts["train"][:]
    assert examples.labels["train"] == labelled.labels["train"]
    assert not examples.task.partly_labelled
    assert examples.stored is None
    assert examples.edits == ["the method, which learns from labels alone: the text of task.unlabelled left out"]
    assert not labelled.edits


def test_hidden_labels_are_of_all_but_a_few_examples(small: Callable[..., list[str]]) -> None:
    def examples(name: str, count: int, *more: str) -> Examples:
        return build_examples(planned(small(f"edit=[{name}]", f"task.edits.{name}.count={count}", *more)))

    hidden, few, whole = (
        examples(*words, "method=kd") for words in (("hidden_labels", 9), ("few_labels", 9), ("few_labels", 999))
    )
    assert hidden.texts["train"][:] == whole.texts["train"][:]
    rows = np.flatnonzero(~np.isnan(hidden.labels["train"]))
    assert [hidden.texts["train"][row] for row in rows] == few.texts["train"][:]
    assert [hidden.labels["train"][row] for row in rows] == list(few.labels["train"])
    assert "HiddenLabels: 87 of 96 labels taken away" in hidden.edits[0]
    for split in ("validation", "test"):
        assert hidden.labels[split] == whole.labels[split]
    alone = examples("hidden_labels", 9, "method=finetune")
    assert (alone.texts["train"][:], list(alone.labels["train"])) == (few.texts["train"][:], list(few.labels["train"]))
    assert alone.edits[1] == "the method, which learns from labels alone: 87 examples without labels left out"


def test_a_baseline_of_labels_alone_has_the_budget_of_what_learns_from_all_text(
    small: Callable[..., list[str]], tmp_path: Path
) -> None:
    words = ("edit=[hidden_labels]", "task.edits.hidden_labels.count=40", "trainer.max_epochs=1", f"paths.runs={tmp_path}")
    results = {method: made(small(f"method={method}", *words)) for method in ("finetune", "kd")}
    (_, baseline), (run, taught) = results["finetune"], results["kd"]
    assert budget_of(baseline) == budget_of(taught)
    assert (baseline["examples"]["train"], taught["examples"]["train"]) == (40, 96)
    (teacher,) = run.inputs.teachers.values()
    assert len(build_examples(teacher).texts["train"]) == 40


# What cannot work, and digests


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=ad_kd", "method.views=gold"], "method=ad_kd needs the label of every example: method.views=gold"),
        (
            ["method=ad_kd", "method.views=gold", "teacher=[minilm,minilm_4l]", "pool=stochastic"],
            "method=ad_kd needs the label of every example",
        ),
    ],
)
def test_a_method_that_cannot_do_without_labels_is_refused(run: Callable[..., Run], words: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        check_arguments(run(*words))
    assert caught.value.key == "task.unlabelled"
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task.unlabelled=none.txt"], "does not exist"),
        (["task.unlabelled={folder}"], "has files of several formats"),
        (["task.unlabelled={folder}/empty.txt"], "is empty"),
        (["task.unlabelled={folder}/a.csv"], "no column 'text'"),
        (["task.text=[text,b]", "task.train={folder}/b.csv", "task.validation={folder}/b.csv", "task.test=null"], "has pairs"),
        (["task=text", *BOTH, "+task.unlabelled={folder}/more.txt"], "needs no labels"),
        (["task.extra={label: classes}"], "no column 'label'"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(
    small: Callable[..., list[str]], more: Path, words: list[str], message: str
) -> None:
    (more.parent / "empty.txt").write_text("")
    (more.parent / "a.csv").write_text("words\nsome\n")
    (more.parent / "b.csv").write_text("text,b,label\none,two,positive\ntwo,one,negative\n")
    words = [word if "extra" in word else word.format(folder=more.parent) for word in words]
    given = [] if any("unlabelled" in word for word in words) else [f"task.unlabelled={more}"]
    base = [word for word in small("method=kd") if "task=text" not in words or not word.startswith("task")]
    with pytest.raises(InputError, match=message) as caught:
        build_examples(plan(compose([*base, *given, *words])))
    expected = "task.text" if "no column 'text'" in message else "task.extra" if "extra" in words[0] else "task.unlabelled"
    assert caught.value.key == expected


def test_the_content_of_the_file_is_part_of_the_digest_but_not_of_the_teachers(run: Callable[..., Run], more: Path) -> None:
    one, none = run(), run("task.unlabelled=null")
    renamed = more.rename(more.with_name("other.txt"))
    assert run(f"task.unlabelled={renamed}").digest == one.digest != none.digest
    renamed.write_text("another text\n")
    assert run(f"task.unlabelled={renamed}").digest != one.digest
    assert one.inputs.teachers["minilm"].digest == none.inputs.teachers["minilm"].digest
    assert "unlabelled" not in none.digest_inputs["task"]
