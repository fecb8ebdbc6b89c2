"""A cache of a given size: which examples it has, what a batch of both kinds gives, and how caches of other sizes share it."""

import errno
import json
import os
import pickle
import random
import signal
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import BAD, GOOD, sentence, tiny_model, tiny_tokenizer
from kd.data.tokenized import Tokens
from kd.errors import InputError
from kd.forward import Forward, Needs, UndeclaredRead
from kd.forward.inputs import LIVE, ORDER
from kd.forward.kinds import by_token
from kd.models import CachedTeacher, Encoder, FrozenTeacher
from kd.models.latency import to_time
from kd.teacher_cache import cache as caching
from kd.teacher_cache.cache import CachedOrLive, CacheUnused, TeacherCache
from kd.teacher_cache.store import Share, TensorStore
from processes import Command

TRAIN, VALIDATION, CLASSES, WIDTH = 40, 6, 3, 16
EVALUATED = 4 * CLASSES * VALIDATION
"""Bytes of the logits of the split that is evaluated."""
COLUMNS = [2, 0, 1]


def first_numbers(model: Encoder, inputs: Mapping[str, Tensor]) -> Tensor:
    """Two numbers of every token, of a further pass."""
    return model(inputs, Needs(hidden=[1])).hidden(1)[..., :2]


ALL = Needs(hidden=[0, 2], cls=[1], attention=[2], value=[1], pooled=True, derived={"first-1": first_numbers})
LOGITS = Needs()


def texts(count: int, seed: int) -> list[tuple[str]]:
    generator = random.Random(seed)
    return [(sentence(generator, GOOD if n % 2 else BAD),) for n in range(count)]


def tokens() -> dict[str, Tokens]:
    tokenizer = tiny_tokenizer()
    return {
        "train": Tokens(tokenizer, texts(TRAIN, 0), 16, multiple=4),
        "validation": Tokens(tokenizer, texts(VALIDATION, 1), 16, multiple=4),
    }


def load() -> torch.nn.Module:
    """Weights so large that examples differ."""
    model = tiny_model(3, layers=2, width=WIDTH, heads=2, num_labels=CLASSES)
    torch.manual_seed(4)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def frozen(precision: str = "32-true") -> FrozenTeacher:
    shape = Encoder(load(), tiny_tokenizer())
    teacher = FrozenTeacher(shape, "t", COLUMNS, load)
    return teacher if precision != "64-true" else in_double(teacher)


def in_double(teacher: FrozenTeacher) -> FrozenTeacher:
    teacher.encoder.double()
    return teacher


def cache(folder: Path, setting: object, precision: str = "32-true") -> TeacherCache:
    return TeacherCache(folder, "weights", precision, setting, torch.device("cpu"), "toy")


def made(folder: Path, setting: object, needs: Needs | None = ALL, precision: str = "32-true") -> CachedOrLive:
    return cache(folder, setting, precision).cached_or_live(frozen(), tokens(), needs)


def size_of(needs: Needs, count: int, item: int = 4) -> int:
    """Bytes of the outputs of the first examples of train, computed one by one."""
    total = 0
    for length in tokens()["train"].lengths[:count].tolist():
        for name in needs.tensors:
            width = {"logits": CLASSES, "derived-first-1": 2}.get(name, WIDTH)
            total += item * width * (length if by_token(name) else 1)
    return total


def stored(folder: Path) -> int:
    """Bytes of all numbers on disk."""
    return sum(np.load(path).nbytes for path in folder.rglob("*.npy"))


def counts(result: CachedOrLive) -> dict[str, int]:
    """Number of cached examples by split."""
    return {split: outputs.cached for split, outputs in result.outputs.items()}


BATCHES = ([0, 3, 1], [39, 12, 30], [0, 39, 5, 20, 19, 38], [20], [19, 20], list(range(TRAIN))[::-1])
"""Examples before, after, and on both sides of the 20th."""


