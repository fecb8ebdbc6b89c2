"""Augmentation of the training examples: copies in which a masked language model and word vectors have replaced words."""

import functools
import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from kd.config.values import LARGEST_SEED, number, switch, whole, word
from kd.data.edits import FrozenModel, Split, TextEdit
from kd.data.sources import SAY_AFTER
from kd.data.tasks import Task
from kd.data.texts import Texts, Writer
from kd.data.tokenized import rules_of
from kd.data.vectors import MOST_WORDS, Vectors, read_vectors
from kd.errors import InputError
from kd.system import distributed

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerFast

CONTEXTS = ("both", "masked")
"""Inputs of the masked language model: the masked text and the text behind it, or the masked text alone."""

MOST_COPIES = 1000
"""Largest number of copies."""

AT_ONCE = 64
"""Number of masked texts in a forward pass; all are versions of one text."""

MEMO = 10_000
"""Number of texts whose candidates are kept for further examples with the same text."""

STOP_WORDS = frozenset(
    """
    a an the this that these those each every either neither both all any some such no none other another same own few more most
    i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers herself it
    its itself they them their theirs themselves who whom whose which what whoever whatever whichever one ones
    am is are was were be been being do does did done doing have has had having can could may might must shall should will would
    ought cannot not nor and or but if unless because since so as than then though although while whereas until till whether
    of at by for from in into on onto to toward towards with within without about above across after against along among around
    before behind below beneath beside besides between beyond down during except inside like near off out outside over past
    through throughout under underneath up upon via again further once here there where when why how
    too very just only also even ever never yet still already almost quite rather
    s t d m o y ll re ve ain don didn doesn isn aren wasn weren hasn haven hadn couldn wouldn shouldn mustn needn won
    shan mightn
    """.split()
)
"""English function words, and the pieces that tokenizers cut contractions into. Our list; the authors' code has its own."""

Candidates = Sequence[tuple[int, int, Sequence[str]]]
"""Replaceable words of a text: start and end, in characters, and the words that may take their place."""


@dataclass(frozen=True)
class Piecewise:
    """A word of a text with its pieces.

    Attributes:
        start: its first character.
        end: the character behind its last one.
        pieces: indices of its pieces in the encoding.
    """

    start: int
    end: int
    pieces: Sequence[int]


