"""Pools of teachers: the runs they need, what ranks them, and what is refused."""

import copy
import csv
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from conftest import tiny_model, tiny_tokenizer
from kd.build.check import check_run
from kd.build.data import build_examples
from kd.build.inputs import TrainedModels
from kd.build.models import build_models, plan_models
from kd.build.parts import examples_of
from kd.data.batch import Batch
from kd.data.examples import Examples
from kd.errors import InputError
from kd.methods.base import Progress, Step
from kd.methods.wrappers.ensemble import Ensemble
from kd.methods.wrappers.stochastic import Stochastic
from kd.runs.identity import backbone_of
from kd.runs.run import Run
from kd.training import execute
from whole_runs import Small, checked, made, over, planned, pool, roles

NAMES = ("minilm", "minilm_4l", "minilm_3l")
TWO = ("minilm", "minilm_3l")


@pytest.fixture(scope="module")
def plans(of_count: Callable[[int], Callable[..., Run]]) -> dict[str, Run]:
    """A run for each combination that a test looks at, planned once."""
    words = {
        "none": ("method=finetune", "pool=none"),
        "stochastic": (),
        "wkd": ("pool=wkd",),
        "best": ("pool=best",),
        "takd": ("pool=takd",),
        "teacher_rank": ("pool.distribution=teacher_rank",),
        "student_rank": ("pool.distribution=student_rank",),
    }
    return {name: of_count(3)(*more) for name, more in words.items()}


@pytest.fixture(scope="module")
def of_count(small: Small, backbone: Path) -> Callable[[int], Callable[..., Run]]:
    """For a number of teachers, how to plan a run of theirs."""
    return cache(lambda count: over(small("method=skdbert", *pool(backbone, *NAMES[:count]))))


def texts(examples: Examples, split: str) -> set[tuple[str, ...]]:
    return set(examples.texts[split])


# What a run needs first


def test_the_inputs_of_a_pool_are_its_teachers_and_what_ranks_them(plans: dict[str, Run]) -> None:
    teachers, pilots = [f"teacher {name}" for name in NAMES], [f"pilot {name}" for name in NAMES]
    for kind in ("none", "stochastic", "wkd"):
        assert roles(plans[kind]) == teachers, kind
    for kind in ("best", "teacher_rank", "student_rank"):
        assert roles(plans[kind]) == [*teachers, *pilots], kind
    assert roles(plans["takd"]) == ["teacher minilm_3l"]


def test_every_pool_has_the_same_teachers_and_is_a_run_of_its_own(plans: dict[str, Run]) -> None:
    assert len({run.digest for run in plans.values()}) == len(plans)
    for kind in ("stochastic", "wkd", "best", "teacher_rank", "student_rank"):
        for name in NAMES:
            teacher = plans[kind].inputs.teachers[name]
            assert teacher.digest == plans["none"].inputs.teachers[name].digest
            assert teacher.spec.task.holdout is None
            assert (teacher.spec.pool.name, teacher.spec.method["name"]) == ("none", "finetune")


def test_a_chain_is_taught_link_by_link(plans: dict[str, Run]) -> None:
    run = plans["takd"]
    third = run.inputs.teachers["minilm_3l"]
    assert (roles(third), list(third.spec.teacher)) == (["teacher minilm_4l"], ["minilm", "minilm_4l"])
    second = third.inputs.teachers["minilm_4l"]
    assert (roles(second), list(second.spec.teacher)) == (["teacher minilm"], ["minilm"])
    first = second.inputs.teachers["minilm"]
    assert not first.inputs
    assert first.digest == plans["none"].inputs.teachers["minilm"].digest
    for link, layers in ((third, 3), (second, 4)):
        assert link.spec.method == run.spec.method
        assert link.spec.student.layers == layers
        assert link.spec.student.backbone == first.spec.student.backbone
        assert (link.spec.optimizer.lr, link.spec.trainer.max_epochs) == (5e-3, 1)  # its own, not the student's
    assert first.spec.method["name"] == "finetune"


