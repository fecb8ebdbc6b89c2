"""Checkpoints and exports that are damaged, missing, or of something else."""

import json
import os
import pickle
import shutil
import socket
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kd.build.data import build_examples
from kd.build.engine import build_engine
from kd.build.models import build_models
from kd.engines.base import Engine
from kd.engines.nonfinite import LATEST
from kd.errors import InputError
from kd.runs.run import Run, write_record
from kd.system import distributed
from kd.training import execute
from kd.training.checkpoints import ENTRY_TYPES, STATE, AtomicCheckpointIO, EveryFewMinutes, read_checkpoint, seal
from kd.training.fit import count_fills
from kd.training.trainer import last_step, select
from whole_runs import broken_off, planned

Small = Callable[..., list[str]]

DIGEST = "0123456789ab"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A small checkpoint."""
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO(DIGEST).save_checkpoint({"state_dict": {"weight": torch.arange(3.0)}, "epoch": 1}, path)
    return path


def sealed(content: object, path: Path) -> Path:
    """A file with a checksum that fits, whatever it holds."""
    with path.open("w+b") as file:
        torch.save(content, file)
        seal(file)
    return path


def refused(path: Path, words: str = "") -> None:
    """Check that a checkpoint is refused with one message that names the file and the cure."""
    with pytest.raises(InputError, match=words) as caught:
        read_checkpoint(path, DIGEST)
    assert str(path) in caught.value.message
    assert "resume=false" in caught.value.message
    assert caught.value.key == "resume"


def test_a_checkpoint_is_read_as_it_was_written_also_by_torch_alone(saved: Path) -> None:
    found = read_checkpoint(saved, DIGEST)
    assert found["epoch"] == 1
    assert found["digest"] == DIGEST
    assert torch.equal(found["state_dict"]["weight"], torch.arange(3.0))
    assert torch.load(saved, weights_only=True)["epoch"] == 1
    assert zipfile.ZipFile(saved).testzip() is None
    assert [path.name for path in saved.parent.iterdir()] == ["last.ckpt"]


def test_a_changed_bit_in_any_byte_is_noticed(saved: Path) -> None:
    content = saved.read_bytes()
    for place in {*range(0, len(content), 5), *range(len(content) - 120, len(content))}:  # the checksum's own bytes are last
        saved.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        refused(saved, "truncated or damaged")


def test_a_checkpoint_that_ends_early_or_goes_on_is_noticed(saved: Path) -> None:
    content = saved.read_bytes()
    for size in range(0, len(content), 7):
        saved.write_bytes(content[:size])
        refused(saved, "truncated")
    for more in (b"\0", b"\0" * 4096, content):
        saved.write_bytes(content + more)
        refused(saved, "truncated or damaged")


def test_what_is_in_the_place_of_a_checkpoint_is_refused(tmp_path: Path, saved: Path) -> None:
    refused(tmp_path / "nowhere.ckpt", "missing")
    refused(tmp_path, "directory")
    torch.save({"state_dict": {}, "digest": DIGEST}, saved)
    refused(saved, "earlier version of kd")
    saved.write_bytes(pickle.dumps({"state_dict": {}}))
    refused(saved, "truncated")
    for content in ([1], {"state_dict": 3}, {"model": {}}, torch.zeros(2)):
        refused(sealed(content, saved), "not a checkpoint of this program")
    refused(sealed({"state_dict": {}, "digest": "ba9876543210"}, saved), "of the run ba9876543210")
    refused(sealed({"state_dict": {}}, saved), "of the run None")


def test_a_draft_is_not_written_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / f"last.ckpt.{socket.gethostname()}.{os.getpid()}.part").symlink_to(victim)
    AtomicCheckpointIO(DIGEST).save_checkpoint({"state_dict": {}}, tmp_path / "last.ckpt")
    assert victim.read_text() == "precious"


def test_a_folder_that_cannot_be_written_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to") as caught:
        AtomicCheckpointIO(DIGEST).save_checkpoint({"state_dict": {}}, tmp_path / "file" / "last.ckpt")
    assert caught.value.key == "paths.runs"


# Of a run


@pytest.fixture(scope="module")
def stopped(small: Small, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Engine]:
    """A run that was stopped in its second epoch, and its engine."""
    run = planned(small("method=finetune", "teacher=[]", f"paths.runs={tmp_path_factory.mktemp('stopped')}"))
    with pytest.MonkeyPatch.context() as patch:
        broken_off(run, 8, patch)
    task = build_examples(run).task
    return run, build_engine(run, build_models(run, task), task)


@pytest.fixture
def begun(stopped: tuple[Run, Engine], tmp_path: Path) -> tuple[Run, Engine]:
    """The stopped run in a folder that may be spoilt."""
    run, engine = stopped
    copied = replace(run, directory=tmp_path / run.name)
    shutil.copytree(run.directory, copied.directory)
    return copied, engine


def rewritten(path: Path, change: Callable[[dict], object]) -> None:
    """Change what a checkpoint holds, and give it the checksum that fits."""
    found = torch.load(path, weights_only=True)
    change(found)
    AtomicCheckpointIO(found["digest"]).save_checkpoint(found, path)


def test_a_run_goes_on_from_a_whole_checkpoint(begun: tuple[Run, Engine]) -> None:
    run, engine = begun
    assert last_step(run, engine) == 6
    (run.checkpoints / "last.ckpt").unlink()
    assert last_step(run, engine) is None


CHANGES: dict[str, Callable[[dict], object]] = {
    **{f"no {name}": lambda found, name=name: found.pop(name) for name in (*STATE, "optimizer_states")},  # type: ignore[misc]
    "a tensor is missing": lambda found: found["state_dict"].popitem(),
    "a tensor too many": lambda found: found["state_dict"].update(more=torch.zeros(2)),
    "another name": lambda found: found["state_dict"].update({"x": found["state_dict"].popitem()[1]}),
    "another shape": lambda found: found["state_dict"].update({"student.model.classifier.bias": torch.zeros(5)}),
    "no tensor": lambda found: found["state_dict"].update({"student.model.classifier.bias": "0"}),
    "another optimiser": lambda found: found["optimizer_states"][0]["param_groups"].pop(),
    "no optimiser": lambda found: found.update(optimizer_states=[]),
    "an optimiser that is none": lambda found: found.update(optimizer_states=[3]),
    **{f"{name} is a text": lambda found, name=name: found.update({name: "x"}) for name in ENTRY_TYPES},  # type: ignore[misc]
    "a state that is none": lambda found: found.update(callbacks={"x": 3}),
    "a path that is none": lambda found: found.update(callbacks={"x": {"best_model_path": 3}}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_that_training_cannot_go_on_from_is_refused_before_it_begins(
    begun: tuple[Run, Engine], change: str
) -> None:
    run, engine = begun
    rewritten(run.checkpoints / "last.ckpt", CHANGES[change])
    with pytest.raises(InputError, match="resume=false") as caught:
        last_step(run, engine)
    assert str(run.checkpoints / "last.ckpt") in caught.value.message


COSTS = [{}, {"starts": "1", "caches": {}}, {"starts": 1, "caches": []}, {"starts": 1, "caches": {"minilm": 3}}]
COSTS += [{"starts": 1, "caches": {"minilm": {"seconds": "long"}}}, {"starts": 1, "caches": {"minilm": {"written": 3}}}]


@pytest.mark.parametrize("costs", COSTS, ids=str)
def test_costs_that_are_none_are_told_and_not_counted(
    begun: tuple[Run, Engine], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, costs: dict
) -> None:
    run, engine = begun
    path = run.checkpoints / "costs.json"
    monkeypatch.setattr(engine, "work_of_teachers", lambda: {"minilm": {"passes": 1, "examples": 2}})
    monkeypatch.setattr(engine, "teachers", [])
    for write in (write_record, lambda path, record: path.write_text(json.dumps(record))):
        write(path, costs)
        assert count_fills(run, engine, {}) == (1, {})
        assert "costs.json' is damaged" in capsys.readouterr().out
        assert count_fills(run, engine, {}) == (2, {})
        assert "damaged" not in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["missing", "flipped", "of another model"])
def test_a_best_checkpoint_that_is_missing_or_damaged_is_told_at_once_and_at_the_end(
    begun: tuple[Run, Engine], damage: str
) -> None:
    run, engine = begun
    best = run.checkpoints / "best.ckpt"
    if damage == "missing":
        best.unlink()
    elif damage == "flipped":
        content = bytearray(best.read_bytes())
        content[len(content) // 2] ^= 4
        best.write_bytes(content)
    else:
        rewritten(best, CHANGES["a tensor is missing"])
    for read in (last_step, select):
        with pytest.raises(InputError, match="resume=false") as caught:
            read(run, engine)
        assert str(best) in caught.value.message
    last = replace(run, spec=replace(run.spec, trainer=replace(run.spec.trainer, selection="last")))
    assert last_step(last, engine) == 6  # it has no use for the best one


def test_a_folder_in_the_place_of_a_file_is_told_before_training(begun: tuple[Run, Engine]) -> None:
    run, _ = begun
    for name in ("checkpoints/last.ckpt", "checkpoints/best.ckpt", "metrics.csv", "config.yaml", "result.json"):
        (run.directory / name).unlink(missing_ok=True)
        (run.directory / name).mkdir()
        with pytest.raises(InputError, match="is a folder") as caught:
            run.begin(resume=True)
        assert caught.value.key == "paths.runs"
        (run.directory / name).rmdir()


# What a finished run has exported


@pytest.fixture(scope="module")
def finished(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that was made by a person whose files are for a group."""
    run = planned(small("method=finetune", "teacher=[]", f"paths.runs={tmp_path_factory.mktemp('finished')}"))
    before = os.umask(0o027)
    try:
        execute.execute(run)
    finally:
        os.umask(before)
    return run


