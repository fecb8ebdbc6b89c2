"""A frozen teacher is run once: what is kept, when it counts, and when the teacher runs after all."""

import gc
import re
import shutil
import signal
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kd.build.data import build_data, build_examples, teacher_cache
from kd.build.models import BuiltModels, build_models
from kd.config.schema import cache_limit
from kd.data import tokenized
from kd.data.datamodule import KDDataModule
from kd.errors import InputError
from kd.forward import Needs, Outputs, UndeclaredRead
from kd.models import CachedTeacher, FrozenTeacher
from kd.runs.run import Run
from kd.system import hardware
from kd.system import model_sources as sources
from kd.system.model_sources import recorded_files
from kd.teacher_cache import cache as caching
from kd.training import execute
from processes import Command
from whole_runs import Small, broken_off, last_weights, made, planned, pool, same_weights, torchrun

TRAIN, VALIDATION, TEST = 96, 32, 32


@pytest.fixture(scope="module")
def teacher(small: Small) -> Path:
    """A finished run of the teacher, without a cache."""
    run = planned(small()).inputs.teachers["minilm"]
    execute.execute(run)
    return run.directory


@pytest.fixture
def fresh(small: Small, teacher: Path, tmp_path: Path):
    """Overrides of runs in a folder of their own, with the teacher done and nothing kept of it."""
    shutil.copytree(teacher, tmp_path / "runs" / teacher.name, ignore=shutil.ignore_patterns("cache"))
    return lambda *more: small(*more, f"paths.runs={tmp_path / 'runs'}")


def built(overrides: list[str]) -> tuple[Run, BuiltModels, KDDataModule]:
    """A run's models and data as training sees them."""
    run = planned(overrides)
    for _, needed in run.inputs:
        execute.execute(needed)
    examples = build_examples(run)
    models = build_models(run, examples.task, texts=examples.texts["train"])
    data, models = build_data(run, examples, models)
    return run, models, data


def cache_of(overrides: list[str]) -> Path:
    """Return the folder of the teacher's cache."""
    return planned(overrides).inputs.teachers["minilm"].directory / "cache"


def kept(overrides: list[str]) -> dict[str, set[str]]:
    """Return, by split, the names of the tensors that are stored completely."""
    return {
        folder.name.partition("-")[0]: {path.stem for path in folder.glob("*.json")} - {"about"}
        for folder in cache_of(overrides).iterdir()
        if folder.is_dir()
    }


# That it is as good as running


def each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run teachers over one example at a time, without its padding.

    How a processor adds up a product of matrices depends on their shapes, and the pass has other batches than training. Alone,
    an example's shapes are the same in both, so what a teacher says of it is the same to the bit on every machine.
    """
    original = FrozenTeacher.run

    def run(teacher: FrozenTeacher, inputs: dict[str, torch.Tensor], needs: Needs) -> Outputs:
        assert not needs.tokens  # what is said of tokens would have to be padded again
        rows = [{name: t[row : row + 1, :length] for name, t in inputs.items()} for row, length in enumerate(lengths(inputs))]
        said = [original(teacher, row, needs).named() for row in rows]
        named = {name: torch.cat([one[name] for one in said]) for name in said[0]}
        return Outputs.from_named(named, inputs["attention_mask"].bool(), needs, teacher.heads)

    monkeypatch.setattr(FrozenTeacher, "run", run)


def lengths(inputs: dict[str, torch.Tensor]) -> list[int]:
    return inputs["attention_mask"].sum(dim=1).tolist()


@pytest.mark.parametrize(
    "words",
    [("method=pkd",), ("method=kd",), ("method=p2p_mutual",), ("method=pkd", "pool=wkd")],
    ids=lambda words: " ".join(words),
)
def test_cached_and_live_training_from_the_same_outputs_end_with_the_same_weights(
    fresh, backbone: Path, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    each_alone(monkeypatch)
    teachers = pool(backbone, "minilm", "minilm_3l") if "pool=wkd" in words else []
    words = (*teachers, *words, "student.dropout=0.1")
    cached, one = made(fresh(*words, "cache=on"))
    ours = last_weights(cached)
    shutil.rmtree(cached.directory)
    live, other = made(fresh(*words, "cache=off"))
    assert cached.digest == live.digest, "how a teacher is read changes no result"
    assert all(each["used"] for each in one["cache"].values())
    assert one["teacher_forward_examples"] < other["teacher_forward_examples"]
    assert same_weights(ours, last_weights(live))
    shutil.rmtree(live.directory)
    size = min(each["bytes"] for each in one["cache"].values()) * 2 // 3
    both, third = without_caches(fresh(*words, f"cache={size}"))
    rest = {name: each["live"]["train"] for name, each in third["cache"].items()}
    assert all(0 < count < TRAIN for count in rest.values())
    assert [(each["used"], each["budget"]) for each in third["cache"].values()] == [(True, size)] * len(rest)
    assert both.digest == live.digest
    assert same_weights(ours, last_weights(both))
    for key in ("metrics", "metrics_teacher", "agreement"):
        assert one[key] == other[key] == third[key], key


def without_caches(overrides: list[str]) -> tuple[Run, dict]:
    """Make a run whose teachers' caches are removed before."""
    for teacher in planned(overrides).inputs.teachers.values():
        shutil.rmtree(teacher.cache)
    return made(overrides)


