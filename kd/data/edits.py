"""Edits of the training split: label noise, and class sizes that are out of balance.

The validation and test splits are never edited. A teacher that is fine-tuned by a run of its own inherits the task, and so
learns from the same edited examples, unless the edit is for students alone (`Edit.teachers`).
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np

from kd.config.values import LARGEST_SEED, literal, number, shown, whole, word
from kd.data.columns import chosen_mask
from kd.data.labels import listed
from kd.data.tasks import Task
from kd.data.texts import Texts
from kd.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

PROFILES = ("exponential", "power")
"""Shapes of class sizes between the largest and the smallest."""

LARGEST_RATIO = 1e6
"""Largest ratio of the sizes of two classes."""

LARGEST_COUNT = 1 << 40
"""Largest number of examples."""


@dataclass(frozen=True)
class Split:
    """Encoded examples of one split.

    Attributes:
        texts: one tuple of one or two texts for each example.
        labels: as the task encodes them: class indices, or scores.
        columns: further column -> value of each example, (examples,), as `kd.data.columns.values_of_columns` returns them.
        origins: the texts that each example was made from; None while no edit has changed texts.
    """

    texts: Texts
    labels: Sequence[float]
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    origins: Texts | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Sequence[int] | np.ndarray) -> "Split":
        """Return these examples, in this order."""
        rows = np.asarray(rows, dtype=np.int64)
        columns = {name: values[rows] for name, values in self.columns.items()}
        origins = None if self.origins is None else self.origins.take(rows)
        return Split(self.texts.take(rows), [self.labels[row] for row in rows.tolist()], columns, origins)


class Edit(ABC):
    """A change of the training examples, a function of these and its own arguments alone: every rank computes the same.

    A subclass has its seed, if it draws anything, as an argument of its own, so that students of every seed and their teacher
    use the same examples.

    Attributes:
        teachers: whether teachers that are fine-tuned by runs of their own learn from the edited examples too, unless the key
            `teachers` of the edit's node says otherwise.
        adds: whether it adds examples to those that there are; `task.limit_train` then counts the examples before it.
        unlabels: whether it makes examples without a label, or takes labels away; a method that learns from labels alone leaves
            these examples out.
        files: names of the arguments that are paths of files; the content of the files enters the digest of a run instead.
        column: name of the further column that it adds; None if it adds none.
    """

    teachers: ClassVar[bool] = True
    adds: ClassVar[bool] = False
    unlabels: ClassVar[bool] = False
    files: ClassVar[Sequence[str]] = ()
    column: str | None = None

    @abstractmethod
    def __call__(self, train: Split, task: Task) -> Split:
        """Return the edited training examples.

        Raises:
            InputError: if the edit cannot be applied to this task; it names the argument.
        """


class FrozenModel(Protocol):
    """Interface of the frozen model that an edit reads.

    Attributes:
        tokenizer: tokenizer of its inputs.
    """

    tokenizer: "PreTrainedTokenizerFast"

    @property
    def positions(self) -> int:
        """Largest number of tokens of an input."""
        ...

    def logits(self, inputs: Mapping[str, "Tensor"]) -> "Tensor":
        """Return the logits of a pass without gradients, on the CPU; inputs as in `kd.forward.inputs`."""
        ...

    def states(self, inputs: Mapping[str, "Tensor"]) -> "Tensor":
        """Return the states of the last layer, (batch, tokens, width), float32, as `logits` returns logits."""
        ...

    def embeddings(self) -> np.ndarray:
        """Return the input word embeddings, (vocabulary, width)."""
        ...


Arrays = Mapping[str, np.ndarray]
"""Arrays by name."""


class ModelEdit(Edit):
    """An edit that reads a frozen model: `model` in its node, or the student of the run that `run` in its node trains.

    `model` and `run` are not passed to the class. What it makes of the examples is an array by name, which the build stores.

    Attributes:
        head: the head that the model needs, a key of `kd.models.heads.HEADS`; None if only states are read.
        stored: `made` with the model, or its stored result; the build sets it before the edit is applied.
    """

    head: ClassVar[str | None]
    stored: Callable[[Split, Task], Arrays]

    @property
    def pairs(self) -> bool:
        """True if the model reads pairs of texts."""
        return False

    def check(self, model: FrozenModel, task: Task) -> None:
        """Check that the edit can work with a model, whose weights are not there yet, and a task; and that files can be read.

        Raises:
            InputError: if not; it names the argument.
        """

    def reads(self, train: Split, task: Task) -> Sequence[np.ndarray | Sequence[object]]:
        """Return what the result depends on besides the texts, for the name of the stored result: arrays, or lists of words."""
        return ()

    @abstractmethod
    def made(self, train: Split, task: Task, model: FrozenModel) -> Arrays:
        """Return what the edit makes of the examples: arrays by name.

        Raises:
            InputError: if it cannot be applied to these examples; it names the argument.
        """


class TextEdit(ModelEdit):
    """An edit with a model that changes texts alone, or repeats or leaves out examples.

    Labels and further columns are those of the example that a new one is made from; with `unlabels` a text that is not that of
    its example has no label.
    """

    @abstractmethod
    def derive(self, train: Split, task: Task, model: FrozenModel) -> tuple[Texts, np.ndarray]:
        """Return the new texts, and the index of the example that each is made from, (new examples,)."""

    def made(self, train: Split, task: Task, model: FrozenModel) -> Arrays:
        """Return the new texts, as bytes with their offsets, and the indices of the examples that they are made from."""
        texts, rows = self.derive(train, task, model)
        return {"content": np.frombuffer(texts.content, dtype=np.uint8), "offsets": texts.offsets, "rows": rows}

    def __call__(self, train: Split, task: Task) -> Split:
        """Return the edited training examples."""
        arrays = self.stored(train, task)
        texts = Texts(arrays["content"].tobytes(), arrays["offsets"], train.texts.columns)
        made = train.take(arrays["rows"])
        labels = made.labels
        if self.unlabels:
            labels = [label if text == old else math.nan for label, text, old in zip(labels, texts, made.texts, strict=True)]
        return replace(made, texts=texts, labels=labels, origins=made.origins or made.texts)


class ColumnEdit(ModelEdit):
    """An edit with a model that adds a further column of numbers to train, and changes nothing else.

    It reads all of train but the part that `task.holdout` cuts from it, before `task.where`, `task.limit_train` and the other
    edits select examples or change labels; it is listed before them. No example of another split has the column. A subclass
    sets its name, `column`, in its constructor.
    """

    column: str

    @abstractmethod
    def values(self, train: Split, task: Task, model: FrozenModel) -> np.ndarray:
        """Return the value of each example, (examples,).

        Raises:
            InputError: if the edit cannot be applied to these examples; it names the argument.
        """

    def reads(self, train: Split, task: Task) -> Sequence[np.ndarray | Sequence[object]]:
        """Return the labels, and the further columns with their names and classes."""
        columns = [[name, *task.column_classes.get(name, ())] for name in train.columns]
        return [np.asarray(train.labels, dtype=np.float64), *train.columns.values(), *columns]

    def made(self, train: Split, task: Task, model: FrozenModel) -> Arrays:
        """Return the values."""
        return {"values": np.asarray(self.values(train, task, model), dtype=np.float32)}

    def __call__(self, train: Split, task: Task) -> Split:
        """Return the training examples with the column."""
        return replace(train, columns={**train.columns, self.column: self.stored(train, task)["values"]})


class LabelNoise(Edit):
    """Symmetric label noise: with probability `rate` the label is another class, each of the others equally likely.

    Source: Sarfraz, Arani and Zonooz, ICPR 2020, arXiv:2007.01922, of which only the abstract was available to us. That the
    noise is symmetric, drawn once, and seen by the teachers too follows secondary accounts of the paper; its rates are not
    known to us.

    An example is drawn by a hash of its text and the seed (our choice), so noise does not depend on the order of the file, on
    `task.limit_train` or on what is held out. Equal texts with equal labels get equal labels. The examples that a rate
    changes are also changed by every higher rate, to the same classes.

    Args:
        rate: probability that a label changes, in [0, 1]; at 0 the examples stay as they are.
        seed: seed of the draws.

    >>> from kd.data.tasks import Classification
    >>> task = Classification("t", ["no", "yes"], {}, ["accuracy"], "accuracy")
    >>> LabelNoise(1.0)(Split(Texts.of([("a",), ("b",)]), [0, 1]), task).labels
    [1, 0]
    """

    def __init__(self, rate: float, seed: int = 0) -> None:
        self.rate = number(rate, "rate", 0, 1)
        self.seed = whole(seed, "seed", 0, LARGEST_SEED)

    def __call__(self, train: Split, task: Task) -> Split:
        """Return the examples with noisy labels; those without a label stay as they are.

        Raises:
            InputError: for a task without classes.
        """
        count = len(classes_of(task, "label noise"))
        labels = list(train.labels)
        for row, (chance, other) in enumerate(draws(train.texts, f"LabelNoise {self.seed}")):
            if chance < self.rate and not math.isnan(labels[row]):
                labels[row] = (int(labels[row]) + 1 + int(other * (count - 1))) % count
        return replace(train, labels=labels)


class Imbalance(Edit):
    """Class sizes that fall from the largest class to the smallest; examples of the larger classes are left out.

    With n the size of the largest class before, C classes and γ the ratio, the class of rank c = 0 ... C - 1 keeps at most
    n γ^(-c / (C - 1)) examples (`exponential`), or n (c + 1)^(-ln γ / ln C) (`power`: a power law of the rank). A class that
    has fewer keeps them all, so the result is at least as unbalanced as the ratio says, and is the given data at a ratio of 1.

    Source: Sarfraz, Arani and Zonooz, ICPR 2020, arXiv:2007.01922, of which only the abstract was available to us. Its ratios
    and the exact shape of its class sizes are not known to us; the exponential profile as the default is our choice.

    Which examples stay is decided by a hash of the text and the seed (our choice): they do not depend on the order of the
    file, and those of a larger ratio are among those of a smaller one, if both rank the classes alike.

    Args:
        ratio: size of the largest class over that of the smallest, from 1.
        profile: `exponential` or `power`.
        order: all classes from the largest to the smallest; None ranks them by their sizes in the training split, and equal
            ones in the task's order. Sizes that are nearly equal may be ranked otherwise after an edit before this one, or
            in the part that remains after `task.holdout`: an order that is given prevents that.
        seed: seed of the draws.
    """

    def __init__(self, ratio: float, profile: str = "exponential", order: Sequence[str] | None = None, seed: int = 0) -> None:
        self.ratio = number(ratio, "ratio", 1, LARGEST_RATIO)
        self.profile = word(profile, PROFILES, "profile")
        if order is not None and not (isinstance(order, list | tuple) and all(isinstance(name, str) for name in order)):
            raise InputError(f"order={shown(order)} is not a list of classes, from the largest to the smallest", "order")
        self.order = order
        self.seed = whole(seed, "seed", 0, LARGEST_SEED)

    def __call__(self, train: Split, task: Task) -> Split:
        """Return the examples that stay, in their order; those without a label do.

        Raises:
            InputError: for a task without classes, an order that does not name each class once, or a ratio that leaves a class
                without examples.
        """
        names = classes_of(task, "class imbalance")
        labels = np.asarray(train.labels, dtype=np.float64)
        sizes = np.bincount(labels[~np.isnan(labels)].astype(np.int64), minlength=len(names))
        ranked = [index for index in self.ranked(names, sizes) if sizes[index]]
        chances = chances_of(train.texts, f"Imbalance {self.seed}")
        stays = np.ones(len(train), dtype=bool)
        for rank, index in enumerate(ranked):
            most = round(sizes.max() * self.share(rank, len(ranked)))
            if not most:
                raise InputError(
                    f"ratio={shown(self.ratio)} leaves the class {literal(names[index])} without examples: the largest has "
                    f"{sizes.max()}",
                    "ratio",
                )
            rows = np.flatnonzero(labels == index)
            stays[rows[np.argsort(chances[rows], kind="stable")[most:]]] = False
        return train.take(np.flatnonzero(stays))

    def ranked(self, names: Sequence[str], sizes: np.ndarray) -> list[int]:
        """Return the indices of the classes from the largest to the smallest.

        Raises:
            InputError: if `order` does not name each class once.
        """
        if self.order is None:
            return sorted(range(len(names)), key=lambda index: (-sizes[index], index))
        if sorted(self.order) != sorted(names):
            raise InputError(f"order={shown(list(self.order))} does not name each class once: {', '.join(names)}", "order")
        return [names.index(name) for name in self.order]

    def share(self, rank: int, classes: int) -> float:
        """Return the size of a class over that of the largest."""
        if rank == 0:
            return 1.0
        exponent = rank / (classes - 1) if self.profile == "exponential" else math.log(rank + 1) / math.log(classes)
        return float(self.ratio**-exponent)


class CountedLabels(Edit):
    """An edit that keeps the labels of a few examples of a domain.

    Which examples these are is decided by a hash of the text and the seed: they do not depend on the order of the file, and
    fewer are among more. Classes are not balanced (our choice).

    Args:
        count: number of examples that keep their labels; all if there are fewer.
        where: further column of classes -> a class, or several: the examples that are counted; None for all of train. Examples
            of other classes, and examples without a label, stay as they are.
        seed: seed of the draws; examples of a seed and a count are the same for every class of edits.
    """

    def __init__(self, count: int, where: Mapping[str, str | Sequence[str]] | None = None, seed: int = 0) -> None:
        self.count = whole(count, "count", 1, LARGEST_COUNT)
        self.where = mapping_of_names(where, "where")
        self.seed = whole(seed, "seed", 0, LARGEST_SEED)

    def kept(self, train: Split, task: Task) -> np.ndarray:
        """Return whether each example stays as it is, (examples,), bool.

        Raises:
            InputError: for a column or a class that the task does not have, or none of whose examples is in train.
        """
        labelled = ~np.isnan(np.asarray(train.labels, dtype=np.float64))
        rows = np.flatnonzero(labelled & chosen_mask(self.where, task.column_classes, train.columns, len(train)))
        if not len(rows):
            raise InputError(f"where={shown(self.where)} selects no training example with a label", "where")
        chances = chances_of(train.texts, f"FewLabels {self.seed}")
        kept = np.ones(len(train), dtype=bool)
        kept[rows[np.argsort(chances[rows], kind="stable")[self.count :]]] = False
        return kept


class FewLabels(CountedLabels):
    """A few examples of a domain, whose others are left out: a domain of few labels beside others of many.

    Arguments as for `CountedLabels`.
    """

    def __call__(self, train: Split, task: Task) -> Split:
        """Return the examples that stay, in their order; errors as of `kept`."""
        return train.take(np.flatnonzero(self.kept(train, task)))


class HiddenLabels(CountedLabels):
    """A few labels, and all of the text: the other examples stay without theirs, and a teacher still teaches on them.

    Arguments as for `CountedLabels`. Runs that learn from labels alone, such as fine-tuning and that of teachers, leave the
    others out, and are baselines of the same data.
    """

    unlabels: ClassVar[bool] = True

    def __call__(self, train: Split, task: Task) -> Split:
        """Return all examples, in their order; errors as of `kept`."""
        kept = self.kept(train, task).tolist()
        return replace(train, labels=[label if keeps else math.nan for label, keeps in zip(train.labels, kept, strict=True)])


def mapping_of_names(where: object, key: str) -> dict[str, list[str]] | None:
    """Return a selection by columns of classes (`kd.data.columns.Where`) after a check; None for none.

    Raises:
        InputError: for anything else than a mapping from a column to one name or several.
    """
    if where is None:
        return None
    if isinstance(where, Mapping) and where:
        names = {str(column): [wanted] if isinstance(wanted, str) else wanted for column, wanted in where.items()}
        if all(
            isinstance(each, list | tuple) and each and all(isinstance(name, str) for name in each) for each in names.values()
        ):
            return {column: list(each) for column, each in names.items()}
    raise InputError(f"{key}={shown(where)} does not select by a column of classes: {{domain: [books]}}", key)


def classes_of(task: Task, what: str) -> list[str]:
    """Return the classes of a task.

    Raises:
        InputError: if it has none.
    """
    if task.labels is None:
        raise InputError(f"{what} is for classes, and the task '{task.name}' has none")
    return task.labels


def draws(texts: Texts, salt: str) -> Iterator[tuple[float, float]]:
    """Yield two numbers in [0, 1) for each example, of its text and the salt alone: equal on every rank and machine."""
    for row in texts:
        digest = hashlib.blake2b("\0".join((salt, *row)).encode(), digest_size=16).digest()
        first, second = (int.from_bytes(half) >> 11 for half in (digest[:8], digest[8:]))
        yield first / 2**53, second / 2**53  # of 53 bits, the precision of a float: 64 bits might round to 1


def chances_of(texts: Texts, salt: str) -> np.ndarray:
    """Return the first of the two numbers that `draws` yields for each example, (examples,)."""
    return np.fromiter((chance for chance, _ in draws(texts, salt)), np.float64, len(texts))


def edited(edit: Edit, train: Split, task: Task) -> Split:
    """Return the training examples after an edit.

    Raises:
        InputError: for an edit that leaves no example, or a class that had examples without any.
    """
    result = edit(train, task)
    name = type(edit).__name__
    if not len(result):
        raise InputError(f"{name} leaves no training example")
    if all(map(math.isnan, result.labels)):
        raise InputError(f"{name} leaves no training example with a label")
    before, after = class_sizes(train, task), class_sizes(result, task)
    if lost := [label for label, size in before.items() if size and not after[label]]:
        raise InputError(f"{name} leaves the class {literal(lost[0])} without examples")
    return result


def class_sizes(split: Split, task: Task) -> dict[str, int]:
    """Return the number of examples that have each class; an empty dict for a task without classes."""
    if task.labels is None:
        return {}
    given = [int(label) for label in split.labels if not math.isnan(label)]
    counts = np.bincount(np.asarray(given, dtype=np.int64), minlength=len(task.labels))
    return dict(zip(task.labels, counts.tolist(), strict=True))


def described(edit: Edit, before: Split, after: Split, task: Task) -> str:
    """Describe what an edit did to the training examples.

    >>> from kd.data.tasks import Classification
    >>> task = Classification("t", ["no", "yes"], {}, ["accuracy"], "accuracy")
    >>> before, noise = Split(Texts.of([("a",), ("b",), ("c",)]), [0, 1, 1]), LabelNoise(1.0)
    >>> described(noise, before, noise(before, task), task)
    'LabelNoise: 3 of 3 labels changed; class sizes no 1 -> 2, yes 2 -> 1'
    """
    if edit.column is not None:
        values = after.columns[edit.column]
        return (
            f"{type(edit).__name__}: column {edit.column}, {values.min():.3g} to {values.max():.3g}, mean {values.mean():.3g}"
        )
    if before.texts == after.texts:
        pairs = zip(before.labels, after.labels, strict=True)
        changed = sum(one != other and not (math.isnan(one) and math.isnan(other)) for one, other in pairs)
        words = [f"{changed} of {len(before)} labels {'taken away' if edit.unlabels else 'changed'}"]
    else:
        words = [f"{len(before)} -> {len(after)} examples"]
        if edit.unlabels:
            words.append(f"{sum(map(math.isnan, after.labels))} of them without a label")
    sizes = zip(class_sizes(before, task).items(), class_sizes(after, task).values(), strict=True)
    if of_classes := [f"{name} {size} -> {other}" for (name, size), other in sizes]:
        words.append(f"class sizes {listed(of_classes)}")
    return f"{type(edit).__name__}: {'; '.join(words)}"
