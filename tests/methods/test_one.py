"""ONE: branches that equal whole models, the ensemble's losses as formulas, the gate, and what is refused."""

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM

from conftest import tiny_config, tiny_model
from kd.config.compose import compose
from kd.data.batch import Batch
from kd.data.tasks import Classification, Regression
from kd.errors import InputError
from kd.forward import Forward
from kd.functional.ensembles import gate, gated, over_rows
from kd.functional.logits import kl_divergence
from kd.methods.base import Bound, Progress, Step
from kd.methods.one import ONE, Branch
from kd.methods.wrappers.stochastic import Stochastic
from kd.models import Encoder, FrozenTeacher
from kd.schedules import RampUp

pytestmark = pytest.mark.fast

TASK = Classification("toy", ["no", "maybe", "yes"], {}, ["accuracy"], "accuracy")
FAMILIES = ("bert", "roberta", "distilbert", "mpnet")


def encoder(layers: int = 3, seed: int = 0, outputs: int = 3, **sizes: object) -> Encoder:
    model = tiny_model(seed, layers=layers, width=16, num_labels=outputs, **sizes).double()
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return Encoder(model)


def bound(student: Encoder, padding: int = 0, **arguments: object) -> tuple[ONE, Step]:
    """A method bound to a student, whose branches have weights of their own, and a step over four sentences."""
    method = ONE(**arguments)
    method.bind(Bound(student, [], TASK))
    method.double()
    torch.manual_seed(3)
    for parameter in method.parameters():
        nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(5, 30, (4, 6), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(6) < torch.tensor([6, 4, 3, 5])[:, None]).long()
    fill = {"input_ids": student.config.pad_token_id, "attention_mask": 0}
    inputs = {"input_ids": ids * mask + (1 - mask) * fill["input_ids"], "attention_mask": mask}
    inputs = {name: nn.functional.pad(rows, (0, padding), value=fill[name]) for name, rows in inputs.items()}
    batch = Batch(inputs, (), torch.tensor([0, 2, 1, 1]), torch.arange(4))
    return method, Step(Forward(student, inputs, method.needs()[0]), [], batch, TASK, Progress())


def whole(student: Encoder, branch: Branch, shared: int) -> nn.Module:
    """A model of its own with the student's lower layers and the branch's upper ones."""
    model = copy.deepcopy(student)
    blocks = model.base.get_submodule(model.family.blocks)
    for own, block in zip(list(blocks)[shared:], branch.blocks, strict=True):
        own.load_state_dict(block.state_dict())
    names = ["pooler"] if hasattr(model.base, "pooler") and model.base.pooler is not None else []
    heads = [getattr(model.base, name) for name in names]
    heads += [module for module in model.model.children() if module is not model.base]
    for own, module in zip(heads, branch.head, strict=True):
        own.load_state_dict(module.state_dict())
    return model.model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shared", [0, 1, 3])
def test_a_branch_equals_a_whole_model_with_its_upper_layers(family: str, shared: int) -> None:
    student = encoder(model_type=family).eval()
    method, step = bound(student, shared=shared)
    before = dict(student.named_modules())
    logits = method.logits(step)
    assert dict(student.named_modules()) == before, "the student has its own modules again"
    assert len(logits) == 3
    for branch, own in zip(method.branches, logits[1:], strict=True):
        expected = whole(student, branch, shared)(**step.batch.student).logits
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(logits[0], student.model(**step.batch.student).logits)
    assert not torch.allclose(logits[1], logits[2])


