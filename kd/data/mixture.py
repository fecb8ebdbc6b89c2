"""Mixtures of tasks: which task a batch is of, and the loaders over all of them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from kd.config.mixture import MEAN
from kd.data.batch import Batch
from kd.data.datamodule import Epoch, KDDataModule, ResumableData, RowIndices
from kd.data.direction import higher_is_better
from kd.data.held import WithHeld
from kd.data.sampler import LengthBatches, OptimiserStep, Rows
from kd.data.tasks import Task
from kd.errors import InputError

DRAWS = 2
"""Spawn key of the random generator that draws tasks: it sets the draws apart from the shuffles of examples."""


class Mixture:
    """The metrics of several tasks, and which of them chooses the best checkpoint.

    A metric of a task is named `task/metric`; `mean` is the mean of the metrics that the tasks monitor.

    Args:
        name: name of the mixture.
        tasks: the tasks by name.
        monitor: name of the metric that chooses the best checkpoint.

    Raises:
        InputError: if the mean would be monitored, and a task monitors an error, which is better if it is smaller.
    """

    def __init__(self, name: str, tasks: Mapping[str, Task], monitor: str) -> None:
        self.name, self.tasks, self.monitor = name, dict(tasks), monitor
        errors = [name for name, task in tasks.items() if not higher_is_better(task.monitor)]
        if monitor == MEAN and errors:
            raise InputError(
                f"the mean is of metrics of which the largest is best, and {errors[0]} monitors {tasks[errors[0]].monitor}; "
                "let it monitor another one, or name the metric of one task",
                "monitor",
            )

    def joined(self, scores: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Return the metrics of all tasks by their names in the mixture, and their mean; None if one of those is undefined.

        Args:
            scores: task -> metric -> value.
        """
        named = {f"{task}/{metric}": value for task, values in scores.items() for metric, value in values.items()}
        monitored = [values[self.tasks[task].monitor] for task, values in scores.items()]
        defined = all(value is not None for value in monitored)
        return {MEAN: sum(monitored) / len(monitored) if defined else None, **named}


class TaskRows(Rows):
    """Indices of one rank's examples in a global batch of one task of a mixture.

    Attributes:
        task: name of the task.
    """

    def __init__(self, rows: Rows, task: str) -> None:
        super().__init__(rows, rows.weight, rows.epoch, rows.held, rows.label_weight)
        self.task = task


