"""Batches of examples of similar length: a pure function of seed and epoch, the same on every rank."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch.utils.data import Sampler

from kd.data.texts import RowSequence
from kd.data.tokenized import padded_length
from kd.errors import InputError

POOL = 50
"""Number of batches that are shuffled, sorted by length and cut together: large enough to save padding, small enough that the
composition of a batch stays random. Our choice."""

SPREAD = 1.1
"""Ratio of the longest to the shortest text of a length class under a token budget. Our choice: classes are large enough for a
shuffle within them, and it adds at most 10 % padding."""


class Rows(list[int]):
    """Indices of one rank's examples in a global batch.

    Attributes:
        weight: number of these examples relative to an equal share of the optimiser step's examples. The mean over ranks and
            over `accumulate` batches of weighted means is then the mean over the step's examples, also if the ranks do not
            divide a batch, its batches differ in size, or an epoch ends before there are `accumulate` of them.
        epoch: epoch of the batch, passed along so that loader workers have it; None outside training.
        held: indices of the held examples beside the batch (`kd.data.held.WithHeld`); None if nothing is held.
        label_weight: factor of a mean over the labelled ones of these examples, besides `weight`. With both, the same mean over
            ranks and batches is the mean over the labelled examples of the step. 0 if none of these examples has a label.
    """

    def __init__(
        self,
        rows: Sequence[int],
        weight: float = 1.0,
        epoch: int | None = None,
        held: "Rows | None" = None,
        label_weight: float = 1.0,
    ) -> None:
        super().__init__(rows)
        self.weight = weight
        self.epoch = epoch
        self.held = held
        self.label_weight = label_weight


class Lengths(Protocol):
    """Interface of numbers of tokens that are not all there yet (`kd.data.stored_tokens.LengthsOnDemand`)."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Return the numbers of tokens of these examples, once they are there."""
        ...

    def expect(self, blocks: Iterable[np.ndarray]) -> None:
        """Prepare the numbers of these examples, which will be asked for in this order."""
        ...


