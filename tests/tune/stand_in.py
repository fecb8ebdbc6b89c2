"""Stand-in for the execution of a trial's run: it reports scores that follow from its settings, and writes an early record.

Its record is that of `tests/old_result.json` with the digest of the run. The score after each epoch is the temperature / 100.
Temperature 13 fails as an error that the user can correct, and 14 by a bug. `STAND_IN_SECONDS` is the duration of an epoch.
Each start, epoch and end is a line of `events.txt`. As a program it is `kd-tune` with this execution.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd.errors import InputError
from kd.runs.run import Run
from kd.training import execute as execution
from kd.tune import main, make
from kd.tune.pruning import EpochScores, Pruned

OLD_RESULT = Path(__file__).parent.parent / "old_result.json"


def execute(run: Run, callbacks: Sequence[EpochScores] = ()) -> dict[str, Any]:
    """Make the record of a run, unless it is done; it resumes after the epochs in its folder."""
    temperature = run.spec.method.get("temperature", 1)
    events = run.directory.parent / "events.txt"

    def event(word: str) -> None:
        with events.open("a") as file:
            file.write(f"{word} {run.name}\n")

    with run.lock():
        if (record := run.result) is not None:
            return record
        event("began")
        if temperature == 13:
            raise InputError("the loss is not finite", "optimizer.lr")
        if temperature == 14:
            raise RuntimeError("a bug")
        done = run.directory / "epochs"
        first = int(done.read_text()) if done.exists() else 0
        for epoch in range(first + 1, run.spec.trainer.max_epochs + 1):
            time.sleep(float(os.environ.get("STAND_IN_SECONDS", "0")))
            event(f"epoch-{epoch}")
            stops = [callback.report(epoch, temperature / 100) for callback in callbacks]
            done.write_text(str(epoch))
            if any(stops) and epoch < run.spec.trainer.max_epochs:
                raise Pruned
        metrics = {"validation": {"accuracy": temperature / 100}, "test": {"accuracy": 1 - temperature / 100}}
        record = {**json.loads(OLD_RESULT.read_text()), "digest": run.digest, "seed": run.spec.seed, "metrics": metrics}
        event("done")
        return run.finish(record)


def replace_execution(patch: Any = None) -> None:
    """Execute trials by this module, in this process; `patch` sets the attributes, if the process has other uses for them."""
    replaced = {(execution, "execute"): execute, (execution, "check_all"): lambda run: None, (make, "POLL"): 0.1}
    for (module, name), value in replaced.items():
        (setattr if patch is None else patch.setattr)(module, name, value)


if __name__ == "__main__":
    sys.argv[0] = "kd-tune"
    replace_execution()
    main()
