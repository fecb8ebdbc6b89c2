"""Distillation with the Trainer of transformers."""

import importlib.util
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from kd.api.distillation import Distillation
from kd.errors import InputError
from kd.methods.base import Progress


class DistillationTrainer(Trainer):
    """Trainer of transformers for a `Distillation`: it passes the progress of training, and logs the terms beside the loss.

    The loss is the mean over a batch, which the Trainer divides by `gradient_accumulation_steps`. Checkpoints have the student
    and what the method trains; `trainer.distillation.export().save_pretrained(folder)` is the student alone.

    Args:
        model: the loss, with student and teachers.
        args: arguments of the Trainer.
        **more: further arguments of the Trainer.

    Raises:
        InputError: if accelerate is not installed, for a loss of other arguments, or several GPUs in one process.
    """

    def __init__(self, model: Distillation, args: TrainingArguments | None = None, **more: Any) -> None:
        if importlib.util.find_spec("accelerate") is None:
            raise InputError("the Trainer of transformers needs accelerate, which is not installed: pip install 'kd[trainer]'")
        if more.get("compute_loss_func") is not None or (args is not None and args.label_smoothing_factor):
            raise InputError("the loss is the method's: leave compute_loss_func and label_smoothing_factor out", "args")
        super().__init__(model=model, args=args, **more)
        if self.args.n_gpu > 1:
            raise InputError(
                "several GPUs need a process each, as torchrun starts them: frozen teachers are no replicas", "args"
            )
        self.add_callback(AfterStep(model))
        self._sums: dict[str, Tensor] = {}
        self._counts = 0

    @property
    def distillation(self) -> Distillation:
        """The loss, with student and teachers."""
        model: Distillation = self.accelerator.unwrap_model(self.model)
        return model

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the loss of a batch, with the outputs if they are asked for."""
        state = self.state
        progress = Progress(state.global_step, max(state.max_steps, 1), int(state.epoch or 0))
        output = model(**inputs, progress=progress)
        if model.training:
            for name, term in output.terms.items():
                self._sums[name] = self._sums.get(name, 0) + term.detach()
            self._counts += 1
        return (output.loss, {"loss": output.loss, "logits": output.logits}) if return_outputs else output.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the mean of each term since the last log, over all ranks as the loss is."""
        if "loss" in logs and self._counts:
            means = {name: total / self._counts for name, total in self._sums.items()}
            logs |= {name: float(mean) for name, mean in self.accelerator.reduce(means, "mean").items()}
            self._sums, self._counts = {}, 0
        super().log(logs, start_time)


class AfterStep(TrainerCallback):
    """Callback that lets the method update what follows from a batch when it is over, before anything is written.

    Args:
        distillation: the loss.
    """

    def __init__(self, distillation: Distillation) -> None:
        self.distillation = distillation

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        """Finish a batch whose gradients are accumulated."""
        self.distillation.after_step()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Finish the batch of an optimiser step."""
        self.distillation.after_step()
