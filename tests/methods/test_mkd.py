"""MKD: its loss, and that its default is of logits alone. Mixtures of tasks are tested in `tests/test_mixture.py`."""

import pytest
import torch
from torch import Tensor

from kd.build.instantiate import build_method
from kd.config.compose import compose, typed
from kd.data.batch import Batch
from kd.data.tasks import Classification, Regression
from kd.forward import Forward, Needs, Outputs
from kd.methods.base import Method, Progress, Step

CLASSES = Classification("toy", ["no", "maybe", "yes"], {}, ["accuracy"], "accuracy")
SCORES = Regression("toy", ["pearson"], "pearson")
STUDENT, TEACHER = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([0, 2, 1, 1])


def step(student: Tensor, teacher: Tensor, labels: Tensor, task: object = CLASSES) -> Step:
    """A step whose models show these logits."""

    def forward(logits: Tensor) -> Forward:
        return Forward(lambda inputs, needs: Outputs(logits, torch.ones(len(logits), 1).bool(), needs), {}, Needs())

    batch = Batch({}, ({},), labels, torch.arange(len(labels)))
    return Step(forward(student), [forward(teacher)], batch, task, Progress())


def configured(*overrides: str) -> tuple[Method, dict[str, float]]:
    """The method of `conf/method/mkd.yaml`, and its weights at the start."""
    spec = typed(compose(["method=mkd", *overrides]))
    method, weights = build_method(spec.method, spec.pool, spec.cohort, [1.0])
    return method, {name: weight(0.0) for name, weight in weights.items()}


@pytest.mark.parametrize(("reduction", "expected"), [("batchmean", 5.0), ("elementmean", 2.5)])
def test_loss_is_the_squared_error_of_logits(reduction: str, expected: float) -> None:
    """The numbers of the card: z_T = [2, -1] and z_S = [1, 1]."""
    method, weights = configured(f"method.reduction={reduction}")
    student, teacher = torch.tensor([[1.0, 1.0]]).double(), torch.tensor([[2.0, -1.0]]).double()
    terms = method.terms(step(student, teacher, torch.tensor([0])))
    assert terms["logits"].item() == pytest.approx(expected, abs=1e-12)
    assert weights == {"task": 0.0, "logits": 1.0}


def test_a_shift_of_all_logits_costs_its_square() -> None:
    """Other than a divergence, which does not see it."""
    method, _ = configured()
    assert method.terms(step(TEACHER, TEACHER, LABELS))["logits"].item() == 0.0
    shifted = method.terms(step(TEACHER + 3.0, TEACHER, LABELS))["logits"]
    assert shifted.item() == pytest.approx(9.0, abs=1e-12)


def test_temperature_does_not_enter() -> None:
    one, other = (configured(f"method.temperature={value}")[0].terms(step(STUDENT, TEACHER, LABELS)) for value in (1, 5))
    assert torch.equal(one["logits"], other["logits"])


def test_scores_have_the_same_loss() -> None:
    method, _ = configured()
    student, teacher = STUDENT[:, :1], TEACHER[:, :1]
    terms = method.terms(step(student, teacher, torch.rand(4).double(), SCORES))
    torch.testing.assert_close(terms["logits"], ((student - teacher) ** 2).mean())
