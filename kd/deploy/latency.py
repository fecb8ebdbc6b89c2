"""`kd-latency`: the student of a finished run beside its teachers, by torch and onnxruntime, in turns."""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.errors import InputError, one_of
from kd.system.command import ended, one_run
from kd.system.hardware import configure_openmp, version_line

if TYPE_CHECKING:
    from kd.deploy.runtimes import Runtime
    from kd.deploy.source import Student
    from kd.deploy.timing import Prepare
    from kd.results.finished import ModelSource

DESCRIPTION = """Measure the latency of the student of a finished run and of its teachers on this machine's CPU: torch in
float32 and bf16, ONNX in float32 and int8. All take turns, in rotating order; the tokenizer is measured apart. Refused if the
load of the machine is above its number of cores."""

EPILOG = """words:
  RUN                 directory of a finished run
  paths.glue=FOLDER   an override of the run's configuration, for data that have moved

examples:
  kd-latency runs/kd-3l-rotten_tomatoes-s0-*
  kd-latency runs/kd-3l-rte-s0-* --threads 1 --batch 1 --tokens own --calls 500"""

RUNTIMES: Mapping[str, str] = {
    "torch": "torch, float32",
    "bf16": "torch, bf16",
    "onnx": "ONNX, float32",
    "int8": "ONNX, int8",
    "openvino": "OpenVINO, float32",
}
"""Values of `--formats`, and their names in tables."""

OWN = "own"
"""Value of `--tokens` for the lengths of the task's texts."""


def main() -> None:
    """Run the command `kd-latency`: status 2 for an error of the command, 130 on an interrupt."""
    arguments = parser().parse_intermixed_args()
    configure_openmp()
    with ended("kd-latency", "--out", resumes=False):
        latency(arguments)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    kind = argparse.RawDescriptionHelpFormatter
    found = argparse.ArgumentParser(prog="kd-latency", description=DESCRIPTION, epilog=EPILOG, formatter_class=kind)
    found.add_argument("words", nargs="+", metavar="RUN", help="directory of a finished run, and overrides, see below")
    found.add_argument("--student", metavar="NAME", help="one of several students of a cohort, or task of a mixture")
    found.add_argument(
        "--formats",
        default="torch,bf16,onnx,int8",
        metavar="NAMES",
        help="torch,bf16,onnx,int8,openvino: what is measured (default: torch,bf16,onnx,int8)",
    )
    found.add_argument("--threads", default="1,all", metavar="NUMBERS", help="numbers of threads (default: 1,all)")
    found.add_argument("--batch", default="1,32", metavar="NUMBERS", help="numbers of texts of a call (default: 1,32)")
    found.add_argument(
        "--tokens",
        default="own,32,128",
        metavar="NUMBERS",
        help="lengths of texts; own: of the task's validation (default: own,32,128)",
    )
    found.add_argument("--calls", default="100", metavar="N", help="timed calls of each (default: 100)")
    found.add_argument("--warm-up", default="10", metavar="N", help="calls of each before that (default: 10)")
    found.add_argument("--out", type=Path, default=Path("latency.json"), metavar="FILE", help="file (default: latency.json)")
    found.add_argument("--version", action="version", version=version_line())
    return found


@dataclass(frozen=True)
class Settings:
    """Settings of a measurement.

    Attributes:
        runtimes: keys of `RUNTIMES`.
        threads: numbers of threads.
        batches: numbers of texts of a call.
        tokens: numbers of tokens of a text; None for the lengths of the task's texts.
        calls: number of timed calls.
        warm_up: number of calls before them.
    """

    runtimes: tuple[str, ...]
    threads: tuple[int, ...]
    batches: tuple[int, ...]
    tokens: tuple[int | None, ...]
    calls: int
    warm_up: int


