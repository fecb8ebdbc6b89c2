"""The installed package, its documentation and its pinned dependencies."""

import ast
import os
import pydoc
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import kd
from kd.config.compose import compose, typed

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


@pytest.mark.parametrize(
    "command", ["train", "bench", "table", "tune", "clean", "probe", "deploy.export", "deploy.latency", "deploy.predict"]
)
def test_help_imports_nothing_heavy(command: str) -> None:
    name = command.rpartition(".")[2]
    show = f"try: kd.{command}.main()\nexcept SystemExit: pass\nprint(sorted(sys.modules))"
    code = f"import sys; sys.argv = ['kd-{name}', '--help']; import kd.{command}\n{show}"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert f"kd-{name}" in shown
    for module in ("torch", "lightning", "transformers", "wandb", "optuna"):
        assert f"'{module}'" not in shown


INTERNAL = {"base", "hydra", "table", "tune"}
"""Folders of which `kd-train` chooses nothing."""

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def test_readme_is_a_page() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    prose = [line for line in lines if not line.startswith("|")]  # the table of methods has a row for each
    assert len(" ".join(prose).split()) <= 600, "what is longer belongs into docs/"


def test_readme_has_the_commands_that_install_and_test() -> None:
    text = (ROOT / "README.md").read_text()
    for command in ("make install", "make demo", "make test"):
        assert re.search(rf"(^|`){command}( |`|$)", text, re.MULTILINE), command
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text()


def test_documentation_names_every_choice_of_every_group() -> None:
    assert {ROOT / "docs" / "configuration.md", ROOT / "docs" / "methods.md"} < set(PAGES)
    text = "\n".join(page.read_text() for page in PAGES if page.name != "CONTRIBUTING.md")
    groups = {folder.name for folder in (ROOT / "conf").iterdir() if folder.is_dir()} - INTERNAL
    assert {"method", "student", "teacher", "task", "engine", "paths", "sweep"} < groups
    for group in sorted(groups):
        row = re.search(rf"^\| `{group}` \|.*$", text, re.MULTILINE)
        assert row, f"docs/configuration.md has no row for {group}"
        for path in (ROOT / "conf" / group).glob("*.yaml"):
            assert re.search(rf"`\[?{path.stem}\]?`", row[0]), f"{group}={path.stem} is not in its row of docs/configuration.md"


def test_readme_names_every_method() -> None:
    text = (ROOT / "README.md").read_text()
    for path in (ROOT / "conf" / "method").glob("*.yaml"):
        assert re.search(rf"^\| `{path.stem}` \|", text, re.MULTILINE), path.stem


def links_of(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", page.read_text())


def test_readme_links_every_page() -> None:
    links = {(ROOT / link.partition("#")[0]).resolve() for link in links_of(ROOT / "README.md") if "://" not in link}
    assert {page.resolve() for page in PAGES} - links == {(ROOT / "README.md").resolve()}


def test_contributing_says_what_every_folder_holds() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text().split("## Where things are")[1]
    named = set(re.findall(r"`([\w./]+)`", table))
    tops = {name for name in ("conf", "docs", "experiments", "kd", "tests") if any((ROOT / name).glob("**/*"))}
    parts = {f"kd/{folder.name}" for folder in (ROOT / "kd").iterdir() if any(folder.glob("**/*.py"))}
    assert {"kd/data", "kd/models", "conf", "docs", "experiments", "tests"} <= tops | parts
    assert tops | parts <= named


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_links_point_at_files_and_headings_that_exist(page: Path) -> None:
    for link in links_of(page):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


@pages
def test_files_and_names_of_the_code_exist(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text):
        if re.fullmatch(r"(kd|conf|docs|tests|experiments)/[\w./-]+", name):
            assert (ROOT / name).exists(), name
        if re.fullmatch(r"kd(\.\w+)+", name):
            assert pydoc.locate(name) is not None, name


def commands_of(page: Path) -> list[list[str]]:
    """The overrides of each `kd-train` or `-m kd.train` command of a page, code blocks and inline code alike."""
    found = []
    text = page.read_text().replace("\\\n", " ")
    for block in [*re.findall(r"```bash\n(.*?)```", text, re.DOTALL), *re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)]:
        for line in block.splitlines():
            if match := re.search(r"(?:^|\s)(?:kd-train|-m kd\.train)(?=\s|$)(.*)", line):
                rest = match[1].rstrip("'") if "bash -c '" in line else match[1]
                found.append([word for word in shlex.split(rest, comments=True) if not word.startswith("--")])
    return found


def points_of(overrides: list[str]) -> list[list[str]]:
    """The points of a sweep; one for a command that is none."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (points,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(overrides), None)
    return [list(point) for point in points]


@pages
def test_commands_compose(page: Path) -> None:
    for command in commands_of(page):
        for point in points_of(command):
            typed(compose(point))


def test_commands_are_found_where_they_are_shown() -> None:
    counts = {page.name: len(commands_of(page)) for page in PAGES}
    assert sum(counts.values()) >= 30
    for name in ("README.md", "configuration.md", "methods.md", "models.md", "data.md", "distributed.md", "sweeps.md"):
        assert counts[name] > 0, name
    readme = [" ".join(command) for command in commands_of(ROOT / "README.md")]
    assert {"method=finetune student=full teacher=[]", "", "method=finetune,kd,pkd seed=0,1,2", "trainer=ddp"} <= set(readme)


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
