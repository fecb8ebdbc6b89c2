"""The command `kd-train`, or `python -m kd.train` for torchrun: plan, run inputs, check, fit, evaluate, export, record.

Exit status 0 on success, 2 for an error that the user can correct, 1 for any other, 130 on Ctrl-C; for a sweep with failed
points 2 if the user can correct all of them, else 1. Heavy modules are imported only when needed, so that `--help` and
finished runs return at once.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from kd import distributed
from kd.config import FROM_HYDRA, ROOT, check_overrides, conf_folder, explain, typed
from kd.errors import DISK_FULL, InputError, disk_is_full
from kd.files import writes_to
from kd.hardware import configure_openmp, version_line
from kd.planning import plan, rename_error_keys
from kd.runs import Run, digest_of
from kd.sweeps import SWEEPER, Failure, PointsFailed, register

INTERRUPTED = 130

_begun = False
"""True once Hydra has composed a configuration and called `job`."""


def execute(run: Run, purpose: str = "", first: bool = True) -> dict[str, Any]:
    """Execute a run and the runs that it needs, unless they are done; return its record.

    Args:
        run: the run to execute.
        purpose: description of the run to print, if another run needs it.
        first: True for the run that the command requests; then all runs that it needs are checked before any is executed.

    Raises:
        InputError: for an error that the user can correct.
    """

    def state() -> tuple[dict[str, Any] | None, str | None]:
        """Return the record and the damage to the exports; for a run that another one needs, digests are compared too."""
        record = run.result
        return record, None if record is None else run.damage(record, thorough=not first)

    result, damage = distributed.on_rank_zero(state)
    if result is not None and damage is None:
        distributed.print_rank_zero(f"done already: {purpose or run.name}")
        distributed.print_rank_zero(f"  {run.directory}")
        return result
    from kd.build import build_examples

    examples = build_examples(run)  # referenced from here on, so that the checks and the teachers' runs reuse them
    if first:
        check_all(run)  # before any run that it needs is trained, and before a folder is made: a refusal leaves none behind
    with writes_to(run.spec.paths.runs), contextlib.ExitStack() as held:
        distributed.on_rank_zero(lambda: held.enter_context(run.lock()))
        if not all(distributed.gather(run.directory.is_dir())):
            raise InputError(f"'{run.spec.paths.runs}' is not a folder that all machines share", "paths.runs")
        result, damage = distributed.on_rank_zero(state)  # another process may have finished it while this one waited
        if result is not None and damage is None:
            return result
        for role, needed in run.inputs.items():
            with rename_error_keys(role, run.spec, run.config):
                execute(needed, f"{role}: {needed.name}", first=False)
        from kd.fit import export_again, fit

        distributed.print_rank_zero(f"\n{purpose or run.name}\n  {run.directory}")
        if result is None and distributed.on_rank_zero((run.directory / "result.json").exists):
            distributed.print_rank_zero(
                "  its result.json is damaged; the run resumes from its last checkpoint and writes it anew"
            )
        if result is not None:
            distributed.print_rank_zero(f"  done, but {damage}; it is exported again")
            try:
                return distributed.on_rank_zero(lambda: export_again(run, examples, result))
            except InputError as error:
                if run.spec.resume:
                    raise
                distributed.print_rank_zero(f"  it cannot be exported again, so the run starts again: {error.message}")
        return fit(run, examples)


def check_all(run: Run, known: dict[str, Any] | None = None) -> None:
    """Check a run and all unfinished runs that it needs.

    Args:
        run: a run that is not done.
        known: examples that have been read already, by digest of task and data.

    Raises:
        InputError: for settings that cannot work, naming the key of the command.
    """
    from kd.build import build_examples, check_arguments, check_run
    from kd.loggers import check_logger

    if known is None:
        check_arguments(run)
    known = {} if known is None else known
    text = digest_of({part: run.digest_inputs[part] for part in ("task", "data")})
    if text not in known:
        known[text] = build_examples(run)
    check_logger(run.spec.logger.extra)
    check_run(run, known[text])
    for role, needed in run.inputs.items():
        if needed.result is None:
            with rename_error_keys(role, run.spec, run.config):
                check_all(needed, known)


def job(config: DictConfig) -> Failure | None:
    """Run one configuration; Hydra calls this once per point of a sweep. Return the point's failure, or None."""
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
    typed(config)  # first, because it names the key of a value that cannot be interpolated
    run = plan(config, list(overrides))
    check_launch(run)
    distributed.start(run.spec.trainer.accelerator)
    check_ranks(run)
    deliver(run)


