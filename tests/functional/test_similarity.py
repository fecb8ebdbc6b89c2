"""Divergences, calibration, similarity of representations and heads, linear probes: beside libraries and plain loops."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy as scipy_entropy
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, log_loss
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

from kd.functional.calibration import brier_score, calibration_error, negative_log_likelihood
from kd.functional.divergences import entropy, js_divergence, total_variation
from kd.functional.linear_probe import fit_linear_probe
from kd.functional.logits import kl_divergence
from kd.functional.similarity import head_divergences, leave_one_out_cka, linear_cka, match_heads


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(count: int, classes: int = 3, seed: int = 5) -> Tensor:
    return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed))


# Divergences


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_js_divergence_is_that_of_scipy_and_of_its_definition(scale: float) -> None:
    p, q = (drawn(20, 4, seed=seed, scale=scale).softmax(-1) for seed in (0, 1))
    found = js_divergence(p, q)
    for one, other, value in zip(p.numpy(), q.numpy(), found.tolist(), strict=True):
        assert value == pytest.approx(jensenshannon(one, other, base=2) ** 2, abs=1e-12)
        mean = (one + other) / 2
        halves = [sum(x * math.log2(x / m) for x, m in zip(side, mean, strict=True) if x > 0) / 2 for side in (one, other)]
        assert value == pytest.approx(sum(halves), abs=1e-12)
    torch.testing.assert_close(found, js_divergence(q, p), rtol=0, atol=1e-15)


def test_js_divergence_is_one_bit_of_what_shares_nothing_and_zero_of_equals() -> None:
    assert js_divergence(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])) == 1
    p = drawn(50, 7, scale=4.0).softmax(-1)
    assert js_divergence(p, p).abs().max() == 0
    q = drawn(50, 7, seed=1, scale=4.0).softmax(-1)
    padded = [torch.cat([side, torch.zeros(50, 3)], dim=1) for side in (p, q)]
    torch.testing.assert_close(js_divergence(*padded), js_divergence(p, q), rtol=0, atol=1e-15)
    assert js_divergence(p, q).max() < 1


def test_entropy_is_that_of_scipy() -> None:
    p = drawn(20, 4, scale=3.0).softmax(-1)
    np.testing.assert_allclose(entropy(p), [scipy_entropy(row, base=2) for row in p.numpy()], rtol=0, atol=1e-12)


def test_total_variation_is_the_largest_difference_over_all_events() -> None:
    p, q = (drawn(6, 4, seed=seed).softmax(-1) for seed in (0, 1))
    events = [list(event) for size in range(5) for event in itertools.combinations(range(4), size)]
    for one, other, value in zip(p, q, total_variation(p, q), strict=True):
        assert max(float((one[event] - other[event]).sum()) for event in events) == pytest.approx(float(value), abs=1e-12)
    assert total_variation(p, p).max() == 0
    assert total_variation(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])) == 1


def test_divergences_of_one_pair_bound_each_other() -> None:
    """Lin's bound, JS <= TV in bits, and Pinsker's, TV <= sqrt(KL / 2) in nats."""
    student, teacher = drawn(200, 3, seed=2, scale=2.0), drawn(200, 3, seed=3, scale=2.0)
    p, q = teacher.softmax(-1), student.softmax(-1)
    kl = kl_divergence(student, teacher, reduction="none")
    assert (js_divergence(p, q) <= total_variation(p, q) + 1e-12).all()
    assert (total_variation(p, q) <= (kl / 2).sqrt() + 1e-12).all()


# Calibration


def binned(probabilities: np.ndarray, truth: np.ndarray, bins: int) -> float:
    """ECE as in the paper: a loop over bins."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == truth
    total = 0.0
    for number in range(bins):
        inside = (confidence > number / bins) & (confidence <= (number + 1) / bins)
        if inside.any():
            total += inside.sum() / len(truth) * abs(right[inside].mean() - confidence[inside].mean())
    return total


@pytest.mark.parametrize("bins", [1, 4, 15])
@pytest.mark.parametrize("classes", [2, 5])
def test_calibration_error_is_a_loop_over_bins_and_that_of_torchmetrics(bins: int, classes: int) -> None:
    logits, truth = drawn(300, classes, scale=2.0), labels(300, classes)
    found = float(calibration_error(logits, truth, bins=bins))
    assert found == pytest.approx(binned(logits.softmax(-1).numpy(), truth.numpy(), bins), abs=1e-12)
    theirs = multiclass_calibration_error(logits.softmax(-1).float(), truth, classes, n_bins=bins)
    assert found == pytest.approx(float(theirs), abs=1e-5), "torchmetrics computes in float32"


