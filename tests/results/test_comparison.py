"""Comparisons: what is averaged, paired, joined with the paper, and said of it in each format."""

import csv
import html
import io
import itertools
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kd.errors import InputError
from kd.results.columns import gap, ours, paper, probability, seeds
from kd.results.comparison import Entry, budget_of, compare, details_of, entries_of, with_details, with_settings
from kd.results.figures import OF_RUNS, Figure, read_figures, write_figures
from kd.results.gathering import compare_table, with_expected
from kd.results.page import page
from kd.results.published import compared_with
from kd.results.renderings import FORMATS, as_rows, markdown, ranks, tex
from kd.results.statistics import ExampleDifference, SeedTest, Verdict, holm, sign_flip_p, t_p


def figure(method: str, value: float | None, seed: int = 0, **more: Any) -> Figure:
    task = more.get("task", "rte")
    values = {
        "paper": "toy",
        "table": "1",
        "row": method,
        "method": method,
        "student": "3l",
        "teacher": "minilm",
        "task": task,
        "split": "validation",
        "metric": "accuracy",
        "value": value,
        "std": None,
        "n": 1,
        "seeds": str(seed),
        "selection": "best, by validation accuracy",
        "init": "first layers",
        "source": "kd",
        "confidence": "measured",
        "digest": f"{method}{task}{seed}",
        "commit": "abc",
        "command": f"method={method} student=3l task={task} trainer.max_epochs=3 seed={seed}",
        "family": f"{method} {task}",
        "budget": f"{task}, 3 epochs",
        "scale": "local",
    }
    return Figure(**{**values, **more})


def printed(method: str, value: float, **more: Any) -> Figure:
    of_paper = {"seeds": "", **dict.fromkeys(OF_RUNS, ""), "confidence": "printed", "source": "Table 1"}
    of_paper |= {"aggregate": "one run"}
    return figure(method, value, **{**of_paper, **more})


BASE = [0.50, 0.52, 0.51, 0.49, 0.53, 0.50]
GAIN = [0.02, 0.01, 0.03, 0.02, 0.04, 0.01]
OURS = [
    *(figure("finetune", value, seed) for seed, value in enumerate(BASE)),
    *(figure("kd", value + gain, seed) for seed, (value, gain) in enumerate(zip(BASE, GAIN, strict=True))),
    *(figure("pkd", value, seed) for seed, value in enumerate(reversed(BASE))),
]


def by_method(figures: list[Figure], *of_paper: Figure) -> dict[str, Any]:
    return {entry.method: entry for entry in compare(entries_of(figures), of_paper).entries}


def test_values_of_seeds_are_one_entry_with_mean_and_spread() -> None:
    kd = by_method(OURS)["kd"]
    values = [value + gain for value, gain in zip(BASE, GAIN, strict=True)]
    assert kd.mean == pytest.approx(statistics.mean(values))
    assert kd.std == pytest.approx(statistics.stdev(values))
    assert ours(kd) == f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"
    assert seeds(kd) == "0, 1, 2, 3, 4, 5"


def test_a_method_is_paired_with_the_baseline_by_seed_and_corrected_over_methods() -> None:
    found = by_method(list(reversed(OURS)))  # the order of the rows is not that of the seeds
    differences = {"kd": GAIN, "pkd": [b - a for a, b in zip(BASE, reversed(BASE), strict=True)]}
    raw = {name: t_p(values) for name, values in differences.items()}  # six seeds decide one sign-flip test, not two
    adjusted = dict(zip(raw, holm(list(raw.values())), strict=True))
    for name, values in differences.items():
        assert found[name].difference.mean == pytest.approx(statistics.mean(values), abs=1e-12)
        assert found[name].difference.p == pytest.approx(raw[name], rel=1e-9)
        assert found[name].difference.adjusted == pytest.approx(adjusted[name], rel=1e-9)
        assert found[name].difference.test == SeedTest.T
        assert found[name].difference.sign_flip == sign_flip_p(values)
    assert found["kd"].difference.verdict == Verdict.BETTER
    assert found["finetune"].difference is None
    alone = by_method(OURS[:12])["kd"].difference
    assert (alone.verdict, alone.test, alone.p) == (Verdict.BETTER, SeedTest.SIGN_FLIP, 2 / 64)


@pytest.mark.parametrize(
    ("p", "text"),
    [(0.0496, "0.0496"), (0.0504, "0.0504"), (0.04997, "0.04997"), (0.05003, "0.05003"), (0.04, "0.040"), (0.0004, "< 0.001")],
)
def test_a_p_near_the_level_has_a_digit_more(p: float, text: str) -> None:
    assert probability(ExampleDifference(100, 10, 0.1, 0.0, 0.2, p, Verdict.BETTER)) == text
    assert probability(None) == ""


