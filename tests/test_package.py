"""The installed package, its documentation and its pinned dependencies."""

import ast
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import kd

ROOT = Path(__file__).parent.parent


def test_wheel_carries_the_configuration_and_works_from_any_folder(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path], cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    packed = {path.relative_to(tmp_path / "site/kd/conf") for path in (tmp_path / "site/kd/conf").rglob("*.yaml")}
    assert packed == {path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml")}
    assert (tmp_path / "site/kd/py.typed").is_file()
    (about,) = (tmp_path / "site").glob("*.dist-info/METADATA")
    assert "License-Expression: Apache-2.0" in about.read_text()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-m", "kd.train", "method=kd", "student=4l", "--cfg", "job"]
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert "_target_: kd.methods.kd.KD" in found
    assert "layers: 4" in found


@pytest.mark.parametrize("command", ["train", "bench"])
def test_help_imports_nothing_heavy(command: str) -> None:
    show = f"try: kd.{command}.main()\nexcept SystemExit: pass\nprint(sorted(sys.modules))"
    code = f"import sys; sys.argv = ['kd-{command}', '--help']; import kd.{command}\n{show}"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert f"kd-{command}" in shown
    for module in ("torch", "lightning", "transformers", "wandb"):
        assert f"'{module}'" not in shown


INTERNAL = {"base", "engine", "hydra", "paths", "sweep"}
"""Groups of which a user chooses nothing."""


def test_readme_names_every_choice_of_every_group() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) < 2500, "a page to start from; what is longer belongs beside the part that it is about"
    groups = {folder.name for folder in (ROOT / "conf").iterdir() if folder.is_dir()} - INTERNAL
    assert {"method", "student", "teacher", "task"} < groups
    for group in sorted(groups):
        for path in (ROOT / "conf" / group).glob("*.yaml"):
            assert re.search(rf"`\[?{path.stem}\]?`", text), f"{group}={path.stem} is not in the README"


def test_citation_is_of_this_version() -> None:
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (found["version"], found["license"]) == (kd.__version__, "Apache-2.0")


def docstrings(tree: ast.Module) -> list[tuple[int, str]]:
    """Return line and text of the docstrings of a module, its classes, functions, attributes and constants."""
    statements = [
        statement
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        for statement in node.body
    ]
    values = [statement.value for statement in statements if isinstance(statement, ast.Expr)]
    return [(v.lineno, v.value) for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)]


def test_no_docstring_opens_with_a_question() -> None:
    """Check that docstrings name their subject: "Return whether ...", "Keys that ..." instead of "Whether ...", "What ..."."""
    texts = {
        f"{path.relative_to(ROOT)}:{line}": text
        for folder in ("kd", "tests")
        for path in (ROOT / folder).rglob("*.py")
        for line, text in docstrings(ast.parse(path.read_text()))
    }
    assert len(texts) > 1000
    assert not {location: text for location, text in texts.items() if re.match(r"\s*(What|Of|Whether|Where)\b", text)}


def test_lock_pins_torch_and_every_dependency_exactly() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert pins["torch"] == "2.13.0"
    declared = (ROOT / "pyproject.toml").read_text().split("dependencies = [")[1].split("]")[0]
    for name in re.findall(r'"([\w-]+)', declared):
        assert name in pins, name
