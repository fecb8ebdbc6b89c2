"""Pages of the methods, and the index that helps to choose one, from code, YAML, papers and figures of the repository."""

import csv
import importlib
import inspect
import json
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from bibtexparser.model import Entry as Citation
from omegaconf import OmegaConf

from commented import Key, header, idea_and_settings, keys
from facts import EXAMPLES, STUDENT, TEACHER, TOKENS, VALUES, Facts, all_facts
from kd.config.compose import conf_folder
from kd.results.columns import gap, ours, paper, seeds
from kd.results.comparison import Entry
from kd.results.gathering import compare_table
from kd.table.definition import load_table, table_names
from markup import Docstring, cell, code, one_line, read
from papers import address, bibtex, cited

ROOT = Path(__file__).resolve().parent.parent.parent
SECTIONS = ("Idea", "Loss terms", "Options", "What composes", "Cost of a step", "Figures", "Citation")
"""Sections that every page has, in their order."""

FOLDER = "methods"
"""Folder of the pages."""


def summaries() -> dict[str, str]:
    """Return what each method does, from the table of `docs/methods.md`."""
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    return {row[1]: row[2] for row in re.finditer(r"^\| `(\w+)` \| (.*?) \|", text, re.MULTILINE)}


def node_of(name: str) -> Mapping[str, Any]:
    """Return the node of a method, as its file has it."""
    node: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(conf_folder() / "method" / f"{name}.yaml"), resolve=False)  # type: ignore[assignment]
    return node


def classes(name: str) -> list[type]:
    """Return the classes of a method: that of its first run, its own, and wrappers that its file chooses."""
    node = node_of(name)
    targets = [node["before"]["_target_"]] if node.get("before") else []
    targets.append(node["_target_"])
    for choice in node.get("defaults", []):
        ((group, option),) = choice.items()
        for folder, key in (("pool", "wrapper"), ("cohort", "peers")):
            if f"/{folder}@" in group:
                chosen: Any = OmegaConf.load(conf_folder() / folder / f"{option}.yaml")
                wrapper = (chosen.get(folder) or chosen)[key]
                if wrapper is not None:
                    targets.append(wrapper._target_)
    return [located(target) for target in dict.fromkeys(targets)]


def located(target: str) -> type:
    """Return a class by its full name."""
    module, _, name = target.rpartition(".")
    found: type = getattr(importlib.import_module(module), name)
    return found


def docstring(kind: type) -> Docstring:
    """Return the parts of the docstring of a class."""
    return read(inspect.getdoc(kind) or "")


def page(name: str, citations: Sequence[Citation]) -> str:
    """Return the page of a method in Markdown."""
    facts, found = all_facts()[name], classes(name)
    documented = {kind: docstring(kind) for kind in found}
    lines = [f"# {name}", "", f"{sentence(summaries()[name])}", "", "```bash", command(name, facts), "```", ""]
    bodies = {
        "Idea": idea(name, documented),
        "Loss terms": terms(documented),
        "Options": options(name, documented),
        "What composes": composes(facts),
        "Cost of a step": cost(name, facts),
        "Figures": figures(name),
        "Citation": citation(cited(citations, name)),
    }
    for section in SECTIONS:
        lines += [f"## {section}", "", *bodies[section], ""]
    return "\n".join(lines)


def sentence(text: str) -> str:
    """Return a phrase as a sentence, with links relative to the folder of the pages."""
    text = relative(text)
    return f"{text[0].upper()}{text[1:].rstrip('.')}."


def relative(text: str) -> str:
    """Return a text of `docs` with links relative to the folder of the pages."""
    return re.sub(r"\]\((?!https?:)([^)#]+)", r"](../\1", text)


def command(name: str, facts: Facts) -> str:
    """Return a command that runs a method."""
    return f"kd-train method={name}" + (" task=amazon4 task.train=path/to/amazon4" if facts.columns else "")


