"""Failures of runs as text, for sweeps and tables that go on after them."""

import os
import traceback
from dataclasses import dataclass

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from kd.config.compose import explain
from kd.errors import DISK_FULL, InputError, disk_is_full


@dataclass(frozen=True)
class Failure:
    """Failure of a point, as text: an exception's traceback would keep models in memory."""

    message: str
    key: str | None = None
    users: bool = True
    """True if the user can correct it."""
    trace: str | None = None
    """Traceback to print, if any."""

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

    def __str__(self) -> str:
        return self.message if self.key is None else f"{self.message}\n  change: {self.key}"
