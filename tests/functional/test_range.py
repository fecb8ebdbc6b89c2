"""Every function of `kd.functional` over the range and the precisions that models show it, beside float64."""

import contextlib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import kd.functional
from kd.functional import (
    activation,
    ascent,
    attention,
    attribution,
    boundary,
    calibration,
    combination,
    divergences,
    ensembles,
    flow,
    geometry,
    hidden,
    linear_probe,
    logits,
    outcomes,
    prototypes,
    reinforce,
    relations,
    similarity,
    smoothing,
    transport,
)
from kd.functional.hidden import OVER_EXAMPLES, PADDING

Call = tuple[Callable[..., Tensor], list[Tensor]]
"""A function of tensors, and the tensors, in float64; gradients are taken with respect to the first."""
HALF = (torch.float16, torch.bfloat16)
TYPES = [
    (torch.float32, None),
    *((kind, None) for kind in HALF),
    *((torch.float32, kind) for kind in HALF),
    *((k, k) for k in HALF),
]
"""The type of the inputs, and that of autocast around the function."""
UNITS = 32
"""Units in float32's last place that a result may be off by: sums here have at most a few hundred terms of one size, whose
roundings add up like the root of their number, and a handful of operations follow one another."""


@dataclass
class Situation:
    """Description of generated inputs.

    Attributes:
        examples: in the batch.
        lengths: real tokens of the first examples; the others have all six.
        size: of logits.
        scores: size of attention scores.
        certain: one class has all the probability, and one key of each row.
        equal: the teacher shows what the student shows.
    """

    examples: int = 3
    lengths: tuple[int, ...] = (6, 4, 2)
    size: float = 2.0
    scores: float = 2.0
    certain: bool = False
    equal: bool = False
    classes: int = 3

    def draw(self, *shape: int, size: float, certain: bool | None = None) -> list[Tensor]:
        """The student's and the teacher's tensors of a shape; of this size, or with one entry of it in the last axis."""
        generator = torch.Generator().manual_seed(len(shape) + self.examples)
        found = [torch.randn(self.examples, *shape, generator=generator, dtype=torch.float64) for _ in range(2)]
        if self.certain if certain is None else certain:
            found = [size * (tensor == tensor.amax(dim=-1, keepdim=True)) for tensor in found]
        else:
            found = [size * tensor / tensor.abs().max() for tensor in found]
        return [found[0], found[0].clone()] if self.equal else [tensor.double() for tensor in found]

    @property
    def mask(self) -> Tensor:
        """(examples, 6)."""
        return torch.arange(6) < torch.tensor((*self.lengths, 6, 6, 6)[: self.examples])[:, None]

    def logits(self) -> list[Tensor]:
        return self.draw(self.classes, size=self.size)

    def attention(self) -> list[Tensor]:
        return self.draw(2, 6, 6, size=self.scores)

    def states(self, *shape: int) -> list[Tensor]:
        return self.draw(*shape, size=min(self.size, 300.0), certain=False)


SITUATIONS = {
    "ordinary": Situation(),
    "large": Situation(size=1e4, scores=3e3),
    "certain": Situation(size=1e4, scores=3e3, certain=True),
    "sure of two": Situation(size=30.0, scores=30.0, certain=True, classes=2),
    "equal": Situation(equal=True),
    "equal and large": Situation(size=1e4, scores=3e3, equal=True),
    "one real token": Situation(lengths=(1, 1, 1), size=1e4, scores=3e3),
    "one example": Situation(examples=1, size=1e4, scores=3e3),
    "one example of one token": Situation(examples=1, lengths=(1,)),
}


def attention_errors(function: Callable[..., Tensor], s: Situation, distributions: bool = False) -> Iterator[Call]:
    inputs = s.attention()
    if distributions:
        inputs = [scores.masked_fill(~s.mask[:, None, None], -1e9).softmax(dim=-1) for scores in inputs]
    for padding in PADDING:
        for reduction in OVER_EXAMPLES:
            yield lambda *maps, p=padding, r=reduction: function(*maps, s.mask, padding=p, reduction=r), inputs


