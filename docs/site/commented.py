"""Commented YAML: every key of a file with its value and the comments that stand beside and above it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

LIST_AS_TEXT = 100
"""Characters of a mapping or list in one line of the file, up to which it is one value and not a part with keys of its own."""


@dataclass(frozen=True)
class Key:
    """A key of a file.

    Attributes:
        name: path of the key, `before.run.trainer`.
        value: its value as the file writes it; empty for a part with keys of its own.
        comment: comment beside it, or above it.
    """

    name: str
    value: str
    comment: str


def header(path: Path) -> list[str]:
    """Return the comment lines that a file begins with, without their marks; `# @package` is none of them."""
    lines = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line[1:].removeprefix(" "))
    return lines


def idea_and_settings(lines: list[str]) -> tuple[str, list[str]]:
    """Return the first paragraph of a header, and the lines after the empty one that ends it."""
    end = lines.index("") if "" in lines else len(lines)
    return " ".join(lines[:end]), lines[end + 1 :]


def keys(path: Path) -> list[Key]:
    """Return the keys of a file in their order; `defaults`, which choose other files, are left out."""
    text = path.read_text(encoding="utf-8")
    root = yaml.compose(text)
    if not isinstance(root, yaml.MappingNode):
        return []
    comments = _comments(text)
    lines = text.split("\n")
    return list(_keys(root, "", text, comments, _leading(lines)))


def _leading(lines: list[str]) -> int:
    return next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))


def _comments(text: str) -> dict[int, str]:
    """Return line -> comment, of the comments that stand alone or beside a value."""
    ends: dict[int, int] = {}
    for token in yaml.scan(text):
        if token.end_mark.index > token.start_mark.index:
            ends[token.end_mark.line] = max(ends.get(token.end_mark.line, 0), token.end_mark.column)
    found = {}
    for number, line in enumerate(text.split("\n")):
        rest = line[ends.get(number, 0) :].strip()
        if rest.startswith("#"):
            found[number] = rest[1:].strip()
    return found


def _keys(node: yaml.MappingNode, prefix: str, text: str, comments: dict[int, str], first: int) -> Iterator[Key]:
    for key, value in node.value:
        if not prefix and key.value == "defaults":
            continue
        name, line = f"{prefix}{key.value}", key.start_mark.line
        above = line - 1
        while above >= first and above in comments and text.split("\n")[above].lstrip().startswith("#"):
            above -= 1
        words = [comments[number] for number in range(above + 1, line)]
        inner = isinstance(value, yaml.MappingNode) and not value.flow_style and value.value
        beside = [comments[line]] if line in comments else []
        if not inner and value.end_mark.line != line and value.end_mark.line in comments and value.end_mark.column:
            beside.append(comments[value.end_mark.line])
        written = "" if inner else " ".join(text[value.start_mark.index : value.end_mark.index].split())
        yield Key(name, written, " ".join([*words, *beside]))
        if inner:
            yield from _keys(value, f"{name}.", text, comments, first)
