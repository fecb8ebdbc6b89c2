"""Jobs: the runs that a set of commands needs, each once, in an order in which they can be executed."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kd.config.compose import compose, typed
from kd.config.failure import Failure
from kd.errors import InputError
from kd.runs.plan import plan
from kd.runs.run import Role, Run

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

    @property
    def failure(self) -> Failure | None:
        """Its last failure, in any process; None if it has not failed since it was last started."""
        return Failure.read(self.file(".failed"))


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
    needed_first = needed_in(jobs)
    jobs = {name: replace(job, wanted=name in wanted) for name, job in jobs.items()}
    return dict(sorted(jobs.items(), key=lambda entry: entry[0] not in needed_first))  # stable: needs stay before


def needed_in(jobs: Mapping[str, Job]) -> set[str]:
    """Return the names of the jobs that others need."""
    return {name for job in jobs.values() for name in job.needs}


def find_run(run: Run, name: str) -> tuple[list[tuple[Role, Run]], Run]:
    """Return the run of this name among a run and all that it needs, behind the way to it.

    The way has a role for each step, with the run that needs another in this role; it is empty for the run itself.

    Raises:
        InputError: if there is none: the configuration files have changed since the job was made.
    """
    if run.name == name:
        return [], run
    for role, needed in run.inputs:
        with contextlib.suppress(InputError):
            way, found = find_run(needed, name)
            return [(role, run), *way], found
    raise InputError(f"the command plans {run.name} and no run {name}: configuration or data files have changed; start again")