def attention_divergences(s: Situation) -> Iterator[Call]:
    for direction in attention.DIRECTIONS:
        for padding in PADDING:
            for reduction in OVER_EXAMPLES:
                options = (direction, padding, reduction)
                yield lambda *m, o=options: attention.attention_divergence(*m, s.mask, *o), s.attention()


def means_of_distributions(s: Situation) -> Iterator[Call]:
    real = s.mask[:, None, None]  # elsewhere is the lowest number of a type
    yield lambda *scores: attention.mean_distribution(scores, s.mask).masked_fill(~real, 0.0), s.attention()


def soft_losses(function: Callable[..., Tensor], s: Situation) -> Iterator[Call]:
    for temperature in (1.0, 4.0):
        for reduction in logits.LOGIT_REDUCTIONS:
            # T squared multiplies rounding too, so it is divided out again
            yield lambda *each, t=temperature, r=reduction: function(*each, t, r) / t**2, s.logits()


def maps_of(states: Tensor, s: Situation, target: str, steps: int) -> Tensor:
    """Attributions of logits that are a fixed function of the states."""
    states = states.detach().requires_grad_()
    inner = torch.linspace(-1, 1, 4 * s.classes).view(4, s.classes).double() * s.size / 4
    passes = []
    with torch.autocast("cpu", enabled=False):  # the model's own arithmetic is not what is looked at
        for step in range(1, steps + 1):
            at = states if step == steps else states * (step / steps)
            found = (at.double().tanh() @ inner).mean(dim=1)
            passes.append((found.to(torch.promote_types(states.dtype, torch.float32)), at))
    return attribution.attributions(passes, target)


def attributions(s: Situation) -> Iterator[Call]:
    for target in attribution.DIFFERENTIATED:
        # one pass: of several the weights are exponentials of the model's logits, and as exact as these (test_attribution)
        yield lambda states, t=target: maps_of(states, s, t, 1), s.states(6, 4)[:1]


def map_errors(s: Situation) -> Iterator[Call]:
    inputs = [maps.abs() * s.mask[..., None] for maps in s.states(6, 3)]
    for distance in attribution.DISTANCES:
        for reduction in attribution.ATTRIBUTION_REDUCTIONS:
            if reduction != "norm" or distance == "l2":
                yield lambda *m, d=distance, r=reduction: attribution.map_error(*m, s.mask, d, 2.0, r), inputs


def patiences(s: Situation) -> Iterator[Call]:
    for normalize in (True, False):
        for reduction in hidden.HIDDEN_REDUCTIONS:
            yield lambda *states, n=normalize, r=reduction: hidden.patience(*states, normalize=n, reduction=r), s.states(2, 8)


def token_errors(s: Situation) -> Iterator[Call]:
    for padding in PADDING:
        for reduction in OVER_EXAMPLES:
            yield lambda *states, p=padding, r=reduction: hidden.token_error(*states, s.mask, p, r), s.states(6, 8)


def cosine_distances(s: Situation) -> Iterator[Call]:
    for padding in PADDING:
        for reduction in OVER_EXAMPLES:
            yield lambda *states, p=padding, r=reduction: hidden.cosine_distance(*states, s.mask, p, r), s.states(6, 8)


def hints(s: Situation) -> Iterator[Call]:
    for reduction in activation.HINT_REDUCTIONS:
        scale = 300.0 if reduction in ("examples", "none") else 1.0  # the sum of as many squares of size
        yield lambda *states, r=reduction, c=scale: activation.hint_error(*states, s.mask, r) / c, s.states(6, 8)


def activation_maps(s: Situation) -> Iterator[Call]:
    for power in (1.0, 2.0, 4.0):
        yield lambda states, p=power: activation.activation_map(states, s.mask, p), s.states(6, 8)[:1]


def activation_errors(s: Situation) -> Iterator[Call]:
    for power in (1.0, 2.0, 4.0):
        for reduction in activation.ACTIVATION_REDUCTIONS:
            if reduction != "norm" or not s.equal:  # at its minimum the gradient of a norm has any direction
                options = (power, reduction)
                yield lambda *states, o=options: activation.activation_error(*states, s.mask, *o), s.states(6, 8)


