"""Results of a study: the table of its trials, the best one's command, and both as files."""

import csv
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.table import Table

from kd.results.tables import console, score
from kd.system.files import atomic_write, write_text, writing
from kd.tune.make import Search, state
from kd.tune.study import Entry, Study


def conclude(search: Search, study: Study) -> int:
    """State the number of trials in the records of their runs, write and print the result; return the exit status.

    Raises:
        InputError: if a file cannot be written, or the journal is damaged.
    """
    entries = study.entries()
    state(search, study, entries, [entry for entry in entries if entry.is_finished])
    write_trials(study.folder / "trials.csv", search, entries)
    out = console()
    out.print()
    out.print(table(search, study, entries))
    finished = [entry for entry in entries if entry.is_finished]
    size = search.space.size
    if size is not None and size == len([entry for entry in entries if entry.is_finished or entry.state == "failed"]):
        out.print(f"The search space is exhausted: it has {size} points.")
    if (best := study.best(entries)) is not None:
        write_best(study.folder / "best.yaml", search, study, best, finished)
        print_best(search, study, best, finished)
    failed = [entry for entry in entries if entry.state == "failed"]
    for entry in failed:
        reason = "" if entry.failure is None else f": {entry.failure.line}"
        print(f"trial {entry.number} failed{reason}", file=sys.stderr)
    return 1 if failed or best is None else 0


def table(search: Search, study: Study, entries: Sequence[Entry]) -> Table:
    """Return the table of a study's trials."""
    best = study.best(entries)
    found = Table(title=f"study {study.name}", title_justify="left")
    for column in ("trial", *search.space.parameters, search.by, "epochs", "state", "run"):
        found.add_column(column, justify="right" if column in (search.by, "epochs", "trial") else "left", overflow="fold")
    for entry in entries:
        value = "" if entry.value is None else score(search.monitor, entry.value)
        words = f"{entry.state}: the best" if entry == best else entry.state
        values = (shown(entry.point.get(name)) for name in search.space.parameters)
        found.add_row(str(entry.number), *values, value, str(entry.epochs or ""), words, entry.run or "")
    return found


def shown(value: object) -> str:
    """Return a value of a parameter for a table.

    >>> shown(3.5271e-05), shown("last"), shown(None)
    ('3.53e-05', 'last', '')
    """
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def best_command(search: Search, study: Study, best: Entry, count: int) -> str:
    """Return the command of kd-train with the settings of the best trial, quoted for a shell.

    Its figures state the search. If trials were compared on a part of train, the command trains on all of it.
    """
    words = [word for word in search.command if not word.startswith(("task.holdout=", "tuned."))]
    stated = [f"tuned.study={study.name}", f"tuned.trials={count}", f"tuned.by={search.by}"]
    return shlex.join(["kd-train", *words, *search.space.overrides(best.point), *stated])


def print_best(search: Search, study: Study, best: Entry, finished: Sequence[Entry]) -> None:
    """Print the best trial, what its figure is worth, and the command."""
    pruned = sum(entry.state == "pruned" for entry in finished)
    print(
        f"\nbest of {len(finished)} trials ({pruned} pruned) by {search.by}: trial {best.number}, "
        f"{score(search.monitor, best.value)}\n"
        "It was chosen by this figure, which is therefore optimistic. No score on test was read: report that of this setting\n"
        "alone, once, with the number of trials; a baseline deserves as many.\n"
        f"Files: {study.folder}\n\n{best_command(search, study, best, len(finished))}",
        flush=True,
    )


def write_trials(path: Path, search: Search, entries: Sequence[Entry]) -> None:
    """Write the trials as a CSV file.

    Raises:
        InputError: if it cannot be written.
    """
    with writing(path), atomic_write(path, newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["trial", "state", search.by, "epochs", "run", *search.space.parameters, "failure"])
        for entry in entries:
            about = (entry.number, entry.state, entry.value, entry.epochs, entry.run)
            row = (
                *about,
                *(entry.point.get(name) for name in search.space.parameters),
                entry.failure and entry.failure.message,
            )
            writer.writerow("" if value is None else value for value in row)


def write_best(path: Path, search: Search, study: Study, best: Entry, finished: Sequence[Entry]) -> None:
    """Write the best trial as a YAML file.

    Raises:
        InputError: if it cannot be written.
    """
    content = {
        "study": study.name,
        "trials": len(finished),
        "pruned": sum(entry.state == "pruned" for entry in finished),
        "by": search.by,
        "value": best.value,
        "trial": best.number,
        "run": best.run,
        "overrides": list(search.space.overrides(best.point)),
        "command": best_command(search, study, best, len(finished)),
    }
    with writing(path):
        write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000))
