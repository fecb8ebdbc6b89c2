"""`kd-bench`: training cost of distillation relative to fine-tuning the same student, and relative to another framework.

Absolute rates depend more on the machine than on the method, so candidates run alternately and their ratios are reported.
"""

import argparse
import importlib.util
import os
import sys
from pathlib import Path

from kd.errors import InputError
from kd.system.hardware import configure_openmp, version_line

DESCRIPTION = """Time a method's training steps beside plain fine-tuning of the same student in the same harness, and, with
--peer, beside another framework: TextBrewer for classification, sentence-transformers for scores of pairs of texts. Each
candidate has a process of its own; they take turns, and one works at a time. A turn is an epoch over the same few training
examples, and the first turn of each is a warm-up. Only the figures are kept. Teachers that a run would fine-tune are taken
untrained: speed does not depend on their weights."""


def main() -> None:
    """Run the command `kd-bench`; exit status 2 for a user error, 1 if a candidate's process dies."""
    parser = argparse.ArgumentParser(prog="kd-bench", description=DESCRIPTION)
    parser.add_argument("overrides", nargs="*", help="as for kd-train: method=pkd student=3l task=rotten_tomatoes ...")
    parser.add_argument("--steps", type=_positive, default=20, help="optimiser steps of one turn (default 20)")
    parser.add_argument("--repeats", type=_positive, default=5, help="turns of each, after a warm-up (default 5)")
    parser.add_argument("--peer", action="store_true", help="also TextBrewer or sentence-transformers, by the task")
    parser.add_argument("--bare", action="store_true", help="also fine-tuning in a bare loop, without the trainer")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to this file")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the ratios; needs pip install 'kd[bench]'")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write bench.json, table.md and bench.png into this folder")
    parser.add_argument("--version", action="version", version=version_line())
    arguments = parser.parse_intermixed_args()
    configure_openmp()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers warn where a data loader forks
    from kd.bench.workers import WorkerDied

    try:
        if arguments.picture or arguments.out:
            need("matplotlib", "--picture" if arguments.picture else "--out")
        from kd.bench.benchmark import benchmark, report

        found = benchmark(arguments.overrides, arguments.steps, arguments.repeats, peer=arguments.peer, bare=arguments.bare)
    except InputError as error:
        print(f"kd-bench: {error}", file=sys.stderr)
        sys.exit(2)
    except WorkerDied as error:
        print(f"kd-bench: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    report(found, arguments.json, arguments.picture, arguments.out)


def need(package: str, option: str, extra: str = "bench") -> None:
    """Check that an optional package, which an extra of this one installs, can be imported.

    Raises:
        InputError: if it is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{option} needs {package}, which is not installed: pip install 'kd[{extra}]'", option)


def _positive(word: str) -> int:
    if not word.isdigit() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word} is not a whole number from 1")
    return int(word)
