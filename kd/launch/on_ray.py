"""Execution of jobs on a Ray cluster whose machines share the folder of the runs and have this package."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from kd.config.failure import Failure
from kd.errors import InputError
from kd.launch.fan_out import WORKER, Event, reason
from kd.launch.jobs import Job


def work(command: list[str], environment: Mapping[str, str], folder: str, log: str, *needs: int) -> int:
    """Execute a job in a process of its own on a machine of the cluster; return its status.

    Args:
        command: arguments of the interpreter.
        environment: variables that the process gets beside those of the cluster's worker.
        folder: working folder, to which relative paths refer.
        log: file that its output is appended to.
        needs: statuses of the jobs that it needs; Ray waits for them.
    """
    if any(needs):
        return 1  # the caller knows which of them failed
    with open(log, "ab") as file:
        environment = {**os.environ, **environment}
        return subprocess.run(
            [sys.executable, *command], cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode


def import_ray() -> Any:
    """Import Ray.

    Raises:
        InputError: if it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError("launcher=ray needs the package: pip install 'kd[ray]'", "launcher") from error
    return ray


def on_ray(jobs: Mapping[str, Job], address: str, threads: int, gpus: float) -> Iterator[Event]:
    """Execute jobs on a Ray cluster; yield those that end.

    Args:
        jobs: name -> job, those that others need first.
        address: address of the cluster, `auto`, or `local` for one on this machine that ends with this command.
        threads: processors of each job.
        gpus: GPUs of each job.

    Raises:
        InputError: if Ray is not installed, or there is no cluster at the address.
    """
    ray = import_ray()
    try:
        ray.init(address=address, log_to_driver=False, include_dashboard=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"no Ray cluster at '{address}': {' '.join(str(error).split())}", "launcher.address") from error
    try:
        yield from _execute(ray, jobs, threads, gpus)
    finally:
        ray.shutdown()


def _execute(ray: Any, jobs: Mapping[str, Job], threads: int, gpus: float) -> Iterator[Event]:
    remote = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=3)(work)
    environment = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    pending: dict[Any, Job] = {}
    references: dict[str, Any] = {}
    for job in jobs.values():
        failed, log = job.file(".failed").resolve(), job.file(".log").resolve()
        log.parent.mkdir(parents=True, exist_ok=True)
        failed.unlink(missing_ok=True)
        command = [*WORKER, job.name, str(failed), *job.command]
        needs = [references[name] for name in job.needs]
        reference = remote.remote(command, environment, os.getcwd(), str(log), *needs)
        pending[reference], references[job.name] = job, reference
    failures: dict[str, Failure] = {}
    while pending:
        (reference, *_), _ = ray.wait(list(pending), num_returns=1)
        job = pending.pop(reference)
        if broken := [name for name in job.needs if name in failures]:
            failure = Failure(f"it needs {broken[0]}, which failed: {failures[broken[0]].message}")
        else:
            try:
                status = ray.get(reference)
            except ray.exceptions.RayError as error:
                status, failure = 1, Failure(f"Ray could not execute it: {' '.join(str(error).split())}", users=False)
            else:
                if status == 0 and job.run.is_done():
                    yield Event(job, "done")
                    continue
                failure = job.failure or Failure(reason(status, job))
        failures[job.name] = failure
        yield Event(job, "failed", failure=failure)
