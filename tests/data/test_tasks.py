"""Tasks: labels by name, losses, metrics against naive ones."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kd.config.schema import TaskSpec
from kd.data.direction import higher_is_better
from kd.data.examples import build_task, load_examples
from kd.data.metrics import CLASSIFICATION, REGRESSION
from kd.data.sources import Example, Splits
from kd.data.tasks import Classification, Regression, Task
from kd.errors import InputError


def classes(labels: list[str], codes: dict[str, str] | None = None, metrics: tuple[str, ...] = ("accuracy",)) -> Classification:
    return Classification("t", labels, codes or {}, metrics, metrics[0])


def scores() -> Regression:
    return Regression("t", list(REGRESSION), "pearson")


def example(label: object, line: int = 7) -> Example:
    return Example(("a text",), label, f"'a.csv', line {line}")


class Given:
    """A source of these labels."""

    def __init__(self, **labels: list[object]) -> None:
        self.raw: Splits = {
            split: [example(label, line) for line, label in enumerate(found, 2)] for split, found in labels.items()
        }

    def splits(self) -> Splits:
        return self.raw

    def fingerprint(self) -> dict[str, str]:
        return {}


def spec(**more: object) -> TaskSpec:
    given = {"name": "t", "source": {}, "text": ["text"], "label": "label", "metrics": ["accuracy"], "monitor": "accuracy"}
    return TaskSpec(**{**given, **more})


# Labels


@pytest.mark.parametrize("labels", [["no", "yes"], ["yes", "no"]])
def test_a_label_is_known_by_its_name_never_by_its_place(labels: list[str]) -> None:
    task = classes(labels, {"0": "no", "1": "yes"})
    for raw, name in {"no": "no", "yes": "yes", " yes ": "yes", "0": "no", 1: "yes", "1": "yes"}.items():
        assert task.labels[int(task.encode(example(raw)))] == name


def test_a_name_that_looks_like_a_code_stays_a_name() -> None:
    task = classes(["1", "0"], {"0": "1"})
    assert [task.encode(example(raw)) for raw in ("1", "0")] == [0, 1]


@pytest.mark.parametrize("raw", ["maybe", "Yes", 1, -1, "1.0", True])
def test_an_unknown_label_names_the_line_and_the_labels(raw: object) -> None:
    with pytest.raises(InputError, match=r"'a\.csv', line 7: unknown label .*no, yes") as caught:
        classes(["no", "yes"]).encode(example(raw))
    assert caught.value.key == "labels"


@pytest.mark.parametrize(
    ("labels", "codes", "metrics", "monitor", "key"),
    [
        (["a"], {}, ["accuracy"], "accuracy", "labels"),
        (["a", "a"], {}, ["accuracy"], "accuracy", "labels"),
        (["a", "b"], {"0": "c"}, ["accuracy"], "accuracy", "codes"),
        (["a", "b"], {}, ["acuracy"], "acuracy", "metrics"),
        (["a", "b"], {}, ["pearson"], "pearson", "metrics"),
        (["a", "b"], {}, ["accuracy"], "f1", "monitor"),
        (["a", "b", "c"], {}, ["f1"], "f1", "metrics"),
    ],
)
def test_a_description_that_cannot_work_names_its_key(labels, codes, metrics, monitor, key: str) -> None:
    with pytest.raises(InputError) as caught:
        Classification("t", labels, codes, metrics, monitor)
    assert caught.value.key == key


def test_a_regression_refuses_metrics_of_classes() -> None:
    with pytest.raises(InputError, match="pearson") as caught:
        Regression("t", ["accuracy"], "accuracy")
    assert caught.value.key == "metrics"


def test_an_unknown_kind_of_task_is_refused() -> None:
    with pytest.raises(InputError, match="Did you mean 'regression'") as caught:
        build_task(spec(kind="regresion"), {})
    assert caught.value.key == "kind"


def test_without_labels_the_classes_are_the_sorted_labels_of_train() -> None:
    examples = load_examples(spec(), Given(train=["b", " a", "c", "b"], validation=["c"]))
    assert examples.task.labels == ["a", "b", "c"]
    assert examples.labels == {"train": [1, 0, 2, 1], "validation": [2]}


def test_a_label_that_only_validation_has_names_its_line() -> None:
    with pytest.raises(InputError, match="line 3: unknown label 'c'"):
        load_examples(spec(), Given(train=["a", "b"], validation=["a", "c"]))


@pytest.mark.parametrize("labels", [None, ["a", "b"]])
def test_one_class_only_is_refused(labels: list[str] | None) -> None:
    with pytest.raises(InputError, match="every training example has the label 'a'"):
        load_examples(spec(labels=labels), Given(train=["a", "a"], validation=["a"]))


@pytest.mark.parametrize("missing", ["", None])
def test_a_missing_label_is_no_class(missing: object) -> None:
    with pytest.raises(InputError, match="line 3"):
        load_examples(spec(), Given(train=["a", missing, "b"], validation=["a"]))


@pytest.mark.parametrize("raw", ["high", "", None, "nan", "inf", [1]])
def test_a_score_that_is_no_number_names_its_line(raw: object) -> None:
    with pytest.raises(InputError, match=r"'a\.csv', line 7: the score .* is not a finite number") as caught:
        scores().encode(example(raw))
    assert caught.value.key == "label"


def test_scores_are_read_as_they_are() -> None:
    assert [scores().encode(example(raw)) for raw in ("5.000", " 0.25", 3, -1.5)] == [5.0, 0.25, 3.0, -1.5]


@pytest.mark.parametrize(("task", "dtype"), [(classes(["a", "b"]), torch.long), (scores(), torch.double)])
def test_labels_have_the_type_of_their_loss(task: Task, dtype: torch.dtype) -> None:
    assert task.label_tensor([0, 1]).dtype == dtype


# Metrics


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    return sum(int(p == t) for p, t in zip(predicted.tolist(), labels.tolist(), strict=True)) / len(labels)


def f1_of(number: int) -> Callable[[Tensor, Tensor], float]:
    def f1(predicted: Tensor, labels: Tensor) -> float:
        pairs = list(zip(predicted.tolist(), labels.tolist(), strict=True))
        hit = sum(p == t == number for p, t in pairs)
        wrong = sum((p == number) != (t == number) for p, t in pairs)
        return 2 * hit / (2 * hit + wrong)

    return f1


def matthews(predicted: Tensor, labels: Tensor) -> float:
    """Return Matthews' correlation of two classes, which is Pearson's of two columns of zeros and ones."""
    return pearson(predicted, labels)


def pearson(predicted: Tensor, labels: Tensor) -> float:
    x, y = ([float(v) for v in values] for values in (predicted, labels))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))


def spearman(predicted: Tensor, labels: Tensor) -> float:
    def ranks(values: Tensor) -> Tensor:  # ties share the mean of their places
        return torch.tensor([float((values < v).sum() + ((values == v).sum() - 1) / 2) for v in values])

    return pearson(ranks(predicted), ranks(labels))


def measured(task: Task, name: str, predicted: Tensor, labels: Tensor) -> float:
    """A metric of `task`, fed in two pieces, as batches are."""
    metric = task.metric(name)
    for part in (slice(0, 20), slice(20, None)):
        metric.update(predicted[part], labels[part])
    return float(metric.compute())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "naive"), [("accuracy", accuracy), ("f1", f1_of(1)), ("matthews_corrcoef", matthews)])
def test_metrics_of_two_classes_equal_naive_ones(name: str, naive: Callable[[Tensor, Tensor], float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(50, generator=generator) < 0.3).long()  # unbalanced, so that the F1 of the other class differs
    logits = torch.randn(50, 2, generator=generator) + torch.nn.functional.one_hot(labels, 2)
    task = classes(["a", "b"], metrics=list(CLASSIFICATION))
    predicted = task.predict(logits)
    assert measured(task, name, predicted, labels) == pytest.approx(naive(predicted, labels), abs=1e-5)


def test_metrics_of_three_classes_equal_naive_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (60,), generator=generator)
    task = classes(["a", "b", "c"], metrics=("accuracy", "macro_f1"))
    predicted = task.predict(torch.randn(60, 3, generator=generator) + torch.nn.functional.one_hot(labels, 3))
    assert measured(task, "accuracy", predicted, labels) == pytest.approx(accuracy(predicted, labels), abs=1e-6)
    macro = sum(f1_of(number)(predicted, labels) for number in range(3)) / 3
    assert measured(task, "macro_f1", predicted, labels) == pytest.approx(macro, abs=1e-6)


def test_balanced_accuracy_is_the_mean_recall_of_the_classes_that_occur() -> None:
    task = classes(["a", "b", "c", "d"], metrics=("balanced_accuracy",))
    labels, predicted = (torch.tensor(rows).repeat(4) for rows in ([0, 0, 0, 0, 1, 1, 2], [0, 0, 0, 3, 1, 0, 2]))
    assert measured(task, "balanced_accuracy", predicted, labels) == pytest.approx((3 / 4 + 1 / 2 + 1) / 3, abs=1e-15)
    constant = torch.zeros_like(labels)
    assert measured(task, "balanced_accuracy", constant, labels) == pytest.approx(1 / 3, abs=1e-15)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("name", "naive"),
    [
        ("pearson", pearson),
        ("spearman", spearman),
        ("mse", lambda p, t: sum((a - b) ** 2 for a, b in zip(p, t, strict=True)) / len(p)),
    ],
)
def test_metrics_of_scores_equal_naive_ones(name: str, naive: Callable[[Tensor, Tensor], float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(6, (50,), generator=generator).float()  # with ties, as STS-B has
    task = scores()
    predicted = task.predict((labels + 2 * torch.randn(50, generator=generator))[:, None])
    assert measured(task, name, predicted, labels) == pytest.approx(float(naive(predicted, labels)), abs=1e-5)


def test_chance_is_what_a_prediction_without_looking_scores() -> None:
    labels = torch.tensor([0, 2, 2, 1, 2])
    assert classes(["a", "b", "c"]).majority_baseline(labels) == {"accuracy": pytest.approx(0.6), "matthews_corrcoef": 0.0}
    targets = torch.tensor([0.0, 1.0, 5.0])
    assert scores().majority_baseline(targets) == {"pearson": 0.0, "spearman": 0.0, "mse": pytest.approx((4 + 1 + 9) / 3)}


def test_only_an_error_is_better_when_lower() -> None:
    assert [name for name in (*CLASSIFICATION, *REGRESSION) if not higher_is_better(name)] == ["mse"]


# Losses


def test_the_hard_loss_of_classes_is_the_mean_negative_log_likelihood() -> None:
    logits, labels = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 1, 1, 0])
    naive = [
        -math.log(math.exp(row[n]) / sum(map(math.exp, row))) for row, n in zip(logits.tolist(), labels.tolist(), strict=True)
    ]
    task = classes(["a", "b", "c"])
    assert float(task.hard(logits, labels)) == pytest.approx(sum(naive) / 5, abs=1e-6)
    assert task.hard(logits, labels, reduction="none").tolist() == pytest.approx(naive, abs=1e-6)


@pytest.mark.parametrize("loss", ["kl", "ce", "mse"])
def test_the_soft_loss_of_classes_is_the_one_that_is_named(loss: str) -> None:
    student, teacher = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    p, q = (student / 3).softmax(-1), (teacher / 3).softmax(-1)
    expected = {
        "kl": 9 * (q * (q / p).log()).sum(-1).mean(),
        "ce": -(q * p.log()).sum(-1).mean(),
        "mse": ((student - teacher) ** 2).sum(-1).mean(),
    }[loss]
    torch.testing.assert_close(classes(["a", "b", "c"]).soft(student, teacher, 3.0, loss), expected)


@pytest.mark.parametrize(("task", "width"), [(classes(["a", "b", "c"]), 3), (scores(), 1)])
@pytest.mark.parametrize("loss", ["hard", "kl", "ce", "mse"])
def test_each_examples_loss_is_that_of_a_batch_of_it_alone_with_its_gradient(task: Task, width: int, loss: str) -> None:
    student, teacher = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels, weights = task.label_tensor([0, 2, 1, 1, 0]), torch.tensor([2.0, 0.0, -1.0, 0.5, 1.0]).double()
    student.requires_grad_()

    def value(rows: slice, reduction: str | None = None) -> Tensor:
        if loss == "hard":
            return task.hard(student[rows], labels[rows], reduction or "mean")
        return task.soft(student[rows], teacher[rows], 3.0, loss, reduction or "batchmean")

    alone = [value(slice(row, row + 1)) for row in range(5)]
    found = value(slice(None), "none")
    torch.testing.assert_close(found, torch.stack(alone))
    torch.testing.assert_close(found.mean(), value(slice(None)))
    (gradient,) = torch.autograd.grad((weights * found).sum(), student, retain_graph=True)
    slopes = [torch.autograd.grad(each, student)[0] for each in alone]
    torch.testing.assert_close(gradient, sum(w * slope for w, slope in zip(weights, slopes, strict=True)))
    if loss == "hard":
        with pytest.raises(ValueError, match="'sum' is not one of mean, none"):
            value(slice(None), "sum")


def test_a_regressions_loss_does_not_broadcast_a_column_against_a_row() -> None:
    logits, labels = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1.0, 2.0, 1.0])
    assert float(scores().hard(logits, labels)) == pytest.approx(3.0)
    assert scores().predict(logits).shape == (3,)
    with pytest.raises(ValueError, match="one output, not 2"):
        scores().hard(torch.zeros(3, 2), labels)
    assert scores().hard(logits, labels, reduction="none").tolist() == [0.0, 0.0, 9.0]
    assert scores().soft(logits, labels[:, None], 1.0, reduction="none").tolist() == [0.0, 0.0, 9.0]
    for reduction in ("batchmean", "none"):
        with pytest.raises(ValueError, match="shape"):
            scores().soft(logits, labels, 1.0, reduction=reduction)


def test_a_regressions_soft_loss_ignores_temperature_form_and_reduction() -> None:
    student, teacher = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [2.0]])
    for temperature in (1.0, 10.0):
        for loss in ("kl", "ce", "mse"):
            for reduction in ("batchmean", "elementmean", "sum"):
                assert float(scores().soft(student, teacher, temperature, loss, reduction)) == pytest.approx(2.0)


@pytest.mark.parametrize(("task", "width"), [(classes(["a", "b"]), 2), (scores(), 1)])
def test_losses_of_bfloat16_logits_are_computed_in_float32(task: Task, width: int) -> None:
    logits = torch.randn(8, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = task.label_tensor([0, 1] * 4)
    assert task.hard(logits, labels).dtype == torch.float
    torch.testing.assert_close(task.hard(logits, labels), task.hard(logits.float(), labels))
    assert task.soft(logits, logits + 1, 2.0).dtype == torch.float
    assert torch.equal(task.hard(logits, labels, "none"), task.hard(logits.float(), labels, "none"))
    each = task.soft(logits, logits + 1, 2.0, reduction="none")
    assert torch.equal(each, task.soft(logits.float(), (logits + 1).float(), 2.0, reduction="none"))


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("constant", ["predictions", "labels"])
def test_matthews_correlation_with_a_constant_is_zero(classes: int, constant: str) -> None:
    task = Classification("toy", [str(n) for n in range(classes)], {}, ["matthews_corrcoef"], "matthews_corrcoef")
    varied, same = torch.arange(100) % 7 % classes, torch.ones(100, dtype=torch.long)
    metric = task.metric("matthews_corrcoef")
    metric.update(*((same, varied) if constant == "predictions" else (varied, same)))
    assert metric.compute() == 0.0
