"""Tokens on disk: the same as those just made, and never in the way."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from conftest import FILLER, tiny_tokenizer
from kd.data import tokenized as tokens
from kd.data.masked_lm import tokenized as masked
from kd.data.masked_lm.tokenized import MaskedTokens
from kd.data.tokenized import Tokens, TokenStore, read_arrays, write_arrays
from kd.system import distributed

TEXTS = [("the film was fine",), ("bad",), ("a scene and a plot that is boring",)]
PAIRS = [(text, f"it was {text}") for (text,) in TEXTS]


class Counting:
    """A tokenizer, and how often texts are cut with it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer, self.calls = tokenizer, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.tokenizer, name)

    def __call__(self, *texts: object, **options: object) -> object:
        return self.tokenizer(*texts, **options)


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> Counting:
    counting, encodings = Counting(tiny_tokenizer()), tokens.encodings

    def counted(reader: object, *given: object, **options: object) -> object:
        counting.calls += 1
        return encodings(reader, *given, **options)

    for module in (tokens, masked):
        monkeypatch.setattr(module, "encodings", counted)
    return counting


def same(one: Tokens, other: Tokens) -> bool:
    first, second = one.pad(range(len(TEXTS))), other.pad(range(len(TEXTS)))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("texts", [TEXTS, PAIRS])
def test_stored_tokens_are_those_that_were_made(tokenizer: Counting, tmp_path: Path, texts: list[tuple[str, ...]]) -> None:
    plain = Tokens(tokenizer, texts, 16)
    for _ in range(3):
        assert same(Tokens(tokenizer, texts, 16, 1, TokenStore(tmp_path / "new")), plain)
    assert tokenizer.calls == 2
    (file,) = (tmp_path / "new").iterdir()
    assert file.suffix == ".npz"


def test_whatever_changes_the_tokens_has_its_own_file(tokenizer: Counting, tmp_path: Path) -> None:
    def stored(reader: object = tokenizer, texts: list[tuple[str, ...]] = TEXTS, max_length: int = 16) -> None:
        Tokens(reader, texts, max_length, 1, TokenStore(tmp_path))

    stored()
    stored(max_length=5)
    stored(texts=TEXTS[:2])
    stored(texts=[("the film", "was fine"), *PAIRS[1:]])
    stored(texts=[("the", "film was fine"), *PAIRS[1:]])
    stored(tiny_tokenizer([*FILLER, "fine"]))
    for change in ({"truncation_side": "left"}, {"model_input_names": ["input_ids", "attention_mask"]}):
        other = tiny_tokenizer()
        for name, value in change.items():
            setattr(other, name, value)
        stored(other)
    assert len(list(tmp_path.iterdir())) == 8
    Tokens(tokenizer, TEXTS, 16, 8, TokenStore(tmp_path))  # padding comes after
    assert len(list(tmp_path.iterdir())) == 8


