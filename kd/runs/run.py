"""A run: its directory, its record and the runs that it needs."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from kd.config.schema import KEEP, RunSpec
from kd.errors import InputError
from kd.runs.digest import digest_of
from kd.system.files import check_writable, is_locked, locked, remove, write_text, writes_to, writing
from kd.system.model_sources import damaged_file

RECORD: Mapping[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("metrics", "students", "seconds", "selection", "parameters", "megabytes", "latency_ms"), dict),
    **dict.fromkeys(("agreement", "metrics_teacher", "metrics_ensemble", "inputs", "versions"), dict),
    **dict.fromkeys(("method", "student", "task", "init", "headline", "precision"), str),
}
"""Keys that every record of a finished run has, and their types: other parts of the program read them."""


@dataclass(frozen=True)
class Role:
    """The part that a needed run plays in the run that needs it.

    Attributes:
        kind: `teacher`: trains a teacher; `pilot`: ranks a teacher; `before`: is the first run of a method; `stage`: trains the
            model that the student starts from; `surgery`: trains the model that a surgery reads; `aid`: trains an aid of the
            method; `edit`: trains the model that an edit of train reads.
        name: name of the teacher, the surgery, the aid or the edit; None for the other kinds.
    """

    kind: Literal["teacher", "pilot", "before", "stage", "surgery", "aid", "edit"]
    name: str | None = None

    def __str__(self) -> str:
        return self.kind if self.name is None else f"{self.kind} {self.name}"


@dataclass(frozen=True)
class RunInputs:
    """The runs that a run needs first.

    Attributes:
        teachers: name of a teacher -> the run that trains it.
        pilots: name of a teacher -> the run that ranks it.
        before: the first run of the method.
        stage: the run whose student this run's student starts from.
        surgeries: name of a surgery -> the run whose model it reads.
        aids: name of an aid of the method -> the run that trains it.
        edits: name of an edit of train -> the run whose model it reads.
    """

    teachers: Mapping[str, "Run"] = field(default_factory=dict)
    pilots: Mapping[str, "Run"] = field(default_factory=dict)
    before: "Run | None" = None
    stage: "Run | None" = None
    surgeries: Mapping[str, "Run"] = field(default_factory=dict)
    aids: Mapping[str, "Run"] = field(default_factory=dict)
    edits: Mapping[str, "Run"] = field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[Role, "Run"]]:
        """Yield each needed run with its role, in the order in which they are executed."""
        yield from ((Role("teacher", name), run) for name, run in self.teachers.items())
        yield from ((Role("pilot", name), run) for name, run in self.pilots.items())
        if self.before is not None:
            yield Role("before"), self.before
        if self.stage is not None:
            yield Role("stage"), self.stage
        yield from ((Role("surgery", name), run) for name, run in self.surgeries.items())
        yield from ((Role("aid", name), run) for name, run in self.aids.items())
        yield from ((Role("edit", name), run) for name, run in self.edits.items())

    def of(self, role: Role) -> "Run":
        """Return the run of a role."""
        return next(run for other, run in self if other == role)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @property
    def init(self) -> "Run | None":
        """The run whose student this run's student starts from: the first run of its method, or its stage."""
        return self.before or self.stage


