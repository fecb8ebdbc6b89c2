"""Predictions of a finished run, `predictions.npz`: logits of its students and teachers for each evaluated example."""

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kd.data.texts import Texts
from kd.errors import InputError
from kd.runs.run import predictions_file
from kd.system.files import atomic_write, writing

if TYPE_CHECKING:
    from kd.data.examples import Examples

STUDENTS, TEACHERS = "students", "teachers"


@dataclass(frozen=True, eq=False)
class Logits:
    """Logits of the models of a run over one split, from all ranks.

    Attributes:
        index: (examples,), position in the split of the example of each row, in any order.
        students: name -> (examples, classes), or (examples, 1) for a regression; float32.
        teachers: the same for the teachers, with classes in the task's order.
    """

    index: np.ndarray
    students: Mapping[str, np.ndarray]
    teachers: Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class SplitPredictions:
    """Predictions over one split, in the order of its examples.

    Attributes:
        index: (examples,), position of each example in the split, int64.
        labels: (examples,), class indices in the task's order, or scores; NaN for an example without a label; float64.
        students: name, as in `result.json` -> logits, (examples, classes), or (examples, 1) for a regression; float32.
        teachers: the same for the teachers, with classes in the task's order.
        texts: digest of the texts in their order: predictions of several runs are of the same examples if it is equal.
    """

    index: np.ndarray
    labels: np.ndarray
    students: Mapping[str, np.ndarray]
    teachers: Mapping[str, np.ndarray]
    texts: str

    @classmethod
    def of(cls, logits: Logits, labels: Sequence[float], texts: Sequence[tuple[str, ...]]) -> "SplitPredictions":
        """Put the logits of all ranks in the order of a split's examples.

        Args:
            logits: the logits.
            labels: encoded label of each example of the split; NaN for a missing one.
            texts: texts of each example of the split.

        Raises:
            RuntimeError: if an example of the split is missing, or was evaluated twice.
        """
        order = np.argsort(logits.index, kind="stable")
        index = logits.index[order].astype(np.int64)
        if not np.array_equal(index, np.arange(len(labels))):
            distinct = len(np.unique(index))
            raise RuntimeError(f"{len(index)} predictions of {distinct} examples for a split of {len(labels)}")
        students, teachers = (
            {name: values[order].astype(np.float32) for name, values in models.items()}
            for models in (logits.students, logits.teachers)
        )
        return cls(index, np.asarray(labels, dtype=np.float64), students, teachers, Texts.of(texts).digest())


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions of a run over the splits that it was evaluated on.

    Attributes:
        splits: name of a split, as in `metrics` of `result.json` -> predictions.
    """

    splits: Mapping[str, SplitPredictions] = field(default_factory=dict)


def predictions_of(examples: "Examples", logits: Mapping[str, Logits | None]) -> Predictions:
    """Return the predictions on a task by split; none for a masked language model, whose logits are those of tokens.

    Args:
        examples: examples of the task.
        logits: split -> logits of all models, from all ranks; None if they have no row for each example.

    Raises:
        RuntimeError: if an example is missing, or was evaluated twice.
    """
    known = {split: values for split, values in logits.items() if values is not None}
    return Predictions(
        {split: SplitPredictions.of(values, examples.labels[split], examples.texts[split]) for split, values in known.items()}
    )


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Write predictions atomically; no file if there are none. Equal predictions give equal bytes.

    The file is one of `numpy.savez`, without pickles: `<split>/index`, `<split>/labels`, `<split>/texts`,
    `<split>/students/<name>` and `<split>/teachers/<name>`.

    Raises:
        InputError: if it cannot be written.
    """
    with writing(path):
        if not predictions.splits:
            path.unlink(missing_ok=True)
            return
        arrays: dict[str, np.ndarray] = {}
        for split, values in predictions.splits.items():
            arrays |= {
                f"{split}/index": values.index,
                f"{split}/labels": values.labels,
                f"{split}/texts": np.array(values.texts),
            }
            for kind, models in ((STUDENTS, values.students), (TEACHERS, values.teachers)):
                arrays |= {f"{split}/{kind}/{name}": logits for name, logits in models.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]


def read_predictions(directory: Path, task: str | None = None) -> Predictions:
    """Return the predictions of a finished run.

    Args:
        directory: directory of the run.
        task: name of a task of a mixture, whose tasks have a file each; None for a run of one task.

    Raises:
        InputError: if there is no such file, as of a run of an earlier version, of a masked language model, or one whose file
            was removed; or if it is damaged. A run without predictions is done all the same.
    """
    path = predictions_file(directory, task)
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
        return Predictions({split: _split(arrays, split) for split in dict.fromkeys(name.partition("/")[0] for name in arrays)})
    except (FileNotFoundError, NotADirectoryError) as error:
        why = f"the file '{path}' does not exist{_others(directory, task)}"
        raise InputError(f"the run has no predictions: {why}", "paths.runs") from error
    except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(
            f"the predictions '{path}' are damaged ({type(error).__name__}: {error}). Without the file and result.json, the "
            "command of the run evaluates its last checkpoint again",
            "paths.runs",
        ) from error


def _split(arrays: Mapping[str, np.ndarray], split: str) -> SplitPredictions:
    """Return one split of a file's arrays.

    Raises:
        KeyError: if an array is missing.
        ValueError: if an array has another number of examples than the index.
    """
    index, labels = arrays[f"{split}/index"], arrays[f"{split}/labels"]
    students, teachers = (
        {name.removeprefix(start): values for name, values in arrays.items() if name.startswith(start)}
        for start in (f"{split}/{kind}/" for kind in (STUDENTS, TEACHERS))
    )
    for values in (labels, *students.values(), *teachers.values()):
        if values.shape[:1] != index.shape:
            raise ValueError(f"'{split}' has {len(index)} examples and an array of shape {values.shape}")
    return SplitPredictions(index, labels, students, teachers, str(arrays[f"{split}/texts"]))


def _others(directory: Path, task: str | None) -> str:
    """Return a hint at the tasks of a mixture, if the directory has predictions of such."""
    names = sorted(path.stem for path in predictions_file(directory, "*").parent.glob("*.npz"))
    asked = "" if task is None else f", not '{task}'"
    return f"; there are those of the tasks {', '.join(names)}{asked}" if names else ""
