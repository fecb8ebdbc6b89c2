"""Runs from Python: `kd.run` is the command `kd-train` as a function."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.errors import DISK_FULL, InputError, disk_is_full

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kd.results.predictions import Predictions

Scores = Mapping[str, Mapping[str, float | None]]
"""Split -> metric -> value; None where a metric is undefined."""


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        directory: its directory, with `result.json`, `config.yaml`, `student/` and `predictions.npz`.
        record: contents of `result.json`.
    """

    directory: Path
    record: Mapping[str, Any] = field(repr=False)

    @property
    def metrics(self) -> Scores:
        """Metrics of the selected checkpoint by split, `validation` and `test`; of a cohort those of its best student."""
        scores: Scores = self.record["metrics"]
        return scores

    @property
    def digest(self) -> str:
        """Digest of everything that changes the result: runs with equal ones are one run."""
        return str(self.record["digest"])

    @property
    def students(self) -> list[str]:
        """Names of the students: `student`, or those of a cohort."""
        return list(self.record["students"])

    def student(self, name: str | None = None, task: str | None = None) -> "PreTrainedModel":
        """Return an exported student as a model of transformers, in eval mode and on the CPU.

        Args:
            name: student of a cohort; None for the only or the best one.
            task: task of a mixture, each of which has a head of its own.

        Raises:
            InputError: if there is no such student, or the run has let its weights go (`trainer.keep=figures`).
        """
        import transformers

        folder = self.student_folder(name, task)
        (architecture,) = transformers.AutoConfig.from_pretrained(folder).architectures
        model: PreTrainedModel = getattr(transformers, architecture).from_pretrained(folder).eval()
        return model

    def tokenizer(self, name: str | None = None, task: str | None = None) -> "PreTrainedTokenizerBase":
        """Return the tokenizer of a student; arguments and errors as for `student`."""
        from transformers import AutoTokenizer

        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.student_folder(name, task))
        return tokenizer

    def student_folder(self, name: str | None = None, task: str | None = None) -> Path:
        """Return the folder of an exported student, which `from_pretrained` loads; arguments and errors as for `student`."""
        tasks: Mapping[str, Mapping[str, Any]] = self.record.get("tasks", {})
        if task is not None and task not in tasks:
            raise InputError(f"the run has no task '{task}' of a mixture; it has {', '.join(tasks) or 'one task'}")
        if task is None and tasks:
            raise InputError(f"the run has a student for each task of its mixture; task is one of {', '.join(tasks)}")
        record = self.record if task is None else tasks[task]
        name = record["headline"] if name is None else name
        if name not in record["students"]:
            raise InputError(f"the run has no student '{name}'; it has {', '.join(record['students'])}")
        folder: Path = self.directory / record["students"][name]["folder"]
        if not (folder / "config.json").is_file():
            raise InputError(f"'{folder}' is not there: trainer.keep=figures lets weights go", "trainer.keep")
        return folder

    def predictions(self, task: str | None = None) -> "Predictions":
        """Return the logits of students and teachers on the evaluated splits, `predictions().splits["test"].students`.

        Args:
            task: task of a mixture.

        Raises:
            InputError: if the run has none, as one of a masked language model.
        """
        from kd.results.predictions import read_predictions

        return read_predictions(self.directory, task)


def run(*overrides: str, **keys: Any) -> RunResult:
    """Train and evaluate a run, and before it the runs that it needs, such as its teacher's, unless they are done.

    It does what `kd-train` does with the same overrides, and a finished run is returned at once. It prints what the command
    prints.

    >>> result = kd.run("method=pkd", student="3l", seed=1)  # doctest: +SKIP
    >>> result.metrics["test"], result.student()  # doctest: +SKIP

    What it changes in the process is put back when it returns (`kd.api.process`): the environment, random states, warnings,
    levels of loggers, settings of PyTorch, and Hydra, so that it works in a notebook and in an application of Hydra's. Two
    things stay: imported modules, and that glibc keeps freed memory. Unlike the command it neither configures OpenMP, which
    reads its settings when torch is imported, nor ends the process.

    Args:
        *overrides: overrides as of the command, in Hydra's grammar: `"task.limit_train=256"`.
        **keys: values by key, as Python has them: None, booleans, numbers, text, paths, lists and dictionaries. Text is taken
            literally. Keys with dots are passed as `**{"task.train": path}`.

    Raises:
        InputError: for an error that the user can correct. `key` is the key to change.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from kd.api.overrides import override_of
    from kd.api.process import own_hydra, restored
    from kd.config.compose import explain
    from kd.launch.jobs import plan_command
    from kd.system import distributed
    from kd.training.execute import execute

    if distributed.world() > 1:
        raise InputError("kd.run trains in one process, and this is a rank of several; torchrun starts -m kd.train", "trainer")
    for word in overrides:
        if not isinstance(word, str):
            raise InputError(f"{word!r} is no override, which is a text as 'method=pkd'; values of Python are keywords, seed=1")
    try:
        with restored(), own_hydra():
            planned = plan_command([*overrides, *(override_of(key, value) for key, value in keys.items())])
            record = execute(planned)
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error) from error
    except Exception as error:
        if disk_is_full(error) and not isinstance(error, InputError):
            raise InputError(DISK_FULL, "paths.runs") from error
        raise
    return RunResult(planned.directory, record)
