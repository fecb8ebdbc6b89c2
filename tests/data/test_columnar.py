"""Parquet and Arrow files, and folders of shards: what is read, and what a bad one is told, with key, file and row."""

import os
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from kd.config.compose import compose
from kd.data import columnar
from kd.data.examples import Examples, load_examples
from kd.data.masked_lm.source import TextFiles
from kd.data.readers import rows
from kd.data.shards import data_fingerprint, shards_of
from kd.data.sources import Files
from kd.errors import InputError
from kd.runs.plan import plan

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TEXTS = ["sunny day", "gloomy day", "merry walk"]
COLUMNS = {"text": TEXTS, "label": [1, 0, 1]}
CSV = "text,label\nsunny day,1\ngloomy day,0\nmerry walk,1\n"


def parquet(path: Path, table: Any, **options: Any) -> Path:
    pq.write_table(table, path, **options)
    return path


def arrow_file(path: Path, table: Any, **options: Any) -> Path:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema, **options) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


def arrow_stream(path: Path, table: Any, **options: Any) -> Path:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema, **options) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


WRITERS = {"parquet": parquet, "arrow": arrow_file, "stream": arrow_stream}
SUFFIX = {"parquet": ".parquet", "arrow": ".arrow", "stream": ".arrow"}
every_format = pytest.mark.parametrize("kind", WRITERS)


def written(folder: Path, kind: str, columns: Any, name: str = "a") -> Path:
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    return WRITERS[kind](folder / f"{name}{SUFFIX[kind]}", table)


def load(train: object, **more: object) -> Examples:
    from kd.config.schema import TaskSpec

    given = {"text": ["text"], "label": "label", "metrics": ["accuracy"], "monitor": "accuracy"}
    files = {name: more.pop(name) for name in ("format", "columns", "validation") if name in more}
    spec = TaskSpec(name="t", source={}, **{**given, **more})
    source = Files(train, spec.text, spec.label, **{"validation": train, **files}, extra=list(spec.extra or {}))
    return load_examples(spec, source)


# Values


@every_format
@pytest.mark.parametrize("batch", [1, 2, 4096])
def test_rows_are_those_of_the_table_in_its_order(
    tmp_path: Path, kind: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columnar, "AT_ONCE", batch)
    path = written(tmp_path, kind, COLUMNS)
    found = list(rows(path, "train", wanted={"text": "text", "label": "label"}))
    assert found == [
        (number, {"text": text, "label": label}) for number, text, label in zip([1, 2, 3], TEXTS, [1, 0, 1], strict=True)
    ]
    examples = load(str(path))
    assert examples.texts["train"] == [(text,) for text in TEXTS]
    assert (examples.labels["train"], examples.task.labels) == ([1, 0, 1], ["0", "1"])


VALUES = {
    "dictionary": (lambda: pa.array(["b", "a", "b"]).dictionary_encode(), ["a", "b"], [1, 0, 1]),
    "large dictionary": (lambda: pa.array(["b", "a", "b"], pa.large_string()).dictionary_encode(), ["a", "b"], [1, 0, 1]),
    "int8": (lambda: pa.array([1, 0, 1], pa.int8()), ["0", "1"], [1, 0, 1]),
    "uint64": (lambda: pa.array([2**63, 0, 2**63], pa.uint64()), ["0", str(2**63)], [1, 0, 1]),
    "float": (lambda: pa.array([1.0, 0.0, 1.0], pa.float32()), ["0", "1"], [1, 0, 1]),
    "half": (lambda: pa.array([1.0, 0.0, 1.0], pa.float32()).cast(pa.float16()), ["0", "1"], [1, 0, 1]),
    "bool": (lambda: pa.array([True, False, True]), ["False", "True"], [1, 0, 1]),
    "decimal": (lambda: pa.array([Decimal("1.0"), Decimal("0.0"), Decimal("1.0")]), ["0", "1"], [1, 0, 1]),
    "large text": (lambda: pa.array(["b", "a", "b"], pa.large_string()), ["a", "b"], [1, 0, 1]),
    "view": (lambda: pa.array(["b", "a", "b"], pa.string_view()), ["a", "b"], [1, 0, 1]),
    "bytes": (lambda: pa.array([b"b", b"a", b"b"]), ["a", "b"], [1, 0, 1]),
}


@every_format
@pytest.mark.parametrize("name", VALUES)
def test_labels_of_every_type_are_classes(tmp_path: Path, kind: str, name: str) -> None:
    make, classes, labels = VALUES[name]
    examples = load(str(written(tmp_path, kind, {"text": TEXTS, "label": make()})))
    assert (examples.task.labels, examples.labels["train"]) == (classes, labels)


