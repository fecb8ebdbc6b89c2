"""Text without labels on disk: read in one pass, tokenised in any order, shared by processes, and never half there."""

import csv
import json
import os
import signal
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from conftest import FILLER, GOOD, tiny_tokenizer
from kd.data import examples as loading
from kd.data import readers, sources, stored_texts, stored_tokens
from kd.data.held import cut
from kd.data.labels import PartLabels, given_labels, has_label
from kd.data.readers import Layout, nonblank_lines
from kd.data.sampler import LengthBatches
from kd.data.stored import ABOUT, StoredBytes
from kd.data.stored_texts import StoredTexts, TextPiece, store_texts
from kd.data.stored_tokens import JoinedTokens, LengthsOnDemand, StoredTokens
from kd.data.texts import FlatTexts, JoinedTexts, Texts, count_shared
from kd.data.tokenized import Tokens, TokenStore
from kd.errors import InputError
from kd.system.files import made_by_success

WORDS = [*FILLER, *GOOD]
PLACES = ["'a.txt', line ", "'b.txt', line "]


def some_texts(count: int, columns: int = 1, seed: int = 0) -> list[tuple[str, ...]]:
    """Texts of 0 to 11 words, some not of the vocabulary, some beyond ASCII."""
    draw = np.random.default_rng(seed)
    return [
        tuple(" ".join(draw.choice([*WORDS, "über", "x"], draw.integers(12))) for _ in range(columns)) for _ in range(count)
    ]


