"""A method inside any training loop: a module whose call is the loss of one step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from kd.build.instantiate import build_schedule
from kd.config.compose import conf_folder
from kd.data.batch import Batch
from kd.data.tasks import Classification, Regression
from kd.engines.distiller import Distiller
from kd.engines.models import Models
from kd.errors import InputError
from kd.methods.base import Bound, Method, Progress
from kd.methods.wrappers.mutual import Mutual
from kd.models import Encoder, FrozenTeacher
from kd.models.labels import columns
from kd.schedules import Schedule, ScheduleNode, extremes
from kd.system import distributed


@dataclass
class DistillationOutput(ModelOutput):
    """Loss of a step.

    Attributes:
        loss: weighted sum of the terms, a scalar.
        logits: the student's, (batch, classes).
        terms: name -> unweighted term, a scalar; those of the method's `names`.
    """

    loss: Tensor = None  # type: ignore[assignment]
    logits: Tensor = None  # type: ignore[assignment]
    terms: dict[str, Tensor] = None  # type: ignore[assignment]


class Distillation(nn.Module):
    """Loss of a method for a student and its teachers, inside a training loop of yours.

    It computes what a step of a run computes: `kd.engines.distiller.Distiller` makes the loss. The student and what the method
    trains, such as projections between widths, are its parameters, so that one optimiser and DDP see both; the student alone
    is exported, `distillation.export().save_pretrained(folder)`. Teachers are neither parameters nor in `state_dict()`, but
    move with the module. They are put into eval mode, and their parameters need no gradients afterwards. The student is put
    into training mode, which `from_pretrained` leaves; `eval()` ends it.

    `state_dict()` has the number of steps too. It first does what `after_step` does, so that a checkpoint has all of a step.

    >>> distillation = Distillation(PKD(), student, teacher)  # doctest: +SKIP
    >>> output = distillation(**tokenizer(texts, return_tensors="pt", padding=True), labels=labels)  # doctest: +SKIP
    >>> output.loss.backward()  # doctest: +SKIP

    Args:
        method: a method of `kd.methods`, which is bound to the models. Methods that need more than a step are refused.
        student: a `...ForSequenceClassification` of transformers. Its configuration names the classes (`id2label`); one output,
            or `problem_type="regression"`, is a regression.
        teachers: a teacher, or as many as the method takes, of the same kind; classes are matched by name.
        weights: term -> weight, a number or a schedule (`kd.schedules`). None takes those of the method's file in
            `conf/method`, which has the name of its module: `pkd.yaml` for `kd.methods.pkd`.
        total_steps: number of optimiser steps of the whole training; needed if a weight or a temperature is a schedule.
        seed: random draws of the method follow from it and the step; those of `kd-train` from `seed=`.

    Raises:
        InputError: for a method that needs more than a step, a number of teachers or classes that do not fit, weights that do
            not match the terms, or models that the method cannot work with.
    """

    def __init__(
        self,
        method: Method,
        student: PreTrainedModel,
        teachers: PreTrainedModel | Sequence[PreTrainedModel] = (),
        weights: "Mapping[str, float | Schedule] | None" = None,
        total_steps: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        listed = [teachers] if isinstance(teachers, nn.Module) else list(teachers)
        check_is_a_step(method)
        if method.teachers is not None and method.teachers != len(listed):
            raise InputError(
                f"{type(method).__name__} takes {method.teachers} teacher(s), and {len(listed)} are given", "teachers"
            )
        check_apart(student, listed)
        self.encoder = Encoder(student)
        self.method = method
        task, frozen = task_of(student), [frozen_teacher(student, teacher, f"teacher {n}") for n, teacher in enumerate(listed)]
        method.bind(Bound(self.encoder, frozen, task))
        check_is_a_step(method)  # the turns are known once it is bound
        method.to(next(student.parameters()).device)
        given = weights_of(method) if weights is None else weights
        schedules = {name: build_schedule_of(name, weight) for name, weight in given.items()}
        self.total_steps = total_steps
        if total_steps is None and (moving := scheduled(method, schedules)):
            raise InputError(f"{moving} is a schedule over training; give the number of optimiser steps", "total_steps")
        models = Models({"student": self.encoder}, {"student": method}, frozen, None, schedules)
        # A tuple, so that its modules are registered here alone. It has no trainer, and its optimiser is never made.
        self._engine = (Distiller(models, task, optimizer=None, seed=seed),)  # type: ignore[arg-type]
        self._pending: Any = None
        self.step = 0
        """Number of training steps so far; part of `state_dict()`."""
        self.train()

    @property
    def student(self) -> PreTrainedModel:
        """The student, a model of transformers, as it is trained: the method may have put modules of its own into it."""
        model: PreTrainedModel = self.encoder.model
        return model

    @property
    def teachers(self) -> list[PreTrainedModel]:
        """The teachers, frozen."""
        return [teacher.encoder.model for teacher in self._engine[0].teachers]

    def export(self) -> PreTrainedModel:
        """Return a copy of the student of modules of transformers and torch alone, which `from_pretrained` loads once saved."""
        return self.encoder.plain()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        token_type_ids: Tensor | None = None,
        teacher_inputs: Sequence[Mapping[str, Tensor]] | None = None,
        index: Tensor | None = None,
        progress: Progress | None = None,
    ) -> DistillationOutput:
        """Return the loss of a batch.

        In training mode each call is a step. What the method does after a step (`Method.after_step`), such as updating running
        statistics, is done by `after_step`, at the latest at the beginning of the next call.

        Args:
            input_ids: (batch, tokens).
            attention_mask: (batch, tokens), 1 for tokens that are not padding.
            labels: (batch,), class indices in the order of the student's outputs, or scores.
            token_type_ids: (batch, tokens).
            teacher_inputs: output of each teacher's tokenizer for the same examples, if it is not the student's. A method that
                compares states of tokens takes none.
            index: (batch,), numbers of the examples, which random draws of examples depend on; by default from 0, through the
                batches of all ranks, which are then of one size.
            progress: progress of training; by default that of `step` and `total_steps`. Pass it if gradients are accumulated.

        Raises:
            InputError: for labels of another shape, a teacher whose vocabulary is another and that gets no inputs of its own,
                or the reverse.
        """
        if labels.shape != input_ids.shape[:1]:  # a column of scores would be compared with every prediction of the batch
            raise InputError(f"there is one label for each of {len(input_ids)} examples, not {tuple(labels.shape)}", "labels")
        if self.training:
            self.after_step()
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        own = self._teacher_inputs(inputs, teacher_inputs)
        first = distributed.rank() * len(labels)
        numbers = torch.arange(first, first + len(labels), device=labels.device) if index is None else index
        now = Progress(self.step, self.total_steps or max(self.step, 1)) if progress is None else progress
        loss = self._engine[0].loss(Batch(inputs, own, labels, numbers), now)
        ((_, step, _),) = loss.steps
        if self.training:
            self.step += 1
            if type(self.method).after_step is not Method.after_step:  # otherwise the graph is not kept
                self._pending = loss
        return DistillationOutput(loss=loss.total, logits=step.student.outputs.logits, terms=dict(loss.terms))

    def after_step(self) -> None:
        """Let the method update what follows from the last training step, after the optimiser's; a second call does nothing."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._engine[0].after_step(pending)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state of student and method after the last step, `after_step` included."""
        self.after_step()
        return super().state_dict(*args, **kwargs)

    def get_extra_state(self) -> Tensor:
        """Return the number of steps, for `state_dict()`: a tensor, because files of safetensors have no others."""
        return torch.tensor(self.step)

    def set_extra_state(self, state: Tensor) -> None:
        """Set the number of steps, for `load_state_dict()`."""
        self.step = int(state)

    def _teacher_inputs(
        self, inputs: dict[str, Tensor], given: Sequence[Mapping[str, Tensor]] | None
    ) -> tuple[dict[str, Tensor], ...]:
        """Return the inputs of each teacher."""
        teachers = self._engine[0].teachers
        if given is None:
            for teacher in teachers:
                if teacher.shape.config.vocab_size != self.encoder.config.vocab_size:
                    raise InputError(
                        f"{teacher.name} has {teacher.shape.config.vocab_size} tokens and the student "
                        f"{self.encoder.config.vocab_size}: pass what its own tokenizer returns",
                        "teacher_inputs",
                    )
            return (inputs,) * len(teachers)
        if len(given) != len(teachers):
            raise InputError(f"there are inputs of {len(given)} teachers for {len(teachers)}", "teacher_inputs")
        if self.method.same_vocabulary or any(needs.tokens for needs in self.method.needs()[1]):
            raise InputError(f"{type(self.method).__name__} needs teachers that read the student's tokens", "teacher_inputs")
        return tuple(dict(one) for one in given)

    def _apply(self, fn: Any, recurse: bool = True) -> "Distillation":
        for teacher in self._engine[0].teachers:
            teacher.apply(fn)
        super()._apply(fn, recurse)
        return self


