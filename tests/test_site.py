"""The documentation as a site: a strict build, a page for each method, links, and the commands of its pages."""

import dataclasses
import importlib.util
import os
import posixpath
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("mkdocs")
pytest.importorskip("bibtexparser")

import commented
import facts as site_facts
import markup
import method_pages
import papers
from kd.config.compose import compose, conf_folder, typed
from kd.config.help import PARTS, help_text
from kd.errors import InputError
from kd.runs.plan import plan

ROOT = Path(__file__).parent.parent
METHODS = sorted(path.stem for path in (ROOT / "conf" / "method").glob("*.yaml"))
BIB = ROOT / "kd" / "methods" / "papers.bib"


def build(out: Path, folder: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built once."""
    out = tmp_path_factory.mktemp("site")
    done = build(out)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


class Links(HTMLParser):
    """Links, sources and ids of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids |= {given["id"] or ""} if "id" in given else set()
        if tag == "a" and given.get("href"):
            self.links.append(given["href"] or "")
        loads = tag in ("script", "img") or (tag == "link" and given.get("rel") in ("stylesheet", "preconnect"))
        self.loaded += [url for name in ("src", "href") if loads and (url := given.get(name))]


@pytest.mark.slow
def test_every_method_has_a_page_with_all_its_parts(site: Path) -> None:
    for name in METHODS:
        text = (site / "methods" / f"{name}.html").read_text()
        for section in method_pages.SECTIONS:
            body = re.search(rf">{section}<a.*?(?=<h2|</article>)", text, re.DOTALL)
            assert body, f"{name} has no section {section}"
            assert len(re.sub(r"<[^>]*>", "", body[0])) > 60, f"{name}: {section} is empty"
        assert ":math:" not in text, name
        assert ("<math" in text) == (name not in ("finetune", "mixed_vocab")), name
        assert f"method={name}" in text


@pytest.mark.slow
def test_no_page_has_a_dead_link_or_loads_from_the_network(site: Path) -> None:
    pages = {path.relative_to(site).as_posix(): Links(path.read_text()) for path in site.rglob("*.html")}
    assert len(pages) > 80
    for name, page in pages.items():
        assert not [url for url in page.loaded if "//" in url], name
        for link in page.links if name != "404.html" else []:
            path, _, anchor = link.partition("#")
            if re.match(r"\w+:", link):
                continue
            target = posixpath.normpath(posixpath.join(posixpath.dirname(name), path)) if path else name
            assert (site / target).exists(), f"{name}: {link}"
            assert not anchor or target not in pages or anchor in pages[target].ids or anchor == "__top", f"{name}: {link}"


@pytest.mark.slow
def test_a_dead_link_and_a_method_without_a_paper_fail_the_build(tmp_path: Path) -> None:
    for name in ("docs", "kd/methods", "experiments", "conf"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    site_facts.all_facts()
    (tmp_path / "build").mkdir()
    for path in site_facts.CACHE.glob("facts-*.json"):  # those of the same sources, so that they are not made again
        shutil.copy(path, tmp_path / "build" / path.name)
    for name, own, other, told in (
        ("kd/methods/papers.bib", "{pkd}", "{kd}", "differ in pkd"),
        ("docs/methods.md", "| `pkd` |", "| pkd |", "docs/methods.md has no line for pkd"),
    ):
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text.replace(own, other))
        done = build(tmp_path / "out", tmp_path)
        assert done.returncode != 0
        assert told in done.stderr
        (tmp_path / name).write_text(text)
    with (tmp_path / "docs" / "concepts.md").open("a") as page:
        page.write("\n[gone](gone.md)\n")
    done = build(tmp_path / "out", tmp_path)
    assert done.returncode != 0
    assert "gone.md" in done.stderr


def test_every_method_tells_its_idea_in_three_sentences() -> None:
    for name in METHODS:
        idea, settings = commented.idea_and_settings(commented.header(ROOT / "conf" / "method" / f"{name}.yaml"))
        assert len(re.findall(r"[.](?= [A-Z]|$)", idea)) == 3, f"{name}: {idea}"
        assert "arXiv" not in idea, name
        assert settings, name


def test_choices_follow_from_what_methods_declare() -> None:
    facts = site_facts.all_facts()
    assert set(facts) == set(METHODS)
    assert {name for name, one in facts.items() if one.teachers == "several"} == {"mt_bert", "rl_kd", "skdbert"}
    assert {name for name, one in facts.items() if one.peers} == {"dml", "p2p_mutual"}
    assert {name for name, one in facts.items() if one.aids} == {"text_smoothing"}
    assert {name for name, one in facts.items() if one.needs_unlabelled} == {"l2a"}
    assert {"backward_kd", "bss"} <= {name for name, one in facts.items() if one.live}, "they take gradients of the teacher"
    two = {name for name in METHODS if yaml.safe_load((ROOT / "conf" / "method" / f"{name}.yaml").read_text()).get("before")}
    assert {name for name, one in facts.items() if one.runs == 2} == two
    heads = {name for name, one in facts.items() if "attention is compared" in one.refusals["student=bert_3l_192"]}
    assert heads == {"bert_emd", "l2a", "meta_kd", "tinybert"}


@pytest.mark.parametrize("name", ["dml", "kd", "pkd", "simkd", "tinybert"])
def test_refusals_are_those_of_the_command(name: str) -> None:
    refusals = site_facts.all_facts()[name].refusals
    config = compose([f"method={name}", "cohort=mutual"])
    try:
        plan(config)
        found = ""
    except InputError as error:
        found = " ".join(error.message.split())
    assert found == refusals["cohort=mutual"]


def forward_by_hand(layers: int, width: int, heads: int) -> int:
    """Operations of a forward pass of a BERT, two for each product of numbers: its linear layers and its attention.

    A block has four maps of the width and two to and from four times the width; scores and contexts are the products of each
    token with each. The pooler and two classes read the first token.
    """
    rows = site_facts.EXAMPLES * site_facts.TOKENS
    block = 2 * rows * (4 + 2 * 4) * width**2 + 2 * 2 * rows * site_facts.TOKENS * width
    return layers * block + 2 * site_facts.EXAMPLES * (width**2 + 2 * width)


def test_counted_products_are_those_of_the_formula() -> None:
    """A backward pass has two products for each one of the forward pass; a teacher has none."""
    student, teacher = forward_by_hand(**site_facts.STUDENT), forward_by_hand(**site_facts.TEACHER)
    assert site_facts.products("finetune", site_facts.stages("finetune")) == [[3 * student]]
    assert site_facts.products("kd", site_facts.stages("kd")) == [[3 * student, 3 * student + teacher]]
    assert site_facts.products("dml", site_facts.stages("dml")) == [[2 * 3 * student]]


@pytest.mark.parametrize("name", sorted(site_facts.VALUES))
def test_methods_without_a_count_read_values(name: str) -> None:
    with pytest.raises((RuntimeError, NotImplementedError, ValueError), match=r"(?i)meta|medians"):
        _ = [site_facts.operations_of_step(spec) for spec in site_facts.stages(name)]
    assert site_facts.products(name, []) == []


def test_every_other_method_has_a_count() -> None:
    found = {name: [len(counts) for counts in one.products] for name, one in site_facts.all_facts().items()}
    assert {name for name, counts in found.items() if not counts} == set(site_facts.VALUES)
    for name, one in site_facts.all_facts().items():
        if name not in site_facts.VALUES:
            assert len(one.products) == one.runs, name
            assert one.teachers != "none" or found[name] == [1] * one.runs, name


def test_index_lists_each_method_where_its_facts_say(monkeypatch: pytest.MonkeyPatch) -> None:
    text = method_pages.index()
    for title, _, test in method_pages.CHOICES:
        part = text.split(f"\n## {title}\n")[1].split("\n## ")[0]
        listed = set(re.findall(r"^- \[`(\w+)`\]", part, re.MULTILINE))
        assert listed == {one.name for one in site_facts.all_facts().values() if test(one)}
        assert listed, title


def test_every_key_of_a_commented_file_has_its_comment(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("# head\nname: a # beside\n# above\nb:\n  c: '# no comment' # of c\nweights: {x: 1.0}\n")
    found = {key.name: (key.value, key.comment) for key in commented.keys(path)}
    expected = {"name": ("a", "beside"), "b": ("", "above"), "b.c": ("'# no comment'", "of c"), "weights": ("{x: 1.0}", "")}
    assert found == expected
    assert commented.header(path) == ["head"]


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "method").glob("*.yaml")), ids=lambda path: path.stem)
def test_options_are_all_keys_of_the_file(path: Path) -> None:
    def paths(node: object, prefix: str = "") -> set[str]:
        if not isinstance(node, dict):
            return set()
        return {f"{prefix}{key}" for key in node} | {p for key, inner in node.items() for p in paths(inner, f"{prefix}{key}.")}

    content = {key: value for key, value in yaml.safe_load(path.read_text()).items() if key != "defaults"}
    found = {key.name for key in commented.keys(path)}
    assert set(content) <= found <= paths(content)


