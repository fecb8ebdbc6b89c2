"""Composing configurations, and the words for what is wrong in one."""

import re
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from omegaconf import OmegaConf

from kd.config.compose import compose, conf_folder, typed
from kd.config.schema import RunSpec, TeacherSpec
from kd.errors import InputError

GROUPS = ("method", "student", "teacher", "surgery", "task", "pretrain", "optimizer", "trainer", "logger", "paths", "sweep")
GROUPS = (*GROUPS, "experiment", "tuned", "pool", "cohort", "engine", "edit", "launcher")
FILES = [(group, file.stem) for group in GROUPS for file in sorted((conf_folder() / group).glob("*.yaml"))]


def chosen(group: str, name: str) -> str:
    return f"{group}=[{name}]" if group in ("teacher", "surgery", "edit") else f"{group}={name}"


def spec(*overrides: str) -> RunSpec:
    return typed(compose(list(overrides)))


def test_without_an_override_it_is_pkd_of_three_layers_on_rotten_tomatoes() -> None:
    default = spec()
    assert (default.method["name"], default.student.name, list(default.teacher), default.task.name) == (
        "pkd",
        "3l",
        ["minilm"],
        "rotten_tomatoes",
    )
    assert (default.seed, default.student.layers, default.trainer.accelerator, default.paths.runs) == (0, 3, "cpu", "runs")


@pytest.mark.parametrize(("group", "name"), [pair for pair in FILES if pair[0] != "tuned"])
def test_every_file_composes_and_has_its_types(group: str, name: str) -> None:
    made = spec(chosen(group, name))
    if group in ("method", "student", "task", "optimizer"):
        part = getattr(made, group)
        assert (part["name"] if isinstance(part, dict) else part.name) == name
    if group == "teacher":
        assert list(made.teacher) == [name]
    if group == "logger":
        assert list(made.logger.extra) == ([] if name == "csv" else [name])
    if group == "experiment":
        assert made.logger.group == name
    if group == "method":
        assert made.engine["_target_"].startswith("kd.engines.")


def test_every_folder_of_the_tree_is_checked_here() -> None:
    folders = {folder.name for folder in conf_folder().iterdir() if folder.is_dir()}
    assert folders <= {*GROUPS, "base", "hydra", "table", "tune"}
    assert len(FILES) > 25


def test_the_last_override_wins_and_the_command_line_beats_an_experiment() -> None:
    assert spec("seed=1", "seed=2").seed == 2
    demo = spec("experiment=demo")
    assert (demo.trainer.max_epochs, demo.optimizer.lr) == (2, 1e-4)
    changed = spec("experiment=demo", "trainer.max_epochs=7", "student=2l", "method=kd")
    assert (changed.trainer.max_epochs, changed.optimizer.lr, changed.student.name, changed.method["name"]) == (
        7,
        1e-4,
        "2l",
        "kd",
    )


def test_teachers_are_a_pool_in_the_order_they_are_given() -> None:
    assert list(spec("teacher=[minilm,hub]").teacher) == ["minilm", "hub"]
    assert list(spec("teacher=[hub,minilm]").teacher) == ["hub", "minilm"]
    assert spec("teacher=[]").teacher == {}


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ([], []),
        (["logger=csv"], []),
        (["logger=[]"], []),
        (["logger=wandb"], ["wandb"]),
        (["logger=[wandb,tensorboard]", "logger.extra.wandb.project=mine"], ["wandb", "tensorboard"]),
        (["logger=[csv,trackio]", "logger.group=table"], ["trackio"]),
    ],
)
def test_loggers_are_a_word_or_a_list(overrides: list[str], names: list[str]) -> None:
    found = spec(*overrides).logger
    assert list(found.extra) == names
    assert found.group == ("table" if "logger.group=table" in overrides else None)
    if "wandb" in names:
        assert found.extra["wandb"]["project"] == ("mine" if "tensorboard" in names else "kd")


def test_the_command_line_beats_the_group_of_an_experiment() -> None:
    assert spec("experiment=demo", "logger.group=mine").logger.group == "mine"


