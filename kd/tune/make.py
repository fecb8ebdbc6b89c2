"""Making of a study: what a command searches, and the execution of its trials in this process."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from kd.config.failure import Failure
from kd.config.schema import LONGEST_STUDY, check_name
from kd.data.direction import higher_is_better
from kd.errors import InputError, disk_is_full
from kd.launch.jobs import plan_command
from kd.results.tables import score
from kd.results.tuned import Tuned, state_tuned
from kd.runs.run import Run
from kd.tune.space import Space
from kd.tune.study import FOLDER, Entry, Study, Trial

POLL = 3.0
"""Seconds between two looks at the trials of other commands. Our choice."""

COMPARED = (
    *("seed", "paths.runs", "trainer.selection", "task.name", "task.monitor", "task.source", "task.labels", "task.validation"),
    *("task.limit_validation", "task.holdout", "task.where", "task.where_evaluated"),
)
"""Keys that all trials of a study share: with other values, scores would be of other examples, or of another draw."""


@dataclass(frozen=True)
class Search:
    """Search of a command.

    Attributes:
        space: the space, without what the command has fixed.
        command: the overrides of kd-train that every trial has.
        base: the run of these overrides alone.
        name: name of the study.
    """

    space: Space
    command: tuple[str, ...]
    base: Run
    name: str

    @property
    def folder(self) -> Path:
        """Folder of the study, in that of the runs."""
        return self.base.directory.parent / FOLDER / self.name

    @property
    def first(self) -> Run:
        """The run of each parameter's first value."""
        point = {name: parameter.bounds[0] for name, parameter in self.space.parameters.items()}
        return plan_command([*self.command, *self.space.overrides(point)])

    @property
    def monitor(self) -> str:
        """Metric that trials are compared by."""
        return self.base.spec.task.monitor

    @property
    def by(self) -> str:
        """Score that trials are compared by, in words."""
        share = self.base.spec.task.holdout
        return f"validation {self.monitor}" if share is None else f"{self.monitor} on {share:g} of train"

    def study(self, sampler: str, pruner: str) -> Study:
        """Open the study; arguments and errors are those of `Study`."""
        return Study(
            self.folder,
            self.space,
            {"settings": self.base.digest, "by": self.by},
            higher=higher_is_better(self.monitor),
            sampler=sampler,
            pruner=pruner,
            seed=self.base.spec.seed,
        )


def plan_search(space: Space, command: Sequence[str], name: str | None) -> Search:
    """Plan a search and check each of its values. Nothing is trained or written.

    Args:
        space: the space, with the parameters of the command.
        command: the command's other overrides.
        name: name of the study; None for that of its settings.

    Raises:
        InputError: if nothing is searched, the command cannot be planned, or a value of a parameter is not valid.
    """
    if not space.parameters:
        raise InputError(
            "nothing is searched: name a search space (kd-tune --list), or give a key several values: optimizer.lr=1e-5,3e-5",
            "space",
        )
    words = (*space.fixed, *command)
    base = plan_command(words)
    for parameter, values in space.parameters.items():
        for value in values.bounds:
            check_value(words, values.overrides(value), base, parameter)
    if name is None:
        spec = base.spec
        name = f"{space.name or spec.method['name']}-{spec.student.name}-{spec.task.name}-s{spec.seed}-{base.digest}"
    check_name(name, "study", LONGEST_STUDY)
    return Search(space, words, base, name)


def check_value(command: Sequence[str], overrides: Sequence[str], base: Run, parameter: str) -> None:
    """Check a value of a parameter with the command's other settings, without data or models.

    Raises:
        InputError: if its run cannot be planned, an argument is not valid, or it changes what trials are compared by.
    """
    from kd.build.check import check_arguments

    try:
        run = plan_command([*command, *overrides])
        check_arguments(run)
    except InputError as error:
        raise InputError(f"'{' '.join(overrides)}' of the search space: {error.message}", error.key or parameter) from error
    for key in COMPARED:
        if OmegaConf.select(run.config, key) != OmegaConf.select(base.config, key):
            raise InputError(
                f"'{' '.join(overrides)}' of the search space changes {key}: scores of such trials cannot be compared",
                parameter,
            )


def trials(study: Study, count: int) -> Iterator[Trial]:
    """Yield the trials that this command executes, until `count` are finished, or no point is left.

    While other commands execute the last trials it waits, and takes one that is left by a command that was killed.

    Args:
        study: the study.
        count: number of trials of the study.

    Raises:
        InputError: if the journal is damaged.
    """
    waits = False
    while True:
        if (trial := study.take(count)) is not None:
            waits = False
            try:
                yield trial
            finally:
                trial.lock.release()
            continue
        running = [entry.number for entry in study.entries() if entry.state == "running"]
        if not running:
            return
        if not waits:
            print(f"waiting for {len(running)} trial(s) of other commands", flush=True)
            waits = True
        time.sleep(POLL)


def execute_trial(search: Search, study: Study, trial: Trial) -> None:
    """Execute a trial's run, unless it is done, and record its score, that it was pruned, or why it failed.

    Raises:
        InputError: if the journal is damaged.
        OSError: if the disk is full.
    """
    from kd.training.execute import execute
    from kd.tune.pruning import EpochScores, Pruned

    print(f"\ntrial {trial.number}: {' '.join(trial.overrides)}", flush=True)
    try:
        run = plan_command([*search.command, *trial.overrides])
        if (other := study.assign(trial, run.name)) is not None:
            print(f"trial {trial.number} is the run of trial {other}, and is not counted", flush=True)
            return
        value = score_of(execute(run, callbacks=[EpochScores(trial.report)]), search)
    except Pruned:
        study.prune(trial)
        print(f"trial {trial.number}: pruned", flush=True)
    except BrokenPipeError:  # the output has been closed
        raise
    except Exception as error:
        if disk_is_full(error):
            raise
        failure = Failure.of(error)
        study.fail(trial, failure)
        print(f"{failure.trace or ''}trial {trial.number}: failed: {failure}", flush=True)
    else:
        study.complete(trial, value)
        entries = study.entries()
        state(search, study, entries, [entry for entry in entries if entry.number == trial.number])
        best = study.best(entries)
        told = "" if best is None else f" (best: {score(search.monitor, best.value)}, trial {best.number})"
        print(f"trial {trial.number}: {search.by} {score(search.monitor, value)}{told}", flush=True)


def score_of(record: dict[str, Any], search: Search) -> float:
    """Return the score of a finished run that trials are compared by. Scores on test are not read.

    Raises:
        InputError: if it is undefined.
    """
    value = record["metrics"]["validation"].get(search.monitor)
    if value is None:
        raise InputError(f"{search.by} of this run is undefined, as of predictions that are all one class", "task.monitor")
    return float(value)


def state(search: Search, study: Study, entries: Sequence[Entry], chosen: Sequence[Entry]) -> None:
    """Write to the records of trials' runs that they are trials, and of how many.

    Args:
        search: the search.
        study: the study.
        entries: all its trials.
        chosen: the trials whose runs are written to; those that are not finished, or locked, are left out.
    """
    count, best = sum(entry.is_finished for entry in entries), study.best(entries)
    for entry in chosen:
        if entry.run is not None:
            tuned = Tuned(study.name, count, search.by, best is not None and entry.number == best.number)
            state_tuned(search.base.directory.parent / entry.run, asdict(tuned))