@dataclass(frozen=True)
class Row:
    """Latency of a model, or of its tokenizer, in milliseconds.

    Attributes:
        model: `student`, or `teacher <name>`.
        runtime: a key of `RUNTIMES`, or `tokenizer`.
        threads: number of threads.
        batch: number of texts of a call.
        tokens: number of tokens of a text, padding included; a mean for the task's own lengths.
        own: whether these are the lengths of the task's texts.
        calls: number of calls.
        median: half of the calls took at most so long.
        p95: 95 % of them.
        p99: 99 % of them.
        load: load of the machine before the first of them.
    """

    model: str
    runtime: str
    threads: int
    batch: int
    tokens: float
    own: bool
    calls: int
    median: float
    p95: float
    p99: float
    load: float


def count_of(text: str, key: str, least: int = 1) -> int:
    """Return a whole number of the command line.

    Raises:
        InputError: for something else.
    """
    if not (text.isascii() and text.isdigit() and least <= int(text) <= 10**6):
        raise InputError(f"{key}={text} must be a whole number, at least {least}", key)
    return int(text)


def settings_of(arguments: argparse.Namespace, cores: int) -> Settings:
    """Return the settings that options choose.

    Raises:
        InputError: for a value that an option does not have.
    """
    names = [name.strip() for name in arguments.formats.split(",")]
    for name in names:
        if name not in RUNTIMES:
            raise one_of(name, tuple(RUNTIMES), "--formats")
    threads = [cores if word == "all" else count_of(word, "--threads") for word in arguments.threads.split(",")]
    if max(threads) > cores:
        raise InputError(f"--threads={max(threads)}: there are {cores} core(s) here", "--threads")
    return Settings(
        tuple(name for name in RUNTIMES if name in names),
        tuple(dict.fromkeys(threads)),
        tuple(dict.fromkeys(count_of(word, "--batch") for word in arguments.batch.split(","))),
        tuple(dict.fromkeys(None if word == OWN else count_of(word, "--tokens", 4) for word in arguments.tokens.split(","))),
        count_of(arguments.calls, "--calls", 2),
        count_of(arguments.warm_up, "--warm-up", 0),
    )


