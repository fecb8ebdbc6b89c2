"""The command `kd-clean`: what it lists and removes of a folder of runs, and what it leaves alone."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kd import clean
from kd.runs.retention import USES
from kd.runs.run import read_record, write_record
from kd.system.files import LOCK, locked, locked_now
from kd.training import execute
from kd.training.checkpoints import AtomicCheckpointIO, optimizer_bytes, read_checkpoint
from kd.training.leftovers import Folder, Leftover, age_of
from whole_runs import made, planned

Small = Callable[..., list[str]]

DAY = 24 * 3600


@pytest.fixture(scope="module")
def trained(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that retains all, and the run of its teacher with a cache."""
    runs = tmp_path_factory.mktemp("trained")
    made(small("method=kd", "trainer.max_epochs=1", "teacher.minilm.run.trainer.max_epochs=1", f"paths.runs={runs}"))
    return runs


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """A copy of that folder."""
    return Path(shutil.copytree(trained, tmp_path / "runs"))


@pytest.fixture
def student(runs: Path) -> Path:
    """Directory of the student's run."""
    return next(runs.glob("kd-*"))


@pytest.fixture
def teacher(runs: Path) -> Path:
    """Directory of the teacher's run."""
    return next(runs.glob("finetune-*"))


def listed(runs: Path, days: float | None = None) -> dict[str, str]:
    """Return the paths of all leftovers, and their reasons."""
    folder = Folder(runs, days)
    return {folder.shown(leftover): leftover.reason for leftover in folder.leftovers()}


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Run `kd-clean` with these words; return its exit status."""
    monkeypatch.setattr(sys, "argv", ["kd-clean", *map(str, words)])
    try:
        clean.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of every file in a folder, by path, without those of locks."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != LOCK
    }


def of_an_earlier_version(directory: Path) -> None:
    """Let a run be one of an earlier version, which does not say what it retains or uses."""
    record = read_record(directory / "result.json")
    assert record is not None
    write_record(directory / "result.json", {name: value for name, value in record.items() if name != "keep"})
    (directory / USES).unlink()


def unfinished(directory: Path) -> None:
    """Let a run be one that is not finished."""
    (directory / "result.json").unlink()


def gone() -> int:
    """Return the number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


# The command


