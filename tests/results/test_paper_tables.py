"""The tables of papers: their figures read, their cells compose, and each figure has cells or a reason why not."""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import yaml

from kd.config.compose import compose, conf_folder, typed
from kd.config.schema import RunSpec, TaskSpec
from kd.results.figures import Figure, read_figures
from kd.table.definition import load_table

EXPERIMENTS = conf_folder().parent / "experiments"
NAMES = sorted(path.stem for path in (conf_folder() / "table").glob("*.yaml"))
Axis = list[tuple[str, str, list[str]]]
"""Key, label and overrides of each entry."""

OURS = {"what_is_lost", "local_bench"}
"""Papers that are no methods, and no figure of which is known: an analysis of students of any method, and our own benchmark."""

LOCAL = {"local_bench", "local_bench_weights"}
"""Tables that have no published scale."""

tables = pytest.mark.parametrize("name", NAMES)
published = pytest.mark.parametrize("name", sorted({*NAMES} - LOCAL))
scales = pytest.mark.parametrize(
    ("name", "scale"),
    [(name, scale) for name in NAMES for scale in ("published", "local") if scale == "local" or name not in LOCAL],
)


@dataclass(frozen=True)
class Cell:
    """One run of a table: its labels and its overrides."""

    labels: dict[str, str]
    overrides: tuple[str, ...]


