"""RKD: its distances and angles as loops over what models show, its draw of examples, and what is refused."""

import math
from collections.abc import Sequence

import pytest
import torch
from conformance.bench import Bench, take
from models.test_masked_lm import TASK as MASKED
from models.test_masked_lm import masked_lm
from torch import Tensor, nn

from conftest import tiny_model
from kd.data.batch import Batch
from kd.data.tasks import Classification, Regression
from kd.errors import InputError
from kd.forward import Forward
from kd.methods.base import Bound, Progress, Step
from kd.methods.rkd import RKD
from kd.models import Encoder, FrozenTeacher

TASK = Classification("toy", ["no", "yes"], {}, ["accuracy"], "accuracy")
SCORES = Regression("toy scores", ["mse"], "mse")
LENGTHS = (6, 4, 3, 5)


def encoder(layers: int, width: int = 32, seed: int = 0) -> Encoder:
    model = tiny_model(seed, layers=layers, width=width).double()
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return Encoder(model)


def bound(student: Encoder, teacher: Encoder, padding: int = 0, **arguments: object) -> tuple[RKD, Step]:
    """A method bound to two models, and a step over four sentences."""
    method, frozen = RKD(**arguments), FrozenTeacher(teacher)
    method.bind(Bound(student, [frozen], TASK))
    ids = torch.randint(5, 30, (4, 6), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(6) < torch.tensor(LENGTHS)[:, None]).long()
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    inputs = {
        name: nn.functional.pad(rows, (0, padding), value=7 if name == "input_ids" else 0) for name, rows in inputs.items()
    }
    ours, (theirs,) = method.needs()
    batch = Batch(inputs, (inputs,), torch.tensor([0, 1, 1, 0]), torch.arange(4))
    return method, Step(Forward(student, inputs, ours), [Forward(frozen, inputs, theirs)], batch, TASK, Progress())


def shown(step: Step, teacher: bool) -> tuple[Tensor, ...]:
    """The states of all layers, as transformers returns them."""
    model = step.teacher.model.encoder.model if teacher else step.student.model.model
    return model(**step.batch.student, output_hidden_states=True).hidden_states


def soft(step: Step, temperature: float) -> Tensor:
    """The soft loss, as a sum over classes and a mean over examples."""
    s, t = step.student.outputs.logits / temperature, step.teacher.outputs.logits / temperature
    return temperature**2 * (t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))).sum() / len(s)


def features(step: Step, feature: str, pairs: list[list[int]]) -> list[tuple[Tensor, Tensor]]:
    """The vectors of the examples, without the package's functions."""

    def of(layer: int, teacher: bool) -> Tensor:
        states = shown(step, teacher)[layer]
        rows = [s[0] if feature == "cls" else s[:length].mean(0) for s, length in zip(states, LENGTHS, strict=True)]
        return torch.stack(rows)

    if feature in ("cls", "mean"):
        return [(of(ours, False), of(theirs, True)) for ours, theirs in pairs]
    outputs = step.student.outputs, step.teacher.outputs
    return [tuple(each.logits if feature == "logits" else each.pooled for each in outputs)]


FEATURES = [
    ("cls", "final", [[2, 6]]),
    ("mean", "final", [[2, 6]]),
    ("cls", "stages", [[1, 3], [2, 6]]),
    ("mean", [[0, 1], [2, 5]], [[0, 1], [2, 5]]),
    ("pooled", "final", []),
    ("logits", "final", []),
]


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
    terms = [method.terms(step) for method, step in (bound(*models, padding, feature="mean") for padding in (0, 5))]
    for name, term in terms[0].items():
        torch.testing.assert_close(term, terms[1][name], rtol=0, atol=1e-10)


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
    teachers = [FrozenTeacher(encoder(4))]
    for layers, message in (("skip", "no pair"), ([[1, 5]], "layer 5 of the teacher")):
        with pytest.raises(InputError, match=message) as caught:
            RKD(layers=layers).bind(Bound(encoder(1), teachers, TASK))
        assert caught.value.key == "layers"
    with pytest.raises(InputError, match="one number for each example") as caught:
        RKD("logits").bind(Bound(encoder(2), teachers, SCORES))
    assert caught.value.key == "feature"
    RKD("pooled").bind(Bound(encoder(2), teachers, SCORES))
    for feature in ("pooled", "logits"):
        with pytest.raises(InputError, match="a masked language model does not have") as caught:
            RKD(feature).bind(Bound(masked_lm(layers=2), [FrozenTeacher(masked_lm())], MASKED))
        assert caught.value.key == "feature"


def test_a_student_deeper_than_its_teacher_is_compared_by_its_last_layer() -> None:
    method, _ = bound(encoder(4), encoder(2))
    assert method.describe() == {"layer map (student<-teacher)": "4<-2"}
    assert method.needs()[0].cls == {4}


def test_a_comparison_of_examples_says_so() -> None:
    assert "of the examples of a batch" in RKD().batch_dependence()
    assert RKD.across_ranks
