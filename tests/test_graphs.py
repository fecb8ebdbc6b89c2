"""CUDA graphs of training steps: few shapes, where a step begins, what is overwritten, what is refused. No GPU is needed."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from overwriting import Overwriting, overwriting

import kd
from kd.build.check import check_arguments, check_run
from kd.build.data import build_data
from kd.build.engine import build_engine
from kd.build.models import build_models
from kd.build.parts import examples_of
from kd.engines.base import Engine
from kd.errors import InputError
from kd.models import CachedTeacher
from kd.runs.run import Run
from kd.system import distributed
from kd.training.graphs import encoders_of, line_of_graphs
from kd.training.rows import TrainOccurringRows, plan_tables, readers_of
from kd.training.trainer import build_trainer
from whole_runs import planned

Words = Callable[..., list[str]]
GRAPHS = "trainer.compile=reduce-overhead"
__all__ = ["overwriting"]


def train(run: Run, *callbacks: pl.Callback) -> Engine:
    """Train a run with all that its steps have, and return its engine."""
    run.directory.mkdir(parents=True, exist_ok=True)
    (examples,) = examples_of(run).values()
    data, models = build_data(run, examples, build_models(run, examples.task, texts=examples.texts["train"]))
    engine = build_engine(run, models, examples.task)
    rows = TrainOccurringRows(plan_tables(readers_of(models, data), engine, run.spec.trainer))
    trainer = build_trainer(run, engine, None, callbacks=[rows, *callbacks], enable_checkpointing=False)
    trainer.fit(engine, datamodule=data)
    return engine


@pytest.fixture
def words(small: Words, backbone: Path, tmp_path: Path) -> Words:
    """Overrides of a run with a ready teacher that runs at every step."""
    teacher = ["teacher=[hub]", f"teacher.hub.model={backbone}", "teacher.hub.labels=[negative,positive]", "cache=off"]

    def words(*more: str) -> list[str]:
        own = ["teacher=[]"] if {"method=finetune", "method=dml"} & set(more) else teacher
        return small(*own, f"paths.runs={tmp_path}", "task.limit_train=80", "trainer.max_epochs=1", *more)

    return words


@pytest.mark.parametrize(
    "more",
    [
        ["method=finetune", "trainer.accumulate=2"],
        ["method=pkd", "trainer.batch_tokens=512"],
        ["method=dml", "engine.update=sequential"],
    ],
    ids=" ".join,
)
def test_a_run_reads_nothing_that_the_next_step_overwrites(words: Words, overwriting: Overwriting, more: list[str]) -> None:
    more = [*more, "trainer.pad_multiple=4"]
    plain = train(planned(words(*more)))
    assert not overwriting.events
    graphs = train(planned(words(*more, GRAPHS)))
    assert all(overwriting.steps)
    assert len({shape[1] for passes in overwriting.steps for shape in passes}) > 1
    for (name, expected), found in zip(plain.state_dict().items(), graphs.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name


class Around(pl.Callback):
    """Notes where a batch, and the validation, begin and end among the events of a stand-in, and the batches' shapes."""

    def __init__(self, events: list[Any]) -> None:
        self.events = events
        self.shapes: list[tuple[int, ...]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self.shapes.append(tuple(batch.student["input_ids"].shape))

    def on_train_batch_end(self, *_: Any) -> None:
        self.events.append("end")

    def on_validation_start(self, *_: Any) -> None:
        self.events.append("validation")

    def on_validation_end(self, *_: Any) -> None:
        self.events.append("end of validation")


def test_a_step_is_marked_before_all_passes_over_its_batch_and_only_these_have_graphs(
    words: Words, overwriting: Overwriting
) -> None:
    around = Around(overwriting.events)
    more = ["trainer.accumulate=2", "trainer.max_epochs=2", "trainer.eval_batch_size=16", "cohort=mutual"]
    engine = train(planned(words("method=pkd", *more, GRAPHS)), around)
    assert overwriting.asked == [{"dynamic": True, "mode": "reduce-overhead"}]
    assert len(overwriting.steps) == len(around.shapes) == 10, "two epochs of five batches, of which two are accumulated"
    assert overwriting.events[0] == "step"
    for number, (events, shape) in enumerate(zip(overwriting.steps, around.shapes, strict=True), start=1):
        end = events.index("end")
        # A teacher of four blocks, without gradients, and two students of two.
        assert sorted(events[:end]) == [(*shape, False)] * 4 + [(*shape, True)] * 4
        assert events[end + 1 :] == ([] if number % 5 else ["validation", "end of validation"]), "nothing compiled in it"
    assert {tokens for _, tokens in around.shapes} == {16}, "the texts have 6 to 13"
    assert [model.graphs for model in encoders_of(engine)] == [None] * 3, "nor after training"


def test_a_teacher_that_is_cached_in_part_has_no_graphs(words: Words, overwriting: Overwriting) -> None:
    more = ["method=kd", "trainer.batch_tokens=80", "trainer.pad_multiple=4"]
    budget = 800  # bytes: logits of two classes in float32 for 100 examples, of which 64 are evaluated
    around = Around(overwriting.events)
    engine = train(planned(words(*more, f"cache={budget}", GRAPHS)), around)
    (teacher,) = engine.teachers
    assert isinstance(teacher, CachedTeacher)
    assert teacher.runs
    assert teacher.passes, "on the examples that are not cached"
    for events, shape in zip(overwriting.steps, around.shapes, strict=True):
        assert {event[:2] for event in events if isinstance(event, tuple)} == {shape}, "of the student alone"


@pytest.mark.parametrize("more", [["method=finetune"], ["method=pkd"]], ids=" ".join)
def test_padding_to_few_lengths_changes_nothing_but_rounding(words: Words, more: list[str]) -> None:
    words = partial(words, "student.dropout=0", "trainer.precision=64-true", *more)
    every, few = (train(planned(words(f"trainer.pad_multiple={multiple}"))).state_dict() for multiple in (1, 16))
    moved = [not torch.equal(every[name], few[name]) for name in every]
    assert any(moved), "sums have another order"
    for name in every:
        torch.testing.assert_close(every[name], few[name], rtol=1e-7, atol=1e-9)  # AdamW enlarges rounding


def refused(call: Callable[[], object]) -> InputError:
    """The error of a call."""
    with pytest.raises(InputError) as caught:
        call()
    return caught.value


def test_graphs_are_refused_without_cuda_and_with_ddp(words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    def error(*more: str) -> str:
        found = refused(lambda: check_arguments(planned(words("method=finetune", GRAPHS, *more))))
        assert found.key == "trainer.compile"
        assert "trainer.compile=false" in found.message
        return found.message

    assert "this run trains on the CPU; use trainer=gpu" in error()
    assert "this run trains on the CPU" in error("trainer.accelerator=auto")
    missing = refused(lambda: check_arguments(planned(words("method=finetune", GRAPHS, "trainer.accelerator=gpu"))))
    assert missing.key == "trainer", "that there is no GPU comes first"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "this run trains on the CPU" in error(), "on a machine with a GPU, too"
    assert "not tested with DDP" in error("trainer.accelerator=gpu", "trainer.strategy=ddp")
    monkeypatch.setattr(distributed, "world", lambda: 2)
    assert "not tested with DDP" in error("trainer.accelerator=gpu")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "a GPU without CUDA" in error("trainer.accelerator=gpu")


@pytest.mark.parametrize(
    ("more", "key", "words_of_it"),
    [
        (["method=ad_kd"], "trainer.compile", "method=ad_kd takes gradients of the student's pass"),
        (["method=bert_emd"], "trainer.compile", "method=bert_emd reads queries, keys or values of the student"),
        (["trainer.pad_multiple=1", "task.max_length=60"], None, ""),
        (["method=kd", "trainer.pad_multiple=1", "task.max_length=64"], None, ""),
        (["trainer.pad_multiple=1", "task.max_length=65"], "trainer.pad_multiple", "65 lengths"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_graphs_cannot_do_is_refused_before_anything_is_trained(
    words: Words, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, more: list[str], key: str | None, words_of_it: str
) -> None:
    monkeypatch.setattr("kd.build.check.check_machine", lambda spec: None)
    monkeypatch.setattr("kd.build.check.checked_length", lambda spec, models: spec.task.max_length)
    monkeypatch.setattr("kd.build.check.check_compiler", lambda device, mode: None)
    run = planned(words(*(() if any("method" in word for word in more) else ("method=finetune",)), *more, GRAPHS))
    if key is None:
        check_run(run, examples_of(run))
        return
    error = refused(lambda: check_run(run, examples_of(run)))
    assert error.key == key
    assert words_of_it in error.message
    assert not run.directory.exists()
    off = planned(words(*(() if any("method" in word for word in more) else ("method=finetune",)), *more))
    check_run(off, examples_of(off))


def test_the_compiler_is_tried_in_the_mode_of_the_run(words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[object] = []
    monkeypatch.setattr("kd.build.check.check_machine", lambda spec: None)
    monkeypatch.setattr("kd.build.check.check_compiler", lambda device, mode: tried.append(mode))
    for more in ("trainer.compile=false", "trainer.compile=true", GRAPHS):
        run = planned(words("method=finetune", more))
        check_run(run, examples_of(run))
    assert tried == [None, "reduce-overhead"]


def test_the_preflight_says_what_has_graphs(words: Words) -> None:
    assert line_of_graphs(planned(words("method=finetune")).spec.trainer, {1, 2}) is None
    line = line_of_graphs(planned(words("method=finetune", GRAPHS)).spec.trainer, {16, 32})
    assert line is not None
    assert "one of 2 lengths, at most 32 tokens" in line


def test_the_documentation_names_the_methods_that_are_refused() -> None:
    text = (Path(kd.__file__).parent.parent / "docs" / "distributed.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| a student's pass"))
    assert set(re.findall(r"`(\w+)`", row)) == {"ad_kd", "bert_emd", "l2a", "tinybert", "mlkd_bert", "meta_kd"}
