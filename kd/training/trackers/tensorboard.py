"""Event files of TensorBoard."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

from kd.results.summary import summary
from kd.training.trackers.base import TrackedRun, Tracker, check_options, import_package


class TensorBoardTracker(Tracker, TensorBoardLogger):
    """Event files in the folder `tensorboard` of the run: `tensorboard --logdir runs` shows all runs.

    Each start adds files. TensorBoard drops the steps of an earlier start that this one logs again (`purge_step`).

    Args:
        run: the run.
        options: further arguments of `torch.utils.tensorboard.SummaryWriter`.

    Raises:
        InputError: if tensorboard is not installed.
    """

    def __init__(self, run: TrackedRun, **options: Any) -> None:
        import_package("tensorboard")
        self.tracked, self.options = run, options
        super().__init__(
            run.folder, name="", version="tensorboard", default_hp_metric=False, **{"purge_step": run.first_step, **options}
        )
        self.hparams = dict(run.config)  # which Lightning writes to hparams.yaml

    def check(self) -> None:
        """Check that the writer takes the options.

        Raises:
            InputError: naming one that it does not take.
        """
        from torch.utils.tensorboard import SummaryWriter

        check_options(SummaryWriter, self.options, "SummaryWriter")

    def conclude(self, record: Mapping[str, Any], notes: Mapping[str, str]) -> None:
        """Add the configuration and the summary, as `result/test/accuracy`, to the table of hyper-parameters, and the notes."""
        step, values = record["steps"], {f"result/{name}": value for name, value in summary(record).items()}
        self.log_hyperparams(dict(self.tracked.config), values, step)
        for name, text in notes.items():
            self.experiment.add_text(f"method/{name}", text, step)

    def close(self, *, failed: bool) -> None:
        """Close the file, if there is one."""
        self.finalize("failed" if failed else "success")
