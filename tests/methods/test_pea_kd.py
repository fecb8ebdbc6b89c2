"""Pea-KD: labels of the teacher's outcomes and their thresholds, the first run's term, and both runs with shared layers."""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import tiny_model
from kd.build.check import check_unlabelled
from kd.build.data import build_data, build_examples, prefit_methods
from kd.build.models import build_models, check_prefit, plan_models
from kd.config.compose import compose, typed
from kd.data.batch import Batch
from kd.data.masked_lm.task import MaskedLM
from kd.data.tasks import Classification, Regression
from kd.errors import InputError
from kd.forward import Forward
from kd.functional.hidden import patience
from kd.functional.outcomes import SCHEMES, confidence, median_thresholds, outcome_labels
from kd.methods.base import Bound, Progress, Step
from kd.methods.pea_kd import PeaKD
from kd.methods.pkd import PKD
from kd.models import Encoder, FrozenTeacher
from kd.runs.run import Run
from kd.training import execute
from whole_runs import broken_off, last_weights, made, planned, same_weights, torchrun

Small = Callable[..., list[str]]
TASK = Classification("toy", ["no", "yes"], {}, ["accuracy"], "accuracy")
SHORT = ["method=pea_kd", "method.before.run.trainer.max_epochs=1", "trainer.max_epochs=1"]


