"""Optimisers: what decays, what the rate is at each step, and what is refused."""

import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from conftest import tiny_model
from kd.build.check import check_optimizer_steps
from kd.build.instantiate import build_optimizer
from kd.config.compose import compose, typed
from kd.config.schema import RunSpec
from kd.engines.optimizer import OptimizerFactory
from kd.errors import InputError
from kd.training.execute import check_all
from whole_runs import Small, planned


def factory(**changes: object) -> OptimizerFactory:
    settings = {"make": torch.optim.AdamW, "lr": 1e-3, "weight_decay": 0.01, "schedule": "linear", "warmup": 0.1}
    return OptimizerFactory(**{**settings, **changes})


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "mpnet"])
def test_biases_and_normalisation_weights_do_not_decay(family: str) -> None:
    model = tiny_model(model_type=family, layers=2)
    groups = factory().optimizer(model).param_groups
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        plain = name.endswith("bias") or "norm" in name.lower()
        assert decay[id(parameter)] == (0.0 if plain else 0.01), name


def test_shared_parameters_are_optimised_once() -> None:
    student, method = nn.Linear(3, 3), nn.ModuleList([nn.Linear(3, 3)])
    method.append(student)
    method[0].weight = student.weight
    parameters = [parameter for group in factory().groups([student, method]) for parameter in group["params"]]
    assert len(parameters) == 3
    assert len({id(parameter) for parameter in parameters}) == 3


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    model[1].requires_grad_(False)
    model[0].bias.requires_grad_(False)
    groups = factory().groups([model])
    assert [group["params"] for group in groups] == [[model[0].weight]]


def test_optimiser_has_the_peak_rate_and_the_given_class() -> None:
    optimizer = factory(make=torch.optim.SGD, lr=0.3).optimizer(nn.Linear(2, 2))
    assert isinstance(optimizer, torch.optim.SGD)
    assert {group["lr"] for group in optimizer.param_groups} == {0.3}


@pytest.mark.parametrize(
    ("schedule", "warmup", "total", "factors"),
    [
        # 4 steps of warm-up rise by fifths, because step 0 already trains; then the peak, then decay to zero at `total`.
        ("linear", 0.4, 10, {0: 0.2, 1: 0.4, 3: 0.8, 4: 1.0, 7: 0.5, 9: 1 / 6, 10: 0.0, 12: 0.0}),
        ("cosine", 0.4, 10, {0: 0.2, 4: 1.0, 6: 0.75, 7: 0.5, 10: 0.0}),
        ("constant", 0.4, 10, {0: 0.2, 4: 1.0, 9: 1.0, 12: 1.0}),
        ("linear", 0.0, 4, {0: 1.0, 1: 0.75, 3: 0.25, 4: 0.0}),
        ("linear", 1.0, 3, {0: 0.25, 2: 0.75}),
        ("linear", 0.1, 1, {0: 1.0}),
        ("linear", 0.1, 0, {0: 1.0}),
    ],
    ids=lambda value: str(value) if isinstance(value, str | float) else "",
)
def test_rate_is_multiplied_by(schedule: str, warmup: float, total: int, factors: dict[int, float]) -> None:
    made = factory(schedule=schedule, warmup=warmup)
    assert {step: made.factor(step, total) for step in factors} == pytest.approx(factors)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("total", [1, 7, 50])
def test_no_step_of_training_has_a_zero_rate(schedule: str, total: int) -> None:
    made = factory(schedule=schedule)
    assert all(0 < made.factor(step, total) <= 1 for step in range(total))


