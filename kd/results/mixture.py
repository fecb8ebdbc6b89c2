"""The record of a mixture of tasks, made of the records of its tasks."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from kd.config.schema import TaskSpec
from kd.data.mixture import Mixture

Record = Mapping[str, Any]


def mixture_record(
    mixture: Mixture,
    tasks: Mapping[str, Record],
    parameters: Mapping[str, int],
    last: Record,
    work: Mapping[str, Mapping[str, int]],
    provenance: Record,
    spec: TaskSpec,
) -> dict[str, Any]:
    """Return the record of a mixture: metrics by task and their mean, and the records of the tasks in `tasks`.

    What is the same for all tasks is the first one's.

    Args:
        mixture: the mixture.
        tasks: the record of each task by name.
        parameters: number of parameters of each student, its body counted once.
        last: metrics on validation at the end of training.
        work: teacher, as `task/name` -> its forward passes, the examples in them, and the batches that used it.
        provenance: what made the run (`kd.results.record.Provenance`).
        spec: configuration of the mixture.
    """
    records = list(tasks.values())
    first = records[0]

    def metrics(of_task: Callable[[Record], Mapping[str, Record]]) -> dict[str, dict[str, Any]]:
        """Return metrics by split, joined over the tasks that have the split."""
        by_task = {name: of_task(record) for name, record in tasks.items()}
        splits = dict.fromkeys(split for by_split in by_task.values() for split in by_split)
        return {split: scores(mixture, {name: by[split] for name, by in by_task.items() if by.get(split)}) for split in splits}

    def student(name: str) -> dict[str, Any]:
        entries = [record["students"][name] for record in records]
        agreements = {task: record["students"][name]["agreement"] for task, record in tasks.items()}
        return {
            **entries[0],
            "metrics": metrics(lambda record: record["students"][name]["metrics"]),
            "agreement": mean_agreement(agreements),
            "parameters": parameters[name],
            "init": common({task: record["students"][name]["init"] for task, record in tasks.items()}),
            "collapsed": any(entry["collapsed"] for entry in entries),
            "folder": entries[0]["folder"].rpartition("/")[0],
            "export_difference": max(entry["export_difference"] for entry in entries),
            "megabytes": round(sum(entry["megabytes"] for entry in entries), 2),
        }

    def of_teacher(name: str) -> dict[str, dict[str, Any]]:
        return metrics(lambda record: record["metrics_teacher"][name])

    students = {name: student(name) for name in first["students"]}
    best, teachers = students[first["headline"]], first["metrics_teacher"]
    return {
        **first,
        **provenance,
        "task": spec.name,
        "tasks": dict(tasks),
        "students": students,
        **{name: best[name] for name in ("metrics", "agreement", "init", "export_difference", "collapsed")},
        "parameters": {**first["parameters"], "student": best["parameters"]},
        "megabytes": {**first["megabytes"], "student": best["megabytes"]},
        "metrics_last": {"validation": dict(last)},
        "metrics_teacher": {name: of_teacher(name) for name in teachers},
        "metrics_ensemble": metrics(lambda record: record["metrics_ensemble"]),
        "notes_teacher": {
            f"{name}/{teacher}": notes for name, record in tasks.items() for teacher, notes in record["notes_teacher"].items()
        },
        "baseline": metrics(lambda record: record["baseline"]),
        "labels": {name: record["labels"] for name, record in tasks.items()},
        "examples": {name: record["examples"] for name, record in tasks.items()},
        "limit_train": spec.limit_train,
        "max_length": {name: record["max_length"] for name, record in tasks.items()},
        "teacher_forward_examples": sum(done["examples"] for done in work.values()),
        "teacher_forwards": dict(work),
        "cache": {f"{name}/{teacher}": cache for name, record in tasks.items() for teacher, cache in record["cache"].items()},
        "seconds": {**first["seconds"], "cache": sum(record["seconds"]["cache"] for record in records)},
        "files": {path: file for record in records for path, file in record["files"].items()},
    }


def common(words: Mapping[str, str]) -> str:
    """Return what is said of every task, once if it is the same.

    >>> common({"a": "first layers", "b": "first layers"}), common({"a": "x", "b": "y"})
    ('first layers', 'a: x; b: y')
    """
    return next(iter(words.values())) if len(set(words.values())) == 1 else "; ".join(f"{n}: {w}" for n, w in words.items())


def scores(mixture: Mixture, by_task: Mapping[str, Record]) -> dict[str, Any]:
    """Return metrics by their names in the mixture; the mean only if every task has them."""
    named = mixture.joined(by_task) if by_task else {}
    return named if by_task.keys() == mixture.tasks.keys() else {name: value for name, value in named.items() if "/" in name}


def mean_agreement(by_task: Mapping[str, Mapping[str, Record]]) -> dict[str, dict[str, float | None]]:
    """Return the mean over tasks of the agreement with each teacher, by split; None if one is undefined."""
    splits: dict[str, dict[str, list[float | None]]] = {}
    for by_split in by_task.values():
        for split, by_teacher in by_split.items():
            values = splits.setdefault(split, {})
            for teacher, value in by_teacher.items():
                values.setdefault(teacher, []).append(value)
    return {split: {name: mean(values) for name, values in teachers.items()} for split, teachers in splits.items()}


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of values; None if one of them is."""
    listed = list(values)
    defined = [value for value in listed if value is not None]
    return sum(defined) / len(defined) if len(defined) == len(listed) else None
