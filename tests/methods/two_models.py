"""A student, its teacher and four sentences: what the tests of methods with one teacher share."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import pytest
import torch
from models.test_masked_lm import TASK as MASKED
from models.test_masked_lm import masked_lm
from torch import Tensor, nn

from conftest import tiny_model
from kd.data.batch import Batch
from kd.data.tasks import Classification, Regression
from kd.errors import InputError
from kd.forward import Forward
from kd.methods.base import Bound, Method, Progress, Step
from kd.models import Encoder, FrozenTeacher

M = TypeVar("M", bound=Method)

TASK = Classification("toy", ["no", "yes"], {}, ["accuracy"], "accuracy")
SCORES = Regression("toy scores", ["mse"], "mse")
LENGTHS = (6, 4, 3, 5)
"""Real tokens of the sentences."""
LABELS = torch.tensor([0, 1, 1, 0])

FEATURES = [
    ("cls", "final", [[2, 6]]),
    ("mean", "final", [[2, 6]]),
    ("cls", "stages", [[1, 3], [2, 6]]),
    ("mean", [[0, 1], [2, 5]], [[0, 1], [2, 5]]),
    ("pooled", "final", []),
    ("logits", "final", []),
]
"""Features of `kd.methods.features`, layer maps, and their pairs of layers of two and six."""


def encoder(layers: int, width: int = 32, seed: int = 0, outputs: int = 2, **sizes: object) -> Encoder:
    """A random model in float64, with weights large enough that attention is far from uniform."""
    model = tiny_model(seed, layers=layers, width=width, num_labels=outputs, **sizes).double()
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return Encoder(model)


def sentences(padding: int = 0, lengths: Sequence[int] = LENGTHS) -> dict[str, Tensor]:
    """Inputs for sentences of these lengths, with further padding, where a token stands that would show if it were read."""
    ids = torch.randint(5, 30, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {
        "input_ids": nn.functional.pad(ids * mask, (0, padding), value=7),
        "attention_mask": nn.functional.pad(mask, (0, padding)),
    }


def bound_to(student: Encoder, teacher: Encoder, method: M, padding: int = 0) -> tuple[M, Step]:
    """A method bound to two models, with parameters that are not those it begins with, and a step over the sentences."""
    frozen, inputs = FrozenTeacher(teacher), sentences(padding)
    method.bind(Bound(student, [frozen], TASK))
    method.double()
    torch.manual_seed(5)
    for parameter in method.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours, (theirs,) = method.needs()
    batch = Batch(inputs, (inputs,), LABELS, torch.arange(len(LENGTHS)))
    return method, Step(Forward(student, inputs, ours), [Forward(frozen, inputs, theirs)], batch, TASK, Progress())


def shown(step: Step, teacher: bool) -> tuple[Tensor, ...]:
    """The states of all layers, as transformers returns them."""
    model = step.teacher.model.encoder.model if teacher else step.student.model.model
    with torch.no_grad():
        return model(**step.batch.student, output_hidden_states=True).hidden_states


def soft(step: Step, temperature: float) -> Tensor:
    """The divergence times temperature squared, as a sum over classes and a mean over examples."""
    s, t = step.student.outputs.logits / temperature, step.teacher.outputs.logits / temperature
    return temperature**2 * (t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))).sum() / len(s)


def features(step: Step, feature: str, pairs: list[list[int]]) -> list[tuple[Tensor, Tensor]]:
    """The vectors of the examples, without the package's functions."""

    def of(layer: int, teacher: bool) -> Tensor:
        states = shown(step, teacher)[layer]
        rows = [s[0] if feature == "cls" else s[:length].mean(0) for s, length in zip(states, LENGTHS, strict=True)]
        return torch.stack(rows)

    if feature in ("cls", "mean"):
        return [(of(ours, False), of(theirs, True)) for ours, theirs in pairs]
    outputs = step.student.outputs, step.teacher.outputs
    return [tuple(each.logits if feature == "logits" else each.pooled for each in outputs)]


def check_padding(bound: Callable[[int], tuple[Method, Step]], tolerance: float = 1e-10) -> dict[str, Tensor]:
    """Compare the terms without and with further padding, and return them."""
    one, other = (method.terms(step) for method, step in map(bound, (0, 5)))
    assert one.keys() == other.keys()
    for name, term in one.items():
        torch.testing.assert_close(term, other[name], rtol=0, atol=tolerance)
    return one


def check_features_are_checked(kind: Callable[..., Method]) -> None:
    """Bind a method of `kd.methods.features.Features` to models and tasks that its options do not suit."""
    teachers = [FrozenTeacher(encoder(4))]
    for layers, message in (("skip", "no pair"), ([[1, 5]], "layer 5 of the teacher")):
        with pytest.raises(InputError, match=message) as caught:
            kind(layers=layers).bind(Bound(encoder(1), teachers, TASK))
        assert caught.value.key == "layers"
    with pytest.raises(InputError, match="one number for each example") as caught:
        kind("logits").bind(Bound(encoder(2), teachers, SCORES))
    assert caught.value.key == "feature"
    kind("pooled").bind(Bound(encoder(2), teachers, SCORES))
    for feature in ("pooled", "logits"):
        with pytest.raises(InputError, match="a masked language model does not have") as caught:
            kind(feature).bind(Bound(masked_lm(layers=2), [FrozenTeacher(masked_lm())], MASKED))
        assert caught.value.key == "feature"