def test_pilots_by_teacher_are_the_teachers_on_a_part_of_train(plans: dict[str, Run]) -> None:
    for name in NAMES:
        inputs = plans["teacher_rank"].inputs
        pilot, teacher = inputs.pilots[name], inputs.teachers[name]
        assert pilot.spec.task.holdout == 0.1
        assert not pilot.inputs
        assert (pilot.spec.method, pilot.spec.student) == (teacher.spec.method, teacher.spec.student)
        assert (pilot.spec.optimizer, pilot.spec.trainer) == (teacher.spec.optimizer, teacher.spec.trainer)
        assert pilot.digest == plans["best"].inputs.pilots[name].digest, "one pilot serves every pool"


def test_pilots_by_student_distil_from_teachers_that_have_not_seen_the_rest(plans: dict[str, Run]) -> None:
    run = plans["student_rank"]
    for name in NAMES:
        pilot = run.inputs.pilots[name]
        student = replace(run.spec.student, backbone=backbone_of(run.spec)[0])  # the same one for every teacher
        assert (pilot.spec.method, pilot.spec.student, pilot.spec.seed) == (run.spec.method, student, run.spec.seed)
        assert (pilot.spec.task.holdout, pilot.spec.pool.name, list(pilot.spec.teacher)) == (0.1, "none", [name])
        assert roles(pilot) == [f"teacher {name}"]
        teacher = pilot.inputs.teachers[name]
        assert teacher.spec.task.holdout == 0.1
        assert teacher.digest == plans["teacher_rank"].inputs.pilots[name].digest


def test_seeds_of_a_pool_are_one_family(of_count: Callable[[int], Callable[..., Run]]) -> None:
    run = of_count(2)
    by_student = [run("pool.distribution=student_rank", f"seed={seed}") for seed in range(2)]
    assert by_student[0].digest != by_student[1].digest
    assert by_student[0].family == by_student[1].family
    assert run("pool.distribution=[0.3,0.7]").family != run().family
    by_teacher = [run("pool.distribution=teacher_rank", f"seed={seed}") for seed in range(2)]
    assert by_teacher[0].inputs.pilots["minilm"].digest == by_teacher[1].inputs.pilots["minilm"].digest
    assert by_teacher[0].family == by_teacher[1].family


# What ranks are made of


@pytest.fixture(scope="module")
def ranked(small: Small, backbone: Path) -> tuple[Run, list[str]]:
    """A run whose pilots are done, and what it was made of."""
    words = small("method=skdbert", *pool(backbone, *TWO), "pool.distribution=teacher_rank", "pool.holdout=0.25")
    return piloted(words), words


def piloted(words: list[str]) -> Run:
    run = planned(words)
    for role, needed in run.inputs:
        if role.kind == "pilot":
            execute.execute(needed)
    return run


@pytest.mark.parametrize("kind", ["teacher_rank", "student_rank"])
def test_a_pilots_texts_are_those_of_train_cut_in_two(plans: dict[str, Run], kind: str) -> None:
    run = plans[kind]
    whole = build_examples(run)
    for pilot in (run.inputs.pilots[name] for name in NAMES):
        part = build_examples(pilot)
        assert list(part.texts) == ["train", "validation"]
        assert texts(part, "train").isdisjoint(texts(part, "validation"))
        assert texts(part, "train") | texts(part, "validation") == texts(whole, "train")
        assert len(part.texts["train"]) + len(part.texts["validation"]) == len(whole.texts["train"])
        for split in ("validation", "test"):
            assert not (texts(whole, split) - texts(whole, "train")) & (texts(part, "train") | texts(part, "validation"))


def test_a_limit_on_train_holds_before_the_part_is_held_out(small: Small, backbone: Path) -> None:
    words = small("method=skdbert", *pool(backbone, *TWO), "pool.distribution=teacher_rank", "task.limit_train=40")
    run = planned(words)
    part = build_examples(run.inputs.pilots["minilm"])
    assert texts(part, "train") | texts(part, "validation") == texts(build_examples(run), "train")


