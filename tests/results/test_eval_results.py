"""Results for the hub: what the hub's library reads back, and which figures are none of the benchmark."""

import json
import random
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import EvalResultEntry, parse_eval_result_entries

from conftest import BAD, GOOD, sentence
from kd.config.compose import compose, conf_folder, typed
from kd.config.schema import TaskSpec
from kd.data.sources import REPOSITORY, Glue
from kd.results.eval_results import (
    CHANGES_EXAMPLES,
    COLUMNS,
    DEFINITIONS,
    DEVELOPMENT_SETS,
    LABELS,
    changed_keys,
    definition_of,
    eval_results,
    hub_splits,
    without_results,
)
from kd.results.export import _metadata
from kd.runs.identity import task_identity, with_class_names
from kd.training import execute
from whole_runs import made

OLD_RESULT = Path(__file__).parent.parent / "old_result.json"

RTE = 277
"""Number of examples of RTE's development set."""


def record(subset: str = "rte", task: dict[str, Any] | None = None, data: dict[str, Any] | None = None, **more: Any) -> Any:
    """The parts of a record that say what a student was evaluated on: those of the package's own task, with changes."""
    own, source = identity_of(subset)
    return {
        "identity": {"task": {**own, **(task or {})}, "data": {**source, **(data or {})}},
        "metrics": {"validation": {"accuracy": 0.66787}, "test": {}},
        "examples": {"train": 2490, "validation": RTE},
        "selection": {"kind": "best", "by": "chosen by validation accuracy over 3 epoch(s)"},
        "seed": 3,
        "digest": "abcdef012345",
        "versions": {"kd": "0.1.0"},
        "finished": "2025-06-01T10:00:00Z",
        **more,
    }


