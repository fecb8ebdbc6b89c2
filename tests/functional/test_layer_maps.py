"""Layer maps: the papers' maps, explicit pairs, and what is refused."""

import itertools

import numpy as np
import pytest

from kd.errors import InputError
from kd.functional.layer_maps import (
    ANY_DEPTHS,
    NAMED,
    NAMED_FEW,
    blocks,
    bottom,
    describe,
    describe_blocks,
    drawn,
    resolve,
    top,
)


@pytest.mark.parametrize(
    ("name", "student", "teacher", "expected"),
    [
        ("skip", 6, 12, [2, 4, 6, 8, 10]),
        ("skip", 3, 12, [4, 8]),
        ("skip", 6, 24, [4, 8, 12, 16, 20]),
        ("skip", 3, 24, [8, 16]),
        ("last", 6, 12, [7, 8, 9, 10, 11]),
        ("last", 3, 12, [10, 11]),
    ],
)
def test_pkd_maps_are_the_papers(name: str, student: int, teacher: int, expected: list[int]) -> None:
    assert resolve(name, student, teacher) == tuple(enumerate(expected, start=1))


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [(4, 12, [0, 3, 6, 9, 12]), (6, 12, [0, 2, 4, 6, 8, 10, 12]), (4, 6, [0, 1, 3, 4, 6])],
)
def test_uniform_map_runs_from_embeddings_to_the_last_layer(student: int, teacher: int, expected: list[int]) -> None:
    assert resolve("uniform", student, teacher) == tuple(enumerate(expected))


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize(("student", "teacher"), [(1, 1), (2, 3), (5, 7), (6, 6), (4, 24)])
def test_named_maps_ascend_within_both_models(name: str, student: int, teacher: int) -> None:
    pairs = resolve(name, student, teacher)
    for ours, theirs in itertools.pairwise(pairs):
        assert ours[0] < theirs[0]
        assert ours[1] < theirs[1]
    assert all(0 <= ours <= student and 0 <= theirs <= teacher for ours, theirs in pairs)
    assert resolve([list(pair) for pair in pairs], student, teacher) == pairs  # what a name gives is allowed in words


@pytest.mark.parametrize("name", NAMED)
def test_equal_depths_meet_layer_for_layer(name: str) -> None:
    assert all(ours == theirs for ours, theirs in resolve(name, 5, 5))


def test_pkd_maps_leave_a_single_layer_nothing() -> None:
    assert resolve("skip", 1, 12) == resolve("last", 1, 12) == ()


@pytest.mark.parametrize(
    ("student", "expected"),
    [
        (2, [(1, 6)]),
        (3, [(1, 4), (2, 8)]),
        (4, [(1, 3), (2, 6), (3, 9)]),
        (6, [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10)]),
        (9, [(3, 4), (6, 8)]),
        (1, []),
    ],
)
def test_proportional_map_is_pea_kds_for_a_teacher_of_twelve_layers(student: int, expected: list[tuple[int, int]]) -> None:
    assert resolve("proportional", student, 12) == tuple(expected)


def test_proportional_map_rounds_down_where_no_fraction_is_the_same_and_takes_deeper_students() -> None:
    assert resolve("proportional", 5, 12) == ((1, 2), (2, 4), (3, 7), (4, 9))
    assert resolve("proportional", 9, 6) == ((3, 2), (6, 4))
    assert resolve("proportional", 4, 3) == ((2, 1), (3, 2))
    assert resolve("proportional", 3, 1) == ()


def test_explicit_pairs_are_kept_in_their_order() -> None:
    assert resolve([[3, 12], (0, 0), [1, 12]], 3, 12) == ((3, 12), (0, 0), (1, 12))


