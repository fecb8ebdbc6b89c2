"""MLKD-BERT: the paper's terms as loops over the models' own tensors, worked numbers, ablations and refusals."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import tiny_model
from kd.data.batch import Batch
from kd.data.masked_lm.task import MaskedLM
from kd.data.tasks import Classification, Regression, Task
from kd.errors import InputError
from kd.forward import Forward, Needs
from kd.functional.relations import context, relation_divergence, scaled_products, similarity_divergence, supervised_contrast
from kd.methods.base import Bound, Progress, Step
from kd.methods.mlkd_bert import MLKDBERT, PREDICTION, REPRESENTATION, divisors, normalized
from kd.models import Encoder, FrozenTeacher

TASK = Classification("toy", ["no", "maybe", "yes"], {}, ["accuracy"], "accuracy")
SCORES = Regression("toy scores", ["mse"], "mse")
LENGTHS, TOKENS = (5, 3, 4), 5
MASK = torch.arange(TOKENS) < torch.tensor(LENGTHS)[:, None]
LABELS = torch.tensor([2, 0, 2])
EVERY = {"strict": lambda example: range(LENGTHS[example]), "reference": lambda _: range(TOKENS)}


def encoder(layers: int, width: int = 8, seed: int = 0, heads: int = 4, outputs: int = 3, **more: Any) -> Encoder:
    model = tiny_model(seed, layers=layers, width=width, heads=heads, num_labels=outputs, **more).double()
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return Encoder(model)


def bound(
    student: Encoder, teacher: Encoder, padding_tokens: int = 0, task: Task = TASK, **options: Any
) -> tuple[MLKDBERT, Step]:
    """A method bound to two models, with maps that are not the identity, and a step over three sentences."""
    method, frozen = MLKDBERT(**options), FrozenTeacher(teacher)
    method.bind(Bound(student, [frozen], task))
    method.double()
    torch.manual_seed(5)
    for parameter in method.parameters():
        nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(5, 20, (3, TOKENS), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": torch.where(MASK, ids, 0), "attention_mask": MASK.long()}
    inputs = {
        name: nn.functional.pad(rows, (0, padding_tokens), value=7 if name == "input_ids" else 0)
        for name, rows in inputs.items()
    }
    ours, (theirs,) = method.needs()
    labels = LABELS if task is TASK else torch.tensor([0.5, 0.1, 0.5]).double()
    batch = Batch(inputs, (inputs,), labels, torch.arange(3))
    return method, Step(Forward(student, inputs, ours), [Forward(frozen, inputs, theirs)], batch, task, Progress())


def represented(student: Encoder, teacher: Encoder, padding_tokens: int = 0, **options: Any) -> tuple[MLKDBERT, Step]:
    return bound(student, teacher, padding_tokens, stage="representation", **options)


# -- the paper as loops ------------------------------------------------------------------------------------------------


def shown(encoder: Encoder, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Words, states, projections of a BERT by hooks of this test, and the input of each attention's output layer."""
    found: dict[str, Any] = {"context": [None], "query": [None], "key": [None], "value": [None]}
    hooks = []
    for block in encoder.base.encoder.layer:
        hooks.append(block.attention.output.dense.register_forward_pre_hook(lambda _, given: found["context"].append(given[0])))
        for name in ("query", "key", "value"):
            module = block.attention.self.get_submodule(name)
            hooks.append(module.register_forward_hook(lambda _, __, out, n=name: found[n].append(out)))
    with torch.no_grad():
        outputs = encoder.model(**inputs, output_hidden_states=True)
        found["raw"] = encoder.base.embeddings.word_embeddings.weight[inputs["input_ids"]]
        found["normalized"] = encoder.base.embeddings.LayerNorm(found["raw"])
    for hook in hooks:
        hook.remove()
    return {**found, "hidden": outputs.hidden_states, "logits": outputs.logits}


def both(step: Step) -> tuple[dict[str, Any], dict[str, Any]]:
    return shown(step.student.model, step.batch.student), shown(step.teacher.model.encoder, step.batch.student)


