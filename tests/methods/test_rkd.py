"""RKD: its distances and angles as loops over what models show, its draw of examples, and what is refused."""

import math
from collections.abc import Sequence

import pytest
import torch
from conformance.bench import Bench, take
from methods.two_models import FEATURES, TASK, bound_to, check_features_are_checked, check_padding, encoder, features, soft

from kd.errors import InputError
from kd.methods.base import Progress, Step
from kd.methods.rkd import RKD
from kd.models import Encoder


def bound(student: Encoder, teacher: Encoder, padding: int = 0, **arguments: object) -> tuple[RKD, Step]:
    return bound_to(student, teacher, RKD(**arguments), padding)


def minus(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [x - y for x, y in zip(one, other, strict=True)]


def dot(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(one, other, strict=True))


def length(vector: Sequence[float]) -> float:
    return math.sqrt(dot(vector, vector))


def huber(difference: float) -> float:
    return difference**2 / 2 if abs(difference) < 1 else abs(difference) - 0.5


def distances(rows: list[list[float]]) -> list[float]:
    """Distances of all pairs, divided by their mean over the pairs of different examples."""
    found = [length(minus(one, other)) for one in rows for other in rows]
    mean = sum(found) / (len(rows) * (len(rows) - 1))
    return [distance / mean for distance in found]


def cosines(rows: list[list[float]]) -> list[float]:
    """Angles of all triplets."""
    found = []
    for i in rows:
        for j in rows:
            for k in rows:
                one, other = minus(i, j), minus(k, j)
                found.append(dot(one, other) / (length(one) * length(other)) if i != j and k != j else 0.0)
    return found


@pytest.mark.parametrize("width", [32, 16])
@pytest.mark.parametrize(("feature", "layers", "pairs"), FEATURES, ids=str)
def test_terms_equal_the_formulas_written_as_loops(feature: str, layers: object, pairs: list, width: int) -> None:
    method, step = bound(encoder(2, width, seed=1), encoder(6), feature=feature, layers=layers)
    terms = method.terms(step)
    for name, relation in (("distance", distances), ("angle", cosines)):
        expected = 0.0
        for both in features(step, feature, pairs):
            ours, theirs = (relation(rows.tolist()) for rows in both)
            expected += sum(huber(x - y) for x, y in zip(ours, theirs, strict=True)) / len(ours)
        assert terms[name].item() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("name", ["distance", "angle"])
def test_student_gets_gradients_and_the_teacher_none(name: str) -> None:
    student, teacher = encoder(2, seed=1), encoder(6)
    method, step = bound(student, teacher)
    method.terms(step)[name].backward()
    assert list(method.parameters()) == []
    assert student.base.embeddings.word_embeddings.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_angles_of_a_large_batch_are_those_of_examples_drawn_by_their_index() -> None:
    bench = Bench("rkd", more=["method.most=3"], double=True)
    batch = bench.batch()
    (method,) = bench.methods.values()
    ((_, step, terms),) = bench.engine.loss(batch).steps
    drawn = step.draws("angles", 1)[:, 0].argsort()[:3]
    all_of_them = Bench("rkd", more=["method.most=null"], double=True)
    (whole,) = all_of_them.methods.values()
    assert (method.most, whole.most) == (3, None)
    exact, of_three = (all_of_them.terms(each) for each in (batch, take(batch, drawn)))
    torch.testing.assert_close(bench.terms(batch)["angle"], of_three["angle"])
    torch.testing.assert_close(terms["distance"].detach(), exact["distance"])
    assert abs(exact["angle"] - of_three["angle"]) > 1e-3
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(bench.terms(take(batch, order))["angle"], of_three["angle"])


def test_other_examples_are_drawn_in_each_step() -> None:
    method, step = bound(encoder(2, seed=1), encoder(6), most=3)
    terms = [method.terms(step.replace(progress=Progress(done, 100)))["angle"] for done in range(20)]
    values = {round(term.item(), 9) for term in terms}
    assert 2 <= len(values) <= 4  # of four examples one is left out


def test_padding_changes_no_term() -> None:
    models = encoder(2, 16, seed=1).eval(), encoder(6)
    check_padding(lambda padding: bound(*models, padding, feature="mean"))


def test_soft_loss_is_the_divergence_times_temperature_squared() -> None:
    method, step = bound(encoder(2, seed=1), encoder(6), temperature=3.0)
    torch.testing.assert_close(method.terms(step)["logits"], soft(step, 3.0))
    assert method.terms(step)["task"] == TASK.hard(step.student.outputs.logits, step.batch.labels)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"feature": "tokens"}, "feature"),
        ({"layers": "all"}, "layers"),
        ({"feature": "pooled", "layers": "stages"}, "layers"),
        ({"feature": "logits", "layers": [[1, 1]]}, "layers"),
        ({"temperature": 0}, "temperature"),
        ({"loss": "l1"}, "loss"),
        ({"reduction": "sum"}, "reduction"),
        ({"most": 2}, "most"),
        ({"most": 4.0}, "most"),
    ],
    ids=str,
)
def test_impossible_arguments_are_refused_by_their_key(arguments: dict[str, object], key: str) -> None:
    with pytest.raises(InputError) as caught:
        RKD(**arguments)
    assert caught.value.key == key


def test_what_does_not_suit_the_models_or_the_task_is_refused_while_binding() -> None:
    check_features_are_checked(RKD)


def test_a_student_deeper_than_its_teacher_is_compared_by_its_last_layer() -> None:
    method, _ = bound(encoder(4), encoder(2))
    assert method.describe() == {"layer map (student<-teacher)": "4<-2"}
    assert method.needs()[0].cls == {4}


def test_a_comparison_of_examples_says_so() -> None:
    assert "of the examples of a batch" in RKD().batch_dependence()
    assert RKD.across_ranks
