"""Files that a finished run retains (`trainer.keep`), and their use by other runs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from kd.config.schema import KEEP
from kd.errors import InputError
from kd.results.tables import closing_table
from kd.runs.retention import USES, excess, needed_by, read_uses, write_uses
from kd.runs.run import Run, keep_of
from kd.system.files import locked_now
from kd.training import execute, reduce, trainer
from kd.training import fit as fitting
from kd.training.checkpoints import read_checkpoint
from kd.training.leftovers import Folder
from whole_runs import StopAfter, broken_off, made, planned, torchrun

Small = Callable[..., list[str]]
Words = Callable[..., list[str]]

EXPORTED = {"student/README.md", "student/config.json", "student/model.safetensors"}
EXPORTED |= {"student/tokenizer.json", "student/tokenizer_config.json"}
FIGURES = {"result.json", "config.yaml", "metrics.csv", "predictions.npz"}
RETAINED = {
    "all": FIGURES | EXPORTED | {f"checkpoints/{name}" for name in ("best.ckpt", "last.ckpt", "costs.json")},
    "best": FIGURES | EXPORTED | {f"checkpoints/{name}" for name in ("best.ckpt", "costs.json")},
    "student": FIGURES | EXPORTED,
    "figures": FIGURES,
}
"""Word of `trainer.keep` -> files of a run that chose the best checkpoint."""
LAST = RETAINED["best"] - {"checkpoints/best.ckpt"} | {"checkpoints/last.ckpt"}
"""Files of a run that chose the last checkpoint, with `trainer.keep=best`."""


def files(run: Run) -> set[str]:
    """Return the files of a run, without those of locks, caches and of what it uses."""
    found = {path.relative_to(run.directory).as_posix() for path in run.directory.rglob("*") if path.is_file()}
    return {name for name in found if name != USES and not name.startswith("cache/") and not name.endswith(".lock")}


@pytest.fixture(scope="module")
def trained(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that retains all, and the run of its teacher."""
    runs = tmp_path_factory.mktemp("trained")
    made(small("method=kd", "trainer.max_epochs=1", "teacher.minilm.run.trainer.max_epochs=1", f"paths.runs={runs}"))
    return runs


@pytest.fixture
def words(trained: Path, small: Small, tmp_path: Path) -> Words:
    """Overrides of the trained run, and further ones, in a copy of its folder."""
    shutil.copytree(trained, tmp_path / "runs")
    short = ("trainer.max_epochs=1", "teacher.minilm.run.trainer.max_epochs=1", f"paths.runs={tmp_path / 'runs'}")
    return lambda *more: small("method=kd", *short, *more)