@dataclass(frozen=True)
class Run:
    """One run: its configuration, its directory, and the runs that it needs first.

    Attributes:
        config: the composed configuration, which is written to `config.yaml`.
        spec: the same configuration, typed.
        digest: digest of everything that changes the result; see `digest_of`.
        directory: directory of the run.
        inputs: the runs that it needs first.
        digest_inputs: the values that the digest is computed from.
        member: name of the task, if this is one task of a mixture (`kd.runs.members`); else None.
        chosen: name of the student of a cohort whose model the run that needs this one reads; None for the best one.
    """

    config: DictConfig
    spec: RunSpec
    digest: str
    directory: Path
    inputs: RunInputs = field(default_factory=RunInputs)
    digest_inputs: dict[str, Any] = field(default_factory=dict)
    member: str | None = None
    chosen: str | None = None

    @property
    def name(self) -> str:
        """Name of the run's directory."""
        return self.directory.name

    @property
    def family(self) -> str:
        """Digest of everything but the seed: runs with the same family may be averaged."""
        inputs = dict(self.digest_inputs.get("inputs", {}))
        for role, needed in self.inputs:
            if role.kind != "teacher":  # stages and pilots have the seed of the run that needs them
                inputs[str(role)] = needed.family
        # A method's option that interpolates the seed, as `draw_seed: ${seed}`, is left out as well.
        seeds = {name for name, value in self.config.method.items_ex(resolve=False) if value == "${seed}"}
        method = {name: value for name, value in self.digest_inputs["method"].items() if name not in seeds}
        return digest_of({**self.digest_inputs, "method": method, "inputs": inputs, "seed": None})

    @property
    def prefix(self) -> str:
        """Prefix of the names of metrics and teachers of one task of a mixture, as in `rte/accuracy`; else empty."""
        return "" if self.member is None else f"{self.member}/"

    @property
    def result(self) -> dict[str, Any] | None:
        """The record of a finished run; None for any other run. It is written last, in one atomic step.

        None also if it is damaged or was written by another program: the run then resumes from its last checkpoint and writes
        it anew.
        """
        record = self.record
        if record is None or self.member is None:
            return record
        of_task: dict[str, Any] | None = record.get("tasks", {}).get(self.member)
        return of_task

    @property
    def record(self) -> dict[str, Any] | None:
        """The same record, of a mixture that of all its tasks."""
        record = read_record(self.directory / "result.json")
        return record if record is not None and is_record(record) and record.get("digest") == self.digest else None

    @property
    def has_model(self) -> bool:
        """True for a finished run whose exported model is there; `trainer.keep=figures` lets it go."""
        record = self.record
        return record is not None and (
            keep_of(record) != "figures" or damaged_file(self.directory, record.get("files"), thorough=False) is None
        )

    def damage(self, result: Mapping[str, Any], *, thorough: bool = False) -> str | None:
        """Return the first exported file of a finished run that is missing or has changed since; None if there is none.

        Args:
            result: the run's record.
            thorough: compare digests, for a run that uses the weights; otherwise compare only sizes, which takes no time, and
                nothing if the run has let its weights go (`trainer.keep=figures`).
        """
        if not thorough and keep_of(result) == "figures":
            return None
        files = result.get("files")
        if files is None:  # the record of a version that recorded no digests
            files = {"student/config.json": {}, "student/model.safetensors": {}}
        return damaged_file(self.directory, files, thorough=thorough)

    def is_done(self, *, thorough: bool = False) -> bool:
        """Return whether the run has a record and its exported files are intact; see `damage`."""
        result = self.result
        return result is not None and self.damage(result, thorough=thorough) is None

    def folder(self, peer: str | None = None) -> Path:
        """Return the folder of an exported student; a mixture has a folder for each task in it.

        Args:
            peer: name of a student of a cohort that is not its best one; None for the best one, or the only one.
        """
        folder = self.directory / "student" if peer is None else self.directory / "peers" / peer
        return folder if self.member is None else folder / self.member

    @property
    def student(self) -> Path:
        """Folder of the exported student that others read: the chosen one of a cohort, else the best one.

        Which student of a cohort is the best, and so in another folder than its peers, is known once the run is done.
        """
        best = self.chosen is None or (self.result or {}).get("headline") == self.chosen
        return self.folder(None if best else self.chosen)

    @property
    def cache(self) -> Path:
        """Folder of the student's outputs, where it is a teacher; each student of a cohort and each task has its own."""
        folder = self.directory / "cache"
        return folder.joinpath(*(name for name in (self.chosen, self.member) if name is not None))

    @property
    def metrics(self) -> dict[str, dict[str, float | None]] | None:
        """Split -> metric -> value of the student that others read; None for a run that is not done."""
        record = self.result
        if record is None:
            return None
        own: dict[str, Any] = record if self.chosen is None else record["students"][self.chosen]
        return own["metrics"]  # type: ignore[no-any-return]

    @property
    def predictions(self) -> Path:
        """File with the predictions on the evaluated splits; each task of a mixture has its own."""
        return predictions_file(self.directory, self.member)

    @property
    def init_run(self) -> "Run":
        """The run whose student this run's student starts from, which it must have."""
        run = self.inputs.init
        assert run is not None, "student.init=run without such a run is refused when the run is planned"
        return run

    @property
    def checkpoints(self) -> Path:
        """Folder of `best.ckpt` and `last.ckpt`."""
        return self.directory / "checkpoints"

    def finish(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Write the record, after which the run is done; return it as written, with its checksum.

        Raises:
            InputError: if it cannot be written.
        """
        return write_record(self.directory / "result.json", result)

    def begin(self, *, resume: bool) -> None:
        """Make the directory and write `config.yaml`.

        Args:
            resume: keep checkpoints, metrics, predictions and maps of an earlier start; otherwise they are removed.

        Raises:
            InputError: if the directory cannot be made, or there is a folder where the run will write a file.
        """
        with writing(self.directory):
            if not resume:
                for name in ("checkpoints", "metrics.csv", "predictions.npz", "predictions", "maps.json"):
                    remove(self.directory / name)
            checkpoints = ("checkpoints/last.ckpt", "checkpoints/best.ckpt")
            for name in ("result.json", "metrics.csv", "config.yaml", "predictions.npz", "maps.json", *checkpoints):
                if (path := self.directory / name).is_dir():
                    raise InputError(f"'{path}' is a folder, where this run writes a file; remove it", "paths.runs")
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_text(self.directory / "config.yaml", OmegaConf.to_yaml(self.config))

    def is_locked(self) -> bool:
        """Return whether a process has locked the run: it is being executed, here or on a machine that shares the folder."""
        return is_locked(self.directory)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run: another process that needs it waits, then finds it done. A killed process releases its lock."""
        check_writable(self.directory)
        with (
            writes_to(self.spec.paths.runs),
            locked(self.directory, f"{self.name}: another process has locked this run; waiting for it"),
        ):
            yield


def is_record(record: Mapping[str, Any]) -> bool:
    """Return whether a record has everything that other parts of the program read of a finished run (`RECORD`)."""
    return all(isinstance(record.get(name), kind) for name, kind in RECORD.items()) and record["headline"] in record["students"]


def keep_of(record: Mapping[str, Any]) -> str:
    """Return the word of `kd.config.schema.KEEP` for what a finished run retains; runs of earlier versions retain all."""
    keep = record.get("keep")
    return keep if keep in KEEP else "all"


def predictions_file(directory: Path, task: str | None = None) -> Path:
    """Return the path of the predictions of a run (`kd.results.predictions`).

    Args:
        directory: directory of the run.
        task: name of a task of a mixture; None for a run of one task.

    >>> predictions_file(Path("run")).as_posix(), predictions_file(Path("run"), "rte").as_posix()
    ('run/predictions.npz', 'run/predictions/rte.npz')
    """
    return directory / "predictions.npz" if task is None else directory / "predictions" / f"{task}.npz"


def write_record(path: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Write a JSON file with a checksum of its values atomically; return the values with the checksum.

    Raises:
        InputError: if the file cannot be written.
    """
    content = {name: value for name, value in record.items() if name != "checksum"}
    content["checksum"] = digest_of(content)
    with writing(path):
        write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return content


def read_record(path: Path, *, sealed: bool = False) -> dict[str, Any] | None:
    """Return the record that `write_record` wrote; None if there is no such file, or its values do not match its checksum.

    Args:
        path: path of the file.
        sealed: return None also for a file without a checksum. Files with `files` always need one; the records of earlier
            versions have neither `files` nor a checksum.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            return None
        content = {name: value for name, value in record.items() if name != "checksum"}
        if "checksum" not in record:
            return None if sealed or "files" in record else record
        return record if record["checksum"] == digest_of(content) else None
    except (OSError, ValueError, OverflowError, RecursionError):
        return None
