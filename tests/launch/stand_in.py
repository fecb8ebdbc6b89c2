"""Stand-in for `kd.launch.worker`: it behaves to others as one that trains, and writes the record of an early run.

Its record is that of `tests/old_result.json` with the digest of the run. The seed in the command chooses a failure: 13 fails as
an error that the user can correct, 14 is killed, 15 ends with status 3. Each start and end is a line of `events.txt`.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from kd.config.failure import Failure
from kd.runs.run import read_record, write_record
from kd.system.files import locked

OLD_RESULT = Path(__file__).parent.parent / "old_result.json"


def main() -> None:
    name, failed, *command = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as the worker does
    given = dict(word.split("=", 1) for word in command)  # the last of each key counts
    runs, seed = Path(given["paths.runs"]), int(given.get("seed", 0))

    def event(word: str) -> None:
        with (runs / "events.txt").open("a") as file:
            file.write(f"{word} {name} {os.environ['OMP_NUM_THREADS']}\n")

    time.sleep(0.2)  # as imports take, before the run is locked
    wanted = f"-s{seed}-" in name
    with locked(runs / name, "waiting"):
        if read_record(runs / name / "result.json") is not None:
            return
        event("began")
        time.sleep(float(os.environ.get("STAND_IN_SECONDS", "0.3")))
        if wanted and seed == 13:
            Failure("the loss is not finite", "optimizer.lr").record(Path(failed))
            sys.exit(2)
        if wanted and seed == 14:
            os.kill(os.getpid(), signal.SIGKILL)
        if wanted and seed == 15:
            sys.exit(3)
        (runs / name / "student").mkdir(exist_ok=True)
        for file in ("config.json", "model.safetensors"):
            (runs / name / "student" / file).write_text("{}")
        record = json.loads(OLD_RESULT.read_text())
        metrics = {split: {"accuracy": seed / 100} for split in ("validation", "test")}
        own = {"digest": name.rpartition("-")[2], "seed": seed, "metrics": metrics}
        write_record(runs / name / "result.json", {**record, **own})
        event("done")


if __name__ == "__main__":
    main()