def naive(method: ONE, step: Step, rows: list[list[float]]) -> dict[str, float]:
    """The terms as the formula, with scores that the gate's softmax is taken of."""
    logits = [one.detach() for one in method.logits(step)]
    labels, temperature = step.batch.labels.tolist(), method.temperature(0.0)

    def cross_entropy(z: Tensor) -> float:
        return sum(-float(z[n].log_softmax(-1)[label]) for n, label in enumerate(labels)) / len(labels)

    ensemble = torch.zeros_like(logits[0])
    for n, scores in enumerate(rows):
        exponents = [2.718281828459045 ** max(score, 0.0) for score in scores]
        for z, exponent in zip(logits, exponents, strict=True):
            ensemble[n] += exponent / sum(exponents) * z[n]
    divergence = 0.0
    for z in logits:
        for n in range(len(labels)):
            target, own = (ensemble[n] / temperature).softmax(-1), (z[n] / temperature).softmax(-1)
            divergence += temperature**2 * float((target * (target / own).log()).sum()) / len(labels)
    return {
        "task": cross_entropy(logits[0]),
        "branches": sum(map(cross_entropy, logits[1:])),
        "ensemble": cross_entropy(ensemble),
        "logits": divergence,
    }


def naive_scores(method: ONE, step: Step) -> list[list[float]]:
    """The normalised scores of the gate, row by row."""
    states = step.student.outputs.hidden(method.layer)[:, 0].tolist()
    weight = method.gate.weight.tolist()
    bias = method.gate.bias.tolist() if method.norm == "none" else [0.0] * len(weight)
    rows = [[sum(w * x for w, x in zip(row, s, strict=True)) + b for row, b in zip(weight, bias, strict=True)] for s in states]
    if method.norm == "none":
        return rows

    def normal(values: list[float]) -> list[float]:
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / len(values)
        return [(value - mean) / (variance + 1e-5) ** 0.5 for value in values]

    if method.norm == "layer":
        rows = [normal(row) for row in rows]
    else:
        rows = [list(row) for row in zip(*(normal(list(column)) for column in zip(*rows, strict=True)), strict=True)]
    return [[w * x + b for w, x, b in zip(method.weight.tolist(), row, method.bias.tolist(), strict=True)] for row in rows]


@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
@pytest.mark.parametrize("branches", [2, 3])
def test_terms_equal_the_formula_written_as_loops(norm: str, branches: int) -> None:
    method, step = bound(encoder().eval(), norm=norm, branches=branches)
    expected = naive(method, step, naive_scores(method, step))
    terms = method.terms(step)
    assert tuple(terms) == method.names
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-9), name


def test_normalisation_over_rows_is_that_of_batch_norm() -> None:
    torch.manual_seed(0)
    scores, norm = torch.randn(7, 3), nn.BatchNorm1d(3).train()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    torch.testing.assert_close(over_rows(scores, norm.weight, norm.bias), norm(scores))
    assert torch.equal(over_rows(scores[:1], norm.weight, norm.bias)[0], norm.bias)


def test_gates_of_an_example_add_up_to_one_and_negative_scores_count_alike() -> None:
    gates = gate(torch.tensor([[-5.0, -1.0, 0.0], [2.0, -1.0, 0.0]]))
    torch.testing.assert_close(gates.sum(-1), torch.ones(2))
    torch.testing.assert_close(gates[0], torch.full((3,), 1 / 3))
    assert gates[1, 1] == gates[1, 2] < gates[1, 0]


def test_equal_branches_are_their_ensemble_and_have_no_divergence() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 3).double()
    ensemble = gated([logits] * 3, gate(torch.randn(4, 3).double()))
    torch.testing.assert_close(ensemble, logits)
    assert kl_divergence(logits, ensemble, 3.0).item() == pytest.approx(0, abs=1e-12)
    method, step = bound(encoder().eval())
    student = step.student.model
    for branch in method.branches:
        branch.load_state_dict(Branch(student, method.layer, new_head=False).state_dict())
    terms = method.terms(step)
    assert terms["logits"].item() == pytest.approx(0, abs=1e-12)
    assert terms["branches"].item() == pytest.approx(2 * terms["task"].item())
    assert terms["ensemble"].item() == pytest.approx(terms["task"].item())