def test_another_method_may_be_the_baseline() -> None:
    compared = compare(entries_of(OURS), baseline="kd")
    found = {entry.method: entry for entry in compared.entries}
    assert found["kd"].difference is None
    assert found["finetune"].difference.mean == pytest.approx(-statistics.mean(GAIN), abs=1e-12)
    assert compared.baseline == "kd"
    rows = {line.split("|")[1].split()[0]: line for line in markdown(compared).splitlines() if line.startswith("| ")}
    assert "baseline" in rows["kd"]
    assert "worse" in rows["finetune"]
    assert "Baseline: kd with the same student" in markdown(compared)
    with pytest.raises(InputError, match="no run of 'rkd' to compare with; there are finetune, kd, pkd"):
        compare(entries_of(OURS), baseline="rkd")


@pytest.mark.parametrize(
    "change",
    [
        {"init": "random"},
        {"selection": "last, after 3 epoch(s)"},
        {"student": "2l"},
        {"split": "test"},
        {"metric": "f1"},
        {"task": "mrpc"},
        {"budget": "rte, 9 epochs"},
    ],
)
def test_a_baseline_of_another_start_budget_or_column_is_none(change: dict[str, Any]) -> None:
    figures = [figure("finetune", 0.5, **change), figure("kd", 0.6)]
    kd = by_method(figures)["kd"]
    assert kd.difference is None
    assert "no baseline of this budget" in markdown(compare(entries_of(figures)))


LONGER = [
    figure("dml", value + 2 * gain, seed, budget="two students")
    for seed, (value, gain) in enumerate(zip(BASE, GAIN, strict=True))
]


def test_any_budget_adds_verdicts_and_changes_none() -> None:
    entries = entries_of([*OURS, *LONGER])
    strict, more = (compare(entries, any_budget=choice) for choice in (False, True))
    alone, found = ({entry.method: entry for entry in compared.entries} for compared in (strict, more))
    assert alone["dml"].difference is None
    assert found["dml"].difference.mean == pytest.approx(2 * statistics.mean(GAIN), abs=1e-12)
    assert (found["dml"].differs_in, found["kd"].differs_in) == (("budget",), ())
    for method in ("kd", "pkd"):
        assert found[method].difference == alone[method].difference
        assert found[method].difference.comparisons == 2
    gains = {"kd": GAIN, "pkd": [b - a for a, b in zip(BASE, reversed(BASE), strict=True)], "dml": [2 * g for g in GAIN]}
    together = dict(zip(gains, holm([t_p(values) for values in gains.values()]), strict=True))
    assert found["dml"].difference.adjusted == pytest.approx(together["dml"], rel=1e-9)
    assert found["dml"].difference.comparisons == 3


def test_every_format_says_that_a_baseline_differs() -> None:
    more = compare(entries_of([*OURS, *LONGER]), any_budget=True)
    text = markdown(more)
    assert "| better; another budget |" in text
    assert "(of six pairs or more: 2, 3)" in text
    rows = {row["method"]: row for row in as_rows(more)}
    assert (rows["dml"]["baseline_differs_in"], rows["dml"]["comparisons"]) == ("budget", 3)
    assert (rows["kd"]["baseline_differs_in"], rows["kd"]["comparisons"]) == ("", 2)
    assert "better; another budget" in FORMATS["latex"](more)
    assert "better; another budget" in page(more)
    for compared in (more, more.only(lambda entry: entry.method == "kd")):
        assert "not one of the method alone" in markdown(compared)
    assert "not one of the method alone" not in markdown(compare(entries_of([*OURS, *LONGER])))


def test_any_budget_prefers_the_baseline_of_the_same_budget_and_chooses_none_of_several_others() -> None:
    same, other = figure("finetune", 0.5), figure("finetune", 0.7, budget="rte, 9 epochs", family="longer")
    for order in ([same, other], [other, same]):
        figures = [*order, figure("kd", 0.55), figure("dml", 0.6, budget="two students")]
        found = {entry.method: entry.difference for entry in compare(entries_of(figures), any_budget=True).entries}
        assert found["kd"].mean == pytest.approx(0.05)
        assert found["dml"] is None


def test_any_budget_keeps_students_and_columns_apart() -> None:
    for change in ({"student": "2l"}, {"split": "test"}, {"metric": "f1"}, {"task": "mrpc"}):
        entries = entries_of([figure("finetune", 0.5, **change), figure("kd", 0.6)])
        assert all(entry.difference is None for entry in compare(entries, any_budget=True).entries)


