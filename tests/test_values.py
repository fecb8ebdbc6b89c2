"""Every value of every key is checked before anything is trained: the right key, no traceback, no long wait."""

import contextlib
import dataclasses
import signal
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from key_values import Values, every_value, leaves, method_keys, names_key, typed_keys
from omegaconf import DictConfig, OmegaConf

from kd.bench import main as bench_command
from kd.build.check import check_arguments, check_run
from kd.build.parts import examples_of
from kd.config.compose import check_overrides, compose, typed
from kd.config.schema import DECAYS, RunSpec
from kd.data.sources import Example, split_by_hash
from kd.engines.optimizer import SCHEDULES
from kd.errors import InputError
from kd.report import main as report_command
from kd.runs.digest import digest_of
from kd.runs.error_keys import key_for
from kd.runs.plan import plan
from kd.runs.run import Role
from kd.train import main as train_command
from kd.training.execute import check_all
from whole_runs import Small, planned

TIME_LIMIT = 30
"""Seconds after which a value that is neither accepted nor refused is a fault. Ordinary ones take a tenth of a second."""


@pytest.fixture(autouse=True)
def watchdog() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise AssertionError("no answer in time")

    signal.signal(signal.SIGALRM, ring)
    yield
    signal.alarm(0)


@pytest.fixture(scope="module")
def values(backbone: Path, reviews: Path) -> dict[str, Values]:
    return every_value(str(backbone), str(reviews))


@pytest.fixture(scope="module")
def composed(small: Small) -> DictConfig:
    return compose(small())


def attempt(composed: DictConfig, key: str, value: Any, full: bool) -> None:
    """Lay a value over a configuration, and plan and check the run of it, models without weights."""
    signal.alarm(TIME_LIMIT)
    config = composed.copy()
    OmegaConf.set_struct(config, False)
    try:
        OmegaConf.update(config, key, value, merge=False, force_add=True)
        run = plan(config, [])
        check_arguments(run)
        if full:
            check_all(run, [])
        else:
            check_run(run, examples_of(run))
    finally:
        signal.alarm(0)


KEYS = sorted(every_value("", ""))
BOUNDED = settings(
    derandomize=True,
    deadline=None,  # the watchdog is the deadline
    database=None,
    suppress_health_check=list(HealthCheck),
)


def test_every_key_has_legal_and_illegal_values(composed: DictConfig) -> None:
    found = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(found, dict)
    inside = [key for key in leaves(found) if not key.startswith("task.source.")]  # follows from the task's own keys
    known = [*inside, *typed_keys()]
    lacking = {key for key in known if key not in KEYS and not any(each.startswith(f"{key}.") for each in KEYS)}
    assert lacking == set()


@pytest.mark.parametrize("key", KEYS)
def test_an_illegal_value_is_refused_and_its_key_is_named(key: str, composed: DictConfig, values: dict[str, Values]) -> None:
    @settings(BOUNDED, max_examples=3)
    @given(values[key].illegal)
    def run(value: Any) -> None:
        with pytest.raises(InputError) as caught:
            attempt(composed, key, value, full=False)
        assert names_key(caught.value.key, key, values[key].also), (value, caught.value.key, caught.value.message)
        assert len(caught.value.message) < 1000
        assert caught.value.message.isprintable()

    run()


@pytest.mark.parametrize("key", KEYS)
def test_a_legal_value_is_accepted(key: str, composed: DictConfig, values: dict[str, Values]) -> None:
    @settings(BOUNDED, max_examples=1)
    @given(values[key].legal)
    def run(value: Any) -> None:
        attempt(composed, key, value, full=False)

    run()


OF_METHODS = [(method, key) for method, keys in method_keys().items() for key in keys if key not in ("method.name",)]
WRONG: st.SearchStrategy[Any] = st.sampled_from(
    [
        -1,
        1e300,
        1e-320,
        "none of these",
        float("nan"),
        10**30,
        [None],
        {"a": 1},
        {"_target_": "os.system", "command": "true"},
        [],
    ]
)


@pytest.mark.parametrize(("method", "key"), OF_METHODS, ids=[f"{method}:{key}" for method, key in OF_METHODS])
def test_no_option_of_a_method_takes_just_anything(method: str, key: str, small: Small, backbone: Path) -> None:
    domains = [
        "task.extra={label: classes}",
        *(f"task.edits.prototype_weights.{word}" for word in ("domain=label", "max_length=32")),
    ]
    of_meta = [f"teacher.meta.backbone={backbone}", "+teacher.meta.run.method.domain=label", "method.before.domain=label"]
    more = {
        "mixed_vocab": ["teacher=[]"],
        "text_smoothing": ["method.aids.mlm.run.task.max_length=32"],
        "l2a": [f"task.edits.denoising_chain.{key}=32" for key in ("max_length", "run.task.max_length")],
        "meta_teacher": ["teacher=[]", "method.domain=label", *domains],
        "meta_kd": ["teacher=[meta]", *of_meta, *domains],
    }
    config = compose(small(f"method={method}", *more.get(method, [])))

    @settings(BOUNDED, max_examples=1)
    @given(WRONG)
    def run(value: Any) -> None:
        signal.alarm(TIME_LIMIT)
        changed = config.copy()
        OmegaConf.set_struct(changed, False)
        OmegaConf.update(changed, key, value, merge=False)
        with pytest.raises(InputError) as caught:
            check_all(plan(changed, []))
        found = str(caught.value.key)
        parents = [key.rpartition(".")[0], key.rpartition(".")[0].rpartition(".")[0]]
        assert names_key(found, key, ("method.tau_max", "teacher")) or found in parents, (value, found, caught.value.message)

    run()