def test_a_folder_of_finished_runs_has_nothing_to_remove(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(runs)
    assert command(monkeypatch, runs, "--yes") == 0
    assert "nothing to remove" in capsys.readouterr().out
    assert contents(runs) == before


@pytest.mark.parametrize("words", [["--dry-run"], ["--dry-run", "--yes"], []], ids=" ".join)
def test_a_list_alone_removes_nothing_and_is_no_failure(
    runs: Path, student: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    of_an_earlier_version(student)
    before = contents(runs)
    assert command(monkeypatch, runs, *words) == 0  # standard input is no terminal
    shown = capsys.readouterr().out
    size = (student / "checkpoints" / "last.ckpt").stat().st_size
    assert f"{size / 1e3:.1f} kB  {student.name}/checkpoints/last.ckpt" in shown
    assert f"{size / 1e3:.1f} kB  in all" in shown
    assert "nothing was removed" in shown
    assert contents(runs) == before


@pytest.mark.parametrize(("answer", "removes"), [("y", True), ("YES", True), ("", False), ("n", False), (None, False)])
def test_a_terminal_is_asked(
    runs: Path, student: Path, monkeypatch: pytest.MonkeyPatch, answer: str | None, removes: bool
) -> None:
    of_an_earlier_version(student)

    def given(question: str) -> str:
        assert "[y/N]" in question
        if answer is None:
            raise EOFError
        return answer

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", given)
    assert command(monkeypatch, runs) == 0
    assert (student / "checkpoints" / "last.ckpt").exists() != removes


def test_ctrl_c_at_the_question_removes_nothing(runs: Path, student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_an_earlier_version(student)

    def interrupted(_: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", interrupted)
    assert command(monkeypatch, runs) == 130
    assert (student / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize(
    "words", [["/not/there"], ["--unfinished=-1"], ["--unfinished=soon"], ["--unfinished=nan"]], ids=" ".join
)
def test_words_that_cannot_be_used_end_with_status_two(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    assert command(monkeypatch, *words) == 2


def test_what_cannot_be_removed_is_told_and_the_rest_is_removed(
    runs: Path, student: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for directory in (student, teacher):
        of_an_earlier_version(directory)
    original = Folder.remove

    def remove(folder: Folder, leftover: Leftover) -> int:
        if leftover.owner == teacher:
            raise PermissionError(13, "Permission denied", "it")
        return original(folder, leftover)

    monkeypatch.setattr(Folder, "remove", remove)
    assert command(monkeypatch, runs, "--yes") == 2
    assert f"cannot remove {teacher.name}/checkpoints/last.ckpt" in capsys.readouterr().err
    assert (teacher / "checkpoints" / "last.ckpt").exists()
    assert not (student / "checkpoints" / "last.ckpt").exists()


# Finished runs


def test_runs_of_an_earlier_version_lose_the_state_of_the_optimiser_alone(
    runs: Path, student: Path, teacher: Path, small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    for directory in (student, teacher):
        of_an_earlier_version(directory)
    before = contents(runs)
    assert set(listed(runs)) == {f"{directory.name}/checkpoints/last.ckpt" for directory in (student, teacher)}
    assert command(monkeypatch, runs, "--yes") == 0
    after = contents(runs)
    assert before.keys() - after.keys() == {f"{directory.name}/checkpoints/last.ckpt" for directory in (student, teacher)}
    assert {name for name in after if after[name] != before[name]} == {f"{one.name}/result.json" for one in (student, teacher)}
    assert not listed(runs)
    run = planned(small("method=kd", "trainer.max_epochs=1", "teacher.minilm.run.trainer.max_epochs=1", f"paths.runs={runs}"))
    shutil.rmtree(run.student)
    assert (execute.execute(run)["keep"], run.is_done(thorough=True)) == ("best", True)


def test_a_chosen_last_checkpoint_is_listed_with_the_size_of_the_optimisers_state(
    runs: Path, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_an_earlier_version(student)
    record = read_record(student / "result.json")
    assert record is not None
    record["selection"]["kind"] = "last"
    write_record(student / "result.json", record)
    last, best = (student / "checkpoints" / f"{name}.ckpt" for name in ("last", "best"))
    weights = read_checkpoint(last, record["digest"])["state_dict"]
    expected = 2 * sum(
        tensor.nbytes for tensor in weights.values()
    )  # the two moments of AdamW, and a step count of each tensor
    assert expected <= optimizer_bytes(last) <= expected + 8 * len(weights)
    (leftover,) = Folder(runs).leftovers()
    assert (leftover.paths, leftover.bytes) == ((last, best), optimizer_bytes(last) + best.stat().st_size)
    assert command(monkeypatch, runs, "--yes") == 0
    assert not best.exists()
    assert optimizer_bytes(last) == 0
    found = read_checkpoint(last, record["digest"])["state_dict"]
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    assert not listed(runs)


@pytest.mark.parametrize(("keep", "names"), [("all", set()), ("best", {"last"}), ("student", {"best", "last"})])
def test_an_interrupted_removal_is_finished(runs: Path, student: Path, keep: str, names: set[str]) -> None:
    record = read_record(student / "result.json")
    assert record is not None
    write_record(student / "result.json", {**record, "keep": keep})
    found = [path.stem for leftover in Folder(runs).leftovers() for path in leftover.paths if path.suffix == ".ckpt"]
    assert set(found) == names


def test_a_model_that_an_unfinished_run_reads_is_not_listed(runs: Path, student: Path, teacher: Path) -> None:
    record = read_record(teacher / "result.json")
    assert record is not None
    write_record(teacher / "result.json", {**record, "keep": "figures"})
    names = {"checkpoints/best.ckpt", "checkpoints/last.ckpt", "checkpoints/costs.json"}

    def of_teacher() -> set[str]:
        paths = [path for leftover in Folder(runs).leftovers() if leftover.owner == teacher for path in leftover.paths]
        return {path.relative_to(teacher).as_posix() for path in paths}

    assert of_teacher() == names | {"student"}
    unfinished(student)
    assert of_teacher() == names


@pytest.mark.parametrize("content", ["", "{}", "of another run"])
def test_a_record_that_cannot_be_read_means_that_nothing_of_the_run_is_listed(runs: Path, student: Path, content: str) -> None:
    of_an_earlier_version(student)
    record = read_record(student / "result.json")
    assert record is not None
    if content == "of another run":
        write_record(student / "result.json", {**record, "digest": "0123456789ab"})
    else:
        (student / "result.json").write_text(content)
    (student / "student.part").mkdir()
    folder = Folder(runs, 0)
    assert not [leftover for leftover in folder.leftovers() if leftover.owner == student]
    assert any(student.name in note for note in folder.notes)


# Locked runs, links, and folders of others


def test_a_locked_run_is_left_alone(runs: Path, student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_an_earlier_version(student)
    before = contents(runs)
    with locked_now(student) as mine:
        assert mine
        folder = Folder(runs)
        assert not list(folder.leftovers())
        assert folder.notes == [f"left alone: {student.name}, which another process has locked"]
        unfinished(student)
        assert not listed(runs, 0)
        assert command(monkeypatch, runs, "--yes", "--unfinished=0") == 0
    assert contents(runs) == {name: content for name, content in before.items() if name != f"{student.name}/result.json"}


def test_a_run_that_is_locked_after_the_question_is_left_alone(
    runs: Path, student: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    of_an_earlier_version(student)
    locks = []

    def given(_: str) -> str:
        locks.append(locked_now(student))
        assert locks[0].__enter__()
        return "y"

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", given)
    assert command(monkeypatch, runs) == 2
    locks[0].__exit__(None, None, None)
    assert "locked by another process" in capsys.readouterr().err
    assert (student / "checkpoints" / "last.ckpt").exists()


def test_what_has_changed_since_the_question_is_left_alone(runs: Path, student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unfinished(student)

    def given(_: str) -> str:
        (student / "metrics.csv").write_text("it goes on")
        return "y"

    for path in (student, *student.rglob("*")):
        os.utime(path, (time.time() - 10 * DAY,) * 2)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", given)
    assert command(monkeypatch, runs, "--unfinished=7") == 0
    assert (student / "metrics.csv").read_text() == "it goes on"


def test_links_are_not_followed(
    runs: Path, student: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_an_earlier_version(student)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(student / "checkpoints", elsewhere / "checkpoints")
    (student / "checkpoints").symlink_to(elsewhere / "checkpoints")
    shutil.copytree(teacher, elsewhere / teacher.name)
    of_an_earlier_version(elsewhere / teacher.name)
    (runs / "finetune-2l-file-s0-0123456789ab").symlink_to(elsewhere / teacher.name)
    stale(teacher)
    shutil.move(teacher / "cache", elsewhere / "cache")
    (teacher / "cache").symlink_to(elsewhere / "cache")
    for name in (".edits", ".teachers", "checkpoints/drafts"):
        (elsewhere / name).mkdir()
    (elsewhere / ".edits" / f"{'0' * 32}.npz").write_text("edited")
    shutil.copytree(elsewhere / "cache", elsewhere / ".teachers" / "0123456789ab")
    for name in (".edits", ".teachers"):
        (runs / name).symlink_to(elsewhere / name)
    draft = elsewhere / f"file.{socket.gethostname()}.{gone()}.part"
    draft.write_text("")
    (teacher / draft.name).symlink_to(draft)
    before = contents(elsewhere)
    assert not listed(runs, 0)
    assert command(monkeypatch, runs, "--yes", "--unfinished=0") == 0
    assert contents(elsewhere) == before


def test_a_link_in_a_run_that_is_removed_is_removed_and_its_target_stays(
    runs: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished(student)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("")
    (student / "link").symlink_to(precious)
    (student / "peers").symlink_to(precious)
    assert command(monkeypatch, runs, "--yes", "--unfinished=0") == 0
    assert not student.exists()
    assert (precious / "file").exists()


def test_folders_that_are_no_runs_are_left_alone(tmp_path: Path) -> None:
    for name in ("notes", "model-0123456789ab", "no-digest", "kd-3l-rte-s0-0123456789abc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file.part").write_text("")
    (tmp_path / "notes" / "config.yaml").write_text("")
    assert not listed(tmp_path, 0)


# Runs that are not finished


def test_unfinished_runs_are_listed_by_age_if_that_is_asked_for(
    runs: Path, student: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished(student)
    assert not listed(runs)
    for path in (student, *student.rglob("*")):
        os.utime(path, (time.time() - 10 * DAY,) * 2)
    assert age_of(student) == pytest.approx(10, abs=0.1)
    assert not listed(runs, 11)
    assert listed(runs, 9.5) == {student.name: "not finished, and unchanged for 10 days"}
    (student / LOCK).touch()
    assert set(listed(runs, 9.5)) == {student.name}, "to lock a run does not change it"
    before = contents(teacher)
    assert command(monkeypatch, runs, "--yes", "--unfinished", 9.5) == 0
    assert not student.exists()
    assert contents(teacher) == before


# Caches


def stale(directory: Path, **changes: object) -> None:
    """Let the caches of a teacher be made from other weights, or whatever else their descriptions say."""
    for path in directory.rglob("about.json"):
        about = json.loads(path.read_text())
        path.write_text(json.dumps({**about, **(changes or {"weights": "files:0"})}))


@pytest.mark.parametrize(
    ("changes", "words"), [({"weights": "files:0"}, "other weights"), ({"format": 0}, "another version of kd")], ids=str
)
def test_caches_that_cannot_be_used_are_removed(
    runs: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, words: str
) -> None:
    before = contents(runs)
    stale(teacher, **changes)
    (reason,) = listed(runs).values()
    assert words in reason
    assert command(monkeypatch, runs, "--yes") == 0
    after = contents(runs)
    assert {name for name in before if name not in after} == {name for name in before if "/cache/" in name}
    assert not listed(runs)


def test_a_cache_of_which_the_weights_were_let_go_is_not_stale(runs: Path, teacher: Path) -> None:
    shutil.rmtree(teacher / "student")
    stale(teacher)
    assert not listed(runs)


def test_a_cache_is_unused_if_no_run_names_its_teacher(runs: Path, student: Path, teacher: Path) -> None:
    unfinished(student)
    assert not listed(runs), "a run that is not finished may go on"
    (student / USES).unlink()
    folder = Folder(runs)
    assert not list(folder.leftovers())
    assert "does not say what it uses" in folder.notes[0]
    shutil.rmtree(student)
    (reason,) = listed(runs).values()
    assert "no run in this folder uses" in reason


def test_the_cache_of_a_given_teacher_is_unused_if_no_run_names_its_weights(
    runs: Path, student: Path, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(next(runs.glob("finetune-*")) / "student", tmp_path / "model")
    own = tmp_path / "own"
    run, _ = made(
        small("method=kd", "teacher=[hub]", f"teacher.hub.model={model}", "trainer.max_epochs=1", f"paths.runs={own}")
    )
    assert list((own / ".teachers").rglob("*.npy"))
    assert not listed(own)
    shutil.rmtree(run.directory)
    (leftover,) = Folder(own).leftovers()
    assert leftover.owner.parent == own / ".teachers"
    assert command(monkeypatch, own, "--yes") == 0
    assert not list((own / ".teachers").rglob("*.npy"))


def test_a_cache_of_a_hub_model_is_used_by_runs_that_name_it_without_a_commit(runs: Path, student: Path) -> None:
    record = read_record(student / "result.json")
    assert record is not None
    record["identity"]["teachers"][0]["model"] = "hf:one/model"
    write_record(student / "result.json", record)
    shutil.copytree(next(runs.glob("finetune-*")) / "cache", runs / ".teachers" / "0123456789ab")
    for weights, used in (("hf:one/model@0a1b", True), ("hf:one/model2@0a1b", False), ("hf:one/mode", False)):
        stale(runs / ".teachers", weights=weights)
        assert bool(listed(runs)) != used, weights


def test_a_locked_cache_is_left_alone(runs: Path, teacher: Path) -> None:
    stale(teacher)
    with locked_now(teacher / "cache") as mine:
        assert mine
        assert not listed(runs)
    assert listed(runs)


def test_caches_of_a_cohort_and_a_mixture_lie_deeper(runs: Path, teacher: Path) -> None:
    (teacher / "cache").rename(teacher / "other")
    shutil.copytree(teacher / "other", teacher / "cache" / "a" / "rte")
    shutil.rmtree(teacher / "other")
    assert not listed(runs)
    stale(teacher)
    (name,) = listed(runs)
    assert name.startswith(f"{teacher.name}/cache/a/rte/")


# Edited examples, and drafts


def test_edited_examples_are_removed_if_no_run_has_such_an_edit(
    runs: Path, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (runs / ".edits").mkdir()
    for name in (f"{'0' * 32}.npz", "mine.npz"):
        (runs / ".edits" / name).write_text("edited")
    assert set(listed(runs)) == {f".edits/{'0' * 32}.npz"}
    record = read_record(student / "result.json")
    assert record is not None
    edits = [{"_target_": "data.augmentation.WordReplacement", "model": None}]
    record["identity"]["task"]["edits"] = edits
    write_record(student / "result.json", record)
    assert not listed(runs)
    record["identity"]["task"]["edits"] = [{"_target_": "LabelNoise", "rate": 0.1}]
    write_record(student / "result.json", record)
    assert command(monkeypatch, runs, "--yes") == 0
    assert [path.name for path in (runs / ".edits").iterdir()] == ["mine.npz"]


def test_text_and_tokens_that_are_not_complete_are_removed_after_a_day(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, yesterday = runs / ".tokens", time.time() - 25 * 3600
    old = {f"texts-{'0' * 32}": "content.bin", f"tokens-{'1' * 32}": "ab.part/index.bin"}
    kept = {f"texts-{'2' * 32}": "about.json", f"tokens-{'3' * 32}": "ab.part/new.bin", "texts-mine": "content.bin"}
    for name, file in {**old, **kept}.items():
        (store / name / file).parent.mkdir(parents=True, exist_ok=True)
        (store / name / file).write_text("half")
        for path in (*(store / name).rglob("*"), store / name):
            os.utime(path, (yesterday, yesterday if "new" not in file else time.time()))
    assert set(listed(runs)) == {f".tokens/{name}" for name in old}
    with locked(store / f"texts-{'0' * 32}", "waiting"):
        assert set(listed(runs)) == {f".tokens/tokens-{'1' * 32}"}
    os.utime(store / f"texts-{'0' * 32}", (yesterday, yesterday))  # the lock's file is new
    assert command(monkeypatch, runs, "--yes") == 0
    assert {path.name for path in store.iterdir() if path.is_dir()} == set(kept)


def test_drafts_of_processes_that_have_ended_are_removed(
    runs: Path, student: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = next((teacher / "cache").glob("train-*"))
    dead = [
        place / f"{name}.{socket.gethostname()}.{gone()}.part"
        for place, name in ((student, "result.json"), (student / "checkpoints", "last.ckpt"), (runs / ".tokens", "0.npz"))
    ]
    dead += [cache / "logits.part0", student / "student.part", teacher / "peers" / "b.part"]
    (student / "student.part").mkdir()
    (teacher / "peers" / "b.part").mkdir(parents=True)
    living = [
        student / f"metrics.csv.{socket.gethostname()}.{os.getppid()}.part",
        student / f"metrics.csv.elsewhere.{gone()}.part",
        student / "student" / "part",
    ]
    for path in (*dead, *living):
        (path / "file" if path.is_dir() else path).write_text("half")
    assert set(listed(runs)) == {path.relative_to(runs).as_posix() for path in dead}
    before = contents(runs)
    assert command(monkeypatch, runs, "--yes") == 0
    assert all(not path.exists() for path in dead)
    assert set(before) - set(contents(runs)) <= {name for name in before if ".part" in name}
    assert all(path.exists() for path in living)


def test_drafts_in_the_parts_of_a_mixture_and_a_cohort_are_removed(
    runs: Path, student: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Predictions and documents of each task are written where they are, exports beside the folder of another task."""
    draft = f"{socket.gethostname()}.{gone()}.part"
    files = [f"predictions/rte.npz.{draft}", f"student/rte/README.md.{draft}", f"student/rte/.eval_results/a.yaml.{draft}"]
    files += [f"peers/b/rte.method.safetensors.{draft}"]
    kept = ["predictions/rte.npz", "student/rte/README.md", "student/rte/.eval_results/a.yaml", "peers/b/rte/config.json"]
    for name in (*files, *kept, "peers/b/sst2.part/config.json", f"peers/b/sst2.part/inside.{draft}"):
        (student / name).parent.mkdir(parents=True, exist_ok=True)
        (student / name).write_text("half")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / f"mine.{draft}").write_text("half")
    (student / "predictions" / "link").symlink_to(tmp_path / "elsewhere")
    assert set(listed(runs)) == {f"{student.name}/{name}" for name in (*files, "peers/b/sst2.part")}
    assert command(monkeypatch, runs, "--yes") == 0
    assert not any((student / name).exists() for name in (*files, "peers/b/sst2.part"))
    assert all((student / name).is_file() for name in kept)
    assert (tmp_path / "elsewhere" / f"mine.{draft}").exists()


def test_a_record_that_a_person_crafted_reaches_nothing_outside(runs: Path, student: Path, tmp_path: Path) -> None:
    (tmp_path / "victim.ckpt").write_text("")
    record = read_record(student / "result.json")
    assert record is not None
    for kind in ("../../../victim", "/etc/passwd", None, 3, ["best"]):
        changed = {**record, "keep": "best", "selection": {"kind": kind}, "inputs": {"x": "../victim"}}
        write_record(student / "result.json", changed)
        assert not [path for leftover in Folder(runs).leftovers() for path in leftover.paths if path.suffix == ".ckpt"]
    for changes in ({"inputs": 3}, {"inputs": {"x": [1]}}, {"identity": 3}, {"identity": {"task": 3, "teachers": [{}]}}):
        write_record(student / "result.json", {**record, **changes})
        list(Folder(runs).leftovers())


def test_a_checkpoint_that_cannot_be_read_has_no_state_to_remove(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"half")
    assert optimizer_bytes(path) == 0
    AtomicCheckpointIO("0").save_checkpoint({"state_dict": {}}, path)
    assert optimizer_bytes(path) == 0