def test_weight_of_the_divergence_ramps_up_as_published() -> None:
    ramp = RampUp(end=1.0, until=80 / 300)
    assert [ramp(epoch / 300) for epoch in (0, 40, 80, 300)] == pytest.approx([0.006738, 0.286505, 1, 1], abs=1e-6)
    weights = compose(["method=one"]).method.weights
    assert weights.logits == {"_target_": "kd.schedules.RampUp", "end": 1.0, "until": 0.2667}


def test_ensemble_is_a_constant_in_the_divergence() -> None:
    method, step = bound(encoder())
    terms = method.terms(step)
    gates = [method.gate.weight, method.weight, method.bias]
    assert all(g is None for g in torch.autograd.grad(terms["logits"], gates, retain_graph=True, allow_unused=True))
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(terms["ensemble"], gates, retain_graph=True))
    assert all(
        g is None for g in torch.autograd.grad(terms["task"], list(method.parameters()), retain_graph=True, allow_unused=True)
    )
    logits = method.logits(step)
    target = gated(logits, gate(method.scores(step))).detach()
    expected = sum(kl_divergence(one, target, 3.0) for one in logits)
    upper = list(method.branches[0].parameters())
    for own, other in zip(
        torch.autograd.grad(terms["logits"], upper, retain_graph=True), torch.autograd.grad(expected, upper), strict=True
    ):
        torch.testing.assert_close(own, other)


def test_every_branch_trains_the_shared_layers_and_no_other_branch() -> None:
    student = encoder()
    method, step = bound(student, shared=2)
    loss = step.task.hard(method.logits(step)[1], step.batch.labels)
    loss.backward()
    blocks = student.base.encoder.layer
    assert all(parameter.grad is not None for block in blocks[:2] for parameter in block.parameters())
    assert all(parameter.grad is None for parameter in blocks[2].parameters())
    assert student.model.classifier.weight.grad is None
    assert student.base.embeddings.word_embeddings.weight.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in method.branches[0].parameters())
    assert all(parameter.grad is None for parameter in method.branches[1].parameters())


def test_branches_hold_copies_of_the_upper_layers_alone() -> None:
    student = encoder()
    names = set(student.state_dict())
    method = ONE()
    torch.manual_seed(0)
    method.bind(Bound(student, [], TASK))
    assert method.layer == 2
    own = set(student.parameters())
    assert own.isdisjoint(method.parameters())
    assert set(student.state_dict()) == names
    upper = sum(p.numel() for p in student.base.encoder.layer[2].parameters())
    head = sum(p.numel() for module in (student.base.pooler, student.model.classifier) for p in module.parameters())
    assert sum(p.numel() for p in method.branches.parameters()) == 2 * (upper + head)
    one, other = method.branches
    block = student.base.encoder.layer[2].state_dict()
    assert all(torch.equal(block[name], tensor) for name, tensor in one.blocks[0].state_dict().items())
    assert torch.equal(one.head[2].bias, student.model.classifier.bias)
    assert not torch.equal(one.head[2].weight, student.model.classifier.weight)
    assert not torch.equal(one.head[2].weight, other.head[2].weight)
    copied = Branch(student, 2, new_head=False)
    assert torch.equal(copied.head[2].weight, student.model.classifier.weight)


def test_an_error_in_a_branch_gives_the_student_its_modules_back() -> None:
    student = encoder()
    method, step = bound(student)
    before = dict(student.named_modules())
    with pytest.raises(RuntimeError, match="stop"), method.branches[0].inside(student):
        raise RuntimeError("stop")
    assert dict(student.named_modules()) == before
    assert step.student.model.model.classifier is before["model.classifier"]