def test_a_pilots_score_is_its_accuracy_on_the_part_held_out(ranked: tuple[Run, list[str]]) -> None:
    run, _ = ranked
    scores = []
    for name in TWO:
        pilot = run.inputs.pilots[name]
        held = build_examples(pilot)
        assert 10 < len(held.texts["validation"]) < 40
        model = AutoModelForSequenceClassification.from_pretrained(pilot.student).eval()
        tokenizer = AutoTokenizer.from_pretrained(pilot.student)
        with torch.no_grad():
            logits = model(
                **tokenizer([text for (text,) in held.texts["validation"]], padding=True, return_tensors="pt")
            ).logits
        found = (logits.argmax(-1) == torch.tensor(held.labels["validation"])).float().mean().item()
        assert pilot.result["metrics"]["validation"]["accuracy"] == pytest.approx(found)
        assert pilot.result["examples"] == {split: len(each) for split, each in held.texts.items()}
        scores.append(found)
    chances = TrainedModels(run).probabilities(build_examples(run).task)
    order = [1 / 3, 2 / 3] if scores[0] < scores[1] else [2 / 3, 1 / 3] if scores[0] > scores[1] else [0.5, 0.5]
    assert chances == pytest.approx(order)


def test_ranks_do_not_change_with_the_labels_of_validation_and_test(
    ranked: tuple[Run, list[str]], reviews: Path, tmp_path: Path
) -> None:
    run, words = ranked
    swapped = {"positive": "negative", "negative": "positive", "label": "label"}
    changed = list(words)
    for split in ("validation", "test"):
        with (reviews / f"{split}.csv").open() as file:
            found = [(text, swapped[label]) for text, label in csv.reader(file)]
        with (tmp_path / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(found)
        changed.append(f"task.{split}={tmp_path / split}.csv")
    other = piloted(changed)
    for name in TWO:
        one, two = (each.inputs.pilots[name].result for each in (run, other))
        assert one["metrics"] == two["metrics"]
    task = build_examples(run).task
    assert TrainedModels(run).probabilities(task) == TrainedModels(other).probabilities(task)


class Scored:
    """An input whose record holds one score."""

    def __init__(self, metric: str, score: float | None) -> None:
        self.metrics = {"validation": {metric: score}}


def chances(
    run: Run, metric: str, scores: list[float | None], distribution: object = "teacher_rank", sharpness: float = 1.0
) -> list[float]:
    task = copy.copy(build_examples(run).task)  # runs over the same text share the task itself
    task.monitor = metric
    pilots = {name: Scored(metric, score) for name, score in zip(NAMES, scores, strict=True)}
    spec = replace(run.spec, pool=replace(run.spec.pool, distribution=distribution, sharpness=sharpness))
    run = replace(run, spec=spec, inputs=replace(run.inputs, pilots=pilots))
    return TrainedModels(run).probabilities(task)


def test_chances_follow_the_monitored_metric_of_the_pilots(of_count: Callable[[int], Callable[..., Run]]) -> None:
    run = of_count(3)()
    assert chances(run, "accuracy", [0.7, 0.9, 0.8]) == pytest.approx([1 / 6, 3 / 6, 2 / 6])
    assert chances(run, "mse", [0.7, 0.9, 0.8]) == pytest.approx([3 / 6, 1 / 6, 2 / 6])
    assert chances(run, "accuracy", [0.7, 0.9, 0.8], "best") == [0, 1, 0]
    assert chances(run, "mse", [0.7, 0.9, 0.8], "best") == [1, 0, 0]
    assert chances(run, "matthews_corrcoef", [None, -0.2, 0.1]) == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert chances(run, "accuracy", [0.7, 0.9, 0.8], sharpness=2.0) == pytest.approx([1 / 14, 9 / 14, 4 / 14])
    assert chances(run, "accuracy", [0.7, 0.9, 0.8], [0.2, 0.3, 0.5]) == [0.2, 0.3, 0.5]


@pytest.mark.parametrize(("kind", "wrapper"), [("stochastic", Stochastic), ("wkd", Ensemble), ("best", Stochastic)])
def test_a_pool_wraps_the_method_that_was_chosen(plans: dict[str, Run], kind: str, wrapper: type) -> None:
    method = plan_models(plans[kind], build_examples(plans[kind]).task).shapes.methods["student"]
    assert type(method) is wrapper
    assert method.probabilities == pytest.approx([1 / 3] * 3)  # the pilots of `best` have not run yet
    assert method.each[0].loss == "ce"


# Whole runs


def test_a_chain_of_teachers_ends_in_a_student_of_the_last(small: Small, backbone: Path) -> None:
    run, result = made(small("method=skdbert", *pool(backbone, *NAMES), "pool=takd"))
    assert set(result["teacher_forwards"]) == {"minilm_3l"}
    assert result["teacher_forwards"]["minilm_3l"]["batches_used"] == 12
    third = run.inputs.teachers["minilm_3l"]
    assert set(third.result["teacher_forwards"]) == {"minilm_4l"}
    assert set(third.inputs.teachers["minilm_4l"].result["teacher_forwards"]) == {"minilm"}
    assert third.result["metrics_teacher"]["minilm_4l"] == {
        split: third.inputs.teachers["minilm_4l"].result["metrics"][split] for split in ("validation", "test")
    }
    assert result["inputs"] == {"teacher minilm_3l": third.name}


def test_ranks_by_students_reach_the_draws(small: Small, backbone: Path) -> None:
    words = small("method=skdbert", *pool(backbone, *TWO), "pool.distribution=student_rank", "pool.holdout=0.25")
    run, result = made([*words, "trainer.max_epochs=1"])
    task = build_examples(run).task
    method = build_models(run, task).methods["student"]
    scores = [run.inputs.pilots[name].result["metrics"]["validation"]["accuracy"] for name in TWO]
    wanted = [1 / 3, 2 / 3] if scores[0] < scores[1] else [2 / 3, 1 / 3] if scores[0] > scores[1] else [0.5, 0.5]
    assert method.probabilities == pytest.approx(wanted)
    assert sum(each["batches_used"] for each in result["teacher_forwards"].values()) == 6
    assert set(result["inputs"]) == {f"{role} {name}" for role in ("teacher", "pilot") for name in TWO}


# What cannot be

BAD = {
    "a pool of one": (1, ["pool=stochastic"], "teacher", r"needs two teachers or more.*has 1"),
    "a weighted ensemble of one": (1, ["pool=wkd"], "teacher", r"needs two teachers or more.*has 1"),
    "a chain of one": (1, ["pool=takd"], "teacher", r"needs two teachers or more.*has 1"),
    "several teachers for a method of one": (
        3,
        ["method=kd", "pool=none"],
        "teacher",
        r"takes 1 teacher.*has 3.*pool=stochastic",
    ),
    "no sum of 1": (3, ["pool.distribution=[0.5,0.3,0.1]"], "pool.distribution", r"adds up to 0\.9, not 1"),
    "too few probabilities": (3, ["pool.distribution=[0.5,0.5]"], "pool.distribution", "for each teacher of"),
    "too many probabilities": (2, ["pool.distribution=[0.5,0.3,0.2]"], "pool.distribution", "for each teacher of"),
    "a negative probability": (3, ["pool.distribution=[1.2,-0.4,0.2]"], "pool.distribution", "not negative"),
    "a word among probabilities": (2, ["pool.distribution=[0.5,half]"], "pool.distribution", "a probability"),
    "an unknown word": (3, ["pool.distribution=teacher_rnk"], "pool.distribution", "uniform.*Did you mean 'teacher_rank'"),
    "a negative sharpness": (3, ["pool.sharpness=-1"], "pool.sharpness", "at least 0"),
    "nothing held out": (3, ["pool.distribution=best", "pool.holdout=0"], "pool.holdout", "between 0 and 1"),
    "all held out": (3, ["pool.distribution=best", "pool.holdout=1"], "pool.holdout", "between 0 and 1"),
    "pilots of a pilot": (3, ["pool.distribution=best", "task.holdout=0.2"], "task.holdout", "pilots of its own"),
    "a cohort ranked by one student": (
        2,
        ["cohort=mutual", "pool.distribution=student_rank"],
        "pool.distribution",
        "teacher_rank",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_pool_that_cannot_work_names_the_key(case: str, of_count: Callable[[int], Callable[..., Run]]) -> None:
    count, words, key, message = BAD[case]
    with pytest.raises(InputError, match=f"(?s){message}") as caught:
        checked(of_count(count), *words)
    assert caught.value.key == key


@pytest.mark.parametrize("distribution", ["teacher_rank", "best"])
def test_a_ready_classifier_has_no_pilot_of_its_own(small: Small, backbone: Path, distribution: str) -> None:
    ready = ["teacher=[minilm,hub]", f"teacher.minilm.backbone={backbone}", f"teacher.hub.model={backbone}"]
    with pytest.raises(InputError, match=r"'hub' is a ready classifier") as caught:
        planned(small("method=skdbert", *ready, f"pool.distribution={distribution}"))
    assert caught.value.key == "pool.distribution"
    run = planned(small("method=skdbert", *ready, "pool.distribution=student_rank"))
    assert roles(run) == ["teacher minilm", "pilot minilm", "pilot hub"]
    assert not run.inputs.pilots["hub"].inputs


def test_probabilities_that_pass_the_check_can_be_drawn_from(of_count: Callable[[int], Callable[..., Run]]) -> None:
    words = "pool.distribution=[0.3333333,0.3333333,0.3333333]"
    run = of_count(3)(words)  # or refused here; at step one it is too late
    method = plan_models(run, build_examples(run).task).shapes.methods["student"]
    task = build_examples(run).task
    batch = Batch({}, ({},) * 3, torch.tensor([0]), torch.arange(1))
    assert method.drawn(Step(None, [None] * 3, batch, task, Progress())) in range(3)


def test_an_endless_sharpness_is_refused(of_count: Callable[[int], Callable[..., Run]]) -> None:
    with pytest.raises(InputError) as caught:
        of_count(3)("pool.sharpness=.inf")
    assert caught.value.key == "pool.sharpness"


def test_an_undefined_error_ranks_last(of_count: Callable[[int], Callable[..., Run]]) -> None:
    run = of_count(3)()
    assert chances(run, "mse", [None, 0.5, 0.2]) == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert chances(run, "mse", [None, 0.5, 0.2], "best") == [0, 0, 1]


def test_a_chain_for_a_cohort_is_of_single_links(of_count: Callable[[int], Callable[..., Run]]) -> None:
    run = of_count(3)("pool=takd", "cohort=mutual")
    link = run.inputs.teachers["minilm_3l"]
    check_run(link, examples_of(link))  # found only after the first link has been trained


@pytest.mark.parametrize("place", [0, 1])
def test_only_the_first_of_a_chain_is_a_ready_classifier(small: Small, backbone: Path, place: int) -> None:
    names = ["minilm", "hub"][:: 1 if place else -1]
    ready = [f"teacher=[{','.join(names)}]", f"teacher.minilm.backbone={backbone}", f"teacher.hub.model={backbone}"]
    words = small("method=skdbert", "pool=takd", *ready)
    if place == 0:
        assert roles(planned(words)) == ["teacher minilm"]
        return
    with pytest.raises(InputError, match="hub") as caught:  # nobody taught it; those before it would be left out in silence
        planned(words)
    assert caught.value.key == "teacher.hub.model"


def test_a_pilots_stage_is_of_the_same_task(of_count: Callable[[int], Callable[..., Run]]) -> None:
    stage = ["student.init=run", "student.run=['student.init=random']"]
    run = of_count(2)("pool.distribution=student_rank", *stage)
    for name in NAMES[:2]:
        found = run.inputs.pilots[name].inputs.stage
        assert found.spec.task.name == "file"
        assert found.spec.task.holdout == 0.1, "a stage that has seen the part held out leaks it"


def test_pilots_by_student_rank_teachers_by_one_student(small: Small, backbone: Path, tmp_path: Path) -> None:
    wider = tmp_path / "wider"
    tiny_model(seed=2, width=64).save_pretrained(wider)
    tiny_tokenizer().save_pretrained(wider)
    changed = [*pool(backbone, *TWO), f"teacher.minilm_3l.backbone={wider}"]
    run = planned(small("method=skdbert", *changed, "pool.distribution=student_rank"))
    shapes = [backbone_of(each.spec)[0] for each in (run, *(run.inputs.pilots[name] for name in TWO))]
    assert shapes == [str(backbone)] * 3


def test_what_is_wrong_with_a_student_is_not_put_down_to_a_teachers_run(of_count: Callable[[int], Callable[..., Run]]) -> None:
    with pytest.raises(InputError, match="/nowhere") as caught:
        of_count(2)("pool.distribution=student_rank", "student.init=checkpoint", "student.checkpoint=/nowhere")
    assert caught.value.key == "student.checkpoint"


def test_a_part_too_small_to_rank_by_names_its_key_before_anything_is_trained(
    of_count: Callable[[int], Callable[..., Run]],
) -> None:
    with pytest.raises(InputError) as caught:
        checked(of_count(2), "pool.distribution=best", "pool.holdout=0.0001")
    assert caught.value.key == "pool.holdout"


@pytest.mark.parametrize("words", [["pool.distribution=teacher_rank"], ["pool.distribution=[0.3,0.7]"]])
@pytest.mark.parametrize("kind", ["none", "takd"])
def test_a_pool_without_a_draw_has_no_distribution(
    of_count: Callable[[int], Callable[..., Run]], kind: str, words: list
) -> None:
    with pytest.raises(InputError) as caught:
        of_count(2)(f"pool={kind}", *words)
    assert caught.value.key == "pool.distribution"


def test_what_a_pool_does_not_use_is_not_in_the_digest(of_count: Callable[[int], Callable[..., Run]]) -> None:
    run = of_count(2)
    assert run("pool.sharpness=2", "pool.holdout=0.3").digest == run().digest
    assert run("pool.distribution=teacher_rank", "pool.sharpness=2").digest != run("pool.distribution=teacher_rank").digest
    assert run("pool=best").digest == run("pool.distribution=best").digest


def test_a_stage_of_a_teacher_is_refused(of_count: Callable[[int], Callable[..., Run]]) -> None:
    with pytest.raises(InputError) as caught:
        of_count(2)("+teacher.minilm.run.student.init=run", "+teacher.minilm.run.student.run=['seed=1']")
    assert caught.value.key == "teacher.minilm.run.student.init"


def test_nothing_is_trained_before_everything_that_is_needed_has_been_checked(
    small: Small, backbone: Path, tmp_path: Path
) -> None:
    words = ["method=kd", "surgery=[learned_vocabulary]", "surgery.learned_vocabulary.size=100000", f"paths.runs={tmp_path}"]
    run = planned(small(*words))
    with pytest.raises(InputError) as caught:
        execute.execute(run)
    assert caught.value.key == "surgery.learned_vocabulary.size"
    stage = planned(small("method=kd", "student.init=run", "student.run=['student=1l','student.init=first']", words[-1]))
    with pytest.raises(InputError) as caught:
        execute.execute(stage)
    assert caught.value.key == "student.run"
    assert not list(tmp_path.glob("*/result.json"))
