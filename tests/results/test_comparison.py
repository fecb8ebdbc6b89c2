"""Comparisons: what is averaged, paired, joined with the paper, and said of it in each format."""

import csv
import io
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from kd.results.comparison import budget_of, compare, details_of, entries_of, with_details, with_settings
from kd.results.figures import OF_RUNS, Figure, write_figures
from kd.results.gathering import compare_table
from kd.results.renderings import FORMATS, as_rows, gap, markdown, ours, paper, ranks, seeds, tex
from kd.results.statistics import Verdict, holm, sign_flip_p


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
    raw = {name: sign_flip_p(values) for name, values in differences.items()}
    adjusted = dict(zip(raw, holm(list(raw.values())), strict=True))
    for name, values in differences.items():
        assert found[name].difference.mean == pytest.approx(statistics.mean(values), abs=1e-12)
        assert (found[name].difference.p, found[name].difference.adjusted) == (raw[name], adjusted[name])
    assert found["kd"].difference.verdict == Verdict.TOO_FEW_SEEDS  # six seeds decide one test, not two
    assert found["finetune"].difference is None
    assert by_method(OURS[:12])["kd"].difference.verdict == Verdict.BETTER


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
    parts["inputs"] = {"teacher a": "0a", "teacher b": "0b"}
    return {"teacher": ["a", "b"], "identity": {**parts, **changes}}


@pytest.mark.parametrize("change", [{"method": {"name": "finetune"}}, {"seed": 1}, {"inputs": {"teacher a": "1a"}}])
def test_runs_that_differ_in_method_seed_and_teacher_have_one_budget(change: dict[str, Any]) -> None:
    assert budget_of(identity(**change)) == budget_of(identity())


@pytest.mark.parametrize(
    "change", [{"student": {"name": "2l"}}, {"task": {}}, {"trainer": {"max_epochs": 4}}, {"surgery": [{"name": "sps"}]}]
)
def test_runs_that_differ_in_student_data_or_trainer_have_budgets_of_their_own(change: dict[str, Any]) -> None:
    assert budget_of(identity(**change)) != budget_of(identity())


def test_of_students_that_start_from_their_first_teacher_it_belongs_to_the_budget() -> None:
    student = {"name": "3l", "init_from": "teacher"}
    own = budget_of(identity(student=student))
    assert own != budget_of(identity(student=student, inputs={"teacher a": "1a", "teacher b": "0b"}))
    assert own == budget_of(identity(student=student, inputs={"teacher a": "0a", "teacher b": "1b"}))


def test_keys_that_change_no_result_and_the_order_of_a_command_split_no_row() -> None:
    figures = [figure("kd", 0.5), figure("kd", 0.6, 1, command="trainer.num_workers=2 seed=1 student=3l method=kd")]
    (entry,) = entries_of(figures)
    assert entry.values == {0: 0.5, 1: 0.6}


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
    assert paper(found["kd"]) == "55.0 (from memory) / 56.0 (copied)"
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
    summary = compare(entries_of(figures)).over_tasks["kd", "3l", "validation"]
    assert (summary.better, summary.p) == (5, 0.0625)
    fewer = compare(entries_of([f for f in figures if f.task != "e"])).over_tasks["kd", "3l", "validation"]
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
    write_figures(tmp_path / "ours.csv", [figure("kd", 0.5), figure("kd", 0.7, digest="p", family="p", scale="published")])
    labels = [{"method": "kd", "student": "3l", "task": "rte", "seed": str(seed)} for seed in (0, 1)]
    for scale, values in (("local", {0: 0.5}), ("published", {0: 0.7})):
        found = compare_table(tmp_path, scale, labels, [], title="", protocol="")
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
