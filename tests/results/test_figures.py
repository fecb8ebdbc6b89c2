"""The long table of figures: what is read, what is refused, and what several processes write."""

import csv
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from kd.errors import InputError
from kd.results.figures import COLUMNS, NEEDED_OF_RUNS, OF_PAPERS, OF_RUNS, Figure, add_figures, read_figures, write_figures

PRINTED = Figure(
    paper="pkd",
    table="dev",
    row="BERT6-PKD, best run",
    method="pkd",
    student="6l",
    teacher="bert_base",
    task="rte",
    split="validation",
    metric="accuracy",
    value=0.6823104693140795,
    std=None,
    n=1,
    seeds="",
    selection="best, dev accuracy",
    init="first layers",
    source='a file, "quoted", at a commit',
    confidence="printed",
    aggregate="best run",
)
RUN = {"digest": "0a39", "commit": "df571ee", "family": "f", "budget": "b", "scale": "local"}
OURS = replace(PRINTED, value=0.1 + 0.2, std=0.0, seeds="0", confidence="measured", aggregate="", **RUN)


def write(path: Path, **changes: str) -> Path:
    """A file of one line: the figure PRINTED with other texts; a text of `None` leaves the column out."""
    write_figures(path, [PRINTED])
    (texts,) = csv.DictReader(path.read_text(encoding="utf-8").splitlines())
    texts |= changes
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [name for name in texts if texts[name] != "None"], extrasaction="ignore")
        writer.writeheader()
        writer.writerow(texts)
    return path


def test_what_is_written_is_read_back_to_the_last_digit(tmp_path: Path) -> None:
    figures = [
        PRINTED,
        OURS,
        replace(PRINTED, value=None, std=0.01, n=None, aggregate="unknown", row="row, with\na line break"),
    ]
    write_figures(tmp_path / "ours.csv", figures)
    assert read_figures(tmp_path / "ours.csv") == figures


def test_columns_of_runs_stand_in_files_of_runs_alone(tmp_path: Path) -> None:
    write_figures(tmp_path / "paper.csv", [PRINTED])
    write_figures(tmp_path / "ours.csv", [OURS])
    headers = [(tmp_path / name).read_text().splitlines()[0] for name in ("paper.csv", "ours.csv")]
    shared = [name for name in COLUMNS if name not in (*OF_RUNS, *OF_PAPERS)]
    assert [header.split(",") for header in headers] == [[*shared, *OF_PAPERS], [*shared, *OF_RUNS]]


def test_columns_may_stand_in_any_order(tmp_path: Path) -> None:
    path = write(tmp_path / "paper.csv")
    rows = [line[::-1] for line in csv.reader(path.read_text().splitlines())]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    assert read_figures(path) == [PRINTED]


def test_a_byte_order_mark_and_blank_lines_are_no_content(tmp_path: Path) -> None:
    path = write(tmp_path / "paper.csv")
    path.write_text("\ufeff" + path.read_text().replace("\n", "\n\n"), encoding="utf-8")
    assert read_figures(path) == [PRINTED]


@pytest.mark.parametrize("column", [name for name in COLUMNS if name not in (*OF_RUNS, *OF_PAPERS)])
def test_a_missing_column_is_named(tmp_path: Path, column: str) -> None:
    path = write(tmp_path / "paper.csv", **{column: "None"})
    with pytest.raises(InputError, match=f"paper.csv, line 1: missing column {column}") as caught:
        read_figures(path)
    assert caught.value.key == column


@pytest.mark.parametrize(
    ("column", "text", "message"),
    [
        ("confidence", "guessed", "line 2: confidence 'guessed' is not one of printed, copied, memory, measured"),
        ("value", "68,2", "line 2: value '68,2' is not a number"),
        ("value", "nan", "line 2: value 'nan' is not a number"),
        ("value", "inf", "line 2: value 'inf' is not a number"),
        ("std", "±1", "line 2: std '±1' is not a number"),
        ("std", "-0.1", "line 2: std=-0.1 is negative"),
        ("n", "0", "line 2: n '0' is not a number of runs, 1 or more"),
        ("n", "2.0", "line 2: n '2.0' is not a number of runs"),
        ("task", " ", "line 2: task is empty"),
        ("metric", "", "line 2: metric is empty"),
        ("aggregate", "the best run", "line 2: aggregate 'the best run' is not one of best run, one run, mean of runs, median"),
        ("aggregate", "None", "line 2: aggregate '' is not one of best run, one run"),
        ("aggregate", "mean of runs", "line 2: aggregate 'mean of runs' contradicts n, which is 1"),
        ("aggregate", "unknown", "line 2: aggregate 'unknown' contradicts n, which is 1"),
        ("accuracy", "0.5", "line 1: unknown column 'accuracy'"),
    ],
)
def test_a_wrong_entry_is_refused_with_its_line(tmp_path: Path, column: str, text: str, message: str) -> None:
    path = write(tmp_path / "paper.csv", **{column: text})
    with pytest.raises(InputError) as caught:
        read_figures(path)
    assert f"{path}, {message}" in caught.value.message
    assert caught.value.key == column