def geometry_errors(function: Callable[..., Tensor], s: Situation) -> Iterator[Call]:
    for reduction in OVER_EXAMPLES:
        yield lambda *rows, r=reduction: function(*rows, r), s.states(8)


def means(s: Situation) -> Iterator[Call]:
    for padding in PADDING:
        for reduction in OVER_EXAMPLES:
            values = s.draw(6, size=s.size, certain=False)[:1]
            yield lambda values, p=padding, r=reduction: hidden.mean_over_real(values, s.mask, p, r), values


def examples(s: Situation) -> Iterator[Call]:
    for reduction in OVER_EXAMPLES:
        yield lambda values, r=reduction: hidden.over_examples(values[:, 0], r), s.states(1)[:1]


def combinations(s: Situation) -> Iterator[Call]:
    for normalize in combination.NORMALIZATIONS:
        yield lambda *states, n=normalize: combination.combination_squares(*states, n, 2), s.states(6, 8)


def attended_layers(s: Situation) -> Iterator[Call]:
    teacher = s.states(4, 8)[1]
    weights = s.draw(4, size=1.0, certain=False)[0].abs()
    yield combination.attended, [weights, teacher]


def layer_attentions(s: Situation) -> Iterator[Call]:
    teacher, student = s.states(4, 8)[1], s.states(8)[0]
    for scaled in (True, False):
        yield lambda *states, c=scaled: combination.layer_attention(*states, scaled=c), [student, teacher]


def layer_reductions(s: Situation) -> Iterator[Call]:
    squares = [states**2 / 300 for states in s.states(6, 8)]
    for reduction in combination.REDUCTIONS:
        yield lambda *rows, r=reduction: combination.reduce_layers(rows, s.mask, r), squares


def moderate_states(s: Situation, *shape: int) -> list[Tensor]:
    """States whose dot products are of the size of attention scores."""
    return s.draw(*shape, size=min(s.size, 10.0), certain=False)


def contexts(s: Situation) -> Iterator[Call]:
    maps, values = s.attention()[0].softmax(dim=-1), s.states(6, 8)[0]
    yield relations.context, [maps, values]


def relation_divergences(s: Situation) -> Iterator[Call]:
    inputs = moderate_states(s, 6, 8)
    for padding in PADDING:
        for reduction in OVER_EXAMPLES:
            for splits in (1, 2):
                yield lambda *x, o=(splits, padding, reduction): relations.relation_divergence(*x, s.mask, *o), inputs


def similarity_divergences(s: Situation) -> Iterator[Call]:
    for reduction in OVER_EXAMPLES:
        yield lambda *x, r=reduction: relations.similarity_divergence(*x, r), moderate_states(s, 8)


def contrasts(s: Situation) -> Iterator[Call]:
    labels = torch.arange(s.examples) % 2
    for anchors in relations.ANCHORS:
        for reduction in OVER_EXAMPLES:
            # at lower temperatures unit vectors' rounding is divided by them
            yield lambda *x, a=anchors, r=reduction: relations.supervised_contrast(*x, labels, 0.5, a, r), s.states(8)


def classes_of(s: Situation) -> tuple[Tensor, Tensor]:
    """A class of each example, and its label, another one."""
    labels = torch.arange(s.examples) % s.classes
    return (labels + 1) % s.classes, labels


def tables(s: Situation) -> list[Tensor]:
    return [table.reshape(-1, 4) for table in s.draw(6, 4, size=1.0, certain=False)]


def stacks(s: Situation) -> Iterator[Call]:
    labels = torch.arange(s.examples) % s.classes
    yield lambda *x: torch.tensor(reinforce.stacked_weights(list(x), labels)), s.logits()


def mean_embeddings(s: Situation) -> Iterator[Call]:
    table, probabilities = s.states(8)[0], s.draw(s.examples, size=2.0)[0].softmax(dim=-1)
    for ids in (torch.arange(s.examples).repeat(s.examples, 1), torch.arange(s.examples).expand(s.examples, -1)):
        yield lambda x, p, i=ids: smoothing.mean_embedding(lambda words: x[words], i, p), [table, probabilities]