@every_format
@pytest.mark.parametrize(
    "make",
    [
        lambda: pa.array(TEXTS).dictionary_encode(),
        lambda: pa.array(TEXTS, pa.large_string()),
        lambda: pa.array(TEXTS, pa.string_view()),
        lambda: pa.array([text.encode() for text in TEXTS]),
        lambda: pa.chunked_array([TEXTS[:1], TEXTS[1:]]),
    ],
)
def test_text_of_every_type_is_text(tmp_path: Path, kind: str, make: Callable[[], Any]) -> None:
    assert load(str(written(tmp_path, kind, {"text": make(), "label": [1, 0, 1]}))).texts["train"] == [
        (text,) for text in TEXTS
    ]


@every_format
def test_scores_pairs_and_further_columns(tmp_path: Path, kind: str) -> None:
    columns = {"a": TEXTS, "b": ["x", "y", "z"], "s": [0.25, 1.5, 3.0], "n": [7, 8, 9], "d": ["u", "v", "u"]}
    path = str(written(tmp_path, kind, columns))
    further = {"n": "number", "d": "classes"}
    examples = load(path, kind="regression", text=["a", "b"], label="s", metrics=["mse"], monitor="mse", extra=further)
    assert examples.texts["train"] == list(zip(TEXTS, ["x", "y", "z"], strict=True))
    assert examples.labels["train"] == [0.25, 1.5, 3.0]
    assert examples.columns["train"]["n"].tolist() == [7, 8, 9]
    assert examples.columns["train"]["d"].tolist() == [0, 1, 0]


@every_format
def test_columns_that_are_not_asked_for_may_be_of_any_type(tmp_path: Path, kind: str) -> None:
    nested = {"tokens": [[1], [], None], "about": [{"a": 1}, None, {"a": 2}], "when": pa.array([1, 2, 3], pa.timestamp("s"))}
    assert load(str(written(tmp_path, kind, {**COLUMNS, **nested}))).texts["train"] == [(text,) for text in TEXTS]


# What cannot be read


@every_format
@pytest.mark.parametrize(
    ("columns", "key", "words"),
    [
        ({"text": ["a", None, "c"]}, "text", ["row 2: 'text' is null, not text"]),
        ({"text": ["a", " ", "c"]}, "text", ["row 2: 'text' is blank"]),
        ({"text": [1, 2, 3]}, "text", ["row 1: 'text' is 1, not text"]),
        ({"text": ["a", "b\0", "c"]}, "text", ["row 2: 'text' has a NUL character"]),
        ({"label": [1, None, 1]}, "label", ["row 2: the label is missing (null)"]),
        ({"label": [1.0, float("nan"), 1.0]}, "label", ["row 2: the label is missing (nan)"]),
        ({"text": [["a"], ["b"], []]}, "text", ["the column 'text' is nested (list<"]),
        ({"label": [{"x": 1}, {"x": 0}, None]}, "label", ["the column 'label' is nested (struct<"]),
        ({"label": pa.array([1, 2, 3], pa.timestamp("s"))}, "label", ["'label' has values of type timestamp["]),
        ({"text": pa.array([b"a", b"\xff", b"c"])}, "train", ["damaged", "UTF8"]),
    ],
)
def test_a_bad_value_is_told_with_key_and_row(tmp_path: Path, kind: str, columns: dict, key: str, words: list[str]) -> None:
    path = str(written(tmp_path, kind, {**COLUMNS, **columns}))
    with pytest.raises(InputError) as caught:
        load(path)
    assert caught.value.key == key
    for word in (path, *words):
        assert word in caught.value.message


@every_format
@pytest.mark.parametrize(
    ("options", "key"), [({"text": ["no"]}, "text"), ({"label": "no"}, "label"), ({"extra": {"no": "number"}}, "extra")]
)
def test_a_missing_column_is_told_with_its_key_and_the_others(tmp_path: Path, kind: str, options: dict, key: str) -> None:
    path = written(tmp_path, kind, COLUMNS)
    with pytest.raises(InputError, match="no column 'no'; the columns are text, label") as caught:
        load(str(path), **options)
    assert caught.value.key == key


@every_format
def test_a_column_that_is_there_twice_is_refused(tmp_path: Path, kind: str) -> None:
    table = pa.Table.from_arrays([pa.array(TEXTS), pa.array([1, 0, 1]), pa.array([0, 0, 0])], ["text", "label", "label"])
    with pytest.raises(InputError, match="'label' is there twice"):
        load(str(written(tmp_path, kind, table)))


@every_format
def test_a_file_without_rows_has_no_examples(tmp_path: Path, kind: str) -> None:
    path = written(tmp_path, kind, pa.table(COLUMNS).slice(0, 0))
    with pytest.raises(InputError, match="has no examples") as caught:
        load(str(path))
    assert caught.value.key == "train"


