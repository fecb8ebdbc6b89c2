"""The command `kd-clean`: list files of a folder of runs that serve no purpose, with sizes and reasons; ask, and remove them.

Listed are, in the folder of runs and without following links:

- files of finished runs that `trainer.keep` does not retain: the states of optimisers in runs of earlier versions, and the rest
  of a removal that was interrupted;
- caches of teachers that were made from other weights or by another version, and those of teachers that no run uses;
- `.edits`, if no run has an edit that reads a model;
- drafts of files whose process has ended;
- with `--unfinished DAYS`, runs that are not finished and were not changed for so many days.

A finished run is a result, and is never removed; nor is a study of kd-tune (`tune`). A run that another process has locked is
left alone. What was listed is checked again, with its lock held, when it is removed.

Exit status 0 if there is nothing to remove, all that was confirmed is removed, the answer is no, or only a list was requested
(`--dry-run`, or without `--yes` a standard input that is no terminal); 2 if the folder cannot be read, or something cannot be
removed; 130 on Ctrl-C.
"""

import argparse
import os
import sys
from pathlib import Path

from kd.errors import InputError
from kd.system.command import INTERRUPTED
from kd.system.files import readable_size
from kd.system.hardware import version_line


def days(text: str) -> float:
    """Return a number of days from the command line.

    Raises:
        ValueError: for something else than a number from 0.
    """
    number = float(text)
    if not 0 <= number < float("inf"):
        raise ValueError(text)
    return number


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    arguments = argparse.ArgumentParser(
        prog="kd-clean",
        description="List files of a folder of runs that serve no purpose, ask, and remove them.",
        epilog="Exit status 0 also if nothing is removed; 2 if the folder cannot be read, or something cannot be removed.",
    )
    arguments.add_argument("runs", nargs="?", default="runs", type=Path, help="folder of runs (paths.runs), default: runs")
    arguments.add_argument("--yes", action="store_true", help="remove without a question")
    arguments.add_argument("--dry-run", action="store_true", help="list only; so it is without a terminal and --yes")
    arguments.add_argument(
        "--unfinished", type=days, metavar="DAYS", help="also runs that are not finished and unchanged for so many days"
    )
    arguments.add_argument("--version", action="version", version=version_line())
    return arguments


def confirmed(arguments: argparse.Namespace) -> bool:
    """Return whether to remove what is listed: `--yes`, or the answer in a terminal."""
    if arguments.dry_run:
        return False
    if arguments.yes:
        return True
    if not sys.stdin.isatty():
        return False
    try:
        return input("Remove all of it? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def main() -> None:
    """Run the command `kd-clean`."""
    arguments = parser().parse_args()
    try:
        status = clean(arguments)
    except BrokenPipeError:  # `kd-clean | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except OSError as error:
        print(f"kd-clean: cannot read '{arguments.runs}': {error.strerror}\n  change: paths.runs", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("\nkd-clean: interrupted", file=sys.stderr)
        status = INTERRUPTED
    if status:
        sys.exit(status)


def clean(arguments: argparse.Namespace) -> int:
    """List, ask and remove; return the exit status.

    Raises:
        OSError: if the folder cannot be read.
    """
    from kd.training.leftovers import Folder

    folder = Folder(arguments.runs.expanduser(), arguments.unfinished)
    leftovers = list(folder.leftovers())
    for leftover in leftovers:
        print(f"{readable_size(leftover.bytes):>12}  {folder.shown(leftover)}\n{'':14}{leftover.reason}")
    for line in folder.notes:
        print(line)
    if not leftovers:
        print(f"nothing to remove in '{arguments.runs}'")
        return 0
    print(f"{readable_size(sum(leftover.bytes for leftover in leftovers)):>12}  in all")
    if not confirmed(arguments):
        print("nothing was removed" + ("" if sys.stdin.isatty() or arguments.dry_run else "; --yes removes it"))
        return 0
    freed, failed = 0, 0
    folder = Folder(folder.runs, arguments.unfinished)  # runs may have begun since the question
    for leftover in leftovers:
        try:
            freed += folder.remove(leftover)
        except (InputError, OSError) as error:
            failed += 1
            print(f"kd-clean: cannot remove {folder.shown(leftover)}: {error}", file=sys.stderr)
    print(f"{readable_size(freed):>12}  removed")
    return 2 if failed else 0


if __name__ == "__main__":
    main()
