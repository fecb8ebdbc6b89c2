"""AT: its maps as loops over what models show, its reductions, and what is refused."""

import math

import pytest
import torch
from torch import Tensor, nn

from conftest import tiny_model
from kd.data.batch import Batch
from kd.data.tasks import Classification
from kd.errors import InputError
from kd.forward import Forward
from kd.methods.at import AT
from kd.methods.base import Bound, Progress, Step
from kd.models import Encoder, FrozenTeacher

TASK = Classification("toy", ["no", "yes"], {}, ["accuracy"], "accuracy")
LENGTHS = (6, 4, 3, 5)


def encoder(layers: int, width: int = 32, seed: int = 0) -> Encoder:
    model = tiny_model(seed, layers=layers, width=width).double()
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return Encoder(model)


def bound(student: Encoder, teacher: Encoder, padding: int = 0, **arguments: object) -> tuple[AT, Step]:
    """A method bound to two models, and a step over four sentences."""
    method, frozen = AT(**arguments), FrozenTeacher(teacher)
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


def naive(step: Step, layer: int, power: float, teacher: bool) -> list[list[float]]:
    """The map of each example over its real tokens."""
    found = []
    for example, length in enumerate(LENGTHS):
        states = shown(step, teacher)[layer][example, :length].tolist()
        values = [sum(abs(x) ** power for x in state) for state in states]
        found.append([value / math.sqrt(sum(each**2 for each in values)) for value in values])
    return found


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("width", [32, 16])
@pytest.mark.parametrize(("layers", "pairs"), [("stages", [[1, 3], [2, 6]]), ("final", [[2, 6]]), ([[0, 1]], [[0, 1]])])
def test_term_equals_equation_2_written_as_loops(layers: object, pairs: list, width: int, power: float) -> None:
    method, step = bound(encoder(2, width, seed=1), encoder(6), layers=layers, power=power)
    expected = dict.fromkeys(("norm", "squares", "elements"), 0.0)
    for ours, theirs in pairs:
        for one, other in zip(naive(step, ours, power, False), naive(step, theirs, power, True), strict=True):
            total = sum((x - y) ** 2 for x, y in zip(one, other, strict=True))
            expected["norm"] += math.sqrt(total) / 4
            expected["squares"] += total / 4
            expected["elements"] += total / len(one) / 4
    for reduction, value in expected.items():
        method.activation_reduction = reduction
        assert method.terms(step)["activation"].item() == pytest.approx(value, rel=1e-9)


def test_student_gets_gradients_and_the_teacher_none() -> None:
    student, teacher = encoder(2, seed=1), encoder(6)
    method, step = bound(student, teacher)
    method.terms(step)["activation"].backward()
    assert list(method.parameters()) == []
    assert method.describe() == {"layer map (student<-teacher)": "1<-3, 2<-6"}
    assert student.base.embeddings.word_embeddings.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_padding_changes_no_term() -> None:
    models = encoder(2, 16, seed=1).eval(), encoder(6)
    terms = [method.terms(step) for method, step in (bound(*models, padding) for padding in (0, 5))]
    for name, term in terms[0].items():
        torch.testing.assert_close(term, terms[1][name], rtol=0, atol=1e-10)


def test_soft_loss_is_the_divergence_times_temperature_squared() -> None:
    method, step = bound(encoder(2, seed=1), encoder(6), temperature=3.0)
    torch.testing.assert_close(method.terms(step)["logits"], soft(step, 3.0))
    assert method.terms(step)["task"] == TASK.hard(step.student.outputs.logits, step.batch.labels)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"layers": "all"}, "layers"),
        ({"power": 0.5}, "power"),
        ({"power": 9}, "power"),
        ({"power": "2"}, "power"),
        ({"activation_reduction": "none"}, "activation_reduction"),
        ({"temperature": 0}, "temperature"),
        ({"loss": "l1"}, "loss"),
        ({"reduction": "none"}, "reduction"),
    ],
    ids=str,
)
def test_impossible_arguments_are_refused_by_their_key(arguments: dict[str, object], key: str) -> None:
    with pytest.raises(InputError) as caught:
        AT(**arguments)
    assert caught.value.key == key


def test_maps_that_do_not_suit_the_depths_are_refused_while_binding() -> None:
    for layers, depths, message in (("stages", (4, 2), "no deeper"), ([], (2, 4), "no pair"), ([[1, 5]], (2, 4), "layer 5")):
        with pytest.raises(InputError, match=message) as caught:
            AT(layers).bind(Bound(encoder(depths[0]), [FrozenTeacher(encoder(depths[1]))], TASK))
        assert caught.value.key == "layers"
