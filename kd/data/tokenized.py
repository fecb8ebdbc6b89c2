"""Tokenised texts: computed once, stored on disk for later runs, and padded per batch."""

import hashlib
import itertools
import json
import os
import time
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from kd.data.sources import SAY_AFTER
from kd.data.texts import Texts
from kd.system import distributed
from kd.system.files import atomic_write

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENS_FORMAT = 1
"""Version of the stored format, part of the digest that names every stored file; incremented when the format changes."""

CHECKSUM = 32
"""Number of bytes at the end of a stored file that hold the checksum of the bytes before them."""

PIECE = 1 << 22
"""Number of bytes read at a time for a checksum."""

AT_ONCE = 4096
"""Number of texts tokenised at a time: an encoding of 20 words takes 2 kB of memory. It has no effect on the tokens."""

BATCH_TOKENS = 2048
"""Tokens of a batch, padding included. Our choice: enough to keep the kernels busy, little memory."""

KINDS: Mapping[str, type[np.integer[Any]]] = {"input_ids": np.int32, "token_type_ids": np.int8}
"""Input of a model -> type of its numbers."""


class TokenizerPair(Protocol):
    """Two tokenizers for the words of one text, such as `kd.data.masked_lm.tokenized.MixedTokenizer`."""

    @property
    def parts(self) -> tuple["PreTrainedTokenizerFast", "PreTrainedTokenizerFast"]:
        """Both tokenizers, the model's own first."""

    def save_pretrained(self, folder: Path) -> None:
        """Save both in a folder."""


AnyTokenizer: TypeAlias = "PreTrainedTokenizerFast | TokenizerPair"
"""Tokenizer of a model's inputs."""


def parts_of(tokenizer: AnyTokenizer) -> tuple["PreTrainedTokenizerFast", ...]:
    """Return the tokenizer itself, or both of a pair."""
    given: Any = tokenizer
    parts: tuple[PreTrainedTokenizerFast, ...] = getattr(given, "parts", (given,))
    return parts


def tokenizer_fingerprint(tokenizer: AnyTokenizer) -> str:
    """Return a digest of a tokenizer's vocabulary and rules, without its padding and truncation settings."""
    parts = [sorted_rules(part.backend_tokenizer.to_str()) for part in parts_of(tokenizer)]
    return hashlib.blake2b("".join(parts).encode(), digest_size=8).hexdigest()


@lru_cache(maxsize=8)
def sorted_rules(text: str) -> str:
    """Return a tokenizer's rules, as JSON, in the order of their names and without padding and truncation settings.

    Cached, because sorting a vocabulary takes a tenth of a second, and the start of a run compares its tokenizers often.
    """
    rules = json.loads(text)
    rules.pop("padding", None)
    rules.pop("truncation", None)
    return json.dumps(rules, sort_keys=True)


def save_tokenizer(tokenizer: AnyTokenizer, folder: Path) -> None:
    """Save a tokenizer, or both of a mixed one, without the truncation and padding settings of its last call.

    `tokenizers` keeps these settings after a call and saves them, so the files of a model would depend on the last text that
    its tokenizer read.
    """
    for part in parts_of(tokenizer):
        part.backend_tokenizer.no_truncation()
        part.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)