def deliver(run: Run) -> None:
    """Execute a run, unless it is done, and print its table."""
    result = execute(run)
    if distributed.is_rank_zero():
        from kd.report import closing_table

        closing_table(result, run.directory)


def check_launch(run: Run, key: str = "trainer.batch_size") -> None:
    """Check that the number of processes fits a run and the runs that it needs.

    Several processes are started by torchrun, never by Lightning, which would start this command again in each.

    Args:
        run: the run to execute.
        key: configuration key of its batch size.

    Raises:
        InputError: if several devices are requested in one process, or the batch size is not a multiple of the number of
            ranks.
    """
    trainer = run.spec.trainer
    wanted = int(trainer.devices) if str(trainer.devices).isdigit() else 1
    if distributed.world() == 1 and wanted > 1:
        raise InputError(
            f"trainer.devices={trainer.devices} needs a process for each: "
            f"torchrun --nproc-per-node={wanted} -m kd.train trainer=ddp ...",
            "trainer.devices",
        )
    if trainer.batch_tokens is None and trainer.batch_size % distributed.world():
        raise InputError(
            f"trainer.batch_size={trainer.batch_size} is the batch over all ranks; {distributed.world()} do not divide it",
            key,
        )
    for role, needed in run.inputs.items():
        with rename_error_keys(role, run.spec, run.config):
            check_launch(needed, "student.run" if role == "stage" else "trainer.batch_size")


def check_ranks(run: Run) -> None:
    """Check that all ranks have the same run and settings: on several machines, several commands start them.

    Raises:
        InputError: if they differ.
    """
    caches = distributed.gather(str(run.spec.cache))
    if len(set(caches)) > 1:
        raise InputError(f"the ranks do not agree on cache: {', '.join(caches)}", "cache")
    names = distributed.gather(run.name)
    for rank, name in enumerate(names):
        if name != names[0]:
            raise InputError(f"the ranks do not train the same run: rank 0 is at {names[0]}, rank {rank} at {name}")
    counts = sorted(set(distributed.gather(distributed.local_world())))
    if len(counts) > 1:
        raise InputError(f"every machine has to start as many ranks: {counts} were started; see --nproc-per-node")


def point(number: str, make: Callable[[], None]) -> Failure | None:
    """Run a point of a sweep; return its failure, or None, so that the other points go on.

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


def main() -> None:
    """Run the command `kd-train`."""
    leave_out_working_folder()
    if "--version" in sys.argv[1:]:  # Hydra would print its version
        print(version_line())
        return
    global _begun
    _begun = False
    configure_openmp()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints its report and exits with 1
    command = hydra.main(config_path=str(conf_folder()), config_name=ROOT, version_base="1.3")(job)
    with plain_errors():
        status = 0
        overrides, options = overrides_first(sys.argv[1:])
        check_overrides(overrides)
        sys.argv[1:] = [*overrides, *options]
        distributed.join()
        register()
        try:
            command()
        except PointsFailed as failed:
            status = failed.status
        except FROM_HYDRA as error:
            if _begun or isinstance(error, BrokenPipeError):
                raise
            raise explain(error) from error  # raised by Hydra for an invalid override
        distributed.leave(status)
        if status:
            sys.exit(status)


if __name__ == "__main__":
    main()