class WordReplacement(TextEdit):
    r"""Copies of the training examples in which words are replaced; each copy has the label of its example.

    Source: Jiao et al., Findings of EMNLP 2020, arXiv:1909.10351, algorithm 1; the authors' code, `data_augmentation.py`. For
    each text, `copies` times: each word becomes, with probability `rate`, one of its candidates, each equally likely.

    - A word of a single piece is masked, and its candidates are the `topk` most probable pieces of the masked language model
      there, without pieces that continue a word (as in the code) and special tokens. The word itself may be among them.
    - A word of several pieces has as candidates the `topk` words of most similar vectors, cosine similarity: GloVe's in the
      paper, those of `vectors` here. Without such a file a word's vector is the mean of the model's input embeddings of its
      pieces, and the candidates are words of the training texts (our choice). A word without a vector stays.

    Example, then copies, in order; copies that are equal to the example or to an earlier one are left out, so that at a rate
    of 0 train stays as it is. In a pair each text has copies of its own, beside the other text as it is. The authors' code
    has them too, but keeps the first text at its last copy while the second one varies, which we take for an oversight.

    As in the code, candidates are computed once for each word, from the unchanged text; in the paper's algorithm a copy's
    earlier replacements are part of the context. Words with other characters than letters, and stop words, stay as they are in
    the code; the paper does not mention either. The code joins the words of a copy, in lower case, by blanks; we replace words
    in the text as it is, and write nearest words in lower case.

    The draws of a copy depend on the texts of the example and `seed` alone, not on its index, the rest of train or the rank.
    (Nearest words among the training texts do depend on these.) Fewer copies are the first ones of more, up to duplicates, and
    a higher rate replaces the words that a lower one replaces, by the same words, and more. All masked versions of a text are
    of one length and make batches of their own, without padding, so that no other example changes a rounding error.

    Args:
        rate: probability that a word is replaced, :math:`p_t`, in [0, 1]. The paper: 0.4.
        copies: number of copies of each text, :math:`N_a`, at least 1.
        topk: number of candidates, :math:`K`, at least 1. The paper: 15.
        context: input of the model: `both`, the masked text and the text, as a pair (authors' code), or `masked` (paper).
        vectors: path of word vectors: a line for each word, which its numbers follow, separated by blanks, as GloVe's files
            have them. The first 100,000 are read, as in the code. None for the model's embeddings.
        stop_words: whether stop words stay as they are (authors' code).
        max_length: largest number of tokens of the model's input, special ones included. Words behind it stay (our choice).
        seed: seed of the draws.
    """

    head: ClassVar[str] = "masked_lm"
    teachers: ClassVar[bool] = False  # in the paper the teacher is fine-tuned on the task's own examples
    adds: ClassVar[bool] = True
    files: ClassVar[Sequence[str]] = ("vectors",)

    def __init__(
        self,
        rate: float = 0.4,
        copies: int = 5,
        topk: int = 15,
        context: str = "both",
        vectors: str | None = None,
        stop_words: bool = True,
        max_length: int = 256,
        seed: int = 0,
    ) -> None:
        self.rate = number(rate, "rate", 0, 1)
        self.copies = whole(copies, "copies", 1, MOST_COPIES)
        self.topk = whole(topk, "topk", 1, 1000)
        self.context = word(context, CONTEXTS, "context")
        self.vectors = vectors
        self.stop_words = switch(stop_words, "stop_words")
        self.max_length = whole(max_length, "max_length", 5, 1 << 16)
        self.seed = whole(seed, "seed", 0, LARGEST_SEED)

    @property
    def pairs(self) -> bool:
        """True if the model reads pairs of texts."""
        return self.context == "both"

    def check(self, model: FrozenModel, task: Task) -> None:
        """Check that the model has enough positions, and that the file of vectors can be read.

        Raises:
            InputError: if not; it names the argument.
        """
        check_positions(self.max_length, model)
        if self.vectors is not None:
            read_vectors(self.vectors, "vectors")

    def derive(self, train: Split, task: Task, model: FrozenModel) -> tuple[Texts, np.ndarray]:
        """Return the examples with their copies, and the index of the example that each is made from, (new examples,)."""
        texts = train.texts
        if self.rate == 0:
            return texts, np.arange(len(texts))
        reader = Reader(model, self)
        reader.nearest = self.nearest(texts, model, reader)
        candidates = functools.lru_cache(MEMO)(reader.candidates)
        return with_versions(texts, lambda _, row: self.copies_of(row, candidates), "replacing words")

    def copies_of(self, row: tuple[str, ...], candidates: Callable[[str], Candidates]) -> Iterator[tuple[str, ...]]:
        """Yield the copies of an example: those of its first text, then those of its second one."""
        for column, text in enumerate(row):
            words = candidates(text)
            for chances, choices in draws((str(self.seed), str(column), *row), self.copies, len(words)):
                copy, end = [], 0
                for (start, stop, others), chance, choice in zip(words, chances, choices, strict=True):
                    if chance < self.rate:
                        copy += [text[end:start], others[int(choice * len(others))]]
                        end = stop
                yield (*row[:column], "".join([*copy, text[end:]]), *row[column + 1 :])

    def replaceable(self, text: str) -> bool:
        """Return whether a word of a text may be replaced."""
        return text.isalpha() and not (self.stop_words and text.lower() in STOP_WORDS)

    def nearest(self, texts: Texts, model: FrozenModel, reader: "Reader") -> dict[str, list[str]]:
        """Return the nearest words of every word of several pieces in some texts; all in lower case."""
        counts, several = reader.vocabulary(texts)
        if self.vectors is not None:
            vectors = read_vectors(self.vectors, "vectors")
        else:
            common = sorted(counts, key=lambda name: (-counts[name], name))[:MOST_WORDS]
            vectors = Vectors(sorted(common), reader.embedded(sorted(common), model.embeddings()))
        return vectors.nearest(sorted(several), self.topk)


