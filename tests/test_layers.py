"""The layers of the package: no folder imports one above it, so there are no circles between folders."""

import ast
from collections.abc import Iterator
from pathlib import Path

import kd

ROOT = Path(kd.__file__).parent

LAYERS = (
    "errors system schedules functional config data forward models methods engines runs teacher_cache build results training "
    "bench launch table tune report probe deploy clean sweeps train api plugins"
).split()
"""Folders and top-level modules of the package, each above those that it may import."""


def layer(module: str) -> str:
    return module.split(".")[1]


def imports(file: Path) -> Iterator[str]:
    """Every module of the package that a file imports, also inside functions and for annotations alone."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.startswith("kd."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "kd":
            yield from ([node.module] if "." in node.module else [f"kd.{name.name}" for name in node.names])
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"


def test_every_folder_has_its_layer() -> None:
    parts = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path.is_dir() and any(path.glob("**/*.py")))}
    assert parts - {"__init__"} == set(LAYERS)


def test_few_modules_lie_at_the_top() -> None:
    top = ["__init__", "clean", "errors", "report", "schedules", "sweeps", "train"]
    assert sorted(path.stem for path in ROOT.glob("*.py")) == top


def test_no_folder_imports_one_above_it() -> None:
    upwards = [
        f"{file.relative_to(ROOT)} imports {module}"
        for file in sorted(ROOT.rglob("*.py"))
        if file.parent != ROOT or file.stem != "__init__"
        for module in imports(file)
        if LAYERS.index(layer(module)) > LAYERS.index(file.relative_to(ROOT).parts[0].removesuffix(".py"))
    ]
    assert not upwards