@pytest.mark.parametrize("name", [name for name in NAMED if name not in ANY_DEPTHS])
def test_a_student_deeper_than_its_teacher_needs_explicit_pairs(name: str) -> None:
    with pytest.raises(InputError, match=r"no deeper than its teacher, got 6 and 4 layers.*give the pairs") as caught:
        resolve(name, 6, 4)
    assert caught.value.key == "layers"
    assert resolve([[6, 4]], 6, 4) == ((6, 4),)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("skp", "Did you mean 'skip'"),
        ([[1, 5]], "asks for layer 5 of the teacher, which has layers 0 \\(embeddings\\) to 4"),
        ([[3, 4]], "asks for layer 3 of the student, which has layers 0 \\(embeddings\\) to 2"),
        ([[-1, 4]], "asks for layer -1 of the student"),
        ([[1, 2, 3]], "not a pair"),
        ([[1]], "not a pair"),
        ([[1, True]], "not a pair"),
        ([[1, 2.0]], "not a pair"),
        ([["1", "2"]], "not a pair"),
        (["12"], "not a pair"),
        ([1, 2], "not a pair"),
        ([None], "not a pair"),
        ([1.5], "not a pair"),
        (3, "pair"),
        (None, "pair"),
    ],
    ids=str,
)
def test_what_is_no_map_is_refused_by_its_key(spec: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        resolve(spec, 2, 4, key="attention_layers")
    assert caught.value.key == "attention_layers"


def test_description_shows_each_pair() -> None:
    assert describe(((1, 2), (2, 4))) == "1<-2, 2<-4"
    assert describe(()) == "none"
    assert describe_blocks(((1, (1, 2)), (2, (4,)))) == "1<-1+2, 2<-4"


@pytest.mark.parametrize(("student", "teacher"), [(4, 12), (6, 12), (3, 3), (1, 5)])
def test_top_and_bottom_are_tinyberts(student: int, teacher: int) -> None:
    layers = range(1, student + 1)
    assert top(student, teacher) == tuple((m, m + teacher - student) for m in layers)
    assert bottom(student, teacher) == tuple((m, m) for m in layers)


@pytest.mark.parametrize(("student", "teacher"), [(4, 12), (6, 12), (3, 3), (1, 5)])
def test_blocks_share_out_every_teacher_layer_and_end_where_the_uniform_map_is(student: int, teacher: int) -> None:
    found = blocks(student, teacher)
    assert [layer for _, block in found for layer in block] == list(range(1, teacher + 1))
    assert ((0, 0), *((ours, block[-1]) for ours, block in found)) == resolve("uniform", student, teacher)


@pytest.mark.parametrize(("student", "teacher"), [(5, 12), (12, 5), (8, 12)])
def test_depths_that_do_not_divide_have_no_blocks(student: int, teacher: int) -> None:
    with pytest.raises(InputError, match=f"{student} layers does not divide its teacher's {teacher}") as caught:
        blocks(student, teacher, "attention_layers")
    assert caught.value.key == "attention_layers"


def test_drawn_layers_are_different_ascending_and_all_of_them_come_up() -> None:
    generator, seen = np.random.default_rng(0), np.zeros(7, int)
    for _ in range(600):
        pairs = drawn(3, 6, generator)
        assert [ours for ours, _ in pairs] == [1, 2, 3]
        layers = [theirs for _, theirs in pairs]
        assert layers == sorted(set(layers))
        assert all(type(layer) is int for layer in layers)
        seen[layers] += 1
    assert seen[0] == 0
    assert (abs(seen[1:] - 300) < 60).all()  # five standard deviations
    assert drawn(4, 4, generator) == bottom(4, 4)


@pytest.mark.parametrize(("student", "teacher"), [(4, 12), (6, 12), (3, 3), (1, 5), (5, 12)])
def test_stages_are_the_uniform_map_without_embeddings_and_few_maps_have_one_pair(student: int, teacher: int) -> None:
    assert ((0, 0), *resolve("stages", student, teacher, named=NAMED_FEW)) == resolve("uniform", student, teacher)
    assert resolve("final", student, teacher, named=NAMED_FEW) == ((student, teacher),)
    ((ours, theirs),) = resolve("middle", student, teacher, named=NAMED_FEW)
    for layer, depth in ((ours, student), (theirs, teacher)):
        assert 0 <= depth - 2 * layer + 1 <= 1  # as many layers above it as below it, or one more


def test_maps_of_one_pair_are_also_those_of_deeper_students() -> None:
    assert resolve("middle", 6, 2, named=NAMED_FEW) == ((3, 1),)
    assert resolve("final", 6, 2, named=NAMED_FEW) == ((6, 2),)
    with pytest.raises(InputError, match="no deeper"):
        resolve("stages", 6, 2, named=NAMED_FEW)


@pytest.mark.parametrize("name", sorted(set(NAMED_FEW) - set(NAMED)))
def test_maps_of_few_pairs_are_not_offered_to_all_methods(name: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve(name, 2, 4)
    assert caught.value.key == "layers"
