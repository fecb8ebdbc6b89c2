"""AD-KD: its loss written as loops over classes and tokens, its second derivative, and what the teacher's maps depend on."""

import pytest
import torch
from torch import Tensor, nn

from conftest import tiny_model
from kd.data.batch import Batch
from kd.data.tasks import Classification, Regression
from kd.errors import InputError
from kd.forward import Forward, Needs
from kd.methods.ad_kd import ADKD, TeacherMaps
from kd.methods.base import Bound, Progress, Step
from kd.models import Encoder, FrozenTeacher
from kd.schedules import Staircase

LENGTHS = [6, 4, 3]
IDS = torch.randint(5, 30, (3, 6), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(6) < torch.tensor(LENGTHS)[:, None]).long()
INPUTS = {"input_ids": IDS * MASK, "attention_mask": MASK}


def encoder(layers: int, width: int = 32, seed: int = 0, classes: int = 3, std: float = 0.3) -> Encoder:
    model = tiny_model(seed, layers=layers, width=width, num_labels=classes).double()
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return Encoder(model)


def task_of(classes: int) -> Classification | Regression:
    if classes == 1:
        return Regression("toy", ["pearson"], "pearson")
    return Classification("toy", [f"c{n}" for n in range(classes)], {}, ["accuracy"], "accuracy")


def bound(
    student: Encoder, teacher: Encoder, classes: int = 3, columns: list[int] | None = None, **arguments: object
) -> tuple[ADKD, Step]:
    method, frozen = ADKD(**arguments), FrozenTeacher(teacher, columns=columns)
    method.bind(Bound(student, [frozen], task_of(classes)))
    ours, (theirs,) = method.needs()
    labels = torch.tensor([0, 1, 1]) if classes > 1 else torch.tensor([0.5, 2.0, 1.0]).double()
    batch = Batch(INPUTS, (INPUTS,), labels, torch.arange(3))
    step = Step(Forward(student, INPUTS, ours), [Forward(frozen, INPUTS, theirs)], batch, task_of(classes), Progress())
    return method, step


def naive_maps(encoder: Encoder, classes: int, steps: int, keep: int | None) -> Tensor:
    """(views, batch, tokens), from gradients taken one score at a time by transformers' model and its embedding hook."""
    model = encoder.model
    embedded = model.bert.embeddings(INPUTS["input_ids"]).detach()
    views = {1: 1, 2: 1}.get(classes, classes)
    maps = torch.zeros(views, 3, 6).double()
    for view in range(views):
        for example in range(3):
            length = LENGTHS[example]
            gradient = torch.zeros(length, embedded.shape[-1]).double()
            for k in range(1, steps + 1):
                at = (embedded[example : example + 1, :length] * k / steps).requires_grad_()
                hook = model.bert.embeddings.register_forward_hook(lambda *_, at=at: at)
                logits = model(INPUTS["input_ids"][example : example + 1, :length]).logits[0]
                hook.remove()
                score = logits[0] if classes == 1 else -torch.log(logits[view].exp() / logits.exp().sum())
                gradient += torch.autograd.grad(score, at)[0][0] / steps
            for token in range(length):
                entries = [(a * g) for a, g in zip(embedded[example, token].tolist(), gradient[token].tolist(), strict=True)]
                largest = sorted(entries, key=abs, reverse=True)[: keep or len(entries)]
                maps[view, example, token] = sum(entry**2 for entry in largest) ** 0.5
    return maps


@pytest.mark.parametrize("classes", [1, 2, 3])
@pytest.mark.parametrize(("steps", "topk"), [(1, None), (1, 5), (3, 5)])
def test_the_attribution_term_equals_loops_over_classes_and_tokens(classes: int, steps: int, topk: int | None) -> None:
    student, teacher = encoder(2, 16, seed=1, classes=classes), encoder(3, classes=classes)
    method, step = bound(student, teacher, classes, steps=steps, topk=topk)
    ours, theirs = naive_maps(student, classes, steps, None), naive_maps(teacher, classes, steps, topk)
    total = 0.0
    for view in range(len(ours)):
        for example, length in enumerate(LENGTHS):
            one, other = (maps[view, example] / maps[view, example].pow(2).sum().sqrt() for maps in (ours, theirs))
            total += sum(float((one[token] - other[token]) ** 2) for token in range(length)) / length / 3
    assert method.terms(step)["attribution"].item() == pytest.approx(total, rel=1e-6)


def test_maps_of_two_classes_coincide_and_are_zero_on_padding() -> None:
    teacher = encoder(3, classes=2)
    found = TeacherMaps(0, 1, None, "loss")(teacher, INPUTS)[..., 0]
    assert ((found != 0) == MASK.bool()).all()
    raw = []
    for label in range(2):
        outputs = teacher(INPUTS, Needs(hidden=[0], gradient=True))
        loss = nn.functional.cross_entropy(outputs.logits, torch.full((3,), label))
        raw.append((outputs.hidden(0) * torch.autograd.grad(loss, outputs.hidden(0))[0]).norm(dim=-1))
    expected = nn.functional.normalize(found, dim=1)
    for each in raw:
        assert torch.allclose(nn.functional.normalize(each, dim=1), expected, rtol=0, atol=1e-12)
    assert not torch.allclose(raw[0], raw[1], rtol=1e-3)