def test_another_format_or_library_makes_its_own_files(
    tokenizer: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Tokens(tokenizer, TEXTS, 16, 1, TokenStore(tmp_path))
    monkeypatch.setattr(tokens, "TOKENS_FORMAT", tokens.TOKENS_FORMAT + 1)
    Tokens(tokenizer, TEXTS, 16, 1, TokenStore(tmp_path))
    monkeypatch.setattr(tokens.metadata, "version", lambda name: "0.0")
    Tokens(tokenizer, TEXTS, 16, 1, TokenStore(tmp_path))
    assert len(list(tmp_path.iterdir())) == tokenizer.calls == 3


def test_a_damaged_file_is_found_said_and_made_again(
    tokenizer: Counting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = Tokens(tokenizer, TEXTS, 16, 1, TokenStore(tmp_path))
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    damages = [whole[: len(whole) // 2], b"", b"no archive", whole.replace(b"\x05\x00\x00\x00", b"\x06\x00\x00\x00", 1)]
    for damage in damages:
        file.write_bytes(damage)
        assert same(Tokens(tokenizer, TEXTS, 16, 1, TokenStore(tmp_path)), plain)
        said = capsys.readouterr().out
        assert said.count("\n") == 1
        assert "damaged" in said
        assert file.read_bytes() == whole
    assert not list(tmp_path.glob("*.part"))


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    arrays = {"offsets": np.arange(9), "input_ids": np.arange(40, dtype=np.int32)}
    write_arrays(file, arrays)
    whole = bytearray(file.read_bytes())
    for place in range(len(whole)):
        hurt = bytearray(whole)
        hurt[place] ^= 1 << place % 8
        file.write_bytes(hurt)
        found = read_arrays(file)
        assert found is None, place


@pytest.mark.parametrize("kind", ["a file in its place", "a full disk"])
def test_a_folder_that_cannot_be_written_is_not_fatal(
    tokenizer: Counting, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "a full disk":

        def full(file: object, **arrays: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(np, "savez", full)
    else:
        (tmp_path / "tokens").write_text("")
    assert same(Tokens(tokenizer, TEXTS, 16, 1, TokenStore(tmp_path / "tokens")), Tokens(tokenizer, TEXTS, 16))
    assert "not stored" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.part"))


def test_under_ddp_the_first_rank_cuts_the_text_and_the_others_read_it(
    tokenizer: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Tokens(tokenizer, TEXTS, 16)

    def on_rank_zero(make: Callable[[], object]) -> None:  # as a later rank finds it: the first one has been at work meanwhile
        monkeypatch.setattr(distributed, "on_rank_zero", lambda make: make())
        Tokens(tokenizer, TEXTS, 16, 1, TokenStore(tmp_path))

    monkeypatch.setattr(distributed, "on_rank_zero", on_rank_zero)
    assert same(Tokens(tokenizer, TEXTS, 16, 1, TokenStore(tmp_path)), first)
    assert tokenizer.calls == 2


@pytest.mark.parametrize(("multiple", "most", "expected"), [(1, 16, 10), (4, 16, 12), (8, 16, 16), (8, 11, 11), (64, 16, 16)])
def test_batches_are_padded_to_a_multiple_but_not_beyond_the_positions(multiple: int, most: int, expected: int) -> None:
    reader = tiny_tokenizer()
    plain = Tokens(reader, TEXTS, most).pad([0, 2])
    padded = Tokens(reader, TEXTS, most, multiple).pad([0, 2])
    assert plain["input_ids"].shape == (2, 10)
    for name, values in padded.items():
        assert values.shape == (2, expected)
        assert torch.equal(values[:, :10], plain[name])
        assert (values[:, 10:] == 0).all()


def test_masked_text_is_stored_and_padded_too(tokenizer: Counting, tmp_path: Path) -> None:
    plain = MaskedTokens(tokenizer, TEXTS, 16, 0).pad([0, 2], 1)
    calls = tokenizer.calls
    for _ in range(2):
        stored = MaskedTokens(tokenizer, TEXTS, 16, 0, 1, TokenStore(tmp_path)).pad([0, 2], 1)
        assert all(torch.equal(stored[0][name], plain[0][name]) for name in plain[0])
        assert torch.equal(stored[1], plain[1])
    assert len(list(tmp_path.iterdir())) == 1
    assert tokenizer.calls == calls + 1
    wide = MaskedTokens(tokenizer, TEXTS, 16, 0, 16)
    inputs, labels = wide.pad([0, 2], 1)
    assert labels.shape == inputs["input_ids"].shape == inputs["predicted"].shape == (2, 16)
    assert torch.equal(labels[:, :10], plain[1])
    assert (labels[:, 10:] == -100).all()
    assert wide.longest.tolist() == [6, 3, 10]


@pytest.mark.parametrize("texts", [TEXTS * 5, PAIRS * 5])
@pytest.mark.parametrize("at_once", [1, 4, 15, 4096])
def test_tokens_are_those_of_the_tokenizer_itself_whatever_is_cut_at_a_time(
    texts: list[tuple[str, ...]], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "AT_ONCE", at_once)
    reader = tiny_tokenizer()
    expected = reader(*map(list, zip(*texts, strict=True)), truncation=True, max_length=7)
    found = Tokens(reader, texts, 7)
    assert found.lengths.tolist() == [len(ids) for ids in expected["input_ids"]]
    for name, values in found.columns.items():
        assert values.tolist() == [value for row in expected[name] for value in row]


def test_cutting_leaves_a_tokenizer_as_it_is() -> None:
    reader = tiny_tokenizer()
    before = reader.backend_tokenizer.to_str()
    Tokens(reader, TEXTS, 7)
    MaskedTokens(reader, TEXTS, 16, 0)
    assert reader.backend_tokenizer.to_str() == before


def test_a_limit_on_length_that_a_tokenizer_has_does_not_count() -> None:
    reader = tiny_tokenizer()
    whole = Tokens(reader, TEXTS, 16).lengths.tolist()
    reader(["a film"], truncation=True, max_length=3, padding="max_length")
    assert Tokens(reader, TEXTS, 16).lengths.tolist() == whole