# Groups, deletions, hints


@pytest.mark.parametrize(
    ("override", "key", "words"),
    [
        ("teacher=null", "teacher", "teacher=[] where there is none"),
        ("teacher={}", "teacher", "teacher=[] where there is none"),
        ("teacher=", "teacher", "minilm"),
        ("teacher=[minilm,minilm]", "teacher", "twice"),
        ("surgery=null", "surgery", "surgery=[]"),
        ("method=null", "method", "pkd"),
        ("method={}", "method", "pkd"),
        ("student=null", "student", "3l"),
        ("student=3", "student", "3l"),
        ("optimizer=true", "optimizer", "adamw"),
        ("method=[kd]", "method", "named by a word"),
        ("~teacher", "teacher", "teacher=[]"),
        ("~trainer.clip", "trainer.clip", "give it a value"),
        ("~student", "student", "give it a value"),
        ("~seed", "seed", "give it a value"),
        ("~method.name", "method.name", "part of a folder"),
        ("+seed=1", "seed", "leave the plus out"),
        ("lr=1e-4", "lr", "Did you mean 'optimizer.lr'"),
        ("weight_decay=0", "weight_decay", "Did you mean 'optimizer.weight_decay'"),
        ("max_epochs=2", "max_epochs", "Did you mean 'trainer.max_epochs'"),
        ("layers=2", "layers", "'student.layers'"),
        ("optimizer.factory.amsgrad=true", "optimizer.factory.amsgrad", "'+optimizer.factory.amsgrad=...'"),
        ("teacher.minilm.labels=[a,b]", "teacher.minilm.labels", "'+teacher.minilm.labels=...'"),
        ("teacher.minilm.run.trainer.clip=2", "teacher.minilm.run.trainer.clip", "'+teacher.minilm.run.trainer.clip=...'"),
        ("trainer.deterministic=2", "trainer.deterministic", "neither true nor false"),
        ("++pool.wrapper=[1]", "pool.wrapper", "takes a mapping"),
        ("++logger.extra=[1]", "logger.extra", "takes a mapping"),
        ("pool.chain='10'", "pool.chain", "neither true nor false"),
        ("task.label=true", "task.label", "truth value"),
        ("task.labels=[1.5,a]", "task.labels", "needs quotes"),
        (f"paths.runs={'x' * 300}", "paths.runs", "longer than a file system allows"),
        (f"student.checkpoint={'x' * 300}", "student.checkpoint", "longer than a file system allows"),
        (f"teacher.minilm.backbone={'x' * 300}", "teacher.minilm.backbone", "longer than a file system allows"),
        ("++surgery=x", "surgery", "without plus signs"),
        ("task.train=(a).csv", "task.train", "'task.train=\"(a).csv\"'"),
    ],
)
def test_an_override_that_cannot_work_says_what_would(override: str, key: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        plan(compose([override]))
    assert caught.value.key == key
    assert words in caught.value.message


def test_parts_that_may_be_given_as_mappings_still_can(small: Small) -> None:
    check_overrides(["trainer={max_epochs: 2}", "student=3l", "teacher=[a,b]", "~method.weights.mutual", "experiment=demo"])


# The runs that a run needs


@pytest.mark.parametrize(
    ("more", "key"),
    [
        (["teacher.minilm.run.optimizer.lr=-1"], "teacher.minilm.run.optimizer.lr"),
        (["+teacher.minilm.run.task.max_length=0"], "teacher.minilm.run.task.max_length"),
        (["+teacher.minilm.run.trainer.clip=0"], "teacher.minilm.run.trainer.clip"),
        (["+teacher.minilm.run.student=3"], "teacher.minilm.run.student"),
        (["+teacher.minilm.run.surgery=[1]"], "teacher.minilm.run"),
        (["+teacher.minilm.run.method.weights.task=-1"], "teacher.minilm.run.method.weights.task"),
        (["student.init=run", "student.run=['optimizer.lr=-1']"], "student.run"),
        (["student.init=run", "student.run=['method.weights.hidden=-1']"], "student.run"),
        (["student.init=run", "student.run=['no=1']"], "student.run"),
        (["student.init=run", "student.run=[1]"], "student.run"),
        (["student.init=run", "student.run={a: 1}"], "student.run"),
        (["student.init=run", "+pretrain.rate=-1", "student.run=['optimizer.lr=${pretrain.rate}']"], "pretrain.rate"),
        (["method=tinybert", "method.before.weights.hidden=-1"], "method.before.weights.hidden"),
        (["method=tinybert", "method.before.run.optimizer.lr=1e30"], "method.before.run.optimizer.lr"),
        (["method=tinybert", "method.before.run=3"], "method.before.run"),
    ],
)
def test_a_value_of_a_run_that_is_needed_is_named_as_the_command_has_it(more: list[str], key: str, small: Small) -> None:
    with pytest.raises(InputError) as caught:
        check_all(planned(small(*more)))
    assert caught.value.key == key


def test_a_value_that_pre_training_takes_over_is_named_as_the_command_has_it() -> None:
    config = compose(["pretrain=mixed_vocab", "student=bert_3l_192"])
    spec = typed(config)
    assert key_for(Role("stage"), spec, "optimizer.lr", config) == "pretrain.student_lr"
    assert key_for(Role("stage"), spec, "surgery.mixed_vocab.run.surgery.mixed_stage.size", config) == "pretrain.size"
    assert key_for(Role("stage"), spec, "trainer.batch_size", config) == "student.run.trainer.batch_size"
    assert key_for(Role("stage"), spec, "trainer.clip", config) == "student.run", "a default, which the stage may set"
    assert key_for(Role("stage"), spec, "trainer.precision", config) == "trainer.precision", "inherited"


def test_the_order_of_shares_changes_no_split() -> None:
    examples = [Example((f"text {number}",), None, "") for number in range(200)]
    one = split_by_hash(examples, {"train": 0.8, "validation": 0.2})
    assert one == split_by_hash(examples, {"validation": 0.2, "train": 0.8})
    for shares in ({"train": 0.8}, {"train": 2, "validation": -1}, {}):
        with pytest.raises(InputError):
            split_by_hash(examples, shares)


@pytest.mark.parametrize("command", [train_command, report_command, bench_command])
def test_every_command_prints_kds_version(
    command: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["kd", "--version"])
    with contextlib.suppress(SystemExit):
        command()
    printed = capsys.readouterr().out
    assert printed.startswith(f"kd {metadata.version('kd')} ")
    assert f"torch {metadata.version('torch')}" in " ".join(printed.split())


# What a node may name


class Marker:
    """Remembers that somebody has called it."""

    called = False

    def __init__(self, *_: object, **__: object) -> None:
        Marker.called = True


@pytest.mark.parametrize(
    "key",
    "method method.layers method.temperature method.weights.hidden engine engine.more optimizer.factory optimizer.factory.eps "
    "task.source task.source.label logger.extra surgery.x".split(),
)
def test_a_node_runs_nothing_but_what_its_place_is_for(key: str, small: Small, composed: DictConfig) -> None:
    config = composed.copy()
    OmegaConf.set_struct(config, False)
    OmegaConf.update(config, key, {"_target_": f"{__name__}.Marker", "name": "x", "weights": {}}, merge=False, force_add=True)
    with pytest.raises(InputError) as caught:
        check_all(plan(config, []))
    assert str(caught.value.key).startswith(key.removesuffix(".eps"))
    assert not Marker.called


# Digests


def test_a_digest_tells_values_apart_that_are_not_the_same() -> None:
    different: list[Any] = [
        1,
        True,
        "1",
        [1],
        {"a": 1},
        None,
        "null",
        "None",
        0,
        False,
        "",
        [],
        {},
        2**53,
        2**53 + 1,
        2**53 + 3,
    ]
    different += [10**300, 10**300 + 1, 1.5, "1.5", [1, [2]], [[1], 2], {"a": {"b": 1}}, {"a": 1, "b": 1}]
    assert len({digest_of({"x": value}) for value in different}) == len(different)


def test_a_digest_does_not_tell_apart_what_is_the_same() -> None:
    assert digest_of({"x": 10}) == digest_of({"x": 10.0})
    assert digest_of({"x": 0.0}) == digest_of({"x": -0.0}) == digest_of({"x": 0})
    assert digest_of({"x": (1, 2)}) == digest_of({"x": [1, 2]})
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})


def test_large_seeds_that_floats_hold_as_one_make_two_runs(composed: DictConfig) -> None:
    runs = []
    for seed in (2**60, 2**60 + 1):
        config = composed.copy()
        config.seed = seed
        runs.append(plan(config, []))
    assert runs[0].digest != runs[1].digest


def test_what_the_learning_rate_may_do_is_written_down_once() -> None:
    assert set(DECAYS) == set(SCHEDULES)
    assert {field.name for field in dataclasses.fields(RunSpec)} >= {"optimizer", "seed"}


def test_more_parameters_than_the_machine_can_hold_are_refused_before_any_is_made(
    composed: DictConfig, small: Callable[..., list[str]]
) -> None:
    config = composed.copy()
    for key, value in {"layers": 256, "width": 65_536, "init": "random"}.items():
        OmegaConf.update(config, f"student.{key}", value)
    config.method.layers = [[1, 1]]
    with pytest.raises(InputError, match="GB for weights and gradients") as caught:
        check_all(plan(config, []))
    assert caught.value.key == "student.width"
