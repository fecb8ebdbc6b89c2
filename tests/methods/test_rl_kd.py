"""RL-KD: worked numbers, its terms and rewards as loops, what each turn moves, and the ensembles beside it."""

import math
from typing import Any

import pytest
import torch
from conformance.bench import Bench
from models.test_masked_lm import TASK as MASKED
from models.test_masked_lm import masked_lm
from torch import Tensor, nn

from conftest import tiny_model
from kd.data.batch import Batch
from kd.data.masked_lm.task import NOT_PREDICTED
from kd.data.tasks import NO_CLASS, Classification, Regression, Task
from kd.errors import InputError
from kd.forward import Forward
from kd.functional.reinforce import log_probability, selected_weights, stacked_weights
from kd.methods.base import Bound, Progress, Step
from kd.methods.rl_kd import RLKD
from kd.models import Encoder, FrozenTeacher

TASK = Classification("toy", ["no", "yes"], {}, ["accuracy"], "accuracy")
SCORES = Regression("toy", ["mse"], "mse")
LABELS = [0, 1, 1]
PROBABILITIES = ([0.9, 0.1], [0.5, 0.5])


def encoder(seed: int, layers: int = 2, width: int = 16, outputs: int = 2, dropout: float = 0.0) -> Encoder:
    off = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model = tiny_model(seed, layers=layers, width=width, num_labels=outputs, **off).double()
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return Encoder(model)


