"""Losses that are no number, at once and later; clipping to the bit."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kd.data.tasks import Classification
from kd.engines.distiller import Distiller
from kd.engines.nonfinite import LATEST, NonFiniteGuard, NonFiniteLoss, NonFiniteWeights, clip_gradients
from kd.system import distributed, hardware
from kd.training import execute
from whole_runs import planned

Small = Callable[..., list[str]]
GOOD, BAD = torch.tensor(1.0), torch.tensor(float("nan"))


@pytest.fixture
def deferring(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU taken for an accelerator."""
    monkeypatch.setattr(hardware, "is_asynchronous", lambda tensor: True)


def see(guard: NonFiniteGuard, step: int, total: Tensor = GOOD) -> None:
    guard.record(total, {"task": total, "hidden": GOOD}, step)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_on_the_cpu_a_loss_is_looked_at_at_once(bad: float) -> None:
    guard = NonFiniteGuard()
    see(guard, 0)
    with pytest.raises(NonFiniteLoss, match="not finite at step 1: term 'task'"):
        see(guard, 1, torch.tensor(bad))
    assert not guard.kept


@pytest.mark.usefixtures("deferring")
def test_on_an_accelerator_it_is_found_within_a_few_steps_and_names_the_first() -> None:
    guard = NonFiniteGuard()
    for step in range(20):
        see(guard, step)
    for step in range(20, 20 + LATEST - 20 % LATEST - 1):
        see(guard, step, BAD)
    assert len(guard.kept) == LATEST - 1
    with pytest.raises(NonFiniteLoss, match="not finite at step 20: term 'task'"):
        see(guard, 23)
    guard = NonFiniteGuard()
    see(guard, 4)
    see(guard, 5, BAD)
    with pytest.raises(NonFiniteLoss, match="step 5"):
        guard.flush()
    guard.flush()


@pytest.mark.usefixtures("deferring")
def test_on_an_accelerator_no_step_waits_for_the_device_but_every_eighth(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    look = NonFiniteGuard.check
    monkeypatch.setattr(NonFiniteGuard, "check", lambda guard: looks.append(1) or look(guard))
    guard = NonFiniteGuard()
    for step in range(4 * LATEST):
        see(guard, step)
    assert len(looks) == 4
    # Without a look, nothing of it may need the value: a tensor without one will do.
    see(guard, 0, torch.tensor(1.0, device="meta"))


@pytest.mark.usefixtures("deferring")
def test_before_a_checkpoint_every_rank_learns_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "gather", lambda found: [found, ({"task": float("nan")}, 3)])
    guard = NonFiniteGuard()
    guard.flush()  # nothing was trained: nobody asks
    see(guard, 3)
    with pytest.raises(NonFiniteLoss, match="not finite at step 3"):
        guard.flush()


@pytest.mark.usefixtures("deferring")
@pytest.mark.parametrize(("at", "minutes"), [(8, 5), (10, 5), (11, 5), (8, 0)])
def test_a_late_look_keeps_the_last_good_checkpoint(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, minutes: int
) -> None:
    words = ("trainer.max_epochs=3", f"trainer.checkpoint_minutes={minutes}", f"paths.runs={tmp_path}")
    run = planned(small("method=finetune", "teacher=[]", *words))
    seen = []
    original = Classification.hard

    def hard(task: Classification, logits: Tensor, labels: Tensor) -> Tensor:
        seen.append(1)
        return original(task, logits, labels) * (float("nan") if len(seen) == at + 2 else 1.0)  # the preflight's is the first

    monkeypatch.setattr(Classification, "hard", hard)
    with pytest.raises(NonFiniteLoss, match=f"not finite at step {at}: term 'task'"):
        execute.execute(run)
    for name, step in {"last": 6 if minutes else at, "best": 6}.items():
        kept = torch.load(run.checkpoints / f"{name}.ckpt", weights_only=True)
        assert kept["global_step"] == step
        assert all(torch.isfinite(tensor).all() for tensor in kept["state_dict"].values())


def gradients(seed: int, scale: float) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    found = [nn.Parameter(torch.randn(size, generator=generator)) for size in ((50, 8), (8,), (3, 3, 3))]
    for parameter in found[:-1]:
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    return found


