"""The command `kd-report`: tables of finished runs."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd.results.tables import UNITS, console, protocol, report_table
from kd.system.hardware import version_line


def load_results(folder: Path) -> list[dict[str, Any]]:
    """Return the records of all finished runs in a folder, oldest first."""
    records = []
    if folder.exists():
        next(folder.iterdir(), None)  # raises OSError for an unreadable folder, for which `glob` yields nothing
    for path in folder.glob("*/result.json"):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and "students" in record:  # otherwise a file of another program
            records.append({**record, "run": path.parent.name})
    return sorted(records, key=lambda record: record.get("finished", ""))


def first_runs(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the results of runs with which another run's method begins; tables omit them unless they are requested."""
    names = {result["inputs"].get("before", "").rpartition("-")[2] for result in results}
    return [result for result in results if result["digest"] in names]


def main() -> None:
    """Run the command `kd-report`."""
    parser = argparse.ArgumentParser(prog="kd-report", description="Tables of finished runs.")
    parser.add_argument("runs", nargs="?", default="runs", type=Path, help="folder of runs (paths.runs), default: runs")
    parser.add_argument("--task", help="only this task")
    parser.add_argument("--method", help="only these methods, separated by commas")
    parser.add_argument("--version", action="version", version=version_line())
    parser.add_argument("--json", action="store_true", help="the records themselves, as JSON")
    arguments = parser.parse_args()
    try:
        results = load_results(arguments.runs.expanduser())
    except OSError as error:
        print(f"kd-report: cannot read '{arguments.runs}': {error.strerror}\n  change: paths.runs", file=sys.stderr)
        sys.exit(2)
    if arguments.task:
        results = [result for result in results if result["task"] == arguments.task]
    if arguments.method:
        results = [result for result in results if result["method"] in arguments.method.split(",")]
    if not results:
        print(f"kd-report: no finished runs in '{arguments.runs}'", file=sys.stderr)
        sys.exit(2)
    if arguments.json:
        print(json.dumps(results, indent=2, ensure_ascii=False))
        return
    out = console()
    unfinished = [] if arguments.method else first_runs(results)
    left_out = {result["run"] for result in unfinished}
    tasks: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        if result["run"] not in left_out:
            tasks.setdefault(result["task"], []).append(result)
    for chosen in tasks.values():
        out.print(report_table(chosen))
        out.print(f"{UNITS} Mean ± standard deviation over seeds. {protocol(chosen)}")
        if constant := [result["run"] for result in chosen if result.get("collapsed")]:
            out.print(f"Students that predict one class, or nearly one score: {', '.join(constant)}")
        out.print()
    if unfinished:
        left = ",".join(dict.fromkeys(result["method"] for result in unfinished))
        out.print(f"Left out: runs that other runs start from; --method={left} shows them")


if __name__ == "__main__":
    main()
