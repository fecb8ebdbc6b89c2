"""Members of a run: a view of the run for each of its tasks, as if that were its only task."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from kd.config.mixture import is_mixture, tasks_of
from kd.config.schema import TaskSpec
from kd.errors import InputError
from kd.runs.error_keys import stage_key
from kd.runs.run import Run, RunInputs


def members(run: Run) -> dict[str, Run]:
    """Return the run of each task of a mixture, by name; a run of one task is its own only member.

    A member has the directory and the digest of its mixture. Its inputs are members of the mixture's inputs: where a teacher
    was trained on the same mixture, the member's teacher is its student for that task.
    """
    return {name: member(run, name, task) for name, task in tasks_of(run.spec.task).items()}


def member(run: Run, name: str, task: TaskSpec) -> Run:
    """Return the run of one task of a mixture; of a run with one task, the run itself with the inputs of that task."""
    if not is_mixture(run.spec.task):
        return replace(run, inputs=inputs_of(run.inputs, name))
    inputs = run.digest_inputs
    mixture = {"tasks": list(inputs["task"]["of"]), "tau": inputs["task"]["tau"]}
    identified = {**inputs, "mixture": mixture, "task": inputs["task"]["of"][name], "data": inputs["data"][name]}
    spec = replace(run.spec, task=task)
    return replace(run, spec=spec, inputs=inputs_of(run.inputs, name), digest_inputs=identified, member=name)


def inputs_of(inputs: RunInputs, name: str) -> RunInputs:
    """Return the inputs of a task: those that are mixtures with this task alone, and of teachers for one task each its own.

    Raises:
        InputError: for a mixture without this task.
    """
    for role, needed in inputs:
        if is_mixture(needed.spec.task) and name not in needed.spec.task.of:
            raise InputError(
                f"the {role} is trained on the tasks {', '.join(needed.spec.task.of)}; it has no model for '{name}'",
                {"stage": "student.run", "before": "method.before", "teacher": "teacher"}.get(role.kind) or stage_key(role),
            )

    def of(needed: Run | None) -> Run | None:
        if needed is None or not is_mixture(needed.spec.task):
            return needed
        return member(needed, name, tasks_of(needed.spec.task)[name])

    parts: dict[str, Any] = {}
    for field in fields(RunInputs):
        value = getattr(inputs, field.name)
        parts[field.name] = {key: of(one) for key, one in value.items()} if isinstance(value, Mapping) else of(value)
    own = {key.partition("/"): one for key, one in parts["teachers"].items()}
    parts["teachers"] = {teacher: one for (teacher, mark, task), one in own.items() if not mark or task == name}
    return RunInputs(**parts)