def drawn(s: Situation) -> Iterator[Call]:
    ids, draws = torch.arange(s.classes).expand(s.examples, -1), torch.linspace(0, 0.9, s.examples)
    yield lambda x: smoothing.drawn_words(ids, x, draws).float(), [s.logits()[0].softmax(dim=-1)]


def transports(s: Situation) -> tuple[Tensor, Tensor, Tensor]:
    cost = s.draw(4, size=s.size, certain=False)[0].abs()
    return (
        transport.transport_plan(cost, *(torch.full((n,), 1 / n).double() for n in cost.shape)),
        cost,
        torch.full((len(cost),), 1 / len(cost)),
    )


def masses(s: Situation) -> Iterator[Call]:
    flow, cost, mass = transports(s)
    for update in transport.MASS_UPDATES:
        # the unit costs are rounded as the inputs are, and `softmax` takes exponentials of their inverses
        yield lambda f, c, m, u=update: transport.cost_attention(f, c, m, u, tau=10.0), [flow, cost, mass]
        yield lambda f, c, m, u=update: transport.shared_cost_attention([(f, c, m)] * 2, u, 10.0), [flow, cost, mass]


def plans(s: Situation) -> Iterator[Call]:
    equal = [torch.full((n,), 1 / n).double() for n in (s.examples, 4)]
    yield lambda cost: (transport.transport_plan(cost, *equal).double() * cost.double()).sum(), [transports(s)[1]]


def divergences_of_logits(s: Situation) -> Iterator[Call]:
    for outputs in ascent.OUTPUTS:
        yield lambda *logits, o=outputs: ascent.divergence(*logits, o), s.logits()


def transfers(s: Situation) -> Iterator[Call]:
    tables = s.draw(20, 8, size=1.0, certain=False)  # of an example each
    yield lambda *given: torch.stack([ascent.transfer_matrix(*both) for both in zip(*given, strict=True)]), tables


def gradients_by_words(s: Situation) -> Iterator[Call]:
    teacher = s.logits()[1]

    def gradient(words: Tensor) -> Tensor:
        given = words if words.requires_grad else words.requires_grad_()
        logits = hidden.at_least_float32(given).mean(dim=1)
        return ascent.gradient_by_words(ascent.divergence(logits, teacher.to(logits)), [logits], given)

    yield gradient, s.states(6, s.classes)[:1]


def ascents(s: Situation) -> Iterator[Call]:
    for normalize in (True, False):
        yield lambda *states, n=normalize: ascent.ascend(*states, s.mask, 0.1, normalize=n), s.states(6, 8)


def outcome_calls(s: Situation) -> Iterator[Call]:
    classes = torch.arange(s.examples) % s.classes
    for scheme in outcomes.SCHEMES:  # indices, which have no precision
        yield lambda z, c=scheme: outcomes.outcome_labels(z, classes, (0.7, 0.6), c).float(), s.logits()[:1]


def calibration_calls(function: Callable[..., Tensor], s: Situation) -> Iterator[Call]:
    yield lambda z: function(z, classes_of(s)[1]), s.logits()[:1]


def distances(function: Callable[..., Tensor], s: Situation) -> Iterator[Call]:
    yield function, [z.softmax(dim=-1) for z in s.logits()]


def maps_of_heads(s: Situation) -> list[Tensor]:
    return [scores.masked_fill(~s.mask[:, None, None], -1e9).softmax(dim=-1) for scores in s.attention()]


def alignments(s: Situation) -> Iterator[Call]:
    if s.examples > 1:  # one vector has no similarity
        yield lambda *x: torch.tensor(similarity.linear_cka(*x)), s.states(8)


def alignments_without_one(s: Situation) -> Iterator[Call]:
    if s.examples > 2:
        yield similarity.leave_one_out_cka, s.states(8)