def test_equations_are_mathml_that_markdown_leaves_alone() -> None:
    assert "<mi>" in markup.mathml(r"\alpha_1")
    assert "|" not in re.sub(r"<[^>]*>", "", markup.mathml(r"KL(p \| q) | x"))
    long = markup.with_equations(r":math:`L = (1 - \alpha) L_{CE} + \alpha L_{DS} + \beta L_{PT}`: terms")
    assert long.endswith("<mtext>:</mtext></math></span> terms"), "a mark stays on the line of its equation"
    parts = markup.read(
        "Title.\n\n:math:`L = a`, a loss.\n\nTerms:\n    `task`: hard\n        loss.\n\nArgs:\n    tau: T > 0.\n"
    )
    assert parts.terms == {"task": "hard loss."}
    assert parts.arguments == {"tau": "T > 0."}
    assert "<math" in parts.idea[0]


def test_doctests_are_code_and_nothing_else_is() -> None:
    text = "Twice.\n\nReturns:\n    The list [1, 2].\n\n>>> twice([1])\n[1, 1]\n>>> 'a'\n'a'\n\nNot code: [1]."
    found = markup.with_examples(text)
    assert found == text.replace(">>> twice", "```pycon\n>>> twice").replace("\n'a'\n", "\n'a'\n```\n")


