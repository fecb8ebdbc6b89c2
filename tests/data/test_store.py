"""Storage of a teacher's outputs on disk: exact, atomic, complete or absent."""

import errno
import hashlib
import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kd.forward import Needs, Outputs, UndeclaredRead
from kd.teacher_cache.store import RELEASE, CachedOutputs, Entry, Share, TensorStore, fits, size_of_array, stored_as

LENGTHS = (3, 5, 2, 5)
OFFSETS = np.concatenate([[0], np.cumsum(LENGTHS)])


def entry(store: TensorStore, name: str, width: int, kind: str = "float32", shown: str | None = None) -> Entry:
    return Entry((store.rows(name), width), kind, shown or kind)


def put(store: TensorStore, name: str, values: torch.Tensor, kind: str = "float32", ranks: int = 1) -> None:
    """Write a tensor of all examples, (4, width) or (4, 5, width), by one rank or more."""
    store.folder.mkdir(exist_ok=True)
    made = entry(store, name, values.shape[-1], kind, str(values.dtype).removeprefix("torch."))
    bounds = [4 * rank // ranks for rank in range(ranks + 1)]
    for rank in range(ranks):
        rows = list(range(bounds[rank], bounds[rank + 1]))[::-1]  # in any order
        share = Share(store, name, made, (bounds[rank], bounds[rank + 1]), rank)
        if rows:
            assert share.write(rows, values[rows])
        share.close()
    store.commit(name, made, ranks)


@pytest.fixture
def store(tmp_path: Path) -> TensorStore:
    return TensorStore(tmp_path / "kept", OFFSETS)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_what_is_read_is_what_was_written(store: TensorStore, dtype: torch.dtype, ranks: int) -> None:
    kind = str(dtype).removeprefix("torch.")
    logits, hidden = torch.randn(4, 3).to(dtype), torch.randn(4, 5, 6).to(dtype)
    put(store, "logits", logits, kind, ranks)
    put(store, "hidden-2", hidden, kind, ranks)
    rows = [2, 0, 3]
    found = store.read(["logits", "hidden-2"], rows)
    assert found["logits"].dtype is found["hidden-2"].dtype is dtype
    assert torch.equal(found["logits"], logits[rows])
    assert found["hidden-2"].shape == (3, 5, 6)
    for place, row in enumerate(rows):
        assert torch.equal(found["hidden-2"][place, : LENGTHS[row]], hidden[row, : LENGTHS[row]])
        assert not found["hidden-2"][place, LENGTHS[row] :].any()
    assert not store.damaged(["logits", "hidden-2"])


def test_a_batch_is_as_long_as_its_longest_example(store: TensorStore) -> None:
    put(store, "hidden-1", torch.randn(4, 5, 2))
    for multiple, longest in ((1, 3), (4, 4), (8, 5)):
        tokens = SimpleNamespace(mask=lambda rows, longest=longest: np.arange(longest) < np.asarray(LENGTHS)[rows][:, None])
        read = CachedOutputs(store, ("hidden-1",), tokens).pad([2, 0])
        assert read["hidden-1"].shape == (2, longest, 2)
        assert read["attention_mask"].sum(dim=1).tolist() == [2, 3], multiple
        assert not read["hidden-1"][0, 2:].any()


def test_sixteen_bits_are_given_back_as_the_type_that_was_shown(store: TensorStore) -> None:
    values = torch.randn(4, 7)
    put(store, "cls-1", values, "float16")
    found = store.read(["cls-1"], range(4))["cls-1"]
    assert found.dtype is torch.float32
    assert torch.equal(found, values.half().float())
    stored = np.load(store.folder / "cls-1.npy")
    assert (stored.dtype, stored.nbytes) == (np.float16, 4 * 7 * 2)


def test_what_sixteen_bits_are_good_for() -> None:
    assert stored_as(torch.float32, "32-true") is torch.float32
    assert stored_as(torch.float32, "bf16-mixed") is torch.float16
    assert stored_as(torch.bfloat16, "bf16-mixed") is torch.bfloat16
    assert stored_as(torch.float64, "64-true") is torch.float64
    assert fits(torch.randn(3, 4), torch.float16)
    assert fits(torch.zeros(3, 4), torch.float16)
    assert not fits(torch.tensor([[1.0, 1e5]]), torch.float16)  # beyond its range
    assert not fits(torch.tensor([[1e-9, 2e-9]]), torch.float16)  # below it
    assert fits(torch.tensor([[1e-9, 1.0]]), torch.float16)  # nothing, beside its neighbour


def test_a_type_that_is_too_narrow_is_refused(store: TensorStore) -> None:
    store.folder.mkdir()
    share = Share(store, "logits", entry(store, "logits", 2, "float16", "float32"), (0, 4), 0)
    assert share.write([0], torch.tensor([[1.0, 2.0]]))
    assert not share.write([1], torch.tensor([[1.0, 1e6]]))


@pytest.mark.parametrize(
    "bad", ["truncated", "flipped", "flipped header", "no numbers", "torn json", "empty json", "another shape"]
)
def test_damage_is_found(store: TensorStore, bad: str) -> None:
    put(store, "logits", torch.randn(4, 3))
    put(store, "cls-1", torch.randn(4, 3))
    numbers, described = store.folder / "logits.npy", store.folder / "logits.json"
    if bad == "truncated":
        numbers.write_bytes(numbers.read_bytes()[:-1])
    elif bad == "flipped":
        found = bytearray(numbers.read_bytes())
        found[-17] ^= 1
        numbers.write_bytes(found)
    elif bad == "flipped header":
        found = bytearray(numbers.read_bytes())
        found[17] ^= 1
        numbers.write_bytes(found)
    elif bad == "no numbers":
        numbers.unlink()
    elif bad == "torn json":
        described.write_text(described.read_text()[:20])
    elif bad == "empty json":
        described.write_text("{}")
    else:
        np.save(numbers, np.load(numbers).reshape(3, 4))
        checksum = hashlib.blake2b(numbers.read_bytes(), digest_size=16).hexdigest()
        described.write_text(json.dumps(json.loads(described.read_text()) | {"checksum": checksum}))
    assert store.damaged(["logits", "cls-1"]) == ["logits"]
    store.remove(["logits"])
    assert store.missing(["logits", "cls-1"]) == ["logits"]
    assert list(store.folder.glob("logits*")) == []


def test_what_was_not_finished_does_not_count(store: TensorStore) -> None:
    put(store, "cls-1", torch.randn(4, 3))
    share = Share(store, "logits", entry(store, "logits", 2), (0, 4), 0)
    share.write([0, 1], torch.randn(2, 2))
    share.close()
    assert store.missing(["logits", "cls-1"]) == ["logits"]
    store.sweep()
    assert sorted(path.name for path in store.folder.iterdir()) == ["cls-1.json", "cls-1.npy"]


def test_a_full_disk_is_an_error_and_not_the_end(store: TensorStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store.folder.mkdir()
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        Share(store, "logits", entry(store, "logits", 2), (0, 4), 0)


def test_pages_are_let_go_of_and_read_again(store: TensorStore) -> None:
    values = torch.randn(4, 3)
    put(store, "logits", values)
    for turn in range(3 * RELEASE):
        assert torch.equal(store.read(["logits"], [turn % 4])["logits"], values[[turn % 4]])


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_numpy_reads_the_files(store: TensorStore, ranks: int) -> None:
    logits = torch.randn(4, 3)
    put(store, "logits", logits, ranks=ranks)
    put(store, "cls-1", logits.bfloat16(), "bfloat16", ranks=ranks)
    assert np.array_equal(np.load(store.folder / "logits.npy"), logits.numpy())
    bits = np.load(store.folder / "cls-1.npy")
    assert bits.dtype == np.uint16
    assert torch.equal(torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16), logits.bfloat16())


def test_a_file_counts_without_its_header(store: TensorStore) -> None:
    put(store, "logits", torch.randn(4, 3))
    assert size_of_array(store.folder / "logits.npy") == store.size(["logits"]) == 4 * 3 * 4
    (store.folder / "logits.npy").write_bytes(bytes(30))
    assert size_of_array(store.folder / "logits.npy") == 30


def test_a_share_that_is_short_is_not_taken(store: TensorStore) -> None:
    store.folder.mkdir()
    made = entry(store, "logits", 2)
    Share(store, "logits", made, (0, 2), 0).close()
    with pytest.raises(RuntimeError, match="bytes"):
        store.commit("logits", made, 1)
    assert store.missing(["logits"]) == ["logits"]


def test_a_store_is_pickled_without_its_numbers(store: TensorStore) -> None:
    values = torch.randn(4, 3000)
    put(store, "logits", values)
    store.read(["logits"], [0])
    pickled = pickle.dumps(store)
    assert len(pickled) < 3000
    copied = pickle.loads(pickled)
    assert torch.equal(copied.read(["logits"], [3])["logits"], values[[3]])


def test_names_lead_to_outputs_and_back() -> None:
    needs = Needs(hidden=[0, 2], cls=[1], attention=[2], value=[1])
    assert needs.tensors == ["logits", "hidden-0", "hidden-2", "cls-1", "query-2", "key-2", "value-1"]
    named = {name: torch.randn(2, 4 if name == "cls-1" else 3, 4) for name in needs.tensors}
    mask = torch.ones(2, 3, dtype=torch.bool)
    outputs = Outputs.from_named({**named, "attention_mask": mask}, mask, needs, 2)
    assert {name: id(tensor) for name, tensor in outputs.named().items()} == {n: id(t) for n, t in named.items()}
    assert outputs.scores(2).shape == (2, 2, 3, 3)
    with pytest.raises(UndeclaredRead, match="hidden-1"):
        Outputs.from_named(named, mask, Needs(hidden=[1]), 2)