# What a batch gives


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
@pytest.mark.parametrize("count", [1, 20, TRAIN - 1])
def test_outputs_are_those_of_a_running_teacher_whatever_examples_are_cached(
    tmp_path: Path, count: int, precision: str
) -> None:
    item = 8 if precision == "64-true" else 4
    budget = size_of(ALL, count, item) + EVALUATED * item // 4
    result, whole = made(tmp_path / "a", budget, precision=precision), made(tmp_path / "b", "on", precision=precision)
    assert counts(result) == {"train": count, "validation": VALIDATION}
    live, text = frozen(precision), tokens()["train"]
    for rows in BATCHES:
        expected = live(text.pad(rows), ALL)
        outputs = result.teacher(result.outputs["train"].pad(rows), ALL)
        read = whole.teacher(whole.outputs["train"].pad(rows), ALL).named()
        assert torch.equal(outputs.mask, expected.mask)
        assert list(outputs.named()) == list(read) == ALL.tensors
        for name, tensor in outputs.named().items():
            # Sums of up to 32 products of numbers of size 1, in another order.
            close = {"rtol": 0, "atol": 1e-12 if item == 8 else 2e-5}
            mask = expected.mask[:, :, None] if by_token(name) else torch.ones(1, dtype=torch.bool)
            torch.testing.assert_close(tensor, expected.named()[name] * mask, **close)
            torch.testing.assert_close(tensor, read[name], **close)
        scores = expected.attention(2)
        torch.testing.assert_close(
            outputs.attention(2) * outputs.mask[:, None, :, None], scores * outputs.mask[:, None, :, None]
        )


def test_examples_differ_by_more_than_the_tolerance() -> None:
    named = frozen()(tokens()["train"].pad(list(range(TRAIN))), ALL).named()
    for name, tensor in named.items():
        distances = torch.cdist(tensor.flatten(1), tensor.flatten(1), p=float("inf")) + torch.eye(TRAIN)
        assert float(distances.min()) > 1e-3, name


def test_cached_rows_are_read_and_the_others_are_one_pass_over_them_alone(tmp_path: Path, monkeypatch) -> None:
    result = made(tmp_path, size_of(ALL, 20) + EVALUATED)
    given: list[dict[str, Tensor]] = []
    run = FrozenTeacher.run
    monkeypatch.setattr(FrozenTeacher, "run", lambda self, inputs, needs: given.append(inputs) or run(self, inputs, needs))
    text, teacher, before = tokens()["train"], result.teacher, result.teacher.work
    assert before == {"passes": before["passes"], "examples": 20, "batches_used": 0}
    for rows in BATCHES:
        given.clear()
        work = teacher.work
        teacher(result.outputs["train"].pad(rows), ALL)
        beyond = [row for row in rows if row >= 20]
        assert len(given) == (1 if beyond else 0)
        if beyond:
            expected = text.pad(beyond)
            assert given[0].keys() == expected.keys()
            assert all(torch.equal(given[0][name], tensor) for name, tensor in expected.items())
        passes = 2 if beyond else 0  # the derived tensor takes a further one
        assert teacher.work == {
            "passes": work["passes"] + passes,
            "examples": work["examples"] + passes * len(beyond),
            "batches_used": work["batches_used"] + 1,
        }


def test_a_batch_carries_no_token_of_cached_rows_and_no_output_of_the_others(tmp_path: Path) -> None:
    outputs = made(tmp_path, size_of(ALL, 20) + EVALUATED).outputs["train"]
    inputs = outputs.pad([39, 3, 20])
    assert (len(inputs["logits"]), len(inputs[f"{LIVE}input_ids"]), inputs[ORDER].tolist()) == (1, 2, [1, 0, 2])
    assert ORDER not in outputs.pad([3, 4])
    assert not any(name.startswith(LIVE) for name in outputs.pad([3, 4]))
    assert len(outputs.pad([39, 20])["hidden-2"]) == 0


def test_what_is_cached_follows_from_the_indices_and_no_step_reads_it_from_a_device(tmp_path: Path) -> None:
    result = made(tmp_path, size_of(ALL, 20) + EVALUATED)
    inputs = {name: tensor.to("meta") for name, tensor in result.outputs["train"].pad([39, 3, 20]).items()}
    result.teacher.apply(lambda tensor: tensor.to("meta"))  # a device whose values cannot be read
    outputs = result.teacher(inputs, ALL)
    assert all(tensor.is_meta and len(tensor) == 3 for tensor in outputs.named().values())