def test_every_citation_names_the_arxiv_id_of_its_method() -> None:
    for entry in papers.entries(BIB):
        assert {"title", "author", "year"} <= set(entry.fields_dict)
        assert "methods" not in papers.bibtex(entry)
        for name in papers.methods_of(entry):
            sources = [ROOT / "conf" / "method" / f"{name}.yaml", *(ROOT / "kd" / "methods").glob("**/*.py")]
            text = sources[0].read_text() + "".join(path.read_text() for path in sources[1:])
            if "eprint" in entry.fields_dict:
                assert f"arXiv:{entry['eprint']}" in text, (name, entry.key)


def test_help_fits_a_screen_and_names_every_choice() -> None:
    lines = help_text().splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    grouped = [group for groups in PARTS.values() for group in groups]
    folders = {path.name for path in conf_folder().iterdir() if path.is_dir()} - {"base", "hydra", "table", "tune"}
    assert sorted(grouped) == sorted(folders)
    words = set(help_text().split())
    assert {path.stem for group in grouped for path in (conf_folder() / group).glob("*.yaml")} <= words


@pytest.fixture
def command(tmp_path: Path) -> Path:
    """The command `kd-train` of this checkout, in a folder of its own."""
    script = tmp_path / "bin" / "kd-train"
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom kd.train import main\nmain()\n")
    script.chmod(0o755)
    return script


