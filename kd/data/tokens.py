"""Texts as tokens: tokenised once, kept on disk for later runs, padded to the batch."""

import contextlib
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd import distributed

FORMAT = 1
"""Part of the name of every stored file; raised when what is stored changes."""

CHECKSUM = 32
"""Bytes at the end of a stored file: the checksum of what is before them."""


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """What decides how a tokenizer cuts text: vocabulary and rules, without its padding and truncation settings."""
    found = []
    for part in getattr(tokenizer, "parts", (tokenizer,)):  # a mixed one has two
        rules = json.loads(part.backend_tokenizer.to_str())
        rules.pop("padding", None)
        rules.pop("truncation", None)
        found.append(json.dumps(rules, sort_keys=True))
    return hashlib.blake2b("".join(found).encode(), digest_size=8).hexdigest()


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer, or the two of a mixed one, without the limits that it was used with last.

    Truncation and padding are settings of a call that `tokenizers` keeps, and writes: the files of a model would depend on what
    its tokenizer happened to read.
    """
    for part in getattr(tokenizer, "parts", (tokenizer,)):
        part.backend_tokenizer.no_truncation()
        part.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)


def padded_length(longest: int, multiple: int, most: int) -> int:
    """Tokens that a batch is padded to: a multiple, but no more than the models have positions for.

    >>> [padded_length(longest, 8, 30) for longest in (1, 8, 9, 25)]
    [8, 8, 16, 30]
    """
    return max(longest, min(-(-longest // multiple) * multiple, most))


class Store:
    """Arrays that are made once and kept in a folder, for later runs and for the other ranks.

    A file is named by a digest of what its arrays are made from, is written all or nothing, and carries a checksum: one that is
    damaged is made again. A folder that cannot be written is not fatal.

    Args:
        folder: None keeps nothing.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def arrays(self, source: Callable[[], Sequence[Any]], make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The arrays of a source, from the folder or made.

        Under DDP the first rank makes and writes, and the others read what it wrote; every rank has to call this.

        Args:
            source: gives everything that decides what `make` gives, as JSON takes it.
            make: gives the arrays.
        """
        if self.folder is None:
            return make()
        # The library is part of it: a later one may cut the same text in another way.
        known = json.dumps([FORMAT, metadata.version("tokenizers"), *source()])
        path = self.folder / f"{hashlib.blake2b(known.encode(), digest_size=16).hexdigest()}.npz"
        found: dict[str, np.ndarray] = {}
        distributed.on_first(lambda: found.update(self._first(path, make)))
        return found or read(path) or make()

    def _first(self, path: Path, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        found = read(path)
        if found is not None:
            return found
        if path.exists():
            print(f"  the stored tokens '{path}' are damaged; they are made again", flush=True)
        made = make()
        try:
            write(path, made)
        except OSError as error:
            print(f"  tokens are not stored: {error}", flush=True)
        return made


def read(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a file; None if there is none, or if it is damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    body, checksum = content[:-CHECKSUM], content[-CHECKSUM:]
    if hashlib.blake2b(body, digest_size=CHECKSUM).digest() != checksum:
        return None
    try:
        with np.load(io.BytesIO(body), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):  # somebody else's, with a checksum that fits
        return None


def write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays, all or nothing.

    Raises:
        OSError: if that cannot be done.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.part")
    body = io.BytesIO()
    np.savez(body, **arrays)  # type: ignore[arg-type]
    try:
        with draft.open("wb") as file:
            file.write(body.getbuffer())
            file.write(hashlib.blake2b(body.getbuffer(), digest_size=CHECKSUM).digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


class Tokens:
    """The tokenised texts of one split: flat arrays, so that a million sentences cost no million objects.

    Args:
        tokenizer: a fast tokenizer.
        texts: one tuple of one or two texts for each example.
        max_length: tokens a text, or a pair of texts, is cut to.
        multiple: batches are padded to a multiple of so many tokens, up to `max_length`.
        store: where tokens are kept.
    """

    def __init__(
        self,
        tokenizer: Any,
        texts: Sequence[tuple[str, ...]],
        max_length: int,
        multiple: int = 1,
        store: Store | None = None,
    ) -> None:
        columns = [list(column) for column in zip(*texts, strict=True)]

        def make() -> dict[str, np.ndarray]:
            encoded = tokenizer(*columns, truncation=True, max_length=max_length, padding=False)
            offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in encoded["input_ids"]])])
            flat = {
                name: np.fromiter((value for row in encoded[name] for value in row), dtype, offsets[-1])
                for name, dtype in (("input_ids", np.int32), ("token_type_ids", np.int8))
                if name in encoded
            }
            return {"offsets": offsets, **flat}

        def source() -> list[Any]:
            settings = [tokenizer.truncation_side, tokenizer.model_input_names, max_length]
            return ["tokens", tokenizer_fingerprint(tokenizer), *settings, columns]

        self.columns = (store or Store()).arrays(source, make)
        self.offsets = self.columns.pop("offsets")
        self.fill = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
        self.multiple, self.max_length = multiple, max_length

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, special ones included."""
        return np.diff(self.offsets)

    @property
    def longest(self) -> np.ndarray:
        """Tokens of each example at most, whatever is drawn."""
        return self.lengths

    def pad(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Inputs of these examples, padded to the longest and then to the multiple, each (batch, tokens)."""
        mask, inputs = self.mask(rows), {}
        for name, values in self.columns.items():
            padded = np.full(mask.shape, self.fill[name], dtype=np.int64)
            padded[mask] = np.concatenate([values[self.offsets[row] : self.offsets[row + 1]] for row in rows])
            inputs[name] = torch.from_numpy(padded)
        inputs["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
        return inputs

    def mask(self, rows: Sequence[int]) -> np.ndarray:
        """Where these examples have tokens once they are padded, (batch, tokens), bool."""
        lengths = self.lengths_of(rows)
        return np.arange(padded_length(max(lengths), self.multiple, self.max_length)) < np.asarray(lengths)[:, None]

    def lengths_of(self, rows: Sequence[int]) -> list[int]:
        """Tokens of these examples."""
        return [int(self.offsets[row + 1] - self.offsets[row]) for row in rows]
