"""Training steps wait for no accelerator: they run on a device whose values cannot be read."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from unreadable import DEVICE, swapped, unreadable

from kd.build.data import build_data
from kd.build.engine import build_engine
from kd.build.models import build_models
from kd.build.parts import examples_of
from kd.engines.base import Engine
from kd.engines.nonfinite import LATEST
from kd.runs.run import Run
from kd.system import hardware
from kd.training.rows import TrainOccurringRows, plan_tables, readers_of
from kd.training.trainer import build_trainer, callbacks_of
from whole_runs import planned

Small = Callable[..., list[str]]


class Unreadable(CPUAccelerator):
    """The accelerator of one meta device."""

    def setup_device(self, device: torch.device) -> None:
        """Nothing to set up."""


class OneDevice(SingleDeviceStrategy):
    """Strategy of the meta device, from which nothing can be moved back."""

    def __init__(self) -> None:
        super().__init__(DEVICE, accelerator=Unreadable())

    def teardown(self) -> None:
        """Nothing to tear down."""


class Enough(Exception):
    """Raised after a few steps."""


class Stop(pl.Callback):
    """Forgets what the set-up has copied, and ends training before the losses of two students are checked, or any logged."""

    def __init__(self) -> None:
        self.waits: list[str] = []
        self.steps = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget."""
        self.waits.clear()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Stop."""
        assert pl_module.device == DEVICE
        self.steps += 1
        if self.steps == LATEST // 2 - 1:
            raise Enough


def train(run: Run, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Train a run with all its callbacks on the device; return the copies that its steps waited for."""
    run.directory.mkdir(parents=True, exist_ok=True)
    run = replace(run, spec=replace(run.spec, trainer=replace(run.spec.trainer, accelerator="auto")))
    (examples,) = examples_of(run).values()
    data, models = build_data(run, examples, build_models(run, examples.task, texts=examples.texts["train"]))
    engine = build_engine(run, models, examples.task)
    rows = TrainOccurringRows(plan_tables(readers_of(models, data), engine, run.spec.trainer))
    monkeypatch.setattr("kd.training.trainer.strategy_of", lambda *given: OneDevice())
    for loop in ("fit_loop", "evaluation_loop"):  # they read the lengths of the loaders from the device, once
        monkeypatch.setattr(f"lightning.pytorch.loops.{loop}.has_len_all_ranks", lambda *given, **more: True)
    trainer = build_trainer(run, engine, None, callbacks=[*callbacks_of(run, engine), rows, stop := Stop()])
    with unreadable(monkeypatch) as stop.waits, swapped(), pytest.raises(Enough):
        trainer.fit(engine, datamodule=data)
    return stop.waits


@pytest.mark.parametrize(
    "words", [["method=finetune"], ["method=dml", "engine.update=sequential"]], ids=["automatic", "manual"]
)
def test_the_whole_loop_waits_for_no_step(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    # A fused optimiser refuses this device; on a GPU it keeps its steps there.
    more = ["teacher=[]", "optimizer.factory.fused=false", "trainer.batch_size=8", "trainer.progress=plain"]
    assert train(planned(small(*words, *more, f"paths.runs={tmp_path}")), monkeypatch) == []


def test_reading_a_loss_in_a_step_is_noticed(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["method=finetune", "teacher=[]", "optimizer.factory.fused=false", f"paths.runs={tmp_path}"]
    monkeypatch.setattr(Engine, "note", lambda engine, loss, batch: float(loss.total))
    with pytest.raises(RuntimeError, match="item"):
        train(planned(small(*words)), monkeypatch)


@pytest.mark.parametrize(
    "copy",
    [
        lambda values: torch.tensor([1, 0], device=DEVICE),
        lambda values: values[[1, 0]],
        lambda values: values[torch.tensor([1, 0])],
        lambda values: values.copy_(torch.ones(2)),
        lambda values: torch.ones(2).to(DEVICE),
    ],
    ids=["tensor", "list", "index", "copy", "to"],
)
def test_copies_that_a_step_would_wait_for_are_noticed(
    copy: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.ones(2, device=DEVICE)
    with unreadable(monkeypatch) as waits:
        hardware.to_device(torch.ones(2), DEVICE)
        _ = values * torch.tensor(2.0)  # one number is passed to the kernel
        assert not waits
        copy(values)
    assert len(waits) == 1
