"""The benchmark: in every round, each candidate trains for one turn, an epoch over the same few examples."""

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd.bench.candidates import BARE, CANDIDATES, FINETUNE, GRAPHED, LIVE, Candidate
from kd.bench.cost import device_of, product_rate
from kd.bench.figures import figures, markdown, measurement_notes, tabulate
from kd.bench.launches import Launches
from kd.bench.peers import choose_peer
from kd.bench.workers import PROFILE, Job, Turn, Worker
from kd.config.compose import compose
from kd.config.mixture import is_mixture
from kd.config.schema import GRAPHS
from kd.errors import InputError
from kd.results.tables import console
from kd.runs.plan import plan
from kd.runs.run import Run
from kd.system.hardware import git, hardware, versions

RECORDING_TURNS = 2
"""Turns of a candidate with CUDA graphs before its warm-up. A graph is recorded at the second batch of its shape, and replayed
from the third on; a turn has the same shapes as the others, some of them once."""


def benchmark(
    overrides: Sequence[str],
    steps: int,
    repeats: int,
    *,
    peer: bool = False,
    bare: bool = False,
    candidates: Sequence[Candidate] = CANDIDATES,
) -> dict[str, Any]:
    """Time all candidates, turn by turn, and return every figure.

    Args:
        overrides: overrides of a `kd-train` command.
        steps: optimiser steps of one turn.
        repeats: turns of each candidate, after one warm-up turn.
        peer: whether another framework is compared too (`kd.bench.peers`).
        bare: whether fine-tuning in a bare loop is compared too.
        candidates: the candidates to compare; fine-tuning must be one of them.

    Raises:
        InputError: for a user error, such as an invalid override.
        WorkerDied: if a candidate's process ends early.
    """
    chosen = plan(compose(LIVE.overrides(overrides)), overrides)
    check_measurable(chosen)
    chosen_peer = choose_peer(chosen) if peer else None
    cuda = device_of(chosen.spec.trainer.accelerator) == "cuda"
    candidates = [
        *candidates,
        *(graphs_of(candidates) if cuda and chosen.spec.trainer.compile != GRAPHS else ()),
        *(chosen_peer.candidates if chosen_peer else ()),
        *([BARE] if bare else []),
    ]
    further = RECORDING_TURNS + 1 if cuda else 0  # turns that are not measured: of graphs that are recorded, and a profile
    for candidate in candidates:
        candidate_overrides = candidate.overrides(overrides)
        plan(compose(candidate_overrides), candidate_overrides)  # report errors of any candidate before one is built
    workers: dict[str, Worker] = {}
    with tempfile.TemporaryDirectory(prefix="kd-bench-") as folder:
        try:
            for candidate in candidates:
                say(f"building {candidate.name}")
                job = Job(candidate, tuple(candidate.overrides(overrides)), steps, repeats + 1 + further, Path(folder))
                workers[candidate.name] = Worker(job)
                if (why := why_left_out(candidate, workers[candidate.name])) is not None:
                    say(f"{why}, so there is no row '{candidate.name}'")
                    workers.pop(candidate.name).close()
            graphs = chosen.spec.trainer.compile == GRAPHS  # then all candidates have them
            for candidate in candidates:
                if (graphs or candidate.without_graphs is not None) and candidate.name in workers:
                    say(f"recording the graphs of {candidate.name}")
                    for _ in range(RECORDING_TURNS):
                        workers[candidate.name].turn()
            rounds, rates = run_rounds(workers, repeats + 1, chosen.spec.trainer.accelerator)
            launches = profiled(workers) if cuda else {}
        finally:
            for worker in workers.values():
                worker.close()
    spec = (chosen.inputs.before or chosen).spec  # the run that the harness measures
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
    candidates = [candidate for candidate in candidates if candidate.name in workers]
    labels = {candidate.name: candidate.label.format(**words) for candidate in candidates}
    all_overrides = {candidate.name: candidate.overrides(overrides) for candidate in candidates}
    facts = {name: {**worker.facts, "overrides": all_overrides[name]} for name, worker in workers.items()}
    return {
        **setting,
        **figures(labels, facts, rounds, rates, FINETUNE.name, launches),
        "versions": versions(chosen_peer.distributions if chosen_peer else ()),
        "hardware": hardware(),
        "git": git(),
    }


