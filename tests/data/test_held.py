"""The held part of train: which examples it has, and the batches of it beside those of training."""

import itertools
import pickle
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from conformance.bench import TASK
from engines.reward import examples_of, held_mask

from conftest import tiny_tokenizer
from kd.data.batch import Batch
from kd.data.datamodule import KDDataModule
from kd.data.examples import Examples, held_out
from kd.data.held import WithHeld, checked_share, cut
from kd.data.masked_lm.datamodule import MaskedLMDataModule
from kd.data.masked_lm.task import MaskedLM
from kd.data.sampler import LengthBatches, Rows
from kd.data.texts import Example, Table
from kd.errors import InputError

TEXTS = [(f"text number {number}",) for number in range(2000)]

LENGTHS = np.random.default_rng(0).integers(3, 30, 97)


def test_the_cut_follows_from_the_text_alone() -> None:
    mask = held_mask(TEXTS, 0.3)
    assert 0.27 < mask.mean() < 0.33
    assert held_mask(TEXTS[::-1], 0.3).tolist() == mask[::-1].tolist()
    assert held_mask([(f" TEXT  Number {number} ",) for number in range(2000)], 0.3).tolist() == mask.tolist()
    assert not (mask & ~held_mask(TEXTS, 0.5)).any(), "a larger share holds the examples of a smaller one"
    assert not held_mask(TEXTS, 0).any()


def test_the_cut_is_independent_of_the_one_of_pilots() -> None:
    table = Table.of([Example(texts, 0, "") for texts in TEXTS])
    left = list(held_out({"train": table}, 0.5)["train"].texts)
    assert 0.45 < held_mask(left, 0.5).mean() < 0.55
    pairs = [(first, second) for (first,), (second,) in itertools.pairwise(TEXTS)]
    assert 0.45 < held_mask(pairs, 0.5).mean() < 0.55


@pytest.mark.parametrize("share", [-0.1, 1, 1.5, float("nan"), True, "0.1", None, [0.1]])
def test_a_share_out_of_range_is_refused(share: Any) -> None:
    with pytest.raises(InputError, match="at least 0 and less than 1") as caught:
        checked_share(share, "holds")
    assert caught.value.key == "holds"


def test_either_part_needs_an_example_for_each_rank() -> None:
    count = int(held_mask(TEXTS, 0.01).sum())
    for share, ranks in ((1e-9, 1), (0.01, count + 1), (0.99, count * 10)):
        with pytest.raises(InputError, match="either part needs") as caught:
            held_mask(TEXTS, share, ranks=ranks)
        assert caught.value.key == "holds"
    held_mask(TEXTS, 0.01, ranks=count)


# Batches


def sampler(size: int = 16, accumulate: int = 1, held: int = 23, rank: int = 0, world: int = 1, of: int = 16) -> WithHeld:
    """Batches over 97 examples of 120, of which the others are held."""
    order = np.random.default_rng(5).permutation(97 + held)
    inner = LengthBatches(LENGTHS, size, 3, rank, world, accumulate)
    return WithHeld(inner, np.sort(order[:97]), np.sort(order[97:]), of)


def epoch_of(batches: WithHeld, epoch: int) -> list[Rows]:
    batches.set_epoch(epoch)
    return list(batches)  # type: ignore[arg-type]


def test_what_an_edit_made_of_a_held_example_is_not_trained_on() -> None:
    """Copies and texts without labels are on the side of their origin, and are never held themselves."""
    texts = [text for row, text in enumerate(TEXTS[:300]) for text in (text, (f"copy of {row}",), (f"made of {row}",))]
    labels = [0, 1, float("nan")] * 300
    origins = [text for text in TEXTS[:300] for _ in range(3)]
    parts = cut(Examples(TASK, {"train": texts}, {"train": labels}, origins=origins), 0.3)
    plain = held_mask(TEXTS[:300], 0.3)
    equal = next(row for row, held in enumerate(plain) if held)  # a copy of another example that is a held text
    texts[3 * plain.tolist().index(False) + 1] = TEXTS[equal]
    again = cut(Examples(TASK, {"train": texts}, {"train": labels}, origins=origins), 0.3)
    assert again.held.tolist() == parts.held.tolist()
    assert np.flatnonzero(again.trained != parts.trained).tolist() == [3 * plain.tolist().index(False) + 1]
    assert parts.held.tolist() == [held and first for held in plain for first in (True, False, False)]
    assert parts.trained.tolist() == [not held for held in plain for _ in range(3)]


