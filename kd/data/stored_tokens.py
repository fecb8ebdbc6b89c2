"""Tokens of texts on disk: made when they are needed, in any order, and stored for later and for other processes.

A folder of a finished store holds `index.bin`, where each example's tokens begin and how many they are; a file for each input
of a model, all tokens in the order in which they were made; and `about.json`. While tokens are missing, the files are in a
folder inside, whose name has the identity of this start of the machine: the processes that share it see each other's writes at
once and in order, so that the tokens of every example that the index has can be read, also after a process is killed.
After a crash of the machine, another folder is begun.
"""

import contextlib
import hashlib
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock
from tokenizers import Encoding

from kd.data.sources import SAY_AFTER
from kd.data.stored import ABOUT, StoredBytes, describe, description, empty, remove_with
from kd.data.stored_texts import StoredTexts
from kd.data.tokenized import (
    AT_ONCE,
    KINDS,
    TOKENS_FORMAT,
    Padding,
    Tokens,
    TokenStore,
    columns_of,
    encode,
    flat_arrays,
    rules_of,
    settings_of,
    tokenizer_fingerprint,
)
from kd.errors import InputError
from kd.system import distributed
from kd.system.files import ABANDONED, LOCK, remove, writing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

INDEX = "index.bin"
LENGTH_BITS = 24
"""Bits of a number of the index that hold the number of tokens plus one; those above hold the first token's position. It is one
number, so that no process ever reads a position without its length. 0 stands for an example without tokens so far."""

POLL = 0.002
"""Seconds between looks at a store that another process writes."""

MOST_BYTES = 1 << 22
"""Largest number of bytes of text that are tokenised at a time; one text may have more. Our choice: an encoding, which has the
tokens beyond the largest length too, takes some 25 times the memory of its text."""

BLOCK_ROWS = 1 << 16
"""Number of examples whose index is read at a time."""