@pytest.mark.parametrize("classes", [2, 3])
def test_maps_of_a_confident_teacher_are_not_lost_to_rounding(classes: int) -> None:
    teacher = encoder(3, classes=classes)
    with torch.no_grad():
        teacher.model.classifier.bias += torch.tensor([60.0, 0.0, -60.0]).double()[:classes]
    exact = nn.functional.normalize(TeacherMaps(0, 1, None, "loss")(teacher, INPUTS), dim=1)
    single = nn.functional.normalize(TeacherMaps(0, 1, None, "loss")(teacher.float(), INPUTS), dim=1)
    assert torch.allclose(single.double(), exact, rtol=0, atol=1e-4)
    assert (single[:, 0] > 1e-3).all()


def test_a_single_view_is_that_of_the_label() -> None:
    student, teacher = encoder(2, 16, seed=1), encoder(3)
    method, step = bound(student, teacher, views="gold")
    total = 0.0
    ours, theirs = naive_maps(student, 3, 1, None), naive_maps(teacher, 3, 1, None)
    for example, (length, label) in enumerate(zip(LENGTHS, [0, 1, 1], strict=True)):
        one, other = (nn.functional.normalize(maps[label, example], dim=0) for maps in (ours, theirs))
        total += float(((one - other) ** 2).sum()) / length / 3
    assert method.terms(step)["attribution"].item() == pytest.approx(total, rel=1e-6)


def test_terms_are_the_papers_mixture() -> None:
    student, teacher = encoder(2, 16, seed=1), encoder(3)
    method, step = bound(student, teacher, temperature=2.0)
    terms = method.terms(step)
    ours, theirs = (each.model(**INPUTS).logits for each in (student, teacher))
    soft = -((theirs / 2).softmax(-1) * (ours / 2).log_softmax(-1)).sum(-1).mean()
    assert terms["logits"].item() == pytest.approx(soft.item(), rel=1e-10)
    assert terms["task"].item() == pytest.approx(nn.functional.cross_entropy(ours, step.batch.labels).item(), rel=1e-10)


@pytest.mark.parametrize("name", ["bert.encoder.layer.0.attention.self.query.weight", "bert.embeddings.word_embeddings.weight"])
@pytest.mark.parametrize("steps", [1, 2])
def test_the_gradient_is_that_of_finite_differences(name: str, steps: int) -> None:
    student, teacher = encoder(2, 16, seed=1), encoder(3)
    method, step = bound(student, teacher, steps=steps)
    parameter = student.model.get_parameter(name)
    method.terms(step)["attribution"].backward()
    place = tuple(int(index) for index in (parameter.grad.abs() == parameter.grad.abs().max()).nonzero()[0])
    values = []
    for shift in (1e-5, -1e-5):
        with torch.no_grad():
            parameter[place] += shift
        values.append(method.terms(step.replace(student=Forward(student, INPUTS, method.needs()[0])))["attribution"].item())
        with torch.no_grad():
            parameter[place] -= shift
    assert parameter.grad[place].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_student_that_equals_its_teacher_is_at_zero_unless_entries_are_dropped() -> None:
    assert bound(encoder(3), encoder(3))[0].terms(bound(encoder(3), encoder(3))[1])["attribution"].item() < 1e-20
    method, step = bound(encoder(3), encoder(3), topk=3)
    assert method.terms(step)["attribution"].item() > 1e-6


def test_views_stand_in_the_order_of_the_tasks_labels() -> None:
    student, teacher = encoder(2, 16, seed=1), encoder(3)
    order = [2, 0, 1]
    method, step = bound(student, teacher, columns=order)
    found = method.terms(step)["attribution"].item()
    with torch.no_grad():
        for parameter in teacher.model.classifier.parameters():
            parameter.copy_(parameter[order])
    method, step = bound(student, teacher)
    assert found == pytest.approx(method.terms(step)["attribution"].item(), rel=1e-10)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("target", ["loss", "logit"])
def test_a_teacher_with_its_two_classes_reversed_shows_the_views_of_the_same_classes(steps: int, target: str) -> None:
    student, teacher = encoder(2, 16, seed=1, classes=2), encoder(3, classes=2)
    with torch.no_grad():
        teacher.model.classifier.bias += torch.tensor([23.0, 0.0]).double()
    method, step = bound(student, teacher, 2, steps=steps, target=target)
    expected = method.terms(step)["attribution"].item()
    with torch.no_grad():
        for parameter in teacher.model.classifier.parameters():
            parameter.copy_(parameter[[1, 0]])
    method, step = bound(student, teacher, 2, columns=[1, 0], steps=steps, target=target)
    assert method.terms(step)["attribution"].item() == pytest.approx(expected, rel=1e-9)


