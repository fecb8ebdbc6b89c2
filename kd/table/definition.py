"""Tables of papers as configurations: unions of products of kd-train's options, in `conf/table/<name>.yaml`.

```yaml
paper: pkd                       # stem of the paper, as in method=
title: Patient knowledge distillation, development sets
protocol: Best epoch on the development set, which is also the set of the figures.   # a sentence for reports
scales:
  published:                     # the paper's own models, data and grid
    overrides: [student.backbone=hf:bert-base-uncased]        # of every cell
    cells:                       # a union of products
      - method: [finetune, kd, {pkd_last: [method=pkd, method.layers=last]}]
        student: [6l, 3l]
        task: [rte, mrpc]
        optimizer.lr: [5.0e-5, 2.0e-5]
        seed: [0, 1, 2]
  local: {overrides: [], cells: []}
```

A word `w` of the list of `key` is the override `key=w`. A mapping `{label: [overrides]}` names a list of overrides. `row` in a
product is the label of its cells in the table; without it the labels of method and student are. `new_rows: kd` beside `paper`
lets `rows=mine` make a row of any other method, whose cells are those of `kd` with `method=mine`.
"""

import itertools
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kd.config.choices import choice, definition_names, entries, mapping, read_definition, words
from kd.errors import InputError, one_of

KEYS = ("paper", "title", "protocol", "scales", "new_rows", "not_run")
SCALE_KEYS = ("overrides", "cells")


@dataclass(frozen=True)
class Cell:
    """One run of a table, before it is planned.

    Attributes:
        scale: name of its scale.
        row: label of its row; None for that of its method and student.
        labels: key of kd-train -> label of its value, of the keys that the product lists.
        overrides: the command of kd-train that makes it.
    """

    scale: str
    row: str | None
    labels: Mapping[str, str]
    overrides: tuple[str, ...]

    @property
    def words(self) -> list[str]:
        """Its labels as `key=label`."""
        return [f"{key}={label}" for key, label in self.labels.items()]

    def of_method(self, method: str) -> "Cell":
        """Return the cell with another method in place of its own, which is a word of the list of `method`."""
        own = f"method={self.labels['method']}"
        overrides = tuple(f"method={method}" if word == own else word for word in self.overrides)
        return replace(self, row=None, labels={**self.labels, "method": method}, overrides=overrides)

    def __str__(self) -> str:
        return shlex.join(self.words)


@dataclass(frozen=True)
class Table:
    """Definition of a table.

    Attributes:
        name: stem of its file.
        paper: stem of its paper.
        title: heading.
        protocol: sentence about the protocol of its figures.
        scales: name of a scale, such as `published` or `local` -> its cells.
        not_run: row or method of the paper that kd does not run -> the reason.
        new_rows: method whose cells a method that the table does not list takes; None if there are no such rows.
    """

    name: str
    paper: str
    title: str
    protocol: str
    scales: Mapping[str, Sequence[Cell]]
    not_run: Mapping[str, str]
    new_rows: str | None = None

    @property
    def folder(self) -> Path:
        """Folder of the paper's figures, `paper.csv`, and of ours, `ours.csv`, relative to the working directory."""
        return Path("experiments") / self.name

    def cells(self, scale: str) -> Sequence[Cell]:
        """Return the cells of a scale.

        Raises:
            InputError: if there is no such scale.
        """
        if scale not in self.scales:
            raise InputError(f"table {self.name} has no scale={scale}; it has {', '.join(self.scales)}", "scale")
        return self.scales[scale]

    def labels(self, scale: str) -> list[Mapping[str, str]]:
        """Return the labels of each cell of a scale, with that of its row, as `row`, where it has one of its own."""
        return [cell.labels if cell.row is None else {**cell.labels, "row": cell.row} for cell in self.cells(scale)]

    def rows(self, scale: str, methods: Sequence[str]) -> Sequence[Cell]:
        """Return the cells of some methods, in the order of the table; those that it does not list come last.

        Args:
            scale: name of a scale.
            methods: labels of methods of the table, or, where it has `new_rows`, names of other methods.

        Raises:
            InputError: if there is no such scale or method.
        """
        cells = self.cells(scale)
        listed = [label for cell in cells if (label := cell.labels.get("method")) is not None]
        new = [method for method in dict.fromkeys(methods) if method not in listed]
        if new and (self.new_rows is None or not all(method.isidentifier() for method in new)):
            raise one_of(new[0], tuple(dict.fromkeys(listed)), "rows")
        pattern = [cell for cell in cells if cell.labels.get("method") == self.new_rows]
        found = [cell for cell in cells if cell.labels.get("method") in methods]
        return [*found, *(cell.of_method(method) for method in new for cell in pattern)]


def table_names() -> list[str]:
    """Return the names of the tables that come with the package."""
    return definition_names("table")


def load_table(name: str) -> Table:
    """Read the definition of a table.

    Args:
        name: name of a table of the package, or the path of a YAML file.

    Raises:
        InputError: if there is no such table, or its definition is not valid.
    """
    return parse_table(*read_definition(name, "table", "table", "table"))


def parse_table(name: str, content: Any) -> Table:
    """Return the table of a YAML file's content.

    Raises:
        InputError: for a key that does not exist or lacks, a value of the wrong type, or a scale without cells.
    """
    values = mapping(content, "table", KEYS)
    for key in ("paper", "title", "scales"):
        if key not in values:
            raise InputError(f"table {name} has no '{key}'", key)
    scales = {}
    for scale, given in mapping(values["scales"], "scales").items():
        node = mapping(given, f"scales.{scale}", SCALE_KEYS)
        scales[scale] = tuple(_cells(scale, node, f"scales.{scale}"))
        if not scales[scale]:
            raise InputError(f"table {name} has no rows at scale={scale}", f"scales.{scale}.cells")
    if not scales:
        raise InputError(f"table {name} has no rows", "scales")
    new_rows = values.get("new_rows")
    if new_rows is not None:
        for scale, cells in scales.items():
            own = [cell for cell in cells if cell.labels.get("method") == new_rows]
            if not own or any(f"method={new_rows}" not in cell.overrides for cell in own):
                raise InputError(
                    f"new_rows={new_rows} is the method whose cells other methods take, and 'method: [{new_rows}]' is in no "
                    f"product at scale={scale}",
                    "new_rows",
                )
    reasons = {str(row): str(reason) for row, reason in mapping(values.get("not_run") or {}, "not_run").items()}
    protocol = " ".join(str(values.get("protocol") or "").split())
    return Table(name, str(values["paper"]), str(values["title"]), protocol, scales, reasons, new_rows)


def _cells(scale: str, node: Mapping[str, Any], key: str) -> Iterator[Cell]:
    """Yield the cells of a scale."""
    shared = words(node.get("overrides") or [], f"{key}.overrides")
    for number, given in enumerate(entries(node.get("cells") or [], f"{key}.cells")):
        place = f"{key}.cells.{number}"
        product = dict(mapping(given, place))
        row = product.pop("row", None)
        axes = [
            [(axis, *choice(axis, value, f"{place}.{axis}")) for value in entries(values, f"{place}.{axis}")]
            for axis, values in product.items()
        ]
        if not axes or not all(axes):
            raise InputError(f"{place} lists no values" + (f" of {_empty(product)}" if axes else ""), place)
        for combination in itertools.product(*axes):
            labels = {axis: label for axis, label, _ in combination}
            own = [word for _, _, words in combination for word in words]
            yield Cell(scale, None if row is None else str(row), labels, (*shared, *own))


def _empty(product: Mapping[str, Any]) -> str:
    return ", ".join(axis for axis, values in product.items() if not values)
