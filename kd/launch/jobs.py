"""Jobs: the runs that a set of commands needs, each once, in an order in which they can be executed."""

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from kd.config.compose import compose, typed
from kd.errors import InputError
from kd.runs.plan import plan
from kd.runs.run import Role, Run
from kd.system.files import write_text, writing

FOLDER = ".launch"
"""Folder in that of the runs for claims, failures and output of jobs."""


@dataclass(frozen=True)
class Job:
    """A run to execute in a process of its own.

    Attributes:
        run: the run.
        command: overrides of kd-train whose run needs it, or is it.
        needs: names of the jobs that have to be done before.
        wanted: True if a command asks for it; False for a run that only others need, such as a teacher.
    """

    run: Run
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    wanted: bool = True

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.run.name

    def file(self, suffix: str) -> Path:
        """Return the path of a file about this job."""
        return self.run.directory.parent / FOLDER / f"{self.name}{suffix}"


@dataclass(frozen=True)
class Failure:
    """Reason why a job failed, as another process reads it.

    Attributes:
        message: the error.
        key: configuration key to change, if it is the user's.
        users: True if the user can correct it.
        at: seconds since the epoch.
    """

    message: str
    key: str | None = None
    users: bool = True
    at: float = 0.0

    def __str__(self) -> str:
        return self.message if self.key is None else f"{self.message} (change: {self.key})"

    @staticmethod
    def read(job: Job) -> "Failure | None":
        """Return the last failure of a job; None if there is none, or its file is not readable."""
        try:
            content = json.loads(job.file(".failed").read_text(encoding="utf-8"))
            return Failure(content["message"], content["key"], content["users"], content["at"])
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def record(self, path: Path) -> None:
        """Write the failure, with the time of now, for other processes.

        Raises:
            InputError: if it cannot be written.
        """
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(asdict(replace(self, at=time.time()))) + "\n")


def plan_command(command: Sequence[str]) -> Run:
    """Return the run of overrides of kd-train.

    Raises:
        InputError: if they cannot be composed or planned.
    """
    from kd.training.execute import check_launch

    config = compose(command)
    typed(config)
    run = plan(config, list(command))
    check_launch(run)
    return run


def jobs_of(runs: Mapping[int, Run], commands: Sequence[Sequence[str]]) -> dict[str, Job]:
    """Return the jobs of runs that are not done, with the runs that they need.

    Args:
        runs: index of a command -> its run; runs that are done are left out.
        commands: the commands, as overrides of kd-train.
    """
    jobs: dict[str, Job] = {}

    def add(run: Run, command: tuple[str, ...]) -> None:
        if run.name in jobs:
            return
        needed = {other.name: other for _, other in run.inputs if not other.is_done()}
        for other in needed.values():
            add(other, command)
        jobs[run.name] = Job(run, command, tuple(needed))

    for index, run in runs.items():
        if not run.is_done():
            add(run, tuple(commands[index]))
    wanted = {run.name for run in runs.values()}
    jobs = {name: replace(job, wanted=name in wanted) for name, job in jobs.items()}
    return dict(sorted(jobs.items(), key=lambda entry: entry[0] not in needed_in(jobs)))  # stable: needs stay before


def needed_in(jobs: Mapping[str, Job]) -> set[str]:
    """Return the names of the jobs that others need."""
    return {name for job in jobs.values() for name in job.needs}


def find_run(run: Run, name: str, role: Role | None = None) -> tuple[Role | None, Run]:
    """Return the run of this name among a run and all that it needs, with its role; None for that of the run itself.

    Raises:
        InputError: if there is none: the configuration files have changed since the job was made.
    """
    if run.name == name:
        return role, run
    for needed_as, needed in run.inputs:
        with contextlib.suppress(InputError):
            return find_run(needed, name, needed_as)
    raise InputError(f"the command plans {run.name} and no run {name}: configuration or data files have changed; start again")
