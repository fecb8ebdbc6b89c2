"""The command `kd-table`: cells that are done, missing, broken and failed; commands that share a table, or are killed."""

import errno
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from kd import table as command
from kd.errors import InputError
from kd.launch import fan_out, processes
from kd.launch.slurm import RESTARTS
from kd.results.figures import OF_RUNS, read_figures, write_figures
from kd.table.cells import commit_of, plan_table
from kd.table.definition import parse_table

STAND_IN = Path(__file__).parent.parent / "launch" / "stand_in.py"
Small = Callable[..., list[str]]


class Tables:
    """A table of kd and finetune with seeds, whose cells are made by a stand-in, in a folder of its own."""

    def __init__(self, small: Small, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.overrides = [word for word in small() if not word.startswith(("paths.runs=", "student="))]
        self.folder, self.capsys = folder, capsys
        self.runs, self.figures = folder / "runs", folder / "ours.csv"

    def write(self, *products: dict[str, Any], **more: Any) -> Path:
        """Write the definition of a table of these products."""
        scale = {"overrides": self.overrides, "cells": list(products)}
        path = self.folder / "mine.yaml"
        path.write_text(yaml.safe_dump({"paper": "toy", "title": "A table", "scales": {"local": scale}, **more}))
        return path

    def words(self, *more: str) -> list[str]:
        """Return the words of a command on the table."""
        return [str(self.folder / "mine.yaml"), f"paths.runs={self.runs}", f"--figures={self.figures}", *more]

    def __call__(self, *more: str, name: str = "run") -> tuple[int, str, str]:
        """Run the command in this process; return its status, output and errors."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["kd-table", name, *self.words(*more)])
            patch.setattr(fan_out, "WORKER", (str(STAND_IN),))
            patch.setattr(processes, "PRELOAD", ())
            patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
            with pytest.raises(SystemExit) as end:
                command.main()
        return int(end.value.code or 0), *self.capsys.readouterr()

    def start(self, seconds: float) -> "subprocess.Popen[bytes]":
        """Start the command in a process of its own, with cells that take so many seconds."""
        code = f"from kd.launch import fan_out, processes; fan_out.WORKER = ({str(STAND_IN)!r},); fan_out.POLL_OTHERS = 0.3\n"
        code += "processes.PRELOAD = ()\n"
        code += f"import sys; sys.argv = {['kd-table', 'run', *self.words('--workers=2')]!r}\nfrom kd.table import main; main()"
        path = os.pathsep.join(path for path in sys.path if path)
        environment = {**os.environ, "PYTHONPATH": path, "STAND_IN_SECONDS": str(seconds)}
        return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def events(self) -> Counter[str]:
        """Return how often each run was made to its end."""
        lines = (self.runs / "events.txt").read_text().splitlines() if (self.runs / "events.txt").exists() else []
        return Counter(line.split()[1] for line in lines if line.startswith("done "))


@pytest.fixture
def tables(small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Tables:
    return Tables(small, tmp_path, capsys)


def seeds(*numbers: int, **more: Sequence[Any]) -> dict[str, Any]:
    return {"method": ["kd"], "student": ["2l"], **more, "seed": list(numbers)}


def test_missing_cells_are_made_and_their_figures_written_once(tables: Tables) -> None:
    tables.write(seeds(0, 1), seeds(0, method=["finetune"]))
    status, out, _ = tables()
    assert status == 0
    assert "3 cells, 3 to make" in out
    assert re.search(r"\[3/3\] method=.* validation accuracy 0\.0\d00", out)
    rows = read_figures(tables.figures)
    assert [(row.method, row.seeds, row.split, row.value) for row in rows if row.split == "test"].count(
        ("kd", "1", "test", 0.01)
    ) == 1
    assert len(rows) == 6
    assert {row.confidence for row in rows} == {"measured"}
    assert all("method=" in row.command and "paths." not in row.command for row in rows)
    status, out, _ = tables()
    assert (status, "3 cells, 0 to make" in out) == (0, True)
    assert read_figures(tables.figures) == rows


def test_a_cell_whose_figures_stand_in_the_file_counts_as_done(tables: Tables) -> None:
    tables.write(seeds(0, 1))
    tables()
    tables.runs = tables.folder / "elsewhere"
    tables.write(seeds(0, 1, 2))
    status, out, _ = tables(name="plan")
    assert status == 0
    assert "2 done, 1 missing" in out
    assert out.count("done, elsewhere") == 2


def test_a_method_that_is_not_listed_gets_its_row_and_verdict_by_one_command(tables: Tables) -> None:
    tables.write(seeds(0, 1, method=["finetune", "kd", "pkd"]), new_rows="kd")
    status, out, _ = tables("rows=alp_kd")
    assert (status, "4 cells, 4 to make" in out) == (0, True)
    table = out[out.index("# A table") :]
    assert Counter(re.findall(r"^\| (\w+) 2l ", table, re.MULTILINE)) == {"finetune": 2, "alp_kd": 2}
    assert "too few seeds to decide" in table
    status, out, _ = tables("rows=alp_kd")
    assert (status, "4 cells, 0 to make" in out, "# A table" in out) == (0, True, True)
    status, out, _ = tables("rows=kd", name="plan")
    assert "2 done, 2 missing" in out
    status, _, err = tables("rows=nosuch")
    assert (status, "method=nosuch" in err) == (1, True)


def test_rows_are_printed_of_the_students_and_tasks_that_are_chosen(tables: Tables) -> None:
    tables.write(seeds(0, method=["finetune", "kd"], student=["2l", "3l"]))
    tables("rows=kd")
    status, out, _ = tables("rows=kd", "--only", "student=3l")
    table = out[out.index("# A table") :]
    assert status == 0
    assert Counter(re.findall(r"^\| (\w+ \dl) ", table, re.MULTILINE)) == {"finetune 3l": 2, "kd 3l": 2}


def test_printed_rows_have_the_figures_of_the_paper(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tables.folder)
    tables.write(seeds(0, method=["finetune", "kd"]))
    tables("rows=kd")
    ours = next(figure for figure in read_figures(tables.figures) if (figure.method, figure.split) == ("kd", "test"))
    source = {"confidence": "printed", "aggregate": "one run", "source": "Table 1"}
    of_paper = replace(ours, value=0.123, seeds="", **dict.fromkeys(OF_RUNS, ""), **source)
    paper = tables.folder / "experiments" / "mine" / "paper.csv"
    paper.parent.mkdir(parents=True)
    write_figures(paper, [of_paper, replace(of_paper, method="pkd", value=0.456)])
    status, out, _ = tables("rows=kd")
    assert (status, "| 12.3 |" in out, "45.6" in out) == (0, True, False)
    paper.write_text("rubbish,x\n1,2\n")
    tables.write(seeds(0, 1, method=["finetune", "kd"]))
    made = tables.events()
    status, out, err = tables("rows=kd")
    assert (status, "missing column" in err, "# A table" in out) == (2, True, False)
    assert tables.events() == made, "a file that cannot be read is told before anything is trained"
    paper.unlink()
    status, out, _ = tables("rows=kd", "nonsense.key=1")
    assert (status, "4 cannot be planned" in out) == (1, True)


@pytest.mark.parametrize(
    ("git", "commit"),
    [
        ({"commit": "0123456789", "dirty": False}, "0123456"),
        ({"commit": "0123456789", "dirty": True}, "0123456-dirty"),
        (None, ""),
    ],
)
def test_the_commit_of_a_row_says_if_the_code_was_another(git: dict[str, Any] | None, commit: str) -> None:
    assert commit_of({"git": git}) == commit


def test_broken_and_failed_cells_are_listed_and_the_rest_is_made(tables: Tables) -> None:
    tables.write(seeds(0, 13), {**seeds(0), "student": ["nosuch"]})
    status, out, err = tables()
    assert status == 1
    assert "kd-table: 1 cells done, 1 failed, 1 cannot be planned:\n  method=kd seed=13" in err.replace(" student=2l", "")
    assert "the loss is not finite (change: optimizer.lr)" in err
    assert "student=nosuch" in err
    assert "1 cannot be planned" in out
    status, out, _ = tables(name="plan")
    assert status == 1
    assert re.search(r"^failed +method=kd seed=13 .*: the loss is not finite", out, re.MULTILINE)
    assert re.search(r"^broken +method=kd seed=0 student=nosuch: .*nosuch", out, re.MULTILINE)


def test_a_needed_run_that_fails_alone_is_no_cell(tables: Tables) -> None:
    tables.write({**seeds(13), "teacher.minilm.run.seed": [13]})
    status, _, err = tables("--needed")
    assert (status, "kd-table: 0 cells done, 1 run(s) that cells need failed:\n  finetune-full-" in err) == (1, True), err
    status, _, err = tables()
    assert (status, "kd-table: 0 cells done, 1 failed:\n  method=kd" in err) == (1, True), err


def test_an_array_tells_cells_that_cannot_be_planned(tables: Tables) -> None:
    tables.write(seeds(0), {**seeds(0), "student": ["nosuch"]})
    status, out, err = tables("--slurm")
    assert (status, "sbatch " in out) == (1, True)
    assert "kd-table: 0 cells done, 1 cannot be planned:\n  method=kd seed=0 student=nosuch\n" in err


def test_plan_tells_time_and_disk_of_what_is_missing(tables: Tables) -> None:
    tables.write(seeds(0, 1))
    assert "unknown until a cell is done" in tables(name="plan")[1]
    assert "first 1 run(s) that they need" in tables(name="plan")[1]
    tables("--only", "seed=0")
    assert re.search(r"time left with \d+ worker\(s\): \d+ s; disk: \d", tables(name="plan")[1])


def test_runs_that_failed_before_are_counted_as_what_they_are(tables: Tables) -> None:
    tables.write({**seeds(13), "method.temperature": [1, 2], "teacher.minilm.run.seed": [13]})
    tables()
    _, out, _ = tables(name="plan")
    assert "0 done, 2 missing, 0 of these failed before\n" in out  # the cells themselves have never been tried
    assert re.search(
        r"^first 1 run\(s\) that they need: (finetune-full\S+)\n\1 failed before: the loss is not", out, re.MULTILINE
    )


def test_the_count_of_planned_cells_is_cleared_before_anything_else(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    tables.write(seeds(0, 1))
    assert tables(name="plan")[2] == f"\rplanning cell 1 of 2\rplanning cell 2 of 2{command.CLEAR_LINE}"
    tables.write(seeds(0), {**seeds(0), "method.temperature": [4.0]}, seeds(1))  # two cells are one run
    status, _, err = tables(name="plan")
    assert status == 2
    assert err.startswith(f"\rplanning cell 1 of 3\rplanning cell 2 of 3{command.CLEAR_LINE}kd-table: two cells")


def test_only_chooses_cells_and_needed_their_teachers(tables: Tables) -> None:
    tables.write(seeds(0, 1, method=["kd", "finetune"]))
    assert tables("--only", "method=finetune", "--needed")[0] == 0
    assert len(tables.events()) == 1
    assert all("full" in name for name in tables.events())
    assert tables("--only", "method=finetune seed=1")[0] == 0
    assert len(tables.events()) == 2
    for words in ("method=pkd", "'method=kd"):
        status, _, err = tables("--only", words)
        assert (status, "change: --only" in err) == (2, True)


def test_only_leaves_out_cells_that_cannot_be_planned_and_reads_labels_with_spaces(tables: Tables) -> None:
    named = {"my kd": ["method=kd", "method.temperature=2"]}
    tables.write(seeds(0, method=["nosuch", named]))
    status, out, err = tables("--only", "'method=my kd'")
    assert (status, err) == (0, "")
    assert "1 cells, 1 to make" in out
    assert [row.method for row in read_figures(tables.figures)] == ["my kd"] * 2
    assert tables("--only", "method=nosuch", name="plan")[0] == 1


def test_two_cells_that_are_one_run_are_refused(tables: Tables) -> None:
    tables.write(seeds(0), {**seeds(0), "method.temperature": [4.0]})
    assert "temperature: 4.0" in (Path(command.__file__).parents[2] / "conf/method/kd.yaml").read_text()
    status, _, err = tables()
    assert status == 2
    assert "two cells" in err
    assert "change: scales" in err


@pytest.mark.parametrize("words", [[], ["nosuch"], ["mine.yaml", "scale=nosuch"]])
def test_a_command_without_a_table_ends_with_2(words: list[str], tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    tables.write(seeds(0))
    monkeypatch.chdir(tables.folder)
    monkeypatch.setattr(sys, "argv", ["kd-table", "run", *words])
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == 2
    assert "change: " in tables.capsys.readouterr().err


def test_the_number_of_cells_side_by_side_is_given_or_measured(tables: Tables) -> None:
    found = [command.parser().parse_args(["run", "mine", *words]) for words in ([], ["--workers=3"], ["--workers=measure"])]
    assert [command.launcher_of(arguments).workers for arguments in found] == [None, 3, "measure"]
    with pytest.raises(SystemExit):
        command.parser().parse_args(["run", "mine", "--workers=all"])
    assert "invalid count value: 'all'" in tables.capsys.readouterr().err
    tables.write(seeds(0))
    status, _, err = tables("--workers=measure", "--ray=local")
    assert (status, "change: launcher.workers" in err) == (2, True)
    status, _, err = tables("--workers=0")
    assert (status, "change: launcher.workers" in err) == (2, True)


@pytest.mark.parametrize("words", [[], ["nosuch"], ["paths.glue=nowhere"]])
def test_a_submission_without_finished_runs_is_refused(
    words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kd-table", "submit", *words])
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == 2
    assert "change: runs" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_refused(tables: Tables) -> None:
    tables.write(seeds(0))
    (tables.folder / "file").write_text("")
    tables.runs = tables.folder / "file" / "runs"
    status, _, err = tables()
    assert (status, "change: paths.runs" in err) == (2, True)


def test_damaged_figures_are_refused(tables: Tables) -> None:
    tables.write(seeds(0))
    tables.figures.write_text("paper,table\na,b\n")
    status, _, err = tables()
    assert (status, "missing column" in err) == (2, True)


def test_an_array_holds_what_is_missing_and_its_tasks_make_it(tables: Tables) -> None:
    tables.write(seeds(0, 1))
    tables("--only", "seed=0")
    status, out, _ = tables("--slurm", "--time=01:00:00", "--sbatch=--gres=gpu:1")
    assert (status, len(tables.events())) == (0, 2)
    (script,) = (tables.runs / ".launch").glob("*.sbatch")
    text = script.read_text()
    assert "#SBATCH --array=0-0\n#SBATCH --time=01:00:00\n#SBATCH --requeue" in text
    assert "#SBATCH --gres=gpu:1" in text
    assert f"sbatch {script}" in out
    subprocess.run(["bash", "-n", script], check=True)
    tables.write(seeds(0, 1, 2), seeds(0, method=["dml"], teacher=[[]]))
    status, out, err = tables("--slurm", "--array-limit=1")
    assert (status, "change: launcher.array_limit" in err) == (2, True)


def test_an_array_makes_first_what_others_need(tables: Tables) -> None:
    tables.write(seeds(0, 1))
    _, out, _ = tables("--slurm")
    assert "--array=0-0" in out
    assert "--dependency=afterany:$first --array=1-2" in out
    (listed,) = (tables.runs / ".launch").glob("*.jobs")
    assert "full" in listed.read_text().splitlines()[0].partition("command")[0]


def test_a_second_script_leaves_the_first_as_it_is(tables: Tables) -> None:
    tables.write(seeds(0, 1))
    tables("--slurm")
    before = {path: path.read_text() for path in (tables.runs / ".launch").iterdir()}
    tables("--slurm", "--only", "seed=1")
    after = {path: path.read_text() for path in (tables.runs / ".launch").iterdir()}
    assert len(after) == len(before) + 2
    assert {path: after[path] for path in before} == before


def test_a_run_of_two_scales_has_figures_of_both(tables: Tables) -> None:
    tables.write(seeds(0))
    path = tables.folder / "mine.yaml"
    scales = yaml.safe_load(path.read_text())["scales"]
    scales["full"] = {**scales["local"], "cells": [seeds(0, 1)]}
    path.write_text(yaml.safe_dump({"paper": "toy", "title": "A table", "scales": scales}))
    assert tables()[0] == 0
    assert tables("scale=full")[0] == 0
    assert len(tables.events()) == 3
    found = Counter((row.scale, row.seeds) for row in read_figures(tables.figures))
    assert found == {("local", "0"): 2, ("full", "0"): 2, ("full", "1"): 2}


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"), [(130, 0, True), (0, 0, False), (1, 0, False), (130, RESTARTS, False)]
)
def test_a_task_at_its_time_limit_is_queued_again(
    tables: Tables, monkeypatch: pytest.MonkeyPatch, status: int, restarts: int, requeued: bool
) -> None:
    """The script itself, with stand-ins for the interpreter and for SLURM's `scontrol`."""
    tables.write(seeds(0))
    monkeypatch.setattr(sys, "executable", str(tables.folder / "python"))
    tables("--slurm")
    (script,) = (tables.runs / ".launch").glob("*.sbatch")
    programs = {
        "python": f"trap 'exit {status}' TERM; echo $3 $4 > started; while :; do sleep 0.05; done",
        "scontrol": "echo $@ > asked",
    }
    for name, text in programs.items():
        (tables.folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (tables.folder / name).chmod(0o755)
    asked, started = tables.folder / "asked", tables.folder / "started"
    environment = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    text = script.read_text().replace(f"cd {Path.cwd()} ", f"cd {tables.folder} ")
    path = f"{tables.folder}:{os.environ['PATH']}"
    process = subprocess.Popen(["bash", "-c", text], env={**os.environ, **environment, "PATH": path})
    until = time.monotonic() + 30
    while not started.exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=30) == status
    assert started.read_text().endswith(".jobs 3\n")
    assert asked.exists() == requeued
    if requeued:
        assert asked.read_text() == "requeue 7_3\n"


def test_a_figure_that_cannot_be_written_does_not_stop_the_others(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    tables.write(seeds(0, 1))

    def full(path: Path, rows: Sequence[Any]) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr("kd.table.make.add_figures", full)
        status, _, err = tables()
        again = tables()
    assert (status, len(tables.events())) == (1, 3)
    assert "kd-table: 2 cells done, figures of 2 of them not written, which the next command does:\n" in err
    assert "failed" not in err
    assert "change: paths.runs" in err
    assert (again[0], "change: paths.runs" in again[2]) == (2, True)  # figures of runs that were done before
    status, out, _ = tables()
    assert (status, "0 to make" in out) == (0, True)
    assert len(read_figures(tables.figures)) == 4


def planned(tables: Tables, *products: dict[str, Any]) -> Any:
    content = {"paper": "toy", "title": "A", "scales": {"local": {"overrides": tables.overrides, "cells": list(products)}}}
    table = parse_table("toy", content)
    return plan_table(table, table.cells("local"), [f"paths.runs={tables.runs}"])


def test_labels_that_a_product_lacks_are_those_of_the_run(tables: Tables) -> None:
    (cell,) = planned(tables, {"seed": [3]}).cells
    assert [cell.label(key) for key in ("method", "student", "teacher", "task")] == ["pkd", "3l", "minilm", "file"]
    assert cell.row == "pkd 3l"
    (cell,) = planned(tables, {"method": ["kd"], "method.temperature": [2], "seed": [3]}).cells
    assert cell.row == "kd 3l method.temperature=2"


def test_a_cell_that_cannot_be_planned_leaves_the_others(tables: Tables) -> None:
    found = planned(tables, {"method": ["kd", "nosuch"], "seed": [0]})
    assert [cell.label("method") for cell in found.cells] == ["kd"]
    ((cell, failure),) = found.broken
    assert (cell.labels["method"], failure.users) == ("nosuch", True)
    with pytest.raises(InputError, match="two cells"):
        planned(tables, {"method": ["kd"], "seed": [0, 0]})


@pytest.mark.slow
def test_three_commands_share_a_table_and_make_no_cell_twice(tables: Tables) -> None:
    tables.write(seeds(*range(9)))
    processes = [tables.start(0.5) for _ in range(3)]
    outputs = [process.communicate(timeout=300)[0].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert set(tables.events().values()) == {1}
    assert len(tables.events()) == 10
    assert all("9 cells done" in output for output in outputs)
    own = [len(re.findall(r"^\[\d+/9\] method.* (?:s|min)(?:;.*)?$", output, re.MULTILINE)) for output in outputs]
    assert sum(own) == 9, outputs
    assert len(read_figures(tables.figures)) == 18


@pytest.mark.slow
def test_a_table_that_is_killed_again_and_again_loses_and_repeats_nothing(tables: Tables) -> None:
    tables.write(seeds(*range(8)))
    generator = random.Random(0)
    for _ in range(5):
        process = tables.start(0.8)
        before, until = len(tables.events()), time.monotonic() + 60
        while len(tables.events()) == before and time.monotonic() < until and process.poll() is None:
            time.sleep(0.05)  # at least one run is made to its end, or the test would kill nothing but starts
        time.sleep(generator.uniform(0.0, 1.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
    output, _ = tables.start(0.1).communicate(timeout=300)
    assert "8 cells done" in output.decode()
    assert set(tables.events().values()) == {1}
    assert len(tables.events()) == 9
    assert {row.seeds for row in read_figures(tables.figures)} == {str(seed) for seed in range(8)}
