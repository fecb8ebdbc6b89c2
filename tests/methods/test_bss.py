"""BSS: its samples and losses as loops over calls of the models, its choice of base samples, and what is refused."""

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM

from conftest import tiny_config, tiny_model
from kd.config.compose import compose
from kd.data.batch import Batch
from kd.data.tasks import Classification, Regression
from kd.errors import InputError
from kd.forward import Forward
from kd.functional import boundary
from kd.functional.logits import soft_cross_entropy
from kd.methods.base import Bound, Progress, Step
from kd.methods.bss import BSS
from kd.models import Encoder, FrozenTeacher
from kd.schedules import Linear

pytestmark = pytest.mark.fast

TASK = Classification("toy", ["no", "maybe", "yes"], {}, ["accuracy"], "accuracy")
COUNT = 8
LENGTHS = (6, 4, 3, 5, 6, 2, 4, 5)
SCALE = 2.0
"""Standard deviation of the logits of the models here."""


def encoder(layers: int = 2, width: int = 16, seed: int = 0, outputs: int = 3, **sizes: object) -> Encoder:
    model = tiny_model(seed, layers=layers, width=width, num_labels=outputs, **sizes).double()
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return Encoder(model)


def bound(
    student: Encoder, teacher: Encoder, padding: int = 0, progress: Progress | None = None, **arguments: object
) -> tuple[BSS, Step]:
    """A method bound to two models, and a step over sentences whose labels are mostly the teacher's classes."""
    ids = torch.randint(5, 30, (COUNT, 6), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(6) < torch.tensor(LENGTHS)[:, None]).long()
    empty = student.config.pad_token_id
    inputs = {"input_ids": ids * mask + empty * (1 - mask), "attention_mask": mask}
    fill = {"input_ids": empty, "attention_mask": 0}
    inputs = {name: nn.functional.pad(rows, (0, padding), value=fill[name]) for name, rows in inputs.items()}
    with torch.no_grad():
        for model in (student, teacher):  # so that each class is some examples'
            logits = model.eval().model(**inputs).logits
            factor = SCALE / (logits - logits.mean(0)).std()
            model.outputs.bias.copy_((model.outputs.bias - logits.mean(0)) * factor)
            model.outputs.weight *= factor
        labels = teacher.model(**inputs).logits.argmax(-1)
    method, frozen = BSS(**arguments), FrozenTeacher(teacher)
    method.bind(Bound(student, [frozen], TASK))
    method.double()
    labels[0] = (labels[0] + 1) % 3
    ours, (theirs,) = method.needs()
    batch = Batch(inputs, (inputs,), labels, torch.arange(COUNT) + 20)
    step = Step(Forward(student, inputs, ours), [Forward(frozen, inputs, theirs)], batch, TASK, progress or Progress())
    return method, step


def call(model: nn.Module, states: str, moved: Tensor, step: Step, row: int) -> Tensor:
    """Logits of one example whose embeddings are given: word embeddings, or what a hook puts for the embeddings' output."""
    inputs = {name: tensor[row : row + 1] for name, tensor in step.batch.student.items()}
    if states == "words":
        return model(inputs_embeds=moved, attention_mask=inputs["attention_mask"]).logits[0]
    handle = model.base_model.embeddings.register_forward_hook(lambda *_: moved)
    try:
        return model(**inputs).logits[0]
    finally:
        handle.remove()


def embedded(model: nn.Module, states: str, step: Step, row: int) -> Tensor:
    """The embeddings of one example, (1, tokens, width)."""
    ids = step.batch.student["input_ids"][row : row + 1]
    with torch.no_grad():
        return model.get_input_embeddings()(ids) if states == "words" else model.base_model.embeddings(ids)


def draw_class(p: list[float], label: int, draw: float) -> int:
    rest = [0.0 if c == label else probability for c, probability in enumerate(p)]
    reached = 0.0
    for c, probability in enumerate(rest):
        reached += probability / sum(rest)
        if probability and reached > draw:
            return c
    raise AssertionError


def naive(method: BSS, step: Step) -> dict[int, float]:
    """The cross entropy of every base sample, by its row."""
    student, teacher, labels = step.student.model.model, step.teacher.model.encoder.model, step.batch.labels.tolist()
    losses, draws = {}, step.draws("class", 1)
    for row, label in enumerate(labels):
        start = embedded(teacher, method.states, step, row)
        own = embedded(student, method.states, step, row)
        first = call(teacher, method.states, start, step, row).detach()
        ours = call(student, method.states, own, step, row).detach()
        if int(first.argmax()) != label or (method.base == "both" and int(ours.argmax()) != label):
            continue
        other = draw_class(first.softmax(-1).tolist(), label, float(draws[row, 0]))
        x = start.clone()
        for _ in range(method.steps):
            x = x.detach().requires_grad_()
            z = call(teacher, method.states, x, step, row)
            if int(z.argmax()) != label:
                break
            (gradient,) = torch.autograd.grad(z[other] - z[label], x)
            z = z.detach()
            norm = sum(float(entry) ** 2 for entry in gradient.flatten()) ** 0.5
            x = x.detach() + method.step_size * (abs(float(z[label] - z[other])) + 1e-4) * gradient / norm
        with torch.no_grad():
            target = (call(teacher, method.states, x, step, row) / 3).softmax(-1)
            shift = x - start
            if method.shift is not None:
                shift = shift @ method.shift
            moved = (call(student, method.states, own + shift, step, row) / 3).log_softmax(-1)
        losses[row] = -float((target * moved).sum())
    return losses


