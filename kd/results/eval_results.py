"""Results of an exported student on GLUE in the hub's format: `.eval_results/<name>.yaml` beside its model card.

Source: https://huggingface.co/docs/hub/eval-results, and `huggingface_hub.EvalResultEntry`. The hub shows the value of such a
file on the page of the model and, if the data set is one of its benchmarks, on the data set's leaderboard. There is no field
for the metric, its unit or the split, and none of them is prescribed: `notes` says them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
from omegaconf import OmegaConf

from kd.config.compose import conf_folder
from kd.data.sources import REPOSITORY, Glue
from kd.results.tuned import selection_words

FOLDER = ".eval_results"
"""Folder of the files in the repository of a model."""

CHANGES_EXAMPLES = ("limit_validation", "holdout", "where", "where_evaluated")
"""Keys of a task that leave examples out of the development set, or put others in their place."""

LABELS = ("labels", "codes")
"""Keys of a task that say what a label means: which class is positive, or whether two are one."""

COLUMNS = ("text", "label", "local_text", "local_label", "local_columns")
"""Arguments of `Glue` that say which texts and labels are read."""

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


@cache
def definition_of(subset: str) -> Mapping[str, Any]:
    """Return the task of the package that reads a subset of GLUE: `conf/task/<subset>.yaml`, without the machine's folder."""
    task: Any = OmegaConf.load(conf_folder() / "task" / f"{subset}.yaml")
    task.source.root = None  # refers to a part of the whole configuration
    content: Any = OmegaConf.to_container(task, resolve=True)
    return dict(content)


def read_from_glue(record: Mapping[str, Any]) -> bool:
    """Return whether a run has read a subset of GLUE that has a development set, from the hub or from a folder of TSV files.

    Args:
        record: record of the run, or of a task of a mixture.
    """
    data = record["identity"]["data"]
    subset = data.get("subset")
    from_glue = data.get("_target_") == Glue.__name__ and data.get("hub", f"{REPOSITORY}/{subset}") == f"{REPOSITORY}/{subset}"
    return from_glue and any(name == subset for name, _ in DEVELOPMENT_SETS)


def changed_keys(record: Mapping[str, Any]) -> list[str]:
    """Return the keys in which the evaluation of a run that has read GLUE differs from that of the package's own task.

    Args:
        record: record of the run, or of a task of a mixture.
    """
    task, data = record["identity"]["task"], record["identity"]["data"]
    own = definition_of(data["subset"])
    changed = [key for key in CHANGES_EXAMPLES if task.get(key)]
    changed += [key for key in LABELS if (task.get(key) or None) != (own.get(key) or None)]
    changed += [f"source.{key}" for key in COLUMNS if data.get(key) != own["source"].get(key)]
    names = glue_of(own).fingerprint() if "hub" in data else {}  # of files there are digests alone, not names
    changed += ["source.validation"] if any(data.get(split) != name for split, name in names.items()) else []
    return [f"task.{key}" for key in changed]


def glue_of(task: Mapping[str, Any]) -> Glue:
    """Return the source of a task's definition, which reads the hub."""
    return Glue(**{key: value for key, value in task["source"].items() if key != "_target_"})


def development_sets(record: Mapping[str, Any]) -> dict[str, DevelopmentSet]:
    """Return the development sets of GLUE that a student was evaluated on as they are, by split; empty for any other data.

    The run has read GLUE from the hub, or from a folder of its TSV files, all examples of the split, and the texts and labels
    that the package's own task reads. With `task.limit_validation`, as with the other keys of `CHANGES_EXAMPLES`, a figure is
    of other examples; with another text column, or two classes that are one, it is of another task. It is none of the benchmark
    then, although its name is the same. It is left out, as is that of a file with another number of examples. A test split is
    left out too: GLUE's has no labels.

    Args:
        record: record of the run, or of a task of a mixture.
    """
    if not read_from_glue(record) or changed_keys(record):
        return {}
    subset = record["identity"]["data"]["subset"]
    return {
        split: found
        for split in record["metrics"]
        if (found := DEVELOPMENT_SETS.get((subset, split))) is not None and record["examples"].get(split) == found.examples
    }


def hub_splits(record: Mapping[str, Any]) -> list[str]:
    """Return the splits whose figures may be stated as those of the data set that the model card names.

    Of data from the hub these are the development sets that were evaluated as they are; of other data, whose name is the
    task's, all.

    Args:
        record: record of the run, or of a task of a mixture.
    """
    return list(development_sets(record) if "hub" in record["identity"]["data"] else record["metrics"])


def without_results(record: Mapping[str, Any]) -> str:
    """Return the reason why a run that has read GLUE has no results for the hub of a development set; empty if it has all.

    Args:
        record: record of the run, or of a task of a mixture.
    """
    if not read_from_glue(record):
        return ""
    subset, examples = record["identity"]["data"]["subset"], record["examples"]
    reasons = changed_keys(record) or [
        f"{split} has {examples[split]:,} examples in place of {found.examples:,}"
        for split in record["metrics"]
        if (found := DEVELOPMENT_SETS.get((subset, split))) is not None and examples.get(split) != found.examples
    ]
    return f"it does not evaluate {subset} of {REPOSITORY} as it is: {', '.join(reasons)}" if reasons else ""


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
