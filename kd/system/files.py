"""Atomic writes, locks on folders, and input errors for paths that cannot be written to."""

import contextlib
import errno
import glob
import hashlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from kd.errors import InputError, disk_is_full
from kd.system import distributed

ABANDONED = 24 * 3600
"""Age in seconds after which a draft of another machine counts as left behind. Our choice: longer than any write takes."""

CHECKSUM = 16
"""Number of bytes of the checksum of a file."""


@contextmanager
def atomic_write(path: Path, mode: str = "w", **options: Any) -> Iterator[IO[Any]]:
    """Open a draft beside a file; when the block ends, sync it to disk and rename it to the file.

    A block that raises, or a process that is killed, leaves the file as it was. Each process has a draft of its own, so that
    two that write the same file never mix their bytes. Drafts that killed processes left behind are removed.

    Args:
        path: the file; its folder has to exist.
        mode: `w` for text in UTF-8, `wb` for bytes; with `+` the draft can be read back.
        options: further arguments of `open`.

    Raises:
        OSError: if the file cannot be written.
    """
    draft = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    for other in path.parent.glob(f"{glob.escape(path.name)}.*.part"):
        if other == draft or is_abandoned(other):  # an existing draft may be a link, which would be written through
            other.unlink(missing_ok=True)
    if "b" not in mode:
        options.setdefault("encoding", "utf-8")
    try:
        with draft.open(mode.replace("w", "x"), **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically.

    Raises:
        OSError: if it cannot be written.
    """
    with atomic_write(path) as file:
        file.write(text)


def is_abandoned(draft: Path) -> bool:
    """Return whether the process that wrote a draft is gone; for another machine's, whether the draft is old."""
    host, _, number = draft.name.removesuffix(".part").rpartition(".")
    if not host.endswith(f".{socket.gethostname()}"):
        with contextlib.suppress(OSError):
            return time.time() - draft.lstat().st_mtime > ABANDONED
        return False
    try:
        os.kill(int(number), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return True
    except OSError:  # of another user
        return False
    return False


def check_writable(folder: Path | str, key: str = "paths.runs") -> None:
    """Check that a folder for runs can be written to; make it if it does not exist.

    Raises:
        InputError: if it cannot be made or written to.
    """
    folder = Path(folder).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make '{folder}': {error.strerror}", key) from error
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"cannot write to '{folder}': {error.strerror}", key) from error


NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
"""Errors on writing to another user's folder, to a read-only file system, or where a file is in place of a folder."""


@contextmanager
def writes_to(runs: str) -> Iterator[None]:
    """Turn an OSError about a path in the folder of runs that cannot be written to into an InputError.

    Args:
        runs: folder of runs.

    Raises:
        InputError: in place of an OSError of `NOT_WRITABLE`; others, such as a full disk, are raised as they are.
    """
    try:
        yield
    except OSError as error:
        inside = isinstance(error.filename, str) and Path(error.filename).is_relative_to(Path(runs).expanduser())
        if disk_is_full(error) or error.errno not in NOT_WRITABLE or not inside:
            raise
        raise InputError(f"cannot write to '{error.filename}': {error.strerror}", "paths.runs") from error


_stored: list[Path] = []
"""Folders that `made_by_success` removes if its block fails."""


@contextmanager
def made_by_success(folder: Path) -> Iterator[None]:
    """If the block raises an InputError, remove what it stored in a folder that was not there before (`note_stored`).

    The folder and those above it, if the block made them, are removed too, but only if they are empty: another process may have
    begun to use them.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    _stored.clear()
    try:
        yield
    except InputError:
        if missing and distributed.is_rank_zero():
            with contextlib.suppress(OSError):
                for path in _stored:
                    with locked_now(path) as free:  # else another process stores the same now
                        if free:
                            remove(path)
                for path in missing:
                    path.rmdir()
        raise


def note_stored(folder: Path) -> None:
    """Note that this process writes a folder which is stored for later, before it does; see `made_by_success`."""
    _stored.append(folder)


LOCK = ".lock"
"""Name of the file in a folder that locks it."""


@contextmanager
def locked(folder: Path, waiting: str, key: str | None = "paths.runs") -> Iterator[None]:
    """Lock a folder, which is made if it does not exist. The lock of a killed process is free.

    Args:
        folder: folder to lock.
        waiting: message to print if another process has locked it.
        key: key of the error; None if no key of a run names the folder.

    Raises:
        InputError: if the folder cannot be made or written to.
    """
    lock = FileLock(folder / LOCK)
    with writing(folder, key):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            distributed.print_rank_zero(waiting)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def is_locked(folder: Path) -> bool:
    """Return whether a process, this one included, has locked a folder with `locked`. The folder is not changed."""
    if not (folder / LOCK).is_file():
        return False
    with locked_now(folder) as free:
        return not free


@contextmanager
def locked_now(folder: Path) -> Iterator[bool]:
    """Lock a folder without waiting, as `locked` does.

    Args:
        folder: a folder that exists.

    Yields:
        True; False if another process has locked it, or this one may not.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


@contextmanager
def writing(path: Path, key: str | None = "paths.runs") -> Iterator[None]:
    """Turn an OSError on writing to a path into an InputError; that of a full disk is raised as it is.

    Args:
        path: path of the file or folder that is written.
        key: key of the error; None if no key of a run names the path.

    Raises:
        InputError: if the path cannot be written; the message names it.
    """
    try:
        yield
    except OSError as error:
        if disk_is_full(error):
            raise
        raise InputError(f"cannot write to '{path}': {error.strerror or error}", key) from error


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with its content, if it exists.

    Raises:
        OSError: if it cannot be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def checksum_of(path: Path) -> str:
    """Return a checksum of a file, 32 hexadecimal digits; it is read piece by piece.

    Raises:
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=CHECKSUM)).hexdigest()


def readable_size(size: float) -> str:
    """Return a number of bytes in words: `37.2 kB` below a megabyte, else `1,234.5 MB`."""
    return f"{size / 1e3:.1f} kB" if size < 1e6 else f"{size / 1e6:,.1f} MB"


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder; links are not followed. Nothing there is 0."""
    try:
        if path.is_dir() and not path.is_symlink():
            return sum(size_of(inner) for inner in path.iterdir())
        return path.lstat().st_size
    except OSError:  # removed by another process, or not readable
        return 0