SHELLS = {
    "bash": 'eval "$(kd-train --shell-completion install=bash)"; COMP_LINE="kd-train method=pk"; COMP_POINT=18; '
    'COMP_WORDS=(kd-train method = pk); COMP_CWORD=3; hydra_bash_completion; echo "${COMPREPLY[@]}"',
    "fish": 'source (kd-train --shell-completion install=fish | psub); complete -C "kd-train method=pk"',
    "zsh": "autoload -Uz compinit bashcompinit; compinit -u; bashcompinit; "
    'eval "$(kd-train --shell-completion install=zsh)"; complete -p | grep -q "completion kd-train" && echo method=pkd',
}


@pytest.mark.slow
@pytest.mark.parametrize("shell", sorted(SHELLS))
def test_shell_completes_methods(shell: str, command: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} on this machine")
    path = f"{command.parent}:{os.environ['PATH']}"
    done = subprocess.run([shell, "-c", SHELLS[shell]], env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.stdout.split() == ["method=pkd"], done.stderr


def blocks(language: str, page: str = "start.md") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


def test_loss_of_the_first_page_trains_a_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example is run as it stands: bound to models, one update of an engine."""
    from conformance import bench

    (source,) = [block for block in blocks("python") if "class LastState" in block]
    (node,) = map(yaml.safe_load, blocks("yaml"))
    path = tmp_path / "last_state.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("kd.methods.last_state", path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "kd.methods.last_state", module)
    kd_spec = bench.specification("kd")
    monkeypatch.setitem(bench.SPECIFICATIONS, ("last_state", ()), dataclasses.replace(kd_spec, method=node))
    one = bench.Bench("last_state")
    batch = one.batch()
    terms = one.terms(batch)
    assert set(terms) == {"task", "state"}
    assert all(float(term) > 0 for term in terms.values())
    one.engine.train()
    assert any("project" in name for name in one.gradients(batch))
    (block,) = [block for block in blocks("python") if "def test_" in block]
    names: dict[str, Any] = {}
    exec(block, names)
    (name,) = [name for name in names if name.startswith("test_")]
    names[name]()


def lines_of(page: Path) -> list[str]:
    text = page.read_text().replace("\\\n", " ")
    return [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines() if line.strip()]


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def test_commands_of_pages_exist_with_their_options() -> None:
    """`kd-train` is composed in `tests/test_package.py`; here words and options of the other commands are looked up."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    helps: dict[str, str] = {}
    counted = dict.fromkeys(("kd-train", "make", "others", "kd-"), 0)
    for page in PAGES:
        for line in lines_of(page):
            words = shlex.split(line, comments=True)
            first = words[0] if words else ""
            if "kd-train" in line or "kd.train" in line:
                counted["kd-train"] += 1
            elif first == "make":
                counted["make"] += 1
                assert words[1] in targets, f"{page.name}: {line}"
            elif first.startswith("kd-"):
                counted["kd-"] += 1
                if first not in helps:
                    module, _, function = SCRIPTS[first].partition(":")
                    main = f"import sys; sys.argv = ['{first}', '--help']; from {module} import {function}; {function}()"
                    helps[first] = subprocess.run([sys.executable, "-c", main], cwd=ROOT, capture_output=True, text=True).stdout
                for word in words:
                    option = word.partition("=")[0]
                    assert not re.fullmatch(r"--[a-z-]+", option) or option in helps[first], f"{page.name}: {line}"
            else:
                counted["others"] += 1
    assert counted["kd-train"] >= 60
    assert counted["kd-"] > 20
    assert counted["others"] < 30, counted


def test_commands_of_the_first_page_are_planned(tmp_path: Path) -> None:
    train = tmp_path / "train.csv"
    train.write_text("text,label\n" + "".join(f"text {n},{'no' if n % 2 else 'yes'}\n" for n in range(40)))
    seen = 0
    for line in lines_of(ROOT / "docs" / "start.md"):
        if not line.startswith("kd-train task=file") or "hub" in line:
            continue
        words = [w.replace("train.csv", str(train)) for w in shlex.split(line)[1:] if not w.startswith("--")]
        words = [w.split(",")[0] for w in words] + [f"paths.runs={tmp_path}"]
        run = plan(compose(words), words)
        typed(run.config)
        seen += 1
    assert seen == 3
