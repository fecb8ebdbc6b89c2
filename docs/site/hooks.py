"""Hooks of mkdocs: pages that are made when the site is built, and links that lead out of `docs`."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import config_pages
import method_pages
from facts import method_names
from papers import entries, methods_of

ROOT = method_pages.ROOT
COPIED = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Pages of the repository's top folder -> pages of the site."""

LINK = re.compile(r"(\]\()([^)\s]+)(\))")
FENCE = re.compile(r"(^ *```.*?^ *```)", re.MULTILINE | re.DOTALL)
CHOICE = f"Which one fits what you have: [Choosing a method]({method_pages.FOLDER}/index.md)."
"""Sentence below the heading of `docs/methods.md`, whose target is a page of the site alone."""

METHODS, MORE = "Methods", "More"
"""Sections of the navigation that pages are added to: a page for each method, and pages of `docs` that `mkdocs.yml` lacks."""

_sources: dict[str, str] = {}
"""Page of the site -> file of the repository that its links are relative to."""

REFERENCE = {
    "reference/methods.md": (
        "Interface of a method",
        (
            "kd.methods.base",
            "kd.forward.needs",
            "kd.forward.outputs.Outputs",
            "kd.data.batch.Batch",
            "kd.data.tasks.Task",
            "kd.methods.options",
            "kd.schedules",
        ),
    ),
    "reference/losses.md": ("Losses", ()),
    "reference/classes.md": ("Classes of the methods", ()),
}
"""Pages of the code -> heading and modules, which docstrings describe."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add to the navigation the pages that are made, and those of `docs` that it lacks."""
    nav: Any = config.nav
    for part in nav:
        if METHODS in part:
            part[METHODS] += [{name: f"{method_pages.FOLDER}/{name}.md"} for name in method_names()]
    named = set(_paths(nav))
    own = [path.relative_to(ROOT / "docs").as_posix() for path in sorted((ROOT / "docs").glob("**/*.md"))]
    if missing := [path for path in own if path not in named]:
        nav.append({MORE: missing})
    return config


def _paths(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [path for part in parts for path in _paths(part)]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made: of methods, of the configuration, of the code, and copies of pages outside `docs`.

    Raises:
        PluginError: for a method without a paper or a line in the table of methods, or a paper of no method.
    """
    _sources.clear()
    for file in files.documentation_pages():
        _sources[file.src_uri] = f"docs/{file.src_uri}"
    citations = entries(ROOT / "kd" / "methods" / "papers.bib")
    named = {name for entry in citations for name in methods_of(entry)}
    if wrong := (set(method_names()) - {"finetune"}) ^ named:
        raise PluginError(f"kd/methods/papers.bib and conf/method differ in {', '.join(sorted(wrong))}")
    if unlisted := set(method_names()) - method_pages.summaries().keys():
        raise PluginError(f"docs/methods.md has no line for {', '.join(sorted(unlisted))}")
    made = {f"{method_pages.FOLDER}/{name}.md": method_pages.page(name, citations) for name in method_names()}
    made[f"{method_pages.FOLDER}/index.md"] = method_pages.index()
    made[config_pages.FILE] = config_pages.page()
    made |= {page: reference(page) for page in REFERENCE}
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    experiments = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "experiments").glob("**/*.md"))]
    for source in [*COPIED, *experiments]:
        page = COPIED.get(source, source)
        _sources[page] = source
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for source in sorted(linked_files(list(_sources.values()))):
        files.append(File.generated(config, source, abs_src_path=str(ROOT / source)))
    return files


def linked_files(sources: list[str]) -> set[str]:
    """Return the files outside `docs`, no pages, that pages link."""
    found = set()
    for source in sources:
        for link in LINK.findall(FENCE.sub("", (ROOT / source).read_text(encoding="utf-8"))):
            path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1].partition("#")[0]))
            if "://" not in link[1] and (ROOT / path).is_file() and not path.endswith(".md") and not path.startswith("docs/"):
                found.add(path)
    return found


def reference(page: str) -> str:
    """Return a page of the code, which mkdocstrings fills."""
    title, modules = REFERENCE[page]
    if page.endswith("losses.md"):
        modules = tuple(f"kd.functional.{path.stem}" for path in _modules("functional"))
    if page.endswith("classes.md"):
        kinds = {kind for name in method_names() for kind in method_pages.classes(name)}
        modules = tuple(sorted(f"{kind.__module__}.{kind.__name__}" for kind in kinds))
    return "\n\n".join([f"# {title}", *(f"::: {module}" for module in modules)]) + "\n"


def _modules(folder: str) -> list[Path]:
    return [path for path in sorted((ROOT / "kd" / folder).glob("*.py")) if path.stem != "__init__"]


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links of a page of the repository to pages of the site; code blocks stay as they are."""
    source = _sources.get(page.file.src_uri)
    if source is None:
        return markdown
    if source == "docs/methods.md":  # whose rows have pages on the site
        markdown = re.sub(r"^\| `(\w+)` \|(?=.*\|)", _linked, markdown, flags=re.MULTILINE)
        markdown = markdown.replace("\n\n", f"\n\n{CHOICE}\n\n", 1)
    parts = FENCE.split(markdown)
    return "".join(
        part if n % 2 else LINK.sub(lambda m: m[1] + _target(m[2], source, page) + m[3], part) for n, part in enumerate(parts)
    )


def _linked(row: re.Match[str]) -> str:
    """Return the beginning of a row of a table, with the method that it names as a link to its page."""
    return f"| [`{row[1]}`](methods/{row[1]}.md) |" if row[1] in method_names() else row[0]


def _target(link: str, source: str, page: Page) -> str:
    path, mark, anchor = link.partition("#")
    if "://" in link or not path:
        return link
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    target = COPIED.get(target, target.removeprefix("docs/"))
    if (ROOT / target).is_dir() and (ROOT / target / "README.md").is_file():
        target = f"{target}/README.md"
    return posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".") + mark + anchor
