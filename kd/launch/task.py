"""Execute one job of a file: `python -m kd.launch.task <file> <number> <submitted>`, as the tasks of an array do.

The last word is the time of the submission in seconds since the epoch: what another of its tasks has tried since then in vain,
such as a teacher, is not tried again. SIGTERM interrupts the job, with status 130; it resumes from its last checkpoint.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from kd.errors import InputError
from kd.launch.fan_out import FanOut
from kd.launch.jobs import Job, find_run, jobs_of, plan_command
from kd.launch.places import places
from kd.system.command import INTERRUPTED


def execute_task(path: Path, number: int, submitted: float) -> int:
    """Execute the job on a line of a file, and before it what it needs; return the exit status.

    Args:
        path: the file.
        number: number of the line, from 0.
        submitted: time of the submission in seconds since the epoch, see `FanOut`.

    Raises:
        InputError: if there is no such line, or its command cannot be planned.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    if not 0 <= number < len(lines):
        raise InputError(f"'{path}' has {len(lines)} jobs, numbered from 0; there is no job {number}")
    job = json.loads(lines[number])
    jobs = only(job["run"], job["command"])
    uses_gpus = any(each.run.spec.trainer.accelerator != "cpu" for each in jobs.values())
    fan_out = FanOut(jobs, places(1, uses_gpus), submitted)
    for event in fan_out:
        print(f"{event.job.name}: {event.state}" + (f": {event.failure.line}" if event.failure else ""), flush=True)
    return 1 if fan_out.failed else 0


def only(name: str, command: Sequence[str]) -> dict[str, Job]:
    """Return the job of a run, with those that it needs, unless it is done."""
    _, run = find_run(plan_command(command), name)
    return jobs_of({0: run}, [command])


def main() -> None:
    """Run the module as a program."""
    _, path, number, submitted = sys.argv
    try:
        sys.exit(execute_task(Path(path), int(number), float(submitted)))
    except InputError as error:
        print(f"kd: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
