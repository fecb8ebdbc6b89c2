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
    from kd.results.comparison import Comparison, Entry

CHOICES = ("markdown", "csv", "latex", "json", "html", "svg")
"""Formats of comparisons, whose modules are imported only where they are used."""

CHOOSE = ("task", "method", "student")
"""Options that choose what is shown."""


class Output(StrEnum):
    """Outputs of the command."""

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
"""Output -> the options that change it."""

OF_TABLES = {
    "scale": "the cells of a table have a scale, runs of a folder have none",
    "runs": "the folder of the runs is the target itself",
    "any_budget": "runs of a folder may have other data and students of one name; compare a table",
}
"""Options about tables alone -> reason why they do not apply to a folder of runs."""

REASONS = {(Output.DASHBOARD, name): "a dashboard shows all runs of its group" for name in CHOOSE}
"""Reasons why an option does not apply to what is made, where they are not plain."""

OF_FOLDERS = (Output.RECORDS, Output.DASHBOARD)
"""Outputs that are made of a folder of runs alone."""


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
    arguments = parser().parse_args()
    try:
        table = is_table(arguments.target)
        output = output_of(arguments, table)
        if table or Path(arguments.target).expanduser().is_dir():
            check_options(arguments, output, table)
        if output in (Output.COMPARISON, Output.PICTURE):
            deliver(comparison_of(arguments, table), arguments, runs_of(arguments, table))
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
    found.add_argument("--scale", help="of a table: whose cells are looked for (default local)")
    found.add_argument("--runs", type=Path, help="of a table: runs with sizes, costs, curves and predictions (default runs)")
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
    if arguments.wandb is not None or arguments.group is not None:
        return Output.DASHBOARD
    if arguments.json:
        return Output.RECORDS
    if arguments.format == "svg":
        return Output.PICTURE
    return Output.COMPARISON if table or arguments.format or arguments.baseline else Output.TABLES


def check_options(arguments: argparse.Namespace, output: Output, table: bool) -> None:
    """Check that each option that is given changes what is made.

    Args:
        arguments: the options; one that is not given is None or False.
        output: what is made.
        table: whether it is made of a table, and not of a folder of runs.

    Raises:
        InputError: naming an option that is empty or would be ignored.
    """
    given = {name: value for name, value in vars(arguments).items() if name != "target" and value not in (None, False)}
    if table and output in OF_FOLDERS:
        first = next(name for name in USED[output] if name in given and name not in CHOOSE)
        raise InputError(f"{output} can only be made of finished runs: name their folder in place of the table", f"--{first}")
    for name, value in given.items():
        option = f"--{name.replace('_', '-')}"
        if value == "":
            raise InputError(f"{option} is empty: leave it out, or name something", option)
        if name in OF_TABLES and not table:
            raise InputError(OF_TABLES[name], option)
        if name not in USED[output]:
            reason = REASONS.get((output, name), f"{option} changes nothing in {output}")
            raise InputError(f"{reason}: leave it out", option)


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
    folder = Path(arguments.target).expanduser()
    chosen = "".join(f", {key}={value}" for key in CHOOSE if (value := getattr(arguments, key)) is not None)
    why = f" with{chosen[1:]}" if chosen else ""
    return InputError(
        f"no finished runs in '{folder}'{why}" + ("" if folder.is_dir() else "; there is no such folder or table")
    )


def is_chosen(arguments: argparse.Namespace, task: str, method: str, student: str) -> bool:
    """Return whether the options choose something of this task, method and student."""
    methods, students = (None if given is None else given.split(",") for given in (arguments.method, arguments.student))
    return (
        arguments.task in (None, task) and (methods is None or method in methods) and (students is None or student in students)
    )


def runs_of(arguments: argparse.Namespace, table: bool) -> Path:
    """Return the folder of the runs that a comparison is of, or that add sizes and tests to that of a table.

    Raises:
        InputError: if `--runs` is no folder.
    """
    if not table:
        return Path(arguments.target).expanduser()
    found: Path = (arguments.runs or Path("runs")).expanduser()
    if arguments.runs is not None and not found.is_dir():
        raise InputError(f"there is no folder '{found}'", "--runs")
    return found


def comparison_of(arguments: argparse.Namespace, table: bool) -> "Comparison":
    """Return the comparison of a table or of a folder of runs, with the tasks, methods and students that the options choose.

    They are chosen after all were compared, so that no verdict depends on them.

    Raises:
        InputError: if the table, its files or the folder cannot be read, or nothing is chosen.
    """
    from kd.results.comparison import with_details
    from kd.results.gathering import with_runs

    def chosen(entry: "Entry") -> bool:
        return is_chosen(arguments, entry.task, entry.method, entry.student)

    folder = runs_of(arguments, table)
    records = all_results(folder) if folder.is_dir() or not table else []
    compared = table_comparison(arguments) if table else folder_comparison(arguments, records)
    groups = {(entry.task, entry.student) for entry in compared.entries if chosen(entry)}
    if not groups:
        raise no_figures(arguments.target) if table else no_runs(arguments)
    whole_groups = compared.only(lambda entry: (entry.task, entry.student) in groups)  # p is corrected in these
    if arguments.format == "svg":  # a picture shows no test
        return with_details(whole_groups.only(chosen), {record["digest"]: record for record in records})
    return with_runs(whole_groups, records, folder).only(chosen)


def no_figures(name: str) -> InputError:
    """Return the error that the options choose no figure of a table."""
    from kd.table.definition import load_table

    table = load_table(name)
    return InputError(f"table {table.name} has no such figures: '{table.folder}' has no paper.csv and no ours.csv with them")


def table_comparison(arguments: argparse.Namespace) -> "Comparison":
    """Return the comparison of a table.

    Raises:
        InputError: if the table or its files are not valid.
    """
    from kd.results.comparison import BASELINE
    from kd.results.gathering import compare_table
    from kd.table.definition import load_table

    table, scale = load_table(arguments.target), arguments.scale or "local"
    return compare_table(
        table.folder / "ours.csv",
        table.folder / "paper.csv",
        scale,
        table.labels(scale),
        title=table.title,
        protocol=table.protocol,
        any_budget=arguments.any_budget,
        baseline=arguments.baseline or BASELINE,
    )


def folder_comparison(arguments: argparse.Namespace, records: Sequence[dict[str, Any]]) -> "Comparison":
    """Return the comparison of a folder of runs, without those that others begin with.

    Raises:
        InputError: if there is none, or none of the baseline.
    """
    from kd.results.comparison import BASELINE, compare, entries_of_records

    first = first_runs(records)
    compared = [record for record in records if record not in first]
    asked = arguments.method.split(",") if arguments.method else []
    if begun := [record["method"] for record in first if record["method"] in asked]:
        words = f"runs of {', '.join(dict.fromkeys(begun))} that others begin with are not compared"
        raise InputError(f"{words}; tables without --format and --baseline show them", "--method")
    if not compared:
        raise no_runs(arguments)
    return compare(entries_of_records(compared), title=f"Runs in {arguments.target}", baseline=arguments.baseline or BASELINE)


def deliver(comparison: "Comparison", arguments: argparse.Namespace, folder: Path) -> None:
    """Write a comparison in the format that is asked for.

    Args:
        comparison: the comparison.
        arguments: the options.
        folder: folder of the runs, whose curves and maps of layers a page shows.
    """
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
    if out.is_dir():
        raise InputError(f"'{out}' is a folder: name a file", "--out")
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
