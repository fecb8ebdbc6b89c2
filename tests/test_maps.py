"""Maps of layers that whole runs write: of which checkpoint they are, and of which students and teachers."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from kd import report
from kd.results.maps import LayerMap, read_maps
from kd.runs.run import Run
from kd.training import execute
from whole_runs import Small, broken_off, last_weights, made, planned, pool, torchrun

ATTENTION = ("method=alp_kd", "method.scaled=true")
"""Weights of the toy's teacher layers that are not near 0 and 1."""
CHOSEN = ("trainer.max_epochs=3", "optimizer.lr=2e-2", "student.dropout=0")


@pytest.fixture(scope="module")
def finished(small: Small) -> tuple[Run, dict]:
    return made(small(*ATTENTION, *CHOSEN))


def matrix(found: LayerMap) -> torch.Tensor:
    return torch.tensor(found.weights)


def copied(run: Run, folder: Path) -> str:
    """Copy what a run needs to another folder of runs, and return the override that names it."""
    for _, needed in run.inputs:
        shutil.copytree(needed.directory, folder / needed.name, ignore=shutil.ignore_patterns("cache"))
    return f"paths.runs={folder}"


def test_a_run_writes_the_maps_of_the_checkpoint_that_is_evaluated(finished: tuple[Run, dict], small: Small) -> None:
    run, record = finished
    (found,) = read_maps(run.directory)
    assert (found.task, found.student, found.teacher, found.name) == (record["task"], "student", "minilm", "hidden")
    assert matrix(found).shape == (3, 5)
    assert matrix(found).sum(dim=1).tolist() == pytest.approx([0, 1, 1], abs=1e-5)
    assert json.loads((run.directory / "maps.json").read_text())["selection"] == record["selection"]
    states = {kind: torch.load(run.checkpoints / f"{kind}.ckpt", weights_only=True)["state_dict"] for kind in ("best", "last")}
    values = {kind: state["method.attention.values"] for kind, state in states.items()}
    assert record["selection"]["epoch"] < 3, "the toy's best epoch is not the last"
    assert int(states["best"]["method.attention.epoch"]) == record["selection"]["epoch"] - 1
    assert not torch.allclose(values["best"], values["last"], atol=1e-6)
    torch.testing.assert_close(matrix(found)[1:, 1:].flatten(), values["best"])
    last, _ = made(small(*ATTENTION, *CHOSEN, "trainer.selection=last"))
    (of_last,) = read_maps(last.directory)
    torch.testing.assert_close(matrix(of_last)[1:, 1:].flatten(), last_weights(last)["method.attention.values"])


def test_a_run_that_was_stopped_within_an_epoch_has_the_maps_of_one_that_was_not(
    finished: tuple[Run, dict], small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = finished
    run = planned(small(*ATTENTION, *CHOSEN, copied(whole, tmp_path), "trainer.checkpoint_minutes=0"))
    broken_off(run, 6 * whole.result["selection"]["epoch"] - 2, monkeypatch)
    assert not (run.directory / "maps.json").exists()
    execute.execute(run)
    (one,), (other,) = (read_maps(each.directory) for each in (run, whole))
    torch.testing.assert_close(matrix(one), matrix(other), rtol=0, atol=1e-6)


def test_maps_stay_with_the_figures_alone_and_go_with_a_new_start(
    finished: tuple[Run, dict], small: Small, tmp_path: Path
) -> None:
    whole, _ = finished
    folder = tmp_path / whole.name
    shutil.copytree(whole.directory, folder)
    words = small(*ATTENTION, *CHOSEN, copied(whole, tmp_path), "trainer.keep=figures")
    assert execute.execute(planned(words))["keep"] == "figures"
    assert len(read_maps(folder)) == 1
    planned(words).begin(resume=False)
    assert not (folder / "maps.json").exists()


def test_students_and_teachers_have_maps_by_their_names(small: Small, backbone: Path) -> None:
    short = ("trainer.max_epochs=1", *pool(backbone, "minilm", "minilm_4l"))
    run, _ = made(small("method=pkd", "method.layers=uniform", "pool=wkd", *short, "teacher.minilm_4l.run.student.layers=3"))
    found = {one.teacher: matrix(one) for one in read_maps(run.directory)}
    assert {name: weights.nonzero().tolist() for name, weights in found.items()} == {
        "minilm": [[0, 0], [1, 2], [2, 4]],
        "minilm_4l": [[0, 0], [1, 1], [2, 3]],
    }
    cohort, _ = made(
        small("method=pkd", "cohort=mutual", "cohort.students=[2l,{layers: 3,name: deep}]", "trainer.max_epochs=1")
    )
    assert {one.student: matrix(one).nonzero().tolist() for one in read_maps(cohort.directory)} == {
        "2l": [[1, 2]],
        "deep": [[1, 1], [2, 2]],
    }


def test_a_method_without_maps_writes_no_file(small: Small) -> None:
    run, _ = made(small("method=kd", "trainer.max_epochs=1"))
    assert not (run.directory / "maps.json").exists()


def test_the_page_of_runs_shows_the_maps_that_are_whole(
    finished: tuple[Run, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = finished
    shutil.copytree(run.directory, tmp_path / run.name, ignore=shutil.ignore_patterns("checkpoints", "student"))
    out = tmp_path / "page.html"
    for damage, shown in ((None, True), ("{", False), (None, False)):
        if damage is not None:
            (tmp_path / run.name / "maps.json").write_text(damage)
        elif not shown:
            (tmp_path / run.name / "maps.json").unlink()
        monkeypatch.setattr(sys, "argv", ["kd-report", str(tmp_path), "--format", "html", "--out", str(out)])
        report.main()
        text = out.read_text()
        assert ("Maps of layers" in text) is shown
        assert ("teacher minilm: hidden" in text) is shown


@pytest.mark.slow
@pytest.mark.ddp
def test_two_ranks_have_the_maps_of_one(small: Small, tmp_path: Path) -> None:
    more = (*ATTENTION, "student.dropout=0", "trainer.batch_size=14", "optimizer.lr=1e-3")  # uneven shares at the end
    one, _ = made(small(*more))
    arguments = small(*more, copied(one, tmp_path), "trainer=ddp", "trainer.accelerator=cpu")
    torchrun(arguments)
    (ours,), (theirs,) = (read_maps(run.directory) for run in (planned(arguments), one))
    torch.testing.assert_close(matrix(ours), matrix(theirs), rtol=0, atol=1e-4)
