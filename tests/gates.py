"""The worker's side of a benchmark, without a parent process."""

from typing import Any

import pytest
import torch

from kd.bench.workers import Finished


class Recorder:
    """A gate that notes, at each opening and closing, how many optimiser steps were made, and what they did.

    Attributes:
        rates: learning rate of each step.
        weights: trained parameters after the last step, in their order in the optimiser.
    """

    def __init__(self, turns: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, self.steps = turns, 0
        self.facts: dict[str, Any] = {}
        self.opened: list[int] = []
        self.closed: list[tuple[int, int]] = []
        self.rates: list[float] = []
        self.weights: list[torch.Tensor] = []
        original = torch.optim.AdamW.step

        def step(optimizer: torch.optim.AdamW, *arguments: Any, **options: Any) -> Any:
            self.steps += 1
            self.rates.append(optimizer.param_groups[0]["lr"])
            done = original(optimizer, *arguments, **options)
            self.weights = [each.detach().clone() for group in optimizer.param_groups for each in group["params"]]
            return done

        monkeypatch.setattr(torch.optim.AdamW, "step", step)

    def ready(self, facts: dict[str, Any], accelerator: str) -> None:
        self.facts = facts

    def open(self) -> None:
        if not self.left:
            raise Finished
        self.left -= 1
        self.opened.append(self.steps)

    def close(self, examples: int) -> None:
        self.closed.append((self.steps, examples))
