"""Cohorts: who learns together, where each begins, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kd.build.data import build_examples
from kd.build.models import build_models
from kd.config.cohort import students_of
from kd.config.schema import StudentSpec
from kd.errors import InputError
from kd.models import Encoder
from kd.runs.run import Run
from whole_runs import Small, checked, over, planned, pool, roles


@pytest.fixture(scope="module")
def dml(small: Small):
    """The run of a cohort without a teacher."""
    return over(small("method=dml", "teacher=[]"))


def students(run: Run) -> dict[str, Encoder]:
    return build_models(run, build_examples(run).task).students


def state(student: Encoder, part: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in student.model.state_dict().items() if part in name}


def alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


# Who


def test_a_number_makes_students_alike_with_names_of_their_own(dml) -> None:
    run = dml("cohort.students=3")
    found = students_of(run.spec)
    assert list(found) == ["2l", "2l_2", "2l_3"]
    assert all(each == run.spec.student for each in found.values())


def test_names_are_of_conf_student_and_keep_their_sizes_and_starts(dml) -> None:
    found = students_of(dml("cohort.students=[3l,2l,3l]", "student.dropout=0.3").spec)
    assert {name: each.layers for name, each in found.items()} == {"3l": 3, "2l": 2, "3l_2": 3}
    assert {each.dropout for each in found.values()} == {0.3}


def test_mappings_are_laid_over_the_student(dml) -> None:
    run = dml("cohort.students=[{init: last},{layers: 3,dropout: 0.2,name: deep},{}]")
    found = students_of(run.spec)
    assert list(found) == ["2l", "deep", "2l_2"]
    assert [(each.init, each.layers, each.dropout) for each in found.values()] == [
        ("last", 2, None),
        ("first", 3, 0.2),
        ("first", 2, None),
    ]


def test_names_are_unique_and_usable_as_module_names(dml) -> None:
    found = students_of(dml("cohort.students=[{name: a.b},{name: a_b},{name: a.b},{name: a_b_2}]").spec)
    assert len(found) == 4
    assert not any("." in name for name in found)
    torch.nn.ModuleDict({name: torch.nn.Identity() for name in found})


@pytest.mark.parametrize(
    ("one", "other"),
    [("2", "[2l,2l]"), ("[{init: first},{}]", "2"), ("[{layers: 2},2l]", "2")],
)
def test_ways_of_saying_the_same_cohort_have_one_set_of_students(dml, one: str, other: str) -> None:
    runs = [dml(f"cohort.students={words}") for words in (one, other)]
    assert students_of(runs[0].spec) == students_of(runs[1].spec)


def test_what_students_are_changes_the_digest(dml) -> None:
    words = ["2", "3", "[2l,3l]", "[3l,2l]", "[{init: last},{}]", "[{dropout: 0.3},{}]"]
    assert len({dml(f"cohort.students={each}").digest for each in words}) == len(words)
    assert dml("cohort.peers.target=sum").digest != dml().digest != dml("engine.update=sequential").digest


def test_seeds_of_a_cohort_are_one_family(dml) -> None:
    runs = [dml(f"seed={seed}") for seed in range(2)]
    assert runs[0].digest != runs[1].digest
    assert runs[0].family == runs[1].family != dml("cohort.students=3").family


def test_a_teacher_that_learns_with_its_students_has_no_run_and_its_start_is_part_of_theirs(small: Small) -> None:
    run = over(small("method=p2p_mutual", "cohort.teacher=online"))
    assert not run().inputs
    assert "teacher minilm" in roles(planned(small("method=p2p_mutual")))
    changes = [(), ("teacher.minilm.run.seed=1",), ("+teacher.minilm.run.student.layers=3",)]
    assert len({run(*more).digest for more in changes}) == 3
    for words in ("teacher.minilm.run.optimizer.lr=1", "teacher.minilm.run.trainer.max_epochs=9"):
        assert run(words).digest == run().digest, "it is trained with its students, by their optimiser"


# Where each begins


def test_copies_share_the_pretrained_layers_and_begin_with_heads_of_their_own(dml) -> None:
    found = list(students(dml("cohort.students=3")).values())
    for place, one in enumerate(found):
        for other in found[place + 1 :]:
            assert alike(state(one, "bert.encoder"), state(other, "bert.encoder"))
            assert not torch.equal(one.model.classifier.weight, other.model.classifier.weight)
    again = students(dml("cohort.students=3")).values()
    assert all(alike(one.state_dict(), other.state_dict()) for one, other in zip(found, again, strict=True))


def test_random_copies_differ_throughout(dml) -> None:
    one, other = students(dml("student.init=random")).values()
    embeddings = [each.base.embeddings.word_embeddings.weight for each in (one, other)]
    assert not torch.equal(*embeddings)


@pytest.mark.parametrize("init", ["first", "random"])
def test_the_first_student_begins_exactly_as_a_lone_one_of_that_seed(dml, small: Small, init: str) -> None:
    mixed = ["cohort.students=[{},{layers: 3}]", f"student.init={init}"]
    (first, _), (other, _) = (students(dml(*mixed, f"seed={seed}")).values() for seed in (3, 4))
    (lone,) = students(planned(small("method=finetune", "teacher=[]", f"student.init={init}", "seed=3"))).values()
    assert alike(first.state_dict(), lone.state_dict())
    assert not alike(first.state_dict(), other.state_dict())


def test_students_keep_their_start_when_others_join(dml) -> None:
    two, three = (list(students(dml(f"cohort.students={count}")).values()) for count in (2, 3))
    assert all(alike(one.state_dict(), other.state_dict()) for one, other in zip(two, three, strict=False))


def test_each_student_begins_from_the_layers_of_its_own_init(dml) -> None:
    run = dml("cohort.students=[{init: first},{init: last}]")
    models = build_models(run, build_examples(run).task)
    first, last = models.students.values()
    assert list(models.inits.values()) == [
        f"{k} of the pre-trained backbone" for k in ("first layers [1, 2]", "last layers [3, 4]")
    ]
    assert not torch.equal(*(each.base.encoder.layer[0].output.dense.weight for each in (first, last)))


# What cannot be

BAD = {
    "one student": (["cohort.students=1"], "cohort.students", "needs two students or more.*has 1"),
    "a list of one": (["cohort.students=[2l]"], "cohort.students", "needs two students or more.*has 1"),
    "nobody": (["cohort.students=0"], "cohort.students", "leaves no student"),
    "an empty list": (["cohort.students=[]"], "cohort.students", "leaves no student"),
    "fewer than nobody": (["cohort.students=-1"], "cohort.students", "leaves no student"),
    "a word": (["cohort.students=two"], "cohort.students", r"'cohort\.students=\[two\]'"),
    "a mapping": (["cohort.students={layers: 2}"], "cohort.students", "neither a number nor a list"),
    "a truth": (["cohort.students=true"], "cohort.students", "neither a number nor a list"),
    "a fraction": (["cohort.students=2.5"], "cohort.students", "neither a number nor a list"),
    "an unknown key": (["cohort.students=[{depth: 2},{}]"], "cohort.students", "depth.*name, layers, width"),
    "a number among students": (["cohort.students=[2,3]"], "cohort.students", "neither a name of conf/student nor a mapping"),
    "an unknown name": (["cohort.students=[2l,33l]"], "cohort.students", "'33l' is not one of.*Did you mean '3l'"),
    "students of one run that differ": (
        ["cohort.students=[2l,3l]", "student.init=run", "student.run=['student.init=random']"],
        "cohort.students",
        "have to be equal",
    ),
    "several without a cohort": (
        ["cohort=single", "cohort.students=2", "~method.weights.mutual"],
        "cohort",
        "several students need cohort=mutual",
    ),
    "a weight without peers": (["cohort=single", "engine=distiller"], "method.weights.mutual", "'mutual' has no term"),
    "no weight on peers": (["~method.weights.mutual"], "method.weights.mutual", "'mutual' has no weight"),
    "an unknown kind of teacher": (["cohort.teacher=live"], "cohort.teacher", "frozen, online"),
    "an online teacher that is not there": (["cohort.teacher=online"], "cohort.teacher", "trained online"),
    "an unknown update": (["engine.update=random"], "engine.update", "simultaneous, sequential"),
    "teachers given to an engine": (["+engine.teachers=2"], "engine.teachers", "follows from the rest"),
    "models given to an engine": (["+engine.models=2"], "engine.models", "follows from the rest"),
    "turns over several batches": (
        ["engine.update=sequential", "trainer.accumulate=2"],
        "trainer.accumulate",
        "trainer.accumulate=1",
    ),
    "turns with a gradient scaler": (
        ["engine.update=sequential", "trainer.precision=16-mixed", "optimizer.factory.fused=false"],
        "trainer.precision",
        "bf16-mixed",
    ),
    "an unknown target": (["cohort.peers.target=all"], "cohort.peers.target", "each, sum, mean"),
    "no temperature": (["cohort.peers.temperature=0"], "cohort.peers.temperature", "positive"),
    "an unknown option of peers": (["+cohort.peers.gain=2"], "cohort.peers.gain", "gain"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_cohort_that_cannot_work_names_the_key(case: str, dml) -> None:
    words, key, message = BAD[case]
    with pytest.raises(InputError, match=f"(?s){message}") as caught:
        checked(dml, *words)
    assert caught.value.key == key


def test_a_teacher_is_trained_online_alone_and_from_a_backbone(small: Small, backbone: Path) -> None:
    several = pool(backbone, "minilm", "minilm_3l")
    for teachers in (several, ["teacher=[hub]", f"teacher.hub.model={backbone}"]):
        for method in ("method=p2p_mutual", "method=kd cohort=single"):
            with pytest.raises(InputError, match="trained online together") as caught:
                planned(small(*method.split(), *teachers, "cohort.teacher=online"))
            assert caught.value.key == "cohort.teacher"


def test_a_weight_for_peers_needs_a_cohort(small: Small) -> None:
    with pytest.raises(InputError, match="'mutual' has no term") as caught:
        checked(over(small("method=kd")), "+method.weights.mutual=1")
    assert caught.value.key == "method.weights.mutual"


WRONG_VALUES = {
    "layers that are a word": "[{layers: two},{}]",
    "dropout that is a word": "[{dropout: much},{}]",
    "a run that is not there": "[{init: run},{}]",
    "a checkpoint that is not there": "[{init: checkpoint},{}]",
    "no name": "[{name: null},{}]",
    "a name that is a path": "[{name: ../../elsewhere},{}]",
    "the ensemble's name": "[{name: ensemble},{}]",
}


@pytest.mark.parametrize("case", WRONG_VALUES)
def test_a_value_that_a_student_cannot_have_is_found_when_planning(case: str, dml) -> None:
    with pytest.raises(InputError) as caught:
        checked(dml, f"cohort.students={WRONG_VALUES[case]}")
    assert caught.value.key.startswith(("cohort.students", "student."))


def refusal(action: Callable[[], object]) -> InputError | None:
    """Return the error that an action raises; None if it raises none."""
    try:
        action()
    except InputError as error:
        return error
    return None


@pytest.mark.parametrize("name", ["half", "items", "type"])
def test_a_name_that_torch_uses_itself_is_a_name_or_refused(dml, name: str) -> None:
    error = refusal(lambda: checked(dml, f"cohort.students=[{{name: {name}}},{{}}]"))
    assert error is None or error.key == "cohort.students"


def test_a_student_called_teacher_is_not_taken_for_the_one_trained_online(small: Small) -> None:
    run = over(small("method=p2p_mutual", "cohort.teacher=online"))
    with pytest.raises(InputError, match="teacher") as caught:
        checked(run, "cohort.students=[{name: teacher},{}]")
    assert caught.value.key == "cohort.students"


@pytest.mark.parametrize("words", ["student.init=random", "student.init=checkpoint student.checkpoint={backbone}"])
def test_students_by_name_begin_as_the_command_says_or_not_at_all(dml, backbone: Path, words: str) -> None:
    given = words.format(backbone=backbone).split()
    found: dict[str, StudentSpec] = {}
    error = refusal(lambda: found.update(students_of(dml("cohort.students=[2l,3l]", *given).spec)))
    assert error is None or error.key in ("student.init", "cohort.students")
    assert {each.init for each in found.values()} <= {given[0].partition("=")[2]}


def test_the_message_for_a_cohort_without_peers_says_what_to_do(dml) -> None:
    with pytest.raises(InputError) as caught:
        dml("cohort.peers=null")
    assert "use cohort=mutual" not in caught.value.message, "that is what was used"


def test_a_named_student_begins_as_its_file_says_whatever_the_first_one_is(dml) -> None:
    found = students_of(dml("student=bert_3l_192", "cohort.students=[3l,bert_3l_192]").spec)
    assert {name: each.init for name, each in found.items()} == {"3l": "first", "bert_3l_192": "random"}


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["student.init_from=teacher"], "student.init_from"),
        (["+teacher.minilm.run.student.init=checkpoint"], "teacher.minilm.run.student.init"),
    ],
)
def test_what_an_online_teacher_would_ignore_is_refused(small: Small, words: list[str], key: str) -> None:
    with pytest.raises(InputError) as caught:
        planned(small("method=p2p_mutual", "cohort.teacher=online", *words))
    assert caught.value.key == key