def pieces_of(texts: list[tuple[str, ...]], at_once: int = 7) -> Iterator[TextPiece]:
    """The first half as of the first file, with lines from 1."""
    half = -(-len(texts) // 2)
    for file, part in enumerate((texts[:half], texts[half:])):
        for start in range(0, len(part), at_once):
            some = part[start : start + at_once]
            yield TextPiece(file, Texts.of(some), np.arange(start, start + len(some)) + 1, {"n": np.float32(range(len(some)))})


def stored(folder: Path | None, texts: list[tuple[str, ...]]) -> StoredTexts:
    return store_texts(folder, PLACES, lambda: pieces_of(texts), "'more'")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


# Texts


@pytest.mark.parametrize("columns", [1, 2])
def test_stored_texts_behave_like_a_list(tmp_path: Path, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_texts, "PIECE_ROWS", 10)
    texts = some_texts(45, columns)
    found = stored(tmp_path / "texts", texts)
    assert found == texts
    assert list(found) == texts
    assert (len(found), found[3], found[-1], found[4:9]) == (45, texts[3], texts[-1], texts[4:9])
    assert found.take([7, 3, 44, 7])[:] == [texts[7], texts[3], texts[44], texts[7]]
    assert [len(piece) for piece in found.pieces()] == [10, 10, 10, 10, 5]
    assert [text for piece in found.pieces() for text in piece] == texts
    for index in (45, -46):
        with pytest.raises(IndexError):
            found[index]
    assert (found.where(0), found.where(22), found.where(23)) == ("'a.txt', line 1", "'a.txt', line 23", "'b.txt', line 1")
    assert found.column("n").tolist() == [float(n % 23 % 7) for n in range(45)]
    assert found.column("n").dtype == np.float32


@pytest.mark.parametrize("columns", [1, 2])
def test_few_long_texts_are_read_at_a_time(tmp_path: Path, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_texts, "PIECE_ROWS", 7)
    monkeypatch.setattr(stored_texts, "PIECE_BYTES", 100)
    texts = [("x" * (number * 7 % 60 if number % 10 else 300),) * columns for number in range(100)]
    pieces = list(stored(tmp_path / "texts", texts).pieces())
    assert [row for piece in pieces for row in piece] == texts
    assert all(len(piece) == 1 or len(piece.content) <= 100 for piece in pieces)
    assert 1 < max(map(len, pieces)) <= 7
    assert list(stored(tmp_path / "none", []).pieces()) == []


def test_texts_are_read_once_and_shared(tmp_path: Path) -> None:
    texts = some_texts(30)
    first = stored(tmp_path / "texts", texts)
    again = store_texts(tmp_path / "texts", PLACES, lambda: pytest.fail("read again"), "'more'")
    assert again == texts
    assert again.digest == first.digest
    assert stored(tmp_path / "other", texts).digest == first.digest
    assert stored(tmp_path / "third", texts[::-1]).digest != first.digest
    # Equal content with other boundaries is other text.
    assert stored(tmp_path / "c", [("ab",), ("c",)]).digest != stored(tmp_path / "d", [("a",), ("bc",)]).digest


def test_temporary_texts_go_with_their_object() -> None:
    found = stored(None, some_texts(5))
    folder = found.folder
    assert folder.is_dir()
    assert len(found) == 5
    del found
    assert not folder.exists()


@pytest.mark.parametrize("name", ["content.bin", "offsets.bin", "numbers.bin", "column0.bin"])
def test_damaged_texts_are_read_again(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    texts = some_texts(30)
    stored(tmp_path / "texts", texts)
    content = bytearray((tmp_path / "texts" / name).read_bytes())
    content[len(content) // 2] ^= 4
    (tmp_path / "texts" / name).write_bytes(content)
    assert stored(tmp_path / "texts", texts) == texts
    assert "are damaged; 'more' is read again" in capsys.readouterr().out
    (tmp_path / "texts" / name).unlink()
    assert stored(tmp_path / "texts", texts) == texts


@pytest.mark.parametrize(
    "about", ["", "[]", "{}", '{"files": 3}', '{"files": {"../../a": 3}}', '{"files": {"content.bin": {}}}']
)
def test_a_foreign_description_counts_as_none(tmp_path: Path, about: str) -> None:
    texts = some_texts(5)
    stored(tmp_path / "texts", texts)
    (tmp_path / "texts" / ABOUT).write_text(about)
    assert stored(tmp_path / "texts", texts) == texts


def test_an_error_while_texts_are_read_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    texts = some_texts(30)

    def broken() -> Iterator[TextPiece]:
        for number, piece in enumerate(pieces_of(texts)):
            if number == 2:
                raise InputError("line 15", "unlabelled")
            yield piece

    with pytest.raises(InputError, match="line 15"):
        store_texts(tmp_path / "texts", PLACES, broken, "'more'")
    assert [path.name for path in (tmp_path / "texts").iterdir()] == [".lock"]
    assert stored(tmp_path / "texts", texts) == texts


def test_a_kill_while_texts_are_written_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    texts = some_texts(30)

    def killed() -> Iterator[TextPiece]:
        for number, piece in enumerate(pieces_of(texts)):
            if number == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            yield piece

    process = get_context("fork").Process(target=store_texts, args=(tmp_path / "texts", PLACES, killed, "'more'"))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "texts" / "content.bin").exists()
    assert not (tmp_path / "texts" / ABOUT).exists()
    assert stored(tmp_path / "texts", texts) == texts


def test_a_second_process_waits_for_the_texts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    texts = some_texts(30)
    begun, go_on = get_context("fork").Event(), get_context("fork").Event()

    def slow() -> Iterator[TextPiece]:
        begun.set()
        go_on.wait(60)
        return pieces_of(texts)

    process = get_context("fork").Process(target=store_texts, args=(tmp_path / "texts", PLACES, slow, "'more'"))
    process.start()
    begun.wait(60)
    threading.Timer(0.3, go_on.set).start()
    found = store_texts(tmp_path / "texts", PLACES, lambda: pytest.fail("read twice"), "'more'")
    process.join(60)
    assert found == texts
    assert "another process reads 'more'; waiting for it" in capfd.readouterr().out


def test_what_another_process_stores_meanwhile_outlives_a_refusal(tmp_path: Path) -> None:
    """As of two commands in a new folder of runs, one of which is refused: the other may still be writing."""
    store, texts = tmp_path / "runs" / ".tokens", some_texts(30)
    begun, go_on = get_context("fork").Event(), get_context("fork").Event()

    def slow() -> Iterator[TextPiece]:
        begun.set()
        go_on.wait(60)
        return pieces_of(texts)

    other = get_context("fork").Process(target=store_texts, args=(store / "other", PLACES, slow, "'other'"))

    def refused() -> None:
        stored(store / "own", texts)
        other.start()
        begun.wait(60)
        raise InputError("refused")

    with pytest.raises(InputError, match="refused"), made_by_success(store):
        refused()
    assert [path.name for path in store.iterdir()] == ["other"]
    go_on.set()
    other.join(60)
    assert other.exitcode == 0
    assert store_texts(store / "other", PLACES, lambda: pytest.fail("read twice"), "'other'") == texts
    with pytest.raises(InputError, match="refused"), made_by_success(store):
        raise InputError("refused")
    assert (store / "other").exists(), "it was there before"


def test_joined_and_flat_texts_are_those_of_their_parts(tmp_path: Path) -> None:
    first, second, third = some_texts(5), some_texts(9, seed=1), some_texts(3, 2)
    both = JoinedTexts(Texts.of(first), stored(tmp_path / "texts", second))
    assert both == [*first, *second]
    assert (both[4], both[5], both[-1], both[3:7]) == (first[4], second[0], second[-1], [*first[3:], *second[:2]])
    assert FlatTexts(both)[:] == [text for (text,) in [*first, *second]] == list(FlatTexts(both))
    mixed = FlatTexts(JoinedTexts(both, third))
    expected = [text for row in [*first, *second, *third] for text in row]
    assert (list(mixed), mixed[:], len(mixed), mixed[-2]) == (expected, expected, 20, expected[-2])
    assert len(FlatTexts([])) == 0


def test_shared_texts_are_counted_in_all_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_texts, "PIECE_ROWS", 4)
    texts = [(f"text {number}",) for number in range(20)]
    both = JoinedTexts(Texts.of(texts[:3]), stored(tmp_path / "texts", texts[3:]))
    evaluated = [("text 1",), ("no",), ("text 19",), ("text 6",), ("text 6",)]
    assert count_shared(evaluated, both) == count_shared(evaluated, texts) == 4
    assert count_shared([], both) == count_shared([("no",)], both) == 0


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("length", [0, 1, 3, 30])
def test_shared_texts_are_those_that_are_equal(columns: int, length: int) -> None:
    """Also of texts whose sizes and last letters are equal, and of empty ones."""
    draw = np.random.default_rng(length)

    def texts() -> list[tuple[str, ...]]:
        return [
            tuple("".join(draw.choice(["a", "b"], draw.integers(length + 1))) + "cd" * 4 * (length > 9) for _ in range(columns))
            for _ in range(60)
        ]

    one, other = texts(), texts()
    assert count_shared(one, Texts.of(other)) == sum(text in set(other) for text in one)
    keys = Texts.of([*one, *other]).keys()
    for text, key in zip(one, keys[:60], strict=True):
        assert all(key == theirs for same, theirs in zip(other, keys[60:], strict=True) if same == text)


def test_labels_that_are_missing_take_no_list() -> None:
    labels = PartLabels([1.0, float("nan"), 0.0], 4)
    assert (len(labels), labels[0], labels[2], labels[:1], labels[-5]) == (7, 1.0, 0.0, [1.0], 0.0)
    assert np.isnan(labels[3:]).tolist() == [True] * 4
    assert np.isnan(list(labels)).tolist() == np.isnan(np.asarray(labels)).tolist() == [False, True, False, *[True] * 4]
    assert has_label(labels).tolist() == [True, False, True, *[False] * 4]
    assert has_label([1.0, float("nan")]).tolist() == [True, False]
    assert given_labels(labels) == given_labels(list(labels)) == [1.0, 0.0]
    with pytest.raises(IndexError):
        labels[7]


# Tokens


def joined(tokenizer: PreTrainedTokenizerFast, texts: list[tuple[str, ...]], split: int, folder: Path | None) -> JoinedTokens:
    """Tokens of some texts, the first ones in memory."""
    where = None if folder is None else folder / "texts"
    first = Tokens(tokenizer, texts[:split], 9, 2)
    return JoinedTokens(first, StoredTokens(tokenizer, stored(where, texts[split:]), 9, 2, TokenStore(folder)))


def same_tokens(one: JoinedTokens | StoredTokens, other: Tokens, rows: list[int]) -> None:
    """Check that two objects give equal inputs for these examples."""
    ours, theirs = one.pad(rows), other.pad(rows)
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        assert torch.equal(values, theirs[name]), name
        assert values.dtype == torch.long
    assert one.lengths_of(rows) == other.lengths_of(rows)


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("columns", [1, 2])
def test_tokens_made_in_any_order_are_those_made_at_once(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, columns: int, folder: bool
) -> None:
    texts = some_texts(60, columns)
    plain = Tokens(tokenizer, texts, 9, 2)
    for _ in range(2):  # made, and found
        tokens = joined(tokenizer, texts, 20, tmp_path if folder else None)
        for rows in np.array_split(np.random.default_rng(0).permutation(60), 7):
            tokens.need(rows)
            same_tokens(tokens, plain, rows.tolist())
        tokens.stored.complete()
        for name in ("lengths", "offsets", "longest"):
            assert getattr(tokens, name).tolist() == getattr(plain, name).tolist()
            assert getattr(tokens, name).dtype == getattr(plain, name).dtype
        assert tokens.digest() == plain.digest()
        assert tokens.words().tolist() == plain.words().tolist()
        assert {name: values.tolist() for name, values in tokens.columns.items()} == {
            name: values.tolist() for name, values in plain.columns.items()
        }
        assert len(tokens) == len(plain) == 60


def test_a_teacher_cache_is_named_as_before(tokenizer: PreTrainedTokenizerFast) -> None:
    """The digest of all tokens is that of the arrays, as caches on disk have it."""
    import hashlib

    tokens = Tokens(tokenizer, some_texts(60), 9)
    text = hashlib.blake2b(tokens.offsets.tobytes(), digest_size=8)
    for column in tokens.columns.values():
        text.update(np.ascontiguousarray(column).tobytes())
    assert tokens.digest() == text.hexdigest()


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    many = tiny_tokenizer([*WORDS, *(f"w{number}" for number in range(70_000))])
    texts = [("w69999 film",), ("w12",)]
    tokens = StoredTokens(many, stored(tmp_path / "texts", texts), 9, 1, TokenStore(tmp_path))
    tokens.complete()
    same_tokens(tokens, Tokens(many, texts, 9), [0, 1])
    assert tokens.files.kinds["input_ids"] == np.int32
    assert StoredTokens(tiny_tokenizer(), tokens.texts, 9).files.kinds["input_ids"] == np.uint16


def test_an_empty_example_has_tokens(tmp_path: Path) -> None:
    """No tokens, of a tokenizer that adds none of its own, are not the same as none so far."""
    bare = tiny_tokenizer()
    bare.backend_tokenizer.post_processor = None
    tokens = StoredTokens(bare, stored(tmp_path / "texts", [("film",), ("",), ("a film",)]), 9)
    tokens.complete()
    assert tokens.lengths.tolist() == [1, 0, 2]
    assert tokens.files.finish()


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of texts that are tokenised from now on."""
    calls: list[int] = []
    encode = stored_tokens.encode

    def counting(rules: Tokenizer, rows: list[tuple[str, ...]]) -> object:
        calls.append(len(rows))
        return encode(rules, rows)

    monkeypatch.setattr(stored_tokens, "encode", counting)
    return calls


def test_each_text_is_tokenised_once_by_all_objects_of_a_store(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = some_texts(60)
    calls, found = counted(monkeypatch), stored(tmp_path / "texts", texts)
    one, other = (StoredTokens(tokenizer, found, 9, 1, TokenStore(tmp_path)) for _ in range(2))
    one.need(np.arange(0, 40))
    other.need(np.arange(20, 60))
    assert sum(calls) == 60
    plain = Tokens(tokenizer, texts, 9)
    same_tokens(one, plain, list(range(60)))
    other.complete()
    one.complete()
    third = StoredTokens(tokenizer, found, 9, 1, TokenStore(tmp_path))
    assert (one.finished, third.finished, sum(calls)) == (True, True, 60)
    same_tokens(one, plain, list(range(60)))
    same_tokens(third, plain, list(range(60)))
    (folder,) = tmp_path.glob("tokens-*")
    assert not list(folder.glob("*.part"))
    for more in (9, 12):  # another length, tokenizer or text has a store of its own
        StoredTokens(tokenizer, found, more, 1, TokenStore(tmp_path))
    StoredTokens(tiny_tokenizer([*WORDS, "more"]), found, 9, 1, TokenStore(tmp_path))
    StoredTokens(tokenizer, stored(tmp_path / "others", texts[:-1]), 9, 1, TokenStore(tmp_path))
    assert len(list(tmp_path.glob("tokens-*"))) == 4


def make_all(folder: Path, seed: int) -> None:
    """Make the tokens of a store in an order of this seed."""
    tokens = StoredTokens(tiny_tokenizer(), stored(folder / "texts", some_texts(600)), 9, 1, TokenStore(folder))
    for rows in np.array_split(np.random.default_rng(seed).permutation(600), 60):
        tokens.need(rows)
    tokens.complete()


def test_processes_that_make_tokens_at_once_share_a_store(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    texts = some_texts(600)
    stored(tmp_path / "texts", texts)
    processes = [get_context("fork").Process(target=make_all, args=(tmp_path, seed)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    (folder,) = tmp_path.glob("tokens-*")
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock",
        ABOUT,
        "index.bin",
        "input_ids.bin",
        "token_type_ids.bin",
    ]
    plain = Tokens(tokenizer, texts, 9)
    assert (folder / "input_ids.bin").stat().st_size == 2 * plain.offsets[-1], "no text was stored twice"
    same_tokens(StoredTokens(tokenizer, stored(tmp_path / "texts", texts), 9, 1, TokenStore(tmp_path)), plain, list(range(600)))


TOKENISED_AGAIN = {
    "before the tokens": 560,
    "after the tokens": 560,
    "after the index": 510,
    "while it is described": 0,
    "while it is moved": 600,
}
"""Moment at which a process is killed -> number of 600 texts that the next one tokenises."""


@pytest.mark.parametrize("moment", TOKENISED_AGAIN)
def test_a_kill_leaves_a_store_that_goes_on(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = some_texts(600)
    stored(tmp_path / "texts", texts)

    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def killed() -> None:
        calls, write_at, make = 0, stored_tokens.write_at, StoredTokens._make

        def write(descriptor: int, content: bytes, start: int) -> None:
            nonlocal calls
            calls += 1
            if calls == 9:
                write_at(descriptor, content[: len(content) // 3] if moment == "before the tokens" else content, start)
                die()
            write_at(descriptor, content, start)

        def made(tokens: StoredTokens, rows: np.ndarray) -> None:
            nonlocal calls
            make(tokens, rows)
            calls += 1
            if calls == 9:
                die()

        if moment == "while it is described":  # which reads all tokens once more
            stored_tokens.describe = die  # type: ignore[assignment]
        elif moment == "while it is moved":
            stored_tokens.os.replace = lambda old, new: die() if Path(new).name == "input_ids.bin" else Path(old).rename(new)
        elif moment == "after the index":
            StoredTokens._make = made  # type: ignore[method-assign]
        else:
            stored_tokens.write_at = write
        make_all(tmp_path, 0)

    process = get_context("fork").Process(target=killed)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (folder,) = tmp_path.glob("tokens-*")
    assert not (folder / ABOUT).exists()
    calls = counted(monkeypatch)
    make_all(tmp_path, 1)
    assert sum(calls) == TOKENISED_AGAIN[moment]
    plain = Tokens(tokenizer, texts, 9)
    same_tokens(StoredTokens(tokenizer, stored(tmp_path / "texts", texts), 9, 1, TokenStore(tmp_path)), plain, list(range(600)))


def test_what_is_left_of_before_a_crash_of_the_machine_is_not_read(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its index may have been written to disk, and its tokens not."""
    texts = some_texts(60)
    found = stored(tmp_path / "texts", texts)
    StoredTokens(tokenizer, found, 9, 1, TokenStore(tmp_path)).need(np.arange(40))
    (old,) = tmp_path.glob("tokens-*/*.part")
    (old / "input_ids.bin").write_bytes(bytes((old / "input_ids.bin").stat().st_size))
    monkeypatch.setattr(stored_tokens, "this_start", lambda: "another")
    tokens = StoredTokens(tokenizer, found, 9, 1, TokenStore(tmp_path))
    tokens.complete()
    same_tokens(tokens, Tokens(tokenizer, texts, 9), list(range(60)))
    assert old.exists(), "it may be of another machine that shares the folder"
    os.utime(old / "index.bin", (1, 1))
    (old.parent / ABOUT).unlink()
    StoredTokens(tokenizer, found, 9, 1, TokenStore(tmp_path))
    assert not old.exists()


def test_without_an_identity_of_the_machine_nothing_goes_on(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_tokens, "this_start", lambda: None)
    found = stored(tmp_path / "texts", some_texts(60))
    one = StoredTokens(tokenizer, found, 9, 1, TokenStore(tmp_path))
    one.need(np.arange(40))
    other = StoredTokens(tokenizer, found, 9, 1, TokenStore(tmp_path))
    assert len(other.files.missing(np.arange(60))) == 60
    other.complete()
    one.complete()
    for tokens in (one, other):
        same_tokens(tokens, Tokens(tokenizer, some_texts(60), 9), list(range(60)))


@pytest.mark.parametrize("damage", ["short tokens", "short index", "no index"])
def test_an_unfinished_store_that_is_damaged_is_begun_again(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, damage: str
) -> None:
    found = stored(tmp_path / "texts", some_texts(60))
    StoredTokens(tokenizer, found, 9, 1, TokenStore(tmp_path)).need(np.arange(40))
    (part,) = tmp_path.glob("tokens-*/*.part")
    if damage == "no index":
        (part / "index.bin").unlink()
    else:
        name = "input_ids.bin" if damage == "short tokens" else "index.bin"
        os.truncate(part / name, (part / name).stat().st_size - 8)
    tokens = StoredTokens(tokenizer, found, 9, 1, TokenStore(tmp_path))
    assert len(tokens.files.missing(np.arange(60))) == 60
    tokens.complete()
    same_tokens(tokens, Tokens(tokenizer, some_texts(60), 9), list(range(60)))


@pytest.mark.parametrize("name", ["input_ids.bin", "token_type_ids.bin", "index.bin"])
def test_damage_of_a_finished_store_is_found(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = stored(tmp_path / "texts", some_texts(60, 2))
    StoredTokens(tokenizer, found, 9, 1, TokenStore(tmp_path)).complete()
    (folder,) = tmp_path.glob("tokens-*")
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    tokens = StoredTokens(tokenizer, found, 9, 1, TokenStore(tmp_path))
    assert "are damaged; they are rebuilt" in capsys.readouterr().out
    assert not tokens.finished
    tokens.complete()
    same_tokens(tokens, Tokens(tokenizer, some_texts(60, 2), 9), list(range(60)))


def test_a_file_that_ends_early_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert StoredBytes(tmp_path / "a").read(1, 4) == b"2345"
    with pytest.raises(OSError, match="ends after 5 bytes, of which 6 are read"):
        StoredBytes(tmp_path / "a").read(2, 4)


def test_tokens_that_are_missing_are_never_read_as_if_they_were_there(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokens = StoredTokens(tokenizer, stored(tmp_path / "texts", some_texts(9)), 9)
    tokens.need(np.arange(3))
    with pytest.raises(RuntimeError, match="read before they are made"):
        tokens.pad([2, 3])


def test_a_full_disk_is_an_error_and_not_the_end(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    found = stored(tmp_path / "texts", some_texts(60))
    tokens = StoredTokens(tokenizer, found, 9, 1, TokenStore(tmp_path))
    tokens.need(np.arange(20))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space left"):
            tokens.need(np.arange(30))
    assert tokens.files.missing(np.arange(60)).tolist() == list(range(20, 60))
    tokens.complete()
    same_tokens(tokens, Tokens(tokenizer, some_texts(60), 9), list(range(60)))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        StoredTokens(tokenizer, found, 8, 1, TokenStore(tmp_path))


def refusing() -> PreTrainedTokenizerFast:
    """A tokenizer that has no token for an unknown word, and fails on one."""
    rules = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    del rules["model"]["vocab"]["[UNK]"]
    rules["added_tokens"] = [token for token in rules["added_tokens"] if token["content"] != "[UNK]"]
    core = Tokenizer.from_str(json.dumps(rules))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")


def test_a_text_that_the_tokenizer_refuses_is_named(tmp_path: Path) -> None:
    texts = [*[("film",)] * 5, ("über",), *[("film",)] * 3]
    tokens = StoredTokens(refusing(), stored(tmp_path / "texts", texts), 9)
    tokens.need(np.arange(4))
    with pytest.raises(InputError, match=r"'b.txt', line 1: the tokenizer fails on this text \(.*UNK") as refused:
        tokens.need(np.arange(9))
    assert refused.value.key == "task.unlabelled"


def test_ranks_that_write_nothing_wait_for_the_first_of_their_machine(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = some_texts(60)
    found = stored(tmp_path / "texts", texts)
    first = StoredTokens(tokenizer, found, 9, 1, TokenStore(tmp_path))
    monkeypatch.setenv("LOCAL_RANK", "1")
    second = StoredTokens(tokenizer, found, 9, 1, TokenStore(tmp_path))
    assert (first.writes, second.writes) == (True, False)
    calls = counted(monkeypatch)
    maker = threading.Timer(0.2, first.need, [np.arange(40)])
    maker.start()
    second.need(np.arange(30))
    same_tokens(second, Tokens(tokenizer, texts, 9), list(range(30)))
    maker.join()
    assert calls == [40]
    threading.Timer(0.2, first.complete).start()
    assert second.lengths.tolist() == Tokens(tokenizer, texts, 9).lengths.tolist()
    assert second.finished


def test_a_loader_process_gets_the_files_alone(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    import pickle

    texts = some_texts(60)
    tokens = joined(tokenizer, texts, 20, tmp_path)
    tokens.need(np.arange(40))
    content = pickle.dumps(tokens)
    assert len(content) < 20_000
    same_tokens(pickle.loads(content), Tokens(tokenizer, texts, 9, 2), list(range(40)))
    tokens.stored.complete()
    same_tokens(pickle.loads(content), Tokens(tokenizer, texts, 9, 2), list(range(60)))


# The order in which tokens are made


def eager(lengths: np.ndarray, size: int, seed: int, epoch: int, bounds: list[int]) -> list[np.ndarray]:
    """The batches of an epoch from all lengths at once, as they were before lengths came on demand."""
    generator = np.random.default_rng([seed, epoch])
    order, batches = generator.permutation(len(lengths)), []
    for pool in np.split(order, bounds):
        ordered = pool[np.argsort(lengths[pool], kind="stable")]
        batches += np.array_split(ordered, -(-len(ordered) // size))
    return [batches[index] for index in generator.permutation(len(batches))]


@pytest.mark.parametrize("count", [1, 7, 50, 99, 350, 353, 401, 1000])
@pytest.mark.parametrize("size", [1, 4, 7])
def test_batches_on_demand_are_those_of_all_lengths(count: int, size: int) -> None:
    lengths = np.random.default_rng(count).integers(3, 30, count)
    sampler = LengthBatches(lengths, size, 5)
    for epoch in (0, 3):
        sampler.set_epoch(epoch)
        expected = eager(lengths, size, 5, epoch, sampler._pools(count))
        found = sampler.batches()
        assert len(found) == len(expected) == len(sampler)
        for index in [*range(0, len(found), 2), *range(len(found))]:  # in any order, and again
            assert found[index].tolist() == expected[index].tolist()
        assert [batch.tolist() for batch in found[1:3]] == [batch.tolist() for batch in expected[1:3]]


class Asked:
    """Lengths that note what is asked for, and what is to be expected."""

    def __init__(self, lengths: np.ndarray) -> None:
        self.lengths = lengths
        self.asked: list[list[int]] = []
        self.expected: list[list[int]] = []

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        self.asked.append(rows.tolist())
        return self.lengths[rows]

    def expect(self, blocks: Iterator[np.ndarray]) -> None:
        self.expected = [rows.tolist() for rows in blocks]


@pytest.mark.parametrize("skip", [0, 37])
def test_lengths_are_asked_for_a_pool_at_a_time_in_the_order_that_is_expected(skip: int) -> None:
    asked = Asked(np.random.default_rng(0).integers(3, 30, 1000))
    sampler = LengthBatches(asked, 4, 5)
    sampler.skip = skip
    batches = iter(sampler)
    assert not asked.asked
    next(batches)
    assert (len(asked.asked), len(asked.asked[0])) == (1, 200)
    list(batches)
    assert [sorted(rows) for rows in asked.asked] == [sorted(rows) for rows in asked.expected]
    assert sorted(row for rows in asked.expected for row in rows) == list(range(1000))
    other = LengthBatches(asked.lengths, 4, 5)
    other.skip = skip
    sampler.skip = skip
    assert list(sampler) == list(other)


def on_demand(tokenizer: PreTrainedTokenizerFast, texts: list[tuple[str, ...]], folder: Path) -> LengthsOnDemand:
    return LengthsOnDemand([joined(tokenizer, texts, 20, folder)])


def test_tokens_are_made_ahead_of_the_batches(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    texts = some_texts(900)
    lengths = on_demand(tokenizer, texts, tmp_path)
    expected = Tokens(tokenizer, texts, 9).lengths
    batches = LengthBatches(lengths, 4, 0).batches()
    assert batches[0].tolist() == LengthBatches(expected, 4, 0).batches()[0].tolist()
    assert lengths.ahead is not None
    lengths.ahead.thread.join(60)
    assert lengths.tokens[0].stored.finished
    assert [batch.tolist() for batch in batches] == [batch.tolist() for batch in LengthBatches(expected, 4, 0).batches()]
    lengths.close()
    LengthBatches(lengths, 4, 1).batches()
    assert lengths.ahead is None, "nothing is left to make"


def test_a_store_is_finished_although_some_texts_are_not_trained_on(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Those that equal a held one; a later run, which may need them, finds all tokens."""
    tokens = on_demand(tokenizer, some_texts(900), tmp_path).tokens
    lengths = LengthsOnDemand(tokens, np.arange(0, 900, 3))
    assert len(LengthBatches(lengths, 4, 0).batches()[0]) == 4
    assert lengths.ahead is not None
    lengths.ahead.thread.join(60)
    assert lengths.ahead.error is None
    assert tokens[0].stored.finished
    assert not list(tmp_path.rglob("*.part"))


def test_few_long_texts_are_tokenised_at_a_time(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_tokens, "MOST_BYTES", 1000)
    sizes: list[list[int]] = []
    encode = stored_tokens.encode
    monkeypatch.setattr(
        stored_tokens,
        "encode",
        lambda rules, rows: sizes.append([len(row[0].encode()) for row in rows]) or encode(rules, rows),
    )
    texts = [("film " * (number * 7 % 90 if number % 10 else 300),) for number in range(100)]
    tokens = StoredTokens(tokenizer, stored(tmp_path / "texts", texts), 9, 1, TokenStore(tmp_path))
    tokens.need(np.arange(100))
    assert [size for some in sizes for size in some] == [len(text[0]) for text in texts]
    assert all(sum(some) <= 1000 or len(some) == 1 for some in sizes)
    assert len(sizes) < 50
    same_tokens(tokens, Tokens(tokenizer, texts, 9), list(range(100)))


def test_the_thread_lets_the_training_go_first_between_long_texts(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_tokens, "MOST_BYTES", 10)
    asked, going, encode = threading.Event(), threading.Event(), stored_tokens.encode
    order: list[str] = []

    def noted(rules: Tokenizer, rows: list[tuple[str, ...]]) -> object:
        order.append(threading.current_thread().name)
        going.set()
        asked.wait(60)
        return encode(rules, rows)

    monkeypatch.setattr(stored_tokens, "encode", noted)
    tokens = StoredTokens(tokenizer, stored(tmp_path / "texts", [("a film story",)] * 50), 9, 1, TokenStore(tmp_path))
    ahead = threading.Thread(target=tokens.prepare, args=(np.arange(50),), name="ahead")
    ahead.start()
    going.wait(60)
    threading.Timer(0.2, asked.set).start()  # `need` waits for the lock by then
    tokens.need(np.array([49]))
    ahead.join(60)
    assert order.index(threading.current_thread().name) < 10, "of 50 texts, each of which is a part"
    assert not len(tokens.files.missing(np.arange(50)))


def test_the_thread_ends_when_it_is_told_to(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_tokens, "AT_ONCE", 5)
    lengths = on_demand(tokenizer, some_texts(900), tmp_path)
    encode = stored_tokens.encode

    def slow(*given: object) -> object:
        time.sleep(0.02)
        return encode(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(stored_tokens, "encode", slow)
    LengthBatches(lengths, 4, 0).batches()
    assert lengths.ahead is not None
    thread = lengths.ahead.thread
    lengths.close()
    assert not thread.is_alive()
    assert not lengths.tokens[0].stored.finished


def test_an_error_in_the_background_is_raised_where_batches_are_made(tmp_path: Path) -> None:
    texts = [("film",)] * 900
    texts[700] = ("über",)
    lengths = on_demand(refusing(), texts, tmp_path)
    batches = LengthBatches(lengths, 4, 0).batches()
    assert lengths.ahead is not None
    lengths.ahead.thread.join(60)
    with pytest.raises(InputError, match=r"'b.txt', line 241: the tokenizer fails"):
        batches[0]
    lengths.close()


# Files


@pytest.fixture
def load(reviews: Path, tmp_path: Path) -> Callable[..., loading.Examples]:
    """Examples of the test reviews, with a file of text without labels and a folder for it."""
    from kd.config.compose import compose, typed
    from kd.runs.identity import source_of

    def load(more: Path, *overrides: str, store: Path | None = tmp_path / "store") -> loading.Examples:
        files = [f"task.{split}={reviews / split}.csv" for split in ("train", "validation", "test")]
        spec = typed(compose(["task=file", *files, f"task.unlabelled={more}", *overrides]))
        return loading.load_examples(spec.task, source_of(spec.task), store=store)

    return load


@pytest.mark.parametrize("at_once", [1, 4, 1000])
def test_a_file_is_read_a_few_rows_at_a_time(
    load: Callable[..., loading.Examples], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    read = []
    tables_of = sources.tables_of

    def noted(*given: object) -> Iterator[object]:
        for number, table in tables_of(*given, at_once=at_once):  # type: ignore[arg-type]
            read.append(len(table))
            yield number, table

    monkeypatch.setattr(loading, "tables_of", noted)
    for number in range(2):
        (tmp_path / "more").mkdir(exist_ok=True)
        (tmp_path / "more" / f"{number}.csv").write_text("text\n" + "".join(f'"a\nfilm {number}{row}"\n' for row in range(10)))
    examples = load(tmp_path / "more")
    assert examples.stored == [(f"a\nfilm {number}{row}",) for number in range(2) for row in range(10)]
    assert max(read) == min(at_once, 10)
    assert sum(read) == 20
    assert examples.stored is not None
    assert examples.stored.where(13) == f"'{tmp_path / 'more' / '1.csv'}', line 8"
    load(tmp_path / "more")
    assert sum(read) == 20, "the store has them"


def test_rows_are_selected_while_they_are_read(load: Callable[..., loading.Examples], tmp_path: Path) -> None:
    rows = [f"film {row},{'ab'[row % 2]},{'xy'[row % 3 > 0]}" for row in range(30)]
    (tmp_path / "train.csv").write_text("\n".join(["text,label,domain", *rows]) + "\n")
    files = [f"task.{split}={tmp_path / 'train.csv'}" for split in ("train", "validation")]
    given = [*files, "task.test=null", "task.extra={domain: classes}"]
    (tmp_path / "more.csv").write_text("domain,text\n" + "".join(f"{'xy'[row % 3 > 0]},more {row}\n" for row in range(30)))
    examples = load(tmp_path / "more.csv", *given, "task.where={domain: [x]}")
    assert examples.stored is not None
    assert examples.stored == [(f"more {row}",) for row in range(0, 30, 3)]
    assert examples.columns["train"]["domain"].tolist() == [0] * 20
    assert examples.stored.where(2).endswith("line 8")
    both = load(tmp_path / "more.csv", *given)
    assert both.columns["train"]["domain"][30:].tolist() == [int(row % 3 > 0) for row in range(30)]
    (tmp_path / "none.csv").write_text("text,domain\nfilm,y\n")
    with pytest.raises(InputError, match="'unlabelled' has no examples; none is selected") as refused:
        load(tmp_path / "none.csv", *given, "task.where={domain: [x]}")
    assert refused.value.key == "unlabelled"
    (tmp_path / "third.csv").write_text("text,domain\nfilm,x\nfilm,z\n")
    with pytest.raises(InputError, match=r"third\.csv', line 3: the column 'domain' is 'z'"):
        load(tmp_path / "third.csv", *given)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "film\n" * 9000 + "fi\0lm\n" + "film\n" * 9, "line 9001: 'text' has a NUL"),
        ("a.txt", "film\n" * 9000 + "\u200b\n", "line 9001: 'text' is blank"),
        ("a.csv", "text,b\n" + "film,1\n" * 9000 + "film\n" + "film,1\n", "line 9002: 1 fields where the header has 2"),
        ("a.csv", "text,b\n" + "film,1\n" * 9000 + '"film,1\n', "line 9002: a quote is opened"),
        ("a.jsonl", '{"text": "film"}\n' * 9000 + '{"text": 3}\n', "line 9001: 'text' is 3, not text"),
        ("a.jsonl", '{"text": "film"}\n' * 9000 + '{"text": "film \\ud800"}\n', "line 9001: half of a character"),
        ("a.jsonl", '{"text": "film"}\n' * 9000 + '{"other": "film"}\n', "line 9001: no column 'text'"),
    ],
)
def test_a_bad_row_in_the_middle_is_named_and_nothing_looks_done(
    load: Callable[..., loading.Examples], tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        load(tmp_path / name)
    assert not list((tmp_path / "store").rglob("*.bin"))
    assert not list((tmp_path / "store").rglob(ABOUT))


def test_text_that_is_not_utf8_in_the_middle_is_named(load: Callable[..., loading.Examples], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"film\n" * 9000 + b"f\xfflm\n" + b"film\n")
    with pytest.raises(InputError, match="line 9001: not UTF-8"):
        load(tmp_path / "a.txt")


def test_a_file_that_changes_while_it_is_read_is_refused(
    load: Callable[..., loading.Examples], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = tmp_path / "a.txt"
    more.write_text("film\n" * 20)
    tables_of = sources.tables_of

    def changed(*given: object) -> Iterator[object]:
        yield from tables_of(*given)  # type: ignore[arg-type]
        more.write_text("film\n" * 19 + "a plot\n")
        os.utime(more, ns=(1, 1))

    monkeypatch.setattr(loading, "tables_of", changed)
    with pytest.raises(InputError, match="changed while it was read"):
        load(more)
    assert not list((tmp_path / "store").rglob(ABOUT))


def test_the_held_part_is_cut_as_from_texts_in_memory(load: Callable[..., loading.Examples], tmp_path: Path) -> None:
    """A text without a label that equals a held one is not trained on."""
    (tmp_path / "a.txt").write_text("film\n" * 20)
    first = load(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_text("\n".join(text for (text,) in first.texts["train"]) + "\n")
    examples = load(tmp_path / "b.txt")
    memory = loading.Examples(
        examples.task,
        {**examples.texts, "train": list(examples.texts["train"])},
        {**examples.labels, "train": list(examples.labels["train"])},
    )
    ours, theirs = cut(examples, 0.3), cut(memory, 0.3)
    assert ours.held.tolist() == theirs.held.tolist()
    assert ours.trained.tolist() == theirs.trained.tolist()
    assert ours.held.sum() > 5
    assert not ours.held[96:].any()
    assert (~ours.trained[96:]).sum() >= ours.held.sum()


LINES = ["a film", "", " ", "\t", "über", '"quoted"', "(a plot)", "- dash", "日本", "é", "0", "😀 film", "x" * 300]
ENDS = ["\n", "\r\n", "\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\n\n"]


@pytest.mark.parametrize("seed", range(6))
def test_lines_read_by_the_piece_are_those_read_one_by_one(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against `str.splitlines` of the whole file, with every kind of line end, and pieces that end anywhere."""
    monkeypatch.setattr(readers, "PIECE_BYTES", 40 * seed + 1)
    draw = np.random.default_rng(seed)
    content = "\ufeff" * (seed % 2) + "".join(f"{draw.choice(LINES)}{draw.choice(ENDS)}" for _ in range(300)) + "end"
    (tmp_path / "a.txt").write_bytes(content.encode())
    lines = content.removeprefix("\ufeff").splitlines()
    expected = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    assert list(nonblank_lines(tmp_path / "a.txt", "unlabelled", Layout())) == expected
    tables = [table for _, table in sources.tables_of([tmp_path / "a.txt"], ["text"], "unlabelled", Layout("lines"))]
    assert len(tables) > 1
    found = [(int(number), text) for table in tables for number, (text,) in zip(table.numbers, table.texts, strict=True)]
    assert found == expected
    assert tables[-1].where(-1) == f"'{tmp_path / 'a.txt'}', line {len(lines)}"


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "arrow"])
@pytest.mark.parametrize("columns", [["text"], ["text", "other"]])
def test_tables_read_by_the_piece_are_those_read_whole(
    tmp_path: Path, kind: str, columns: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kd.data.columnar.AT_ONCE", 7)
    draw = np.random.default_rng(0)
    texts = [line for line in LINES if line.strip() and "\t" not in line and (kind != "tsv" or '"' not in line)]
    rows = [{"text": str(draw.choice(texts)), "other": str(draw.choice(texts)), "n": number} for number in range(40)]
    path = tmp_path / f"a.{kind}"
    if kind in ("csv", "tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["n", "other", "text"], delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pa = pytest.importorskip("pyarrow")
        from pyarrow import feather, parquet

        (parquet.write_table if kind == "parquet" else feather.write_feather)(pa.Table.from_pylist(rows), path)
    whole = sources.read_shards([path, path], columns, None, "unlabelled", Layout(), extra=["n"])
    pieces = list(sources.tables_of([path, path], columns, "unlabelled", Layout(), ["n"], at_once=7))
    assert [index for index, _ in pieces] == sorted(index for index, _ in pieces)
    assert {index for index, _ in pieces} == {0, 1}
    found = [example for _, table in pieces for example in table]
    assert found == list(whole)
    assert max(len(table) for _, table in pieces) == 7


def test_texts_take_no_memory_for_each_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading, tokenising and drawing batches of ten times as many rows takes a few bytes more for each, and no text of 160."""
    monkeypatch.setattr(readers, "PIECE_BYTES", 1 << 14)
    for module, name in ((stored_texts, "PIECE_ROWS"), (stored_tokens, "AT_ONCE"), (stored_tokens, "BLOCK_ROWS")):
        monkeypatch.setattr(module, name, 128)
    tokenizer, peaks = tiny_tokenizer([]), {}  # every word is unknown: fast
    for count in (1_000, 10_000):
        (tmp_path / "more.txt").write_text("".join(f"{'long words ' * 14}{row}\n" for row in range(count)))
        tracemalloc.start()
        tables = sources.tables_of([tmp_path / "more.txt"], ["text"], "unlabelled", Layout("lines"))
        pieces = (TextPiece(index, table.texts, table.numbers) for index, table in tables)
        texts = store_texts(tmp_path / str(count), PLACES, lambda pieces=pieces: pieces, "'more'")
        store = TokenStore(tmp_path / str(count))
        tokens = JoinedTokens(Tokens(tokenizer, [("film",)], 9), StoredTokens(tokenizer, texts, 9, 1, store))
        lengths = LengthsOnDemand([tokens])
        sampler = LengthBatches(lengths, 8, 0)
        seen = sum(len(rows) for _ in range(2) for rows in sampler)
        lengths.close()
        assert count_shared([("film",)], JoinedTexts(Texts.of([("film",)]), texts)) == 1
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert seen == 2 * (count + 1)
        del tokens, lengths, sampler, texts
    assert peaks[10_000] - peaks[1_000] < 9_000 * 40, peaks
