"""The reference of the configuration, from the commented YAML of `conf`."""

import re
from collections.abc import Iterator
from pathlib import Path

from commented import header, keys
from kd.config.compose import conf_folder
from markup import cell, code
from method_pages import comment

FILE = "reference/configuration.md"
NOT_CHOSEN = {"hydra", "table", "tune"}
"""Folders of which `kd-train` chooses nothing and that have pages of their own."""


def groups() -> list[Path]:
    """Return the folders of the groups."""
    return sorted(folder for folder in conf_folder().iterdir() if folder.is_dir() and folder.name not in NOT_CHOSEN)


def page() -> str:
    """Return the reference."""
    lines = [
        "# Configuration reference",
        "",
        "Every group, every option and every key, with its default and the comment that stands beside it in `conf`. What the "
        "groups are for is on the page [Configuration](../configuration.md). A file that begins with `/base/...` "
        "has the keys of that file too.",
        "",
        "## Keys without a group",
        "",
        *file(conf_folder() / "train.yaml", ""),
    ]
    for folder in groups():
        lines += [f"## {folder.name}", ""]
        for path in sorted(folder.glob("*.yaml")):
            lines += [f"### {folder.name}/{path.stem}", "", *file(path, folder.name)]
    return "\n".join(lines) + "\n"


def file(path: Path, group: str) -> Iterator[str]:
    """Yield the part of the reference about a file."""
    if lines := header(path):
        yield from ("```text", *lines, "```", "")
    if defaults := chosen(path):
        yield f"Begins with: {', '.join(defaults)}."
        yield ""
    if group == "method":
        yield f"Options and their meaning: [{path.stem}](../methods/{path.stem}.md)."
        yield ""
        return
    found = keys(path)
    if found:
        yield from ("| key | default | comment |", "|---|---|---|")
        for key in found:
            yield f"| `{key.name}` | {code(key.value) if key.value else ''} | {cell(comment(key))} |"
        yield ""


def chosen(path: Path) -> list[str]:
    """Return the files that a file begins with, as its `defaults` name them."""
    text = path.read_text(encoding="utf-8")
    if path.stem == "train":
        return []
    found = re.search(r"^defaults:(.*(?:\n +- .*)*)", text, re.MULTILINE)
    if found is None:
        return []
    entries = [line.strip(" -[]") for line in re.split(r"[\n,]", found[1]) if line.strip(" -[]")]
    return [code(re.sub(r"\s*#.*", "", entry)) for entry in entries]