def teacher_of(words: Words, *more: str) -> Run:
    """Return the run of the teacher, as if the command requested it."""
    return planned(words(*more)).inputs.teachers["minilm"]


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run that trains fail."""

    def fit(*_: object) -> None:
        raise AssertionError("it trains")

    monkeypatch.setattr(fitting, "fit", fit)


def killed(*_: object) -> None:
    raise KeyboardInterrupt


# A run that is done


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("keep", KEEP)
def test_a_done_run_is_reduced_to_what_the_command_names(words: Words, keep: str) -> None:
    run = planned(words(f"trainer.keep={keep}"))
    before = run.result
    assert before is not None
    record = execute.execute(run)
    assert files(run) == RETAINED[keep]
    assert (keep_of(record), run.result) == (keep, record)
    same = before.keys() - {"keep", "checksum"}
    assert {name: record[name] for name in same} == {name: before[name] for name in same}
    assert execute.execute(run) == record
    assert run.is_done()
    assert files(teacher_of(words)) == RETAINED["all"], "the command's key is not about runs that are done already"


@pytest.mark.usefixtures("no_training")
def test_nothing_is_restored_and_a_line_says_how_to_train_again(words: Words, capsys: pytest.CaptureFixture[str]) -> None:
    for keep, least in (("student", "student"), ("best", "student"), ("figures", "figures"), ("all", "figures")):
        run = planned(words(f"trainer.keep={keep}"))
        assert execute.execute(run)["keep"] == least
        assert files(run) == RETAINED[least]
    assert "without its result.json it is trained again" in capsys.readouterr().out


@pytest.mark.usefixtures("no_training")
def test_a_run_of_an_earlier_version_is_one_that_retains_all(words: Words) -> None:
    run = planned(words("trainer.keep=all"))
    record = run.result
    assert record is not None
    run.finish({name: value for name, value in record.items() if name != "keep"})
    assert "keep" not in execute.execute(run)
    assert execute.execute(planned(words("trainer.keep=best")))["keep"] == "best"
    assert files(run) == RETAINED["best"]


@pytest.mark.usefixtures("no_training")
def test_the_closing_table_names_no_folder_that_is_gone(words: Words, capsys: pytest.CaptureFixture[str]) -> None:
    run = planned(words("trainer.keep=figures"))
    closing_table(execute.execute(run), run.directory)
    assert "exported student: none is left (trainer.keep=figures)" in capsys.readouterr().out


@pytest.mark.parametrize("keep", ["student", "figures"])
def test_files_of_others_in_its_folder_stay(words: Words, keep: str) -> None:
    run = planned(words(f"trainer.keep={keep}"))
    (run.checkpoints / "mine.ckpt").write_text("")
    (run.directory / "predictions.npz").write_text("")
    execute.execute(run)
    assert files(run) == RETAINED[keep] | {"checkpoints/mine.ckpt", "predictions.npz"}


def test_all_students_of_a_cohort_go_with_the_figures_alone(tmp_path: Path) -> None:
    for name in ("student", "peers/b", "checkpoints"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("method.safetensors", "peers/b.method.safetensors", "checkpoints/best.ckpt"):
        (tmp_path / name).write_text("")
    record = {"selection": {"kind": "best"}, "keep": "figures"}
    gone = {path.relative_to(tmp_path).as_posix() for path in excess(tmp_path, record, "figures").remove}
    assert gone == {"student", "peers", "method.safetensors", "checkpoints/best.ckpt"}


def test_the_other_checkpoint_stays_where_the_chosen_one_is_missing(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for here, chosen in (("best", "last"), ("last", "best")):
        file = tmp_path / "checkpoints" / f"{here}.ckpt"
        file.write_text("")
        assert not excess(tmp_path, {"selection": {"kind": chosen}}, "best")
        file.unlink()


# A run that is trained now


def test_a_new_run_retains_what_it_is_asked_and_its_inputs_their_models(small: Small, tmp_path: Path) -> None:
    short = ("trainer.max_epochs=1", "teacher.minilm.run.trainer.max_epochs=1", f"paths.runs={tmp_path}")
    run, record = made(small("method=kd", *short, "trainer.keep=figures"))
    assert (files(run), record["keep"]) == (RETAINED["figures"], "figures")
    assert set(record["files"]) == EXPORTED - {"student/README.md"}
    teacher = run.inputs.teachers["minilm"]
    assert (files(teacher), (teacher.result or {})["keep"]) == (RETAINED["student"], "student")
    other, _ = made(small("method=kd", *short, "trainer.keep=best", "trainer.selection=last"))
    assert files(other) == LAST
    assert "optimizer_states" not in read_checkpoint(other.checkpoints / "last.ckpt", other.digest)


@pytest.mark.slow
@pytest.mark.ddp
def test_rank_zero_alone_removes(small: Small, tmp_path: Path) -> None:
    short = ("trainer.max_epochs=1", f"paths.runs={tmp_path}", "trainer=ddp", "trainer.accelerator=cpu")
    overrides = small("method=finetune", "teacher=[]", *short)
    torchrun([*overrides, "trainer.keep=figures"])
    run = planned(overrides)
    assert files(run) == RETAINED["figures"]
    assert (run.result or {})["ranks"] == 2


def test_a_chosen_last_checkpoint_is_written_again_without_the_optimiser(small: Small, tmp_path: Path) -> None:
    overrides = small("method=finetune", "teacher=[]", "trainer.selection=last", f"paths.runs={tmp_path}")
    run, _ = made(overrides)
    last = run.checkpoints / "last.ckpt"
    whole, size = read_checkpoint(last, run.digest), last.stat().st_size
    assert whole["optimizer_states"]
    exported = (run.student / "model.safetensors").read_bytes()
    reduced = planned([*overrides, "trainer.keep=best"])
    execute.execute(reduced)
    assert files(run) == LAST
    weights = read_checkpoint(last, run.digest)
    assert whole.keys() - weights.keys() == {"optimizer_states", "lr_schedulers", "callbacks"}
    assert all(torch.equal(weights["state_dict"][name], tensor) for name, tensor in whole["state_dict"].items())
    assert last.stat().st_size < size / 2
    shutil.rmtree(run.student)
    execute.execute(reduced)
    assert (run.student / "model.safetensors").read_bytes() == exported


# Exports and records that are damaged


@pytest.mark.usefixtures("no_training")
def test_a_damaged_export_is_written_again_under_best(words: Words) -> None:
    run = planned(words("trainer.keep=best"))
    execute.execute(run)
    weights = run.student / "model.safetensors"
    content = weights.read_bytes()
    shutil.rmtree(run.student)
    record = execute.execute(run)
    assert (weights.read_bytes(), record["keep"], files(run)) == (content, "best", RETAINED["best"])


def test_a_damaged_export_without_a_checkpoint_is_refused_until_told_to_begin_again(words: Words) -> None:
    run = planned(words("trainer.keep=student"))
    execute.execute(run)
    weights = run.student / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    with pytest.raises(InputError, match=r"trainer\.keep=student has let its checkpoint go.*resume=false") as caught:
        execute.execute(run)
    assert caught.value.key == "resume"
    execute.execute(planned(words("trainer.keep=student", "resume=false")))
    assert (weights.read_bytes(), files(run)) == (content, RETAINED["student"])


def test_a_damaged_record_without_a_checkpoint_to_resume_from_means_training_again(
    words: Words, capsys: pytest.CaptureFixture[str]
) -> None:
    run = planned(words("trainer.keep=best"))
    record = execute.execute(run)
    (run.directory / "result.json").write_text("{")
    again = execute.execute(run)
    assert (
        "its result.json is damaged; it has no checkpoint, and is trained again, and writes it anew" in capsys.readouterr().out
    )
    assert again["files"] == record["files"]
    assert files(run) == RETAINED["best"]


# Runs that read its model


def test_runs_that_begin_from_or_learn_from_a_student_without_checkpoints(words: Words) -> None:
    execute.execute(teacher_of(words, "trainer.keep=student"))
    assert files(teacher_of(words)) == RETAINED["student"]
    stage = "student.run=['trainer.max_epochs=1','student.init=first']"
    run = planned(words("trainer.keep=student", "seed=1", "student.init=run", stage))
    record = execute.execute(run)
    assert record["init"].startswith("run ")
    assert files(run.init_run) == files(run) == RETAINED["student"]
    assert not teacher_of(words).checkpoints.exists(), "it is not trained again"


def test_a_model_that_was_let_go_is_trained_again_for_the_run_that_reads_it(
    words: Words, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = teacher_of(words, "trainer.keep=figures")
    content = (teacher.student / "model.safetensors").read_bytes()
    execute.execute(teacher)
    assert files(teacher) == RETAINED["figures"]
    assert teacher.is_done()
    assert not teacher.has_model
    run = planned(words("trainer.keep=figures", "seed=1"))
    execute.execute(run)
    assert "trainer.keep=figures has let its model go, which another run needs: it is trained again" in capsys.readouterr().out
    assert (teacher.student / "model.safetensors").read_bytes() == content
    assert (files(teacher), (teacher.result or {})["keep"]) == (RETAINED["student"], "student")


@pytest.mark.usefixtures("no_training")
def test_a_run_of_which_only_the_figures_are_read_needs_no_model(words: Words) -> None:
    teacher = teacher_of(words, "trainer.keep=figures")
    record = execute.execute(teacher)
    assert execute.execute(teacher, first=False, model=False) == record
    with pytest.raises(AssertionError, match="it trains"):
        execute.execute(teacher, first=False)


def test_a_folder_without_a_model_says_why(words: Words, small: Small) -> None:
    teacher = teacher_of(words, "trainer.keep=student")
    given = small("method=kd", "teacher=[hub]", f"teacher.hub.model={teacher.directory}")
    execute.execute(teacher)
    planned(given)
    weights = teacher.student / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match=r"is damaged.* makes it again, with resume=false"):
        planned(given)
    execute.execute(teacher_of(words, "trainer.keep=figures"))
    with pytest.raises(InputError, match=r"trainer\.keep=figures has let go.*trainer\.keep=student") as caught:
        planned(given)
    assert caught.value.key == "teacher.hub.model"


def test_the_model_stays_as_long_as_a_run_that_is_not_finished_reads_it(
    words: Words, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader = planned(words("seed=1"))
    broken_off(reader, 2, monkeypatch)
    teacher = teacher_of(words, "trainer.keep=figures")
    assert execute.execute(teacher)["keep"] == "figures"
    assert f"stays: {reader.name} reads it, and is not finished" in capsys.readouterr().out
    assert files(teacher) == RETAINED["student"]
    execute.execute(reader)
    assert "trained again" not in capsys.readouterr().out
    assert files(teacher) == RETAINED["student"], "a run that needs another's model does not remove it"
    execute.execute(teacher)
    assert files(teacher) == RETAINED["figures"]


def test_a_run_says_what_it_and_the_runs_that_it_needs_use(words: Words) -> None:
    first = "\"student.run=['method=finetune','teacher=[]','student.init=random']\""
    run = planned(words("seed=1", "student.init=run", f"student.run=['student.init=run',{first}]"))
    stage, teacher = run.init_run, run.inputs.teachers["minilm"]
    assert needed_by(teacher.directory) is None
    run.directory.mkdir()
    write_uses(run)
    uses = read_uses(run.directory)
    assert uses is not None
    assert uses.runs == {teacher.name, stage.name, stage.init_run.name}
    assert (uses.models, uses.edits) == (frozenset(), False)
    for needed in (teacher, stage, stage.init_run):
        assert needed_by(needed.directory) == run.name
    done = read_uses(planned(words()).directory)
    assert done is not None
    assert done.runs == {teacher.name}


@pytest.mark.usefixtures("no_training")
def test_a_run_that_is_exported_again_finds_the_models_that_it_needs(words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = teacher_of(words, "trainer.keep=figures")
    with monkeypatch.context() as patch:
        patch.setattr(reduce, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            execute.execute(teacher)
    run = planned(words())
    shutil.rmtree(run.student)
    execute.execute(run)
    assert files(run) == RETAINED["all"]
    assert files(teacher) == RETAINED["student"]


# Killed on the way, or not allowed


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("keep", ["best", "student", "figures"])
def test_a_process_that_is_killed_before_it_removes_leaves_a_run_that_is_done_and_the_next_start_goes_on(
    words: Words, monkeypatch: pytest.MonkeyPatch, keep: str
) -> None:
    run = planned(words(f"trainer.keep={keep}"))
    with monkeypatch.context() as patch:
        patch.setattr(reduce, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            execute.execute(run)
    assert run.is_done()
    assert (keep_of(run.result or {}), files(run)) == (keep, RETAINED["all"])
    execute.execute(planned(words("trainer.keep=all")))  # the word in the record counts, also for a command with another one
    assert files(run) == RETAINED[keep]


@pytest.mark.usefixtures("no_training")
def test_a_process_that_is_killed_between_two_files_goes_on_with_the_other_ones(
    words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = planned(words("trainer.keep=figures"))
    original = reduce.remove
    for count in (1, 2, 3):
        left = [count]

        def remove(path: Path, left: list[int] = left) -> None:
            if not left[0]:
                killed()
            left[0] -= 1
            original(path)

        with monkeypatch.context() as patch:
            patch.setattr(reduce, "remove", remove)
            try:
                execute.execute(run)
            except KeyboardInterrupt:
                assert run.is_done()
                assert files(run) > FIGURES
    execute.execute(run)
    assert files(run) == FIGURES


def test_a_last_checkpoint_is_never_lost_when_it_is_written_again(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = small(
        "method=finetune", "teacher=[]", "trainer.selection=last", "trainer.max_epochs=1", f"paths.runs={tmp_path}"
    )
    run, _ = made(overrides)
    reduced = planned([*overrides, "trainer.keep=best"])
    last = run.checkpoints / "last.ckpt"
    size = last.stat().st_size
    for place in ("kd.training.checkpoints.AtomicCheckpointIO.save_checkpoint", "kd.training.reduce.remove"):
        with monkeypatch.context() as patch:
            patch.setattr(place, killed)
            with pytest.raises(KeyboardInterrupt):
                execute.execute(reduced)
        assert read_checkpoint(last, run.digest)["state_dict"]
        assert (run.checkpoints / "best.ckpt").exists(), "it says that the other one may have to be written again"
    execute.execute(reduced)
    assert not (run.checkpoints / "best.ckpt").exists()
    assert last.stat().st_size < size / 2


@pytest.mark.usefixtures("no_training")
def test_a_folder_that_cannot_be_written_to_is_told_and_the_run_stays_done(
    words: Words, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = planned(words("trainer.keep=student"))

    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(reduce, "remove", refused)
        assert execute.execute(run)["keep"] == "student"
        assert "not all is removed that trainer.keep=student does not retain: cannot write to" in capsys.readouterr().out
    execute.execute(run)
    assert files(run) == RETAINED["student"]


@pytest.mark.usefixtures("no_training")
def test_a_done_run_that_another_process_has_locked_is_not_waited_for(words: Words, capsys: pytest.CaptureFixture[str]) -> None:
    run = planned(words("trainer.keep=student"))
    with locked_now(run.directory) as mine:
        assert mine
        assert execute.execute(run)["keep"] == "all"
    assert "another process has locked the run" in capsys.readouterr().out
    assert files(run) == RETAINED["all"]


def test_the_word_that_counts_is_that_of_the_record_when_the_run_is_locked(
    words: Words,
) -> None:
    """A run that another process trains again in the meantime, for one that needs its model, retains it."""
    teacher = teacher_of(words, "trainer.keep=figures")
    figures = {**(teacher.result or {}), "keep": "figures"}
    teacher.finish({**figures, "keep": "student"})
    execute.reduce_run(teacher_of(words, "trainer.keep=all"), figures, first=True)
    assert files(teacher) == RETAINED["student"]
    assert (teacher.result or {})["keep"] == "student"


def test_checkpoints_of_a_model_that_is_being_trained_again_stay(words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = teacher_of(words, "trainer.keep=figures")
    execute.execute(teacher)
    reader = planned(words("seed=1", "trainer.checkpoint_minutes=0"))
    original = trainer.build_trainer

    def build(*arguments: Any) -> pl.Trainer:
        built = original(*arguments)
        built.callbacks.append(StopAfter(2, RuntimeError))
        return built

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "build_trainer", build)
        with pytest.raises(RuntimeError, match="stopped"):
            execute.execute(reader)
    assert (teacher.checkpoints / "last.ckpt").exists()
    assert execute.execute(teacher)["keep"] == "figures"
    assert not list(Folder(teacher.directory.parent).leftovers())
    assert (teacher.checkpoints / "last.ckpt").exists()
    execute.execute(reader)
    assert (teacher.result or {})["resumed"]["from_steps"] == [2]


def test_a_record_that_names_an_unknown_word_retains_all() -> None:
    for keep in (None, 3, "none", ["best"], {}):
        assert keep_of({"keep": keep}) == "all"


def test_finished_runs_leave_nothing_to_remove(trained: Path, words: Words) -> None:
    for keep in KEEP:
        execute.execute(planned(words(f"trainer.keep={keep}")))
        assert not list(Folder(Path(planned(words()).spec.paths.runs)).leftovers()), keep
    assert json.loads((planned(words()).directory / "result.json").read_text())["keep"] == "figures"
