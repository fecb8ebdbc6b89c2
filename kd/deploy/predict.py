"""`kd-predict`: labels and probabilities for the texts of a file of any size, by a student of a run or of an exported folder.

The file is read a few rows at a time, and the same command goes on where it was stopped. Of an exported folder nothing that
trains is imported.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.errors import InputError, one_of, prefix_error_keys, with_keys
from kd.system.command import ended
from kd.system.hardware import configure_openmp, version_line

if TYPE_CHECKING:
    from kd.data.readers import Layout
    from kd.deploy.folder import Deployed

DESCRIPTION = """Predict the texts of a file with the student of a finished run, or of a folder that kd-export wrote. Writes a
line for each text: its line in the file, the label, and the probability of each class; or the score."""

EPILOG = """words:
  RUN                    directory of a finished run, or a folder that kd-export wrote
  FILE                   .csv, .tsv, .jsonl, .parquet or .arrow with the text columns of training; .txt with a text on each line
  task.text=[a,b]        other names of the text columns
  task.delimiter=pipe    as are task.format, task.columns, task.quoted, task.pattern and task.encoding, as for
                         kd-train task=file

examples:
  kd-predict runs/kd-3l-rotten_tomatoes-s0-* reviews.csv
  kd-predict exported/kd-3l-rte-s0-* pairs.jsonl --format int8 --out predictions.jsonl"""

LAYOUT = ("format", "delimiter", "columns", "quoted", "pattern", "encoding")
"""Options of a file, as `task.<option>`: the attributes of `Layout`, in its order."""

LITERAL = ("delimiter", "pattern", "encoding")
"""Options whose values are read as they are, perhaps in quotes, not as YAML."""


def main() -> None:
    """Run the command `kd-predict`: status 2 for an error of the command, 130 on an interrupt."""
    arguments = parser().parse_intermixed_args()
    configure_openmp()
    with ended("kd-predict", "--out"):
        predict(arguments)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    kind = argparse.RawDescriptionHelpFormatter
    found = argparse.ArgumentParser(prog="kd-predict", description=DESCRIPTION, epilog=EPILOG, formatter_class=kind)
    found.add_argument("run", type=Path, metavar="RUN", help="directory of a finished run, or an exported folder")
    found.add_argument("file", type=Path, metavar="FILE", help="file with the texts")
    found.add_argument("words", nargs="*", metavar="task.OPTION=VALUE", help="layout of the file, see below")
    found.add_argument("--student", metavar="NAME", help="one of several students of a cohort, or task of a mixture")
    found.add_argument(
        "--format", metavar="NAME", help="torch, onnx, int8 or openvino (default: torch if it is there, else onnx)"
    )
    found.add_argument(
        "--out", type=Path, metavar="FILE", help=".csv, .tsv or .jsonl to write (default: <name>.predictions.csv beside FILE)"
    )
    found.add_argument("--version", action="version", version=version_line())
    return found


def overrides_of(words: Sequence[str]) -> "tuple[list[str] | None, Layout]":
    """Return the text columns that words name, if they do, and the layout of the file.

    Raises:
        InputError: for a word that is none, or a value that is not YAML.
    """
    import yaml

    from kd.config.values import one_line, switch
    from kd.data.readers import Layout
    from kd.data.sources import as_names

    values: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        option = name.removeprefix("task.")
        if not equals or option == name or option not in ("text", *LAYOUT):
            raise one_of(word, tuple(f"task.{option}=..." for option in ("text", *LAYOUT)), "FILE")
        try:
            values[option] = unquoted(value) if option in LITERAL else yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"{word} is not YAML: {one_line(error)}", name) from error
    if values.get("quoted") is not None:
        switch(values["quoted"], "task.quoted")
    for option in ("text", "columns"):
        names = as_names(values.get(option))
        values[option] = [names] if isinstance(names, str) else names
    return values.pop("text"), Layout(**values, configurable=True)


def unquoted(value: str) -> str:
    """Return a value without the quotes around it, which Hydra needs around some and takes off.

    >>> unquoted('"(?P<text>.+)"'), unquoted(";"), unquoted('"')
    ('(?P<text>.+)', ';', '"')
    """
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value


def predict(arguments: argparse.Namespace) -> None:
    """Predict a file and print where the predictions are.

    Raises:
        InputError: for an error that the user can correct.
    """
    text, layout = overrides_of(arguments.words)

    from kd.data.readers import check_file
    from kd.deploy.files import FILE, checked_out
    from kd.deploy.folder import is_exported, read_folder

    path = arguments.file.expanduser()
    check_file(path, FILE)
    out = (arguments.out or path.with_name(f"{path.stem}.predictions.csv")).expanduser()
    checked_out(out)
    folder = arguments.run.expanduser()
    if is_exported(folder) and arguments.student is None:
        deployed = read_folder(folder)
    else:  # imports what reads configurations of runs
        from kd.deploy.source import student_of

        deployed = student_of(folder, arguments.student).deployed
    if text is not None and len(text) != len(deployed.text):
        columns = "two columns" if len(deployed.text) == 2 else "one column"
        raise InputError(f"task.text={text}: the texts of '{deployed.task}' are in {columns}", "task.text")
    format = arguments.format or next((name for name in ("torch", "onnx") if name in deployed.files), None)
    count = predict_with(deployed, format or next(iter(deployed.files)), path, out, text, layout)
    say(f"{count:,} texts")
    print(out)


def predict_with(deployed: "Deployed", format: str, path: Path, out: Path, text: Sequence[str] | None, layout: "Layout") -> int:
    """Predict a file with a student, and return the number of its texts.

    Args:
        deployed: the student.
        format: format of its file that is run.
        path: the file with the texts.
        out: the file to write.
        text: text columns; None for those of training.
        layout: layout of the file.

    Raises:
        InputError: see `kd.deploy.files.predict_file`, `kd.deploy.runtimes.open_student`.
    """
    from kd.data.tokenized import Tokens, in_order, tokenizer_fingerprint
    from kd.deploy.files import predict_file
    from kd.deploy.folder import FORMATS, KEY
    from kd.deploy.runtimes import open_student
    from kd.models.pretrained import load_tokenizer
    from kd.system.distributed import device
    from kd.system.model_sources import file_fingerprint

    runtime = open_student(deployed, format, device("auto"))
    tokenizer = load_tokenizer(str(deployed.folder), KEY)
    identity = {
        "model": [file_fingerprint(deployed.folder / name) for name in ("config.json", *FORMATS[format].paths)],
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "max_length": deployed.max_length,
        "labels": None if deployed.labels is None else list(deployed.labels),
        "format": format,
    }

    def logits(table: Any) -> Any:
        return in_order(Tokens(tokenizer, table.texts, deployed.max_length), runtime.logits)

    with options_named():
        return predict_file(path, out, text or deployed.text, layout, deployed.labels, logits, identity, say)


@contextmanager
def options_named() -> Iterator[None]:
    """Put `task.` before the options that errors name, also in errors about FILE.

    Raises:
        InputError: in place of one that names an option.
    """
    from kd.deploy.files import FILE

    names = ("text", *LAYOUT)
    try:
        with prefix_error_keys("task", names):
            yield
    except InputError as error:
        if error.key != FILE:
            raise
        raise InputError(with_keys(error.message, "task", names), FILE) from error


def say(words: str) -> None:
    """Print progress, apart from the output of the command."""
    print(words, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
