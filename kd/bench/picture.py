"""Bar chart of a benchmark's figures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd.bench.candidates import FINETUNE
from kd.bench.figures import batches_in_words, ranged, title

PLAIN, OURS, THEIRS = "#8a8f98", "#2f6db3", "#d08a2e"
"""Colours of fine-tuning, the method in this harness and its peer: distinct also to colour-blind readers and in print."""


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draw time relative to fine-tuning as horizontal bars, with the range over rounds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    candidates = found["candidates"]
    ratios = [one["time_relative_to_finetune"] for one in candidates.values()]
    colours = [PLAIN if name == FINETUNE.name else THEIRS if "losses" in one else OURS for name, one in candidates.items()]
    figure = Figure(figsize=(8.0, 1.5 + 0.62 * len(ratios)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    medians = [ratio["median"] for ratio in ratios]
    reach = [
        [ratio["median"] - ratio["low"] for ratio in ratios],
        [ratio["high"] - ratio["median"] for ratio in ratios],
    ]
    places = range(len(ratios))
    axes.barh(places, medians, xerr=reach, height=0.6, color=colours, error_kw={"ecolor": "#222222", "capsize": 3, "lw": 1})
    widest = max(ratio["high"] for ratio in ratios)
    for index, (ratio, one) in enumerate(zip(ratios, candidates.values(), strict=True)):
        rate = one["examples_per_second"]["median"]
        axes.text(ratio["high"] + 0.02 * widest, index, f"{ranged(ratio, 2)}\n{rate:,.0f} examples/s", va="center", fontsize=8)
    axes.axvline(1.0, color="#222222", lw=0.8, ls=":")
    axes.set_yticks(places, [one["label"] for one in candidates.values()])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.38 * widest)
    figure.supxlabel("time for the same examples, relative to fine-tuning the same student (shorter is better)", fontsize=9)
    how = f"median and range of {found['repeats']} rounds, batches of {batches_in_words(found)}, {found['precision']}"
    axes.set_title(f"{title(found)}\n{how}", fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.savefig(path, dpi=160)
