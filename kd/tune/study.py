"""A study: its trials in a journal that any number of commands write to, and which trial a command takes next.

The journal is a file of optuna's in the folder of the study. All that reads and then writes has the lock of the study, and a
command has the lock of each trial that it executes: a trial that runs and that nobody has locked was left by a command that was
killed, and is taken again.
"""

import contextlib
import json
import os
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from kd.config.failure import Failure
from kd.errors import InputError
from kd.system.files import LOCK, check_writable, writing
from kd.tune.space import Choices, Parameter, Range, Space, Value

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial
    from optuna.trial import Trial as OptunaTrial

FOLDER = "tune"
"""Folder of the studies in that of the runs."""

JOURNAL = "journal.log"
"""File of a study's trials."""

SAMPLERS = ("auto", "grid", "tpe", "random")
"""Choices of the next point: `grid` draws one that was not tried, `tpe` is optuna's estimator, `auto` is the grid where the
points are counted and else the estimator."""

PRUNERS = ("median", "halving", "none")
"""Rules that stop a trial: below the median of the others after as many epochs, successive halving, or none."""

REPEATS = 100
"""Times that a sampler is asked again after a point that was tried. Our choice."""


def import_optuna() -> Any:
    """Import optuna, without its messages.

    Raises:
        InputError: if it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise InputError("kd-tune needs the package optuna: pip install 'kd[tune]'", "kd[tune]") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


class JournalLock:
    """Lock of the journal. That of a killed process is free, and what it has written of a line is removed.

    Args:
        journal: the file.
    """

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self._lock = FileLock(journal.with_suffix(".lock"))

    def acquire(self) -> bool:
        """Lock the journal."""
        self._lock.acquire()
        with self._journal.open("r+b") as file:
            if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read())[1] != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        """Unlock the journal."""
        self._lock.release()


@dataclass(frozen=True)
class Trial:
    """A trial that this command executes.

    Attributes:
        number: its number in the study, from 0.
        point: name of a parameter -> value.
        overrides: overrides of kd-train that the point is.
        handle: optuna's trial.
        lock: the lock that keeps other commands away.
    """

    number: int
    point: Mapping[str, Value]
    overrides: tuple[str, ...]
    handle: "OptunaTrial"
    lock: FileLock

    def report(self, epoch: int, score: float) -> bool:
        """Report the score after an epoch, counted from 1; return whether the trial should stop."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an epoch that a killed command had reported is repeated
            self.handle.report(score, epoch)
        return bool(self.handle.should_prune())


@dataclass(frozen=True)
class Entry:
    """Trial as a study knows it.

    Attributes:
        number: its number, from 0.
        state: `complete`, `pruned`, `failed`, `running` or `waiting`.
        point: name of a parameter -> value.
        value: the score that trials are compared by; of a pruned trial its last one; None if there is none.
        epochs: number of epochs that it has reported.
        run: name of its run; None if it was not planned.
        failure: reason, if it has failed.
        repeats: True if it was ended, because it repeats another trial.
    """

    number: int
    state: str
    point: Mapping[str, Value]
    value: float | None
    epochs: int
    run: str | None
    failure: Failure | None
    repeats: bool

    @property
    def is_finished(self) -> bool:
        """Return whether it counts as a trial: it is complete, or pruned."""
        return self.state in ("complete", "pruned")


STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}
"""Names of optuna's states."""


