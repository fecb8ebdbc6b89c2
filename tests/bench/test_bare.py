"""The bare loop takes the steps of the trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kd.bench import bare, harness
from kd.bench.candidates import BARE, FINETUNE, Candidate
from kd.bench.workers import Finished, Job
from kd.engines.base import Engine
from kd.errors import InputError

Small = Callable[..., list[str]]
TURNS = 2


class Gate:
    """A gate that lets a number of turns through, and notes the examples of each."""

    def __init__(self) -> None:
        self.examples: list[int] = []

    def ready(self, facts: dict[str, Any], accelerator: str) -> None:
        """Do nothing."""

    def open(self) -> None:
        if len(self.examples) == TURNS:
            raise Finished

    def close(self, examples: int) -> None:
        self.examples.append(examples)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_weights_are_those_of_the_trainer(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    """With dropout off; the last of four batches is an optimiser step of its own for `accumulate=3`."""
    engines: list[Engine] = []
    original = harness.build_engine

    def build(*arguments: Any) -> Engine:
        engines.append(original(*arguments))
        return engines[-1]

    for module in (bare, harness):
        monkeypatch.setattr(module, "build_engine", build)
    words = small(f"trainer.accumulate={accumulate}", "trainer.clip=0.1", "student.dropout=0", "trainer.precision=32-true")
    weights, examples = [], []
    candidates: list[tuple[Candidate, Any]] = [(FINETUNE, harness.train_candidate), (BARE, bare.train_bare)]
    for candidate, work in candidates:
        gate = Gate()
        steps = 2 if accumulate == 3 else 4
        with pytest.raises(Finished):
            work(Job(candidate, tuple(candidate.overrides(words)), steps, TURNS, tmp_path / candidate.name), gate)
        weights.append(engines[-1].state_dict())
        examples.append(gate.examples)
    assert examples[0] == examples[1]
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][name], rtol=0, atol=1e-6), name


def test_what_takes_several_steps_for_a_batch_is_refused(small: Small, tmp_path: Path) -> None:
    words = small("engine.update=sequential", "method=dml")
    with pytest.raises(InputError, match="one optimiser step for a batch"):
        bare.train_bare(Job(Candidate("mine", "mine"), tuple(words), 2, 1, tmp_path), Gate())  # type: ignore[arg-type]
