"""Auxiliary samples as the paper's formulas written out over transformers' models, and what generates them and when."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.bench import Bench
from torch import Tensor, nn

from conftest import tiny_model, tiny_tokenizer
from kd.data.batch import Batch
from kd.data.tasks import Classification, Regression
from kd.errors import InputError
from kd.forward import Forward, Needs
from kd.methods.backward_kd import BackwardKD
from kd.methods.base import Bound, Progress, Step
from kd.models import Encoder, FrozenTeacher
from whole_runs import broken_off, execute, last_weights, made, planned, same_weights

Small = Callable[..., list[str]]
TASK = Classification("toy", ["no", "maybe", "yes"], {}, ["accuracy"], "accuracy")
SCORES = Regression("toy scores", ["mse"], "mse")
LENGTHS = (7, 5, 4)
CLS, SEP = 2, 3


def encoder(layers: int = 2, width: int = 16, seed: int = 0, outputs: int = 3, **more: Any) -> Encoder:
    """In float64, with weights large enough that models disagree."""
    model = tiny_model(seed, layers=layers, width=width, num_labels=outputs, **more).double()
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return Encoder(model, tiny_tokenizer())


def text(padding: int = 0) -> dict[str, Tensor]:
    """Three sentences with [CLS], [SEP] and padding."""
    ids = torch.randint(5, 40, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(7) < torch.tensor(LENGTHS)[:, None]).long()
    ids[:, 0] = CLS
    for row, length in enumerate(LENGTHS):
        ids[row, length - 1] = SEP
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    fill = {"input_ids": 9, "attention_mask": 0}
    return {name: nn.functional.pad(rows, (0, padding), value=fill[name]) for name, rows in inputs.items()}


def step_of(method: BackwardKD, student: Encoder, teacher: FrozenTeacher, padding: int = 0, epoch: int = 0) -> Step:
    inputs = text(padding)
    ours, (theirs,) = method.needs()
    batch = Batch(inputs, (inputs,), torch.tensor([0, 2, 1]), torch.tensor([4, 0, 9]))
    forwards = Forward(student, inputs, ours), [Forward(teacher, inputs, theirs)]
    return Step(*forwards, batch, TASK, Progress(epoch=epoch))


def bound(student: Encoder, teacher: Encoder, **arguments: Any) -> tuple[BackwardKD, Step]:
    method, frozen = BackwardKD(**arguments), FrozenTeacher(teacher)
    method.bind(Bound(student, [frozen], TASK))
    method.double()
    return method, step_of(method, student, frozen)


def movable() -> list[list[int]]:
    """Positions of the words of each sentence, without [CLS], [SEP] and padding."""
    return [list(range(1, length - 1)) for length in LENGTHS]


def naive(student: Encoder, teacher: Encoder, method: BackwardKD) -> list[tuple[Tensor, Tensor]]:
    """Words of both models after each step, by the paper's formulas."""
    inputs, mask = text(), text()["attention_mask"]
    ours, theirs = (model.model.get_input_embeddings().weight.detach().T for model in (student, teacher))
    gram = ours @ ours.T
    gram = gram + method.ridge * gram.trace() / len(gram) * torch.eye(len(gram)).double()
    matrix = theirs @ ours.T @ torch.linalg.inv(gram)
    norm = sum(math.sqrt(sum(entry**2 for entry in column)) for column in ours.T.tolist()) / ours.shape[1]
    start, own = ours.T[inputs["input_ids"]], theirs.T[inputs["input_ids"]]

    def for_teacher(words: Tensor) -> Tensor:
        if method.teacher_words == "transferred":
            return torch.einsum("ts,bns->bnt", matrix, words)
        return own + torch.einsum("ts,bns->bnt", matrix, words - start)

    words, found = start.clone(), []
    for _ in range(method.steps):
        words = words.detach().requires_grad_()
        s = student.model(inputs_embeds=words, attention_mask=mask).logits
        if method.direction == "student_loss":
            value = nn.functional.cross_entropy(s, torch.tensor([0, 2, 1]), reduction="sum")
        else:
            t = teacher.model(inputs_embeds=for_teacher(words), attention_mask=mask).logits
            if method.outputs == "probabilities":
                s, t = s.softmax(-1), t.softmax(-1)
            value = ((t - s) ** 2).sum()
        (gradient,) = torch.autograd.grad(value, words)
        moved = words.detach().clone()
        for example, positions in enumerate(movable()):
            length = math.sqrt(sum(entry**2 for p in positions for entry in gradient[example, p].tolist()))
            factor = method.step_size * norm * (math.sqrt(len(positions)) / length if method.normalize else 1)
            for p in positions:
                moved[example, p] += factor * gradient[example, p]
            if method.radius is not None:
                shift = moved[example] - start[example]
                far = math.sqrt(sum(entry**2 for entry in shift.flatten().tolist()) / len(positions))
                if far > method.radius * norm:
                    moved[example] = start[example] + shift * method.radius * norm / far
        words = moved
        found.append((moved, for_teacher(moved).detach()))
    return found


