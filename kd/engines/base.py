"""Base class of the engines: training time, counters, metrics and optimiser; subclasses define the training step."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kd.data.batch import Batch
from kd.data.metrics import finite_or_none
from kd.data.tasks import Task, headline
from kd.engines.models import Models
from kd.engines.nonfinite import NonFiniteGuard, check_weights_finite, clip_gradients
from kd.engines.optimizer import OptimizerFactory
from kd.errors import InputError
from kd.forward import Needs
from kd.methods.base import Method, Progress, Step
from kd.models import Encoder, FrozenTeacher
from kd.system import distributed, hardware


def check_terms(names: Sequence[str], weights: Mapping[str, Any]) -> None:
    """Check that every weight of a loss has its term, and every term its weight.

    Raises:
        InputError: naming the first that does not.
    """
    if spare := [name for name in weights if name not in names]:
        raise InputError(
            f"the weight '{spare[0]}' has no term; the terms of this method are {', '.join(names)}",
            f"method.weights.{spare[0]}",
        )
    if lacking := [name for name in names if name not in weights]:
        raise InputError(f"the term '{lacking[0]}' has no weight", f"method.weights.{lacking[0]}")


def in_words(collapse: Sequence[float], labels: Sequence[str] | None) -> str:
    """Describe the result of `kd.data.metrics.Collapse.compute`.

    >>> in_words([1, 1, 0, 0.5], ["bad", "good"])
    "every prediction is 'good'"
    """
    _, least, predicted, expected = collapse
    if labels is None:
        return f"predicted scores hardly differ (standard deviation {predicted:.3g}, that of the labels {expected:.3g})"
    return f"every prediction is '{labels[int(least)]}'"


def work_of_all(ranks: Sequence[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    """Combine the teachers' counts of all ranks: examples are summed; passes and batches used are the maximum over ranks.

    Args:
        ranks: result of `Engine.work_of_teachers` on each rank.

    >>> one = {"passes": 2, "examples": 8, "batches_used": 2}
    >>> work_of_all([{"a": one}, {"a": {**one, "examples": 7}}])
    {'a': {'passes': 2, 'examples': 15, 'batches_used': 2}}
    """
    return {
        name: {kind: (sum if kind == "examples" else max)(work[name][kind] for work in ranks) for kind in kinds}
        for name, kinds in ranks[0].items()
    }


@dataclass
class Learner:
    """A student and the method that is bound to it."""

    student: Encoder
    method: Method

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Trainable parameters of both, without duplicates."""
        both = (*self.student.parameters(), *self.method.parameters())
        return list(dict.fromkeys(parameter for parameter in both if parameter.requires_grad))


@dataclass
class Loss:
    """Weighted sum of loss terms, the unweighted terms, and their origin: a (method, step, terms) for each method."""

    total: Tensor
    terms: dict[str, Tensor]
    steps: list[tuple[Method, Step, dict[str, Tensor]]] = field(default_factory=list)

    @classmethod
    def sum(cls, losses: "Sequence[Loss]") -> "Loss":
        """Return the sum of losses. Of a method that several are from, the last step counts, with all its terms."""
        if len(losses) == 1:
            return losses[0]
        steps: dict[Method, tuple[Method, Step, dict[str, Tensor]]] = {}
        for method, step, terms in (each for loss in losses for each in loss.steps):
            steps[method] = (method, step, {**(steps[method][2] if method in steps else {}), **terms})
        total = torch.stack([loss.total for loss in losses]).sum()
        return cls(total, {name: term for loss in losses for name, term in loss.terms.items()}, list(steps.values()))

    def detached(self) -> "Loss":
        """Return the loss without its graph."""
        steps = [(method, step, detach(terms)) for method, step, terms in self.steps]
        return Loss(self.total.detach(), detach(self.terms), steps)


