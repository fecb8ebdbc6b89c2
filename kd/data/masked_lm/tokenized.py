"""Tokenised texts with positions to predict that are drawn anew in every epoch."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kd.data.masked_lm.task import NOT_PREDICTED
from kd.data.texts import Texts
from kd.data.tokenized import AnyTokenizer, TokenStore, encodings, padded_length, parts_of, tokenizer_fingerprint
from kd.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PREDICTED = 0.15
"""Share of an example's tokens that are predicted. Devlin et al., NAACL 2019, section 3.1, like the next two constants."""

MASKED, REPLACED = 0.8, 0.1
"""Shares of the predicted tokens that are masked, and that are replaced by a random token. The rest is unchanged."""

DRAW_MASKS, DRAW_VOCABULARIES = 0, 1


@dataclass(frozen=True)
class MixedTokenizer:
    """Two tokenizers with different vocabularies for one text; each word is tokenised by one of them.

    Both have the same normaliser and pre-tokeniser, so that they have the same word boundaries. Token ids of the second
    vocabulary follow those of the first. The special tokens around a text are those of the first tokenizer.

    Args:
        first: the tokenizer of the model, which is exported with it.
        second: the tokenizer with the small vocabulary.
        shift: offset of the second vocabulary's ids: the number of rows of the first one's embedding table.
        probability: probability that a word is tokenised by the second tokenizer, in [0, 1].
    """

    first: "PreTrainedTokenizerFast"
    second: "PreTrainedTokenizerFast"
    shift: int
    probability: float

    @property
    def parts(self) -> tuple["PreTrainedTokenizerFast", "PreTrainedTokenizerFast"]:
        """Both tokenizers, the first one first."""
        return self.first, self.second

    def save_pretrained(self, folder: Path) -> None:
        """Save the first tokenizer in a folder, the second one in `vocabulary/` inside it."""
        self.first.save_pretrained(folder)
        self.second.save_pretrained(Path(folder) / "vocabulary")


def words_of(tokenizer: "PreTrainedTokenizerFast", texts: Texts) -> dict[str, np.ndarray]:
    """Return token ids of all texts (`ids`), first token of each word and end (`starts`), and words of each text (`words`)."""
    ids: list[np.ndarray] = []
    starts: list[np.ndarray] = []
    words: list[int] = []
    total = 0
    for encoding in itertools.chain.from_iterable(encodings(tokenizer, texts, special=False, words=True)):
        # Word ids are the same for both vocabularies, because normaliser and pre-tokeniser are.
        word_ids = np.asarray([-1 if word is None else word for word in encoding.word_ids], dtype=np.int64)
        begins = np.flatnonzero(np.diff(word_ids, prepend=-2))
        ids.append(np.asarray(encoding.ids, dtype=np.int32))
        words.append(len(begins))
        starts.append(begins + total)
        total += len(word_ids)
    return {"ids": np.concatenate(ids), "starts": np.concatenate([*starts, [total]]), "words": np.asarray(words)}


