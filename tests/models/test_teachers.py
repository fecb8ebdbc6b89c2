"""Frozen teachers: labels by name, never trained, counted."""

import pytest
import torch
from torch import Tensor

from conftest import tiny_model
from kd.data.tasks import Classification
from kd.engines.distiller import Distiller
from kd.engines.models import Models
from kd.engines.optimizer import OptimizerFactory
from kd.errors import InputError
from kd.forward import Forward, Needs, UndeclaredRead
from kd.methods.kd import KD
from kd.models import CachedTeacher, Encoder, FrozenTeacher
from kd.models.teachers import match_labels
from kd.schedules import Constant

LABELS = ["entailment", "neutral", "contradiction"]


def batch(examples: int = 2) -> dict[str, Tensor]:
    ids = torch.randint(5, 30, (examples, 6), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def encoder(layers: int = 2, seed: int = 0) -> Encoder:
    return Encoder(tiny_model(seed, layers=layers, num_labels=3))


def distiller(teacher: FrozenTeacher) -> Distiller:
    task = Classification("nli", LABELS, {}, ["accuracy"], "accuracy")
    weights = {"task": Constant(0.5), "logits": Constant(0.5)}
    factory = OptimizerFactory(torch.optim.AdamW, 1e-3, 0.0, "linear", 0.0)
    return Distiller(Models({"student": encoder(1, seed=1)}, {"student": KD()}, [teacher], None, weights), task, factory)


@pytest.mark.parametrize(
    ("theirs", "columns"),
    [
        (LABELS, [0, 1, 2]),
        (["CONTRADICTION", "Entailment", "neutral"], [1, 2, 0]),
        (["neutral", "contradiction", "entailment"], [2, 0, 1]),
    ],
    ids=str,
)
def test_labels_are_matched_by_name_without_case(theirs: list[str], columns: list[int]) -> None:
    assert match_labels(LABELS, theirs, "teacher.x.labels") == columns


@pytest.mark.parametrize(
    "theirs",
    [
        ["LABEL_0", "LABEL_1", "LABEL_2"],
        ["entailment", "neutral"],
        [*LABELS, "other"],
        ["entailment", "entailment", "neutral"],
    ],
    ids=str,
)
def test_other_labels_are_refused_never_taken_by_position(theirs: list[str]) -> None:
    with pytest.raises(InputError, match="matched by name") as caught:
        match_labels(LABELS, theirs, "teacher.x.labels")
    assert caught.value.key == "teacher.x.labels"


@pytest.mark.parametrize("columns", [[1, 2, 0], [2, 0, 1], [0, 2, 1]], ids=str)
def test_permuted_columns_permute_the_logits(columns: list[int]) -> None:
    plain = encoder()(batch(), Needs()).logits
    found = FrozenTeacher(encoder(), columns=columns)(batch(), Needs(hidden=[1]))
    for label, column in enumerate(columns):
        assert torch.equal(found.logits[:, label], plain[:, column])
    assert found.hidden(1).shape == (2, 6, 32)


@pytest.mark.parametrize("columns", [None, [0, 1, 2]], ids=str)
def test_columns_in_order_leave_the_logits_alone(columns: list[int] | None) -> None:
    assert torch.equal(FrozenTeacher(encoder(), columns=columns)(batch(), Needs()).logits, encoder()(batch(), Needs()).logits)


def test_teacher_stays_in_eval_mode_when_the_engine_trains() -> None:
    teacher = FrozenTeacher(encoder().train())
    engine = distiller(teacher).train()
    assert engine.student.training
    assert not any(module.training for module in teacher.encoder.modules())
    assert torch.equal(teacher(batch(), Needs()).logits, teacher(batch(), Needs()).logits)


def test_teacher_set_to_train_by_someone_else_is_in_eval_mode_at_its_next_pass() -> None:
    teacher = FrozenTeacher(encoder())
    expected = teacher(batch(), Needs()).logits
    teacher.encoder.train()
    assert torch.equal(teacher(batch(), Needs()).logits, expected)


def test_teacher_is_outside_parameters_and_checkpoints_and_still_moves_with_the_engine() -> None:
    teacher = FrozenTeacher(encoder())
    engine = distiller(teacher)
    ours = sum(parameter.numel() for parameter in engine.student.parameters())
    assert sum(parameter.numel() for parameter in engine.parameters()) == ours
    assert sum(tensor.numel() for tensor in engine.state_dict().values()) == ours
    engine.double()
    assert {parameter.dtype for parameter in teacher.encoder.parameters()} == {torch.float64}


def test_teacher_gives_no_gradients() -> None:
    teacher = FrozenTeacher(encoder())
    outputs = teacher(batch(), Needs(hidden=[1], attention=[1]))
    assert not any(parameter.requires_grad for parameter in teacher.encoder.parameters())
    assert not any(tensor.requires_grad for tensor in (outputs.logits, outputs.hidden(1), outputs.attention(1)))


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "mpnet"])
def test_teacher_can_be_differentiated_by_its_embeddings_where_declared(family: str) -> None:
    teacher = FrozenTeacher(Encoder(tiny_model(model_type=family, layers=2)))
    outputs = teacher(batch(), Needs(hidden=[0], gradient=True))
    (gradient,) = torch.autograd.grad(outputs.logits[:, 0].sum(), outputs.hidden(0))
    assert gradient.shape == (2, 6, 32)
    assert gradient.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.encoder.parameters())