@pytest.mark.parametrize("width", [16, 8])
@pytest.mark.parametrize("states", ["embedded", "words"])
@pytest.mark.parametrize(("base", "steps"), [("both", 10), ("teacher", 10), ("teacher", 1)])
def test_boundary_term_equals_the_algorithm_written_as_loops(states: str, base: str, steps: int, width: int) -> None:
    student, teacher = encoder(width=width, seed=1).eval(), encoder(3).eval()
    method, step = bound(student, teacher, states=states, base=base, steps=steps)
    losses = naive(method, step)
    assert len(losses) == COUNT - 1 if base == "teacher" else 1 <= len(losses) < COUNT - 1
    assert method.terms(step)["boundary"].item() == pytest.approx(sum(losses.values()) / COUNT, rel=1e-8)
    method.boundary_reduction = "base"  # the authors' code
    assert method.terms(step)["boundary"].item() == pytest.approx(sum(losses.values()) / len(losses), rel=1e-8)
    method.boundary_reduction, method.reduction = "batch", "elementmean"
    assert method.terms(step)["boundary"].item() == pytest.approx(sum(losses.values()) / COUNT / 3, rel=1e-8)


@pytest.mark.parametrize("family", ["roberta", "distilbert", "mpnet"])
@pytest.mark.parametrize("states", ["embedded", "words"])
def test_other_families_move_embeddings_too(family: str, states: str) -> None:
    models = encoder(seed=1, model_type=family).eval(), encoder(3, model_type=family).eval()
    method, step = bound(*models, states=states, base="teacher")
    first = method.terms(step)["boundary"]
    _, padded = bound(*models, padding=3, states=states, base="teacher")
    assert first.item() > 0
    torch.testing.assert_close(method.terms(padded)["boundary"], first, rtol=0, atol=1e-10)


def test_other_losses_are_those_of_the_authors() -> None:
    method, step = bound(encoder(seed=1), encoder(3))
    terms = method.terms(step)
    s, t = step.student.outputs.logits, step.teacher.outputs.logits
    expected = -((t / 3).softmax(-1) * (s / 3).log_softmax(-1)).sum() / COUNT  # not times T squared
    torch.testing.assert_close(terms["logits"], expected.detach(), check_dtype=False)
    torch.testing.assert_close(expected, soft_cross_entropy(s, t, 3.0))
    torch.testing.assert_close(terms["task"], nn.functional.cross_entropy(s, step.batch.labels))


def test_weights_fall_as_published() -> None:
    weights = compose(["method=bss"]).method.weights
    r, a = (
        Linear(**{key: value for key, value in weights[name].items() if key != "_target_"}) for name in ("logits", "boundary")
    )
    for epoch in range(81):
        assert r(epoch / 80) == pytest.approx(max(3 * (1 - epoch / 80), 0) + 1)
        assert a(epoch / 80) == pytest.approx(max(2 * (1 - 4 * epoch / 3 / 80), 0), abs=1e-12)


def test_classes_are_drawn_in_proportion_to_the_softmax_and_never_the_label() -> None:
    logits = torch.tensor([[1.0, 3.0, 0.0, 2.0]])
    draws = (torch.arange(10000).double() + 0.5) / 10000
    found = boundary.other_classes(logits.expand(10000, -1), torch.full((10000,), 1), draws)
    p = logits[0].double().softmax(-1)
    p[1] = 0
    shares = torch.bincount(found, minlength=4) / 10000
    torch.testing.assert_close(shares.double(), p / p.sum(), rtol=0, atol=2e-4)
    certain = torch.tensor([[0.0, 3e4, -3e4], [0.0, 1.0, -3e4]])
    assert boundary.other_classes(
        certain, torch.tensor([1, 1]), torch.tensor([0.0, 1 - 2**-53], dtype=torch.double)
    ).tolist() == [0, 0]


def test_disagreement_leaves_the_label_out() -> None:
    student, teacher = torch.tensor([[0.0, 1.0, 2.0]]).double(), torch.tensor([[2.0, 0.0, 0.0]]).double()
    p, q = student.softmax(-1)[0], teacher.softmax(-1)[0]
    expected = float((p[1] - q[1]) ** 2 + (p[2] - q[2]) ** 2)
    assert boundary.disagreement(student, teacher, torch.tensor([0])).item() == pytest.approx(expected)


