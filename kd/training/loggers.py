"""The history that every run writes, `metrics.csv`."""

import csv
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from kd.system import distributed
from kd.system.files import atomic_write, writing


class History(Logger):
    """Logger that writes `metrics.csv`: one row per logged step; columns are added when a name is first logged.

    Lightning's CSVLogger deletes the file of an interrupted run; this one continues it.

    Args:
        path: the file.
        last_step: rows after this step are dropped, because a resumed run logs them again; None starts a new file.
    """

    def __init__(self, path: Path, last_step: int | None = None) -> None:
        super().__init__()
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if last_step is not None and path.is_file():
            whole, left_out = whole_rows(path)
            self.rows = [row for row in whole if int(row["step"]) <= last_step]
            if left_out:
                distributed.print_rank_zero(
                    f"  '{path}' is damaged: {left_out} line(s) are left out of it; no result depends on them"
                )
        self._written = 0  # rows that are unchanged in the file
        self._saved = 0  # rows in the file
        self._header: list[str] = []

    @property
    def name(self) -> str:
        """Name of the logger, which Lightning requires."""
        return "history"

    @property
    def version(self) -> str:
        """Empty version, because a run has one history."""
        return ""

    @property
    def columns(self) -> list[str]:
        """Names of all columns logged so far, step and epoch first."""
        return list(dict.fromkeys(["step", "epoch", *(name for row in self.rows for name in row)]))

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing, because `config.yaml` holds the hyper-parameters."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add metrics to the row of this step."""
        number = step or 0
        if not self.rows or int(self.rows[-1]["step"]) != number:
            self.rows.append({"step": number})
        # Nine digits distinguish any two float32 numbers, the type that Lightning passes.
        self.rows[-1].update({name: f"{value:.9g}" for name, value in metrics.items()})
        self._written = min(self._written, len(self.rows) - 1)

    @rank_zero_only
    def save(self) -> None:
        """Append the new rows to the file; rewrite it atomically if there is a new column or an old row has changed."""
        columns = self.columns
        if columns == self._header and self._written == self._saved:
            with writing(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, columns).writerows(self.rows[self._written :])
        else:
            with writing(self.path), atomic_write(self.path, newline="") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(self.rows)
        self._header, self._written, self._saved = columns, len(self.rows), len(self.rows)

    def finalize(self, status: str) -> None:
        """Save the rows, if there are any."""
        if self.rows:
            self.save()


def whole_rows(path: Path) -> tuple[list[dict[str, str]], int]:
    """Read the intact rows of a `metrics.csv`, without empty cells, and count the damaged lines.

    A crash of the machine, or a full disk, can leave foreign bytes, and a last line that ends within a number.
    """
    try:
        lines = path.read_bytes().split(b"\n")
        header = next(csv.reader([lines[0].decode()]))
    except (OSError, ValueError, csv.Error, StopIteration):
        return [], 1
    left_out = int(bool(lines.pop()))  # an intact file ends with a newline, so the last piece is empty
    if header[:1] != ["step"] or len(set(header)) < len(header):
        return [], max(len(lines) + left_out, 1)
    rows: list[dict[str, str]] = []
    for line in lines[1:]:
        row = _whole_row(header, line)
        if row is None or (rows and int(row["step"]) <= int(rows[-1]["step"])):
            left_out += 1
        else:
            rows.append(row)
    return rows, left_out


def _whole_row(header: list[str], line: bytes) -> dict[str, str] | None:
    try:
        cells = next(csv.reader([line.decode()]))
        row = {name: cell for name, cell in zip(header, cells, strict=True) if cell}
        _ = int(row["step"]), *(float(cell) for cell in row.values())
    except (ValueError, KeyError, csv.Error, StopIteration):
        return None
    return row
