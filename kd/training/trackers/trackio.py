"""Runs of trackio."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from kd.config.values import one_line, shown
from kd.errors import InputError
from kd.results.summary import summary
from kd.training.trackers.base import FILES, TrackedRun, Tracker, check_options, import_package


class TrackioTracker(Tracker):
    """A run of trackio, in a folder of the user (`TRACKIO_DIR`): `trackio show --project kd` shows all runs.

    trackio finds the run that it continues by its name, so the name ends with the digest. Steps after a checkpoint that a start
    logs again are there twice.

    Args:
        run: the run.
        project: name of the project.
        options: further arguments of `trackio.init`.

    Raises:
        InputError: if trackio is not installed.
    """

    def __init__(self, run: TrackedRun, project: str = "kd", **options: Any) -> None:
        super().__init__()
        import_package("trackio")
        self.tracked, self.project = run, project
        self.options: dict[str, Any] = {
            "name": f"{run.name}-{run.digest}",
            "group": run.group,
            "resume": "allow",
            "config": {**run.config, "job_type": run.job_type, "tags": list(run.tags)},
            **options,
        }
        self._experiment: Any = None

    @property
    def name(self) -> str:
        """Name of the project, as for Lightning's other loggers."""
        return self.project

    @property
    def version(self) -> str:
        """Digest of the run."""
        return self.tracked.digest

    def check(self) -> None:
        """Check the project's name, and that `trackio.init` takes the other options.

        Raises:
            InputError: naming the option.
        """
        if not re.fullmatch(r"[\w.-]+", str(self.project)):
            raise InputError(f"project={shown(self.project)}: use letters, digits, '.', '_' and '-'", "project")
        check_options(import_package("trackio").init, self.options, "trackio.init")

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of trackio, which begins when it is first used.

        Raises:
            InputError: if trackio refuses it.
        """
        if self._experiment is None:
            try:
                self._experiment = import_package("trackio").init(project=self.project, **self.options)
            except ValueError as error:
                raise InputError(f"trackio refuses this run: {one_line(error)}", "logger") from error
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics of a step."""
        self.experiment.log(dict(metrics), step=step)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing, because the run begins with its configuration."""

    def begin(self, rows: Sequence[Mapping[str, str]]) -> None:
        """Begin the run, or continue it."""
        _ = self.experiment

    def conclude(self, record: Mapping[str, Any], notes: Mapping[str, str]) -> None:
        """Log the summary, as `result/test/accuracy`, and the notes, and the files as the artifact `record-<digest>`."""
        trackio = import_package("trackio")
        texts = {f"method/{name}": trackio.Markdown(text) for name, text in notes.items()}
        values = {f"result/{name}": value for name, value in summary(record).items()}
        self.experiment.log({**values, **texts}, step=record["steps"])
        artifact = trackio.Artifact(f"record-{self.tracked.digest}", type="record")
        for file in FILES:
            artifact.add_file(str(self.tracked.folder / file))
        self.experiment.log_artifact(artifact)

    def close(self, *, failed: bool) -> None:
        """Finish the run, if it has begun."""
        if self._experiment is not None:
            import_package("trackio").finish()
            self._experiment = None
