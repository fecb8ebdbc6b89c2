"""The start of a command: what it imports and composes, and when Python's garbage collector rests."""

import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import OmegaConf

from kd import train
from kd.config.compose import _composed as compositions
from kd.runs.run import Run
from kd.system.startup import without_collection

Small = Callable[..., list[str]]

NEVER = """
    pandas wandb optuna ray sklearn datasets pyarrow sentence_transformers tensorboard trackio textbrewer ot torchvision
    transformers.trainer tensorflow IPython networkx lightning.pytorch.demos
""".split()
"""Modules that a run without special options does without."""

LARGE = ("torch", "lightning", "transformers", "torchmetrics", "scipy", "matplotlib", "sympy", "kd.models", "kd.training.fit")
"""Modules that a command needs only if it trains."""


def imported(code: str) -> set[str]:
    """Names of the modules that are there after some code, in a new interpreter; with what the code prints."""
    code += "\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_a_command_that_trains_nothing_imports_no_large_library() -> None:
    for module in ("train", "report", "table", "tune", "clean", "bench"):
        assert imported(f"import kd.{module}") & {*NEVER, *LARGE} == set(), module


def test_a_run_imports_what_its_libraries_do_and_nothing_else() -> None:
    """Lightning, Transformers and torchmetrics import others themselves, such as SciPy and matplotlib."""
    code = "import sys, torch, lightning.pytorch, torchmetrics, hydra.compose, huggingface_hub, filelock\n"
    code += "from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification\n"
    code += "before = set(sys.modules)\nimport kd.launch.libraries\n"
    code += "print(*(f'new:{name}' for name in set(sys.modules) - before))"
    names = imported(code)
    assert names & set(NEVER) == set()
    new = {name.removeprefix("new:") for name in names if name.startswith("new:")}
    others = {name for name in new if name.partition(".")[0] != "kd"}
    assert {"kd.training.fit", "kd.build.check"} <= new
    assert len(others) < 30, sorted(others)


# -- composition -------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Run, int]]:
    """Run a command whose run is not executed; return its run, and the number of compositions of the command's own words."""
    composed: list[list[str]] = []
    runs: list[Run] = []
    load = ConfigLoaderImpl.load_configuration

    def counted(self: ConfigLoaderImpl, config_name: str, overrides: list[str], *rest: Any, **more: Any) -> Any:
        composed.append(overrides)
        return load(self, config_name, overrides, *rest, **more)

    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", counted)
    monkeypatch.setattr(train, "deliver", runs.append)

    def run(*words: str) -> tuple[Run, int]:
        composed.clear()
        compositions.cache_clear()  # a test before may have chosen the same groups
        monkeypatch.setattr(sys, "argv", ["kd-train", *small("method=kd", f"paths.runs={tmp_path}", *words)])
        train.main()
        return runs[-1], sum("student=2l" in words for words in composed)

    return run


def test_a_command_is_composed_once_and_as_hydra_composes_it(command: Callable[..., tuple[Run, int]]) -> None:
    alone, once = command("seed=3", "+teacher.minilm.run.student.layers=2")
    by_hydra, twice = command("seed=3", "+teacher.minilm.run.student.layers=2", "--run")
    assert (once, twice) == (1, 2)
    assert (alone.name, alone.spec, alone.digest_inputs) == (by_hydra.name, by_hydra.spec, by_hydra.digest_inputs)
    assert OmegaConf.to_yaml(alone.config) == OmegaConf.to_yaml(by_hydra.config)
    assert OmegaConf.is_struct(alone.config) == OmegaConf.is_struct(by_hydra.config)
    assert [run.name for _, run in alone.inputs] == [run.name for _, run in by_hydra.inputs]


@pytest.mark.parametrize("word", ["hydra.job.name=mine", "++hydra.verbose=false", "seed=${hydra:job.num}", "task=[file,rte]"])
def test_what_only_a_job_of_hydra_knows_is_left_to_it(
    command: Callable[..., tuple[Run, int]], monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(train, "run_by_hydra", lambda: asked.append(True) or 0)
    monkeypatch.setattr(train, "planned", lambda config, overrides: config)
    monkeypatch.setattr(train, "make", lambda run: None)
    monkeypatch.setattr(sys, "argv", ["kd-train", word])
    train.main()
    assert asked == ([True] if "hydra" in word else [])


# -- garbage collector -------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A process that has not imported Lightning."""
    monkeypatch.delitem(sys.modules, "lightning", raising=False)
    before = gc.get_freeze_count()
    yield monkeypatch
    if not before:
        gc.unfreeze()
    assert gc.isenabled()


@pytest.fixture
def freezes(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """An entry for each time that the collector freezes; counts of objects fall by themselves, as what is frozen is freed."""
    made: list[None] = []
    freeze = gc.freeze
    monkeypatch.setattr(gc, "freeze", lambda: made.append(freeze()))
    return made


def test_the_collector_rests_and_leaves_out_afterwards_what_was_there(fresh: pytest.MonkeyPatch, freezes: list[None]) -> None:
    before = gc.get_freeze_count()
    with without_collection():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert not freezes
    with without_collection(freeze=True):
        kept = [[] for _ in range(1000)]
        assert not gc.isenabled()
        with without_collection(freeze=True):
            assert not gc.isenabled()
        assert not gc.isenabled()
        assert not freezes
    assert gc.isenabled()
    assert len(freezes) == 1
    assert gc.get_freeze_count() >= before + len(kept)


def test_the_collector_works_again_after_an_error(fresh: pytest.MonkeyPatch, freezes: list[None]) -> None:
    with pytest.raises(ImportError), without_collection(freeze=True):
        raise ImportError
    assert gc.isenabled()
    assert not freezes


def test_the_collector_is_left_alone_if_it_is_off_or_libraries_are_there(
    fresh: pytest.MonkeyPatch, freezes: list[None]
) -> None:
    gc.disable()
    try:
        with without_collection(freeze=True):
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
    fresh.setitem(sys.modules, "lightning", gc)
    with without_collection(freeze=True):
        assert gc.isenabled()
    assert not freezes


def test_libraries_of_forks_are_out_of_collections() -> None:
    code = "import gc, kd.launch.libraries; print(gc.isenabled(), gc.get_freeze_count() > 200_000)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]
