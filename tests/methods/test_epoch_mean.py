"""Means over the batches of an epoch: their weights, the epoch that they are of, and their state."""

import pickle

import pytest
import torch

from kd.methods.epoch_mean import EpochMean

BATCHES = [(torch.tensor([[1.0, 5.0]]), 1.0), (torch.tensor([[2.0, 0.0]]), 0.5), (torch.tensor([[0.0, 3.0]]), 2.5)]


def added(mean: EpochMean, epoch: int) -> EpochMean:
    for values, weight in BATCHES:
        mean.add(values, epoch, weight)
    return mean


def test_mean_is_weighted_and_of_the_latest_epoch() -> None:
    expected = sum(weight * values for values, weight in BATCHES) / 4
    mean = added(EpochMean(1, 2), 0)
    torch.testing.assert_close(mean.values, expected)
    mean.add(torch.tensor([[7.0, 8.0]]), 1)
    torch.testing.assert_close(mean.values, torch.tensor([[7.0, 8.0]]))
    torch.testing.assert_close(added(mean, 3).values, expected)


def test_before_the_first_batch_there_are_zeros() -> None:
    assert torch.equal(EpochMean(2, 3).values, torch.zeros(2, 3))


def test_mean_goes_on_from_its_state() -> None:
    whole, first = EpochMean(1, 2), EpochMean(1, 2)
    added(whole, 4)
    for values, weight in BATCHES[:2]:
        first.add(values, 4, weight)
    second = EpochMean(1, 2)
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())), strict=True)
    values, weight = BATCHES[2]
    second.add(values, 4, torch.tensor(weight))
    assert torch.equal(second.values, whole.values)


def test_long_epochs_lose_no_digits() -> None:
    mean = EpochMean(1)
    for number in range(20_000):
        mean.add(torch.tensor([0.1 if number % 2 else 0.3]), 0)
    assert mean.values.item() == pytest.approx(0.2, rel=1e-5)  # float32: a sum of 20,000 numbers would be off by more


def test_a_value_that_is_not_finite_ends_with_its_epoch() -> None:
    mean = EpochMean(2)
    mean.add(torch.tensor([float("nan"), float("inf")]), 0)
    mean.add(torch.tensor([1.0, 3.0]), 1)
    mean.add(torch.tensor([3.0, 5.0]), 1)
    assert mean.values.tolist() == [2.0, 4.0]
