"""Points of a sweep: all are planned before the first is made, and one that fails leaves the others alone.

A failure is printed when it happens. The last lines count the points that are done and list those that failed.
"""

import os
import pickle
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.utils import get_class
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from kd import distributed
from kd.config import compose, explain
from kd.errors import DISK_FULL, InputError, disk_is_full
from kd.planning import plan
from kd.runs import Run, check_writable

SWEEPER = "hydra_plugins.kd_sweeper.Points"


def register() -> None:
    """Make the sweeper known to Hydra.

    Hydra takes plugins from a top-level package `hydra_plugins` alone, which is a namespace that any folder may add to.
    """
    folder = str(Path(__file__).parent / "plugins")
    if folder not in sys.path:
        sys.path.append(folder)
    Plugins.instance().register(get_class(SWEEPER))


class PointsFailed(Exception):
    """Some points of a sweep failed, and it has been said which.

    Attributes:
        status: exit status of the command: 2 if all of them failed by something the user can put right, else 1.
    """

    def __init__(self, status: int) -> None:
        super().__init__(f"exit status {status}")
        self.status = status


@dataclass(frozen=True)
class Failure:
    """Why a point failed. It holds no exception, whose traceback would keep models in memory."""

    message: str
    key: str | None = None
    users: bool = True
    """Whether it is something the user can put right."""
    trace: str | None = None
    """The traceback, where it is to be printed."""

    @staticmethod
    def of(error: Exception) -> "Failure":
        """From an exception that is being handled."""
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


@dataclass
class Sweep:
    """What has become of the points so far.

    Args:
        points: the overrides of each.
    """

    points: Sequence[Sequence[str]]
    done: int = 0
    failures: dict[int, Failure] = field(default_factory=dict)
    """By position, from 0."""

    def name(self, index: int) -> str:
        """A point in words: its number, and the overrides in which points differ."""
        first = self.points[0]
        differ = [any(point[position] != word for point in self.points) for position, word in enumerate(first)]
        own = [word for word, differs in zip(self.points[index], differ, strict=True) if differs]
        return f"{index + 1} of {len(self.points)}: {' '.join(own or self.points[index])}"

    def fail(self, index: int, failure: Failure) -> None:
        """Note a failure, and print it."""
        self.failures[index] = failure
        if distributed.is_rank_zero():
            trace = f"{failure.trace}\n" if failure.trace else ""
            sys.stdout.flush()
            print(f"\n{trace}kd-train: point {self.name(index)}\n  failed: {failure}", file=sys.stderr, flush=True)

    @property
    def counts(self) -> str:
        """How many points are done, failed, and left."""
        left = len(self.points) - self.done - len(self.failures)
        return f"{self.done} done, {len(self.failures)} failed" + (f", {left} not made" if left else "")

    def close(self) -> None:
        """Print the counts, and the points that failed.

        Raises:
            PointsFailed: if any failed.
        """
        if not self.failures:
            distributed.print_rank_zero(f"\n{self.counts}")
            return
        lines = [f"\nkd-train: {self.counts}:"]
        for index, failure in sorted(self.failures.items()):
            (message, *_) = failure.message.splitlines() or [""]
            lines.append(f"  {self.name(index)}  failed: {message}" + (f" (change: {failure.key})" if failure.key else ""))
        if distributed.is_rank_zero():
            sys.stdout.flush()
            print("\n".join(lines), file=sys.stderr, flush=True)
        raise PointsFailed(2 if all(failure.users for failure in self.failures.values()) else 1)


