"""Sources of models: `hf:<hub id>[@revision]`, `package:<module>/<folder>`, `zip:<package>/<file>@<sha256>`, or a path.

A source is resolved to arguments of `from_pretrained`, and to a fingerprint that enters a run's digest, because the same
source may later refer to other weights.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from kd.errors import InputError
from kd.system import archives
from kd.system.distributed import print_rank_zero
from kd.system.files import locked, remove, write_text
from kd.system.packages import package_folder, package_version, pip_install


@lru_cache(maxsize=4096)
def _digest(path: str, size: int, modified: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:16]


def file_fingerprint(path: Path) -> str:
    """Return a digest of a file's bytes."""
    status = path.stat()
    return _digest(str(path), status.st_size, status.st_mtime_ns)


def recorded_files(directory: Path, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Return size and digest of some files, and of those in some folders, by path in a run's directory.

    Files that end in `.md` or `.yaml`, the model card and results for the hub, which users edit, are left out.
    """
    return {
        file.relative_to(directory).as_posix(): {"bytes": file.stat().st_size, "digest": file_fingerprint(file)}
        for path in paths
        for file in ([path] if path.is_file() else sorted(path.rglob("*")))
        if file.is_file() and file.suffix not in (".md", ".yaml")
    }


def damaged_file(directory: Path, files: object, *, thorough: bool, record: str = "result.json") -> str | None:
    """Return a description of the first recorded file that is missing or has changed; None if all are intact.

    Args:
        directory: directory of the run.
        files: records as returned by `recorded_files`; entries that a record lacks are not compared.
        thorough: whether to compare digests as well as sizes.
        record: name of the file that holds the records, for the description.
    """
    if not isinstance(files, Mapping) or not all(isinstance(recorded, Mapping) for recorded in files.values()):
        return f"{record} does not list its exported files"
    for name, recorded in files.items():
        path = directory / name
        try:
            if path.stat().st_size != recorded.get("bytes", path.stat().st_size) or not path.is_file():
                return f"{name} has another size than recorded in {record}"
            if thorough and "digest" in recorded and file_fingerprint(path) != recorded["digest"]:
                return f"{name} is damaged: its digest is not the one in {record}"
        except (OSError, ValueError):
            return f"{name} is missing"
    return None


def _check_export(folder: Path, source: str, key: str) -> None:
    """Check that a source that a finished run has exported, `student` or one of `peers`, is unchanged.

    Raises:
        InputError: if a file is missing or has changed since the run wrote it.
    """
    directory = folder.parent.parent if folder.parent.name == "peers" else folder.parent
    try:
        result = json.loads((directory / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # not the record of a run
    files = result.get("files") if isinstance(result, dict) else None
    if not isinstance(files, dict):
        return  # an older record, without digests
    own = kept_file(folder)
    in_folder = {
        name: record for name, record in files.items() if own == directory / name or folder == (directory / name).parent
    }
    if why := damaged_file(directory, in_folder, thorough=True):
        keep = result.get("keep")
        if keep == "figures":
            raise InputError(
                f"'{source}' is a finished run without a model, which trainer.keep=figures has let go: {why}. Remove its "
                "result.json, and the command that made it trains it again, with trainer.keep=student",
                key,
            )
        cure = "makes it again, with resume=false" if keep == "student" else "exports it again"
        raise InputError(
            f"'{source}' is a finished run whose model is not as it was written: {why}. The command that made it {cure}; a "
            "changed model can be used from a folder of its own, without the result.json",
            key,
        )


def kept_file(folder: Path) -> Path:
    """Return the path of what the method of an exported student kept for later runs (`kd.methods.base.Method.keeps`).

    >>> kept_file(Path("run/student")).as_posix(), kept_file(Path("run/peers/s1")).as_posix()
    ('run/method.safetensors', 'run/peers/s1.method.safetensors')
    """
    return folder.with_name("method.safetensors" if folder.name == "student" else f"{folder.name}.method.safetensors")


def kept_beside(source: str, key: str) -> Path | None:
    """Return the file with what the method of a model's run kept; None if the source has none, as packages and the hub.

    Raises:
        InputError: if the source is a folder that is missing or holds no model.
    """
    folder = None if source.startswith(("package:", archives.PREFIX)) else _local(source, key)
    return None if folder is None or not kept_file(folder).is_file() else kept_file(folder)


def _local(source: str, key: str) -> Path | None:
    """Return the folder of a local source; None for a source on the hub.

    Raises:
        InputError: if the folder is missing or holds no model.
    """
    if source.startswith("hf:"):
        return None
    if source.startswith("package:"):
        module, _, folder = source.removeprefix("package:").partition("/")
        path = package_folder(module, key) / folder
    elif source.startswith(archives.PREFIX):
        path = _unpacked(source, key)
    else:
        path = Path(source).expanduser()
        if (path / "result.json").is_file():  # the directory of a finished run: its exported student is meant
            path = path / "student"
        _check_export(path, source, key)
    if not (path / "config.json").is_file():
        raise InputError(
            f"'{source}' holds no model: there is no config.json in {path}. "
            f"A source is hf:<hub id>, package:<module>/<folder>, {archives.FORM}, or a folder",
            key,
        )
    return path


RECORD = "files.json"
"""Name of the file with the digests of what was unpacked, beside the folder `files`."""


def _unpacked(source: str, key: str) -> Path:
    """Return the folder with the model of a zip source; what its packages ship is unpacked at the first use.

    A copy that is not as it was unpacked is made again. An intact one is used also if the packages are gone.

    Raises:
        InputError: if it has to be unpacked, and a package is missing, a file is damaged, or the cache cannot be written to.
    """
    archive = archives.parsed(source, key)
    home = archives.cache_folder(archive.sha256, key)
    content, draft = home / "content", home / "content.part"
    if not _is_intact(content):
        with archives.writing_to_cache(home, key), tempfile.TemporaryFile(dir=home):
            pass
        with locked(home, f"'{source}' is being unpacked by another process; waiting", key):
            if not _is_intact(content):
                parts = archives.part_files(archive, source, key)
                print_rank_zero(f"unpacking {archives.archive_name(source)} to {content}, once")
                with archives.writing_to_cache(home, key):
                    remove(draft)
                    (draft / "files").mkdir(parents=True)
                    try:
                        cure = pip_install(archive.packages, "--force-reinstall")
                        archives.unpack(parts, archive.sha256, draft / "files", cure, key)
                        write_text(draft / RECORD, json.dumps(recorded_files(draft, [draft / "files"])))
                        remove(content)
                        os.replace(draft, content)
                    finally:
                        remove(draft)
    folders = [content / "files", *sorted((content / "files").iterdir())]
    return next((folder for folder in folders if (folder / "config.json").is_file()), folders[0])


def _is_intact(content: Path) -> bool:
    """Return whether an unpacked folder has the files that its record lists, and no others."""
    try:
        record = json.loads((content / RECORD).read_text(encoding="utf-8"))
        return bool(recorded_files(content, [content / "files"]) == record)
    except (OSError, ValueError, RecursionError):
        return False


def check_not_here(name: str, key: str) -> None:
    """Check that no file or folder in the working folder has the name of a model or data set on the hub.

    Raises:
        InputError: if there is one: the hub's libraries would read it instead.
    """
    if Path(name).exists():
        here = Path(name).absolute()
        raise InputError(f"'{name}' is meant to come from the hub, but '{here}' would be read in its place", key)


def pretrained(source: str, key: str) -> tuple[str, dict[str, str]]:
    """Return the arguments for `from_pretrained`: the name or folder, and keyword arguments."""
    path = _local(source, key)
    if path is not None:
        return str(path), {}
    name, _, revision = source.removeprefix("hf:").partition("@")
    check_not_here(name, key)
    return name, {"revision": revision} if revision else {}


def stated_depth(source: str, key: str) -> int | None:
    """Return the number of blocks that a source's `config.json` states; None if it states none, or is on the hub.

    Nothing is downloaded. What this machine happens to have of the hub is not read, so that a plan does not depend on it.

    Raises:
        InputError: if the source is a folder that is missing or holds no model.
    """
    path = _local(source, key)
    if path is None:
        return None
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # which the build reports
    stated = config.get("num_hidden_layers", config.get("n_layers")) if isinstance(config, dict) else None
    return stated if isinstance(stated, int) else None


def source_name(source: str) -> str:
    """Return a source as cards and records show it: as given, but of a path on this machine the last folder alone."""
    public = source.startswith(("hf:", "package:", archives.PREFIX))
    return source if public else Path(source).expanduser().resolve().name


def base_name(source: str) -> str:
    """Return a model's name for the metadata of a card, by its source as `source_name` shows it.

    >>> base_name("hf:owner/name@main"), base_name("package:some_models/small"), base_name("zip:a/b/model.zip@0a1b")
    ('owner/name', 'some_models', 'model')
    """
    if source.startswith("package:"):
        return source.removeprefix("package:").partition("/")[0]
    if source.startswith(archives.PREFIX):
        return archives.archive_name(source)
    return source.removeprefix("hf:").partition("@")[0]


def hub_commit(source: str) -> str | None:
    """Return the commit of a hub source in this machine's cache; None if it is not downloaded, or not a hub source."""
    if not source.startswith("hf:"):
        return None
    name, _, revision = source.removeprefix("hf:").partition("@")
    path = try_to_load_from_cache(name, "config.json", revision=revision or None)
    commit = Path(path).parent.name if isinstance(path, str) else ""
    return commit if re.fullmatch("[0-9a-f]{40}", commit) else None


def fingerprint(source: str, key: str) -> str:
    """Return an identifier of the weights of a source: a package's version, a zip file's digest, or that of a folder's files.

    For the hub it is the name and the revision as given: only `hf:<id>@<revision>` identifies the weights for certain.
    """
    path = _local(source, key)
    if path is None:
        return source
    if source.startswith(archives.PREFIX):
        return archives.PREFIX + archives.parsed(source, key).sha256
    if source.startswith("package:"):
        version = package_version(source.removeprefix("package:").partition("/")[0])
        if version != "unknown":
            return f"{source}=={version}"
    files = [file for file in path.iterdir() if file.is_file() and file.suffix != ".md" and not file.name.startswith(".")]
    if (kept := kept_file(path)).is_file():
        files.append(kept)
    digests = "".join(f"{file.name}={file_fingerprint(file)};" for file in sorted(files))
    return "files:" + hashlib.blake2b(digests.encode(), digest_size=8).hexdigest()