@every_format
@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "other"])
def test_a_damaged_file_is_told(tmp_path: Path, kind: str, damage: str) -> None:
    many = {"text": [f"text number {row}" for row in range(9000)], "label": [row % 2 for row in range(9000)]}
    path = written(tmp_path, kind, many)
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 4 : len(content) // 2] = b"\xff" * (len(content) // 2 - len(content) // 4)
    path.write_bytes({"cut": content[:-50], "empty": b"", "flipped": content, "other": CSV.encode() * 9}[damage])
    with pytest.raises(InputError) as caught:
        load(str(path))
    assert str(path) in caught.value.message
    assert "is empty" in caught.value.message if damage == "empty" else "damaged" in caught.value.message
    assert caught.value.key == "train"
    assert caught.value.message.isprintable()


def test_options_of_tables_of_text_are_refused(tmp_path: Path) -> None:
    path = str(written(tmp_path, "parquet", COLUMNS))
    with pytest.raises(InputError, match=r"columns is for tables .*is parquet"):
        load(path, columns=["a", "b"])


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_name_that_hides_the_format_is_told_it(tmp_path: Path, kind: str) -> None:
    path = written(tmp_path, kind, COLUMNS)
    renamed = path.rename(tmp_path / "a.csv")
    with pytest.raises(InputError, match=rf"in the format {kind}, not text: its name should end in \.{kind}"):
        load(str(renamed))
    assert load(str(renamed), format=kind).texts["train"] == [(text,) for text in TEXTS]


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, "parquet", COLUMNS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"needs the package pyarrow: pip install 'kd\[arrow\]'") as caught:
        load(str(path))
    assert caught.value.key == "train"


