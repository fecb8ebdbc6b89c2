"""The run that a method begins with: what it is laid over, what it shares, and how errors name it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from kd.config.compose import compose, conf_folder, typed
from kd.errors import InputError
from kd.runs.run import Run
from kd.training.execute import check_all
from whole_runs import made, planned, roles

Small = Callable[..., list[str]]
SHORT = ["method=annealing_kd", "method.before.run.trainer.max_epochs=2", "method.before.tau_max=2"]


@pytest.fixture
def staged(small: Small) -> Callable[..., Run]:
    """The run of a method in two stages, with further overrides."""
    return lambda *more: planned(small(*SHORT, *more))


def test_it_is_the_same_run_with_another_method(staged: Callable[..., Run]) -> None:
    run = staged("seed=4", "student.init=last", "optimizer.lr=2e-3")
    first = run.inputs.before
    assert (run.spec.method["name"], first.spec.method["name"]) == ("annealing_kd", "annealing_kd_logits")
    assert (first.spec.seed, first.spec.student.init, first.spec.optimizer.lr) == (4, "last", 2e-3)
    assert (first.spec.trainer.max_epochs, first.spec.method["epochs"]) == (2, 2)
    assert first.inputs.teachers["minilm"].digest == run.inputs.teachers["minilm"].digest
    assert run.spec.student.init == "run"
    assert run.init_run is first


def test_what_is_laid_over_it_changes_both_runs_and_the_rest_the_last_alone(staged: Callable[..., Run]) -> None:
    def digests(*more: str) -> tuple[str, str]:
        run = staged(*more)
        return run.inputs.before.digest, run.digest

    plain = digests()
    other = digests("method.before.run.optimizer.lr=1e-3")
    assert other[0] != plain[0]
    assert other[1] != plain[1]
    longer = digests("trainer.max_epochs=3")
    assert longer[0] == plain[0]
    assert longer[1] != plain[1]


def test_without_it_the_student_begins_as_usual(small: Small) -> None:
    run = planned(small("method=annealing_kd", "method.before=null"))
    assert roles(run) == ["teacher minilm"]
    assert run.spec.student.init == "first"


def test_a_stage_of_the_student_comes_before_it(staged: Callable[..., Run]) -> None:
    run = staged("student.init=run", "student.run=['method=finetune','student.init=first']")
    assert roles(run) == ["teacher minilm", "before"]
    stage = run.inputs.before.inputs.stage
    assert (stage.spec.method["name"], stage.spec.student.init) == ("finetune", "first")


def test_the_last_link_of_a_chain_has_it_too(small: Small, backbone: Path) -> None:
    names = [f"teacher.{name}.backbone={backbone}" for name in ("minilm", "minilm_3l")]
    run = planned(small(*SHORT, "teacher=[minilm,minilm_3l]", "pool=takd", *names))
    link = run.inputs.teachers["minilm_3l"]
    assert link.spec.method["name"] == "annealing_kd"
    assert link.inputs.before.spec.method["name"] == "annealing_kd_logits"
    assert run.inputs.before.inputs.teachers["minilm_3l"].digest == link.digest
    check_all(run)


def test_both_runs_draw_teachers_by_one_ranking(small: Small, backbone: Path) -> None:
    names = [f"teacher.{name}.backbone={backbone}" for name in ("minilm", "minilm_3l")]
    pool = ["teacher=[minilm,minilm_3l]", "pool=stochastic", "pool.distribution=student_rank"]
    run = planned(small(*SHORT, *pool, *names))
    pilots = run.inputs.pilots
    assert len(pilots) == 2
    assert all(pilot.spec.method["name"] == "annealing_kd" for pilot in pilots.values())
    assert all(run.inputs.before.inputs.pilots[name].digest == pilot.digest for name, pilot in pilots.items())


def test_seeds_of_both_runs_are_one_family(staged: Callable[..., Run]) -> None:
    runs = [staged(f"seed={seed}") for seed in range(2)]
    assert runs[0].family == runs[1].family
    assert runs[0].inputs.before.digest != runs[1].inputs.before.digest


@pytest.mark.parametrize(
    ("more", "key"),
    [
        (["method.before.run.trainer.max_epochs=0"], "method.before.run.trainer.max_epochs"),
        (["+method.before.run.optimizer.speed=1"], "method.before.run.optimizer.speed"),
        (["method.before.tau_max=3"], "method.before.tau_max"),
        (["method.before.epochs=null"], "method.before.epochs"),
        (["method.before=5"], "method.before"),
        (["~method.before.name"], "method.before"),
        (["+method.before.run.student.layers=1"], "method.before.run.student"),
        (["method.before.weights.logits=much"], "method.before.weights.logits"),
        (["method.before.run.optimizer.lr=-1"], "method.before.run.optimizer.lr"),
        (["cohort=mutual"], "cohort"),
        (["trainer.batch_size=0"], "trainer.batch_size"),
    ],
)
def test_errors_name_the_key_of_the_command(small: Small, more: list[str], key: str) -> None:
    with pytest.raises(InputError) as error:
        check_all(planned(small(*SHORT, *more)))
    assert error.value.key == key


@pytest.mark.parametrize(
    "surgery", ["cut_vocabulary", "learned_vocabulary", "factorized", "cut_vocabulary,sps", "sps,factorized"]
)
def test_a_student_after_a_surgery_goes_through_both(small: Small, surgery: str) -> None:
    size = {"learned_vocabulary": ["surgery.learned_vocabulary.size=80"], "factorized": ["surgery.factorized.rank=8"]}
    sizes = [option for name in surgery.split(",") for option in size.get(name, [])]
    run, result = made(small(*SHORT, f"surgery=[{surgery}]", *sizes, "trainer.max_epochs=1"))
    first = run.inputs.before.result
    assert first is not None
    assert result["parameters"] == first["parameters"]


@pytest.mark.parametrize("given", ["student.run='seed=1'", "student.run={overrides: 'seed=1'}"])
def test_one_override_in_place_of_a_list_is_refused_with_the_list(given: str) -> None:
    words = ["student.init=run", given]
    with pytest.raises(InputError, match=r'=\["seed=1"\]') as caught:
        planned(words)
    assert str(caught.value.key).startswith("student.run")


# A stage that lists what it inherits

LISTED = "student.run={choose: {method: kd, student: 2l}, inherits: [%s], trainer: {max_epochs: 7}}"


def listed(small: Small, inherits: str, *more: str) -> Run:
    """The stage of a run that lists what it inherits."""
    run = planned(small("method=pkd", "student.init=run", LISTED % inherits, *more))
    assert run.inputs.stage is not None
    return run.inputs.stage


def test_a_stage_has_what_it_inherits_what_it_sets_and_else_the_defaults(small: Small) -> None:
    stage = listed(
        small, "task, teacher, seed", "seed=5", "optimizer.lr=1e-2", "trainer.clip=0.5", "trainer.precision=bf16-mixed"
    )
    plain = typed(compose(["method=kd", "student=2l"]))
    assert (stage.spec.method["name"], stage.spec.student.name, stage.spec.seed) == ("kd", "2l", 5)
    assert (stage.spec.optimizer, stage.spec.trainer.clip) == (plain.optimizer, plain.trainer.clip), "not inherited"
    assert stage.spec.trainer.max_epochs == 7
    assert stage.spec.trainer.precision == "bf16-mixed", "every needed run inherits what the machine decides"


def test_what_a_stage_does_not_inherit_leaves_it_as_it_is(small: Small) -> None:
    digests = {
        listed(small, "task, teacher", *more).digest
        for more in (
            [],
            ["seed=3"],
            ["optimizer.lr=1e-2"],
            ["method.temperature=2"],
            ["trainer.max_epochs=9"],
            ["student.dropout=0"],
        )
    }
    assert len(digests) == 1
    assert listed(small, "task, teacher, seed", "seed=3").digest not in digests


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ("{choose: {method: no}}", "student.run"),
        ("{choose: 3}", "student.run.choose"),
        ("{choose: {method: kd}, inherits: 3}", "student.run.inherits"),
        ("{choose: {method: kd}, trainer: {max_epoch: 3}}", "student.run.trainer.max_epoch"),
        ("{choose: {method: kd}, trainer: {max_epochs: 0}}", "student.run.trainer.max_epochs"),
        ("{choose: {method: kd}, optimizer: {lr: ${pretrain.rate}}}", "pretrain.rate"),
    ],
)
def test_an_error_in_a_stage_that_lists_names_the_key_that_is_to_be_changed(small: Small, given: str, key: str) -> None:
    with pytest.raises(InputError) as caught:
        planned(small("student.init=run", "+pretrain.rate=-1", f"student.run={given}"))
    assert caught.value.key == key


def test_no_configuration_file_holds_overrides_for_another_run() -> None:
    for path in conf_folder().rglob("*.yaml"):
        assert path.parent.name == "table" or "overrides:" not in path.read_text(), path


# A pool of the first run


def test_the_first_run_of_a_method_may_have_a_pool_of_its_own(small: Small, backbone: Path) -> None:
    names = [f"teacher.{name}.backbone={backbone}" for name in ("minilm", "minilm_3l")]
    both = small(*SHORT, "teacher=[minilm,minilm_3l]", "pool=stochastic", *names)
    run = planned([*both, "+method.before.run.pool=wkd"])
    first = run.inputs.before
    assert (run.spec.pool.name, first.spec.pool.name) == ("stochastic", "wkd")
    assert roles(first) == ["teacher minilm", "teacher minilm_3l"]
    assert [needed.digest for _, needed in first.inputs] == [needed.digest for _, needed in run.inputs][:2]
    assert first.digest != planned(both).inputs.before.digest
    check_all(run)
    with pytest.raises(InputError) as caught:
        planned([*both, "+method.before.run.pool=no"])
    assert caught.value.key == "method.before.run.pool"
