"""KD: the card's numbers through a step, and what its weights must do."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kd.data.batch import Batch
from kd.data.tasks import Classification, Regression
from kd.errors import InputError
from kd.forward import Forward, Needs, Outputs
from kd.functional.logits import kl_divergence, soft_cross_entropy, squared_error
from kd.methods.base import Method, Progress, Step
from kd.methods.kd import KD
from kd.schedules import Cosine, Linear, Piecewise

CLASSES = Classification("toy", ["no", "maybe", "yes"], {}, ["accuracy"], "accuracy")
SCORES = Regression("toy", ["pearson"], "pearson")
STUDENT, TEACHER = 2 * torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([0, 2, 1, 1])


def step(student: Tensor, teacher: Tensor, labels: Tensor, task: object = CLASSES, fraction: float = 0.0) -> Step:
    """A step whose models show these logits."""

    def forward(logits: Tensor) -> Forward:
        return Forward(lambda inputs, needs: Outputs(logits, torch.ones(len(logits), 1).bool(), needs), {}, Needs())

    batch = Batch({}, ({},), labels, torch.arange(len(labels)))
    return Step(forward(student), [forward(teacher)], batch, task, Progress(int(100 * fraction), 100))


def loss(method: Method, alpha: float, *args: object, **more: object) -> Tensor:
    terms = method.terms(step(*args, **more))
    return alpha * terms["logits"] + (1 - alpha) * terms["task"]


@pytest.mark.parametrize(("temperature", "soft"), [(1, 0.327813), (2, 0.443777), (4, 0.484798)])
def test_terms_are_the_numbers_of_the_card(temperature: float, soft: float) -> None:
    task = Classification("toy", ["no", "yes"], {}, ["accuracy"], "accuracy")
    student, teacher = torch.zeros(1, 2).double(), torch.tensor([[2.0, 0.0]]).double()
    terms = KD(temperature).terms(step(student, teacher, torch.tensor([0]), task))
    assert terms["logits"].item() == pytest.approx(soft, abs=1e-6)
    assert terms["task"].item() == pytest.approx(0.693147, abs=1e-6)
    halved = KD(temperature, reduction="elementmean").terms(step(student, teacher, torch.tensor([0]), task))
    assert halved["logits"].item() == pytest.approx(soft / 2, abs=1e-6)


@pytest.mark.parametrize("reduction", ["batchmean", "elementmean"])
@pytest.mark.parametrize("kind", ["kl", "ce", "mse"])
def test_soft_loss_and_reduction_are_those_named(kind: str, reduction: str) -> None:
    expected = {
        "kl": lambda: kl_divergence(STUDENT, TEACHER, 3.0, reduction),
        "ce": lambda: soft_cross_entropy(STUDENT, TEACHER, 3.0, reduction),
        "mse": lambda: squared_error(STUDENT, TEACHER, reduction),
    }[kind]()
    terms = KD(3.0, kind, reduction).terms(step(STUDENT, TEACHER, LABELS))
    torch.testing.assert_close(terms["logits"], expected)
    torch.testing.assert_close(terms["task"], F.cross_entropy(STUDENT, LABELS))


@pytest.mark.parametrize("temperature", [1.0, 5.0, 20.0])
def test_alpha_zero_is_plain_fine_tuning(temperature: float) -> None:
    found = loss(KD(temperature), 0.0, STUDENT, TEACHER, LABELS)
    assert found.item() == pytest.approx(F.cross_entropy(STUDENT, LABELS).item(), abs=1e-6)


def test_alpha_one_does_not_look_at_the_labels() -> None:
    one, other = (loss(KD(), 1.0, STUDENT, TEACHER, labels) for labels in (LABELS, LABELS.flip(0)))
    assert one.item() == other.item()
    assert loss(KD(), 0.5, STUDENT, TEACHER, LABELS) != loss(KD(), 0.5, STUDENT, TEACHER, (LABELS + 1) % 3)


def test_a_student_equal_to_its_teacher_has_no_soft_loss_and_a_hard_one() -> None:
    terms = KD().terms(step(TEACHER, TEACHER, LABELS))
    assert terms["logits"].item() == pytest.approx(0, abs=1e-12)
    assert terms["task"] > 0


@pytest.mark.parametrize("temperature", [1.0, 9.0])
def test_regression_is_two_mean_squared_errors_without_temperature(temperature: float) -> None:
    student, teacher, scores = torch.tensor([[1.0], [4.0]]), torch.tensor([[3.0], [5.0]]), torch.tensor([1.5, 2.0])
    terms = KD(temperature).terms(step(student, teacher, scores, SCORES))
    assert terms["logits"].item() == pytest.approx(((1 - 3) ** 2 + (4 - 5) ** 2) / 2)
    assert terms["task"].item() == pytest.approx((0.5**2 + 2**2) / 2)


@pytest.mark.parametrize(("fraction", "temperature"), [(0.0, 8.0), (0.5, 5.0), (1.0, 2.0)])
def test_temperature_follows_its_schedule(fraction: float, temperature: float) -> None:
    found = KD(Linear(8.0, 2.0)).terms(step(STUDENT, TEACHER, LABELS, fraction=fraction))["logits"]
    torch.testing.assert_close(found, kl_divergence(STUDENT, TEACHER, temperature))


def test_only_logits_are_needed_and_nothing_is_learnt() -> None:
    assert KD().needs() == (Needs(), [Needs()])
    assert list(KD().parameters()) == []
    assert set(KD.names) == set(KD().terms(step(STUDENT, TEACHER, LABELS)))


@pytest.mark.parametrize(
    "temperature",
    [0, -1.0, "hot", None, float("nan"), Linear(4.0, 0.0), Cosine(-1.0, 4.0), Piecewise([0.3, 0.6], [4.0, 0.0, 4.0])],
    ids=str,
)
def test_temperature_that_is_not_positive_throughout_is_refused(temperature: object) -> None:
    with pytest.raises(InputError) as caught:
        KD(temperature)
    assert caught.value.key == "temperature"


@pytest.mark.parametrize(("arguments", "key"), [({"loss": "l1"}, "loss"), ({"reduction": "none"}, "reduction")], ids=str)
def test_unknown_words_are_refused_by_their_key(arguments: dict[str, str], key: str) -> None:
    with pytest.raises(InputError, match="is not one of") as caught:
        KD(**arguments)
    assert caught.value.key == key