class Reader:
    """Words of texts and their candidates, as a masked language model's tokenizer and the model give them.

    Args:
        model: the masked language model.
        edit: the options.
    """

    def __init__(self, model: FrozenModel, edit: WordReplacement) -> None:
        self.model, self.edit = model, edit
        self.rules: Tokenizer = rules_of(model.tokenizer)
        self.mask = int(model.tokenizer.mask_token_id)  # type: ignore[arg-type]
        self.names = word_names(model.tokenizer)
        self.nearest: Mapping[str, Sequence[str]] = {}
        ends = self.rules.num_special_tokens_to_add(edit.pairs)
        self.room = (edit.max_length - ends) // (2 if edit.pairs else 1)
        """Largest number of a text's tokens in an input."""

    def candidates(self, text: str) -> Candidates:
        """Return the replaceable words of a text that have candidates, in their order."""
        alone = self.rules.encode(text, add_special_tokens=False)
        read = [each for each in words_in(alone, text) if each.pieces[-1] < self.room]
        if not any(self.edit.replaceable(text[each.start : each.end]) for each in read):
            return []
        start = text[: read[-1].end]
        encoding = self.rules.encode(start, start) if self.edit.pairs else self.rules.encode(start)
        words = [each for each in words_in(encoding, start) if self.edit.replaceable(text[each.start : each.end])]
        single = [each for each in words if len(each.pieces) == 1]
        predicted = iter(self.predicted(encoding, [each.pieces[0] for each in single]))
        found = [
            (each.start, each.end, next(predicted) if len(each.pieces) == 1 else self.near(text[each.start : each.end]))
            for each in words
        ]
        return [each for each in found if each[2]]

    def near(self, name: str) -> Sequence[str]:
        """Return the nearest words of a word of several pieces."""
        return self.nearest.get(name.lower(), ())

    def predicted(self, encoding: "Encoding", places: Sequence[int]) -> Iterator[list[str]]:
        """Yield the candidates of the words at some places, each masked in a text of its own."""
        ids, segments = torch.tensor(encoding.ids), torch.tensor(encoding.type_ids)
        for first in range(0, len(places), AT_ONCE):
            masked = torch.zeros(len(places[first : first + AT_ONCE]), len(ids), dtype=torch.bool)
            masked[torch.arange(len(masked)), torch.tensor(places[first : first + AT_ONCE])] = True
            inputs = {
                "input_ids": ids.expand(len(masked), -1).masked_fill(masked, self.mask),
                "attention_mask": torch.ones_like(masked, dtype=torch.long),
                "token_type_ids": segments.expand(len(masked), -1),
                "predicted": masked,
            }
            logits = self.model.logits(inputs)
            best = logits.topk(min(self.edit.topk, logits.shape[1])).indices.tolist()
            yield from ([self.names[token] for token in row if token in self.names] for row in best)

    def vocabulary(self, texts: Texts) -> tuple[Counter[str], set[str]]:
        """Return the words of letters in some texts, with their counts, and the replaceable ones of several pieces."""
        counts: Counter[str] = Counter()
        several: set[str] = set()
        every = itertools.chain.from_iterable(texts)
        while part := list(itertools.islice(every, 4096)):
            for text, encoding in zip(part, self.rules.encode_batch(part, add_special_tokens=False), strict=True):
                for each in words_in(encoding, text):
                    name = text[each.start : each.end]
                    if name.isalpha():
                        counts[name.lower()] += 1
                        if len(each.pieces) > 1 and self.edit.replaceable(name):
                            several.add(name.lower())
        return counts, several

    def embedded(self, names: Sequence[str], embeddings: np.ndarray) -> np.ndarray:
        """Return the mean of the embeddings of each word's pieces, (words, width)."""
        result = np.zeros((len(names), embeddings.shape[1]), dtype=np.float32)
        for row, name in enumerate(names):
            pieces = self.rules.encode(f" {name}", add_special_tokens=False).ids  # a blank before it, as inside a text
            if pieces:
                result[row] = embeddings[pieces].mean(axis=0)
        return result


