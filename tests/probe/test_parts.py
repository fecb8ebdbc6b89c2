"""Vectors, similarity of layers and attention, probes and drops of models, beside plain passes of one example."""

import itertools
import math

import numpy as np
import pytest
import torch
from encoders import families
from scipy.spatial.distance import jensenshannon
from sklearn.linear_model import LogisticRegression

from conftest import BAD, FILLER, GOOD, tiny_model, tiny_tokenizer
from kd.errors import InputError
from kd.forward import Needs
from kd.functional.similarity import linear_cka
from kd.models import Encoder, FrozenTeacher
from kd.probe.ablation import ablated_logits, ablation_of
from kd.probe.attention import attention_similarity
from kd.probe.outputs import logits_of, same_tokens, vectors_of
from kd.probe.representations import alignment_of, probes_of
from kd.results.statistics import Estimate

TEXTS = [(" ".join([*FILLER[: 2 + number % 7], word]),) for number, word in enumerate([*GOOD, *BAD])]
LABELS = np.array([1.0] * len(GOOD) + [0.0] * len(BAD))
LENGTH = 16
LONGEST = 4


def model(seed: int = 0, columns: list[int] | None = None, **sizes: object) -> FrozenTeacher:
    chosen = {"layers": 2, "width": 24, "heads": 3, "initializer_range": 0.3, **sizes}
    return FrozenTeacher(Encoder(tiny_model(seed, **chosen), tiny_tokenizer()), f"model {seed}", columns)


def one_by_one(found: FrozenTeacher, text: tuple[str, ...], needs: Needs):
    """The outputs of a pass of one text, which has no padding."""
    tokens = tiny_tokenizer()(*text, truncation=True, max_length=LENGTH, return_tensors="pt")
    with torch.no_grad():
        return found.encoder(dict(tokens), needs)


@families
def test_logits_and_vectors_are_those_of_passes_of_one_example(family: str) -> None:
    found = model(model_type=family)
    logits = logits_of(found, TEXTS, LENGTH)
    vectors = {kind: vectors_of(found, TEXTS, LENGTH, kind) for kind in ("mean", "cls")}
    assert [len(layers) for layers in vectors.values()] == [3, 3]
    for row, text in enumerate(TEXTS):
        outputs = one_by_one(found, text, Needs(hidden=range(3)))
        torch.testing.assert_close(logits[row], outputs.logits[0], rtol=0, atol=1e-5)
        for layer in range(3):
            states = outputs.hidden(layer)[0].double()
            torch.testing.assert_close(vectors["mean"][layer][row], states.mean(0), rtol=0, atol=1e-5)
            torch.testing.assert_close(vectors["cls"][layer][row], states[0], rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="'last' is not one of mean, cls"):
        vectors_of(found, TEXTS, LENGTH, "last")


def test_logits_are_in_the_order_of_the_task() -> None:
    torch.testing.assert_close(
        logits_of(model(columns=[1, 0]), TEXTS, LENGTH), logits_of(model(), TEXTS, LENGTH).flip(1), rtol=0, atol=0
    )


def test_models_read_the_same_tokens_if_their_vocabularies_are_equal() -> None:
    other = FrozenTeacher(Encoder(tiny_model(), tiny_tokenizer([*GOOD, *FILLER, *BAD])))
    assert same_tokens(model(0), model(1))
    assert not same_tokens(model(0), other)


def test_similarity_of_layers_is_cka_of_each_pair_and_one_of_a_model_with_itself() -> None:
    ours, theirs = (vectors_of(found, TEXTS, LENGTH, "mean") for found in (model(0), model(1, layers=3, width=32, heads=4)))
    found = alignment_of(ours, theirs)
    assert (found.n, len(found.matrix), {len(row) for row in found.matrix}) == (len(TEXTS), 3, {4})
    for layer, other in itertools.product(range(3), range(4)):
        cell = found.matrix[layer][other]
        assert (cell.value, cell.n) == (linear_cka(ours[layer], theirs[other]), len(TEXTS))
        assert cell.low < cell.value < cell.high
    itself = alignment_of(ours, ours)
    for layer in range(3):
        assert itself.matrix[layer][layer].value == pytest.approx(1, abs=1e-12)
        assert itself.unrelated[layer][layer] < 0.9
    flat = alignment_of([torch.ones(5, 3)], [torch.randn(5, 2)])
    assert (flat.matrix, flat.unrelated) == ([[Estimate(None, None, None, 5)]], [[None]])


def test_the_interval_of_cka_is_that_of_leaving_out_one_example() -> None:
    ours, theirs = (vectors_of(found, TEXTS, LENGTH, "mean")[1] for found in (model(0), model(1)))
    n = len(TEXTS)
    without = [linear_cka(*(side[[row for row in range(n) if row != left]] for side in (ours, theirs))) for left in range(n)]
    half = 1.959964 * math.sqrt((n - 1) ** 2 / n * np.var(without, ddof=1))
    cell = alignment_of([ours], [theirs]).matrix[0][0]
    assert (cell.low, cell.high) == pytest.approx((cell.value - half, min(cell.value + half, 1.0)), abs=1e-6)


def test_first_tokens_of_layer_0_are_equal_and_have_no_similarity_and_no_probe_reads_them() -> None:
    vectors = vectors_of(model(), TEXTS, LENGTH, "cls")
    found = alignment_of(vectors, vectors)
    assert [cell.value for cell in found.matrix[0]] == [row[0].value for row in found.matrix] == [None] * 3
    assert found.matrix[1][1].value == pytest.approx(1, abs=1e-12)
    truth = torch.from_numpy(LABELS).long()
    probed = probes_of(vectors, truth, vectors, truth, 2)
    assert probed.layers[0].value == 0.5, "one class for all, of two equally frequent ones"
    assert probed.layers[2].value > 0.5