def padded_length(longest: int, multiple: int, most: int) -> int:
    """Return the number of tokens to which a batch is padded: a multiple, but at most `most` unless `longest` exceeds it.

    >>> [padded_length(longest, 8, 30) for longest in (1, 8, 9, 25)]
    [8, 8, 16, 30]
    """
    return max(longest, min(-(-longest // multiple) * multiple, most))


def padded_lengths(multiple: int, most: int) -> set[int]:
    """Return the values that `padded_length` can have for texts of 1 to `most` tokens.

    >>> sorted(padded_lengths(8, 30))
    [8, 16, 24, 30]
    """
    return {*range(multiple, most, multiple), most}


class TokenStore:
    """Arrays that are computed once and stored in a folder, for later runs and for the other ranks.

    A file is named by a digest of everything that determines its arrays, is written atomically, and ends with a checksum; a
    damaged file is computed again. A folder that cannot be written to is not an error.

    Args:
        folder: folder of the files; None stores nothing.
        what: name of what the arrays hold, for messages.
    """

    def __init__(self, folder: Path | None = None, what: str = "tokens") -> None:
        self.folder = folder
        self.what = what

    def arrays(self, source: Callable[[], Sequence[Any]], make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Return the arrays of a source, from the folder or newly computed.

        Under DDP the first rank computes and writes them, and the others read its file; every rank has to call this.

        Args:
            source: returns everything that determines the arrays, as values that JSON can hold.
            make: computes the arrays.
        """
        if self.folder is None:
            return make()
        # The library's version is included, because another one may tokenise the same text differently.
        inputs = json.dumps([TOKENS_FORMAT, metadata.version("tokenizers"), *source()])
        path = self.folder / f"{hashlib.blake2b(inputs.encode(), digest_size=16).hexdigest()}.npz"
        arrays: dict[str, np.ndarray] = {}
        distributed.on_rank_zero(lambda: arrays.update(self._first(path, make)))
        return arrays or read_arrays(path) or make()

    def _first(self, path: Path, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        stored = read_arrays(path)
        if stored is not None:
            return stored
        if path.exists():
            distributed.print_rank_zero(f"  the stored {self.what} '{path}' are damaged; they are rebuilt")
        arrays = make()
        try:
            write_arrays(path, arrays)
        except OSError as error:
            distributed.print_rank_zero(f"  {self.what} are not stored: {error}")
        return arrays


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """Return the arrays of a file; None if it does not exist or is damaged."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END) - CHECKSUM
            file.seek(0)
            if size <= 0 or checksum_of(file, size) != file.read(CHECKSUM):
                return None
            file.seek(0)
            with np.load(file, allow_pickle=False) as content:
                return {name: content[name] for name in content.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):  # the last ones: a foreign file with a valid checksum
        return None


def checksum_of(file: IO[bytes], size: int) -> bytes:
    """Return the checksum of the next `size` bytes of a file, which is read piece by piece."""
    digest = hashlib.blake2b(digest_size=CHECKSUM)
    while size > 0 and (piece := file.read(min(size, PIECE))):
        digest.update(piece)
        size -= len(piece)
    return digest.digest()


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays atomically.

    Raises:
        OSError: if the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "w+b") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        checksum = checksum_of(file, size)
        file.seek(0, os.SEEK_END)
        file.write(checksum)


def rules_of(tokenizer: "PreTrainedTokenizerFast", max_length: int | None = None) -> Tokenizer:
    """Return a copy of a tokenizer's rules, without padding, and with truncation to this number of tokens alone."""
    rules = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    rules.encode_special_tokens = tokenizer.split_special_tokens  # not part of the serialised rules
    rules.no_padding()
    rules.no_truncation()
    if max_length is not None:
        rules.enable_truncation(max_length, stride=0, strategy="longest_first", direction=tokenizer.truncation_side)
    return rules


def encode(rules: Tokenizer, rows: Sequence[tuple[str, ...]], *, special: bool = True, words: bool = False) -> list[Encoding]:
    """Return the encodings of some texts, or pairs of texts; arguments as for `encodings`."""
    given: Any = rows if rows and len(rows[0]) > 1 else [text for (text,) in rows]
    batch = rules.encode_batch if words else rules.encode_batch_fast
    return list(batch(given, add_special_tokens=special))


def encodings(
    tokenizer: "PreTrainedTokenizerFast",
    texts: Texts,
    max_length: int | None = None,
    *,
    special: bool = True,
    words: bool = False,
) -> Iterator[list[Encoding]]:
    """Yield the encodings of the texts in lists of `AT_ONCE`; the next list is computed while the caller uses the last.

    A copy of the tokenizer is used, so that truncation and padding settings of the given one, which is exported, stay.

    Args:
        tokenizer: a fast tokenizer.
        texts: one or two texts for each example.
        max_length: largest number of tokens; None truncates nothing.
        special: whether special tokens are added around the texts.
        words: whether encodings have word ids, which takes longer.
    """
    rules = rules_of(tokenizer, max_length)
    began = said = time.monotonic()

    def piece(start: int) -> list[Encoding]:
        return encode(rules, texts[start : start + AT_ONCE], special=special, words=words)

    with ThreadPoolExecutor(1) as pool:
        starts = range(0, len(texts), AT_ONCE)
        waiting = [pool.submit(piece, start) for start in starts[:1]]
        for number in range(len(starts)):
            done = waiting.pop().result()
            waiting += [pool.submit(piece, start) for start in starts[number + 1 : number + 2]]
            yield done
            if time.monotonic() - said > SAY_AFTER:
                said = time.monotonic()
                count = min((number + 1) * AT_ONCE, len(texts))
                distributed.print_rank_zero(f"  tokenising texts: {count:,} of {len(texts):,} in {said - began:.0f} s")


def cut(tokenizer: "PreTrainedTokenizerFast", texts: Texts, max_length: int) -> dict[str, np.ndarray]:
    """Return the tokens of all texts as flat arrays, and `offsets`, (examples + 1,), the start of each example's tokens."""
    lengths: list[np.ndarray] = []
    columns: dict[str, list[np.ndarray]] = {name: [] for name in columns_of(tokenizer)}
    for encoded in encodings(tokenizer, texts, max_length):
        some, values = flat_arrays(encoded, columns_of(tokenizer))
        lengths.append(some)
        for name, pieces in columns.items():
            pieces.append(values[name])
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.concatenate(lengths))])
    return {"offsets": offsets, **{name: np.concatenate(pieces) for name, pieces in columns.items()}}


