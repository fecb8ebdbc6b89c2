"""Batches of examples of similar length: a pure function of seed and epoch, the same on every rank."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from kd.data.tokens import padded_length
from kd.errors import InputError

POOL = 50
"""Batches that are shuffled, sorted by length and cut together: large enough to save padding, small enough that what meets
what in a batch stays chance. Our choice."""

SPREAD = 1.1
"""Longest over shortest text that a token budget takes for equally long. Our choice: what shares batches is large enough to be
a shuffle, and at most 10 % of the tokens are padding for it."""


class Rows(list[int]):
    """The examples of one rank's share of a global batch.

    Attributes:
        weight: the share's size relative to an equal one, of the examples of an optimiser step. The mean over ranks and over
            `accumulate` batches of weighted means is then the mean over the step's examples, also where the ranks do not divide
            a batch, its batches differ in size, or an epoch ends before there are `accumulate` of them.
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
        accumulate: batches of an optimiser step; the last step of an epoch takes those that are left. Each batch is weighted as
            for a trainer that divides every loss by `accumulate`.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        batch_size: int,
        seed: int | None,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
    ) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.rank, self.world = rank, world
        self.accumulate = accumulate
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
        return [batches[index] for index in generator.permutation(len(batches))]

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
        batches = self.batches()
        first, self.skip = self.skip, 0
        sizes = [len(batch) for batch in batches]
        epoch = None if self.seed is None else self.epoch
        for index in range(first, len(batches)):
            batch, begin = batches[index], index - index % self.accumulate
            # The examples of the optimiser step; the trainer divides by `accumulate` however many batches they come in.
            count = sum(sizes[begin : begin + self.accumulate])
            mine = batch[self.rank :: self.world]
            yield Rows(mine.tolist(), len(mine) * self.world / len(batch) * (self.accumulate * len(batch) / count), epoch)


class TokenBatches(LengthBatches):
    """Batches of as many examples as fit into so many padded tokens: a hard limit, and the same batch count in every epoch.

    Texts of about the same length (`SPREAD`) are one class. An epoch lines up the classes from long to short, each shuffled
    anew, and cuts the line where the next example, were it the longest of its class, would not fit. At a given place of the
    line the class is always the same, so the places of the cuts are too; only who stands there is drawn.

    What it costs in fairness: any two examples of a class are equally likely to meet, those of two neighbouring classes meet
    only in the batch where one ends and the other begins, and others never do. Where a batch comes in an epoch is uniform, as
    for `LengthBatches`. A batch of short texts has more examples than one of long texts, and a loss is a mean over the batch,
    so an example of a short text weighs less in a step than one of a long text.

    Args:
        lengths: tokens of each example, at most.
        budget: padded tokens of a *global* batch; examples times the longest after padding.
        padding: the multiple that batches are padded to, and the length at which that ends.
        seed: of the shuffle.
        rank: this process, from 0.
        world: processes.
        accumulate: batches of an optimiser step, in which every example weighs the same.

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
        tokens = np.unique(self.lengths)
        if len(tokens) and (longest := padded_length(int(tokens[-1]), *padding)) > budget:
            raise InputError(
                f"trainer.batch_tokens={budget} is less than one text: the longest has {longest} tokens, padding included. "
                "A larger budget, or a smaller task.max_length",
                "trainer.batch_tokens",
            )
        self.classes = self._classes(tokens)
        self.cuts = self._cuts(padding)

    def _classes(self, tokens: np.ndarray) -> np.ndarray:
        """The longest text of the class of each example, in tokens."""
        most = np.zeros(len(tokens), dtype=np.int64)
        for index in range(len(tokens) - 1, -1, -1):
            same = index + 1 < len(tokens) and most[index + 1] <= SPREAD * tokens[index]
            most[index] = most[index + 1] if same else tokens[index]
        found: np.ndarray = most[np.searchsorted(tokens, self.lengths)]
        return found

    def _cuts(self, padding: tuple[int, int]) -> list[int]:
        """Where one batch of the line ends and the next begins."""
        line = -np.sort(-self.classes)
        bounds = [0]
        while bounds[-1] < len(line):
            room = self.budget // padded_length(int(line[bounds[-1]]), *padding)
            bounds.append(min(bounds[-1] + room, len(line)))
        # What is left over is not enough for a batch: the last two share what they have, so that no rank is left without.
        if len(bounds) > 2 and bounds[-1] - bounds[-2] < bounds[-2] - bounds[-3]:
            bounds[-2] = (bounds[-3] + bounds[-1] + 1) // 2
        return bounds[1:-1]

    def __len__(self) -> int:
        return len(self.cuts) + 1

    def smallest(self) -> int:
        """Examples of the smallest global batch; the same in every epoch."""
        return min(end - start for start, end in itertools.pairwise([0, *self.cuts, len(self.lengths)]))

    def batches(self) -> list[np.ndarray]:
        """The global batches of the current epoch."""
        assert self.seed is not None
        generator = np.random.default_rng([self.seed, self.epoch])
        order = generator.permutation(len(self.lengths))
        line = order[np.argsort(-self.classes[order], kind="stable")]
        batches = np.split(line, self.cuts)
        return [batches[index] for index in generator.permutation(len(batches))]