def test_calibration_error_is_zero_of_what_is_always_right_and_sure() -> None:
    truth = labels(40)
    sure = 1000 * F.one_hot(truth, 3).double()
    assert calibration_error(sure, truth) == 0
    assert calibration_error(sure, (truth + 1) % 3) == 1
    even = torch.zeros(8, 2).double()
    assert calibration_error(even, torch.tensor([0, 1] * 4)) == 0, "half of them right with confidence 1/2"
    assert calibration_error(even, torch.zeros(8).long()) == 0.5


def test_a_confidence_at_the_edge_of_two_bins_is_in_the_lower_one() -> None:
    logits = torch.tensor([[0.0, 0.0], [0.75, 0.25]]).double()
    logits[1] = logits[1].log()
    # The first is right with confidence 1/2, the second wrong with 3/4; in one bin their gaps would add up to 1/4.
    assert float(calibration_error(logits, torch.tensor([0, 1]), bins=2)) == pytest.approx((0.5 + 0.75) / 2, abs=1e-12)


def test_calibration_error_of_a_sample_is_that_of_its_examples() -> None:
    logits, truth = drawn(60, 3, scale=2.0), labels(60)
    counts = torch.randint(0, 4, (5, 60), generator=torch.Generator().manual_seed(1))
    found = calibration_error(logits, truth, counts)
    for row, value in zip(counts, found, strict=True):
        rows = torch.repeat_interleave(torch.arange(60), row)
        assert float(value) == pytest.approx(float(calibration_error(logits[rows], truth[rows])), abs=1e-12)
    assert calibration_error(logits, truth, torch.zeros(1, 60)).isnan().all()


def test_proper_scores_are_those_of_scikit_learn() -> None:
    logits, truth = drawn(100, 3, scale=2.0), labels(100)
    probabilities = logits.softmax(-1).numpy()
    assert float(negative_log_likelihood(logits, truth).mean()) == pytest.approx(log_loss(truth, probabilities), rel=1e-12)
    naive = [sum((p - (c == y)) ** 2 for c, p in enumerate(row)) for row, y in zip(probabilities, truth.tolist(), strict=True)]
    np.testing.assert_allclose(brier_score(logits, truth).numpy(), naive, atol=1e-12)
    two, of_two = drawn(100, 2), labels(100, 2)
    positive = two.softmax(-1)[:, 1].numpy()
    assert float(brier_score(two, of_two).mean()) == pytest.approx(2 * brier_score_loss(of_two, positive), rel=1e-12)


# Representations


def naive_cka(first: np.ndarray, second: np.ndarray) -> float:
    """Kornblith et al.: HSIC of the linear kernels, with the centring matrix written out."""
    n = len(first)
    centring = np.eye(n) - np.ones((n, n)) / n

    def hsic(one: np.ndarray, other: np.ndarray) -> float:
        return np.trace(one @ centring @ other @ centring) / (n - 1) ** 2

    kernels = [side @ side.T for side in (first, second)]
    return hsic(*kernels) / math.sqrt(hsic(kernels[0], kernels[0]) * hsic(kernels[1], kernels[1]))


@pytest.mark.parametrize("count", [5, 40])
def test_cka_is_the_normalised_hsic_of_linear_kernels(count: int) -> None:
    first, second = drawn(count, 8) + 3, drawn(count, 6, seed=1)
    second[:, :3] += first[:, :3]
    found = linear_cka(first, second)
    assert found == pytest.approx(naive_cka(first.numpy(), second.numpy()), abs=1e-12)
    assert found == pytest.approx(linear_cka(second, first), abs=1e-12)
    assert 0 < found < 1