def test_no_budget_makes_up_for_another_selection_in_the_column_that_selects() -> None:
    """The best of two students by validation is too good there, and not on the test set."""
    other = {"init": "random", "selection": "last"}
    for split, differs_in in (("validation", None), ("test", ("selection", "initialisation"))):
        figures = [figure("finetune", 0.5, split=split, **other), figure("kd", 0.6, split=split)]
        (_, kd) = compare(entries_of(figures), any_budget=True).entries
        assert (None if kd.difference is None else kd.differs_in) == differs_in
    figures = [figure("finetune", 0.5, init="random"), figure("kd", 0.6)]
    assert compare(entries_of(figures), any_budget=True).entries[1].differs_in == ("initialisation",)


def test_other_budgets_are_no_part_of_the_sign_test_over_tasks() -> None:
    tasks = ("rte", "mrpc", "sst2", "qnli", "cola", "wnli")
    figures = [figure("finetune", 0.5, task=task) for task in tasks]
    figures += [figure("dml", 0.6, task=task, budget="two students") for task in tasks]
    figures += [figure("kd", 0.6, task=task) for task in tasks]
    compared = compare(entries_of(figures), any_budget=True)
    assert {method for method, *_ in compared.over_tasks} == {"kd"}
    assert all(entry.difference is not None for entry in compared.entries if entry.method == "dml")
    assert not compared.only(lambda entry: entry.method != "kd").over_tasks


def test_a_part_of_a_table_still_says_that_seeds_are_missing() -> None:
    entries = [replace(entry, expected=frozenset(range(7 if entry.method == "pkd" else 6))) for entry in entries_of(OURS)]
    compared = compare(entries)
    assert "Seeds are missing" in markdown(compared)
    assert "Seeds are missing" in markdown(compared.only(lambda entry: entry.method == "kd"))
    assert "Seeds are missing" not in markdown(compare(entries_of(OURS)))


def test_of_several_baselines_that_of_the_same_teacher_counts_or_none() -> None:
    """A student may start from its teacher's backbone, which the words about its start do not name."""
    scores = {("a", "finetune"): 0.5, ("a", "kd"): 0.55, ("b", "finetune"): 0.7, ("b", "kd"): 0.75}
    figures = [figure(method, value, teacher=teacher) for (teacher, method), value in scores.items()]
    for order in (figures, figures[::-1]):
        found = {entry.teacher: entry for entry in compare(entries_of(order)).entries if entry.method == "kd"}
        assert {teacher: round(entry.difference.mean, 3) for teacher, entry in found.items()} == {"a": 0.05, "b": 0.05}
    entries = compare(entries_of([*figures[::2], figure("kd", 0.6, teacher="c")])).entries
    assert [entry.difference for entry in entries if entry.method == "kd"] == [None]


def identity(**changes: Any) -> dict[str, Any]:
    """A record of a run with two teachers, as far as its budget reads it, with changes of its identity."""
    parts = {"method": {"name": "kd", "temperature": 4}, "seed": 0, "student": {"name": "3l", "init_from": "pretrained"}}
    parts |= {"task": {"limit_train": 9}, "trainer": {"max_epochs": 3}, "teachers": [{"name": "a"}, {"name": "b"}]}
    parts |= {"inputs": {"teacher a": "0a", "teacher b": "0b"}, "pool": {}}
    return {"teacher": ["a", "b"], "identity": {**parts, **changes}}


@pytest.mark.parametrize("change", [{"method": {"name": "finetune"}}, {"seed": 1}, {"inputs": {"teacher a": "1a"}}])
def test_runs_that_differ_in_method_seed_and_teacher_have_one_budget(change: dict[str, Any]) -> None:
    assert budget_of(identity(**change)) == budget_of(identity())


@pytest.mark.parametrize(
    "change",
    [
        *({"inputs": {role: "0"}} for role in ("stage", "surgery svd", "edit chain")),
        *({"student": {"name": "2l"}}, {"task": {}}, {"trainer": {"max_epochs": 4}}, {"surgery": [{"name": "sps"}]}),
    ],
)
def test_runs_that_differ_in_student_data_or_trainer_have_budgets_of_their_own(change: dict[str, Any]) -> None:
    assert budget_of(identity(**change)) != budget_of(identity())


def test_of_students_that_start_from_their_teacher_it_belongs_to_the_budget() -> None:
    student = {"name": "3l", "init_from": "teacher"}
    own = budget_of(identity(student=student))
    assert own != budget_of(identity(student=student, inputs={"teacher a": "1a", "teacher b": "0b"}))
    assert own == budget_of(identity(student=student, inputs={"teacher a": "0a", "teacher b": "1b"}))
    chain = {"student": student, "pool": {"chain": True}}
    assert budget_of(identity(**chain)) == budget_of(identity(**chain, inputs={"teacher a": "1a", "teacher b": "0b"}))
    assert budget_of(identity(**chain)) != budget_of(identity(**chain, inputs={"teacher a": "0a", "teacher b": "1b"}))


