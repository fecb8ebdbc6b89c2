"""Augmentation of the training examples: texts without labels, from a chain that masks words and lets a model fill them in."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from kd.config.values import LARGEST_SEED, number, whole
from kd.data.augmentation import MOST_COPIES, check_positions, with_versions, word_names
from kd.data.columns import chosen_mask
from kd.data.edits import LARGEST_COUNT, FrozenModel, Split, TextEdit, chances_of, mapping_of_names
from kd.data.tasks import Task
from kd.data.texts import Texts
from kd.data.tokenized import rules_of
from kd.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


class DenoisingChain(TextEdit):
    r"""Texts from a denoising Markov chain on tokens that starts from the training texts, added to train without labels.

    Source: the generator of Learning to Augment for Data-Scarce Domain BERT Knowledge Distillation (L2A: Feng et al., AAAI
    2021, arXiv:2101.08106), which samples "from a stationary distribution near the target data", from texts of a source and of
    the target domain. Only its abstract and introduction could be read, and there is no code: the form of the chain is our
    choice. It is a generalised denoising auto-encoder (Bengio et al., NeurIPS 2013, arXiv:1305.6663), whose stationary
    distribution estimates that of the model's data: a masked language model of text of the target domain.

    A step of the chain masks each token with probability `rate`, all but special ones, and draws every masked token from the
    model's distribution there, given the masked text. A text has as many tokens after it as before. A token that starts a word
    becomes one that starts a word, and a piece of a word another such piece, so that a text is one of words (our choice);
    special tokens are not drawn. After `steps` steps the text is added, unless it is that of its start or
    of an earlier copy: with a rate or a number of steps of 0 train stays as it is. Both texts of a pair are in one chain.

    Draws depend on the texts of the start and `seed` alone, not on its index, the rest of train or the rank. Fewer copies are
    the first ones of more, up to rounding of the model's output. Further columns are those of the start. Generated texts are
    written as the model's tokenizer decodes them: for uncased BERT in lower case, with blanks around punctuation.

    Args:
        rate: probability that a token is masked, p, in [0, 1].
        steps: steps of the chain, K, at least 0.
        copies: chains from each start, at least 1.
        temperature: > 0, of the model's distribution.
        topk: number of most probable tokens that are drawn from; None for all.
        where: further column of classes -> a class, or several, of the examples that chains start from; None for all.
        most: largest number of starts, drawn by a hash of the text; None for all.
        max_length: largest number of tokens of the model's input, special ones included. Words behind it stay.
        seed: seed of the draws.
    """

    head: ClassVar[str | None] = "masked_lm"
    teachers: ClassVar[bool] = False  # fine-tuning learns from labels
    adds: ClassVar[bool] = True
    unlabels: ClassVar[bool] = True

    def __init__(
        self,
        rate: float = 0.15,
        steps: int = 5,
        copies: int = 1,
        temperature: float = 1.0,
        topk: int | None = None,
        where: Mapping[str, str | Sequence[str]] | None = None,
        most: int | None = None,
        max_length: int = 128,
        seed: int = 0,
    ) -> None:
        self.rate = number(rate, "rate", 0, 1)
        self.steps = whole(steps, "steps", 0, MOST_COPIES)
        self.copies = whole(copies, "copies", 1, MOST_COPIES)
        self.temperature = number(temperature, "temperature", 1e-3, 1e3)
        self.topk = None if topk is None else whole(topk, "topk", 1, LARGEST_COUNT)
        self.where = mapping_of_names(where, "where")
        self.most = None if most is None else whole(most, "most", 1, LARGEST_COUNT)
        self.max_length = whole(max_length, "max_length", 5, 1 << 16)
        self.seed = whole(seed, "seed", 0, LARGEST_SEED)

    @property
    def pairs(self) -> bool:
        """True: the texts of a pair are in one chain."""
        return True

    def check(self, model: FrozenModel, task: Task) -> None:
        """Check that the model has enough positions and a mask, and the task the classes that chains start from.

        Raises:
            InputError: if not; it names the argument.
        """
        check_positions(self.max_length, model)
        chosen_mask(self.where, task.column_classes, dict.fromkeys(task.column_classes, np.zeros(0, dtype=np.int64)), 0)

    def reads(self, train: Split, task: Task) -> Sequence[np.ndarray | Sequence[object]]:
        """Return whether each example is a start."""
        return [self.starts(train, task)]

    def starts(self, train: Split, task: Task) -> np.ndarray:
        """Return whether a chain starts from each example, (examples,), bool.

        Raises:
            InputError: for a column or a class that the task does not have, or that no example is of.
        """
        mask = chosen_mask(self.where, task.column_classes, train.columns, len(train))
        if not mask.any():
            raise InputError(f"where={self.where} selects no training example", "where")
        if self.most is not None:
            rows = np.flatnonzero(mask)
            chances = chances_of(train.texts.take(rows), "DenoisingChain")
            mask[rows[np.argsort(chances, kind="stable")[self.most :]]] = False
        return mask

    def derive(self, train: Split, task: Task, model: FrozenModel) -> tuple[Texts, np.ndarray]:
        """Return the examples with generated texts, and the index of the example that each is made from, (new examples,)."""
        if not self.rate or not self.steps:
            return train.texts, np.arange(len(train))
        starts, sampler = self.starts(train, task), Sampler(model, self)
        return with_versions(train.texts, lambda index, row: sampler.chains(row) if starts[index] else (), "denoising chains")


class Sampler:
    """Chains of a masked language model.

    Args:
        model: the masked language model.
        edit: the options.
    """

    def __init__(self, model: FrozenModel, edit: DenoisingChain) -> None:
        self.model, self.edit = model, edit
        self.tokenizer: PreTrainedTokenizerFast = model.tokenizer
        self.rules: Tokenizer = rules_of(model.tokenizer)
        self.mask = int(model.tokenizer.mask_token_id)  # type: ignore[arg-type]
        special = set(model.tokenizer.all_special_ids)
        words = set(word_names(model.tokenizer))
        vocabulary = set(model.tokenizer.get_vocab().values())
        self.allowed = {True: torch.tensor(sorted(words)), False: torch.tensor(sorted(vocabulary - words - special))}
        """Tokens that start a word, and the others, without special ones."""
        self.starts_word = torch.zeros(max(vocabulary) + 1, dtype=torch.bool)
        self.starts_word[self.allowed[True]] = True
        self.special = torch.zeros(max(vocabulary) + 1, dtype=torch.bool)
        self.special[torch.tensor(sorted(special))] = True

    def chains(self, row: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        """Yield the texts that the chains from the texts of an example have after their last steps, if they differ."""
        room = (self.edit.max_length - self.rules.num_special_tokens_to_add(len(row) == 2)) // len(row)
        read, spare = [], []
        for text in row:
            offsets = self.rules.encode(text, add_special_tokens=False).offsets[:room]
            end = offsets[-1][1] if offsets else 0
            read.append(text[:end])
            spare.append(text[end:])
        encoding = self.rules.encode(read[0], read[1] if len(read) == 2 else None)
        ids, segments = torch.tensor(encoding.ids), torch.tensor(encoding.type_ids)
        sequences = encoding.sequence_ids
        for tokens in self.run(ids, segments, row).tolist():
            if tokens == encoding.ids:  # its decoded text may be written in another way
                continue
            texts = []
            for index, rest in enumerate(spare):
                own = [token for token, sequence in zip(tokens, sequences, strict=True) if sequence == index]
                texts.append(f"{self.tokenizer.decode(own, clean_up_tokenization_spaces=False)}{rest}")
            yield tuple(texts)

    def run(self, ids: Tensor, segments: Tensor, key: Sequence[str]) -> Tensor:
        """Return the tokens of each chain after its last step, (copies, tokens).

        Args:
            ids: the tokens of the start, (tokens,).
            segments: their token types.
            key: what the draws follow from, beside the seed.
        """
        copies, steps = self.edit.copies, self.edit.steps
        places = ~self.special[ids]
        tokens = ids.expand(copies, -1).clone()
        chances = uniform((str(self.edit.seed), *key), (copies, steps, 2, len(ids)))
        for step in range(steps):
            masked = places & (chances[:, step, 0] < self.edit.rate)
            if not masked.any():
                continue
            inputs = {
                "input_ids": tokens.masked_fill(masked, self.mask),
                "attention_mask": torch.ones_like(tokens),
                "token_type_ids": segments.expand(copies, -1),
                "predicted": masked,
            }
            logits = self.model.logits(inputs)
            tokens[masked] = self.drawn(logits, tokens[masked], chances[:, step, 1][masked])
        return tokens

    def drawn(self, logits: Tensor, before: Tensor, chances: Tensor) -> Tensor:
        """Return a token for each place, drawn from the model's distribution over those that may stand there.

        Args:
            logits: (places, vocabulary).
            before: the tokens before, (places,); whether one starts a word decides which may take its place.
            chances: numbers in [0, 1), (places,).
        """
        result = before.clone()
        for starts, allowed in self.allowed.items():
            rows = self.starts_word[before] == starts
            if not rows.any() or not len(allowed):
                continue
            allowed = allowed[allowed < logits.shape[1]]  # a tokenizer may have more tokens than the model
            scores = logits[rows][:, allowed].double() / self.edit.temperature
            if self.edit.topk is not None and self.edit.topk < len(allowed):
                least = scores.topk(self.edit.topk).values[:, -1:]
                scores = scores.masked_fill(scores < least, -math.inf)
            ladder = scores.softmax(dim=1).cumsum(dim=1)
            chosen = torch.searchsorted(ladder, chances[rows].unsqueeze(1) * ladder[:, -1:], right=True).squeeze(1)
            result[rows] = allowed[chosen.clamp(max=len(allowed) - 1)]
        return result


def uniform(key: Sequence[str], shape: Sequence[int]) -> Tensor:
    """Return numbers in [0, 1), float64, that follow from the key alone; a larger first dimension adds some at the end."""
    digest = hashlib.blake2b("\0".join(("denoising chain", *key)).encode(), digest_size=16).digest()
    return torch.from_numpy(np.random.default_rng(int.from_bytes(digest)).random(tuple(shape)))