@pytest.mark.parametrize("bound", [1e-3, 1.0, 20.0, 1e3])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e10, float("nan"), float("inf")])
def test_clipping_equals_torchs_to_the_bit(bound: float, scale: float) -> None:
    for seed in range(3):
        ours, theirs = gradients(seed, scale), gradients(seed, scale)
        norms = clip_gradients(ours, bound), nn.utils.clip_grad_norm_(theirs, bound)
        assert torch.equal(*(norm.view(torch.int32) for norm in norms))
        for one, other in zip(ours, theirs, strict=True):
            if one.grad is not None:
                assert torch.equal(one.grad.nan_to_num(7.0), other.grad.nan_to_num(7.0))


@pytest.mark.parametrize("offset", [-2e-7, -1e-7, 0.0, 1e-7, 1e-6, 2e-6, 3e-6])
def test_clipping_equals_torchs_where_the_norm_is_the_bound(offset: float) -> None:
    for seed in range(5):
        norm = float(nn.utils.get_total_norm([p.grad for p in gradients(seed, 1.0)[:-1]]))
        ours, theirs = gradients(seed, 1.0), gradients(seed, 1.0)
        clip_gradients(ours, norm * (1 + offset)), nn.utils.clip_grad_norm_(theirs, norm * (1 + offset))
        for one, other in zip(ours[:-1], theirs[:-1], strict=True):
            assert torch.equal(one.grad, other.grad)


def test_gradients_within_the_bound_are_not_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.utils, "clip_grads_with_norm_", lambda *given: pytest.fail("they were"))
    clip_gradients(gradients(0, 1.0), 1e3)
    with pytest.raises(pytest.fail.Exception):
        clip_gradients(gradients(0, 1.0), 1e-3)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_losses_are_logged_at_every_tenth_step_and_at_no_other(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    logged = []
    log_dict = Distiller.log_dict

    def counted(engine: Distiller, values: dict[str, Tensor], **options: object) -> None:
        if "train/loss" in values:
            logged.append(engine.global_step)
        log_dict(engine, values, **options)

    monkeypatch.setattr(Distiller, "log_dict", counted)
    epochs = 4 * accumulate
    words = (f"trainer.accumulate={accumulate}", f"trainer.max_epochs={epochs}", f"paths.runs={tmp_path}")
    run = planned(small("method=finetune", "teacher=[]", *words))
    execute.execute(run)
    assert logged == [step for step in (9, 19) for _ in range(accumulate)]
    with (run.directory / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert [int(row["step"]) for row in rows] == [9, 19]
    assert all(row["train/task"] == row["train/loss"] for row in rows)


class Exploding(torch.autograd.Function):
    """The identity, whose gradient is infinite."""

    @staticmethod
    def forward(context: object, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(context: object, gradient: Tensor) -> Tensor:
        return gradient * float("inf")


@pytest.mark.parametrize(
    ("at", "clip", "words"),
    [
        (5, "1.0", r"the gradient \(norm (nan|inf)\) is not finite at step 5"),
        (5, "null", r"weights, the first of them student\.\S+, are not finite at step 6"),  # the last step of the only epoch
    ],
)
def test_gradients_that_are_no_number_end_a_run_whose_losses_are_fine(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, clip: str, words: str
) -> None:
    overrides = ("trainer.max_epochs=1", f"trainer.clip={clip}", f"paths.runs={tmp_path}")
    run = planned(small("method=finetune", "teacher=[]", *overrides))
    seen = []
    original = Classification.hard

    def hard(task: Classification, logits: Tensor, labels: Tensor) -> Tensor:
        seen.append(1)
        if len(seen) == at + 2:  # the preflight's is the first
            logits = Exploding.apply(logits)
        return original(task, logits, labels)

    monkeypatch.setattr(Classification, "hard", hard)
    with pytest.raises(NonFiniteWeights, match=words) as caught:
        execute.execute(run)
    assert caught.value.key == "optimizer.lr"
    assert not list(run.checkpoints.glob("*.ckpt"))
    assert run.result is None


@pytest.mark.usefixtures("deferring")
def test_a_gradient_on_an_accelerator_is_not_waited_for() -> None:
    NonFiniteGuard().check_gradient(torch.tensor(1.0, device="meta"), 0)