class Study:
    """A study that commands share.

    Args:
        folder: its folder, which is made.
        space: the search space.
        about: what else has to be the same in all commands, by the name that an error gives it.
        higher: True if a larger score is better.
        sampler: one of `SAMPLERS`.
        pruner: one of `PRUNERS`.
        seed: seed of the sampler.

    Raises:
        InputError: if optuna is not installed, the folder cannot be written to, the journal is damaged, or the study was begun
            with another space or other settings.
    """

    def __init__(
        self, folder: Path, space: Space, about: Mapping[str, Any], *, higher: bool, sampler: str, pruner: str, seed: int
    ) -> None:
        self.folder, self.space, self.higher, self.seed = folder, space, higher, seed
        self.sampler = sampler if sampler != "auto" else "tpe" if space.size is None else "grid"
        self._optuna = import_optuna()
        check_writable(folder)
        with self._locked(), self._reading():
            self._open(about, pruner)
        self.failed_before = {entry.number for entry in self.entries() if entry.state == "failed"}

    @property
    def name(self) -> str:
        """Name of the study, which is that of its folder."""
        return self.folder.name

    def _open(self, about: Mapping[str, Any], pruner: str) -> None:
        """Open the journal, and check or write what the study is about."""
        optuna, journal = self._optuna, self.folder / JOURNAL
        journal.touch()
        backend = optuna.storages.journal.JournalFileBackend(str(journal), lock_obj=JournalLock(journal))
        self._storage = optuna.storages.JournalStorage(backend)
        self._study = optuna.create_study(
            storage=self._storage,
            study_name=self.name,
            direction="maximize" if self.higher else "minimize",
            load_if_exists=True,
            pruner=self._pruner(pruner),
        )
        now = json.loads(json.dumps({**about, "space": self.space.describe()}))
        before = self._study.user_attrs.get("about")
        if before is None:
            self._study.set_user_attr("about", now)
        elif before != now:
            raise self._changed(before, now)

    def _changed(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> InputError:
        """Return the error for a study that was begun with something else."""
        other = [name for name in now if before.get(name) != now[name]] or list(before)
        what = "other settings"
        if other == ["space"]:
            names = dict.fromkeys([*before["space"], *now["space"]])
            differ = [name for name in names if before["space"].get(name) != now["space"].get(name)]
            what = f"another search space, which differs in {', '.join(differ) or 'its order'}"
        return InputError(
            f"the study '{self.name}' was begun with {what}; trials of the two cannot be compared. Begin another one, "
            f"study=<name>, or remove the folder '{self.folder}': runs that are done are not trained again",
            "study",
        )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with writing(self.folder), FileLock(self.folder / LOCK):
            yield

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn optuna's errors for a damaged journal into an error of ours."""
        try:
            yield
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise InputError(
                f"'{self.folder / JOURNAL}' is damaged, or was written by another version of optuna ({type(error).__name__}: "
                f"{error}). Remove the folder '{self.folder}' to begin again: runs that are done are not trained again",
                "study",
            ) from error

    def entries(self) -> list[Entry]:
        """Return what the study knows of its trials, in their order.

        Those that repeat another one are left out, and those that failed and were tried again.

        Raises:
            InputError: if the journal is damaged.
        """
        with self._reading():
            entries = [entry for entry in self._trials() if not entry.repeats]
            last = {self._words(entry): entry.number for entry in entries}
        return [entry for entry in entries if entry.state != "failed" or entry.number == last[self._words(entry)]]

    def _trials(self) -> list[Entry]:
        """Return what the study knows of all its trials."""
        return [self._entry(trial) for trial in self._study.get_trials(deepcopy=False)]

    def _words(self, entry: Entry) -> tuple[str, ...]:
        """Return the overrides of a trial; none of one that was killed while it was made."""
        return self.space.overrides(entry.point) if entry.point.keys() == self.space.parameters.keys() else ()

    def _entry(self, trial: "FrozenTrial") -> Entry:
        scores, attributes = trial.intermediate_values, trial.user_attrs
        value = trial.value if trial.state.name in ("COMPLETE", "PRUNED") else None
        point = trial.params or trial.system_attrs.get("fixed_params", {})
        failure = attributes.get("failure")
        return Entry(
            trial.number,
            STATES[trial.state.name],
            point,
            value,
            len(scores),
            attributes.get("run"),
            None if failure is None else Failure(failure["message"], failure["key"]),
            "repeats" in attributes,
        )

    def take(self, count: int) -> Trial | None:
        """Return the next trial for this command; None if there is none, at least not now.

        First a trial that a killed command has left; else a new one, if the trials that are finished or run, and those that
        have failed since this command began, are fewer than `count`, and a point is left.

        Raises:
            InputError: if the journal is damaged.
        """
        with self._locked():
            entries = self.entries()
            for entry in entries:
                if entry.state == "running" and (lock := self._lock_of(entry.number)) is not None:
                    return self._trial(self._optuna.trial.Trial(self._study, self._identifier(entry.number)), lock)
            counted = [entry for entry in entries if entry.state != "waiting" and entry.number not in self.failed_before]
            if len(counted) >= count or (handle := self._ask(entries)) is None:
                return None
            lock = self._lock_of(handle.number)
            assert lock is not None, "a trial is new as long as this command has the lock of the study"
            return self._trial(handle, lock)

    def _trial(self, handle: "OptunaTrial", lock: FileLock) -> Trial:
        point = self._point(handle)
        return Trial(handle.number, point, self.space.overrides(point), handle, lock)

    def _point(self, handle: "OptunaTrial") -> dict[str, Value]:
        """Return the point of a trial: what it has already, and what the sampler suggests."""
        return {name: self._value(handle, name, parameter) for name, parameter in self.space.parameters.items()}

    @staticmethod
    def _value(handle: "OptunaTrial", name: str, parameter: Parameter) -> Value:
        if isinstance(parameter, Choices):
            return handle.suggest_categorical(name, parameter.values)  # type: ignore[return-value]
        assert isinstance(parameter, Range)
        if parameter.whole:
            low, high, step = (int(number) for number in (parameter.low, parameter.high, parameter.step or 1))
            return handle.suggest_int(name, low, high, step=step, log=parameter.log)
        return handle.suggest_float(name, parameter.low, parameter.high, step=parameter.step, log=parameter.log)

    def _ask(self, entries: Sequence[Entry]) -> "OptunaTrial | None":
        """Return a new trial; None if no point is left.

        It is of a point that failed in an earlier command, else of one that was not tried.
        """
        if any(entry.state == "waiting" for entry in entries):  # of a command that was killed after it had chosen the point
            return self._new()
        number = len(trials := self._trials())
        self._study.sampler = self._sampler(self.seed + number)
        if again := [dict(entry.point) for entry in entries if entry.state == "failed" and entry.number in self.failed_before]:
            return self._of_point(again[0])
        tried = {self._words(entry) for entry in trials}
        left = None
        if self.space.size is not None:
            left = [point for point in self.space.points() if self.space.overrides(point) not in tried]
            if not left:
                return None
        for _ in range(0 if self.sampler == "grid" else 1 if left else REPEATS):
            handle = self._new()
            if self.space.overrides(self._point(handle)) not in tried:
                return handle
            self._discard(handle.number, handle.number)
        return None if left is None else self._of_point(random.Random(self.seed + number).choice(left))

    def _of_point(self, point: Mapping[str, Value]) -> "OptunaTrial":
        """Return a new trial of a point."""
        self._study.enqueue_trial(dict(point))
        return self._new()

    def _new(self) -> "OptunaTrial":
        handle: OptunaTrial = self._study.ask()
        return handle

    def _discard(self, number: int, repeated: int) -> None:
        """End a trial that repeats another one, and counts no more."""
        self._attribute(number, "repeats", repeated)
        self._study.tell(number, state=self._state("FAIL"))

    def assign(self, trial: Trial, run: str) -> int | None:
        """Record the run of a trial; return the number of another trial whose run it is, of which this one is a repetition."""
        with self._locked():
            for entry in self.entries():
                if entry.run == run and entry.number != trial.number and entry.state != "failed":
                    self._discard(trial.number, entry.number)
                    return entry.number
            self._attribute(trial.number, "run", run)
            return None

    def complete(self, trial: Trial, value: float) -> None:
        """Record the score of a trial whose run is finished."""
        self._study.tell(trial.number, value)

    def prune(self, trial: Trial) -> None:
        """Record that a trial was stopped."""
        self._study.tell(trial.number, state=self._state("PRUNED"))

    def fail(self, trial: Trial, failure: Failure) -> None:
        """Record why a trial failed."""
        self._attribute(trial.number, "failure", {"message": failure.message, "key": failure.key})
        self._study.tell(trial.number, state=self._state("FAIL"))

    def best(self, entries: Sequence[Entry]) -> Entry | None:
        """Return the complete trial with the best score, among equals the first; None if there is none."""
        complete = [entry for entry in entries if entry.state == "complete" and entry.value is not None]
        sign = 1.0 if self.higher else -1.0
        return max(complete, key=lambda entry: sign * (entry.value or 0.0), default=None)

    def _lock_of(self, number: int) -> FileLock | None:
        """Lock a trial for this command; return None if another process has locked it."""
        path = self.folder / "locks" / f"{number}.lock"
        path.parent.mkdir(exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        return lock

    def _identifier(self, number: int) -> int:
        return int(
            self._storage.get_trial_id_from_study_id_trial_number(self._storage.get_study_id_from_name(self.name), number)
        )

    def _attribute(self, number: int, name: str, value: Any) -> None:
        self._storage.set_trial_user_attr(self._identifier(number), name, value)

    def _state(self, name: str) -> Any:
        return self._optuna.trial.TrialState[name]

    def _sampler(self, seed: int) -> "BaseSampler":
        samplers = self._optuna.samplers
        return samplers.TPESampler(seed=seed, constant_liar=True) if self.sampler == "tpe" else samplers.RandomSampler(seed)  # type: ignore[no-any-return]

    def _pruner(self, name: str) -> "BasePruner":
        pruners = self._optuna.pruners
        kinds = {"median": pruners.MedianPruner, "halving": pruners.SuccessiveHalvingPruner, "none": pruners.NopPruner}
        return kinds[name]()  # type: ignore[no-any-return]
