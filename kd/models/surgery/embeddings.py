"""Interface of surgeries, which follow a student's initialisation in the order given, with any method; those on embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from kd.config.values import whole
from kd.errors import InputError
from kd.models.encoder import Encoder
from kd.models.surgery.wordpiece import (
    check_wordpiece,
    learned_tokens,
    set_outputs,
    set_vocabulary,
    special_tokens,
    used_tokens,
    with_vocabulary,
)
from kd.system import distributed


@dataclass(frozen=True, slots=True)
class SurgeryInputs:
    """Inputs of a surgery.

    Attributes:
        texts: the training texts.
        folder: folder with the exported student of the run that the surgery's `run` option configures; None without one.
    """

    texts: Sequence[str]
    folder: Path | None = None


class Surgery(Protocol):
    """Interface of a surgery that `kd.build.models` can apply."""

    changes_vocabulary: bool

    def config(self, config: PretrainedConfig) -> PretrainedConfig:
        """Return the configuration that a student will have in the exported folder. Optional: without it, that is the same.

        Only the number of layers may differ: a surgery that changes it keeps the student's layers, and adds further ones above
        them that follow from them. A run which starts from the exported folder of a run with the same surgery then takes the
        lower layers, and after the surgery the upper ones have to equal those of the folder.

        Raises:
            InputError: if the surgery cannot be applied to a student of this configuration.
        """
        ...

    def shape(self, student: Encoder) -> Encoder:
        """Return the shape that a student will have, as far as it does not depend on the training texts.

        Called before anything is trained.

        Args:
            student: the student on the meta device; it may be changed.

        Raises:
            InputError: if the surgery cannot be applied to a student of this shape.
        """
        ...

    def dry_run(self, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> None:
        """Check, before anything is trained, that the surgery can be applied with the training texts. Optional.

        Raises:
            InputError: if it cannot.
        """
        ...

    def __call__(self, student: Encoder, inputs: SurgeryInputs) -> tuple[Encoder, str]:
        """Apply the surgery; return the student and a description of the change.

        Raises:
            InputError: if it cannot be applied to this student.
        """
        ...


def word_table(student: Encoder, name: str) -> nn.Embedding:
    """Return the module of a student's word embeddings.

    Raises:
        InputError: if another surgery has replaced it.
    """
    table = student.model.get_input_embeddings()
    if type(table) is not nn.Embedding:
        kind = type(table).__name__
        raise InputError(f"{name} must come before the surgery that replaced the word embeddings ({kind})", "surgery")
    return table


class CutVocabulary:
    """Surgery that reduces the vocabulary to the tokens of the training texts; their embeddings are not changed.

    With `min_count=1` the training texts are segmented as before, so the model's outputs on them are unchanged; other texts
    may be segmented into more and shorter pieces.

    Args:
        min_count: number of occurrences from which a token stays in the vocabulary, at least 1. Special tokens, and the
            single characters of the texts, always stay.
    """

    changes_vocabulary = True

    def __init__(self, min_count: int = 1) -> None:
        self.min_count = whole(min_count, "min_count")

    def shape(self, student: Encoder) -> Encoder:
        """Check that the vocabulary can be reduced; return the student unchanged, because the size depends on the texts."""
        word_table(student, "cut_vocabulary")
        check_wordpiece(student.tokenizer)
        return student

    def __call__(self, student: Encoder, inputs: SurgeryInputs) -> tuple[Encoder, str]:
        """Return the student with the smaller vocabulary, and a description of the change."""
        self.shape(student)
        table, old = word_table(student, "cut_vocabulary"), student.tokenizer
        tokens = distributed.broadcast(used_tokens(old, inputs.texts, self.min_count))
        rows = torch.tensor(old.convert_tokens_to_ids(tokens))
        outputs = student.model.get_output_embeddings()
        student.tokenizer = with_vocabulary(old, tokens)
        bias = None if outputs is None else outputs.bias.detach()[rows]
        set_vocabulary(student.model, table.weight.detach()[rows], bias, student.tokenizer.pad_token_id)
        return student, f"vocabulary cut from {len(old)} to {len(tokens)} tokens"


class LearnedVocabulary:
    """Surgery that replaces the vocabulary by a WordPiece one learned from the training texts, with random embeddings.

    Args:
        size: number of tokens, special ones included.
    """

    changes_vocabulary = True

    def __init__(self, size: int) -> None:
        self.size = whole(size, "size")

    def dry_run(self, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> None:
        """Check, before anything is trained, that the texts support the vocabulary: learn it and discard it."""
        learned_tokens(tokenizer, texts, self.size)

    def shape(self, student: Encoder) -> Encoder:
        """Check that the vocabulary can be replaced; return the student unchanged."""
        word_table(student, "learned_vocabulary")
        check_wordpiece(student.tokenizer)
        return student

    def __call__(self, student: Encoder, inputs: SurgeryInputs) -> tuple[Encoder, str]:
        """Return the student with the learned vocabulary, and a description of the change."""
        self.shape(student)
        tokens = distributed.broadcast(learned_tokens(student.tokenizer, inputs.texts, self.size))
        student.tokenizer = with_vocabulary(student.tokenizer, tokens)
        padding = student.tokenizer.pad_token_id
        set_vocabulary(student.model, drawn_table(len(tokens), student.width, student.config, padding), None, padding)
        return student, f"vocabulary of {len(tokens)} tokens learned from the task's text"


def drawn_table(size: int, width: int, config: PretrainedConfig, padding: int | None = None) -> Tensor:
    """Return random embeddings (size, width), initialised as BERT's are; zeros for the padding token."""
    table = torch.empty(size, width).normal_(std=config.initializer_range)
    if padding is not None:
        table[padding] = 0
    return table