@cache
def identity_of(subset: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parts of the digest of a run that reads a task from the hub: those of the task, and of its data."""
    own, source = task_identity(typed(compose([f"task={subset}"])).task)
    return own, with_class_names(source)


def read(text: str) -> EvalResultEntry:
    (entry,) = parse_eval_result_entries(yaml.safe_load(text))
    return entry


def test_the_hub_s_library_reads_what_was_written() -> None:
    ((name, text),) = eval_results(record()).items()
    entry = read(text)
    assert name == ".eval_results/glue_rte_accuracy.yaml"
    assert (entry.dataset_id, entry.task_id, entry.value) == ("nyu-mll/glue", "rte", 66.79)
    assert (entry.date, entry.source_url) == ("2025-06-01T10:00:00Z", None)
    assert entry.notes == (
        "accuracy in percent; development set (validation), all 277 examples, not the test set; checkpoint: best, chosen by "
        "validation accuracy over 3 epoch(s); one run, seed 3; kd 0.1.0, run abcdef012345"
    )


def test_each_of_glue_s_metrics_has_a_file_and_says_what_it_is() -> None:
    figures = {"f1": 0.8, "accuracy": 0.7, "balanced_accuracy": 0.6}
    files = eval_results(record("mrpc", metrics={"validation": figures}, examples={"validation": 408}))
    values = {name: (read(text).value, str(read(text).notes).partition(";")[0]) for name, text in files.items()}
    assert values == {
        ".eval_results/glue_mrpc_accuracy.yaml": (70.0, "accuracy in percent"),
        ".eval_results/glue_mrpc_f1.yaml": (80.0, "F1 of the positive class in percent"),
    }
    assert eval_results(record(metrics={"validation": {"accuracy": None}})) == {}


def test_both_development_sets_of_mnli_have_their_subset() -> None:
    metrics = {"validation": {"accuracy": 0.7}, "validation_mismatched": {"accuracy": 0.71}}
    examples = {"validation": 9815, "validation_mismatched": 9832}
    files = eval_results(record("mnli", metrics=metrics, examples=examples))
    assert {(read(text).task_id, read(text).value) for text in files.values()} == {
        ("mnli_matched", 70.0),
        ("mnli_mismatched", 71.0),
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"task": {"limit_validation": 100}},
        {"task": {"limit_validation": 1000}},
        {"task": {"holdout": 0.1}},
        {"task": {"where": {"genre": ["fiction"]}}},
        {"task": {"where_evaluated": {"genre": ["fiction"]}}},
        {"examples": {"validation": RTE - 1}},
        {"task": {"labels": ["not_entailment", "entailment"]}},  # the positive class of F1 is another one
        {"task": {"labels": None}},
        {"task": {"codes": {"0": "entailment", "1": "entailment"}}},
        {"data": {"text": ["sentence1"]}},
        {"data": {"text": ["sentence2", "sentence1"]}},
        {"data": {"label": "idx"}},
        {"data": {"local_text": ["sentence1"]}},
        {"data": {"local_label": "index"}},
        {"data": {"local_columns": ["index", "sentence1", "sentence2", "label"]}},
        {"data": {"validation": "train"}},  # the name of the split on the hub, as `Glue.fingerprint` gives it
        {"data": {"_target_": "Files"}},
        {"data": {"hub": "mine/glue/rte"}},
        {"data": {"subset": "ax"}},
        {"metrics": {"test": {"accuracy": 0.9}}, "examples": {"test": RTE}},
    ],
    ids=str,
)
def test_a_figure_of_other_examples_is_none_of_the_benchmark(changes: dict[str, Any]) -> None:
    found = record(**changes)
    assert eval_results(found) == {}
    of_glue = {"hub": f"{REPOSITORY}/rte", "_target_": "Glue", "subset": "rte"}.items() <= found["identity"]["data"].items()
    keys = [f"task.{key}" for key in changes.get("task", {})] + [f"task.source.{key}" for key in changes.get("data", {})]
    told = without_results(found)
    if not of_glue or "validation" not in found["metrics"]:  # other data, of which nobody expects results for the hub
        assert told == ""
    else:
        assert told.startswith(f"it does not evaluate rte of {REPOSITORY} as it is: ")
        assert told.endswith(", ".join(keys) or "validation has 276 examples in place of 277")
    assert hub_splits(found) == ([] if "hub" in found["identity"]["data"] else list(found["metrics"]))


@pytest.mark.parametrize(
    "changes",
    [
        {"task": {"limit_train": 100, "max_length": 64, "edits": [{"_target_": "LabelNoise", "rate": 0.2}]}},
        {"task": {"name": "mine", "monitor": "loss", "extra": {"idx": "number"}, "limit_test": 5}},
        {"data": {"skip_broken": True, "folder": "elsewhere"}},
    ],
    ids=str,
)
def test_what_changes_training_alone_leaves_the_results(changes: dict[str, Any]) -> None:
    assert len(eval_results(record(**changes))) == 1
    assert without_results(record(**changes)) == ""
    assert hub_splits(record(**changes)) == ["validation"]


def test_each_key_of_a_task_and_of_its_source_is_known_to_change_the_evaluation_or_not() -> None:
    """A new key has to be sorted: results for the hub are of the development set as it is."""
    of_training = {"name", "metrics", "monitor", "max_length", "limit_train", "limit_test", "extra", "edits", "unlabelled"}
    keys_of_files = {"train", "validation", "test", "quoted", "format", "delimiter", "columns", "pattern", "encoding"}
    of_others = {"kind", "of", "tau"} | keys_of_files  # of tasks that the hub has no results of
    in_source = {"source", "text", "label"}  # the source's own, which may differ from the task's, count
    task = {field.name for field in fields(TaskSpec)}
    assert task == of_training | of_others | in_source | {*CHANGES_EXAMPLES, *LABELS}
    source = {field.name for field in fields(Glue)}
    assert source == {"subset", "folder", "root", "repository", "skip_broken", "extra", "validation", *COLUMNS}


def test_metrics_and_subsets_are_those_of_the_tasks() -> None:
    """Compare with the configurations: what a run of each GLUE task has."""
    found = set()
    for path in sorted((conf_folder() / "task").glob("*.yaml")):
        if "kd.data.sources.Glue" in path.read_text(encoding="utf-8"):
            task = typed(compose([f"task={path.stem}"])).task
            for split in task.source.get("validation") or ["validation"]:
                one = DEVELOPMENT_SETS[task.source["subset"], split]
                assert definition_of(path.stem)["source"]["subset"] == path.stem
                assert changed_keys(record(path.stem)) == []
                assert set(one.metrics) <= set(task.metrics) & set(DEFINITIONS)
                found.add((task.source["subset"], split))
    assert found == set(DEVELOPMENT_SETS)


def test_the_card_states_no_figure_of_the_hub_s_data_set_that_is_of_other_examples() -> None:
    result = {**json.loads(OLD_RESULT.read_text()), **record(metrics={"validation": {"accuracy": 0.7}})}
    result |= {"pipeline": "text-classification", "origin": {"backbone": "b", "data": REPOSITORY, "license": None}}
    metadata = _metadata(result).eval_results
    assert [(figure.dataset_type, figure.metric_value) for figure in metadata] == [(REPOSITORY, 0.7)]
    limited = {**result, **record(metrics=result["metrics"], task={"limit_validation": 100})}
    assert _metadata(limited).eval_results is None


def test_a_run_exports_its_results_and_again(backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files that a user has changed are no damage."""
    generator = random.Random(0)
    for split, count in (("train", 64), ("dev", RTE)):
        rows = [
            (sentence(generator, (BAD, GOOD)[n % 2]), "a film", ("not_entailment", "entailment")[n % 2]) for n in range(count)
        ]
        (tmp_path / "RTE").mkdir(exist_ok=True)
        lines = ["\t".join(row) + "\n" for row in [("sentence1", "sentence2", "label"), *rows]]
        (tmp_path / "RTE" / f"{split}.tsv").write_text("".join(lines))
    words = ["method=finetune", "teacher=[]", "student=2l", f"backbone={backbone}", "task=rte", "task.max_length=32"]
    place = [f"paths.runs={tmp_path / 'runs'}", f"paths.glue={tmp_path}", "trainer.progress=none", "trainer.max_epochs=1"]
    run, result = made([*words, *place, "trainer.batch_size=16"])
    path = run.student / ".eval_results" / "glue_rte_accuracy.yaml"
    entry = read(path.read_text())
    assert entry.value == round(100 * result["metrics"]["validation"]["accuracy"], 2)
    assert run.digest in str(entry.notes)
    assert str(tmp_path) not in path.read_text()
    assert not any(".eval_results" in name for name in result["files"])
    path.write_text("")
    assert run.is_done(thorough=True)
    (run.student / "model.safetensors").unlink()
    execute.execute(run)
    assert read(path.read_text()) == entry
    assert "no results for the hub" not in capsys.readouterr().out
    limited, _ = made([*words, *place, "trainer.batch_size=16", "task.limit_validation=100"])
    assert not (limited.student / ".eval_results").exists()
    told = "no results for the hub beside the student: it does not evaluate rte of nyu-mll/glue as it is: task.limit_validation"
    assert capsys.readouterr().out.count(f"{told}\n") == 1
