"""Baselines that ignore the text, and latencies."""

import itertools
import types
from typing import Any

import pytest
import torch

from conftest import tiny_config, tiny_tokenizer
from kd.config.schema import StudentSpec, TaskSpec
from kd.data.examples import load_examples
from kd.data.metrics import Collapse
from kd.data.sources import Files
from kd.data.tasks import Classification, Regression
from kd.engines.base import in_words
from kd.forward import Needs
from kd.forward.taps import FAMILIES
from kd.models import CachedTeacher, Encoder, FrozenTeacher, latency
from kd.models.latency import FILLER, LATENCY_CALLS, LATENCY_ROUNDS, latencies, to_time
from kd.models.students import empty_model, new_model, plan_student
from kd.results.evaluate import baseline, evaluate
from kd.training import preflight
from kd.training.preflight import Report, check_shares, check_teachers
from kd.training.progress_bar import ProgressBar

TWO = Classification("t", ["bad", "good"], {}, ["accuracy", "f1", "matthews_corrcoef"], "accuracy")
SCORES = Regression("t", ["pearson", "mse"], "pearson")


@pytest.fixture(autouse=True)
def _as_many_calls_as_in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "LATENCY_ROUNDS", LATENCY_ROUNDS)
    monkeypatch.setattr(latency, "LATENCY_CALLS", LATENCY_CALLS)


def collapse(predictions: list[float], labels: list[float], parts: int = 1) -> list[float]:
    metric = Collapse()
    for p, y in zip(torch.tensor(predictions).chunk(parts), torch.tensor(labels).chunk(parts), strict=True):
        metric.update(p, y)
    return metric.compute().tolist()


@pytest.mark.parametrize(
    ("predictions", "labels", "expected"),
    [
        ([1, 1, 1, 1], [0, 1, 0, 1], True),
        ([1, 1, 1, 0], [0, 1, 0, 1], False),
        ([1, 1, 1, 1], [1, 1, 1, 1], False),  # there is nothing else to say
        ([2.5, 2.5, 2.5, 2.5], [0.0, 1.0, 4.0, 5.0], True),
        ([2.4, 2.5, 2.5, 2.6], [0.0, 1.0, 4.0, 5.0], True),
        ([2.0, 2.5, 2.5, 3.0], [0.0, 1.0, 4.0, 5.0], False),
        ([1e4, 1e4 + 1, 1e4 + 4, 1e4 + 5], [1e4, 1e4 + 1, 1e4 + 4, 1e4 + 5], False),
    ],
)
def test_predictions_are_alike_where_the_labels_are_not(predictions: list[float], labels: list[float], expected: bool) -> None:
    for parts in (1, 2):
        assert bool(collapse(predictions, labels, parts)[0]) is expected


def test_what_is_alike_is_said_in_words() -> None:
    assert in_words(collapse([1, 1], [0, 1]), ["bad", "good"]) == "every prediction is 'good'"
    assert "standard deviation 0, that of the labels 2" in in_words(collapse([2.0, 2.0], [1.0, 5.0]), None)


def test_nothing_waits_for_the_copy_of_a_batch_that_is_evaluated() -> None:
    moved = []

    class Batches:
        def to(self, device: object, *, non_blocking: bool = False) -> None:
            moved.append((device, non_blocking))
            raise StopIteration

    with pytest.raises(StopIteration):
        evaluate({}, [], [Batches()], Classification("toy", ["a", "b"], {}, ["accuracy"], "accuracy"), "cuda")
    assert moved == [("cuda", True)]


def test_the_baseline_predicts_what_train_has_most_of_on_the_other_splits() -> None:
    labels = {"train": [0, 1, 1], "validation": [1, 1, 1, 0], "test": [0, 0, 0, 1]}
    found = baseline(TWO, labels)
    assert found["validation"] == {"accuracy": 0.75, "f1": pytest.approx(6 / 7), "matthews_corrcoef": 0.0}
    assert found["test"]["accuracy"] == 0.25
    assert "train" not in found


