"""A file, or a folder of shards: files of one format, which are read in the order of their names as one file."""

import hashlib
from pathlib import Path

from kd.data.readers import check_file
from kd.errors import InputError
from kd.system.model_sources import file_fingerprint

HIDDEN = (".", "_")
"""First letters of the names of files that are no shards, as Spark and pyarrow have it: `_SUCCESS`, `.part.crc`."""

DESCRIPTIONS = ("dataset_info.json", "state.json")
"""Names of files that `datasets` writes beside its shards."""


def shards_of(path: Path, key: str | None, *, any_suffix: bool = False) -> list[Path]:
    """Return the files to read: the one given, or those of a folder by their names.

    Args:
        path: a file or a folder.
        key: the configuration key that an error names.
        any_suffix: whether the files of a folder may have several suffixes, because the configuration names their format.

    Raises:
        InputError: for a file that cannot be read, or a folder that has no files, further folders, or files of several formats.
    """
    try:
        is_folder = path.is_dir()
        files = [file for file in sorted(path.iterdir()) if not file.name.startswith(HIDDEN)] if is_folder else [path]
    except (OSError, ValueError) as error:
        raise InputError(f"the folder '{path}' cannot be read ({getattr(error, 'strerror', None) or error})", key) from error
    if not is_folder:
        check_file(path, key)
        return files
    files = [file for file in files if file.name not in DESCRIPTIONS]
    if inner := [file for file in files if file.is_dir()]:
        raise InputError(
            f"the folder '{path}' has a folder in it, '{inner[0].name}'; shards lie in one folder. Give a file, or a folder of "
            f"shards, or one for each class: '{key}={{pos: pos, neg: neg}}'",
            key,
        )
    if not files:
        raise InputError(f"the folder '{path}' has no files; hidden ones, as {' '.join(HIDDEN)}*, are left out", key)
    for file in files:
        check_file(file, key)
    first = files[0]
    other = next((file for file in files if file.suffix.lower() != first.suffix.lower()), None)
    if other is not None and not any_suffix:
        raise InputError(
            f"the folder '{path}' has files of several formats, '{first.name}' and '{other.name}'; its shards have one suffix",
            key,
        )
    return files


def data_fingerprint(path: Path, key: str | None, *, any_suffix: bool = False) -> str:
    """Return a digest of the bytes of a file, or of all shards of a folder in their order; arguments as for `shards_of`.

    Raises:
        InputError: as `shards_of`.
    """
    files = shards_of(path, key, any_suffix=any_suffix)
    if files == [path]:
        return file_fingerprint(path)
    digests = "".join(f"{file_fingerprint(file)};" for file in files)
    return "shards:" + hashlib.blake2b(digests.encode(), digest_size=8).hexdigest()
