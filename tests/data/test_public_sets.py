"""Public sets in the form in which they are shipped, each read by the command of its row in docs/data.md.

Forms are those of the sets' own files or of their common readers: TREC (torchtext's and datasets' readers: ISO-8859-1,
`label:fine text`), AG News (Zhang's CSV: quoted, no header), SUBJ (`rotten_imdb.tar.gz`), MPQA (SentEval), SICK (SemEval 2014,
`SICK_train.txt`), SNLI 1.0 (`snli_1.0_train.txt`, as MultiNLI's), GLUE's `.tsv` of natural language inference, ANLI 1.0
(`R1/train.jsonl`). The sentences are made here.
"""

import csv
import json
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from kd.build.parts import examples_of
from kd.data.examples import Examples
from kd.errors import InputError
from whole_runs import planned

DOCS = Path(__file__).parent.parent.parent / "docs" / "data.md"
SIZE = 40


def commands() -> dict[str, list[str]]:
    """The command of each row of the table, by the row's first word."""
    table = DOCS.read_text(encoding="utf-8").split("## Public sets as they are shipped")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \| `kd-train ([^`]+)` \|$", table, re.MULTILINE)
    assert len(rows) == table.count("`kd-train ")
    return {name: shlex.split(command) for name, command in rows}


def command(beginning: str) -> list[str]:
    (found,) = [words for name, words in commands().items() if name.startswith(beginning)]
    return found


def read(words: Sequence[str]) -> Examples:
    (examples,) = examples_of(planned([*words, "teacher=[]", "method=finetune", "student=full"])).values()
    return examples


def rows_of(examples: Examples, split: str) -> list[tuple[tuple[str, ...], str]]:
    names = examples.task.labels
    return [
        (tuple(texts), str(label) if names is None else names[int(label)])
        for texts, label in zip(examples.texts[split], examples.labels[split], strict=True)
    ]


def write(path: str, lines: Sequence[str], encoding: str = "utf-8") -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes("".join(f"{line}\n" for line in lines).encode(encoding))


def trec() -> None:
    lines = [f"DESC:manner How did word{n} develop in Quer\xe9taro\x85 and then leave ?" for n in range(SIZE)]
    lines += [f"HUM:ind Who was number {n} : the first ?" for n in range(SIZE)]
    write("train_5500.label", lines, "latin-1")
    write("TREC_10.label", ["NUM:dist How far is it from Denver to Aspen ?", "HUM:ind Who ?"][1:], "latin-1")


def ag_news() -> None:
    for name, count in (("train.csv", SIZE), ("test.csv", 4)):
        with Path(name).open("w", newline="", encoding="utf-8") as file:
            rows = [(n % 4 + 1, f"Title {n}, (AP)", f'He said "no", \\and left {n}\\') for n in range(count)]
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows(rows)


def subj() -> None:
    write("quote.tok.gt9.5000", [f"smart and alert , caf\xe9 {n} is a treat ." for n in range(SIZE)], "latin-1")
    write("plot.tok.gt9.5000", [f"the movie begins in the past {n} ." for n in range(SIZE)], "latin-1")


def mpqa() -> None:
    write("mpqa.pos", [f"a na\xefve hope {n}" for n in range(SIZE)], "latin-1")
    write("mpqa.neg", [f"complained {n}" for n in range(SIZE)], "latin-1")


def sick() -> None:
    header = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment"
    labels = ("NEUTRAL", "ENTAILMENT", "CONTRADICTION")
    for name in ("SICK_train.txt", "SICK_trial.txt", "SICK_test_annotated.txt"):
        rows = [f'{n}\tA "man" is {n}\tNobody is {n}\t{1 + n % 4}.{n % 10}\t{labels[n % 3]}' for n in range(12)]
        write(name, [header, *rows])


NLI = ("entailment", "neutral", "contradiction")


def snli() -> None:
    parses = "sentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse"
    header = f"gold_label\t{parses}\tsentence1\tsentence2\tcaptionID\tpairID\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5"
    for split in ("train", "dev", "test"):
        rows = [
            f'{gold}\t( A )\t( B )\t(ROOT A)\t(ROOT B)\tA "person {n}\tIt is {n}.\t{n}.jpg#4\t{n}.jpg#4r1n\tneutral\t\t\t\t'
            for n, gold in enumerate((*NLI, "-", *NLI))
        ]
        write(f"snli_1.0_{split}.txt", [header, *rows])


def nli_tsv() -> None:
    names = "index captionID pairID sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse"
    header = "\t".join([*names.split(), "sentence1", "sentence2", "label1", "gold_label"])
    for split in ("train", "dev", "test"):
        rows = [f'{n}\tc\tp\t( A )\t( B )\tA\tB\tA "person {n}\tIt is {n}.\t{gold}\t{gold}' for n, gold in enumerate(NLI)]
        write(f"{split}.tsv", [header, *rows])