def test_keys_that_change_no_result_and_the_order_of_a_command_split_no_row() -> None:
    figures = [figure("kd", 0.5), figure("kd", 0.6, 1, command="trainer.num_workers=2 seed=1 student=3l method=kd")]
    (entry,) = entries_of(figures)
    assert entry.values == {0: 0.5, 1: 0.6}


TUNED = "best, by validation accuracy, best of 20 trials by validation accuracy"


def searched(seeds: str, **more: Any) -> list[Figure]:
    """Figures of kd and of its baseline; those of the seeds in capitals came of a search."""
    return [
        figure(method, value, seed, selection=TUNED if letter.isupper() else "best, by validation accuracy", **more)
        for seed, letter in enumerate(seeds)
        for method, value in (("finetune", 0.5), ("kd", 0.6))
    ]


def test_seeds_of_a_search_are_rows_of_their_own_and_paired_among_themselves() -> None:
    for order in (searched("Aab"), searched("aAb"), searched("abA")):
        found = compare(entries_of(order))
        rows = {(entry.method, entry.selection == TUNED): entry for entry in found.entries}
        assert {key: len(entry.values) for key, entry in rows.items()} == {
            (method, tuned): 1 if tuned else 2 for method in ("finetune", "kd") for tuned in (True, False)
        }
        assert len(found.rows) == 4  # also where a label is made of row and settings
        assert {entry.settings for entry in rows.values()} == {TUNED, "best, by validation accuracy"}
        assert [rows["kd", tuned].difference.n for tuned in (True, False)] == [1, 2]
        assert found.over_tasks == {}
    apart = [one for one in searched("Aa") if (one.method, one.selection == TUNED) in (("kd", True), ("finetune", False))]
    for entry in compare(entries_of(apart)).entries:
        assert entry.difference is None
    assert "no baseline of this budget and selection" in markdown(compare(entries_of(apart)))


def test_a_search_that_a_command_names_does_not_hide_the_selection() -> None:
    words = "method=kd student=3l task=rte seed=0"
    named = figure("kd", 0.6, 0, selection=TUNED, command=f"{words} tuned.study=mine")
    settings = [entry.settings for entry in entries_of([named, figure("kd", 0.5, 1, command=words)])]
    assert settings == [TUNED, "best, by validation accuracy"]
    assert [entry.settings for entry in entries_of([named])] == [""]


def test_a_seed_that_was_selected_otherwise_is_not_missing() -> None:
    labels = cells(method=["kd"], student=["3l"], task=["rte"], seed=["0", "1", "2"])
    figures = [one for one in searched("Aa", row="kd 3l") if one.method == "kd"]
    found = with_expected(entries_of(figures), labels)
    assert {tuple(entry.values): entry.missing for entry in found} == {(0,): [2], (1,): [2]}


def test_a_figure_of_the_paper_joins_on_method_student_task_split_and_metric() -> None:
    found = by_method(OURS, printed("kd", 0.55, teacher=""), printed("pkd", 0.6, split="test"))
    assert paper(found["kd"]) == "55.0"
    assert gap(found["kd"]) == f"{100 * (statistics.mean([b + g for b, g in zip(BASE, GAIN, strict=True)]) - 0.55):+.1f}"
    entries = compare(entries_of(OURS), [printed("pkd", 0.6, split="test")]).entries
    (test,) = [entry for entry in entries if entry.split == "test"]
    assert (test.values, paper(test), gap(test)) == ({}, "60.0", "")
    assert paper(next(entry for entry in entries if entry.method == "pkd" and entry.split == "validation")) == ""


def test_confidence_of_a_figure_is_told_and_two_figures_give_no_gap() -> None:
    found = by_method(OURS, printed("kd", 0.55, confidence="memory"), printed("kd", 0.56, row="other", confidence="copied"))
    assert paper(found["kd"]) == "55.0 (one run, from memory) / 56.0 (one run, copied)"
    assert gap(found["kd"]) == ""


def test_rows_with_one_label_and_other_settings_are_apart() -> None:
    figures = [figure("kd", 0.5), figure("kd", 0.6, 1, family="kd 2", command=f"{OURS[6].command} method.temperature=2")]
    assert [entry.settings for entry in entries_of(figures)] == ["", "method.temperature=2"]
    assert [entry.settings for entry in with_settings(entries_of(OURS))] == [""] * 3


