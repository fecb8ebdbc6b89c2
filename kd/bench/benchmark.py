"""The benchmark: candidates take turns, round after round."""

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd.bench.candidates import BASELINES, CACHED, CANDIDATES, FINETUNE, LIVE, Candidate
from kd.bench.cost import product_rate
from kd.bench.figures import figures, lines, markdown, tabulate
from kd.bench.workers import Job, Turn, Worker
from kd.config import compose
from kd.errors import InputError
from kd.hardware import git, hardware, versions
from kd.planning import plan
from kd.report import console
from kd.runs import Run

PACKAGES = ("textbrewer",)
"""Packages whose versions matter here, beside those of every run."""


def benchmark(
    overrides: Sequence[str], steps: int, repeats: int, peer: bool = False, candidates: Sequence[Candidate] = CANDIDATES
) -> dict[str, Any]:
    """Let all candidates take turns; every figure of it.

    Args:
        overrides: as for `kd-train`.
        steps: optimiser steps of one turn.
        repeats: turns of each, after one that warms up.
        peer: TextBrewer too.
        candidates: to be compared; fine-tuning is one of them.

    Raises:
        InputError: for what the user can put right.
        WorkerDied: if a candidate's process ends.
    """
    chosen = plan(compose(LIVE.overrides(overrides)), overrides)
    check_run(chosen)
    if peer:
        from kd.bench.textbrewer import check_textbrewer

        check_textbrewer(chosen)
        candidates = [*candidates, *BASELINES]
    for candidate in candidates:
        laid = candidate.overrides(overrides)
        plan(compose(laid), laid)  # what is wrong with one is said before any is built
    workers: dict[str, Worker] = {}
    with tempfile.TemporaryDirectory(prefix="kd-bench-") as folder:
        try:
            for candidate in candidates:
                say(f"building {candidate.name}")
                job = Job(candidate, tuple(candidate.overrides(overrides)), steps, repeats + 1, Path(folder))
                workers[candidate.name] = Worker(job)
                workers[candidate.name].wait()
                caches = workers[candidate.name].facts["caches"].values()
                if candidate is CACHED and not (caches and all(made["used"] for made in caches)):
                    say("no teacher is cached here, so there is no row of it")
                    workers.pop(candidate.name).close()
            rounds, rates = run_rounds(workers, repeats + 1, chosen.spec.trainer.accelerator)
        finally:
            for worker in workers.values():
                worker.close()
    spec = chosen.inputs.get("before", chosen).spec  # what the harness measures
    words = {"method": str(spec.method["name"]), "max_length": spec.task.max_length}
    setting = {
        "command": list(overrides),
        **words,
        "student": spec.student.name,
        "teacher": list(spec.teacher),
        "task": spec.task.name,
        "seed": spec.seed,
        "batch_size": spec.trainer.batch_size,
        "batch_tokens": spec.trainer.batch_tokens,
        "accumulate": spec.trainer.accumulate,
        "precision": spec.trainer.precision,
        "steps": steps,
        "repeats": repeats,
    }
    candidates = [each for each in candidates if each.name in workers]
    labels = {each.name: each.label.format(**words) for each in candidates}
    laid_over = {each.name: each.overrides(overrides) for each in candidates}
    facts = {name: {**worker.facts, "overrides": laid_over[name]} for name, worker in workers.items()}
    return {
        **setting,
        **figures(labels, facts, rounds, rates, FINETUNE.name),
        "versions": versions(PACKAGES if peer else ()),
        "hardware": hardware(),
        "git": git(),
    }


def check_run(run: Run) -> None:
    """Whether a run can be measured here.

    Raises:
        InputError: if it takes a GPU that is not there, or several devices.
    """
    import torch

    from kd import distributed

    trainer = run.spec.trainer
    if trainer.accelerator == "gpu" and not torch.cuda.is_available():
        raise InputError("there is no GPU that torch can use here; use trainer=cpu", "trainer")
    if distributed.world() > 1 or trainer.strategy != "auto" or str(trainer.devices) != "1":
        raise InputError("kd-bench measures one device; use trainer=cpu or trainer=gpu", "trainer")


def run_rounds(
    workers: Mapping[str, Worker], turns: int, accelerator: str
) -> tuple[list[dict[str, Turn]], dict[str, list[float]]]:
    """Round after round, each beginning with another candidate, and before each the machine's own rates.

    Returns:
        name -> turn, for each round; and data type -> floating-point operations per second, of each round in which it was
        timed.
    """
    used = {worker.facts["dtype"] for worker in workers.values()}
    rates: dict[str, list[float]] = {"float32": [], "bfloat16": [], **{dtype: [] for dtype in sorted(used)}}
    names, rounds = list(workers), []
    for number in range(turns):
        for dtype, found in rates.items():
            if dtype in used or not number:  # what nobody uses is told once
                found.append(product_rate(dtype, accelerator))
        first = number % len(names)
        say(f"round {number} of {turns - 1}" if number else "warm-up")
        done = {name: workers[name].turn() for name in [*names[first:], *names[:first]]}
        if len({turn.examples for turn in done.values()}) > 1:
            counts = ", ".join(f"{name} {turn.examples}" for name, turn in done.items())
            raise RuntimeError(f"the candidates of one round trained on different numbers of examples: {counts}")
        rounds.append(done)
    return rounds, rates


def say(text: str) -> None:
    """How far it is; the figures alone are on standard output."""
    print(f"kd-bench: {text}", file=sys.stderr, flush=True)


def report(found: Mapping[str, Any], as_json: Path | None, picture: Path | None, folder: Path | None) -> None:
    """Print the table, and write what was asked for."""
    out = console(220)
    out.print(tabulate(found))
    for line in lines(found):
        out.print(line, soft_wrap=True)
    places = {"json": [as_json], "table": [], "picture": [picture]}
    if folder is not None:
        places["json"].append(folder / "bench.json")
        places["table"].append(folder / "table.md")
        places["picture"].append(folder / "bench.png")
    for kind, paths in places.items():
        for path in filter(None, paths):
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "json":
                path.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", encoding="utf-8")
            elif kind == "table":
                path.write_text(markdown(found), encoding="utf-8")
            else:
                from kd.bench.picture import draw

                draw(found, path)
