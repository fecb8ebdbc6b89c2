"""An edit that adds the weights of Meta-KD to train: similarities of each example to the prototypes of domains."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from kd.config.values import number, whole, word
from kd.data.edits import ColumnEdit, FrozenModel, Split
from kd.data.tasks import Task
from kd.data.texts import Texts
from kd.errors import InputError
from kd.functional.hidden import PADDING
from kd.functional.prototypes import ACROSS, content_vector, transferability

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

OF = ("domain", "class")
"""Examples that have one prototype: those of a domain, or those of a class in a domain."""

AT_ONCE = 32
"""Number of texts in a forward pass."""


class PrototypeWeights(ColumnEdit):
    r"""The transferability t(x) of each training example, from a model that was not fine-tuned.

    Source: Pan et al., Meta-KD, ACL 2021, arXiv:2012.01266: how similar the text is to the prototype of its own domain and to
    those of the others, see `kd.functional.prototypes.transferability`. A vector of a text is the mean of the last states of
    its tokens without [CLS]. Authors' code consulted for facts: EasyTransfer, `meta_kd`.

    Args:
        column: name of the column that is added.
        domain: name of the column of domains (`task.extra`), of two or more.
        prototypes: of a `domain` (authors' code), or of a `class` in a domain (paper).
        across: `mean_of_prototypes` (authors' code) or `mean_of_cosines` (paper).
        own: factor of the similarity to the own domain, 0.5 in the authors' code.
        others: factor of the similarity to the other domains, 0.5 in the authors' code.
        padding: `strict`, a mean over real tokens (our choice); `reference`, over `max_length` positions (authors' code).
        max_length: tokens of a text, 128 in the authors' code.
    """

    head: ClassVar[str | None] = None
    column: str

    def __init__(
        self,
        column: str = "transferability",
        domain: str = "domain",
        prototypes: str = "domain",
        across: str = "mean_of_prototypes",
        own: float = 0.5,
        others: float = 0.5,
        padding: str = "strict",
        max_length: int = 128,
    ) -> None:
        self.column = column
        self.domain = domain
        self.prototypes = word(prototypes, OF, "prototypes")
        self.across = word(across, ACROSS, "across")
        self.own, self.others = number(own, "own", 0, 1e6), number(others, "others", 0, 1e6)
        self.padding = word(padding, PADDING, "padding")
        self.max_length = whole(max_length, "max_length", 3, 65_536)

    def check(self, model: FrozenModel, task: Task) -> None:
        """Check that the model has enough positions, and the task domains.

        Raises:
            InputError: if the model has fewer than `max_length`, or for a task without a column of two domains or more, or
                without the classes that prototypes are of.
        """
        self.domains(task)
        if model.positions < self.max_length:
            raise InputError(f"max_length={self.max_length} is more than the model's {model.positions} positions", "max_length")

    def domains(self, task: Task) -> list[str]:
        """Return the names of a task's domains.

        Raises:
            InputError: for a task without a column of two domains or more, or without the classes that prototypes are of.
        """
        names = task.column_classes.get(self.domain)
        if names is None or len(names) < 2:
            raise InputError(
                f"domain={self.domain} is not a column of two domains or more: 'task.extra={{{self.domain}: classes}}'",
                "domain",
            )
        if self.prototypes == "class" and task.labels is None:
            raise InputError(
                "prototypes=class needs classes, and the task is a regression; use prototypes=domain", "prototypes"
            )
        return names

    def values(self, train: Split, task: Task, model: FrozenModel) -> np.ndarray:
        """Return t of each example.

        Raises:
            InputError: for a domain without examples, and as `check`.
        """
        names = self.domains(task)
        domains = torch.from_numpy(np.asarray(train.columns[self.domain], dtype=np.int64))
        if lacking := [name for index, name in enumerate(names) if not (domains == index).any()]:
            raise InputError(f"train has no example of the domain '{lacking[0]}', which so has no prototype", "domain")
        classes = torch.tensor([int(label) for label in train.labels]) if self.prototypes == "class" else None
        vectors = torch.cat(list(self._vectors(train.texts, model)))
        return transferability(vectors, domains, len(names), classes, self.own, self.others, self.across).numpy()

    def _vectors(self, texts: Texts, model: FrozenModel) -> Iterator[Tensor]:
        """Yield the vectors of the texts, (batch, width)."""
        tokenizer: PreTrainedTokenizerFast = model.tokenizer
        padding = "max_length" if self.padding == "reference" else "longest"
        rows = [texts[row] for row in range(len(texts))]
        for start in range(0, len(rows), AT_ONCE):
            batch = rows[start : start + AT_ONCE]
            columns = [list(column) for column in zip(*batch, strict=True)]
            inputs = dict(
                tokenizer(*columns, padding=padding, truncation=True, max_length=self.max_length, return_tensors="pt")
            )
            states = model.states(inputs)
            yield content_vector(states, inputs["attention_mask"].bool(), self.padding)
