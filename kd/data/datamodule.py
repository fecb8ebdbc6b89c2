"""Examples, tokenised once, and the loaders over them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from kd.data.batch import Batch
from kd.data.examples import Examples
from kd.data.held import WithHeld, cut
from kd.data.labels import has_label
from kd.data.sampler import LengthBatches, Rows, TokenBatches
from kd.data.stored_texts import StoredTexts
from kd.data.stored_tokens import JoinedTokens, LengthsOnDemand, StoredTokens
from kd.data.tasks import Task
from kd.data.texts import JoinedTexts
from kd.data.tokenized import AnyTokenizer, Tokens, TokenStore, padded_length, padded_lengths, tokenizer_fingerprint
from kd.errors import InputError
from kd.system import hardware

MOST_BEFORE = 100_000
"""Largest number of texts without labels that are tokenised before the training; more are in the background of the first epoch.
Our choice: some seconds."""

TRIAL_TEXTS = 1024
"""Number of examples with labels, and of those without, among which the trial batch is looked for if not all have tokens."""


class RowIndices(Dataset[int]):
    """Dataset of the example indices of a split; `Collate` reads the examples, a batch at a time."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index

    def __getitems__(self, rows: list[int]) -> list[int]:
        """Return the indices of a whole batch as the sampler gave them, so that `Rows` keeps its attributes."""
        return rows