def detach(terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return loss terms without their graphs."""
    return {name: term.detach() for name, term in terms.items()}


class Engine(pl.LightningModule):
    """LightningModule that trains students on the weighted sums of their methods' terms.

    Students and methods are submodules, so DDP synchronises both; frozen teachers are not submodules.

    Args:
        models: students, methods bound to them, teachers, and weights of the terms.
        task: losses and metrics.
        optimizer: factory.
        seed: every random draw of a training step follows from it, the rank and the step.
        clip: largest gradient norm of one learner; None does not clip. Only for engines that step the optimiser themselves:
            for the others the trainer clips.
    """

    idles = False
    """True if a training step leaves some trainable parameters without a gradient."""

    def __init__(
        self,
        models: Models,
        task: Task,
        optimizer: OptimizerFactory,
        seed: int = 0,
        clip: float | None = None,
    ) -> None:
        super().__init__()
        self.teachers = list(models.teachers)  # a plain list, so that they are not registered as submodules
        self.aids = dict(models.aids)  # a plain mapping, for the same reason
        self.task = task
        self.weights = dict(models.weights)
        self.optimizer_factory = optimizer
        self.seed, self.clip = seed, clip
        self.metrics = nn.ModuleDict()
        self.seconds = 0.0
        self.examples = 0
        self.teacher_work: dict[str, dict[str, int]] = {}
        self.resumed: list[int] = []
        """Optimiser steps of the checkpoints that training was resumed from."""
        self.filled = self.work_of_teachers()
        """Counts of each teacher that filling caches took; they are not part of training and not saved in checkpoints."""
        self.validation: dict[str, dict[str, float | None]] = {}
        """Metrics of the last validation: student -> metric -> value; None for a value that is not finite."""
        self.collapse = nn.ModuleDict()
        self.constant: dict[str, str] = {}
        """Students whose predictions in the last validation were all alike: student -> description."""
        self._began = 0.0
        self._last: Loss | None = None
        self.guard = NonFiniteGuard()

    @property
    def learners(self) -> Mapping[str, Learner]:
        """Students with their methods by name, in the order of `Batch.students`."""
        raise NotImplementedError

    def loss(self, batch: Batch, progress: Progress | None = None) -> Loss:
        """Compute the loss of a batch. Needs no trainer."""
        raise NotImplementedError

    def trained(self) -> list[list[nn.Parameter]]:
        """Return the trainable parameters in groups whose gradients are clipped together, one for each learner."""
        return [learner.parameters for learner in self.learners.values()]

    def weight_of(self, name: str, progress: Progress) -> float:
        """Return the weight of a logged term, whose name is `student/term` if there are several students."""
        return self.weights[name.rpartition("/")[2]](progress.fraction)

    def weighted(self, terms: Mapping[str, Tensor], progress: Progress) -> Tensor:
        """Return the weighted sum of terms of one method.

        Raises:
            InputError: for a term that has no weight.
        """
        check_terms(list(terms), {name: weight for name, weight in self.weights.items() if name in terms})
        total = sum(self.weights[name](progress.fraction) * term for name, term in terms.items())
        assert isinstance(total, Tensor)
        return total

    # -- Lightning ---------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Compute the loss of one batch, and log every unweighted term and the weighted sum.

        The trainer divides the returned loss by `trainer.accumulate`. With the batch's weight the gradient of an optimiser
        step is that of the mean over its examples, also in the last step of an epoch, which may accumulate fewer batches.

        Raises:
            NonFiniteLoss: naming the term and the step.
        """
        loss = self.loss(batch, self.progress())
        self.check(loss)
        self.note(loss, batch)
        return loss.total * batch.weight

    def check(self, loss: Loss) -> None:
        """Raise for a loss that is not finite: on the CPU before the optimiser step, elsewhere before anything is written.

        Raises:
            NonFiniteLoss: naming the term and the step.
        """
        self.guard.record(loss.total, loss.terms, self.global_step)

    def flush(self) -> None:
        """Check the losses that were not checked yet, and the weights, before the weights are scored or written.

        Raises:
            NonFiniteLoss: naming the term and the step.
            NonFiniteWeights: naming the first parameter.
        """
        self.guard.flush()
        check_weights_finite(self.named_parameters(), self.global_step)

    def note(self, loss: Loss, batch: Batch) -> None:
        """Log a loss, and store it for `Method.after_step`."""
        if self.trainer._logger_connector.should_update_logs:  # otherwise Lightning stores values that are never logged
            named = {**loss.terms, "loss": loss.total}
            self.log_dict({f"train/{name}": value.detach() for name, value in named.items()}, batch_size=len(batch))
        self._last = loss

    def progress(self) -> Progress:
        """Return the progress of training."""
        return Progress(self.global_step, int(self.trainer.estimated_stepping_batches), self.current_epoch)

    def on_train_epoch_start(self) -> None:
        """Switch to training mode: a model from `from_pretrained` is in eval mode, and Lightning does not change that."""
        self.train()

    def on_train_start(self) -> None:
        """Start to measure the training time."""
        self._began = time.perf_counter()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed torch from seed, rank, epoch and batch, so that a resumed run has the dropout masks of an uninterrupted one."""
        entropy = [self.seed, self.global_rank, self.current_epoch, batch_idx]
        hardware.seed_torch(int(np.random.SeedSequence(entropy).generate_state(1)[0]), self.device)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Finish the batch, unless a callback did so already."""
        self.finish_batch(batch)

    def finish_batch(self, batch: Batch) -> None:
        """Call the methods' `after_step` and update time and counters; a second call for the same batch does nothing.

        Lightning calls the engine's hooks after those of the callbacks; a callback that saves a checkpoint calls this first.
        """
        if self._last is None:
            return
        self.after_step(self._last)
        self._last = None
        now = time.perf_counter()
        self.seconds, self._began = self.seconds + now - self._began, now
        self.examples += len(batch)

    def after_step(self, loss: Loss) -> None:
        """Call `after_step` of the methods that a loss is from, after the optimiser step if any."""
        for method, step, terms in loss.steps:
            method.after_step(step, detach(terms))

    def on_train_end(self) -> None:
        """Check the last losses and stop measuring the training time, which includes validation and checkpoints."""
        self.guard.flush()
        self.seconds, self._began = self.elapsed, 0.0
        self.teacher_work = self.work_of_teachers()

    @property
    def elapsed(self) -> float:
        """Seconds of training so far, including the time since the last batch ended."""
        return self.seconds + (time.perf_counter() - self._began if self._began else 0.0)

    def work_of_teachers(self) -> dict[str, dict[str, int]]:
        """Return each teacher's counts of passes, examples and batches used so far, on this rank, by name."""
        return {name: teacher.work for name, teacher in self.counted.items()}

    @property
    def counted(self) -> dict[str, FrozenTeacher]:
        """Teachers whose work is counted, by name."""
        return {teacher.name: teacher for teacher in self.teachers}

    def on_validation_epoch_start(self) -> None:
        """Check losses and weights, and reset the metrics.

        Raises:
            NonFiniteLoss: for a loss that is not finite.
            NonFiniteWeights: for weights that are not finite.
        """
        self.flush()
        self.begin_validation()

    def begin_validation(self) -> None:
        """Reset the metrics."""
        for name in self.evaluated:
            self._reset(name)
        for name in self.learners:
            if (metric := self.task.collapse()) is not None:
                self.collapse[f"of-{name}"] = metric.to(self.device)

    @property
    def evaluated(self) -> list[str]:
        """Names of the models that validation scores: each student, and their ensemble if there are several."""
        names = list(self.learners)
        return names if len(names) == 1 else [*names, "ensemble"]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Score the students; frozen teachers are not run, because their predictions do not change in training."""
        learners = self.learners.items()
        logits = {
            name: learner.student(inputs, Needs()).logits
            for (name, learner), inputs in zip(learners, batch.students, strict=True)
        }
        if len(logits) > 1:
            logits["ensemble"] = self.task.ensemble(list(logits.values()))
        for name, predicted in logits.items():
            self._update(name, predicted, batch.labels)

    def on_validation_epoch_end(self) -> None:
        """Log metrics over the validation examples, none counted twice; the best student's are logged as the run's."""
        results, self.constant = self.end_validation()
        scores = {name: {m: finite_or_none(float(v)) for m, v in metrics.items()} for name, metrics in results.items()}
        best = headline(self.task, {name: scores[name] for name in self.learners})
        self.log_dict({f"validation/{metric}": value for metric, value in results[best].items()})
        if len(results) > 1:
            self.log_dict({f"validation/{name}/{m}": value for name, values in results.items() for m, value in values.items()})
        self.validation = scores

    def end_validation(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
        """Return the metrics of each model that was scored, by name, and descriptions of students that predict one class."""
        results = {name: self.compute_metrics(name) for name in self.evaluated}
        collapses = {name.removeprefix("of-"): metric.compute().tolist() for name, metric in self.collapse.items()}  # type: ignore[operator]
        return results, {name: in_words(value, self.task.labels) for name, value in collapses.items() if value[0]}

    def rates(self) -> Mapping[nn.Parameter, float]:
        """Return the peak learning rates of parameters that do not have the run's."""
        return {}

    def optimizer(self) -> Optimizer:
        """Create the factory's optimiser over all trained parameters."""
        return self.optimizer_factory.optimizer(self, rates=self.rates())

    def configure_optimizers(self) -> Any:
        """Return the factory's optimiser over all trained parameters, and its schedule in optimiser steps."""
        optimizer = self.optimizer()
        total = int(self.trainer.estimated_stepping_batches)
        scheduler = self.optimizer_factory.scheduler(optimizer, total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the gradient norm of each learner separately.

        Lightning's mixed-precision plugin refuses to clip for a fused optimiser, because with a gradient scaler it would clip
        scaled gradients. bfloat16 uses no scaler, so clipping is safe; with a scaler the plugin has already unscaled them.
        """
        if gradient_clip_val:
            plugin = self._trainer and self._trainer.precision_plugin  # without a trainer there is no scaler
            scaled = getattr(plugin, "scaler", None) is not None  # a scaler skips a step whose gradients overflow
            for parameters in self.trained():
                norm = clip_gradients(parameters, float(gradient_clip_val))
                if not scaled:
                    self.guard.check_gradient(norm, self.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check losses and weights, then add the counters, so that a resumed run reports its whole cost.

        Raises:
            NonFiniteLoss: naming the term and the step.
            NonFiniteWeights: naming the first parameter.
        """
        self.flush()
        trained = {
            name: {kind: count - self.filled.get(name, {}).get(kind, 0) for kind, count in work.items()}
            for name, work in self.work_of_teachers().items()
        }
        ranks = distributed.gather((self.examples, trained))
        checkpoint["kd"] = {
            "seconds": self.elapsed,
            "examples": sum(examples for examples, _ in ranks),
            "teacher_work": work_of_all([work for _, work in ranks]),
            "validation": self.validation,
            "resumed": self.resumed,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counters; rank zero gets the totals of all ranks."""
        saved = checkpoint.get("kd", {})
        self.seconds = saved.get("seconds", 0.0)
        self.validation = saved.get("validation", {})
        self.resumed = [*saved.get("resumed", []), int(checkpoint.get("global_step", 0))]
        if distributed.is_rank_zero():
            self.examples = saved.get("examples", 0)
            for name, teacher in self.counted.items():
                before = saved.get("teacher_work", {}).get(name, {})
                # Added to the counts of a cache that this run had to fill again.
                teacher.work = {kind: count + before.get(kind, 0) for kind, count in teacher.work.items()}
        self.teacher_work = self.work_of_teachers()

    def _apply(self, fn: Any, recurse: bool = True) -> "Engine":
        for frozen in (*self.teachers, *self.aids.values()):
            frozen.apply(fn)
        super()._apply(fn, recurse)
        return self

    # -- metrics -----------------------------------------------------------------------------------------------------

    def _reset(self, name: str) -> None:
        key = f"of-{name}"  # prefixed, because a ModuleDict rejects names of its own attributes
        if key not in self.metrics:
            self.metrics[key] = nn.ModuleDict({metric: self.task.metric(metric) for metric in self.task.metrics})
        for metric in self.metrics[key].values():  # type: ignore[operator,union-attr]
            metric.to(self.device).reset()

    def _update(self, name: str, logits: Tensor, labels: Tensor) -> None:
        self.task.score(self.metrics[f"of-{name}"], logits.float(), labels)  # type: ignore[arg-type]
        if f"of-{name}" in self.collapse:
            self.collapse[f"of-{name}"].update(self.task.predict(logits.float()), labels)  # type: ignore[operator]

    def compute_metrics(self, name: str) -> dict[str, Tensor]:
        """Return the task's metrics of one model over the examples that were scored since the last reset: scalars by name."""
        metrics = self.metrics[f"of-{name}"].items()  # type: ignore[operator,union-attr]
        return {name: metric.compute() for name, metric in metrics}