VARIANTS: list[dict[str, Any]] = [
    {},
    {"steps": 3},
    {"steps": 3, "iterates": "all", "radius": 0.15},
    {"normalize": False, "step_size": 0.01, "steps": 2},
    {"outputs": "probabilities"},
    {"teacher_words": "shifted", "steps": 2},
    {"direction": "student_loss", "steps": 2},
    {"ridge": 0.1},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_samples_equal_the_formulas_written_out(variant: dict[str, Any]) -> None:
    student, teacher = encoder(seed=1), encoder(3, 24, seed=2)
    method, step = bound(student, teacher, **variant)
    expected = naive(student, teacher, method)
    expected = expected if method.iterates == "all" else expected[-1:]
    found = method.samples(step)
    assert len(found) == len(expected)
    for both, of_both in zip(found, expected, strict=True):
        for words, exact in zip(both, of_both, strict=True):
            assert not words.requires_grad
            torch.testing.assert_close(words, exact, rtol=0, atol=1e-9)


@pytest.mark.parametrize("loss", ["kl", "ce", "mse"])
@pytest.mark.parametrize("reduction", ["batchmean", "elementmean"])
def test_terms_equal_the_losses_written_out(loss: str, reduction: str) -> None:
    student, teacher, temperature = encoder(seed=1), encoder(3, 24, seed=2), 2.0
    options = {"temperature": temperature, "auxiliary_loss": loss, "reduction": reduction, "steps": 2, "iterates": "all"}
    method, step = bound(student, teacher, **options)
    mask, losses, samples = text()["attention_mask"], [], naive(student, teacher, method)
    with torch.no_grad():
        for ours, theirs in samples:
            s, t = (m.model(inputs_embeds=w, attention_mask=mask).logits for m, w in ((student, ours), (teacher, theirs)))
            p, log_p, log_q = (
                (t / temperature).softmax(-1),
                (t / temperature).log_softmax(-1),
                (s / temperature).log_softmax(-1),
            )
            entries = {"kl": 4 * p * (log_p - log_q), "ce": -p * log_q, "mse": (s - t) ** 2}[loss]
            losses.append(entries.sum() / (3 if reduction == "batchmean" else 9))
        s, t = (model.model(**text()).logits for model in (student, teacher))
        soft = 4 * (t / 2).softmax(-1) * ((t / 2).log_softmax(-1) - (s / 2).log_softmax(-1))
    terms = method.terms(step)
    assert terms["auxiliary"].item() == pytest.approx(sum(losses).item() / 2, rel=1e-8)
    assert terms["logits"].item() == pytest.approx(soft.sum().item() / (3 if reduction == "batchmean" else 9), rel=1e-9)
    assert terms["task"].item() == pytest.approx(nn.functional.cross_entropy(s, torch.tensor([0, 2, 1])).item(), rel=1e-9)


@pytest.mark.parametrize("family", ["roberta", "distilbert", "mpnet"])
def test_models_of_every_family_are_moved(family: str) -> None:
    student, teacher = encoder(seed=1, model_type=family), encoder(3, 24, seed=2, model_type=family)
    method, step = bound(student, teacher, steps=2)
    before, ((ours, theirs),) = student.word_embeddings(text()["input_ids"]), method.samples(step)
    assert (ours - before).flatten(1).norm(dim=1).gt(0).all()
    with torch.no_grad():
        inputs = [{**text(), "words": words} for words in (before, before @ method.matrix.T, ours, theirs)]
        logits = [model(given, Needs()).logits for model, given in zip((student, teacher) * 2, inputs, strict=True)]
    assert ((logits[2] - logits[3]).square().sum(-1) > (logits[0] - logits[1]).square().sum(-1)).all()
    assert set(method.terms(step)) == set(method.names)


def test_small_steps_raise_the_divergence_of_every_example() -> None:
    student, teacher = encoder(seed=1), encoder(3, 24, seed=2)
    method, step = bound(student, teacher, step_size=1e-3, steps=5, iterates="all")
    samples, mask, before = method.samples(step), text()["attention_mask"], None
    with torch.no_grad():
        for ours, theirs in samples:
            s, t = (m.model(inputs_embeds=w, attention_mask=mask).logits for m, w in ((student, ours), (teacher, theirs)))
            now = ((s - t) ** 2).sum(-1)
            assert before is None or (now > before).all()
            before = now


@pytest.mark.parametrize("normalize", [True, False])
def test_models_that_are_equal_move_nothing(normalize: bool) -> None:
    student = encoder(seed=1)
    method, step = bound(student, copy.deepcopy(student), normalize=normalize)
    ((ours, theirs),) = method.samples(step)
    words = student.word_embeddings(text()["input_ids"])
    assert torch.equal(ours, words)
    assert torch.equal(theirs, words)
    assert torch.equal(method.matrix, torch.eye(16).double())


@pytest.mark.parametrize("direction", ["divergence", "noise", "student_loss"])
def test_ends_and_padding_stay_exactly_where_they_are(direction: str) -> None:
    student, teacher = encoder(seed=1), encoder(3, 24, seed=2)
    method, step = bound(student, teacher, direction=direction, step_size=1.0, steps=2)
    shift = method.samples(step)[0][0] - student.word_embeddings(text()["input_ids"])
    moved = {(example, p) for example, positions in enumerate(movable()) for p in positions}
    for example in range(3):
        for position in range(7):
            assert bool((shift[example, position] != 0).any()) == ((example, position) in moved)


def test_generation_changes_no_parameter_and_gives_none_a_gradient() -> None:
    student, teacher = encoder(seed=1).train(), encoder(3, 24, seed=2)
    method, step = bound(student, teacher, steps=3)
    before = [copy.deepcopy(model.state_dict()) for model in (student, teacher)]
    method.samples(step)
    for model, state in zip((student, teacher), before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
    assert student.training
    method.terms(step)["auxiliary"].backward()
    table = student.base.embeddings.word_embeddings.weight
    reached = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert table.grad is None  # the samples are data
    assert {name for name, _ in student.named_parameters()} - reached == {"model.bert.embeddings.word_embeddings.weight"}
    assert all(parameter.grad is None for parameter in (*teacher.parameters(), *method.parameters()))


def test_samples_are_generated_without_dropout_and_learned_from_with_it() -> None:
    dropout = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    student, teacher = encoder(seed=1, **dropout), encoder(3, 24, seed=2)
    without, step = bound(copy.deepcopy(student), teacher)
    ((expected, _),) = without.samples(step)
    method, step = bound(student.train(), teacher)
    method.train()
    for _ in range(2):
        ((ours, _),) = method.samples(step)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    assert method.terms(step)["auxiliary"] != method.terms(step)["auxiliary"]


def moved(student: Encoder) -> None:
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)).to(parameter)


