"""A held part of train: examples that a student is not trained on, and a batch of them beside each training batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from kd.config.values import shown
from kd.data.examples import Examples
from kd.data.labels import has_label
from kd.data.sampler import LengthBatches, OptimiserStep, Rows
from kd.data.sources import hash_fraction
from kd.errors import InputError

SALT = "held by the method"
"""Put before a text whose hash decides whether it is held, so that the cut is independent of that of `task.holdout`, and of
the hash by which a task's own splits may have been cut."""


def checked_share(share: object, key: str = "holds") -> float:
    """Return a share of train after a check.

    Raises:
        InputError: if it is not a number in [0, 1); the error names `key`.
    """
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
        raise InputError(f"{key}={shown(share)} is a share of train, at least 0 and less than 1", key)
    return float(share)


@dataclass(frozen=True)
class Cut:
    """The part of train that is held, and what is left out for it.

    Attributes:
        held: whether each example is held, (examples,), bool.
        trained: whether each example is trained on. One that an edit made from a held example is neither.
    """

    held: np.ndarray
    trained: np.ndarray


def hashes(texts: Sequence[tuple[str, ...]]) -> np.ndarray:
    """Return a number in [0, 1) for each text, (texts,), that decides whether it is held."""
    return np.fromiter((hash_fraction((SALT, *text)) for text in texts), np.float64, len(texts))


def cut(examples: Examples, share: float, key: str = "holds", ranks: int = 1) -> Cut:
    """Cut the held part from train.

    A hash of the text decides, as for `task.holdout`: equal texts are on one side, whatever the seed, the order and the other
    examples, and a larger share holds the examples of a smaller one and more. Held are examples with a label, as the data has
    them, of the kind that is evaluated (`task.where_evaluated`): the held part stands in for a validation split. What an edit
    makes of a held example is not trained on.

    Args:
        examples: the examples.
        share: share of such examples that is held, in [0, 1).
        key: key that an error names.
        ranks: number of processes that share each batch.

    Raises:
        InputError: if the share is out of range, or fewer examples than there are ranks are held or left to train on.
    """
    share = checked_share(share, key)
    texts = examples.texts["train"]
    origins = texts if examples.origins is None else examples.origins
    chances = hashes(origins)
    own = chances if examples.origins is None else hashes(texts)
    may = has_label(examples.labels["train"])
    if examples.evaluated_like is not None:
        may &= examples.evaluated_like
    if examples.origins is not None:
        may &= np.fromiter((text == origin for text, origin in zip(texts, origins, strict=True)), bool, len(texts))
    held = may & (chances < share)
    trained = ~np.isin(chances, chances[held]) & ~np.isin(own, chances[held])
    if share and min(held.sum(), trained.sum()) < ranks:
        needed = "one example" if ranks == 1 else f"an example for each of {ranks} ranks"
        raise InputError(
            f"{key}={shown(share)} of {may.sum()} training examples holds {held.sum()} and leaves {trained.sum()} to train on; "
            f"either part needs {needed}",
            key,
        )
    return Cut(held, trained)


class WithHeld(Sampler[list[int]]):
    """Batches of the examples that are trained on, each with a batch of the held ones in `Rows.held`.

    The held examples are in one order, a permutation that follows from the seed, and are taken in turn, over and over. All
    global held batches have the same size, and none has an example twice. A batch follows from the seed, the epoch and the
    number of the training batch alone, so that a resumed run has those of an unbroken one. The accumulated batches of an
    optimiser step have consecutive parts of the order, together those that a step of one batch, `accumulate` times as large,
    has; the last step of an epoch, which may have fewer batches, has the first ones of them.

    Rank *r* of *n* takes every *n*-th example of a held batch, starting with the *r*-th. The `weight` of its rows is their
    number relative to an equal share: the mean over ranks of weighted means is the mean over the global held batch.

    Args:
        batches: sampler over the examples that are trained on, numbered from 0.
        trained: indices of these examples in train.
        held: indices of the held examples in train.
        size: examples of a global held batch; all if there are fewer.
    """

    def __init__(self, batches: LengthBatches, trained: np.ndarray, held: np.ndarray, size: int) -> None:
        assert batches.seed is not None
        self.inner = batches
        self.trained = trained
        # The spawn key sets it apart from the shuffle of the training examples.
        generator = np.random.default_rng(np.random.SeedSequence(batches.seed, spawn_key=(1,)))
        self.order = held[generator.permutation(len(held))]
        self.size = min(size, len(held))

    @property
    def sampler(self) -> "WithHeld":
        """The sampler itself: Lightning sets the epoch of `batch_sampler.sampler`."""
        return self

    @property
    def skip(self) -> int:
        """Number of batches already trained on in an interrupted epoch, which the next iteration leaves out."""
        return self.inner.skip

    @skip.setter
    def skip(self, count: int) -> None:
        self.inner.skip = count

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; Lightning calls this before each epoch."""
        self.inner.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.inner)

    def sizes(self) -> set[int]:
        """Return the numbers of examples that global batches have, those of held examples included."""
        return {*self.inner.sizes(), self.size}

    def held_batch(self, index: int) -> np.ndarray:
        """Return the global held batch of the training batch at this index in the current epoch, as indices in train."""
        accumulate = self.inner.accumulate
        steps = -(-len(self) // accumulate)
        number = (self.inner.epoch * steps + index // accumulate) * accumulate + index % accumulate
        return self.order[(number * self.size + np.arange(self.size)) % len(self.order)]

    def __iter__(self) -> Iterator[list[int]]:
        for index, rows in enumerate(self.inner, start=self.inner.skip):
            assert isinstance(rows, Rows)
            yield self.beside(index, rows)

    def share(self, index: int, batch: np.ndarray, of_step: OptimiserStep) -> Rows:
        """Return this rank's share of a global batch; arguments as for `LengthBatches.share`."""
        return self.beside(index, self.inner.share(index, batch, of_step))

    def beside(self, index: int, rows: Rows) -> Rows:
        """Return a rank's rows of the training batch at this index as indices in train, with its share of the held batch."""
        rank, world, batch = self.inner.rank, self.inner.world, self.held_batch(index)
        mine = batch[rank::world]
        held = Rows(mine.tolist(), len(mine) * world / len(batch), rows.epoch)
        return Rows(self.trained[rows].tolist(), rows.weight, rows.epoch, held, rows.label_weight)
