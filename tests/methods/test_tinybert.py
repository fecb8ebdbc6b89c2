"""TinyBERT: the card's checks, the terms as loops over what the models themselves show, its layer maps and its draws."""

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import tiny_model
from kd.data.batch import Batch
from kd.data.tasks import Classification
from kd.errors import InputError
from kd.forward import Forward, Needs, Outputs
from kd.functional.logits import soft_cross_entropy
from kd.methods.base import Bound, Progress, Step, freeze_above
from kd.methods.tinybert import TinyBERT
from kd.models import Encoder, FrozenTeacher

TASK = Classification("toy", ["no", "yes"], {}, ["accuracy"], "accuracy")
LENGTHS, TOKENS, HEADS, LAYERS = (5, 3), 5, 2, 6
MASK = torch.arange(TOKENS) < torch.tensor(LENGTHS)[:, None]
MAPS = {
    "uniform": {1: [3], 2: [6]},
    "top": {1: [5], 2: [6]},
    "bottom": {1: [1], 2: [2]},
    "mean": {1: [1, 2, 3], 2: [4, 5, 6]},
    "pairs": {1: [4], 2: [5]},
}
"""Student layer -> teacher layers, of two and six."""


def encoder(layers: int, width: int = 8, seed: int = 0, heads: int = HEADS, **more: Any) -> Encoder:
    model = tiny_model(seed, layers=layers, width=width, heads=heads, **more).double()
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return Encoder(model)


@pytest.fixture(scope="module")
def teacher() -> FrozenTeacher:
    return FrozenTeacher(encoder(LAYERS))


@pytest.fixture
def student() -> Encoder:
    return encoder(2, seed=1)


@pytest.fixture
def narrow() -> Encoder:
    return encoder(2, width=4, seed=1)


