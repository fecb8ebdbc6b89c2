"""Execute one job in this process: `python -m kd.launch.worker <run> <file for a failure> <overrides>`.

The exit status is that of kd-train: 2 for an error that the user can correct, 1 for any other, 130 on an interrupt.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from kd.config.failure import Failure
from kd.launch.jobs import find_run, plan_command
from kd.runs.error_keys import rename_error_keys
from kd.system.command import INTERRUPTED
from kd.system.hardware import configure_openmp


def work(name: str, command: Sequence[str]) -> None:
    """Execute the run of this name, which the run of a command is or needs.

    Raises:
        InputError: for an error that the user can correct, with a key of the command.
    """
    from kd.training.execute import check_all, deliver, execute, reads_model

    asked = plan_command(command)
    way, run = find_run(asked, name)
    if not way:
        deliver(run)
        return
    with contextlib.ExitStack() as renaming:
        for role, needing in way:
            renaming.enter_context(rename_error_keys(role, needing.spec, needing.config))
        check_all(run)
        execute(run, role, first=False, model=reads_model(role))


def main() -> None:
    """Run the module as a program. A failure is written to a file for the process that started this one, and for others."""
    configure_openmp()
    os.environ["HYDRA_FULL_ERROR"] = "1"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a script starts in the background
    name, file, *command = sys.argv[1:]
    try:
        work(name, command)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:  # noqa: BLE001 - every failure is printed and written
        failure = Failure.of(error)
        print(f"{failure.trace or ''}\nkd: {failure}", file=sys.stderr, flush=True)
        failure.record(Path(file))
        sys.exit(2 if failure.users else 1)


if __name__ == "__main__":
    main()
