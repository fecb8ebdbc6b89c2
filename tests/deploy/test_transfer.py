"""docs/transfer.md, followed at small size: every command in its order, from a folder of a teacher to predictions."""

import csv
import json
import random
import re
import shlex
from collections.abc import Callable
from glob import glob
from pathlib import Path
from typing import Any

import pytest

import kd.deploy.export
import kd.deploy.predict
import kd.report
import kd.train
from conftest import BAD, GOOD, sentence, write_csv
from kd.runs.run import Run
from whole_runs import Small, made

PAGE = Path(__file__).parent.parent.parent / "docs" / "transfer.md"
COMMANDS = {"kd-train": kd.train, "kd-export": kd.deploy.export, "kd-predict": kd.deploy.predict, "kd-report": kd.report}
SMALL = ["task.max_length=32", "trainer.max_epochs=6", "trainer.batch_size=16", "optimizer.lr=5e-3", "trainer.progress=none"]
"""Overrides that make a run of the page small."""


def commands() -> list[list[str]]:
    """The commands of the page, as words."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8").replace("\\\n", " "), re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


@pytest.fixture(scope="module")
def teacher(small: Small) -> Run:
    """A classifier of four layers that has learnt the toy task."""
    return made(small("method=finetune", "student=full", "teacher=[]", "trainer.max_epochs=20"))[0]


def prepare(teacher: Run) -> None:
    """Write the files of the page into this folder: 80 labels, 160 texts without."""
    Path("teacher").symlink_to(teacher.student)
    write_csv(Path("labels.csv"), 80, seed=11)
    write_csv(Path("test.csv"), 32, seed=12)
    write_csv(Path("new.csv"), 64, seed=13)
    generator = random.Random(14)
    Path("more.txt").write_text("".join(f"{sentence(generator, (BAD, GOOD)[n % 2])}\n" for n in range(160)))


def test_the_page_leads_from_a_teacher_to_predictions(
    teacher: Run, ends: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prepare(teacher)
    words = commands()
    assert [line[0] for line in words] == ["kd-train", "kd-export", "kd-predict", "kd-train", "kd-train", "kd-report"]
    printed = []
    for name, *given in words:
        found = [path for word in given for path in (sorted(glob(word)) if "*" in word else [word])]
        ended = ends(COMMANDS[name], *found, *(SMALL if name == "kd-train" else ()))
        assert ended.status == 0, f"{name} {found}\n{ended.output}\n{ended.errors}"
        printed.append(ended.output + ended.errors)
    assert "76 examples of train have labels, 160 have none" in printed[0]
    assert printed[-1].count("data.unlabelled=") == 1  # tells the two rows of kd apart
    records = [json.loads(path.read_text()) for path in Path("runs").glob("*/result.json")]
    more, fewer, baseline = sorted(records, key=lambda record: (record["method"] != "kd", -record["steps"]))
    assert (more["steps"], fewer["steps"], baseline["steps"]) == (6 * 15, 6 * 5, 6 * 5)
    assert more["metrics_teacher"]["hub"] == fewer["metrics_teacher"]["hub"]
    with Path("new.predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["line", "label", "probability_negative", "probability_positive"]
    right = [row["label"] == ("negative", "positive")[n % 2] for n, row in enumerate(rows)]
    assert sum(right) / len(right) > 0.7
