"""Random numbers of examples: what they depend on, and that they are uniform and independent."""

import functools
from collections.abc import Callable
from dataclasses import replace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conformance.bench import TASK, Bench, Collated, batch_of
from torch import Tensor
from torch.utils.data import DataLoader

from kd.data.batch import Batch
from kd.data.sampler import LengthBatches
from kd.methods.base import Progress, Step
from kd.methods.draws import GOLDEN, _mix, _signed

COUNT = 40_000
"""Size of a sample."""
SIGMAS = 5.0
"""Standard deviations that a statistic of a sample may be off by: 6 in 10 million do by chance, and seeds are fixed."""


def step_at(index: Tensor, step: int = 0, seed: int = 0) -> Step:
    batch = Batch({}, (), torch.zeros(len(index)).long(), index)
    return Step(None, [], batch, TASK, Progress(step, 100), seed=seed)  # type: ignore[arg-type]


def by_example(steps: list[Step], what: str = "mask", count: int = 3) -> dict[int, list[float]]:
    return {
        int(index): row.tolist() for step in steps for index, row in zip(step.batch.index, step.draws(what, count), strict=True)
    }


# What they depend on


def test_draws_have_a_row_for_each_example() -> None:
    found = step_at(torch.tensor([4, 0, 2**40])).draws("mask", 2)
    assert found.shape == (3, 2)
    assert found.dtype == torch.float64
    assert step_at(torch.tensor([4])).draws("mask", 0).shape == (1, 0)


def test_draws_do_not_depend_on_the_batch_its_order_or_the_number_of_columns() -> None:
    index = torch.tensor([5, 3, 9, 0])
    found = step_at(index).draws("mask", 3)
    for rows in ([2, 0, 3, 1], [1], [3, 2]):
        assert torch.equal(step_at(index[rows]).draws("mask", 3), found[rows])
    assert torch.equal(step_at(index).draws("mask", 7)[:, :3], found)
    again = step_at(index)
    assert torch.equal(again.draws("other", 3), again.draws("other", 3))
    assert torch.equal(again.draws("mask", 3), found), "earlier draws change nothing"


@pytest.mark.parametrize("world", [2, 3])
def test_draws_do_not_depend_on_the_rank_or_the_number_of_ranks(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def steps(ranks: int) -> list[Step]:
        found = []
        for rank in range(ranks):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(ranks))
            found += [step_at(torch.tensor(rows), seed=3) for rows in LengthBatches([9] * 23, 8, 0, rank, ranks)]
        return found

    whole = by_example(steps(1))
    assert len(whole) == 23
    assert by_example(steps(world)) == whole


@pytest.mark.parametrize("change", [{"seed": 1}, {"step": 1}])
def test_draws_depend_on_seed_and_step(change: dict[str, int]) -> None:
    index = torch.arange(6)
    assert (step_at(index).draws("mask", 2) != step_at(index, **change).draws("mask", 2)).all()


def test_draws_depend_on_the_name_and_differ_from_numbers_of_the_generator() -> None:
    step = step_at(torch.arange(6))
    found, other = step.draws("mask", 2), step.draws("mask2", 2)
    assert (found != other).all()
    assert not np.isin(step.rng("mask").random(12), found.numpy()).any()


