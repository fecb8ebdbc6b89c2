"""The batch sampler: nothing lost, nothing repeated, the same on every rank."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd.data.held import WithHeld
from kd.data.sampler import POOL, SPREAD, LengthBatches, TokenBatches
from kd.data.tokenized import padded_length, padded_lengths
from kd.errors import InputError

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
        assert set(sizes) == sampler.sizes()
    assert sampler.smallest() >= size // 2


# Fairness, over many epochs


def met(sampler: LengthBatches, epochs: int) -> tuple[np.ndarray, np.ndarray]:
    """Return how often two examples shared a batch, (examples, examples), and their positions, (epochs, examples) in [0, 1]."""
    count = len(sampler.lengths)
    together, places = np.zeros((count, count), dtype=int), np.zeros((epochs, count))
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert sorted(flat(batches)) == list(range(count))
        for number, batch in enumerate(batches):
            together[np.ix_(batch, batch)] += 1
            places[epoch, batch] = (number + 0.5) / len(batches)
    np.fill_diagonal(together, 0)
    return together, places


def assert_uniform(places: np.ndarray) -> None:
    """Every example's place in the epoch has the mean and the spread of a uniform draw, up to five standard errors."""
    epochs = len(places)
    assert abs(places.mean(axis=0) - 0.5).max() < 5 * np.sqrt(1 / 12 / epochs)
    assert abs(places.var(axis=0) - 1 / 12).max() < 5 * np.sqrt(1 / 180 / epochs)


def spread_of(counts: np.ndarray) -> float:
    """Variance over mean: one where meeting is a matter of chance alone, as of a Poisson variable."""
    return float(counts.var() / counts.mean())


@pytest.mark.thorough
def test_a_fixed_count_lets_examples_of_similar_length_meet_equally_often_anywhere_in_the_epoch() -> None:
    lengths = 5 + np.arange(600) % 40  # as many of each: the chance to meet is also a matter of how many there are
    together, places = met(LengthBatches(lengths.tolist(), 4, 0), 400)
    assert_uniform(places)
    # The chance to meet is a matter of the difference in length, and nearly the same for all lengths.
    same = [together[np.ix_(lengths == one, lengths == one)] for one in range(8, 42)]
    pairs = [block[np.triu_indices(len(block), 1)] for block in same]
    rates = np.array([block.mean() for block in pairs])
    assert 0.7 < (rates / rates.mean()).min() < (rates / rates.mean()).max() < 1.4
    assert np.mean([spread_of(block) for block in pairs]) < 1.4
    near, far = (together[abs(lengths[:, None] - lengths) == distance].mean() for distance in (1, 10))
    assert rates.mean() > near > 20 * far


@pytest.mark.thorough
def test_a_token_budget_lets_examples_of_a_class_meet_equally_often_anywhere_in_the_epoch() -> None:
    lengths = np.random.default_rng(1).integers(5, 45, 600)
    sampler = TokenBatches(lengths.tolist(), 160, (1, 64), 0)
    together, places = met(sampler, 400)
    assert_uniform(places)
    for each in np.unique(sampler.classes):
        members = sampler.classes == each
        assert lengths[members].max() <= SPREAD * lengths[members].min()
        block = together[np.ix_(members, members)]
        # Of one class, also those of different length: 1 but for the chance, as for independent draws.
        assert spread_of(block[np.triu_indices(len(block), 1)]) < 1.4
    # Every two neighbouring classes meet somewhere, unless a batch happens to end where the class does.
    classes = np.unique(sampler.classes)
    crossing = [together[np.ix_(sampler.classes == a, sampler.classes == b)].sum() > 0 for a, b in itertools.pairwise(classes)]
    assert np.mean(crossing) > 0.7


# Shapes