def test_an_undefined_value_makes_the_mean_undefined() -> None:
    entry = by_method([figure("kd", None), figure("kd", 0.5, 1)])["kd"]
    assert (entry.mean, ours(entry)) == (None, "undefined")


def test_seeds_without_a_pair_are_told() -> None:
    text = markdown(compare(entries_of([*OURS[:6], *OURS[6:12], figure("kd", 0.5, 9)])))
    assert "seeds without a pair: 9" in text


def test_a_comparison_over_tasks_begins_with_five() -> None:
    tasks = ["a", "b", "c", "d", "e"]
    figures = [
        figure(m, v + (m == "kd") * 0.1, s, task=t) for t in tasks for m in ("finetune", "kd") for s, v in enumerate(BASE)
    ]
    summary = compare(entries_of(figures)).over_tasks["kd", "3l", "minilm", "validation"]
    assert (summary.better, summary.p) == (5, 0.0625)
    fewer = compare(entries_of([f for f in figures if f.task != "e"])).over_tasks["kd", "3l", "minilm", "validation"]
    assert (fewer.better, fewer.p) == (4, None)


def test_errors_are_better_if_they_are_smaller() -> None:
    figures = [figure(m, v, s, metric="mse") for m, sign in (("finetune", 0), ("kd", -0.1)) for s, v in enumerate(BASE)]
    figures = [f if f.method == "finetune" else figure("kd", f.value - 0.1, int(f.seeds), metric="mse") for f in figures]
    found = by_method(figures)
    assert found["kd"].difference.verdict == Verdict.BETTER
    assert ours(found["kd"]).startswith("0.40")
    assert ranks(list(found.values()))[found["kd"].key] == 1


def test_a_report_of_a_table_shows_the_figures_of_one_scale(tmp_path: Path) -> None:
    write_figures(tmp_path / "paper.csv", [printed("kd", 0.55)])
    published = figure("kd", 0.7, row="kd 3l", digest="p", family="p", scale="published")
    write_figures(tmp_path / "ours.csv", [figure("kd", 0.5, row="kd 3l"), published])
    labels = [{"method": "kd", "student": "3l", "task": "rte", "seed": str(seed)} for seed in (0, 1)]
    for scale, values in (("local", {0: 0.5}), ("published", {0: 0.7})):
        found = compare_table(tmp_path / "ours.csv", tmp_path / "paper.csv", scale, labels, title="", protocol="")
        assert [(entry.values, entry.missing, paper(entry)) for entry in found.entries] == [(values, [1], "55.0")]


def record(digest: str, seconds: float) -> dict[str, Any]:
    return {
        "digest": digest,
        "teacher": ["minilm"],
        "parameters": {"student": 17_000_000},
        "megabytes": {"student": 68.0},
        "latency_ms": {"student": 2.0, "minilm": 4.0},
        "seconds": {"train": seconds, "before": 5.0},
        "agreement": {"validation": {"minilm": 0.9}},
    }


def test_sizes_and_costs_come_from_records_at_hand() -> None:
    found = with_details(compare(entries_of(OURS)), {"kdrte0": record("kdrte0", 10.0), "kdrte1": record("kdrte1", 20.0)})
    kd = next(entry for entry in found.entries if entry.method == "kd")
    assert kd.details["train_seconds"] == 20.0
    assert kd.details["speed_up"] == 2.0
    assert "| 17,000,000 | 2.00 |" in markdown(found)
    assert "speed_up" not in details_of({**record("x", 1.0), "latency_ms": {"student": None}})


def test_every_format_has_the_same_numbers() -> None:
    comparison = compare(entries_of(OURS), [printed("kd", 0.55)], title="A & B")
    rows = as_rows(comparison)
    table = list(csv.DictReader(io.StringIO(FORMATS["csv"](comparison))))
    assert [row["mean"] for row in table] == [str(row["mean"]) for row in rows]
    content = json.loads(FORMATS["json"](comparison))
    assert [row["mean"] for row in content["rows"]] == [row["mean"] for row in rows]
    assert content["rows"][1]["values"]["3"] == BASE[3] + GAIN[3]
    for row, entry in zip(rows, comparison.entries, strict=True):
        assert row["mean"] == entry.mean
        assert ours(entry) in FORMATS["markdown"](comparison)
        assert ours(entry).replace("±", r"$\pm$") in FORMATS["latex"](comparison)


