"""One student, any number of frozen teachers, one optimiser."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from kd.data.batch import Batch
from kd.data.tasks import Task
from kd.errors import InputError
from kd.evaluate import finite_or_none
from kd.forward import Forward, Needs
from kd.methods.base import Method, Progress, Step
from kd.models import Encoder, FrozenTeacher
from kd.optimizers import OptimizerFactory
from kd.schedules import Schedule


class NonFiniteLoss(InputError):
    """A term became NaN or infinite. Training stops; the last good checkpoint is kept."""

    def __init__(self, terms: Mapping[str, float], step: int) -> None:
        bad = [name for name, value in terms.items() if not torch.isfinite(torch.tensor(value))]
        shown = ", ".join(f"{name}={value:g}" for name, value in terms.items())
        super().__init__(
            f"the loss is not finite at step {step}: term {' and '.join(f'{name!r}' for name in bad) or 'sum'} ({shown}). "
            "Training stopped; the last checkpoint before it is kept. A smaller learning rate, or a smaller weight "
            "for that term, is the usual cure",
            "optimizer.lr",
        )
        self.terms, self.step = dict(terms), step


def check_weights(names: Sequence[str], weights: Mapping[str, Any]) -> None:
    """Every weight has its term and every term its weight.

    Raises:
        InputError: naming the ones that do not.
    """
    if spare := [name for name in weights if name not in names]:
        raise InputError(
            f"the weight '{spare[0]}' has no term; the terms of this method are {', '.join(names)}",
            f"method.weights.{spare[0]}",
        )
    if lacking := [name for name in names if name not in weights]:
        raise InputError(f"the term '{lacking[0]}' has no weight", f"method.weights.{lacking[0]}")


@dataclass
class Loss:
    """The weighted sum, and the raw terms it was made from."""

    total: Tensor
    terms: dict[str, Tensor]
    step: Step


class Distiller(pl.LightningModule):
    """Trains a student by the weighted sum of a method's terms.

    Student and method are submodules, so DDP synchronises both; teachers ride along outside.

    Args:
        student: trained.
        teachers: frozen; may be empty.
        method: bound to these models.
        task: losses and metrics.
        weights: term -> schedule.
        optimizer: factory.
        seed: every random draw of a training step follows from it, the rank and the step.
    """

    def __init__(
        self,
        student: Encoder,
        teachers: Sequence[FrozenTeacher],
        method: Method,
        task: Task,
        weights: Mapping[str, Schedule],
        optimizer: OptimizerFactory,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_weights(method.names, weights)
        self.student = student
        self.method = method
        self.teachers = list(teachers)  # a plain list on purpose: not submodules
        self.task = task
        self.weights = dict(weights)
        self.optimizer_factory = optimizer
        self.seed = seed
        self.metrics = torch.nn.ModuleDict()
        self.seconds = 0.0
        self.examples = 0
        self.teacher_examples = 0
        self.validation: dict[str, float | None] = {}
        self._began = 0.0
        self._last: tuple[Step, dict[str, Tensor]] | None = None

    # -- the loss, without a trainer ---------------------------------------------------------------------------------

    def step(self, batch: Batch, progress: Progress) -> Step:
        """A step over a batch: forwards bound to inputs and needs, none of them run."""
        ours, theirs = self.method.needs()
        forwards = [
            Forward(teacher, inputs, needs)
            for teacher, inputs, needs in zip(self.teachers, batch.teachers, theirs or cycle([Needs()]), strict=False)
        ]
        student, task = Forward(self.student, batch.student, ours), self.task.of(batch.labels)
        return Step(student, forwards, batch, task, progress, seed=self.seed)

    def loss(self, batch: Batch, progress: Progress | None = None) -> Loss:
        """The weighted sum of the method's terms over a batch."""
        progress = progress or Progress()
        step = self.method.prepare(self.step(batch, progress))
        terms = self.method.terms(step)
        check_weights(list(terms), self.weights)
        total = sum(self.weights[name](progress.fraction) * term for name, term in terms.items())
        assert isinstance(total, Tensor)
        return Loss(total, terms, step)

    # -- Lightning ---------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One batch. Logs every term raw, and the sum.

        Raises:
            NonFiniteLoss: naming the term and the step.
        """
        loss = self.loss(batch, self.progress())
        terms = {name: term.detach() for name, term in loss.terms.items()}
        if not torch.isfinite(loss.total):
            raise NonFiniteLoss({name: float(term) for name, term in terms.items()}, self.global_step)
        self.log_dict({f"train/{name}": term for name, term in terms.items()}, batch_size=len(batch))
        self.log("train/loss", loss.total.detach(), batch_size=len(batch))
        self._last = (loss.step, terms)
        return loss.total * batch.weight

    def progress(self) -> Progress:
        """How far training has come."""
        return Progress(self.global_step, int(self.trainer.estimated_stepping_batches), self.current_epoch)

    def on_train_epoch_start(self) -> None:
        """A model from `from_pretrained` is in eval mode, and Lightning does not change that."""
        self.train()

    def on_train_start(self) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Dropout is a function of seed, rank, epoch and batch: a resumed run draws what an unbroken one draws."""
        place = [self.seed, self.global_rank, self.current_epoch, batch_idx]
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Delayed work of the method, and the clock."""
        if self._last is not None:
            self.method.after_step(*self._last)
            self._last = None
        now = time.perf_counter()
        self.seconds, self._began = self.seconds + now - self._began, now
        self.examples += len(batch)

    def on_train_end(self) -> None:
        """Stop the clock; validation and checkpoints count as training time."""
        self.seconds += time.perf_counter() - self._began
        self.teacher_examples += sum(teacher.examples for teacher in self.teachers)

    def on_validation_epoch_start(self) -> None:
        """Fresh metrics."""
        self._reset("validation")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The student alone; the teacher has nothing new to say about it."""
        logits = self.student(batch.student, Needs()).logits
        self._update("validation", logits, batch.labels)

    def on_validation_epoch_end(self) -> None:
        """Log what was reduced over exactly the examples there are."""
        found = self._compute("validation")
        self.log_dict({f"validation/{name}": value for name, value in found.items()})
        self.validation = {name: finite_or_none(float(value)) for name, value in found.items()}

    def configure_optimizers(self) -> Any:
        """The factory's optimiser over student and method, stepped every optimiser step."""
        optimizer = self.optimizer_factory.optimizer(self.student, self.method)
        total = int(self.trainer.estimated_stepping_batches)
        scheduler = self.optimizer_factory.scheduler(optimizer, total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the norm over all parameters.

        Lightning's mixed-precision plugin refuses to clip for a fused optimiser, because with a gradient scaler it would clip
        scaled gradients. bfloat16 has no scaler, so there is nothing to refuse.
        """
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Counters, so that a resumed run reports its whole cost."""
        done = self.teacher_examples + sum(teacher.examples for teacher in self.teachers)
        checkpoint["kd"] = {
            "seconds": self.seconds,
            "examples": self.examples,
            "teacher_examples": done,
            "validation": self.validation,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the counters up again."""
        kept = checkpoint.get("kd", {})
        self.seconds = kept.get("seconds", 0.0)
        self.examples = kept.get("examples", 0)
        self.teacher_examples = kept.get("teacher_examples", 0)
        self.validation = kept.get("validation", {})

    def _apply(self, fn: Any, recurse: bool = True) -> "Distiller":
        for teacher in self.teachers:
            teacher.apply(fn)
        super()._apply(fn, recurse)
        return self

    # -- metrics -----------------------------------------------------------------------------------------------------

    def _reset(self, split: str) -> None:
        if split not in self.metrics:
            self.metrics[split] = torch.nn.ModuleDict({name: self.task.metric(name) for name in self.task.metrics})
        for metric in self.metrics[split].values():  # type: ignore[operator,union-attr]
            metric.to(self.device).reset()

    def _update(self, split: str, logits: Tensor, labels: Tensor) -> None:
        self.task.score(self.metrics[split], logits, labels)  # type: ignore[arg-type]

    def _compute(self, split: str) -> dict[str, Tensor]:
        metrics = self.metrics[split].items()  # type: ignore[operator,union-attr]
        return {name: metric.compute() for name, metric in metrics}
