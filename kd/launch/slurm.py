"""A script for SLURM: an array with one task for each job that is not done."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from kd.errors import InputError
from kd.launch.jobs import Job, needed_in
from kd.runs.digest import digest_of
from kd.system.command import INTERRUPTED
from kd.system.files import write_text, writing

LARGEST_ARRAY = 1000
"""Largest number of tasks of an array: SLURM's default `MaxArraySize` is 1001, one more than the largest index."""

SCRIPT = """#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --array=0-{last}
#SBATCH --time={time}
#SBATCH --requeue
#SBATCH --signal=B:USR1@{warning}
#SBATCH --output="{log}"
#SBATCH --open-mode=append
{options}
# {count} jobs{first}. A task whose run is done ends at once. One that is preempted or reaches its
# time limit is queued again and resumes its run from the last checkpoint. What is not done afterwards is in the next script.
# The argument is the time of the submission: a run that others need and that fails after it is not tried again by their tasks.
cd {folder} || exit 1
task=
trap '[ -z "$task" ] || kill -TERM "$task"' TERM
trap 'late=yes; [ -z "$task" ] || kill -TERM "$task"' USR1
{python} -m kd.launch.task {jobs} "$SLURM_ARRAY_TASK_ID" "${{1:-$(date +%s)}}" &
task=$!
while kill -0 "$task" 2> /dev/null; do wait "$task"; done
wait "$task"
status=$?
if [ "$late" = yes ] && [ "$status" = {interrupted} ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ]; then
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
fi
exit "$status"
"""

WARNING = 120
"""Seconds before the time limit at which a task is told to stop. Our choice: twice `kd.launch.fan_out.GRACE`."""

EARLIER = 60
"""Seconds by which SLURM may send this signal earlier (sbatch's manual, `--signal`)."""

RESTARTS = 50
"""Largest number of times that a task is queued again, so that one which makes no progress in its time ends. Our choice."""


def write_script(
    name: str,
    jobs: Mapping[str, Job],
    python: str,
    time: str,
    options: Sequence[str] = (),
    largest: int = LARGEST_ARRAY,
) -> tuple[Path, int]:
    """Write the script of an array and the file of its jobs; return the script, and the number of jobs that others need.

    Args:
        name: name of the array, a part of the files' names.
        jobs: name -> job; those that others need come first.
        python: the interpreter.
        time: time limit of a task, as SLURM reads it: `04:00:00`; 0 is none.
        options: further options of `sbatch`, such as `--gres=gpu:1`.
        largest: largest number of tasks that the cluster allows.

    Raises:
        InputError: if there are more jobs than the cluster allows, a task would be told to stop as soon as it starts, or the
            files cannot be written.
    """
    check_time(time)
    if len(jobs) > largest:
        raise InputError(
            f"{len(jobs)} jobs are more than an array of this cluster may have, {largest}: choose fewer, or give the cluster's "
            "MaxArraySize, less one",
            "launcher.array_limit",
        )
    folder = next(iter(jobs.values())).file("").parent.resolve()
    content = "".join(json.dumps({"run": job.name, "command": job.command}) + "\n" for job in jobs.values())
    name = f"{name}-{digest_of({'jobs': content})}"  # tasks read their line when they start: no later script may change it
    listed, script = folder / f"{name}.jobs", folder / f"{name}.sbatch"
    needed = len(needed_in(jobs))
    text = SCRIPT.format(
        name=name,
        last=len(jobs) - 1,
        time=time,
        warning=WARNING,
        log=folder / f"{name}-%a.log",
        options="\n".join(f"#SBATCH {option}" for option in options),
        count=len(jobs),
        interrupted=INTERRUPTED,
        restarts=RESTARTS,
        first=f", the first {needed} of which the others need" if needed else "",
        folder=shlex.quote(str(Path.cwd())),
        python=shlex.quote(python),
        jobs=shlex.quote(str(listed)),
    )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(listed, content)
        write_text(script, text)
    return script, needed


def check_time(time: str) -> None:
    """Check that a time limit leaves a task time to work before it is told to stop.

    Raises:
        InputError: if it does not.
    """
    seconds, least = seconds_of(time), WARNING + EARLIER
    if 0 < seconds <= least:
        raise InputError(
            f"launcher.time={time} is too short: a task is told to stop up to {least} seconds before its limit, and would be "
            "queued again and again without progress",
            "launcher.time",
        )


def seconds_of(time: str) -> int:
    """Return the seconds of a time limit as SLURM reads it.

    >>> [seconds_of(time) for time in ("3", "3:30", "04:00:00", "1-12", "1-12:30", "1-00:00:01")]
    [180, 210, 14400, 129600, 131400, 86401]
    """
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:
        hours, minutes, seconds = [0, *parts, 0][:3] if len(parts) < 3 else parts
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def submission(script: Path, needed: int, count: int) -> str:
    """Return the commands that submit a script: if jobs need others, these first, and then the rest when they are done.

    Both get the time as an argument, which makes them one submission.
    """
    path = shlex.quote(str(script))
    if not needed or needed == count:
        return f"sbatch {path} $(date +%s)"
    return (
        "submitted=$(date +%s)\n"
        f"first=$(sbatch --parsable --array=0-{needed - 1} {path} $submitted)\n"
        f"sbatch --dependency=afterany:$first --array={needed}-{count - 1} {path} $submitted"
    )
