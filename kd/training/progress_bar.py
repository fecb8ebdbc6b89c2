"""Progress bar and progress lines of training."""

import shutil
import sys
import time
from typing import NoReturn

import lightning.pytorch as pl
from lightning.pytorch.utilities.types import STEP_OUTPUT
from tqdm.auto import tqdm

from kd.data.batch import Batch
from kd.results.tables import score

PLAIN_SECONDS = 20.0
"""Seconds between lines if the output is not a terminal."""

FORMAT = "{desc} {percentage:3.0f}%|{bar:6}| {n_fmt}/{total_fmt} {remaining} left {rate_fmt}{postfix}"
BESIDE_LABEL = 47
"""Format of the bar, and characters of it beside label and terms: a bar is one line, and is cut where a terminal ends."""


def shortened(label: str, room: int) -> str:
    """Return a label that fits into a number of characters, without its middle.

    >>> shortened("pkd-3l-rte-s0-0123456789ab", 15), shortened("pkd", 15)
    ('pkd-3l-…456789ab', 'pkd')
    """
    return label if len(label) <= room else f"{label[: room // 2]}…{label[len(label) - (room - room // 2) :]}"


def fitting(words: str, room: int) -> str:
    """Return as many words as fit into a number of characters, whole: a number that is cut would be another one.

    >>> fitting("task=0.51 hidden=0.127", 15)
    'task=0.51'
    """
    while words and len(words) > room:
        words = words.rpartition(" ")[0]
    return words


class ProgressBar(pl.Callback):
    """Progress bar over the whole training: loss terms, rate and time left; without a terminal, a line at intervals.

    Args:
        label: description of the bar.
        mode: `bar`, `plain`, `none`, or `auto` (a bar on a terminal).
        cure: advice to print if a student's predictions are constant; None prints none.
    """

    def __init__(self, label: str, mode: str = "auto", cure: str | None = None) -> None:
        self.label, self.cure = label, cure
        self._warned = False
        self.mode = ("bar" if sys.stderr.isatty() else "plain") if mode == "auto" else mode
        self.bar: tqdm[NoReturn] | None = None
        self._began = self._shown = 0.0
        self._first = 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Open the bar."""
        self._began = self._shown = time.monotonic()
        self._first = trainer.global_step
        if self.mode == "bar" and trainer.is_global_zero:
            self.bar = tqdm(
                total=int(trainer.estimated_stepping_batches),
                initial=trainer.global_step,
                desc=shortened(self.label, self._columns() // 4),
                unit=" steps",
                bar_format=FORMAT,
                dynamic_ncols=True,
                smoothing=0.05,
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        """Advance the bar; read the loss terms only when they are shown, because reading them waits for the device."""
        if not trainer.is_global_zero or self.mode == "none":
            return
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(trainer.global_step - self.bar.n)
            if now - self._shown > 0.5:
                self._shown = now
                label = shortened(self.label, self._columns() // 4)
                self.bar.set_description_str(label, refresh=False)
                self.bar.set_postfix_str(fitting(self._words(trainer), self._columns() - len(label) - BESIDE_LABEL))
        elif now - self._shown > PLAIN_SECONDS:
            self._shown = now
            total = int(trainer.estimated_stepping_batches)
            done = trainer.global_step
            left = (now - self._began) * (total - done) / max(done - self._first, 1)
            print(f"{self.label}: step {done}/{total}  {self._words(trainer)}  {left:.0f} s left", flush=True)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Print a line per epoch with the validation metrics, and once a warning about constant predictions."""
        if trainer.is_global_zero and not trainer.sanity_checking and self.mode != "none":
            metrics = {k.removeprefix("validation/"): v for k, v in trainer.callback_metrics.items() if k.startswith("val")}
            words = "  ".join(f"{name} {score(name.rpartition('/')[2], float(value))}" for name, value in metrics.items())
            line = f"{self.label}: epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  validation {words}"
            constant = getattr(module, "constant", {})
            if constant and not self._warned:  # once a run
                self._warned = True
                several = len(getattr(module, "learners", constant)) > 1
                whose = [f"{name}: {what}" if several else what for name, what in constant.items()]
                line += f"  WARN {'; '.join(whose)}" + (f". Try {self.cure}" if self.cure is not None else "")
            self.bar.write(line, file=sys.stdout) if self.bar is not None else print(line, flush=True)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Close the bar."""
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    @staticmethod
    def _columns() -> int:
        """Return the width of the terminal."""
        return shutil.get_terminal_size().columns

    def _words(self, trainer: pl.Trainer) -> str:
        shown = {k.removeprefix("train/"): v for k, v in trainer.callback_metrics.items() if k.startswith("train/")}
        return " ".join(f"{name}={float(value):.3g}" for name, value in shown.items())
