"""The CSV history that every run keeps, and optional loggers beside it."""

import csv
import os
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from kd import distributed
from kd.errors import InputError
from kd.runs import writing


class History(Logger):
    """`metrics.csv`: a row for each logged step, columns as they turn up.

    Lightning's CSVLogger deletes the file of an interrupted run; this one goes on with it.

    Args:
        path: the file.
        last_step: rows after this step are dropped, because a resumed run makes them again; None begins a new file.
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
        self._written = 0  # rows that the file has as they are
        self._saved = 0  # rows that the file has
        self._header: list[str] = []

    @property
    def name(self) -> str:
        """A word for Lightning."""
        return "history"

    @property
    def version(self) -> str:
        """No versions: a run has one history."""
        return ""

    @property
    def columns(self) -> list[str]:
        """All names logged so far, step and epoch first."""
        return list(dict.fromkeys(["step", "epoch", *(name for row in self.rows for name in row)]))

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: `config.yaml` holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add to the row of this step."""
        number = step or 0
        if not self.rows or int(self.rows[-1]["step"]) != number:
            self.rows.append({"step": number})
        # Nine digits tell any two float32 numbers apart, which is what Lightning gives.
        self.rows[-1].update({name: f"{value:.9g}" for name, value in metrics.items()})
        self._written = min(self._written, len(self.rows) - 1)

    @rank_zero_only
    def save(self) -> None:
        """Add the new rows to the file; write it anew, all or nothing, where a column is new or an old row grew."""
        columns = self.columns
        if columns == self._header and self._written == self._saved:
            with writing(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, columns).writerows(self.rows[self._written :])
        else:
            draft = self.path.with_name(self.path.name + ".part")
            with writing(self.path):
                draft.unlink(missing_ok=True)  # a link that is not ours would be written through
                with draft.open("x", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, columns)
                    writer.writeheader()
                    writer.writerows(self.rows)
                os.replace(draft, self.path)
        self._header, self._written, self._saved = columns, len(self.rows), len(self.rows)

    def finalize(self, status: str) -> None:
        """Write what is there."""
        if self.rows:
            self.save()


def whole_rows(path: Path) -> tuple[list[dict[str, str]], int]:
    """The rows of a `metrics.csv` that can be told to be whole, cells without a value left out; and the lines that cannot.

    A crash of the machine, or a full disk, can leave bytes that are none of ours, and a last line that ends within a number.
    """
    try:
        lines = path.read_bytes().split(b"\n")
        header = next(csv.reader([lines[0].decode()]))
    except (OSError, ValueError, csv.Error, StopIteration):
        return [], 1
    left_out = int(bool(lines.pop()))  # behind the last line's end there is nothing
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


def close_wandb() -> None:
    """End the run that is open: the next point of a sweep, in the same process, is another."""
    finish = getattr(sys.modules.get("wandb"), "finish", None)  # a folder of that name is a module too, without it
    if finish is not None:
        finish()


def import_wandb() -> Any:
    """The package of Weights & Biases.

    Raises:
        InputError: if it is not installed.
    """
    try:
        import wandb

        if getattr(wandb, "__file__", None) is None:  # a folder of that name in the working folder, of earlier runs perhaps
            raise ModuleNotFoundError("wandb is a folder without a package in it")
    except ImportError as error:
        raise InputError("logger=wandb needs the package: pip install wandb", "logger") from error
    return wandb


def check_logger(node: Mapping[str, Any]) -> None:
    """Check that the package of an optional logger is installed.

    Raises:
        InputError: if it is not.
    """
    if node.get("_target_") == f"{__name__}.{wandb_logger.__name__}":
        import_wandb()


def wandb_logger(folder: Path, name: str, config: Mapping[str, Any], project: str = "kd", **options: Any) -> Logger:
    """Weights & Biases: online with an account, offline (`wandb sync` later) without one.

    The run's digest is its id, so a resumed run goes on in the same place.

    Raises:
        InputError: if wandb is not installed.
    """
    wandb = import_wandb()
    from lightning.pytorch.loggers import WandbLogger

    if "WANDB_MODE" not in os.environ and not wandb.login(prompt=False):
        options.setdefault("mode", "offline")
    options.setdefault("id", name.rsplit("-", 1)[-1])
    logger: Logger = WandbLogger(name=name, project=project, save_dir=folder, resume="allow", config=dict(config), **options)
    return logger