class MixedBatches(Sampler[list[int]]):
    r"""Batches of one task each, drawn with probabilities proportional to :math:`n^\tau`, n the task's number of examples.

    The batches of a task are those that its own sampler gives, epoch after epoch: no example is lost or repeated within an
    epoch of the task, however its batches are spread over the epochs of the mixture. An epoch of the mixture has as many
    batches as the epochs of all tasks together (our choice). Everything follows from the seed and the epoch, so that ranks
    agree, and a resumed epoch continues as it would have.

    The loss of an optimiser step is the mean over the examples of its batches, whatever their tasks.

    Args:
        samplers: the sampler over the training examples of each task, by name.
        sizes: number of training examples of each task.
        tau: exponent, 0 or more.
        seed: seed of the draws.
    """

    def __init__(self, samplers: Mapping[str, LengthBatches | WithHeld], sizes: Sequence[int], tau: float, seed: int) -> None:
        self.samplers, self.seed = dict(samplers), seed
        self.names = list(samplers)
        # Relative to the largest, so that no power overflows.
        weights = (np.asarray(sizes, dtype=np.float64) / max(sizes)) ** tau
        self.probabilities = weights / weights.sum()
        self.epoch = 0
        self.skip = 0
        """Number of batches already trained on in an interrupted epoch, which the next iteration leaves out."""

    @property
    def sampler(self) -> "MixedBatches":
        """The sampler itself: Lightning sets the epoch of `batch_sampler.sampler`, not of a batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; Lightning calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(len(sampler) for sampler in self.samplers.values())

    def sizes(self) -> set[int]:
        """Return the numbers of examples that global batches have, whatever their task."""
        return {size for sampler in self.samplers.values() for size in sampler.sizes()}

    def tasks(self, epoch: int) -> np.ndarray:
        """Return the task of each batch of an epoch, as an index into `names`, (batches,)."""
        seed = np.random.SeedSequence(self.seed, spawn_key=(DRAWS, epoch))
        return np.random.default_rng(seed).choice(len(self.names), size=len(self), p=self.probabilities)

    def __iter__(self) -> Iterator[list[int]]:
        first, self.skip = self.skip, 0
        tasks = self.tasks(self.epoch)
        accumulate = plain(next(iter(self.samplers.values()))).accumulate
        begin = first - first % accumulate  # that of the optimiser step of the first batch
        before = np.concatenate([*(self.tasks(epoch) for epoch in range(self.epoch)), tasks[:begin]]).astype(int)
        streams = [
            Stream(self.samplers[name], int(count))
            for name, count in zip(self.names, np.bincount(before, minlength=len(self.names)), strict=True)
        ]
        for start in range(begin, len(tasks), accumulate):
            drawn = [(task, next(streams[task])) for task in tasks[start : start + accumulate]]
            of_step = OptimiserStep.of([(streams[task].sampler, batch) for task, (_, _, batch) in drawn])
            for number, (task, (epoch, index, batch)) in enumerate(drawn, start=start):
                if number >= first:
                    sampler = self.samplers[self.names[task]]
                    sampler.set_epoch(epoch)
                    yield TaskRows(sampler.share(index, batch, of_step), self.names[task])


def plain(sampler: LengthBatches | WithHeld) -> LengthBatches:
    """Return the sampler of the examples that are trained on."""
    return sampler.inner if isinstance(sampler, WithHeld) else sampler


class Stream(Iterator[tuple[int, int, np.ndarray]]):
    """The global batches of a sampler without end, epoch after epoch, each with its epoch and its index in it.

    Args:
        sampler: the sampler.
        count: number of batches that are left out first.
    """

    def __init__(self, sampler: LengthBatches | WithHeld, count: int) -> None:
        self.sampler, self.count = plain(sampler), count
        self.epoch = -1
        self.batches: Sequence[np.ndarray] = []

    def __next__(self) -> tuple[int, int, np.ndarray]:
        epoch, index = divmod(self.count, len(self.sampler))
        if epoch != self.epoch:
            self.sampler.set_epoch(epoch)
            self.epoch, self.batches = epoch, self.sampler.batches(index)
        self.count += 1
        return epoch, index, self.batches[index]


class MixedCollate:
    """Collate function that leaves a batch to the collate function of its task.

    Args:
        of_task: collate function of each task by name.
    """

    def __init__(self, of_task: Mapping[str, Any]) -> None:
        self.of_task = dict(of_task)

    def __call__(self, rows: list[int]) -> Batch:
        """Return the batch of these examples, a `TaskRows`."""
        assert isinstance(rows, TaskRows)
        batch: Batch = self.of_task[rows.task](rows)
        return batch


class MixedData(ResumableData):
    """Loaders over several tasks: one for training, whose batches are of one task each, and one for each task's validation.

    Args:
        parts: the data module of each task by name, with its name as `of`.
        tau: exponent of the sampling probabilities.
        seed: seed of the shuffles and draws.
    """

    def __init__(self, parts: Mapping[str, KDDataModule], tau: float, seed: int) -> None:
        super().__init__()
        self.parts, self.tau, self.seed = dict(parts), tau, seed

    def sampler(self) -> MixedBatches:
        """Return the sampler of training batches."""
        samplers = {name: part.sampler("train", self.seed) for name, part in self.parts.items()}
        sizes = [part.trained_rows for part in self.parts.values()]
        return MixedBatches(samplers, sizes, self.tau, self.seed)

    def epoch(self) -> Epoch:
        """Return the size of an epoch; a task may have more or fewer batches in it than in an epoch of its own."""
        return Epoch(len(self.sampler()), sum(part.trained_count for part in self.parts.values()))

    @property
    def padded_lengths(self) -> set[int]:
        """Numbers of tokens that batches may have after padding."""
        return {length for part in self.parts.values() for length in part.padded_lengths}

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of training batches."""
        first = next(iter(self.parts.values()))
        self._train_sampler = sampler = self.sampler()
        sampler.skip = self._skip
        return DataLoader(
            RowIndices(sum(part.trained_rows for part in self.parts.values())),  # type: ignore[arg-type]
            batch_sampler=sampler,
            collate_fn=MixedCollate({name: part.collate("train") for name, part in self.parts.items()}),
            num_workers=first.workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=first.workers > 0,
        )

    def close(self) -> None:
        """End what works in the background of the training."""
        for part in self.parts.values():
            part.close()

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """Return the loader of each task's validation batches."""
        return [part.loader("validation") for part in self.parts.values()]
