"""Model card of an exported folder: the card of its run, and the files with their checks."""

from collections.abc import Mapping, Sequence
from typing import Any

from kd.deploy.check import Check
from kd.deploy.folder import FORMATS, Deployed
from kd.results.tables import score


def figures_of(check: Check) -> tuple[str, str, str]:
    """Return a check in words: the largest difference from torch, the metric, and its drop in points."""
    drop = "-" if check.drop is None else f"{check.drop:.2f}"
    return (f"{check.difference:.2g}", score(check.metric, check.value, " %"), drop)


def card(
    text: str,
    deployed: Deployed,
    files: Mapping[str, Mapping[str, Any]],
    checks: Mapping[str, Check],
    failed: Mapping[str, Sequence[str]],
    max_drop: float,
) -> str:
    """Return the text of a card with a section about exported files.

    Args:
        text: card of the run's student.
        deployed: the student.
        files: format -> entry of the record about its files.
        checks: format -> its check.
        failed: format -> why it is not in the folder.
        max_drop: largest drop that passes, in points.
    """
    first = next(iter(checks.values()))
    shapes = ", ".join(f"{shape.batch} x {shape.tokens}" for shape in first.shapes)
    rows = []
    for name, check in checks.items():
        size = sum(file["bytes"] for file in files[name]["files"].values()) / 1e6
        apart = " / ".join(f"{shape.difference:.1e}" for shape in check.shapes)
        _, value, drop = figures_of(check)
        rows.append(f"| `{FORMATS[name].path}` | {FORMATS[name].words} | {size:.1f} | {apart} | {value} | {drop} |")
    missed = "".join(f"\nNot in this folder: {FORMATS[name].words}, {'; '.join(why)}.\n" for name, why in failed.items())
    columns = ", ".join(f"`{name}`" for name in deployed.text)
    return f"""{text.rstrip()}

## Files

| file | format | MB | difference from torch | validation {first.metric} | drop |
|---|---|---|---|---|---|
{chr(10).join(rows)}

Differences are the largest of logits, for batches of {shapes} (texts x tokens). The metric is of {first.examples:,} examples of
validation; a file that drops by more than {max_drop:g} points is not in this folder.
{missed}
Input `input_ids`, `attention_mask` and, if the model has segments, `token_type_ids`, each (batch, tokens); output `logits`.
Texts are truncated to {deployed.max_length} tokens; their columns are {columns}. `kd-predict FOLDER FILE` reads tables of them.
"""
