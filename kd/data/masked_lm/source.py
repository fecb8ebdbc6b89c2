"""Unlabelled text files as a data source."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd.data.readers import Layout, nonblank_lines
from kd.data.readers import rows as table_rows
from kd.data.sources import Splits, as_names, check_hash_split, examples_of, fingerprint_of, given_paths, split_by_hash
from kd.data.texts import Table
from kd.errors import InputError

HELD_OUT = 0.05
"""Share of the text that is held out for validation if there is no validation file. Our choice."""


@dataclass(frozen=True, slots=True)
class TextFiles:
    """Text files of the user: the lines of a `.txt` file, or a column of CSV, TSV or JSON Lines.

    Without a validation file, `train` is split 95/5 by a hash of the text.
    """

    train: Any
    text: Sequence[str]
    validation: Any = None
    quoted: bool | None = None
    format: str | None = None
    delimiter: str | None = None
    columns: Sequence[str] | None = None

    def _paths(self) -> dict[str, dict[str | None, Path]]:
        paths = given_paths(self.train, self.validation, None, "task=text needs train=<file.txt|.csv|.tsv|.jsonl>")
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
        if self.format == "lines" or (self.format is None and path.suffix.lower() == ".txt" and self.delimiter is None):
            lines = ((number, {"text": line}) for number, line in nonblank_lines(path, key))
            return examples_of(lines, path, ["text"], None, key)
        layout = Layout(as_names(self.format), as_names(self.delimiter), as_names(self.columns), self.quoted)
        return examples_of(table_rows(path, key, layout=layout), path, as_names(self.text), None, key)

    def fingerprint(self) -> dict[str, str]:
        """Return a digest of every file's bytes."""
        return fingerprint_of(self._paths())
