"""Speed of fine-tuning in a bare loop, with all rows of the embedding table and with those that occur: turns of a few steps.

    python experiments/bench/rows.py OUT.json [--steps 5] [--turns 40] [overrides of kd-train]

Both loops are in one process and take turns that are so short that what else the machine does falls on both; each round begins
with the other one. The figure is the median of the ratios of neighbouring turns, with its quartiles.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kd.bench.bare import train_bare
from kd.bench.candidates import BARE
from kd.bench.workers import Job

ROWS = ("all", "occurring")


class Turn:
    """The gate of one loop: it waits for its turns, and stores their seconds."""

    def __init__(self) -> None:
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.seconds: list[float] = []
        self._began = 0.0

    def ready(self, facts: Mapping[str, Any], accelerator: str) -> None:
        """Report that the loop is built."""
        self.done.release()

    def open(self) -> None:
        """Wait for the turn."""
        self.go.acquire()
        self._began = time.perf_counter()

    def close(self, examples: int) -> None:
        """End the turn."""
        self.seconds.append(time.perf_counter() - self._began)
        self.done.release()


def main() -> None:
    """Measure, print the figures, and write them with the seconds of all turns."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_intermixed_args()
    gates = {rows: Turn() for rows in ROWS}
    with tempfile.TemporaryDirectory() as scratch:
        for rows, gate in gates.items():  # one after the other: runs are built with one random state
            words = (*given.overrides, "method=finetune", f"trainer.embedding_rows={rows}")
            job = Job(replace(BARE, name=rows), words, given.steps, given.turns + 2, Path(scratch) / rows)
            threading.Thread(target=train_bare, args=(job, gate), daemon=True).start()
            gate.done.acquire()
        for turn in range(given.turns + 1):  # the first is the warm-up
            for rows in ROWS[:: 1 if turn % 2 else -1]:
                gates[rows].go.release()
                gates[rows].done.acquire()
    ratios = [all_rows / occurring for all_rows, occurring in zip(*(gates[rows].seconds[1:] for rows in ROWS), strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    found = {
        "overrides": given.overrides,
        "steps": given.steps,
        "speed_relative_to_all_rows": {"median": median, "lower quartile": low, "upper quartile": high},
        "seconds": {rows: gates[rows].seconds[1:] for rows in ROWS},
    }
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"occurring rows: {median:.3f} [{low:.3f}, {high:.3f}] times the speed of all rows, {len(ratios)} pairs of turns")


if __name__ == "__main__":
    main()