@given(
    lengths=st.lists(st.integers(1, 128), min_size=1, max_size=700),
    multiple=st.sampled_from([8, 16, 32, 48]),
    size=st.integers(2, 40),
    seed=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_padded_batches_have_few_shapes_whatever_the_lengths(lengths: list[int], multiple: int, size: int, seed: int) -> None:
    padding, buckets = (multiple, 128), padded_lengths(multiple, 128)
    assert len(buckets) == -(-128 // multiple)
    by_count, by_tokens = LengthBatches(lengths, size, seed), TokenBatches(lengths, 128 * size, padding, seed)
    held = WithHeld(by_count, np.arange(len(lengths)), np.arange(3), 2)
    # A budget has one size of batch for each length, of texts that may fall two lengths short of it, and two for the last ones.
    for sampler, most in ((by_count, 3 * len(buckets)), (by_tokens, 3 * len(buckets) + 6)):
        shapes = set()
        for epoch in range(3):
            sampler.set_epoch(epoch)
            shapes |= {(len(batch), padded_length(max(lengths[row] for row in batch), *padding)) for batch in sampler}
        assert {rows for rows, _ in shapes} <= sampler.sizes()
        assert {tokens for _, tokens in shapes} <= buckets
        assert len(shapes) <= most
    assert len(by_count.sizes()) <= 3, "full batches, and two sizes for what is left of an epoch"
    assert held.sizes() == by_count.sizes() | {2}


# A budget of tokens


@pytest.mark.parametrize("budget", [100, 333, 1600, 100_000])
@pytest.mark.parametrize("padding", [(1, 128), (8, 128), (8, 91), (64, 100)])
@pytest.mark.parametrize("count", [1, 2, 97, 1003])
def test_a_budget_is_a_hard_limit_and_every_epoch_has_the_same_batches(
    budget: int, padding: tuple[int, int], count: int
) -> None:
    sampler = TokenBatches(LENGTHS[:count], budget, padding, 3)
    shapes = set()
    for epoch in range(4):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert sorted(flat(batches)) == list(range(count))
        for batch in batches:
            assert len(batch) * padded_length(max(LENGTHS[place] for place in batch), *padding) <= budget
        assert len(batches) == len(sampler)
        assert min(map(len, batches)) == sampler.smallest()
        assert set(map(len, batches)) == sampler.sizes()
        shapes.add(tuple(sorted(map(len, batches))))
    assert len(shapes) == 1


def test_a_budget_is_nearly_used_up_and_short_texts_make_larger_batches() -> None:
    batches = list(TokenBatches(LENGTHS, 1000, (1, 128), 0))
    used = [len(batch) * max(LENGTHS[place] for place in batch) / 1000 for batch in batches]
    assert np.mean(used) > 0.9
    assert sum(LENGTHS) / sum(len(batch) * max(LENGTHS[place] for place in batch) for batch in batches) > 0.9
    sizes = {max(LENGTHS[place] for place in batch): len(batch) for batch in batches}
    assert sizes[max(sizes)] < sizes[min(sizes)] / 4


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_batches_of_a_budget_and_each_example_weighs_the_same(world: int) -> None:
    whole = list(TokenBatches(LENGTHS, 700, (8, 128), 3))
    shards = [list(TokenBatches(LENGTHS, 700, (8, 128), 3, rank, world)) for rank in range(world)]
    for place, batch in enumerate(whole):
        parts = [shard[place] for shard in shards]
        assert sorted(flat(parts)) == sorted(batch)
        for part in parts:  # the mean over ranks of a rank's mean times its weight: 1 / batch for each example
            assert part.weight / len(part) / world == pytest.approx(1 / len(batch))


def test_seed_and_epoch_decide_who_shares_a_budget() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = TokenBatches(LENGTHS, 700, (1, 128), seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 2) == order(1, 2)
    orders = [order(1, 2), order(1, 3), order(2, 2)]
    assert len({tuple(sorted(tuple(sorted(batch)) for batch in one)) for one in orders}) == 3


def test_an_interrupted_epoch_of_a_budget_goes_on_with_the_next_batch() -> None:
    whole, resumed = (TokenBatches(LENGTHS, 700, (1, 128), 0) for _ in range(2))
    resumed.skip = 11
    assert list(resumed) == list(whole)[11:]
    assert list(resumed) == list(whole)


def test_a_text_that_is_longer_than_the_budget_is_refused() -> None:
    assert len(TokenBatches([3, 96], 96, (8, 128), 0)) == 2
    for lengths, padding in (([3, 97], (1, 128)), ([3, 90], (64, 128))):
        with pytest.raises(InputError, match="batch_tokens=96 is less than one text") as caught:
            TokenBatches(lengths, 96, padding, 0)
        assert caught.value.key == "trainer.batch_tokens"