def graphs_of(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates with CUDA graphs that have a candidate without them among these."""
    names = [candidate.name for candidate in candidates]
    return [candidate for candidate in GRAPHED if candidate.without_graphs in names]


def why_left_out(candidate: Candidate, worker: Worker) -> str | None:
    """Wait until a worker is ready for its first turn; return the reason why there is no row of its candidate, None for a row.

    Raises:
        InputError: for an error of the user.
        WorkerDied: if the process ends early.
    """
    try:
        worker.wait()
    except InputError as error:
        if candidate.without_graphs is None or error.key not in ("trainer.compile", "trainer.pad_multiple"):
            raise
        return error.message
    caches = worker.facts["caches"].values()
    if candidate.caches and not (caches and all(cache["used"] for cache in caches)):
        return "no teacher can be cached here"
    return None


def profiled(workers: Mapping[str, Worker]) -> dict[str, Launches]:
    """Run a further turn of each candidate under torch's profiler, and return its counts.

    A turn on a GPU has kernels. Where the profiler saw none, as in a container without the permissions that it needs, nothing
    was counted, and the candidate has no such figures.
    """
    launches = {}
    for name, worker in workers.items():
        say(f"profiling {name}")
        counts = worker.turn(PROFILE).launches
        assert counts is not None
        if counts.kernels:
            launches[name] = counts
        else:
            say(f"torch's profiler saw no kernel on the GPU, so the launches of '{name}' are not counted")
    return launches


def check_measurable(run: Run) -> None:
    """Check that a run can be measured on this machine.

    Raises:
        InputError: if it needs a GPU and there is none, or if it uses several devices.
    """
    from kd.build.check import check_machine
    from kd.system import distributed

    trainer = run.spec.trainer
    check_machine(run.spec)
    if distributed.world() > 1 or trainer.strategy != "auto" or str(trainer.devices) != "1":
        raise InputError("kd-bench measures one device; use trainer=cpu or trainer=gpu", "trainer")
    if is_mixture(run.spec.task):
        raise InputError("kd-bench measures one task; a step of a mixture is one of one of its tasks", "task")


def run_rounds(
    workers: Mapping[str, Worker], turns: int, accelerator: str
) -> tuple[list[dict[str, Turn]], dict[str, list[float]]]:
    """Run all rounds; each starts with the next candidate, after timing the machine's matrix products.

    Returns:
        Candidate name -> turn, for each round; and data type -> floating-point operations per second, for each round in which
        its matrix product was timed.
    """
    used = {worker.facts["dtype"] for worker in workers.values()}
    rates: dict[str, list[float]] = {"float32": [], "bfloat16": [], **{dtype: [] for dtype in sorted(used)}}
    names, rounds = list(workers), []
    for number in range(turns):
        for dtype, measured in rates.items():
            if dtype in used or not number:  # a data type that no candidate uses is timed once
                measured.append(product_rate(dtype, accelerator))
        first = number % len(names)
        say(f"round {number} of {turns - 1}" if number else "warm-up")
        done = {name: workers[name].turn() for name in [*names[first:], *names[:first]]}
        if len({turn.examples for turn in done.values()}) > 1:
            counts = ", ".join(f"{name} {turn.examples}" for name, turn in done.items())
            raise RuntimeError(f"the candidates of one round trained on different numbers of examples: {counts}")
        rounds.append(done)
    return rounds, rates


def say(text: str) -> None:
    """Print progress on standard error, because standard output holds the figures alone."""
    print(f"kd-bench: {text}", file=sys.stderr, flush=True)


def report(found: Mapping[str, Any], as_json: Path | None, picture: Path | None, folder: Path | None) -> None:
    """Print the table, and write the requested files."""
    out = console(220)
    out.print(tabulate(found))
    for line in measurement_notes(found):
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
