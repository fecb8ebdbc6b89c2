"""The command `kd-report`: tables of finished runs, and of papers' tables beside ours."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.errors import InputError
from kd.results.folder import load_results as load_results
from kd.results.tables import UNITS, console, protocol, report_table
from kd.system.files import write_text, writing
from kd.system.hardware import version_line

if TYPE_CHECKING:
    from kd.results.comparison import Comparison

CHOICES = ("markdown", "csv", "latex", "json", "html", "svg")
"""Formats of comparisons, whose modules are imported only where they are used."""

CHOOSE = ("task", "method", "student")
"""Options that choose what is shown."""


class Output(StrEnum):
    """What the command makes."""

    DASHBOARD = "a dashboard"
    RECORDS = "the records"
    TABLES = "tables on the terminal"
    PICTURE = "a picture"
    COMPARISON = "a comparison"


USED: Mapping[Output, Sequence[str]] = {
    Output.DASHBOARD: ("wandb", "group"),
    Output.RECORDS: (*CHOOSE, "json", "out"),
    Output.TABLES: CHOOSE,
    Output.PICTURE: (*CHOOSE, "format", "out", "scale", "runs"),
    Output.COMPARISON: (*CHOOSE, "format", "out", "scale", "runs", "baseline", "any_budget"),
}
"""What the command makes -> the options that change it."""

OF_TABLES = {
    "scale": "the cells of a table have a scale, runs of a folder have none",
    "runs": "the folder of the runs is the target itself",
    "any_budget": "runs of a folder may have other data and students of one name; compare a table",
}
"""Options about tables alone -> why they do not apply to a folder of runs."""

OF_FOLDERS = (Output.RECORDS, Output.DASHBOARD)
"""What is made of a folder of runs alone."""


def first_runs(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the results of runs with which another run's method begins; tables omit them unless they are requested."""
    names = {result["inputs"].get("before", "").rpartition("-")[2] for result in results}
    return [result for result in results if result["digest"] in names]


def publish_dashboard(target: str | None, group: str | None, folder: Path, results: Sequence[dict[str, Any]]) -> None:
    """Make a dashboard and print its address.

    Raises:
        InputError: for an error that the user can correct.
    """
    from kd.results.dashboard import publish

    if target is None:
        raise InputError("--group is the group of a dashboard, which --wandb <entity>/<project> makes", "--wandb")
    print(publish(target, group, folder, results))


def main() -> None:
    """Run the command `kd-report`."""
    found = parser()
    arguments = found.parse_args()
    try:
        table = is_table(arguments.target)
        output = output_of(arguments, table)
        given = [name for name, value in vars(arguments).items() if name != "target" and value != found.get_default(name)]
        check_options(given, output, table)
        if table:
            deliver(table_comparison(arguments), arguments)
        elif output in (Output.COMPARISON, Output.PICTURE):
            deliver(folder_comparison(arguments), arguments)
        elif output == Output.DASHBOARD:
            folder = Path(arguments.target).expanduser()
            publish_dashboard(arguments.wandb, arguments.group, folder, chosen_results(arguments))
        elif output == Output.RECORDS:
            write(json.dumps(chosen_results(arguments), indent=2, ensure_ascii=False) + "\n", arguments.out)
        else:
            print_tables(chosen_results(arguments), arguments)
    except InputError as error:
        print(f"kd-report: {error}", file=sys.stderr)
        sys.exit(2)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(prog="kd-report", description="Tables of finished runs, and of papers' tables beside them.")
    found.add_argument("target", nargs="?", default="runs", help="folder of runs (default: runs), or a table, as pkd_dev")
    found.add_argument("--task", help="only this task")
    found.add_argument("--method", help="only these methods, separated by commas")
    found.add_argument("--student", help="only these students, separated by commas")
    found.add_argument("--format", choices=CHOICES, help="compare with a baseline, in this format")
    found.add_argument("--baseline", metavar="METHOD", help="method that the others are compared with (default: finetune)")
    found.add_argument(
        "--any-budget",
        action="store_true",
        help="of a table: where no baseline has the same budget, initialisation and selection, compare with another one",
    )
    found.add_argument("--out", type=Path, metavar="FILE", help="write to this file; default: standard output")
    found.add_argument("--scale", default="local", help="of a table: whose cells are looked for (default local)")
    found.add_argument(
        "--runs", type=Path, default=Path("runs"), help="of a table: runs with sizes, costs, curves and predictions"
    )
    found.add_argument("--version", action="version", version=version_line())
    found.add_argument("--json", action="store_true", help="the records themselves, as JSON")
    found.add_argument("--wandb", metavar="ENTITY/PROJECT", help="make a dashboard in this project of Weights & Biases")
    found.add_argument("--group", help="group of its runs, as logger.group; with --wandb")
    return found


def output_of(arguments: argparse.Namespace, table: bool) -> Output:
    """Return what the options ask for.

    Args:
        arguments: the options.
        table: whether it is made of a table, and not of a folder of runs.
    """
    if arguments.wandb or arguments.group:
        return Output.DASHBOARD
    if arguments.json:
        return Output.RECORDS
    if arguments.format == "svg":
        return Output.PICTURE
    return Output.COMPARISON if table or arguments.format or arguments.baseline else Output.TABLES


def check_options(given: Sequence[str], output: Output, table: bool) -> None:
    """Check that each option changes what is made.

    Args:
        given: names of the options that are given.
        output: what is made.
        table: whether it is made of a table, and not of a folder of runs.

    Raises:
        InputError: naming an option that would be ignored.
    """
    if table and output in OF_FOLDERS:
        first = next(name for name in USED[output] if name in given and name not in CHOOSE)
        raise InputError(f"{output} can only be made of finished runs: name their folder in place of the table", f"--{first}")
    for name in given:
        option = f"--{name.replace('_', '-')}"
        if name in OF_TABLES and not table:
            raise InputError(OF_TABLES[name], option)
        if name not in USED[output]:
            raise InputError(f"{option} changes nothing in {output}: leave it out", option)


