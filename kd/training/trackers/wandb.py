"""Runs of Weights & Biases."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger

from kd.config.values import one_line, shown
from kd.errors import InputError
from kd.results.summary import COLUMNS, result_rows, summary
from kd.training.trackers.base import FILES, TrackedRun, Tracker, check_options, import_package


class WandbTracker(Tracker, WandbLogger):
    """A run of Weights & Biases: online with an account, offline without one (`wandb sync` sends it later).

    Its id is the run's digest, so that online a resumed run continues the same run of Weights & Biases. The step counter of
    Weights & Biases counts calls; charts have to show `trainer/global_step`, against which every metric is defined.

    Offline nothing is continued: each start writes a folder of its own, `wandb/offline-run-<time>-<digest>`, whose step
    counter begins at 0, and of several folders with one id the one that is sent last replaces the others (issues 3841 and
    5865 of wandb). A start that resumes therefore logs the rows of `metrics.csv` before its checkpoint again: the last folder
    has the whole history, and is the one to send.

    Args:
        run: the run.
        project: name of the project.
        entity: user or team; None is the account's default.
        tags: tags besides those of the run.
        options: further arguments of `wandb.init`.

    Raises:
        InputError: if wandb is not installed, or its account does not work.
    """

    def __init__(
        self, run: TrackedRun, project: str = "kd", entity: str | None = None, tags: Sequence[str] = (), **options: Any
    ) -> None:
        wandb = import_package("wandb")
        if not isinstance(tags, list | tuple):
            raise InputError(f"tags={shown(tags)} must be a list of words", "tags")
        self.tracked = run
        self.options: dict[str, Any] = {
            "project": project,
            "entity": entity,
            "tags": list(dict.fromkeys([*run.tags, *tags])),
            "group": run.group,
            "job_type": run.job_type,
            "name": run.name,
            "id": run.digest,
            "resume": "allow",
            "config": dict(run.config),
            **options,
        }
        if "WANDB_MODE" not in os.environ and "mode" not in options:
            try:
                if not wandb.login(prompt=False):
                    self.options["mode"] = "offline"
            except wandb.errors.Error as error:
                raise InputError(
                    f"wandb cannot log in: {one_line(error)}. WANDB_MODE=offline needs no account", "logger"
                ) from error
        super().__init__(save_dir=run.folder, **self.options)

    def check(self) -> None:
        """Check the names that wandb checks without an account, and that `wandb.init` takes the other options.

        Raises:
            InputError: naming the option.
        """
        wandb = import_package("wandb")
        check_options(wandb.init, self.options, "wandb.init")
        for name, setting in {"project": "project", "tags": "run_tags"}.items():
            try:
                wandb.Settings(**{setting: self.options[name]})
            except (wandb.errors.Error, ValueError) as error:
                raise InputError(f"{name}={shown(self.options[name])} is refused by wandb: {one_line(error)}", name) from error

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of wandb, which begins when it is first used.

        Raises:
            InputError: if wandb refuses it.
        """
        wandb = import_package("wandb")
        try:
            return super().experiment
        except wandb.errors.Error as error:
            words = f"wandb refuses this run: {one_line(error)}. WANDB_MODE=offline needs no account"
            raise InputError(words, "logger") from error

    def begin(self, rows: Sequence[Mapping[str, str]]) -> None:
        """Begin the run; if it is offline, log the rows before the checkpoint again."""
        if self.experiment.offline:
            for row in rows:
                self.log_metrics({name: float(value) for name, value in row.items() if name != "step"}, int(row["step"]))

    def conclude(self, record: Mapping[str, Any], notes: Mapping[str, str]) -> None:
        """Set the summary, and log the table `results` and the files, as the artifact `record-<digest>`.

        In the summary, metrics are those of the selected checkpoint, in place of the last logged ones.
        """
        wandb, run = import_package("wandb"), self.experiment
        run.summary.update({**summary(record), **{f"method/{name}": text for name, text in notes.items()}})
        run.log({"results": wandb.Table(columns=list(COLUMNS), data=result_rows(record))})
        artifact = wandb.Artifact(f"record-{self.tracked.digest}", type="record")
        for file in FILES:
            artifact.add_file(str(self.tracked.folder / file), policy="immutable", skip_cache=True)
        run.log_artifact(artifact)

    def close(self, *, failed: bool) -> None:
        """Finish the run of wandb, if there is one: a later run of this process would be logged to it."""
        import_package("wandb").finish(exit_code=int(failed))