class Padded(Protocol):
    """Inputs of one model for every example of a split: its tokens, or in their place its cached outputs."""

    def pad(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return the tensors of these examples by name, (batch, ...), padded to the longest."""


@dataclass
class Collate:
    """Collate function from example indices to a `Batch`. Models with equal tokenizers share one inputs object."""

    tokens: Mapping[str, Padded]
    students: Sequence[str]
    teachers: Sequence[str]
    labels: Sequence[float]
    task: Task
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    of: str | None = None

    def __call__(self, rows: Sequence[int]) -> Batch:
        """Return the batch of these examples."""
        inputs = {key: tokens.pad(rows) for key, tokens in self.tokens.items()}
        return Batch(
            inputs[self.students[0]],
            tuple(inputs[key] for key in self.teachers),
            self.task.label_tensor([self.labels[row] for row in rows]),
            torch.tensor(list(rows), dtype=torch.long),
            rows.weight if isinstance(rows, Rows) else 1.0,
            tuple(inputs[key] for key in self.students[1:]),
            self(rows.held) if isinstance(rows, Rows) and rows.held is not None else None,
            {name: torch.from_numpy(values[list(rows)]) for name, values in self.columns.items()},
            rows.label_weight if isinstance(rows, Rows) else 1.0,
            self.of,
        )


class ResumableData(pl.LightningDataModule):
    """Data module whose interrupted epoch continues with the batch after the last one that was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self._train_sampler: Any = None
        """Sampler of training batches, with the number of batches to leave out as `skip`; None before the loader is made."""
        self._skip = 0

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move a batch to a device without waiting for it; Lightning's default would wait for each of its tensors."""
        return batch.map(lambda tensor: hardware.to_device(tensor, device))

    def close(self) -> None:
        """End what works in the background of the training."""

    def state_dict(self) -> dict[str, int]:
        """Return the number of batches done in the current epoch, so that a resumed epoch continues with the next one."""
        if self.trainer is None:
            return {"batch": 0}
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        return {"batch": 0 if progress.is_last_batch else progress.current.processed}  # type: ignore[attr-defined]

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue the epoch after the batch that `state_dict` recorded."""
        self._skip = state["batch"]
        if self._train_sampler is not None:
            self._train_sampler.skip = self._skip


@dataclass(frozen=True)
class Epoch:
    """Size of an epoch of training, over all ranks.

    Attributes:
        batches: number of batches.
        examples: number of examples, as texts.
    """

    batches: int
    examples: int


def chosen(values: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
    """Return the values of these examples; of all if `rows` is None."""
    return values if rows is None else values[rows]


def why_later(examples: Examples) -> str | None:
    """Return the reason why not all texts of train have tokens before the training; None if they have."""
    stored = examples.stored
    if stored is None or len(stored) <= MOST_BEFORE:
        return None
    return f"{len(stored):,} texts without labels are tokenised in the background of the first epoch"


class KDDataModule(ResumableData):
    """Loaders over a task, tokenised for its students and teachers.

    A subclass whose text differs between epochs gives the reason in `changes`; teacher outputs are then not cached.

    Args:
        examples: the task's text and labels.
        students: each student's tokenizer; batches are formed by the lengths with the first one.
        teachers: each teacher's tokenizer.
        batch_size: examples of a global training batch, over all ranks.
        eval_batch_size: examples of a global evaluation batch.
        max_length: number of tokens to which a text, or a pair of texts, is truncated.
        seed: seed of the shuffle.
        workers: number of loader processes per loader.
        rank: rank of this process.
        world: number of processes.
        pad_multiple: batches are padded to a multiple of this number of tokens.
        batch_tokens: largest number of padded tokens of a global training batch; replaces `batch_size`.
        store: folder for tokenised texts; None stores none.
        accumulate: training batches of an optimiser step.
        holds: share of train that is held (`kd.data.held`): not trained on, and beside each training batch as `Batch.held`.
        of: `Batch.task` of the batches: the task's name in a mixture, None outside one.

    Raises:
        InputError: if a split, or a part of train, has fewer examples than there are ranks.
    """

    changes: str | None = None
    """Reason why the text differs between epochs; None if it does not."""

    def __init__(
        self,
        examples: Examples,
        students: Sequence[AnyTokenizer],
        teachers: Sequence[AnyTokenizer],
        batch_size: int,
        eval_batch_size: int,
        max_length: int,
        seed: int,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        pad_multiple: int = 1,
        batch_tokens: int | None = None,
        store: Path | None = None,
        accumulate: int = 1,
        holds: float = 0.0,
        of: str | None = None,
    ) -> None:
        super().__init__()
        self.of = of
        self._lengths: LengthsOnDemand | None = None
        self.examples = examples
        self.max_length, self.pad_multiple, self.batch_tokens = max_length, pad_multiple, batch_tokens
        self.accumulate = accumulate
        self.store = TokenStore(store)
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.seed, self.workers, self.rank, self.world = seed, workers, rank, world
        self.student_keys = [tokenizer_fingerprint(student) for student in students]
        self.teacher_keys = [tokenizer_fingerprint(teacher) for teacher in teachers]
        tokenizers = dict(zip([*self.student_keys, *self.teacher_keys], [*students, *teachers], strict=True))
        self.tokens = {
            split: {key: self.read(tokenizer, texts, max_length) for key, tokenizer in tokenizers.items()}
            for split, texts in examples.texts.items()
        }
        for split in self.tokens:
            if (count := self.count(split)) < world:
                raise InputError(f"'{split}' has {count} examples for {world} ranks", split.partition("_")[0])
        self.shared_tokenizer = len(tokenizers) == 1
        """True if all students and teachers have the same tokenizer."""
        self._trained: np.ndarray | None = None
        self.held = np.zeros(0, dtype=np.int64)
        """Indices in train of the held examples."""
        self.held_count, self.trained_count = 0, len(examples.texts["train"])
        """Numbers of examples of train that are held, and that are trained on, as texts."""
        if holds:
            parts = cut(examples, holds, ranks=world)
            self.held_count, self.trained_count = int(parts.held.sum()), int(parts.trained.sum())
            text_of_rows = self.text_of_rows("train")
            self._trained, self.held = (np.flatnonzero(part[text_of_rows]) for part in (parts.trained, parts.held))
        if holds and min(len(self.trained), len(self.held)) < world:  # a text without tokens to predict is no example
            raise InputError(
                f"holds={holds} holds {len(self.held)} examples and leaves {len(self.trained)} to train on, for {world} ranks",
                "holds",
            )

    @property
    def trained(self) -> np.ndarray:
        """Indices in train of the examples that are trained on."""
        return np.arange(self.count("train")) if self._trained is None else self._trained

    @property
    def trained_rows(self) -> int:
        """Number of the examples that are trained on: a text may be several, or none."""
        return self.count("train") if self._trained is None else len(self._trained)

    def trained_from(self, index: int, count: int) -> np.ndarray:
        """Return the indices in train of at most `count` examples that are trained on, the first ones from an index on."""
        if self._trained is None:
            return np.arange(index, min(index + count, self.count("train")))
        start = np.searchsorted(self._trained, index)
        return self._trained[start : start + count]

    @property
    def later(self) -> str | None:
        """Reason why not all texts of train have tokens before the training; None if they have."""
        return why_later(self.examples)

    def count(self, split: str) -> int:
        """Return the number of examples of a split."""
        return len(self.tokens[split][self.student_key])

    def close(self) -> None:
        """End the thread that makes tokens in the background, if there is one."""
        if self._lengths is not None:
            self._lengths.close()

    def use_cached(self, index: int, splits: Mapping[str, Padded]) -> None:
        """Replace the tokens of the teacher at this index by its cached outputs, in all batches of these splits."""
        for split, cached in splits.items():
            self.tokens[split][f"teacher {index}"] = cached

    def read(self, tokenizer: AnyTokenizer, texts: Sequence[tuple[str, ...]], max_length: int) -> Any:
        """Tokenise the texts of one split; those on disk, if they are many, when they are needed."""
        if not isinstance(texts, JoinedTexts):
            return Tokens(tokenizer, texts, max_length, self.pad_multiple, self.store)  # type: ignore[arg-type]
        first, stored = texts.parts
        assert isinstance(stored, StoredTexts)
        own = StoredTokens(tokenizer, stored, max_length, self.pad_multiple, self.store)  # type: ignore[arg-type]
        if len(stored) <= MOST_BEFORE:
            own.complete(announce=False)
        return JoinedTokens(self.read(tokenizer, first, max_length), own)

    def words(self, key: str) -> np.ndarray:
        """Return the words that training text has, padding included, for the tokenizer with this key: ids, increasing."""
        ids: np.ndarray = self.tokens["train"][key].words()
        return ids

    def text_of_rows(self, split: str) -> np.ndarray:
        """Return the index of each example's text in the split, (examples,)."""
        return np.arange(len(self.examples.texts[split]))

    def epoch(self) -> Epoch:
        """Return the size of an epoch."""
        return Epoch(len(self.sampler("train", self.seed)), self.trained_count)

    @property
    def padded_lengths(self) -> set[int]:
        """Numbers of tokens that batches may have after padding."""
        return padded_lengths(self.pad_multiple, self.max_length)

    @property
    def student_key(self) -> str:
        """Key of the first student's tokens in `tokens[split]`."""
        return self.student_keys[0]

    def rows(self, split: str, count: int) -> list[int]:
        """Return the indices of the first examples of a split, at most `count`."""
        return list(range(min(count, self.count(split))))

    def probe(self, split: str, count: int) -> Batch:
        """Return a batch of at most `count` examples of a split, tokenised as for the exported model."""
        return self.collate(split)(self.rows(split, count))

    def trial(self, count: int) -> Batch:
        """Return a batch of at most `count` of the shortest training examples, with the shortest held ones beside it.

        If texts are tokenised in the background of the training, the first examples with a label and the first without one
        alone are looked at.
        """
        tokens, held = self.tokens["train"][self.student_key], self.held
        if self.later is None:
            trained = self.trained
            lengths = [tokens.lengths[part] for part in (trained, held)]
        else:
            trained = np.unique(np.concatenate([self.trained_from(start, TRIAL_TEXTS) for start in (0, len(tokens.first))]))
            self.lengths().need(trained)
            lengths = [np.asarray(tokens.lengths_of(part.tolist()), dtype=np.int64) for part in (trained, held)]
        rows, beside = (part[own.argsort()[:count]].tolist() for part, own in zip((trained, held), lengths, strict=True))
        return self.collate("train")(Rows(rows, held=Rows(beside) if beside else None))

    def lengths(self) -> LengthsOnDemand:
        """Return the numbers of tokens of the examples that are trained on, of which some may have none before the training."""
        if self._lengths is None:
            tokens = {key: self.tokens["train"][key] for key in dict.fromkeys([*self.student_keys, *self.teacher_keys])}
            self._lengths = LengthsOnDemand(list(tokens.values()), self._trained)
        return self._lengths

    def collate(self, split: str) -> Callable[[Sequence[int]], Batch]:
        """Return the collate function of a split."""
        tokens, examples = self.tokens[split], self.examples
        teachers = [f"teacher {index}" for index in range(len(self.teacher_keys))]
        teachers = [own if own in tokens else key for own, key in zip(teachers, self.teacher_keys, strict=True)]
        read = {key: tokens[key] for key in (*self.student_keys, *teachers)}
        columns = examples.columns.get(split, {})
        return Collate(read, self.student_keys, teachers, examples.labels[split], examples.task, columns, self.of)

    def loader(self, split: str, seed: int | None = None) -> DataLoader[Batch]:
        """Return a loader over a split: shuffled with a seed, sorted by length without one."""
        sampler = self.sampler(split, seed)
        if seed is not None:
            self._train_sampler = sampler
            sampler.skip = self._skip
        return DataLoader(
            RowIndices(self.count(split)),  # type: ignore[arg-type]
            batch_sampler=sampler,
            collate_fn=self.collate(split),
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.workers > 0,
        )

    def sampler(self, split: str, seed: int | None) -> LengthBatches | WithHeld:
        """Return the batch sampler of a split; for training with `batch_tokens`, one with a token budget.

        Raises:
            InputError: for a batch with fewer examples than ranks, or a text that is longer than the budget.
        """
        tokens = self.tokens[split][self.student_key]
        holds = seed is not None and len(self.held) > 0
        trained = self._trained if holds else None
        key, size, accumulate = "trainer.eval_batch_size", self.eval_batch_size, 1
        if seed is not None:
            key, size, accumulate = "trainer.batch_size", self.batch_size, self.accumulate
        sampler: LengthBatches
        if seed is not None and self.batch_tokens is not None:
            key, size = "trainer.batch_tokens", self.batch_tokens
            padding = (self.pad_multiple, self.max_length)
            longest = chosen(tokens.longest, trained)
            sampler = TokenBatches(longest, size, padding, seed, self.rank, self.world, accumulate)
        elif seed is not None and isinstance(tokens, JoinedTokens):
            sampler = LengthBatches(self.lengths(), size, seed, self.rank, self.world, accumulate)
        else:
            sampler = LengthBatches(chosen(tokens.lengths, trained), size, seed, self.rank, self.world, accumulate)
        if split == "train" and self.examples.task.partly_labelled:
            sampler.labelled = chosen(has_label(self.examples.labels["train"]), trained)
        if sampler.smallest() < self.world:
            raise InputError(
                f"{key}={size} cuts '{split}' into batches of which one has {sampler.smallest()} examples for {self.world} "
                "ranks to share; it should be larger, so that each has two or more",
                key,
            )
        return sampler if trained is None else WithHeld(sampler, trained, self.held, self.held_size())

    def held_size(self) -> int:
        """Return the number of examples of a global held batch, our choice: as many as a training batch has, at most all.

        With `batch_tokens` as many as are within it if each is as long as the longest held one.

        Raises:
            InputError: if these are fewer than there are ranks.
        """
        if self.batch_tokens is None:
            return min(self.batch_size, len(self.held))
        longest = int(self.tokens["train"][self.student_key].longest[self.held].max())
        room = self.batch_tokens // padded_length(longest, self.pad_multiple, self.max_length)
        if room < self.world:
            raise InputError(
                f"trainer.batch_tokens={self.batch_tokens} has room for {room} of the longest held examples, which have "
                f"{longest} tokens, for {self.world} ranks; it should be larger",
                "trainer.batch_tokens",
            )
        return min(room, len(self.held))

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of training batches."""
        return self.loader("train", self.seed)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of validation batches."""
        return self.loader("validation")
