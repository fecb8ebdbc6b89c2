"""Every method's terms over the range and the precisions that models show them, beside float64.

What the models show is drawn here: a network's own arithmetic in half precision is not what is looked at. Methods are bound to
a student and teachers of one width, where the maps between widths begin as the identity and round nothing.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.bench import CASES, COMPOSED, METHODS, STAGED, Bench, take
from kd.data.batch import Batch
from kd.forward import Forward, Needs, Outputs
from kd.methods.base import Method, Progress, Step

IN_RANGE = (*METHODS, *STAGED, *(case for case in COMPOSED if case in CASES and ("pool=wkd" in case or "target=mean" in case)))
"""Every method, and the two ways to combine some that compute anything themselves."""
HALF = (torch.float16, torch.bfloat16)
UNITS = 32
"""Units in float32's last place that a result may be off by: see `functional/test_range.py`."""
HOTTEST = 10.0
"""The highest temperature of a configuration: its square multiplies what the logits divided by it are rounded by."""


Kinds = tuple[torch.dtype, torch.dtype]


@dataclass
class Shown(Outputs):
    """Outputs whose attention scores are given."""

    given: Mapping[int, Tensor] = field(default_factory=dict)

    def scores(self, layer: int) -> Tensor:
        """As given, (batch, heads, tokens, tokens)."""
        return self.given[layer]


class Prescribed(Forward):
    """A forward whose outputs are given; further passes run the model."""

    def __init__(self, model: Any, inputs: Any, needs: Needs, outputs: Outputs) -> None:
        super().__init__(model, inputs, needs)
        self.prescribed = outputs
        self.passes = 0

    @property
    def outputs(self) -> Outputs:
        """As given."""
        return self.prescribed

    def run(self, inputs: Any = None, needs: Needs | None = None) -> Outputs:
        """A further pass, counted."""
        self.passes += 1
        return super().run(inputs, needs)


@dataclass(frozen=True)
class Situation:
    """Model outputs to generate: sizes of logits and attention scores, rows and real tokens of the batch."""

    logits: float = 2.0
    scores: float = 2.0
    certain: bool = False
    equal: bool = False
    rows: int = 3
    tokens: int | None = None


SITUATIONS = {
    "ordinary": Situation(),
    "large": Situation(1e4, 3e3),
    "certain": Situation(1e4, 3e3, certain=True),
    "equal": Situation(1e4, 3e3, equal=True),
    "one example": Situation(1e4, 3e3, rows=1),
    "one real token": Situation(rows=1, tokens=1),
}


