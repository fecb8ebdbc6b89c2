"""Plans of frozen teachers: their shapes and labels are checked before any of their weights are loaded."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from kd.build.inputs import InputModels
from kd.config.frozen import FrozenSpec, aids_of
from kd.config.pool import teachers_of
from kd.config.schema import TeacherSpec
from kd.config.values import shown
from kd.data.examples import HEAD_OF_KIND
from kd.data.labels import label_text
from kd.data.tasks import Task
from kd.errors import InputError
from kd.methods.base import Method
from kd.models import Encoder, FrozenTeacher
from kd.models.heads import HEADS
from kd.models.pretrained import (
    check_head,
    check_tokenizer,
    check_weights,
    label_names,
    load_config,
    load_model,
    load_tokenizer,
)
from kd.models.students import empty_model
from kd.models.teachers import match_labels
from kd.runs.inputs import teacher_source
from kd.runs.kept import read_kept
from kd.runs.run import Role, Run


@dataclass(frozen=True, slots=True)
class TeacherPlan:
    """A frozen teacher that passed all checks of its configuration; its weights are not loaded.

    Attributes:
        name: its name in messages and results.
        source: source of its weights.
        key: the configuration key that names the source.
        config: its configuration.
        tokenizer: the tokenizer of its inputs.
        head: a key of `kd.models.heads.HEADS`.
        columns: for each label of the task, its column in the teacher's logits; None keeps their order.
        notes: remarks on its weights that affect results.
        asides: remarks on its weights that do not affect results.
        headless: whether only its states are read, so that its source may have no head; a random one stands for it.
        kept: what the method that trained it kept, on the meta device if it is not trained yet.
    """

    name: str
    source: str
    key: str
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerFast
    head: str
    columns: Sequence[int] | None = None
    notes: Sequence[str] = ()
    asides: Sequence[str] = ()
    headless: bool = False
    kept: Mapping[str, Tensor] = field(default_factory=dict)

    def shape(self) -> FrozenTeacher:
        """Return the teacher on the meta device: shapes without weights."""
        return FrozenTeacher(self._encoder(), self.name, self.columns, kept=self.kept)

    def materialise(self) -> FrozenTeacher:
        """Return the teacher; its weights are loaded when first needed: never, if its outputs are cached already."""
        load = functools.partial(load_model, self.source, self.key, self.config, self.head, head_needed=not self.headless)
        return FrozenTeacher(self._encoder(), self.name, self.columns, load, read_kept(self.source, self.key))

    def _encoder(self) -> Encoder:
        encoder = Encoder(empty_model(self.config, self.head), self.tokenizer)
        encoder.notes, encoder.asides = list(self.notes), list(self.asides)
        return encoder


def plan_teachers(run: Run, task: Task, inputs: InputModels) -> list[TeacherPlan]:
    """Plan the frozen teachers of a run; an empty list if its teacher is trained together with the students.

    Raises:
        InputError: for labels that do not match, or weights that cannot be read.
    """
    names = [] if run.spec.cohort.teacher == "online" else teachers_of(run.spec)
    return [plan_teacher(run, task, inputs, name) for name in names]


def plan_teacher(run: Run, task: Task, inputs: InputModels, name: str) -> TeacherPlan:
    """Plan a frozen teacher: a trained classifier (`teacher.<name>.model`), or the student of a run that fine-tunes it.

    Raises:
        InputError: for labels that do not match, or weights that cannot be read.
    """
    source, key = teacher_source(run, name)
    ready = name not in run.inputs.teachers
    if ready:
        config, origin = ready_config(run.spec.teacher[name], task, key), source
        columns = ready_columns(config, run.spec.teacher[name], task, name, key)
    else:
        (config, origin), columns = inputs.teacher(name, task), None
    check_head(config, task.head, key)
    tokenizer = load_tokenizer(origin, key)
    check_tokenizer(tokenizer, config, key, task.head, pairs=len(run.spec.task.text) > 1)
    if not ready:
        return TeacherPlan(name, source, key, config, tokenizer, task.head)
    # If its outputs are cached, its weights are never loaded; otherwise `load_model` checks their values. They are checked
    # here only if another run has to be trained first.
    values = any(not needed.has_model for _, needed in run.inputs)
    weights = check_weights(source, key, config, task.head, head_needed=True, values=values)
    return TeacherPlan(name, source, key, config, tokenizer, task.head, columns, weights.notes, weights.asides)


def plan_aids(run: Run, task: Task, method: Method, inputs: InputModels) -> dict[str, TeacherPlan]:
    """Plan the frozen models of a method that are no teachers: trained models, or those that runs train.

    Raises:
        InputError: for an aid that the method does not have, one that is missing, or one without the head that is read.
    """
    given, name = aids_of(run.spec), run.spec.method["name"]
    if spare := [aid for aid in given if aid not in method.aids]:
        has = f"its aids are {', '.join(method.aids)}" if method.aids else "it has none"
        raise InputError(f"method={name} has no aid '{shown(spare[0])}'; {has}", f"method.aids.{spare[0]}")
    if lacking := [aid for aid in method.aids if aid not in given]:
        key = f"method.aids.{lacking[0]}"
        kind = f"with a head of {method.aids[lacking[0]]}" if method.aids[lacking[0]] else "whose states it reads"
        raise InputError(f"method={name} needs {key}.model or {key}.run, a model {kind}", key)
    pairs = len(run.spec.task.text) > 1
    return {
        aid: plan_frozen(run, Role("aid", aid), f"method.aids.{aid}", head, given[aid], inputs, pairs=pairs)
        for aid, head in method.aids.items()
    }


def plan_frozen(
    run: Run, role: Role, where: str, head: str | None, spec: FrozenSpec, inputs: InputModels, *, pairs: bool
) -> TeacherPlan:
    """Plan a frozen model that is no teacher: an aid of the method, or the model that an edit reads.

    Args:
        run: the run.
        role: role of the run that trains the model, if one does.
        where: configuration key of the node with `model` and `run`.
        head: a key of `kd.models.heads.HEADS`; None if only states are read.
        spec: its configuration.
        inputs: models of the runs that the run needs.
        pairs: whether the model reads pairs of texts.

    Raises:
        InputError: for a model without that head, or weights that cannot be read.
    """
    key = f"{where}.{'model' if spec.model else 'run'}"
    if spec.model is not None:
        config, origin = load_config(spec.model, key), spec.model
    else:
        config, origin = inputs.frozen(role)
        head_of_run = HEAD_OF_KIND[run.inputs.of(role).spec.task.kind]
        if head is not None and head_of_run != head:
            raise InputError(f"the {role.kind} '{role.name}' needs a head of {head}, its run trains one of {head_of_run}", key)
    if spec.model is not None and head is not None and not HEADS[head].is_in(config):
        raise InputError(
            f"the {role.kind} '{role.name}' needs a model whose architecture ends in {HEADS[head].suffix}; "
            f"'{spec.model}' is {', '.join(config.architectures or ())}",
            key,
        )
    built = head or "classifier"
    check_head(config, built, key)
    tokenizer = load_tokenizer(origin, key)
    check_tokenizer(tokenizer, config, key, built, pairs=pairs)
    source = spec.model or str(run.inputs.of(role).student)
    weights = None if spec.model is None else check_weights(source, key, config, built, head_needed=head is not None)
    remarks = () if weights is None else (*weights.notes, *weights.asides)
    return TeacherPlan(str(role), source, key, config, tokenizer, built, None, remarks, (), head is None)


def ready_config(spec: TeacherSpec, task: Task, key: str) -> PretrainedConfig:
    """Load the configuration of a teacher that is not fine-tuned first, and check that it has the task's head.

    Raises:
        InputError: if it cannot be loaded, or names an architecture with another head.
    """
    config, head = load_config(str(spec.model), key), HEADS[task.head]
    if not head.is_in(config):
        architectures = ", ".join(config.architectures or ())
        raise InputError(
            f"'{spec.model}' has no head for this task: its architecture is {architectures}, not ...{head.suffix}", key
        )
    return config


def ready_columns(config: PretrainedConfig, spec: TeacherSpec, task: Task, name: str, key: str) -> list[int] | None:
    """Return the columns of a trained classifier's logits in the order of the task's labels; None keeps their order.

    Raises:
        InputError: if the labels do not match, or it was trained for another problem type.
    """
    if not HEADS[task.head].labelled:
        return None
    columns = teacher_columns(task, teacher_labels(config, spec, name), f"teacher.{name}.labels")
    check_outputs(config, task, spec.model, key)
    return columns


def teacher_labels(config: PretrainedConfig, spec: TeacherSpec, name: str) -> list[str]:
    """Return the names of the outputs of a trained classifier (`teacher.<name>.model`).

    They are `teacher.<name>.labels` if set, else those of the teacher's own configuration.

    Raises:
        InputError: for a list of another length than the outputs, or a configuration that does not name each output.
    """
    key = f"teacher.{name}.labels"
    if not spec.labels:
        return label_names(config, key)
    names = [label_text(name) for name in spec.labels]
    if len(names) != config.num_labels or len(set(names)) < len(names):
        raise InputError(f"{key}={list(spec.labels)} must name each of the {config.num_labels} outputs of '{spec.model}'", key)
    return names


def check_outputs(config: PretrainedConfig, task: Task, model: str | None, key: str) -> None:
    """Check that a classifier was trained for the problem type of the task, if its configuration states one.

    Raises:
        InputError: if its `problem_type` is another.
    """
    wanted = "regression" if task.labels is None else "single_label_classification"
    if config.problem_type not in (None, wanted):
        raise InputError(f"the task is a {wanted.replace('_', ' ')}; '{model}' says problem_type={config.problem_type}", key)


def teacher_columns(task: Task, labels: list[str], key: str) -> list[int] | None:
    """Return the columns of a trained classifier's logits in the order of the task's labels; None for regression.

    Raises:
        InputError: if the labels do not match, or the task is a regression and the teacher has several outputs.
    """
    if task.labels is not None:
        return match_labels(task.labels, labels, key)
    if len(labels) != 1:
        raise InputError(f"the task is a regression, the teacher has {len(labels)} outputs: {labels}", key)
    return None