def latency(arguments: argparse.Namespace) -> None:
    """Measure, write the file, and print a table.

    Raises:
        InputError: for an error that the user can correct.
    """
    from kd.deploy.timing import checked_load
    from kd.launch import places

    cores = places.cores()
    settings = settings_of(arguments, cores)
    directory, overrides = one_run(arguments.words, "kd-latency")
    out = arguments.out.expanduser()
    check_out(out)
    load = checked_load(cores)

    from kd.deploy.exporters import scratch
    from kd.deploy.source import student_of
    from kd.system.files import write_text, writing
    from kd.system.hardware import cpu_has_bf16, hardware, versions

    student = student_of(directory, arguments.student, overrides)
    with scratch(out) as temporary:
        rows, absent = measured(student, settings, cores, temporary)
    content = {
        "name": student.deployed.name,
        "task": student.deployed.task,
        "digest": student.run.record["digest"],
        "measure": "milliseconds of a call on the CPU, all models and runtimes in turn in rotating order, tokenizer apart",
        "settings": asdict(settings),
        "cores": cores,
        "bf16_in_hardware": cpu_has_bf16(),
        "load": {"before": load, "after": round(os.getloadavg()[0], 2)},
        "absent": absent,
        "versions": versions(["onnx", "onnxruntime", "openvino"]),
        "hardware": hardware(),
        "rows": [asdict(row) for row in rows],
    }
    with writing(out, "--out"):
        write_text(out, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    print_table(rows, student.deployed.name, absent)
    print(out)


def check_out(out: Path) -> None:
    """Check that a file can be written, before anything is measured.

    Raises:
        InputError: if its folder is not there or cannot be written to, or it is a folder itself.
    """
    from kd.system.files import check_writable

    if not out.parent.is_dir():
        raise InputError(f"there is no folder '{out.parent}' for '{out.name}'", "--out")
    if out.is_dir():
        raise InputError(f"'{out}' is a folder; name a file in it", "--out")
    check_writable(out.parent, "--out")


def measured(student: "Student", settings: Settings, cores: int, folder: Path) -> tuple[list[Row], dict[str, str]]:
    """Return the latencies of a student and of its teachers; and name of a teacher -> why it is not measured.

    Args:
        student: the student.
        settings: the settings.
        cores: number of cores.
        folder: folder for files of models.

    Raises:
        InputError: if the machine is busy, a model cannot be exported or read so many tokens, or the data cannot be read.
    """
    import torch

    from kd.results.finished import ModelSource, examples_of, teacher_source

    sources = {"student": ModelSource(str(student.deployed.folder))}
    absent = {}
    for name in student.run.teachers:
        place = teacher_source(student.run, name)
        if isinstance(place, str):
            absent[name] = place
        else:
            sources[f"teacher {name}"] = place
    texts = examples_of(student.run).texts["validation"] if None in settings.tokens else None
    before = torch.get_num_threads()
    try:
        models = {
            name: Timed(place, folder / str(number), settings.runtimes, student.deployed.max_length, texts)
            for number, (name, place) in enumerate(sources.items())
        }
        check_tokens(models, settings)
        for model in models.values():
            model.export()
        rows = [row for threads in settings.threads for row in rows_of(models, threads, settings, cores)]
    finally:
        torch.set_num_threads(before)
    return rows, absent


def check_tokens(models: "Mapping[str, Timed]", settings: Settings) -> None:
    """Check that all models read texts of the chosen numbers of tokens.

    Raises:
        InputError: if one does not.
    """
    most = max((tokens for tokens in settings.tokens if tokens is not None), default=0)
    for name, model in models.items():
        if most > model.positions:
            raise InputError(f"--tokens={most}: the {name} reads at most {model.positions} tokens", "--tokens")


class Timed:
    """A model in several runtimes, its tokenizer, and the texts that it reads.

    Args:
        place: where the model is.
        folder: folder for its files, which is made.
        runtimes: keys of `RUNTIMES`.
        max_length: number of tokens to which texts are truncated.
        texts: texts of the task's own lengths; None if they are not measured.
    """

    def __init__(
        self,
        place: "ModelSource",
        folder: Path,
        runtimes: Sequence[str],
        max_length: int,
        texts: Sequence[tuple[str, ...]] | None,
    ) -> None:
        from kd.data.tokenized import Tokens, encode, rules_of
        from kd.deploy.folder import FORMATS
        from kd.deploy.runtimes import input_names, load_classifier
        from kd.models import Encoder
        from kd.models.pretrained import load_tokenizer

        self.runtimes, self.texts = runtimes, texts
        self.load = lambda: load_classifier(place.source, place.key)
        model = self.load()
        config: Any = model.config
        self.config = config
        tokenizer = load_tokenizer(place.source, place.key)
        self.positions = Encoder(model).positions
        self.rules, self.encode = rules_of(tokenizer, max_length), encode
        self.tokens = Tokens(tokenizer, [("a",)] if texts is None else texts, max_length)
        self.names = input_names(str(config.model_type), list(self.tokens.pad([0])))
        self.files = {name: folder / Path(FORMATS[name].path).name for name in FORMATS}
        folder.mkdir()

    def export(self) -> None:
        """Write the files of its runtimes.

        Raises:
            InputError: if an exporter refuses the model.
        """
        from kd.deploy.check import random_batch
        from kd.deploy.exporters import write_int8, write_onnx, write_openvino

        model, example = self.load(), dict(random_batch(self.names, self.config, 2, 16, seed=7))
        if {"onnx", "int8"} & set(self.runtimes):
            write_onnx(model, example, self.files["onnx"])
        if "int8" in self.runtimes:
            write_int8(self.files["onnx"], self.files["int8"])
        if "openvino" in self.runtimes:
            write_openvino(model, example, self.files["openvino"])

    def opened(self, threads: int) -> "dict[str, Runtime]":
        """Return the runtimes with a number of threads."""
        import torch

        from kd.deploy.runtimes import TorchRuntime, open_file

        types = {"torch": torch.float32, "bf16": torch.bfloat16}
        return {
            name: TorchRuntime(self.load(), dtype=types[name]) if name in types else open_file(name, self.files[name], threads)
            for name in self.runtimes
        }

    def rows(self, number: int, batch: int) -> list[int]:
        """Return the indices of the texts of a round: other ones in each, until all were read."""
        assert self.texts is not None
        return [(number * batch + index) % len(self.texts) for index in range(batch)]

    def inputs(self, number: int, batch: int, tokens: int | None) -> Any:
        """Return the inputs of a round, without padding if `tokens` is given."""
        from kd.deploy.check import random_batch

        if tokens is None:
            return self.tokens.pad(self.rows(number, batch))
        return random_batch(self.names, self.config, batch, tokens, seed=number, padded=False)

    def tokenise(self, batch: int, number: int) -> Any:
        """Return the call that makes the tokens of a round from texts."""
        assert self.texts is not None
        texts = [self.texts[row] for row in self.rows(number, batch)]
        return lambda: self.encode(self.rules, texts)


def rows_of(models: Mapping[str, Timed], threads: int, settings: Settings, cores: int) -> list[Row]:
    """Return the latencies of all models with a number of threads.

    Raises:
        InputError: if the machine is busy.
    """
    import numpy as np
    import torch

    from kd.deploy.timing import Latency, checked_load, in_turns

    torch.set_num_threads(threads)
    parallel = os.environ.get("TOKENIZERS_PARALLELISM")
    found: list[Row] = []
    try:
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
        opened = {name: model.opened(threads) for name, model in models.items()}
        for tokens, batch in itertools.product(settings.tokens, settings.batches):
            candidates: dict[tuple[str, str], Prepare] = {
                (name, runtime): prepared(models[name], opened[name][runtime], batch, tokens)
                for runtime in settings.runtimes
                for name in models
            }
            if tokens is None:
                candidates |= {(name, "tokenizer"): partial(model.tokenise, batch) for name, model in models.items()}
            load = checked_load(cores, own=max(settings.threads))
            rounds = range(settings.warm_up, settings.warm_up + settings.calls)
            for (name, runtime), seconds in in_turns(candidates, settings.calls, settings.warm_up).items():
                lengths = [models[name].inputs(number, batch, tokens)["input_ids"].shape[1] for number in rounds]
                length = round(float(np.mean(lengths)), 1)
                taken = asdict(Latency.of(seconds))
                found.append(Row(name, runtime, threads, batch, length, tokens is None, load=load, **taken))
            shown = "the task's lengths" if tokens is None else f"{tokens} tokens"
            print(f"measured {batch} text(s) of {shown}, {threads} thread(s)", file=sys.stderr, flush=True)
    finally:
        if parallel is None:
            os.environ.pop("TOKENIZERS_PARALLELISM", None)
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = parallel
    return found


def prepared(model: Timed, runtime: "Runtime", batch: int, tokens: int | None) -> "Prepare":
    """Return the calls of a runtime, by round."""

    def prepare(number: int) -> Any:
        inputs = model.inputs(number, batch, tokens)
        return lambda: runtime.logits(inputs)

    return prepare


def print_table(rows: Sequence[Row], name: str, absent: Mapping[str, str]) -> None:
    """Print the rows, the models of each runtime beside each other."""
    from rich.table import Table

    from kd.results.tables import console

    out = console()
    models = list(dict.fromkeys(row.model for row in rows))
    table = Table(title=f"{name}: milliseconds of a call, median / p95 / p99", title_justify="left")
    for column in ("threads", "texts", "tokens", "runtime", *models):
        table.add_column(column, justify="left" if column == "runtime" else "right")
    groups: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        lengths = OWN if row.own else f"{row.tokens:g}"
        groups.setdefault((row.threads, row.batch, lengths, row.runtime), {})[row.model] = row
    for (threads, batch, lengths, runtime), of in groups.items():
        cells = [
            f"{of[model].median:.2f} / {of[model].p95:.2f} / {of[model].p99:.2f}" if model in of else "" for model in models
        ]
        table.add_row(str(threads), str(batch), str(lengths), RUNTIMES.get(runtime, runtime), *cells)
    out.print(table)
    for teacher, why in absent.items():
        out.print(f"Not measured, teacher {teacher}: {why}", soft_wrap=True)


if __name__ == "__main__":
    main()
