"""Knowledge distillation of BERT-style encoders: one paper, one file.

The names of `__all__` are the interface for Python (`docs/python.md`). They are imported when they are first read.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kd.api.distillation import Distillation, DistillationOutput
    from kd.api.run import RunResult, run
    from kd.api.trainer import DistillationTrainer
    from kd.errors import InputError
    from kd.methods.base import Method, Progress
    from kd.results.frame import results

__all__ = [
    "Distillation",
    "DistillationOutput",
    "DistillationTrainer",
    "InputError",
    "Method",
    "Progress",
    "RunResult",
    "results",
    "run",
]

_MODULES = {
    "Distillation": "kd.api.distillation",
    "DistillationOutput": "kd.api.distillation",
    "DistillationTrainer": "kd.api.trainer",
    "InputError": "kd.errors",
    "Method": "kd.methods.base",
    "Progress": "kd.methods.base",
    "RunResult": "kd.api.run",
    "run": "kd.api.run",
}
"""Public name -> module that defines it. `results` is the package `kd.results`, which can be called."""


def __getattr__(name: str) -> Any:
    if name == "results":
        return importlib.import_module("kd.results")
    if name not in _MODULES:
        raise AttributeError(f"module 'kd' has no attribute '{name}'")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
