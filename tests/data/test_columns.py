"""Further columns: read with the examples, encoded, and carried to every batch."""

import csv
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from kd.bench.harness import some
from kd.build.edits import build_edits
from kd.config.compose import compose, typed
from kd.data.batch import Batch
from kd.data.datamodule import KDDataModule
from kd.data.examples import Examples, load_examples
from kd.data.sources import Example, Files, Splits
from kd.data.texts import Table
from kd.errors import InputError
from kd.runs.identity import prefix_task_errors, source_of
from kd.runs.plan import plan

BOTH = "task.extra={domain: classes, stars: number}"
DOMAINS = ("news", "film", "book")


def loaded(*overrides: str) -> Examples:
    spec = typed(compose(["task=file", *overrides]))
    with prefix_task_errors():
        return load_examples(spec.task, source_of(spec.task), build_edits(spec.task))


def table(path: Path, count: int = 60, domains: tuple[str, ...] = DOMAINS) -> Path:
    """Texts that tell their number, and columns that follow from it."""
    rows = [(domains[row % len(domains)], row / 4, f"number {row}", "no yes".split()[row % 2]) for row in range(count)]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("domain", "stars", "text", "label"), *rows])
    return path


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return table(tmp_path / "a.csv")


def check(texts: list[tuple[str, ...]], domains: list[int], stars: list[float]) -> None:
    """Compare columns with what `table` wrote."""
    numbers = [int(text.split()[-1]) for (text,) in texts]
    assert domains == [sorted(DOMAINS).index(DOMAINS[number % 3]) for number in numbers]
    assert stars == [number / 4 for number in numbers]


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["task.limit_train=30"],
        ["task.holdout=0.3"],
        ["task.holdout=0.3", "task.limit_train=30"],
        ["edit=[label_noise,imbalance]", "task.edits.imbalance.ratio=2"],
        ["edit=[label_noise,imbalance]", "task.edits.imbalance.ratio=2", "task.limit_train=20", "task.holdout=0.3"],
    ],
    ids=lambda more: " ".join(more) or "plain",
)
def test_columns_stay_with_their_examples(train: Path, more: list[str]) -> None:
    examples = loaded(f"task.train={train}", BOTH, *more)
    assert examples.task.column_classes == {"domain": sorted(DOMAINS)}
    for split, texts in examples.texts.items():
        columns = examples.columns[split]
        assert (columns["domain"].dtype, columns["stars"].dtype) == (np.int64, np.float32)
        check(list(texts), columns["domain"].tolist(), columns["stars"].tolist())


def test_a_task_without_them_reads_no_columns(train: Path) -> None:
    examples = loaded(f"task.train={train}")
    assert examples.task.column_classes == {}
    assert not any(examples.columns.values())


