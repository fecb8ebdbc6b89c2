"""Tasks of several domains: a folder for each, and examples of some domains alone."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from kd.build.edits import build_edits
from kd.config.compose import compose, typed
from kd.config.mixture import check_tasks
from kd.data.examples import Examples, load_examples
from kd.data.held import cut
from kd.data.sources import hash_fraction
from kd.errors import InputError
from kd.runs.identity import prefix_task_errors, source_of, task_identity
from kd.runs.plan import plan

NAMES = ("books", "dvd", "electronics", "kitchen")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for domain in NAMES:
        (tmp_path / domain).mkdir()
        for name, count in {"train": 80, "dev": 20}.items():
            rows = [f"{name} text {number} of {domain}\t{number % 2}" for number in range(count)]
            (tmp_path / domain / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return tmp_path


def loaded(folder: Path, *overrides: str) -> Examples:
    spec = typed(compose(["task=amazon4", f"task.train={folder}", *overrides]))
    check_tasks(spec.task)
    with prefix_task_errors():
        return load_examples(spec.task, source_of(spec.task), build_edits(spec.task))


def domains_of(examples: Examples, split: str) -> list[str]:
    """The domain of each example, as its text tells it."""
    return [text.split()[-1] for (text,) in examples.texts[split]]


def test_folders_are_domains(folder: Path) -> None:
    examples = loaded(folder)
    assert {split: len(texts) for split, texts in examples.texts.items()} == {"train": 287, "validation": 33, "test": 80}
    assert all(hash_fraction(text) >= 0.9 for text in examples.texts["validation"])
    assert all(hash_fraction(text) < 0.9 for text in examples.texts["train"])
    assert all(text.startswith("dev") for (text,) in examples.texts["test"])
    for split in examples.texts:
        columns = examples.columns[split]["domain"]
        assert [NAMES[index] for index in columns] == domains_of(examples, split)


@pytest.mark.parametrize("where", ["dvd", "[dvd]", "[kitchen,books]"])
def test_examples_of_some_domains_alone(folder: Path, where: str) -> None:
    """Their indices are those of all domains, so that a student of one domain and a teacher of all mean the same by them."""
    wanted = set(where.strip("[]").split(","))
    whole, part = loaded(folder), loaded(folder, f"task.where={{domain: {where}}}")
    for split in whole.texts:
        rows = [row for row, domain in enumerate(domains_of(whole, split)) if domain in wanted]
        assert list(part.texts[split]) == [whole.texts[split][row] for row in rows]
        np.testing.assert_array_equal(part.columns[split]["domain"], whole.columns[split]["domain"][rows])


def test_a_limit_counts_the_examples_that_are_selected(folder: Path) -> None:
    examples = loaded(folder, "task.where={domain: [books]}", "task.limit_train=7")
    assert domains_of(examples, "train") == ["books"] * 7


def test_a_teacher_may_be_of_other_domains_than_its_student(folder: Path) -> None:
    own = ["task=amazon4", f"task.train={folder}", "method=kd", "task.where={domain: [books]}"]
    others = "+teacher.minilm.run.task={where: {domain: [dvd, electronics, kitchen]}}"
    student, apart = (plan(compose([*own, *more]), [*own, *more]) for more in ([], [others]))
    assert student.inputs.teachers["minilm"].spec.task.where == {"domain": ["books"]}
    assert apart.inputs.teachers["minilm"].spec.task.where == {"domain": ["dvd", "electronics", "kitchen"]}
    assert student.digest != apart.digest


def test_text_without_labels_is_selected_too(folder: Path, tmp_path: Path) -> None:
    rows = [f"more {number} of {domain}\t{domain}" for number in range(3) for domain in ("books", "dvd")]
    (tmp_path / "more.tsv").write_text("\n".join(["sentence\tdomain", *rows]) + "\n")
    more = f"task.unlabelled={tmp_path / 'more.tsv'}"
    examples = loaded(folder, more, "task.where={domain: [books]}")
    assert domains_of(examples, "train")[-3:] == ["books"] * 3
    assert not any(text.startswith("more") for (text,) in list(examples.texts["train"])[:-3])
    with pytest.raises(InputError, match="none is selected") as refusal:
        loaded(folder, more, "task.where={domain: [kitchen]}")
    assert refusal.value.key == "task.unlabelled"


BAD = {
    "a domain that train lacks": (["task.where={domain: [toys]}"], "task.where", "'toys'"),
    "a class that is not listed": (["task.extra={domain: [books, dvd, kitchen]}"], "task.extra", "'electronics'"),
    "a column that is not read": (["task.where={genre: [books]}"], "task.where", "column of classes"),
    "an empty list": (["task.where={domain: []}"], "task.where.domain", "each once"),
    "a name twice": (["task.where={domain: [dvd, dvd]}"], "task.where.domain", "each once"),
    "no folder": (["task.train=null"], "task.train", "a folder with a folder for each domain"),
    "an evaluated domain that is none": (["task.where_evaluated={domain: [food]}"], "task.where_evaluated", "no class 'food'"),
    "an evaluated domain without its column": (
        ["task.where_evaluated={genre: [food]}"],
        "task.where_evaluated",
        "add 'task.extra={genre: classes}'",
    ),
}


@pytest.mark.parametrize(("more", "key", "words"), BAD.values(), ids=BAD.keys())
def test_bad_domains_are_refused(folder: Path, more: list[str], key: str, words: str) -> None:
    with pytest.raises(InputError) as refusal:
        loaded(folder, *more)
    assert refusal.value.key == key
    assert words in refusal.value.message


def test_a_folder_without_its_files_is_refused(folder: Path) -> None:
    (folder / "dvd" / "dev.tsv").unlink()
    with pytest.raises(InputError, match=r"lacks 'dvd/dev\.tsv'"):
        loaded(folder)


def test_a_file_in_another_encoding_is_refused_with_a_cure_that_folders_have(folder: Path) -> None:
    """The task has no `task.encoding`."""
    file = folder / "dvd" / "train.tsv"
    file.write_bytes(file.read_bytes() + "caf\xe9\tpositive\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"not UTF-8 text; iconv -f latin-1 -t UTF-8 converts") as refusal:
        loaded(folder)
    assert refusal.value.key == "task.train"


def test_tasks_without_a_selection_are_identified_as_before(folder: Path) -> None:
    spec = typed(compose(["task=amazon4", f"task.train={folder}"])).task
    assert not {"where", "where_evaluated"} & set(task_identity(spec)[0])


@pytest.mark.parametrize("holdout", ["null", "0.2"])
def test_one_domain_may_be_evaluated_with_others_in_train(folder: Path, holdout: str) -> None:
    whole = loaded(folder, f"task.holdout={holdout}")
    part = loaded(folder, "task.where_evaluated={domain: [dvd]}", f"task.holdout={holdout}")
    assert list(part.texts["train"]) == list(whole.texts["train"])
    assert whole.evaluated_like is None
    assert part.evaluated_like is not None
    assert part.evaluated_like.tolist() == [domain == "dvd" for domain in domains_of(part, "train")]
    for split in part.evaluated:
        assert list(part.texts[split]) == [text for text in whole.texts[split] if text[0].endswith("dvd")]
    both = loaded(folder, "task.where={domain: [dvd, books]}", "task.where_evaluated={domain: dvd}")
    assert set(domains_of(both, "train")) == {"dvd", "books"}
    assert set(domains_of(both, "test")) == {"dvd"}


def test_a_few_labels_are_of_the_domain_that_is_evaluated(folder: Path) -> None:
    count = "task.edits.few_labels.count=9"
    examples = loaded(folder, "task.where_evaluated={domain: [dvd]}", "edit=[few_labels]", count)
    counts = Counter(domains_of(examples, "train"))
    assert counts["dvd"] == 9
    assert min(counts[name] for name in NAMES if name != "dvd") > 60
    assert len(loaded(folder, "edit=[few_labels]", count).texts["train"]) == 9


def test_what_a_method_holds_is_of_the_domain_that_is_evaluated(folder: Path) -> None:
    examples = loaded(folder, "task.where_evaluated={domain: [dvd]}")
    parts, domains = cut(examples, 0.3), np.array(domains_of(examples, "train"))
    assert set(domains[parts.held]) == {"dvd"}
    assert 0.15 < parts.held.sum() / (domains == "dvd").sum() < 0.45
    assert (parts.trained == ~parts.held).all()


def test_a_part_of_train_keeps_all_that_belongs_to_its_examples(folder: Path) -> None:
    examples = loaded(folder, "task.where_evaluated={domain: [dvd]}")
    examples.origins = list(examples.texts["train"])
    rows = np.array([200, 3, 7])
    part = examples.with_train(rows)
    assert list(part.texts["train"]) == list(part.origins or ()) == [examples.texts["train"][row] for row in rows]
    assert list(part.labels["train"]) == [examples.labels["train"][row] for row in rows]
    assert part.columns["train"]["domain"].tolist() == examples.columns["train"]["domain"][rows].tolist()
    assert part.evaluated_like is not None
    assert part.evaluated_like.tolist() == [domain == "dvd" for domain in domains_of(part, "train")]
    assert part.texts["test"] is examples.texts["test"]


def test_text_of_a_domain_for_a_masked_language_model(folder: Path) -> None:
    spec = typed(compose(["task=amazon4_text", f"task.train={folder}", "task.where={domain: [dvd]}"]))
    check_tasks(spec.task)
    examples = load_examples(spec.task, source_of(spec.task))
    assert set(domains_of(examples, "train")) == {"dvd"}
    assert not examples.task.columns
    assert not examples.columns["train"]
    assert list(examples.texts["train"]) == list(loaded(folder, "task.where={domain: dvd}").texts["train"])
    spec = typed(compose(["task=amazon4_text", f"task.train={folder}", "task.where_evaluated={domain: [dvd]}"]))
    examples = load_examples(spec.task, source_of(spec.task))
    assert set(domains_of(examples, "train")) == set(NAMES)
    assert set(domains_of(examples, "test")) == {"dvd"}
    assert examples.evaluated_like is None
    few = "edit=[few_labels]", "task.edits.few_labels.count=9", "task.edits.few_labels.where={domain: [dvd]}"
    spec = typed(compose(["task=amazon4_text", f"task.train={folder}", *few]))
    with pytest.raises(InputError, match="no column of classes 'domain'") as caught:
        load_examples(spec.task, source_of(spec.task), build_edits(spec.task))
    assert caught.value.key == "task.edits.few_labels.where"