def linear_probes(s: Situation) -> Iterator[Call]:
    labels = classes_of(s)[1]
    yield lambda x: linear_probe.fit_linear_probe(x, labels, s.classes).logits(x), s.states(8)[:1]


INPUTS: dict[str, Callable[[Situation], Iterator[Call]]] = {
    "activation.hint_error": hints,
    "activation.activation_map": activation_maps,
    "activation.activation_error": activation_errors,
    "ascent.transfer_matrix": transfers,
    "ascent.divergence": divergences_of_logits,
    "ascent.gradient_by_words": gradients_by_words,
    "ascent.ascend": ascents,
    "ascent.within": lambda s: iter([(lambda *states: ascent.within(*states, s.mask, 0.5), s.states(6, 8))]),
    "ascent.noise_like": lambda s: iter([(lambda *states: ascent.noise_like(*states, s.mask), s.states(6, 8))]),
    "ascent.gaussian": lambda s: iter([(ascent.gaussian, [s.draw(8, size=0.4, certain=False)[0] + 0.5])]),
    "attention.score_error": lambda s: attention_errors(attention.score_error, s),
    "attention.probability_error": lambda s: attention_errors(attention.probability_error, s, distributions=True),
    "attention.attention_divergence": attention_divergences,
    "attention.mean_distribution": means_of_distributions,
    "attribution.odds": lambda s: iter([(lambda z: torch.stack(attribution.odds(z)), s.logits()[:1])]),
    "attribution.scores": lambda s: iter([(lambda z: torch.stack(attribution.scores(z)), s.logits()[:1])]),
    "attribution.attributions": attributions,
    "attribution.token_maps": lambda s: iter([(lambda a: attribution.token_maps(a, 3), s.states(6, 4, 2)[:1])]),
    "attribution.map_error": map_errors,
    "calibration.brier_score": lambda s: calibration_calls(calibration.brier_score, s),
    "calibration.calibration_error": lambda s: calibration_calls(calibration.calibration_error, s),
    "calibration.negative_log_likelihood": lambda s: calibration_calls(calibration.negative_log_likelihood, s),
    "divergences.entropy": lambda s: iter([(divergences.entropy, [s.logits()[0].softmax(dim=-1)])]),
    "divergences.js_divergence": lambda s: distances(divergences.js_divergence, s),
    "divergences.total_variation": lambda s: distances(divergences.total_variation, s),
    "linear_probe.fit_linear_probe": linear_probes,
    "similarity.head_divergences": lambda s: iter([(lambda *a: similarity.head_divergences(*a, s.mask), maps_of_heads(s))]),
    "similarity.linear_cka": alignments,
    "similarity.leave_one_out_cka": alignments_without_one,
    "similarity.match_heads": lambda s: iter([(lambda c: torch.tensor(similarity.match_heads(c)).float(), s.states(8)[:1])]),
    "combination.concatenate": lambda s: iter(
        [(lambda *z, n=n: combination.concatenate(z, normalize=n), s.states(6, 8)) for n in (True, False)]
    ),
    "combination.combination_squares": combinations,
    "combination.layer_attention": layer_attentions,
    "combination.attended": attended_layers,
    "combination.reduce_layers": layer_reductions,
    "hidden.patience": patiences,
    "hidden.cosine_distance": cosine_distances,
    "hidden.token_error": token_errors,
    "hidden.mean_over_real": means,
    "hidden.over_examples": examples,
    "hidden.unit": lambda s: iter([(hidden.unit, s.states(8)[:1])]),
    "hidden.near_one": lambda s: iter([(hidden.near_one, s.states(8)[:1])]),
    "hidden.at_least_float32": lambda s: iter([(hidden.at_least_float32, s.states(8)[:1])]),
    "logits.widened": lambda s: iter([(logits.widened, s.logits()[:1])]),
    "logits.kl_divergence": lambda s: soft_losses(logits.kl_divergence, s),
    "logits.soft_cross_entropy": lambda s: soft_losses(logits.soft_cross_entropy, s),
    "logits.squared_error": lambda s: iter(
        [(lambda *z, r=r: logits.squared_error(*z, r), s.logits()) for r in logits.LOGIT_REDUCTIONS]
    ),
    "boundary.difference": lambda s: iter([(lambda x: boundary.difference(x, *classes_of(s)), s.logits()[:1])]),
    "boundary.disagreement": lambda s: iter([(lambda *x: boundary.disagreement(*x, classes_of(s)[1]), s.logits())]),
    "boundary.least_squares_map": lambda s: iter([(boundary.least_squares_map, tables(s))]),
    "boundary.other_classes": lambda s: iter(
        [(lambda x: boundary.other_classes(x, classes_of(s)[1], torch.full((s.examples,), 0.3)).float(), s.logits()[:1])]
    ),
    "boundary.toward_boundary": lambda s: iter(
        [(lambda x, g: boundary.toward_boundary(x, g, torch.ones(s.examples), 0.3), s.states(6, 8))]
    ),
    "ensembles.gate": lambda s: iter([(ensembles.gate, s.logits()[:1])]),
    "ensembles.gated": lambda s: iter([(lambda *x: ensembles.gated(x, torch.full((s.examples, 2), 0.5)), s.logits())]),
    "ensembles.over_rows": lambda s: iter(
        [(lambda x: ensembles.over_rows(x, torch.ones(s.classes), torch.zeros(s.classes)), s.logits()[:1])]
    ),
    "flow.flow_error": lambda s: iter([(lambda *x, r=r: flow.flow_error(*x, r), s.states(8, 8)) for r in flow.FLOW_REDUCTIONS]),
    "flow.flow_matrix": lambda s: iter([(lambda *x: flow.flow_matrix(*x, s.mask), s.states(6, 8))]),
    "reinforce.log_probability": lambda s: iter([(lambda x, y: reinforce.log_probability(x, y > 0), s.logits())]),
    "reinforce.selected_weights": lambda s: iter(
        [(lambda x, y: reinforce.selected_weights(x, (y > 0).to(y.dtype)), s.logits())]
    ),
    "reinforce.selected_mean": lambda s: iter([(lambda x, y: reinforce.selected_mean(x[:, 0], y[:, 0] > 0), s.logits())]),
    "reinforce.stacked_weights": stacks,
    "smoothing.likely_words": lambda s: iter(
        [(lambda x, n=count: smoothing.likely_words(x, n, 2.0)[1], s.logits()[:1]) for count in (2, None)]
    ),
    "smoothing.mean_embedding": mean_embeddings,
    "smoothing.drawn_words": drawn,
    "relations.scaled_products": lambda s: iter([(relations.scaled_products, moderate_states(s, 6, 8)[:1])]),
    "relations.split": lambda s: iter([(lambda x: relations.split(hidden.at_least_float32(x), 2), s.states(6, 8)[:1])]),
    "relations.context": contexts,
    "relations.relation_divergence": relation_divergences,
    "relations.similarity_divergence": similarity_divergences,
    "relations.supervised_contrast": contrasts,
    "outcomes.confidence": lambda s: iter([(outcomes.confidence, s.logits()[:1])]),
    "outcomes.outcome_labels": outcome_calls,
    "outcomes.median_thresholds": lambda s: iter(
        [(lambda z: outcomes.median_thresholds(z, torch.arange(s.examples) % s.classes), s.logits()[:1])]
    ),
    "prototypes.content_vector": lambda s: iter(
        [(lambda z, p=p: prototypes.content_vector(z, s.mask, p), s.states(6, 8)[:1]) for p in PADDING]
    ),
    "prototypes.prototypes": lambda s: iter(
        [(lambda z: prototypes.prototypes(z, torch.arange(s.examples) % 2, 2), s.states(8)[:1])]
    ),
    "prototypes.transferability": lambda s: iter(
        [
            (lambda z, a=a: prototypes.transferability(z, torch.arange(s.examples) % 2, 2, across=a), s.states(8)[:1])
            for a in prototypes.ACROSS
        ]
    ),
    "prototypes.expertise": lambda s: iter(
        [(lambda t: prototypes.expertise(*(hidden.at_least_float32(t).sigmoid().unbind(dim=1))), s.states(2)[:1])]
    ),
    "geometry.mean_of_tokens": lambda s: iter([(lambda z: geometry.mean_of_tokens(z, s.mask), s.states(6, 8)[:1])]),
    "geometry.similarities": lambda s: iter([(geometry.similarities, s.states(8)[:1])]),
    "geometry.relative_distances": lambda s: iter([(geometry.relative_distances, s.states(8)[:1])]),
    "geometry.angles": lambda s: iter([(geometry.angles, s.states(8)[:1])]),
    "geometry.similarity_error": lambda s: geometry_errors(geometry.similarity_error, s),
    "geometry.distance_error": lambda s: geometry_errors(geometry.distance_error, s),
    "geometry.angle_error": lambda s: geometry_errors(geometry.angle_error, s),
    "transport.transport_plan": plans,
    "transport.cost_attention": masses,
    "transport.shared_cost_attention": masses,
}
"""Function of tensors -> builder of its arguments."""
ROUNDED = ("ascent.gradient_by_words", "attribution.attributions")
"""Functions whose values are made of gradients, which have the dtype of the model's hidden states."""


