"""Unlabelled text files as a data source."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd.data.readers import Layout
from kd.data.shards import shards_of
from kd.data.sources import (
    LINES,
    Splits,
    as_names,
    check_hash_split,
    fingerprint_of,
    given_paths,
    read_shards,
    split_by_hash,
)
from kd.data.texts import Table
from kd.errors import InputError

HELD_OUT = 0.05
"""Share of the text that is held out for validation if there is no validation file. Our choice."""


@dataclass(frozen=True, slots=True)
class TextFiles:
    """Text files of the user: the lines of a `.txt` file, or a column of a table; a folder of shards is as a file.

    Without a validation file, `train` is split 95/5 by a hash of the text.
    """

    train: Any
    text: Sequence[str]
    validation: Any = None
    quoted: bool | None = None
    format: str | None = None
    delimiter: str | None = None
    columns: Sequence[str] | None = None
    encoding: str | None = None

    def _paths(self) -> dict[str, dict[str | None, Path]]:
        paths = given_paths(
            self.train,
            self.validation,
            None,
            "task=text needs train=<a file or a folder of shards>",
        )
        for split, files in paths.items():
            if None not in files:
                raise InputError(f"{split} must be a file: text without labels has no classes", split)
        return paths

    def splits(self) -> Splits:
        """Return the texts of `train` and `validation`.

        Raises:
            InputError: if a file is missing, empty, not text, lacks the column, or has a broken line.
        """
        splits: Splits = {split: self._read(files[None], split) for split, files in self._paths().items()}
        if "validation" not in splits:
            splits = split_by_hash(splits["train"], {"train": 1 - HELD_OUT, "validation": HELD_OUT})
            check_hash_split(splits, f"'{self.train}'")
        return splits

    def _read(self, path: Path, key: str) -> Table:
        files = shards_of(path, key, any_suffix=self.format is not None)
        names = as_names(self.format), as_names(self.delimiter), as_names(self.columns)
        layout = Layout(*names, self.quoted, encoding=as_names(self.encoding), configurable=True)
        layout.codec()
        if self.format == "lines" or (self.format is None and files[0].suffix.lower() == LINES and self.delimiter is None):
            layout = Layout("lines", encoding=layout.encoding, configurable=True)
        return read_shards(files, as_names(self.text), None, key, layout, blank=True)

    def fingerprint(self) -> dict[str, str]:
        """Return a digest of the bytes of every file."""
        return fingerprint_of(self._paths(), any_suffix=self.format is not None)
