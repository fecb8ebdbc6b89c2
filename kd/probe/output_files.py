"""Files that an analysis leaves: `probe.json` with every figure, and `probe.html`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kd.probe.page import page
from kd.probe.result import Settings
from kd.probe.summary import Summary
from kd.results.statistics.examples import EXAMPLE_DRAWS
from kd.system.files import write_text, writing
from kd.system.hardware import version_line

JSON, HTML = "probe.json", "probe.html"
"""Names of the files."""

FORMAT = 1
"""Version of the JSON: a larger one has other names or meanings; further names alone do not change it."""


def write_files(folder: Path, summaries: Sequence[Summary], settings: Settings) -> list[Path]:
    """Write both files; return their paths.

    Raises:
        InputError: if a file cannot be written.
    """
    about = f"Made by kd-probe, {version_line()}."
    texts = {JSON: json.dumps(as_json(summaries, settings), indent=2, ensure_ascii=False, allow_nan=False) + "\n"}
    texts[HTML] = page(summaries, settings, about)
    with writing(folder, "--out"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_text(folder / name, text)
    return [folder / name for name in texts]


def as_json(summaries: Sequence[Summary], settings: Settings) -> dict[str, Any]:
    """Return all figures as values that JSON holds: fractions, nats and bits; None where one is undefined."""
    return {
        "format": FORMAT,
        "made_by": version_line(),
        "settings": {**asdict(settings), "bootstrap_samples": EXAMPLE_DRAWS, "interval": 0.95},
        "summaries": [
            {
                **{name: getattr(summary.cases[0].about, name) for name in ("task", "split", "method", "student", "settings")},
                **{name: getattr(summary.cases[0].about, name) for name in ("teacher", "selection", "init")},
                "seeds": summary.seeds,
                "controls": [case.about.control for case in summary.cases],
                "figures": as_plain(summary.figures),
                "teacher_figures": as_plain(summary.teacher),
                "slices": [asdict(one) for one in summary.slices],
            }
            for summary in summaries
        ],
        "cases": [asdict(case) for summary in summaries for case in summary.cases],
    }


def as_plain(value: Any) -> Any:
    """Return nested mappings with their dataclasses as mappings."""
    return {name: as_plain(one) for name, one in value.items()} if isinstance(value, Mapping) else asdict(value)
