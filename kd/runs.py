"""A run: where it lives, whether it is done, who is at it."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from kd.errors import InputError
from kd.files import check_writable, locked, remove, write_text, writes_to, writing
from kd.schema import RunSpec
from kd.sources import damaged_file

RECORD: Mapping[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("metrics", "students", "seconds", "selection", "parameters", "megabytes", "latency_ms"), dict),
    **dict.fromkeys(("agreement", "metrics_teacher", "metrics_ensemble", "inputs", "versions"), dict),
    **dict.fromkeys(("method", "student", "task", "init", "headline", "precision"), str),
}
"""What other parts of the program read in the record of a finished run."""


@dataclass
class Run:
    """One run: what it is, where it lives, what it needs first.

    Attributes:
        config: as composed, for `config.yaml`.
        spec: the same, typed.
        digest: of everything that changes the result.
        directory: where it lives.
        inputs: role -> run; `teacher <name>`, `pilot <name>`, `stage`, `before`, or `surgery <name>`.
        digest_inputs: what the digest is of.
    """

    config: DictConfig
    spec: RunSpec
    digest: str
    directory: Path
    inputs: dict[str, "Run"] = field(default_factory=dict)
    digest_inputs: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the directory."""
        return self.directory.name

    @property
    def family(self) -> str:
        """Digest of everything but the seed: what runs that may be averaged have in common."""
        inputs = dict(self.digest_inputs.get("inputs", {}))
        for role, needed in self.inputs.items():
            if not role.startswith("teacher "):  # a stage or pilot has the seed of the run that it is for
                inputs[role] = needed.family
        # What a method takes from the seed is the seed: `draw_seed: ${seed}`.
        seeds = {name for name, value in self.config.method.items_ex(resolve=False) if value == "${seed}"}
        method = {name: value for name, value in self.digest_inputs["method"].items() if name not in seeds}
        return digest_of({**self.digest_inputs, "method": method, "inputs": inputs, "seed": None})

    @property
    def result(self) -> dict[str, Any] | None:
        """The record of a finished run; None for any other. It is written last, and all at once.

        One that is damaged, or is another program's, is none: the run then goes on from its last checkpoint and writes it anew.
        """
        found = read_record(self.directory / "result.json")
        if found is None or found.get("digest") != self.digest:
            return None
        whole = (
            all(isinstance(found.get(name), kind) for name, kind in RECORD.items()) and found["headline"] in found["students"]
        )
        return found if whole else None

    def damage(self, result: Mapping[str, Any], thorough: bool = False) -> str | None:
        """The first file of a finished run's exports that is missing or not as it was written; None if they are whole.

        Args:
            result: the record.
            thorough: compare digests, for a run that uses the weights; otherwise only sizes, which takes no time.
        """
        files = result.get("files")
        if files is None:  # of a time before digests were recorded
            files = {"student/config.json": {}, "student/model.safetensors": {}}
        return damaged_file(self.directory, files, thorough)

    def is_done(self, thorough: bool = False) -> bool:
        """Return whether its record is there and its exports are whole; see `damage`."""
        result = self.result
        return result is not None and self.damage(result, thorough) is None

    @property
    def student(self) -> Path:
        """The exported model."""
        return self.directory / "student"

    @property
    def init_run(self) -> "Run":
        """The run that this one's student begins from: a stage, or what its method begins with."""
        return self.inputs["before"] if "before" in self.inputs else self.inputs["stage"]

    @property
    def checkpoints(self) -> Path:
        """`best.ckpt` and `last.ckpt`."""
        return self.directory / "checkpoints"

    def finish(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Write the record that makes the run done; the record as it was written, with its checksum.

        Raises:
            InputError: if it cannot be written.
        """
        return write_record(self.directory / "result.json", result)

    def begin(self, resume: bool) -> None:
        """Make the directory; forget what is there unless it is to be resumed.

        Raises:
            InputError: if it cannot be made, or something else is in the place of a file that the run will write.
        """
        with writing(self.directory):
            if not resume:
                remove(self.checkpoints)
                remove(self.directory / "metrics.csv")
            for name in ("result.json", "metrics.csv", "config.yaml", "checkpoints/last.ckpt", "checkpoints/best.ckpt"):
                if (path := self.directory / name).is_dir():
                    raise InputError(f"'{path}' is a folder, where this run writes a file; remove it", "paths.runs")
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_text(self.directory / "config.yaml", OmegaConf.to_yaml(self.config))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run: a second process that needs it waits, then finds it done. A killed holder's lock is free."""
        check_writable(self.directory)
        with (
            writes_to(self.spec.paths.runs),
            locked(self.directory, f"{self.name}: another process is at this run; waiting for it"),
        ):
            yield


def digest_of(identified: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that stand for a configuration.

    10 and 10.0 are the same number, and so are 0.0 and -0.0. A whole number beyond 2^53 that no float holds stands for itself.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(name): plain(inner) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [plain(inner) for inner in value]
        if isinstance(value, bool) or not isinstance(value, int | float):
            return value
        exact = isinstance(value, float) or (abs(value) < 2**1000 and int(float(value)) == value)
        return float(value) + 0.0 if exact else value  # adding zero takes the sign from -0.0

    text = json.dumps(plain(identified), sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def write_record(path: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Write a JSON file that carries a checksum of its values, all or nothing; what was written.

    Raises:
        InputError: if it cannot be written.
    """
    content = {name: value for name, value in record.items() if name != "checksum"}
    content["checksum"] = digest_of(content)
    with writing(path):
        write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return content


def read_record(path: Path, sealed: bool = False) -> dict[str, Any] | None:
    """What `write_record` wrote; None if there is no such file, or a value is another.

    Args:
        path: of the file.
        sealed: whether it must have a checksum. A run's record must have one if it has `files`; earlier ones have neither.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            return None
        content = {name: value for name, value in found.items() if name != "checksum"}
        if "checksum" not in found:
            return None if sealed or "files" in found else found
        return found if found["checksum"] == digest_of(content) else None
    except (OSError, ValueError, OverflowError, RecursionError):
        return None
