"""From text to batches: padding, shared inputs, limits and lengths."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kd.config.compose import compose, typed
from kd.data.batch import Batch
from kd.data.datamodule import KDDataModule, tokenizer_fingerprint
from kd.data.examples import Examples, load_examples
from kd.data.mixture import MixedData
from kd.data.sources import Files, Splits
from kd.errors import InputError
from kd.runs.identity import source_of


@pytest.fixture
def tokenizer(backbone: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(backbone)


@pytest.fixture
def other(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> PreTrainedTokenizerFast:
    """The same words with other numbers, cased, and another padding token."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = rules["model"]["vocab"]
    first = len(vocabulary)
    rules["model"]["vocab"] = {word: first - 1 - number for word, number in vocabulary.items()}
    for token in rules["added_tokens"]:
        token["id"] = first - 1 - token["id"]
    for name, token in rules["post_processor"]["special_tokens"].items():
        token["ids"] = [first - 1 - vocabulary[name]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(rules))
    return PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"),
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "attention_mask"],
    )


@pytest.fixture
def load(reviews: Path) -> Callable[..., Examples]:
    """Examples of the test reviews, with further overrides."""

    def load(*overrides: str) -> Examples:
        files = [f"task.{split}={reviews / split}.csv" for split in ("train", "validation", "test")]
        spec = typed(compose(["task=file", *files, *overrides]))
        return load_examples(spec.task, source_of(spec.task))

    return load


def module(examples: Examples, student: object, *teachers: object, **more: object) -> KDDataModule:
    given = {"batch_size": 8, "eval_batch_size": 16, "max_length": 32, "seed": 0, **more}
    return KDDataModule(examples, [student], teachers, **given)


def pairs(examples: Examples) -> Examples:
    """Every text beside the next one."""
    texts = {
        split: [(a[0], b[0]) for a, b in zip(found, [*found[1:], found[0]], strict=True)]
        for split, found in examples.texts.items()
    }
    return Examples(examples.task, texts, examples.labels)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("max_length", [8, 32])