def test_teachers_maps_fit_sixteen_bits_however_small_the_gradients_are() -> None:
    teacher = encoder(3, classes=2)
    expected = TeacherMaps(0, 1, None, "logit")(teacher, INPUTS)
    with torch.no_grad():
        teacher.model.classifier.weight *= 2.0**-40
    found = TeacherMaps(0, 1, None, "logit")(teacher, INPUTS)
    assert torch.equal(found, expected)
    assert ((found.amax(dim=1) >= 1) & (found.amax(dim=1) < 2)).all()


@pytest.mark.parametrize("steps", [1, 3])
def test_terms_are_finite_whatever_the_margin(steps: int) -> None:
    for margin in (12.0, 45.0, 300.0, 1e4):
        student, teacher = encoder(2, 16, seed=1, classes=2).float(), encoder(3, classes=2).float()
        with torch.no_grad():
            student.model.classifier.bias += torch.tensor([margin, 0.0])
            teacher.model.classifier.bias += torch.tensor([0.0, margin])
        method, step = bound(student, teacher, 2, steps=steps)
        term = method.terms(step)["attribution"]
        term.backward()
        assert 1e-6 < term.item() < 1
        weight = student.model.get_parameter("bert.encoder.layer.0.attention.self.query.weight")
        assert weight.grad.isfinite().all()
        assert weight.grad.abs().max() > 0


def test_integrated_gradients_of_a_bert_add_up() -> None:
    model = encoder(2, classes=2, std=0.1)
    whole = model(INPUTS, Needs(hidden=[0])).hidden(0).detach()
    steps, total = 400, 0.0
    for k in range(1, steps + 1):
        at = (whole * k / steps).requires_grad_()
        score = model({**INPUTS, "embedded": at}, Needs(hidden=[0], gradient=True)).logits.log_softmax(-1)[:, 0].sum()
        total += (torch.autograd.grad(score, at)[0] * whole).sum().item() / steps

    def score_at(scale: float) -> float:
        return model({**INPUTS, "embedded": whole * scale}, Needs()).logits.log_softmax(-1)[:, 0].sum().item()

    # The first normalisation jumps at zero: the integral begins just above it.
    assert total == pytest.approx(score_at(1.0) - score_at(1e-3), rel=2e-2)


def test_passes_of_the_attribution_are_counted() -> None:
    method, step = bound(encoder(2, 16, seed=1), encoder(3), steps=3)
    method.terms(step)
    frozen = step.teacher.model
    assert frozen.work == {"passes": 4, "examples": 12, "batches_used": 1}


def test_the_name_of_the_maps_says_what_they_depend_on() -> None:
    settings = [(0, 1, None, "loss"), (1, 1, None, "loss"), (0, 2, None, "loss"), (0, 1, 5, "loss"), (0, 1, None, "logit")]
    assert len({TeacherMaps(*each).name for each in settings}) == len(settings)


def test_the_annealed_temperature_is_the_cards() -> None:
    falling = Staircase(start=4.0, end=1.0, steps=10)
    found = [falling(epoch / 10) for epoch in range(10)]
    assert found[:2] == pytest.approx([4.0, 3.6666667])
    assert found[-2:] == pytest.approx([1.3333333, 1.0])


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"topk": 33}, "topk"),
        ({"topk": 0}, "topk"),
        ({"steps": 0}, "steps"),
        ({"layers": [1, 1], "steps": 2}, "steps"),
        ({"layers": [2, 2]}, "layers"),
        ({"layers": [0]}, "layers"),
        ({"norm": 3}, "norm"),
        ({"distance": "l3"}, "distance"),
        ({"distance": "l1", "attribution_reduction": "norm"}, "distance"),
        ({"views": "one"}, "views"),
        ({"target": "gold"}, "target"),
        ({"attribution_reduction": "mean"}, "attribution_reduction"),
        ({"attribution_reduction": "none"}, "attribution_reduction"),
        ({"temperature": 0}, "temperature"),
    ],
)
def test_what_cannot_work_names_the_key(arguments: dict, key: str) -> None:
    with pytest.raises(InputError) as error:
        bound(encoder(2, 16), encoder(3), **arguments)
    assert error.value.key == key


def test_the_mean_over_a_batchs_tokens_says_that_it_couples_them() -> None:
    assert ADKD().batch_dependence() is None
    assert "tokens of a batch" in ADKD(attribution_reduction="tokens").batch_dependence()


def test_deeper_layers_can_be_compared() -> None:
    method, step = bound(encoder(2, 16, seed=1), encoder(3), layers=[1, 2])
    term = method.terms(step)["attribution"]
    term.backward()
    assert term.item() > 1e-6
