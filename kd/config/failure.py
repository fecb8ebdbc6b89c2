"""Failures of runs as text, for sweeps and tables that go on after them, and for other processes."""

import json
import os
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from kd.config.compose import explain
from kd.errors import DISK_FULL, InputError, disk_is_full
from kd.system.files import write_text, writing


@dataclass(frozen=True)
class Failure:
    """Failure of a run, as text: an exception's traceback would keep models in memory.

    Attributes:
        message: the error.
        key: configuration key to change, if there is one.
        users: True if the user can correct it.
        trace: traceback to print, if any.
        at: seconds since the epoch at which it was recorded for other processes; 0 if it was not.
    """

    message: str
    key: str | None = None
    users: bool = True
    trace: str | None = None
    at: float = 0.0

    @staticmethod
    def of(error: Exception) -> "Failure":
        """Return the failure for the exception that is being handled."""
        shown = traceback.format_exc() if os.environ.get("KD_TRACEBACK") else None
        if isinstance(error, HydraException | OmegaConfBaseException):
            error = explain(error)
        if isinstance(error, InputError):
            return Failure(error.message, error.key, trace=shown)
        if disk_is_full(error):
            return Failure(DISK_FULL, "paths.runs", trace=shown)
        return Failure(f"{type(error).__name__}: {error}", users=False, trace=traceback.format_exc())

    @staticmethod
    def read(path: Path) -> "Failure | None":
        """Return a recorded failure; None if there is none, or its file is not readable."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return Failure(content["message"], content["key"], content["users"], at=content["at"])
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def record(self, path: Path) -> None:
        """Write the failure, with the time of now, for other processes.

        Raises:
            InputError: if it cannot be written.
        """
        content = {"message": self.message, "key": self.key, "users": self.users, "at": time.time()}
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(content) + "\n")

    @property
    def line(self) -> str:
        """The first line of the message, and the key."""
        message = self.message.partition("\n")[0]
        return message if self.key is None else f"{message} (change: {self.key})"

    def __str__(self) -> str:
        return self.message if self.key is None else f"{self.message}\n  change: {self.key}"
