"""Cells per hour of one sweep, in one process and side by side.

    python experiments/throughput/measure.py FOLDER [--students 2l,3l,full] [--cells 4] [--rounds 2] [overrides of kd-train]

makes the teacher once, then for each student the same cells (seeds of one method) by each arrangement in turn, in a folder of
runs of its own to which the teacher is copied; each round begins with another arrangement. `launcher.workers=measure` measures
anew in each round, which its seconds include. Prints a CSV: seconds of a round, cells per hour, the ratio to the first
arrangement, and what the launcher chose. `--leave "one process, 1 thread"` leaves an arrangement out.
"""

import argparse
import csv
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

CELL = ["method=kd", "task=rotten_tomatoes", "task.limit_train=1000", "trainer.max_epochs=2"]
LIMITS = ["task.limit_validation=256", "task.limit_test=256"]


def arrangements(cores: int) -> dict[str, tuple[list[str], str | None]]:
    """Name -> further overrides, and OMP_NUM_THREADS, which is set for the command and its processes; None leaves it to kd."""
    found: dict[str, tuple[list[str], str | None]] = {f"one process, {cores} threads": ([], str(cores))}
    for workers in sorted({1, cores // 2 or 1, cores}):
        threads = max(1, cores // workers)
        found[f"{workers} x {threads} threads"] = (["launcher=local", f"launcher.workers={workers}"], None)
    found["measured"] = (["launcher=local", "launcher.workers=measure"], None)
    found["one process, 1 thread"] = ([], "1")
    return found


def run(words: list[str], threads: str | None) -> tuple[float, str]:
    """Run kd-train; return the seconds that it took, and the line of the launcher, empty if there is none."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = threads
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "kd.train", *words], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    seconds = time.monotonic() - began
    return seconds, next((line for line in done.stdout.splitlines() if line.startswith("launcher: ")), "")


def parsed() -> argparse.Namespace:
    """Return the arguments of the command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--students", default="3l", help="names of conf/student, separated by commas: 2l,3l,6l,full")
    parser.add_argument("--cells", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--leave", action="append", default=[])
    parser.add_argument("overrides", nargs="*")
    return parser.parse_intermixed_args()


def main() -> None:
    """Measure, and print the figures."""
    arguments, cores = parsed(), len(os.sched_getaffinity(0))
    tried = {name: one for name, one in arrangements(cores).items() if name not in arguments.leave}
    if unknown := [name for name in arguments.leave if name not in arrangements(cores)]:
        raise SystemExit(f"--leave '{unknown[0]}' is none of {', '.join(arrangements(cores))}")
    made, students = arguments.folder / "teacher", arguments.students.split(",")
    words = [*CELL, *LIMITS, *arguments.overrides]
    run([*words, f"student={students[0]}", f"paths.runs={made}", "seed=99"], str(cores))
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["student", "arrangement", "cells", "seconds", "cells_per_hour", "ratio", "launcher"])
    for student in students:
        common = [*words, f"student={student}", f"seed={','.join(map(str, range(arguments.cells)))}"]
        seconds: dict[str, list[float]] = {name: [] for name in tried}
        lines: dict[str, list[str]] = {name: [] for name in tried}
        for number in range(arguments.rounds):
            for index in range(len(tried)):
                name = list(tried)[(index + number) % len(tried)]
                more, threads = tried[name]
                runs = arguments.folder / f"runs-{student}-{number}-{name.replace(' ', '_').replace(',', '')}"
                shutil.copytree(made, runs, ignore=lambda _, names: [one for one in names if "-s99-" in one])
                taken, line = run(["--multirun", *common, *more, f"paths.runs={runs}"], threads)
                seconds[name].append(taken)
                lines[name] += [line.removeprefix("launcher: ")] if line else []
                shutil.rmtree(runs)
                print(f"{student}: {number}: {name}: {taken:.1f} s {line}", file=sys.stderr, flush=True)
        (first, *_) = seconds.values()
        for name, taken_by_round in seconds.items():
            ratio = statistics.median(one / other for one, other in zip(first, taken_by_round, strict=True))
            rate = 3600 * arguments.cells / statistics.median(taken_by_round)
            times = " ".join(f"{one:.1f}" for one in taken_by_round)
            chosen = " | ".join(lines[name])
            writer.writerow([student, name, arguments.cells, times, f"{rate:.0f}", f"{ratio:.2f}", chosen])
            sys.stdout.flush()


if __name__ == "__main__":
    main()
