"""Cells per hour of one sweep, in one process and side by side.

    python experiments/throughput/measure.py FOLDER [--cells 4] [--rounds 2] [overrides of kd-train]

makes the teacher once, then the same cells (seeds of one method) by each arrangement in turn, in a folder of runs of its own to
which the teacher is copied; each round begins with another arrangement. Prints a CSV: seconds of a round, cells per hour, and
the ratio to one process with all threads. `--leave "one process, 1 thread"` leaves an arrangement out.
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

CELL = ["method=kd", "student=3l", "task=rotten_tomatoes", "task.limit_train=1000", "trainer.max_epochs=2"]


def arrangements(cores: int) -> dict[str, tuple[list[str], str | None]]:
    """Name -> further overrides, and OMP_NUM_THREADS, which is set for the command and its processes; None leaves it to kd."""
    found: dict[str, tuple[list[str], str | None]] = {f"one process, {cores} threads": ([], str(cores))}
    for workers in sorted({1, cores // 2 or 1, cores}):
        threads = max(1, cores // workers)
        found[f"{workers} x {threads} threads"] = (["launcher=local", f"launcher.workers={workers}"], None)
    found["one process, 1 thread"] = ([], "1")
    return found


def run(words: list[str], threads: str | None) -> float:
    """Run kd-train; return the seconds that it took."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = threads
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "kd.train", *words], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return time.monotonic() - began


def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cells", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--leave", action="append", default=[])
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    cores = len(os.sched_getaffinity(0))
    made, words = arguments.folder / "teacher", [*CELL, *arguments.overrides]
    run([*words, "task.limit_validation=256", "task.limit_test=256", f"paths.runs={made}", "seed=99"], str(cores))
    common = [*words, "task.limit_validation=256", "task.limit_test=256", f"seed={','.join(map(str, range(arguments.cells)))}"]
    tried = {name: one for name, one in arrangements(cores).items() if name not in arguments.leave}
    seconds: dict[str, list[float]] = {name: [] for name in tried}
    for number in range(arguments.rounds):
        for index in range(len(tried)):
            name = list(tried)[(index + number) % len(tried)]
            more, threads = tried[name]
            runs = arguments.folder / f"runs-{number}-{name.replace(' ', '_').replace(',', '')}"
            shutil.copytree(made, runs, ignore=lambda _, names: [one for one in names if "-s99-" in one])
            seconds[name].append(run(["--multirun", *common, *more, f"paths.runs={runs}"], threads))
            shutil.rmtree(runs)
            print(f"{number}: {name}: {seconds[name][-1]:.1f} s", file=sys.stderr, flush=True)
    (first, *_) = seconds.values()
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["arrangement", "cells", "seconds", "cells_per_hour", "ratio"])
    for name, taken in seconds.items():
        ratio = statistics.median(one / other for one, other in zip(first, taken, strict=True))
        rate = 3600 * arguments.cells / statistics.median(taken)
        writer.writerow([name, arguments.cells, " ".join(f"{one:.1f}" for one in taken), f"{rate:.0f}", f"{ratio:.2f}"])


if __name__ == "__main__":
    main()