def bound(student: Encoder, teacher: FrozenTeacher, **arguments: Any) -> tuple[TinyBERT, Step]:
    """A method bound to two models, and a step over two sentences of which one is padded."""
    method = TinyBERT(**arguments)
    method.bind(Bound(student, [teacher], TASK))
    method.double()
    ids = torch.randint(5, 30, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": torch.where(MASK, ids, 0), "attention_mask": MASK.long()}
    ours, (theirs,) = method.needs()
    batch = Batch(inputs, (inputs,), torch.tensor([0, 1]), torch.arange(2))
    return method, Step(Forward(student, inputs, ours), [Forward(teacher, inputs, theirs)], batch, TASK, Progress())


# -- the paper as loops ------------------------------------------------------------------------------------------------


class Shown:
    """Hidden states and attention probabilities as Transformers returns them, and scores computed from weights, as lists."""

    def __init__(self, encoder: Encoder, inputs: dict[str, Tensor]) -> None:
        model = copy.deepcopy(encoder.model).eval()
        model.set_attn_implementation("eager")
        with torch.no_grad():
            found = model(**inputs, output_hidden_states=True, output_attentions=True)
            self.hidden = [states.tolist() for states in found.hidden_states]
            self.probabilities = [[], *(rows.tolist() for rows in found.attentions)]
            self.scores: list[Any] = [[]]
            for block, states in zip(model.bert.encoder.layer, found.hidden_states, strict=False):
                own = block.attention.self
                self.scores.append(dots(own.query(states).tolist(), own.key(states).tolist()))


def dots(queries: list, keys: list) -> list:
    """Example -> head -> query -> key -> q k / sqrt(head width)."""
    size = len(queries[0][0]) // HEADS

    def score(item: int, head: int, q: int, k: int) -> float:
        part = range(head * size, (head + 1) * size)
        return sum(queries[item][q][w] * keys[item][k][w] for w in part) / math.sqrt(size)

    every = range(TOKENS)
    return [[[[score(n, h, q, k) for k in every] for q in every] for h in range(HEADS)] for n in range(len(LENGTHS))]


def average(values: list) -> Any:
    """Elementwise, of nested lists of one shape."""
    if isinstance(values[0], list):
        return [average(list(parts)) for parts in zip(*values, strict=True)]
    return sum(values) / len(values)


def naive_attention(ours: Any, theirs: Any, target: str, padding: str) -> float:
    """One layer of eq. 7, or of what stands in its place. `kl` takes probabilities."""
    found = []
    for item, length in enumerate(LENGTHS):
        queries = length if padding == "strict" else TOKENS
        values = []
        for head in range(HEADS):
            for query in range(queries):
                s, t = (side[item][head][query] for side in (ours, theirs))
                if target in ("forward", "reverse"):
                    p, q = (t, s) if target == "forward" else (s, t)
                    values.append(sum(p[key] * math.log(p[key] / q[key]) for key in range(length)))
                else:  # the authors' code keeps padded keys in the mean, with nothing in them
                    squares = [(s[key] - t[key]) ** 2 for key in range(length)]
                    values.append(sum(squares) / (length if padding == "strict" else TOKENS))
        found.append(sum(values) / len(values))
    return sum(found) / len(found)


def naive_hidden(ours: Any, theirs: Any, linear: nn.Linear, padding: str) -> float:
    """Eq. 8 or 9 of one layer."""
    weight, bias, found = linear.weight.tolist(), linear.bias.tolist(), []
    for item, length in enumerate(LENGTHS):
        squares = []
        for token in range(length if padding == "strict" else TOKENS):
            state = ours[item][token]
            for row, shift, target in zip(weight, bias, theirs[item][token], strict=True):
                squares.append((sum(w * x for w, x in zip(row, state, strict=True)) + shift - target) ** 2)
        found.append(sum(squares) / len(squares))
    return sum(found) / len(found)


@pytest.mark.parametrize("padding", ["strict", "reference"])
@pytest.mark.parametrize("target", ["scores", "probabilities", "forward", "reverse"])
@pytest.mark.parametrize("layers", MAPS)
def test_attention_equals_equation_7_written_as_loops(
    narrow: Encoder, teacher: FrozenTeacher, layers: str, target: str, padding: str
) -> None:
    divergence = target in ("forward", "reverse")
    options = {"attention": "kl", "direction": target} if divergence else {"attention": target}
    given = [[1, 4], [2, 5]] if layers == "pairs" else layers
    method, step = bound(narrow, teacher, layers=given, padding=padding, **options)
    inputs = step.batch.student
    kind = "scores" if target == "scores" else "probabilities"
    ours, theirs = (getattr(Shown(each, inputs), kind) for each in (narrow, teacher.encoder))
    expected = sum(
        naive_attention(ours[layer], average([theirs[other] for other in block]), target, padding)
        for layer, block in MAPS[layers].items()
    )
    assert method.terms(step)["attention"].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("padding", ["strict", "reference"])
@pytest.mark.parametrize("project", ["shared", "paper", "layer"])
@pytest.mark.parametrize("layers", ["uniform", "mean", "pairs"])
def test_hidden_and_embedding_equal_equations_8_and_9_written_as_loops(
    narrow: Encoder, teacher: FrozenTeacher, layers: str, project: str, padding: str
) -> None:
    given = [[1, 4], [2, 5]] if layers == "pairs" else layers
    method, step = bound(narrow, teacher, layers=given, padding=padding, project=project)
    ours, theirs = (Shown(each, step.batch.student).hidden for each in (narrow, teacher.encoder))
    names = {"shared": ["all"] * 3, "paper": ["embedding", "layers", "layers"], "layer": ["0", "1", "2"]}[project]
    assert sorted(method.projections) == sorted(set(names))
    maps = [method.projections[name] for name in names]
    terms = method.terms(step)
    assert terms["embedding"].item() == pytest.approx(naive_hidden(ours[0], theirs[0], maps[0], padding), rel=1e-9)
    expected = sum(
        naive_hidden(ours[layer], average([theirs[other] for other in block]), maps[layer], padding)
        for layer, block in MAPS[layers].items()
    )
    assert terms["hidden"].item() == pytest.approx(expected, rel=1e-9)


# -- the card ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["strict", "reference"])
@pytest.mark.parametrize("attention", ["scores", "probabilities", "kl"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_copy_of_the_teacher_has_no_loss_and_no_gradient(
    teacher: FrozenTeacher, attention: str, direction: str, padding: str
) -> None:
    method, step = bound(encoder(LAYERS), teacher, attention=attention, direction=direction, padding=padding)
    terms = method.terms(step)
    assert all(term.item() == pytest.approx(0, abs=1e-12) for term in terms.values())
    sum(terms.values()).backward()
    assert all(p.grad.abs().max() < 1e-9 for p in step.student.model.parameters() if p.grad is not None)


def test_prediction_stage_at_the_teacher_is_its_entropy_over_the_classes_with_no_gradient() -> None:
    logits = torch.tensor([[0.7, 0.7]], dtype=torch.float64, requires_grad=True)
    loss = soft_cross_entropy(logits, logits.detach(), 1.0, "elementmean")
    loss.backward()
    assert loss.item() == pytest.approx(0.346574, abs=1e-6)
    assert logits.grad.abs().max() < 1e-12


def shown(method: TinyBERT, student: Tensor, teacher: Tensor, mask: Tensor) -> Step:
    """A step of one sentence, whose models have one head and these attention scores at layer 1, and no states to speak of."""
    outputs = []
    ours, (theirs,) = method.needs()
    for scores, needs in ((student, ours), (teacher, theirs)):
        tokens = mask.shape[1]
        query, key = scores * math.sqrt(tokens), torch.eye(tokens)[None]  # whose scaled products are the scores
        states = {"query": query, "key": key, "hidden": torch.zeros(1, tokens, 1)}
        tensors = {kind: dict.fromkeys(range(2), tensor.double()) for kind, tensor in states.items()}
        outputs.append(Outputs(torch.zeros(1, 2), mask, needs, heads=1, tensors=tensors))
    forwards = [Forward(lambda _, __, found=found: found, {}, found.needs) for found in outputs]
    return Step(forwards[0], forwards[1:], Batch({}, ({},), torch.tensor([0]), torch.arange(1)), TASK, Progress())


def single(**arguments: Any) -> TinyBERT:
    """Bound to one layer and one of one head."""
    method = TinyBERT(**arguments)
    method.bind(Bound(encoder(1, width=1, heads=1), [FrozenTeacher(encoder(1, width=1, heads=1))], TASK))
    return method.double()


@pytest.mark.parametrize(("padding", "expected"), [("reference", 1.25), ("strict", 1.0)])
def test_attention_of_the_card_with_a_padded_key(padding: str, expected: float) -> None:
    method = single(padding=padding)
    ours, theirs = torch.tensor([[[1.0, -1e4], [3.0, -1e4]]]), torch.tensor([[[0.0, -1e4], [1.0, -1e4]]])
    found = method.terms(shown(method, ours, theirs, torch.tensor([[True, False]])))
    assert found["attention"].item() == pytest.approx(expected, abs=1e-6)


def test_divergence_of_the_card_and_its_blindness_to_a_constant_on_a_row() -> None:
    ours, theirs = torch.zeros(1, 2, 2), torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    whole = torch.ones(1, 2).bool()
    method = single(attention="kl")
    assert method.terms(shown(method, ours, theirs, whole))["attention"].item() == pytest.approx(0.055472, abs=1e-6)
    twice = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    assert method.terms(shown(method, ours, twice, whole))["attention"].item() == pytest.approx(0.110944, abs=1e-6)
    moved = ours + 3.0
    assert method.terms(shown(method, moved, theirs, whole))["attention"].item() == pytest.approx(0.055472, abs=1e-6)
    plain = single()
    before, after = (plain.terms(shown(plain, each, theirs, whole))["attention"].item() for each in (ours, moved))
    assert (before, after) == pytest.approx((1 / 4, (4 + 9 * 3) / 4))


@pytest.mark.parametrize(
    ("layers", "depths", "expected"),
    [
        ("uniform", (4, 12), [3, 6, 9, 12]),  # counted from 0: attention 2, 5, 8, 11; hidden 0, 3, 6, 9, 12
        ("uniform", (6, 12), [2, 4, 6, 8, 10, 12]),
        ("top", (4, 12), [9, 10, 11, 12]),
        ("bottom", (4, 12), [1, 2, 3, 4]),
        ([[1, 2], [4, 12]], (4, 12), [2, 12]),
    ],
    ids=str,
)
def test_maps_are_the_cards_and_nothing_else_is_asked_for(layers: Any, depths: tuple[int, int], expected: list[int]) -> None:
    student, teacher = encoder(depths[0], width=4), FrozenTeacher(encoder(depths[1], width=4))
    method, step = bound(student, teacher, layers=layers)
    ours = [1, 4] if isinstance(layers, list) else list(range(1, depths[0] + 1))
    assert method.map_at(step.progress) == tuple((layer, (other,)) for layer, other in zip(ours, expected, strict=True))
    assert method.needs() == (
        Needs(hidden=[0, *ours], attention=ours),
        [Needs(hidden=[0, *expected], attention=expected)],
    )
    pairs = ", ".join(f"{layer}<-{other}" for layer, other in zip(ours, expected, strict=True))
    assert method.describe() == {"layer map (student<-teacher)": f"0<-0, {pairs}"}


def test_mean_map_meets_every_block(teacher: FrozenTeacher, student: Encoder) -> None:
    method, step = bound(student, teacher, layers="mean")
    assert method.map_at(step.progress) == ((1, (1, 2, 3)), (2, (4, 5, 6)))
    every = range(1, LAYERS + 1)
    assert method.needs()[1] == [Needs(hidden=[0, *every], attention=every)]
    assert method.describe() == {"layer map (student<-teacher)": "0<-0, 1<-1+2+3, 2<-4+5+6"}


@pytest.mark.parametrize("attention", ["scores", "probabilities", "kl"])
def test_mean_map_of_a_teacher_whose_layers_are_alike_is_the_uniform_map(
    narrow: Encoder, teacher: FrozenTeacher, attention: str
) -> None:
    found = []
    for layers in ("uniform", "mean"):
        torch.manual_seed(0)
        method, step = bound(narrow, teacher, layers=layers, attention=attention)
        tensors = step.teacher.outputs.tensors
        for kind in ("hidden", "query", "key"):
            tensors[kind].update({layer: tensors[kind][LAYERS] for layer in tensors[kind] if layer})
        found.append(method.terms(step))
    for name in found[0]:
        assert found[1][name].item() == pytest.approx(found[0][name].item(), rel=1e-12), name


def test_mean_map_of_constant_layers_has_the_cards_targets() -> None:
    method, step = bound(encoder(4, width=4, heads=1), FrozenTeacher(encoder(12, width=4, heads=1)), layers="mean")
    for layer, states in step.student.outputs.tensors["hidden"].items():
        states.data.fill_(0.0 if layer == 0 else 3.0 * layer - 1)
    for layer, states in step.teacher.outputs.tensors["hidden"].items():
        states.data.fill_(float(layer))
    terms = method.terms(step)  # the projection begins as the identity: student layers 2, 5, 8, 11 are at their targets
    assert (terms["hidden"].item(), terms["embedding"].item()) == pytest.approx((0.0, 0.0), abs=1e-12)


# -- what is trained ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["scores", "probabilities", "kl"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_every_trained_parameter_gets_a_finite_gradient_and_the_head_is_left_alone(
    narrow: Encoder, teacher: FrozenTeacher, attention: str, direction: str
) -> None:
    method, step = bound(narrow, teacher, attention=attention, direction=direction)
    sum(method.terms(step).values()).backward()
    for name, parameter in [*narrow.model.named_parameters(), *method.named_parameters()]:
        above = any(part in name for part in ("pooler", "classifier"))
        assert parameter.requires_grad is not above, name
        assert (parameter.grad is None) is above, name
        assert above or parameter.grad.isfinite().all(), name
    assert all(parameter.grad is None for parameter in teacher.encoder.parameters())
    assert narrow.base.embeddings.word_embeddings.weight.grad.abs().sum() > 0
    assert narrow.base.encoder.layer[1].attention.self.query.weight.grad.abs().sum() > 0


def test_blocks_above_the_map_are_left_alone(teacher: FrozenTeacher) -> None:
    student = encoder(4, seed=1)
    bound(student, teacher, layers=[[2, 6], [1, 3]])
    trained = {name.split(".")[2] for name, p in student.base.named_parameters() if "layer." in name and p.requires_grad}
    assert trained == {"0", "1"}
    method, _ = bound(student, teacher, layers=[[2, 6]], project="layer")
    assert sorted(method.projections) == ["0", "2"]  # one that nothing uses would get no gradient


@pytest.mark.parametrize("family", ["roberta", "distilbert", "mpnet"])
def test_heads_of_other_families_are_left_alone(family: str, teacher: FrozenTeacher) -> None:
    other = FrozenTeacher(encoder(4, model_type=family))
    student = encoder(2, seed=1, model_type=family)
    method, step = bound(student, other)
    sum(method.terms(step).values()).backward()
    for name, parameter in student.model.named_parameters():
        assert parameter.requires_grad is (parameter.grad is not None), name
        assert parameter.requires_grad is (not any(word in name for word in ("classifier", "pooler"))), name


def test_what_the_head_shares_with_the_embeddings_is_trained() -> None:
    from transformers import BertForMaskedLM

    student = encoder(2)
    model = Encoder(BertForMaskedLM(student.config))
    model.model.tie_weights()
    freeze_above(model, 2)
    assert model.base.embeddings.word_embeddings.weight.requires_grad
    assert not model.model.cls.predictions.transform.dense.weight.requires_grad


def test_a_block_that_also_lies_below_is_trained() -> None:
    student = encoder(2)
    student.base.encoder.layer[1] = student.base.encoder.layer[0]
    freeze_above(student, 1)
    assert all(parameter.requires_grad for parameter in student.base.encoder.parameters())


def test_projection_is_of_the_students_width_by_the_teachers(narrow: Encoder, teacher: FrozenTeacher, student: Encoder) -> None:
    for project, count in (("shared", 1), ("paper", 2), ("layer", 3)):
        method, _ = bound(narrow, teacher, project=project)
        assert [tuple(p.shape) for p in method.parameters()] == [(8, 4), (8,)] * count
    method, _ = bound(student, teacher)
    (own,) = method.projections.values()
    assert torch.equal(own.weight, torch.eye(8).double())


@pytest.mark.parametrize("attention", ["scores", "probabilities", "kl"])
def test_strict_terms_do_not_depend_on_the_other_examples_and_only_reference_says_it_does(
    narrow: Encoder, teacher: FrozenTeacher, attention: str
) -> None:
    for padding in ("strict", "reference"):
        method, step = bound(narrow, teacher, attention=attention, padding=padding)
        whole, parts = method.terms(step), []
        for row, length in enumerate(LENGTHS):
            inputs = {name: tensor[[row], :length] for name, tensor in step.batch.student.items()}
            ours, theirs = (Forward(each.model, inputs, each.needs) for each in (step.student, step.teacher))
            parts.append(method.terms(step.replace(student=ours, teachers=[theirs])))
        for name, term in whole.items():
            apart = sum(part[name].item() for part in parts) / len(parts)
            assert (term.item() == pytest.approx(apart, rel=1e-9)) is (padding == "strict"), name
        assert (method.batch_dependence() is not None) is (padding == "reference")


def test_bf16_autocast_is_finite(narrow: Encoder, teacher: FrozenTeacher) -> None:
    ours, theirs = copy.deepcopy(narrow).float(), FrozenTeacher(copy.deepcopy(teacher.encoder).float())
    for parameter in [*ours.parameters(), *theirs.encoder.parameters()]:
        parameter.data *= 4  # sharp attention
    for attention in ("scores", "probabilities", "kl"):
        for layers in ("uniform", "mean"):
            method, step = bound(ours, theirs, attention=attention, layers=layers, direction="reverse")
            method.float()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                terms = method.terms(step)
            assert all(term.isfinite() and term.dtype == torch.float32 for term in terms.values())
            sum(terms.values()).backward()
            assert all(p.grad.isfinite().all() for p in ours.parameters() if p.grad is not None)


# -- the random map ----------------------------------------------------------------------------------------------------


def draws(method: TinyBERT) -> list[Any]:
    return [method.map_at(Progress(step, 100, step // 4)) for step in range(12)]


@pytest.mark.parametrize(("redraw", "different"), [("run", 1), ("epoch", 3), ("step", 12)])
def test_random_map_is_drawn_as_often_as_asked_in_range_and_in_order(redraw: str, different: int) -> None:
    student, teacher = encoder(4, width=4), FrozenTeacher(encoder(12, width=4))
    method, step = bound(student, teacher, layers="random", redraw=redraw, draw_seed=3)
    found = draws(method)
    for blocks in found:
        layers = [layer for _, (layer,) in blocks]
        assert [ours for ours, _ in blocks] == [1, 2, 3, 4]
        assert layers == sorted(set(layers))
        assert set(layers) <= set(range(1, 13))
    assert different - 1 <= len(set(found)) <= different  # of 495 maps, two may be equal
    changes = [one != other for one, other in itertools.pairwise(found)]
    assert sum(changes) >= different - 2
    if redraw == "epoch":
        assert all(not change for place, change in enumerate(changes) if place % 4 != 3)
    again, _ = bound(student, teacher, layers="random", redraw=redraw, draw_seed=3)  # another rank, or a resumed run
    assert draws(again) == found
    other, _ = bound(student, teacher, layers="random", redraw=redraw, draw_seed=4)
    assert draws(other) != found
    theirs = [layer for _, (layer,) in found[0]] if redraw == "run" else range(1, 13)
    assert method.needs() == (
        Needs(hidden=range(5), attention=range(1, 5)),
        [Needs(hidden=[0, *theirs], attention=theirs)],
    )
    for done in (0, 5, 11):  # whatever is drawn has been declared
        terms = method.terms(step.replace(progress=Progress(done, 100, done // 4)))
        assert all(term.isfinite() for term in terms.values())
    said = method.describe()
    assert said["layer map (student<-teacher)"] == "0<-0, " + ", ".join(f"{ours}<-{layer}" for ours, (layer,) in found[0])
    assert said["layer map is drawn"].endswith("; draw_seed=3")
    assert ("once" in said["layer map is drawn"]) is (redraw == "run")


@pytest.mark.parametrize("redraw", ["run", "epoch", "step"])
def test_map_of_layers_is_the_mean_of_those_drawn_in_an_epoch(redraw: str) -> None:
    student, teacher = encoder(2, width=4), FrozenTeacher(encoder(6, width=4))
    method, step = bound(student, teacher, layers="random", redraw=redraw, draw_seed=3)
    of_epochs: dict[int, list[Any]] = {}
    for done in range(8):
        progress = Progress(done, 8, done // 4)
        method.after_step(step.replace(progress=progress), {})
        of_epochs.setdefault(progress.epoch, []).append(method.map_at(progress))
    expected = torch.zeros(3, 7)
    for blocks in of_epochs[1]:
        for ours, (theirs,) in blocks:
            expected[ours, theirs] += 1 / 4
    (maps,) = method.layer_maps()
    torch.testing.assert_close(maps["attention"].float(), expected)
    expected[0, 0] = 1
    torch.testing.assert_close(maps["hidden"].float(), expected)


def test_terms_of_a_random_map_are_those_of_its_pairs(narrow: Encoder, teacher: FrozenTeacher) -> None:
    for done in range(4):
        torch.manual_seed(0)
        method, step = bound(narrow, teacher, layers="random", redraw="step")
        step = step.replace(progress=Progress(done, 10))
        pairs = [[ours, theirs] for ours, (theirs,) in method.map_at(step.progress)]
        torch.manual_seed(0)
        given, same = bound(narrow, teacher, layers=pairs)
        assert method.terms(step) == given.terms(same)


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"layers": "unifrom"}, "layers"),
        ({"layers": "skip"}, "layers"),
        ({"teacher_dropout": 0.1}, "teacher_dropout"),
        ({"redraw": "batch"}, "redraw"),
        ({"draw_seed": -1}, "draw_seed"),
        ({"draw_seed": None}, "draw_seed"),
        ({"attention": "mse"}, "attention"),
        ({"direction": "both"}, "direction"),
        ({"padding": "ignore"}, "padding"),
        ({"project": "none"}, "project"),
    ],
    ids=str,
)
def test_impossible_arguments_are_refused_by_their_key(arguments: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError) as caught:
        TinyBERT(**arguments)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("layers", "depths", "message"),
    [
        ("uniform", (5, 12), "5 layers does not divide its teacher's 12"),
        ("mean", (5, 12), "5 layers does not divide its teacher's 12"),
        ("uniform", (4, 2), "no deeper than its teacher, got 4 and 2"),
        ("top", (4, 2), "no deeper than its teacher, got 4 and 2"),
        ("bottom", (4, 2), "no deeper than its teacher, got 4 and 2"),
        ("random", (4, 2), "no deeper than its teacher, got 4 and 2"),
        ([], (2, 4), "must list pairs"),
        ([[0, 0], [1, 2]], (2, 4), "embeddings meet embeddings"),
        ([[1, 0]], (2, 4), "layers from 1"),
        ([[1, 5]], (2, 4), "asks for layer 5 of the teacher"),
        ([1, 2], (2, 4), "not a pair"),
        (None, (2, 4), "pair"),
    ],
    ids=str,
)
def test_maps_that_the_depths_do_not_allow_are_refused(layers: Any, depths: tuple[int, int], message: str) -> None:
    student, teacher = (encoder(depth, width=4) for depth in depths)
    with pytest.raises(InputError, match=message) as caught:
        TinyBERT(layers=layers).bind(Bound(student, [FrozenTeacher(teacher)], TASK))
    assert caught.value.key == "layers"


@pytest.mark.parametrize(("width", "cure"), [(8, "set student.heads=4"), (6, "set student.heads=4 and student.width to")])
def test_heads_that_differ_are_refused_with_the_number_to_set(width: int, cure: str) -> None:
    student, teacher = encoder(1, width=width, heads=2), FrozenTeacher(encoder(2, width=8, heads=4), "big")
    with pytest.raises(InputError, match=f"the student has 2 heads, the teacher 4; {cure}") as caught:
        TinyBERT().bind(Bound(student, [teacher], TASK))
    assert caught.value.key == "student.heads"
    assert ("multiple" in caught.value.message) is (width == 6)
