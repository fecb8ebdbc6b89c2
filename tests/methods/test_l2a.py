"""L2A: worked numbers, its terms as loops, which examples count, what the policy learns over an episode, and refusals."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from conftest import tiny_model, tiny_tokenizer
from kd.data.batch import Batch
from kd.data.tasks import NO_CLASS, Classification, Regression, Task
from kd.engines.distiller import Distiller
from kd.engines.models import Models
from kd.engines.optimizer import OptimizerFactory
from kd.errors import InputError
from kd.forward import Forward, Needs
from kd.functional.reinforce import log_probability, selected_mean
from kd.methods.base import Bound, Progress, Step
from kd.methods.l2a import L2A, with_gradient
from kd.methods.tinybert import TinyBERT
from kd.models import Encoder, FrozenTeacher
from kd.schedules import Constant

LENGTHS = (7, 3, 5, 6)
WEIGHTS = {"task": 0.0, "attention": 1.0, "hidden": 1.0, "embedding": 1.0, "logits": 1.0, "policy": 1.0}


def task_of(*, scores: bool = False) -> Task:
    """A task whose examples may have no label, with a column of domains."""
    task: Any = (
        Regression("t", ["mse"], "mse") if scores else Classification("t", ["a", "b", "c"], {}, ["accuracy"], "accuracy")
    )
    task.column_classes, task.columns, task.partly_labelled = {"domain": ["books", "dvd"]}, ["domain"], True
    return task  # type: ignore[no-any-return]


def encoder(seed: int, outputs: int = 3, **sizes: Any) -> Encoder:
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return Encoder(tiny_model(seed, num_labels=outputs, initializer_range=0.3, **off, **sizes), tiny_tokenizer()).double()


def inputs_of(lengths: tuple[int, ...], seed: int = 4) -> dict[str, Tensor]:
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, 40, mask.shape, generator=torch.Generator().manual_seed(seed)) * mask
    ids[:, 0] = 2
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def batch_of(labels: list[float], *, scores: bool = False) -> Batch:
    """Four examples, with three held ones."""
    dtype = torch.double if scores else torch.long
    domains = {"domain": torch.tensor([0, 1, 1, 0])}
    held = inputs_of((4, 6, 5), seed=8)
    of_held = Batch(
        held, (held,), torch.tensor([0, 1, 2], dtype=dtype), torch.arange(10, 13), columns={"domain": torch.zeros(3).long()}
    )
    inputs = inputs_of(LENGTHS)
    return Batch(inputs, (inputs,), torch.tensor(labels, dtype=dtype), torch.arange(4), held=of_held, columns=domains)


def bound(labels: list[float], progress: Progress | None = None, *, scores: bool = False, **options: Any) -> tuple[L2A, Step]:
    task, outputs = task_of(scores=scores), 1 if scores else 3
    student, teacher = (
        encoder(1, outputs, layers=2, width=16).train(),
        FrozenTeacher(encoder(2, outputs, layers=4, width=32), "t"),
    )
    torch.manual_seed(6)
    method = L2A(**{"domain": "domain", **({"reward": "loss"} if scores else {}), **options})
    method.bind(Bound(student, [teacher], task))
    method.double()
    ours, theirs = method.needs()
    batch = batch_of(labels, scores=scores)
    if not method.holds:
        batch = replace(batch, held=None)
    passes = [Forward(teacher, batch.teachers[0], theirs[0])]
    return method, Step(
        Forward(student, batch.student, ours), passes, batch, task.of(batch.labels), progress or Progress(3, 100)
    )


UNLABELLED = [float(NO_CLASS)] * 4


def discounted_returns(rewards: Tensor, gamma: float) -> Tensor:
    """The return of each step of an episode, by its definition."""
    steps = range(len(rewards))
    return torch.stack([sum(gamma ** (later - step) * rewards[later] for later in steps[step:]) for step in steps])  # type: ignore[misc]


# Worked numbers


def test_returns_of_an_episode() -> None:
    assert discounted_returns(torch.tensor([1.0, 0.0, -1.0]), 0.5).tolist() == [0.75, -0.5, -1.0]
    accuracies = torch.tensor([0.5, 0.75, 0.625, 1.0])
    assert float(discounted_returns(accuracies.diff(), 1.0)[0]) == 0.5, "without a discount the changes add up to the whole one"


@pytest.mark.parametrize(("action", "slope"), [(1.0, 1.0), (0.0, -1.0)])
def test_slope_of_a_decision(action: float, slope: float) -> None:
    logit = torch.zeros(1, 1, requires_grad=True)
    (2 * log_probability(logit, torch.tensor([[action]]))).sum().backward()
    assert logit.grad is not None
    assert float(logit.grad) == slope


def test_a_mean_over_no_example_is_zero_without_a_gradient() -> None:
    values = torch.ones(3, requires_grad=True)
    mean = selected_mean(values, torch.zeros(3))
    mean.backward()
    assert float(mean) == 0
    assert values.grad is not None
    assert not values.grad.any()


def test_a_value_with_another_gradient() -> None:
    first, second = torch.ones(2, 2, requires_grad=True), torch.ones(1, requires_grad=True)
    (3 * with_gradient(torch.tensor(7.0), [first, second], torch.arange(5.0))).backward()
    assert first.grad is not None
    assert first.grad.tolist() == [[0.0, 3.0], [6.0, 9.0]]
    assert second.grad is not None
    assert second.grad.tolist() == [12.0]


def test_a_gradient_is_exact_in_mixed_precision() -> None:
    weight = torch.ones(3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = with_gradient(torch.tensor(0.0), [weight], torch.tensor([1 / 3, 1.001, 1e6]))
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == torch.tensor([1 / 3, 1.001, 1e6]).tolist()


def test_padding_makes_ranks_differ_and_is_a_reason_of_its_own() -> None:
    for options, across, reasons in (
        ({}, True, ["reward"]),
        ({"padding": "reference"}, False, ["reward", "padding"]),
        ({"padding": "reference", "selection": "all"}, False, ["padding"]),
        ({"selection": "all"}, True, []),
    ):
        method = L2A(**options)  # type: ignore[arg-type]
        assert method.across_ranks == across
        assert [word for word in ("reward", "padding") if word in (method.batch_dependence() or "")] == reasons


# The student's terms


def naive_logits(step: Step) -> list[float]:
    """Cross entropy of each example with the teacher's distribution, in a loop."""
    student, teacher = step.student.outputs.logits, step.teacher.outputs.logits
    return [
        -sum(float(p) * math.log(float(q)) for p, q in zip(theirs.softmax(-1), ours.softmax(-1), strict=True))
        for ours, theirs in zip(student, teacher, strict=True)
    ]