@lru_cache(maxsize=1)
def this_start() -> str | None:
    """Return an identity of the machine since it was started; None if it has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip().replace("-", "")[:16]
    except OSError:
        return None


class TokenFiles:
    """The files of a token store.

    Args:
        folder: folder of the store, which may be empty or not there.
        count: number of examples.
        kinds: input of a model -> type of its numbers on disk.
        writes: whether this process adds tokens. One that does not is called after one on its machine that does.

    Raises:
        InputError: if the folder cannot be written to.
        OSError: if there is no room on the disk.
    """

    def __init__(self, folder: Path, count: int, kinds: Mapping[str, np.dtype[Any]], *, writes: bool) -> None:
        self.folder, self.count, self.kinds, self.writes = folder, count, dict(kinds), writes
        self.part = folder / f"{this_start() or socket.gethostname()}.part"
        self.lock = FileLock(folder / LOCK, poll_interval=POLL)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with self.lock:  # no other process finishes the store meanwhile, which moves its files
            if writes:
                self._begin()
            self._open()

    def _begin(self) -> None:
        """Make the folder of an unfinished store, unless there is one that can go on. The store is locked."""
        if description(self.folder, thorough=False) is not None:
            return
        (self.folder / ABOUT).unlink(missing_ok=True)
        for other in self.folder.glob("*.part"):
            with contextlib.suppress(OSError):
                if other != self.part and time.time() - (other / INDEX).stat().st_mtime > ABANDONED:
                    remove(other)
        if this_start() is None or not self._can_go_on():
            remove(self.part)
            self.part.mkdir()
            for name in self.kinds:
                (self.part / f"{name}.bin").touch()
            allocate(self.part / INDEX, self.count * np.dtype(np.int64).itemsize)

    def _can_go_on(self) -> bool:
        """Return whether an unfinished store has the tokens of all examples that its index has."""
        try:
            index = np.memmap(self.part / INDEX, np.int64, "r")
            end = 0
            for start in range(0, len(index), BLOCK_ROWS):
                words = index[start : start + BLOCK_ROWS]
                end = max(end, int(((words >> LENGTH_BITS) + (words & ((1 << LENGTH_BITS) - 1))).max(initial=0)) - 1)
            sizes = {name: (self.part / f"{name}.bin").stat().st_size for name in self.kinds}
        except (OSError, ValueError):
            return False
        return len(index) == self.count and all(sizes[name] >= end * kind.itemsize for name, kind in self.kinds.items())

    def _open(self) -> None:
        """Open the files. The store is locked."""
        self.finished = description(self.folder, thorough=False) is not None
        where = self.folder if self.finished else self.part
        mode: Any = "r+" if self.writes and not self.finished else "r"
        self.index: np.ndarray = np.memmap(where / INDEX, np.int64, mode)
        self.files = {name: StoredBytes(where / f"{name}.bin") for name in self.kinds}
        if self.writes and not self.finished:
            self.drafts = {name: (where / f"{name}.bin").open("r+b", buffering=0) for name in self.kinds}

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "count": self.count, "kinds": self.kinds}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state, writes=False)  # type: ignore[misc]

    def missing(self, rows: np.ndarray) -> np.ndarray:
        """Return those of some examples that have no tokens so far."""
        missing: np.ndarray = rows[self.index[rows] == 0]
        return missing

    def spans(self, rows: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray]:
        """Return the position of the first token of each of these examples, and the numbers of tokens.

        Raises:
            RuntimeError: if an example has no tokens.
        """
        words = np.asarray(self.index[rows])
        if not words.all():
            raise RuntimeError(f"tokens of '{self.folder}' are read before they are made")
        return words >> LENGTH_BITS, (words & ((1 << LENGTH_BITS) - 1)) - 1

    def read(self, name: str, starts: Sequence[int], lengths: Sequence[int]) -> list[np.ndarray]:
        """Return the numbers of an input from these positions on."""
        file, kind = self.files[name], self.kinds[name]
        size = kind.itemsize
        return [np.frombuffer(file.read(a * size, n * size), kind) for a, n in zip(starts, lengths, strict=True)]

    def add(self, rows: np.ndarray, lengths: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        """Add the tokens of some examples, except of those that another process has added meanwhile.

        Args:
            rows: the examples.
            lengths: numbers of tokens, (examples,).
            values: input -> numbers, one example after the other.

        Raises:
            OSError: if they cannot be written.
        """
        with self.lock:
            fresh = self.index[rows] == 0
            if self.finished or not fresh.any():
                return
            rows, lengths, own = rows[fresh], lengths[fresh], np.repeat(fresh, lengths)
            end = max(-(-os.fstat(draft.fileno()).st_size // self.kinds[name].itemsize) for name, draft in self.drafts.items())
            for name, draft in self.drafts.items():
                kind = self.kinds[name]
                write_at(draft.fileno(), values[name][own].astype(kind).tobytes(), end * kind.itemsize)
            starts = end + np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths[:-1], dtype=np.int64)])
            self.index[rows] = (starts << LENGTH_BITS) + lengths + 1  # last: they can be read from now on

    def finish(self) -> bool:
        """Declare the store finished if every example has tokens; return whether it is."""
        if not self.finished:
            self.finished = all(self.index[start : start + BLOCK_ROWS].all() for start in range(0, self.count, BLOCK_ROWS))
            if self.finished and self.writes:
                self._move()
        return self.finished

    def _move(self) -> None:
        """Move the files of a store that has all tokens to its folder, and declare it finished."""
        with self.lock:
            if self.part.is_dir() and description(self.folder, thorough=False) is None:  # else another process has moved them
                names = [INDEX, *(f"{name}.bin" for name in self.kinds)]
                # Before the files are moved: checksums take a while, in which a kill is to cost no tokens.
                describe(self.part, names, {"examples": self.count})
                for name in (*names, ABOUT):
                    os.replace(self.part / name, self.folder / name)
            remove(self.part)


def allocate(path: Path, size: int) -> None:
    """Make a file of zeros: a full disk is an error here, but would kill the process in a memory map.

    Raises:
        OSError: if there is no room.
    """
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            for start in range(0, size, BLOCK_ROWS):
                file.write(bytes(min(BLOCK_ROWS, size - start)))


def write_at(descriptor: int, content: bytes, start: int) -> None:
    """Write all bytes at a position.

    Raises:
        OSError: if they cannot be written.
    """
    view = memoryview(content)
    while len(view):
        written = os.pwrite(descriptor, view, start)
        view, start = view[written:], start + written


class StoredTokens(Padding):
    """Tokens of texts on disk, in a store on disk.

    Under DDP the first rank of each machine makes them, and the others wait for them. Every rank has to make this object.

    Args:
        tokenizer: a fast tokenizer.
        texts: the texts.
        max_length: number of tokens to which a text, or a pair of texts, is truncated.
        multiple: batches are padded to a multiple of this number of tokens, up to `max_length`.
        store: its folder has the store; a temporary one if it has none.

    Raises:
        InputError: if the folder cannot be written to.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        texts: StoredTexts,
        max_length: int,
        multiple: int = 1,
        store: TokenStore | None = None,
    ) -> None:
        super().__init__(tokenizer, max_length, multiple)
        self.texts, self.tokenizer, self.inputs = texts, tokenizer, columns_of(tokenizer)
        self.rules = rules_of(tokenizer, max_length)
        numbers = [*self.rules.get_vocab(with_added_tokens=True).values(), 0]
        kinds = {name: np.dtype(KINDS[name]) for name in self.names}
        if max(numbers) <= np.iinfo(np.uint16).max:
            kinds["input_ids"] = np.dtype(np.uint16)
        source = ["stored tokens", tokenizer_fingerprint(tokenizer), *settings_of(tokenizer, max_length), texts.digest]
        named = json.dumps([TOKENS_FORMAT, metadata.version("tokenizers"), *source])
        folder = None if store is None else store.folder
        self.writes = folder is None or distributed.local_rank() == 0
        if folder is None:
            path = Path(tempfile.mkdtemp(prefix="kd-tokens-"))
            remove_with(self, path)
        else:
            path = folder / f"tokens-{hashlib.blake2b(named.encode(), digest_size=16).hexdigest()}"
            distributed.on_rank_zero(lambda: check_store(path))
        opened = TokenFiles(path, len(texts), kinds, writes=True) if self.writes else None
        if folder is not None:
            distributed.gather(None)  # the files are there from here on
        self.files = opened or TokenFiles(path, len(texts), kinds, writes=False)
        self.lock = threading.Lock()
        self.urgent = threading.Event()
        """Set while the thread that trains waits for `lock`: the one that works ahead lets it go first."""

    def __getstate__(self) -> dict[str, Any]:
        """Return what processes of a loader need: they read tokens, and make none."""
        return {**{name: getattr(self, name) for name in ("fill", "names", "multiple", "max_length", "files")}, "writes": False}

    def __len__(self) -> int:
        return self.files.count

    def need(self, rows: np.ndarray) -> None:
        """Return once these examples have tokens.

        Raises:
            InputError: for a text that the tokenizer refuses.
            OSError: if the tokens cannot be written.
        """
        if not len(missing := self.files.missing(rows)):
            return
        if not self.writes:
            while len(missing):
                time.sleep(POLL)
                missing = self.files.missing(missing)
            return
        self.urgent.set()
        try:
            with self.lock:
                self.urgent.clear()
                for some in self._parts(missing):
                    self._make(some)
        finally:
            self.urgent.clear()

    def prepare(self, rows: np.ndarray) -> None:
        """Make the tokens of some examples, at most `AT_ONCE`, ahead of the time; see `need`."""
        for some in self._parts(rows):
            while self.urgent.is_set():
                time.sleep(POLL)
            with self.lock:
                self._make(some)

    def _parts(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Yield some examples in parts that are tokenised at a time: of at most `AT_ONCE`, and of few bytes (`MOST_BYTES`)."""
        for start in range(0, len(rows), AT_ONCE):
            some = rows[start : start + AT_ONCE]
            yield from np.split(some, bounds_by_size(self.texts.sizes(some).tolist(), MOST_BYTES))

    def _make(self, rows: np.ndarray) -> None:
        """Make and store the tokens of those of some examples that have none. This thread has `lock`."""
        rows = self.files.missing(rows)
        if len(rows):
            lengths, values = flat_arrays(self._encodings(rows), self.inputs)
            self.files.add(rows, lengths, values)

    def _encodings(self, rows: np.ndarray) -> list[Encoding]:
        """Return the encodings of some examples.

        Raises:
            InputError: for a text that the tokenizer refuses; it names the line.
        """
        texts = self.texts.take(rows)[:]
        try:
            return encode(self.rules, texts)
        except Exception:  # the library raises no class of its own
            for row, text in zip(rows.tolist(), texts, strict=True):
                try:
                    encode(self.rules, [text])
                except Exception as cause:
                    where = self.texts.where(row)
                    raise InputError(f"{where}: the tokenizer fails on this text ({cause})", "task.unlabelled") from cause
            raise

    @property
    def finished(self) -> bool:
        """True if every example has tokens, as far as this process has looked."""
        return self.files.finished

    def complete(self, *, announce: bool = True) -> None:
        """Return once every example has tokens.

        Args:
            announce: whether to print that the training waits for it.

        Raises:
            InputError: for a text that the tokenizer refuses.
        """
        if self.finished:
            return
        if announce:
            distributed.print_rank_zero(
                f"  {len(self):,} texts without labels are tokenised now, because all tokens are read before the training"
            )
        began = said = time.monotonic()
        for start in range(0, len(self), AT_ONCE):
            self.need(np.arange(start, min(start + AT_ONCE, len(self))))
            if time.monotonic() - said > SAY_AFTER:
                said = time.monotonic()
                distributed.print_rank_zero(f"  tokenising texts: {start:,} of {len(self):,} in {said - began:.0f} s")
        self.files.finish()

    @property
    def offsets(self) -> np.ndarray:
        """Start of each example's tokens, as if all were in one array, and the end of the last one's, (examples + 1,)."""
        return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self.lengths)])

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each example, special ones included; the tokens that are missing are made first."""
        self.complete()
        return self.files.spans(slice(None))[1]

    def lengths_of(self, rows: Sequence[int]) -> list[int]:
        """Return the number of tokens of each of these examples."""
        lengths: list[int] = self.files.spans(np.asarray(rows, dtype=np.int64))[1].tolist()
        return lengths

    def values(self, name: str, rows: Sequence[int]) -> list[np.ndarray]:
        """Return the numbers of an input, one array for each of these examples."""
        starts, lengths = self.files.spans(np.asarray(rows, dtype=np.int64))
        return self.files.read(name, starts.tolist(), lengths.tolist())

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """Yield the numbers of an input for all examples, in their order; the tokens that are missing are made first."""
        self.complete()
        for start in range(0, len(self), BLOCK_ROWS):
            starts, lengths = self.files.spans(slice(start, start + BLOCK_ROWS))
            # Examples that lie one behind the other are read at once.
            bounds = np.flatnonzero(np.concatenate([[True], starts[1:] != starts[:-1] + lengths[:-1], [True]]))
            ends = starts[bounds[1:] - 1] + lengths[bounds[1:] - 1]
            firsts = starts[bounds[:-1]]
            for array in self.files.read(name, firsts.tolist(), (ends - firsts).tolist()):
                yield array.astype(KINDS[name])


def bounds_by_size(sizes: Sequence[int], most: int) -> list[int]:
    """Return where to cut a sequence, so that the sizes of no part add up to more than `most`, but for a part of one item.

    >>> bounds_by_size([2, 2, 2, 9, 1], 4)
    [2, 3, 4]
    """
    bounds, total = [], 0
    for index, size in enumerate(sizes):
        if index and total + size > most:
            bounds.append(index)
            total = 0
        total += size
    return bounds


def check_store(folder: Path) -> None:
    """Remove the files of a finished store if they are damaged."""
    if (folder / ABOUT).exists() and description(folder) is None:
        distributed.print_rank_zero(f"  the stored tokens '{folder}' are damaged; they are rebuilt")
        with FileLock(folder / LOCK):
            if description(folder) is None:
                empty(folder, but=(LOCK,))


class JoinedTokens(Padding):
    """Tokens in memory, and behind them tokens on disk, as those of one split.

    Args:
        first: tokens in memory.
        stored: tokens on disk, made by the same tokenizer.
    """

    def __init__(self, first: Tokens, stored: StoredTokens) -> None:
        self.fill, self.names, self.multiple, self.max_length = first.fill, first.names, first.multiple, first.max_length
        self.first, self.stored = first, stored

    def __len__(self) -> int:
        return len(self.first) + len(self.stored)

    @property
    def offsets(self) -> np.ndarray:
        """Start of each example's tokens, as if all were in one array, and the end of the last one's, (examples + 1,)."""
        first = self.first.offsets
        return np.concatenate([first, first[-1] + self.stored.offsets[1:]])

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each example, special ones included; the tokens that are missing are made first."""
        return np.concatenate([self.first.lengths, self.stored.lengths])

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """All numbers of each input, in memory; the tokens that are missing are made first."""
        return {name: np.concatenate(list(self.blocks(name))) for name in self.names}

    def need(self, rows: np.ndarray) -> None:
        """Return once these examples have tokens; errors as `StoredTokens.need`."""
        self.stored.need(rows[rows >= len(self.first)] - len(self.first))

    def lengths_of(self, rows: Sequence[int]) -> list[int]:
        """Return the number of tokens of each of these examples."""
        return self._merged(rows, self.first.lengths_of, self.stored.lengths_of)

    def values(self, name: str, rows: Sequence[int]) -> list[np.ndarray]:
        """Return the numbers of an input, one array for each of these examples."""
        return self._merged(rows, lambda some: self.first.values(name, some), lambda some: self.stored.values(name, some))

    def _merged(self, rows: Sequence[int], first: Any, stored: Any) -> list[Any]:
        """Return what two functions return for the examples of either part, in the order of `rows`."""
        start = len(self.first)
        ours = iter(first([row for row in rows if row < start]))
        theirs = iter(stored([row - start for row in rows if row >= start]))
        return [next(ours if row < start else theirs) for row in rows]

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """Yield the numbers of an input for all examples, in their order; the tokens that are missing are made first."""
        yield from self.first.blocks(name)
        yield from self.stored.blocks(name)


class LengthsOnDemand:
    """Numbers of tokens of the examples of a split, for a sampler: those of examples that are asked for are made first.

    Args:
        tokens: tokens of each tokenizer of the run; the lengths are those of the first.
        rows: the examples of the split that are numbered from 0 here; None for all.
    """

    def __init__(self, tokens: Sequence[JoinedTokens], rows: np.ndarray | None = None) -> None:
        self.tokens, self.rows = list(tokens), rows
        self.ahead: Ahead | None = None

    def __len__(self) -> int:
        return len(self.tokens[0]) if self.rows is None else len(self.rows)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Return the numbers of tokens of these examples."""
        rows = rows if self.rows is None else self.rows[rows]
        self.need(rows)
        return np.asarray(self.tokens[0].lengths_of(rows.tolist()), dtype=np.int64)

    def need(self, rows: np.ndarray) -> None:
        """Return once these examples, as they are numbered in the split, have tokens.

        Raises:
            InputError: for a text that the tokenizer refuses, also if that was found ahead of the time.
            OSError: if the tokens cannot be written.
        """
        if self.ahead is not None:
            self.ahead.check()
        for tokens in self.tokens:
            tokens.need(rows)

    def expect(self, blocks: Iterable[np.ndarray]) -> None:
        """Make tokens ahead of the time, in a thread, of these examples, which will be asked for in this order."""
        self.close()
        if all(tokens.stored.finished or not tokens.stored.writes for tokens in self.tokens):
            return
        own = blocks if self.rows is None else (self.rows[rows] for rows in blocks)
        self.ahead = Ahead([tokens for tokens in self.tokens if tokens.stored.writes], own)

    def close(self) -> None:
        """End the thread, if there is one."""
        if self.ahead is not None:
            self.ahead.stop()
            self.ahead = None


class Ahead:
    """Thread that makes the tokens of an epoch ahead of the training.

    Args:
        tokens: tokens of each tokenizer of the run.
        blocks: examples, in the order in which they will be needed.
    """

    def __init__(self, tokens: Sequence[JoinedTokens], blocks: Iterable[np.ndarray]) -> None:
        self.tokens, self.blocks = tokens, blocks
        self.error: BaseException | None = None
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, name="tokens of text without labels", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            for rows in self.blocks:
                for tokens in self.tokens:
                    start = len(tokens.first)
                    own = rows[rows >= start] - start
                    for begin in range(0, len(own), AT_ONCE):
                        if self.stopped.is_set():
                            return
                        tokens.stored.prepare(own[begin : begin + AT_ONCE])
            for stored in (tokens.stored for tokens in self.tokens):
                # Texts that equal a held one are not trained on, but the store is finished with them alone.
                for begin in range(0, len(stored), AT_ONCE):
                    if self.stopped.is_set():
                        return
                    rest = stored.files.missing(np.arange(begin, min(begin + AT_ONCE, len(stored))))
                    if len(rest):
                        stored.prepare(rest)
                stored.files.finish()
        except BaseException as error:  # noqa: BLE001 - raised again by `check`, in the thread that trains
            self.error = error

    def check(self) -> None:
        """Raise the error that ended the thread, if one did."""
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """End the thread and wait for it."""
        self.stopped.set()
        self.thread.join()
