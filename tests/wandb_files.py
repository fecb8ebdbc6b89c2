"""Files that wandb writes, `run-<id>.wandb`, read back: what a run has logged, offline or online.

A file begins with 7 bytes, `:W&B`, a magic number and a version. A log in the format of LevelDB follows, in blocks of 32 KiB:
pieces of records, each behind 7 bytes, the CRC-32 of its type and content, its length and its type (1 a whole record, 2 the
first piece of one, 3 one in the middle, 4 the last). Where less than 7 bytes of a block are left they are padding. A record is
a message `Record` of wandb's protocol.
"""

import json
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HEADER = b":W&B\xe1\xbe\x00"
BLOCK = 32 * 1024
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class WandbRun:
    """The content of a file; `metrics` are their definitions: name or pattern -> name of the step."""

    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, str] = field(default_factory=dict)
    artifacts: dict[str, list[str]] = field(default_factory=dict)
    exit_code: int | None = None


def pieces(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and content of each piece."""
    assert content[: len(HEADER)] == HEADER
    place = len(HEADER)
    while place < len(content):
        left = BLOCK - place % BLOCK
        if left < 7:
            assert not any(content[place : place + left])
            place += left
            continue
        check, length, kind = struct.unpack("<IHB", content[place : place + 7])
        piece = content[place + 7 : place + 7 + length]
        assert zlib.crc32(bytes([kind]) + piece) == check, f"a damaged piece at byte {place}"
        yield kind, piece
        place += 7 + length


def records(content: bytes) -> Iterator[bytes]:
    """Content of each record."""
    begun: list[bytes] | None = None
    for kind, piece in pieces(content):
        assert (kind in (MIDDLE, LAST)) == (begun is not None), "a piece of no record"
        begun = [*(begun or []), piece]
        if kind in (WHOLE, LAST):
            yield b"".join(begun)
            begun = None
    assert begun is None, "a record without an end"


def lay_over(values: dict[str, Any], updates: Iterable[Any]) -> None:
    """Set values of an update, whose keys are nested or not."""
    for update in updates:
        *path, last = list(update.nested_key) or [update.key]
        inner = values
        for name in path:
            inner = inner.setdefault(name, {})
        inner[last] = json.loads(update.value_json)


def read(path: Path) -> WandbRun:
    """Return what a file says of its run."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = WandbRun()
    for content in records(path.read_bytes()):
        record = Record()
        record.ParseFromString(content)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
            lay_over(found.config, record.run.config.update)
        elif kind in ("config", "summary"):
            lay_over(getattr(found, kind), getattr(record, kind).update)
        elif kind == "history":
            row: dict[str, Any] = {}
            lay_over(row, record.history.item)
            found.history.append(row)
        elif kind == "metric":
            found.metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "artifact":
            found.artifacts[record.artifact.name] = sorted(entry.path for entry in record.artifact.manifest.contents)
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found


def runs_in(folder: Path) -> list[WandbRun]:
    """The runs that were logged offline in a run's folder, oldest first."""
    return [read(path) for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"))]


def without_account(folder: Path) -> dict[str, str]:
    """Variables of the environment with which wandb finds no account, and writes what is not the run's into this folder."""
    places = dict.fromkeys(("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"), str(folder))
    return {**places, "NETRC": str(folder / "none"), "WANDB_SILENT": "true", "WANDB_API_KEY": ""}
