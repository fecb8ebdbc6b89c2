"""The terms of DistilBERT against torch's losses, on labels and on masked tokens."""

from typing import Any

import pytest
import torch
from conformance.bench import Bench
from models.test_masked_lm import TASK, batches, masked_lm
from torch import Tensor
from torch.nn import functional as F

from kd.data.batch import Batch
from kd.data.masked_lm.task import NOT_PREDICTED
from kd.engines.distiller import Distiller
from kd.engines.models import Models
from kd.engines.optimizer import OptimizerFactory
from kd.errors import InputError
from kd.forward import Needs
from kd.functional.hidden import cosine_distance
from kd.methods.base import Bound
from kd.methods.distilbert import DistilBERT
from kd.models import FrozenTeacher
from kd.schedules import Constant

WEIGHTS: Any = {name: Constant(1.0) for name in DistilBERT.names}


def engine(**options: Any) -> Distiller:
    """A student of two layers and a teacher of four, both masked language models, in float64."""
    student, teacher = masked_lm(seed=1, layers=2), FrozenTeacher(masked_lm(seed=2))
    method = DistilBERT(**options)
    method.bind(Bound(student, [teacher], TASK))
    optimizer = OptimizerFactory(torch.optim.SGD, lr=0.1, weight_decay=0.0, schedule="constant", warmup=0.0)
    made = Distiller(Models({"student": student}, {"student": method}, [teacher], None, WEIGHTS), TASK, optimizer)
    return made.double().eval()


def batch() -> Batch:
    return batches(teachers=1)[0]


def authors_terms(made: Distiller, batch: Batch, temperature: float, only_predicted: bool) -> dict[str, Tensor]:
    """The four losses as the authors' `distiller.py` takes them: means over all selected tokens of the batch."""
    inputs = {name: tensor for name, tensor in batch.student.items() if name != "predicted"}
    student, teacher = made.student(inputs, Needs(hidden=[2])), made.teachers[0].run(inputs, Needs(hidden=[4]))
    real, width = inputs["attention_mask"].bool(), student.hidden(2).shape[-1]
    chosen = batch.student["predicted"] if only_predicted else real
    ours, theirs = student.logits[chosen], teacher.logits[chosen]
    soft = F.kl_div((ours / temperature).log_softmax(-1), (theirs / temperature).softmax(-1), reduction="batchmean")
    flat = [outputs[real].view(-1, width) for outputs in (student.hidden(2), teacher.hidden(4))]
    return {
        "task": F.cross_entropy(student.logits.flatten(0, 1), batch.labels.flatten(), ignore_index=NOT_PREDICTED),
        "logits": soft * temperature**2,
        "cosine": F.cosine_embedding_loss(*flat, torch.ones(len(flat[0]))),
        "mse": F.mse_loss(ours, theirs, reduction="sum") / len(ours),
    }


@pytest.mark.parametrize("only_predicted", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_terms_are_the_authors_over_the_tokens_of_a_batch(temperature: float, only_predicted: bool) -> None:
    made, given = engine(temperature=temperature, only_predicted=only_predicted, token_mean="batch"), batch()
    expected = authors_terms(made, given, temperature, only_predicted)
    terms = made.loss(given).terms
    assert list(terms) == list(DistilBERT.names)
    for name, value in terms.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("only_predicted", [False, True])
def test_means_of_examples_are_those_of_batches_of_one(only_predicted: bool) -> None:
    given = batch()
    whole = engine(only_predicted=only_predicted).loss(given).terms
    made = engine(only_predicted=only_predicted, token_mean="batch")
    each = []
    for row in range(len(given)):
        one = given.map(lambda tensor, row=row: tensor[row : row + 1])
        each.append(made.loss(one).terms)
    for name, value in whole.items():
        torch.testing.assert_close(value, torch.stack([terms[name] for terms in each]).mean(), rtol=1e-9, atol=1e-12, msg=name)


def test_a_student_that_is_its_teacher_has_no_loss_but_that_of_the_task() -> None:
    student = masked_lm(seed=1)
    teacher = FrozenTeacher(masked_lm(seed=1))
    method = DistilBERT()
    method.bind(Bound(student, [teacher], TASK))
    made = Distiller(Models({"student": student}, {"student": method}, [teacher], None, WEIGHTS), TASK, None)  # type: ignore[arg-type]
    terms = made.double().eval().loss(batch()).terms
    assert float(terms["task"]) > 0.1
    assert all(float(terms[name]) == pytest.approx(0.0, abs=1e-12) for name in ("logits", "cosine", "mse"))


def test_cosine_distance_is_torchs() -> None:
    student, teacher = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]]), torch.tensor([[[2.0, 0.0], [1.0, -1.0]]])
    both = torch.ones(1, 2, dtype=torch.bool)
    assert cosine_distance(student, teacher, both).item() == pytest.approx(0.5)
    assert cosine_distance(3 * student, teacher, both).item() == pytest.approx(0.5)
    assert cosine_distance(student, teacher, torch.tensor([[True, False]])).item() == pytest.approx(0.0, abs=1e-7)
    with pytest.raises(ValueError, match="differ in shape"):
        cosine_distance(student, teacher[:, :1], both)


def test_gradient_reaches_the_student_and_not_its_teacher() -> None:
    made = engine()
    made.loss(batch()).total.backward()
    assert all(parameter.grad is not None for parameter in made.student.parameters() if parameter.requires_grad)
    assert all(parameter.grad is None for parameter in made.teachers[0].encoder.parameters())


def test_states_of_another_width_are_mapped() -> None:
    bench = Bench("distilbert")
    (method,) = bench.methods.values()
    assert tuple(method.project.weight.shape) == (32, 24)


def test_the_mean_over_a_batch_is_a_declared_dependence() -> None:
    assert DistilBERT().batch_dependence() is None
    assert "token_mean=batch" in str(DistilBERT(token_mean="batch").batch_dependence())


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"temperature": 0}, "temperature"),
        ({"loss": "cosine"}, "loss"),
        ({"only_predicted": 1}, "only_predicted"),
        ({"token_mean": "tokens"}, "token_mean"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError) as caught:
        DistilBERT(**options)
    assert caught.value.key == key