@pytest.fixture
def done(finished: Run, tmp_path: Path) -> Run:
    """The finished run in a folder that may be spoilt."""
    shutil.copytree(finished.directory, tmp_path / finished.name)
    return replace(finished, directory=tmp_path / finished.name)


def contents(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of a folder's files."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_every_file_that_a_run_leaves_honours_the_umask(finished: Run) -> None:
    files = [file for file in finished.directory.parent.rglob("*") if file.is_file()]
    assert {"model.safetensors", "result.json", "last.ckpt", "best.ckpt", "metrics.csv"} <= {file.name for file in files}
    assert {f"{file.name} {file.stat().st_mode & 0o777:o}" for file in files if file.stat().st_mode & 0o777 != 0o640} == set()


def test_the_record_knows_every_exported_file(finished: Run) -> None:
    record = finished.result
    assert record is not None
    names = {f"student/{file.name}" for file in finished.student.iterdir() if file.name != "README.md"}
    assert set(record["files"]) == names
    assert finished.damage(record, thorough=True) is None


def test_an_export_that_is_gone_or_damaged_is_written_again(done: Run, capsys: pytest.CaptureFixture[str]) -> None:
    record, whole = done.result, contents(done.student)
    weights = done.student / "model.safetensors"

    def spoil(kind: str) -> None:
        if kind in ("gone", "a file"):
            shutil.rmtree(done.student)
        if kind == "a file":
            done.student.write_text("")
        if kind == "truncated":
            weights.write_bytes(whole[weights.name][:-9])
        if kind == "no tokenizer":
            (done.student / "tokenizer.json").unlink()

    for kind in ("gone", "a file", "truncated", "no tokenizer"):
        spoil(kind)
        assert execute.execute(done) == record
        assert contents(done.student) == whole, kind
    assert capsys.readouterr().out.count("it is exported again") == 4


def test_weights_that_a_run_begins_from_are_compared_byte_by_byte(done: Run) -> None:
    record, whole = done.result, contents(done.student)
    assert record is not None
    weights = done.student / "model.safetensors"
    weights.write_bytes(whole[weights.name][:-1] + b"?")
    assert done.damage(record) is None
    assert "model.safetensors is damaged" in str(done.damage(record, thorough=True))
    execute.execute(done, first=False)
    assert contents(done.student) == whole


def test_an_export_that_cannot_be_written_again_says_what_to_do(done: Run) -> None:
    shutil.rmtree(done.student)
    best = done.checkpoints / "best.ckpt"
    kept = best.read_bytes()
    best.unlink()
    with pytest.raises(InputError, match="resume=false") as caught:
        execute.execute(done)
    assert str(best) in caught.value.message
    best.write_bytes(kept[:-1] + b"?")
    with pytest.raises(InputError, match="resume=false"):
        execute.execute(done)
    again = execute.execute(replace(done, spec=replace(done.spec, resume=False)))
    assert again["metrics"]
    assert done.damage(again, thorough=True) is None


def test_weights_that_are_not_those_of_the_record_are_told(done: Run) -> None:
    record = done.result
    assert record is not None
    record["files"]["student/model.safetensors"]["digest"] = "0" * 16
    done.finish(record)
    with pytest.raises(InputError, match=r"differs from its digest in result\.json"):
        execute.execute(done, first=False)


def test_an_old_record_without_digests_still_holds(done: Run) -> None:
    record = done.result
    assert record is not None
    done.finish({name: value for name, value in record.items() if name not in ("files", "origin", "resumed")})
    assert execute.execute(done).get("files") is None
    shutil.rmtree(done.student)
    assert execute.execute(done)["files"] == record["files"]


def test_a_record_that_is_damaged_is_written_again_without_training(done: Run, capsys: pytest.CaptureFixture[str]) -> None:
    record = done.result
    assert record is not None
    (done.directory / "result.json").write_text('{"digest": "')
    again = execute.execute(done)
    assert "its result.json is damaged" in capsys.readouterr().out
    assert again["resumed"] == {"starts": 2, "from_steps": [12]}
    same = ("metrics", "selection", "files", "parameters", "family")
    assert {name: again[name] for name in same} == {name: record[name] for name in same}
    assert again["seconds"]["train"] == pytest.approx(record["seconds"]["train"], abs=1)


@pytest.mark.parametrize("place", ["", "student"])
def test_a_finished_run_that_is_given_as_a_source_is_checked(small: Small, done: Run, place: str) -> None:
    given = ["teacher=[hub]", f"teacher.hub.model={done.directory / place}", "method=kd"]
    planned(small(*given))
    weights = done.student / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match=r"not as it was written: student/model.safetensors is damaged") as caught:
        planned(small(*given))
    assert caught.value.key == "teacher.hub.model"
    shutil.copytree(done.student, done.directory / "changed on purpose")
    planned(small("teacher=[hub]", f"teacher.hub.model={done.directory / 'changed on purpose'}", "method=kd"))


def test_a_record_cannot_name_a_folder_outside_its_run(done: Run, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("")
    record = done.result
    assert record is not None
    record["students"]["student"]["folder"] = "../victim"
    done.finish(record)
    shutil.rmtree(done.student)
    execute.execute(done)
    assert [path.name for path in victim.iterdir()] == ["precious"]


@pytest.mark.parametrize(("device", "ranks", "asked"), [("cpu", 2, 16), ("cuda", 1, 16), ("cuda", 2, 16 // LATEST)])
def test_ranks_with_accelerators_agree_on_the_time_once_in_a_few_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, ranks: int, asked: int
) -> None:
    asking = []
    strategy = SimpleNamespace(root_device=torch.device(device), broadcast=lambda due: asking.append(due))
    monkeypatch.setattr(distributed, "world", lambda: ranks)
    callback = EveryFewMinutes(tmp_path, minutes=5)
    for step in range(1, 17):
        trainer = SimpleNamespace(is_last_batch=False, accumulate_grad_batches=1, global_step=step, strategy=strategy)
        callback.on_train_batch_end(trainer, None, None, None, step - 1)  # type: ignore[arg-type]
    assert asking == [False] * asked