def test_cached_and_live_training_differ_by_the_rounding_of_batches_of_other_shapes_alone(fresh) -> None:
    words = ("method=pkd", "student.dropout=0.1", "trainer.precision=64-true")
    cached, one = made(fresh(*words, "cache=on"))
    ours = last_weights(cached)
    shutil.rmtree(cached.directory)
    live, other = made(fresh(*words, "cache=off"))
    assert all(each["used"] for each in one["cache"].values())
    assert one["teacher_forward_examples"] < other["teacher_forward_examples"]
    theirs = last_weights(live)
    shutil.rmtree(live.directory)
    both, third = without_caches(fresh(*words, f"cache={one['cache']['minilm']['bytes'] // 2}"))
    assert one["teacher_forward_examples"] < third["teacher_forward_examples"] < other["teacher_forward_examples"]
    mixed = last_weights(both)
    apart = {name: float(max((ours[name] - each[name]).abs().max() for each in (theirs, mixed))) for name in ours}
    # Sums in another order differ by 1e-16 of their terms, and AdamW, which divides a gradient by its size plus 1e-8, makes at
    # most 1e8 times as much of it: keys' biases, whose gradients are rounding alone, stay below this bound, too.
    assert all(tensor.dtype == torch.float64 for tensor in ours.values() if tensor.is_floating_point())
    assert max(apart.values()) <= 1e-9, max(apart, key=lambda name: apart[name])


