"""PKD: the card's numbers through a step, its layer maps, and where its gradient goes."""

import pytest
import torch
from methods.two_models import LABELS, TASK, bound_to, encoder
from torch import Tensor
from torch.nn import functional as F

from kd.data.batch import Batch
from kd.errors import InputError
from kd.forward import Forward, Needs, Outputs
from kd.functional.hidden import patience
from kd.functional.logits import kl_divergence, soft_cross_entropy
from kd.methods.base import Bound, Progress, Step
from kd.methods.pkd import PKD
from kd.models import Encoder, FrozenTeacher
from kd.schedules import Linear


def bound(student: Encoder, teacher: Encoder, **arguments: object) -> tuple[PKD, Step]:
    return bound_to(student, teacher, PKD(**arguments))


def shown(method: PKD, student: Tensor, teacher: Tensor, logits: list[Tensor]) -> Step:
    """A step of one sentence whose models show these [CLS] vectors at layer 1, and these logits."""
    method.pairs = ((1, 1),)
    forwards = []
    ours, (theirs,) = method.needs()
    for states, row, needs in zip((student, teacher), logits, (ours, theirs), strict=True):
        tensors = {"cls": {1: states}}
        outputs = Outputs(row, torch.ones(1, 2).bool(), needs, tensors=tensors)
        forwards.append(Forward(lambda _, __, outputs=outputs: outputs, {}, needs))
    return Step(forwards[0], forwards[1:], Batch({}, ({},), torch.tensor([0]), torch.arange(1)), TASK, Progress())


def test_weighted_terms_are_the_numbers_of_the_card() -> None:
    method = PKD(temperature=10)
    states = torch.tensor([[3.0, 4.0]]).double(), torch.tensor([[4.0, 3.0]]).double()
    rows = [torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[2.0, 0.0]]).double()]
    terms = method.terms(shown(method, *states, rows))
    assert terms["logits"].item() == pytest.approx(0.062060, abs=1e-6)
    assert terms["task"].item() == pytest.approx(0.313262, abs=1e-6)
    assert terms["hidden"].item() == pytest.approx(0.04, abs=1e-9)
    total = 0.7 * terms["logits"] + 0.3 * terms["task"] + 100 * terms["hidden"]
    assert total.item() == pytest.approx(4.137420, abs=1e-6)


def test_without_normalisation_the_distance_is_of_raw_states() -> None:
    method = PKD(normalize=False)
    states = torch.tensor([[3.0, 4.0]]).double(), torch.tensor([[4.0, 3.0]]).double()
    assert method.terms(shown(method, *states, [torch.zeros(1, 2)] * 2))["hidden"].item() == pytest.approx(1.0)


def test_terms_equal_equations_7_and_8_written_as_loops() -> None:
    student, teacher = encoder(3, seed=1), encoder(6)
    method, step = bound(student, teacher, loss="ce", reduction="batchmean", hidden_reduction="examples", temperature=5.0)
    inputs = step.batch.student
    ours = student.model(**inputs, output_hidden_states=True)
    theirs = teacher.model(**inputs, output_hidden_states=True)
    hidden, soft, hard = 0.0, 0.0, 0.0
    for example in range(4):
        for layer in (1, 2):  # the last is left to the logits
            c, t = ours.hidden_states[layer][example, 0], theirs.hidden_states[2 * layer][example, 0]
            hidden += (((c / c.norm()) - (t / t.norm())) ** 2).sum().item()
        p = (theirs.logits[example] / 5).softmax(-1)
        soft -= sum((p[label] * (ours.logits[example] / 5).log_softmax(-1)[label]).item() for label in range(2))
        hard -= ours.logits[example].log_softmax(-1)[LABELS[example]].item() / 4
    terms = method.terms(step)
    assert terms["hidden"].item() == pytest.approx(hidden / 4, rel=1e-9)  # the paper sums over the batch, we average
    assert terms["logits"].item() == pytest.approx(soft / 4, rel=1e-9)
    assert terms["task"].item() == pytest.approx(hard, rel=1e-9)


def test_defaults_are_the_reductions_of_the_authors_code() -> None:
    student, teacher = encoder(2, seed=1), encoder(4)
    method, step = bound(student, teacher, temperature=5.0)
    s, t = step.student.outputs, step.teacher.outputs
    terms = method.terms(step)
    torch.testing.assert_close(terms["logits"], kl_divergence(s.logits, t.logits, 5.0, "elementmean"))
    total = F.kl_div((s.logits / 5).log_softmax(-1), (t.logits / 5).softmax(-1), reduction="sum")
    kl = total / (4 * 2) * 5**2  # src/KD_loss.py averages over batch and classes
    torch.testing.assert_close(terms["logits"], kl)
    ours, theirs = (F.normalize(states[:, :1], dim=2) for states in (s.cls(1)[:, None], t.cls(2)[:, None]))
    torch.testing.assert_close(terms["hidden"], F.mse_loss(ours, theirs))