def softmax(row: Sequence[float]) -> list[float]:
    powers = [math.exp(x - max(row)) for x in row]
    return [power / sum(powers) for power in powers]


def relation(vectors: Sequence[Sequence[float]]) -> list[list[float]]:
    """R(X), row by row."""
    scale = math.sqrt(len(vectors[0]))
    return [softmax([sum(a * b for a, b in zip(x, y, strict=True)) / scale for y in vectors]) for x in vectors]


def divergence(theirs: Sequence[Sequence[float]], ours: Sequence[Sequence[float]]) -> float:
    """The mean over rows of KL(R(theirs) || R(ours))."""
    rows = zip(relation(theirs), relation(ours), strict=True)
    return sum(p * math.log(p / q) for t, s in rows for p, q in zip(t, s, strict=True)) / len(ours)


def naive_relations(ours: Tensor, theirs: Tensor, splits: int, padding: str) -> float:
    """The mean over examples and splits of the divergence over an example's tokens; each has the same rows in `reference`."""
    total = 0.0
    for example in range(3):
        for n in range(splits):
            s, t = (
                [
                    x[example, token].tolist()[n * len(x[0, 0]) // splits : (n + 1) * len(x[0, 0]) // splits]
                    for token in EVERY[padding](example)
                ]
                for x in (ours, theirs)
            )
            total += divergence(t, s) / splits / 3
    return total


def naive_squares(ours: Tensor, theirs: Tensor, padding: str, project: nn.Linear) -> float:
    weight, bias = project.weight.tolist(), project.bias.tolist()
    total = 0.0
    for example in range(3):
        tokens = EVERY[padding](example)
        for token in tokens:
            x, y = ours[example, token].tolist(), theirs[example, token].tolist()
            mapped = [sum(w * a for w, a in zip(row, x, strict=True)) + b for row, b in zip(weight, bias, strict=True)]
            total += sum((a - b) ** 2 for a, b in zip(mapped, y, strict=True)) / len(y) / len(tokens) / 3
    return total


@pytest.mark.parametrize("padding", ["strict", "reference"])
@pytest.mark.parametrize("words", ["normalized", "raw"])
@pytest.mark.parametrize(("width", "heads", "splits"), [(8, 4, None), (12, 2, None), (12, 3, 4)])
def test_representation_equals_the_paper_as_loops(width: int, heads: int, splits: int | None, words: str, padding: str) -> None:
    student, teacher = encoder(2, width, seed=1, heads=heads).eval(), encoder(4, 16)
    method, step = represented(student, teacher, splits=splits, words=words, padding=padding)
    ours, theirs = both(step)
    terms, parts = method.terms(step), splits or heads
    assert set(terms) == set(method.names) == set(REPRESENTATION)
    expected = naive_relations(ours[words], theirs[words], 1, padding)
    assert terms["embedding"].item() == pytest.approx(expected, rel=1e-9)
    expected = sum(naive_relations(ours["context"][n], theirs["context"][2 * n], parts, padding) for n in (1, 2))
    assert terms["attention"].item() == pytest.approx(expected, rel=1e-9)
    maps = {n: method.projections[f"hidden_{n}"] for n in (0, 1, 2)}
    expected = sum(naive_squares(ours["hidden"][n], theirs["hidden"][2 * n], padding, maps[n]) for n in maps)
    assert terms["hidden"].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("padding", ["strict", "reference"])
@pytest.mark.parametrize("source", ["context", "query", "key", "value"])
def test_ablations_of_attention_equal_loops(source: str, padding: str) -> None:
    student, teacher = encoder(2, seed=1).eval(), encoder(4, 16)
    method, step = represented(student, teacher, source=source, padding=padding)
    ours, theirs = both(step)
    expected = sum(naive_relations(ours[source][n], theirs[source][2 * n], 4, padding) for n in (1, 2))
    assert method.terms(step)["attention"].item() == pytest.approx(expected, rel=1e-9)
    method, step = represented(student, teacher, source=source, padding=padding, attention="feature")
    maps = {n: method.projections[f"attention_{n}"] for n in (1, 2)}
    expected = sum(naive_squares(ours[source][n], theirs[source][2 * n], padding, maps[n]) for n in maps)
    assert method.terms(step)["attention"].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("splits", [1, 2])
def test_relations_of_hidden_states_equal_loops(splits: int) -> None:
    for embedding_output in (True, False):
        method, step = represented(
            encoder(2, seed=1).eval(),
            encoder(4, 16),
            hidden="relation",
            hidden_splits=splits,
            embedding_output=embedding_output,
        )
        ours, theirs = both(step)
        layers = (0, 1, 2) if embedding_output else (1, 2)
        expected = sum(naive_relations(ours["hidden"][n], theirs["hidden"][2 * n], splits, "strict") for n in layers)
        assert method.terms(step)["hidden"].item() == pytest.approx(expected, rel=1e-9)
        assert not method.projections


def test_without_the_embeddings_output_their_pair_is_left_out() -> None:
    student, teacher = encoder(2, seed=1).eval(), encoder(4, 16)
    method, step = represented(student, teacher, embedding_output=False, layers=[[1, 1], [2, 4]])
    ours, theirs = both(step)
    assert sorted(method.projections) == ["hidden_1", "hidden_2"]
    pairs = ((1, 1), (2, 4))
    expected = sum(
        naive_squares(ours["hidden"][n], theirs["hidden"][m], "strict", method.projections[f"hidden_{n}"]) for n, m in pairs
    )
    assert method.terms(step)["hidden"].item() == pytest.approx(expected, rel=1e-9)
    expected = sum(naive_relations(ours["context"][n], theirs["context"][m], 4, "strict") for n, m in pairs)
    assert method.terms(step)["attention"].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_random_merge_compares_one_head_of_each_group(heads: int) -> None:
    teacher = encoder(4, 16, heads=4)
    method, step = represented(encoder(2, seed=1, heads=heads).eval(), teacher, merge="random", draw_seed=3)
    ours, theirs = both(step)
    expected, group = 0.0, 4 // heads
    for n, drawn in zip((1, 2), method.heads_at(Progress()), strict=True):
        assert [head // group for head in drawn] == list(range(heads))
        for part, head in enumerate(drawn):
            width = 8 // heads
            student_part = ours["context"][n][..., part * width : (part + 1) * width]
            teacher_part = theirs["context"][2 * n][..., head * 4 : (head + 1) * 4]
            expected += naive_relations(student_part, teacher_part, 1, "strict") / heads
    assert method.terms(step)["attention"].item() == pytest.approx(expected, rel=1e-9)
    assert "attention" not in method.distances


@pytest.mark.parametrize("splits", [1, 2, 4, 8])
def test_drawn_heads_are_one_of_each_group_and_each_is_drawn_once_in_a_while(splits: int) -> None:
    found: list[set[int]] = [set() for _ in range(splits)]
    for seed in range(40):
        method = MLKDBERT(stage="representation", merge="random", splits=splits, draw_seed=seed)
        method.bind(Bound(encoder(2), [FrozenTeacher(encoder(4, 16, heads=8))], TASK))
        for row in method.heads_at(Progress()):
            for part, head in enumerate(row):
                found[part].add(head)
    size = 8 // splits
    assert found == [set(range(part * size, (part + 1) * size)) for part in range(splits)]


@pytest.mark.parametrize(("redraw", "different"), [("run", 1), ("epoch", 3), ("step", 12)])
def test_heads_are_drawn_as_often_as_asked(redraw: str, different: int) -> None:
    def draws(seed: int) -> list[Any]:
        method, _ = represented(
            encoder(4, seed=1), encoder(12, 16, heads=8), merge="random", redraw=redraw, draw_seed=seed, splits=4
        )
        assert "teacher's heads are drawn" in method.describe()
        return [method.heads_at(Progress(step, 100, step // 4)) for step in range(12)]

    found = draws(3)
    assert len({str(heads) for heads in found}) == different
    assert draws(3) == found
    assert draws(4) != found


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "mpnet"])
def test_context_is_what_the_output_layer_of_attention_reads(family: str) -> None:
    paths = {"distilbert": "attention.out_lin", "mpnet": "attention.attn.o"}
    model = encoder(1, 16, model_type=family).eval()
    inputs = {"input_ids": torch.randint(5, 20, (3, TOKENS)), "attention_mask": MASK.long()}
    (block,) = model.base.get_submodule(model.family.blocks)
    seen: list[Tensor] = []
    block.get_submodule(paths.get(family, "attention.output.dense")).register_forward_pre_hook(
        lambda _, given: seen.append(given[0])
    )
    outputs = model(inputs, Needs(attention=[1], value=[1], words=True))
    torch.testing.assert_close(context(outputs.attention(1), outputs.value(1))[MASK], seen[0][MASK])
    torch.testing.assert_close(
        normalized(model, outputs.words).mean(-1), model.base.embeddings.LayerNorm(outputs.words).mean(-1)
    )
    method, step = represented(encoder(1, seed=2, model_type=family), model)
    assert all(term.isfinite() for term in method.terms(step).values())


def naive_contrast(views: Sequence[Sequence[float]], labels: Sequence[float], tau: float, anchors: Sequence[int]) -> float:
    total = 0.0
    unit = [[x / math.sqrt(sum(y * y for y in view)) for x in view] for view in views]
    for i in anchors:
        similar = [sum(a * b for a, b in zip(unit[i], other, strict=True)) / tau for other in unit]
        positives = [p for p in range(len(views)) if p != i and labels[p] == labels[i]]
        below = math.log(sum(math.exp(x) for a, x in enumerate(similar) if a != i))
        total += sum(below - similar[p] for p in positives) / len(positives)
    return total / len(anchors)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("anchors", ["both", "student"])
@pytest.mark.parametrize("positives", ["classes", "labels", "pairs"])
def test_prediction_equals_the_paper_as_loops(positives: str, anchors: str, scaled: bool) -> None:
    options = {"positives": positives, "anchors": anchors, "contrast_scaled": scaled, "contrast_temperature": 0.3}
    method, step = bound(encoder(2, seed=1).eval(), encoder(4, 16), **options)
    ours, theirs = both(step)
    terms, (s, t) = method.terms(step), (each["hidden"][-1][:, 0] for each in (ours, theirs))
    assert set(terms) == set(method.names) == set(PREDICTION)
    assert terms["similarity"].item() == pytest.approx(divergence(t.tolist(), s.tolist()), rel=1e-9)
    (project,) = method.projections.values()
    with torch.no_grad():
        views = [*project(s).tolist(), *t.tolist()]
    labels = [0, 1, 2] if positives == "pairs" else LABELS.tolist()
    expected = naive_contrast(views, labels * 2, 0.3, range(6 if anchors == "both" else 3))
    assert terms["contrast"].item() == pytest.approx(expected * (0.3 if scaled else 1.0), rel=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_logits_follow_paper_and_authors_code(temperature: float) -> None:
    models = encoder(2, seed=1).eval(), encoder(4, 16)

    def logits(**options: Any) -> float:
        method, step = bound(*models, temperature=temperature, **options)
        return method.terms(step)["logits"].item()

    _, step = bound(*models)
    rows = [[[x / temperature for x in row] for row in each["logits"].tolist()] for each in both(step)]
    divergences, entropies = [], []
    for s, t in zip(*rows, strict=True):
        p, q = softmax(t), softmax(s)
        divergences.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        entropies.append(-sum(a * math.log(b) for a, b in zip(p, q, strict=True)))
    assert logits() == pytest.approx(sum(divergences) / 3, rel=1e-9)
    assert logits(temperature_squared=True) == pytest.approx(sum(divergences) / 3 * temperature**2, rel=1e-9)
    assert logits(loss="ce", reduction="elementmean") == pytest.approx(sum(entropies) / 9, rel=1e-9)


def test_scores_are_compared_by_their_squared_error_whatever_the_temperature() -> None:
    models = encoder(2, seed=1, outputs=1).eval(), encoder(4, 16, outputs=1)
    for positives in ("pairs", "labels"):
        method, step = bound(*models, task=SCORES, positives=positives, temperature=3.0)
        ours, theirs = both(step)
        terms = method.terms(step)
        torch.testing.assert_close(terms["logits"], ((ours["logits"] - theirs["logits"]) ** 2).mean())
        s, t = (each["hidden"][-1][:, 0] for each in (ours, theirs))
        with torch.no_grad():
            views = [*method.projections["hidden_2"](s).tolist(), *t.tolist()]
        labels = [0, 1, 2] if positives == "pairs" else [0.5, 0.1, 0.5]
        assert terms["contrast"].item() == pytest.approx(0.07 * naive_contrast(views, labels * 2, 0.07, range(6)), rel=1e-9)


def test_one_stage_has_the_terms_of_both() -> None:
    student, teacher = encoder(2, seed=1).eval(), encoder(4, 16)
    first, of_first = represented(student, teacher, project="shared")
    last, of_last = bound(student, teacher, project="shared")
    method, step = bound(encoder(2, seed=1).eval(), teacher, stage="both", project="shared")
    terms = method.terms(step)
    assert tuple(terms) == method.names == (*PREDICTION, *REPRESENTATION)
    for own, own_step in ((first, of_first), (last, of_last)):
        own.projections = method.projections
        for name, term in own.terms(own_step).items():
            torch.testing.assert_close(terms[name], term)
    assert all(parameter.requires_grad for parameter in step.student.model.parameters())


# -- worked numbers and properties -------------------------------------------------------------------------------------


def test_worked_numbers_of_relations() -> None:
    ours, theirs = torch.tensor([[1.0], [0.0]]).double(), torch.tensor([[2.0, 0, 0, 0], [0, 0, 0, 0]]).double()
    assert scaled_products(ours).softmax(-1)[0].tolist() == pytest.approx([0.7311, 0.2689], abs=5e-5)
    assert scaled_products(theirs).softmax(-1)[0].tolist() == pytest.approx([0.8808, 0.1192], abs=5e-5)
    assert similarity_divergence(ours, theirs, "none").tolist() == pytest.approx([0.067131, 0.0], abs=5e-7)
    mask = torch.ones(1, 2).bool()
    for padding in ("strict", "reference"):
        loss = relation_divergence(ours[None], theirs[None], mask, padding=padding)
        assert loss.item() == pytest.approx(0.033565, abs=5e-7)


def test_worked_numbers_of_the_contrast() -> None:
    vectors = torch.eye(2).double()
    for tau in (0.07, 0.5, 1.0):
        loss = supervised_contrast(vectors, vectors, torch.tensor([0, 1]), tau)
        assert tau * loss.item() == pytest.approx(tau * math.log(1 + 2 * math.exp(-1 / tau)), rel=1e-9)
    assert supervised_contrast(vectors, vectors, torch.tensor([0, 1]), 1.0).item() == pytest.approx(0.551445, abs=5e-7)
    assert supervised_contrast(vectors, vectors, torch.tensor([1, 1]), 1.0).item() == pytest.approx(1.218111, abs=5e-7)


@pytest.mark.parametrize("anchors", ["both", "student"])
def test_order_and_scale_change_no_contrast_and_none_gives_each_example(anchors: str) -> None:
    torch.manual_seed(0)
    ours, theirs, labels = torch.randn(6, 4).double(), torch.randn(6, 4).double(), torch.tensor([0, 1, 1, 2, 0, 1])
    order = torch.randperm(6)
    loss = supervised_contrast(ours, theirs, labels, 0.07, anchors)
    torch.testing.assert_close(supervised_contrast(ours[order], theirs[order], labels[order], 0.07, anchors), loss)
    torch.testing.assert_close(supervised_contrast(ours * 9, theirs / 9, labels, 0.07, anchors), loss)
    each = supervised_contrast(ours, theirs, labels, 0.07, anchors, "none")
    assert each.shape == (6,)
    torch.testing.assert_close(each.mean(), loss)
    rows = similarity_divergence(ours, theirs, "none")
    torch.testing.assert_close(rows.mean(), similarity_divergence(ours, theirs))
    torch.testing.assert_close(similarity_divergence(ours[order], theirs[order]), rows.mean())


def test_relations_do_not_see_rotations_and_states_do() -> None:
    torch.manual_seed(0)
    states = torch.randn(3, TOKENS, 8).double()
    rotation, _ = torch.linalg.qr(torch.randn(8, 8).double())
    assert relation_divergence(states, states @ rotation, MASK).item() == pytest.approx(0.0, abs=1e-12)
    assert relation_divergence(states, states @ rotation, MASK, splits=2).item() > 1e-3


def test_a_student_that_equals_its_teacher_is_at_zero() -> None:
    teacher = encoder(2, 8)
    method = MLKDBERT(stage="both")
    method.bind(Bound(teacher, [FrozenTeacher(teacher)], TASK))
    projections = method.double().projections  # which begin as the identity
    method, step = bound(encoder(2, 8).eval(), teacher, stage="both")
    method.projections = projections
    terms = method.terms(step)
    assert all(terms[name].item() == pytest.approx(0.0, abs=1e-12) for name in method.distances)
    assert set(method.distances) == {"logits", "similarity", "embedding", "attention", "hidden"}
    assert terms["contrast"] > 0


def test_autocast_does_not_round_relations() -> None:
    torch.manual_seed(0)
    ours, theirs, labels = torch.randn(3, 5, 8) * 3, torch.randn(3, 5, 8) * 3, torch.tensor([0, 1, 1])

    def losses() -> list[float]:
        maps = context(torch.rand(3, 2, 5, 5, generator=torch.Generator().manual_seed(0)), ours)
        return [
            relation_divergence(maps, theirs, MASK, 2).item(),
            similarity_divergence(ours[:, 0], theirs[:, 0]).item(),
            supervised_contrast(ours[:, 0], theirs[:, 0], labels, 0.07).item(),
        ]

    exact = losses()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert losses() == exact


@pytest.mark.parametrize("stage", ["representation", "prediction", "both"])
def test_padding_changes_no_term_of_the_strict_mean_and_says_so_of_the_other(stage: str) -> None:
    models = encoder(2, seed=1).eval(), encoder(4, 16)
    for padding in ("strict", "reference"):
        plain, padded = (bound(*models, count, stage=stage, padding=padding) for count in (0, 4))
        one, other = (method.terms(step) for method, step in (plain, padded))
        equal = all(one[term].item() == pytest.approx(other[term].item(), rel=1e-9) for term in one)
        assert equal is (padding == "strict" or stage == "prediction")
        method, reads = plain[0], stage != "prediction" and padding == "reference"
        assert method.across_ranks is not reads
        assert (method.needs()[1][0].uncacheable_reason is not None) is reads
        assert (method.batch_dependence() is None) is (stage == "representation" and padding == "strict")


# -- what is trained and read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"attention": "feature"}, {"hidden": "relation"}, {"project": "shared"}, {"source": "query"}]
)
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_first_stage_trains_the_blocks_and_leaves_the_head(family: str, options: dict[str, Any]) -> None:
    student, teacher = encoder(2, seed=1, model_type=family), encoder(4, 16, model_type=family)
    method, step = represented(student, teacher, **options)
    sum(method.terms(step).values()).backward()
    for name, parameter in [*student.named_parameters(), *method.named_parameters()]:
        above = any(part in name for part in ("pooler", "classifier"))
        assert parameter.requires_grad is not above, name
        assert (parameter.grad is None) is above, name
    assert student.word_embeddings.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_each_term_moves_what_it_reads() -> None:
    student, teacher = encoder(2, seed=1), encoder(4, 16)
    method, step = bound(student, teacher, stage="both", words="raw")
    terms, base = method.terms(step), student.base
    first, last = base.encoder.layer
    contrast = method.projections["hidden_2"].weight

    def moved(term: str, parameter: Tensor) -> bool:
        (gradient,) = torch.autograd.grad(terms[term], parameter, retain_graph=True, allow_unused=True)
        return gradient is not None and bool(gradient.abs().sum() > 0)

    # words before LayerNorm and positions; outputs of heads before the output layer; states; [CLS] with and without its map
    words, norm = base.embeddings.word_embeddings.weight, base.embeddings.LayerNorm.weight
    assert (moved("embedding", words), moved("embedding", norm)) == (True, False)
    assert moved("attention", last.attention.self.value.weight)
    assert not moved("attention", last.attention.output.dense.weight)
    assert not moved("attention", contrast)
    assert moved("hidden", last.output.dense.weight)
    assert (moved("similarity", last.output.dense.weight), moved("similarity", contrast)) == (True, False)
    assert (moved("contrast", first.output.dense.weight), moved("contrast", contrast)) == (True, True)
    assert [moved(term, student.outputs.weight) for term in PREDICTION] == [True, True, False, False]


def test_no_gradient_flows_to_teachers_vectors() -> None:
    ours, theirs = torch.randn(3, 5, 8).requires_grad_(), torch.randn(3, 5, 8).requires_grad_()
    losses = [
        relation_divergence(ours, theirs, MASK, 2),
        similarity_divergence(ours[:, 0], theirs[:, 0]),
        supervised_contrast(ours[:, 0], theirs[:, 0], LABELS, 0.07),
    ]
    for loss in losses:
        ours.grad = None
        loss.backward(retain_graph=True)
        assert ours.grad is not None
        assert ours.grad.abs().sum() > 0
        assert theirs.grad is None


def test_needs_are_those_of_the_stage() -> None:
    models = encoder(2, seed=1), encoder(4, 16)
    first, last = represented(*models)[0].needs(), bound(*models)[0].needs()
    assert first[0] == Needs(hidden=[0, 1, 2], attention=[1, 2], value=[1, 2], words=True)
    (theirs,) = first[1]
    assert (theirs.hidden, theirs.attention, theirs.value) == ({0, 2, 4}, {2, 4}, {2, 4})
    assert theirs.layers("derived") == {"words-normalized"}
    assert theirs.uncacheable_reason is None
    assert not theirs.words
    assert last == (Needs(cls=[2]), [Needs(cls=[4])])
    assert represented(*models, source="query")[0].needs()[0].value == frozenset()
    assert represented(*models, source="value")[0].needs()[0].attention == frozenset()
    for stage in ("representation", "prediction"):
        assert bound(*models, stage=stage, teacher_dropout=True)[0].needs()[1][0].dropout


def test_labels_are_declared_only_where_they_are_read() -> None:
    assert MLKDBERT().label_dependence() is not None
    assert MLKDBERT(positives="pairs").label_dependence() is None
    assert MLKDBERT(stage="representation").label_dependence() is None


@pytest.mark.parametrize(("project", "names"), [("layer", ["hidden_0", "hidden_1", "hidden_2"]), ("shared", ["hidden"])])
def test_maps_are_one_for_each_layer_or_one(project: str, names: list[str]) -> None:
    method, _ = represented(encoder(2, seed=1), encoder(4, 16), project=project)
    assert sorted(method.projections) == names
    assert all(tuple(p.weight.shape) == (16, 8) for p in method.projections.values())
    method, _ = represented(encoder(2, seed=1), encoder(4, 16), project=project, attention="feature")
    assert len(method.projections) == len(names) + (2 if project == "layer" else 1)


def test_description_says_what_was_resolved() -> None:
    method, _ = represented(encoder(2, seed=1, heads=2), encoder(4, 16))
    assert method.describe() == {
        "layer map (student<-teacher)": "0<-0 (hidden), 1<-2, 2<-4",
        "splits of attention": "2",
    }
    assert bound(encoder(2, seed=1), encoder(4, 16))[0].describe() == {}


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"stage": "first"}, "stage"),
        ({"layers": "skip"}, "layers"),
        ({"words": "all"}, "words"),
        ({"attention": "none"}, "attention"),
        ({"source": "hidden"}, "source"),
        ({"splits": 0}, "splits"),
        ({"splits": 1.5}, "splits"),
        ({"merge": "mean"}, "merge"),
        ({"merge": "random", "attention": "feature"}, "merge"),
        ({"redraw": "batch"}, "redraw"),
        ({"draw_seed": -1}, "draw_seed"),
        ({"hidden": "cosine"}, "hidden"),
        ({"hidden_splits": None}, "hidden_splits"),
        ({"padding": "none"}, "padding"),
        ({"project": "paper"}, "project"),
        ({"temperature": 0}, "temperature"),
        ({"loss": "l1"}, "loss"),
        ({"reduction": "sum"}, "reduction"),
        ({"positives": "all"}, "positives"),
        ({"anchors": "teacher"}, "anchors"),
        ({"contrast_temperature": 0}, "contrast_temperature"),
        ({"contrast_scaled": 1}, "contrast_scaled"),
        ({"temperature_squared": "yes"}, "temperature_squared"),
        ({"embedding_output": 0}, "embedding_output"),
        ({"teacher_dropout": 0.1}, "teacher_dropout"),
    ],
    ids=str,
)
def test_impossible_arguments_are_refused_by_their_key(arguments: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError) as caught:
        MLKDBERT(**arguments)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("options", "task", "key", "message"),
    [
        ({}, SCORES, "positives", "use positives=pairs, or positives=labels"),
        ({"stage": "both"}, SCORES, "positives", "scores and no classes"),
        ({"stage": "representation", "splits": 3}, TASK, "splits", "8 and 16; set splits to one of 1, 2, 4, 8"),
        ({"stage": "representation", "hidden": "relation", "hidden_splits": 5}, TASK, "hidden_splits", "set hidden_splits to"),
        ({"stage": "representation", "merge": "random", "splits": 8}, TASK, "splits", "4 heads .* to one of 1, 2, 4"),
        ({"stage": "representation", "layers": [[0, 0], [1, 2]]}, TASK, "layers", "from 1"),
        ({"stage": "representation", "layers": []}, TASK, "layers", "must list pairs"),
        ({"stage": "representation", "layers": [[1, 5]]}, TASK, "layers", "asks for layer 5 of the teacher"),
        ({"stage": "representation", "layers": 3}, TASK, "layers", "neither"),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_what_the_models_or_the_task_do_not_allow_is_refused(
    options: dict[str, Any], task: Task, key: str, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        bound(encoder(2, seed=1), encoder(4, 16), task=task, **options)
    assert caught.value.key == key


def test_a_student_deeper_than_its_teacher_is_refused() -> None:
    with pytest.raises(InputError, match="no deeper") as caught:
        represented(encoder(4), encoder(2))
    assert caught.value.key == "layers"
    assert bound(encoder(4), encoder(2))[0].projections  # the second stage pairs no layers but the last


@pytest.mark.parametrize("positives", ["classes", "labels"])
def test_text_without_labels_has_no_classes_to_contrast(positives: str) -> None:
    from transformers import BertForMaskedLM

    student = Encoder(BertForMaskedLM(encoder(2).config))
    task = MaskedLM("text", ["loss"], "loss")
    with pytest.raises(InputError, match="positives=pairs") as caught:
        MLKDBERT(positives=positives).bind(Bound(student, [FrozenTeacher(student)], task))
    assert caught.value.key == "positives"
    for stage, other in (("prediction", "pairs"), ("representation", "classes")):
        MLKDBERT(stage=stage, positives=other).bind(Bound(student, [FrozenTeacher(student)], task))


def test_functions_refuse_what_they_cannot_compare() -> None:
    states = torch.randn(3, 5, 8)
    with pytest.raises(ValueError, match="do not divide"):
        relation_divergence(states, states, MASK, splits=3)
    with pytest.raises(ValueError, match="not one of"):
        relation_divergence(states, states, MASK, padding="none")
    with pytest.raises(ValueError, match="differ in shape"):
        supervised_contrast(states[:, 0], states[:, 0, :4], LABELS, 1.0)
    with pytest.raises(ValueError, match="anchors"):
        supervised_contrast(states[:, 0], states[:, 0], LABELS, 1.0, "teacher")
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
