"""Examples of a task before tokenisation: read, checked, limited and encoded."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from kd.config.schema import TaskSpec
from kd.data.columnar import COLUMNAR
from kd.data.columns import chosen, chosen_mask, classes_of_columns, values_of_columns
from kd.data.edits import Split
from kd.data.labels import PartLabels, class_names, given_labels, has_label
from kd.data.masked_lm.task import MaskedLM
from kd.data.readers import Layout, data_path
from kd.data.shards import data_fingerprint, shards_of
from kd.data.sources import LINES, Source, as_names, hash_fraction, tables_of
from kd.data.stored_texts import TEXTS_FORMAT, StoredTexts, TextPiece, store_texts
from kd.data.tasks import Classification, Regression, Task
from kd.data.texts import INTERNED, JoinedTexts, Table
from kd.errors import InputError, one_of

LIMIT_SEED = 0
"""Seed of the shuffle behind `task.limit_train`, `limit_validation` and `limit_test`: fixed, so that students of every seed and
their teacher use the same examples."""

HEAD_OF_KIND: Mapping[str, str] = {"classification": "classifier", "regression": "classifier", "masked_lm": "masked_lm"}
"""Allowed values of `task.kind`, and the head of `kd.models.heads.HEADS` of the models that are trained on it."""


@dataclass
class Examples:
    """Text of a task and its labels, before tokenisation.

    Attributes:
        task: labels, losses and metrics.
        texts: split -> one tuple of one or two texts for each example.
        labels: split -> encoded labels; NaN for a training example without one.
        columns: split -> further column -> value of each example, (examples,): class indices, whose names are in
            `task.column_classes`, or numbers.
        origins: for each example of train the texts that it was made from, if an edit changed texts; None if none did.
        evaluated_like: for each example of train whether those of its kind are evaluated (`task.where_evaluated`), (examples,),
            bool; None if all kinds are.
        edits: descriptions of what edits changed in train, in the order in which they were applied.
    """

    task: Task
    texts: Mapping[str, Sequence[tuple[str, ...]]]
    labels: Mapping[str, Sequence[float]]
    columns: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    edits: Sequence[str] = ()
    origins: Sequence[tuple[str, ...]] | None = None
    evaluated_like: np.ndarray | None = None

    @property
    def stored(self) -> StoredTexts | None:
        """The texts of train that have no labels and lie on disk; None if there are none."""
        texts = self.texts["train"]
        last = texts.parts[-1] if isinstance(texts, JoinedTexts) else None
        return last if isinstance(last, StoredTexts) else None

    @property
    def evaluated(self) -> list[str]:
        """Names of the splits that are not trained on, `validation` first."""
        return [split for split in self.texts if split != "train"]

    def with_train(self, rows: np.ndarray) -> "Examples":
        """Return the examples with those of train at these indices, in this order."""
        texts, labels, origins = self.texts["train"], self.labels["train"], self.origins
        of_train = {name: values[rows] for name, values in self.columns.get("train", {}).items()}
        return replace(
            self,
            texts={**self.texts, "train": [texts[row] for row in rows]},
            labels={**self.labels, "train": [labels[row] for row in rows]},
            columns={**self.columns, "train": of_train},
            origins=None if origins is None else [origins[row] for row in rows],
            evaluated_like=None if self.evaluated_like is None else self.evaluated_like[rows],
        )


@dataclass(frozen=True)
class Edited:
    """Function that edits the training examples and describes the change.

    Attributes:
        apply: the function; None while the model that the edit reads may not be trained yet.
        adds: whether it adds examples (`Edit.adds`).
        column: name of the further column that it adds (`Edit.column`); None if it adds none.
    """

    apply: Callable[[Split, Task], tuple[Split, str]] | None
    adds: bool = False
    column: str | None = None


def load_examples(
    spec: TaskSpec,
    source: Source,
    edits: Sequence[Edited] = (),
    store: Path | None = None,
    *,
    labelled_alone: bool = False,
) -> Examples:
    """Read a task's examples, encode their labels, edit those of train, and check all.

    Text without labels (`unlabelled`) follows the examples of train; neither limit, edits nor holdout apply to it.
    `where_evaluated` selects, after `where`, among the examples of the other splits.

    Edits are applied to all of train, before `limit_train`; a larger limit then adds examples and changes none. The limit is
    applied before the first edit that adds examples, though: it counts those of the file. Edits that add a column come before
    `where` and all others, and so read examples that these leave out. What `holdout` cuts from train is
    cut before: no example that is edited is evaluated on. Classes are those of train before.

    Args:
        spec: the task.
        source: its data source.
        edits: applied in this order.
        store: folder for text without labels, which is read piece by piece; None for a temporary one.
        labelled_alone: leave out what has no label, of train and of text without labels.

    Raises:
        InputError: for an error in the files or in the configuration of the task.
    """
    if len(spec.text) not in (1, 2):
        raise InputError(f"text={spec.text} must name one column, or two for a pair", "text")
    limits = {"train": spec.limit_train, "validation": spec.limit_validation, "test": spec.limit_test}
    for split, limit in limits.items():
        if limit is not None and limit < 1:
            raise InputError(f"limit_{split}={limit} must be at least 1", f"limit_{split}")
    raw = {split: Table.of(examples) for split, examples in source.splits().items()}
    check_splits(raw)
    task = build_task(spec, raw["train"])
    task.column_classes = classes_of_columns(spec.extra or {}, raw["train"])
    adding = [edit for edit in edits if edit.column is not None]
    if any(edit.column is None for edit in edits[: len(adding)]):
        raise InputError(
            f"the edit that adds the column '{adding[0].column}' reads all of train as it is in the file, so that it comes "
            "before the others",
            "edits",
        )
    task.columns = [*carried(spec), *(str(edit.column) for edit in adding)]
    if spec.holdout is not None and adding:  # what is evaluated on enters no column
        raw = held_out(raw, spec.holdout)
    kinds, changes = with_columns(raw, spec, task, adding)
    edits = [edit for edit in edits if edit.column is None and edit.apply is not None]
    if spec.where:
        raw = {split: table.take(chosen(spec.where, task.column_classes, table)) for split, table in raw.items()}
        check_splits(raw, "where")
    first = next((index for index, edit in enumerate(edits) if edit.adds), len(edits))
    if not first:
        raw["train"] = limited(raw["train"], spec.limit_train)
    if spec.holdout is not None and not adding:
        raw = held_out(raw, spec.holdout)
    if spec.where_evaluated:
        key = "where_evaluated"
        for split in [split for split in raw if split != "train"]:
            raw[split] = raw[split].take(chosen(spec.where_evaluated, task.column_classes, raw[split], key))
            check_splits({split: raw[split]}, key)
    for split in raw:
        if split != "train":  # `validation_mismatched` is limited as `validation` is; a split of another name is whole
            raw[split] = limited(raw[split], limits.get(split.partition("_")[0]))
    own = carried(spec)
    splits = {split: encoded_split(task, table, spec, kinds if split == "train" else own) for split, table in raw.items()}
    for index, edit in enumerate(edits):
        if first and index == first:
            splits["train"] = limited(splits["train"], spec.limit_train)
        assert edit.apply is not None
        splits["train"], change = edit.apply(splits["train"], task)
        changes.append(change)
    if first and first == len(edits):
        splits["train"] = limited(splits["train"], spec.limit_train)
    if labelled_alone:
        splits["train"], change = with_labels(splits["train"], spec)
        changes.append(change)
    labels: dict[str, Sequence[float]] = {split: examples.labels for split, examples in splits.items()}
    given = given_labels(labels["train"])
    task.partly_labelled = len(given) < len(labels["train"])
    try:
        task.check_labels(given)
    except InputError as error:
        raise InputError(error.message, error.key if spec.limit_train is None else "limit_train") from error
    if isinstance(task, Regression):
        task.start = float(np.mean(given))  # otherwise the first steps only learn the mean
    ordered = list({"train": None, "validation": None, **dict.fromkeys(raw)})
    texts, columns = ({split: getattr(splits[split], part) for split in ordered} for part in ("texts", "columns"))
    labels = {split: labels[split] for split in ordered}
    origins: Sequence[tuple[str, ...]] | None = splits["train"].origins
    if spec.unlabelled is not None and not labelled_alone:
        if len(kinds) > len(own):
            raise InputError(
                f"text without labels has no column '{list(kinds)[-1]}', which an edit adds to train", "unlabelled"
            )
        task.partly_labelled = True
        more = read_unlabelled(spec, task, store)
        if origins is not None:
            origins = JoinedTexts(origins, more)
        texts["train"] = JoinedTexts(texts["train"], more)
        labels["train"] = PartLabels(labels["train"], len(more))
        columns["train"] = {name: np.concatenate([values, more.column(name)]) for name, values in columns["train"].items()}
    alike = None
    if spec.where_evaluated and own:
        of_train = columns["train"]
        alike = chosen_mask(spec.where_evaluated, task.column_classes, of_train, len(labels["train"]), "where_evaluated")
    return Examples(task, texts, labels, columns, changes, origins, alike)


def with_labels(train: Split, spec: TaskSpec) -> tuple[Split, str]:
    """Return the training examples that have a label, and what was left out, in words."""
    rows = np.flatnonzero(has_label(train.labels))
    left = [f"{count} examples without labels"] if (count := len(train) - len(rows)) else []
    left += [] if spec.unlabelled is None else ["the text of task.unlabelled"]
    return train.take(rows), f"the method, which learns from labels alone: {' and '.join(left) or 'nothing'} left out"


def carried(spec: TaskSpec) -> dict[str, Any]:
    """Return the further columns that the examples of a task carry; those of a masked language model only select texts."""
    return {} if spec.kind == "masked_lm" else dict(spec.extra or {})


def with_columns(
    raw: dict[str, Table], spec: TaskSpec, task: Task, edits: Sequence[Edited]
) -> tuple[dict[str, Any], list[str]]:
    """Add the columns of edits to the training split of a task.

    Returns:
        Kinds of the further columns of train, those of the edits included, and descriptions of the edits.

    Raises:
        InputError: for an edit that cannot be applied, or a column that there is already.
    """
    kinds = carried(spec)
    changes = []
    for edit in edits:
        column = str(edit.column)
        if column in kinds:
            raise InputError(f"an edit adds the column '{column}', which there is already", "extra")
        if edit.apply is None:
            continue
        table = raw["train"]
        split, change = edit.apply(encoded_split(task, table, spec, kinds), task)
        values = {**table.columns, column: split.columns[column].tolist()}
        raw["train"] = Table(table.texts, table.labels, table.places, table.place, table.numbers, values)
        kinds[column] = "number"
        changes.append(change)
    return kinds, changes


def read_unlabelled(spec: TaskSpec, task: Task, store: Path | None = None) -> StoredTexts:
    """Return the training text that has no labels, on disk, with the further columns of the task.

    The file, or each shard of a folder, is a table with the task's text columns, by its suffix, or a `.txt` with a text on
    each line. It is read in one pass, a few rows at a time, unless its texts are stored already.

    Args:
        spec: the task.
        task: the task, with the classes of its further columns.
        store: folder of the stored texts; None for a temporary one.

    Raises:
        InputError: if the file cannot be read, or lacks a column.
    """
    key, text, extra = "unlabelled", as_names(spec.text), dict(spec.extra or {})
    path = data_path(str(spec.unlabelled), key)
    files = shards_of(path, key)
    has_lines = files[0].suffix.lower() == LINES
    if has_lines and len(text) != 1:
        raise InputError(f"'{files[0]}' has one text on each line, and the task has pairs: give a table", key)
    layout = Layout("lines" if has_lines else None)
    kind = layout.kind(files[0], key)

    def pieces() -> Iterator[TextPiece]:
        before, count = data_fingerprint(path, key), 0
        for index, table in tables_of(files, text, key, layout, list(extra)):
            if spec.where:
                table = table.take(chosen(spec.where, task.column_classes, table))
            count += len(table)
            yield TextPiece(index, table.texts, table.numbers, values_of_columns(extra, task.column_classes, table))
        if not count:
            raise none_selected(key, key)
        if data_fingerprint(path, key) != before:
            raise InputError(f"'{path}' changed while it was read", key)

    word = "row" if kind in COLUMNAR else "line"
    named = [TEXTS_FORMAT, data_fingerprint(path, key), kind, text, extra, dict(task.column_classes), spec.where]
    digest = hashlib.blake2b(json.dumps(named).encode(), digest_size=16).hexdigest()
    folder = None if store is None else store / f"texts-{digest}"
    return store_texts(folder, [f"'{file}', {word} " for file in files], pieces, f"'{path}'")


def check_splits(raw: Mapping[str, Table], key: str | None = None) -> None:
    """Check that every split has examples.

    Args:
        raw: the splits.
        key: the argument that selects examples, which an error names; None for a split of a file.

    Raises:
        InputError: if one has none.
    """
    for split, table in raw.items():
        if not len(table):
            if key is not None:
                raise none_selected(split, key)
            raise InputError(f"the split '{split}' has no examples; the file is too small to be split", split.partition("_")[0])


def none_selected(split: str, key: str) -> InputError:
    """Return the error for an argument that selects no example of a split."""
    return InputError(f"the split '{split}' has no examples; none is selected", key)


T = TypeVar("T", Table, Split)


def limited(table: T, count: int | None) -> T:
    """Return at most `count` examples, drawn with a fixed seed; without a limit, all of them in their order."""
    if count is None:
        return table
    return table.take(np.random.default_rng(LIMIT_SEED).permutation(len(table))[:count])


def encoded_split(task: Task, table: Table, spec: TaskSpec, kinds: Mapping[str, Any]) -> Split:
    """Return a split with labels and further columns as numbers; `kinds` are those of its columns.

    Raises:
        InputError: for a label that is not one of the task's, or a value that a column cannot have.
    """
    columns = values_of_columns(kinds, task.column_classes, table)
    return Split(table.texts, encoded(task, table, spec), columns)


def encoded(task: Task, table: Table, spec: TaskSpec) -> list[float]:
    """Return the labels of a split as numbers.

    Raises:
        InputError: for a label that is not one of the task's.
    """
    numbers: dict[tuple[type, Any], float] = {}
    results = []
    for row, label in enumerate(table.labels):
        try:
            number = numbers.get((type(label), label))
        except TypeError:  # a list cannot be hashed; `encode` rejects it
            number = None
        if number is None:
            try:
                number = task.encode(table[row])
            except InputError as error:
                if error.key != "labels" or spec.labels is not None:
                    raise
                raise InputError(
                    f"{error.message}. These are the labels of train; labels=[...] lists others", error.key
                ) from error
            if len(numbers) < INTERNED:
                numbers[type(label), label] = number
        results.append(number)
    return results


def held_out(raw: Mapping[str, Table], share: float) -> dict[str, Table]:
    """Split train by a hash of the text into train and validation, which replaces the task's own evaluation splits.

    Raises:
        InputError: for a share outside (0, 1).
    """
    if not 0 < share < 1:
        raise InputError(f"holdout={share} is a share of train, between 0 and 1", "holdout")
    # Salted: if the task's own splits come from the same hash, train has only part of its range, and shares would be wrong.
    train = raw["train"]
    held = np.fromiter((hash_fraction(("held out", *texts)) < share for texts in train.texts), bool, len(train))
    splits = {"train": train.take(np.flatnonzero(~held)), "validation": train.take(np.flatnonzero(held))}
    if not all(map(len, splits.values())):
        raise InputError(f"a share of {share} of {len(held)} examples leaves no example to score, or to train on", "holdout")
    return splits


def build_task(spec: TaskSpec, train: Table) -> Task:
    """Build a task from its configuration; without `labels`, its classes are the sorted labels of the training split."""
    if spec.kind not in HEAD_OF_KIND:
        raise one_of(spec.kind, tuple(HEAD_OF_KIND), "kind")
    if spec.kind == "masked_lm":
        if spec.extra and not spec.where:
            raise InputError(
                "a masked language model reads chunks of text, which have no further columns but those of `where`", "extra"
            )
        if spec.unlabelled is not None:
            raise InputError("a masked language model needs no labels: all of its text is in train", "unlabelled")
        return MaskedLM(spec.name, spec.metrics, spec.monitor)
    if spec.label is None:
        raise InputError(f"label is null: a {spec.kind} needs the column of its labels", "label")
    if spec.kind == "regression":
        return Regression(spec.name, spec.metrics, spec.monitor)
    labels = spec.labels or class_names(train)
    if len(labels) < 2 and spec.labels is None:
        raise InputError(f"every training example has the label '{labels[0]}'; a classifier needs two or more", "label")
    return Classification(spec.name, labels, spec.codes, spec.metrics, spec.monitor)
