"""Citations: `kd/methods/papers.bib`, whose field `methods` names the files of `conf/method` that an entry is the source of."""

from collections.abc import Sequence
from pathlib import Path

from bibtexparser.entrypoint import parse_string
from bibtexparser.model import Entry

FIELD = "methods"


def entries(path: Path) -> list[Entry]:
    """Return the entries of a file.

    Raises:
        ValueError: for a part that is no BibTeX, or a key that is there twice.
    """
    library = parse_string(path.read_text(encoding="utf-8"))
    if library.failed_blocks:
        raise ValueError(f"{path}: {str(library.failed_blocks[0].raw)[:100]!r} is no BibTeX, or its key is there twice")
    return list(library.entries)


def methods_of(entry: Entry) -> list[str]:
    """Return the methods that an entry is the source of."""
    return [name.strip() for name in entry[FIELD].split(",")]


def cited(found: Sequence[Entry], method: str) -> list[Entry]:
    """Return the entries of a method."""
    return [entry for entry in found if method in methods_of(entry)]


def bibtex(entry: Entry) -> str:
    """Return an entry as BibTeX, without our own field."""
    fields = [f for f in entry.fields if f.key != FIELD]
    width = max(len(f.key) for f in fields)
    lines = [f"  {f.key:<{width}} = {{{f.value}}}," for f in fields]
    return "\n".join([f"@{entry.entry_type}{{{entry.key},", *lines, "}"])


def address(entry: Entry) -> str | None:
    """Return the address of a paper, if the entry has one."""
    known = entry.fields_dict
    if "eprint" in known:
        return f"https://arxiv.org/abs/{known['eprint'].value}"
    return known["url"].value if "url" in known else None
