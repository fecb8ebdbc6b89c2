"""Execution of jobs as `launcher` says: on this machine, on a Ray cluster, or later by a queue."""

import pkgutil
import sys
from collections.abc import Iterable, Iterator, Mapping

from kd.config.schema import MEASURE, LauncherSpec, check_launcher, launcher_named
from kd.errors import InputError
from kd.launch.fan_out import Event, FanOut
from kd.launch.jobs import Job, needed_in
from kd.launch.on_ray import on_ray
from kd.launch.places import places
from kd.launch.slurm import submission, write_script


def workers(launcher: LauncherSpec, jobs: Iterable[Job]) -> int:
    """Return the number of jobs that are executed side by side on this machine; before a measurement, as without one.

    Raises:
        InputError: if the number that is asked for is not positive.
    """
    return len(places(None if launcher.workers == MEASURE else launcher.workers, uses_gpus(jobs)))


def uses_gpus(jobs: Iterable[Job]) -> bool:
    """Return whether a job uses GPUs where there are any."""
    return any(job.run.spec.trainer.accelerator != "cpu" for job in jobs)


def prepare(launcher: LauncherSpec) -> None:
    """Start what a launcher needs, while jobs are still planned."""
    if (start := launcher_named(launcher.name).prepare) is not None:
        pkgutil.resolve_name(start)()


def launch(jobs: Mapping[str, Job], launcher: LauncherSpec, name: str) -> Iterator[Event]:
    """Execute jobs and yield what changes; for SLURM, write a script and print how to submit it.

    Args:
        jobs: name -> job, those that others need first.
        launcher: settings.
        name: name of the script.

    Raises:
        InputError: for a value that is not valid, or a launcher that does not work here.
    """
    check_launcher(launcher)
    execute = launcher_named(launcher.name).execute
    if execute is None:
        raise InputError(f"launcher={launcher.name} executes no jobs", "launcher")
    if jobs:
        yield from pkgutil.resolve_name(execute)(jobs, launcher, name)


def local(jobs: Mapping[str, Job], launcher: LauncherSpec, name: str) -> Iterator[Event]:
    """Execute jobs on this machine; to measure how many of them side by side, first those that others need."""
    gpus = uses_gpus(jobs.values())
    if launcher.workers != MEASURE:
        yield from FanOut(jobs, places(launcher.workers, gpus))
        return
    from kd.launch.measure import measured

    needed = needed_in(jobs)
    first = FanOut({name: job for name, job in jobs.items() if name in needed}, places(None, gpus))
    yield from first
    cells = [job for name, job in jobs.items() if name not in needed and first.done.issuperset(job.needs)]
    yield from FanOut(jobs, places(measured(cells, uses_gpus=gpus), gpus), done=first.done, failed=first.failed)


def ray(jobs: Mapping[str, Job], launcher: LauncherSpec, name: str) -> Iterator[Event]:
    """Execute jobs on a Ray cluster, each with the share of a machine that a place of this one has."""
    (place, *_) = places(launcher.workers, uses_gpus(jobs.values()))
    yield from on_ray(jobs, launcher.address, int(place["OMP_NUM_THREADS"]), float("CUDA_VISIBLE_DEVICES" in place))


def slurm(jobs: Mapping[str, Job], launcher: LauncherSpec, name: str) -> Iterator[Event]:
    """Write a script for SLURM and print how to submit it; no job changes."""
    script, needed = write_script(name, jobs, sys.executable, launcher.time, launcher.sbatch, launcher.array_limit)
    print(f"{len(jobs)} jobs. Submit them, and repeat this command afterwards to see what is left:")
    print(submission(script, needed, len(jobs)))
    yield from ()
