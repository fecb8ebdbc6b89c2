"""One run: plan, make the inputs, check, fit, evaluate, export, record.

`kd-train`, or `python -m kd.train` for torchrun. Exit status 0 on success, 2 for something the user can put right, 130 on
Ctrl-C. Nothing heavy is imported before it is needed, so `--help` and a finished run answer at once.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from kd import distributed
from kd.config import ROOT, conf_folder, explain
from kd.errors import InputError, disk_is_full
from kd.planning import keys_of, plan
from kd.runs import Run

INTERRUPTED = 130


def execute(run: Run, purpose: str = "") -> dict[str, Any]:
    """Make a run and what it needs, unless it is done; its record.

    Raises:
        InputError: for what the user can put right.
    """
    result: dict[str, Any] | None = distributed.agree(run.result)
    if result is not None:
        say(f"done already: {purpose or run.name}")
        say(f"  {run.directory}")
        return result
    from kd.build import build_examples, check

    with run.lock() if distributed.is_first() else contextlib.nullcontext():
        result = distributed.agree(run.result)  # another process may have made it while this one waited
        if result is not None:
            return result
        examples = build_examples(run)
        check(run, examples)  # before a teacher is trained for it
        for role, needed in run.inputs.items():
            with keys_of(role):
                execute(needed, f"{role}: {needed.name}")
        from kd.fit import fit

        say(f"\n{purpose or run.name}\n  {run.directory}")
        return fit(run, examples)


def say(text: str) -> None:
    """Print, on the first rank only."""
    if distributed.is_first():
        print(text, flush=True)


def job(config: DictConfig) -> None:
    """What Hydra calls, once for each point of a sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra_config = HydraConfig.get()
    alone = hydra_config.mode == RunMode.RUN
    # In a sweep a point that fails must not take the others with it: Hydra keeps its error, and `main` reports it.
    with plain_errors() if alone else contextlib.nullcontext():
        run = plan(config, list(hydra_config.overrides.task))
        check_launch(run)
        distributed.start(run.spec.trainer.accelerator)
        result = execute(run)
        if distributed.is_first():
            from kd.report import closing_table

            closing_table(result, run.directory)


def check_launch(run: Run) -> None:
    """Several processes are started by torchrun, never by Lightning, which would start this command again in each.

    Raises:
        InputError: if several devices are asked for in one process, or the batch is smaller than the ranks are many.
    """
    trainer = run.spec.trainer
    wanted = int(trainer.devices) if str(trainer.devices).isdigit() else 1
    if distributed.world() == 1 and wanted > 1:
        raise InputError(
            f"trainer.devices={trainer.devices} needs a process for each: "
            f"torchrun --nproc-per-node={wanted} -m kd.train trainer=ddp ...",
            "trainer.devices",
        )
    if trainer.batch_size % distributed.world():
        raise InputError(
            f"trainer.batch_size={trainer.batch_size} is the batch over all ranks; {distributed.world()} do not divide it",
            "trainer.batch_size",
        )


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
        if not disk_is_full(error):
            raise
        stop(
            "kd-train: the disk is full. What was saved before is whole; free some space, and the same command goes on from "
            "it\n  change: paths.runs",
            2,
        )


def stop(message: str, status: int) -> None:
    """End with a message and a status."""
    if os.environ.get("KD_TRACEBACK"):
        traceback.print_exc()
    print(f"\n{message}", file=sys.stderr, flush=True)
    sys.exit(status)


def main() -> None:
    """The command."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra would print its own report and exit with 1
    command = hydra.main(config_path=str(conf_folder()), config_name=ROOT, version_base="1.3")(job)
    with plain_errors():
        command()


if __name__ == "__main__":
    main()
