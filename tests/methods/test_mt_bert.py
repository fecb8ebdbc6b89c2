"""MT-BERT: worked numbers, its losses as loops over teachers, layers and tokens, and where its gradient goes."""

import math
from typing import Any

import pytest
import torch
from methods.two_models import SCORES, TASK, encoder, sentences
from torch import nn

from kd.data.batch import Batch
from kd.data.tasks import NO_CLASS, Classification, Task
from kd.errors import InputError
from kd.forward import Forward, Needs
from kd.functional.logits import soft_cross_entropy
from kd.methods import by_teacher
from kd.methods.base import Bound, Progress, Step
from kd.methods.mt_bert import MTBERT
from kd.models import Encoder, FrozenTeacher

LENGTHS = (6, 4, 3)


def bound(
    student: Encoder, teachers: list[Encoder], more: int = 0, task: Task = TASK, labels: Any = (0, 1, 1), **arguments: Any
) -> tuple[MTBERT, Step]:
    """A method bound to a student and teachers, and a step over three sentences of which two are padded."""
    torch.manual_seed(5)
    method, frozen = MTBERT(**arguments), [FrozenTeacher(teacher) for teacher in teachers]
    method.bind(Bound(student, frozen, task))
    method.double()
    inputs = sentences(more, LENGTHS)
    ours, theirs = method.needs()
    batch = Batch(inputs, (inputs,) * len(teachers), torch.tensor(labels), torch.arange(3))
    passes = [Forward(one, inputs, needs) for one, needs in zip(frozen, theirs, strict=True)]
    return method, Step(Forward(student, inputs, ours), passes, batch, task, Progress())


class Given:
    """A forward pass with these logits."""

    def __init__(self, logits: list[float]) -> None:
        self.outputs = self
        self.logits = torch.tensor([logits], dtype=torch.double)


def given(student: list[float], *teachers: list[float], label: int = 0) -> Step:
    batch = Batch({}, (), torch.tensor([label]), torch.arange(1))
    return Step(Given(student), [Given(logits) for logits in teachers], batch, TASK, Progress())  # type: ignore[arg-type]


def logits_term(step: Step, **arguments: Any) -> float:
    method = MTBERT(**arguments)
    losses = by_teacher.soft_losses(step, 1.0, method.loss)
    return float((method.weights(step) * losses).sum(dim=1).mean())


def test_worked_numbers_of_two_teachers() -> None:
    step = given([1.0, 0.0], [2.0, 0.0], [0.0, 2.0])
    weights, losses = by_teacher.inverse_error_weights(by_teacher.errors(step)), by_teacher.soft_losses(step, 1.0, "ce")
    assert weights[0].tolist() == pytest.approx([0.887368, 0.319803], abs=1e-6)
    assert losses[0].tolist() == pytest.approx([0.432465, 1.194059], abs=1e-6)
    assert logits_term(step) == pytest.approx(0.765619, abs=1e-6)


def test_weight_of_a_sure_and_right_teacher_is_one_and_at_probability_1_over_e_a_half() -> None:
    odds = math.log((1 / math.e) / (1 - 1 / math.e))
    weights = by_teacher.inverse_error_weights(by_teacher.errors(given([0.0, 0.0], [60.0, 0.0], [odds, 0.0])))
    assert weights[0].tolist() == pytest.approx([1.0, 0.5], abs=1e-12)


def test_one_perfect_teacher_is_the_plain_soft_loss() -> None:
    step = given([1.0, 0.0], [60.0, 0.0])
    expected = soft_cross_entropy(torch.tensor([[1.0, 0.0]]), torch.tensor([[60.0, 0.0]]))
    assert logits_term(step) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("project", ["teacher", "student"])
