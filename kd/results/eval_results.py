"""Results of an exported student on GLUE in the hub's format: `.eval_results/<name>.yaml` beside its model card.

Source: https://huggingface.co/docs/hub/eval-results, and `huggingface_hub.EvalResultEntry`. The hub shows the value of such a
file on the page of the model and, if the data set is one of its benchmarks, on the data set's leaderboard. There is no field
for the metric, its unit or the split, and none of them is prescribed: `notes` says them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from kd.data.sources import REPOSITORY, Glue
from kd.results.tuned import selection_words

FOLDER = ".eval_results"
"""Folder of the files in the repository of a model."""

CHANGES_EVALUATION = ("limit_validation", "holdout", "where", "where_evaluated")
"""Keys of a task that leave examples out of the development set, or put others in their place."""

DEFINITIONS = {
    "accuracy": "accuracy in percent",
    "f1": "F1 of the positive class in percent",
    "matthews_corrcoef": "Matthews correlation times 100",
    "pearson": "Pearson correlation times 100",
    "spearman": "Spearman correlation times 100",
}
"""Name of a metric of GLUE -> its definition and unit, those in which GLUE gives it."""


@dataclass(frozen=True)
class DevelopmentSet:
    """A development set of GLUE.

    Attributes:
        task: subset of the data set on the hub.
        examples: number of examples there.
        metrics: metrics that GLUE reports, as in `result.json`.
    """

    task: str
    examples: int
    metrics: tuple[str, ...]


# The numbers of examples are those of the data set nyu-mll/glue on the hub.
DEVELOPMENT_SETS: Mapping[tuple[str, str], DevelopmentSet] = {
    ("cola", "validation"): DevelopmentSet("cola", 1043, ("matthews_corrcoef",)),
    ("sst2", "validation"): DevelopmentSet("sst2", 872, ("accuracy",)),
    ("mrpc", "validation"): DevelopmentSet("mrpc", 408, ("accuracy", "f1")),
    ("stsb", "validation"): DevelopmentSet("stsb", 1500, ("pearson", "spearman")),
    ("qqp", "validation"): DevelopmentSet("qqp", 40430, ("accuracy", "f1")),
    ("mnli", "validation"): DevelopmentSet("mnli_matched", 9815, ("accuracy",)),
    ("mnli", "validation_mismatched"): DevelopmentSet("mnli_mismatched", 9832, ("accuracy",)),
    ("qnli", "validation"): DevelopmentSet("qnli", 5463, ("accuracy",)),
    ("rte", "validation"): DevelopmentSet("rte", 277, ("accuracy",)),
    ("wnli", "validation"): DevelopmentSet("wnli", 71, ("accuracy",)),
}
"""Subset that the run read and split in `result.json` -> the development set."""


def development_sets(record: Mapping[str, Any]) -> dict[str, DevelopmentSet]:
    """Return the development sets of GLUE that a student was evaluated on, by split; empty for any other data.

    The run has read GLUE from the hub, or from a folder of its TSV files, and all examples of the split. With
    `task.limit_validation`, as with the other keys of `CHANGES_EVALUATION`, a figure is of other examples, and so none of the
    benchmark, although its name is the same: it may be higher or lower for the choice of the examples alone. It is left out, as
    is that of a file with another number of examples. A test split is left out too: GLUE's has no labels.

    Args:
        record: record of the run, or of a task of a mixture.
    """
    data, task = record["identity"]["data"], record["identity"]["task"]
    subset = data.get("subset")
    from_glue = data.get("_target_") == Glue.__name__ and data.get("hub", f"{REPOSITORY}/{subset}") == f"{REPOSITORY}/{subset}"
    if not from_glue or any(task.get(key) for key in CHANGES_EVALUATION):
        return {}
    return {
        split: found
        for split in record["metrics"]
        if (found := DEVELOPMENT_SETS.get((subset, split))) is not None and record["examples"].get(split) == found.examples
    }


def eval_results(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the files of results of a student, path in its folder -> content; none for data other than GLUE's.

    Each metric that GLUE reports has a file of its own, and `notes` tells them apart, because an entry has one value and no
    name of a metric. The unit is that of GLUE, percent, with two decimals.

    Args:
        record: record of the run, or of a task of a mixture, with the metrics of the student.
    """
    files = {}
    for split, found in development_sets(record).items():
        for metric in found.metrics:
            value = record["metrics"][split].get(metric)
            if value is not None:
                entry = EvalResultEntry(
                    dataset_id=REPOSITORY,
                    task_id=found.task,
                    value=round(100 * value, 2),
                    date=record["finished"],
                    notes=notes(record, split, found, metric),
                )
                content = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True, width=1000)
                files[f"{FOLDER}/glue_{found.task}_{metric}.yaml"] = content
    return files


def notes(record: Mapping[str, Any], split: str, found: DevelopmentSet, metric: str) -> str:
    """Return metric, split, selection, seed and origin of a value, which the hub's format has no fields for.

    Args:
        record: record of the run, or of a task of a mixture.
        split: name of the split.
        found: the development set.
        metric: name of the metric.
    """
    return (
        f"{DEFINITIONS[metric]}; development set ({split}), all {found.examples:,} examples, not the test set; "
        f"checkpoint: {selection_words(record)}; one run, seed {record['seed']}; "
        f"kd {record['versions']['kd']}, run {record['digest']}"
    )