def test_attention_of_a_model_with_itself_does_not_diverge_and_heads_match_themselves() -> None:
    found = attention_similarity(model(), model(), TEXTS, LENGTH)
    for layer in range(2):
        assert found.matrix[layer][layer].value == found.matrix[layer][layer].high == 0
        assert found.heads[layer][layer] == [(0, 0), (1, 1), (2, 2)]
    assert found.matrix[0][1].value > 0.01


def test_divergence_of_attention_is_the_least_mean_over_assignments() -> None:
    ours, theirs = model(0), model(1, heads=4, width=32)
    found = attention_similarity(ours, theirs, TEXTS, LENGTH)
    costs = np.zeros((len(TEXTS), 3, 4))
    for row, text in enumerate(TEXTS):
        maps = [one_by_one(one, text, Needs(attention=[2])).attention(2)[0].double() for one in (ours, theirs)]
        for head, other in itertools.product(range(3), range(4)):
            rows = zip(maps[0][head], maps[1][other], strict=True)
            costs[row, head, other] = np.mean([jensenshannon(p, q, base=2) ** 2 for p, q in rows])
    mean = costs.mean(0)
    assignments = list(itertools.permutations(range(4), 3))
    totals = [sum(mean[head, other] for head, other in enumerate(chosen)) / 3 for chosen in assignments]
    assert found.matrix[1][1].value == pytest.approx(min(totals), abs=1e-6)
    best = assignments[int(np.argmin(totals))]
    assert found.heads[1][1] == list(enumerate(best))
    assert found.n == found.matrix[1][1].n == len(TEXTS)
    assert found.matrix[1][1].low < found.matrix[1][1].value < found.matrix[1][1].high


# Linear probes


def test_probes_have_the_accuracy_of_logistic_regression_on_each_layer() -> None:
    layers = vectors_of(model(), TEXTS, LENGTH, "mean")
    rows, others = torch.arange(0, 20, 2), torch.arange(1, 20, 2)
    truth = torch.from_numpy(LABELS).long()
    found = probes_of([of[rows] for of in layers], truth[rows], [of[others] for of in layers], truth[others], 2)
    assert (found.train, len(found.layers)) == (10, 3)
    for states, accuracy in zip(layers, found.layers, strict=True):
        mean, deviation = states[rows].mean(0), states[rows].std(0, correction=0)
        inputs = ((states - mean) / deviation).numpy()
        fitted = LogisticRegression(C=2.0, tol=1e-10, max_iter=10_000).fit(inputs[rows], truth[rows])
        assert accuracy.value == pytest.approx(fitted.score(inputs[others], truth[others]))
        assert accuracy.n == 10


# Without a head or a layer


@families
def test_logits_without_a_part_are_those_of_whole_passes_without_it(family: str) -> None:
    found = model(model_type=family)
    ablated = ablated_logits(found, TEXTS, LENGTH)
    parts = [None, *((layer, head) for layer in (1, 2) for head in (None, 0, 1, 2))]
    assert set(ablated) == set(parts)
    assert torch.equal(ablated[None], logits_of(found, TEXTS, LENGTH))
    for part in parts[1:]:
        layer, head = part
        left_out = {"layer": layer} if head is None else {"head": (layer, head)}
        with found.encoder.without(**left_out):
            expected = logits_of(found, TEXTS, LENGTH)
        torch.testing.assert_close(ablated[part], expected, rtol=0, atol=1e-6)
        assert (ablated[part] - ablated[None]).abs().max() > 1e-4
    assert torch.equal(ablated_logits(found, TEXTS, LENGTH)[None], ablated[None]), "nothing stays left out"


def test_drops_are_differences_of_scores() -> None:
    found = model()
    logits = ablated_logits(found, TEXTS, LENGTH)
    ablation = ablation_of(logits, LABELS, "accuracy", classifies=True)
    scores = {part: float((values.argmax(1).numpy() == LABELS).mean()) for part, values in logits.items()}
    assert ablation.score.value == pytest.approx(scores[None])
    assert (ablation.n, ablation.metric, len(ablation.heads), len(ablation.heads[0])) == (20, "accuracy", 2, 3)
    for layer in (1, 2):
        assert ablation.layers[layer - 1].value == pytest.approx(scores[None] - scores[layer, None], abs=1e-12)
        for head in range(3):
            assert ablation.heads[layer - 1][head].value == pytest.approx(scores[None] - scores[layer, head], abs=1e-12)
    drops = [cell.value for row in ablation.heads for cell in row]
    assert len(set(drops)) > 1, "the toy's heads matter"


def test_drops_of_scores_are_in_correlation() -> None:
    found = FrozenTeacher(
        Encoder(tiny_model(layers=2, width=24, heads=3, num_labels=1, initializer_range=0.3), tiny_tokenizer())
    )
    logits = ablated_logits(found, TEXTS, LENGTH)
    labels = np.arange(20.0)
    ablation = ablation_of(logits, labels, "pearson", classifies=False)
    expected = np.corrcoef(logits[None][:, 0], labels)[0, 1] - np.corrcoef(logits[1, 2][:, 0], labels)[0, 1]
    assert ablation.heads[0][2].value == pytest.approx(expected, abs=1e-6)
    assert not math.isnan(ablation.score.low)
