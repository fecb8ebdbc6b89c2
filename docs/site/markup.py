"""Docstrings in Google style as Markdown, with equations as MathML, which browsers render without scripts."""

import html
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

from latex2mathml.converter import convert

LONG = 36
"""Characters of LaTeX from which an equation has a line of its own, which scrolls where it is wider than the screen."""

ROLE = re.compile(r":math:`([^`]+)`([.,:;]?)")


def mathml(latex: str, mark: str = "") -> str:
    r"""Return an equation and the punctuation mark behind it as MathML on one line, safe inside Markdown, a table included.

    >>> mathml(r"a_1")
    '<math ... display="inline">...'
    """
    block = len(latex) > LONG
    text = " ".join(convert(" ".join(latex.split()), display="block" if block else "inline").split("\n"))
    marks = {"*": "&#x2A;", "_": "&#x5F;", "|": "&#x7C;", "`": "&#x60;", "\\": "&#x5C;", "[": "&#x5B;", "~": "&#x7E;"}
    tags = re.split(r"(<[^>]*>)", text)
    safe = "".join(part if part.startswith("<") else re.sub(r"[*_|`\\\[~]", lambda m: marks[m[0]], part) for part in tags)
    if not block:
        return safe + mark
    inner = safe.removesuffix("</math>") + (
        f"<mtext>{mark}</mtext>" if mark else ""
    )  # behind the equation it would begin a line
    return f'<span class="equation">{inner}</math></span>'


def with_equations(text: str) -> str:
    """Return a text whose roles `:math:` are MathML."""
    return ROLE.sub(lambda role: mathml(role[1], role[2]), text)


EXAMPLE = re.compile(r"^( *)>>> .*(?:\n\1 *\S.*)*", re.MULTILINE)


def with_examples(text: str) -> str:
    """Return a text whose doctests are blocks of code: Markdown would read a printed list as a link."""
    return EXAMPLE.sub(lambda found: f"{found[1]}```pycon\n{found[0]}\n{found[1]}```", text)


def one_line(text: str) -> str:
    """Return a paragraph on one line, with equations as MathML."""
    return with_equations(" ".join(text.split()))


def cell(text: str) -> str:
    """Return a text for a cell of a table: one line, without bars."""
    return " ".join(text.split()).replace("|", "\\|")


def code(value: object) -> str:
    """Return a value as code in a cell of a table, where a bar would end the cell."""
    return f"<code>{html.escape(str(value)).replace('|', '&#124;').replace('*', '&#42;').replace('_', '&#95;')}</code>"


@dataclass(frozen=True)
class Docstring:
    """A docstring in parts.

    Attributes:
        title: first line.
        idea: paragraphs before the first section.
        terms: name of a loss term, or several -> description.
        arguments: name -> description.
        closing: paragraphs behind the sections.
    """

    title: str
    idea: Sequence[str] = ()
    terms: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)
    closing: Sequence[str] = ()


SECTION = re.compile(r"^(Terms|Args|Raises|Attributes|Returns)\b([^:\n]*):(.*)$")


def parse(text: str) -> Docstring:
    """Return the parts of a docstring of a method."""
    text = textwrap.dedent(text.partition("\n")[2]).strip() if "\n" in text else ""
    return _parts("", text)


def read(docstring: str) -> Docstring:
    """Return the parts of a cleaned docstring, as `inspect.getdoc` returns it."""
    title, _, rest = docstring.strip().partition("\n")
    return _parts(title, rest.strip("\n"))


def _parts(title: str, rest: str) -> Docstring:
    idea: list[str] = []
    closing: list[str] = []
    entries: dict[str, dict[str, str]] = {"Terms": {}, "Args": {}}
    for block in re.split(r"\n\s*\n", rest):
        lines = [line for line in block.split("\n") if line.strip()]
        if not lines:
            continue
        head = SECTION.match(lines[0])
        if head is None:
            (closing if entries["Terms"] or entries["Args"] else idea).append(one_line(block))
        elif head[1] in entries:
            if head[2].strip(" ,") and head[1] == "Terms":
                entries[head[1]]["all"] = one_line(head[2].strip(" ,"))
            if head[3].strip():  # on one line, as "Terms: `task`, the hard loss."
                entries[head[1]]["all"] = one_line(" ".join([head[3], *lines[1:]]))
            else:
                entries[head[1]] |= _entries(lines[1:])
    return Docstring(title, idea, entries["Terms"], entries["Args"], closing)


def _entries(lines: Sequence[str]) -> dict[str, str]:
    """Return the entries of a section: a line `name: text`, and deeper lines that go on."""
    depth = min((len(line) - len(line.lstrip()) for line in lines), default=0)
    found: dict[str, str] = {}
    name = ""
    for line in lines:
        if len(line) - len(line.lstrip()) == depth and (start := re.match(r"\s*(`?[\w`, ]+?`?):\s(.*)$", line)):
            name = start[1].replace("`", "")
            found[name] = start[2]
        elif name:
            found[name] += f" {line.strip()}"
    return {name: one_line(text) for name, text in found.items()}
