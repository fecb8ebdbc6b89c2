"""SimKD: the card's properties, the loss as loops, and a deployed model that is the one that was trained."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from conftest import tiny_model, tiny_tokenizer
from kd.data.batch import Batch
from kd.data.tasks import Classification
from kd.errors import InputError
from kd.forward import Forward, Needs
from kd.methods.base import Bound, Progress, Step
from kd.methods.simkd import FEATURES, Reused, SimKD, projector
from kd.models import Encoder, FrozenTeacher

TASK = Classification("toy", ["no", "yes"], {}, ["accuracy"], "accuracy")
LABELS = torch.tensor([0, 1, 1])


def encoder(layers: int = 2, width: int = 32, seed: int = 0, **options: object) -> Encoder:
    model = tiny_model(seed, layers=layers, width=width, **options).double()
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return Encoder(model, tiny_tokenizer())


def bound(
    student: Encoder, teacher: Encoder, columns: list[int] | None = None, labels: torch.Tensor = LABELS, **arguments: object
) -> tuple[SimKD, Step]:
    """A method bound to two models, and a step over three sentences of which two are padded."""
    method, frozen = SimKD(**arguments), FrozenTeacher(teacher, columns=columns)
    torch.manual_seed(5)
    method.bind(Bound(student, [frozen], TASK))
    student.double()
    ids = torch.randint(5, 30, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(6) < torch.tensor([6, 4, 3])[:, None]).long()
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    ours, (theirs,) = method.needs()
    batch = Batch(inputs, (inputs,), labels, torch.arange(3))
    return method, Step(Forward(student, inputs, ours), [Forward(frozen, inputs, theirs)], batch, TASK, Progress())


@pytest.mark.parametrize("feature", FEATURES)
def test_a_student_that_equals_its_teacher_gives_the_teachers_logits_to_the_bit(feature: str) -> None:
    method, step = bound(encoder(), encoder(), feature=feature)
    terms = method.terms(step)
    assert terms["feature"].item() == 0.0
    assert terms["logits"].item() == pytest.approx(0.0, abs=1e-12)
    assert torch.equal(step.student.outputs.logits, step.teacher.outputs.logits)


@pytest.mark.parametrize("factor", [1, 4])
@pytest.mark.parametrize("feature", FEATURES)
def test_the_loss_is_the_mean_square_written_as_loops(feature: str, factor: int) -> None:
    student, teacher = encoder(3, seed=1), encoder(4)
    method, step = bound(student, teacher, feature=feature, factor=factor)
    term = method.terms(step)["feature"].item()
    inputs = step.batch.student
    ours, theirs = (e.model(**inputs, output_hidden_states=True).hidden_states[-1] for e in (student, teacher))
    place = "classifier" if feature == "pooled" else "bert.pooler.dense"
    project = student.model.get_submodule(place).project
    if feature == "pooled":
        pooled = [e.model.bert.pooler(states) for e, states in ((student, ours), (teacher, theirs))]
        pairs = [[(project(pooled[0][b]), pooled[1][b])] for b in range(3)]
    else:
        lengths = [6, 4, 3] if feature == "tokens" else [1, 1, 1]
        pairs = [[(project(ours[b, t]), theirs[b, t]) for t in range(lengths[b])] for b in range(3)]
    total = 0.0
    for example in pairs:
        for one, other in example:
            for x, y in zip(one.tolist(), other.tolist(), strict=True):
                total += (x - y) ** 2 / 32 / len(example) / 3
    assert term == pytest.approx(total, rel=1e-10)


@pytest.mark.parametrize("feature", FEATURES)
def test_the_feature_does_not_look_at_labels_and_moves_nothing_of_the_teacher(feature: str) -> None:
    gradients = []
    for labels in (LABELS, 1 - LABELS):
        student, teacher = encoder(3, seed=1), encoder(4)
        before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
        method, step = bound(student, teacher, labels=labels, feature=feature)
        terms = method.terms(step)
        deepest = student.model.bert.encoder.layer[0].attention.self.query.weight
        assert torch.autograd.grad(terms["feature"], deepest, retain_graph=True)[0].abs().max() > 0
        (terms["feature"] + 0 * terms["task"] + 0 * terms["logits"]).backward()
        reused = [module for module in student.modules() if isinstance(module, Reused)]
        assert len(reused) == (1 if feature == "pooled" else 2)
        assert all(module.layer.weight.grad is None and not module.layer.weight.requires_grad for module in reused)
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        assert all(parameter.grad is not None for parameter in trained)
        torch.optim.SGD(trained, lr=0.1).step()
        assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
        assert all(parameter.grad is None for parameter in teacher.parameters())
        gradients.append([parameter.grad for parameter in trained])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_padding_counts_where_it_is_asked_for() -> None:
    student, teacher = encoder(3, seed=1), encoder(4)
    method, step = bound(student, teacher, feature="tokens", padding="reference")
    inputs = step.batch.student
    ours, theirs = (e.model(**inputs, output_hidden_states=True).hidden_states[-1] for e in (student, teacher))
    project = student.model.get_submodule("bert.pooler.dense").project
    torch.testing.assert_close(method.terms(step)["feature"], nn.functional.mse_loss(project(ours), theirs))
    assert "padding" in method.batch_dependence()
    assert SimKD(feature="tokens").batch_dependence() is None


def test_logits_are_off_by_no_more_than_the_classifiers_norm_times_the_distance() -> None:
    student, teacher = encoder(3, width=16, seed=1), encoder(4)
    _, step = bound(student, teacher)
    gap = (step.student.outputs.logits - step.teacher.outputs.logits).norm(dim=-1)
    features = student.model.classifier.project(step.student.outputs.pooled) - step.teacher.outputs.pooled
    norm = torch.linalg.matrix_norm(teacher.model.classifier.weight, 2)
    assert (gap <= norm * features.norm(dim=-1) + 1e-12).all()
    assert (gap > 0).all()


def test_the_reused_rows_stand_in_the_order_of_the_tasks_labels() -> None:
    _, step = bound(encoder(), encoder(), columns=[1, 0])
    assert torch.equal(step.student.outputs.logits, step.teacher.outputs.logits)


def test_sizes_of_the_projector() -> None:
    def size(*shape: int) -> int:
        return sum(parameter.numel() for parameter in projector(*shape).parameters())

    assert size(312, 768, 1) == 240_384
    assert size(312, 768, 2) == 312 * 384 + 384 + 384 * 768 + 768


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "mpnet"])
@pytest.mark.parametrize(
    ("feature", "width", "factor"), [("pooled", 16, 1), ("pooled", 16, 4), ("cls", 32, 1), ("tokens", 32, 2)]
)
def test_the_export_is_a_plain_model_with_the_same_logits(
    family: str, feature: str, width: int, factor: int, tmp_path: Path
) -> None:
    student, teacher = encoder(2, width, seed=1, model_type=family), encoder(3, model_type=family)
    _, step = bound(student, teacher, feature=feature, factor=factor)
    student.eval().save(tmp_path)
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert not any(isinstance(module, Reused) for module in found.modules())
    assert sum(p.numel() for p in found.parameters()) < student.parameter_count()
    logits = found(**step.batch.student).logits
    assert torch.allclose(logits, step.student.outputs.logits, rtol=0, atol=1e-6)
    assert not torch.allclose(logits, step.teacher.outputs.logits, rtol=0, atol=1e-3)


def test_dropout_does_not_stand_before_the_reused_classifier() -> None:
    student = encoder(2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.9)
    _, step = bound(student, encoder(3))
    student.train()
    trained = step.student.run().logits
    student.eval()
    assert torch.equal(trained, step.student.run().logits)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"feature": "cls"}, "feature"),
        ({"feature": "hidden"}, "feature"),
        ({"factor": 5}, "factor"),
        ({"factor": 0}, "factor"),
        ({"loss": "l1"}, "loss"),
        ({"feature": "tokens", "padding": "all"}, "padding"),
        ({"feature": "cls", "padding": "reference"}, "padding"),
    ],
)
def test_what_cannot_work_names_the_key(arguments: dict, key: str) -> None:
    with pytest.raises(InputError) as error:
        bound(encoder(2, width=16), encoder(3), **arguments)
    assert error.value.key == key


def test_a_pool_of_teachers_is_refused() -> None:
    student, teachers = encoder(), [FrozenTeacher(encoder(3, seed=seed)) for seed in (1, 2)]
    SimKD().bind(Bound(student, teachers[:1], TASK))
    with pytest.raises(InputError) as error:
        SimKD().bind(Bound(student, teachers[1:], TASK))
    assert error.value.key == "pool"


def test_only_what_is_declared_is_kept() -> None:
    model = encoder()
    inputs = {"input_ids": torch.tensor([[2, 6, 7]]), "attention_mask": torch.ones(1, 3).long()}
    assert "pooled" in model(inputs, Needs(pooled=True)).tensors
    assert "pooled" not in model(inputs, Needs()).tensors
