"""Speed of several checkouts, or of one with several settings, in turns: what a change gained, in one run.

    python experiments/bench/in_turns.py OUT.json [--rounds 5] --of NAME FOLDER [WORD ...] [--of ...] -- WORD ...

FOLDER is a checkout, whose `kd-bench` is called with the words of its `--of` and those behind `--`: overrides and options, such
as --steps 50 --bare. Each round calls every one of them, beginning with the next, for a turn after a warm-up. Prints a row for
each candidate of each call: examples per second, and the ratio to the first candidate of the first name in the same round.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

USAGE = "in_turns.py OUT.json [--rounds 5] --of NAME FOLDER [WORD ...] [--of ...] -- WORD ..."


def speeds(folder: Path, words: list[str]) -> dict[str, float]:
    """Return the examples per second of each candidate of a call of `kd-bench`."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "bench.json"
        command = [sys.executable, "-m", "kd.bench", *words, "--repeats", "1", "--json", str(file)]
        environment = {**os.environ, "PYTHONPATH": str(folder.resolve())}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        found = json.loads(file.read_text())
    candidates = found.get("contestants") or found["candidates"]
    return {name: each["examples_per_second"]["median"] for name, each in candidates.items()}


def spread(values: list[float]) -> dict[str, float]:
    """Return median and range."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def summary(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return speeds and ratios to the first candidate, by name of the call and of its candidate."""
    of = next(iter(rounds[0]))
    first = next(iter(rounds[0][of]))
    return {
        f"{name}: {candidate}": {
            "examples_per_second": spread([each[name][candidate] for each in rounds]),
            "speed_relative_to_first": spread([each[name][candidate] / each[of][first] for each in rounds]),
        }
        for name, candidates in rounds[0].items()
        for candidate in candidates
    }


def parts(words: list[str], mark: str) -> list[list[str]]:
    """Return the parts between marks. argparse would take options of `kd-bench` behind an `--of` for its own."""
    ends = [-1, *(place for place, word in enumerate(words) if word == mark), len(words)]
    return [words[start + 1 : end] for start, end in itertools.pairwise(ends)]


def main() -> None:
    """Run every call in turns; write and print the figures."""
    mine, *rest = parts(sys.argv[1:], "--")
    own, *named = parts(mine, "--of")
    parser = argparse.ArgumentParser(usage=USAGE)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args(own)
    if not named or any(len(call) < 2 for call in named) or len(rest) > 1:
        parser.error("give each --of a name and a folder, and the words of all behind one --")
    words = rest[0] if rest else []
    calls = [(name, Path(folder), more) for name, folder, *more in named]
    rounds = []
    for number in range(arguments.rounds):
        shift = number % len(calls)
        found = {name: speeds(folder, [*words, *more]) for name, folder, more in calls[shift:] + calls[:shift]}
        rounds.append({name: found[name] for name, _, _ in calls})
        figures = summary(rounds)
        arguments.out.write_text(json.dumps({"words": words, "rounds": rounds, "figures": figures}, indent=1) + "\n")
    for name, figure in figures.items():
        speed, ratio = figure["examples_per_second"], figure["speed_relative_to_first"]
        print(f"{name:40} {speed['median']:8.1f}   {ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]")


if __name__ == "__main__":
    main()