def idea(name: str, documented: Mapping[type, Docstring]) -> Iterator[str]:
    """Yield the idea by the head of the file, and with its equations by class."""
    node = node_of(name)
    first, _ = idea_and_settings(header(conf_folder() / "method" / f"{name}.yaml"))
    yield first
    yield ""
    for kind, about in documented.items():
        role = ""
        if node.get("before") and f"{kind.__module__}.{kind.__name__}" == node["before"]["_target_"]:
            role = "First run, `method.before`. "
        elif node.get("before") and f"{kind.__module__}.{kind.__name__}" == node["_target_"]:
            role = "Second run. "
        elif kind.__module__.startswith("kd.methods.wrappers"):
            role = "Around it. "
        yield f"**{role}{one_line(about.title)}**"
        yield ""
        for paragraph in about.idea:
            yield paragraph
            yield ""
        for paragraph in about.closing:
            yield paragraph
            yield ""
        yield f"Code: [`{kind.__module__}.{kind.__name__}`][]."
        yield ""


def terms(documented: Mapping[type, Docstring]) -> Iterator[str]:
    """Yield the table of the loss terms."""
    yield "A term's weight is `method.weights.<term>`, or `method.before.weights.<term>` in a first run, and may be a schedule."
    yield ""
    for kind, parts in documented.items():
        yield f"`{kind.__name__}`:"
        yield ""
        for name, text in parts.terms.items():
            yield f"- {text}" if name == "all" else f"- **{name}**: {text}"
        yield ""


def options(name: str, documented: Mapping[type, Docstring]) -> Iterator[str]:
    """Yield the options: default, values and comment of the YAML, meaning of the docstring; and the paper's values."""
    path = conf_folder() / "method" / f"{name}.yaml"
    node = node_of(name)
    _, settings = idea_and_settings(header(path))
    if settings:
        yield "The paper's settings, from the head of the file:"
        yield ""
        yield from ("```text", *settings, "```", "")
    yield "| option | default | values, and where they are from | meaning |"
    yield "|---|---|---|---|"
    first = located(node["before"]["_target_"]) if node.get("before") else None
    for key in keys(path):
        own = first if key.name.startswith("before.") and first is not None else located(node["_target_"])
        meaning = meaning_of(key, documented[own], own)
        yield f"| `method.{key.name}` | {code(key.value) if key.value else ''} | {cell(comment(key))} | {cell(meaning)} |"


def comment(key: Key) -> str:
    """Return the comment of a key, safe in Markdown."""
    return re.sub(r"([*_|<\[\]])", r"\\\1", key.comment).replace("\\|", "&#124;")


def meaning_of(key: Key, documented: Docstring, kind: type) -> str:
    """Return the meaning of an option, by the docstring of its class or of one that it inherits from."""
    last = key.name.rpartition(".")[2]
    for base in inspect.getmro(kind):
        parts = documented if base is kind else docstring(base) if base.__module__.startswith("kd.methods") else Docstring("")
        if last in parts.arguments:
            return parts.arguments[last].replace("|", "&#124;")
    return {
        "name": "Name of the method in records and tables.",
        "_target_": "Class of the method.",
        "weights": "Weights of the loss terms, numbers of at least 0 or schedules.",
        "before": "The run that comes first; null leaves it out.",
        "run": "Settings of the first run, laid over those of the command.",
        "aids": "Frozen models that are no teachers.",
    }.get(last, "")


COMBINATIONS = {
    "pool=stochastic": "several teachers, one drawn for each step",
    "cohort=mutual": "students that learn from each other",
    "surgery=[cut_vocabulary]": "a student with a vocabulary of its own",
    "student=bert_3l_192": "a student of another width and number of heads than the teacher",
    "task=stsb": "a regression",
}
"""Combination -> what it is."""