def alone(step: Step, row: int) -> Step:
    """The step with one of its examples."""
    batch = replace(step.batch, held=None).map(lambda tensor: tensor[row : row + 1])
    return step.replace(
        student=Forward(step.student.model, batch.student, step.student.needs),
        teachers=[Forward(step.teacher.model, batch.teachers[0], step.teacher.needs)],
        batch=batch,
    )


@pytest.mark.parametrize("actions", [(1, 0, 1, 1), (0, 0, 1, 0), (1, 1, 1, 1)])
def test_losses_are_means_over_the_selected_examples(actions: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    method, step = bound(UNLABELLED)
    monkeypatch.setattr(method, "actions", lambda *_: torch.tensor(actions, dtype=torch.double))
    terms = method._student(step)
    chosen = [row for row, action in enumerate(actions) if action]
    soft = naive_logits(step)
    assert float(terms["logits"]) == pytest.approx(sum(soft[row] for row in chosen) / len(chosen), abs=1e-9)
    plain = TinyBERT()
    plain.depths, plain.projections = method.depths, method.projections
    each = [plain.terms(alone(step, row)) for row in chosen]
    for name in ("attention", "hidden", "embedding"):
        assert float(terms[name]) == pytest.approx(sum(float(one[name]) for one in each) / len(chosen), abs=1e-9), name
    assert float(terms["task"]) == 0, "no example has a label"


def test_all_selected_is_plain_distillation_and_none_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for selected in (1.0, 0.0):
        method, step = bound(UNLABELLED)
        monkeypatch.setattr(method, "actions", lambda *_, value=selected: torch.full((4,), value, dtype=torch.double))
        terms = method._student(step)
        student = step.student.model
        total = sum(terms[name] for name in ("attention", "hidden", "embedding", "logits"))
        assert isinstance(total, Tensor)
        assert total.isfinite()
        gradients.append(torch.autograd.grad(total, list(student.parameters()), allow_unused=True))
        plain = TinyBERT()
        plain.depths, plain.projections = method.depths, method.projections
        again = step.replace(student=Forward(student, step.batch.student, step.student.needs))
        soft = F.cross_entropy(again.student.outputs.logits, again.teacher.outputs.logits.softmax(-1))
        expected = torch.autograd.grad(sum(plain.terms(again).values()) + soft, list(student.parameters()), allow_unused=True)
    for ours, none, theirs in zip(*gradients, expected, strict=True):
        if theirs is not None:
            assert torch.allclose(ours, theirs, atol=1e-9)
            assert not none.any()


def test_examples_with_labels_are_used_and_the_policy_decides_about_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    method, step = bound([1.0, NO_CLASS, NO_CLASS, 2.0])
    monkeypatch.setattr(Step, "draws", lambda *_: torch.full((4, 1), 0.999, dtype=torch.double))
    labelled = step.batch.labels != NO_CLASS
    assert method.actions(step, labelled).tolist() == [1, 0, 0, 1]
    assert method.taken is not None
    assert method.taken[2].tolist() == [0, 1, 1, 0]
    method, step = bound([1.0, NO_CLASS, NO_CLASS, 2.0], selects="all")
    assert method.actions(step, labelled).tolist() == [0, 0, 0, 0]
    assert method.taken is not None
    assert method.taken[2].tolist() == [1, 1, 1, 1]
    for keep, expected in ((1.0, [1, 1, 1, 1]), (0.9, [1, 0, 0, 1])):
        method, step = bound([1.0, NO_CLASS, NO_CLASS, 2.0], selection="random", keep=keep)
        assert method.actions(step, labelled).tolist() == expected


def test_actions_follow_the_probabilities_of_the_policy() -> None:
    method, step = bound(UNLABELLED)
    last: Any = method.policy[2]  # type: ignore[index]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.fill_(math.log(0.3 / 0.7))
    means = []
    for number in range(600):
        now = step.replace(progress=Progress(number, 1000))
        means.append(float(method.actions(now, torch.zeros(4, dtype=torch.bool)).mean()))
    assert abs(sum(means) / len(means) - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 2400)


def test_the_state_as_a_loop() -> None:
    method, step = bound(UNLABELLED, normalize=False)
    state, student, teacher = method.state_of(step), step.student.outputs, step.teacher.outputs
    assert not state.requires_grad
    for row in range(4):
        ours, theirs = student.logits[row].softmax(-1), teacher.logits[row].softmax(-1)
        entropy = -float((theirs * theirs.log()).sum())
        flag = [1.0, 0.0] if row in (0, 3) else [0.0, 1.0]
        expected = [*student.cls(2)[row].tolist(), *theirs.tolist(), *ours.tolist(), entropy, naive_logits(step)[row], *flag]
        assert state[row].tolist() == pytest.approx(expected, abs=1e-9)


def test_a_regression_has_losses_and_a_reward() -> None:
    method, step = bound([math.nan, 1.0, math.nan, 0.5], scores=True)
    terms = method._student(step)
    scores, targets = step.student.outputs.logits[:, 0], step.teacher.outputs.logits[:, 0]
    chosen = step.draws("actions", 1)[:, 0]
    assert chosen.shape == (4,)
    assert all(term.isfinite() for term in terms.values())
    assert float(method._policy(step)["policy"]) == 0, "the student did not move, and the reward is a change"
    expected = [float((scores[row] - 1.0) ** 2) for row in (1,)] + [float((scores[3] - 0.5) ** 2)]
    assert float(terms["task"]) == pytest.approx(sum(expected) / 2, abs=1e-6)
    assert targets.shape == (4,)


# The policy


class Rewards:
    """Performances before and after the student's turns, in order."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def __call__(self, _: Step) -> Tensor:
        return torch.tensor(self.values.pop(0), dtype=torch.double)


def gradient_of(method: L2A, step: Step, actions: Tensor, decided: Tensor) -> Tensor:
    """Gradient of the mean log-probability of the decisions."""
    logits = method.policy(method.state_of(step)).squeeze(1)
    chosen = torch.where(actions > 0, F.logsigmoid(logits), F.logsigmoid(-logits))
    mean = (chosen * decided).sum() / decided.sum()
    return torch.cat([part.flatten() for part in torch.autograd.grad(mean, list(method.policy.parameters()))])


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_the_policy_moves_along_the_returns_of_an_episode(gamma: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against REINFORCE with returns, computed when the episode is over; and a second episode starts anew."""
    method, step = bound([1.0, NO_CLASS, NO_CLASS, NO_CLASS], episode=3, gamma=gamma)
    decided = torch.tensor([0.0, 1.0, 1.0, 1.0]).double()
    parameters = list(method.policy.parameters())
    for first, rewards in ((0, [1.0, 0.0, -1.0]), (3, [0.5, -0.25, 2.0])):
        gradients, values = [], []
        for number, reward in enumerate(rewards):
            now = step.replace(progress=Progress(first + number, 100))
            monkeypatch.setattr(method, "performance", Rewards([0.25, 0.25 + reward]))
            method._student(now)
            assert method.taken is not None
            actions = method.taken[1].clone()
            gradients.append(gradient_of(method, now, actions, decided))
            logits = method.policy(method.state_of(now)).squeeze(1)
            values.append(float((log_probability(logits[:, None], actions[:, None]) * decided).sum() / 3))
            (term,) = method._policy(now).values()
            (again,) = [torch.cat([p.flatten() for p in torch.autograd.grad(term, parameters)])]
            assert method.ends(now.progress) == (number == 2)
            method.after_step(now, {})
        returns = discounted_returns(torch.tensor(rewards).double(), gamma)
        expected = -sum(r * g for r, g in zip(returns, gradients, strict=True))
        assert torch.allclose(again, expected, atol=1e-9)
        assert float(term) == pytest.approx(-sum(float(r) * v for r, v in zip(returns, values, strict=True)), abs=1e-9)


def test_a_sum_that_did_not_move_the_policy_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a stochastic pool another teacher's copy may be drawn when an episode ends."""
    method, step = bound(UNLABELLED, episode=2, gamma=1.0)
    sums = []
    for number in (0, 3):  # the end of the first episode, step 1, was another copy's
        now = step.replace(progress=Progress(number, 100))
        monkeypatch.setattr(method, "performance", Rewards([0.0, 1.0]))
        method._student(now)
        assert method.taken is not None
        sums.append(gradient_of(method, now, method.taken[1], torch.ones(4).double()))
        (term,) = method._policy(now).values()
        method.after_step(now, {})
    got = torch.cat([part.flatten() for part in torch.autograd.grad(term, list(method.policy.parameters()))])
    assert torch.allclose(got, -(sums[0] + sums[1]), atol=1e-9)


def engine_of(**options: Any) -> tuple[Distiller, Batch, Any]:
    method, step = bound([1.0, NO_CLASS, NO_CLASS, NO_CLASS], **options)
    factory = OptimizerFactory(torch.optim.AdamW, lr=0.05, weight_decay=0.1, schedule="constant", warmup=0.0)
    weights: Any = {name: Constant(weight) for name, weight in WEIGHTS.items()}
    student: Any = step.student.model
    models = Models({"student": student}, {"student": method}, [step.teacher.model], None, weights)  # type: ignore[list-item]
    engine = Distiller(models, step.task, factory)
    return engine, step.batch, factory.optimizer(engine)


def test_the_policy_moves_at_the_end_of_an_episode_and_the_student_in_every_step() -> None:
    engine, batch, optimizer = engine_of(episode=3, reward="loss", gamma=0.9)
    method: Any = engine.learners["student"].method
    for number in range(7):
        before = {name: tensor.clone() for name, tensor in engine.state_dict().items()}
        loss = engine.update(batch, optimizer, Progress(number, 7))
        engine.after_step(loss)
        moved = {name for name, parameter in engine.named_parameters() if not torch.equal(parameter, before[name])}
        of_policy = {name for name in moved if "policy" in name}
        assert len(of_policy) == (4 if number in (2, 5, 6) else 0), number
        assert any(name.startswith("student.") for name in moved)
    assert method.trace.any()


def test_all_and_random_have_one_turn_and_hold_nothing() -> None:
    for selection in ("all", "random"):
        method, step = bound([1.0, 0.0, 2.0, 1.0], selection=selection)
        assert [turn.name for turn in method.turns()] == ["student"]
        assert method.holds == 0
        terms = method.terms(step)
        assert set(terms) == set(WEIGHTS)
        assert float(terms["policy"]) == 0
    assert "policy" not in dict(method.named_parameters())


def test_performance_is_accuracy_or_minus_the_loss_of_the_held_examples() -> None:
    method, step = bound(UNLABELLED)
    held = step.batch.held
    assert held is not None
    student: Any = step.student.model
    student.eval()
    logits = student(held.student, Needs()).logits
    student.train()
    right = [int(row.argmax()) == int(label) for row, label in zip(logits, held.labels, strict=True)]
    assert float(method.performance(step)) == pytest.approx(sum(right) / 3)
    method, step = bound(UNLABELLED, reward="loss")
    assert float(method.performance(step)) == pytest.approx(-float(F.cross_entropy(logits, held.labels)), abs=1e-6)


# Refusals


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"selection": "best"}, "selection"),
        ({"selects": "some"}, "selects"),
        ({"keep": 1.1}, "keep"),
        ({"reward": "f1"}, "reward"),
        ({"holds": 0}, "holds"),
        ({"episode": 0}, "episode"),
        ({"gamma": -0.1}, "gamma"),
        ({"hidden": 0}, "hidden"),
        ({"policy_lr": 0}, "policy_lr"),
        ({"domain": "genre"}, "domain"),
        ({"domain": ["domain"]}, "domain"),
        ({"loss": "l1"}, "loss"),
    ],
)
def test_options_are_checked(options: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError) as caught:
        bound(UNLABELLED, **options)
    assert caught.value.key == key


def test_accuracy_needs_classes() -> None:
    with pytest.raises(InputError, match="reward=loss") as caught:
        bound([math.nan] * 4, scores=True, reward="accuracy")
    assert caught.value.key == "reward"
