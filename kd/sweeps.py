"""Sweeps over combinations of values, as `kd-train --multirun` makes them.

A point is the command with one of the combinations. All points are planned before the first is run, and a point that fails
does not stop the others. A failure is printed when it happens. The last lines give the number of finished points and list
those that failed.
"""

import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.utils import get_class
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from kd.config.compose import compose
from kd.config.failure import Failure
from kd.config.mixture import expand
from kd.config.schema import LauncherSpec, launcher_named
from kd.errors import InputError
from kd.runs.plan import plan
from kd.runs.run import Run
from kd.system import distributed
from kd.system.files import check_writable

SWEEPER = "hydra_plugins.kd_sweeper.Points"


def register() -> None:
    """Register the sweeper with Hydra.

    Hydra loads plugins only from the top-level package `hydra_plugins`, a namespace package that any folder may extend.
    """
    folder = str(Path(__file__).parent / "plugins")
    if folder not in sys.path:
        sys.path.append(folder)
    Plugins.instance().register(get_class(SWEEPER))


class PointsFailed(Exception):
    """Error at the end of a sweep in which points failed; the failures have been printed already.

    Attributes:
        status: exit status of the command: 2 if the user can correct every failure, else 1.
    """

    def __init__(self, status: int) -> None:
        super().__init__(f"exit status {status}")
        self.status = status


@dataclass
class Sweep:
    """State of a sweep: points, number of finished ones, and failures.

    Args:
        points: the overrides of each point.
    """

    points: Sequence[Sequence[str]]
    done: int = 0
    failures: dict[int, Failure] = field(default_factory=dict)
    """Failures by index of the point, from 0."""

    def name(self, index: int) -> str:
        """Return the description of a point: its number, and the overrides in which points differ."""
        first = self.points[0]
        differ = [any(point[position] != word for point in self.points) for position, word in enumerate(first)]
        distinctive = [word for word, differs in zip(self.points[index], differ, strict=True) if differs]
        return f"{index + 1} of {len(self.points)}: {' '.join(distinctive or self.points[index])}"

    def fail(self, index: int, failure: Failure) -> None:
        """Record a failure and print it."""
        self.failures[index] = failure
        if distributed.is_rank_zero():
            trace = f"{failure.trace}\n" if failure.trace else ""
            sys.stdout.flush()
            print(f"\n{trace}kd-train: point {self.name(index)}\n  failed: {failure}", file=sys.stderr, flush=True)

    @property
    def counts(self) -> str:
        """Numbers of points that are done, failed and left, as text."""
        left = len(self.points) - self.done - len(self.failures)
        return f"{self.done} done, {len(self.failures)} failed" + (f", {left} not started" if left else "")

    def close(self) -> None:
        """Print the counts and the points that failed.

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
    """Plan all points, then run those that are not done.

    Args:
        points: the overrides of each point.
        options: overrides of Hydra's configuration.
        launch: Hydra's launcher: runs points, given their overrides and the number of the first one.

    Raises:
        PointsFailed: at the end, if any failed.
        InputError: if the folder of all runs cannot be written to, the ranks do not agree on what fails, or `launcher` cannot
            run the points.
    """
    state = Sweep(points)
    try:
        left = planned(state, options)
        if (launcher := launcher_of(left)) is None:
            one_after_the_other(state, sorted(left), launch)
        else:
            side_by_side(state, left, launcher)
    except KeyboardInterrupt:
        distributed.print_rank_zero(f"\ninterrupted: {state.counts}")
        raise
    state.close()


def one_after_the_other(state: Sweep, indices: Sequence[int], launch: Callable[..., Sequence[Any]]) -> None:
    """Run points by Hydra's launcher."""
    for index in indices:
        try:
            (returned,) = launch([expand(state.points[index])], initial_job_idx=index)
            failure = returned.return_value
        except (HydraException, OmegaConfBaseException) as error:  # raised as the launcher composes the configuration again
            failure = Failure.of(error)
        if failure is None:
            state.done += 1
        else:
            state.fail(index, failure)


def launcher_of(runs: Mapping[int, Run | None]) -> LauncherSpec | None:
    """Return the launcher of points; None for Hydra's.

    Raises:
        InputError: if the points do not have one launcher, or it cannot run them.
    """
    launchers = [run.spec.launcher for run in runs.values() if run is not None]
    chosen = next((launcher for launcher in launchers if launcher_named(launcher.name).execute is not None), None)
    if chosen is None:
        return None
    key = f"launcher={chosen.name}"
    if any(launcher != chosen for launcher in launchers):
        raise InputError("the points of a sweep have one launcher; do not sweep over it", "launcher")
    if distributed.world() > 1:
        raise InputError(f"{key} starts processes itself: start it without torchrun", "launcher")
    if search_path_is_extended():
        raise InputError(f"{key} starts processes that do not get --config-dir; give the values as overrides", "launcher")
    return chosen


