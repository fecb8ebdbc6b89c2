"""The batch sampler: nothing lost, nothing repeated, the same on every rank."""

import numpy as np
import pytest

from kd.data.sampler import POOL, LengthBatches

LENGTHS = np.random.default_rng(0).integers(3, 90, 1003).tolist()


def flat(batches: list[list[int]]) -> list[int]:
    return [place for batch in batches for place in batch]


def padding(batches: list[list[int]]) -> int:
    """Pad tokens of an epoch."""
    return sum(len(batch) * max(LENGTHS[place] for place in batch) for batch in batches) - sum(LENGTHS)


@pytest.mark.parametrize("seed", [None, 0, 7])
@pytest.mark.parametrize(("count", "size"), [(1003, 16), (64, 16), (5, 16), (1, 4), (POOL * 4 + 1, 4)])
def test_every_example_comes_once_an_epoch(seed: int | None, count: int, size: int) -> None:
    sampler = LengthBatches(LENGTHS[:count], size, seed)
    batches = list(sampler)
    assert sorted(flat(batches)) == list(range(count))
    assert len(batches) == len(sampler) == -(-count // size)
    assert max(map(len, batches)) <= size


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_shards_of_the_ranks_make_up_the_global_batch(world: int, seed: int | None) -> None:
    whole = list(LengthBatches(LENGTHS, 24, seed))
    shards = [list(LengthBatches(LENGTHS, 24, seed, rank, world)) for rank in range(world)]
    for place, batch in enumerate(whole):
        parts = [shard[place] for shard in shards]
        assert sorted(flat(parts)) == sorted(batch)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("world", [2, 4])
def test_no_rank_gets_an_empty_batch_when_one_example_is_left_over(world: int, seed: int | None) -> None:
    shards = [list(LengthBatches(LENGTHS[:97], 16, seed, rank, world)) for rank in range(world)]
    assert all(batch for shard in shards for batch in shard)


def test_seed_and_epoch_decide_the_order() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = LengthBatches(LENGTHS, 16, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 2) == order(1, 2)
    orders = [order(1, 2), order(1, 3), order(2, 2), order(2, 1)]
    assert all(one != other for place, one in enumerate(orders) for other in orders[:place])
    assert {tuple(sorted(batch)) for batch in orders[0]} != {tuple(sorted(batch)) for batch in orders[1]}


@pytest.mark.parametrize("skip", [0, 1, 40, 63])
def test_an_interrupted_epoch_goes_on_with_the_next_batch_and_the_one_after_is_whole(skip: int) -> None:
    whole, resumed = LengthBatches(LENGTHS, 16, 0, 1, 2), LengthBatches(LENGTHS, 16, 0, 1, 2)
    whole.set_epoch(4), resumed.set_epoch(4)
    resumed.skip = skip
    assert list(resumed) == list(whole)[skip:]
    whole.set_epoch(5), resumed.set_epoch(5)
    assert list(resumed) == list(whole)


def test_batches_of_similar_length_save_most_of_the_padding_of_a_plain_shuffle() -> None:
    order = np.random.default_rng(0).permutation(len(LENGTHS)).tolist()
    plain = padding([order[start : start + 16] for start in range(0, len(order), 16)])
    assert padding(list(LengthBatches(LENGTHS, 16, 0))) < 0.25 * plain


def test_evaluation_reads_from_short_to_long_in_one_order() -> None:
    sampler = LengthBatches(LENGTHS, 16, None)
    first = list(sampler)
    sampler.set_epoch(1)
    assert first == list(sampler)
    lengths = [LENGTHS[place] for place in flat(first)]
    assert lengths == sorted(lengths)


def test_it_stays_a_shuffle() -> None:
    first, second = (LengthBatches(LENGTHS, 16, 0) for _ in range(2))
    second.set_epoch(1)
    batches = list(first)
    # The means of the batches' lengths come in no order: neighbours do not resemble each other.
    means = np.array([np.mean([LENGTHS[place] for place in batch]) for batch in batches])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.4
    # What met in a batch mostly meets others in the next epoch.
    mates = {place: set(batch) for batch in second for place in batch}
    kept = [len(mates[place] & set(batch)) - 1 for batch in batches for place in batch]
    assert np.mean(kept) < 0.5 * 15


@pytest.mark.parametrize(("count", "size"), [(1601, 32), (97, 2), (POOL * 4 + 1, 4), (1003, 16), (POOL * 8 + 7, 8)])
@pytest.mark.parametrize("seed", [None, 3])
def test_smallest_batch_is_known_beforehand_and_at_least_half_a_batch(count: int, size: int, seed: int | None) -> None:
    lengths = [LENGTHS[place % len(LENGTHS)] for place in range(count)]
    sampler = LengthBatches(lengths, size, seed)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        sizes = [len(batch) for batch in sampler]
        assert (min(sizes), len(sizes)) == (sampler.smallest(), len(sampler))
    assert sampler.smallest() >= size // 2
