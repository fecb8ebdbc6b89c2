"""Annealing distillation: the card's numbers, its schedule, and its two phases as runs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kd.data.batch import Batch
from kd.data.tasks import Classification, Regression
from kd.errors import InputError
from kd.forward import Forward, Outputs
from kd.methods.annealing_kd import AnnealingKD
from kd.methods.base import Progress, Step
from kd.training import execute
from whole_runs import broken_off, last_weights, made, planned, same_weights

Small = Callable[..., list[str]]
TASK = Classification("toy", ["no", "yes"], {}, ["accuracy"], "accuracy")
SHORT = ["method=annealing_kd", "method.before.run.trainer.max_epochs=2", "method.before.tau_max=2", "trainer.max_epochs=1"]


def term(
    student: Tensor, teacher: Tensor, progress: Progress, label: int = 0, task: object = TASK, **arguments: object
) -> float:
    def shown(logits: Tensor) -> Forward:
        outputs = Outputs(logits, torch.ones(len(logits), 2).bool())
        return Forward(lambda *_: outputs, {}, outputs.needs)

    method = AnnealingKD(**{"tau_max": 10, "epochs": 10, **arguments})
    batch = Batch({}, ({},), torch.full((len(student),), label), torch.arange(len(student)))
    return float(method.terms(Step(shown(student), [shown(teacher)], batch, task, progress))["logits"])


def epoch(number: int, of: int) -> Progress:
    return Progress(step=7 * number, total=7 * of, epoch=number)


def factor(number: int, **arguments: int) -> float:
    """Return the factor of the teacher's logits in an epoch, from the term, a parabola with its minimum at that multiple."""
    teacher = torch.tensor([[1.0, -1.0]]).double()
    at_zero = term(0 * teacher, teacher, epoch(number, arguments["epochs"]), **arguments)
    return at_zero**0.5


def test_factors_rise_to_one_in_equal_parts() -> None:
    assert [factor(n, tau_max=10, epochs=10) for n in range(10)] == pytest.approx([n / 10 for n in range(1, 11)])
    expected = [n / 7 for n in (1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7)]
    assert [factor(n, tau_max=7, epochs=14) for n in range(14)] == pytest.approx(expected)
    assert [factor(n, tau_max=1, epochs=3) for n in range(3)] == [1.0] * 3


def test_the_factor_changes_at_the_first_step_of_an_epoch_whatever_the_number_of_steps() -> None:
    for steps in (3, 7, 11, 49):
        found = [AnnealingKD(3, 6).factor(Progress(step, 6 * steps).fraction) for step in range(6 * steps)]
        assert found == pytest.approx([(1 + step // (2 * steps)) / 3 for step in range(6 * steps)])


def test_the_loss_is_the_number_of_the_card() -> None:
    teacher, student = torch.tensor([[2.0, -1.0]]).double(), torch.tensor([[0.5, 0.5]]).double()
    half = epoch(4, 10)  # 5/10
    assert term(student, teacher, half) == pytest.approx(0.625)
    assert term(student, teacher, half, reduction="batchmean") == pytest.approx(1.25)
    assert term(teacher / 2, teacher, half) == 0.0
    assert term(teacher, teacher, half) == pytest.approx(0.25 * 2.5)
    assert term(teacher, teacher, epoch(9, 10)) == 0.0


def test_labels_do_not_enter_and_a_shift_of_the_logits_does() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 2, generator=generator).double() for _ in range(2))
    plain = term(student, teacher, epoch(2, 10))
    assert term(student, teacher, epoch(2, 10), label=1) == plain
    assert abs(term(student, teacher + 1, epoch(2, 10)) - plain) > 1e-3
    divergence = term(student, teacher, epoch(2, 10), loss="kl")
    target = (0.3 * teacher).softmax(-1)
    assert divergence == pytest.approx(float((target * (target.log() - student.log_softmax(-1))).sum(-1).mean() / 2))


def test_scores_of_a_regression_are_not_broadcast() -> None:
    student, teacher = torch.tensor([[1.0], [2.0]]).double(), torch.tensor([[3.0], [5.0]]).double()
    task = Regression("toy", ["pearson"], "pearson")
    assert term(student, teacher, epoch(9, 10), task=task) == pytest.approx((4 + 9) / 2)


@pytest.mark.parametrize(("tau_max", "epochs"), [(10, 25), (10, 15), (7, 3), (0, 4), (2.5, 5)])
def test_a_number_of_steps_that_does_not_divide_the_epochs_is_refused(tau_max: float, epochs: int) -> None:
    with pytest.raises(InputError) as error:
        AnnealingKD(tau_max, epochs)  # type: ignore[arg-type]
    assert error.value.key == "tau_max"


def test_the_error_reaches_the_command_before_anything_is_trained(small: Small) -> None:
    run = planned(small(*SHORT, "method.before.tau_max=3"))
    with pytest.raises(InputError, match=r"2 epochs cannot be divided into; take .* 3 epochs") as error:
        execute.execute(run)
    assert error.value.key == "method.before.tau_max"
    assert not any(needed.directory.is_dir() and needed.result is None for _, needed in run.inputs)


def test_phase_two_begins_from_phase_one_and_does_not_hear_the_teacher(small: Small) -> None:
    run, result = made(small(*SHORT))
    first = run.inputs.before
    assert first.result is not None
    assert first.result["weights"] == {"logits": 1.0}
    assert (first.result["epochs"], result["epochs"]) == (2, 1)
    assert first.result["teacher_forwards"]["minilm"]["batches_used"] > 0
    assert result["teacher_forwards"]["minilm"]["batches_used"] == 0
    assert result["init"].startswith("run annealing_kd_logits, begun from first layers [1, 2] of the pre-trained backbone")
    assert result["inputs"]["before"] == first.name
    assert result["seconds"]["before"] == first.result["seconds"]["train"] > 0


def test_a_phase_two_that_is_broken_off_goes_on_to_the_same_weights(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    words = small(*SHORT, "seed=3", "trainer.max_epochs=2")
    run = planned(words)
    broken_off(run, 8, monkeypatch)
    execute.execute(run)
    kept = last_weights(run)
    (run.directory / "result.json").unlink()
    execute.execute(planned([*words, "resume=false"]))
    assert same_weights(kept, last_weights(run))
