"""Runs from Python: the runs of the command, errors as exceptions, and a process that is as it was."""

import gc
import logging
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hydra import compose, initialize_config_dir, version
from hydra.core.global_hydra import GlobalHydra

import kd
from kd.api.overrides import override_of
from kd.config.compose import parsed_override
from kd.training import fit as fitting
from whole_runs import planned

Small = Callable[..., list[str]]


@pytest.fixture(scope="module")
def run(small: Small) -> kd.RunResult:
    return kd.run(*small("method=pkd"), seed=1)


def test_a_run_is_the_one_of_the_command(run: kd.RunResult, small: Small) -> None:
    of_command = planned(small("method=pkd", "seed=1"))
    assert run.directory == of_command.directory
    assert run.record == of_command.result
    assert (run.digest, run.students) == (of_command.digest, ["student"])
    assert run.metrics["test"] == of_command.metrics["test"]
    teacher = run.directory.parent / run.record["inputs"]["teacher minilm"]
    assert (teacher / "result.json").is_file()


def test_a_finished_run_is_returned_without_training(run: kd.RunResult, small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "fit", lambda *_: pytest.fail("it was trained again"))
    assert kd.run(*small("method=pkd", "seed=1")).record == run.record


def test_the_student_gives_the_logits_of_the_run(run: kd.RunResult, reviews: Path) -> None:
    import csv

    with (reviews / "test.csv").open() as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    model, tokenizer = run.student(), run.tokenizer()
    assert not model.training
    with torch.no_grad():
        logits = model(**tokenizer(texts, return_tensors="pt", padding=True)).logits
    known = run.predictions().splits["test"].students["student"]
    torch.testing.assert_close(logits, torch.from_numpy(known), rtol=0, atol=1e-5)


def test_errors_are_exceptions_with_the_key(small: Small, tmp_path: Path) -> None:
    for words, keys, key in (
        (["method=no_such"], {}, "method"),
        ([], {"sede": 1}, "sede"),
        ([], {"seed": "a"}, "seed"),
        ([], {"seed": object()}, "seed"),
        (["seed=1,2"], {}, "seed"),
        ([], {"task.train": str(tmp_path / "none.csv")}, "task.train"),
        ([], {"optimizer.lr": -1.0}, "optimizer.lr"),
        ([], {"paths.runs": "${seed}"}, "paths.runs"),
    ):
        with pytest.raises(kd.InputError) as caught:
            kd.run(*small(*words), **keys)
        assert caught.value.key == key
    with pytest.raises(kd.InputError, match="is no override"):
        kd.run(1)  # type: ignore[arg-type]


def test_a_student_that_is_not_there_is_an_error(run: kd.RunResult, tmp_path: Path) -> None:
    for arguments, message in (({"name": "a"}, "no student 'a'"), ({"task": "rte"}, "no task 'rte'")):
        with pytest.raises(kd.InputError, match=message):
            run.student(**arguments)
    with pytest.raises(kd.InputError, match=r"trainer\.keep=figures") as caught:
        kd.RunResult(tmp_path, run.record).student()
    assert caught.value.key == "trainer.keep"


def state() -> dict[str, Any]:
    """Parts of a process that a run changes, but for modules and the allocator."""
    return {
        "environment": dict(os.environ),
        "filters": list(warnings.filters),
        "levels": [logging.getLogger(name).level for name in ("lightning.pytorch", "lightning.fabric")],
        "transformers": (transformers.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled()),
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "torch": (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark),
        "argv": list(sys.argv),
        "folder": Path.cwd(),
        "hydra": (GlobalHydra.instance().is_initialized(), version.getbase()),
        "frozen": gc.get_freeze_count() > 0,
    }


def test_the_process_is_as_it_was(small: Small) -> None:
    transformers.utils.logging.enable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    try:
        before = state()
        kd.run(*small("method=kd", "trainer.max_epochs=1", "trainer.deterministic=true"), seed=7)
        assert state() == before
        with pytest.raises(kd.InputError):
            kd.run(*small("method=no_such"))
        assert state() == before
    finally:
        transformers.utils.logging.disable_progress_bar()


def test_it_runs_inside_an_application_of_hydra(run: kd.RunResult, small: Small, tmp_path: Path) -> None:
    (tmp_path / "app.yaml").write_text("a: 3\n")
    with initialize_config_dir(str(tmp_path), version_base="1.2"):
        base = version.getbase()
        assert kd.run(*small("method=pkd"), seed=1).record == run.record
        assert (compose("app"), version.getbase()) == ({"a": 3}, base)


def test_a_rank_of_several_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(kd.InputError, match="torchrun") as caught:
        kd.run()
    assert caught.value.key == "trainer"


VALUES = [
    *(None, True, False, 0, -1, 1.5, 1e-5),
    *("word", "", "a,b", "a b ", "it's", "ends in \\", "\\'", '"quoted"', "true", "null", "1", "1e3", "yes", "[a]", "{a: b}"),
    *("a=b", "a:b", "Ä ö", "#x", "~/runs", "C:\\runs\\1", "(", "a(b", "x" * 1000, Path("my runs/of, today")),
    *([], ["a", "1", 1, None, [True]], ("a", "b"), {"a": 1, "b": {"c": "x,y"}}),
]


@pytest.mark.parametrize("value", VALUES)
def test_a_value_is_read_back_as_it_was(value: object) -> None:
    override = override_of("task.source", value)
    parsed = parsed_override(override)
    expected = str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
    assert plain(parsed.value()) == expected
    assert [type(plain(parsed.value()))] == [type(expected)]
    assert not parsed.is_sweep_override()


def plain(value: Any) -> Any:
    """A value of Hydra's parser without its class for text in quotes."""
    if isinstance(value, dict):
        return {plain(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return getattr(value, "text", value)


@pytest.mark.parametrize("key", ["seed", "teacher.my-own.run.seed", "task.train", "+teacher.minilm.run.a", "logger@b"])
def test_a_key_is_one_of_the_grammar(key: str) -> None:
    """Names of files, as those of teachers, may have hyphens."""
    assert parsed_override(override_of(key, 1)).key_or_group == key.strip("+").partition("@")[0]


def test_importing_kd_imports_nothing_large() -> None:
    code = "import sys, kd; dir(kd); print([name for name in ('torch', 'hydra', 'lightning', 'pandas') if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.strip() == "[]"