def test_the_tasks_keys_reach_its_source() -> None:
    made = spec("task=file", "task.train=a.csv", "task.text=[premise,hypothesis]", "task.label=gold", "task.quoted=true")
    assert made.task.source == {
        "_target_": "kd.data.sources.Files",
        "train": "a.csv",
        "validation": None,
        "test": None,
        "text": ["premise", "hypothesis"],
        "label": "gold",
        "quoted": True,
        "format": None,
        "delimiter": None,
        "pattern": None,
        "encoding": None,
        "columns": None,
    }
    assert spec("task=rte", "paths.glue=/glue").task.source["root"] == "/glue"


def test_the_commands_in_the_comments_of_the_tree_compose() -> None:
    words = {}
    for file in sorted(conf_folder().glob("*/*.yaml")):
        for command in re.findall(r"kd-train (.*)", file.read_text()):
            found = [word.strip("'") for word in command.split() if "=" in word and "<" not in word and "," not in word]
            words[f"{file.parent.name}/{file.name}"] = found
            assert compose(found), command
    assert words["sweep/seeds.yaml"]


@pytest.mark.parametrize(
    ("override", "key", "suggestion"),
    [
        ("method.temprature=3", "method.temprature", "method.temperature"),
        ("method.weights.hiden=3", "method.weights.hiden", "method.weights.hidden"),
        ("trainer.max_epoch=3", "trainer.max_epoch", "trainer.max_epochs"),
        ("+trainer.max_epoch=3", "trainer.max_epoch", None),
        ("task.limit_trian=3", "task.limit_trian", "task.limit_train"),
        ("student.droput=0", "student.droput", "student.dropout"),
        ("optimizer.lrr=1", "optimizer.lrr", "optimizer.lr"),
        ("optimiser.lr=1", "optimiser.lr", "optimizer.lr"),
        ("sed=1", "sed", "seed"),
        ("+sed=1", "sed", None),
        ("methd=kd", "methd", "method"),
        ("paths.run=x", "paths.run", "paths.runs"),
        ("+teacher.minilm.lables=[a]", "teacher.minilm.lables", None),
    ],
)
def test_a_misspelt_key_is_refused_with_the_right_one(override: str, key: str, suggestion: str | None) -> None:
    with pytest.raises(InputError) as caught:
        spec(override)
    assert caught.value.key == key
    if suggestion is not None:
        assert f"Did you mean '{suggestion}'?" in caught.value.message


@pytest.mark.parametrize("override", ["teacher.minilm.backbon=x", "teacher.hub.backbone=x"])
def test_a_key_that_no_chosen_teacher_has_is_quoted(override: str) -> None:
    with pytest.raises(InputError) as caught:
        spec(override)
    assert str(caught.value.key).startswith("teacher")
    assert override.partition("=")[0] in caught.value.message


@pytest.mark.parametrize("override", ["task.codes={a: b}", "logger.extra=x"])
def test_a_key_is_not_suggested_in_place_of_itself(override: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(InputError) as caught:
        spec(override)
    assert f"Did you mean '{key}'?" not in caught.value.message


@pytest.mark.parametrize(
    ("override", "key", "words"),
    [
        ("method=pdk", "method", ["no method 'pdk'", "finetune", "Did you mean 'pkd'?"]),
        ("student=5l", "student", ["no student '5l'", "3l", "bert_4l_312"]),
        ("task=mrcp", "task", ["no task 'mrcp'", "rotten_tomatoes", "Did you mean 'mrpc'?"]),
        ("teacher=nobody", "teacher", ["no teacher 'nobody'", "hub", "minilm"]),
        ("teacher=[minilm,nobody]", "teacher", ["nobody", "hub", "minilm"]),
        ("optimizer=adam", "optimizer", ["Did you mean 'adamw'?"]),
        ("trainer=tpu", "trainer", ["cpu", "ddp", "gpu"]),
        ("logger=mlflow", "logger", ["csv", "tensorboard", "trackio", "wandb"]),
        ("logger=[csv,wandbb]", "logger", ["there is no logger 'wandbb'", "Did you mean 'wandb'?"]),
        ("experiment=dmo", "experiment", ["Did you mean 'demo'?"]),
    ],
)
def test_an_unknown_name_lists_the_known_ones(override: str, key: str, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        spec(override)
    assert caught.value.key == key
    for word in words:
        assert word in caught.value.message


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("seed=abc", "abc"),
        ("seed=1.0", "1.0"),
        ("seed=", "''"),
        ("trainer.max_epochs=many", "many"),
        ("trainer.batch_size=3.5", "3.5"),
        ("trainer.clip=high", "high"),
        ("optimizer.lr=fast", "fast"),
        ("optimizer.lr=null", "None"),
        ("student.layers=[1]", "1"),
        ("student.width=wide", "wide"),
        ("task.text=sentence", ""),
        ("task.source=null", ""),
        ("task.name=???", "no value"),
        ("task.name=${nothing}", "nothing"),
        ("teacher.minilm.run=3", "int"),
        ("teacher.minilm=null", ""),
        ("preflight=maybe", "maybe"),
    ],
)
def test_a_value_of_the_wrong_type_names_its_key(override: str, value: str) -> None:
    with pytest.raises(InputError) as caught:
        spec(override)
    assert caught.value.key == override.partition("=")[0]
    assert value in caught.value.message