@pytest.mark.parametrize(
    ("layers", "depths", "pairs"),
    [
        ("skip", (3, 6), ((1, 2), (2, 4))),
        ("last", (3, 6), ((1, 4), (2, 5))),
        ("uniform", (2, 6), ((0, 0), (1, 3), (2, 6))),
        ([[1, 4], [2, 6]], (2, 6), ((1, 4), (2, 6))),
    ],
    ids=str,
)
def test_needs_are_the_layers_of_the_map(layers: object, depths: tuple[int, int], pairs: tuple[tuple[int, int], ...]) -> None:
    method, step = bound(encoder(depths[0], seed=1), encoder(depths[1]), layers=layers)
    assert method.pairs == pairs
    ours, theirs = method.needs()
    assert ours == Needs(cls=[pair[0] for pair in pairs])
    assert theirs == [Needs(cls=[pair[1] for pair in pairs])]
    stacked = []
    for forward, which in zip((step.student, step.teacher), zip(*pairs, strict=True), strict=True):
        whole = forward.run(needs=Needs(hidden=which))
        stacked.append(torch.stack([whole.hidden(layer)[:, 0] for layer in which], 1))
    torch.testing.assert_close(method.terms(step)["hidden"], patience(*stacked))
    assert method.describe() == {"layer map (student<-teacher)": ", ".join(f"{a}<-{b}" for a, b in pairs)}


def test_a_copy_of_the_teacher_has_only_a_hard_loss() -> None:
    method, step = bound(encoder(4).eval(), encoder(4))
    terms = method.terms(step)
    assert terms["hidden"].item() == pytest.approx(0, abs=1e-12)
    assert terms["logits"].item() == pytest.approx(0, abs=1e-12)
    assert terms["task"] > 0


def test_patience_gives_the_last_layer_and_the_head_no_gradient_and_the_layers_below_some() -> None:
    student = encoder(3, seed=1)
    method, step = bound(student, encoder(6))
    method.terms(step)["hidden"].backward()
    for name, parameter in student.model.named_parameters():
        size = 0.0 if parameter.grad is None else parameter.grad.abs().sum().item()
        above = any(part in name for part in ("layer.2.", "pooler", "classifier"))
        if above:
            assert size == 0, name
        elif "key.bias" not in name:  # it shifts a row of scores, which softmax ignores
            assert size > 0, name
    assert student.base.embeddings.word_embeddings.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("scale", [0.2, 30.0])
def test_scale_of_the_teachers_states_matters_only_without_normalisation(scale: float) -> None:
    for normalize in (True, False):
        method, step = bound(encoder(2, seed=1), encoder(4), normalize=normalize)
        before = method.terms(step)["hidden"].item()
        for states in step.teacher.outputs.tensors["cls"].values():
            states *= scale
        assert (method.terms(step)["hidden"].item() == pytest.approx(before)) is normalize


@pytest.mark.parametrize(("loss", "function"), [("kl", kl_divergence), ("ce", soft_cross_entropy)])
@pytest.mark.parametrize(("done", "temperature"), [(0, 8.0), (50, 5.0)])
def test_soft_labels_follow_the_temperature_of_the_moment(loss: str, function, done: int, temperature: float) -> None:
    method, step = bound(encoder(2, seed=1), encoder(4), loss=loss, reduction="batchmean", temperature=Linear(8.0, 2.0))
    step = step.replace(progress=Progress(done, 100))
    expected = function(step.student.outputs.logits, step.teacher.outputs.logits, temperature, "batchmean")
    torch.testing.assert_close(method.terms(step)["logits"], expected)


def test_equal_widths_learn_nothing() -> None:
    assert list(bound(encoder(2), encoder(4))[0].parameters()) == []


def test_unequal_widths_learn_one_map_to_the_teachers_width() -> None:
    method, step = bound(encoder(2, width=16), encoder(4, width=32))
    assert [tuple(parameter.shape) for parameter in method.parameters()] == [(32, 16), (32,)]
    terms = method.terms(step)
    projected = F.linear(step.student.outputs.cls(1)[:, None], method.project.weight, method.project.bias)
    torch.testing.assert_close(terms["hidden"], patience(projected, step.teacher.outputs.cls(2)[:, None]))
    terms["hidden"].backward()
    assert method.project.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("layers", ["skip", "last", []], ids=str)
def test_a_map_without_pairs_is_refused(layers: object) -> None:
    with pytest.raises(InputError, match="nothing to match") as caught:
        PKD(layers).bind(Bound(encoder(1), [FrozenTeacher(encoder(4))], TASK))
    assert caught.value.key == "layers"


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"temperature": 0}, "temperature"),
        ({"loss": "l1"}, "loss"),
        ({"reduction": "none"}, "reduction"),
        ({"hidden_reduction": "mean"}, "hidden_reduction"),
        ({"hidden_reduction": "none"}, "hidden_reduction"),
    ],
    ids=str,
)
def test_impossible_arguments_are_refused_by_their_key(arguments: dict[str, object], key: str) -> None:
    with pytest.raises(InputError) as caught:
        PKD(**arguments)
    assert caught.value.key == key