@pytest.mark.parametrize(
    ("arguments", "renewed"),
    [({}, [0, 1, 2, 3]), ({"epochs": 2}, [0, 2]), ({"refresh": "batch"}, None)],
    ids=str,
)
def test_a_copy_generates_until_its_epochs_are_over(arguments: dict[str, Any], renewed: list[int] | None) -> None:
    student, teacher = encoder(seed=1), encoder(3, 24, seed=2)
    method, _ = bound(student, teacher, **arguments)
    last = None
    for epoch in range(4):
        for batch in range(2):
            ((ours, _),) = method.samples(step_of(method, student, FrozenTeacher(teacher), epoch=epoch))
            new = renewed is None or (batch == 0 and epoch in renewed)
            assert last is None or torch.equal(ours, last) != new, (epoch, batch)
            if new:
                fresh, step = bound(student, teacher, **arguments)
                assert torch.equal(ours, fresh.samples(step)[0][0])
            last = ours
            moved(student)


@pytest.mark.parametrize("transfer", ["refresh", "once"])
def test_the_matrix_is_computed_at_each_refresh_or_once(transfer: str) -> None:
    student, teacher = encoder(seed=1), encoder(3, 24, seed=2)
    method, step = bound(student, teacher, transfer=transfer)
    method.samples(step)
    first, norm = method.matrix.clone(), method.mean_norm.clone()
    moved(student)
    method.samples(step_of(method, student, FrozenTeacher(teacher), epoch=1))
    assert torch.equal(method.matrix, first) == (transfer == "once")
    assert not torch.equal(method.mean_norm, norm)


def test_noise_has_the_norm_of_the_ascents_shift_and_follows_the_example_alone() -> None:
    student, teacher = encoder(seed=1), encoder(3, 24, seed=2)
    words = student.word_embeddings(text()["input_ids"]).detach()
    shifts = {}
    for direction in ("divergence", "noise"):
        method, step = bound(student, teacher, direction=direction, steps=2, normalize=False, step_size=0.02)
        shifts[direction] = [ours - words for ours, _ in method.samples(step)]
    (ascent,), (noise,) = shifts["divergence"], shifts["noise"]
    torch.testing.assert_close(noise.flatten(1).norm(dim=1), ascent.flatten(1).norm(dim=1))
    assert (nn.functional.cosine_similarity(noise.flatten(1), ascent.flatten(1)).abs() < 0.5).all()
    padded = method.samples(step_of(method, student, FrozenTeacher(teacher), padding=4))[0][0][:, :7] - words
    torch.testing.assert_close(padded[:, :4], noise[:, :4], rtol=0, atol=1e-12)