def test_the_package_is_imported_for_such_files_alone(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(CSV)
    code = f"import sys; from kd.data.sources import Files; Files({str(tmp_path / 'a.csv')!r}, ['text'], 'label', "
    code += f"validation={str(tmp_path / 'a.csv')!r}).splits(); print('pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, kind: str) -> None:
    """Rows that are read and let go take the memory of a batch: the second 100,000 rows, 100 MB, add nothing to the first."""
    import numpy as np

    words = np.random.default_rng(0).integers(97, 123, (2000, 1000), np.uint8)
    block = pa.table({"text": [row.tobytes().decode() for row in words], "label": [0] * 2000})
    path = tmp_path / f"a{SUFFIX[kind]}"
    with pq.ParquetWriter(path, block.schema) if kind == "parquet" else pa.ipc.new_file(str(path), block.schema) as writer:
        for _ in range(100):
            writer.write_table(block)
    code = (
        "import resource, sys; from pathlib import Path; from kd.data.readers import rows; import pyarrow.parquet\n"
        "used = lambda: int(next(l for l in open('/proc/self/status') if l.startswith('RssAnon')).split()[1])\n"
        "most = [0, 0]\n"
        f"for n, _ in rows(Path({str(path)!r}), None, wanted={{'text': None}}):\n"
        "    if n % 5000 == 0: most[n > 100_000] = max(most[n > 100_000], used())\n"
        "print(n, most[1] - most[0])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert int(found[0]) == 200_000
    assert int(found[1]) < 30_000, f"{found[1]} kB"


# Folders of shards


def shards(folder: Path, kind: str, count: int = 3) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        name = f"part-{number}"
        columns = {"text": [TEXTS[number]], "label": [[1, 0, 1][number]]}
        if kind in WRITERS:
            written(folder, kind, columns, name)
        elif kind == "csv":
            (folder / f"{name}.csv").write_text(f"text,label\n{columns['text'][0]},{columns['label'][0]}\n")
        else:
            (folder / f"{name}.jsonl").write_text(f'{{"text": "{columns["text"][0]}", "label": {columns["label"][0]}}}\n')
    return folder


@pytest.mark.parametrize("kind", [*WRITERS, "csv", "jsonl"])
def test_a_folder_is_read_as_one_file_in_the_order_of_names(tmp_path: Path, kind: str) -> None:
    folder = shards(tmp_path / "data", kind)
    (folder / "_SUCCESS").write_text("")
    (folder / ".part-0.crc").write_bytes(b"\0\1")
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text("{}")
    examples = load(str(folder))
    assert examples.texts["train"] == [(text,) for text in TEXTS]
    assert examples.labels["train"] == [1, 0, 1]
    table = Files(str(folder), ["text"], "label", validation=str(folder)).splits()["train"]
    number, row = ("row", 1) if kind in WRITERS else ("line", 2 if kind == "csv" else 1)
    assert table[2].where == f"'{sorted(folder.glob('part*'))[2]}', {number} {row}"


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_shard_without_rows_is_passed_over(tmp_path: Path, kind: str) -> None:
    folder = shards(tmp_path / "data", kind)
    if kind == "csv":
        (folder / "part-0.csv").write_text("text,label\n")
    else:
        written(folder, kind, pa.table(COLUMNS).slice(0, 0), "part-0")
    assert load(str(folder)).texts["train"] == [(TEXTS[1],), (TEXTS[2],)]


def test_a_folder_of_shards_for_each_class(tmp_path: Path) -> None:
    good, bad = shards(tmp_path / "good", "parquet"), tmp_path / "bad"
    bad.mkdir()
    for number in range(2):
        (bad / f"{number}.txt").write_text(f"bad {number}\n")
    examples = load({"pos": str(good), "neg": str(bad)})
    assert examples.texts["train"] == [*((text,) for text in TEXTS), ("bad 0",), ("bad 1",)]
    assert examples.labels["train"] == [1, 1, 1, 0, 0]


def test_with_a_format_the_suffix_does_not_matter(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for number, name in enumerate(("part-0", "part-1.data")):
        (folder / name).write_text(f"text,label\n{TEXTS[number]},{number}\n")
    assert load(str(folder), format="csv").texts["train"] == [(text,) for text in TEXTS[:2]]
    with pytest.raises(InputError, match=r"several formats, 'part-0' and 'part-1\.data'"):
        load(str(folder))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "has no files"),
        ([".hidden.csv", "_metadata.csv"], "has no files; hidden ones, as . _*, are left out"),
        (["a.csv", "b.jsonl"], "has files of several formats, 'a.csv' and 'b.jsonl'"),
        (["a.csv", "sub/b.csv"], "has a folder in it, 'sub'"),
        (["a.csv", "README.md"], "has files of several formats"),
    ],
)
def test_a_folder_that_is_no_folder_of_shards_is_told(tmp_path: Path, names: list[str], words: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(CSV)
    good = tmp_path / "good.csv"
    good.write_text(CSV)
    for action in ("fingerprint", "splits"):
        with pytest.raises(InputError) as caught:
            getattr(Files(str(folder), ["text"], "label", validation=str(good)), action)()
        assert caught.value.key == "train"
        assert words in caught.value.message


def test_a_shard_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    folder = shards(tmp_path / "data", "csv")
    (folder / "part-1.csv").unlink()
    (folder / "part-1.csv").symlink_to(folder / "gone.csv")
    with pytest.raises(InputError, match=r"part-1\.csv' does not exist"):
        shards_of(folder, "train")


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    folder = shards(tmp_path / "data", "parquet")
    (folder / "part-1.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"part-1\.parquet': not a Parquet file, or damaged"):
        load(str(folder))


def test_the_fingerprint_covers_every_shard_and_their_order(tmp_path: Path) -> None:
    folder = shards(tmp_path / "data", "csv")
    first = data_fingerprint(folder, "train")
    (folder / "_SUCCESS").write_text("done")
    assert data_fingerprint(folder, "train") == first
    for name in ("part-0.csv", "part-1.csv", "part-2.csv"):
        content = (folder / name).read_text()
        (folder / name).write_text(content + "another,0\n")
        assert data_fingerprint(folder, "train") != first
        (folder / name).write_text(content)
        assert data_fingerprint(folder, "train") == first
    (folder / "part-0.csv").rename(folder / "part-3.csv")
    assert data_fingerprint(folder, "train") != first


def test_the_digest_of_a_run_follows_the_shards_not_the_path(tmp_path: Path) -> None:
    folder = shards(tmp_path / "data", "csv")

    def digest() -> str:
        given = [f"task.train={folder}", f"task.validation={folder}"]
        return plan(compose(["method=finetune", "teacher=[]", "task=file", *given])).digest

    first = digest()
    folder = folder.rename(tmp_path / "other")
    assert digest() == first
    with (folder / "part-1.csv").open("a") as file:
        file.write("more,1\n")
    os.utime(folder / "part-1.csv", ns=(1, 1))
    assert digest() != first


# Text without labels


@pytest.mark.parametrize("kind", [*WRITERS, "csv", "jsonl", "txt"])
@pytest.mark.parametrize("folder", [False, True])
def test_text_without_labels_of_every_format(tmp_path: Path, kind: str, folder: bool) -> None:
    (tmp_path / "train.csv").write_text(CSV)
    data = tmp_path / "data"
    if kind == "txt":
        data.mkdir()
        for number, text in enumerate(TEXTS):
            (data / f"{number}.txt").write_text(f"\n{text}\n")
    else:
        shards(data, kind)
    path, expected = (data, TEXTS) if folder else (sorted(data.iterdir())[0], TEXTS[:1])
    examples = load(str(tmp_path / "train.csv"), unlabelled=str(path))
    assert examples.texts["train"] == [(text,) for text in [*TEXTS, *expected]]
    examples = TextFiles(str(path), ["text"], validation=str(path)).splits()["train"]
    assert [example.texts for example in examples] == [(text,) for text in expected]