def test_batches_equal_what_the_tokenizer_itself_pads(load, tokenizer, paired: bool, max_length: int) -> None:
    examples = pairs(load()) if paired else load()
    data = module(examples, tokenizer, max_length=max_length)
    for split, loader in (("train", data.train_dataloader()), ("validation", data.val_dataloader())):
        for batch in loader:
            rows = batch.index.tolist()
            columns = [list(column) for column in zip(*(examples.texts[split][row] for row in rows), strict=True)]
            expected = tokenizer(*columns, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
            assert batch.student.keys() == expected.keys()
            for name, values in expected.items():
                assert torch.equal(batch.student[name], values), name
                assert batch.student[name].dtype == torch.long
            assert batch.labels.tolist() == [examples.labels[split][row] for row in rows]
            assert len(batch) == len(rows)


def test_the_mask_covers_exactly_the_padding_of_a_tokenizer_that_does_not_pad_with_zero(load, tokenizer, other) -> None:
    batch = next(iter(module(load(), other).train_dataloader()))
    pad = other.pad_token_id
    assert pad != 0
    assert torch.equal(batch.student["attention_mask"], (batch.student["input_ids"] != pad).long())
    assert batch.student["attention_mask"].sum(1).max() == batch.student["input_ids"].shape[1]
    assert "token_type_ids" not in batch.student


@pytest.mark.parametrize("max_length", [5, 9, 16])
def test_max_length_truncates_texts_and_pairs(load, tokenizer, max_length: int) -> None:
    for examples in (load(), pairs(load())):
        lengths = module(examples, tokenizer, max_length=max_length).tokens["train"][tokenizer_fingerprint(tokenizer)].lengths
        whole = [len(ids) for ids in tokenizer(*map(list, zip(*examples.texts["train"], strict=True)))["input_ids"]]
        assert lengths.tolist() == np.minimum(whole, max_length).tolist()


def test_a_cut_pair_keeps_both_texts_and_its_separators(load, tokenizer) -> None:
    data = module(pairs(load()), tokenizer, max_length=8)
    inputs = next(iter(data.train_dataloader())).student
    assert (inputs["input_ids"] == tokenizer.sep_token_id).sum(1).eq(2).all()
    for number in (0, 1):
        assert ((inputs["token_type_ids"] == number) & inputs["attention_mask"].bool()).sum(1).ge(2).all()


def test_equal_tokenizers_share_one_object_even_after_a_move(load, backbone, tokenizer) -> None:
    again = AutoTokenizer.from_pretrained(backbone, padding_side="right")
    again(["a film", "a"], padding=True, truncation=True, max_length=4)  # leaves padding and truncation set in its backend
    data = module(load(), tokenizer, again, tokenizer)
    assert data.shared_tokenizer
    batch = next(iter(data.train_dataloader()))
    for found in (batch, batch.to("cpu"), batch.to(torch.device("meta"))):
        assert len(found.teachers) == 2
        assert all(teacher is found.student for teacher in found.teachers)
    assert batch.to("meta").labels.device.type == batch.to("meta").student["input_ids"].device.type == "meta"


def test_different_tokenizers_give_different_inputs_of_the_same_text(load, tokenizer, other) -> None:
    data = module(load(), tokenizer, other, tokenizer)
    assert not data.shared_tokenizer
    batch = next(iter(data.train_dataloader())).to("cpu")
    assert batch.teachers[1] is batch.student
    assert batch.teachers[0] is not batch.student
    texts = [data.examples.texts["train"][row][0] for row in batch.index.tolist()]
    for inputs, reader in ((batch.student, tokenizer), (batch.teachers[0], other)):
        assert torch.equal(inputs["input_ids"], reader(texts, padding=True, return_tensors="pt")["input_ids"])
    assert not torch.equal(batch.student["input_ids"], batch.teachers[0]["input_ids"])


def test_a_batch_without_teachers_moves_too() -> None:
    batch = Batch({"input_ids": torch.ones(2, 3)}, (), torch.zeros(2), torch.arange(2))
    assert batch.to("cpu").teachers == ()
    assert torch.equal(batch.to("cpu").index, torch.arange(2))


def test_a_fingerprint_is_blind_to_padding_and_truncation_only(tokenizer, other) -> None:
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a film"], padding="max_length", truncation=True, max_length=7)
    assert tokenizer_fingerprint(tokenizer) == before != tokenizer_fingerprint(other)
    tokenizer.add_tokens(["quirky"])
    assert tokenizer_fingerprint(tokenizer) != before


def test_limit_train_is_a_fixed_subset_of_train_alone(load) -> None:
    whole, ten, twenty, same = (
        load(*o) for o in ([], ["task.limit_train=10"], ["task.limit_train=20"], ["task.limit_train=10", "seed=5"])
    )
    assert ten.texts == same.texts
    assert ten.texts["train"] == twenty.texts["train"][:10]
    assert set(zip(twenty.texts["train"], twenty.labels["train"], strict=True)) <= set(
        zip(whole.texts["train"], whole.labels["train"], strict=True)
    )
    assert len(twenty.texts["train"]) == len(twenty.labels["train"]) == 20
    assert twenty.texts["train"] != whole.texts["train"][:20]
    assert twenty.texts["validation"] == whole.texts["validation"]
    assert sorted(load("task.limit_train=1000").texts["train"]) == sorted(whole.texts["train"])


def test_a_split_of_another_name_is_whole_whatever_limits_the_others(reviews: Path) -> None:
    class FourSplits(Files):
        def splits(self) -> Splits:
            found = dict(super().splits())
            return {**found, "hans": found["test"], "validation_mismatched": found["test"]}

    spec = typed(compose(["task=file", f"task.train={reviews / 'train.csv'}", "task.limit_validation=5", "task.limit_test=3"]))
    train, *others = (str(reviews / f"{split}.csv") for split in ("train", "validation", "test"))
    files = FourSplits(train, ["text"], "label", *others)
    examples = load_examples(spec.task, files)
    sizes = {split: len(texts) for split, texts in examples.texts.items()}
    assert sizes == {"train": 96, "validation": 5, "test": 3, "hans": 32, "validation_mismatched": 5}
    assert examples.evaluated == ["validation", "test", "hans", "validation_mismatched"]


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_below_one_is_refused(load, limit: int) -> None:
    with pytest.raises(InputError, match="at least 1") as caught:
        load(f"task.limit_train={limit}")
    assert caught.value.key == "limit_train"


def test_a_file_too_small_to_be_split_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,1\nb,0\n")
    spec = typed(compose(["task=file", f"task.train={tmp_path / 'a.csv'}"]))
    with pytest.raises(InputError, match="too small to be split") as caught:
        load_examples(spec.task, source_of(spec.task))
    assert caught.value.key in ("validation", "test", "train")


def test_ranks_read_disjoint_parts_of_the_same_batches(load, tokenizer) -> None:
    examples = load()
    ranks = [list(module(examples, tokenizer, rank=rank, world=2).train_dataloader()) for rank in (0, 1)]
    whole = list(module(examples, tokenizer).train_dataloader())
    for parts, batch in zip(zip(*ranks, strict=True), whole, strict=True):
        assert sorted(row for part in parts for row in part.index.tolist()) == sorted(batch.index.tolist())


def test_a_lone_last_example_does_not_break_a_rank(load, tokenizer) -> None:
    examples = load("task.limit_train=25")
    ranks = [module(examples, tokenizer, rank=rank, world=2).train_dataloader() for rank in (0, 1)]
    assert sorted(row for loader in ranks for batch in loader for row in batch.index.tolist()) == list(range(25))


def test_a_resumed_epoch_goes_on_with_the_next_batch_whenever_the_loader_is_made(load, tokenizer) -> None:
    examples = load()
    whole = [batch.index.tolist() for batch in module(examples, tokenizer).train_dataloader()]
    before, after = module(examples, tokenizer), module(examples, tokenizer)
    before.load_state_dict({"batch": 5})
    late = before.train_dataloader()
    early = after.train_dataloader()
    after.load_state_dict({"batch": 5})
    for loader in (late, early):
        assert [batch.index.tolist() for batch in loader] == whole[5:]
    evaluation = [row for batch in before.val_dataloader() for row in batch.index.tolist()]
    assert sorted(evaluation) == list(range(32))


def test_loaders_of_processes_give_the_same_batches(load, tokenizer) -> None:
    data, parallel = module(load(), tokenizer), module(load(), tokenizer, workers=1)
    assert pickle.dumps(parallel.collate("train"))
    for one, other in zip(data.train_dataloader(), parallel.train_dataloader(), strict=True):
        assert torch.equal(one.student["input_ids"], other.student["input_ids"])
        assert torch.equal(one.index, other.index)


class Locked:
    """Stand-in for a GPU and for page-locked memory: notes the tensors that are copied into it, and from it to the GPU.

    Attributes:
        pinned: tensors in locked memory.
        moved: for each tensor that is moved to the GPU, whether it was in locked memory, and whether nothing waits for it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pinned: list[torch.Tensor] = []
        self.moved: list[tuple[bool, bool]] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: GPU)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: self.pin(tensor))
        monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, **more: self.move(tensor, device, **more))

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor is in locked memory."""
        return any(one is tensor for one in self.pinned)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor in locked memory."""
        if not self.is_pinned(tensor):
            tensor = tensor.clone()
            self.pinned.append(tensor)
        return tensor

    def move(self, tensor: torch.Tensor, device: torch.device, *, non_blocking: bool = False) -> torch.Tensor:
        """Return the tensor, which stays where it is."""
        assert device == GPU
        self.moved.append((self.is_pinned(tensor), non_blocking))
        return tensor


GPU = torch.device("cuda", 0)


def tensors_of(value: object) -> list[torch.Tensor]:
    """Every tensor in an object, found without methods of its own; one that is shared comes once."""
    if isinstance(value, torch.Tensor):
        return [value]
    inner = vars(value) if isinstance(value, Batch) else value
    parts = inner.values() if isinstance(inner, dict) else inner if isinstance(inner, tuple) else ()
    return list({id(tensor): tensor for part in parts for tensor in tensors_of(part)}.values())


class Cached:
    """Cached outputs of a teacher, as `kd.teacher_cache.store.CachedOutputs` gives them."""

    def pad(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """Return the outputs of these examples."""
        return {
            "attention_mask": torch.ones(len(rows), 3),
            "logits": torch.ones(len(rows), 2),
            "cls-2": torch.ones(len(rows), 8),
        }


def test_batches_leave_the_loader_in_locked_memory_and_nothing_waits_for_their_copies(
    load, tokenizer, other, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = module(load(), tokenizer, other, tokenizer, holds=0.25)
    data.use_cached(1, {"train": Cached(), "validation": Cached()})
    # Three tensors of the student, two of the first teacher, three cached ones of the second, labels and index; with held ones.
    for loader_of, count in ((data.train_dataloader, 20), (data.val_dataloader, 10)):
        with monkeypatch.context() as patch:
            locked = Locked(patch)
            batch = next(iter(loader_of()))
            given = tensors_of(batch)
            assert len(given) == count
            assert all(map(locked.is_pinned, given))
            data.transfer_batch_to_device(batch, GPU, 0)
            assert locked.moved == [(True, True)] * count
            locked.moved.clear()
            batch.to(GPU, non_blocking=True)  # as an evaluation moves it
            assert locked.moved == [(True, True)] * count


def test_a_mixture_has_its_batches_in_locked_memory_too(load, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    data = MixedData({"one": module(load(), tokenizer, of="one")}, 1.0, 0)
    locked = Locked(monkeypatch)
    batch = next(iter(data.train_dataloader()))
    data.transfer_batch_to_device(batch, GPU, 0)
    assert locked.moved == [(True, True)] * len(tensors_of(batch)) != []
