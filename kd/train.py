"""The command `kd-train`, or `python -m kd.train` for torchrun: plan, run inputs, check, fit, evaluate, export, record.

Exit status 0 on success, 2 for an error that the user can correct, 1 for any other, 130 on Ctrl-C; for a sweep with failed
points 2 if the user can correct all of them, else 1. Heavy modules are imported only when needed, so that `--help` and
finished runs return at once.
"""

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from kd.config.compose import FROM_HYDRA, ROOT, check_overrides, compose, conf_folder, explain, typed
from kd.config.failure import Failure
from kd.config.help import help_text
from kd.config.mixture import expand
from kd.errors import DISK_FULL, InputError, disk_is_full
from kd.runs.plan import plan
from kd.runs.run import Run
from kd.sweeps import SWEEPER, PointsFailed, asks_hydra, register
from kd.system import distributed
from kd.system.hardware import configure_openmp, version_line
from kd.system.startup import without_collection
from kd.training.execute import check_launch, check_ranks, deliver

INTERRUPTED = 130

_begun = False
"""True once Hydra has composed a configuration and called `job`."""


def job(config: DictConfig) -> Failure | None:
    """Run one configuration; Hydra calls this for each point of a sweep (`kd.sweeps`). Return its failure, or None."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    global _begun
    _begun = True
    hydra_config = HydraConfig.get()
    overrides = hydra_config.overrides.task
    if hydra_config.mode == RunMode.RUN:
        with plain_errors():
            make_point(config, overrides)
        return None
    failure = point(str(hydra_config.job.num), lambda: make_point(config, overrides))
    if failure is not None and hydra_config.sweeper["_target_"] != SWEEPER:  # another sweeper would take it for a result
        raise InputError(failure.message, failure.key)
    return failure


def make_point(config: DictConfig, overrides: Sequence[str]) -> None:
    """Plan and check the run of a configuration, execute it unless it is done, and print its table."""
    make(planned(config, overrides))


def planned(config: DictConfig, overrides: Sequence[str]) -> Run:
    """Return the run of a configuration.

    Raises:
        InputError: for a value that is not valid, or an input that does not exist.
    """
    typed(config)  # first, because it names the key of a value that cannot be interpolated
    run = plan(config, list(overrides))
    check_launch(run)
    return run


def make(run: Run) -> None:
    """Check that all ranks have the same run, execute it unless it is done, and print its table."""
    distributed.start(run.spec.trainer.accelerator)
    check_ranks(run)
    deliver(run)


def point(number: str, make: Callable[[], None]) -> Failure | None:
    """Run a point of a sweep (`kd.sweeps`); return its failure, or None, so that the other points go on.

    If the ranks do not fail with the same error, they cannot go on together, and the job ends.
    """
    try:
        make()
    except BrokenPipeError:  # the output has been closed
        raise
    except Exception as error:
        if not distributed.all_ranks_failed_alike(number, error):
            with plain_errors():
                raise
        return Failure.of(error)
    return None


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turn errors that the user can correct into a message and an exit status; others keep their traceback."""
    try:
        yield
    except BrokenPipeError:  # `kd-train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        stop("interrupted; run the same command to resume from the last checkpoint", INTERRUPTED)
    except InputError as error:
        stop(f"kd-train: {error}", 2)
    except (HydraException, OmegaConfBaseException) as error:
        stop(f"kd-train: {explain(error)}", 2)
    except Exception as error:
        if disk_is_full(error):
            stop(f"kd-train: {DISK_FULL}\n  change: paths.runs", 2)
        distributed.end_without(error)
        if distributed.world() == 1:
            raise
        traceback.print_exc()
        distributed.end(1)


def stop(message: str, status: int) -> None:
    """End the process with a message and an exit status."""
    if os.environ.get("KD_TRACEBACK"):
        traceback.print_exc()
    try:
        if distributed.prints_error(message):
            print(f"\n{message}", file=sys.stderr, flush=True)
    finally:
        distributed.end(status)


def leave_out_working_folder() -> None:
    """Remove the working folder from `sys.path`, where `python -m` puts it first.

    It may hold code of others, and any folder is importable: one called `wandb`, `datasets` or `hydra_plugins` would be
    imported instead of the package. `kd-train` does not have it in its path.
    """
    here, checkout = Path.cwd(), Path(__file__).resolve().parent.parent
    if sys.path and here == Path(sys.path[0]).absolute() and here.resolve() != checkout:
        del sys.path[0]


def overrides_first(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command into overrides and options with their values: Hydra requires overrides to be contiguous.

    >>> overrides_first(["seed=0,1", "--multirun", "method=kd", "--cfg", "job"])
    (['seed=0,1', 'method=kd'], ['--multirun', '--cfg', 'job'])
    """
    from hydra._internal.utils import get_args_parser

    overrides: list[str] = get_args_parser().parse_intermixed_args(list(words)).overrides
    options = list(words)
    for override in overrides:
        options.remove(override)
    return overrides, options


@without_collection()
def planned_alone(overrides: Sequence[str]) -> Run | None:
    """Return the run of overrides, which Hydra would compose twice; None if only a job of Hydra has its configuration.

    Such a job is needed for overrides of Hydra's own configuration, and for values that it resolves, as `${hydra:job.num}`.

    Raises:
        InputError: for a value that is not valid, or an input that does not exist.
    """
    if any(re.match(r"[+~]*hydra\b", override) for override in overrides):
        return None
    config = compose(overrides)
    return None if asks_hydra(config) else planned(config, overrides)


def main() -> None:
    """Run the command `kd-train`."""
    leave_out_working_folder()
    if "--version" in sys.argv[1:]:  # Hydra would print its version
        print(version_line())
        return
    if {"--help", "-h"} & set(sys.argv[1:]):  # Hydra would print the whole configuration, some 200 lines
        with plain_errors():
            print(help_text(), flush=True)
        return
    configure_openmp()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints its report and exits with 1
    with plain_errors():
        status = 0
        overrides, options = overrides_first(sys.argv[1:])
        check_overrides(overrides)
        overrides = expand(overrides)
        sys.argv[1:] = [*overrides, *options]
        distributed.join()
        if not options and (run := planned_alone(overrides)) is not None:
            make(run)
        else:
            status = run_by_hydra()
        distributed.leave(status)
        if status:
            sys.exit(status)


def run_by_hydra() -> int:
    """Run the command line by Hydra, with its options such as `--multirun`; return the exit status.

    Raises:
        InputError: for an invalid override.
    """
    global _begun
    _begun = False
    command = hydra.main(config_path=str(conf_folder()), config_name=ROOT, version_base="1.3")(job)
    register()
    try:
        command()
    except PointsFailed as failed:
        return failed.status
    except FROM_HYDRA as error:
        if _begun or isinstance(error, BrokenPipeError):
            raise
        raise explain(error) from error  # raised by Hydra for an invalid override
    return 0


if __name__ == "__main__":
    main()