def logits_of(probabilities: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


# -- labels and thresholds -------------------------------------------------------------------------------------------------


CASES = logits_of([[0.97, 0.03], [0.90, 0.10], [0.80, 0.20], [0.60, 0.40]])
OUTCOMES = torch.tensor([0, 0, 1, 1])  # correct, correct, wrong, wrong


def test_labels_are_the_published_cases() -> None:
    assert outcome_labels(CASES, OUTCOMES, (0.95, 0.75)).tolist() == [0, 1, 2, 3]
    assert outcome_labels(CASES, OUTCOMES, (0.95, 0.75), "correct").tolist() == [0, 0, 1, 1]
    assert outcome_labels(CASES, OUTCOMES, (0.95, 0.75), "confident").tolist() == [0, 1, 0, 1]


def test_a_confidence_equal_to_its_threshold_is_unconfident() -> None:
    certainty = confidence(CASES)
    equal = (float(certainty[0]), float(certainty[2]))
    assert outcome_labels(CASES, OUTCOMES, equal).tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_labels_equal_the_definition_written_as_a_loop(scheme: str) -> None:
    torch.manual_seed(0)
    logits, labels, thresholds = 3 * torch.randn(200, 3).double(), torch.randint(0, 3, (200,)), (0.7, 0.5)
    expected = []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        total = sum(math.exp(value) for value in row)
        best = max(range(3), key=row.__getitem__)
        right, certainty = best == label, math.exp(row[best]) / total
        confident = certainty > (thresholds[0] if right else thresholds[1])
        name = {
            "four": f"{'confident' if confident else 'unconfident'} and {'correct' if right else 'wrong'}",
            "correct": "correct" if right else "wrong",
            "confident": "confident" if confident else "unconfident",
        }[scheme]
        expected.append(SCHEMES[scheme].index(name))
    assert outcome_labels(logits, labels, thresholds, scheme).tolist() == expected
    assert set(expected) == set(range(len(SCHEMES[scheme])))


def test_half_precision_logits_are_compared_in_float32() -> None:
    logits = torch.tensor([[4.0, 1.0]])  # 0.95257; in bfloat16 0.953
    assert outcome_labels(logits.bfloat16(), torch.tensor([0]), (0.9527, 0.5)).tolist() == [1]
    assert confidence(logits.bfloat16()).dtype is torch.float32


@pytest.mark.parametrize("count", [9, 40])
def test_medians_are_those_of_correct_and_of_wrong_predictions(count: int) -> None:
    torch.manual_seed(count)
    logits, labels = torch.randn(count, 2).double(), torch.randint(0, 2, (count,))
    correct, wrong = [], []
    for row, label in zip(logits.softmax(dim=-1).tolist(), labels.tolist(), strict=True):
        (correct if row[label] == max(row) else wrong).append(max(row))
    found = median_thresholds(logits, labels).tolist()
    assert found == pytest.approx([statistics.median(correct), statistics.median(wrong)], abs=1e-12)
    shares = torch.bincount(outcome_labels(logits, labels, found), minlength=4).tolist()
    assert shares[0] == len(correct) // 2
    assert shares[2] == len(wrong) // 2


def test_a_teacher_that_is_never_wrong_has_a_threshold_nevertheless() -> None:
    thresholds = median_thresholds(CASES, torch.zeros(4, dtype=torch.long))
    assert thresholds.tolist() == pytest.approx([0.85, 0.0])
    assert set(outcome_labels(CASES, torch.zeros(4, dtype=torch.long), thresholds).tolist()) == {0, 1}


def test_an_unknown_scheme_is_an_error() -> None:
    with pytest.raises(ValueError, match="is not one of four"):
        outcome_labels(CASES, OUTCOMES, (0.9, 0.7), "three")


# -- the first run's term --------------------------------------------------------------------------------------------------


def encoder(layers: int = 2, seed: int = 0, **sizes: object) -> Encoder:
    model = tiny_model(seed, layers=layers, **sizes).double()
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" not in name.lower():
            nn.init.normal_(parameter, std=0.3)
    return Encoder(model)


def batch_of(padding: int = 0) -> Batch:
    ids = torch.randint(5, 30, (6, 5), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs = {
        name: nn.functional.pad(rows, (0, padding), value=7 if name == "input_ids" else 0) for name, rows in inputs.items()
    }
    return Batch(inputs, (inputs,), torch.tensor([0, 1, 1, 0, 1, 0]), torch.arange(6))


def bound(student: Encoder, teacher: Encoder, padding: int = 0, **arguments: object) -> tuple[PeaKD, Step]:
    """A method bound to two models and given the teacher's outputs, and a step over six sentences."""
    method, frozen, batch = PeaKD(**arguments), FrozenTeacher(teacher), batch_of(padding)
    method.bind(Bound(student, [frozen], TASK))
    method.double()
    torch.manual_seed(5)
    for parameter in method.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours, (theirs,) = method.needs()
    method.prefit([teacher(batch.student, theirs).logits], batch.labels)
    return method, Step(
        Forward(student, batch.student, ours), [Forward(frozen, batch.student, theirs)], batch, TASK, Progress()
    )


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("thresholds", ["median", 0.6, [0.7, 0.55]], ids=str)
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_term_equals_the_formula_written_as_loops(family: str, thresholds: object, scheme: str) -> None:
    student, teacher = encoder(seed=1, model_type=family), encoder(4, seed=2)
    method, step = bound(student, teacher, scheme=scheme, thresholds=thresholds)
    with torch.no_grad():
        theirs = teacher.model(**step.batch.student).logits
        if family == "bert":
            vectors = student.base(**step.batch.student).pooler_output
        else:
            vectors = student.model.pre_classifier(student.base(**step.batch.student)[0][:, 0]).relu()
    if thresholds == "median":
        found = {True: [], False: []}
        for row, label in zip(theirs.softmax(-1).tolist(), step.batch.labels.tolist(), strict=True):
            found[row[label] == max(row)].append(max(row))
        cut = [statistics.median(found[right]) if found[right] else 0.0 for right in (True, False)]
    else:
        cut = list(thresholds) if isinstance(thresholds, list) else [thresholds] * 2
    assert method.thresholds.tolist() == pytest.approx(cut, abs=1e-12)
    targets = outcome_labels(theirs, step.batch.labels, cut, scheme).tolist()
    losses, weight, bias = [], method.head.weight.tolist(), method.head.bias.tolist()
    for vector, target in zip(vectors.tolist(), targets, strict=True):
        scores = [sum(w * x for w, x in zip(row, vector, strict=True)) + b for row, b in zip(weight, bias, strict=True)]
        losses.append(math.log(sum(math.exp(score) for score in scores)) - scores[target])
    assert method.terms(step)["prediction"].item() == pytest.approx(sum(losses) / len(losses), rel=1e-10)
    assert sum(method.counts) == 6
    assert method.counts == np.bincount(targets, minlength=len(SCHEMES[scheme])).tolist()


def test_padding_changes_nothing() -> None:
    one, other = (bound(encoder(seed=1), encoder(4, seed=2), padding) for padding in (0, 4))
    assert one[0].terms(one[1])["prediction"].item() == pytest.approx(other[0].terms(other[1])["prediction"].item(), rel=1e-10)


def test_encoder_and_head_learn_and_the_classifier_and_the_teacher_do_not() -> None:
    student, teacher = encoder(seed=1), encoder(4, seed=2)
    method, step = bound(student, teacher)
    method.terms(step)["prediction"].backward()
    classifier = set(student.outputs.parameters())
    assert len(classifier) == 2
    for parameter in student.parameters():
        assert (parameter.grad is None) is (parameter in classifier)
        assert parameter.requires_grad is (parameter not in classifier)
    assert all(parameter.grad is not None for parameter in method.head.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_medians_are_never_missing_silently_and_are_described() -> None:
    student, teacher = encoder(seed=1), encoder(4, seed=2)
    method, step = bound(student, teacher)
    assert set(method.describe()) == {"teacher is confident above", "labels of train"}
    assert "(medians of train)" in method.describe()["teacher is confident above"]
    fresh = PeaKD()
    fresh.bind(Bound(student, [FrozenTeacher(teacher)], TASK))
    assert fresh.describe() == {}
    with pytest.raises(RuntimeError, match="`prefit` comes before training"):
        fresh.terms(step)
    fresh.double().load_state_dict(method.state_dict())
    assert torch.equal(fresh.thresholds, method.thresholds), "they are part of a checkpoint"
    assert "(given)" in PeaKD(thresholds=0.9).describe()["teacher is confident above"]
    assert "teacher is confident above" not in PeaKD("correct", 0.9).describe()


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"scheme": "five"}, "scheme"),
        ({"thresholds": "mean"}, "thresholds"),
        ({"thresholds": [0.9]}, "thresholds"),
        ({"thresholds": [0.9, 0.8, 0.7]}, "thresholds"),
        ({"thresholds": 1.1}, "thresholds"),
        ({"thresholds": [0.9, -0.1]}, "thresholds"),
        ({"thresholds": [0.9, True]}, "thresholds"),
        ({"thresholds": None}, "thresholds"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(arguments: dict[str, object], key: str) -> None:
    with pytest.raises(InputError) as caught:
        PeaKD(**arguments)
    assert caught.value.key == key


def test_a_regression_is_refused_with_the_way_out(small: Small) -> None:
    scores = Regression("toy scores", ["mse"], "mse")
    with pytest.raises(InputError, match="leave this run out, with before=null") as caught:
        PeaKD().bind(Bound(encoder(seed=1, num_labels=1), [FrozenTeacher(encoder(4, num_labels=1))], scores))
    assert caught.value.key == "task"


def test_text_without_labels_is_refused() -> None:
    method = PeaKD()
    assert method.label_dependence() is not None
    spec = typed(compose(["method=pea_kd", "task=rotten_tomatoes", "task.unlabelled=more.txt"]))
    with pytest.raises(InputError, match="the teacher's prediction is compared with it"):
        check_unlabelled(spec, method, {"prediction": lambda _: 1.0})  # type: ignore[dict-item]


# -- the second run --------------------------------------------------------------------------------------------------------


def second_run() -> tuple[PKD, dict[str, float]]:
    """The method of the configuration, and its weights."""
    node = compose(["method=pea_kd"]).method
    options = {name: node[name] for name in ("layers", "temperature", "normalize", "loss", "reduction", "hidden_reduction")}
    return PKD(**options), dict(node.weights)


def test_loss_of_the_second_run_is_the_number_of_the_publication() -> None:
    method, weights = second_run()
    teacher, student = torch.tensor([[10.0, 0.0]]).double(), torch.zeros(1, 2).double()
    soft = TASK.soft(student, teacher, float(method.temperature(0.0)), method.loss, method.reduction)
    hard = TASK.hard(student, torch.tensor([0]))
    assert soft.item() == pytest.approx(11.094407, abs=1e-6)
    assert hard.item() == pytest.approx(0.693147, abs=1e-6)
    assert weights["logits"] * soft.item() + weights["task"] * hard.item() == pytest.approx(7.974029, abs=1e-6)


def test_patience_is_one_mean_of_normalised_states() -> None:
    method, weights = second_run()

    def term(student: list[float], teacher: list[float]) -> float:
        states = [torch.tensor([[vector]]).double() for vector in (student, teacher)]
        return float(patience(*states, normalize=method.normalize, reduction=method.hidden_reduction))

    assert weights["hidden"] * term([0.0, 1.0], [1.0, 0.0]) == pytest.approx(100.0)
    assert term([3.0, 4.0], [0.3, 0.4]) == pytest.approx(0.0, abs=1e-15)
    torch.manual_seed(0)
    ours, theirs = torch.randn(4, 3, 5).double(), torch.randn(4, 3, 5).double()
    total = 0.0
    for one, other in zip(ours.flatten(0, 1).tolist(), theirs.flatten(0, 1).tolist(), strict=True):
        lengths = [math.sqrt(sum(x * x for x in vector)) for vector in (one, other)]
        total += sum((x / lengths[0] - y / lengths[1]) ** 2 for x, y in zip(one, other, strict=True))
    found = patience(ours, theirs, normalize=method.normalize, reduction=method.hidden_reduction)
    assert found.item() == pytest.approx(total / (4 * 3 * 5), rel=1e-12)


@pytest.mark.parametrize(("student", "pairs"), [("1l", "1<-2"), ("2l", "1<-1, 2<-2, 3<-3")])
def test_shared_layers_enter_the_layer_map(small: Small, student: str, pairs: str) -> None:
    run = planned(small("method=pea_kd", "surgery=[sps]", f"student={student}"))
    method = plan_models(run, build_examples(run).task).shapes.methods["student"]
    assert method.describe()["layer map (student<-teacher)"] == pairs


# -- whole runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("surgery", [[], ["surgery=[sps]"]], ids=str)
def test_both_runs_train_one_encoder(small: Small, surgery: list[str]) -> None:
    run, result = made(small(*SHORT, *surgery))
    first = run.inputs.before
    assert first is not None
    assert first.result is not None
    assert first.result["method"] == "pea_kd_prediction"
    assert result["init"].startswith("run pea_kd_prediction, begun from first layers")
    assert result["parameters"] == first.result["parameters"]
    state = last_weights(first)
    assert 0.5 <= float(state["method.thresholds"][0]) <= 1


def test_a_regression_is_refused_while_planning_and_without_the_first_run_it_is_not(small: Small) -> None:
    scores = Regression("toy scores", ["mse"], "mse")
    first = planned(small(*SHORT)).inputs.before
    assert first is not None
    with pytest.raises(InputError, match="needs classes") as caught:
        plan_models(first, scores)
    assert caught.value.key == "task"
    plan_models(planned(small(*SHORT, "method.before=null")), scores)


def test_a_teacher_trained_at_the_same_time_and_text_without_labels_are_refused(small: Small) -> None:
    run, method = planned(small(*SHORT)), PeaKD()
    with pytest.raises(InputError, match="reads its teacher's outputs over train before training") as caught:
        check_prefit(run, TASK, method, online=True)
    assert caught.value.key == "cohort.teacher"
    with pytest.raises(InputError, match="compares its teacher with the labels") as caught:
        check_prefit(run, MaskedLM("text", ["loss"], "loss"), method, online=False)
    assert caught.value.key == "task"


def prefitted(overrides: list[str]) -> tuple[PeaKD, int, int]:
    """The method of the first run before training; examples trained on, and examples that its teacher was run on."""
    run = planned(overrides).inputs.before
    assert run is not None
    for _, needed in run.inputs:
        execute.execute(needed)
    examples = build_examples(run)
    data, models = build_data(run, examples, build_models(run, examples.task, texts=examples.texts["train"]))
    before = models.teachers[0].work["examples"]
    prefit_methods(run, data, models)
    method = next(iter(models.methods.values()))
    return method, data.trained_count, models.teachers[0].work["examples"] - before  # type: ignore[return-value]


def test_medians_of_a_cached_teacher_and_of_one_that_runs_are_the_same(small: Small) -> None:
    cached, count, none = prefitted(small(*SHORT))
    running, also, runs = prefitted(small(*SHORT, "cache=off"))
    assert (count, none, also, runs) == (96, 0, 96, 96)
    torch.testing.assert_close(cached.thresholds, running.thresholds, rtol=1e-5, atol=1e-6)  # batches of other sizes
    assert sum(cached.counts) == 96
    assert cached.counts[0] in (cached.counts[1], cached.counts[1] - 1)


def test_a_teacher_whose_labels_have_another_order_is_read_by_name(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Tensor]] = []
    monkeypatch.setattr(PeaKD, "prefit", lambda _, logits, __: seen.append(list(logits)))

    def run(*more: str, columns: list[int] | None = None) -> None:
        run = planned(small(*SHORT, *more)).inputs.before
        assert run is not None
        for _, needed in run.inputs:
            execute.execute(needed)
        examples = build_examples(run)
        models = build_models(run, examples.task, texts=examples.texts["train"])
        models.teachers[0].columns = columns
        data, models = build_data(run, examples, models)
        prefit_methods(run, data, models)

    for more in ([], ["cache=off"]):
        run(*more)
        run(*more, columns=[1, 0])
        plain, swapped = seen[-2][0], seen[-1][0]
        assert torch.equal(plain[:, [1, 0]], swapped)


def test_a_run_broken_off_continues_with_the_same_labels(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def first(folder: str) -> Run:
        found = planned(
            small(*SHORT, "surgery=[sps]", f"paths.runs={tmp_path / folder}", "method.before.run.trainer.max_epochs=2")
        ).inputs.before
        assert found is not None
        return found

    whole = first("whole")
    execute.execute(whole)
    broken = first("broken")
    broken_off(broken, 9, monkeypatch)  # six batches an epoch
    execute.execute(broken)
    assert same_weights(last_weights(whole), last_weights(broken))


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("cache", ["auto", "off"])
def test_two_ranks_compute_the_medians_of_one(small: Small, tmp_path: Path, cache: str) -> None:
    settings = (*SHORT, f"cache={cache}")

    def thresholds(run: Run) -> Tensor:
        assert run.inputs.before is not None
        return last_weights(run.inputs.before)["method.thresholds"]

    # The second run finds the teacher that one rank has trained: ranks have different dropout.
    one, _ = made(small(*settings, f"paths.runs={tmp_path}"))
    overrides = small(*settings, "surgery=[sps]", "trainer=ddp", "trainer.accelerator=cpu", f"paths.runs={tmp_path}")
    torchrun(overrides)
    torch.testing.assert_close(thresholds(planned(overrides)), thresholds(one), rtol=1e-5, atol=1e-5)