def test_training_batches_have_all_other_examples_and_held_ones_come_in_turn() -> None:
    batches = sampler()
    epochs = [epoch_of(batches, epoch) for epoch in range(5)]
    for rows in epochs:
        assert sorted(row for batch in rows for row in batch) == batches.trained.tolist()
    held = [row for rows in epochs for batch in rows for row in batch.held]
    assert len(held) == 5 * len(batches) * 16
    assert set(held) == set(batches.order.tolist())
    assert set(held).isdisjoint(batches.trained.tolist())
    counts = Counter(held).values()
    assert max(counts) - min(counts) <= 1, "each is used as often as any other"
    assert held == [int(row) for row in np.resize(batches.order, len(held))], "one order, over and over"
    assert batches.order.tolist() != sorted(batches.order.tolist())
    assert all(len(set(batch.held)) == 16 for rows in epochs for batch in rows)


def test_training_batches_are_those_of_the_sampler_without_held_ones() -> None:
    batches, plain = sampler(), LengthBatches(LENGTHS, 16, 3)
    for epoch in range(2):
        plain.set_epoch(epoch)
        expected = [(batches.trained[rows].tolist(), rows.weight, epoch) for rows in plain]
        assert [(list(rows), rows.weight, rows.epoch) for rows in epoch_of(batches, epoch)] == expected
        assert len(batches) == len(plain)


def test_seed_decides_the_order_of_held_examples() -> None:
    orders = [WithHeld(LengthBatches(LENGTHS, 16, seed), np.arange(97), np.arange(97, 150), 8).order for seed in (0, 0, 1)]
    assert orders[0].tolist() == orders[1].tolist() != orders[2].tolist()


@pytest.mark.parametrize(("skip", "accumulate"), [(1, 1), (4, 1), (4, 4), (6, 3)])
def test_an_interrupted_epoch_goes_on_with_the_held_batches_of_an_unbroken_one(skip: int, accumulate: int) -> None:
    whole, resumed = (sampler(accumulate=accumulate) for _ in range(2))
    resumed.skip = skip
    for epoch in (2, 3):
        expected = epoch_of(whole, epoch)[skip if epoch == 2 else 0 :]
        found = epoch_of(resumed, epoch)
        assert [(list(rows), list(rows.held)) for rows in found] == [(list(rows), list(rows.held)) for rows in expected]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("of", [16, 7])
def test_ranks_share_the_held_batch_of_one_process(world: int, of: int) -> None:
    values = np.random.default_rng(1).normal(size=120)
    for epoch in range(2):
        whole = epoch_of(sampler(of=of), epoch)
        shards = [epoch_of(sampler(of=of, rank=rank, world=world), epoch) for rank in range(world)]
        for index, batch in enumerate(whole):
            parts = [shard[index].held for shard in shards]
            assert sorted(row for part in parts for row in part) == sorted(batch.held)
            assert all(parts)
            mean = sum(values[list(part)].mean() * part.weight for part in parts) / world
            assert mean == pytest.approx(values[list(batch.held)].mean(), rel=1e-12)


@pytest.mark.parametrize("accumulate", [2, 3, 4])
def test_accumulated_batches_have_together_the_held_batch_of_one_batch(accumulate: int) -> None:
    small, large = sampler(8, accumulate, held=53, of=8), sampler(8 * accumulate, held=53, of=8 * accumulate)
    for epoch in range(3):
        wholes, parts = epoch_of(large, epoch), epoch_of(small, epoch)
        steps = [parts[begin : begin + accumulate] for begin in range(0, len(parts), accumulate)]
        assert len(steps) == len(wholes)
        for whole, step in zip(wholes, steps, strict=True):
            joined = [row for batch in step for row in batch.held]
            assert joined == list(whole.held)[: 8 * len(step)]


def test_fewer_held_examples_than_a_batch_are_all_in_each() -> None:
    for rows in epoch_of(sampler(held=5), 1):
        assert len(set(rows.held)) == len(rows.held) == 5


def test_rows_reach_loader_processes_with_their_held_ones() -> None:
    rows = pickle.loads(pickle.dumps(Rows([1, 2], 0.5, 3, Rows([7], 1.5, 3))))
    assert (rows, rows.held, rows.held.weight, rows.held.epoch) == ([1, 2], [7], 1.5, 3)
    assert Rows([1]).held is None


# Of the data module