def test_a_full_step_reaches_the_boundary_of_a_classifier_of_unit_gradient() -> None:
    torch.manual_seed(0)
    direction = torch.randn(1, 4, 3).double()
    direction = direction / direction.norm()
    x = torch.randn(1, 4, 3).double()
    margin = (x * direction).sum(dim=(1, 2))  # z_k - z_y
    moved = boundary.toward_boundary(x, direction * 5, margin, 1.0)
    assert ((moved - x) / direction).std().item() == pytest.approx(0, abs=1e-9)
    assert (moved - x).norm().item() == pytest.approx(abs(margin.item()) + 1e-4)
    assert torch.equal(boundary.toward_boundary(x, torch.zeros_like(x), margin, 1.0), x)


def test_samples_cross_the_boundary_and_stay_where_they_crossed() -> None:
    method, step = bound(encoder(seed=1).eval(), encoder(3).eval(), base="teacher", step_size=1.0, steps=50)
    rows = torch.arange(1, COUNT)
    shift, logits = method.samples_of(step, step.teacher.outputs.hidden(0), rows)
    labels = step.batch.labels[rows]
    assert (logits.argmax(-1) != labels).float().mean() > 0.5
    again = method.samples_of(step, step.teacher.outputs.hidden(0), rows)[0]
    assert torch.equal(shift, again)
    alone = method.samples_of(step, step.teacher.outputs.hidden(0), rows[2:3])[0]
    torch.testing.assert_close(shift[2:3], alone, rtol=0, atol=1e-10)
    real = step.batch.student["attention_mask"][rows].bool()
    assert torch.equal(shift[~real], torch.zeros_like(shift[~real]))
    assert not shift.requires_grad
    assert not logits.requires_grad


def test_tables_that_are_linear_maps_of_each_other_give_that_map() -> None:
    torch.manual_seed(0)
    table, linear = torch.randn(40, 6).double(), torch.randn(6, 4).double()
    torch.testing.assert_close(boundary.least_squares_map(table, table @ linear), linear)
    student, teacher = encoder(width=8, seed=1), encoder()
    method, _ = bound(student, teacher)
    ours, theirs = (model.word_embeddings.weight.detach() for model in (student, teacher))
    expected = torch.linalg.lstsq(theirs, ours).solution
    torch.testing.assert_close(method.shift, expected)
    assert bound(encoder(seed=1), teacher)[0].shift is None


def test_the_map_is_saved_with_the_method() -> None:
    method, _ = bound(encoder(width=8, seed=1), encoder())
    other, _ = bound(encoder(width=8, seed=2), encoder(seed=3))
    assert not torch.allclose(method.shift, other.shift)
    other.load_state_dict(method.state_dict())
    assert torch.equal(method.shift, other.shift)


def test_models_on_the_meta_device_are_planned() -> None:
    method = BSS()
    method.bind(Bound(encoder(width=8).to("meta"), [FrozenTeacher(encoder().to("meta"))], TASK))
    assert method.shift.shape == (16, 8)


def test_largest_disagreements_of_the_base_samples_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    method, step = bound(encoder(seed=1).eval(), encoder(3).eval(), base="teacher", samples=2)
    assert method.across_ranks
    scores = []
    s, t = (forward.outputs.logits.detach().softmax(-1) for forward in (step.student, step.teacher))
    for row, label in enumerate(step.batch.labels.tolist()):
        scores.append(sum(float(s[row, c] - t[row, c]) ** 2 for c in range(3) if c != label) if row else -1.0)
    best = sorted(range(COUNT), key=lambda row: -scores[row])[:2]
    chosen = method.base_samples(step)
    assert chosen.nonzero().squeeze(1).tolist() == sorted(best)
    losses = naive(method, step)
    assert method.terms(step)["boundary"].item() == pytest.approx(sum(losses[row] for row in best) / COUNT, rel=1e-8)
    method.samples = 64
    assert method.base_samples(step).sum() == COUNT - 1
    method.samples = 2

    def across(given: Step, rows: Tensor) -> Tensor:  # another rank has examples on which the models differ more
        more = rows + 100 if rows.dtype.is_floating_point else rows + COUNT
        return torch.cat([rows, more])

    monkeypatch.setattr(Step, "across", across)
    assert method.base_samples(step).sum() == 0


def test_a_mean_over_base_samples_counts_those_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    method, step = bound(encoder(seed=1).eval(), encoder(3).eval(), base="teacher", boundary_reduction="base")
    assert method.across_ranks
    plain = method.terms(step)["boundary"]
    monkeypatch.setattr(Step, "across", lambda _, rows: torch.cat([rows, torch.zeros_like(rows), rows]))
    torch.testing.assert_close(method.terms(step)["boundary"], plain)


