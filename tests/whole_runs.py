"""Whole runs on the toy task: planned, made, stopped on the way, and made by several processes."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from omegaconf import OmegaConf
from transformers import AutoModelForSequenceClassification

from kd.build.check import check_run
from kd.build.parts import examples_of
from kd.config.compose import compose
from kd.results.predictions import SplitPredictions, read_predictions
from kd.runs.members import members
from kd.runs.plan import plan
from kd.runs.run import Run
from kd.training import execute, trainer
from kd.training import fit as fitting
from processes import Command, free_port

Small = Callable[..., list[str]]


def pool(backbone: Path, *names: str) -> list[str]:
    """Overrides of teachers that are fine-tuned on the toy task in a moment."""
    each = [(f"teacher.{name}.backbone={backbone}", f"teacher.{name}.run.optimizer.lr=5e-3") for name in names]
    epochs = [f"teacher.{name}.run.trainer.max_epochs=1" for name in names]
    return [f"teacher=[{','.join(names)}]", *(word for words in each for word in words), *epochs]


def planned(overrides: list[str]) -> Run:
    """The run of these overrides."""
    return plan(compose(overrides), overrides)


def over(base: list[str]) -> Callable[..., Run]:
    """Runs of these overrides with further ones. Plain keys are laid over without composing again, to save time."""
    composed = compose(base)

    def laid_over(*more: str) -> Run:
        if all(re.match(r"(seed|\w+(\.\w+)+)=", word) for word in more):
            return plan(OmegaConf.merge(composed, OmegaConf.from_dotlist(list(more))), [*base, *more])
        return planned([*base, *more])

    return laid_over


def checked(plan_of: Callable[..., Run], *more: str) -> None:
    """Plan a run and build it with shapes in place of weights, as is done before anything is trained."""
    run = plan_of(*more)
    check_run(run, examples_of(run))


def made(overrides: list[str]) -> tuple[Run, dict]:
    """The run of these overrides, and its record."""
    run = planned(overrides)
    return run, execute.execute(run)


def weights(run: Run) -> dict[str, torch.Tensor]:
    """Those of the exported classifier."""
    return AutoModelForSequenceClassification.from_pretrained(run.student).state_dict()


def last_weights(run: Run, prefix: str = "") -> dict[str, torch.Tensor]:
    """Return the weights at the end of training; the exported student may be of an earlier epoch."""
    found = torch.load(run.checkpoints / "last.ckpt", weights_only=True)["state_dict"]
    return {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Return whether two state dictionaries are bitwise equal."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class StopAfter(Callback):
    """A callback that ends a run at a batch, as a kill would: nothing is saved after it."""

    def __init__(self, batches: int, error: type[BaseException]) -> None:
        self.left, self.error = batches, error

    def on_train_batch_end(self, *_: object) -> None:
        self.left -= 1
        if not self.left:
            raise self.error("stopped")


def broken_off(run: Run, batches: int, monkeypatch: pytest.MonkeyPatch, error: type[BaseException] = RuntimeError) -> None:
    """Begin a run, its inputs done, and end it after so many batches."""
    for _, needed in run.inputs:
        execute.execute(needed)
    original = trainer.build_trainer

    def build(*arguments: object) -> object:
        trainer = original(*arguments)
        trainer.callbacks.append(StopAfter(batches, error))
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "build_trainer", build)
        # Lightning raises a KeyboardInterrupt of its own, without words.
        with pytest.raises(error, match=None if error is KeyboardInterrupt else "stopped"):
            execute.execute(run)
    assert run.result is None


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": lambda given, labels: (given == labels).mean(),
    "f1": lambda given, labels: 2 * (given * labels).sum() / (given + labels).sum(),
    "matthews_corrcoef": lambda given, labels: np.corrcoef(given, labels)[0, 1] if given.std() > 0 else 0.0,
    "pearson": lambda given, labels: np.corrcoef(given, labels)[0, 1],
    "mse": lambda given, labels: ((given - labels) ** 2).mean(),
}
"""Metrics of predictions, which are classes or scores."""


def scores(logits: np.ndarray, labels: np.ndarray, names: Iterable[str]) -> dict[str, float]:
    """Return metrics of logits by name."""
    given = logits[:, 0].astype(np.float64) if logits.shape[1] == 1 else logits.argmax(1)
    return {name: float(METRICS[name](given, labels)) for name in names}


def check_metrics(split: SplitPredictions, record: dict, name: str) -> None:
    """Check that the metrics of all models of a record on a split, and their agreement, follow from the predictions."""
    labels = split.labels
    assert split.students.keys() == record["students"].keys()
    assert split.teachers.keys() == record["metrics_teacher"].keys()
    for student, logits in split.students.items():
        entry = record["students"][student]
        assert scores(logits, labels, entry["metrics"][name]) == pytest.approx(entry["metrics"][name], rel=1e-5), student
        for teacher, theirs in split.teachers.items():
            predicted = theirs[:, 0] if theirs.shape[1] == 1 else theirs.argmax(1)
            (agreement,) = scores(logits, predicted, ["pearson" if theirs.shape[1] == 1 else "accuracy"]).values()
            assert agreement == pytest.approx(entry["agreement"][name][teacher], rel=1e-4), (student, teacher)
    for teacher, logits in split.teachers.items():
        expected = record["metrics_teacher"][teacher][name]
        assert scores(logits, labels, expected) == pytest.approx(expected, rel=1e-5), teacher


def check_predictions(run: Run, record: dict) -> None:
    """Check that a run kept predictions for all its splits, from which the metrics of its record follow, for each task."""
    for one in members(run).values():
        of_task = record if one.member is None else record["tasks"][one.member]
        predictions = read_predictions(run.directory, one.member)
        evaluated = [name for name, values in of_task["metrics"].items() if values]
        assert list(predictions.splits) == evaluated
        for name, split in predictions.splits.items():
            assert split.index.tolist() == list(range(of_task["examples"][name]))
            assert all(logits.dtype == np.float32 for logits in (*split.students.values(), *split.teachers.values()))
            check_metrics(split, of_task, name)


def roles(run: Run) -> list[str]:
    """The roles of the runs that a run needs, in order."""
    return [str(role) for role, _ in run.inputs]


def torchrun(overrides: list[str], interpreters: bool = False, timeout: float = 240) -> None:
    """Make a run in two processes on this machine.

    Args:
        overrides: of the run.
        interpreters: start new interpreters, as a user does: sets have another order in each. Else they are forked.
        timeout: seconds it may take.

    Raises:
        AssertionError: with what they said, if they fail.
    """
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}", "-m", "kd.train"]
    if interpreters:
        whole = [sys.executable, *launcher, *overrides]
        made = subprocess.run(whole, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, check=False)
        assert made.returncode == 0, made.stdout
        return
    process = Command([*launcher, *overrides])
    try:
        output, _ = process.communicate(timeout)
    finally:
        process.kill()
    assert process.returncode == 0, output