def bound(
    count: int = 3,
    task: Task = TASK,
    outputs: int = 2,
    dropout: float = 0.0,
    progress: Progress | None = None,
    **arguments: Any,
) -> tuple[RLKD, Step]:
    """A method bound to a student and teachers, and a step over three sentences; with a held one if the method holds some."""
    student = encoder(1, outputs=outputs, dropout=dropout).train()
    frozen = [FrozenTeacher(encoder(2 + n, 3, 24, outputs), f"t{n}") for n in range(count)]
    torch.manual_seed(5)
    method = RLKD(**arguments)
    method.bind(Bound(student, frozen, task))
    method.double()
    ids = torch.randint(5, 30, (3, 6), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = torch.tensor(LABELS) if task is TASK else torch.tensor([0.5, 2.0, 1.0]).double()
    held = Batch(inputs, (inputs,) * count, torch.tensor([1, 1, 0]), torch.arange(3, 6)) if method.holds else None
    batch = Batch(inputs, (inputs,) * count, labels, torch.arange(3), held=held)
    ours, theirs = method.needs()
    passes = [Forward(one, inputs, needs) for one, needs in zip(frozen, theirs, strict=True)]
    return method, Step(Forward(student, inputs, ours), passes, batch, task, progress or Progress(3, 10))


class Given:
    """A forward pass with these probabilities."""

    def __init__(self, *rows: list[float]) -> None:
        self.outputs = self
        self.logits = torch.tensor(rows, dtype=torch.double).log()

    def evaluate(self, *_: Any, **__: Any) -> "Given":
        return self


def given(student: list[float], *teachers: list[float], label: int = 0) -> Step:
    batch = Batch({}, (), torch.tensor([label]), torch.arange(1))
    passes: Any = [Given(row) for row in teachers]
    return Step(Given(student), passes, batch, TASK, Progress())  # type: ignore[arg-type]


def probabilities(logits: Tensor, temperature: float = 1.0) -> list[list[float]]:
    return (logits.detach() / temperature).softmax(-1).tolist()


# -- worked numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("actions", "mean"), [([1.0, 1.0], [0.7, 0.3]), ([1.0, 0.0], [0.9, 0.1])])
def test_target_is_the_mean_of_the_selected_teachers(actions: list[float], mean: list[float]) -> None:
    weights = selected_weights(torch.tensor([[0.5, 0.5]]).double(), torch.tensor([actions]).double())
    step = given([0.5, 0.5], *PROBABILITIES)
    found = step.task.ensemble([teacher.outputs.logits for teacher in step.teachers], weights).exp()
    assert found[0].tolist() == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize(("reward", "value"), [(1, -0.693147), (2, -1.386294)])
def test_rewards_have_the_worked_numbers(reward: int, value: float) -> None:
    for label in (0, 1):
        step = given([0.5, 0.5], *PROBABILITIES, label=label)
        method = RLKD(reward=reward, state=["losses"])
        assert float(method.rewards_of(step, torch.tensor([[0.5, 0.5]]).double())) == pytest.approx(value, abs=1e-6)


def test_log_probability_of_even_decisions_is_minus_k_ln_2_and_its_slope_is_the_action_minus_a_half() -> None:
    logits = torch.zeros(1, 4, dtype=torch.double, requires_grad=True)
    actions = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    value = log_probability(logits, actions)
    assert float(value) == pytest.approx(-4 * math.log(2), abs=1e-12)
    (slope,) = torch.autograd.grad(value.sum() * 3.0, logits)
    assert torch.allclose(slope, 3.0 * (actions - 0.5).double())


def test_soft_cross_entropy_is_linear_in_the_target_and_divergence_is_not() -> None:
    student = torch.tensor([[0.5, 0.5]], dtype=torch.double).log()
    logits = [torch.tensor([row], dtype=torch.double).log() for row in PROBABILITIES]
    mean = TASK.ensemble(logits)
    assert float(TASK.soft(student, mean, 1.0, "ce")) == pytest.approx(
        sum(float(TASK.soft(student, one, 1.0, "ce")) for one in logits) / 2
    )
    assert float(TASK.soft(student, mean, 1.0, "kl")) == pytest.approx(0.082283, abs=1e-6)
    assert sum(float(TASK.soft(student, one, 1.0, "kl")) for one in logits) / 2 == pytest.approx(0.184032, abs=1e-6)


# -- terms -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [["vector", "probabilities", "losses"], ["losses", "vector"], ["probabilities"]])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights_of", ["sampled", "expected"])
def test_terms_equal_loops_over_examples_teachers_and_classes(state: list[str], normalize: bool, weights_of: str) -> None:
    method, step = bound(state=state, normalize=normalize, weights_of=weights_of, temperature=2.0, reward=2)
    draws = step.draws("actions", 3).tolist()
    terms = method.terms(step)
    own = step.student.outputs
    p, tempered = probabilities(own.logits), probabilities(own.logits, 2.0)
    teachers = [probabilities(teacher.outputs.logits) for teacher in step.teachers]
    soft = [probabilities(teacher.outputs.logits, 2.0) for teacher in step.teachers]
    matrix, bias = method.policy.weight.tolist(), method.policy.bias.tolist()
    hard, divergence, likelihoods = [], [], []
    for i, label in enumerate(LABELS):
        features = own.cls(2)[i].tolist() if "vector" in state else []
        features += [value for of_teacher in teachers for value in of_teacher[i]] if "probabilities" in state else []
        features += [-math.log(of_teacher[i][label]) for of_teacher in teachers] if "losses" in state else []
        if normalize:
            mean = sum(features) / len(features)
            variance = sum((value - mean) ** 2 for value in features) / len(features)
            features = [(value - mean) / math.sqrt(variance + 1e-5) for value in features]
        pi = [
            1 / (1 + math.exp(-sum(a * f for a, f in zip(row, features, strict=True)) - b))
            for row, b in zip(matrix, bias, strict=True)
        ]
        actions = [float(draw < chance) for draw, chance in zip(draws[i], pi, strict=True)]
        weights = actions if sum(actions) else [float(chance == max(pi)) for chance in pi]
        weights = pi if weights_of == "expected" else weights
        q = [sum(w * of_teacher[i][c] for w, of_teacher in zip(weights, soft, strict=True)) / sum(weights) for c in (0, 1)]
        hard.append(-math.log(p[i][label]))
        divergence.append(-sum(target * math.log(value) for target, value in zip(q, tempered[i], strict=True)))
        likelihoods.append(sum(math.log(chance if action else 1 - chance) for chance, action in zip(pi, actions, strict=True)))
    reward = -sum(hard) / 3 - sum(divergence) / 3
    assert float(terms["task"]) == pytest.approx(sum(hard) / 3, abs=1e-9)
    assert float(terms["logits"]) == pytest.approx(sum(divergence) / 3, abs=1e-9)
    assert float(terms["policy"]) == pytest.approx(-reward * sum(likelihoods) / 3, abs=1e-9)


def test_reward_3_adds_the_accuracy_on_the_held_part() -> None:
    method, step = bound(reward=3, gamma=0.25)
    weights = method.weights(step)
    with torch.no_grad():
        right = (step.student.run().logits.argmax(-1) == step.batch.held.labels).double().mean()
    second = RLKD(reward=2)
    expected = 0.25 * float(second.rewards_of(step, weights)) + 0.75 * float(right)
    assert float(method.rewards_of(step, weights)) == pytest.approx(expected, abs=1e-12)
    assert (RLKD(reward=3).holds, RLKD(reward=2).holds, RLKD(selection="uniform", reward=3).holds) == (0.1, 0.0, 0.0)


def test_credit_of_an_example_is_its_own_loss() -> None:
    method, step = bound(credit="example")
    weights = method.weights(step)
    rewards = method.rewards_of(step, weights)
    batch = RLKD(credit="batch").rewards_of(step, weights)
    assert rewards.shape == (3,)
    assert batch.shape == (1,)
    assert torch.allclose(rewards.mean(), batch[0])


def test_rewards_are_without_dropout_and_the_student_stays_in_training_mode() -> None:
    method, step = bound(dropout=0.5)
    weights = method.weights(step)
    found = method.rewards_of(step, weights)
    assert all(module.training for module in step.student.model.modules())
    step.student.model.eval()
    plain = bound(dropout=0.0)[1]
    plain.student.model.load_state_dict(step.student.model.state_dict())
    assert torch.allclose(found, method.rewards_of(plain, weights), rtol=0, atol=1e-12)
    step.student.model.train()
    assert all(module.training for module in step.student.model.modules())


def test_baseline_is_the_mean_of_earlier_rewards() -> None:
    method, step = bound(baseline="ema", decay=0.75)
    plain, _ = bound()
    expected, mean = [], None
    for number in range(3):
        later = step.replace(progress=Progress(number, 10))
        term, own = method.terms(later)["policy"], plain.terms(later)["policy"]
        reward = float(method.rewarded)
        method.after_step(later, {})
        likelihood = -float(own) / reward
        expected.append(-(reward - (reward if mean is None else mean)) * likelihood)
        assert float(term) == pytest.approx(expected[-1], abs=1e-9)
        mean = reward if mean is None else 0.75 * mean + 0.25 * reward
        assert float(method.mean_reward) == pytest.approx(mean, abs=1e-12)


def test_warmup_selects_all_teachers_for_its_fraction_of_training() -> None:
    for done, every in ((0, True), (4, True), (5, False)):
        method, step = bound(warmup=0.5, progress=Progress(done, 10))
        weights = method.weights(step)
        assert torch.allclose(weights, torch.full((3, 3), 1 / 3).double()) is every


# -- turns -----------------------------------------------------------------------------------------------------------------


def test_gradients_of_the_student_and_of_the_policy_do_not_meet() -> None:
    method, step = bound()
    student, policy = list(step.student.model.parameters()), list(method.policy.parameters())
    learning, reinforced = method.turns()
    loss = sum(learning.terms(step).values())
    assert all(one is None for one in torch.autograd.grad(loss, policy, allow_unused=True, retain_graph=True))
    assert any(one is not None for one in torch.autograd.grad(loss, student, allow_unused=True, retain_graph=True))
    loss = reinforced.terms(step)["policy"]
    assert all(one is None for one in torch.autograd.grad(loss, student, allow_unused=True, retain_graph=True))
    assert all(one.abs().sum() > 0 for one in torch.autograd.grad(loss, policy))
    assert (learning.parameters, reinforced.parameters) == (None, policy)


def test_reward_is_of_the_student_after_its_turn() -> None:
    bench = Bench("rl_kd", double=True)
    batch = bench.batch()
    (method,) = bench.methods.values()
    seen: list[float] = []
    original = method.rewards_of
    method.rewards_of = lambda step, weights: (
        seen.append(float(step.task.hard(step.student.evaluate().logits, step.batch.labels))) or original(step, weights)
    )  # type: ignore[method-assign]
    before = float(bench.engine.loss(batch).terms["task"])
    bench.update(batch)
    (student,) = bench.students.values()
    with torch.no_grad():
        after = float(bench.task.hard(student.eval()(batch.student, bench.methods["s0"].needs()[0]).logits, batch.labels))
    assert seen[0] == pytest.approx(before, abs=1e-9)  # nothing moves in `loss`
    assert seen[1] == pytest.approx(after, abs=1e-9)
    assert abs(before - after) > 1e-4


def test_policy_learns_to_select_the_teacher_that_the_reward_prefers() -> None:
    torch.manual_seed(0)
    policy = nn.Linear(1, 2)
    optimizer, state = torch.optim.SGD(policy.parameters(), lr=0.3), torch.ones(64, 1)
    for _ in range(200):
        actions = (torch.rand(64, 2) < policy(state).sigmoid()).float()
        rewards = actions[:, 0] - actions[:, 1]
        loss = -(rewards.detach() * log_probability(policy(state), actions)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    first, second = policy(torch.ones(1, 1)).sigmoid()[0].tolist()
    assert first > 0.9
    assert second < 0.1


@pytest.mark.parametrize(("baseline", "rises"), [("none", False), ("ema", True)])
def test_pre_training_selects_more_as_rewards_rise_and_without_a_baseline_less(baseline: str, rises: bool) -> None:
    method, step = bound(selection="all", baseline=baseline, reward=1)
    before = method.policy(method.state_of(step)).sigmoid().mean()
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    for reward in (-3.0, -2.0, -1.0):
        method.weights(step)
        method.rewards_of = lambda *_, r=reward: torch.tensor([r]).double()  # type: ignore[method-assign]
        optimizer.zero_grad()
        method.turns()[1].terms(step)["policy"].backward()
        optimizer.step()
        method.after_step(step, {})
    after = method.policy(method.state_of(step)).sigmoid().mean()
    assert bool(after > before) is rises


def test_policy_has_a_rate_of_its_own() -> None:
    method, _ = bound(policy_lr=0.01)
    assert [turn.lr for turn in method.turns()] == [None, 0.01]


# -- ensembles -------------------------------------------------------------------------------------------------------------


def test_all_teachers_are_the_uniform_ensemble_to_the_bit() -> None:
    every, step = bound(selection="all")
    uniform, other = bound(selection="uniform")
    sure, third = bound()
    nn.init.zeros_(sure.policy.weight)
    nn.init.constant_(sure.policy.bias, 100.0)
    expected = uniform.terms(other)
    assert list(expected) == ["task", "logits"]
    for method, at in ((every, step), (sure, third)):
        terms = method.terms(at)
        assert all(torch.equal(terms[name], term) for name, term in expected.items())


def test_ensembles_weigh_teachers_as_they_say() -> None:
    best, step = bound(selection="best")
    errors = torch.stack([TASK.errors(teacher.outputs.logits, step.batch.labels) for teacher in step.teachers], dim=1)
    weights = best.weights(step)
    assert torch.equal(weights.argmax(1), errors.argmin(1))
    assert torch.equal(weights.sum(1), torch.ones(3).double())
    fixed, step = bound(selection="fixed", teacher_weights=[1, 0, 3])
    assert fixed.weights(step)[0].tolist() == [0.25, 0.0, 0.75]
    random, step = bound(selection="random")
    drawn = int(step.rng("teacher").integers(3))
    assert torch.equal(random.target(step), step.teachers[drawn].outputs.logits)
    assert [teacher.ran for teacher in step.teachers] == [number == drawn for number in range(3)]


def test_logistic_weights_maximise_the_likelihood() -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (400,))
    signal = nn.functional.one_hot(labels, 3).double()
    logits = [strength * signal + torch.randn(400, 3).double() for strength in (1.5, 0.7, 0.0)]
    weights = stacked_weights(logits, labels)
    scores = torch.stack([one.log_softmax(-1) for one in logits], dim=1)
    coefficients = torch.zeros(3, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([coefficients], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(torch.einsum("k,nkc->nc", coefficients, scores), labels)
        value = value + 5e-4 * (coefficients**2).sum()
        value.backward()
        return value

    optimizer.step(loss)
    expected = coefficients.detach().clamp(min=0)
    assert weights == pytest.approx((expected / expected.sum()).tolist(), abs=1e-6)
    assert weights[0] > weights[1] > weights[2] >= 0
    unlabelled = torch.where(torch.arange(400) % 2 == 0, labels, NO_CLASS)
    assert stacked_weights(logits, unlabelled) == stacked_weights([one[::2] for one in logits], labels[::2])


def test_logistic_selection_fits_on_train_before_training() -> None:
    method, step = bound(selection="logistic")
    assert method.prefits
    assert method.weights(step)[0].tolist() == pytest.approx([1 / 3] * 3)
    labels = torch.tensor([0, 1] * 20)
    right = torch.stack([1 - labels, labels], dim=1).double()
    method.prefit([2 * right, torch.zeros(40, 2).double(), -right], labels)
    assert method.weights(step)[0].tolist() == pytest.approx([1.0, 0.0, 0.0])
    assert "fitted" in method.state_dict()


def test_one_uniform_teacher_is_plain_distillation() -> None:
    method, step = bound(count=1, selection="uniform", temperature=2.0, loss="kl")
    logits = step.student.outputs.logits, step.teacher.outputs.logits
    assert torch.allclose(method.terms(step)["logits"], TASK.soft(*logits, 2.0, "kl"), rtol=0, atol=1e-12)


def test_regression_has_squared_errors_and_mean_scores() -> None:
    method, step = bound(task=SCORES, outputs=1)
    terms = method.terms(step)
    assert all(term.isfinite() for term in terms.values())
    uniform, other = bound(task=SCORES, outputs=1, selection="uniform")
    scores = torch.stack([teacher.outputs.logits for teacher in other.teachers]).mean(0)
    expected = ((other.student.outputs.logits - scores) ** 2).mean()
    assert torch.allclose(uniform.terms(other)["logits"], expected)


# -- refusals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"selection": "worst"}, "selection"),
        ({"reward": 4}, "reward"),
        ({"gamma": 2}, "gamma"),
        ({"reward": 3, "holds": 0}, "holds"),
        ({"reward": 3, "holds": 1.5}, "holds"),
        ({"credit": "token"}, "credit"),
        ({"baseline": "mean"}, "baseline"),
        ({"decay": 1.0}, "decay"),
        ({"weights_of": "both"}, "weights_of"),
        ({"warmup": 1.0}, "warmup"),
        ({"state": []}, "state"),
        ({"state": ["words"]}, "state"),
        ({"policy_lr": 0}, "policy_lr"),
        ({"selection": "fixed"}, "teacher_weights"),
        ({"selection": "fixed", "teacher_weights": [1, 2]}, "teacher_weights"),
        ({"selection": "fixed", "teacher_weights": [0, 0, 0]}, "teacher_weights"),
        ({"selection": "fixed", "teacher_weights": [1, -1, 1]}, "teacher_weights"),
        ({"temperature": 0}, "temperature"),
        ({"loss": "l1"}, "loss"),
        ({"reduction": "sum"}, "reduction"),
        ({"normalize": "yes"}, "normalize"),
        ({"count": 1}, "selection"),
        ({"count": 1, "selection": "best"}, "selection"),
        ({"count": 0, "selection": "uniform"}, "teacher"),
        ({"task": SCORES, "outputs": 1, "reward": 3}, "reward"),
        ({"task": SCORES, "outputs": 1, "selection": "logistic"}, "selection"),
    ],
)
def test_invalid_option_is_refused_by_its_name(arguments: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError) as caught:
        bound(**arguments)
    assert caught.value.key == key


def test_policy_of_a_masked_language_model_is_refused_and_its_weights_are_those_of_positions() -> None:
    student = masked_lm(layers=1)
    for selection in ("policy", "all"):
        with pytest.raises(InputError) as caught:
            RLKD(selection=selection).bind(Bound(student, [FrozenTeacher(student)] * 2, MASKED))
        assert caught.value.key == "selection"
    labels = torch.tensor([[NOT_PREDICTED, 3, 4], [5, NOT_PREDICTED, NOT_PREDICTED]])
    logits = [torch.randn(3, 6), torch.randn(3, 6)]
    found = MASKED.of(labels).ensemble(logits, torch.tensor([[1.0, 0.0], [0.25, 0.75]])).exp()
    first, second = (one.softmax(-1) for one in logits)
    assert torch.allclose(found[:2], first[:2])
    assert torch.allclose(found[2], first[2] / 4 + 3 * second[2] / 4)


def test_dependences_are_declared_where_the_formula_has_them() -> None:
    assert RLKD().batch_dependence() is not None
    assert RLKD(credit="example").batch_dependence() is None
    assert RLKD(credit="example", reward=3).batch_dependence() is not None
    assert RLKD(selection="best").batch_dependence() is None
    assert [RLKD(selection=s).label_dependence() is None for s in ("policy", "all", "best", "uniform", "random")] == [
        False,
        False,
        False,
        True,
        True,
    ]