def test_classes_are_those_of_all_of_train(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", domains=tuple("abcdefghij"))
    examples = loaded(f"task.train={path}", f"task.validation={path}", BOTH, "task.limit_train=6")
    assert examples.task.column_classes == {"domain": list("abcdefghij")}
    assert len(set(examples.columns["train"]["domain"].tolist())) < 10


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_carry_the_columns_of_their_examples(train: Path, backbone: Path, workers: int) -> None:
    examples = loaded(f"task.train={train}", BOTH)
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    data = KDDataModule(examples, [tokenizer, tokenizer], [tokenizer], 8, 8, 16, seed=0, workers=workers)
    assert pickle.dumps(data.collate("train"))
    for split, loader in (("train", data.train_dataloader()), ("validation", data.val_dataloader())):
        for batch in loader:
            texts = [examples.texts[split][row] for row in batch.index.tolist()]
            check(texts, batch.columns["domain"].tolist(), batch.columns["stars"].tolist())
            assert (batch.columns["domain"].dtype, batch.columns["stars"].dtype) == (torch.long, torch.float)


def test_columns_move_with_their_batch() -> None:
    batch = Batch({"x": torch.ones(2)}, (), torch.zeros(2), torch.arange(2), peers=({},), columns={"a": torch.tensor([3, 4])})
    assert batch.to("meta").columns["a"].device.type == "meta"
    assert batch.map(lambda tensor: tensor + 1).columns["a"].tolist() == [4, 5]
    assert batch.seen_by(1).columns["a"].tolist() == [3, 4]


def test_the_bench_takes_columns_along(train: Path) -> None:
    few = some(loaded(f"task.train={train}", BOTH), 10)
    assert len(few.texts["train"]) == 10
    check(list(few.texts["train"]), few.columns["train"]["domain"].tolist(), few.columns["train"]["stars"].tolist())


# Formats


def test_every_format_gives_the_same_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("d,n,text,label\n1,2.5,one,no\n2,3,two,yes\n")
    (tmp_path / "a.tsv").write_text("one\t1\t2.5\tno\ntwo\t2\t3\tyes\n")
    (tmp_path / "a.jsonl").write_text(
        '{"text": "one", "label": "no", "d": 1.0, "n": 2.5}\n{"text": "two", "label": "yes", "d": "2", "n": 3}\n'
    )
    (tmp_path / "no.csv").write_text("d,n,text\n1,2.5,one\n")
    (tmp_path / "yes.csv").write_text("d,n,text\n2,3,two\n")
    sources = [[f"task.train={tmp_path / name}"] for name in ("a.csv", "a.tsv", "a.jsonl")]
    sources += [[f"task.train={{no: {tmp_path / 'no.csv'}, yes: {tmp_path / 'yes.csv'}}}"]]
    sources[1] += ["task.columns=[text,d,n,label]"]
    for source in sources:
        both = [*source, source[0].replace("task.train", "task.validation")]
        examples = loaded(*both, "task.extra={d: classes, n: number}")
        assert examples.task.column_classes == {"d": ["1", "2"]}
        for columns in examples.columns.values():
            assert {name: values.tolist() for name, values in columns.items()} == {"d": [0, 1], "n": [2.5, 3.0]}


def test_a_table_is_a_list_of_examples_with_their_columns(train: Path) -> None:
    found = Files(str(train), ["text"], "label", extra=["domain", "stars"]).splits()["train"]
    assert [example.columns for example in found] == [found[row].columns for row in range(len(found))]
    assert found[0].columns == {name: str(value) for name, value in rows_of(found[0].texts).items()}
    assert Table.of(list(found)).columns == found.columns


def rows_of(texts: tuple[str, ...]) -> dict[str, object]:
    """Columns that `table` wrote beside a text."""
    number = int(texts[0].split()[-1])
    return {"domain": DOMAINS[number % 3], "stars": number / 4}


def test_glue_and_packages_have_columns_too(tmp_path: Path) -> None:
    (tmp_path / "RTE").mkdir()
    for name in ("train", "dev"):
        rows = "3\ta\tb\tentailment\n5\tb\ta\tnot_entailment\n"
        (tmp_path / "RTE" / f"{name}.tsv").write_text(f"index\tsentence1\tsentence2\tlabel\n{rows}")
    spec = typed(compose(["task=rte", f"paths.glue={tmp_path}", "task.extra={index: number}"]))
    found = load_examples(spec.task, source_of(spec.task))
    assert found.columns["train"]["index"].tolist() == found.columns["validation"]["index"].tolist() == [3, 5]
    spec = typed(compose(["task.extra={source: classes}"]))
    found = load_examples(spec.task, source_of(spec.task))
    assert found.task.column_classes == {"source": ["rotten_tomatoes"]}
    assert len(found.columns["train"]["source"]) == len(found.texts["train"])


class Rows:
    """A source of one's own."""

    def __init__(self, extra: tuple[str, ...] = ("domain",)) -> None:
        self.extra = extra

    def splits(self) -> Splits:
        rows = [Example((f"text {row}",), "no yes".split()[row], "", {"domain": "ba"[row]}) for row in (0, 1)]
        return {"train": rows, "validation": rows[:1]}

    def fingerprint(self) -> dict[str, str]:
        return {}


class Bare:
    """A source that reads no further columns."""

    splits, fingerprint = Rows.splits, Rows.fingerprint


def test_a_source_of_ones_own_gives_columns_with_its_examples() -> None:
    spec = typed(compose(["task=file", "task.train=x", "task.extra={domain: classes}"]))
    examples = load_examples(spec.task, Rows())
    assert {split: columns["domain"].tolist() for split, columns in examples.columns.items()} == {
        "train": [1, 0],
        "validation": [1],
    }


# What cannot work


@pytest.mark.parametrize(
    ("more", "key", "words"),
    [
        (
            ["task.extra={topic: classes}"],
            "task.extra",
            "a.csv', line 2: no column 'topic'; the columns are domain, stars, text",
        ),
        (["task.extra={domain: number}"], "task.extra", "line 2: the column 'domain' is 'news', not a finite number"),
        (["task.extra={domain: classes}", "task.validation={other}"], "task.extra", "'sport', which is none of its classes"),
        (
            ["task.extra={domain: classes}", "task.validation={gap}"],
            "task.extra",
            "line 2: the column 'domain' has no value ('')",
        ),
        (
            ["task.extra={stars: number}", "task.validation={gap}"],
            "task.extra",
            "line 2: the column 'stars' is '', not a finite",
        ),
        (["task.extra={domain: classes}", "task.validation={none}"], "task.extra", "none.csv', line 2: no column 'domain'"),
    ],
)
def test_a_column_that_cannot_be_read_names_its_key(train: Path, more: list[str], key: str, words: str) -> None:
    names = {name: str(train.parent / f"{name}.csv") for name in ("other", "gap", "none")}
    table(train.parent / "other.csv", domains=("news", "sport"))
    (train.parent / "gap.csv").write_text("domain,stars,text,label\n,,a text,no\n")
    (train.parent / "none.csv").write_text("text,label\na text,no\n")
    filled = [word if "extra" in word else word.format(**names) for word in more]
    with pytest.raises(InputError) as caught:
        loaded(f"task.train={train}", *filled)
    assert caught.value.key == key
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (
            ["task=file", "task.train=x", "task.extra={domain: words}"],
            "task.extra.domain",
            "'words' is not one of classes, number",
        ),
        (["task=file", "task.train=x", "++task.extra=[a]"], "task.extra", "takes a mapping"),
        (["task=file", "task.train=x", "+task.source.extra=[a]"], "task.source.extra", "follows from task.extra"),
        (["task=text", "task.train=x", "+task.extra={a: number}"], "task.extra", "TextFiles reads no further columns"),
        (
            [f"task.source._target_={__name__}.Bare", "task.extra={a: number}"],
            "task.extra",
            "Bare reads no further columns",
        ),
    ],
)
def test_columns_that_a_task_cannot_have_are_refused(overrides: list[str], key: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        plan(compose([*overrides, f"paths.runs={tmp_path}", "method=finetune", "teacher=[]"]))
    assert caught.value.key == key
    assert words in caught.value.message


def test_a_list_in_the_place_of_the_mapping_names_its_key() -> None:
    config = compose([])
    OmegaConf.update(config, "task.extra", ["domain"], merge=False)
    with pytest.raises(InputError, match="takes a mapping") as caught:
        typed(config)
    assert caught.value.key == "task.extra"


def test_masked_language_modelling_has_no_columns() -> None:
    spec = typed(compose(["task=imdb_text", "+task.extra={source: classes}"]))
    with pytest.raises(InputError, match="no further columns") as caught:
        load_examples(spec.task, source_of(spec.task))
    assert caught.value.key == "extra"


def test_columns_change_a_digest_as_their_kind_does(small: Callable[..., list[str]]) -> None:
    digests = {
        plan(compose(small(*more))).digest
        for more in ([], *([f"task.extra={{label: {kind}}}"] for kind in ("classes", "number")))
    }
    assert len(digests) == 3