@cache
def definition(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((conf_folder() / "table" / f"{name}.yaml").read_text(encoding="utf-8"))
    return found


@cache
def figures(name: str) -> list[Figure]:
    return [] if definition(name)["paper"] in OURS else read_figures(EXPERIMENTS / name / "paper.csv")


def entries(key: str, values: list[Any]) -> Iterator[tuple[str, list[str]]]:
    """Label and overrides of each entry of an axis: a word, or `{label: [overrides]}`."""
    for value in values:
        if isinstance(value, dict):
            ((label, overrides),) = value.items()
            yield str(label), overrides
        else:
            yield str(value), [f"{key}={value}"]


def products(name: str, scale: str) -> Iterator[list[Axis]]:
    for product in definition(name)["scales"][scale]["cells"]:
        yield [[(key, *entry) for entry in entries(key, values)] for key, values in product.items() if key != "row"]


@cache
def cells(name: str, scale: str) -> list[Cell]:
    return [cell_at(name, scale, point) for axes in products(name, scale) for point in itertools.product(*axes)]


def cell_at(name: str, scale: str, point: Iterable[tuple[str, str, list[str]]]) -> Cell:
    point, common = list(point), definition(name)["scales"][scale]["overrides"]
    overrides = (*common, *(override for _, _, own in point for override in own))
    return Cell({key: label for key, label, _ in point}, overrides)


def of_task(word: str) -> bool:
    """Return True for an override of the task's own configuration, which no other group changes."""
    return word.startswith(("task=", "task.")) and not word.startswith("task.edits")


@cache
def task(overrides: tuple[str, ...]) -> TaskSpec:
    return typed(compose(overrides)).task


def task_of(cell: Cell) -> TaskSpec:
    return task(tuple(filter(of_task, cell.overrides)))


@cache
def composed(name: str, scale: str) -> dict[tuple[str, ...], RunSpec]:
    """Specifications in which every override but those of tasks occurs, beside the first cell of each product.

    Of a product these are the first cell, and those that differ from it in one entry, with the default task: all tasks with all
    methods would take minutes.
    """
    chosen = set()
    for axes in products(name, scale):
        first = [axis[0] for axis in axes]
        chosen.add(cell_at(name, scale, first).overrides)
        for place, axis in enumerate(axes):
            for entry in axis[1:] if axis[0][0] != "seed" else []:
                cell = cell_at(name, scale, [*first[:place], entry, *first[place + 1 :]])
                chosen.add(tuple(itertools.filterfalse(of_task, cell.overrides)))
    return {overrides: typed(compose(overrides)) for overrides in sorted(chosen)}


def is_run(figure: Figure, name: str) -> bool:
    labels = {figure.row, figure.method, figure.student, figure.teacher, figure.task}
    return not labels & set(definition(name).get("not_run", {}))


@tables
def test_the_commands_read_the_cells_that_are_tested_here(name: str) -> None:
    for scale, read in load_table(name).scales.items():
        assert [(cell.labels, cell.overrides) for cell in read] == [
            (cell.labels, cell.overrides) for cell in cells(name, scale)
        ]


def test_every_table_has_its_figures_and_every_file_of_figures_its_table() -> None:
    assert sorted(path.parent.name for path in EXPERIMENTS.glob("*/paper.csv")) == [
        name for name in NAMES if definition(name)["paper"] not in OURS
    ]
    assert {"pkd_dev", "tinybert_1", "tinybert_4", "bert_emd_1", "annealing_kd_dev", "distilbert_dev"} <= set(NAMES)


@tables
def test_a_definition_has_its_parts(name: str) -> None:
    found = definition(name)
    assert set(found) - {"not_run", "new_rows"} == {"paper", "title", "protocol", "scales"}
    assert set(found["scales"]) == ({"local"} if name in LOCAL else {"published", "local"})
    assert found["paper"] in OURS or (conf_folder() / "method" / f"{found['paper']}.yaml").is_file()
    assert f"{name}_".startswith(f"{found['paper']}_")
    for part in found["scales"].values():
        assert set(part) == {"overrides", "cells"}
        for product in part["cells"]:
            assert {"method", "student", "task", "seed"} <= set(product)
            assert all(isinstance(values, list) and values for key, values in product.items() if key != "row")


@tables
def test_a_file_of_figures_reads_and_is_of_its_paper(name: str) -> None:
    for figure in figures(name):
        assert figure.paper == definition(name)["paper"]
        assert figure.confidence in ("printed", "copied", "memory")
        assert figure.source
        assert not figure.digest
        assert figure.value is not None
        assert -1 <= figure.value <= 1, "a fraction, not a percentage"
        assert figure.value > 0.02, f"{figure} looks like a percentage that was divided twice"


@tables
def test_no_two_figures_are_of_one_thing(name: str) -> None:
    keys = [(f.row, f.method, f.student, f.teacher, f.task, f.split, f.metric) for f in figures(name)]
    assert len(set(keys)) == len(keys)


@published
def test_every_figure_has_cells_or_a_reason_for_having_none(name: str) -> None:
    joined = {tuple(cell.labels.get(axis) for axis in ("method", "student", "task")) for cell in cells(name, "published")}
    for figure in figures(name):
        assert ((figure.method, figure.student, figure.task) in joined) == is_run(figure, name), figure
    labels = {label for f in figures(name) for label in (f.row, f.method, f.student, f.teacher, f.task)}
    assert set(definition(name).get("not_run", {})) <= labels


@published
def test_metrics_and_splits_of_figures_are_those_that_a_run_has(name: str) -> None:
    specs = {cell.labels["task"]: task_of(cell) for cell in cells(name, "published")}
    for figure in figures(name):
        if is_run(figure, name):
            spec = specs[figure.task]
            assert figure.metric in spec.metrics, figure
            assert figure.split in ("validation", "test", *(MISMATCHED if spec.name == "mnli" else ())), figure


MISMATCHED = ("validation_mismatched", "test_mismatched")


@published
def test_checkpoints_are_selected_by_the_metric_of_the_figures(name: str) -> None:
    """Published cells monitor the metric of the task's dev figures, if they have only one."""
    metrics = defaultdict(set)
    for figure in figures(name):
        if figure.split == "validation" and is_run(figure, name):
            metrics[figure.task].add(figure.metric)
    for cell in cells(name, "published"):
        of_figures = metrics[cell.labels["task"]]
        assert len(of_figures) != 1 or task_of(cell).monitor in of_figures, cell


@scales
def test_every_override_composes(name: str, scale: str) -> None:
    words = {word for overrides in composed(name, scale) for word in overrides}
    for cell in cells(name, scale):
        assert task_of(cell).name
        assert all(word in words or of_task(word) or word.startswith("seed=") for word in cell.overrides)


@scales
def test_no_two_cells_are_one_run(name: str, scale: str) -> None:
    overrides = [cell.overrides for cell in cells(name, scale)]
    labels = [tuple(cell.labels.items()) for cell in cells(name, scale)]
    assert len(set(overrides)) == len(overrides)
    assert len(set(labels)) == len(labels)


@scales
def test_published_cells_take_models_from_the_hub_and_local_ones_from_packages(name: str, scale: str) -> None:
    for cell in cells(name, scale):
        assert any("=hf:" in word for word in cell.overrides) == (scale == "published"), cell
    for spec in composed(name, scale).values():
        assert spec.trainer.accelerator == {"published": "gpu", "local": "cpu"}[scale]


def test_the_local_cells_of_pkd_dev() -> None:
    found = cells("pkd_dev", "local")
    assert len(found) == 3 * 2 * 4 * 7
    assert {axis: {cell.labels[axis] for cell in found} for axis in ("method", "student", "task", "seed")} == {
        "method": {"finetune", "kd", "pkd"},
        "student": {"3l", "2l"},
        "task": {"rte", "mrpc", "sst2", "rotten_tomatoes"},
        "seed": set("0123456"),
    }
    for spec in composed("pkd_dev", "local").values():
        assert (spec.trainer.precision, spec.trainer.max_epochs, spec.optimizer.lr) == ("bf16-mixed", 3, 1e-4)
    for cell in found:
        task = task_of(cell)
        assert (task.limit_train, task.max_length) == ((None, 64) if task.name == "rte" else (2000, 96))
        assert task.monitor == "accuracy"
    assert [cell.labels["seed"] for cell in found[:18]] == ["0"] * 18  # a table that is not complete has all its rows


@pytest.mark.parametrize("scale", ["published", "local"])
def test_every_student_of_the_grid_of_layers_and_heads_has_its_control(scale: str) -> None:
    found = cells("what_is_lost_grid", scale)
    students = {"finetune": set(), "kd": set()}
    for cell in found:
        students[cell.labels["method"]].add(tuple(label for key, label in cell.labels.items() if key != "method"))
    assert students["finetune"] == students["kd"]


GRID = {
    "local": (384, {64, 128, 384}, {2, 4, 12}, {"1l", "2l", "4l", "6l"}),
    "published": (768, {128, 256, 384, 768}, {2, 4, 6, 12}, {"1l", "2l", "3l", "4l", "6l", "8l", "12l"}),
}
"""Width of the teacher; widths of a fixed head size, heads and students of the grid of random students."""


@pytest.mark.parametrize("scale", ["published", "local"])
def test_heads_of_the_grid_are_of_the_size_of_their_labels_at_a_fixed_width_and_at_a_fixed_head_size(scale: str) -> None:
    full, widths, heads, students = GRID[scale]
    found: dict[str, set[tuple[int, int]]] = {}
    for cell in cells("what_is_lost_grid", scale):
        label, task = cell.labels.get("student.heads"), cell.labels["task"]
        if label is None or (cell.labels["method"], cell.labels["seed"], task) != ("kd", "0", "mrpc"):
            continue
        words = [word for word in cell.overrides if word.startswith(("student", "trainer", "optimizer"))]
        spec = typed(compose(words)).student
        count, size = map(int, label.split("x"))
        assert (spec.heads, spec.width or full) == (count, count * size)
        assert spec.init == "random", "heads of another number have no pre-trained weights"
        layers = cell.labels["student"].removesuffix("l")
        assert spec.layers == (None if layers == "12" else int(layers))
        found.setdefault(cell.labels["student"], set()).add((count, count * size))
    sizes = {(count, full) for count in heads} | {(count, count * min(widths) // min(heads)) for count in heads}
    assert found == dict.fromkeys(students, sizes)
    assert {width for _, width in sizes} == widths


@tables
def test_a_folder_of_figures_says_how_it_is_run_and_what_differs(name: str) -> None:
    text = (EXPERIMENTS / name / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 40
    assert f"kd-table run {name} scale=local" in text
    for word in ("**Source**", "**Protocol**", "**Traps**", "**Not reproducible**"):
        assert word in text


def test_the_list_of_tables_is_complete() -> None:
    text = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")
    for name in NAMES:
        assert f"[`{name}`]({name}/README.md)" in text