def test_cka_is_one_of_equals_and_whatever_rotates_scales_shifts_and_permutes() -> None:
    states = drawn(30, 8) * torch.arange(1, 9)
    turn, _ = torch.linalg.qr(drawn(8, 8, seed=2))
    assert linear_cka(states, states) == pytest.approx(1, abs=1e-12)
    assert linear_cka(states, 3 * states @ turn) == pytest.approx(1, abs=1e-12)
    assert linear_cka(states, states[:, torch.randperm(8)] - 5) == pytest.approx(1, abs=1e-12)
    other = drawn(30, 4, seed=3)
    expected = linear_cka(states, other)
    assert linear_cka(0.1 * states @ turn + 7, other[:, [2, 0, 3, 1]]) == pytest.approx(expected, abs=1e-12)
    assert linear_cka(states * torch.arange(8, 0, -1), other) != pytest.approx(expected, abs=1e-3)


def test_cka_of_what_does_not_vary_is_undefined_and_of_other_examples_refused() -> None:
    assert math.isnan(linear_cka(torch.ones(5, 3), drawn(5, 2)))
    assert linear_cka(torch.tensor([[1.0], [-1.0], [0.0]]), torch.tensor([[1.0], [1.0], [-2.0]])) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="5 and 6 examples"):
        linear_cka(drawn(5, 2), drawn(6, 2))


@pytest.mark.parametrize("seed", range(20))
def test_cka_is_in_its_range(seed: int) -> None:
    """Also where one side has less rank, more features than there are examples, or a mean far above the spread."""
    generator = torch.Generator().manual_seed(seed)
    count, width, other = (int(torch.randint(low, 40, (), generator=generator)) for low in (3, 1, 1))
    states = drawn(count, width, seed=seed) * 10.0 ** (seed % 7 - 3) + 100 * (seed % 2)
    for others in (drawn(count, other, seed=seed + 50), states[:, :1], states.flip(0)):
        assert 0 <= linear_cka(states, others) <= 1
        assert (leave_one_out_cka(states, others).nan_to_num() <= 1).all()


def test_vectors_that_differ_by_rounding_alone_have_no_similarity() -> None:
    rounded = torch.full((9, 4), 0.3) * (1 + 1e-7 * torch.arange(9)[:, None])
    other = drawn(9, 3)
    assert math.isnan(linear_cka(rounded, other))
    assert math.isnan(linear_cka(other, rounded))
    assert leave_one_out_cka(rounded, other).isnan().all()
    assert 0 < linear_cka(0.3 * (1 + 1e-3 * drawn(9, 4)), other) < 1


@pytest.mark.parametrize("shape", [(7, 3, 2), (12, 30, 5)])
def test_cka_without_each_example_is_that_of_the_others(shape: tuple[int, int, int]) -> None:
    count, width, other = shape
    first, second = 5 + drawn(count, width), drawn(count, other, seed=1)
    second[:, 0] += first[:, 0]
    found = leave_one_out_cka(first, second)
    for index, value in enumerate(found.tolist()):
        rest = [row for row in range(count) if row != index]
        assert value == pytest.approx(naive_cka(first[rest].numpy(), second[rest].numpy()), abs=1e-12)
    torch.testing.assert_close(leave_one_out_cka(first, 3 * first), torch.ones(count).double(), rtol=0, atol=1e-12)


def test_cka_without_the_example_that_alone_varies_is_undefined() -> None:
    first = torch.ones(5, 2)
    first[3] = 7.0
    undefined = leave_one_out_cka(first, drawn(5, 2)).isnan()
    assert undefined.tolist() == [False, False, False, True, False]
    with pytest.raises(ValueError, match="5 and 6 examples"):
        leave_one_out_cka(drawn(5, 2), drawn(6, 2))


# Heads


def maps(heads: int, mask: Tensor, seed: int) -> Tensor:
    scores = drawn(len(mask), heads, mask.shape[1], mask.shape[1], seed=seed, scale=2.0)
    return scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)


def test_divergences_of_heads_are_means_over_real_queries() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    first, second = maps(2, mask, 0), maps(3, mask, 1)
    found = head_divergences(first, second, mask)
    assert found.shape == (2, 2, 3)
    for example, (one, other) in itertools.product(range(2), itertools.product(range(2), range(3))):
        real = int(mask[example].sum())
        rows = [
            jensenshannon(first[example, one, query, :real], second[example, other, query, :real], base=2) ** 2
            for query in range(real)
        ]
        assert float(found[example, one, other]) == pytest.approx(float(np.mean(rows)), abs=1e-9)
    shorter = head_divergences(first[1:, :, :2, :2], second[1:, :, :2, :2], mask[1:, :2])
    torch.testing.assert_close(found[1:], shorter, rtol=0, atol=1e-12)
    noisy = first.clone()
    noisy[1, :, 2:] = 0.25  # what padded queries attend to
    torch.testing.assert_close(head_divergences(noisy, second, mask), found, rtol=0, atol=0)