@pytest.mark.parametrize("direction", ["divergence", "noise", "student_loss"])
def test_padding_changes_no_term(direction: str) -> None:
    student, teacher = encoder(seed=1), encoder(3, 24, seed=2)
    method, step = bound(student, teacher, direction=direction, steps=2, radius=0.15)
    one, other = method.terms(step), method.terms(step_of(method, student, FrozenTeacher(teacher), padding=5))
    for term in one:
        torch.testing.assert_close(one[term], other[term], rtol=0, atol=1e-10)


def test_samples_follow_the_order_of_the_teachers_labels() -> None:
    student, teacher = encoder(seed=1), encoder(3, 24, seed=2)
    reordered = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in (reordered.outputs.weight, reordered.outputs.bias):
            parameter.copy_(parameter[[2, 0, 1]].clone())
    method, step = bound(student, teacher)
    expected = method.samples(step)[0][0]
    frozen = FrozenTeacher(reordered, columns=[1, 2, 0])
    found = method.samples(step_of(method, student, frozen))[0][0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "case",
    [
        "backward_kd method.refresh=batch method.steps=2 method.iterates=all",
        "backward_kd method.direction=noise task=stsb",
        "backward_kd method.direction=student_loss cohort=mutual cohort.teacher=online",
        "backward_kd surgery=[factorized] surgery.factorized.rank=8",
        "backward_kd pool=wkd teacher=[minilm,minilm_4l]",
    ],
)
def test_compositions_reach_every_trainable_parameter(case: str) -> None:
    bench = Bench(case, dropout=0.1)
    bench.engine.loss(bench.batch()).total.backward()
    for name, parameter in bench.engine.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    bench.update(bench.batch())


def test_a_teacher_that_is_trained_is_not_differentiated() -> None:
    with pytest.raises(InputError) as caught:
        Bench("backward_kd cohort=mutual cohort.teacher=online")
    assert caught.value.key == "cohort.teacher"


@pytest.mark.thorough
def test_stopped_run_ends_with_the_weights_of_an_unbroken_one(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = small("method=backward_kd", "trainer.checkpoint_minutes=0")
    unbroken, result = made(words)
    run = planned([*words, f"paths.runs={tmp_path}"])
    broken_off(run, 8, monkeypatch)  # in the second epoch, whose samples are of the student at its start
    execute.execute(run)
    assert any(name.startswith("method.copy.") for name in last_weights(run))
    assert same_weights(last_weights(run), last_weights(unbroken))
    assert "generated in training" in result["cache"]["minilm"]["why"]


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 1.0}, "steps"),
        ({"step_size": 0}, "step_size"),
        ({"normalize": "yes"}, "normalize"),
        ({"radius": 0}, "radius"),
        ({"iterates": "first"}, "iterates"),
        ({"direction": "gradient"}, "direction"),
        ({"outputs": "scores"}, "outputs"),
        ({"teacher_words": "own"}, "teacher_words"),
        ({"transfer": "never"}, "transfer"),
        ({"ridge": -1}, "ridge"),
        ({"refresh": "step"}, "refresh"),
        ({"epochs": 0}, "epochs"),
        ({"epochs": 2, "refresh": "batch"}, "epochs"),
        ({"temperature": 0}, "temperature"),
        ({"loss": "l1"}, "loss"),
        ({"auxiliary_loss": "l2"}, "auxiliary_loss"),
        ({"reduction": "sum"}, "reduction"),
    ],
    ids=str,
)
def test_impossible_arguments_are_refused_by_their_key(arguments: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError) as caught:
        BackwardKD(**arguments)
    assert caught.value.key == key


def test_models_and_tasks_that_do_not_suit_are_refused_while_binding() -> None:
    student, teacher = encoder(outputs=1), FrozenTeacher(encoder(outputs=1))
    BackwardKD().bind(Bound(student, [teacher], SCORES))
    with pytest.raises(InputError, match="task has scores") as caught:
        BackwardKD(outputs="probabilities").bind(Bound(student, [teacher], SCORES))
    assert caught.value.key == "outputs"


def test_needs_and_description_say_what_runs() -> None:
    method, _ = bound(encoder(), encoder(3, 24))
    ours, (theirs,) = method.needs()
    assert not ours.gradient
    assert theirs.gradient
    assert theirs.uncacheable_reason is not None
    assert not BackwardKD(direction="student_loss").needs()[1][0].gradient
    assert method.describe()["words (student->teacher)"] == "16 -> 24 by least squares, transferred"
    assert BackwardKD.same_vocabulary
