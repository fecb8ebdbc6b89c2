"""Estimates of the time and the disk that the missing cells of a table will take, from cells that are done."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kd.launch.jobs import Job

KINDS = (("method", "student", "task"), ("student", "task"), ("task",), ())
"""Names that a job shares with those that its estimate is the median of: the first of these of which some are known. Our
choice."""


def kind_of(job: Job, names: Sequence[str]) -> tuple[str, ...]:
    """Return names of a job's method, student and task, as many as asked for."""
    spec = job.run.spec
    own = {"method": spec.method["name"], "student": spec.student.name, "task": spec.task.name}
    return tuple(own[name] for name in names)


class Durations:
    """Seconds that jobs took, and estimates for others.

    Args:
        records: content of the `result.json` of finished runs. They lack the seconds before and after training, and may be of
            another machine, so that they count only until jobs have been executed here.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()) -> None:
        self._here: list[tuple[dict[str, str], float]] = []
        self._records = [
            ({name: record[name] for name in KINDS[0]}, record["seconds"]["train"] + (record["seconds"].get("cache") or 0.0))
            for record in records
        ]

    def add(self, job: Job, seconds: float) -> None:
        """Add the seconds that a job took here."""
        self._here.append((dict(zip(KINDS[0], kind_of(job, KINDS[0]), strict=True)), seconds))

    def estimate(self, job: Job) -> float | None:
        """Return the median of the seconds of the jobs that are most like a job; None if none is known."""
        for names in KINDS:
            own = kind_of(job, names)
            alike = [seconds for known, seconds in self._here or self._records if tuple(known[name] for name in names) == own]
            if alike:
                return statistics.median(alike)
        return None

    def left(self, jobs: Iterable[Job], workers: int) -> float | None:
        """Return the seconds that jobs will take side by side; None if nothing is known about one of them."""
        estimates = [self.estimate(job) for job in jobs]
        known = [seconds for seconds in estimates if seconds is not None]
        return None if len(known) < len(estimates) else sum(known) / max(1, workers)


def duration(seconds: float | None) -> str:
    """Return a duration in words.

    >>> duration(95), duration(4000), duration(None)
    ('2 min', '1 h 7 min', 'unknown')
    """
    if seconds is None:
        return "unknown"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
