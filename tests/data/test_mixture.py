"""Batches of a mixture of tasks: which task each is of, and that the tasks' own batches are all there."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from kd.data.held import WithHeld
from kd.data.mixture import MixedBatches, Mixture, TaskRows
from kd.data.sampler import LengthBatches
from kd.data.tasks import Classification, Regression
from kd.errors import InputError

SIZES = {"a": 40, "b": 23, "c": 9}


def sampler(name: str, rank: int = 0, world: int = 1, accumulate: int = 1) -> LengthBatches:
    lengths = np.random.default_rng(len(name)).integers(3, 20, SIZES[name])
    return LengthBatches(lengths, 4, 7, rank, world, accumulate)


def mixture(tau: float = 1.0, names: str = "abc", seed: int = 7, **ranks: int) -> MixedBatches:
    samplers = {name: sampler(name, **ranks) for name in names}
    return MixedBatches(samplers, [SIZES[name] for name in names], tau, seed)


def batches(mixed: MixedBatches, epochs: int) -> Iterator[TaskRows]:
    """The batches of the first epochs."""
    for epoch in range(epochs):
        mixed.set_epoch(epoch)
        for rows in mixed:
            assert isinstance(rows, TaskRows)
            yield rows


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0])
def test_tasks_are_drawn_in_proportion_to_a_power_of_their_sizes(tau: float) -> None:
    mixed = mixture(tau)
    weights = np.array(list(SIZES.values()), dtype=float) ** tau
    expected = weights / weights.sum()
    assert mixed.probabilities == pytest.approx(expected)
    drawn = np.concatenate([mixed.tasks(epoch) for epoch in range(2000)])
    found = np.bincount(drawn, minlength=3) / len(drawn)
    deviation = np.sqrt(expected * (1 - expected) / len(drawn))
    assert (np.abs(found - expected) < 4 * deviation + 1e-12).all()


def test_sizes_of_any_magnitude_have_probabilities() -> None:
    samplers = {name: sampler(name) for name in "ab"}
    assert MixedBatches(samplers, [10**9, 1], 100.0, 0).probabilities.tolist() == [1.0, 0.0]


def test_a_task_has_all_its_batches_epoch_after_epoch() -> None:
    seen: dict[str, list[int]] = {name: [] for name in SIZES}
    for rows in batches(mixture(), 6):
        seen[rows.task] += rows
    for name, rows in seen.items():
        whole = len(rows) // SIZES[name]
        counts = Counter(rows[: whole * SIZES[name]])
        assert set(counts) == set(range(SIZES[name]))
        assert set(counts.values()) == {whole}
        single = sampler(name)
        first = [row for batch in single for row in batch]
        assert rows[: len(first)] == first


def test_an_epoch_has_as_many_batches_as_its_tasks_together() -> None:
    mixed = mixture()
    assert len(mixed) == len(list(mixed)) == sum(len(sampler(name)) for name in SIZES)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_an_interrupted_epoch_goes_on_as_it_would_have(accumulate: int) -> None:
    whole = list(batches(mixture(accumulate=accumulate), 3))
    length = len(mixture())
    for done in (0, 1, 2, 7, length - 1):
        again = mixture(accumulate=accumulate)
        again.set_epoch(2)
        again.skip = done
        for ours, theirs in zip(again, whole[2 * length + done :], strict=True):
            assert isinstance(ours, TaskRows)
            assert (list(ours), ours.task, ours.weight, ours.epoch) == (list(theirs), theirs.task, theirs.weight, theirs.epoch)


def test_ranks_share_each_batch_of_one_task() -> None:
    one = list(batches(mixture(), 2))
    ranks = [list(batches(mixture(rank=rank, world=2), 2)) for rank in range(2)]
    for whole, first, second in zip(one, *ranks, strict=True):
        assert whole.task == first.task == second.task
        assert sorted([*first, *second]) == sorted(whole)
        assert (first.weight + second.weight) / 2 == pytest.approx(whole.weight)


def test_a_step_is_the_mean_over_its_examples_whatever_their_tasks() -> None:
    """The factor of each example is one over the step's examples, after the trainer's division by `accumulate`."""
    mixed = mixture(accumulate=3)
    rows = list(mixed)
    for begin in range(0, len(rows), 3):
        step = [one for one in rows[begin : begin + 3] if isinstance(one, TaskRows)]
        examples = sum(map(len, step))
        for one in step:
            assert one.weight / 3 / len(one) == pytest.approx(1 / examples)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_hard_loss_of_a_step_is_the_mean_over_its_labelled_examples(accumulate: int) -> None:
    """One task has text without labels, the other has a label for each example."""
    one, other = sampler("a", accumulate=accumulate), sampler("b", accumulate=accumulate)
    one.labelled = np.arange(SIZES["a"]) % 4 == 0
    rows = list(MixedBatches({"a": one, "b": other}, [SIZES["a"], SIZES["b"]], 1.0, 7))
    for begin in range(0, len(rows), accumulate):
        factors = []
        for batch in rows[begin : begin + accumulate]:
            assert isinstance(batch, TaskRows)
            labelled = one.labels_in(np.array(batch)) if batch.task == "a" else len(batch)
            # A task's hard loss is the mean over its labelled examples times this factor.
            factors += [batch.weight * batch.label_weight / accumulate / max(labelled, 1)] * labelled
        assert not factors or factors == pytest.approx([1 / len(factors)] * len(factors))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_mixture_of_one_task_has_its_batches(accumulate: int) -> None:
    labelled = np.arange(SIZES["a"]) % 3 > 0

    def single() -> WithHeld:
        inner = sampler("b", accumulate=accumulate)
        inner.labelled = labelled[: SIZES["b"]]
        return WithHeld(inner, np.arange(5, 5 + SIZES["b"]), np.arange(5), 3)

    mixed = MixedBatches({"b": single()}, [SIZES["b"]], 1.0, 7)
    alone = single()
    for epoch in range(3):
        mixed.set_epoch(epoch)
        alone.set_epoch(epoch)
        for ours, theirs in zip(mixed, alone, strict=True):
            assert list(ours) == list(theirs)
            for name in ("weight", "label_weight", "epoch", "held"):
                assert getattr(ours, name) == getattr(theirs, name)


def test_seeds_draw_other_tasks() -> None:
    assert mixture().tasks(0).tolist() != mixture(seed=8).tasks(0).tolist()
    assert mixture().tasks(0).tolist() != mixture().tasks(1).tolist()


def tasks() -> dict[str, Classification | Regression]:
    return {
        "a": Classification("a", ["x", "y"], {}, ["accuracy"], "accuracy"),
        "s": Regression("s", ["pearson", "mse"], "pearson"),
    }


def test_metrics_of_a_mixture() -> None:
    joined = Mixture("mix", tasks(), "mean").joined({"a": {"accuracy": 0.5}, "s": {"pearson": 0.25, "mse": 3.0}})
    assert joined == {"mean": 0.375, "a/accuracy": 0.5, "s/pearson": 0.25, "s/mse": 3.0}
    undefined = Mixture("mix", tasks(), "mean").joined({"a": {"accuracy": 0.5}, "s": {"pearson": None, "mse": 3.0}})
    assert undefined["mean"] is None
    tensors = Mixture("mix", tasks(), "mean").joined(
        {"a": {"accuracy": torch.tensor(0.5)}, "s": {"pearson": torch.tensor(0.25), "mse": torch.tensor(3.0)}}
    )
    assert tensors["mean"] == 0.375


def test_the_mean_of_an_error_is_refused() -> None:
    with pytest.raises(InputError) as refusal:
        Mixture("mix", {"s": Regression("s", ["mse"], "mse")}, "mean")
    assert refusal.value.key == "monitor"
    assert Mixture("mix", {"s": Regression("s", ["mse"], "mse")}, "s/mse").monitor == "s/mse"
