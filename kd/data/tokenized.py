"""Tokenised texts: computed once, stored on disk for later runs, and padded per batch."""

import hashlib
import itertools
import json
import os
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
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


def rules_of(tokenizer: "PreTrainedTokenizerFast") -> Tokenizer:
    """Return a copy of a tokenizer's rules, without truncation and padding."""
    rules = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    rules.encode_special_tokens = tokenizer.split_special_tokens  # not part of the serialised rules
    rules.no_padding()
    rules.no_truncation()
    return rules


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
    rules = rules_of(tokenizer)
    if max_length is not None:
        rules.enable_truncation(max_length, stride=0, strategy="longest_first", direction=tokenizer.truncation_side)
    began = said = time.monotonic()

    def piece(start: int) -> list[Encoding]:
        rows: list[Any] = texts[start : start + AT_ONCE]
        if texts.columns == 1:
            rows = [text for (text,) in rows]
        encode = rules.encode_batch if words else rules.encode_batch_fast
        return list(encode(rows, add_special_tokens=special))

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
    names = {"input_ids": ("ids", np.int32), "token_type_ids": ("type_ids", np.int8)}
    names = {name: names[name] for name in names if name == "input_ids" or name in tokenizer.model_input_names}
    lengths: list[np.ndarray] = []
    columns: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for encoded in encodings(tokenizer, texts, max_length):
        lengths.append(np.fromiter(map(len, encoded), np.int64, len(encoded)))
        count = int(lengths[-1].sum())
        for name, (attribute, kind) in names.items():
            values = itertools.chain.from_iterable(getattr(one, attribute) for one in encoded)
            columns[name].append(np.fromiter(values, kind, count))
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.concatenate(lengths))])
    return {"offsets": offsets, **{name: np.concatenate(pieces) for name, pieces in columns.items()}}


class Tokens:
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
        texts = Texts.of(texts)

        def make() -> dict[str, np.ndarray]:
            return cut(tokenizer, texts, max_length)

        def source() -> list[Any]:
            settings = [tokenizer.truncation_side, tokenizer.model_input_names, max_length]
            return ["tokens", tokenizer_fingerprint(tokenizer), *settings, texts.digest()]

        self.columns = (store or TokenStore()).arrays(source, make)
        self.offsets = self.columns.pop("offsets")
        self.fill = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
        self.multiple, self.max_length = multiple, max_length

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each example, special ones included."""
        return np.diff(self.offsets)

    def words(self) -> np.ndarray:
        """Return the ids of the words that occur, padding included, (words,), increasing."""
        ids, padding = self.columns["input_ids"], self.fill["input_ids"]
        occurs = np.zeros(1 + max(int(ids.max(initial=0)), padding), dtype=bool)
        occurs[padding] = True
        for start in range(0, len(ids), PIECE):  # an index takes 8 bytes
            occurs[ids[start : start + PIECE]] = True
        return np.flatnonzero(occurs)

    @property
    def longest(self) -> np.ndarray:
        """Largest number of tokens of each example; equal to `lengths`, because nothing is drawn at random."""
        return self.lengths

    def pad(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return inputs of these examples, padded to the longest and then to the multiple, each (batch, tokens)."""
        mask, inputs = self.mask(rows), {}
        for name, values in self.columns.items():
            padded = np.full(mask.shape, self.fill[name], dtype=np.int64)
            padded[mask] = np.concatenate([values[self.offsets[row] : self.offsets[row + 1]] for row in rows])
            inputs[name] = torch.from_numpy(padded)
        inputs["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
        return inputs

    def mask(self, rows: Sequence[int]) -> np.ndarray:
        """Return the mask of these examples' tokens after padding, (batch, tokens), bool."""
        lengths = self.lengths_of(rows)
        return np.arange(padded_length(max(lengths), self.multiple, self.max_length)) < np.asarray(lengths)[:, None]

    def lengths_of(self, rows: Sequence[int]) -> list[int]:
        """Return the number of tokens of each of these examples."""
        return [int(self.offsets[row + 1] - self.offsets[row]) for row in rows]
