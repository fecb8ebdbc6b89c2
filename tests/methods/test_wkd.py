"""WKD: the sum of losses is the loss against the weighted mean of the probabilities."""

import pytest
import torch
from torch import Tensor

from kd.data.batch import Batch
from kd.data.tasks import Classification
from kd.forward import Forward, Needs, Outputs
from kd.methods.base import Progress, Step
from kd.methods.kd import KD
from kd.methods.wrappers.ensemble import Ensemble

TASK = Classification("toy", ["no", "maybe", "yes"], {}, ["accuracy"], "accuracy")
STUDENT, *TEACHERS = 2 * torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
WEIGHTS = [0.5, 0.3, 0.2]


def forward(logits: Tensor) -> Forward:
    return Forward(lambda inputs, needs: Outputs(logits, torch.ones(len(logits), 1).bool(), needs), {}, Needs())


def step(student: Tensor, teachers: list[Tensor]) -> Step:
    batch = Batch({}, ({},) * len(teachers), torch.tensor([0, 2, 1, 1, 0]), torch.arange(5))
    return Step(forward(student), [forward(logits) for logits in teachers], batch, TASK, Progress())


def mean_probabilities(temperature: float = 1.0) -> Tensor:
    return sum(w * (logits / temperature).softmax(-1) for w, logits in zip(WEIGHTS, TEACHERS, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_cross_entropies_add_up_to_the_one_against_the_mean_probabilities(temperature: float) -> None:
    found = Ensemble(KD(temperature, "ce"), WEIGHTS).terms(step(STUDENT, TEACHERS))
    expected = -(mean_probabilities(temperature) * (STUDENT / temperature).log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(found["logits"], expected)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradient_of_the_divergences_is_that_of_the_one_from_the_mean_probabilities(temperature: float) -> None:
    student = STUDENT.clone().requires_grad_()
    found = Ensemble(KD(temperature, "kl"), WEIGHTS).terms(step(student, TEACHERS))["logits"]
    target = mean_probabilities(temperature)
    whole = (target * (target.log() - (student / temperature).log_softmax(-1))).sum(-1).mean() * temperature**2
    assert found > whole  # by what the teachers disagree
    torch.testing.assert_close(*(torch.autograd.grad(value, student)[0] for value in (found, whole)))


def test_it_is_not_the_mean_of_the_logits() -> None:
    found = Ensemble(KD(1.0, "ce"), WEIGHTS).terms(step(STUDENT, TEACHERS))["logits"]
    logits = sum(w * each for w, each in zip(WEIGHTS, TEACHERS, strict=True))
    assert abs(found - KD(1.0, "ce").terms(step(STUDENT, [logits]))["logits"]) > 0.01


def test_the_hard_loss_is_counted_once() -> None:
    found = Ensemble(KD(1.0), WEIGHTS).terms(step(STUDENT, TEACHERS))
    torch.testing.assert_close(found["task"], KD(1.0).terms(step(STUDENT, TEACHERS[:1]))["task"])


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 0, 1)])
def test_the_order_of_teachers_and_weights_changes_nothing(order: tuple[int, ...]) -> None:
    one = Ensemble(KD(2.0), WEIGHTS).terms(step(STUDENT, TEACHERS))
    other = Ensemble(KD(2.0), [WEIGHTS[n] for n in order]).terms(step(STUDENT, [TEACHERS[n] for n in order]))
    for name in one:
        torch.testing.assert_close(one[name], other[name])
    swapped = Ensemble(KD(2.0), [WEIGHTS[n] for n in order]).terms(step(STUDENT, TEACHERS))
    assert abs(swapped["logits"] - one["logits"]) > 1e-3


def test_all_weight_on_one_teacher_is_that_teacher_alone() -> None:
    found = Ensemble(KD(2.0), [0.0, 1.0, 0.0]).terms(step(STUDENT, TEACHERS))
    expected = KD(2.0).terms(step(STUDENT, TEACHERS[1:2]))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