class EpochBatches(RowSequence[np.ndarray]):
    """Global batches of an epoch, in their order; a pool of them is sorted by length and cut when the first one is asked for.

    Args:
        lengths: tokens of each example.
        order: the examples in the order of the shuffle; it is changed.
        bounds: boundaries between pools in it, its start and end included.
        batch_size: examples of a batch.
        generator: draws the order of the batches.
    """

    def __init__(
        self,
        lengths: np.ndarray | Lengths,
        order: np.ndarray,
        bounds: Sequence[int],
        batch_size: int,
        generator: np.random.Generator,
    ) -> None:
        self.lengths, self.order, self.bounds = lengths, order, np.asarray(bounds)
        counts = -(-np.diff(self.bounds) // batch_size)
        self.firsts = np.concatenate([[0], np.cumsum(counts)])
        """Number of the first batch of each pool, and the number of all batches."""
        self.shuffled = generator.permutation(int(self.firsts[-1]))
        self.sorted = np.zeros(len(counts), dtype=bool)

    def __len__(self) -> int:
        return len(self.shuffled)

    def row(self, row: int) -> np.ndarray:
        """Return one batch."""
        number = int(self.shuffled[row])
        pool = int(np.searchsorted(self.firsts, number, side="right")) - 1
        rows = self.order[self.bounds[pool] : self.bounds[pool + 1]]
        if not self.sorted[pool]:
            rows[:] = rows[np.argsort(self.lengths[rows], kind="stable")]
            self.sorted[pool] = True
        first, end = (int(self.firsts[one]) for one in (pool, pool + 1))
        return cut_evenly(rows, end - first, number - first)

    def pools_from(self, index: int) -> Iterator[np.ndarray]:
        """Yield the examples of each pool, in the order in which the batches from this one on ask for them, then the others."""
        pools = np.searchsorted(self.firsts, np.roll(self.shuffled, -index), side="right") - 1
        _, firsts = np.unique(pools, return_index=True)
        for pool in pools[np.sort(firsts)]:
            yield self.order[self.bounds[pool] : self.bounds[pool + 1]].copy()


def cut_evenly(rows: np.ndarray, count: int, index: int) -> np.ndarray:
    """Return one of `count` parts whose sizes differ by at most one, as `numpy.array_split` cuts them.

    >>> [cut_evenly(np.arange(5), 2, index).tolist() for index in (0, 1)]
    [[0, 1, 2], [3, 4]]
    """
    size, longer = divmod(len(rows), count)
    start = index * size + min(index, longer)
    return rows[start : start + size + (index < longer)]


class LengthBatches(Sampler[list[int]]):
    """Batches of example indices, bucketed by length.

    The global batches of an epoch do not depend on the number of ranks; rank *r* of *n* takes every *n*-th example of each
    batch, starting with the *r*-th. No example is lost or repeated.

    Args:
        lengths: tokens of each example.
        batch_size: examples of a *global* batch.
        seed: seed of the shuffle; None gives a fixed order, sorted by length, for evaluation.
        rank: rank of this process, from 0.
        world: number of processes.
        accumulate: batches of an optimiser step; the last step of an epoch takes the remaining ones. Each batch is weighted as
            for a trainer that divides every loss by `accumulate`.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray | Lengths,
        batch_size: int,
        seed: int | None,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
    ) -> None:
        self.lengths: np.ndarray | Lengths = np.asarray(lengths) if isinstance(lengths, Sequence) else lengths
        self.batch_size = batch_size
        self.seed = seed
        self.rank, self.world = rank, world
        self.accumulate = accumulate
        self.epoch = 0
        self.skip = 0
        """Number of batches already trained on in an interrupted epoch, which the next iteration leaves out."""
        self.labelled: np.ndarray | None = None
        """(examples,), True for each that has a label; None if all have one."""

    @property
    def sampler(self) -> "LengthBatches":
        """The sampler itself: Lightning sets the epoch of `batch_sampler.sampler`, not of a batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; Lightning calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        count = len(self.lengths)
        bounds = [0, *(self._pools(count) if self.seed is not None else []), count]
        return sum(-(-(end - start) // self.batch_size) for start, end in itertools.pairwise(bounds))

    def batches(self, first: int = 0) -> Sequence[np.ndarray]:
        """Return the global batches of the current epoch, which will be asked for from this one on."""
        if self.seed is None:
            return self._cut(np.argsort(np.asarray(self.lengths), kind="stable"))
        generator, count = np.random.default_rng([self.seed, self.epoch]), len(self.lengths)
        order = generator.permutation(count)
        batches = EpochBatches(self.lengths, order, [0, *self._pools(count), count], self.batch_size, generator)
        if not isinstance(self.lengths, np.ndarray):
            self.lengths.expect(batches.pools_from(first))
        return batches

    def _pools(self, count: int) -> list[int]:
        """Return the boundaries between pools; a pool smaller than a batch is merged into the one before it."""
        size = POOL * self.batch_size
        return [start for start in range(size, count, size) if count - start >= self.batch_size]

    def sizes(self) -> set[int]:
        """Return the numbers of examples that global batches have; the same in every epoch."""
        count = len(self.lengths)
        bounds = [0, *(self._pools(count) if self.seed is not None else []), count]
        pools = [end - start for start, end in itertools.pairwise(bounds)]
        counts = [(size, -(-size // self.batch_size)) for size in pools]  # examples and batches, as `_cut` has them
        return {rounded for size, batches in counts for rounded in (size // batches, -(-size // batches))}

    def smallest(self) -> int:
        """Return the number of examples of the smallest global batch; the same in every epoch."""
        return min(self.sizes())

    def _cut(self, order: np.ndarray) -> list[np.ndarray]:
        """Return batches whose sizes differ by at most one: a short last batch might leave a rank without an example."""
        return np.array_split(order, -(-len(order) // self.batch_size))

    def __iter__(self) -> Iterator[list[int]]:
        first, self.skip = self.skip, 0
        batches = self.batches(first)
        for index in range(first, len(batches)):
            begin = index - index % self.accumulate
            of_step = OptimiserStep.of([(self, batch) for batch in batches[begin : begin + self.accumulate]])
            yield self.share(index, batches[index], of_step)

    def share(self, index: int, batch: np.ndarray, of_step: "OptimiserStep") -> Rows:
        """Return this rank's share of a global batch.

        Args:
            index: index of the batch in the epoch.
            batch: indices of its examples.
            of_step: the optimiser step that it is part of. The trainer divides by `accumulate` whatever its number of batches.
        """
        mine = batch[self.rank :: self.world]
        weight = len(mine) * self.world / len(batch) * (self.accumulate * len(batch) / of_step.examples)
        label_weight = 1.0
        if of_step.labelled < of_step.examples:
            share = self.labels_in(mine) / max(of_step.labelled, 1)
            label_weight = share * self.world * self.accumulate / weight
        return Rows(mine.tolist(), weight, None if self.seed is None else self.epoch, label_weight=label_weight)

    def labels_in(self, batch: np.ndarray) -> int:
        """Return the number of examples of a batch that have a label."""
        return len(batch) if self.labelled is None else int(self.labelled[batch].sum())


@dataclass(frozen=True)
class OptimiserStep:
    """The examples of an optimiser step, over all ranks.

    Attributes:
        examples: their number.
        labelled: the number of those that have a label.
    """

    examples: int
    labelled: int

    @classmethod
    def of(cls, batches: Sequence[tuple[LengthBatches, np.ndarray]]) -> "OptimiserStep":
        """Return the step of these global batches, each with its sampler."""
        return cls(sum(len(batch) for _, batch in batches), sum(sampler.labels_in(batch) for sampler, batch in batches))


class TokenBatches(LengthBatches):
    """Batches within a budget of padded tokens: never more than it, and the same number of batches in every epoch.

    Texts of about the same length (`SPREAD`) form a length class. In every epoch the classes are concatenated from long to
    short, each shuffled anew, and cut where the next example would not fit if it were the longest of its class. The class at a
    given position is always the same, so the cuts are too; only the order within a class is random.

    The shuffle is not uniform: any two examples of a class are equally likely to share a batch, those of two neighbouring
    classes can share only the batch at their boundary, and all others never do. The order of the batches in an epoch is
    uniform. A batch of short texts has more examples than one of long texts, and a loss is a mean over the batch, so an
    example with a short text has less weight in a step than one with a long text.

    Args:
        lengths: largest number of tokens of each example.
        budget: padded tokens of a *global* batch: number of examples times the longest after padding.
        padding: the multiple that batches are padded to, and the largest length.
        seed: seed of the shuffle.
        rank: rank of this process, from 0.
        world: number of processes.
        accumulate: batches of an optimiser step, in which every example has the same weight.

    Raises:
        InputError: for a text that is longer than the budget.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        budget: int,
        padding: tuple[int, int],
        seed: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
    ) -> None:
        super().__init__(lengths, 0, seed, rank, world, accumulate)
        self.budget = budget
        tokens = np.unique(np.asarray(self.lengths))
        if len(tokens) and (longest := padded_length(int(tokens[-1]), *padding)) > budget:
            raise InputError(
                f"trainer.batch_tokens={budget} is less than one text: the longest has {longest} tokens, padding included. "
                "A larger budget, or a smaller task.max_length",
                "trainer.batch_tokens",
            )
        self.classes = self._classes(tokens)
        self.cuts = self._cuts(padding)

    def _classes(self, tokens: np.ndarray) -> np.ndarray:
        """Return the length, in tokens, of the longest text in the class of each example."""
        most = np.zeros(len(tokens), dtype=np.int64)
        for index in range(len(tokens) - 1, -1, -1):
            same = index + 1 < len(tokens) and most[index + 1] <= SPREAD * tokens[index]
            most[index] = most[index + 1] if same else tokens[index]
        classes: np.ndarray = most[np.searchsorted(tokens, np.asarray(self.lengths))]
        return classes

    def _cuts(self, padding: tuple[int, int]) -> list[int]:
        """Return the boundaries between batches in the examples sorted from long to short."""
        line = -np.sort(-self.classes)
        bounds = [0]
        while bounds[-1] < len(line):
            room = self.budget // padded_length(int(line[bounds[-1]]), *padding)
            bounds.append(min(bounds[-1] + room, len(line)))
        # If the last batch is short, balance the last two, so that no rank is left without an example.
        if len(bounds) > 2 and bounds[-1] - bounds[-2] < bounds[-2] - bounds[-3]:
            bounds[-2] = (bounds[-3] + bounds[-1] + 1) // 2
        return bounds[1:-1]

    def __len__(self) -> int:
        return len(self.cuts) + 1

    def sizes(self) -> set[int]:
        """Return the numbers of examples that global batches have; the same in every epoch."""
        return {end - start for start, end in itertools.pairwise([0, *self.cuts, len(self.lengths)])}

    def batches(self, first: int = 0) -> Sequence[np.ndarray]:
        """Return the global batches of the current epoch."""
        assert self.seed is not None
        generator = np.random.default_rng([self.seed, self.epoch])
        order = generator.permutation(len(self.lengths))
        line = order[np.argsort(-self.classes[order], kind="stable")]
        batches = np.split(line, self.cuts)
        return [batches[index] for index in generator.permutation(len(batches))]