def check_is_a_step(method: Method) -> None:
    """Check that a method is a loss of single steps.

    Raises:
        InputError: naming what it needs besides.
    """
    name = type(method).__name__
    reasons = {
        "an optimiser step for each of its turns": len(method.turns()) > 1,
        f"a share of {method.holds:g} of train that is held out for its reward": bool(method.holds),
        "its teachers' outputs over all of train before it begins": method.prefits,
        f"frozen models besides teachers ({', '.join(method.aids)})": bool(method.aids),
        "other students, which learn at the same time": any(isinstance(module, Mutual) for module in method.modules()),
    }
    for reason, holds in reasons.items():
        if holds:
            raise InputError(
                f"{name} is more than the loss of a step, it needs {reason}; kd.run or kd-train trains it", "method"
            )


def check_apart(student: PreTrainedModel, teachers: Sequence[PreTrainedModel]) -> None:
    """Check that no parameter of the student is a teacher's: it would be frozen with it.

    Raises:
        InputError: naming the first one that is.
    """
    trained = dict(student.named_parameters())
    for number, teacher in enumerate(teachers):
        theirs = set(teacher.parameters())
        if shared := [name for name, parameter in trained.items() if parameter in theirs]:
            raise InputError(
                f"teacher {number} has {len(shared)} of the student's parameters, the first of them {shared[0]}, and would "
                "freeze them; make the student from a copy, copy.deepcopy(teacher)",
                "teachers",
            )