class Vocabulary:
    """Tokens of the words of a split's texts with one tokenizer, in flat arrays.

    Args:
        tokenizer: a fast tokenizer.
        texts: the texts to tokenise.
        shift: offset that is added to every id.
        store: store for the tokens.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerFast", texts: Texts, shift: int = 0, store: TokenStore | None = None
    ) -> None:
        arrays = (store or TokenStore()).arrays(
            lambda: ["words", tokenizer_fingerprint(tokenizer), texts.digest()], lambda: words_of(tokenizer, texts)
        )
        special = set(tokenizer.all_special_ids)
        self.ids = arrays["ids"].astype(np.int64) + shift
        self.starts = arrays["starts"]
        self.words = arrays["words"]
        """Number of words of each text."""
        self.mask = tokenizer.mask_token_id + shift
        everything = sorted(tokenizer.get_vocab().values())
        self.ordinary = np.asarray([number + shift for number in everything if number not in special])
        """Ids that may replace a predicted token: all tokens that are not special."""
        self.predictable = ~np.isin(self.ids, np.asarray(sorted(special)) + shift)

    def word(self, place: int) -> slice:
        """Return the slice of `ids` that holds the tokens of the word at this index."""
        return slice(self.starts[place], self.starts[place + 1])

    def known(self) -> np.ndarray:
        """Return a bool for each word: True if it has a token that may be predicted."""
        counts: np.ndarray = np.diff(np.concatenate([[0], np.cumsum(self.predictable)])[self.starts])
        return counts > 0


class MaskedTokens:
    """Texts of one split, cut into chunks of whole words, and masked anew in each epoch.

    The masked positions, and the vocabulary of each word, are functions of seed, epoch and example alone, so that they do not
    depend on ranks, on resuming a run or on the rest of a batch. Without an epoch they are functions of the example.

    Args:
        tokenizer: a fast tokenizer, or a `MixedTokenizer`.
        texts: one text for each example.
        max_length: largest number of tokens of a chunk, special ones included. A longer text gives several chunks.
        seed: seed of the random draws.
        multiple: batches are padded to a multiple of this number of tokens, up to `max_length`.
        store: store for the tokens.

    Raises:
        InputError: if a tokenizer has no mask token, or no text has a token to predict.
    """

    def __init__(
        self,
        tokenizer: AnyTokenizer,
        texts: Sequence[tuple[str, ...]],
        max_length: int,
        seed: int,
        multiple: int = 1,
        store: TokenStore | None = None,
    ) -> None:
        parts = parts_of(tokenizer)
        self.probability = float(getattr(tokenizer, "probability", 0.0))
        self.seed, self.multiple, self.max_length = seed, multiple, max_length
        if parts[0].mask_token_id is None:
            raise InputError("the tokenizer has no mask token, which masked language modelling needs", "task")
        plain = Texts.of(texts).joined()
        shifts = [0, int(getattr(tokenizer, "shift", 0))]
        self.vocabularies = [Vocabulary(part, plain, shift, store) for part, shift in zip(parts, shifts, strict=False)]
        first = self.vocabularies[0]
        if any(not np.array_equal(other.words, first.words) for other in self.vocabularies):
            raise ValueError("the two tokenizers split text into words differently")
        ends = parts[0]("")["input_ids"]
        self.before, self.after = ends[:1], ends[1:]
        self.room = max_length - len(ends)
        self.columns = [name for name in parts[0].model_input_names if name == "token_type_ids"]
        self.fill = {"input_ids": parts[0].pad_token_id, "token_type_ids": parts[0].pad_token_type_id}
        sizes = np.stack([np.diff(vocabulary.starts) for vocabulary in self.vocabularies])
        predictable = np.logical_and.reduce([vocabulary.known() for vocabulary in self.vocabularies])
        self.chunks = np.asarray(list(self._cut(sizes.max(axis=0), first.words, predictable)), dtype=np.int64).reshape(-1, 2)
        """Index of the first word of each chunk and of the word after its last, (chunks, 2)."""
        if not len(self.chunks):
            raise InputError("no text has a token that could be predicted", "text")
        share = self.probability if len(self.vocabularies) > 1 else 0.0
        most = np.concatenate([[0], np.cumsum(np.minimum(sizes.max(axis=0), self.room))])
        cut = most[self.chunks[:, 1]] - most[self.chunks[:, 0]]
        self.longest = np.minimum(cut, self.room) + len(ends)
        """Largest number of tokens of each chunk, over all choices of a vocabulary for each word."""
        expected = np.concatenate([[0.0], np.cumsum((1 - share) * sizes[0] + share * sizes[-1])])
        cut = expected[self.chunks[:, 1]] - expected[self.chunks[:, 0]]
        self.lengths = np.minimum(np.rint(cut).astype(np.int64), self.room) + len(ends)
        """Number of tokens of each chunk; the expected number with two vocabularies."""

    def __len__(self) -> int:
        return len(self.lengths)

    def _cut(self, sizes: np.ndarray, words_of_texts: np.ndarray, predictable: np.ndarray) -> Iterator[tuple[int, int]]:
        """Yield chunks that fit for every choice of vocabularies, and that have a token to predict."""
        end = 0
        for words in words_of_texts:
            begin, end, used = end, end + int(words), 0
            for index in range(begin, end):
                size = min(int(sizes[index]), self.room)
                if used + size > self.room:
                    if predictable[begin:index].any():
                        yield begin, index
                    begin, used = index, 0
                used += size
            if predictable[begin:end].any():
                yield begin, end

    def generator(self, row: int, epoch: int | None, draw: int) -> np.random.Generator:
        """Return the random generator for one kind of draw for one example in one epoch."""
        prefix = [0, 0] if epoch is None else [self.seed, epoch + 1]
        return np.random.default_rng([*prefix, row, draw])

    def read(self, row: int, epoch: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return a chunk's ids without special tokens, whether each may be predicted, and the index of its vocabulary."""
        begin, end = self.chunks[row]
        if len(self.vocabularies) == 1:
            which = np.zeros(end - begin, dtype=np.int64)
        else:
            which = (self.generator(row, epoch, DRAW_VOCABULARIES).random(end - begin) < self.probability).astype(np.int64)
        words = [(self.vocabularies[v], self.vocabularies[v].word(w)) for v, w in zip(which, range(begin, end), strict=True)]
        ids = np.concatenate([vocabulary.ids[tokens] for vocabulary, tokens in words])
        predictable = np.concatenate([vocabulary.predictable[tokens] for vocabulary, tokens in words])
        owner = np.repeat(which, [tokens.stop - tokens.start for _, tokens in words])
        return ids[: self.room], predictable[: self.room], owner[: self.room]

    def mask(self, row: int, epoch: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Return a chunk's masked token ids, special tokens included, and its labels, both (tokens,)."""
        ids, predictable, owner = self.read(row, epoch)
        generator = self.generator(row, epoch, DRAW_MASKS)
        candidates = np.flatnonzero(predictable)
        count = max(1, round(PREDICTED * len(candidates)))
        chosen = generator.permutation(candidates)[:count]
        kinds, draws = generator.random(count), generator.random(count)
        labels = np.full(len(ids), NOT_PREDICTED, dtype=np.int64)
        labels[chosen] = ids[chosen]
        masked = ids.copy()
        for index, kind, draw in zip(chosen, kinds, draws, strict=True):
            # Mask and replacement come from the word's own vocabulary, which selects the softmax of the prediction.
            vocabulary = self.vocabularies[owner[index]]
            if kind < MASKED:
                masked[index] = vocabulary.mask
            elif kind < MASKED + REPLACED:
                masked[index] = vocabulary.ordinary[int(draw * len(vocabulary.ordinary))]
        nothing = [NOT_PREDICTED]
        return (
            np.concatenate([self.before, masked, self.after]),
            np.concatenate([nothing * len(self.before), labels, nothing * len(self.after)]),
        )

    def pad(self, rows: Sequence[int], epoch: int | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """Return inputs and labels of these chunks, padded to the longest and then to the multiple, each (batch, tokens)."""
        masked = [self.mask(row, epoch) for row in rows]
        lengths = np.asarray([len(ids) for ids, _ in masked])
        real = np.arange(padded_length(int(lengths.max()), self.multiple, self.max_length)) < lengths[:, None]
        ids = np.full(real.shape, self.fill["input_ids"], dtype=np.int64)
        labels = np.full(real.shape, NOT_PREDICTED, dtype=np.int64)
        ids[real] = np.concatenate([ids for ids, _ in masked])
        labels[real] = np.concatenate([labels for _, labels in masked])
        inputs = {"input_ids": torch.from_numpy(ids)}
        for name in self.columns:
            inputs[name] = torch.from_numpy(np.where(real, 0, self.fill[name]))
        inputs["attention_mask"] = torch.from_numpy(real.astype(np.int64))
        inputs["predicted"] = torch.from_numpy(labels != NOT_PREDICTED)
        return inputs, torch.from_numpy(labels)


OTHER_VOCABULARY = (
    "the logits of a masked language model are over its vocabulary, and the student's is another than the teacher's: there is "
    "nothing to compare. Use teacher=[], or a student with the teacher's vocabulary"
)