def test_mixed_precision_runs_in_the_precision_of_what_is_cached(tmp_path: Path) -> None:
    whole = made(tmp_path / "whole", "on", precision="bf16-mixed")
    size = whole.outputs["train"].store.size(ALL.tensors, 20)
    result = made(tmp_path / "part", size + EVALUATED, precision="bf16-mixed")
    assert counts(result)["train"] == 20
    expected, rows = whole.teacher(whole.outputs["train"].pad([39, 3]), ALL).named(), result.outputs["train"].pad([39, 3])
    with torch.autocast("cpu", torch.bfloat16):  # as a training step
        inside = result.teacher(rows, ALL).named()
    outside = result.teacher(rows, ALL).named()  # as the preflight
    for name, tensor in expected.items():
        assert inside[name].dtype is tensor.dtype
        assert outside[name].dtype is torch.promote_types(tensor.dtype, torch.float32)
        # bfloat16 has 8 significant bits, and other shapes round other sums.
        torch.testing.assert_close(inside[name].float(), tensor.float(), rtol=0, atol=0.05 * float(tensor.abs().max()))


def test_a_teacher_that_runs_on_some_examples_reads_no_other_text_and_nothing_undeclared(tmp_path: Path) -> None:
    needs = Needs(cls=[1])
    result = made(tmp_path, size_of(needs, 20) + EVALUATED, needs)
    outputs = result.outputs["train"]
    text = tokens()["train"].pad([39, 3])
    for rows in ([1, 2], [39, 3], [39, 38]):
        inputs = outputs.pad(rows)
        with pytest.raises(UndeclaredRead, match="hidden-2"):
            Forward(result.teacher, inputs, needs).run(needs=Needs(hidden=[2]))
        for other in (text, {**inputs, **text}, {**inputs, "words": torch.zeros(2, 4, WIDTH)}):
            with pytest.raises(UndeclaredRead, match="uncacheable_reason="):
                result.teacher(other, needs)
    whole = CachedTeacher(frozen())
    with pytest.raises(UndeclaredRead, match="uncacheable_reason="):  # it has no weights to run with
        whole({name: tensor for name, tensor in outputs.pad([39, 38]).items() if name.startswith((LIVE, "att"))}, needs)


def test_the_model_stays_in_memory_only_if_it_runs(tmp_path: Path) -> None:
    part, whole = made(tmp_path, EVALUATED + size_of(ALL, 20)), made(tmp_path, "on")
    assert part.teacher.loaded is not None, "loaded before training, and once"
    assert whole.teacher.loaded is whole.teacher.shape
    assert part.teacher.runs
    assert to_time(part.teacher, "classifier") is part.teacher.encoder
    assert not whole.teacher.runs
    assert whole.teacher.load is None
    moved: list[object] = []
    for teacher in (part.teacher, whole.teacher):
        teacher.apply(lambda tensor: moved.append(tensor) or tensor)
    assert len(moved) >= len(list(part.teacher.encoder.parameters()))
    assert {id(tensor) for tensor in moved}.isdisjoint(id(tensor) for tensor in whole.teacher.encoder.parameters())


def test_outputs_are_pickled_for_the_processes_of_a_loader(tmp_path: Path) -> None:
    outputs = made(tmp_path, EVALUATED + size_of(ALL, 20)).outputs["train"]
    rows = [39, 3, 20]
    copied = pickle.loads(pickle.dumps(outputs)).pad(rows)
    assert copied.keys() == outputs.pad(rows).keys()
    assert all(torch.equal(tensor, copied[name]) for name, tensor in outputs.pad(rows).items())


# How much is cached


@pytest.mark.parametrize("needs", [LOGITS, ALL], ids=["logits", "all"])
def test_as_many_examples_as_fit_are_cached(tmp_path: Path, needs: Needs) -> None:
    for count in (1, 7, 39):
        exact = EVALUATED + size_of(needs, count)
        for n, (budget, expected) in enumerate([(exact - 1, count - 1), (exact, count), (exact + 1, count)]):
            folder = tmp_path / f"{count} {n}"
            result = made(folder, budget, needs)
            assert counts(result).get("train", 0) == expected
            assert stored(folder) <= budget
            if expected:
                assert result.record.live == {"train": TRAIN - expected}
                assert (result.record.budget, result.record.bytes) == (budget, stored(folder))
                assert result.record.written == ["train", "validation"]


def test_all_that_fits_is_cached_as_without_a_budget(tmp_path: Path) -> None:
    result = made(tmp_path, EVALUATED + size_of(ALL, TRAIN))
    assert (result.record.live, result.record.budget) == ({}, EVALUATED + size_of(ALL, TRAIN))
    assert not result.teacher.runs
    assert {path.suffixes[-1] for path in tmp_path.rglob("*@*")} == set()