@pytest.mark.parametrize("more", [{}, {"hidden": [0]}, {"words": True}], ids=str)
def test_teacher_can_be_differentiated_by_the_input_of_its_last_layer(more: dict[str, object]) -> None:
    teacher = FrozenTeacher(encoder())
    outputs = teacher(batch(), Needs(pooled=True, gradient=True, **more))
    (gradient,) = torch.autograd.grad(outputs.logits[:, 0].sum(), outputs.pooled)
    assert torch.equal(gradient, teacher.encoder.outputs.weight[0].expand(2, -1))
    assert torch.equal(outputs.logits, teacher(batch(), Needs(gradient=True)).logits)


def test_examples_are_counted_forward_by_forward() -> None:
    teacher = FrozenTeacher(encoder())
    assert teacher.examples == 0
    teacher(batch(2), Needs())
    teacher(batch(5), Needs())
    assert teacher.examples == 7


def test_passes_from_words_and_layers_are_counted_and_continue_the_teachers_own() -> None:
    teacher = FrozenTeacher(encoder(), columns=[1, 2, 0])
    forward = Forward(teacher, batch(3), Needs(hidden=[1]))
    mask, states = forward.inputs["attention_mask"], forward.outputs.hidden(1)
    words = teacher.encoder.word_embeddings(forward.inputs["input_ids"])
    for given in ({"words": words}, {"embedded": states, "from_layer": 1}):
        outputs = forward.run({**given, "attention_mask": mask})
        assert torch.equal(outputs.logits, forward.outputs.logits)
        assert torch.equal(outputs.hidden(1), states)
        assert not outputs.logits.requires_grad
    assert teacher.work == {"passes": 3, "examples": 9, "batches_used": 3}
    moved = states.clone().requires_grad_()
    logits = forward.run({"embedded": moved, "from_layer": 1, "attention_mask": mask}, Needs(gradient=True)).logits
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), moved)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("given", ["input_ids", "words", "embedded"])
def test_a_cached_teacher_refuses_other_text_words_and_states(given: str) -> None:
    teacher, needs = FrozenTeacher(encoder()), Needs(hidden=[1])
    mask = batch()["attention_mask"]
    cached = {**teacher(batch(), needs).named(), "attention_mask": mask}
    forward = Forward(CachedTeacher(teacher), cached, needs)
    other = {**cached, given: cached["hidden-1"]}
    if given == "input_ids":
        other = batch()
    assert torch.equal(forward.run().logits, cached["logits"])
    for needed in (None, needs):
        with pytest.raises(
            UndeclaredRead, match=r"is cached and cannot read other text, words or states; .*uncacheable_reason="
        ):
            forward.run(other, needed)


def test_teacher_shows_its_sizes() -> None:
    teacher = FrozenTeacher(encoder(layers=3), "large")
    assert (teacher.name, teacher.depth, teacher.width, teacher.heads) == ("large", 3, 32, 4)
