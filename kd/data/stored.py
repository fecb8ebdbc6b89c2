"""Folders of arrays on disk that need not fit into memory: written once, complete or not there, and read where it is needed."""

import contextlib
import json
import os
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kd.system.files import checksum_of, remove, write_text

ABOUT = "about.json"
"""File that is written last: a folder without it is not complete. It has the size and a checksum of every other file."""


class StoredBytes:
    """A file that is read at any position; threads, and processes that are forked from this one, can share it.

    It is no memory map: what was read does not count as memory of this process.

    Args:
        path: path of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("rb", buffering=0)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]

    def read(self, start: int, size: int) -> bytes:
        """Return so many bytes from a position on.

        Raises:
            OSError: if the file cannot be read, or ends before.
        """
        content = os.pread(self.file.fileno(), size, start)
        while len(content) < size:
            more = os.pread(self.file.fileno(), size - len(content), start + len(content))
            if not more:
                raise OSError(f"'{self.path}' ends after {start + len(content)} bytes, of which {start + size} are read")
            content += more
        return content


def describe(folder: Path, names: Iterable[str], facts: dict[str, Any]) -> None:
    """Declare a folder complete: write `about.json` with these facts, and the checksums by which a later reader finds damage.

    Raises:
        OSError: if it cannot be written.
    """
    files = {}
    for name in names:
        files[name] = {"bytes": (folder / name).stat().st_size, "checksum": checksum_of(folder / name)}
    write_text(folder / ABOUT, json.dumps({**facts, "files": files}) + "\n")


def description(folder: Path, *, thorough: bool = True) -> dict[str, Any] | None:
    """Return the facts about a complete folder, and `files`, sizes and checksums by name.

    Args:
        folder: the folder.
        thorough: whether to compare checksums too, which reads every byte.

    Returns:
        The facts; None if the folder is not complete, or a file in it is damaged.
    """
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        for name, file in about["files"].items():
            path = folder / Path(name).name
            if path.stat().st_size != file["bytes"] or (thorough and checksum_of(path) != file["checksum"]):
                return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # missing, or of another program
        return None
    return dict(about)


def empty(folder: Path, but: Iterable[str] = ()) -> None:
    """Remove everything in a folder but these names, `about.json` first.

    Raises:
        OSError: if something cannot be removed.
    """
    (folder / ABOUT).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.name not in but:
            remove(path)


def remove_with(owner: object, folder: Path) -> None:
    """Remove a temporary folder when an object of this process is collected, or when the process ends."""
    weakref.finalize(owner, _remove_own, folder, os.getpid())


def _remove_own(folder: Path, process: int) -> None:
    """Remove a folder, unless this is a fork of the process that made it."""
    if os.getpid() == process:
        with contextlib.suppress(OSError):
            remove(folder)