def test_scheduler_steps_the_rate_of_every_group() -> None:
    made = factory(warmup=0.5, lr=0.1)
    optimizer = made.optimizer(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    scheduler = made.scheduler(optimizer, total=4)
    seen = []
    for _ in range(4):
        seen.append({group["lr"] for group in optimizer.param_groups})
        optimizer.step()
        scheduler.step()
    for rates, expected in zip(seen, (1 / 3, 2 / 3, 1, 1 / 2), strict=True):
        assert list(rates) == pytest.approx([0.1 * expected])


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"lr": 0.0}, "optimizer.lr"),
        ({"lr": -1e-3}, "optimizer.lr"),
        ({"lr": math.nan}, "optimizer.lr"),
        ({"warmup": 1.1}, "optimizer.warmup"),
        ({"warmup": -0.1}, "optimizer.warmup"),
        ({"warmup": math.nan}, "optimizer.warmup"),
        ({"weight_decay": -0.01}, "optimizer.weight_decay"),
        ({"schedule": "liner"}, "optimizer.schedule"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused_by_their_key(changes: dict[str, object], key: str) -> None:
    with pytest.raises(InputError) as caught:
        factory(**changes)
    assert caught.value.key == key
    assert str(next(iter(changes.values()))) in caught.value.message


# What `optimizer.factory` may name


@pytest.fixture(scope="module")
def naming() -> Callable[..., RunSpec]:
    """A configuration whose optimiser is made by what a word names."""
    composed = compose(["method=finetune", "teacher=[]"])

    def spec(target: str, accelerator: str = "cpu", **options: object) -> RunSpec:
        config = composed.copy()
        OmegaConf.update(config, "optimizer.factory", {"_target_": target, "_partial_": True, **options}, merge=False)
        config.trainer.accelerator = accelerator
        return typed(config)

    return spec


def plain(params, lr, momentum=0.0):
    """A function that says nothing of what it returns."""
    return torch.optim.SGD(params, lr=lr, momentum=momentum)


def annotated(params: list, lr: float, **options: float) -> torch.optim.SGD:
    """A function that says it."""
    return torch.optim.SGD(params, lr=lr, **options)


@pytest.mark.parametrize("function", [plain, annotated])
def test_a_function_that_returns_an_optimiser_is_taken(
    naming: Callable[..., RunSpec], function: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim, "mine", function, raising=False)
    check_optimizer_steps(naming("torch.optim.mine", momentum=0.9))
    with pytest.raises(InputError):
        check_optimizer_steps(naming("torch.optim.mine", momentum="much"))


@pytest.mark.parametrize("annotation", [None, nn.Module])
def test_a_function_that_returns_something_else_is_refused(
    naming: Callable[..., RunSpec], annotation: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def make(params, lr):
        calls.append(params)
        return nn.Linear(2, 2)

    if annotation is not None:
        make.__annotations__["return"] = annotation
    monkeypatch.setattr(torch.optim, "mine", make, raising=False)
    with pytest.raises(InputError) as caught:
        check_optimizer_steps(naming("torch.optim.mine"))
    assert caught.value.key == "optimizer.factory._target_"
    assert bool(calls) == (annotation is None), "one that says so is not even called"


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("os.system", {}),
        ("os.mkdir", {}),
        ("builtins.exec", {}),
        ("subprocess.Popen", {}),
        ("subprocess.run", {"shell": True}),
        ("hydra.utils.instantiate", {"mark": 1}),
        ("torch.optim", {}),
        ("torch.pi", {}),
        ("torch.nn.Linear", {}),
    ],
    ids=str,
)
def test_what_is_no_optimiser_executes_nothing(
    naming: Callable[..., RunSpec], target: str, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess.Popen, "_execute_child", lambda *given, **more: pytest.fail("a process was started"))
    with pytest.raises(InputError) as caught:
        check_optimizer_steps(naming(target, **options))
    assert str(caught.value.key).startswith("optimizer.factory")


# The step that is tried


class Counted(torch.optim.AdamW):
    """Counts its steps."""

    steps = 0

    def step(self, closure: object = None) -> None:
        Counted.steps += 1
        super().step(closure)


def test_a_step_is_tried_once_for_each_run_that_is_to_be_made(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim, "Counted", Counted, raising=False)
    monkeypatch.setattr(Counted, "steps", 0)
    target = "optimizer.factory._target_=torch.optim.Counted"
    run = planned(small(target, f"+teacher.minilm.run.{target}", f"paths.runs={tmp_path}"))
    check_all(run)
    assert Counted.steps == 1 + len(run.inputs) == 2


class ForGPUs(torch.optim.SGD):
    """Works on a GPU alone."""

    def step(self, closure: object = None) -> None:
        if any(not parameter.is_cuda for group in self.param_groups for parameter in group["params"]):
            raise RuntimeError("needs CUDA")
        super().step(closure)


@pytest.mark.parametrize("accelerator", ["cpu", "gpu", "auto"])
def test_an_optimiser_is_tried_where_it_will_be_used(
    naming: Callable[..., RunSpec], accelerator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim, "ForGPUs", ForGPUs, raising=False)
    spec = naming("torch.optim.ForGPUs", accelerator)
    if accelerator == "gpu" or (accelerator == "auto" and torch.cuda.is_available()):
        check_optimizer_steps(spec)
    else:
        with pytest.raises(InputError, match="needs CUDA"):
            check_optimizer_steps(spec)


def test_a_fused_optimiser_is_refused_where_gradients_are_scaled() -> None:
    spec = typed(compose(["trainer=gpu", "trainer.precision=16-mixed"]))
    with pytest.raises(InputError, match=r"optimizer\.factory\.fused=false") as caught:
        build_optimizer(spec)
    assert caught.value.key == "trainer.precision"
    spec.optimizer.factory["fused"] = False
    build_optimizer(spec)