LISTS = sorted(
    f"{part}.{key}"
    for part, fields in {**get_type_hints(RunSpec), "teacher.hub": TeacherSpec}.items()
    if is_dataclass(fields)
    for key, kind in get_type_hints(fields).items()
    if any(get_origin(one) is list for one in (kind, *get_args(kind)))
)


@pytest.mark.parametrize("key", LISTS)
@pytest.mark.parametrize("value", ["text", "5", "'no, yes'", "true", "1.5", "'null'", "'[text'", "'a\"b]'", "'a=b'", "'a b'"])
def test_a_value_in_a_lists_place_is_refused_with_the_list_that_was_meant(key: str, value: str) -> None:
    teacher = ["task=file", "task.train=a.csv", "teacher=[hub]", "teacher.hub.backbone=x"]
    with pytest.raises(InputError, match=re.escape(f"{key}={value.strip(chr(39))} takes a list")) as caught:
        spec(*teacher, f"{key}={value}")
    assert caught.value.key == key
    override = re.search(rf"'({key}=\[.*\])'", caught.value.message)[1]
    part: Any = spec(*teacher, override)
    for step in key.split("."):
        part = part[step] if isinstance(part, dict) else getattr(part, step)
    assert part == (["no", "yes"] if "," in value else [value.strip("'")])


def test_what_takes_lists_is_known() -> None:
    assert LISTS == ["launcher.sbatch", "task.columns", "task.labels", "task.metrics", "task.text", "teacher.hub.labels"]
    for key in LISTS:
        with pytest.raises(InputError, match="takes a list") as caught:
            spec("task=file", "task.train=a.csv", "teacher=[hub]", "teacher.hub.backbone=x", f"{key}={{a: b}}")
        assert caught.value.key == key


@pytest.mark.parametrize("override", ["seed", "task.labels=[a,b"])
def test_an_override_that_cannot_be_parsed_is_named(override: str) -> None:
    with pytest.raises(InputError) as caught:
        spec(override)
    assert override.partition("=")[0] in caught.value.message


@pytest.mark.parametrize("override", ["method=[kd]", "~method", "method=null"])
def test_a_run_without_one_method_names_the_method(override: str) -> None:
    with pytest.raises(InputError) as caught:
        spec(override)
    assert caught.value.key == "method"


@pytest.mark.parametrize("override", ["seed=abc", "method.temprature=3", "student=5l", "optimizer.lr=null"])
def test_a_message_is_free_of_the_librarys_own_words(override: str) -> None:
    with pytest.raises(InputError) as caught:
        spec(override)
    assert not re.search(r"full_key|object_type|struct|Hydra", caught.value.message)


def test_composing_again_after_an_error_works() -> None:
    for _ in range(2):
        with pytest.raises(InputError):
            compose(["student=nothing"])
        assert compose(["student=2l"]).student.name == "2l"


def test_inside_a_hydra_job_its_configuration_folder_is_searched(tmp_path: Path) -> None:
    from hydra import initialize_config_dir

    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "mine.yaml").write_text("defaults: [/base/student@_here_]\nname: mine\nlayers: 5\n")
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        made = typed(compose([f"hydra.searchpath=[file://{tmp_path}]", "student=mine"]))
    assert (made.student.name, made.student.layers) == ("mine", 5)


def test_an_experiment_beats_the_keys_of_the_root(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 7\npreflight: false\n")
    made = spec(f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine")
    assert (made.seed, made.preflight) == (7, False)


def test_a_configuration_survives_being_written_and_read() -> None:
    config = compose(["method=kd"])
    assert typed(OmegaConf.create(OmegaConf.to_yaml(config))) == typed(config)
