"""Jobs as tasks of a Ray cluster on this machine."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kd.errors import InputError
from kd.launch import on_ray
from kd.launch.jobs import jobs_of, plan_command

STAND_IN = Path(__file__).parent / "stand_in.py"
Small = Callable[..., list[str]]


@pytest.mark.slow
def test_jobs_are_executed_once_after_what_they_need_and_failures_told(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="pip install 'kd[ray]'")
    monkeypatch.setattr(on_ray, "WORKER", (str(STAND_IN),))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    commands = [small("method=kd", f"seed={seed}", f"paths.runs={tmp_path}") for seed in (0, 1, 13)]
    jobs = jobs_of({index: plan_command(command) for index, command in enumerate(commands)}, commands)
    events = list(on_ray.on_ray(jobs, "local", 1, 0.0))
    states = {event.job.name: event.state for event in events}
    assert [states[name] for name in jobs] == ["done", "done", "done", "failed"]
    (failure,) = [event.failure.line for event in events if event.failure is not None]
    assert failure == "the loss is not finite (change: optimizer.lr)"
    lines = [line.split()[:2] for line in (tmp_path / "events.txt").read_text().splitlines()]
    assert lines[:2] == [["began", next(iter(jobs))], ["done", next(iter(jobs))]]
    assert sorted(name for word, name in lines if word == "done") == sorted(list(jobs)[:3])


def test_without_the_package_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"kd\[ray\]"):
        on_ray.import_ray()
