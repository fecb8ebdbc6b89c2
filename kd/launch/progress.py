"""Lines about jobs as they end, with the time that the others will take."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from kd.launch.estimate import Durations, duration
from kd.launch.fan_out import Event
from kd.launch.jobs import Job


class Progress:
    """Lines about jobs as they end.

    Args:
        jobs: name -> job.
        labels: name -> description of a job that a command asks for.
        done: number of commands whose runs were done before.
        count: number of all commands.
        workers: number of jobs that are executed side by side, until one is started.
        records: records of finished runs, for estimates.
        tell: prints a line.
    """

    def __init__(
        self,
        jobs: Mapping[str, Job],
        labels: Mapping[str, str],
        done: int,
        count: int,
        workers: int,
        records: Iterable[Mapping[str, Any]] = (),
        tell: Callable[[str], None] = lambda line: print(line, flush=True),
    ) -> None:
        self.labels, self.done, self.count, self.workers, self.tell = labels, done, count, workers, tell
        self.durations = Durations(records)
        self.open = dict(jobs)

    def __call__(self, event: Event) -> None:
        """Print a line about a change."""
        name = event.job.name
        label = self.labels.get(name, f"{name} (others need it)")
        self.workers = event.workers or self.workers
        if event.state in ("done", "failed"):
            self.open.pop(name, None)
            self.done += event.state == "done" and event.job.wanted
        if event.seconds is not None and event.state == "done":
            self.durations.add(event.job, event.seconds)
        if event.state == "done":
            took = "by another command" if event.seconds is None else duration(event.seconds)
            self.tell(f"[{self.done}/{self.count}] {label}: {score_of(event.job)}{took}{self._left()}")
        elif event.failure is not None:
            self.tell(f"[{self.done}/{self.count}] {label}: failed: {event.failure.line}")
        elif event.state == "elsewhere":
            self.tell(f"{label}: another command executes it")

    def _left(self) -> str:
        seconds = self.durations.left(self.open.values(), self.workers)
        return f"; about {duration(seconds)} left" if self.open else ""


def score_of(job: Job) -> str:
    """Return the validation score of a finished run in words, empty if it has none."""
    record = job.run.result
    values = {} if record is None else record["metrics"].get("validation", {})
    name = job.run.spec.task.monitor if job.run.spec.task.monitor in values else next(iter(values), None)
    value = None if name is None else values[name]
    return "" if value is None else f"validation {name} {value:.4f}, "