def test_every_format_names_the_test_that_gave_p() -> None:
    for figures, name, of in ((OURS, "paired t-test", "p_t"), (OURS[:12], "sign-flip test", "p_sign_flip")):
        comparison = compare(entries_of(figures))
        (kd,) = [entry for entry in comparison.entries if entry.method == "kd"]
        content = json.loads(FORMATS["json"](comparison))
        table = list(csv.DictReader(io.StringIO(FORMATS["csv"](comparison))))
        for rows in (content["rows"], table):
            (row,) = [row for row in rows if row["method"] == "kd"]
            assert row["test"] == name
            assert row["p"] == row[of]
            assert float(row["p_sign_flip"]) == kd.difference.sign_flip == 2 / 64
            assert float(row["p_t"]) == pytest.approx(t_p(GAIN), rel=1e-9)
            assert float(row["spread"]) == pytest.approx(statistics.stdev(GAIN), rel=1e-9)
            (base,) = [row for row in rows if row["method"] == "finetune"]
            assert (base["test"] or None, base["p_t"] or None) == (None, None)
        header, _, *lines = [line for line in FORMATS["markdown"](comparison).splitlines() if line.startswith("| ")]
        assert "| p | test | verdict |" in header
        p = f"{kd.difference.adjusted:.3f}"
        assert f"| {p} | {name} | better |" in next(line for line in lines if line.startswith("| kd "))
        assert f"<td>{name}</td>" in page(comparison)
        (comment,) = [line for line in FORMATS["latex"](comparison).splitlines() if line.startswith("% By seed, kd")]
        assert comment.startswith("% By seed, kd on rte: validation accuracy: +2.2 [+")
        assert comment.endswith(f"], {name}, p = {p}: better.")
        assert FORMATS["latex"](comparison).count("% By seed, ") == len(figures) // 6 - 1


def test_every_format_tells_what_each_test_and_the_interval_suppose() -> None:
    for render in (*FORMATS.values(), page):
        if render is not FORMATS["csv"]:  # a table alone, without sentences
            text = html.unescape(render(compare(entries_of(OURS))))
            assert "Student's 95 % interval, which supposes normal differences and is not corrected" in text
            assert "sign-flip test, which supposes that differences are symmetric about 0 if there is no true one" in text
            assert "paired t-test, which supposes that they are normal. Fewer than six pairs decide nothing." in text


def test_verdicts_of_a_table_that_lacks_seeds_are_not_called_final() -> None:
    figures = [figure(one.method, one.value, int(one.seeds), row=f"{one.method} 3l") for one in OURS]

    def labels(methods: list[str], count: int, task: str = "rte") -> list[dict[str, str]]:
        return cells(method=methods, student=["3l"], teacher=["minilm"], task=[task], seed=[str(seed) for seed in range(count)])

    def note_is_told(figures: list[Figure], labels: list[dict[str, str]]) -> bool:
        return "Seeds are missing: " in markdown(compare(with_expected(entries_of(figures), labels)))

    complete = labels(["finetune", "kd", "pkd"], 6)
    assert not note_is_told(figures, complete)
    assert not note_is_told(figures, [])
    assert note_is_told([one for one in figures if (one.method, one.seeds) != ("pkd", "5")], complete)
    assert note_is_told([one for one in figures if one.method != "pkd"], complete)
    assert note_is_told(figures, [*complete, *labels(["finetune"], 7)])
    # Nothing is compared in the column of what is missing.
    assert not note_is_told(figures, [*complete, *labels(["kd"], 1, "mrpc")])
    assert not note_is_told([one for one in figures if one.method != "finetune"], complete)


def test_equal_differences_have_no_p_in_any_format() -> None:
    tied = [figure("kd", value + 0.0025, seed) for seed, value in enumerate(BASE)]
    comparison = compare(entries_of([*OURS[:6], *tied, *OURS[12:]]))
    (row,) = [row for row in json.loads(FORMATS["json"](comparison))["rows"] if row["method"] == "kd"]
    assert (row["p"], row["p_corrected"], row["p_t"], row["p_sign_flip"]) == (None, None, None, 2 / 64)
    assert "| +0.2 |  | paired t-test | undecided: all differences are equal |" in FORMATS["markdown"](comparison)
    assert ": +0.2, paired t-test: undecided: all differences are equal." in FORMATS["latex"](comparison)
    assert "undecided: all differences are equal" in page(comparison)


def test_latex_has_the_best_bold_and_the_second_underlined() -> None:
    text = FORMATS["latex"](compare(entries_of(OURS), [printed("kd", 0.55)]))
    (kd,) = [line for line in text.splitlines() if line.startswith("kd ")]
    assert kd.startswith(r"kd & 3l & \textbf{53.0 $\pm$ ")
    assert kd.endswith(r"} (55.0) \\")
    assert text.count(r"\underline{") == 2  # two rows have one mean
    for word in (r"\toprule", r"\midrule", r"\bottomrule", r"\begin{tabular}{llr}"):
        assert word in text
    assert all(line.startswith("%") or "%" not in line.replace(r"\%", "") for line in text.splitlines())


