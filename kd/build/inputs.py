"""Models that come from other runs: as their configurations describe them, or as the trained runs left them."""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import ClassVar, Protocol

from transformers import PretrainedConfig

from kd.build.surgeries import config_after, deepening
from kd.config.schema import RunSpec, StudentSpec
from kd.data.direction import higher_is_better
from kd.data.examples import HEAD_OF_KIND
from kd.data.tasks import Task
from kd.errors import InputError, prefix_error_keys
from kd.functional.policy import best, rank_probabilities
from kd.models.pretrained import load_config
from kd.models.students import check_copy, student_config, with_labels
from kd.runs.error_keys import rename_error_keys, stage_key
from kd.runs.identity import backbone_of
from kd.runs.inputs import student_of, teacher_source
from kd.runs.run import Role, Run


class InputModels(Protocol):
    """Interface of the models that a run takes from the runs that it needs.

    Attributes:
        trained: whether these runs are trained.
    """

    trained: ClassVar[bool]

    def probabilities(self, task: Task) -> list[float]:
        """Return the probability, or weight, of each teacher of a pool."""
        ...

    def teacher(self, name: str, task: Task) -> tuple[PretrainedConfig, str]:
        """Return the configuration of a fine-tuned teacher, and the source of its tokenizer.

        Raises:
            InputError: for a configuration that cannot be built or read.
        """
        ...

    def frozen(self, role: Role) -> tuple[PretrainedConfig, str]:
        """Return the configuration of an aid, or the model of an edit, that a run trains, and the source of its tokenizer.

        Raises:
            InputError: for a configuration that cannot be built or read.
        """
        ...

    def teacher_weights(self, name: str) -> str:
        """Return the source of the weights of a student that starts from a fine-tuned teacher."""
        ...

    def init_weights(self) -> str | None:
        """Return the source of the weights of a student with `student.init=run`; None if there are none yet."""
        ...

    def check_init(self, config: PretrainedConfig, spec: StudentSpec, task: Task) -> None:
        """Check that a student with `student.init=run` can start from that run, if its weights are not there to compare.

        Raises:
            InputError: if the shapes differ.
        """
        ...


@dataclass(frozen=True, slots=True)
class ExpectedModels:
    """Models of runs that may not be trained yet: their shapes follow from their configurations.

    Attributes:
        run: the run that needs them.
    """

    trained: ClassVar[bool] = False
    run: Run

    def probabilities(self, task: Task) -> list[float]:
        """Return the configured probabilities; equal ones where pilots determine them."""
        return configured_probabilities(self.run.spec) or equal_probabilities(self.run.spec)

    def teacher(self, name: str, task: Task) -> tuple[PretrainedConfig, str]:
        """Return the configuration that a teacher will have, and its backbone."""
        needed = self.run.inputs.teachers[name]
        spec, student = needed.spec, student_of(needed)
        source, key = backbone_of(spec, student)
        with rename_error_keys(Role("teacher", name), self.run.spec, self.run.config), prefix_student_errors():
            config = student_config(student, source, task.labels, key, task.head)
            return config_after(spec, config), source

    def frozen(self, role: Role) -> tuple[PretrainedConfig, str]:
        """Return the configuration that the model will have, and its backbone."""
        needed = self.run.inputs.of(role).spec
        source, _ = backbone_of(needed)
        with rename_error_keys(role, self.run.spec, self.run.config), prefix_student_errors():
            config = student_config(needed.student, source, None, "student.backbone", HEAD_OF_KIND[needed.task.kind])
            return config_after(needed, config), source

    def teacher_weights(self, name: str) -> str:
        """Return the backbone of a teacher."""
        needed = self.run.inputs.teachers[name]
        return backbone_of(needed.spec, student_of(needed))[0]

    def init_weights(self) -> None:
        """Return None: `check_init` compares configurations instead."""

    def check_init(self, config: PretrainedConfig, spec: StudentSpec, task: Task) -> None:
        """Check that the student has the shape that the other run's student will have."""
        needed, key = self.run.init_run.spec, "student.run" if self.run.inputs.stage else "method.before"
        with prefix_student_errors():
            expected = student_config(needed.student, backbone_of(needed)[0], task.labels, key, task.head)
            after, deepened = config_after(needed, expected), config_after(self.run.spec, config)
            check_copy(config, after, spec, key, deepened=deepened)
            begins_deep = after.num_hidden_layers == deepened.num_hidden_layers != config.num_hidden_layers
            if begins_deep and deepening(needed) != deepening(self.run.spec):
                raise InputError(
                    f"the {after.num_hidden_layers} layers of the student of {key} are made by other surgeries than those of "
                    "this run, so that they cannot be shared; give both runs the same",
                    key,
                )


@dataclass(frozen=True, slots=True)
class TrainedModels:
    """Models of runs that are trained: read from the folders of their exported students.

    Attributes:
        run: the run that needs them.
    """

    trained: ClassVar[bool] = True
    run: Run

    def probabilities(self, task: Task) -> list[float]:
        """Return the configured probabilities, or those that follow from the pilots' scores on validation."""
        pool = self.run.spec.pool
        configured = configured_probabilities(self.run.spec)
        if configured is not None:
            return configured
        higher = higher_is_better(task.monitor)
        scores, worst = [], -math.inf if higher else math.inf
        for name in self.run.spec.teacher:
            metrics = self.run.inputs.pilots[name].metrics
            assert metrics is not None  # inputs are done before a run is built
            score = metrics["validation"][task.monitor]
            scores.append(worst if score is None else float(score))
        if pool.distribution == "best":
            return best(scores, higher_is_better=higher)
        return rank_probabilities(scores, higher_is_better=higher, sharpness=pool.sharpness)

    def teacher(self, name: str, task: Task) -> tuple[PretrainedConfig, str]:
        """Return the configuration of an exported teacher, and the folder that it was exported to."""
        source, key = teacher_source(self.run, name)
        return with_labels(load_config(source, key), task.labels, task.head), source

    def frozen(self, role: Role) -> tuple[PretrainedConfig, str]:
        """Return the configuration of the model, and the folder that it was exported to."""
        source = str(self.run.inputs.of(role).student)
        return load_config(source, stage_key(role)), source

    def teacher_weights(self, name: str) -> str:
        """Return the folder of an exported teacher."""
        return str(self.run.inputs.teachers[name].student)

    def init_weights(self) -> str:
        """Return the folder of the exported student of the stage, or of the first run of the method."""
        return str(self.run.init_run.student)

    def check_init(self, config: PretrainedConfig, spec: StudentSpec, task: Task) -> None:
        """Do nothing: `plan_student` compares the student with the weights."""


def prefix_student_errors() -> AbstractContextManager[None]:
    """Let errors about a `StudentSpec` name the keys of its fields; see `kd.errors.prefix_error_keys`.

    The key of the backbone, which may be `backbone`, is an argument of the functions that read it.
    """
    return prefix_error_keys("student", [part.name for part in fields(StudentSpec) if part.name != "backbone"])


def configured_probabilities(spec: RunSpec) -> list[float] | None:
    """Return the probabilities of a pool's teachers if its configuration gives them; None if pilots determine them."""
    distribution = spec.pool.distribution
    if isinstance(distribution, list):
        return [float(value) / sum(distribution) for value in distribution]  # numpy requires a sum of 1 up to rounding
    return equal_probabilities(spec) if distribution == "uniform" else None


def equal_probabilities(spec: RunSpec) -> list[float]:
    """Return the same probability for every teacher."""
    return [1 / len(spec.teacher)] * len(spec.teacher)
