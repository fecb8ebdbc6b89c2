"""Words and ends of commands: the runs that they name, their messages and exit statuses."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kd.errors import DISK_FULL, InputError, disk_is_full

INTERRUPTED = 130
"""Exit status of a process that was interrupted."""


@contextmanager
def ended(name: str, out: str = "paths.runs", *, resumes: bool = True) -> Iterator[None]:
    """End the process with a message for an error that the user can correct, a full disk, or an interrupt.

    Args:
        name: name of the command.
        out: key or option that says where it writes.
        resumes: whether the same command goes on where it was interrupted.

    Raises:
        SystemExit: with status 2 for such an error and a full disk, 130 for an interrupt, 1 if nobody reads the output.
    """
    try:
        yield
    except InputError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted{'; the same command goes on where it was' if resumes else ''}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if not disk_is_full(error):
            raise
        print(f"{name}: {DISK_FULL}\n  change: {out}", file=sys.stderr)
        sys.exit(2)


def split_words(words: Sequence[str], command: str) -> tuple[list[Path], list[str]]:
    """Return the directories of runs among the words of a command, each once, and the overrides.

    Args:
        words: the words.
        command: name of the command, for messages.

    Raises:
        InputError: for an override that changes more than where files are, or without a run.
    """
    overrides = [word for word in words if "=" in word and not Path(word).expanduser().exists()]
    for word in overrides:
        if not word.startswith("paths."):
            raise InputError(f"{word} would change what the runs are of; {command} takes paths.glue=<folder> alone", "RUN")
    runs = list(dict.fromkeys(Path(word).expanduser() for word in words if word not in overrides))
    if not runs:
        raise InputError(f"name the directory of a finished run: {command} runs/<run>", "RUN")
    return runs, overrides


def one_run(words: Sequence[str], command: str) -> tuple[Path, list[str]]:
    """Return the directory of the one run among the words of a command, and the overrides.

    Arguments and errors as for `split_words`.

    Raises:
        InputError: for several runs.
    """
    runs, overrides = split_words(words, command)
    if len(runs) > 1:
        raise InputError(f"name one run, not {len(runs)}: {', '.join(map(str, runs))}", "RUN")
    return runs[0], overrides