def functions() -> list[str]:
    """Every public function of `kd.functional` that takes tensors."""
    names = []
    for module in pkgutil.iter_modules(kd.functional.__path__):
        found = importlib.import_module(f"kd.functional.{module.name}")
        for name, function in inspect.getmembers(found, inspect.isfunction):
            kinds = [str(parameter.annotation) for parameter in inspect.signature(function).parameters.values()]
            if function.__module__ == found.__name__ and not name.startswith("_") and any("Tensor" in kind for kind in kinds):
                names.append(f"{module.name}.{name}")
    return names


def evaluated(function: Callable[..., Tensor], tensors: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Value, and gradient of its sum by the first tensor, where there is one."""
    first = tensors[0].detach().requires_grad_()
    value = function(first, *tensors[1:])
    if not value.requires_grad:
        return value.detach(), None
    with torch.autocast("cpu", enabled=False):  # as the engine does
        (gradient,) = torch.autograd.grad(value.sum(), first, allow_unused=True)
    return value.detach(), gradient


def near(found: Tensor, exact: Tensor, inputs: list[Tensor], kind: torch.dtype, rounded: bool) -> None:
    assert found.isfinite().all()
    unit = torch.finfo(torch.float32).eps
    largest = max([float(tensor.abs().max()) for tensor in inputs if tensor.is_floating_point()] + [1.0])
    # A gradient is returned in the type of its input: a unit of that, and its smallest number, come on top.
    rounding = torch.finfo(kind).eps if rounded or found.dtype in HALF else 0.0
    smallest = torch.finfo(found.dtype).smallest_normal if found.dtype in HALF else 0.0
    # Exponentials of differences are as exact as the differences, which have units of the largest input.
    atol = UNITS * unit * largest * max(1.0, float(exact.abs().max()) / largest) + smallest
    torch.testing.assert_close(found.double(), exact.double(), rtol=rounding + UNITS * unit, atol=atol)


def test_every_function_of_tensors_has_inputs_here() -> None:
    assert sorted(INPUTS) == sorted(functions())


@pytest.mark.parametrize("name", sorted(INPUTS))
@pytest.mark.parametrize("situation", SITUATIONS)
def test_values_and_gradients_are_finite_and_near_those_of_float64(name: str, situation: str) -> None:
    for function, drawn in INPUTS[name](SITUATIONS[situation]):
        for kind, mixed in TYPES:
            tensors = [tensor.to(kind) for tensor in drawn]
            exact, slope = evaluated(function, [tensor.double() for tensor in tensors])
            with torch.autocast("cpu", dtype=mixed) if mixed else contextlib.nullcontext():
                value, gradient = evaluated(function, tensors)
            assert value.dtype in (torch.float32, torch.float64), "a result is not returned in half precision"
            near(value, exact, tensors, kind, name in ROUNDED)
            assert (gradient is None) == (slope is None)
            if gradient is not None and slope is not None:
                near(gradient, slope, tensors, kind, name in ROUNDED)
