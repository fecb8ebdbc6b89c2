"""Trials of a study: each point once, also for several commands, one that was killed, and one that failed before."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kd.config.failure import Failure
from kd.errors import InputError
from kd.tune import study as studies
from kd.tune.space import Space, parse_space
from kd.tune.study import JOURNAL, Study, Trial, import_optuna

Open = Callable[..., Study]

GRID = {"a": [1, 2, 3], "b": ["x", "y"]}


@pytest.fixture
def opened(tmp_path: Path) -> Open:
    """A study on a grid of six points, as one more command opens it."""

    def open_study(content: dict[str, Any] = GRID, about: str = "digest", higher: bool = True, **settings: Any) -> Study:
        settings = {"sampler": "auto", "pruner": "median", "seed": 0, **settings}
        space = content if isinstance(content, Space) else parse_space("mine", content)
        return Study(tmp_path / "study", space, {"settings": about}, higher=higher, **settings)

    return open_study


def finish(study: Study, trial: Trial, value: float = 0.5) -> tuple[str, ...]:
    assert study.assign(trial, "-".join(trial.overrides)) is None
    study.complete(trial, value)
    trial.lock.release()
    return trial.overrides


def taken(study: Study, count: int) -> Trial:
    trial = study.take(count)
    assert trial is not None
    return trial


@pytest.mark.parametrize("sampler", ["grid", "tpe", "random"])
def test_each_point_of_a_grid_is_a_trial_once_until_it_is_exhausted(sampler: str, opened: Open) -> None:
    one, other = opened(sampler=sampler), opened(sampler=sampler)
    made = [finish(study, taken(study, 99)) for study in (one, other) * 3]
    assert len(set(made)) == 6
    assert one.take(99) is None
    assert [entry.state for entry in one.entries()] == ["complete"] * 6


def test_the_number_of_trials_is_the_total_of_all_commands_also_after_a_restart(opened: Open) -> None:
    one, other = opened(), opened()
    running = taken(one, 3)
    finish(other, taken(other, 3))
    third = taken(other, 3)
    assert third.number == 2
    assert other.take(3) is None  # one is finished, and two run
    finish(one, running)
    again = opened()
    assert again.take(2) is None
    assert len(again.entries()) == 3


def test_a_trial_that_a_killed_command_left_is_taken_again_and_counts_once(opened: Open) -> None:
    killed = taken(opened(), 1)
    assert opened().take(1) is None  # it is being executed
    killed.lock.release()  # as the end of its process does
    again = taken(other := opened(), 1)
    assert (again.number, again.overrides) == (killed.number, killed.overrides)
    finish(other, again)
    assert [entry.state for entry in other.entries()] == ["complete"]
    assert other.take(1) is None


def test_a_command_that_is_killed_while_it_makes_a_trial_loses_nothing(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    for method in ("_new", "_point"):  # after the point was chosen, and before the trial has its values
        interrupted = opened()
        with monkeypatch.context() as patch:
            patch.setattr(Study, method, killed)
            with pytest.raises(KeyboardInterrupt):
                interrupted.take(99)
    study = opened()
    assert len({finish(study, taken(study, 6)) for _ in range(6)}) == 6
    assert study.take(6) is None
    assert [entry.state for entry in study.entries()] == ["complete"] * 6


def test_a_failed_trial_is_tried_again_by_the_next_command_alone(opened: Open) -> None:
    study = opened()
    failed = taken(study, 2)
    study.fail(failed, Failure("it does not fit", "optimizer.lr"))
    failed.lock.release()
    finish(study, taken(study, 2))
    assert study.take(2) is None
    (first, _) = study.entries()
    assert (first.state, first.failure) == ("failed", Failure("it does not fit", "optimizer.lr"))
    again = opened()
    assert finish(again, taken(again, 2)) == failed.overrides
    assert [entry.state for entry in again.entries()] == ["complete", "complete"]
    assert again.take(2) is None


def test_two_trials_that_are_one_run_count_once(opened: Open) -> None:
    study = opened({"a": ["1", "1.0"]})
    first, second = taken(study, 2), taken(study, 2)
    assert study.assign(first, "run") is None
    assert study.assign(second, "run") == first.number
    study.complete(first, 0.5)
    for trial in (first, second):
        trial.lock.release()
    assert [entry.number for entry in study.entries()] == [first.number]
    assert study.take(9) is None


def test_points_of_a_range_that_are_one_override_are_one_trial(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies, "REPEATS", 3)
    study = opened({"a": {"low": 0.1, "high": 0.1004}}, sampler="random")  # in three digits all are 0.1
    assert finish(study, taken(study, 9)) == ("a=0.1",)
    assert study.take(9) is None
    assert len(study.entries()) == 1


def test_the_best_is_of_complete_trials_in_the_direction_of_the_metric(opened: Open) -> None:
    study = opened(higher=False, about="mse")
    for value in (0.4, 0.2, 0.3):
        finish(study, taken(study, 9), value)
    pruned = taken(study, 9)
    pruned.report(1, 0.1)
    study.prune(pruned)
    best = study.best(study.entries())
    assert best is not None
    assert (best.number, best.value) == (1, 0.2)


@pytest.mark.parametrize(("pruner", "expected"), [("median", True), ("none", False)])
def test_a_trial_below_the_median_is_pruned(pruner: str, expected: bool, opened: Open) -> None:
    study = opened(pruner=pruner)
    for value in (0.5, 0.6, 0.7, 0.8, 0.9):
        trial = taken(study, 9)
        assert not trial.report(1, value)
        finish(study, trial, value)
    low = taken(study, 9)
    assert low.report(1, 0.69) is expected
    assert low.report(2, 0.0) is False  # nothing is known of epoch 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"content": {**GRID, "a": [1, 2]}}, "another search space, which differs in a"),
        ({"content": {**GRID, "c": [1, 2]}}, "differs in c"),
        ({"about": "other"}, "other settings"),
    ],
)
def test_a_study_that_was_begun_with_something_else_is_refused(change: dict[str, Any], message: str, opened: Open) -> None:
    finish(study := opened(), taken(study, 1))
    with pytest.raises(InputError, match=message) as refused:
        opened(**change)
    assert refused.value.key == "study"
    assert "study=<name>" in refused.value.message


def test_what_a_killed_process_has_written_of_a_line_is_removed(opened: Open) -> None:
    finish(study := opened(), taken(study, 9))
    with (study.folder / JOURNAL).open("ab") as file:
        file.write(b'{"op_code":4,"work')
    finish(again := opened(), taken(again, 9))
    assert len(opened().entries()) == 2
    assert all(json.loads(line) for line in (study.folder / JOURNAL).read_text().splitlines())


@pytest.mark.parametrize("damage", [b"not a journal\n", b'{"op_code":4}\n', b"[]\n"])
def test_a_damaged_journal_is_refused(damage: bytes, opened: Open) -> None:
    study = opened()
    path = study.folder / JOURNAL
    path.write_bytes(path.read_bytes() + damage + b"{}\n")
    with pytest.raises(InputError, match="is damaged") as refused:
        opened()
    assert refused.value.key == "study"


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path, opened: Open) -> None:
    (tmp_path / "study").write_text("")
    with pytest.raises(InputError) as refused:
        opened()
    assert refused.value.key == "paths.runs"


def test_without_optuna_the_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r"pip install 'kd\[tune\]'"):
        import_optuna()
