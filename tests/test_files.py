"""Atomic writes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kd.system.files import ABANDONED, atomic_write, write_text


def draft(path: Path, process: int, host: str = "") -> Path:
    return path.with_name(f"{path.name}.{host or socket.gethostname()}.{process}.part")


def gone() -> int:
    """Return the number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_block_that_raises_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(TypeError), atomic_write(path) as file:
        file.write("half of the n") and file.write(3)  # type: ignore[arg-type]
    assert path.read_text() == "old"
    assert [left.name for left in tmp_path.iterdir()] == ["file"]


def test_the_file_is_as_readable_as_others(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_text(tmp_path / "atomic", "")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_drafts_of_dead_processes_are_removed_and_of_living_ones_kept(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    dead, living, elsewhere, long_ago = (
        draft(path, gone()),
        draft(path, os.getppid()),
        draft(path, 1, "elsewhere"),
        draft(path, 2, "elsewhere"),
    )
    beside = tmp_path / f"best.ckpt.{socket.gethostname()}.{gone()}.part"
    for file in (dead, living, elsewhere, long_ago, beside):
        file.write_text("half")
    age = long_ago.stat().st_mtime - ABANDONED - 60
    os.utime(long_ago, (age, age))
    write_text(path, "whole")
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in (path, living, elsewhere, beside)}


WRITER = """
import sys
from pathlib import Path
from kd.system.files import write_text
for _ in range(60):
    write_text(Path(sys.argv[1]), sys.argv[2] * 100_000)
"""


def test_two_writers_never_mix(tmp_path: Path) -> None:
    path = tmp_path / "file"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), letter]) for letter in "ab"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            text = path.read_text()
            assert text in ("a" * 100_000, "b" * 100_000)
            seen.add(text[0])
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen == {"a", "b"}
    assert [left.name for left in tmp_path.iterdir()] == ["file"]