@pytest.mark.parametrize("budget", [1, EVALUATED, EVALUATED + 4 * CLASSES - 1])
def test_a_budget_without_room_for_one_example_runs_on_all_and_says_so(
    tmp_path: Path, budget: int, capsys: pytest.CaptureFixture[str]
) -> None:
    result = made(tmp_path, budget, LOGITS)
    assert isinstance(result.record, CacheUnused)
    assert type(result.teacher) is FrozenTeacher
    assert result.outputs == {}
    assert stored(tmp_path) == 0
    out = capsys.readouterr().out
    assert "teacher 't' runs at every step: its outputs take" in out
    assert f"cache={budget} has no room for those of one example; use cache=on or a larger size" in out


def test_what_is_evaluated_comes_first_and_runs_where_it_does_not_fit(tmp_path: Path) -> None:
    only = made(tmp_path / "a", 4 * CLASSES * 2, None)  # a method without a teacher evaluates it all the same
    assert counts(only) == {"validation": 2}
    assert only.record.live == {"validation": VALIDATION - 2}
    full = size_of(LOGITS, 5)
    made(tmp_path / "b", full + EVALUATED, LOGITS)
    for path in (tmp_path / "b").glob("validation-*/*"):
        path.unlink()
    (tmp_path / "b" / "other").mkdir()
    np.save(tmp_path / "b" / "other" / "logits.npy", np.zeros(EVALUATED, dtype=np.int8))
    late = made(tmp_path / "b", full + EVALUATED, LOGITS)  # the budget is full with train and something else
    assert counts(late) == {"train": 5, "validation": 0}
    live, text = frozen(), tokens()["validation"]
    for result, rows in ((only, [5, 0, 2]), (only, [0, 1]), (late, [5, 0, 2])):
        outputs = result.teacher(result.outputs["validation"].pad(rows), LOGITS)
        torch.testing.assert_close(outputs.logits, live(text.pad(rows), LOGITS).logits)


def test_the_disk_needs_room_for_the_budget_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = EVALUATED + size_of(ALL, 20)
    monkeypatch.setattr(caching.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    for setting, hint in (("on", "a size"), (free + size_of(ALL, 10), "a smaller size")):
        with pytest.raises(InputError, match=rf"take .* kB .* are free; use cache=off or {hint}") as caught:
            made(tmp_path, setting)
        assert caught.value.key == "cache"
    assert counts(made(tmp_path, free))["train"] == 20


def test_lines_say_what_is_cached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path, EVALUATED + size_of(LOGITS, 20), LOGITS)
    out = capsys.readouterr().out
    size = f"{(EVALUATED + size_of(LOGITS, 20)) / 1000:.1f} kB"
    assert f"is run once over train 20 of {TRAIN}, validation {VALIDATION}: {size}, about" in out
    assert f"is cached for 20 of {TRAIN} examples of train: logits, {size}, made in" in out
    assert "it runs at every step on the others" in out
    made(tmp_path, "on", LOGITS)
    out = capsys.readouterr().out
    assert f"is run once over train 20 of {TRAIN}: " in out
    assert "is cached: logits, " in out


# Caches of several sizes


def test_larger_budgets_and_none_complete_what_is_there(tmp_path: Path) -> None:
    examples, most = [], 0
    files: dict[Path, tuple[int, bytes]] = {}
    for count, setting in ((5, None), (20, None), (12, None), (TRAIN, "auto"), (3, None), (TRAIN, "on")):
        result = made(tmp_path, setting or EVALUATED + size_of(ALL, count))
        now = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.rglob("*.npy")}
        assert files.items() <= now.items(), "no file is changed"
        files = now
        examples.append(result.teacher.examples)
        most = max(count, most)
        assert counts(result)["train"] == most, "what is stored is read, also beyond the budget"
        live, rows = frozen(), [39, 0, 19, 20, 4, 5, 11, 12]
        expected = live(tokens()["train"].pad(rows), ALL).named()
        for name, tensor in result.teacher(result.outputs["train"].pad(rows), ALL).named().items():
            mask = tokens()["train"].pad(rows)["attention_mask"][:, :, None] if by_token(name) else 1
            torch.testing.assert_close(tensor, expected[name] * mask, rtol=0, atol=2e-5)
    assert examples == [5, 15, 0, 20, 0, 0], "each example is run once"


