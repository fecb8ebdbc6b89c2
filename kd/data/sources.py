"""Where a task's examples come from. A source gives splits of raw examples; labels are still as the file has them."""

import bisect
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kd.data.tables import Row, rows
from kd.errors import InputError
from kd.sources import check_not_here, file_fingerprint, package_folder, package_version
from kd.values import number


@dataclass(frozen=True, slots=True)
class Example:
    """One raw example: one or two texts, the label as the file has it, and where it stands."""

    texts: tuple[str, ...]
    label: Any
    where: str


Splits = dict[str, list[Example]]


class Source(Protocol):
    """What a task reads from. Split names are `train`, `validation`, `test`, or any further one to evaluate on."""

    def splits(self) -> Splits:
        """The examples of each split."""
        ...

    def fingerprint(self) -> dict[str, str]:
        """What identifies the data; part of the digest of every run that uses it."""
        ...


def hash_fraction(texts: Sequence[str]) -> float:
    """A number in [0, 1) that depends on the text alone, not on case, spacing or place in the file."""
    words = " ".join(" ".join(texts).casefold().split())
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest()) / 2**64


SPLITS = ("train", "validation", "test")
"""Names of splits, in the order in which a text's hash is compared with their shares."""


def split_by_hash(examples: Sequence[Example], shares: Mapping[str, float]) -> Splits:
    """Cut examples into splits by a hash of their text, so that no text is in two splits.

    Args:
        examples: any order; it is kept within a split.
        shares: split name -> share of the text, adding up to 1.

    Raises:
        InputError: for shares that do not.
    """
    # In an order of their own: a mapping has none, and runs whose shares differ by it alone have one digest.
    names = sorted(shares, key=lambda name: (SPLITS.index(name) if name in SPLITS else len(SPLITS), name))
    for name in names:
        number(shares[name], "task.source.shares", 0, 1)
    if not names or abs(sum(shares.values()) - 1) > 1e-6:
        raise InputError(f"task.source.shares={dict(shares)} add up to {sum(shares.values()):g}, not 1", "task.source.shares")
    splits: Splits = {name: [] for name in names}
    bounds = list(itertools.accumulate(shares[name] for name in names))[:-1]  # the last takes the rest, rounding included
    for example in examples:
        place = bisect.bisect_right(bounds, hash_fraction(example.texts))
        splits[names[place]].append(example)
    return splits


def examples_of(
    table: Iterator[tuple[int, Row]], path: Path, text: Sequence[str], label: str | None, key: str
) -> list[Example]:
    """The rows of a table as examples; without a label column they have no label.

    Raises:
        InputError: if a column is missing, a text is none, or there is no row.
    """
    found = []
    columns = [*text, *([] if label is None else [label])]
    for line, row in table:
        missing = [name for name in columns if name not in row]
        if missing:
            wrong = "task.label" if missing == [label] else "task.text"
            raise InputError(
                f"'{path}', line {line}: no column '{missing[0]}'; the columns are {', '.join(map(str, row))}", wrong
            )
        for name in text:
            if not isinstance(row[name], str):
                raise InputError(f"'{path}', line {line}: '{name}' is {row[name]!r}, not text", "task.text")
        value = None if label is None else row[label]
        found.append(Example(tuple(row[name] for name in text), value, f"'{path}', line {line}"))
    if not found:
        raise InputError(f"the file '{path}' has no examples", key)
    return found


@dataclass(frozen=True, slots=True)
class Files:
    """A user's own CSV, TSV or JSON Lines files.

    Without a validation file, `train` is split by a hash of the text: 90/10 where there is a test file, else 80/10/10
    into train, validation and test (our choice).
    """

    train: str | None
    text: Sequence[str]
    label: str
    validation: str | None = None
    test: str | None = None
    quoted: bool | None = None

    def _paths(self) -> dict[str, Path]:
        if self.train is None:
            raise InputError("task=file needs task.train=<file.csv|.tsv|.jsonl>", "task.train")
        named = {"train": self.train, "validation": self.validation, "test": self.test}
        return {split: Path(path).expanduser() for split, path in named.items() if path is not None}

    def splits(self) -> Splits:
        """The examples of every split.

        Raises:
            InputError: if a file is missing, empty, lacks a column, or has a broken line.
        """
        found = {
            split: examples_of(rows(path, f"task.{split}", quoted=self.quoted), path, self.text, self.label, f"task.{split}")
            for split, path in self._paths().items()
        }
        if "validation" not in found:
            rest = {} if "test" in found else {"test": 0.1}
            shares = {"train": 0.9 - sum(rest.values()), "validation": 0.1, **rest}
            found.update(split_by_hash(found["train"], shares))
        return found

    def fingerprint(self) -> dict[str, str]:
        """A digest of every file's bytes."""
        found = {}
        for split, path in self._paths().items():
            if not path.is_file():
                raise InputError(f"the file '{path}' does not exist", f"task.{split}")
            found[split] = file_fingerprint(path)
        return found