def test_draws_depend_on_nothing_else_in_a_step() -> None:
    index = torch.arange(6)
    step = step_at(index)
    other = step.replace(progress=Progress(0, 7, 3), batch=replace(step.batch, weight=0.3, labels=index))
    assert torch.equal(step.draws("mask", 2), other.draws("mask", 2))
    assert torch.equal(step.draws("mask", 2), step_at(index.int()).draws("mask", 2))


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_accumulated_batches_have_the_draws_of_their_step(accumulate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench("kd")
    method, seen = bench.methods["s0"], []
    prepare = method.prepare
    monkeypatch.setattr(method, "prepare", lambda step: seen.append(step) or prepare(step))
    batches = [Collated(batch_of(24))(rows) for rows in LengthBatches([9] * 24, 4, 0, accumulate=accumulate)]
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, accumulate_grad_batches=accumulate, **quiet)
    trainer.fit(bench.engine, DataLoader(batches, batch_size=None))
    assert [step.progress.step for step in seen] == [number // accumulate for number in range(6)]
    for step in seen:
        assert torch.equal(
            step.draws("mask", 2), step_at(torch.arange(24), step.progress.step).draws("mask", 2)[step.batch.index]
        )


def test_mixing_is_that_of_splitmix64() -> None:
    states = [_signed((1234567 + n * GOLDEN) % 2**64) for n in (1, 2, 3)]
    # The first numbers of the reference implementation with seed 1234567.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [number % 2**64 for number in _mix(torch.tensor(states)).tolist()] == expected


# Uniform and independent


@functools.cache
def along(axis: str) -> Tensor:
    """A sample in which one thing alone changes from each number to the next."""
    seed, few = 0, 4000
    if axis == "examples":
        return step_at(torch.arange(COUNT), seed=seed).draws("mask", 1).flatten()
    if axis == "distant examples":
        return step_at(torch.arange(COUNT) * 2**20, seed=seed).draws("mask", 1).flatten()
    if axis == "columns":
        return step_at(torch.tensor([7]), seed=seed).draws("mask", COUNT).flatten()
    one: dict[str, Callable[[int], Tensor]] = {
        "steps": lambda n: step_at(torch.tensor([7]), n, seed).draws("mask", 1),
        "seeds": lambda n: step_at(torch.tensor([7]), 3, n).draws("mask", 1),
        "names": lambda n: step_at(torch.tensor([7]), 3, seed).draws(f"mask{n}", 1),
    }
    return torch.cat([one[axis](n).flatten() for n in range(few)])


AXES = ("examples", "distant examples", "columns", "steps", "seeds", "names")


def chi_square(counts: Tensor) -> float:
    """Chi-square of equally likely bins, as standard deviations from its mean."""
    expected, freedom = float(counts.sum()) / counts.numel(), counts.numel() - 1
    assert expected >= 5
    return (float(((counts - expected) ** 2 / expected).sum()) - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("axis", AXES)
def test_draws_are_uniform_along_every_axis(axis: str) -> None:
    sample = along(axis)
    count = len(sample)
    assert sample.min() >= 0
    assert sample.max() < 1
    assert len(sample.unique()) == count
    assert abs(float(sample.mean()) - 1 / 2) < SIGMAS * (1 / 12 / count) ** 0.5
    squares = (sample - 1 / 2) ** 2  # their mean is 1/12, their variance 1/80 - 1/144
    assert abs(float(squares.mean()) - 1 / 12) < SIGMAS * ((1 / 80 - 1 / 144) / count) ** 0.5
    assert abs(chi_square(torch.bincount((sample * 256).long(), minlength=256))) < SIGMAS
    lowest = (sample * 2.0**53).long() % 256
    assert abs(chi_square(torch.bincount(lowest, minlength=256))) < SIGMAS, "the last bits are uniform too"


def independent(one: Tensor, other: Tensor) -> None:
    """Two samples are uncorrelated, and all pairs of bins are equally likely."""
    count = len(one)
    correlation = float(((one - 1 / 2) * (other - 1 / 2)).mean()) * 12
    assert abs(correlation) < SIGMAS / count**0.5
    pairs = torch.bincount((one * 16).long() * 16 + (other * 16).long(), minlength=256)
    assert abs(chi_square(pairs)) < SIGMAS


@pytest.mark.parametrize("distance", [1, 2, 64])
@pytest.mark.parametrize("axis", AXES)
def test_draws_along_an_axis_are_independent_of_one_another(axis: str, distance: int) -> None:
    sample = along(axis)
    independent(sample[:-distance], sample[distance:])


@pytest.mark.parametrize("other", ["name", "step", "seed", "next example", "next column", "example and column"])
def test_draws_that_differ_in_one_thing_are_independent(other: str) -> None:
    index, columns = torch.arange(COUNT // 10), 10
    found = step_at(index).draws("mask", columns + 1)
    against = {
        "name": lambda: step_at(index).draws("masks", columns),
        "step": lambda: step_at(index, step=1).draws("mask", columns),
        "seed": lambda: step_at(index, seed=1).draws("mask", columns),
        "next example": lambda: step_at(index + 1).draws("mask", columns),
        "next column": lambda: found[:, 1:],
        "example and column": lambda: torch.cat([found[1:, 1:], found[:1, 1:]]),
    }[other]()
    independent(found[:, :columns].flatten(), against.flatten())
