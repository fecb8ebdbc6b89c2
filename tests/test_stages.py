"""The run that a method begins with: what it is laid over, what it shares, and how errors name it."""

from collections.abc import Callable
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("surgery", ["cut_vocabulary", "learned_vocabulary", "factorized"])
def test_a_student_with_small_embeddings_goes_through_both(small: Small, surgery: str) -> None:
    size = {"learned_vocabulary": ["surgery.learned_vocabulary.size=80"], "factorized": ["surgery.factorized.rank=8"]}
    run, result = made(small(*SHORT, f"surgery=[{surgery}]", *size.get(surgery, []), "trainer.max_epochs=1"))
    first = run.inputs.before.result
    assert first is not None
    assert result["parameters"] == first["parameters"]


@pytest.mark.parametrize("given", ["student.run='seed=1'", "student.run={overrides: 'seed=1'}"])
def test_one_override_in_place_of_a_list_is_refused_with_the_list(given: str) -> None:
    words = ["student.init=run", given]
    with pytest.raises(InputError, match=r'=\["seed=1"\]') as caught:
        planned(words)
    assert str(caught.value.key).startswith("student.run")