def module(count: int = 62, **more: Any) -> KDDataModule:
    given = {"batch_size": 8, "eval_batch_size": 8, "max_length": 32, "seed": 0, "holds": 0.3, **more}
    return KDDataModule(examples_of(count), [tiny_tokenizer()], [tiny_tokenizer()], **given)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_carry_held_ones_with_all_that_a_batch_has(workers: int) -> None:
    data = module(workers=workers)
    assert data.held_count == len(data.held) == held_mask(data.examples.texts["train"], 0.3).sum()
    tokenizer, seen = tiny_tokenizer(), set()
    for batch in data.train_dataloader():
        held = batch.held
        assert len(held) == data.held_size() == 8
        assert set(held.index.tolist()) <= set(data.held.tolist())
        assert set(batch.index.tolist()).isdisjoint(data.held.tolist())
        texts = [data.examples.texts["train"][row][0] for row in held.index.tolist()]
        assert torch.equal(held.student["input_ids"], tokenizer(texts, padding=True, return_tensors="pt")["input_ids"])
        assert held.labels.tolist() == [data.examples.labels["train"][row] for row in held.index.tolist()]
        assert held.teachers[0] is held.student
        assert held.held is None
        seen |= set(batch.index.tolist())
    assert seen == set(data.trained.tolist())
    assert all(batch.held is None for batch in data.val_dataloader())
    assert len(list(data.examples.evaluated)) == 1


def test_nothing_is_held_unless_a_share_is_given() -> None:
    data = module(holds=0.0)
    assert type(data.sampler("train", 0)) is LengthBatches
    assert all(batch.held is None for batch in data.train_dataloader())
    assert (data.held_count, data.trained_count, data.trained.tolist()) == (0, 62, list(range(62)))


def test_a_held_batch_of_a_token_budget_stays_within_it() -> None:
    data = module(batch_tokens=60)
    assert 1 < data.held_size() < 8
    for batch in data.train_dataloader():
        assert len(batch.held) == data.held_size()
        assert batch.held.student["input_ids"].numel() <= 60
        assert set(batch.index.tolist()).isdisjoint(data.held.tolist())
    with pytest.raises(InputError, match="longest held") as caught:
        module(batch_tokens=20, world=2).held_size()
    assert caught.value.key == "trainer.batch_tokens"


def test_a_batch_moves_with_its_held_one_and_shows_each_student_its_own() -> None:
    batch = next(iter(module().train_dataloader()))
    for found in (batch.to("meta"), batch.map(lambda tensor: tensor.to("meta"))):
        assert found.held.labels.device.type == found.held.student["input_ids"].device.type == "meta"
        assert found.held.weight == batch.held.weight
    peers = ({"input_ids": torch.ones(1, 2)}, {"input_ids": torch.zeros(1, 2)})
    held = Batch(peers[0], (), torch.zeros(1), torch.arange(1), 1.0, peers[1:])
    both = Batch(peers[0], (), torch.zeros(1), torch.arange(1), 1.0, peers[1:], held)
    assert both.seen_by(1).held.student is peers[1]
    assert both.seen_by(1).held.peers == (peers[0],)


def test_the_trial_batch_has_the_shortest_examples_of_each_part() -> None:
    data = module()
    lengths, batch = data.tokens["train"][data.student_key].lengths, data.trial(4)
    for found, part in ((batch, data.trained), (batch.held, data.held)):
        assert set(found.index.tolist()) <= set(part.tolist())
        assert sorted(lengths[found.index.tolist()]) == sorted(lengths[part])[:4]
    assert module(holds=0.0).trial(4).held is None


def test_no_chunk_of_a_held_text_is_trained_on() -> None:
    texts = [(" ".join([text[0]] * (1 + number % 3)),) for number, text in enumerate(examples_of(40).texts["train"])]
    splits = {"train": texts, "validation": texts[:4]}
    examples = Examples(MaskedLM("toy", ["loss"], "loss"), splits, {name: [0.0] * len(own) for name, own in splits.items()})
    data = MaskedLMDataModule(examples, [tiny_tokenizer()], [], 8, 8, 12, 0, holds=0.3)
    mask, owner = held_mask(texts, 0.3), data.text_of_rows("train")
    tokens = data.tokens["train"][data.student_key]
    assert len(owner) == len(tokens.chunks) > 40
    first = np.concatenate([[0], np.cumsum(tokens.vocabularies[0].words)])
    for (begin, end), text in zip(tokens.chunks, owner, strict=True):
        assert first[text] <= begin < end <= first[text + 1]
    assert 0 < data.held_count == mask.sum() < len(data.held)
    seen = set()
    for batch in data.train_dataloader():
        assert mask[owner[batch.held.index]].all()
        assert not mask[owner[batch.index]].any()
        assert batch.held.student["predicted"].any()
        seen |= set(batch.index.tolist())
    assert seen == set(data.trained.tolist())