class FactorizedEmbedding(nn.Module):
    """Word embeddings as a product: (vocabulary, rank) times (rank, width).

    Args:
        vocabulary: number of tokens.
        rank: rank of the product.
        width: width of an embedding.
        padding: id of the padding token; None without one.
    """

    def __init__(self, vocabulary: int, rank: int, width: int, padding: int | None) -> None:
        super().__init__()
        self.rows = nn.Embedding(vocabulary, rank, padding_idx=padding)
        self.basis = nn.Linear(rank, width, bias=False)

    @property
    def weight(self) -> Tensor:
        """Product of the factors, (vocabulary, width)."""
        return self.rows.weight @ self.basis.weight.T

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embeddings (..., width) of ids (...)."""
        return self.basis(self.rows(ids))  # type: ignore[no-any-return]

    def plain(self) -> nn.Embedding:
        """Return an ordinary embedding that holds the product."""
        table, padding = self.weight.detach().clone(), self.rows.padding_idx
        words: nn.Embedding = nn.Embedding.from_pretrained(table, freeze=False, padding_idx=padding)
        return words


class FactorizedOutputs(nn.Module):
    """Output layer of a masked language model that is tied to factorised embeddings.

    Args:
        words: the embeddings.
        bias: (vocabulary,).
    """

    def __init__(self, words: FactorizedEmbedding, bias: nn.Parameter) -> None:
        super().__init__()
        self.words = words
        self.bias = bias

    def forward(self, states: Tensor) -> Tensor:
        """Return the logits (..., vocabulary) of states (..., width)."""
        return F.linear(states @ self.words.basis.weight, self.words.rows.weight, self.bias)

    def plain(self) -> nn.Linear:
        """Return an ordinary linear layer with the product as its weight; the caller ties it to the embeddings."""
        table = self.words.weight.detach().clone()
        outputs = nn.Linear(table.shape[1], table.shape[0])
        outputs.weight, outputs.bias = nn.Parameter(table), self.bias
        return outputs


def truncated_svd(table: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return two factors whose product is the best approximation of a matrix at a rank, in the Frobenius norm.

    Source: Eckart and Young, Psychometrika 1936. The singular values are shared evenly between the factors (our choice).

    Args:
        table: (rows, columns).
        rank: from 1 to the smaller dimension of the table.

    Returns:
        (rows, rank) and (rank, columns).
    """
    left, values, right = torch.linalg.svd(table.float(), full_matrices=False)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


class Factorized:
    """Surgery that replaces the word embeddings by a product of two matrices, initialised with the table's truncated SVD.

    transformers has no BERT with such embeddings, so the exported folder holds the product.

    Args:
        rank: rank of the product, from 1 to the width. It saves parameters if it is smaller than vocabulary x width /
            (vocabulary + width).
    """

    changes_vocabulary = False

    def __init__(self, rank: int) -> None:
        self.rank = whole(rank, "rank")

    def shape(self, student: Encoder) -> Encoder:
        """Return the student with factors of the same size."""
        self.replace_table(student)
        return student

    def __call__(self, student: Encoder, inputs: SurgeryInputs) -> tuple[Encoder, str]:
        """Return the student with factorised embeddings, and a description of the change."""
        table, words = self.replace_table(student)
        with torch.no_grad():
            rows, basis = truncated_svd(table.weight, self.rank)
            words.rows.weight.copy_(rows)
            words.basis.weight.copy_(basis.T)
        count = sum(parameter.numel() for parameter in words.parameters())
        return student, f"word embeddings of rank {self.rank} ({count:,} parameters for {table.weight.numel():,})"

    def replace_table(self, student: Encoder) -> tuple[nn.Embedding, FactorizedEmbedding]:
        """Replace a student's word embeddings by factors with random values; return the old embeddings and the factors.

        Raises:
            InputError: if the rank is larger than the table, or another surgery has replaced it.
        """
        table = word_table(student, "factorized")
        size, width = table.weight.shape
        if self.rank > min(size, width):
            raise InputError(f"rank={self.rank} is more than the width of the embeddings, {min(size, width)}", "rank")
        with torch.device(table.weight.device):
            words = FactorizedEmbedding(size, self.rank, width, table.padding_idx)
        outputs = student.model.get_output_embeddings()
        if outputs is not None:
            set_outputs(student.model, FactorizedOutputs(words, outputs.bias))
        student.model.set_input_embeddings(words)
        return table, words


def check_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    """Check that a tokenizer has the special tokens that masked language modelling with two vocabularies needs.

    Raises:
        InputError: if a special token is missing.
    """
    for name in ("cls_token", "sep_token", "pad_token", "mask_token", "unk_token"):
        if getattr(tokenizer, name) is None:
            raise InputError(f"the student's tokenizer has no {name}; it has {', '.join(special_tokens(tokenizer))}")