def baseline_of(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the argument of a comparison that the option `--baseline` is, if it is there."""
    return {} if arguments.baseline is None else {"baseline": arguments.baseline}


def is_table(target: str) -> bool:
    """Return whether a name is that of a table, and not of a folder."""
    from kd.table.definition import table_names

    return not Path(target).expanduser().is_dir() and (target in table_names() or target.endswith((".yaml", ".yml")))


def all_results(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a folder's finished runs.

    Raises:
        InputError: if the folder cannot be read.
    """
    try:
        return load_results(folder)
    except OSError as error:
        raise InputError(f"cannot read '{folder}': {error.strerror}", "paths.runs") from error


def chosen_results(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the records that the options choose.

    Raises:
        InputError: if the folder cannot be read, or there is none.
    """
    results = all_results(Path(arguments.target).expanduser())
    found = [one for one in results if is_chosen(arguments, one["task"], one["method"], one["student"])]
    if not found:
        raise no_runs(arguments)
    return found


def no_runs(arguments: argparse.Namespace) -> InputError:
    """Return the error that the options choose no run."""
    chosen = "".join(f", {key}={value}" for key in CHOOSE if (value := getattr(arguments, key)))
    return InputError(f"no finished runs in '{Path(arguments.target).expanduser()}'" + (f" with{chosen[1:]}" if chosen else ""))


def is_chosen(arguments: argparse.Namespace, task: str, method: str, student: str) -> bool:
    """Return whether the options choose something of this task, method and student."""
    methods, students = (given.split(",") if given else None for given in (arguments.method, arguments.student))
    return (
        arguments.task in (None, task) and (methods is None or method in methods) and (students is None or student in students)
    )


def chosen_entries(comparison: "Comparison", arguments: argparse.Namespace) -> "Comparison":
    """Return a comparison with the entries that the options choose, compared as in the whole."""
    return comparison.only(lambda entry: is_chosen(arguments, entry.task, entry.method, entry.student))


def folder_comparison(arguments: argparse.Namespace) -> "Comparison":
    """Return the comparison of a folder of runs with the options' tasks, methods and students.

    Runs that others begin with are left out, but for those of methods that are asked for.

    Raises:
        InputError: if the folder cannot be read, or nothing is chosen.
    """
    from kd.results.gathering import compare_runs

    folder = Path(arguments.target).expanduser()
    results = all_results(folder)
    asked = (arguments.method or "").split(",")
    left_out = {result["run"] for result in first_runs(results) if result["method"] not in asked}
    shown = [result for result in results if result["run"] not in left_out]
    if not any(is_chosen(arguments, one["task"], one["method"], one["student"]) for one in shown):
        raise no_runs(arguments)
    compared = compare_runs(shown, f"Runs in {arguments.target}", folder, **baseline_of(arguments))
    return chosen_entries(compared, arguments)


def table_comparison(arguments: argparse.Namespace) -> "Comparison":
    """Return the comparison of a table with the options' tasks and methods.

    Raises:
        InputError: if the table or its files are not valid, or nothing is chosen.
    """
    from kd.results.gathering import compare_table, with_runs
    from kd.table.definition import load_table

    table = load_table(arguments.target)
    runs = arguments.runs.expanduser()
    records = load_results(runs) if runs.is_dir() else []
    ours, paper = table.folder / "ours.csv", table.folder / "paper.csv"
    comparison = compare_table(
        ours,
        paper,
        arguments.scale,
        table.labels(arguments.scale),
        title=table.title,
        protocol=table.protocol,
        any_budget=arguments.any_budget,
        **baseline_of(arguments),
    )
    chosen = chosen_entries(with_runs(comparison, records, runs), arguments)
    if not chosen.entries:
        raise InputError(f"table {table.name} has no such figures: '{table.folder}' has no paper.csv and no ours.csv with them")
    return chosen


def deliver(comparison: "Comparison", arguments: argparse.Namespace) -> None:
    """Write a comparison in the format that is asked for."""
    if arguments.format == "svg":
        from kd.results.page import picture

        write(picture(comparison), arguments.out)
        return
    if arguments.format != "html":
        from kd.results.renderings import FORMATS

        write(FORMATS[arguments.format or "markdown"](comparison), arguments.out)
        return
    from kd.results.gathering import validation_curve
    from kd.results.maps import read_maps
    from kd.results.page import page

    folder = arguments.runs if is_table(arguments.target) else Path(arguments.target)
    folder = folder.expanduser()
    directories = {path.name.rpartition("-")[2]: path for path in folder.iterdir()} if folder.is_dir() else {}
    metrics = {digest: entry.metric for entry in reversed(comparison.entries) for digest in entry.digests.values()}
    curves = {
        digest: validation_curve(directories[digest] / "metrics.csv", metric)
        for digest, metric in metrics.items()
        if digest in directories
    }
    maps = {digest: read_maps(directories[digest]) for digest in metrics if digest in directories}
    write(page(comparison, curves, maps, about=f"Made by {version_line()}"), arguments.out)


def write(text: str, out: Path | None) -> None:
    """Write a text to a file, or to standard output.

    Raises:
        InputError: if the file cannot be written.
    """
    if out is None:
        sys.stdout.write(text)
        return
    out = out.expanduser()
    with writing(out, "--out"):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, text)
    print(out)


def print_tables(results: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Print a table of each task."""
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
