"""The callback that reports the scores of a run's epochs, and stops the run if its trial is pruned."""

from collections.abc import Callable

import lightning.pytorch as pl

from kd.engines.base import Engine


class Pruned(Exception):
    """Error that stops the run of a pruned trial, after the checkpoint of an epoch."""


class EpochScores(pl.Callback):
    """Report of the monitored validation score after each epoch.

    A run is stopped at the beginning of the next epoch, when `last.ckpt` holds the state from which it would resume. After its
    last epoch it is not stopped, because nothing would be saved.

    Args:
        report: takes the number of an epoch, from 1, and its score; returns whether to stop.

    Raises:
        Pruned: in the training, to stop it.
    """

    def __init__(self, report: Callable[[int, float], bool]) -> None:
        self.report, self.stops = report, False

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report the score."""
        assert isinstance(pl_module, Engine)
        score = trainer.callback_metrics[f"validation/{pl_module.task.monitor}"]
        self.stops = self.report(trainer.current_epoch + 1, float(score))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop, if the score of the epoch before was too low."""
        if self.stops:
            raise Pruned