def test_dropout_differs_between_branches() -> None:
    student = encoder(hidden_dropout_prob=0.5).train()
    method, step = bound(student, heads="copied")
    for branch in method.branches:
        branch.load_state_dict(Branch(student, method.layer, new_head=False).state_dict())
    one, other, _ = method.logits(step)
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_padding_and_other_examples_change_no_term(norm: str) -> None:
    student = encoder().eval()
    one, other = (method.terms(step) for method, step in (bound(student, padding, norm=norm) for padding in (0, 4)))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-12)
    assert ONE(norm=norm).batch_dependence() is None
    assert ONE(norm=norm).label_dependence() is None


def test_normalisation_over_a_batch_says_so_and_joins_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    method, step = bound(encoder().eval(), norm="batch")
    assert method.across_ranks
    assert "examples of a batch" in str(method.batch_dependence())
    assert "labels of all ranks" in str(method.label_dependence())
    whole = method.terms(step)
    given: list[tuple[int, ...]] = []

    def across(_: Step, rows: Tensor) -> Tensor:
        given.append(tuple(rows.shape))
        return torch.cat([rows, rows])

    monkeypatch.setattr(Step, "across", across)
    doubled = method.terms(step)
    assert sorted(given) == [(4,), (4, 3), (4, 3), (4, 3), (4, 3)]  # labels, scores, and the logits of each branch
    for name in whole:
        torch.testing.assert_close(whole[name], doubled[name])


def test_scores_of_a_regression_are_averaged() -> None:
    student = encoder(outputs=1)
    method, step = bound(student)
    step = step.replace(task=Regression("scores", ["mse"], "mse"))
    logits, gates = method.logits(step), gate(method.scores(step))
    ensemble = sum(g[:, None] * z for g, z in zip(gates.unbind(1), logits, strict=True))
    terms = method.terms(step)
    torch.testing.assert_close(terms["ensemble"], ((ensemble[:, 0] - step.batch.labels) ** 2).mean())
    torch.testing.assert_close(terms["logits"], sum(((z - ensemble) ** 2).mean() for z in logits))


@pytest.mark.parametrize(("depth", "layer"), [(1, 0), (2, 1), (3, 2), (6, 4), (12, 8)])
def test_two_thirds_of_the_layers_are_shared(depth: int, layer: int) -> None:
    method = ONE()
    method.bind(Bound(encoder(depth), [], TASK))
    assert method.layer == layer
    (text,) = method.describe().values()
    assert ("the embeddings;" in text) == (layer == 0)
    assert "the first is the student" in text


def test_a_teacher_gives_shape_alone() -> None:
    method = ONE()
    method.bind(Bound(encoder(), [FrozenTeacher(encoder(4))], TASK))
    assert len(method.needs()[1]) == 1
    assert not method.uses_teachers


def test_a_pool_is_refused() -> None:
    with pytest.raises(InputError, match="pool=none") as caught:
        Stochastic(ONE(), [0.5, 0.5])
    assert caught.value.key == "pool"


def test_a_masked_language_model_is_refused() -> None:
    model = Encoder(AutoModelForMaskedLM.from_config(tiny_config()))
    with pytest.raises(InputError, match="method=finetune") as caught:
        ONE().bind(Bound(model, [], TASK))
    assert caught.value.key == "method"


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"branches": 1}, "branches"),
        ({"branches": 65}, "branches"),
        ({"shared": -1}, "shared"),
        ({"shared": 1.5}, "shared"),
        ({"heads": "old"}, "heads"),
        ({"norm": "instance"}, "norm"),
        ({"temperature": 0}, "temperature"),
        ({"loss": "l1"}, "loss"),
        ({"reduction": "none"}, "reduction"),
    ],
    ids=str,
)
def test_impossible_arguments_are_refused_by_their_key(arguments: Mapping[str, object], key: str) -> None:
    with pytest.raises(InputError) as caught:
        ONE(**arguments)
    assert caught.value.key == key


def test_more_shared_layers_than_there_are_are_refused() -> None:
    with pytest.raises(InputError, match="more than the student's 3 layers") as caught:
        ONE(shared=4).bind(Bound(encoder(), [], TASK))
    assert caught.value.key == "shared"
