"""One run: plan, make the inputs, check, fit, evaluate, export, record.

`kd-train`, or `python -m kd.train` for torchrun. Exit status 0 on success, 2 for something the user can put right, 1 for
anything else, 130 on Ctrl-C; of a sweep 2 where every point that failed can be put right, else 1. Nothing heavy is imported
before it is needed, so `--help` and a finished run answer at once.
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
from kd.hardware import configure_openmp, version_line
from kd.planning import plan, rename_error_keys
from kd.runs import Run, digest_of, writes_to
from kd.sweeps import SWEEPER, Failure, PointsFailed, register

INTERRUPTED = 130

_begun = False
"""Whether Hydra has composed a configuration and called `job`."""


def execute(run: Run, purpose: str = "", first: bool = True) -> dict[str, Any]:
    """Make a run and what it needs, unless it is done; its record.

    Args:
        run: to be made.
        purpose: what it is for, where another run needs it.
        first: whether it is what the command asks for; then all that it needs is checked before any of it is made.

    Raises:
        InputError: for what the user can put right.
    """

    def state() -> tuple[dict[str, Any] | None, str | None]:
        """The record, and what is damaged of the exports; a run that another begins from is looked at byte by byte."""
        record = run.result
        return record, None if record is None else run.damage(record, thorough=not first)

    result, damage = distributed.on_rank_zero(state)
    if result is not None and damage is None:
        distributed.print_rank_zero(f"done already: {purpose or run.name}")
        distributed.print_rank_zero(f"  {run.directory}")
        return result
    from kd.build import build_examples

    with writes_to(run.spec.paths.runs), contextlib.ExitStack() as held:
        distributed.on_rank_zero(lambda: held.enter_context(run.lock()))
        if not all(distributed.gather(run.directory.is_dir())):
            raise InputError(f"'{run.spec.paths.runs}' is not a folder that all machines share", "paths.runs")
        result, damage = distributed.on_rank_zero(state)  # another process may have made it while this one waited
        if result is not None and damage is None:
            return result
        examples = build_examples(run)  # held from here on, so that the checks, and the runs that make teachers, find them read
        if first:
            check_all(run)  # before anything is trained for it
        for role, needed in run.inputs.items():
            with rename_error_keys(role, run.spec, run.config):
                execute(needed, f"{role}: {needed.name}", first=False)
        from kd.fit import export_again, fit

        distributed.print_rank_zero(f"\n{purpose or run.name}\n  {run.directory}")
        if result is None and distributed.on_rank_zero((run.directory / "result.json").exists):
            distributed.print_rank_zero(
                "  its result.json is damaged; the run goes on from its last checkpoint and writes it anew"
            )
        if result is not None:
            distributed.print_rank_zero(f"  done, but {damage}; it is exported again")
            try:
                return distributed.on_rank_zero(lambda: export_again(run, examples, result))
            except InputError as error:
                if run.spec.resume:
                    raise
                distributed.print_rank_zero(f"  that cannot be done, so the run begins again: {error.message}")
        return fit(run, examples)


def check_all(run: Run, known: dict[str, Any] | None = None) -> None:
    """Check a run and, before them all, whatever has yet to be made for it.

    Args:
        run: not done.
        known: examples that have been read already, by what identifies them.

    Raises:
        InputError: for what cannot work, naming the key of the command.
    """
    from kd.build import build_examples, check_arguments, check_run

    if known is None:
        check_arguments(run)
    known = {} if known is None else known
    text = digest_of({part: run.digest_inputs[part] for part in ("task", "data")})
    if text not in known:
        known[text] = build_examples(run)
    check_run(run, known[text])
    for role, needed in run.inputs.items():
        if needed.result is None:
            with rename_error_keys(role, run.spec, run.config):
                check_all(needed, known)


def job(config: DictConfig) -> Failure | None:
    """What Hydra calls, once for each point of a sweep; why the point failed, if it did."""
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
    if failure is not None and hydra_config.sweeper["_target_"] != SWEEPER:  # another would take it for a result
        raise InputError(failure.message, failure.key)
    return failure


def make_point(config: DictConfig, overrides: Sequence[str]) -> None:
    """The run of a configuration, made if need be."""
    typed(config)  # first: of a value that cannot be interpolated it names the key
    run = plan(config, list(overrides))
    check_launch(run)
    distributed.start(run.spec.trainer.accelerator)
    check_ranks(run)
    deliver(run)


def deliver(run: Run) -> None:
    """Make a run, unless it is done, and print its table."""
    result = execute(run)
    if distributed.is_rank_zero():
        from kd.report import closing_table

        closing_table(result, run.directory)


def check_launch(run: Run, key: str = "trainer.batch_size") -> None:
    """Several processes are started by torchrun, never by Lightning, which would start this command again in each.

    Args:
        run: what is to be made.
        key: where its batch size can be changed.

    Raises:
        InputError: if several devices are asked for in one process, or a batch, of this run or one that it needs, cannot be
            shared equally by the ranks.
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
    """Ranks of several machines come from several commands, which have to say the same.

    Raises:
        InputError: if they do not.
    """
    caches = distributed.gather(str(run.spec.cache))
    if len(set(caches)) > 1:
        raise InputError(f"the ranks do not agree on cache: {', '.join(caches)}", "cache")
    names = distributed.gather(run.name)
    for rank, name in enumerate(names):
        if name != names[0]:
            raise InputError(f"the ranks are not at the same run: rank 0 is at {names[0]}, rank {rank} at {name}")
    counts = sorted(set(distributed.gather(distributed.local_world())))
    if len(counts) > 1:
        raise InputError(f"every machine has to start as many ranks: {counts} were started; see --nproc-per-node")


def point(number: str, make: Callable[[], None]) -> Failure | None:
    """Make a point of a sweep; why it failed, if it did. One that fails must not take the others with it.

    Ranks that do not fail alike cannot go on together, so that ends the job.
    """
    try:
        make()
    except BrokenPipeError:  # nobody reads any more
        raise
    except Exception as error:
        if not distributed.all_ranks_failed_alike(number, error):
            with plain_errors():
                raise
        return Failure.of(error)
    return None


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """What the user can put right becomes one message and an exit status; anything else stays a traceback."""
    try:
        yield
    except BrokenPipeError:  # `kd-train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        stop("interrupted; the same command goes on from the last checkpoint", INTERRUPTED)
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
    """End with a message and a status."""
    if os.environ.get("KD_TRACEBACK"):
        traceback.print_exc()
    try:
        if distributed.prints_error(message):
            print(f"\n{message}", file=sys.stderr, flush=True)
    finally:
        distributed.end(status)


def leave_out_working_folder() -> None:
    """Import nothing from the working folder, which `python -m` puts first: it may be anybody's, and any folder is importable.

    A folder called `wandb`, `datasets` or `hydra_plugins` would be taken for the package. `kd-train` never looks there.
    """
    here, checkout = Path.cwd(), Path(__file__).resolve().parent.parent
    if sys.path and here == Path(sys.path[0]).absolute() and here.resolve() != checkout:
        del sys.path[0]


def overrides_first(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command's overrides, and its options with their values: Hydra takes overrides only where they stand together.

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
    """The command."""
    leave_out_working_folder()
    if "--version" in sys.argv[1:]:  # Hydra would print its own
        print(version_line())
        return
    global _begun
    _begun = False
    configure_openmp()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra would print its own report and exit with 1
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
            raise explain(error) from error  # Hydra's own, of an override that it cannot work with
        distributed.leave(status)
        if status:
            sys.exit(status)


if __name__ == "__main__":
    main()