def batch_of(bench: Bench, s: Situation) -> Batch:
    batch = take(bench.batch(), torch.arange(s.rows))

    def cut(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        mask = inputs["attention_mask"] * (torch.arange(inputs["attention_mask"].shape[1]) < s.tokens).long()
        return {**inputs, "attention_mask": mask}

    if s.tokens is None:
        return batch
    return replace(
        batch, student=cut(batch.student), teachers=tuple(map(cut, batch.teachers)), peers=tuple(map(cut, batch.peers))
    )


def shown(forward: Forward, needs: Needs, s: Situation, seed: int, kinds: Kinds) -> tuple[Forward, dict[str, Tensor]]:
    """A forward that shows drawn tensors, and the tensors, as leaves with gradients.

    They are rounded to the first kind and shown in the second, so that float64 sees the same numbers.
    """
    outputs, leaves = forward.outputs, {}

    def draw(name: str, shape: torch.Size, size: float, certain: bool = False) -> Tensor:
        generator = torch.Generator().manual_seed(sum(name.encode()) + (0 if s.equal else seed))
        values = torch.randn(shape, generator=generator)
        values = size * (values == values.amax(-1, keepdim=True)) if certain else size * values / values.abs().max()
        leaves[name] = values.to(kinds[0]).to(kinds[1]).requires_grad_()
        return leaves[name]

    mask = forward.inputs["attention_mask"].bool()
    tensors: dict[str, dict[int | str | None, Tensor]] = {}
    given = {}
    for name, tensor in outputs.named().items():
        group, _, layer = name.partition("-")
        key: int | str | None = int(layer) if layer.isdigit() else layer or None
        if group == "query":
            given[int(layer)] = draw(
                f"scores-{layer}", torch.Size((*mask.shape[:1], outputs.heads, *[mask.shape[1]] * 2)), s.scores, s.certain
            )
        elif group == "derived":
            tensors.setdefault(group, {})[key] = (draw(name, tensor.shape, 1.0).abs() * mask[..., None]).detach()
        elif group not in ("logits", "key"):
            tensors.setdefault(group, {})[key] = draw(name, tensor.shape, 30.0)
    logits = draw("logits", outputs.logits.shape, s.logits, s.certain)
    starts = [tensors[group][key] for group, key in (("hidden", 0), ("words", None)) if key in tensors.get(group, {})]
    if needs.gradient and starts:  # attributions differentiate logits by states; further passes have words of their own
        with torch.autocast("cpu", enabled=False):
            shift = sum((states.double() / 30).sin().mean(dim=1)[:, : logits.shape[1]] for states in starts)
            logits = (logits.double() + shift * mask.any(dim=1)[:, None]).to(torch.promote_types(kinds[1], torch.float32))
    shown = Shown(logits, mask, needs, outputs.heads, tensors, given=given)
    return Prescribed(forward.model, forward.inputs, needs, shown), leaves


Found = dict[str, tuple[Tensor, dict[str, Tensor], bool]]


def steps_of(bench: Bench, s: Situation) -> Sequence[tuple[Method, Step]]:
    """Every student's method and step, whose models tell which tensors are drawn, and of which shapes."""
    return [(method, step) for method, step, _ in bench.engine.loss(batch_of(bench, s), Progress(50, 100)).steps]


def terms_of(steps: Sequence[tuple[Method, Step]], s: Situation, kinds: Kinds, mixed: torch.dtype | None) -> Found:
    """Every term of every student over what is drawn: value, gradients by what the student shows, further passes or not."""
    found = {}
    for number, (method, step) in enumerate(steps):
        student, leaves = shown(step.student, step.student.needs, s, 1, kinds)
        teachers = [shown(teacher, teacher.needs, s, 2 + place, kinds)[0] for place, teacher in enumerate(step.teachers)]
        peers = [shown(peer, peer.needs, s, 7 + place, kinds)[0] for place, peer in enumerate(step.peers)]
        with torch.autocast("cpu", dtype=mixed) if mixed else contextlib.nullcontext():
            terms = method.terms(step.replace(student=student, teachers=teachers, peers=peers))
        for term, value in terms.items():
            gradients = torch.autograd.grad(value, list(leaves.values()), retain_graph=True, allow_unused=True)
            slopes = {leaf: gradient for leaf, gradient in zip(leaves, gradients, strict=True) if gradient is not None}
            further = any(forward.passes for forward in (student, *teachers, *peers))
            found[f"{number} {term}"] = (value.detach(), slopes, further)
    return found


@pytest.mark.parametrize("name", IN_RANGE)
def test_terms_and_gradients_are_finite_and_near_those_of_float64(name: str) -> None:
    single, double = (Bench(name, same=True, double=double) for double in (False, True))
    for situation, s in SITUATIONS.items():
        rough, fine = steps_of(single, s), steps_of(double, s)
        for kind, mixed in ((torch.float32, None), *((kind, kind) for kind in HALF)):
            exact, found = terms_of(fine, s, (kind, torch.float64), None), terms_of(rough, s, (kind, kind), mixed)
            assert found.keys() == exact.keys()
            bound = UNITS * torch.finfo(torch.float32).eps * max(s.logits, s.scores) * HOTTEST
            smallest = torch.finfo(kind).smallest_normal if kind in HALF else 0.0
            for term, (value, gradients, further) in found.items():
                # Outputs of further passes, and attributions, which are gradients, have the type of a model's states.
                coarse = 8 * torch.finfo(kind).eps if further or "attribution" in term else 0.0
                where = f"{situation}, {kind}, {term}"
                # A divergence is a difference of logarithms: what it is off by does not fall with it.
                compare(where, value, exact[term][0], bound, coarse, least=1.0)
                assert gradients.keys() == exact[term][1].keys()
                for leaf, gradient in gradients.items():
                    # A gradient through a further pass is rounded by the model on its way back too.
                    own = torch.finfo(kind).eps * (1 + UNITS) if further else torch.finfo(kind).eps + coarse
                    compare(f"{where} by {leaf}", gradient, exact[term][1][leaf], bound + smallest, own)


def compare(what: str, found: Tensor, exact: Tensor, single: float, coarse: float, least: float = 1e-3) -> None:
    """Finite, and off by no more than these shares of the largest entry, which counts as `least` where it is less.

    The first share is of an entry of 1 at most: what large logits are rounded by does not multiply what they lead to.
    """
    assert found.isfinite().all(), what
    size = float(exact.abs().max())
    off = float((found.double() - exact).abs().max())
    assert off <= single * min(max(size, least), 1.0) + (UNITS * 1.2e-7 + coarse) * size, f"{what}: off by {off} of {size}"