def test_other_needs_share_the_budget(tmp_path: Path) -> None:
    """Logits of 20 examples fill it; states of 8 of them fit into a larger one, and one that completes both fills two gaps."""
    made(tmp_path, EVALUATED + size_of(LOGITS, 20), LOGITS)
    needs, state = Needs(cls=[1]), 4 * WIDTH
    result = made(tmp_path, EVALUATED + size_of(LOGITS, 20) + 8 * state, needs)
    assert counts(result)["train"] == 8
    assert stored(tmp_path) == EVALUATED + size_of(LOGITS, 20) + 8 * state
    assert result.record.bytes == EVALUATED + size_of(needs, 8), "what the run reads"
    whole = made(tmp_path, "on", needs)
    assert whole.teacher.examples == TRAIN - 8
    folder = whole.outputs["train"].store.folder
    assert sorted(path.name for path in folder.glob("*.npy")) == [
        "cls-1.npy",
        "cls-1@20.npy",
        "cls-1@8.npy",
        "logits.npy",
        "logits@20.npy",
    ]
    expected = frozen()(tokens()["train"].pad(list(range(TRAIN))), needs).named()
    found = whole.teacher(whole.outputs["train"].pad(list(range(TRAIN))), needs).named()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-5)


def test_who_reads_is_not_disturbed_by_who_adds(tmp_path: Path) -> None:
    first = made(tmp_path, EVALUATED + size_of(ALL, 5))
    rows = [39, 4, 5, 0]
    before = {name: tensor.clone() for name, tensor in first.outputs["train"].pad(rows).items()}
    made(tmp_path, "on")
    assert counts(first)["train"] == 5
    again, copied = first.outputs["train"].pad(rows), pickle.loads(pickle.dumps(first.outputs["train"])).pad(rows)
    assert all(torch.equal(tensor, again[name]) and torch.equal(tensor, copied[name]) for name, tensor in before.items())


COMPANY = """
import sys
from pathlib import Path
from test_budget import made
result = made(Path(sys.argv[1]), sys.argv[2])
print("examples", result.teacher.examples, flush=True)
"""


@pytest.mark.slow
def test_processes_with_several_budgets_fill_one_cache_together(tmp_path: Path) -> None:
    settings = [str(EVALUATED + size_of(ALL, 11)), str(EVALUATED + size_of(ALL, 27)), "auto"]
    commands = [Command(["-c", COMPANY, str(tmp_path), setting]) for setting in settings]
    said = [command.communicate(timeout=240)[0] for command in commands]
    assert [command.returncode for command in commands] == [0, 0, 0], said
    assert sum(int(out.rpartition("examples ")[2]) for out in said) == TRAIN
    check_complete(tmp_path)


def check_complete(folder: Path) -> None:
    """Check that a cache is complete, and has what a running teacher gives."""
    whole = made(folder, "on")
    assert whole.record.written == []
    rows = list(range(TRAIN))
    expected = frozen()(tokens()["train"].pad(rows), ALL)
    for name, tensor in whole.teacher(whole.outputs["train"].pad(rows), ALL).named().items():
        mask = expected.mask[:, :, None] if by_token(name) else torch.ones(1, dtype=torch.bool)
        torch.testing.assert_close(tensor, expected.named()[name] * mask, rtol=0, atol=2e-5)


KILLED = """
import os, signal, sys
from pathlib import Path
from kd.teacher_cache import store
from test_budget import made

moment, after, folder, budgets = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
commit, write, rename, calls = store.TensorStore.commit, store.write_text, os.replace, []

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def stopped(own, name, entry, ranks, span):
    if len(calls) == after:
        if moment == "begin":
            kill()
        if moment == "rename":
            store.os.replace = lambda source, target: kill() if str(target).endswith(".npy") else rename(source, target)
        if moment == "describe":
            store.write_text = kill
    calls.append(name)
    commit(own, name, entry, ranks, span)

for budget in budgets[:-1]:
    made(folder, budget)
store.TensorStore.commit = stopped
if moment == "write":
    store.Share.write = kill
made(folder, budgets[-1])
"""


