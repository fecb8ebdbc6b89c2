"""Mixtures of tasks, as configured: `task=[sst2,rte]` is the file `task/mixture.yaml` with the file of each task below it."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace

from kd.config.schema import TaskSpec, check_name, check_task
from kd.config.values import number, shown
from kd.errors import InputError, one_of

MIXTURE = "mixture"
"""The `task.kind` of a mixture, and the name of its file."""

MEAN = "mean"
"""Name of the metric of a mixture that is the mean of the metrics which its tasks monitor."""

LIMITS = ("limit_train", "limit_validation", "limit_test")
"""Keys of a mixture that are those of every task which has none of its own."""

OWN = ("name", "kind", "of", "tau", "monitor", *LIMITS)
"""Keys of a mixture. All others belong to its tasks."""

KINDS = ("classification", "regression")
"""Kinds of tasks that can be mixed. A masked language model has one head for all texts."""


def is_mixture(task: TaskSpec) -> bool:
    """Return whether a task is a mixture of tasks."""
    return task.kind == MIXTURE


def named(task: TaskSpec) -> TaskSpec:
    """Return a task, of which a mixture without a name of its own has those of its tasks.

    >>> named(TaskSpec(name="mixture", kind="mixture", of={"sst2": TaskSpec(), "rte": TaskSpec()})).name
    'sst2-rte'
    """
    return replace(task, name="-".join(task.of)) if is_mixture(task) and task.name == MIXTURE and task.of else task


def tasks_of(task: TaskSpec) -> dict[str, TaskSpec]:
    """Return the tasks of a mixture by name, each with this name and the limits of the mixture in place of none.

    Any other task is returned as the only one.
    """
    if not is_mixture(task):
        return {task.name: task}
    limits = {limit: getattr(task, limit) for limit in LIMITS}
    return {
        name: replace(one, name=name, **{limit: most for limit, most in limits.items() if getattr(one, limit) is None})
        for name, one in task.of.items()
    }


@contextmanager
def rename_task_error_keys(task: TaskSpec, name: str) -> Iterator[None]:
    """Let errors about a task of a mixture name its keys in the mixture's configuration, such as `task.of.rte.train`.

    Args:
        task: the mixture; for any other task, errors are left as they are.
        name: name of the task that errors are about.

    Raises:
        InputError: in place of one that names a key of the task.
    """
    try:
        yield
    except InputError as error:
        if not is_mixture(task) or error.key is None or not error.key.startswith("task."):
            raise
        key = f"task.of.{name}.{error.key.removeprefix('task.')}"
        raise InputError(error.message.replace(f"{error.key}=", f"{key}="), key) from error


def check_tasks(task: TaskSpec) -> None:
    """Check the values of a task, or of a mixture and its tasks, on their own, without reading files.

    Raises:
        InputError: for a value out of range, or a key that belongs to a mixture, or to one of its tasks.
    """
    if is_mixture(task):
        check_mixture(task)
    else:
        for key, empty in (("of", {}), ("tau", 1.0)):
            if getattr(task, key) != empty:
                raise InputError(f"task.{key} belongs to a mixture: 'task=[sst2,rte]'", f"task.{key}")
    for name, one in tasks_of(task).items():
        with rename_task_error_keys(task, name):
            check_task(one)


def check_mixture(task: TaskSpec) -> None:
    """Check the keys of a mixture that are not of its tasks.

    Raises:
        InputError: for a mixture without tasks, a value out of range, or a key that is each task's own.
    """
    check_name(task.name, "task.name")
    empty = TaskSpec(name="", source={}, text=[], label=None, metrics=[], monitor="")
    for field in fields(TaskSpec):
        if field.name not in OWN and getattr(task, field.name) != getattr(empty, field.name):
            raise InputError(
                f"task.{field.name}={shown(getattr(task, field.name))} is each task's own: set task.of.<name>.{field.name}",
                f"task.{field.name}",
            )
    if not task.of:
        raise InputError("a mixture needs a task: 'task=[sst2,rte]'", "task.of")
    number(task.tau, "task.tau", 0, 100)
    for name, one in task.of.items():
        check_name(name, "task.of")
        if "." in name:
            raise InputError(f"task.of has the name '{name}': a dot would separate keys; use '_' or '-'", "task.of")
        if one.kind not in KINDS:
            raise one_of(one.kind, KINDS, f"task.of.{name}.kind")
    check_monitor(task)


def check_monitor(task: TaskSpec) -> None:
    """Check that a mixture monitors a metric that one of its tasks has.

    Raises:
        InputError: if it does not.
    """
    known = [MEAN, *(f"{name}/{metric}" for name, one in task.of.items() for metric in one.metrics)]
    if task.monitor not in known:
        raise one_of(task.monitor, tuple(known), "task.monitor")


def expand(overrides: Sequence[str]) -> list[str]:
    """Return overrides with each `task=[...]` replaced by those that make the mixture; lists in a sweep are left as they are.

    >>> expand(["seed=1", "task=[sst2,rte]"])
    ['seed=1', 'task=mixture', '+task@task.of.sst2=sst2', '+task@task.of.rte=rte']
    """
    expanded = []
    for override in overrides:
        names = listed(override)
        if names is None:
            expanded.append(override)
        else:
            expanded += [f"task={MIXTURE}", *(f"+task@task.of.{name}={name}" for name in names)]
    return expanded


def listed(override: str) -> list[str] | None:
    """Return the tasks that an override lists; None if it lists none."""
    match = re.fullmatch(r"task=\[([\w.,\s'\"-]*)\]", override)
    if match is None:
        return None
    return [name for name in (word.strip(" '\"") for word in match[1].split(",")) if name]
