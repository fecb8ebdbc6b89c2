"""Examples of docs/python.md and of its notebook, which run, and the public names, which the page lists."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kd
from conftest import tiny_model

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGE = (DOCS / "python.md").read_text(encoding="utf-8")


def test_the_page_names_every_public_name_and_no_other() -> None:
    named = re.findall(r"^\| `kd\.(\w+)` \|", PAGE, re.MULTILINE)
    assert sorted(named) == sorted(kd.__all__)


def test_public_names_are_there_and_documented() -> None:
    assert set(kd.__all__) <= set(dir(kd))
    for name in kd.__all__:
        assert getattr(kd, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'no_such'"):
        _ = kd.no_such  # type: ignore[attr-defined]


def test_public_names_are_typed() -> None:
    """Compare the names for type checkers with those that are imported when they are read."""
    text = Path(kd.__file__).read_text(encoding="utf-8").partition("if TYPE_CHECKING:")[2].partition("__all__")[0]
    found = {name.strip() for line in re.findall(r"import (.+)", text) for name in line.split(",")}
    assert found == set(kd.__all__)
    assert {*kd._MODULES, "results"} == set(kd.__all__)
    assert (Path(kd.__file__).parent / "py.typed").is_file()


def test_examples_of_the_page_run(small: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every block in their order, in a folder with the models that they name."""
    monkeypatch.chdir(tmp_path)
    tiny_model(0, layers=2).save_pretrained("my-student")
    tiny_model(1).save_pretrained("my-teacher")
    real = kd.run

    def run(*words: str, **keys: Any) -> kd.RunResult:
        given = {word.partition("=")[0] for word in words} | keys.keys()
        runs = {"paths.runs": "runs", "trainer.max_epochs": 1, "teacher.minilm.run.trainer.max_epochs": 1}
        own = [word for word in small() if word.partition("=")[0] not in given | runs.keys()]
        return real(*own, *words, **runs, **keys)

    monkeypatch.setattr(kd, "run", run)
    ids = torch.randint(5, 30, (4, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 1, 0])}
    examples = [{name: tensor[n] for name, tensor in batch.items()} for n in range(4)]
    names: dict[str, Any] = {"batches": [batch] * 3, "examples": examples}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        exec(block, names)
    assert names["logits"].shape == (32, 2)
    assert names["means"]["count"].sum() == 2  # a student and its teacher
    assert (tmp_path / "my-distilled-student" / "config.json").is_file()
    expected = names["distillation"].eval()(**batch).terms
    names["student"].eval()
    terms = names["method"].terms(
        names["Step"](
            names["Forward"](names["ours"], names["inputs"], names["needs"]),
            [names["Forward"](names["theirs"], names["inputs"], names["needs_of_teacher"])],
            *(names["Batch"](names["inputs"], (names["inputs"],), batch["labels"], torch.arange(4)), names["task"]),
            kd.Progress(),
        )
    )
    for name, term in terms.items():
        torch.testing.assert_close(term, expected[name])


def test_the_loop_of_the_page_has_ten_lines() -> None:
    block = PAGE.split("## A method in a loop of yours")[1].split("```python\n")[1].split("```")[0]
    lines = [line for line in block.splitlines() if line.strip() and not re.match(r"(from|import) ", line)]
    assert len(lines) <= 10


def test_the_notebook_runs(tmp_path: Path) -> None:
    """Run its code in a new interpreter, with nothing of the tests in the path."""
    content = json.loads((DOCS / "python.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 6
    assert not any(cell["outputs"] for cell in content["cells"] if cell["cell_type"] == "code")
    checks = """
assert set(table["method"]) == {"finetune", "kd", "pkd"} and len(table) == 10
assert losses[-1] < losses[0]
print("the notebook ran")
"""
    code = tmp_path / "notebook.py"
    code.write_text("\n".join([*cells, checks]), encoding="utf-8")
    environment = {
        "PYTHONPATH": str(Path(kd.__file__).parent.parent),
        "PATH": "",
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, code], cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.rstrip().endswith("the notebook ran")