@dataclass(frozen=True, slots=True)
class PackageFile:
    """A CSV file that an installed package ships, split by a hash of the text.

    Args:
        package: module name.
        file: path inside the package.
        text: text columns.
        label: label column; None for text without labels.
        where: column -> value; rows with another value are left out.
        shares: split -> share of the text, 80/10/10 by default.
    """

    package: str
    file: str
    text: Sequence[str]
    label: str | None
    where: Mapping[str, str]
    shares: Mapping[str, float] | None = None

    def splits(self) -> Splits:
        """The examples of each split.

        Raises:
            InputError: if the package is not installed.
        """
        path = package_folder(self.package, "task") / self.file
        table = (
            (line, row)
            for line, row in rows(path, "task")
            if all(row.get(column) == value for column, value in self.where.items())
        )
        examples = examples_of(table, path, self.text, self.label, "task")
        return split_by_hash(examples, self.shares or {"train": 0.8, "validation": 0.1, "test": 0.1})

    def fingerprint(self) -> dict[str, str]:
        """The package's version."""
        path = package_folder(self.package, "task") / self.file
        version = package_version(self.package)
        return {"package": file_fingerprint(path) if version == "unknown" else f"{self.package}=={version}"}


@dataclass(frozen=True, slots=True)
class Glue:
    """A GLUE task from the hub, or from a local folder of GLUE's TSV files.

    GLUE's official test splits carry no labels (-1 on the hub, no label column in the TSV); they are left out then.

    Args:
        subset: name on the hub.
        folder: name of the folder under `root`.
        text: text columns on the hub.
        label: label column on the hub.
        root: a folder of GLUE folders; None reads the hub.
        local_text: text columns in the TSV, where they differ.
        local_label: label column in the TSV, where it differs.
        local_columns: names of all columns, for TSV files without a header.
        validation: split -> name, both on the hub and, with `.tsv`, locally.
        repository: data set on the hub.
        skip_broken: leave out lines of the TSV with another number of fields, and say how many. GLUE's own QQP has some.
    """

    subset: str
    folder: str
    text: Sequence[str]
    label: str
    root: str | None = None
    local_text: Sequence[str] | None = None
    local_label: str | None = None
    local_columns: Sequence[str] | None = None
    validation: Mapping[str, Sequence[str]] | None = None
    repository: str = "nyu-mll/glue"
    skip_broken: bool = False

    def _names(self) -> dict[str, Sequence[str]]:
        """Split -> [name on the hub, file name without `.tsv`]."""
        return {"train": ["train", "train"], **(self.validation or {"validation": ["validation", "dev"]})}

    def _files(self) -> dict[str, Path]:
        assert self.root is not None
        folder = Path(self.root).expanduser() / self.folder
        if not folder.is_dir():
            raise InputError(f"there is no folder '{folder}' for this GLUE task", "paths.glue")
        files = {split: folder / f"{name}.tsv" for split, (_, name) in self._names().items()}
        first_validation = next(split for split in files if split != "train")
        for split in ("train", first_validation):
            if not files[split].is_file():
                raise InputError(f"the file '{files[split]}' does not exist", "paths.glue")
        return {split: path for split, path in {**files, "test": folder / "test.tsv"}.items() if path.is_file()}

    def splits(self) -> Splits:
        """The examples of `train`, the validation splits, and `test` where it is labelled.

        Raises:
            InputError: if the data cannot be had.
        """
        return self._from_hub() if self.root is None else self._from_folder()

    def _from_folder(self) -> Splits:
        text, label = self.local_text or self.text, self.local_label or self.label
        found: Splits = {}
        for split, path in self._files().items():
            if split == "test" and not self._labelled(path, label):
                continue
            found[split] = examples_of(
                rows(path, "paths.glue", self.local_columns, skip_broken=self.skip_broken), path, text, label, "paths.glue"
            )
        return found

    def _labelled(self, path: Path, label: str) -> bool:
        with path.open(encoding="utf-8-sig") as file:
            return self.local_columns is None and label in file.readline().rstrip("\r\n").split("\t")

    def _from_hub(self) -> Splits:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise InputError(
                "reading GLUE from the hub needs the package 'datasets' (pip install datasets); "
                "or point paths.glue at a folder of GLUE's TSV files",
                "paths.glue",
            ) from error
        check_not_here(self.repository, "paths.glue")
        try:
            data = load_dataset(self.repository, self.subset)
        except Exception as error:  # the library raises a dozen kinds for a hub that cannot be reached
            raise InputError(
                f"'{self.repository}/{self.subset}' cannot be had from the hub ({type(error).__name__}: {error}); "
                "or point paths.glue at a folder of GLUE's TSV files",
                "paths.glue",
            ) from error
        names = {**{split: name for split, (name, _) in self._names().items()}, "test": "test"}
        found: Splits = {}
        for split, name in names.items():
            if name not in data:
                continue
            feature = data[name].features[self.label]
            examples = [
                Example(
                    tuple(row[column] for column in self.text),
                    feature.int2str(row[self.label])
                    if hasattr(feature, "int2str") and row[self.label] >= 0
                    else row[self.label],
                    f"{self.repository}/{self.subset}, {name}, row {number}",
                )
                for number, row in enumerate(data[name])
            ]
            if split != "test" or all(example.label not in (-1, -1.0) for example in examples):
                found[split] = examples
        return found

    def fingerprint(self) -> dict[str, str]:
        """Digests of the files, or the hub's name."""
        if self.root is None:
            names = {split: name for split, (name, _) in self._names().items()}
            return {"hub": f"{self.repository}/{self.subset}", **names}
        return {split: file_fingerprint(path) for split, path in self._files().items()}