@pytest.mark.parametrize("states", ["tokens", "cls"])
@pytest.mark.parametrize("widths", [(32, 32, 32), (16, 32, 24)])
@pytest.mark.parametrize("padding", ["strict", "reference"])
def test_terms_equal_loops_over_teachers_layers_and_tokens(
    project: str, states: str, widths: tuple[int, int, int], padding: str
) -> None:
    student, teachers = encoder(2, widths[0]), [encoder(4, widths[1], 1), encoder(6, widths[2], 2)]
    method, step = bound(student, teachers, project=project, states=states, padding=padding, temperature=2.0)
    for parameter in method.parameters():
        nn.init.normal_(parameter, std=0.3)
    inputs = step.batch.student
    with torch.no_grad():
        ours = student.model(**inputs, output_hidden_states=True)
        shown = [teacher.model(**inputs, output_hidden_states=True) for teacher in teachers]
    hidden, soft = 0.0, 0.0
    for number, (found, depth) in enumerate(zip(shown, (4, 6), strict=True)):
        for layer in (1, 2):
            matrix = method.projections[number][layer - 1].weight.detach()
            examples, elements = [], []
            for example, length in enumerate(LENGTHS):
                count = 1 if states == "cls" else 6 if padding == "reference" else length
                squares = []
                for token in range(count):
                    h = ours.hidden_states[layer][example, token]
                    t = found.hidden_states[layer * depth // 2][example, token]
                    pair = (h, matrix @ t) if project == "teacher" else (matrix @ h, t)
                    squares.append(
                        sum((a - b) ** 2 for a, b in zip(*(side.tolist() for side in pair), strict=True)) / len(pair[0])
                    )
                examples.append(sum(squares) / count)
                elements += squares
            hidden += sum(elements) / len(elements) if padding == "reference" else sum(examples) / 3
    for example, label in enumerate((0, 1, 1)):
        own = (ours.logits[example] / 2).softmax(-1).tolist()
        for found in shown:
            error = -math.log(found.logits[example].softmax(-1)[label])
            target = (found.logits[example] / 2).softmax(-1).tolist()
            soft += sum(-q * math.log(p) for q, p in zip(target, own, strict=True)) / (1 + error) / 3
    terms = method.terms(step)
    assert float(terms["hidden"]) == pytest.approx(hidden, abs=1e-9)
    assert float(terms["logits"]) == pytest.approx(soft, abs=1e-9)


def test_order_of_the_teachers_changes_nothing() -> None:
    student, teachers = encoder(2), [encoder(4, 32, 1), encoder(6, 32, 2)]
    one, other = (bound(student, order) for order in (teachers, teachers[::-1]))
    for name, term in one[0].terms(one[1]).items():
        assert torch.allclose(term, other[0].terms(other[1])[name], rtol=0, atol=1e-12)


def test_hidden_is_zero_where_teachers_equal_the_student() -> None:
    student = encoder(2)
    method, step = bound(student, [student, student])
    assert float(method.terms(step)["hidden"]) == 0.0


def test_uniform_weights_are_the_plain_average_and_scaled_ones_add_up_to_one() -> None:
    step = given([1.0, 0.0], [2.0, 0.0], [0.0, 2.0])
    assert logits_term(step, weighting="uniform") == pytest.approx((0.432465 + 1.194059) / 2, abs=1e-6)
    total = 0.887368 + 0.319803
    assert logits_term(step, normalize_weights=True) == pytest.approx(0.765619 / total, abs=1e-6)


def test_example_without_a_label_has_equal_weights() -> None:
    task = Classification("toy", ["no", "yes"], {}, ["accuracy"], "accuracy")
    task.partly_labelled = True
    student, teachers = encoder(2), [encoder(4, 32, 1), encoder(6, 32, 2)]
    method, step = bound(student, teachers, task=task, labels=(0, NO_CLASS, 1))
    labelled = bound(student, teachers)[0].weights(bound(student, teachers)[1])
    found = method.weights(step)
    assert found[1].tolist() == [0.5, 0.5]
    assert torch.equal(found[[0, 2]], labelled[[0, 2]])


def test_regression_weighs_teachers_by_squared_errors() -> None:
    student, teachers = encoder(2, outputs=1), [encoder(4, 32, 1, 1), encoder(6, 32, 2, 1)]
    method, step = bound(student, teachers, task=SCORES, labels=(0.5, 2.0, 1.0))
    scores = [teacher.outputs.logits[:, 0].tolist() for teacher in step.teachers]
    for example, label in enumerate((0.5, 2.0, 1.0)):
        expected = [1 / (1 + (of_teacher[example] - label) ** 2) for of_teacher in scores]
        assert method.weights(step)[example].tolist() == pytest.approx(expected, abs=1e-12)


def test_padding_changes_nothing() -> None:
    student, teachers = encoder(2), [encoder(4, 32, 1), encoder(6, 32, 2)]
    one, other = (bound(student, teachers, padding) for padding in (0, 3))
    for name, term in one[0].terms(one[1]).items():
        assert torch.allclose(term, other[0].terms(other[1])[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("project", ["teacher", "student"])
def test_maps_and_student_move_and_teachers_do_not(project: str) -> None:
    student, teachers = encoder(2, 16), [encoder(4, 32, 1), encoder(6, 24, 2)]
    method, step = bound(student, teachers, project=project)
    method.terms(step)["hidden"].backward(retain_graph=True)
    assert all(parameter.grad.abs().sum() > 0 for parameter in method.parameters())
    assert student.model.bert.encoder.layer[1].output.dense.weight.grad.abs().sum() > 0
    before = [parameter.grad.clone() for parameter in student.parameters() if parameter.grad is not None]
    method.terms(step)["logits"].backward()
    after = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
    assert any(not torch.equal(one, other) for one, other in zip(before, after, strict=False))
    assert all(parameter.grad is None for teacher in teachers for parameter in teacher.parameters())


def test_layer_map_is_each_teachers_and_starts_above_the_embeddings() -> None:
    method, _ = bound(encoder(2), [encoder(4, 32, 1), encoder(6, 32, 2)])
    assert list(method.describe().values()) == ["1<-2, 2<-4", "1<-3, 2<-6"]
    assert bound(encoder(2), [encoder(4)], layers=[[0, 0], [2, 3]])[0].pairs == [((0, 0), (2, 3))]
    assert method.needs()[1][0] == Needs(hidden=[2, 4])


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"project": "both"}, "project"),
        ({"states": "words"}, "states"),
        ({"padding": "none"}, "padding"),
        ({"weighting": "best"}, "weighting"),
        ({"temperature": 0}, "temperature"),
        ({"loss": "l1"}, "loss"),
        ({"normalize_weights": 1}, "normalize_weights"),
        ({"layers": "every"}, "layers"),
        ({"layers": [[1, 5]]}, "layers"),
    ],
)
def test_invalid_option_is_refused_by_its_name(arguments: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError) as caught:
        bound(encoder(2), [encoder(4)], **arguments)
    assert caught.value.key == key


def test_without_a_teacher_it_is_refused() -> None:
    with pytest.raises(InputError):
        bound(encoder(2), [])


def test_batch_dependence_is_of_padding_in_token_means_alone() -> None:
    assert MTBERT(padding="reference").batch_dependence() is not None
    assert MTBERT(padding="reference", states="cls").batch_dependence() is None
    assert MTBERT().batch_dependence() is None


def test_weighted_mean_prediction_leaves_out_a_teacher_of_weight_zero() -> None:
    logits = [torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]])]
    only = TASK.ensemble(logits, torch.tensor([[0.0, 1.0]]))
    assert torch.allclose(only.exp(), logits[1].softmax(-1))
    third = TASK.ensemble(logits, torch.tensor([[1 / 3, 2 / 3]])).exp()
    assert torch.allclose(third, logits[0].softmax(-1) / 3 + 2 * logits[1].softmax(-1) / 3)
    assert torch.allclose(TASK.ensemble(logits), TASK.ensemble(logits, torch.tensor([[0.5, 0.5]])))
    scores = [torch.tensor([[2.0]]), torch.tensor([[5.0]])]
    assert torch.allclose(SCORES.ensemble(scores, torch.tensor([[0.25, 0.75]])), torch.tensor([[4.25]]))
