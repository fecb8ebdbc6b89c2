"""`kd-probe`: how finished students differ from their teachers, beside controls that learnt from labels alone.

Source: Mohanty, Roosta and Passban, What is Lost in Knowledge Distillation?, ENLSP workshop at NeurIPS 2023, arXiv:2311.04142,
of which only the abstract could be read: it asks how a student differs from its teacher, whether distillation loses
information, whether the loss follows a pattern, for which tasks, and what the numbers of layers and of attention heads
contribute. The measures here are our choice.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kd.errors import InputError, one_of
from kd.system.command import ended, split_words
from kd.system.hardware import configure_openmp, version_line

if TYPE_CHECKING:
    from kd.probe.result import Settings
    from kd.probe.summary import Summary

DESCRIPTION = """Compare the students of finished runs with their teachers: retention, agreement, churn, divergences and
calibration, overall and by slices; similarity of layers (linear CKA), linear probes, attention, and drops without a head or a
layer. The control, fine-tuning of the same student, initialisation, data, budget and seed, is found in the folder of the run,
and stands beside every figure. Writes probe.json and probe.html."""

EPILOG = """words:
  RUN                 directory of a finished run; several seeds of one configuration are summarised
  paths.glue=FOLDER   an override of the runs' configurations, for data that have moved

examples:
  kd-probe runs/kd-3l-rotten_tomatoes-s0-*
  kd-probe runs/kd-3l-* runs/pkd-3l-* --split test --only differences
  kd-probe runs/finetune-3l-rte-s0-* --teacher runs/finetune-full-rte-s0-*"""


def main() -> None:
    """Run the command `kd-probe`: status 2 for an error of the command, 130 on an interrupt."""
    arguments = parser().parse_args()
    configure_openmp()
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with ended("kd-probe"):
        probe(arguments)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    kind = argparse.RawDescriptionHelpFormatter
    found = argparse.ArgumentParser(prog="kd-probe", description=DESCRIPTION, epilog=EPILOG, formatter_class=kind)
    found.add_argument("words", nargs="+", metavar="RUN", help="directories of finished runs, and overrides, see below")
    found.add_argument(
        "--out", type=Path, default=Path("probe"), metavar="FOLDER", help="folder of both files (default: probe)"
    )
    found.add_argument("--split", default="validation", help="split that is compared (default: validation)")
    found.add_argument("--only", metavar="PARTS", help="differences,cka,probes,attention,ablation: these parts alone")
    found.add_argument("--teacher", type=Path, metavar="RUN", help="a finished run whose student takes the teacher's place")
    found.add_argument("--examples", default="500", metavar="N", help="examples of CKA and linear probes (default: 500)")
    found.add_argument("--train-examples", default="500", metavar="N", help="of each linear probe (default: 500)")
    found.add_argument(
        "--part-examples",
        default="128",
        metavar="N",
        help="examples of attention, and of models without a head or a layer, a pass for each (default: 128)",
    )
    found.add_argument("--vectors", default="mean", help="mean or cls: vector of an example, of all tokens or the first")
    found.add_argument("--version", action="version", version=version_line())
    return found


def settings_of(arguments: argparse.Namespace) -> "Settings":
    """Return the settings that options choose.

    Raises:
        InputError: for a value that an option does not have.
    """
    from kd.probe.outputs import VECTORS
    from kd.probe.result import PARTS, Settings

    parts = PARTS if arguments.only is None else tuple(arguments.only.split(","))
    for part in parts:
        if part not in PARTS:
            raise one_of(part, PARTS, "--only")
    if arguments.vectors not in VECTORS:
        raise one_of(arguments.vectors, VECTORS, "--vectors")
    counts = {}
    for name in ("examples", "train_examples", "part_examples"):
        key, text = f"--{name.replace('_', '-')}", getattr(arguments, name)
        if not (text.isascii() and text.isdigit() and 2 <= int(text) <= 10**9):
            raise InputError(f"{key}={text} must be a whole number, at least 2", key)
        counts[name] = int(text)
    return Settings(arguments.split, parts, vectors=arguments.vectors, **counts)


def probe(arguments: argparse.Namespace) -> None:
    """Analyse runs, write the files, and print a table.

    Raises:
        InputError: for an error that the user can correct.
    """
    settings = settings_of(arguments)
    directories, overrides = split_words(arguments.words, "kd-probe")

    from kd.probe.analysis import Analysis
    from kd.probe.output_files import write_files
    from kd.probe.summary import summaries_of
    from kd.results.finished import finished_tasks

    runs = [run for directory in directories for run in finished_tasks(directory, overrides)]
    given = None if arguments.teacher is None else finished_tasks(arguments.teacher.expanduser(), overrides)
    analysis = Analysis(settings, given, lambda words: print(words, file=sys.stderr, flush=True))
    summaries = summaries_of(analysis.cases(runs))
    files = write_files(arguments.out.expanduser(), summaries, settings)
    print_table(summaries)
    for file in files:
        print(file)


def print_table(summaries: "Sequence[Summary]") -> None:
    """Print a row for each configuration of each task; without differences only what was left out."""
    from rich.table import Table

    from kd.probe.words import LABELS, spread
    from kd.results.tables import console

    out = console()
    for summary in summaries:
        about = summary.cases[0].about
        table = Table(title=f"{about.task}: {summary.label}, teacher {about.teacher}, {about.split}", title_justify="left")
        for column in ("figure", "teacher", "student", "control"):
            table.add_column(column, justify="left" if column == "figure" else "right")
        metric = about.metrics[0]
        names = {f"score.{metric}": metric, f"delta.{metric}": "teacher minus model", f"retention.{metric}": "model / teacher"}
        for name, label in {**names, **LABELS}.items():
            if name in summary.figures:
                of = summary.figures[name]
                models = [spread(name, of.get(model), len(summary.cases)) for model in ("student", "control")]
                table.add_row(label, spread(name, summary.teacher.get(name)), *models)
        if summary.figures:
            out.print(table)
        for case in summary.cases:
            if case.about.control is None:
                out.print(f"No control of seed {case.about.seed}: {case.about.without_control}", soft_wrap=True)
        for name, reason in {name: reason for case in summary.cases for name, reason in case.absent.items()}.items():
            out.print(f"Left out, {name}: {reason}", soft_wrap=True)
    if any(summary.figures for summary in summaries):
        out.print("Shares and scores in percent; brackets: 95 % intervals over examples; ±: standard deviation over seeds.")