def test_special_characters_of_latex_are_escaped() -> None:
    assert tex(r"a_b & 5 % \x {}") == r"a\_b \& 5 \% \textbackslash{}x \{\}"


def test_markdown_escapes_bars_and_tells_the_protocol() -> None:
    text = markdown(compare(entries_of([figure("kd", 0.5, row="a|b")]), protocol="Dev set."))
    assert r"a\|b" in text
    assert "- Dev set." in text
    assert "best, by validation accuracy" in text
    assert "first layers" in text


def of_runs(value: float, row: str, **more: Any) -> Figure:
    """A figure of pkd_dev's kinds: of an unknown number of runs, or of a stated number."""
    return printed("kd", value, row=row, **{"n": None, "aggregate": "unknown", **more})


MEAN = of_runs(0.51, "kd, mean of runs", aggregate="mean of runs", selection="best: epoch and run, by dev accuracy")
BEST = of_runs(0.56, "kd, best run", n=1, aggregate="best run", selection="best: epoch, by dev accuracy")
OTHERS = of_runs(0.52, "kd, by others", n=5, aggregate="median of runs", confidence="copied", selection="best: on dev")


@pytest.mark.parametrize("order", list(itertools.permutations([MEAN, BEST, OTHERS])))
def test_of_several_figures_our_mean_is_compared_with_the_paper_s_mean_of_runs(order: tuple[Figure, ...]) -> None:
    kd = by_method(OURS, *order)["kd"]
    assert gap(kd) == f"{100 * (kd.mean - 0.51):+.1f}"
    assert paper(kd).split(" / ") == [
        {MEAN: "51.0 (mean of runs)", BEST: "56.0 (best run)", OTHERS: "52.0 (median of 5 runs, copied)"}[one] for one in order
    ]
    comparison = compare(entries_of(OURS), order)
    (row,) = (row for row in as_rows(comparison) if row["method"] == "kd")
    assert (row["paper"], row["paper_row"]) == (0.51, "kd, mean of runs")
    assert row["minus_paper"] == pytest.approx(kd.mean - 0.51)
    assert row["paper_values"].count("; ") == 2
    assert r"} (51.0) \\" in FORMATS["latex"](comparison)
    assert "never with a best run" in markdown(comparison)


def test_a_best_run_alone_is_shown_and_not_compared_with_a_mean() -> None:
    found = by_method(OURS, BEST)["kd"]
    assert (paper(found), gap(found)) == ("56.0 (best run)", "")
    (row,) = (row for row in as_rows(compare(entries_of(OURS), [BEST])) if row["method"] == "kd")
    assert (row["paper"], row["minus_paper"]) == (0.56, None)
    one_run = of_runs(0.56, "kd", n=1, aggregate="one run", selection="best: evaluation of the run's second stage, on dev")
    assert gap(by_method(OURS, one_run)["kd"]) == gap(by_method(OURS, of_runs(0.56, "kd"))["kd"]) != ""
    assert gap(by_method(OURS, one_run, OTHERS)["kd"]) == gap(by_method(OURS, OTHERS)["kd"])


def test_the_figures_of_pkd_dev_have_one_mean_of_runs_each() -> None:
    """The authors' means are compared with ours, never their best runs, nor the means of others."""
    groups: dict[tuple[str, ...], list[Figure]] = {}
    for one in read_figures(Path(__file__).parents[2] / "experiments" / "pkd_dev" / "paper.csv"):
        groups.setdefault((one.method, one.student, one.task, one.split, one.metric), []).append(one)
    compared = [compared_with(figures) for figures in groups.values()]
    assert sum(one is not None for one in compared) >= 79
    for one, figures in zip(compared, groups.values(), strict=True):
        assert one is None or one.row.endswith("mean of runs") or len(figures) == 1
        assert (one is None) == all(figure.row.endswith("best run") for figure in figures)


def test_latex_tells_teachers_where_rows_differ_in_them() -> None:
    figures = [figure("kd", 0.5, teacher="small"), figure("kd", 0.6, teacher="large")]
    text = FORMATS["latex"](compare(entries_of(figures)))
    assert r"\begin{tabular}{lllr}" in text
    assert "kd & 3l & small & " in text
    assert "kd & 3l & large & " in text