def anli() -> None:
    for split in ("train", "dev", "test"):
        rows = [{"uid": f"u{n}", "context": f"Context {n}", "hypothesis": f"H {n}", "label": "enc"[n % 3]} for n in range(6)]
        write(f"R1/{split}.jsonl", [json.dumps({**row, "model_label": "c", "reason": "", "tag": "r1"}) for row in rows])


def columns(count: int, start: int = 0) -> dict[str, list]:
    return {"text": [f"text {n}" for n in range(start, start + count)], "label": [n % 2 for n in range(count)]}


def parquet() -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for split in ("train", "test"):
        Path(f"parquet/{split}").mkdir(parents=True)
        for shard in range(2):
            name = f"parquet/{split}/{split}-0000{shard}-of-00002.parquet"
            pq.write_table(pa.table(columns(SIZE, SIZE * shard)), name)


def saved() -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])})
    parts = {split: datasets.Dataset.from_dict(columns(2 * SIZE), features=features) for split in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk("saved", num_shards={"train": 2, "test": 1})


def arrow() -> None:
    pa, feather = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.feather")
    Path("arrow").mkdir()
    for shard in range(2):
        feather.write_feather(pa.table(columns(SIZE, SIZE * shard)), f"arrow/part-{shard}.arrow")


@pytest.mark.parametrize(
    ("beginning", "make", "expected", "count", "classes"),
    [
        ("TREC, coarse", trec, ("How did word0 develop in Quer\xe9taro\x85 and then leave ?", "DESC"), 72, ["DESC", "HUM"]),
        ("TREC, fine", trec, ("Who was number 1 : the first ?", "HUM:ind"), 72, ["DESC:manner", "HUM:ind"]),
        ("AG News", ag_news, ("Title 0, (AP)", 'He said "no", \\and left 0\\', "1"), 36, ["1", "2", "3", "4"]),
        ("SUBJ", subj, ("smart and alert , caf\xe9 1 is a treat .", "subjective"), 64, ["objective", "subjective"]),
        ("MPQA", mpqa, ("a na\xefve hope 3", "positive"), 64, ["negative", "positive"]),
        ("SICK, entailment", sick, ('A "man" is 0', "Nobody is 0", "NEUTRAL"), 12, ["CONTRADICTION", "ENTAILMENT", "NEUTRAL"]),
        ("SICK, relatedness", sick, ('A "man" is 1', "Nobody is 1", "2.1"), 12, None),
        ("SNLI as released", snli, ('A "person 1', "It is 1.", "neutral"), 6, sorted(NLI)),
        ("SNLI and ANLI", nli_tsv, ('A "person 1', "It is 1.", "neutral"), 3, sorted(NLI)),
        ("ANLI as released", anli, ("Context 2", "H 2", "contradiction"), 6, list(NLI)),
        ("Parquet", parquet, ("text 41", "1"), 72, ["0", "1"]),
        ("what `datasets`", saved, ("text 41", "1"), 72, ["0", "1"]),
        ("Arrow", arrow, ("text 41", "1"), 64, ["0", "1"]),
    ],
)
def test_the_command_of_the_page_reads_the_set(
    beginning: str,
    make: Callable[[], None],
    expected: tuple[str, ...],
    count: int,
    classes: list[str] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    backbone: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    make()
    examples = read([*command(beginning), f"backbone={backbone}"])
    rows = [row for split in ("train", "validation", "test") for row in rows_of(examples, split)]
    assert (expected[:-1], expected[-1]) in rows
    assert examples.task.labels == classes
    without_validation = not any(word.startswith("task.validation") for word in command(beginning))
    known = len(rows_of(examples, "train"))
    assert known == count if not without_validation else abs(known - count) <= 10


def test_every_row_of_the_page_is_tested() -> None:
    tested = test_the_command_of_the_page_reads_the_set.pytestmark[0].args[1]
    assert sorted(commands()) == sorted(name for name in commands() for case in tested if name.startswith(case[0]))


def test_a_line_that_does_not_match_the_pattern_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trec()
    with Path("train_5500.label").open("ab") as file:
        file.write(b"no label here\n")
    with pytest.raises(InputError, match="line 81: 'no label here' does not match") as caught:
        read(command("TREC, coarse"))
    assert caught.value.key == "task.pattern"


def test_further_groups_of_a_pattern_are_read_only_where_they_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group is a column: neither a part of the text nor a class, and a further column with `task.extra`."""
    monkeypatch.chdir(tmp_path)
    trec()
    words = [word for word in command("TREC, coarse") if not word.startswith("task.pattern")]
    words.append('task.pattern="(?P<label>\\w+):(?P<fine>\\S+) (?P<text>(?P<first>\\w+) .+)"')
    one = read(words)
    assert (("Who was number 1 : the first ?",), "HUM") in [row for split in one.texts for row in rows_of(one, split)]
    assert one.task.labels == ["DESC", "HUM"]
    assert not one.task.columns
    other = read([*words, "task.extra={fine: classes}"])
    assert other.task.column_classes == {"fine": ["ind", "manner"]}
    assert [rows_of(other, split) for split in other.texts] == [rows_of(one, split) for split in one.texts]


def test_utf8_by_its_name_is_read_as_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a byte-order mark, which would be part of the first text, and with line separators of Unicode."""
    monkeypatch.chdir(tmp_path)
    for name in ("pos", "neg"):
        lines = [f"{name} text {n}\u2028{name} more {n}" for n in range(SIZE)]
        write(f"{name}.txt", lines, "utf-8-sig" if name == "pos" else "utf-8")
    words = ["task=file", "task.train={pos: pos.txt, neg: neg.txt}"]
    expected = read(words)
    for encoding in ("utf-8", "UTF8", "utf-8-sig"):
        found = read([*words, f"task.encoding={encoding}"])
        assert [rows_of(found, split) for split in found.texts] == [rows_of(expected, split) for split in expected.texts]
    texts = {texts[0] for split in expected.texts for texts, _ in rows_of(expected, split)}
    assert {"pos text 0", "neg more 39"} <= texts


def test_unlabelled_text_in_another_encoding_is_refused_with_its_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backbone: Path
) -> None:
    """`task.encoding` is that of the labelled files."""
    monkeypatch.chdir(tmp_path)
    trec()
    write("more.txt", ["caf\xe9"], "latin-1")
    words = [*command("TREC, coarse"), "task.unlabelled=more.txt", "method=kd", "student=2l"]
    run = planned([*words, f"backbone={backbone}", f"teacher.minilm.backbone={backbone}"])
    with pytest.raises(InputError, match=r"line 1: not UTF-8 text; iconv -f latin-1 -t UTF-8 converts") as caught:
        examples_of(run)
    assert caught.value.key == "task.unlabelled"


def test_text_in_another_encoding_is_refused_with_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trec()
    with pytest.raises(InputError, match=r"line 1: not UTF-8 text; task\.encoding=latin-1 reads") as caught:
        read([word for word in command("TREC, coarse") if "encoding" not in word])
    assert caught.value.key == "task.train"


def test_options_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trec()
    words = command("TREC, coarse")
    for more, key, message in (
        ("task.format=csv", "task.pattern", "pattern is for lines"),
        ("task.delimiter=tab", "task.delimiter", "delimiter is for tables"),
        ("task.encoding=base64", "task.encoding", "is no encoding of text"),
        ("task.encoding=ascii", "task.encoding", "line 1: not ascii text"),
        ("task.pattern='(?P<label>x'", "task.pattern", "is no regular expression"),
        ("task.pattern='.*'", "task.pattern", "names no column"),
        ("task.pattern='(?P<label>.*)'", "task.text", "no column 'text'"),
    ):
        with pytest.raises(InputError, match=re.escape(message)) as caught:
            read([*(word for word in words if not word.startswith(more.partition("=")[0])), more])
        assert caught.value.key == key, more


def test_keys_that_are_not_given_are_not_in_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    subj()
    words = [*command("MPQA"), "teacher=[]", "method=finetune", "student=full"]
    mpqa()
    given = planned(words).digest_inputs
    assert (given["task"]["encoding"], given["data"]["encoding"]) == ("latin-1", "latin-1")
    assert not {"encoding", "pattern"} & {*planned([w for w in words if "encoding" not in w]).digest_inputs["task"]}
    assert not {"encoding", "pattern"} & {*planned([w for w in words if "encoding" not in w]).digest_inputs["data"]}


def test_runs_of_other_encodings_or_patterns_are_other_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes are other texts."""
    monkeypatch.chdir(tmp_path)
    trec()
    words = [word for word in command("TREC, coarse") if not word.startswith(("task.pattern", "task.encoding"))]
    given = [
        (encoding, f'task.pattern="{pattern}"')
        for encoding in ("task.encoding=latin-1", "task.encoding=cp1252")
        for pattern in (r"(?P<label>\w+):\S+ (?P<text>.+)", r"(?P<label>\S+) (?P<text>.+)")
    ]
    runs = [planned([*words, *more, "teacher=[]", "method=finetune", "student=full"]) for more in given]
    assert len({run.digest for run in runs}) == len({run.family for run in runs}) == 4