def composes(facts: Facts) -> Iterator[str]:
    """Yield what a method reads and needs, and what it composes with."""
    yield "Read from the code with the default options, bound to a student of "
    yield f"{STUDENT['layers']} x {STUDENT['width']} and a teacher of {TEACHER['layers']} x {TEACHER['width']}."
    yield ""
    yield "| | |"
    yield "|---|---|"
    for name, value in needs(facts).items():
        yield f"| {name} | {cell(value)} |"
    yield ""
    yield "| combination | | |"
    yield "|---|---|---|"
    for combination, what in COMBINATIONS.items():
        reason = facts.refusals[combination]
        yield f"| `{combination}` | {what} | {'refused: ' + cell(escaped(reason)) if reason else 'yes'} |"


def escaped(text: str) -> str:
    """Return a message that Markdown leaves as it is."""
    return re.sub(r"([*_<\[\]])", r"\\\1", text)


LABELS = {
    "needed": "needed, of every example",
    "used": "used; text without labels may be added, on which the teacher teaches alone",
    "none": "not read: the weight of `task` is 0 by default",
}


def needs(facts: Facts) -> dict[str, str]:
    """Return the facts about what a method needs, in words."""
    label = LABELS[facts.labels] + (f": {escaped(facts.label_reason)}" if facts.label_reason else "")
    return {
        "teachers": {"none": "none is read", "one": "one", "several": "several"}[facts.teachers],
        "runs": "two: the first is `method.before`" if facts.runs == 2 else "one",
        "labels": label,
        "text without labels": "needed" if facts.needs_unlabelled else "not needed",
        "read from the student": ", ".join(["logits", *facts.student]),
        "read from a teacher": ", ".join(["logits", *facts.teacher]) if facts.teachers != "none" else "nothing",
        "other frozen models": ", ".join(f"`{aid}`" for aid in facts.aids) or "none",
        "column of domains": "needed" if facts.columns else "not needed",
        "examples compared with each other": escaped(facts.batch) or "no",
        "share of train that is held": f"{facts.holds:g}" if facts.holds else "none",
    }


def cost(name: str, facts: Facts) -> Iterator[str]:
    """Yield what a step costs: counted, and measured where a measurement is on record."""
    live = f"at every step: {facts.live}" if facts.live else "once over train; its outputs are cached"
    if facts.teachers != "none":
        yield f"- A teacher runs {live}."
    else:
        yield "- No teacher runs in training."
    if facts.aids:
        yield f"- {', '.join(f'`{aid}`' for aid in facts.aids)} runs at every step."
    yield f"- Parameters that are trained beside the student's: {facts.trained:,}."
    yield counted(name, facts)
    measured = ROOT / "experiments" / "methods" / "cost" / f"{name}.json"
    if not measured.is_file():
        yield f"- Its time is not on record here; `kd-bench method={name} student=3l` measures it on your machine."
        return
    record = json.loads(measured.read_text(encoding="utf-8"))
    found = record.get("candidates") or record["contestants"]
    for kind, words in (("cached", "with cached outputs of the teacher"), ("live", "with a teacher that runs at every step")):
        if kind in found:
            ratio = found[kind]["time_relative_to_finetune"]
            yield (
                f"- Measured {words}: {ratio['median']:.2f} times a step of fine-tuning (from {ratio['low']:.2f} to "
                f"{ratio['high']:.2f} in {record['repeats']} rounds), peak memory {found[kind]['peak_megabytes']:,.0f} MB, "
                f"`{' '.join(word for word in record['command'] if not word.startswith('paths.'))}`, batches of "
                f"{record['batch_size']}, CPU, {record['precision']}, {record['hardware']['cores']} cores "
                f"([protocol](../experiments/methods/README.md))."
            )