def test_the_baseline_of_scores_is_the_mean_of_train() -> None:
    found = baseline(SCORES, {"train": [1.0, 3.0], "validation": [2.0, 4.0]})
    assert found["validation"] == {"pearson": 0.0, "mse": pytest.approx(2.0)}


@pytest.mark.parametrize(
    ("task", "value", "words"),
    [
        (SCORES, 0.03, "little to teach"),
        (SCORES, -0.2, "nothing to teach"),
        (SCORES, None, "nothing to teach"),
        (SCORES, 0.8, None),
        (TWO, 0.52, "little to teach"),
        (TWO, 0.5, "nothing to teach"),
        (TWO, 0.7, None),
    ],
)
def test_a_teacher_that_is_barely_better_than_chance_is_told(
    task: Any, value: float | None, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "teacher_score", lambda *_: value)
    labels = {"train": [0, 0, 1], "validation": [0, 0, 1, 1]}
    shape = types.SimpleNamespace(notes=[], asides=[])
    engine = types.SimpleNamespace(task=task, teachers=[types.SimpleNamespace(name="t", shape=shape)])
    report = Report()
    check_teachers(report, None, engine, types.SimpleNamespace(examples=types.SimpleNamespace(labels=labels)))
    assert report.warnings == (words is not None)
    assert words is None or report.lines[-1].endswith(words)


@pytest.mark.parametrize(
    ("shares", "told"),
    [
        ({"task": 0.7, "similarity": 14.1}, ["'similarity' is 20 times"]),
        ({"task": 0.7, "similarity": 13.9}, []),
        ({"hidden": 56.0, "task": 0.7, "logits": 20.0}, ["'hidden' is 80 times", "'logits' is 29 times"]),
        ({"task": 0.0, "logits": 3.0}, []),  # methods, or stages of them, that do not learn from labels
        ({"hidden": 3.0}, []),
        ({"a/task": 0.1, "a/mutual": 3.0, "b/task": 1.0, "b/mutual": 3.0}, ["'a/mutual' is 30 times"]),
    ],
)
def test_a_term_that_drowns_the_labels_is_told_with_its_weight(shares: dict[str, float], told: list[str]) -> None:
    report = Report()
    check_shares(report, shares)
    assert report.warnings == len(report.lines) == len(told)
    for line, words in zip(report.lines, told, strict=True):
        term = words.split("'")[1].rpartition("/")[2]
        assert words in line
        assert f"method.weights.{term} " in line


def epochs(constant: list[dict[str, str]], capsys: pytest.CaptureFixture[str]) -> list[str]:
    progress = ProgressBar("run", "plain", "a cure")
    for epoch, found in enumerate(constant):
        trainer = types.SimpleNamespace(
            is_global_zero=True, sanity_checking=False, current_epoch=epoch, max_epochs=9,
            callback_metrics={"validation/accuracy": torch.tensor(0.5), "validation/mse": torch.tensor(2.0)},
        )  # fmt: skip
        progress.on_validation_end(trainer, types.SimpleNamespace(constant=found, learners={"a": 1, "b": 1}))
    return capsys.readouterr().out.splitlines()


def test_one_class_is_told_once_in_the_line_of_its_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    alike = {"a": "every prediction is 'good'"}
    lines = epochs([{}, alike, alike], capsys)
    assert lines[0].endswith("epoch 1/9  validation accuracy 50.0  mse 2.0000")
    assert lines[1].endswith("WARN a: every prediction is 'good'. Try a cure")
    assert "WARN" not in lines[2]


