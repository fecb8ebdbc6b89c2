"""A run as loggers show it, and the interface of a logger that is shown the record of the finished run."""

import importlib
import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from lightning.pytorch.loggers import Logger
from omegaconf import OmegaConf

from kd.config.mixture import tasks_of
from kd.config.values import one_line
from kd.errors import InputError
from kd.runs.run import Role, Run

FILES = ("result.json", "metrics.csv", "config.yaml")
"""Files of a finished run that a logger keeps with it."""

STUDENT = "student"
"""Job type of a run that the command requests; that of a run which another one needs is the kind of its role."""


@dataclass(frozen=True)
class TrackedRun:
    """A run as a logger shows it.

    Attributes:
        folder: directory of the run.
        name: method, student, task and seed.
        digest: digest of the run, unique where the name is not.
        group: name of the table, sweep or experiment that the run belongs to; None if it belongs to none.
        job_type: `student`, or the part that the run plays in the one that needs it: `teacher`, `stage`, `pilot`; see `Role`.
        tags: names of the method, the student and the tasks.
        config: the configuration, resolved.
        first_step: number of the first step that this start logs; 0 unless it resumes.
    """

    folder: Path
    name: str
    digest: str
    group: str | None
    job_type: str
    tags: tuple[str, ...]
    config: Mapping[str, Any]
    first_step: int = 0

    @classmethod
    def of(cls, run: Run, role: Role | None = None, step: int | None = None) -> Self:
        """Return a run in its role.

        Args:
            run: the run.
            role: its part in the run that needs it; None for the run that the command requests.
            step: number of steps before the checkpoint that it resumes from; None if it starts.
        """
        spec = run.spec
        config: Any = OmegaConf.to_container(run.config, resolve=True)
        return cls(
            folder=run.directory,
            name=run.name.removesuffix(f"-{run.digest}"),
            digest=run.digest,
            group=spec.logger.group,
            job_type=STUDENT if role is None else role.kind,
            tags=tuple(dict.fromkeys([spec.method["name"], spec.student.name, *tasks_of(spec.task)])),
            config=config,
            first_step=step or 0,  # steps are counted from 0
        )


class Tracker(Logger):
    """A logger of Lightning that also shows the record of the finished run."""

    def check(self) -> None:
        """Check the options, before anything is trained; an error names an argument of the class.

        Raises:
            InputError: for options that the package does not accept.
        """

    def begin(self, rows: Sequence[Mapping[str, str]]) -> None:
        """Begin to log, before the first step.

        Args:
            rows: rows of `metrics.csv` up to the checkpoint that the run resumes from; none if it starts.
        """

    @abstractmethod
    def conclude(self, record: Mapping[str, Any], notes: Mapping[str, str]) -> None:
        """Show the record of the finished run, and keep its `FILES`.

        Args:
            record: content of `result.json`.
            notes: what the method resolved, such as its layer map: name -> text.
        """

    @abstractmethod
    def close(self, *, failed: bool) -> None:
        """End the run, so that another one of this process can begin; nothing happens if it has not begun."""


def import_package(name: str) -> ModuleType:
    """Import the package of a logger.

    Raises:
        InputError: if it is not installed, or a package that it needs is not.
    """
    try:
        package = importlib.import_module(name)
        if (
            getattr(package, "__file__", None) is None
        ):  # a folder of this name in the working folder, for example of earlier runs
            raise ModuleNotFoundError(f"{name} is a folder without a package in it", name=name)
    except ImportError as error:
        why = "" if error.name == name else f" ({one_line(error)})"
        raise InputError(f"logger={name} needs the package: pip install {name}{why}", "logger") from error
    return package


def check_options(function: Callable[..., Any], options: Mapping[str, Any], what: str) -> None:
    """Check that a function takes the options.

    Args:
        function: function of the package.
        options: keyword arguments, by the keys of the node.
        what: name of the function, for the message.

    Raises:
        InputError: naming the first one that it does not take.
    """
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name in options:
        if name not in parameters:
            raise InputError(f"{what} takes no argument '{name}'", name)
