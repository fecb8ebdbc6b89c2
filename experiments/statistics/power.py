"""Smallest true difference from a baseline that seeds show, for numbers of seeds and methods.

    python experiments/statistics/power.py experiments/pkd_dev/ours.csv --task rte --examples 277
    python experiments/statistics/power.py --spread 0.7 --examples 850

With a table's `ours.csv` the spread of each column is the median over its rows, of all students, of the standard deviation of
the differences from the baseline, in pairs of seeds as `kd-report` makes them; with `--spread` it is that number of points. The
result is the difference that is shown in 80 of 100 simulated tables by the rule of docs/statistics.md: `kd.results.statistics`,
whose function `detectable_difference` says what is simulated.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from kd.errors import InputError
from kd.results.columns import title_of
from kd.results.comparison import compare, entries_of
from kd.results.figures import read_figures
from kd.results.statistics import MIN_SEEDS, detectable_difference, median_spread, seed_test
from kd.results.tables import in_own_units


def columns(path: Path, task: str | None) -> Iterator[tuple[str, float, float]]:
    """Yield heading, spread and the factor from the metric's unit to that of a report, of each column of a table.

    Raises:
        InputError: if the file is not a table's, or nothing in it is paired.
    """
    comparison = compare(entries_of(read_figures(path)))
    paired = 0
    for column in comparison.columns:
        differences = [entry.difference for entry in comparison.entries if entry.column == column and entry.difference]
        spread = median_spread(differences)
        if task in (None, column[0]) and spread:
            paired += 1
            factor = 1.0 if in_own_units(column[2]) else 100.0
            own = [factor * one.spread for one in differences if one.spread is not None]
            yield f"{title_of(column)}; {len(own)} differences with spreads of {min(own):.2f} to {max(own):.2f}", spread, factor
    if not paired:
        of_task = f" of task {task}" if task else ""
        raise InputError(f"'{path}' has no two runs{of_task} of a method that have the seeds of two runs of a baseline")


def print_table(title: str, spread: float, factor: float, arguments: argparse.Namespace) -> None:
    """Print a table of the smallest differences: a row for each number of seeds, a column for each number of methods."""
    rounded = f", {arguments.examples:,} examples" if arguments.examples else ""
    print(f"\n{title}: spread {factor * spread:.2f}{rounded}\n")
    print("| seeds |", " | ".join(f"{methods} method{'s' * (methods > 1)}" for methods in arguments.methods), "|")
    print("|---" * (1 + len(arguments.methods)) + "|")
    for pairs in arguments.seeds:
        cells = []
        for methods in arguments.methods:
            smallest = detectable_difference(spread, pairs, methods, examples=arguments.examples)
            shown = "none" if smallest is None else f"{factor * smallest:.2f} ({seed_test(pairs, methods)})"
            cells.append("too few seeds" if pairs < MIN_SEEDS else shown)
        print(f"| {pairs} |", " | ".join(cells), "|", flush=True)


def main() -> None:
    """Print a table for each column, or for one spread."""
    parser = argparse.ArgumentParser(description="Smallest true difference from a baseline that seeds show.")
    parser.add_argument("table", nargs="?", type=Path, help="an ours.csv of a table")
    parser.add_argument("--task", help="of the file: only this task")
    parser.add_argument("--spread", type=float, help="in place of a file: standard deviation of differences, in points")
    parser.add_argument("--examples", type=int, help="number of evaluated examples; default: scores are not rounded")
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 6, 10], help="default: 3 6 10")
    parser.add_argument("--methods", type=int, nargs="+", default=[1, 5, 25], help="default: 1 5 25")
    arguments = parser.parse_args()
    if (arguments.table is None) == (arguments.spread is None):
        parser.error("give either a file or --spread")
    try:
        if arguments.table is None:
            print_table("One table", arguments.spread / 100, 100.0, arguments)
            return
        for title, spread, factor in columns(arguments.table, arguments.task):
            print_table(title, spread, factor, arguments)
    except InputError as error:
        print(f"power.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
