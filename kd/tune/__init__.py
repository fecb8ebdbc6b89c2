"""`kd-tune`: search of hyper-parameters, by commands that can be killed, repeated, and started on any number of machines."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kd.errors import InputError, one_of
from kd.system.command import ended
from kd.system.hardware import configure_openmp, version_line

if TYPE_CHECKING:
    from kd.tune.make import Search

DESCRIPTION = """Search the hyper-parameters of a command of kd-train. A trial is a run of kd-train. The best is chosen on
validation, or with task.holdout=0.1 on a part of train, and never on test."""

EPILOG = """words:
  SPACE              a search space of the package (kd-tune --list), or a file of yours, as mine.yaml
  n_trials=20        trials of the study, of all commands together, also after a restart (default 20)
  sampler=auto       grid (default where the points are counted), tpe (default elsewhere) or random
  pruner=median      median, halving or none: stops trials by their scores after each epoch
  study=NAME         name of the study (default: space, student, task, seed and digest of the settings)
  KEY=VALUE          an override of kd-train, of every trial
  KEY=A,B            choices to search; KEY=interval(1e-5,1e-3) is a range, and
                     'KEY=tag(log,interval(1e-5,1e-3))' one of a logarithmic scale

examples:
  kd-tune pkd n_trials=20 student=3l task=rte paths.glue=path/to/GLUE
  kd-tune method=kd 'optimizer.lr=tag(log,interval(1e-5,1e-3))' method.temperature=2,4,8 n_trials=30

The same command again goes on where it was, and several at once, on machines that share the folder of the runs, share a study.
Exit status: 0; 1 if a trial fails, 2 for an error of the command, 130 on an interrupt."""

DEFAULTS = {"n_trials": "20", "sampler": "auto", "pruner": "median", "study": ""}
"""Words of the command that are no overrides of kd-train, and their defaults."""


@dataclass(frozen=True)
class Settings:
    """Settings of a command.

    Attributes:
        space: name or file of the search space; None if the command names none.
        overrides: overrides of kd-train, some with several values.
        trials: number of trials of the study.
        sampler: one of `kd.tune.study.SAMPLERS`.
        pruner: one of `kd.tune.study.PRUNERS`.
        study: name of the study; None for the default.
    """

    space: str | None
    overrides: tuple[str, ...]
    trials: int
    sampler: str
    pruner: str
    study: str | None


def main() -> None:
    """Run the command `kd-tune`: status 1 if a trial fails, 2 for an error of the command, 130 on an interrupt."""
    arguments = parser().parse_intermixed_args()
    configure_openmp()
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with ended("kd-tune"):
        sys.exit(list_spaces() if arguments.list else tune(settings_of(arguments.words)))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    kind = argparse.RawDescriptionHelpFormatter
    found = argparse.ArgumentParser(prog="kd-tune", description=DESCRIPTION, epilog=EPILOG, formatter_class=kind)
    found.add_argument("words", nargs="*", metavar="WORD", help="search space, settings and overrides, see below")
    found.add_argument("--list", action="store_true", help="the search spaces of the package")
    found.add_argument("--version", action="version", version=version_line())
    return found


def settings_of(words: Sequence[str]) -> Settings:
    """Return the settings of a command's words.

    Raises:
        InputError: for two spaces, or a setting that is not valid.
    """
    from kd.tune.study import PRUNERS, SAMPLERS

    given, overrides, spaces = dict(DEFAULTS), [], []
    for word in words:
        key, equals, value = word.partition("=")
        if key in DEFAULTS and equals:
            given[key] = value
        elif equals or word.startswith(("~", "+")):
            overrides.append(word)
        else:
            spaces.append(word)
    if len(spaces) > 1:
        raise InputError(f"one search space is needed, not {' and '.join(spaces)}; overrides are KEY=VALUE", "space")
    count = given["n_trials"]
    if not (count.isascii() and count.isdigit() and 0 < int(count) <= 1_000_000):
        raise InputError(f"n_trials={count} must be a whole number from 1 to 1000000", "n_trials")
    for key, allowed in (("sampler", SAMPLERS), ("pruner", PRUNERS)):
        if given[key] not in allowed:
            raise one_of(given[key], allowed, key)
    name = spaces[0] if spaces else None
    return Settings(name, tuple(overrides), int(count), given["sampler"], given["pruner"], given["study"] or None)


def list_spaces() -> int:
    """Print the search spaces of the package."""
    from kd.tune.space import load_space, space_names

    for name in space_names():
        space = load_space(name)
        points = "" if space.size is None else f" ({space.size} points)"
        print(f"{name:20} {', '.join(space.parameters)}{points}")
    return 0


def search_of(settings: Settings) -> "Search":
    """Return what a command searches.

    Raises:
        InputError: if the space or the command is not valid, or the command was started by torchrun.
    """
    from kd.system import distributed
    from kd.tune.make import plan_search
    from kd.tune.space import Space, load_space, with_command

    if distributed.world() > 1:
        raise InputError("kd-tune runs trials in one process each: start it without torchrun, as often as there are GPUs")
    space = Space() if settings.space is None else load_space(settings.space)
    space, command = with_command(space, settings.overrides)
    return plan_search(space, command, settings.study)


def tune(settings: Settings) -> int:
    """Execute the trials of a study that are missing, and print the result; return the exit status.

    Raises:
        InputError: for an error that the user can correct.
        KeyboardInterrupt: on an interrupt, also SIGTERM.
    """
    from kd.launch.fan_out import interrupted_by_sigterm
    from kd.training.execute import check_all
    from kd.tune.make import execute_trial, trials
    from kd.tune.report import conclude
    from kd.tune.study import import_optuna

    import_optuna()
    search = search_of(settings)
    if not search.folder.is_dir():
        check_all(search.first)  # before a folder is made: what is wrong with the data or a model is wrong in every trial
    study = search.study(settings.sampler, settings.pruner)
    size = search.space.size
    points = "" if size is None else f" of {size} points"
    print(f"study {study.name}: {', '.join(search.space.parameters)}{points}\n{study.folder}", flush=True)
    with interrupted_by_sigterm():
        for trial in trials(study, settings.trials):
            execute_trial(search, study, trial)
    return conclude(search, study)