def counted(name: str, facts: Facts) -> str:
    """Return the matrix products of a step, counted, relative to fine-tuning."""
    if name in VALUES:
        return f"- Not counted: a step reads values, and models without weights have none ({VALUES[name]})."
    ((finetune,),) = all_facts()["finetune"].products
    parts = []
    for number, counts in enumerate(facts.products):
        run = ("first run ", "second run ")[number] if len(facts.products) > 1 else ""
        ratios = [f"{count / finetune:.2f}" for count in counts]
        cached = f" with cached outputs, {ratios[1]} with teachers that run at every step" if len(ratios) > 1 else ""
        parts.append(f"{run}{ratios[0]}{cached}")
    return (
        f"- Counted, times a step of [fine-tuning](finetune.md): {'; '.join(parts)}. These are floating-point operations of "
        "matrix products, forward and backward; embeddings, elementwise operations and the optimiser are not counted. A step "
        f"of fine-tuning has {finetune / 1e9:.0f} billion, for {EXAMPLES} examples of {TOKENS} tokens."
    )


@cache
def tables() -> Mapping[str, tuple[str, Sequence[Entry]]]:
    """Return the tables of papers: name -> title, and entries with our figures beside the paper's."""
    found = {}
    for table in table_names():
        folder = ROOT / "experiments" / table
        compared = compare_table(folder / "ours.csv", folder / "paper.csv", "local", [], title=table, protocol="")
        found[table] = (load_table(table).title, compared.entries)
    return found


def figures(name: str) -> Iterator[str]:
    """Yield our rows beside the paper's, and our rows of the table of all methods."""
    nothing = True
    for table, (title, entries) in tables().items():
        mine = [entry for entry in entries if entry.method == name and (entry.values or entry.paper)]
        if not mine:
            continue
        nothing = False
        yield f"**[{title}](../experiments/{table}/README.md)**"
        yield ""
        yield from rows(mine)
        if not any(entry.values for entry in mine):
            yield "There is no run of ours in this table yet."
            yield ""
    own = our_rows(name)
    if own:
        nothing = False
        yield "**[One student and one budget](../experiments/methods/README.md)**, `rotten_tomatoes`, 3,000 training examples, "
        yield "the student `3l` and MiniLM as teacher, best epoch by validation. There is no figure of a paper for it."
        yield ""
        yield "| validation accuracy | test accuracy | seeds |"
        yield "|---|---|---|"
        yield from own
        yield ""
    if nothing:
        yield "Neither a figure of the paper for text nor a run of ours is on record ([figures](../figures.md))."


def rows(entries: Sequence[Entry]) -> Iterator[str]:
    """Yield a table of entries, with the words of `kd-report`."""
    yield "| task | split | metric | student | teacher | paper | ours | ours - paper | seeds | selection of ours |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for entry in entries:
        what = (entry.task, entry.split, entry.metric, entry.student, entry.teacher)
        values = (paper(entry), ours(entry), gap(entry), seeds(entry), entry.selection)
        yield f"| {' | '.join(cell(escaped(text)) for text in (*what, *values))} |"
    yield ""
    yield "In percent, mean ± standard deviation over seeds; a paper's figure that was not read in print is marked."
    yield ""


def our_rows(name: str) -> list[str]:
    """Return our rows of the table of all methods, a mean over seeds for each file."""
    found = []
    for file in ("ours.csv", "earlier.csv"):
        with (ROOT / "experiments" / "methods" / file).open(encoding="utf-8", newline="") as opened:
            lines = [
                line
                for line in csv.DictReader(opened)
                if (line["method"], line["student"], line["task"]) == (name, "3l", "rotten_tomatoes") and not line["role"]
            ]
        if lines:
            splits = ([100 * float(line[f"{split}_accuracy"]) for line in lines] for split in ("validation", "test"))
            words = [spread(values) for values in splits]
            earlier = " (earlier table)" if file == "earlier.csv" else ""
            found.append(f"| {words[0]} | {words[1]} | {', '.join(line['seed'] for line in lines)}{earlier} |")
    return found


