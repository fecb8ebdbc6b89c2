"""Where models come from: `hf:<hub id>[@revision]`, `package:<module>/<folder>`, or a path.

A source is turned into something `from_pretrained` takes, and into a fingerprint that enters a run's digest: the same
words must never stand for other weights.
"""

import hashlib
import importlib.util
from functools import lru_cache
from importlib import metadata
from pathlib import Path

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
    if spec is None or not spec.submodule_search_locations:
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
    if not (path / "config.json").is_file():
        raise InputError(
            f"'{source}' holds no model: there is no config.json in {path}. "
            "A source is hf:<hub id>, package:<module>/<folder>, or a folder",
            key,
        )
    return path


def pretrained(source: str, key: str) -> tuple[str, dict[str, str]]:
    """What to pass to `from_pretrained`: the name or folder, and keyword arguments."""
    path = _local(source, key)
    if path is not None:
        return str(path), {}
    name, _, revision = source.removeprefix("hf:").partition("@")
    return name, {"revision": revision} if revision else {}


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