def flat_arrays(encoded: Sequence[Encoding], columns: Mapping[str, str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the lengths of encodings, (examples,), and the numbers of each input, one encoding after the other.

    Args:
        encoded: the encodings.
        columns: as `columns_of` returns them.
    """
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
    count = int(lengths.sum())
    return lengths, {
        name: np.fromiter(itertools.chain.from_iterable(getattr(one, attribute) for one in encoded), KINDS[name], count)
        for name, attribute in columns.items()
    }


def settings_of(tokenizer: "PreTrainedTokenizerFast", max_length: int) -> list[Any]:
    """Return what determines the tokens of a text besides the vocabulary and the rules."""
    return [tokenizer.truncation_side, tokenizer.model_input_names, max_length]


def columns_of(tokenizer: "PreTrainedTokenizerFast") -> dict[str, str]:
    """Return the inputs of a model that a tokenizer makes -> the attribute of an encoding that holds them."""
    names = {"input_ids": "ids", "token_type_ids": "type_ids"}
    return {name: names[name] for name in names if name == "input_ids" or name in tokenizer.model_input_names}


class Padding(ABC):
    """Tokens of the examples of one split, padded per batch.

    Args:
        tokenizer: a fast tokenizer.
        max_length: number of tokens to which a text, or a pair of texts, is truncated.
        multiple: batches are padded to a multiple of this number of tokens, up to `max_length`.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", max_length: int, multiple: int = 1) -> None:
        self.fill = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
        self.names = list(columns_of(tokenizer))
        self.multiple, self.max_length = multiple, max_length

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of examples."""

    @property
    @abstractmethod
    def offsets(self) -> np.ndarray:
        """Start of each example's tokens among all tokens of the split, and the end of the last one's, (examples + 1,)."""

    @property
    @abstractmethod
    def lengths(self) -> np.ndarray:
        """Number of tokens of each example, special ones included."""

    @abstractmethod
    def lengths_of(self, rows: Sequence[int]) -> list[int]:
        """Return the number of tokens of each of these examples."""

    @abstractmethod
    def values(self, name: str, rows: Sequence[int]) -> list[np.ndarray]:
        """Return the numbers of an input, one array for each of these examples."""

    @abstractmethod
    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """Yield the numbers of an input for all examples, in their order, in parts of any size; types as in `KINDS`."""

    @property
    def longest(self) -> np.ndarray:
        """Largest number of tokens of each example; equal to `lengths`, because nothing is drawn at random."""
        return self.lengths

    def digest(self) -> str:
        """Return a digest of all tokens and their order, by which caches of outputs are named."""
        digest = hashlib.blake2b(self.offsets.tobytes(), digest_size=8)
        for name in self.names:
            for block in self.blocks(name):
                digest.update(block.tobytes())
        return digest.hexdigest()

    def words(self) -> np.ndarray:
        """Return the ids of the words that occur, padding included, (words,), increasing."""
        padding = self.fill["input_ids"]
        occurs = np.zeros(1 + padding, dtype=bool)
        occurs[padding] = True
        for block in self.blocks("input_ids"):
            occurs = np.pad(occurs, (0, max(1 + int(block.max(initial=0)) - len(occurs), 0)))
            occurs[block] = True
        return np.flatnonzero(occurs)

    def pad(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return inputs of these examples, padded to the longest and then to the multiple, each (batch, tokens)."""
        mask, inputs = self.mask(rows), {}
        for name in self.names:
            padded = np.full(mask.shape, self.fill[name], dtype=np.int64)
            padded[mask] = np.concatenate(self.values(name, rows))
            inputs[name] = torch.from_numpy(padded)
        inputs["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
        return inputs

    def mask(self, rows: Sequence[int]) -> np.ndarray:
        """Return the mask of these examples' tokens after padding, (batch, tokens), bool."""
        lengths = self.lengths_of(rows)
        return np.arange(padded_length(max(lengths), self.multiple, self.max_length)) < np.asarray(lengths)[:, None]


class Tokens(Padding):
    """Tokenised texts of one split in flat arrays, which avoid one Python object for each sentence.

    Args:
        tokenizer: a fast tokenizer.
        texts: one tuple of one or two texts for each example.
        max_length: number of tokens to which a text, or a pair of texts, is truncated.
        multiple: batches are padded to a multiple of this number of tokens, up to `max_length`.
        store: store for the tokens.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        texts: Sequence[tuple[str, ...]],
        max_length: int,
        multiple: int = 1,
        store: TokenStore | None = None,
    ) -> None:
        super().__init__(tokenizer, max_length, multiple)
        texts = Texts.of(texts)

        def make() -> dict[str, np.ndarray]:
            return cut(tokenizer, texts, max_length)

        def source() -> list[Any]:
            return ["tokens", tokenizer_fingerprint(tokenizer), *settings_of(tokenizer, max_length), texts.digest()]

        self.columns = (store or TokenStore()).arrays(source, make)
        self._offsets = self.columns.pop("offsets")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @property
    def offsets(self) -> np.ndarray:
        """Start of each example's tokens in the arrays, and the end of the last one's, (examples + 1,)."""
        return self._offsets

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each example, special ones included."""
        return np.diff(self._offsets)

    def lengths_of(self, rows: Sequence[int]) -> list[int]:
        """Return the number of tokens of each of these examples."""
        return [int(self._offsets[row + 1] - self._offsets[row]) for row in rows]

    def values(self, name: str, rows: Sequence[int]) -> list[np.ndarray]:
        """Return the numbers of an input, one array for each of these examples."""
        values, offsets = self.columns[name], self._offsets
        return [values[offsets[row] : offsets[row + 1]] for row in rows]

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """Yield the numbers of an input for all examples, in their order."""
        values = self.columns[name]
        for start in range(0, len(values), PIECE):  # an index takes 8 bytes
            yield values[start : start + PIECE]


def batches_by_length(offsets: np.ndarray, span: tuple[int, int]) -> Iterator[list[int]]:
    """Yield the examples of a span in batches of similar length, of at most `BATCH_TOKENS` tokens."""
    lengths = np.diff(offsets)[span[0] : span[1]]
    batch: list[int] = []
    for index in np.argsort(lengths, kind="stable"):
        if batch and (len(batch) + 1) * lengths[index] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(span[0] + int(index))
    if batch:
        yield batch


def in_order(tokens: Tokens, compute: Callable[[dict[str, Tensor]], np.ndarray]) -> np.ndarray:
    """Return what a function computes for each example, in their order, (examples, ...), from batches of similar length.

    Args:
        tokens: the examples, at least one.
        compute: function from the inputs of a batch, each (batch, tokens), to values, (batch, ...).
    """
    found: np.ndarray | None = None
    for rows in batches_by_length(tokens.offsets, (0, len(tokens))):
        values = compute(tokens.pad(rows))
        if found is None:
            found = np.empty((len(tokens), *values.shape[1:]), dtype=values.dtype)
        found[rows] = values
    assert found is not None
    return found
