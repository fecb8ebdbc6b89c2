"""A user's own files: what is read, and what a bad one is told, with key, file and line."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from kd.config.compose import compose, typed
from kd.config.schema import TaskSpec
from kd.data.examples import Examples, load_examples
from kd.data.masked_lm.source import TextFiles
from kd.data.sources import Example, Files, check_hash_split, split_by_hash
from kd.data.texts import Table, Texts, count_shared
from kd.errors import InputError
from kd.runs.plan import plan


def load(train: object, validation: object = None, **more: object) -> Examples:
    """A task's examples, with the files and options of `Files` among those of the task."""
    files = {name: more.pop(name) for name in ("format", "delimiter", "columns", "quoted", "test") if name in more}
    given = {"text": ["text"], "label": "label", "metrics": ["accuracy"], "monitor": "accuracy", **more}
    spec = TaskSpec(name="t", source={}, **given)
    return load_examples(spec, Files(train, given["text"], given["label"], validation=validation or train, **files))


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


ROWS = [{"text": "sunny day", "label": 1}, {"text": "gloomy day", "label": 0}, {"text": "merry walk", "label": 1}]
TEXTS = [("sunny day",), ("gloomy day",), ("merry walk",)]
CSV = "text,label\nsunny day,1\ngloomy day,0\nmerry walk,1\n"


@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        ("a.json", json.dumps(ROWS), {}),
        ("a.jsonl", json.dumps(ROWS, indent=1), {}),
        ("a.data", "\n".join(json.dumps(row) for row in ROWS), {"format": "json"}),
        ("a.csv", CSV.replace(",", ";"), {"delimiter": "semicolon"}),
        ("a.csv", CSV.replace(",", "|"), {"delimiter": "|"}),
        ("a.csv", CSV.replace(",", "\t"), {"format": "tsv"}),
        ("a.dat", CSV.replace(",", "\t"), {"delimiter": "tab"}),
        ("a.csv", CSV.removeprefix("text,label\n"), {"columns": ["text", "label"]}),
        ("a.tsv", CSV.replace(",", "\t").replace("text", "0").replace("label", "1"), {"text": [0], "label": 1}),
        ("a.csv", CSV.replace("\n", "\r"), {}),
        ("a.csv", CSV.replace("\n", "\r\n"), {}),
        ("a.jsonl", "\ufeff" + "\r\n\r\n".join(json.dumps(row) for row in ROWS), {}),
    ],
)
def test_one_table_in_many_forms(tmp_path: Path, name: str, content: str, options: dict) -> None:
    examples = load(write(tmp_path, name, content), **options)
    assert examples.texts["train"] == TEXTS
    assert examples.labels["train"] == [1, 0, 1]
    assert examples.task.labels == ["0", "1"]


def test_a_file_for_each_class_is_read_line_by_line(tmp_path: Path) -> None:
    pos, neg = write(tmp_path, "a.pos", "good\n\nvery, good\t!\n"), write(tmp_path, "b.txt", "bad\n")
    files = {"pos": pos, "neg": neg}
    examples = load(files)
    assert examples.texts["train"] == [("good",), ("very, good\t!",), ("bad",)]
    assert [examples.task.labels[int(label)] for label in examples.labels["train"]] == ["pos", "pos", "neg"]
    assert set(Files(files, ["text"], "label").fingerprint()) == {"train/pos", "train/neg"}
    table = write(tmp_path, "c.csv", "text\nworse\n")
    assert load({"pos": pos, "neg": table}).texts["train"][-1] == ("worse",)


