"""Text of `kd-train --help`: the groups by what they are about, with their options, on one screen."""

import textwrap
from pathlib import Path

from kd.config.compose import conf_folder

PARTS = {
    "What is learnt from": ("method", "teacher", "pool", "cohort", "engine"),
    "The student": ("student", "surgery", "pretrain"),
    "The data": ("task", "edit"),
    "Training": ("optimizer", "trainer"),
    "Runs and where they go": ("experiment", "sweep", "launcher", "logger", "paths"),
}
"""Heading -> groups of `conf` that `kd-train` chooses from."""

LISTS = ("teacher", "surgery", "edit")
"""Groups of which several options are chosen, as in `teacher=[a,b]`."""

WIDTH, INDENT = 80, 13

HEAD = """kd-train GROUP=OPTION ... KEY=VALUE ... [--multirun] [--cfg job]
Fine-tunes missing teachers, trains the student, evaluates and exports it.
  kd-train method=kd student=2l task=file task.train=train.csv
  kd-train --multirun method=finetune,kd,pkd seed=0,1,2"""

FOOT = """--cfg job: print every key with its value; optimizer.lr=1e-4 sets one.
Keys without a group: seed backbone cache preflight resume. --version: versions.
Completion of words: --shell-completion install=bash, zsh or fish."""


def options(folder: Path) -> list[str]:
    """Return the names of the files of a group."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def help_text() -> str:
    """Return the help, at most 80 columns wide."""
    lines = [*HEAD.split("\n")]
    for heading, groups in PARTS.items():
        lines.append(f"{heading}:")
        for group in groups:
            name = f"{group}=[]" if group in LISTS else group
            lines += textwrap.wrap(
                " ".join(options(conf_folder() / group)),
                WIDTH,
                initial_indent=f"  {name:<{INDENT - 2}}",
                subsequent_indent=" " * INDENT,
                break_on_hyphens=False,
            )
    return "\n".join([*lines, *FOOT.split("\n")])