class Clock:
    """Each call takes what is next for its model."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds, self.now, self.running = itertools.cycle(seconds), 0.0, False

    def perf_counter(self) -> float:
        if self.running:
            self.now += next(self.seconds)
        self.running = not self.running
        return self.now


@pytest.mark.parametrize(("slow_round", "expected"), [(1.1, 10.0), (1.5, None)])
def test_a_latency_is_the_least_of_its_calls_or_left_out(
    slow_round: float, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = LATENCY_ROUNDS * LATENCY_CALLS
    seconds = [0.01 * (slow_round if n < LATENCY_CALLS else 1.0) + (0.3 if n % 2 else 0.0) for n in range(calls)]
    monkeypatch.setattr(latency, "time", Clock(seconds))
    found = latencies({"m": Encoder(new_model(tiny_config()))})["m"]
    assert found.milliseconds == expected
    assert found.spread == pytest.approx(slow_round - 1, abs=1e-3)


def test_the_models_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    models = {name: Encoder(new_model(tiny_config(layers=layers))) for name, layers in {"a": 1, "b": 2}.items()}
    for name, model in models.items():
        monkeypatch.setattr(model, "forward", lambda *_, name=name: called.append(name))
    latencies(models)
    assert called == ["a", "b"] * (5 + LATENCY_ROUNDS * LATENCY_CALLS)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_cached_teacher_is_timed_in_its_shape_and_draws_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Encoder(empty_model(tiny_config(family)), tiny_tokenizer())
    normal = torch.Tensor.normal_

    def shapes_alone(tensor: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        assert tensor.is_meta, "drawn, if only to be timed"
        return normal(tensor, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "normal_", shapes_alone)
    before = torch.random.get_rng_state()
    timed = to_time(CachedTeacher(FrozenTeacher(shape)), "classifier")
    monkeypatch.undo()
    assert torch.equal(before, torch.random.get_rng_state())
    assert timed.parameter_count() == shape.parameter_count()
    ends = {float(end) for parameter in timed.parameters() for end in parameter.detach().aminmax()}
    assert ends == {float(torch.tensor(FILLER))}
    assert all(parameter.is_contiguous() for parameter in timed.parameters())  # each number has its own place in memory
    own = dict(new_model(shape.config).named_buffers())
    assert {name: buffer.tolist() for name, buffer in timed.model.named_buffers()} == {n: b.tolist() for n, b in own.items()}
    ids = torch.arange(5, 25)[None]
    assert timed({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, Needs()).logits.isfinite().all()
    assert latencies({"t": timed})["t"].spread >= 0


def test_a_fresh_head_of_scores_begins_at_their_mean_and_one_with_weights_does_not(backbone, tmp_path) -> None:
    pre = plan_student(StudentSpec(name="x"), str(backbone), None, str(backbone), start=2.75).materialise()
    assert pre.model.classifier.bias.tolist() == [2.75]
    assert pre.notes == ["head at the mean of the scores, 2.75"]
    fresh = plan_student(StudentSpec(name="x", init="random"), str(backbone), None, None, start=2.75).materialise()
    assert fresh.model.classifier.bias.tolist() == [2.75]
    pre.model.classifier.bias.data.fill_(1.5)
    pre.save(tmp_path / "teacher")
    spec = StudentSpec(name="x", init_from="teacher")
    from_weights = plan_student(spec, str(backbone), None, str(tmp_path / "teacher"), start=2.75).materialise()
    assert from_weights.model.classifier.bias.tolist() == [1.5]
    assert not from_weights.notes
    assert plan_student(
        StudentSpec(name="x"), str(backbone), ["a", "b"], str(backbone)
    ).materialise().model.classifier.bias.tolist() == [
        0,
        0,
    ]


def test_the_mean_is_that_of_the_examples_that_are_trained_on(tmp_path) -> None:
    rows = [f"a film {n},{n}" for n in range(40)]
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *rows]))
    spec = TaskSpec("t", "regression", {}, ["text"], "label", metrics=["mse"], monitor="mse", limit_train=5)
    examples = load_examples(spec, Files(str(tmp_path / "a.csv"), ["text"], "label"))
    assert len(examples.labels["train"]) == 5
    assert examples.task.start == pytest.approx(sum(examples.labels["train"]) / 5)