def test_without_base_samples_the_term_is_zero_and_the_teacher_runs_once() -> None:
    method, step = bound(encoder(seed=1), encoder(3))
    step.batch.labels[:] = (step.teacher.outputs.logits.argmax(-1) + 1) % 3
    for reduction in ("batch", "base"):
        method.boundary_reduction = reduction
        term = method.terms(step)["boundary"]
        assert term.item() == 0
        assert term.requires_grad
    assert step.teacher.model.passes == 1


def test_no_samples_are_made_late_in_training() -> None:
    models = encoder(seed=1), encoder(3)
    for done, made in ((75, True), (76, False)):
        method, step = bound(*models, base="teacher", progress=Progress(done, 100))
        assert (method.terms(step)["boundary"].item() > 0) == made
        assert (step.teacher.model.passes > 1) == made
    method, step = bound(*models, base="teacher", progress=Progress(100, 100), until=1)
    assert method.terms(step)["boundary"].item() > 0


def test_teacher_runs_once_for_each_step_and_at_the_start() -> None:
    method, step = bound(encoder(seed=1), encoder(3), base="teacher", step_size=1e-6, steps=4)
    method.terms(step)
    assert step.teacher.model.passes == 5
    assert step.student.model.forwards == 2


@pytest.mark.parametrize("states", ["embedded", "words"])
def test_student_gets_gradients_from_its_embeddings_up_and_the_teacher_none(states: str) -> None:
    student, teacher = encoder(width=8, seed=1), encoder(3)
    method, step = bound(student, teacher, states=states, base="teacher")
    method.terms(step)["boundary"].backward()
    assert student.base.embeddings.word_embeddings.weight.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher.training


def test_two_methods_may_share_the_first_pass_of_a_teacher() -> None:
    method, step = bound(encoder(seed=1), encoder(3), base="teacher")
    assert torch.equal(method.terms(step)["boundary"], method.terms(step)["boundary"])
    with torch.no_grad():
        assert method.terms(step)["boundary"].item() > 0


@pytest.mark.parametrize("states", ["embedded", "words"])
def test_padding_changes_no_term(states: str) -> None:
    models = encoder(width=8, seed=1).eval(), encoder(3)
    one, other = (method.terms(step) for method, step in (bound(*models, padding, states=states) for padding in (0, 5)))
    for term in one:
        torch.testing.assert_close(one[term], other[term], rtol=0, atol=1e-10)


def test_equal_models_read_the_same_samples() -> None:
    method, step = bound(encoder(3).eval(), encoder(3).eval(), loss="kl")
    assert method.terms(step)["boundary"].item() == pytest.approx(0, abs=1e-12)
    assert step.teacher.model.passes > 1


def test_dependences_are_declared() -> None:
    assert BSS().batch_dependence() is None
    assert not BSS().across_ranks
    assert "samples=64" in str(BSS(samples=64).batch_dependence())
    assert "base samples of a batch" in str(BSS(boundary_reduction="base").batch_dependence())
    assert "classifies correctly" in str(BSS().label_dependence())
    assert BSS().distances == BSS(until=1).distances == ("logits",)
    assert BSS(until=1, loss="kl").distances == BSS(until=1, base="teacher").distances == ("logits", "boundary")
    assert BSS().same_vocabulary


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"states": "hidden"}, "states"),
        ({"base": "student"}, "base"),
        ({"samples": 0}, "samples"),
        ({"steps": 0}, "steps"),
        ({"steps": 1001}, "steps"),
        ({"step_size": 0}, "step_size"),
        ({"step_size": -0.3}, "step_size"),
        ({"until": 0}, "until"),
        ({"until": 1.5}, "until"),
        ({"boundary_reduction": "examples"}, "boundary_reduction"),
        ({"temperature": 0}, "temperature"),
        ({"loss": "l1"}, "loss"),
        ({"reduction": "none"}, "reduction"),
    ],
    ids=str,
)
def test_impossible_arguments_are_refused_by_their_key(arguments: dict[str, object], key: str) -> None:
    with pytest.raises(InputError) as caught:
        BSS(**arguments)
    assert caught.value.key == key


def test_scores_and_masked_words_have_no_boundary() -> None:
    teacher = FrozenTeacher(encoder(outputs=1))
    with pytest.raises(InputError, match="use method=kd") as caught:
        BSS().bind(Bound(encoder(outputs=1), [teacher], Regression("scores", ["mse"], "mse")))
    assert caught.value.key == "method"
    model = Encoder(AutoModelForMaskedLM.from_config(tiny_config()))
    with pytest.raises(InputError, match="use method=kd"):
        BSS().bind(Bound(model, [teacher], TASK))
