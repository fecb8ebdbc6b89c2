"""Losses between logits: the cards' numbers, loops over the papers' formulas, and what must hold for any logits."""

import math

import pytest
import torch

from kd.functional.logits import LOGIT_REDUCTIONS, kl_divergence, soft_cross_entropy, squared_error

LOSSES = (kl_divergence, soft_cross_entropy, squared_error)
TEACHER, STUDENT = torch.tensor([[2.0, 0.0]]).double(), torch.zeros(1, 2).double()


def logits(batch: int = 5, classes: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Student's and teacher's, of different scale."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, batch, classes, generator=generator, dtype=torch.float64)
    return student, 3 * teacher


def softmax(row: list[float], temperature: float) -> list[float]:
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def naive(loss: object, student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> list[list[float]]:
    """(batch, classes): the summands of a loss, one by one."""
    table = []
    for ours, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = softmax(theirs, temperature), softmax(ours, temperature)
        table.append(
            {
                kl_divergence: [temperature**2 * a * math.log(a / b) for a, b in zip(p, q, strict=True)],
                soft_cross_entropy: [-a * math.log(b) for a, b in zip(p, q, strict=True)],
                squared_error: [(a - b) ** 2 for a, b in zip(ours, theirs, strict=True)],
            }[loss]
        )
    return table


def reduce_naively(table: list[list[float]], reduction: str) -> float | list[float]:
    rows, batch, classes = [sum(row) for row in table], len(table), len(table[0])
    return {
        "batchmean": sum(rows) / batch,
        "elementmean": sum(rows) / (batch * classes),
        "sum": sum(rows),
        "none": rows,
    }[reduction]


def call(loss: object, student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0, **more: str) -> torch.Tensor:
    return loss(student, teacher, **({} if loss is squared_error else {"temperature": temperature}), **more)


@pytest.mark.parametrize("reduction", LOGIT_REDUCTIONS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 7.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_equals_the_formula_written_as_loops(loss, temperature: float, reduction: str) -> None:
    student, teacher = logits()
    expected = torch.tensor(reduce_naively(naive(loss, student, teacher, temperature), reduction), dtype=torch.float64)
    torch.testing.assert_close(call(loss, student, teacher, temperature, reduction=reduction), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("temperature", "expected"), [(1, 0.327813), (2, 0.443777), (4, 0.484798)], ids=["T=1", "T=2", "T=4"])
def test_divergence_gives_the_numbers_of_the_card(temperature: float, expected: float) -> None:
    assert kl_divergence(STUDENT, TEACHER, temperature).item() == pytest.approx(expected, abs=1e-6)


def test_temperature_two_divides_by_four_before_it_is_scaled_back() -> None:
    assert kl_divergence(STUDENT, TEACHER, 2).item() / 4 == pytest.approx(0.110944, abs=1e-6)
    assert kl_divergence(STUDENT, TEACHER, 4).item() / 16 == pytest.approx(0.0303, abs=1e-6)


def test_cross_entropy_gives_the_numbers_of_the_card() -> None:
    assert TEACHER.softmax(-1).squeeze().tolist() == pytest.approx([0.880797, 0.119203], abs=1e-6)
    assert soft_cross_entropy(STUDENT, TEACHER).item() == pytest.approx(0.693147, abs=1e-6)
    assert soft_cross_entropy(STUDENT, TEACHER, reduction="elementmean").item() == pytest.approx(0.346574, abs=1e-6)


@pytest.mark.parametrize(
    ("temperature", "size", "tolerance"),
    [(1, 0.380797, 1e-6), (100, 0.49998, 1e-5), (1e4, 0.5, 1e-6)],  # the card prints five digits at T=100
)
def test_gradient_tends_to_half_the_centred_difference(temperature: float, size: float, tolerance: float) -> None:
    student = STUDENT.clone().requires_grad_()
    kl_divergence(student, TEACHER, temperature).backward()
    assert student.grad.squeeze().tolist() == pytest.approx([-size, size], abs=tolerance)


def test_at_high_temperature_the_gradient_is_that_of_centred_logits() -> None:
    student, teacher = logits()
    student.requires_grad_()
    kl_divergence(student, teacher, 1e5, reduction="sum").backward()
    centred = [values - values.mean(-1, keepdim=True) for values in (student.detach(), teacher)]
    torch.testing.assert_close(student.grad, (centred[0] - centred[1]) / 3, rtol=0, atol=1e-4)  # the limit's error is O(1/T)


@pytest.mark.parametrize("shift", [0.0, 3.5])
@pytest.mark.parametrize("temperature", [1.0, 8.0])
def test_divergence_and_its_gradient_vanish_up_to_a_shift(temperature: float, shift: float) -> None:
    _, teacher = logits()
    student = (teacher + shift).requires_grad_()
    loss = kl_divergence(student, teacher, temperature)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert student.grad.abs().max().item() == pytest.approx(0, abs=1e-12)


def test_squared_error_sees_a_shift() -> None:
    _, teacher = logits()
    assert squared_error(teacher + 3.5, teacher).item() == pytest.approx(3.5**2)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_cross_entropy_is_divergence_plus_the_teachers_entropy(temperature: float) -> None:
    student, teacher = logits()
    entropy = torch.distributions.Categorical(logits=teacher / temperature).entropy().mean()
    divergence = kl_divergence(student, teacher, temperature) / temperature**2
    torch.testing.assert_close(soft_cross_entropy(student, teacher, temperature), divergence + entropy)


def test_divergence_is_not_symmetric() -> None:
    student, teacher = logits()
    assert kl_divergence(student, teacher) != pytest.approx(kl_divergence(teacher, student).item(), rel=0.01)


@pytest.mark.parametrize("loss", LOSSES)
def test_reductions_are_multiples_of_one_another(loss) -> None:
    student, teacher = logits(batch=5, classes=3)
    values = {name: call(loss, student, teacher, 2.0, reduction=name) for name in LOGIT_REDUCTIONS}
    assert values["none"].shape == (5,)
    for name, factor in (("batchmean", 1 / 5), ("elementmean", 1 / 15), ("sum", 1)):
        torch.testing.assert_close(values[name], values["none"].sum() * factor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_is_widened_before_anything_is_computed(loss, dtype: torch.dtype) -> None:
    student, teacher = (values.to(dtype) for values in logits())
    value = call(loss, student, teacher, 4.0)
    assert value.dtype == torch.float32
    assert value.item() == call(loss, student.float(), teacher.float(), 4.0).item()


@pytest.mark.parametrize("loss", LOSSES)
def test_no_gradient_reaches_the_teacher(loss) -> None:
    student, teacher = (values.requires_grad_() for values in logits())
    call(loss, student, teacher, 2.0).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("shape", [(5, 2), (1, 3), (3,), (5, 1)])
@pytest.mark.parametrize("loss", LOSSES)
def test_shapes_that_differ_are_refused_not_broadcast(loss, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shape"):
        call(loss, logits()[0], torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("loss", LOSSES)
def test_unknown_reduction_is_named(loss) -> None:
    with pytest.raises(ValueError, match="'mean' is not one of batchmean"):
        call(loss, *logits(), reduction="mean")