@pytest.mark.parametrize(("moment", "after"), [("write", 0), ("begin", 2), ("rename", 3), ("describe", 3)])
def test_a_kill_while_a_cache_grows_leaves_what_was_there(
    tmp_path: Path, moment: str, after: int, capsys: pytest.CaptureFixture[str]
) -> None:
    few, more = (str(EVALUATED + size_of(ALL, count)) for count in (6, 25))
    done = Command(["-c", KILLED, moment, str(after), str(tmp_path), few, more])
    output, _ = done.communicate(timeout=240)
    assert done.returncode == -signal.SIGKILL, output
    capsys.readouterr()
    result = made(tmp_path, more)
    assert "damaged" not in capsys.readouterr().out
    assert counts(result)["train"] == 25
    assert result.teacher.examples == 25 - 6, "what was there is not computed again"
    assert stored(tmp_path) <= int(more)
    assert not list(tmp_path.rglob("*.part*"))
    made(tmp_path, "auto")
    check_complete(tmp_path)


def test_a_disk_that_fills_up_keeps_what_was_there_and_nothing_of_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program takes the space that was free when the cache was planned."""
    few, more = (EVALUATED + size_of(ALL, count) for count in (6, 25))
    made(tmp_path, few)
    allocate, calls = os.posix_fallocate, []

    def full(descriptor: int, begin: int, size: int) -> None:
        allocate(descriptor, begin, size)
        calls.append(size)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        made(tmp_path, more)
    assert not list(tmp_path.rglob("*.part*"))
    monkeypatch.undo()
    result = made(tmp_path, more)
    assert (counts(result)["train"], result.teacher.examples) == (25, 25 - 6)


# Files


def grown(folder: Path) -> TensorStore:
    """A cache of logits in three segments."""
    for count in (5, 20):
        made(folder, EVALUATED + size_of(LOGITS, count), LOGITS)
    store = made(folder, "on", LOGITS).outputs["train"].store
    assert sorted(path.name for path in store.folder.glob("*.npy")) == ["logits.npy", "logits@20.npy", "logits@5.npy"]
    return store


@pytest.mark.parametrize(
    ("file", "bad"),
    [
        ("logits", "flipped"),
        ("logits@20", "flipped"),
        ("logits@5", "truncated"),
        ("logits@5", "no numbers"),
        ("logits@20", "torn"),
        ("logits@5", "other examples"),
        ("logits@5", "beyond the end"),
        ("logits@20", "not numbers"),
    ],
)
def test_damage_of_any_segment_is_found_and_made_good(
    tmp_path: Path, file: str, bad: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = grown(tmp_path).folder
    numbers, described = folder / f"{file}.npy", folder / f"{file}.json"
    about = json.loads(described.read_text())
    examples = {"other examples": [0, about["examples"][1] - 1], "beyond the end": [0, 999], "not numbers": {"a": [1]}}
    if bad == "flipped":
        numbers.write_bytes(numbers.read_bytes()[:-1] + bytes([numbers.read_bytes()[-1] ^ 1]))
    elif bad == "truncated":
        numbers.write_bytes(numbers.read_bytes()[:-3])
    elif bad == "no numbers":
        numbers.unlink()
    elif bad == "torn":
        described.write_text(described.read_text()[:30])
    else:
        described.write_text(json.dumps(about | {"examples": examples[bad]}))
    capsys.readouterr()
    result = made(tmp_path, "on", LOGITS)
    assert "is damaged (logits); that part is recomputed" in capsys.readouterr().out
    assert result.teacher.examples == TRAIN
    rows = list(range(TRAIN))
    expected = frozen()(tokens()["train"].pad(rows), LOGITS).logits
    torch.testing.assert_close(result.teacher(result.outputs["train"].pad(rows), LOGITS).logits, expected)
    assert sorted(path.name for path in folder.iterdir()) == ["about.json", "logits.json", "logits.npy"]


def test_segments_that_continue_nothing_are_removed_and_a_cache_of_before_is_read(tmp_path: Path) -> None:
    store = grown(tmp_path)
    rows = list(range(TRAIN))
    whole = store.read(["logits"], rows)["logits"]
    # What an earlier version does with a cache in segments: it takes the first one for damaged, and makes it anew.
    for name in ("logits.npy", "logits.json"):
        (store.folder / name).unlink()
    one = TensorStore(store.folder, store.offsets)
    share = Share(one, "logits", entry := one_entry(one), (0, TRAIN), 0)
    assert share.write(rows, whole)
    share.close()
    one.commit("logits", entry, 1)
    described = store.folder / "logits.json"
    about = json.loads(described.read_text())
    described.write_text(json.dumps({name: about[name] for name in ("shown", "checksum")}))
    result = made(tmp_path, "on", LOGITS)
    assert result.record.written == []
    assert torch.equal(result.outputs["train"].store.read(["logits"], rows)["logits"], whole)
    assert sorted(path.name for path in store.folder.iterdir()) == ["about.json", "logits.json", "logits.npy"]


def one_entry(store: TensorStore) -> caching.Any:
    from kd.teacher_cache.store import Entry

    return Entry((store.rows("logits"), CLASSES), "float32", "float32")


def test_segments_of_several_types_are_read_together(tmp_path: Path) -> None:
    store = grown(tmp_path)
    rows = [39, 0, 7, 25, 4, 5]
    expected = store.read(["logits"], rows)["logits"]
    path = store.folder / "logits@5.npy"
    np.save(path, np.load(path).astype(np.float64))
    described = store.folder / "logits@5.json"
    described.write_text(json.dumps(json.loads(described.read_text()) | {"shown": "float64"}))
    found = TensorStore(store.folder, store.offsets).read(["logits"], rows)["logits"]
    assert found.dtype is torch.float64
    assert torch.equal(found.float(), expected)


def test_examples_that_are_not_stored_cannot_be_read(tmp_path: Path) -> None:
    store = made(tmp_path, EVALUATED + size_of(LOGITS, 5), LOGITS).outputs["train"].store
    assert store.count(["logits"]) == 5
    assert store.missing(["logits"]) == ["logits"]
    with pytest.raises(IndexError):
        store.read(["logits"], [5])


def test_numbers_that_16_bits_cannot_hold_stay_within_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = FrozenTeacher.run

    def large(teacher: FrozenTeacher, inputs: dict[str, Tensor], needs: Needs):
        outputs = original(teacher, inputs, needs)
        for tensor in outputs.tensors.get("cls", {}).values():
            tensor.mul_(1e7)
        return outputs

    monkeypatch.setattr(FrozenTeacher, "run", large)
    needs = Needs(cls=[1])
    budget = EVALUATED + 20 * (2 * CLASSES + 2 * WIDTH)  # 16 bits for logits, which are bfloat16, and for states
    result = made(tmp_path, budget, needs, "bf16-mixed")
    assert "cls-1 of 'train' do not fit 16 bits" in capsys.readouterr().out
    assert stored(tmp_path) <= budget
    # Logits of 20 examples are stored by then; the rest of the budget has room for the states of 10 in 32 bits.
    assert counts(result)["train"] == 10
    assert result.teacher.examples == 20 + 10
    assert result.outputs["train"].store.entry("cls-1").stored == "float32"
    larger = made(tmp_path, budget + 5 * 4 * WIDTH, needs, "bf16-mixed")
    assert counts(larger)["train"] == 15
    assert "do not fit" not in capsys.readouterr().out, "the type of before is taken at once"
    none = made(tmp_path / "none", EVALUATED + 2 * CLASSES + 2 * WIDTH, needs, "bf16-mixed")
    assert isinstance(none.record, CacheUnused)
    assert none.teacher.examples == 1, "what was computed in vain is counted"


# Several ranks


def test_ranks_share_each_piece_and_what_is_only_rank_zeros_exchanges_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank after the other does its part of a piece; more ranks than examples leave some without one."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    from kd.system import distributed
    from kd.teacher_cache.precompute import precompute

    exchanged: list[object] = []
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda box, src: exchanged.append(box))
    teacher, text = frozen(), tokens()
    budget = EVALUATED + size_of(ALL, 20)
    own = cache(tmp_path, budget)
    splits = {name: own.split(teacher, name, text[name], ALL if name == "train" else LOGITS) for name in text}

    def gathered(value: frozenset[str]) -> list[frozenset[str]]:
        return [value] * 3

    pieces = distributed.on_rank_zero(lambda: own.plan(teacher, splits, frozenset()))
    assert len(exchanged) == 1, "nothing but the plan itself"
    assert [(piece.split, piece.span) for piece in pieces] == [("train", (0, 20)), ("validation", (0, VALIDATION))]
    monkeypatch.setattr(distributed, "gather", gathered)
    examples = []
    for piece in pieces:
        for rank in (2, 1, 0):  # rank 0 joins the shares
            monkeypatch.setenv("RANK", str(rank))
            examples.append(precompute(frozen(), splits[piece.split], piece, torch.device("cpu"))[1])
    assert examples == [7, 7, 6, 2, 2, 2]
    monkeypatch.undo()
    result = made(tmp_path, budget)
    assert result.record.written == []
    made(tmp_path, "on")
    check_complete(tmp_path)
