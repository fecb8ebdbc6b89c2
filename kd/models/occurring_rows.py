"""A word-embedding table of which only the rows of words that occur in training are trained."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kd.errors import InputError

KEY = "trainer.embedding_rows"
"""Configuration key that chooses which rows are trained."""


class OccurringRows(nn.Module):
    """Embedding table whose parameter holds some rows; the others have no gradient and follow by one factor.

    A row that no training example reads has a zero gradient and zero moments at every step: AdamW changes it by its weight
    decay alone, a multiplication by 1 - lr * decay, and without decay nothing changes it. So the other rows are those of the
    start times `factor`, the product over all steps, which is kept in float64.

    The parameter is the one of the given module, with fewer rows: whatever refers to it goes on to do so. `state_dict` has the
    whole table under the name that it has in `torch.nn.Embedding`, and a whole table is loaded. Rows in `state_dict` and in
    forward passes without gradients are equal bit for bit.

    Args:
        embedding: the table, (words, width). It is not to be used until `restore` has been called.
        ids: words whose rows are trained, (rows,), increasing, int64.
    """

    def __init__(self, embedding: nn.Embedding, ids: Tensor) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx = embedding.padding_idx
        weight: Any = embedding.weight  # torch calls it a Tensor
        self.weight: nn.Parameter = weight
        """Rows that are trained, (rows, width)."""
        # No buffers: DDP would send them to the other ranks at every step.
        self.table: Tensor = embedding.weight.data
        """Rows of the start, (words, width); those that are trained are not read from it."""
        self.ids = ids.to(self.table.device)
        self.index = torch.full((self.num_embeddings,), -1, device=self.table.device)
        """Word -> index of its row in the parameter, (words,), -1 for the rows that are not trained."""
        self.index[self.ids] = torch.arange(len(ids), device=self.table.device)
        self.factor = 1.0
        """Product over all steps so far that the rows which are not trained have been multiplied by."""
        row = -1 if self.padding_idx is None else int(self.index[self.padding_idx])
        self._padding = None if row < 0 else row
        self.weight.data = self.table[self.ids]

    def forward(self, ids: Tensor) -> Tensor:
        """Look up word embeddings.

        Args:
            ids: words, (batch, tokens).

        Returns:
            (batch, tokens, width).

        Raises:
            InputError: with gradients, for a word whose row is not trained. On an accelerator it is the device's error for
                an index out of range.
        """
        index = self.index[ids]
        if torch.is_grad_enabled() and self.weight.requires_grad:
            self._check(ids, index)
            return functional.embedding(index, self.weight, self._padding)
        trained = functional.embedding(index.clamp(min=0), self.weight)
        others = functional.embedding(ids, self.table) * self.factor
        return torch.where(index.unsqueeze(-1) < 0, others, trained)

    def _check(self, ids: Tensor, index: Tensor) -> None:
        absent = index < 0
        # On an accelerator the test would wait for the device, and the lookup of row -1 fails by itself.
        if absent.device.type == "cpu" and absent.any():
            raise InputError(
                f"a training step reads the word {int(ids[absent][0])} of the vocabulary, which train does not have; train all "
                f"rows of the embedding table with {KEY}=all (a method declares such steps by `other_words`)",
                KEY,
            )

    def whole(self) -> Tensor:
        """Return the whole table as it is now, (words, width)."""
        table = self.table * self.factor
        table[self.ids] = self.weight.detach()
        return table

    def restore(self) -> None:
        """Give the parameter its whole table back, so that the module that this one was made of can be used again."""
        self.weight.data = self.whole()
        self.weight.grad = None

    def expanded(self, values: Tensor) -> Tensor:
        """Return values of the trained rows, (rows, width), as those of all, (words, width), with zeros elsewhere."""
        table = values.new_zeros(self.num_embeddings, *values.shape[1:])
        table[self.ids.to(values.device)] = values
        return table

    def selected(self, values: Tensor) -> Tensor:
        """Return the values of the trained rows, (rows, width), of those of all, (words, width)."""
        rows: Tensor = values[self.ids.to(values.device)]
        return rows

    def restart(self, table: Tensor, factor: float) -> None:
        """Continue with the rows of a start, if with this factor they are those that were loaded.

        A checkpoint has the rows as they were, rounded. With the start and the exact factor, a resumed run continues as it
        would have without the interruption, to the last bit.

        Args:
            table: rows of the start, (words, width).
            factor: that of the checkpoint.
        """
        if torch.equal((table * factor)[self.index < 0], self.whole()[self.index < 0]):
            self.table, self.factor = table, factor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "OccurringRows":
        self.table, self.ids, self.index = fn(self.table), fn(self.ids), fn(self.index)
        super()._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.whole()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: object,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        table = state_dict.get(f"{prefix}weight")
        if table is None:
            missing_keys.append(f"{prefix}weight")
        elif table.shape != self.table.shape:
            error_msgs.append(f"{prefix}weight is {tuple(table.shape)}, not {tuple(self.table.shape)}")
        else:
            self.table, self.factor = table.to(self.table, copy=True), 1.0
            with torch.no_grad():
                self.weight.copy_(self.table[self.ids])

    def extra_repr(self) -> str:
        """Describe the table."""
        return f"{len(self.ids)} of {self.num_embeddings}, {self.embedding_dim}, padding_idx={self.padding_idx}"
