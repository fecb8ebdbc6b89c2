"""Work of the published scale of every table, in matrix products, from its cells' configurations.

    python experiments/published_cost/cost.py

prints a CSV. Students are trained for the epochs of their cells and of the first runs of their methods; a teacher that several
cells need is trained once and its outputs are computed once for each cell that it teaches. Sequences count with the full
length of `task.max_length`, to which the papers' code pads; batches here are padded to their longest sequence, so that this is
an upper bound.
"""

import csv
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from kd.config.compose import compose, typed
from kd.config.schema import RunSpec
from kd.table.definition import Cell, load_table, table_names

EXAMPLES = {
    "cola": 8551,
    "sst2": 67349,
    "mrpc": 3668,
    "stsb": 5749,
    "qqp": 363846,
    "mnli": 392702,
    "qnli": 104743,
    "rte": 2490,
    "wnli": 635,
    "fiction": 77348,
    "government": 77350,
    "slate": 77306,
    "telephone": 83348,
    "travel": 77350,
}
"""Examples of GLUE's training sets (Wang et al., ICLR 2019) and of MNLI's genres (Williams et al., NAACL 2018, table 3)."""

SHAPES = {
    "bert-large": (24, 1024, 4096),
    "roberta-large": (24, 1024, 4096),
    "bert-base": (12, 768, 3072),
    "roberta-base": (12, 768, 3072),
    "distilbert": (6, 768, 3072),
    "distilroberta": (6, 768, 3072),
    "TinyBERT_General_4L": (4, 312, 1200),
    "TinyBERT_General_6L": (6, 768, 3072),
    "bert-small": (4, 512, 2048),
    **{f"bert_uncased_L-{n}_H-{width}": (n, width, 4 * width) for n in (2, 4, 6, 8, 10, 12) for width in (128, 256, 512, 768)},
}
"""Part of a source's name -> layers, width and intermediate width."""

RATE = 100e12
"""Floating-point operations in a second of the GPU that hours are given for. An assumption: about a tenth of what the maker of
an H100 states for dense bfloat16 products. It was not measured."""

Shape = tuple[int, int, int]


def shape_of(source: str | None) -> Shape | None:
    """Return the shape of a model by its name; None if it is not known."""
    return next((shape for name, shape in SHAPES.items() if source is not None and name.lower() in source.lower()), None)


def forward(shape: Shape, tokens: int) -> float:
    """Operations of a forward pass of one sequence: projections, feed-forward layers and attention."""
    layers, width, intermediate = shape
    return layers * tokens * (2 * (4 * width**2 + 2 * width * intermediate) + 4 * tokens * width)


def student_shape(spec: RunSpec, backbone: Shape) -> Shape:
    """Return the shape of a student."""
    student = spec.student
    own = shape_of(student.checkpoint) if student.init == "checkpoint" else None
    layers, width, intermediate = own or shape_of(student.backbone) or backbone
    width, changed = student.width or width, student.width
    return (student.layers or layers, width, student.intermediate or (4 * width if changed else intermediate))


@cache
def spec_of(overrides: tuple[str, ...]) -> RunSpec:
    """Return the settings of a command."""
    return typed(compose(overrides))


def work(cell: Cell) -> tuple[float, dict[tuple[Any, ...], float]]:
    """Operations of a cell, and those of each teacher that it needs, by what tells teachers apart."""
    spec = spec_of(tuple(word for word in cell.overrides if not word.startswith("seed=")))
    rows = EXAMPLES.get(cell.labels.get("task", ""), 0) * copies(spec)
    tokens, teachers, passes = spec.task.max_length, {}, 0.0
    backbones = [
        shape for teacher in spec.teacher.values() if (shape := shape_of(teacher.backbone or teacher.model)) is not None
    ]
    backbone = shape_of(spec.student.backbone) or (backbones[0] if backbones else shape_of(spec.backbone))
    if backbone is None:
        raise SystemExit(f"no shape is known for the backbone of {cell}")
    for name, teacher in spec.teacher.items():
        shape = shape_of(teacher.backbone or teacher.model) or backbone
        passes += forward(shape, tokens)
        if teacher.model is None:
            key = (name, teacher.backbone, cell.labels.get("task"), cell.labels.get("optimizer.lr"))
            epochs = nested(teacher.run, "trainer", "max_epochs") or 3
            teachers[key] = 3 * forward(shape, tokens) * rows / copies(spec) * epochs
    before = spec.method.get("before")
    stages = [spec.trainer.max_epochs, nested(before, "run", "trainer", "max_epochs") if before else 0]
    return rows * (3 * forward(student_shape(spec, backbone), tokens) * sum(map(int, stages)) + passes), teachers


def nested(node: Any, *keys: str) -> Any:
    """Return a value below a node by its keys; 0 if it is not there."""
    for key in keys:
        node = node.get(key) if isinstance(node, Mapping) else None
    return node or 0


def copies(spec: RunSpec) -> int:
    """Number of versions of each example, with those that an edit adds."""
    return 1 + sum(int(edit.get("copies") or 0) for edit in (spec.task.edits or {}).values())


def rows_of(name: str) -> dict[str, Any]:
    """Return the row of a table."""
    cells: Sequence[Cell] = load_table(name).cells("published")
    students, teachers, unknown = 0.0, {}, defaultdict(int)
    for cell in cells:
        if cell.labels.get("task") not in EXAMPLES:
            unknown[cell.labels.get("task", "several tasks at once")] += 1
            continue
        own, needed = work(cell)
        students += own
        teachers |= needed
    total = students + sum(teachers.values())
    return {
        "table": name,
        "cells": len(cells),
        "not_counted": "; ".join(f"{count} of {task}" for task, count in unknown.items()),
        "teachers": len(teachers),
        "exaflops": f"{total / 1e18:.1f}",
        "gpu_hours_at_100_tflops": f"{total / RATE / 3600:.1f}",
    }


def main() -> None:
    """Print the rows of all tables as CSV."""
    writer = None
    for name in table_names():
        row = rows_of(name)
        if writer is None:
            writer = csv.DictWriter(sys.stdout, list(row), lineterminator="\n")
            writer.writeheader()
        writer.writerow(row)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