@pytest.mark.parametrize(
    ("name", "content", "options", "key", "words"),
    [
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b \\ud83d", "label": 0}\n', {}, "text", ["line 2", "\\ud83d"]),
        ("a.json", '[{"text": "a", "label": 1},\n{"text": "b"}]', {}, "label", ["line 2", "no column 'label'"]),
        ("a.json", '[{"text": "a", "label": 1}\n{"text": "b"}]', {}, "train", ["line 2", "expecting ','"]),
        ("a.json", '[{"text": "a", "label": 1},\n 7]', {}, "train", ["line 2", "an entry is not an object"]),
        ("a.json", '[{"text": "a", "label": 1}]\n{}', {}, "train", ["line 2", "more text behind"]),
        ("a.json", "[]", {}, "train", ["has no examples"]),
        ("a.json", "[" * 100_000, {}, "train", ["line 1", "recursion"]),
        ("a.jsonl", '{"text": "a", "label": ' + "9" * 5000 + "}", {}, "train", ["line 1", "digits"]),
        ("a.jsonl", '{"text": "a", "label": 1, "label": 0}', {}, "train", ["line 1", "'label' is there twice"]),
        ("a.jsonl", '{"text": ["a"], "label": 1}', {}, "text", ["line 1: 'text' is ['a'], not text"]),
        ("a.jsonl", '{"text": 5, "label": 1}', {}, "text", ["line 1: 'text' is 5, not text"]),
        ("a.jsonl", '{"text": "a\\u0000b", "label": 1}', {}, "text", ["line 1", "NUL"]),
        ("a.jsonl", '{"text": NaN, "label": 1}', {}, "text", ["line 1: 'text' is nan, not text"]),
        ("a.csv", "text,label\na,1\n,0\n", {}, "text", ["line 3", "blank"]),
        ("a.csv", "text,label\na,1\n \u00a0\t,0\n", {}, "text", ["line 3", "blank"]),
        ("a.csv", "text,label\na,1\n\u200b\x07,0\n", {}, "text", ["line 3", "blank"]),
        ("a.csv", b"text,label\na,1\nb\0,0\n", {}, "train", ["line 3", "NUL"]),
        ("a.csv", b"text,label\n" + b"a,1\n" * 2000 + b"b\0,0\n", {}, "text", ["line 2002", "NUL"]),
        ("a.csv", CSV.encode("utf-16"), {}, "train", ["UTF-16"]),
        ("a.csv", CSV.encode("utf-16-be"), {}, "train", ["NUL byte"]),
        ("a.csv.gz", b"\x1f\x8b\x08abc", {"format": "csv"}, "train", ["gzip"]),
        ("a.csv", b"PK\x03\x04abc", {}, "train", ["zip archive or a spreadsheet"]),
        ("a.csv", b"PAR1abc", {}, "train", ["in the format parquet", "end in .parquet"]),
        ("a.csv", 'text,label\na,1\n"b,0\nc,1\n', {}, "train", ["line 3", "never closed", "quoted"]),
        ("a.csv", CSV.replace(",", ";"), {}, "text", ["delimiter="]),
        ("a.csv", "I liked it,1\nbad,0\n", {}, "text", ["columns="]),
        ("a.csv", CSV, {"columns": ["text", "label"]}, "columns", ["line 1 holds the names"]),
        ("a.csv", CSV, {"columns": ["text", "text"]}, "columns", ["once"]),
        ("a.csv", CSV, {"columns": []}, "columns", ["once"]),
        ("a.csv", "a,1,2\n", {"columns": ["text", "label"]}, "train", ["line 1: 3 fields where columns=[...] has 2"]),
        ("a.csv", CSV, {"delimiter": "::"}, "delimiter", ["'::'", "semicolon"]),
        ("a.csv", CSV, {"delimiter": '"'}, "delimiter", ["one character"]),
        ("a.jsonl", "{}", {"delimiter": ";"}, "delimiter", ["is jsonl"]),
        ("a.jsonl", "{}", {"columns": ["text"]}, "columns", ["is jsonl"]),
        ("a.csv", CSV, {"format": "cvs"}, "format", ["csv"]),
        ("a.csv", CSV, {"format": "lines"}, "format", ["no labels"]),
        ("a.data", CSV, {}, "train", ["format="]),
        ("a.csv", CSV, {"label": "text"}, "label", ["among text="]),
        ("a.csv", CSV, {"text": []}, "text", ["one column"]),
    ],
)
def test_a_bad_file_is_told_with_key_and_line(
    tmp_path: Path, name: str, content: str | bytes, options: dict, key: str, words: list[str]
) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(InputError) as caught:
        load(path, **options)
    assert caught.value.key == key, caught.value.message
    for word in words:
        assert word in caught.value.message
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 600


def test_a_path_that_is_no_file_is_told(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "circle.csv").symlink_to(tmp_path / "circle.csv")
    good = write(tmp_path, "a.csv", CSV)
    (tmp_path / "none").mkdir()
    for train, words in (
        (str(tmp_path), "has a folder in it, 'none'"),
        ("", "an empty path"),
        (str(tmp_path / "no.csv"), "does not exist"),
        (good + "/b.csv", "does not exist"),
        (str(tmp_path / ("x" * 300)), "name too long"),
        (str(tmp_path / "a\0.csv"), "null byte"),
        (str(tmp_path / "pipe.csv"), "a device or a pipe"),
        (str(tmp_path / "circle.csv"), "symbolic links"),
        ("~no-such-user/a.csv", "home"),
        (7, "does not exist"),
        ([good], "a file, or one for each class"),
        ({"pos": good}, "two classes"),
        ({"pos": good, "neg": None}, "two classes"),
        ({"pos": good, "neg": str(tmp_path / "none")}, "has no files"),
    ):
        for action in ("fingerprint", "splits"):
            with pytest.raises(InputError, match=f"(?i){words}") as caught:
                getattr(Files(train, ["text"], "label", validation=good), action)()
            assert caught.value.key == "train"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_file_whose_rows_fall_outside_a_split_says_where_they_fall(tmp_path: Path, count: int) -> None:
    path = write(tmp_path, "a.csv", "text,label\n" + "same text,1\n" * count)
    with pytest.raises(InputError, match=rf"{count} examples, which leaves .* without.*validation=") as caught:
        Files(path, ["text"], "label").splits()
    assert caught.value.key == "validation"


