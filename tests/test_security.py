"""Data are never executed: tests with a file of every kind that the program reads, which creates a folder if executed."""

import hashlib
import io
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from kd import train
from kd.data.tokenized import CHECKSUM, read_arrays
from kd.errors import InputError
from kd.models.pretrained import load_config, load_model, load_tokenizer
from kd.report import load_results
from kd.system.model_sources import pretrained
from kd.system.packages import package_folder
from kd.teacher_cache.store import TensorStore
from kd.training import execute
from kd.training.checkpoints import AtomicCheckpointIO, read_checkpoint, seal
from whole_runs import Small, broken_off, planned

DIGEST = "0123456789ab"


class Payload:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """Return the path of the folder that a payload creates."""
    return tmp_path / "executed"


def test_the_payload_works(mark: Path) -> None:
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()


def as_pickle(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


def as_archive(content: object, path: Path) -> None:
    torch.save(content, path)


def as_old_file(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def as_sealed_archive(content: object, path: Path) -> None:
    with path.open("w+b") as file:
        torch.save(content, file)
        seal(file)


FORMS = (as_pickle, as_archive, as_old_file, as_sealed_archive)


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_is_not_executed(tmp_path: Path, mark: Path, form: Callable[[object, Path], None]) -> None:
    path = tmp_path / "last.ckpt"
    form({"state_dict": {}, "digest": DIGEST, "callbacks": Payload(mark)}, path)
    with pytest.raises(InputError, match="resume=false"):
        read_checkpoint(path, DIGEST)
    with pytest.raises(InputError, match="resume=false"):
        AtomicCheckpointIO(DIGEST).load_checkpoint(path, weights_only=False)
    assert not mark.exists()


# Model folders


def changed(file: str, **values: object) -> Callable[[Path, Path], None]:
    """Lay values over a JSON file of a model's folder, beside Python that leaves the mark."""

    def change(folder: Path, mark: Path) -> None:
        (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **values}))
        (folder / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Evil: pass\n")

    return change


def pickled(form: Callable[[object, Path], None], beside: bool = False) -> Callable[[Path, Path], None]:
    """Weights as a pickle, in place of safetensors or beside them."""

    def change(folder: Path, mark: Path) -> None:
        if not beside:
            (folder / "model.safetensors").unlink()
        form({"weight": Payload(mark)}, folder / "pytorch_model.bin")

    return change


CODE = {
    "AutoConfig": "evil.Evil",
    "AutoModelForSequenceClassification": "evil.Evil",
    "AutoTokenizer": ["evil.Evil", "evil.Evil"],
}
FOLDERS = {
    **{f"weights {form.__name__}": pickled(form) for form in FORMS},
    "pickled weights beside others": pickled(as_pickle, beside=True),
    "a model's own code": changed("config.json", auto_map=CODE),
    "own code of a type that nobody knows": changed("config.json", auto_map=CODE, model_type="evil"),
    "a tokenizer's own code": changed("tokenizer_config.json", auto_map=CODE, tokenizer_class="Evil"),
    "a kernel from the hub": changed("config.json", attn_implementation="evil/kernel", _attn_implementation="evil/kernel"),
    "an object to make": changed("config.json", _target_="os.mkdir", dtype={"_target_": "os.mkdir"}),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_model_folder_is_not_executed(backbone: Path, tmp_path: Path, mark: Path, kind: str) -> None:
    folder = shutil.copytree(backbone, tmp_path / "model")
    FOLDERS[kind](folder, mark)
    loaders = (load_config, load_tokenizer, lambda source, key: load_model(source, key, load_config(source, key)))
    refused = 0
    for load in loaders:
        try:
            load(str(folder), "teacher.x.model")
        except InputError:
            refused += 1
    assert not mark.exists()
    assert refused or not kind.startswith("weights"), "pickled weights are refused, or there were none to test with"


# Stored arrays


def test_stored_tokens_are_not_executed(tmp_path: Path, mark: Path) -> None:
    body = io.BytesIO()
    np.savez(body, input_ids=np.array([Payload(mark)], dtype=object))
    path = tmp_path / "x.npz"
    for content in (body.getvalue(), pickle.dumps(Payload(mark)), b"\x93NUMPY", b""):
        path.write_bytes(content + hashlib.blake2b(content, digest_size=CHECKSUM).digest())
        assert read_arrays(path) is None
    assert not mark.exists()


@pytest.mark.parametrize(
    "entry",
    [
        {"shown": "float32"},
        {"shown": "hub"},
        {"shown": ["float32"]},
        {"shape": [2, 3], "stored": "load"},
        {"_target_": "os.mkdir"},
        [1],
    ],
)
@pytest.mark.parametrize("kind", ["pickle", "objects", "three axes", "another type"])
def test_a_cache_that_is_foreign_is_damaged(tmp_path: Path, mark: Path, entry: object, kind: str) -> None:
    store = TensorStore(tmp_path, np.array([0, 2, 4]))
    path = tmp_path / "logits.npy"
    if kind == "pickle":
        as_pickle(Payload(mark), path)
    else:
        arrays = {"objects": np.array([[Payload(mark)]] * 2, object), "three axes": np.zeros((2, 3, 1), np.float32)}
        np.save(path, arrays.get(kind, np.zeros((2, 3), np.int64)))
    if isinstance(entry, dict):  # its checksum is that of the file: the file itself has to be refused
        entry = {**entry, "checksum": hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()}
    (tmp_path / "logits.json").write_text(json.dumps(entry))
    assert store.damaged(["logits"]) == ["logits"]
    assert store.entry("logits") is None
    assert not mark.exists()


@pytest.mark.parametrize("shown", ["hub", ["float32"], None])
def test_a_cache_with_another_description_is_damaged(tmp_path: Path, shown: object) -> None:
    store = TensorStore(tmp_path, np.array([0, 2, 4]))
    np.save(tmp_path / "logits.npy", np.zeros((2, 3), np.float32))
    checksum = hashlib.blake2b((tmp_path / "logits.npy").read_bytes(), digest_size=16).hexdigest()
    for damaged, name in ((["logits"], shown), ([], "float32")):
        (tmp_path / "logits.json").write_text(json.dumps({"shown": name, "checksum": checksum}))
        assert store.damaged(["logits"]) == damaged


# A folder of runs


def test_a_run_goes_on_in_a_folder_of_runs_from_somebody_else(
    small: Small, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = planned(small("method=finetune", "teacher=[]", f"paths.runs={tmp_path / 'runs'}"))
    broken_off(run, 8, monkeypatch)
    folder = run.directory
    node = {"_target_": "os.mkdir", "_args_": [str(mark)], "digest": run.digest}
    code = f"import os\nos.mkdir({str(mark)!r})\n"
    (folder / "config.yaml").write_text(f"a: !!python/object/apply:os.mkdir [{mark}]\n{OmegaConf.to_yaml(node)}")
    as_pickle(Payload(mark), folder / "metrics.csv")
    as_pickle(Payload(mark), folder / "checkpoints" / "costs.json")
    for name in ("result.json", "student/config.json", "cache/train-0/about.json", "cache/latency.json", ".hydra/config.yaml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(node))
    for tokens in (tmp_path / "runs" / ".tokens").iterdir():
        as_pickle(Payload(mark), tokens)
    for name in (
        "hydra_plugins/evil.py",
        "wandb/__init__.py",
        "sitecustomize.py",
        "conf/method/finetune.yaml",
        "kd/__init__.py",
    ):
        (tmp_path / "runs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / name).write_text(code)
    # In a SLURM job Lightning looks for a checkpoint of its own making in the folder it calls the root: by default this one.
    as_archive({"state_dict": {}, "x": Payload(mark)}, tmp_path / "runs" / "hpc_ckpt_1.ckpt")
    as_archive({"state_dict": {}, "x": Payload(mark)}, folder / "hpc_ckpt_1.ckpt")
    monkeypatch.chdir(tmp_path / "runs")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_JOB_NAME", "job")
    assert load_results(tmp_path / "runs") == []
    assert execute.execute(run)["resumed"]["from_steps"] == [6]
    assert not mark.exists()
    # With nothing of its own to go on from, the run refuses what Lightning finds.
    begun = replace(run, spec=replace(run.spec, resume=False))
    (folder / "result.json").unlink()
    with pytest.raises(InputError, match="hpc_ckpt_1"):
        execute.execute(begun)
    assert not mark.exists()


# The working folder


def test_python_m_does_not_take_folders_of_the_working_folder_for_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path, str(tmp_path / "given")])
    train.leave_out_working_folder()
    assert str(tmp_path) not in sys.path
    assert str(tmp_path / "given") in sys.path
    root = Path(train.__file__).parent.parent
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "path", [str(root), *sys.path])
    train.leave_out_working_folder()
    assert sys.path[0] == str(root), "the checkout itself"


def test_a_folder_is_no_package_and_not_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_models" / "model").mkdir(parents=True)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="not installed"):
        package_folder("some_models", "backbone")
    with pytest.raises(InputError, match="meant to come from the hub") as caught:
        pretrained("hf:owner/name@main", "backbone")
    assert caught.value.key == "backbone"
