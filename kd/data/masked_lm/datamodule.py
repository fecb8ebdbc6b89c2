"""Batches and loaders of masked language modelling."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kd.data.batch import Batch
from kd.data.datamodule import KDDataModule
from kd.data.examples import Examples
from kd.data.masked_lm.tokenized import OTHER_VOCABULARY, MaskedTokens
from kd.data.sampler import Rows
from kd.data.tokenized import AnyTokenizer
from kd.errors import InputError


@dataclass
class MaskedCollate:
    """Collate function from chunk indices to a `Batch`. Student and teachers read the same masked tokens."""

    tokens: MaskedTokens
    teachers: int
    students: int = 1

    def __call__(self, rows: Sequence[int]) -> Batch:
        """Return the batch of these chunks."""
        inputs, labels = self.tokens.pad(rows, rows.epoch if isinstance(rows, Rows) else None)
        weight = rows.weight if isinstance(rows, Rows) else 1.0
        index, peers = torch.tensor(list(rows), dtype=torch.long), (inputs,) * (self.students - 1)
        held = self(rows.held) if isinstance(rows, Rows) and rows.held is not None else None
        return Batch(inputs, (inputs,) * self.teachers, labels, index, weight, peers, held)


class MaskedLMDataModule(KDDataModule):
    """Loaders over unlabelled text; arguments as for `KDDataModule`.

    Raises:
        InputError: for a teacher with another vocabulary, because its logits could not be compared with the student's.
    """

    changes = "the text is masked anew in every epoch"

    def __init__(
        self,
        examples: Examples,
        students: Sequence[AnyTokenizer],
        teachers: Sequence[AnyTokenizer],
        *sizes: Any,
        **options: Any,
    ) -> None:
        super().__init__(examples, students, teachers, *sizes, **options)
        if not self.shared_tokenizer:
            raise InputError(OTHER_VOCABULARY, "teacher")

    def read(self, tokenizer: AnyTokenizer, texts: Sequence[tuple[str, ...]], max_length: int) -> Any:
        """Tokenise the texts of one split, for masking in each batch."""
        return MaskedTokens(tokenizer, texts, max_length, self.seed, self.pad_multiple, self.store)

    def text_of_rows(self, split: str) -> np.ndarray:
        """Return the index of each chunk's text in the split, (chunks,)."""
        tokens = self.tokens[split][self.student_key]
        ends = np.cumsum(tokens.vocabularies[0].words)
        index: np.ndarray = np.searchsorted(ends, tokens.chunks[:, 0], side="right")
        return index

    def collate(self, split: str) -> MaskedCollate:
        """Return the collate function of a split."""
        return MaskedCollate(self.tokens[split][self.student_key], len(self.teacher_keys), len(self.student_keys))

    def probe(self, split: str, count: int) -> Batch:
        """Return a batch of at most `count` examples of a split, tokenised with the exported model's vocabulary alone."""
        tokens = self.tokens[split][self.student_key]
        probability, tokens.probability = tokens.probability, 0.0
        try:
            return self.collate(split)(self.rows(split, count))
        finally:
            tokens.probability = probability
