"""Sizes, scores and latencies of teacher and student of finished runs, by torch, ONNX and int8, and their ratios.

Each run is exported and measured by the commands of this package, one after the other; rows are joined in `ours.csv`:

    python experiments/deployment/measure.py runs/kd-3l-sst2-s0-* runs/kd-3l-rte-s0-* runs/kd-3l-stsb-s0-*

Further words are those of kd-latency, as in `--calls 300`; `paths.glue=<folder>` is for both.
"""

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

COLUMNS = (
    "task run model runtime threads texts tokens megabytes metric score drop median_ms p95_ms p99_ms load "
    "times_faster_than_teacher times_smaller_than_teacher"
).split()


def command(module: str, *words: object) -> None:
    """Run a command of the package."""
    subprocess.run([sys.executable, "-m", f"kd.deploy.{module}", *map(str, words)], check=True)


def rows_of(run: Path, work: Path, overrides: list[str], more: list[str]) -> Iterator[dict[str, Any]]:
    """Export a run without a gate, measure it, and yield its rows."""
    exported, latency = work / run.name, work / f"{run.name}.json"
    command("export", run, *overrides, "--out", exported, "--max-drop", 1000)
    command("latency", run, *overrides, "--out", latency, *more)
    record = json.loads((run / "result.json").read_text())
    about, timed = json.loads((exported / "deployment.json").read_text()), json.loads(latency.read_text())
    metric = about["files"]["torch"]["check"]["metric"]

    def settings(row: dict[str, Any]) -> tuple[Any, ...]:
        return (row["threads"], row["batch"], "own" if row["own"] else f"{row['tokens']:g}")

    teachers = [row for row in timed["rows"] if row["model"] != "student" and row["runtime"] == "torch"]
    base = {settings(row): row["median"] for row in reversed(teachers)}  # the first teacher, in float32
    large = record["megabytes"].get(next(iter(record["metrics_teacher"]), None))  # of the first teacher too
    for row in timed["rows"]:
        teacher = row["model"].removeprefix("teacher ")
        size = score = drop = None
        if row["model"] == "student" and (exported_as := about["files"].get(row["runtime"])):
            size = sum(file["bytes"] for file in exported_as["files"].values()) / 1e6
            score, drop = (exported_as["check"][name] for name in ("value", "drop"))
        elif row["runtime"] == "torch":
            size, score = record["megabytes"][teacher], record["metrics_teacher"][teacher]["validation"][metric]
        slow = base.get(settings(row))
        values = [
            *(record["task"], run.name, row["model"], row["runtime"], *settings(row)),
            *(
                rounded(size, 2),
                metric,
                rounded(score, 4),
                rounded(drop, 2),
                row["median"],
                row["p95"],
                row["p99"],
                row["load"],
            ),
            rounded(slow / row["median"], 2) if slow and row["runtime"] != "tokenizer" else None,
            rounded(large / size, 2) if large and size else None,
        ]
        yield dict(zip(COLUMNS, values, strict=True))


def rounded(value: float | None, digits: int) -> float | None:
    """Return a number with so many digits; None stays."""
    return None if value is None else round(value, digits)


def main() -> None:
    """Measure runs, one after the other, and write `ours.csv` after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="RUN", help="directories of runs, and paths.glue=<folder>")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "ours.csv")
    parser.add_argument("--work", type=Path, default=Path("exported"), help="folder for exported students and latencies")
    arguments, more = parser.parse_known_intermixed_args()
    overrides = [word for word in arguments.words if "=" in word]
    arguments.work.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for run in (Path(word) for word in arguments.words if "=" not in word):
        rows += rows_of(run, arguments.work, overrides, more)
        with arguments.out.open("w", newline="") as file:
            table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            table.writeheader()
            table.writerows(rows)


if __name__ == "__main__":
    main()