@pytest.mark.parametrize(("heads", "others"), [(3, 3), (2, 4), (4, 2)])
def test_heads_are_matched_as_by_trying_all_assignments(heads: int, others: int) -> None:
    costs = drawn(heads, others).abs()
    pairs = match_heads(costs)
    fewer, more = min(heads, others), max(heads, others)
    turned = costs if heads <= others else costs.T
    least = min(sum(float(turned[i, j]) for i, j in enumerate(chosen)) for chosen in itertools.permutations(range(more), fewer))
    assert sum(float(costs[pair]) for pair in pairs) == pytest.approx(least)
    assert len(pairs) == fewer
    assert len({one for one, _ in pairs}) == len({other for _, other in pairs}) == fewer


def test_permuted_heads_are_matched_with_themselves() -> None:
    mask = torch.ones(3, 5).bool()
    first, order = maps(4, mask, 0), [2, 0, 3, 1]
    costs = head_divergences(first, first[:, order], mask).mean(dim=0)
    assert match_heads(costs) == [(head, order.index(head)) for head in range(4)]
    assert sum(float(costs[pair]) for pair in match_heads(costs)) == 0


# Linear probes


@pytest.mark.parametrize(("classes", "c"), [(2, 1.0), (3, 1.0), (3, 0.01)])
def test_a_probe_is_the_logistic_regression_of_scikit_learn(classes: int, c: float) -> None:
    sizes = torch.tensor([1e-3, 1.0, 1.0, 100.0, 1.0, 1.0]).double()
    features, further = 5 + drawn(80, 6) * sizes, 5 + drawn(40, 6, seed=8) * sizes
    truth = ((features[:, 1] + drawn(80, seed=4)) * 1.5).round().long() % classes
    probe = fit_linear_probe(features, truth, classes, c)
    mean, deviation = features.mean(0), features.std(0, correction=0)
    # Of two classes scikit-learn has one vector of weights: two that are each other's negative have half of its squares.
    theirs = LogisticRegression(C=2 * c if classes == 2 else c, tol=1e-12, max_iter=10_000, solver="newton-cg")
    theirs.fit(((features - mean) / deviation).numpy(), truth.numpy())
    expected = theirs.predict_proba(((further - mean) / deviation).numpy())
    np.testing.assert_allclose(probe.logits(further).softmax(-1).numpy(), expected, rtol=0, atol=1e-6)


def test_a_probe_is_the_same_each_time_and_for_states_of_another_scale() -> None:
    features, truth = drawn(60, 5), labels(60)
    probe = fit_linear_probe(features, truth, 3)
    again = fit_linear_probe(features, truth, 3)
    assert torch.equal(probe.weight, again.weight)
    assert torch.equal(probe.bias, again.bias)
    scaled = fit_linear_probe(100 * features + 3, truth, 3)
    torch.testing.assert_close(scaled.logits(100 * features + 3), probe.logits(features), rtol=0, atol=1e-6)


def test_a_probe_reads_what_is_linear_and_ignores_a_feature_that_does_not_vary() -> None:
    features, truth = drawn(90, 4), labels(90)
    features[:, 0] = 4 * truth
    features[:, 3] = 2.5
    probe = fit_linear_probe(features, truth, 3)
    assert (probe.logits(features).argmax(-1) == truth).all()
    assert probe.weight[:, 3].abs().max() == 0
    with torch.no_grad():
        assert torch.equal(fit_linear_probe(features, truth, 3).weight, probe.weight)


def test_a_probe_does_not_read_the_rounding_of_a_feature() -> None:
    truth = labels(90)
    features = drawn(90, 2)
    telling = torch.cat([features, (0.5 + 1e-8 * truth)[:, None]], dim=1)  # less than a unit of float32 beside 0.5
    weight = fit_linear_probe(telling, truth, 3).weight
    assert weight[:, 2].abs().max() < 1e-6
    torch.testing.assert_close(weight[:, :2], fit_linear_probe(features, truth, 3).weight, rtol=0, atol=1e-6)