def search_path_is_extended() -> bool:
    """Return whether configuration files are read from a further folder, as with `--config-dir`."""
    from hydra.core.global_hydra import GlobalHydra

    if not GlobalHydra.instance().is_initialized():
        return False
    path = GlobalHydra.instance().config_loader().get_search_path().get_path()
    return any(element.provider not in ("hydra", "main", "schema") for element in path)


def side_by_side(state: Sweep, runs: Mapping[int, Run | None], launcher: LauncherSpec) -> None:
    """Run points in processes of their own, first the runs that they need."""
    from kd.launch.jobs import jobs_of
    from kd.launch.launcher import launch, workers
    from kd.launch.progress import Progress

    chosen = {index: run for index, run in runs.items() if run is not None}
    indices: dict[str, list[int]] = {}
    for index, run in chosen.items():
        indices.setdefault(run.name, []).append(index)
    jobs = jobs_of(chosen, [list(expand(point)) for point in state.points])
    labels = {name: f"point {state.name(numbers[0])}" for name, numbers in indices.items()}
    progress = Progress(jobs, labels, state.done, len(state.points), workers(launcher, jobs.values()))
    for event in launch(jobs, launcher, "sweep"):
        points = indices.get(event.job.name, [])
        if event.state == "done":
            state.done += len(points)
        if event.failure is None or not points:
            progress(event)
            continue
        for index in points:
            state.fail(index, event.failure)


def planned(state: Sweep, options: Sequence[str]) -> dict[int, Run | None]:
    """Plan every point; return the index of each that is left, and its run; None if only a Hydra job can plan it.

    Failures of planning are printed before anything is trained, and a finished point needs no more than its plan. A point
    that is left is planned again when it is run, because its input files may have changed by then.

    Raises:
        InputError: if the folder of all runs cannot be written to, or the ranks do not agree on what fails.
    """
    from kd.launch.launcher import prepare
    from kd.training.execute import check_launch, deliver

    left: dict[int, Run] = {}
    later = []
    failed: dict[int, Failure] = {}
    for index, overrides in enumerate(state.points):
        try:
            config = compose([*options, *overrides])
            if asks_hydra(config):
                if launcher_named(name := config.launcher.name).execute is not None:
                    raise InputError(
                        f"launcher={name} starts processes that are no Hydra jobs: ${{hydra:...}} has no value there",
                        "launcher",
                    )
                later.append(index)
                continue
            run = plan(config, overrides)
            check_launch(run)
            if distributed.world() == 1 and run.is_done():
                deliver(run)
                state.done += 1
            else:
                left[index] = run
                prepare(run.spec.launcher)
        except BrokenPipeError:  # the output has been closed
            raise
        except Exception as error:  # noqa: BLE001 - printed at once; the other points go on
            failed[index] = Failure.of(error)
            state.fail(index, failed[index])
    if distributed.world() > 1:  # even if this rank has no points left, because another may have some
        distributed.start(next((run.spec.trainer.accelerator for run in left.values()), "auto"))
        check_alike(state, {index: run.name for index, run in left.items()}, failed)
    if (left or later) and (state.failures or state.done):
        counted = f", {len(state.failures)} failed" if state.failures else ""
        distributed.print_rank_zero(
            f"\n{len(state.points)} points: {state.done} done already{counted}, {len(left) + len(later)} to run"
        )
    folders = {run.spec.paths.runs for run in left.values()}
    if len(folders) == 1:  # with several folders, each point checks its own when it is run
        distributed.on_rank_zero(lambda: check_writable(*folders))
    return {**left, **dict.fromkeys(later)}


def check_alike(state: Sweep, names: Mapping[int, str], failed: Mapping[int, Failure]) -> None:
    """Check that every rank plans the same runs; every rank has to call this.

    Args:
        state: the sweep.
        names: index of a point -> name of the run that this rank has planned for it.
        failed: index of a point -> failure of this rank to plan it.

    Raises:
        InputError: on every rank, with the reason of the rank that fails at a point where another does not.
    """
    ranks = distributed.gather((names, {index: (failure.message, failure.key) for index, failure in failed.items()}))
    for index in range(len(state.points)):
        planned_as = [runs.get(index) for runs, _ in ranks]  # None if planning failed, or is left to the job
        reasons = [reasons.get(index) for _, reasons in ranks]
        if len(set(planned_as)) == 1 and len({reason is None for reason in reasons}) == 1:
            continue
        failure = failed.get(index)
        if failure is not None and failure.trace and not distributed.is_rank_zero():  # rank 0 has printed its traceback
            print(failure.trace, file=sys.stderr, flush=True)
        lines = [f"rank {rank} fails: {reason[0]}" for rank, reason in enumerate(reasons) if reason is not None]
        lines += [f"rank {rank} plans {name}" for rank, name in enumerate(planned_as) if name is not None]
        key = next((reason[1] for reason in reasons if reason is not None), None)
        raise InputError(f"the ranks plan different runs at point {state.name(index)}:\n  " + "\n  ".join(lines), key)


def asks_hydra(config: DictConfig) -> bool:
    """Return whether a value can only be resolved inside a Hydra job, such as `${hydra:job.num}`."""
    return b"${hydra:" in pickle.dumps(config)