def check_positions(max_length: int, model: FrozenModel) -> None:
    """Check that a masked language model has as many positions as its inputs have tokens.

    Raises:
        InputError: if it has fewer.
    """
    if max_length > model.positions:
        raise InputError(
            f"max_length={max_length} must be at most {model.positions}, the positions of the masked language model",
            "max_length",
        )


def with_versions(
    texts: Texts, versions: Callable[[int, tuple[str, ...]], Iterable[tuple[str, ...]]], what: str
) -> tuple[Texts, np.ndarray]:
    """Return examples, each followed by versions of it, without those that are equal to it or to an earlier one.

    Args:
        texts: texts of the examples.
        versions: function that makes the versions of an example from its index and its texts.
        what: description of what is done, for the lines that say how far it is.

    Returns:
        The texts, and the index of the example that each is made from, (new examples,).
    """
    began = said = time.monotonic()
    writer, rows = Writer(), []
    for index, row in enumerate(texts):
        for version in dict.fromkeys([row, *versions(index, row)]):
            writer.add(version)
            rows.append(index)
        if time.monotonic() - said > SAY_AFTER:
            said = time.monotonic()
            distributed.print_rank_zero(f"  {what}: {index + 1:,} of {len(texts):,} examples in {said - began:.0f} s")
    seconds = time.monotonic() - began
    distributed.print_rank_zero(f"  {what}: {len(texts):,} -> {len(rows):,} examples in {seconds:.1f} s")
    return writer.texts(), np.asarray(rows, dtype=np.int64)


def words_in(encoding: "Encoding", text: str) -> list[Piecewise]:
    """Return the words of the first text of an encoding, in their order."""
    places: dict[int, list[int]] = {}
    for place, (index, sequence) in enumerate(zip(encoding.word_ids, encoding.sequence_ids, strict=True)):
        if index is not None and sequence == 0:
            places.setdefault(index, []).append(place)
    words = []
    for pieces in places.values():
        start, end = encoding.offsets[pieces[0]][0], encoding.offsets[pieces[-1]][1]
        start += len(text[start:end]) - len(text[start:end].lstrip())  # some tokenizers count the blank before a word
        words.append(Piecewise(start, end, pieces))
    return words


def word_names(tokenizer: "PreTrainedTokenizerFast") -> dict[int, str]:
    """Return the text of every piece of a vocabulary that is a word or starts one, without special tokens."""
    special = set(tokenizer.all_special_ids)
    prefix = getattr(tokenizer.backend_tokenizer.model, "continuing_subword_prefix", None)
    names = {}
    for piece, token in tokenizer.get_vocab().items():
        if token in special:
            continue
        if prefix:
            name = "" if piece.startswith(prefix) else piece
        else:  # byte pairs and unigrams mark the blank before a word
            name = tokenizer.convert_tokens_to_string([piece]).strip() if piece[:1] in ("Ġ", "▁") else ""
        if name:
            names[token] = name
    return names


def draws(key: Sequence[str], copies: int, words: int) -> list[list[list[float]]]:
    """Return for each copy the chance and the choice of each word, in [0, 1): functions of the key, equal on every machine.

    Fewer copies are the first ones of more.
    """
    salted = hashlib.shake_256("\0".join(("word replacement", *key)).encode())
    numbers = np.frombuffer(salted.digest(16 * copies * words), dtype="<u8") >> np.uint64(11)
    chances = (numbers / 2**53).reshape(copies, 2, words)  # of 53 bits, the precision of a float
    return chances.tolist()  # type: ignore[no-any-return]
