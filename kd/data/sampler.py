"""Batches of examples of similar length: a pure function of seed and epoch, the same on every rank."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

POOL = 50
"""Batches that are shuffled, sorted by length and cut together: large enough to save padding, small enough that what meets
what in a batch stays chance. Our choice."""


class Rows(list[int]):
    """The examples of one rank's share of a global batch.

    Attributes:
        weight: the share's size relative to an equal one. The mean over ranks of weighted means is the mean over the global
            batch, also where the ranks do not divide it.
        epoch: that they are drawn in, so that a loader's worker knows it too; None outside training.
    """

    def __init__(self, rows: Sequence[int], weight: float = 1.0, epoch: int | None = None) -> None:
        super().__init__(rows)
        self.weight = weight
        self.epoch = epoch


class LengthBatches(Sampler[list[int]]):
    """Batches of example numbers, bucketed by length.

    The global batches of an epoch do not depend on how many ranks there are; rank *r* of *n* takes every *n*-th example of
    each, beginning with the *r*-th. No example is lost or repeated.

    Args:
        lengths: tokens of each example.
        batch_size: examples of a *global* batch.
        seed: of the shuffle; None keeps one order, sorted by length, for evaluation.
        rank: this process, from 0.
        world: processes.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int | None, rank: int = 0, world: int = 1) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.rank, self.world = rank, world
        self.epoch = 0
        self.skip = 0
        """Batches already trained on in an epoch that was interrupted; left out once."""

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        count = len(self.lengths)
        bounds = [0, *(self._pools(count) if self.seed is not None else []), count]
        return sum(-(-(end - start) // self.batch_size) for start, end in itertools.pairwise(bounds))

    def batches(self) -> list[np.ndarray]:
        """The global batches of the current epoch."""
        if self.seed is None:
            return self._cut(np.argsort(self.lengths, kind="stable"))
        generator = np.random.default_rng([self.seed, self.epoch])
        order = generator.permutation(len(self.lengths))
        batches = []
        for pool in np.split(order, self._pools(len(order))):
            batches += self._cut(pool[np.argsort(self.lengths[pool], kind="stable")])
        return [batches[place] for place in generator.permutation(len(batches))]

    def _pools(self, count: int) -> list[int]:
        """Where one pool ends and the next begins. One that would be less than a batch is part of the one before it."""
        size = POOL * self.batch_size
        return [start for start in range(size, count, size) if count - start >= self.batch_size]

    def smallest(self) -> int:
        """Examples of the smallest global batch; the same in every epoch."""
        count = len(self.lengths)
        bounds = [0, *(self._pools(count) if self.seed is not None else []), count]
        sizes = [end - start for start, end in itertools.pairwise(bounds)]
        return min(size // -(-size // self.batch_size) for size in sizes)

    def _cut(self, order: np.ndarray) -> list[np.ndarray]:
        """Batches of a size that differs by one at most: a short last batch might leave a rank without an example."""
        return np.array_split(order, -(-len(order) // self.batch_size))

    def __iter__(self) -> Iterator[list[int]]:
        batches, self.skip = self.batches()[self.skip :], 0
        epoch = None if self.seed is None else self.epoch
        for batch in batches:
            mine = batch[self.rank :: self.world]
            yield Rows(mine.tolist(), len(mine) * self.world / len(batch), epoch)