def test_comparisons_over_tasks_are_by_teacher() -> None:
    tasks = ["a", "b", "c", "d", "e"]
    figures = [
        figure(method, 0.5 + gain, 0, task=task, teacher=teacher)
        for task in tasks
        for method, teacher, gain in (
            *(("finetune", teacher, 0.0) for teacher in ("small", "large")),
            *(("kd", "small", 0.1), ("kd", "large", -0.1)),
        )
    ]
    comparison = compare(entries_of(figures))
    found = {key: (summary.better, summary.worse) for key, summary in comparison.over_tasks.items()}
    assert found == {("kd", "3l", "small", "validation"): (5, 0), ("kd", "3l", "large", "validation"): (0, 5)}
    assert "- kd 3l of large on validation, over tasks: 0 better, 5 worse" in markdown(comparison)
    assert {one["teacher"] for one in json.loads(FORMATS["json"](comparison))["over_tasks"]} == {"small", "large"}


def cells(**axes: list[str]) -> list[dict[str, str]]:
    """Labels of the cells of a product; `lr` is the key of a grid."""
    names = ["optimizer.lr" if name == "lr" else name for name in axes]
    return [dict(zip(names, point, strict=True)) for point in itertools.product(*axes.values())]


GRID = cells(method=["kd"], student=["3l"], teacher=["minilm"], task=["rte"], lr=["1e-5", "5e-5"], seed=["0", "1"])


def missing(entries: list[Entry]) -> dict[tuple[str, ...], list[int]]:
    return {(entry.row, entry.teacher, *entry.column): entry.missing for entry in entries if entry.missing}


def test_a_point_of_a_grid_without_figures_is_missing() -> None:
    """Rows are labelled as those of `ours.csv`, which name the point."""
    figures = [figure("kd", 0.5, 0, row="kd 3l optimizer.lr=5e-5", metric=metric) for metric in ("accuracy", "f1")]
    found = with_expected(entries_of(figures), GRID)
    assert missing(found) == {
        (row, "minilm", "rte", "validation", metric): seeds
        for metric in ("accuracy", "f1")
        for row, seeds in (("kd 3l optimizer.lr=5e-5", [1]), ("kd 3l optimizer.lr=1e-5", [0, 1]))
    }
    assert [ours(entry) for entry in found if entry.row == "kd 3l optimizer.lr=1e-5"] == ["missing"] * 2
    known = [figure("kd", 0.5, seed, row=f"kd 3l optimizer.lr={lr}") for lr in ("1e-5", "5e-5") for seed in (0, 1)]
    assert missing(with_expected(entries_of(known), GRID)) == {}


def test_cells_without_any_figure_are_one_row_under_the_columns_of_their_task() -> None:
    (entry,) = with_expected([], GRID, [printed("kd", 0.5)])
    assert (entry.row, entry.settings, entry.missing, entry.column) == (
        *("kd 3l", "2 points of a grid", [0, 1]),
        ("rte", "validation", "accuracy"),
    )


def test_cells_that_differ_in_the_teacher_are_apart() -> None:
    axes = {"method": ["kd"], "student": ["3l"], "teacher": ["minilm", "large"], "task": ["rte"], "seed": ["0", "1"]}
    found = with_expected(entries_of([figure("kd", 0.5, 0, row="kd 3l")]), cells(**axes))
    where = ("rte", "validation", "accuracy")
    assert missing(found) == {("kd 3l", "minilm", *where): [1], ("kd 3l", "large", *where): [0, 1]}
    del axes["teacher"]  # a table that lists none has that of its runs
    assert missing(with_expected(entries_of([figure("kd", 0.5, 0, row="kd 3l")]), cells(**axes))) == {
        ("kd 3l", "minilm", *where): [1]
    }


def test_a_task_without_any_figure_says_so_in_every_format() -> None:
    labels = cells(method=["kd"], student=["3l"], task=["rte", "cola"], seed=["0"])
    comparison = compare(with_expected(entries_of([figure("kd", 0.5, 0, row="kd 3l")]), labels))
    text = FORMATS["markdown"](comparison)
    assert "## cola: no figure yet\n" in text
    assert "| kd 3l | 3l |  | missing |  | missing 0 |" in text
    assert " &  & rte validation accuracy & cola \\\\" in FORMATS["latex"](comparison)
    assert "<option></option>" not in page(comparison)
    json.loads(FORMATS["json"](comparison))


def test_a_row_has_the_label_that_its_table_gives_it() -> None:
    labels = [{**cell, "row": "KD (ours)"} for cell in GRID]
    found = with_expected(entries_of([figure("kd", 0.5, 0, row="KD (ours)")]), labels)
    assert missing(found) == {("KD (ours)", "minilm", "rte", "validation", "accuracy"): [1]}