def spread(values: Sequence[float]) -> str:
    """Return a mean with its standard deviation over seeds."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{deviation}"


def citation(found: Sequence[Citation]) -> Iterator[str]:
    """Yield the papers of a method."""
    if not found:
        yield "None: this is the baseline of all methods."
    for entry in found:
        where = address(entry)
        if where is not None:
            yield f"<{where}>"
            yield ""
        yield "```bibtex"
        yield bibtex(entry)
        yield "```"
        yield ""


def index() -> str:
    """Return the page that helps to choose a method by what one has."""
    facts = all_facts().values()
    short = summaries()
    lines = [
        "# Choosing a method",
        "",
        "Made from what the methods declare in code, with their default options; options change some of it.",
        "",
    ]
    for title, words, test in CHOICES:
        chosen = [one for one in facts if test(one)]
        lines += [f"## {title}", "", words, ""]
        lines += [f"- [`{one.name}`]({one.name}.md): {relative(short[one.name])}" for one in chosen]
        lines.append("")
    lines += [
        "## All at a glance",
        "",
        "| method | teachers | labels | runs | vocabulary of its own | other heads | regression | several students |",
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for one in facts:
        answers = ("surgery=[cut_vocabulary]", "student=bert_3l_192", "task=stsb", "cohort=mutual")
        marks = ["no" if one.refusals[combination] else "yes" for combination in answers]
        lines.append(f"| [`{one.name}`]({one.name}.md) | {one.teachers} | {one.labels} | {one.runs} | {' | '.join(marks)} |")
    lines += ["", "Labels: *needed* of every example, *used* where an example has one, *none* read by default."]
    return "\n".join(lines) + "\n"


CHOICES = (
    (
        "Labels alone, no teacher",
        "No teacher is read; one that is configured gives shape and initial weights.",
        lambda facts: facts.teachers == "none",
    ),
    (
        "Text without labels",
        "A fine-tuned teacher, few or no labels, and text: `task.unlabelled=<file>` or `edit=[hidden_labels]` "
        "([data](../data.md#text-without-labels)). These accept it.",
        lambda facts: facts.teachers != "none" and facts.labels != "needed",
    ),
    (
        "Several teachers",
        "These read several as they are. A method of one teacher takes several through a "
        "[pool](../methods.md#pools-of-teachers), where its page says so; the plainest is "
        "`method=kd pool=wkd`, the mean of their soft labels. Text without labels may be added to all that do not need labels "
        "by the table below. How to name two models of your own: [teachers](../models.md#teachers).",
        lambda facts: facts.teachers == "several",
    ),
    (
        "Several students",
        "These train students that learn from each other; `cohort=mutual` adds that to others.",
        lambda facts: facts.peers,
    ),
    (
        "A small vocabulary, or another tokenizer",
        "Student and teacher may have different tokens, because logits, [CLS] states or pooled vectors are compared. This is "
        "what [small embeddings](../models.md#surgeries) need: `surgery=[cut_vocabulary]` keeps the tokens of the training "
        "text, `surgery=[learned_vocabulary]` learns new ones, with any of these methods. [`mixed_vocab`](mixed_vocab.md), "
        "which reads no teacher, pre-trains a student with a small vocabulary.",
        lambda facts: facts.teachers != "none" and not facts.refusals["surgery=[cut_vocabulary]"],
    ),
    (
        "A student of another width or number of heads",
        "A narrower student meets a wide teacher without further options: `student=bert_3l_192` has half of MiniLM's width, "
        "and `student=3l student.width=192 student.init=random` the same width with the teacher's number of heads. No layer of "
        "the teacher fits into it, so that it begins at random. The methods that are missing here compare attention head by "
        "head: they take a narrower student too, if its number of heads is the teacher's.",
        lambda facts: facts.teachers != "none" and not facts.refusals["student=bert_3l_192"],
    ),
    (
        "Several domains, or few labels of one",
        "These read a column of domains, or need generated texts.",
        lambda facts: facts.columns or facts.needs_unlabelled,
    ),
    (
        "A teacher that is expensive to run",
        "The teacher runs once over the training set, and its outputs are cached.",
        lambda facts: facts.teachers != "none" and not facts.live,
    ),
)
"""Title, explanation and test of each choice."""
