"""Layer maps: the papers' maps, explicit pairs, and what is refused."""

import itertools

import pytest

from kd.errors import InputError
from kd.functional.layer_maps import NAMED, describe, resolve


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


def test_explicit_pairs_are_kept_in_their_order() -> None:
    assert resolve([[3, 12], (0, 0), [1, 12]], 3, 12) == ((3, 12), (0, 0), (1, 12))


@pytest.mark.parametrize("name", NAMED)
def test_a_student_deeper_than_its_teacher_needs_explicit_pairs(name: str) -> None:
    with pytest.raises(InputError, match=r"no deeper than its teacher, got 6 and 4 layers.*give the pairs") as caught:
        resolve(name, 6, 4)
    assert caught.value.key == "method.layers"
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
        resolve(spec, 2, 4, key="method.attention_layers")
    assert caught.value.key == "method.attention_layers"


def test_description_shows_each_pair() -> None:
    assert describe(((1, 2), (2, 4))) == "1<-2, 2<-4"
    assert describe(()) == "none"