@pytest.mark.parametrize(("n", "aggregate"), [("", "best run"), ("5", "one run"), ("5", "unknown")])
def test_a_kind_of_value_fits_its_number_of_runs(tmp_path: Path, n: str, aggregate: str) -> None:
    path = write(tmp_path / "paper.csv", n=n, aggregate=aggregate)
    with pytest.raises(InputError, match=f"line 2: aggregate '{aggregate}' contradicts n, which is {n or 'empty'}"):
        read_figures(path)


def test_a_run_of_ours_has_no_kind(tmp_path: Path) -> None:
    write_figures(tmp_path / "ours.csv", [replace(OURS, aggregate="best run")])
    with pytest.raises(InputError, match="of a paper's value, and this one is of a run"):
        read_figures(tmp_path / "ours.csv")


def test_the_line_of_an_error_is_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "paper.csv"
    write_figures(path, [replace(PRINTED, row="two\nlines"), PRINTED])
    path.write_text(path.read_text() + "pkd,dev\n")
    with pytest.raises(InputError, match="line 5: 2 fields in place of 18"):
        read_figures(path)


@pytest.mark.parametrize("content", [b"\xff\xfe", b'paper,"table', b""])
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "paper.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"paper\.csv"):
        read_figures(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*none\.csv"):
        read_figures(tmp_path / "none.csv")


def test_a_column_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "paper.csv")
    header, line = path.read_text().splitlines()
    path.write_text(f"{header},value\n{line},0.5\n")
    with pytest.raises(InputError, match="column value is there twice"):
        read_figures(path)


def test_added_figures_stand_behind_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "ours.csv"
    others = [replace(OURS, seeds=str(seed), digest=str(seed)) for seed in range(3)]
    add_figures(path, others[1:])
    add_figures(path, others[:1])
    assert read_figures(path) == [others[1], others[2], others[0]]


def test_a_value_of_the_same_run_replaces_the_old_one_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "ours.csv"
    again, other = replace(OURS, value=0.5, commit="abc"), replace(OURS, metric="f1")
    add_figures(path, [OURS, other])
    add_figures(path, [again])
    assert read_figures(path) == [again, other]


def test_figures_of_several_writers_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "ours.csv"
    figures = [replace(OURS, seeds=str(seed), digest=str(seed)) for seed in range(24)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda figure: add_figures(path, [figure]), figures))
    assert sorted(read_figures(path), key=lambda figure: int(figure.seeds)) == figures


def test_a_broken_file_is_not_overwritten(tmp_path: Path) -> None:
    path = write(tmp_path / "ours.csv", confidence="guessed")
    before = path.read_bytes()
    with pytest.raises(InputError, match="guessed"):
        add_figures(path, [OURS])
    assert path.read_bytes() == before


def test_a_folder_that_cannot_be_written_to_is_an_input_error_without_a_key_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to") as caught:
        add_figures(tmp_path / "file" / "ours.csv", [OURS])
    assert caught.value.key is None
    with pytest.raises(InputError, match="cannot write to"):
        write_figures(tmp_path / "none" / "ours.csv", [OURS])


@pytest.mark.parametrize("name", NEEDED_OF_RUNS)
def test_a_run_without_its_family_or_budget_is_refused(tmp_path: Path, name: str) -> None:
    write_figures(tmp_path / "ours.csv", [replace(OURS, **{name: ""})])
    with pytest.raises(InputError, match=f"line 2: {name} of a run is empty") as caught:
        read_figures(tmp_path / "ours.csv")
    assert caught.value.key == name
