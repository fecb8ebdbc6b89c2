"""Keys of errors in needed runs, as the user's own command has them."""

from collections.abc import Iterator
from contextlib import contextmanager

from omegaconf import DictConfig

from kd.config.nodes import has_key
from kd.config.schema import RunSpec
from kd.errors import InputError
from kd.runs.identity import MACHINE_KEYS, NOT_IN_DIGEST
from kd.runs.inputs import is_student
from kd.runs.run import Role
from kd.runs.stages import key_of_stage

STAGES = {"stage": "student.run", "surgery": "surgery.{}.run", "aid": "method.aids.{}.run", "edit": "task.edits.{}.run"}
"""Kind of a run that is configured as a stage -> the key of its configuration, with the place of its name."""


def stage_key(role: Role) -> str:
    """Return the key of the configuration of a run that is configured as a stage.

    >>> stage_key(Role("aid", "mlm")), stage_key(Role("stage"))
    ('method.aids.mlm.run', 'student.run')
    """
    return STAGES[role.kind].format(role.name)


@contextmanager
def rename_error_keys(role: Role, spec: RunSpec, config: DictConfig) -> Iterator[None]:
    """Let errors about an input's run name the key in the configuration of the run that needs it, which the user can change.

    Args:
        role: role of the input; see `Run.inputs`.
        spec: specification of the run that needs it.
        config: configuration of the run that needs it, not resolved.

    Raises:
        InputError: in place of one that names a key of the input's run.
    """
    try:
        yield
    except InputError as error:
        key = key_for(role, spec, error.key, config)
        if error.key and role.kind in STAGES and key == stage_key(role) and key != error.key:
            raise InputError(f"the run of {key}: {error.message} ({error.key})", key) from error
        raise InputError(error.message.replace(f"{error.key}=", f"{key}="), key) from error


def key_for(role: Role, spec: RunSpec, key: str | None, config: DictConfig | None = None) -> str | None:
    """Return the key in the configuration of a run that sets a key of one of its inputs.

    >>> from kd.config.schema import TeacherSpec
    >>> key_for(Role("teacher", "minilm"), RunSpec(teacher={"minilm": TeacherSpec()}), "optimizer.lr")
    'teacher.minilm.run.optimizer.lr'
    """
    kind, name = role.kind, str(role.name).partition("/")[0]  # after it, the task of a mixture that a teacher is for
    if key is not None and kind in STAGES and config is not None:
        return key_of_stage(config, stage_key(role), key)
    if key is None or kind not in ("teacher", "pilot", "before"):
        return key
    if kind == "before":
        part, _, rest = key.partition(".")
        if part == "method":
            return f"method.before.{rest}".removesuffix(".")
        return f"method.before.run.{key}" if has_key(spec.method["before"].get("run", {}), key) else key
    if key == "task.holdout" and kind == "pilot":
        return "pool.holdout"
    if is_student(role, spec):  # a pilot of the student has the keys of the run that needs it
        return key
    if key.startswith("teacher.") or (spec.pool.chain and key.startswith("method.")):  # a run of the chain inherits these
        return key
    if has_key(spec.teacher[name].run, key):
        return f"teacher.{name}.run.{key}"
    if key in ("student.backbone", "method"):
        return f"teacher.{name}.{key.rpartition('.')[2]}"
    part, _, rest = key.partition(".")
    own = part in ("method", "student", "optimizer", "seed") or (
        part == "trainer" and rest not in (*NOT_IN_DIGEST, *MACHINE_KEYS)
    )
    return f"teacher.{name}.run.{key}" if own else key