def test_the_second_of_a_sweep_does_not_load_the_teacher(fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    _, first = made(fresh("method=kd"))

    def refuse(_: FrozenTeacher) -> None:
        raise AssertionError("the teacher is loaded")

    monkeypatch.setattr(FrozenTeacher, "encoder", property(refuse))
    monkeypatch.setattr(CachedTeacher, "encoder", property(lambda teacher: teacher.shape))
    results = [made(fresh("method=kd", f"seed={seed}"))[1] for seed in (1, 2)]
    assert [each["teacher_forward_examples"] for each in (first, *results)] == [TRAIN, 0, 0]
    assert [each["cache"]["minilm"]["written"] for each in (first, *results)] == [["train", "validation", "test"], [], []]
    for result in results:
        assert result["metrics_teacher"] == first["metrics_teacher"]
        assert result["parameters"]["teacher"] == first["parameters"]["teacher"]
        assert result["megabytes"]["minilm"] == first["megabytes"]["minilm"]


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_what_is_read_is_what_the_teacher_says_of_that_example_but_for_rounding(fresh, precision: str) -> None:
    _, live, plain = built(fresh("method=pkd", "cache=off", f"trainer.precision={precision}"))
    _, cached, data = built(fresh("method=pkd", "cache=on", f"trainer.precision={precision}"))
    needs = cached.methods["student"].needs()[1][0]
    assert needs.cls
    kind = torch.float64 if precision == "64-true" else torch.float32
    live.teachers[0].encoder.to(kind)
    # Sums of up to 64 products are formed in another order where the shapes of a batch are others, in each of 4 blocks: each
    # may be off by as many units in the last place as it has products.
    bound = 4 * 64 * torch.finfo(kind).eps
    for split, asked in (("train", needs), ("validation", Needs()), ("test", Needs())):
        for rows in ([5], [3, 0, 7], list(range(20, 8, -1))):
            expected = live.teachers[0](plain.collate(split)(rows).teachers[0], asked).named()
            found = cached.teachers[0](data.collate(split)(rows).teachers[0], asked).named()
            assert expected.keys() == found.keys()
            for name, tensor in expected.items():
                assert found[name].dtype == kind
                size = float(tensor.abs().max())
                assert torch.allclose(tensor, found[name], rtol=0, atol=bound * size), (split, name)
                if len(rows) > 1:  # no two examples are as near to each other
                    assert float((tensor[0] - tensor[1]).abs().max()) > 10 * bound * size


def test_what_is_cached_is_padded_as_the_tokens_are(fresh) -> None:
    _, _, data = built(fresh("method=pkd", "trainer.pad_multiple=8"))
    for rows in ([5], [3, 0, 7]):
        batch = data.collate("train")(rows)
        assert torch.equal(batch.teachers[0]["attention_mask"], batch.student["attention_mask"])
        assert batch.student["attention_mask"].shape[1] % 8 == 0


def test_metrics_do_not_depend_on_what_shares_a_batch(small: Small) -> None:
    run, alone = made(small("method=kd", "seed=4", "trainer.eval_batch_size=1", "cache=off"))
    shutil.rmtree(run.directory)
    for size in (7, 32):
        run, other = made(small("method=kd", "seed=4", f"trainer.eval_batch_size={size}", "cache=off"))
        shutil.rmtree(run.directory)
        assert {k: other[k] for k in ("metrics", "agreement")} == {k: alone[k] for k in ("metrics", "agreement")}


def test_a_teacher_that_is_trained_with_its_students_is_not_cached(fresh) -> None:
    _, result = made(fresh("method=pkd", "cohort=mutual", "cohort.teacher=online", "trainer.max_epochs=1"))
    assert result["cache"] == {}


def test_the_teacher_is_gone_when_training_begins(fresh) -> None:
    run = planned(fresh("method=pkd"))
    examples = build_examples(run)
    models = build_models(run, examples.task)
    weights = weakref.ref(models.teachers[0].encoder)
    build_data(run, examples, models)
    gc.collect()
    assert weights() is None
    assert all(parameter.is_meta for parameter in models.teachers[0].shape.parameters())


def test_a_cache_that_is_deleted_serves_the_run_that_has_it(fresh) -> None:
    _, models, data = built(fresh("method=kd"))
    expected = {split: data.collate(split)([0, 1]).teachers[0]["logits"] for split in data.tokens}
    shutil.rmtree(cache_of(fresh()))
    for split, logits in expected.items():
        found = models.teachers[0](data.collate(split)([0, 1]).teachers[0], Needs()).logits
        assert torch.equal(found, logits)


# What is kept


def test_more_needs_extend_what_is_there(fresh, capsys: pytest.CaptureFixture[str]) -> None:
    built(fresh("method=kd"))
    assert kept(fresh()) == {"train": {"logits"}, "validation": {"logits"}, "test": {"logits"}}
    cache = cache_of(fresh())
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*.npy")}
    assert before
    _, models, _ = built(fresh("method=pkd", "method.layers=[[1,1],[1,3]]"))
    assert kept(fresh())["train"] == {"logits", "cls-1", "cls-3"}
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert models.caches["minilm"].written == ["train"]
    capsys.readouterr()
    built(fresh("method=pkd", "method.layers=[[1,3]]"))
    assert "teacher not loaded" in capsys.readouterr().out


def test_fine_tuning_has_nothing_kept_that_it_does_not_read(fresh) -> None:
    _, result = made(fresh("method=finetune"))
    assert set(kept(fresh())) == {"validation", "test"}
    assert result["teacher_forward_examples"] == 0
    assert result["metrics_teacher"]["minilm"]["test"]["accuracy"] > 0


def test_mixed_precision_keeps_16_bits_for_training_and_all_for_scores(fresh) -> None:
    _, _, data = built(fresh("method=pkd", "trainer.precision=bf16-mixed"))
    entries = {split: data.tokens[split]["teacher 0"].store.entry("logits") for split in data.tokens}
    assert entries["train"].stored == "bfloat16"
    assert (entries["validation"].stored, entries["test"].stored) == ("float32", "float32")
    store = data.tokens["train"]["teacher 0"].store
    assert [store.entry(name).stored for name in data.tokens["train"]["teacher 0"].names[1:]] == ["float16"]


def test_numbers_that_16_bits_cannot_hold_are_kept_in_full(fresh, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    original = FrozenTeacher.run

    def large(teacher: FrozenTeacher, inputs: dict[str, torch.Tensor], needs: Needs) -> Outputs:
        outputs = original(teacher, inputs, needs)
        return replace(outputs, tensors={**outputs.tensors, "cls": {n: 1e7 * t for n, t in outputs.tensors["cls"].items()}})

    monkeypatch.setattr(FrozenTeacher, "run", large)
    _, _, data = built(fresh("method=pkd", "trainer.precision=bf16-mixed"))
    store = data.tokens["train"]["teacher 0"].store
    (name,) = data.tokens["train"]["teacher 0"].names[1:]
    assert store.entry(name).stored == "float32"
    assert store.entry("logits").stored == "bfloat16"
    assert "do not fit 16 bits" in capsys.readouterr().out
    assert float(store.read([name], range(TRAIN))[name].abs().max()) > 1e6


def test_another_text_or_other_weights_are_not_served_from_what_is_there(
    fresh, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["teacher=[hub]", f"teacher.hub.model={teacher / 'student'}"]
    small = fresh("method=kd", *words)
    built(small)
    capsys.readouterr()
    built([*small, "task.max_length=6"])
    assert "was made from other text" in capsys.readouterr().out
    built(small)
    assert "teacher not loaded" in capsys.readouterr().out, "the first is still there"


def test_weights_that_change_under_one_name_are_noticed(fresh, teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built(fresh("method=kd"))
    run = planned(fresh()).inputs.teachers["minilm"]
    weights = run.student / "model.safetensors"
    found = bytearray(weights.read_bytes())
    found[-5] ^= 1
    weights.write_bytes(found)
    run.finish({**run.result, "files": recorded_files(run.directory, [run.student])})  # not damaged: another's
    capsys.readouterr()
    built(fresh("method=kd"))
    assert "was made from other weights" in capsys.readouterr().out


@pytest.mark.parametrize("bad", ["truncated", "flipped"])
def test_damage_is_said_and_made_good(fresh, bad: str, capsys: pytest.CaptureFixture[str]) -> None:
    run, result = made(fresh("method=kd"))
    path = next((run.inputs.teachers["minilm"].directory / "cache").glob("train-*/logits.npy"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-4] if bad == "truncated" else whole[:-1] + bytes([whole[-1] ^ 1]))
    shutil.rmtree(run.directory)
    capsys.readouterr()
    _, again = made(fresh("method=kd"))
    assert "is damaged (logits); that part is recomputed" in capsys.readouterr().out
    assert again["cache"]["minilm"]["written"] == ["train"]
    assert path.read_bytes() == whole
    assert again["metrics"] == result["metrics"]


# When the teacher runs after all


@pytest.mark.parametrize(
    ("setting", "limit"),
    [
        ("auto", None),
        ("on", float("inf")),
        (True, float("inf")),
        ("off", 0),
        (False, 0),
        ("2GB", 2e9),
        ("1.5 mb", 1.5e6),
        ("500MB", 5e8),
        ("0.5kB", 500),
        (" 3tb ", 3e12),
        (7, 7),
    ],
)
def test_limits(setting: object, limit: float | None) -> None:
    assert cache_limit(setting) == limit


@pytest.mark.parametrize(
    "setting", ["sometimes", "-1GB", "GB", "", None, "nan", "2GiB", "2 bytes", "1e9", "2GB 1MB", "2,5GB", [1], "inf"]
)
def test_a_setting_that_is_none(small: Small, setting: object) -> None:
    with pytest.raises(InputError, match="auto, on, off, or a size") as caught:
        planned(small(f"cache={'null' if setting is None else repr(setting)}"))
    assert caught.value.key == "cache"


@pytest.mark.parametrize("word", ["cache=off", "cache=100"])
def test_a_limit_is_kept(fresh, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, result = made(fresh("method=pkd", word))
    assert result["cache"]["minilm"]["used"] is False
    assert result["teacher_forward_examples"] == 2 * TRAIN
    if word == "cache=off":
        assert not cache_of(fresh()).exists()
    else:
        assert not any(kept(fresh()).values())
    said = capsys.readouterr().out
    assert ("runs at every step: its outputs take" in said) == (word == "cache=100")


def test_what_is_there_counts_towards_the_limit(fresh) -> None:
    def live(*words: str) -> dict[str, int]:
        return built(fresh(*words))[1].caches["minilm"].live

    logits, states = 2 * 4 * (TRAIN + VALIDATION + TEST), 32 * 4 * TRAIN
    assert live("method=kd", f"cache={logits}") == {}
    assert live("method=pkd", f"cache={logits + states - 1}") == {"train": 1}
    assert live("method=pkd", f"cache={logits + states}") == {}


def test_a_folder_that_cannot_be_written_leaves_the_teacher_running(
    fresh, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(caching.tempfile, "TemporaryFile", refuse)
    _, models, _ = built(fresh("method=kd"))
    assert models.caches["minilm"].used is False
    assert "runs at every step: nothing can be written to" in capsys.readouterr().out


def test_teacher_of_the_hub_is_run_once_for_the_commit_that_is_loaded(
    small: Small, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def publish(commit: str) -> None:
        shutil.copytree(backbone, tmp_path / "hub/models--owner--tiny/snapshots" / commit)
        (tmp_path / "hub/models--owner--tiny/refs").mkdir(exist_ok=True)
        (tmp_path / "hub/models--owner--tiny/refs/main").write_text(commit)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    given = ["teacher=hub", "teacher.hub.model=hf:owner/tiny", "teacher.hub.labels=[negative,positive]"]
    overrides = small("method=kd", *given, f"paths.runs={tmp_path / 'runs'}")
    publish("0" * 40)
    _, models, _ = built(overrides)
    assert models.caches["hub"].written == ["train", "validation", "test"]
    _, models, _ = built(overrides)
    assert models.caches["hub"].written == []
    publish("1" * 40)
    _, models, _ = built(overrides)
    assert models.caches["hub"].written == ["train", "validation", "test"]
    monkeypatch.setattr(sources, "try_to_load_from_cache", lambda *_, **__: None)
    _, models, _ = built(overrides)
    assert models.caches["hub"].used is False
    assert "the commit of its weights on the hub is unknown" in capsys.readouterr().out


def test_what_a_teacher_reads_to_fill_a_cache_is_copied_from_locked_memory(fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[torch.device] = []
    monkeypatch.setattr(hardware, "to_device", lambda values, device: copied.append(device) or values)
    _, models, _ = built(fresh("method=kd"))
    assert models.caches["minilm"].used
    assert len(copied) > 6
    assert set(copied) == {torch.device("cpu")}


def test_the_pass_runs_what_is_not_compiled(fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = FrozenTeacher.run

    def run_it(teacher: FrozenTeacher, *arguments: object) -> object:
        seen.append(teacher.encoder.compiled)
        return original(teacher, *arguments)

    monkeypatch.setattr(FrozenTeacher, "run", run_it)
    run = planned(fresh("method=kd"))
    examples = build_examples(run)
    models = build_models(run, examples.task)
    models.teachers[0].shape.compiled = True
    build_data(run, examples, models)
    assert len(seen) > 6
    assert not any(seen)


def test_the_estimate_is_the_size(fresh, capsys: pytest.CaptureFixture[str]) -> None:
    _, models, _ = built(fresh("method=pkd"))
    written = sum(np.load(path).nbytes for path in cache_of(fresh()).rglob("*.npy"))
    assert models.caches["minilm"].bytes == written
    before, after = re.findall(r"[\d.]+ kB", capsys.readouterr().out)
    assert before == after == f"{written / 1000:.1f} kB"


def test_no_room_is_said_before_the_pass(fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"take .* kB .* and 1\.0 kB are free; use cache=off") as caught:
        built(fresh("method=kd", "cache=on"))
    assert caught.value.key == "cache"
    _, models, _ = built(fresh("method=kd"))
    assert models.caches["minilm"].used is False


@pytest.mark.parametrize(
    ("needs", "changes", "reason"),
    [
        (Needs(uncacheable_reason="it smooths the text"), None, "it smooths the text"),
        (Needs(gradient=True), None, "the method takes gradients"),
        (Needs(words=True), None, "word embeddings are not stored"),
        (Needs(), "masked anew", "masked anew"),
        (Needs() | Needs(uncacheable_reason="a") | Needs(uncacheable_reason="b"), None, "a; b"),
    ],
)
def test_a_method_that_cannot_says_so(small: Small, needs: Needs, changes: str | None, reason: str) -> None:
    _, models, _ = built(small("method=kd", "cache=off"))
    cache = teacher_cache(planned(small("cache=on")), "minilm")
    assert cache.reason_to_run(models.teachers[0], needs, changes).startswith(reason)
    assert cache.reason_to_run(models.teachers[0], Needs()) is None


def test_a_cached_teacher_reads_no_other_text(fresh) -> None:
    _, models, data = built(fresh("method=kd"))
    inputs = {"input_ids": torch.zeros(1, 3, dtype=torch.long), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with pytest.raises(UndeclaredRead, match="Needs\\(uncacheable_reason="):
        models.teachers[0](inputs, Needs())
    with pytest.raises(UndeclaredRead, match="hidden-1"):
        models.teachers[0](data.collate("train")([0]).teachers[0], Needs(hidden=[1]))


def test_batches_of_the_pass_hold_every_example_once_and_are_bounded() -> None:
    lengths = np.random.default_rng(0).integers(3, 600, 200)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    for span in ((0, 200), (50, 51), (120, 200)):
        found = list(tokenized.batches_by_length(offsets, span))
        assert sorted(row for rows in found for row in rows) == list(range(*span))
        assert all(len(rows) * lengths[rows].max() <= tokenized.BATCH_TOKENS or len(rows) == 1 for rows in found)
    assert list(tokenized.batches_by_length(offsets, (7, 7))) == []


# Interruptions and company

KILLED = """
import os, signal, sys
from kd.teacher_cache import store as module
from kd.teacher_cache.store import Share, TensorStore

moment, after = sys.argv[1], int(sys.argv[2])
commit, replace, calls = TensorStore.commit, os.replace, []

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def rename(source, target):
    if moment == "rename" and str(target).endswith(".npy"):
        kill()
    replace(source, target)

def stopped(store, name, entry, ranks, span):
    if len(calls) == after:  # at this tensor
        if moment == "begin":
            kill()
        os.replace = rename
        module.write_text = kill if moment == "describe" else module.write_text
    calls.append(name)
    commit(store, name, entry, ranks, span)

TensorStore.commit = stopped
if moment == "write":
    Share.write = kill
from whole_runs import planned
from test_caching import built
built(sys.argv[3:])
"""


@pytest.fixture(scope="module")
def undisturbed(small: Small, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Return the record of a run whose pass over the texts was not stopped."""
    runs = tmp_path_factory.mktemp("undisturbed")
    shutil.copytree(teacher, runs / teacher.name, ignore=shutil.ignore_patterns("cache"))
    _, result = made(small("method=pkd", f"paths.runs={runs}"))
    assert result["cache"]["minilm"]["written"] == ["train", "validation", "test"]
    return result


@pytest.mark.parametrize(
    ("moment", "after"), [("write", 0), ("begin", 0), ("begin", 1), ("begin", 2), ("rename", 1), ("describe", 1)]
)
def test_a_kill_leaves_what_was_there_or_nothing(fresh, moment: str, after: int, undisturbed: dict) -> None:
    words = fresh("method=pkd")
    done = Command(["-c", KILLED, moment, str(after), *words])
    output, _ = done.communicate(timeout=240)
    assert done.returncode == -signal.SIGKILL, output
    assert len(kept(words)["train"]) == after
    _, result = made(words)
    assert result["metrics"] == undisturbed["metrics"]


@pytest.mark.slow
def test_two_processes_share_one_pass(fresh) -> None:
    commands = [Command(["-m", "kd.train", *fresh("method=kd", f"seed={seed}")]) for seed in (0, 1)]
    outputs = [process.communicate(timeout=240)[0] for process in commands]
    assert [process.returncode for process in commands] == [0, 0], outputs
    results = [planned(fresh("method=kd", f"seed={seed}")).result for seed in (0, 1)]
    assert sorted(result["teacher_forward_examples"] for result in results) == [0, TRAIN]


def test_a_run_with_a_budget_goes_on_where_it_was_stopped(
    fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = fresh("method=pkd", f"cache={2 * 4 * (TRAIN + VALIDATION + TEST) + 32 * 4 * 40 - 2 * 4 * 56}")
    unbroken, result = made(words)
    out = capsys.readouterr().out
    assert f"teacher minilm: 40 of {TRAIN} examples of train cached in " in out
    expected = last_weights(unbroken)
    shutil.rmtree(unbroken.directory)
    shutil.rmtree(cache_of(words))
    run = planned(words)
    broken_off(run, 8, monkeypatch)  # in the second of two epochs; the first one's checkpoint is there
    again = execute.execute(run)
    assert same_weights(last_weights(run), expected)
    assert again["resumed"] == {"starts": 2, "from_steps": [6]}
    for key in ("metrics", "teacher_forward_examples", "teacher_forwards"):
        assert again[key] == result[key], key
    assert again["teacher_forward_examples"] == 40 + 2 * (TRAIN - 40)
    entries = [{**each["cache"]["minilm"], "seconds": 0} for each in (again, result)]
    assert entries[0] == entries[1]
    assert (entries[0]["live"], entries[0]["written"]) == ({"train": TRAIN - 40}, ["train", "validation", "test"])


@pytest.mark.parametrize(("setting", "filled", "live"), [("off", 0, TRAIN), ("on", TRAIN - 40, 0), ("1MB", TRAIN - 40, 0)])
def test_a_run_that_was_stopped_goes_on_with_another_budget(
    fresh, monkeypatch: pytest.MonkeyPatch, setting: str, filled: int, live: int
) -> None:
    budget = f"cache={2 * 4 * (TRAIN + VALIDATION + TEST) + 32 * 4 * 40 - 2 * 4 * 56}"
    run = planned(fresh("method=pkd", budget))
    broken_off(run, 8, monkeypatch)  # in the second of two epochs; the first one's checkpoint is there
    again = planned(fresh("method=pkd", f"cache={setting}"))
    assert again.digest == run.digest
    result = execute.execute(again)
    assert result["resumed"] == {"starts": 2, "from_steps": [6]}
    first, second = TRAIN - 40, live  # that ran in each epoch
    assert result["teacher_forward_examples"] == 40 + first + filled + second
    assert result["cache"]["minilm"].get("live", {}) == {}


def test_text_without_labels_and_edited_examples_share_the_budget(fresh, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("".join(f"a film with {'good' if n % 2 else 'bad'} scene\n" for n in range(20)))
    more = (f"task.unlabelled={tmp_path / 'more.txt'}", "edit=[label_noise]", "trainer.num_workers=1")
    _, result = made(fresh("method=pkd", "cache=9kB", *more))
    live = result["cache"]["minilm"]["live"]["train"]
    assert 20 < live < TRAIN + 20, "those without labels follow the others"
    assert result["teacher_forward_examples"] == TRAIN + 20 - live + 2 * live


@pytest.mark.slow
@pytest.mark.ddp
def test_two_ranks_with_a_budget_give_the_result_of_one(fresh) -> None:
    words = fresh("method=pkd", "student.dropout=0", "cache=7kB")
    one, result = made(words)
    ours = last_weights(one)
    shutil.rmtree(one.directory)
    shutil.rmtree(cache_of(words))
    torchrun([*words, "trainer=ddp", "trainer.accelerator=cpu"])
    two = planned(words).result
    assert (two["ranks"], two["digest"]) == (2, result["digest"])
    assert two["cache"]["minilm"]["live"] == result["cache"]["minilm"]["live"] != {}
    assert two["teacher_forward_examples"] == result["teacher_forward_examples"]
    theirs = last_weights(one)
    # Keys' biases change no attention, so their gradients are rounding alone, which AdamW scales up to its step.
    apart = {name: float((ours[name] - theirs[name]).abs().max()) for name in ours if not name.endswith("self.key.bias")}
    assert max(apart.values()) < 1e-5, apart


def test_a_mixed_precision_run_with_a_budget_is_made(fresh) -> None:
    _, result = made(fresh("method=ckd", "trainer.precision=bf16-mixed", "cache=100kB"))
    assert 0 < result["cache"]["minilm"]["live"]["train"] < TRAIN
    assert result["metrics"]["test"]["accuracy"] is not None


def test_each_teacher_of_a_pool_has_a_cache_of_its_own(fresh, backbone: Path) -> None:
    words = fresh("method=pkd", "pool=stochastic", *pool(backbone, "minilm", "minilm_3l"))
    _, result = made([*words, "teacher.minilm_3l.run.seed=5"])
    assert {name: made["used"] for name, made in result["cache"].items()} == {"minilm": True, "minilm_3l": True}
    assert result["teacher_forward_examples"] == 2 * TRAIN
    assert sum(each["batches_used"] for each in result["teacher_forwards"].values()) == 12