@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_whichever_split_is_left_without_is_named(name: str) -> None:
    splits = {split: [] if split == name else [Example(("a",), 1, "")] for split in ("train", "validation", "test")}
    with pytest.raises(InputError, match=f"leaves '{name}' without"):
        check_hash_split(splits, "'a.csv'")


def test_limits_take_the_same_examples_of_every_split_whatever_the_seed(tmp_path: Path) -> None:
    rows = "".join(f"word {number},{number % 2}\n" for number in range(200))
    path = write(tmp_path, "a.csv", "text,label\n" + rows)
    whole, small, smaller = (
        load(path, path, test=path, limit_validation=limit, limit_test=limit, limit_train=limit) for limit in (None, 50, 20)
    )
    for split in ("train", "validation", "test"):
        assert len(small.texts[split]) == len(small.labels[split]) == 50
        assert small.texts[split][:20] == list(smaller.texts[split])
        assert small.texts[split] != whole.texts[split][:50]
        known = dict(zip(whole.texts[split], whole.labels[split], strict=True))
        assert [known[text] for text in small.texts[split]] == small.labels[split]
    for split in ("validation", "test"):
        with pytest.raises(InputError, match="at least 1") as caught:
            load(path, **{f"limit_{split}": 0})
        assert caught.value.key == f"limit_{split}"


def test_new_keys_of_a_task_are_part_of_a_digest_only_where_they_are_set(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", CSV)

    def digest(*overrides: str) -> str:
        given = [f"task.train={path}", f"task.validation={path}", *overrides]
        return plan(compose(["method=finetune", "teacher=[]", "task=file", *given])).digest

    plain = digest()
    assert digest("task.format=null", "task.delimiter=null", "task.limit_test=null") == plain
    changes = (
        "task.format=csv",
        "task.delimiter=semicolon",
        "task.columns=[a,b]",
        "task.limit_validation=5",
        "task.limit_test=5",
    )
    assert len({plain, *map(digest, changes)}) == 6
    assert digest("task.text=[0]", "task.label=1") == digest("task.text=['0']", "task.label='1'") != plain
    (tmp_path / "pos.txt").write_text("a\n")
    spec = typed(compose(["task=file", f"task.train={{pos: {tmp_path}/pos.txt, 1: {path}}}"]))
    assert list(map(str, spec.task.source["train"])) == ["pos", "1"]


def test_text_without_labels_takes_the_same_layouts(tmp_path: Path) -> None:
    lines = write(tmp_path, "a.data", "one line\n\nanother\n")
    found = TextFiles(lines, ["text"], validation=lines, format="lines").splits()["train"]
    assert found == [Example(("one line",), None, f"'{lines}', line 1"), Example(("another",), None, f"'{lines}', line 3")]
    table = write(tmp_path, "b.csv", "1;one line\n")
    found = TextFiles(table, ["s"], validation=table, delimiter="semicolon", columns=["id", "s"]).splits()["train"]
    assert [example.texts for example in found] == [("one line",)]
    with pytest.raises(InputError, match="no classes") as caught:
        TextFiles({"a": lines, "b": lines}, ["text"]).splits()
    assert caught.value.key == "train"


# Compact form


def test_compact_texts_read_like_a_list_of_tuples() -> None:
    rows = [("a", "bc"), ("", "\u00e9t\u00e9"), ("\U0001f600", "x" * 5000), ("ab", "c")]
    texts = Texts.of(rows)
    assert list(texts) == texts[:] == rows
    assert texts == rows
    assert Texts.of(rows[:3]) != texts
    assert (texts[-1], texts[1:3], len(texts)) == (rows[-1], rows[1:3], 4)
    assert texts.take([2, 0, 2]) == [rows[2], rows[0], rows[2]]
    assert texts.take(np.asarray([], dtype=np.int64)) == []
    assert texts.joined() == [("a bc",), (" \u00e9t\u00e9",), (f"\U0001f600 {'x' * 5000}",), ("ab c",)]
    assert len({Texts.of(other).digest() for other in (rows, rows[::-1], rows[:3], [("ab", "c"), *rows[1:]])}) == 4
    assert texts.take([3, 1]).digest() == Texts.of([rows[3], rows[1]]).digest()
    with pytest.raises(IndexError):
        texts[4]


def test_shared_examples_are_counted_as_sets_of_tuples_would() -> None:
    ours, theirs = [("a", "b"), ("ab", ""), ("a", "b"), ("c", "d")], [("a", "b"), ("", "ab"), ("d", "c")]
    assert count_shared(ours, theirs) == sum(pair in set(theirs) for pair in ours) == 2


def test_a_compact_table_keeps_labels_and_places() -> None:
    examples = [Example((f"t{n}",), label, f"'a', line {n}") for n, label in enumerate((1, 1.0, True, "1", None))]
    table = Table.of(examples)
    assert table == examples
    assert [type(example.label) for example in table] == [int, float, bool, str, type(None)]
    assert table.take([4, 2]) == [examples[4], examples[2]]
    parts = split_by_hash(examples, {"a": 0.5, "b": 0.5})
    assert sorted(example.where for part in parts.values() for example in part) == [one.where for one in examples]
