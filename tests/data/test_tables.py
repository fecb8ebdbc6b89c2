"""Readers of tables: what they give, and where they say a file is wrong."""

from pathlib import Path

import pytest

from kd.data.readers import rows
from kd.errors import InputError


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "text,label\nfine,1\nbad,0\n", [(2, "fine", "1"), (3, "bad", "0")]),
        ("crlf.csv", "text,label\r\nfine,1\r\n", [(2, "fine", "1")]),
        ("no_last_newline.csv", "text,label\nfine,1", [(2, "fine", "1")]),
        ("blank.csv", "text,label\n\nfine,1\n\n", [(3, "fine", "1")]),
        ("quoted.csv", 'text,label\n"a, ""b""",1\n', [(2, 'a, "b"', "1")]),
        ("lines.csv", 'text,label\n"a\n\nb",1\nc,0\n', [(2, "a\n\nb", "1"), (5, "c", "0")]),
        ("bom.csv", b"\xef\xbb\xbftext,label\nfine,1\n", [(2, "fine", "1")]),
        ("utf8.csv", "text,label\nc\u2019est \u00e9t\u00e9,1\n", [(2, "c\u2019est \u00e9t\u00e9", "1")]),
        ("a.tsv", "text\tlabel\na, b\t1\n", [(2, "a, b", "1")]),
        ("A.TSV", "text\tlabel\nfine\t1\n", [(2, "fine", "1")]),
        ("a.txt", "text\tlabel\nfine\t1\n", [(2, "fine", "1")]),
        ("raw.tsv", 'text\tlabel\n" an open quote\t1\n"b"\t0\n', [(2, '" an open quote', "1"), (3, '"b"', "0")]),
        ("a.jsonl", '{"text": "fine", "label": 1}\n\n{"text": "bad", "label": 0}\n', [(1, "fine", 1), (3, "bad", 0)]),
        ("bom.ndjson", b'\xef\xbb\xbf{"text": "fine", "label": "x"}\n', [(1, "fine", "x")]),
        ("a.json", '{"text": "a\\u2028b", "label": "x"}\n', [(1, "a\u2028b", "x")]),
    ],
)
def test_rows_come_with_the_line_they_begin_on(tmp_path: Path, name: str, content: str | bytes, expected: list) -> None:
    found = list(rows(write(tmp_path, name, content), "train"))
    assert [(line, row["text"], row["label"]) for line, row in found] == expected


def test_quotes_count_where_they_are_asked_for_and_do_not_where_they_are_not(tmp_path: Path) -> None:
    tsv = write(tmp_path, "a.tsv", 'text\tlabel\n"a\tb"\t1\n')
    assert next(rows(tsv, "k", quoted=True))[1]["text"] == "a\tb"
    csv = write(tmp_path, "a.csv", 'text,label\n"a,1\n')
    assert next(rows(csv, "k", quoted=False))[1]["text"] == '"a'


def test_a_file_without_a_header_begins_on_line_one(tmp_path: Path) -> None:
    path = write(tmp_path, "a.tsv", "gj04\t1\t\tThe sailors rode.\n")
    assert list(rows(path, "k", columns=["source", "label", "star", "sentence"])) == [
        (1, {"source": "gj04", "label": "1", "star": "", "sentence": "The sailors rode."})
    ]


def test_one_text_may_be_longer_than_the_csv_modules_limit(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", f"text,label\n{'word ' * 40_000},1\n")
    assert len(next(rows(path, "k"))[1]["text"]) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.csv", "", ["is empty"]),
        ("a.xlsx", "text,label\n", ["not a .csv, .tsv, .jsonl, .parquet or .arrow file"]),
        ("few.csv", "text,label\nfine,1\nbad\n", ["line 3: 1 fields where the header has 2", "text, label"]),
        ("many.csv", "text,label\nfine,1,2\n", ["line 2: 3 fields where the header has 2"]),
        ("after.csv", 'text,label\n"a\nb\nc",1\nbad\n', ["line 5: 1 fields"]),
        ("inside.csv", 'text,label\na,1\n"b\nc"\n', ["line 3: 1 fields"]),
        ("few.tsv", "text\tlabel\nfine 1\n", ["line 2: 1 fields"]),
        ("quote.csv", 'text,label\n"a"b,1\n', ["line 2"]),
        ("latin.csv", "text,label\nété,1\n".encode("latin-1"), ["line 2", "not UTF-8"]),
        ("utf16.jsonl", '{"text": "a"}\n'.encode("utf-16"), ["not UTF-8"]),
        ("latin.jsonl", '{"text": "été"}\n'.encode("latin-1"), ["not UTF-8"]),
        ("broken.jsonl", '{"text": "a"}\n\n{"text": \n', ["line 3: not JSON"]),
        ("list.jsonl", '{"text": "a"}\n["a", 1]\n', ["line 2: not a JSON object"]),
        ("word.jsonl", '"a"\n', ["line 1: not a JSON object"]),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, name: str, content: str | bytes, words: list[str]) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(InputError) as caught:
        list(rows(path, "train"))
    assert caught.value.key == "train"
    for word in (str(path), *words):
        assert word in caught.value.message


def test_a_missing_file_and_a_folder_are_no_files(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "a.csv", "does not exist"), (tmp_path, "is a folder, not a file")):
        with pytest.raises(InputError, match=words) as caught:
            list(rows(path, "test"))
        assert caught.value.key == "test"


def test_a_quote_that_is_never_closed_is_named_by_the_line_that_opens_it(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'text,label\nfine,1\n"open,1\n' + "more,0\n" * 50)
    with pytest.raises(InputError, match="line 3:"):
        list(rows(path, "k"))


def test_a_wrong_byte_is_placed_in_the_file_not_in_a_read_buffer(tmp_path: Path) -> None:
    good = b"text,label\n" + b"fine,1\n" * 5000
    path = write(tmp_path, "a.csv", good + "été,1\n".encode("latin-1"))
    with pytest.raises(InputError) as caught:
        list(rows(path, "k"))
    assert f"byte {len(good)}" in caught.value.message or "line 5002" in caught.value.message


def test_a_column_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "text,text,label\na,b,1\n")
    with pytest.raises(InputError, match="text"):
        list(rows(path, "k"))
