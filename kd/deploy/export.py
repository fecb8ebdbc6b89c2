"""`kd-export`: the student of a finished run as ONNX, int8 and OpenVINO, checked against torch and on validation.

Each file is compared with torch at four shapes and by the task's metric on validation. A file that drops by more than
`--max-drop` points is kept aside with its figures, and the command ends with status 1.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.errors import InputError, one_of
from kd.system.command import ended, one_run
from kd.system.hardware import configure_openmp, version_line

if TYPE_CHECKING:
    from kd.deploy.check import Check
    from kd.deploy.source import Student

DESCRIPTION = """Export the student of a finished run as ONNX, int8 and OpenVINO, in the layout of the Hugging Face Hub. Each
file is compared with torch at four shapes and scored on validation; the model card states both."""

EPILOG = """words:
  RUN                 directory of a finished run
  paths.glue=FOLDER   an override of the run's configuration, for data that have moved

Exit status 1 if a file drops by more than --max-drop points: it is kept in OUT.rejected, with its figures.

examples:
  kd-export runs/kd-3l-rotten_tomatoes-s0-*
  kd-export runs/kd-3l-rte-s0-* --formats onnx,int8,openvino --max-drop 1 --out exported/rte"""


def main() -> None:
    """Run the command `kd-export`: status 1 for a missed gate, 2 for an error of the command, 130 on an interrupt."""
    arguments = parser().parse_intermixed_args()
    configure_openmp()
    with ended("kd-export", "--out", resumes=False):
        status = export(arguments)
    sys.exit(status)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    kind = argparse.RawDescriptionHelpFormatter
    found = argparse.ArgumentParser(prog="kd-export", description=DESCRIPTION, epilog=EPILOG, formatter_class=kind)
    found.add_argument("words", nargs="+", metavar="RUN", help="directory of a finished run, and overrides, see below")
    found.add_argument("--student", metavar="NAME", help="one of several students of a cohort, or task of a mixture")
    found.add_argument(
        "--formats",
        default="torch,onnx,int8",
        metavar="NAMES",
        help="torch,onnx,int8,openvino: files to write (default: torch,onnx,int8)",
    )
    found.add_argument("--out", type=Path, metavar="FOLDER", help="folder to write (default: exported/<run>)")
    found.add_argument(
        "--max-drop",
        default="0.5",
        metavar="POINTS",
        help="largest drop of the metric on validation: percent, of errors percent of torch's (default: 0.5)",
    )
    found.add_argument(
        "--exporter", default="torchscript", help="torchscript or dynamo: how torch writes ONNX (default: torchscript)"
    )
    found.add_argument("--version", action="version", version=version_line())
    return found


def formats_of(text: str) -> list[str]:
    """Return the formats of `--formats`, in the order in which they are written.

    Raises:
        InputError: for an unknown format, or none.
    """
    from kd.deploy.folder import FORMATS

    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in FORMATS:
            raise one_of(name, tuple(FORMATS), "--formats")
    return [name for name in FORMATS if name in names]


def points_of(text: str) -> float:
    """Return the number of `--max-drop`.

    Raises:
        InputError: for something else than a number from 0.
    """
    try:
        points = float(text)
    except ValueError:
        points = -1.0
    if not 0 <= points < float("inf"):
        raise InputError(f"--max-drop={text} must be a number of points from 0", "--max-drop")
    return points


def export(arguments: argparse.Namespace) -> int:
    """Export a student, print a table, and return the exit status.

    Raises:
        InputError: for an error that the user can correct; nothing is written then.
    """
    formats, max_drop = formats_of(arguments.formats), points_of(arguments.max_drop)

    from kd.config.values import word
    from kd.deploy.exporters import EXPORTERS
    from kd.deploy.source import student_of

    word(arguments.exporter, EXPORTERS, "--exporter")
    directory, overrides = one_run(arguments.words, "kd-export")
    student = student_of(directory, arguments.student, overrides)
    out = (arguments.out or Path("exported") / student.deployed.name).expanduser()
    check_out(out)
    checks, failed = write_folder(student, out, formats, max_drop, arguments.exporter)
    print_table(student, checks, failed, max_drop)
    if failed:
        print(f"kd-export: kept aside in '{aside_of(out)}': {', '.join(failed)}", file=sys.stderr)
    if len(failed) < len(checks):
        print(out)
    return 1 if failed else 0


def aside_of(out: Path) -> Path:
    """Return the folder beside an exported one with the files that missed the gate."""
    return out.with_name(f"{out.name}.rejected")


def check_out(out: Path) -> None:
    """Check that a folder may be written, or replaced because an earlier export wrote it.

    Raises:
        InputError: if something else is there, or the path has no name, as that of this folder.
    """
    from kd.deploy.folder import is_exported

    if out.name in ("", ".."):
        raise InputError(f"'{out}' must be a folder with a name", "--out")
    if os.path.lexists(out) and not is_exported(out):
        raise InputError(f"'{out}' is there already, and no folder that kd-export wrote: it is not replaced", "--out")
    if os.path.lexists(aside := aside_of(out)) and not (aside / FIGURES).is_file():
        raise InputError(f"'{aside}' is there already, and none of kd-export's: it is not replaced", "--out")


FIGURES = "figures.json"
"""File beside rejected ones with their checks."""


def write_folder(
    student: "Student", out: Path, formats: Sequence[str], max_drop: float, exporter: str
) -> "tuple[dict[str, Check], dict[str, list[str]]]":
    """Write the exported folder of a student atomically; it is not written if no file passes.

    Args:
        student: the student.
        out: the folder, replaced if it exists.
        formats: keys of `kd.deploy.folder.FORMATS`.
        max_drop: largest drop that passes, in points.
        exporter: one of `kd.deploy.exporters.EXPORTERS`.

    Returns:
        Format -> its check; and format -> why it failed, for those that did.

    Raises:
        InputError: for data that cannot be read, a model that an exporter refuses, or a folder that cannot be written.
    """
    from kd.deploy.exporters import scratch
    from kd.deploy.folder import FORMATS
    from kd.results.finished import examples_of
    from kd.system.files import made_by_success, writing

    examples = examples_of(student.run)
    with made_by_success(out.parent), writing(out, "--out"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with scratch(out) as temporary:
            draft, aside = temporary / "folder", temporary / "rejected"
            draft.mkdir()
            copy_plain(student.deployed.folder, draft)
            checks = write_files(student, draft, temporary, formats, exporter, examples)
            failed = {
                name: why
                for name, check in checks.items()
                if (why := check.failures(exact=FORMATS[name].exact, max_drop=max_drop))
            }
            passed = {name: check for name, check in checks.items() if name not in failed}
            if failed:
                keep_aside(student, draft, aside, {name: checks[name] for name in failed}, failed)
            if passed:
                write_record(student, draft, passed, failed, max_drop)
                put_in_place(draft, out, temporary / "earlier")
            put_in_place(aside, aside_of(out), temporary / "earlier rejected")
    return checks, failed


def put_in_place(draft: Path, out: Path, earlier: Path) -> None:
    """Rename a draft to a folder, if there is one; what was in its place is moved away whole, to where it is removed later."""
    if os.path.lexists(out):
        os.replace(out, earlier)
    if draft.exists():
        os.replace(draft, out)


def copy_plain(source: Path, target: Path) -> None:
    """Copy the files of a student other than its weights: configuration, tokenizer, card, results for the hub."""
    from kd.models.pretrained import WEIGHT_FILES

    shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*WEIGHT_FILES))


def write_files(
    student: "Student", folder: Path, temporary: Path, formats: Sequence[str], exporter: str, examples: Any
) -> "dict[str, Check]":
    """Write the files of a student in some formats; return the check of each, torch's first.

    Args:
        student: the student.
        folder: folder of the files.
        temporary: folder for files that others are made from.
        formats: see `write_folder`.
        exporter: see `write_folder`.
        examples: the task's examples, of which those of validation are scored.

    Raises:
        InputError: if an exporter refuses the model, or the data are not those of the run.
    """
    from kd.data.tokenized import Tokens
    from kd.deploy.check import check_of, random_batch, shapes_of, validation_score
    from kd.deploy.exporters import write_int8, write_onnx, write_openvino
    from kd.deploy.folder import FORMATS, KEY
    from kd.deploy.runtimes import TorchRuntime, input_names, load_classifier, open_file
    from kd.models.pretrained import load_tokenizer

    deployed = student.deployed
    model, tokenizer = load_classifier(str(deployed.folder)), load_tokenizer(str(deployed.folder), KEY)
    torchs = TorchRuntime(model)
    texts, labels, task = examples.texts["validation"], examples.labels["validation"], examples.task
    tokens = Tokens(tokenizer, texts, deployed.max_length)
    config: Any = model.config
    names = input_names(config.model_type, list(tokens.pad([0])))
    example = dict(random_batch(names, config, 2, min(16, deployed.max_length), seed=7))
    onnx = folder / FORMATS["onnx"].path if "onnx" in formats else temporary / "model.onnx"
    for name in formats:
        path = folder / FORMATS[name].path
        path.parent.mkdir(exist_ok=True)
        print(f"writing {FORMATS[name].path} ({FORMATS[name].words})", file=sys.stderr, flush=True)
        if name == "torch":
            shutil.copyfile(deployed.folder / path.name, path)
        elif name == "openvino":
            write_openvino(model, example, path)
        else:
            if not onnx.is_file():
                write_onnx(model, example, onnx, exporter)
            if name == "int8":
                write_int8(onnx, path)
    print(f"scoring {len(labels):,} examples of validation by each", file=sys.stderr, flush=True)
    value = validation_score(torchs, tokens, task, labels)
    check_data(student, task.monitor, value)
    checks = {}
    for name in formats:
        runtime = torchs if name == "torch" else open_file(name, folder / FORMATS[name].path)
        shapes = shapes_of(runtime, torchs, names, config, deployed.max_length)
        checks[name] = check_of(runtime, shapes, tokens, task, labels, value)
    return checks


SAME = 0.005
"""Largest difference of torch's metric from the recorded one, relative to it for errors: half a point. Our choice: rounding
changes the prediction of few examples."""


def check_data(student: "Student", metric: str, value: float | None) -> None:
    """Check that torch has the score on validation that the run recorded.

    Raises:
        InputError: if not: these are other data than the run's.
    """
    from kd.data.direction import higher_is_better
    from kd.results.tables import score

    recorded = student.run.record["students"][student.name]["metrics"]["validation"].get(metric)
    if recorded is None or value is None:
        return
    scale = 1.0 if higher_is_better(metric) else max(abs(recorded), 1e-12)
    if abs(value - recorded) > SAME * scale:
        raise InputError(
            f"validation {metric} of '{student.run.directory}' is {score(metric, value, ' %')} here, and the run recorded "
            f"{score(metric, recorded, ' %')}: these are other data than the run's",
            "task",
        )


def keep_aside(
    student: "Student", draft: Path, aside: Path, checks: "Mapping[str, Check]", failed: Mapping[str, Sequence[str]]
) -> None:
    """Move files that missed the gate out of a draft, and write their checks beside them."""
    from kd.deploy.folder import FORMATS

    for name in failed:
        for file in FORMATS[name].paths:
            (aside / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(draft / file, aside / file)
            if not any((draft / file).parent.iterdir()):
                (draft / file).parent.rmdir()
    content = {
        name: {"path": FORMATS[name].path, "why": list(failed[name]), "check": check.dump()} for name, check in checks.items()
    }
    text = json.dumps({"name": student.deployed.name, "files": content}, indent=2, ensure_ascii=False)
    (aside / FIGURES).write_text(text + "\n", encoding="utf-8")


def write_record(
    student: "Student", folder: Path, checks: "Mapping[str, Check]", failed: Mapping[str, Sequence[str]], max_drop: float
) -> None:
    """Write the record and the card of an exported folder."""
    from kd.deploy.card import card
    from kd.deploy.folder import FORMATS, RECORD, VERSION
    from kd.system.hardware import hardware, versions
    from kd.system.model_sources import recorded_files

    deployed = student.deployed
    files = {
        name: {
            "files": recorded_files(folder, [folder / file for file in FORMATS[name].paths]),
            "check": check.dump(),
        }
        for name, check in checks.items()
    }
    content = {
        "version": VERSION,
        "name": deployed.name,
        "task": deployed.task,
        "digest": student.run.record["digest"],
        "text": list(deployed.text),
        "max_length": deployed.max_length,
        "labels": None if deployed.labels is None else list(deployed.labels),
        "max_drop": max_drop,
        "files": files,
        "versions": versions(["onnx", "onnxruntime", "openvino"]),
        "hardware": hardware(),
    }
    (folder / RECORD).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else f"# {deployed.name}\n"
    readme.write_text(card(text, deployed, files, checks, failed, max_drop), encoding="utf-8")
    plain = readme.stat().st_mode
    for file in folder.rglob("*"):
        if file.is_file():  # safetensors makes files that the owner alone can read
            file.chmod(plain)


def print_table(
    student: "Student", checks: "Mapping[str, Check]", failed: Mapping[str, Sequence[str]], max_drop: float
) -> None:
    """Print the check of each file."""
    from rich.table import Table

    from kd.deploy.card import figures_of
    from kd.deploy.folder import FORMATS
    from kd.results.tables import console

    out = console()
    first = next(iter(checks.values()))
    table = Table(title=f"{student.deployed.name}: {first.examples:,} examples of validation", title_justify="left")
    for column in ("file", "largest difference from torch", first.metric, "drop", "passes"):
        table.add_column(column, justify="left" if column == "file" else "right")
    for name, check in checks.items():
        table.add_row(FORMATS[name].path, *figures_of(check), "no" if name in failed else "yes")
    out.print(table)
    for name, reasons in failed.items():
        for reason in reasons:
            out.print(f"{FORMATS[name].path}: {reason}", soft_wrap=True)


if __name__ == "__main__":
    main()