def task_of(student: PreTrainedModel) -> Classification | Regression:
    """Return the task that the configuration of a student describes.

    Raises:
        InputError: for several labels at once, or a model without a head for labels.
    """
    config = student.config
    if config.problem_type == "multi_label_classification" or not type(student).__name__.endswith("ForSequenceClassification"):
        raise InputError(
            f"a student is a ...ForSequenceClassification with one label for an example, not {type(student).__name__} "
            f"with problem_type={config.problem_type}",
            "student",
        )
    if config.num_labels == 1 or config.problem_type == "regression":
        return Regression("task", ["mse"], "mse")
    return Classification("task", labels_of(student), {}, ["accuracy"], "accuracy")


def labels_of(model: PreTrainedModel) -> list[str]:
    """Return the names of a model's classes, in the order of its outputs."""
    config: Any = model.config
    return [str(config.id2label[number]) for number in range(config.num_labels)]


def frozen_teacher(student: PreTrainedModel, teacher: PreTrainedModel, name: str) -> FrozenTeacher:
    """Return a teacher, frozen, with its logits in the order of the student's classes.

    Raises:
        InputError: if their classes are not the same.
    """
    ours, theirs = labels_of(student), labels_of(teacher)
    if len(ours) == len(theirs) == 1:
        return FrozenTeacher(Encoder(teacher), name)
    order = columns(ours, theirs)
    if order is None:
        raise InputError(
            f"the student's classes are {ours}, those of {name} {theirs}: they are matched by name. Set id2label and label2id "
            "of the configuration whose names are wrong",
            "teachers",
        )
    return FrozenTeacher(Encoder(teacher), name, order)


def weights_of(method: Method) -> Mapping[str, Any]:
    """Return the weights of a method's file in `conf/method`: of the run, its own or the first one, that has these terms.

    Args:
        method: the method, bound, which has its terms.

    Raises:
        InputError: if there is no such file, or none of its runs has this class with these terms.
    """
    kind = type(method)
    path = conf_folder() / "method" / f"{kind.__module__.rpartition('.')[2]}.yaml"
    content: Any = OmegaConf.load(path) if path.is_file() else OmegaConf.create()
    nodes: list[Any] = [content, content.get("before") or {}]
    for node in nodes:
        if node.get("_target_") == f"{kind.__module__}.{kind.__qualname__}" and set(node.weights) == set(method.names):
            weights: Mapping[str, Any] = OmegaConf.to_container(node.weights)  # type: ignore[assignment]
            return weights
    raise InputError(
        f"conf/method has no weights of {kind.__name__} for the terms {', '.join(method.names)}: give them", "weights"
    )


def build_schedule_of(name: str, weight: Any) -> Schedule:
    """Return a weight as a schedule.

    Raises:
        InputError: for anything but a number or a schedule, or a number that is out of range.
    """
    try:
        return build_schedule(weight, f"weights.{name}")
    except InputError as error:
        raise InputError(error.message, f"weights.{name}") from error


def scheduled(method: Method, weights: Mapping[str, Schedule]) -> str | None:
    """Return the name of a weight, or of an option of a method, that changes during training; None if none does."""
    options = {name: value for module in method.modules() for name, value in vars(module).items()}
    named = {**{f"weights.{name}": weight for name, weight in weights.items()}, **options}
    nodes = {name: value for name, value in named.items() if isinstance(value, ScheduleNode) or name.startswith("weights.")}
    return next((name for name, node in nodes.items() if len(set(extremes(node))) > 1), None)
