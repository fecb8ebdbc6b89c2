"""Figures of a benchmark: summaries of the turns in which its candidates train alternately, and tables of them."""

import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kd.bench.candidates import BASELINES, GRAPHED
from kd.bench.launches import Launches
from kd.bench.workers import Turn

if TYPE_CHECKING:
    from rich.table import Table

Spread = dict[str, float]
"""`median`, `low` and `high`: the ends are the smallest and the largest value, not a quantile."""


def spread(values: Sequence[float]) -> Spread:
    """Return the median and the range.

    >>> spread([3.0, 1.0, 2.0, 10.0])
    {'median': 2.5, 'low': 1.0, 'high': 10.0}
    """
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def relative(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Return the spread of the ratios of two candidates' values within rounds: what slows a whole round down slows both.

    >>> relative([2.0, 9.0, 4.0], [1.0, 3.0, 4.0])
    {'median': 2.0, 'low': 1.0, 'high': 3.0}
    """
    return spread([our / their for our, their in zip(ours, theirs, strict=True)])


def figures(
    labels: Mapping[str, str],
    facts: Mapping[str, Mapping[str, Any]],
    rounds: Sequence[Mapping[str, Turn]],
    rates: Mapping[str, Sequence[float]],
    baseline: str,
    launches: Mapping[str, Launches] | None = None,
) -> dict[str, Any]:
    """Compute every figure of a benchmark from its turns.

    Args:
        labels: candidate -> its name in tables, in their order.
        facts: candidate -> the description that its worker sent.
        rounds: candidate -> turn, for each round; the first round is the warm-up.
        rates: data type -> floating-point operations per second, for each round in which it was timed; the best one counts.
        baseline: the candidate that the others' time is divided by.
        launches: candidate -> counts of a profiled turn; a candidate that is not in it has no such figures. None without a GPU.
    """
    measured = {name: [turns[name].seconds for turns in rounds[1:]] for name in labels}
    peers = [candidate.name for candidate in BASELINES if candidate.name in labels]
    without = {one.name: one.without_graphs for one in GRAPHED if one.without_graphs is not None}
    best = {dtype: max(values) for dtype, values in rates.items()}
    candidates = {}
    for name, label in labels.items():
        fact, seconds = facts[name], measured[name]
        flops = fact["flops"]
        candidates[name] = {
            "label": label,
            "overrides": fact["overrides"],
            "precision": fact["precision"],
            "device": fact["device"],
            "students": fact["students"],
            **({"losses": fact["losses"]} if "losses" in fact else {}),
            "warm_up_seconds": rounds[0][name].seconds,
            "seconds": seconds,
            "cpu_seconds": [turns[name].cpu_seconds for turns in rounds[1:]],
            "setup_seconds": fact["setup_seconds"],
            "examples_per_second": spread([fact["examples"] / time for time in seconds]),
            "tokens_per_second": spread([fact["tokens"] / time for time in seconds]),
            "seconds_per_epoch": spread([time * fact["turns_in_epoch"] for time in seconds]),
            "peak_megabytes": round(max(turns[name].peak_bytes for turns in rounds) / 1e6, 1),
            **reserved_megabytes([turns[name] for turns in rounds]),
            "flops_per_turn": flops,
            "share_of_matrix_product_rate": None
            if flops is None
            else spread([flops / time / best[fact["dtype"]] for time in seconds]),
            "time_relative_to_finetune": relative(seconds, measured[baseline]),
            **{f"speed_relative_to_{peer}": relative(measured[peer], seconds) for peer in peers},
            **({"time_relative_to_no_graphs": relative(seconds, measured[without[name]])} if name in without else {}),
            **({"per_step": launches[name].per_step(fact["steps"])} if launches and name in launches else {}),
        }
    fact = facts[baseline]
    return {
        "examples_per_turn": fact["examples"],
        "tokens_per_turn": fact["tokens"],
        "examples_per_epoch": round(fact["examples"] * fact["turns_in_epoch"]),
        "matrix_product_flops_per_second": {dtype: {"best": best[dtype], "rounds": list(rates[dtype])} for dtype in rates},
        "order": [list(turns) for turns in rounds],
        "candidates": candidates,
    }


def reserved_megabytes(turns: Sequence[Turn]) -> dict[str, float]:
    """Return the entry about the memory that torch has reserved on a GPU; empty without one."""
    reserved = [turn.reserved_bytes for turn in turns if turn.reserved_bytes is not None]
    return {"peak_reserved_megabytes": round(max(reserved) / 1e6, 1)} if reserved else {}


PER_STEP = {
    "kernel launches/step": "kernel_launches",
    "graph launches/step": "graph_launches",
    "kernels/step": "kernels",
    "waits/step": "waits",
}
"""Heading -> name of a count in `per_step`."""

GPU_HEADINGS = ("reserved MB", "time / without graphs", *PER_STEP)
"""Headings of the columns that only a GPU has, in their order."""


def gpu_cells(one: Mapping[str, Any]) -> dict[str, str]:
    """Return the cells of the columns of `GPU_HEADINGS` that a candidate has figures for, by heading."""
    row = {}
    if "peak_reserved_megabytes" in one:
        row["reserved MB"] = f"{one['peak_reserved_megabytes']:,.0f}"
    if "time_relative_to_no_graphs" in one:
        row["time / without graphs"] = ranged(one["time_relative_to_no_graphs"], 2)
    if "per_step" in one:
        row |= {heading: f"{one['per_step'][name]:,.1f}" for heading, name in PER_STEP.items()}
    return row


def cells(found: Mapping[str, Any]) -> list[list[str]]:
    """Return the cells of the table: a row of headings, then a row for each candidate."""
    candidates = found["candidates"]
    peers = [candidate.name for candidate in BASELINES if candidate.name in candidates]
    gpu = {name: gpu_cells(one) for name, one in candidates.items()}
    more = [heading for heading in GPU_HEADINGS if any(heading in row for row in gpu.values())]
    rows = [
        [
            "candidate",
            "examples/s",
            "tokens/s",
            "s/epoch",
            "peak MB",
            "share of rate",
            "time / fine-tuning",
            *(f"speed / {candidates[peer]['label']}" for peer in peers),
            *more,
        ]
    ]
    for name, one in candidates.items():
        share = one["share_of_matrix_product_rate"]
        own = "" if one["precision"] == found["precision"] else f" ({one['precision']})"
        rows.append(
            [
                one["label"] + own,
                ranged(one["examples_per_second"], 1),
                f"{one['tokens_per_second']['median']:,.0f}",
                f"{one['seconds_per_epoch']['median']:,.1f}",
                f"{one['peak_megabytes']:,.0f}",
                "" if share is None else f"{share['median']:.1%}",
                ranged(one["time_relative_to_finetune"], 2),
                *(ranged(one[f"speed_relative_to_{peer}"], 2) for peer in peers),
                *(gpu[name].get(heading, "") for heading in more),
            ]
        )
    return rows


def ranged(found: Spread, digits: int) -> str:
    """Format a median and its range, as `median [low, high]`."""
    return f"{found['median']:,.{digits}f} [{found['low']:,.{digits}f}, {found['high']:,.{digits}f}]"


def title(found: Mapping[str, Any]) -> str:
    """Return the title of the table: method, student, teacher and task."""
    teacher = ", ".join(found["teacher"]) or "none"
    return f"method={found['method']} student={found['student']} teacher={teacher} task={found['task']}"


def gpu_notes(candidates: Collection[Mapping[str, Any]]) -> list[str]:
    """Return the explanation of the columns that only a GPU has; nothing without one."""
    if not any("peak_reserved_megabytes" in one for one in candidates):
        return []
    counted = (
        "Per optimiser step, by torch's profiler in a further turn of each: launches by the host, waits of the host for the "
        "GPU, kernels that ran there, in graphs or alone."
    )
    if not all("per_step" in one for one in candidates):
        counted = "Where launches and kernels are missing, torch's profiler saw nothing of the GPU. " + counted
    return [f"Reserved memory: the peak of what torch holds on the GPU, graphs included. {counted}"]


def measurement_notes(found: Mapping[str, Any]) -> list[str]:
    """Return sentences that describe how the figures were measured."""
    cpu, threads, gpus = (found["hardware"][name] for name in ("cpu", "threads", "gpus"))
    cuda = any(one["device"] == "cuda" for one in found["candidates"].values())
    where = ", ".join(gpus[:1]) if cuda else f"{cpu}, {threads} thread(s)"
    rates = ", ".join(f"{dtype} {rate['best'] / 1e9:,.0f}" for dtype, rate in found["matrix_product_flops_per_second"].items())
    return [
        f"Median [range] of {found['repeats']} rounds, ratios within a round. A turn is {found['examples_per_turn']:,} "
        f"examples, {found['tokens_per_turn']:,} tokens without padding; an epoch is {found['examples_per_epoch']:,} examples. "
        f"Batches of {batches_in_words(found)}, {found['precision']}, {where}.",
        f"Matrix products: {rates} GFLOP/s; the share is of useful work: the student's own, padding left out. "
        f"Peak memory: {'of tensors on the GPU' if cuda else 'of the whole process'}.",
        *gpu_notes(found["candidates"].values()),
    ]


def batches_in_words(found: Mapping[str, Any]) -> str:
    """Return the batch size in words: a number of examples, or a budget of tokens."""
    tokens = found["batch_tokens"]
    return f"{found['batch_size']}" if tokens is None else f"up to {tokens} tokens"


def tabulate(found: Mapping[str, Any]) -> "Table":
    """Format the table for a terminal."""
    from rich.table import Table

    head, *rows = cells(found)
    table = Table(title=title(found), title_justify="left")
    for column in head:
        table.add_column(column, justify="left" if column == head[0] else "right")
    for row in rows:
        table.add_row(*row)
    return table


def markdown(found: Mapping[str, Any]) -> str:
    """Format the title, the table and the notes as Markdown."""
    head, *rows = cells(found)
    rule = ["---", *["---:"] * (len(head) - 1)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))
    return f"{title(found)}\n\n{table}\n\n" + "\n\n".join(measurement_notes(found)) + "\n"