def sweep(points: Sequence[Sequence[str]], options: Sequence[str], launch: Callable[..., Sequence[Any]]) -> None:
    """Plan all points, then make those that are not done.

    Args:
        points: the overrides of each.
        options: overrides of Hydra's own configuration.
        launch: Hydra's launcher: makes points, given their overrides and the first one's number.

    Raises:
        PointsFailed: at the end, if any failed.
        InputError: if the folder of all runs cannot be written to, or the ranks do not agree on what fails.
    """
    state = Sweep(points)
    try:
        for index in planned(state, options):
            try:
                (returned,) = launch([points[index]], initial_job_idx=index)
                failure = returned.return_value
            except (HydraException, OmegaConfBaseException) as error:  # composed for the launcher alone
                failure = Failure.of(error)
            if failure is None:
                state.done += 1
            else:
                state.fail(index, failure)
    except KeyboardInterrupt:
        distributed.print_rank_zero(f"\ninterrupted: {state.counts}")
        raise
    state.close()


def planned(state: Sweep, options: Sequence[str]) -> list[int]:
    """Plan every point; those that are left to be made.

    What fails here is told before anything is trained, and what is done already costs no more than this. A point that is
    left is planned again in its turn, because the files that it reads may be others by then.

    Raises:
        InputError: if the one folder of all runs cannot be written to, or the ranks do not agree on what fails.
    """
    from kd.train import check_launch, deliver

    left: dict[int, Run] = {}
    later = []
    failed: dict[int, Failure] = {}
    for index, overrides in enumerate(state.points):
        try:
            config = compose([*options, *overrides])
            if asks_hydra(config):
                later.append(index)
                continue
            run = plan(config, overrides)
            check_launch(run)
            if distributed.world() == 1 and run.is_done():
                deliver(run)
                state.done += 1
            else:
                left[index] = run
        except BrokenPipeError:  # nobody reads any more
            raise
        except Exception as error:  # noqa: BLE001 - told at once; the other points go on
            failed[index] = Failure.of(error)
            state.fail(index, failed[index])
    if distributed.world() > 1:  # also where this rank has nothing left: another may
        distributed.start(next((run.spec.trainer.accelerator for run in left.values()), "auto"))
        check_alike(state, {index: run.name for index, run in left.items()}, failed)
    places = sorted([*left, *later])
    if places and (state.failures or state.done):
        counted = f", {len(state.failures)} failed" if state.failures else ""
        distributed.print_rank_zero(f"\n{len(state.points)} points: {state.done} done already{counted}, {len(places)} to make")
    folders = {run.spec.paths.runs for run in left.values()}
    if len(folders) == 1:  # of several, each point says so in its turn
        distributed.on_rank_zero(lambda: check_writable(*folders))
    return places


def check_alike(state: Sweep, names: Mapping[int, str], failed: Mapping[int, Failure]) -> None:
    """Check that every rank plans the same runs; every rank has to call this.

    Args:
        state: the points.
        names: position of a point -> name of the run that this rank has planned for it.
        failed: position of a point -> why this rank cannot plan it.

    Raises:
        InputError: on every rank, with the reason of the rank that fails at a point where another does not.
    """
    ranks = distributed.gather((names, {index: (failure.message, failure.key) for index, failure in failed.items()}))
    for index in range(len(state.points)):
        planned_as = [runs.get(index) for runs, _ in ranks]  # None where a rank fails, or leaves the planning to the job
        reasons = [reasons.get(index) for _, reasons in ranks]
        if len(set(planned_as)) == 1 and len({reason is None for reason in reasons}) == 1:
            continue
        own = failed.get(index)
        if own is not None and own.trace and not distributed.is_rank_zero():  # the first has shown its own
            print(own.trace, file=sys.stderr, flush=True)
        told = [f"rank {rank} fails: {reason[0]}" for rank, reason in enumerate(reasons) if reason is not None]
        told += [f"rank {rank} plans {name}" for rank, name in enumerate(planned_as) if name is not None]
        key = next((reason[1] for reason in reasons if reason is not None), None)
        raise InputError(f"the ranks do not plan the same at point {state.name(index)}:\n  " + "\n  ".join(told), key)


def asks_hydra(config: DictConfig) -> bool:
    """Return whether a value is Hydra's to say inside a job: `${hydra:job.num}`."""
    return b"${hydra:" in pickle.dumps(config)
