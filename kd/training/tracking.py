"""Creation, check and end of the loggers of a run beside its history; only rank 0 has them."""

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning.pytorch.loggers import Logger

from kd.build.instantiate import logger_makers, option_names
from kd.config.values import one_line
from kd.errors import InputError, prefix_error_keys
from kd.runs.run import Role, Run
from kd.system import distributed
from kd.training.trackers.base import TrackedRun, Tracker


def make_loggers(run: Run, tracked: TrackedRun, *, check: bool = False) -> list[Logger]:
    """Create the loggers of a run beside its history.

    Args:
        run: the run.
        tracked: the run as loggers show it.
        check: only create those that check their options; creating one of these writes and sends nothing.

    Raises:
        InputError: if a package is not installed, or does not accept an option.
    """
    loggers = []
    for name, make in logger_makers(run.spec).items():
        key, target = f"logger.extra.{name}", make.func
        if check and not (inspect.isclass(target) and issubclass(target, Tracker)):
            continue
        try:
            with prefix_error_keys(key, option_names(target, make.keywords)):
                logger = make(tracked)
                if isinstance(logger, Tracker):
                    logger.check()
        except (TypeError, ValueError) as error:
            raise InputError(f"{key} cannot be created: {one_line(error)}", key) from error
        loggers.append(logger)
    return loggers


def check_loggers(run: Run) -> None:
    """Check the options of a run's loggers before anything is trained.

    Raises:
        InputError: if a package is not installed, or does not accept an option.
    """
    if run.spec.logger.extra:
        make_loggers(run, TrackedRun.of(run), check=True)


@contextlib.contextmanager
def tracking(run: Run, role: Role | None, step: int | None) -> Iterator[list[Logger]]:
    """Yield the loggers of a run beside its history, and close them at the end.

    Args:
        run: the run.
        role: its part in the run that needs it; None for the run that the command requests.
        step: number of steps before the checkpoint that it resumes from; None if it starts.
    """
    loggers: list[Logger] = []
    if run.spec.logger.extra:  # an error is raised on every rank, as each has to stop
        distributed.on_rank_zero(lambda: loggers.extend(make_loggers(run, TrackedRun.of(run, role, step))))
    failed = True

    def close(tracker: Tracker) -> None:
        tracker.close(failed=failed)

    with contextlib.ExitStack() as stack:
        for logger in loggers:
            if isinstance(logger, Tracker):
                stack.callback(close, logger)
        yield loggers
        failed = False


def begin_all(loggers: Sequence[Logger], rows: Sequence[Mapping[str, str]]) -> None:
    """Let the trackers among loggers begin; see `Tracker.begin`."""
    for logger in loggers:
        if isinstance(logger, Tracker):
            logger.begin(rows)


def conclude_all(loggers: Sequence[Logger], record: Mapping[str, Any], notes: Mapping[str, str]) -> None:
    """Show the record of the finished run in the trackers among loggers; see `Tracker.conclude`."""
    for logger in loggers:
        if isinstance(logger, Tracker):
            logger.conclude(record, notes)
