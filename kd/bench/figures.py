"""Turns to figures, and figures to tables."""

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kd.bench.candidates import BASELINES
from kd.bench.workers import Turn

if TYPE_CHECKING:
    from rich.table import Table

Spread = dict[str, float]
"""`median`, `low` and `high`: the ends are the smallest and the largest value, not a quantile."""


def spread(values: Sequence[float]) -> Spread:
    """Median and range.

    >>> spread([3.0, 1.0, 2.0, 10.0])
    {'median': 2.5, 'low': 1.0, 'high': 10.0}
    """
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def relative(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Ratios of two candidates' values of the same round: what slows a whole round down slows both.

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
) -> dict[str, Any]:
    """What the turns say.

    Args:
        labels: candidate -> its name in tables, in their order.
        facts: candidate -> what its worker said of itself.
        rounds: candidate -> turn; the first round is the warm-up.
        rates: data type -> floating-point operations per second, of each round in which it was timed; the best one counts.
        baseline: the candidate that the others' time is divided by.
    """
    measured = {name: [each[name].seconds for each in rounds[1:]] for name in labels}
    peers = [each.name for each in BASELINES if each.name in labels]
    best = {dtype: max(found) for dtype, found in rates.items()}
    candidates = {}
    for name, label in labels.items():
        known, seconds = facts[name], measured[name]
        flops = known["flops"]
        candidates[name] = {
            "label": label,
            "overrides": known["overrides"],
            "precision": known["precision"],
            "device": known["device"],
            "students": known["students"],
            **({"losses": known["losses"]} if "losses" in known else {}),
            "warm_up_seconds": rounds[0][name].seconds,
            "seconds": seconds,
            "cpu_seconds": [each[name].cpu_seconds for each in rounds[1:]],
            "setup_seconds": known["setup_seconds"],
            "examples_per_second": spread([known["examples"] / each for each in seconds]),
            "tokens_per_second": spread([known["tokens"] / each for each in seconds]),
            "seconds_per_epoch": spread([each * known["turns_in_epoch"] for each in seconds]),
            "peak_megabytes": round(max(each[name].peak_bytes for each in rounds) / 1e6, 1),
            "flops_per_turn": flops,
            "share_of_matrix_product_rate": None
            if flops is None
            else spread([flops / each / best[known["dtype"]] for each in seconds]),
            "time_relative_to_finetune": relative(seconds, measured[baseline]),
            **{f"speed_relative_to_{peer}": relative(measured[peer], seconds) for peer in peers},
        }
    known = facts[baseline]
    return {
        "examples_per_turn": known["examples"],
        "tokens_per_turn": known["tokens"],
        "examples_per_epoch": round(known["examples"] * known["turns_in_epoch"]),
        "matrix_product_flops_per_second": {dtype: {"best": best[dtype], "rounds": list(rates[dtype])} for dtype in rates},
        "order": [list(each) for each in rounds],
        "candidates": candidates,
    }


def cells(found: Mapping[str, Any]) -> list[list[str]]:
    """The table: a row of headings, then a row for each candidate."""
    candidates = found["candidates"]
    peers = [each.name for each in BASELINES if each.name in candidates]
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
        ]
    ]
    for one in candidates.values():
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
            ]
        )
    return rows


def ranged(found: Spread, digits: int) -> str:
    """A median and its range in words."""
    return f"{found['median']:,.{digits}f} [{found['low']:,.{digits}f}, {found['high']:,.{digits}f}]"


def title(found: Mapping[str, Any]) -> str:
    """What was measured."""
    teacher = ", ".join(found["teacher"]) or "none"
    return f"method={found['method']} student={found['student']} teacher={teacher} task={found['task']}"


def lines(found: Mapping[str, Any]) -> list[str]:
    """How it was measured, in sentences."""
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
    ]


def batches_in_words(found: Mapping[str, Any]) -> str:
    """What a batch is."""
    tokens = found["batch_tokens"]
    return f"{found['batch_size']}" if tokens is None else f"up to {tokens} tokens"


def tabulate(found: Mapping[str, Any]) -> "Table":
    """The table for a terminal."""
    from rich.table import Table

    head, *rows = cells(found)
    table = Table(title=title(found), title_justify="left")
    for column in head:
        table.add_column(column, justify="left" if column == head[0] else "right")
    for row in rows:
        table.add_row(*row)
    return table


def markdown(found: Mapping[str, Any]) -> str:
    """The table for a document."""
    head, *rows = cells(found)
    rule = ["---", *["---:"] * (len(head) - 1)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))
    return f"{title(found)}\n\n{table}\n\n" + "\n\n".join(lines(found)) + "\n"
