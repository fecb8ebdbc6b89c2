"""Reinforced selection of teachers, and the ensembles that it is compared with."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kd.errors import InputError
from kd.forward import Needs
from kd.functional.hidden import at_least_float32
from kd.functional.logits import SOFT_LOSSES, widened
from kd.functional.reinforce import log_probability, selected_weights, stacked_weights
from kd.methods import by_teacher
from kd.methods.base import ANY_TEACHERS, Bound, Method, Step, Turn
from kd.methods.options import BATCH_MEANS, held_share, number, switch, temperature_schedule, whole, word
from kd.schedules import Schedule
from kd.system import hardware

SELECTIONS = ("policy", "all", "uniform", "random", "fixed", "logistic", "best")
WITH_POLICY = ("policy", "all")
WEIGHTS = ("sampled", "expected")
CREDITS = ("batch", "example")
BASELINES = ("none", "ema")
FEATURES = ("vector", "probabilities", "losses")


class RLKD(Method):
    r"""Reinforced Multi-Teacher Selection (RL-KD: Yuan et al., AAAI 2021, arXiv:2012.06048), and the ensembles beside it.

    For each example i a policy decides about each teacher k, :math:`a_{ik} \sim \pi(a_k | s_i)`, with
    :math:`\pi(1 | s) = \sigma(A_k F(s) + b_k)` and independent decisions. The student learns from the mean soft labels of the
    selected teachers, :math:`q_i`, by :math:`L_{KD} = \alpha L_{DL} + (1 - \alpha) L_{CE}` with
    :math:`L_{DL} = -\frac{1}{B} \sum_i \sum_c q_{ic} \ln p_s(c | x_i)`; then the policy moves along
    :math:`r \sum_i \sum_k \nabla \ln \pi(a_{ik} | s_i)`. The state :math:`F(s)` is a vector of the example, the teachers'
    probabilities and their errors. There is no code of the authors. Of the paper only the abstract and what reviews say of it
    could be read; the forms above are those that they agree on, and everything else is marked as our choice.

    An update has two turns: the student learns, then the policy, from the reward of the student that has moved.

    Terms:
        `task`: the task's hard loss, :math:`L_{CE}`. Weight 1 - alpha.
        `logits`: :math:`L_{DL}`. Weight alpha.
        `policy`: for `policy` and `all`, minus the advantage times the log-probability of the actions, mean over the batch.
            Weight 1; the policy's rate is `policy_lr`.

    Args:
        selection: how the weights of the teachers are chosen for each example. `policy`: as above. `all`: the mean of all
            teachers, while the policy learns from the return of selecting all, the paper's pre-training (`before` in the
            YAML). The others are the ensembles of the paper's comparison, without a policy. `uniform`: equal weights.
            `random`: one teacher for each optimiser step. `fixed`: `teacher_weights`. `logistic`: weights from a logistic
            regression on train. `best`: for each example the teacher with the least error.
        reward: 1, :math:`-L_{CE}`; 2, :math:`-L_{CE} - L_{DL}`; 3,
            :math:`\gamma (-L_{CE} - L_{DL}) + (1 - \gamma) Acc(D')` with the accuracy on a held part of train.
        gamma: of reward 3, in [0, 1]. Not published.
        holds: share of train, in (0, 1), that is held for the accuracy of reward 3. The paper has a development set; it would
            be the one that results are reported on.
        credit: `batch`, one reward for all examples of the batch of all ranks (paper), or `example`, each example's own losses
            (our option, with less variance).
        baseline: subtracted from the reward: `none` (paper), or `ema`, the mean of earlier rewards with the factor `decay` (our
            option). Rewards 1 and 2 are negative: without a baseline, `all` would teach the policy to select no teacher.
        decay: factor of the mean of earlier rewards, in [0, 1).
        weights_of: `sampled`, equal weights of the selected teachers (paper; the most probable one if none is selected, our
            choice), or `expected`, weights proportional to the probabilities, while the policy learns from sampled actions.
        warmup: fraction of training, in [0, 1), in which all teachers are selected; 0 in the paper.
        state: parts of the state: `vector`, the student's [CLS] state of its last layer, as a constant (our choice: the paper
            does not say which model's); `probabilities` of the teachers; `losses`, their errors.
        normalize: scale a state to mean 0 and variance 1 first (our choice: errors of teachers can be large).
        policy_lr: peak learning rate of the policy; null for the run's.
        teacher_weights: of `fixed`, one for each teacher, not negative; they are scaled to add up to 1.
        temperature: T > 0, a number or a schedule.
        loss: loss of the soft labels: `ce` (paper, without temperature squared), `kl` (times temperature squared) or `mse`.
        reduction: reduction of the soft loss: `batchmean` or `elementmean`.

    Rewards are of the student without dropout (our choice).
    """

    teachers = ANY_TEACHERS
    distances = ("logits",)
    across_ranks = True

    mean_reward: Tensor
    rewards: Tensor
    fitted: Tensor

    def __init__(
        self,
        selection: str = "policy",
        reward: int = 2,
        gamma: float = 0.5,
        holds: float = 0.1,
        credit: str = "batch",
        baseline: str = "none",
        decay: float = 0.9,
        weights_of: str = "sampled",
        warmup: float = 0.0,
        state: Sequence[str] = FEATURES,
        policy_lr: float | None = None,
        teacher_weights: Sequence[float] | None = None,
        temperature: "float | Schedule" = 1.0,
        loss: str = "ce",
        reduction: str = "batchmean",
        *,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        self.selection = word(selection, SELECTIONS, "selection")
        self.reward = whole(reward, "reward", 1, 3)
        self.gamma = float(number(gamma, "gamma", 0, 1))
        share = held_share(holds, "reward=3 needs the accuracy")
        self.holds = share if self.learns and self.reward == 3 else 0.0
        self.credit = word(credit, CREDITS, "credit")
        self.baseline = word(baseline, BASELINES, "baseline")
        self.decay = float(number(decay, "decay", 0, 0.9999))
        self.weights_of = word(weights_of, WEIGHTS, "weights_of")
        self.warmup = float(number(warmup, "warmup", 0, 0.9999))
        self.state = features(state)
        self.policy_lr = None if policy_lr is None else float(number(policy_lr, "policy_lr", 1e-12, 100))
        self.teacher_weights = shares(teacher_weights) if selection == "fixed" or teacher_weights is not None else []
        self.temperature = temperature_schedule(temperature)
        self.loss = word(loss, SOFT_LOSSES, "loss")
        self.reduction = word(reduction, BATCH_MEANS, "reduction")
        self.normalize = switch(normalize, "normalize")
        self.names = ("task", "logits", "policy") if self.learns else ("task", "logits")
        self.prefits = selection == "logistic"
        self.keeps = ("policy",) if self.learns else ()
        self.policy: nn.Module = nn.Identity()
        self.depth = 0
        self.taken: tuple[Tensor, Tensor, Tensor] | None = None
        """State, actions and weights of the teachers of the batch, between the student's turn and the policy's."""
        self.rewarded: Tensor | None = None
        """Mean reward of the batch, until `after_step`."""
        self.register_buffer("mean_reward", torch.zeros((), dtype=torch.double))
        self.register_buffer("rewards", torch.zeros((), dtype=torch.long))
        self.register_buffer("fitted", torch.ones(1))

    @property
    def learns(self) -> bool:
        """True if there is a policy."""
        return self.selection in WITH_POLICY

    def bind(self, bound: Bound) -> None:
        """Build the policy.

        Raises:
            InputError: for a number of teachers or a task that the options do not fit.
        """
        self.teachers = count = len(bound.teachers)
        if count < 1:
            raise InputError("this method learns from teachers, teacher=[] has none", "teacher")
        if self.selection not in ("uniform", "fixed") and count < 2:
            raise InputError(
                f"selection={self.selection} chooses among teachers, there are {count}: give two or more", "selection"
            )
        if self.selection == "fixed" and len(self.teacher_weights) != count:
            raise InputError(
                f"teacher_weights lists {len(self.teacher_weights)} weights, there are {count} teachers", "teacher_weights"
            )
        if self.learns and not bound.student.classifies:
            raise InputError(
                f"selection={self.selection} decides for each example, and a masked language model has many predictions for "
                "each; use selection=uniform",
                "selection",
            )
        regression = bound.task.labels is None
        if regression and self.learns and self.reward == 3:
            raise InputError("reward=3 needs the accuracy of classes, the task is a regression; use reward=2", "reward")
        if regression and self.selection == "logistic":
            raise InputError("selection=logistic needs classes, the task is a regression; use selection=fixed", "selection")
        self.depth = bound.student.depth
        self.fitted = torch.full((count,), 1 / count)
        if not self.learns:
            return
        classes = 1 if bound.task.labels is None else len(bound.task.labels)
        sizes = {"vector": bound.student.width, "probabilities": classes * count, "losses": count}
        self.policy = nn.Linear(sum(sizes[part] for part in self.state), count)

    def needs(self) -> tuple[Needs, Sequence[Needs]]:
        """Declare the logits, and the student's vector if it is part of the state."""
        reads = self.learns and "vector" in self.state
        return Needs(cls=[self.depth]) if reads else Needs(), [Needs()] * (self.teachers or 0)

    def prefit(self, logits: Sequence[Tensor], labels: Tensor) -> None:
        """Fit the weights of `selection=logistic`."""
        self.fitted = torch.tensor(stacked_weights(list(logits), labels), device=self.fitted.device)

    def turns(self) -> Sequence[Turn]:
        """Return the student's turn, and then the policy's if there is one."""
        student = Turn("student", self._student)
        if not self.learns:
            return [student]
        return [student, Turn("policy", self._policy, list(self.policy.parameters()), self.policy_lr)]

    def terms(self, step: Step) -> dict[str, Tensor]:
        """Return the terms of both turns."""
        return {name: term for turn in self.turns() for name, term in turn.terms(step).items()}

    def _student(self, step: Step) -> dict[str, Tensor]:
        """Return the student's terms; the state, the actions and the weights of the teachers are kept for the policy."""
        ours, labels = step.student.outputs.logits, step.batch.labels
        return {"task": step.task.hard(ours, labels), "logits": self._soft(step, ours, self.target(step), self.reduction)}

    def _soft(self, step: Step, ours: Tensor, target: Tensor, reduction: str) -> Tensor:
        return step.task.soft(ours, target, self.temperature(step.progress.fraction), self.loss, reduction)

    def target(self, step: Step) -> Tensor:
        """Return logits of the weighted mean of the teachers' tempered predictions, (batch, classes), constants."""
        if self.selection == "random":  # the others do not run
            return step.teachers[int(step.rng("teacher").integers(len(step.teachers)))].outputs.logits.detach()
        return self.mixture(step, self.weights(step))

    def mixture(self, step: Step, weights: Tensor) -> Tensor:
        """Return logits of the mean of the teachers' tempered predictions with these weights, (batch, classes), constants."""
        temperature = self.temperature(step.progress.fraction)
        logits = [widened(teacher.outputs.logits.detach()) / temperature for teacher in step.teachers]
        return step.task.ensemble(logits, weights) * temperature

    def weights(self, step: Step) -> Tensor:
        """Return the weights of the teachers, (batch, teachers), constants."""
        count, labels = len(step.teachers), step.batch.labels
        if self.selection == "best":
            return by_teacher.least_error(by_teacher.errors(step))
        if not self.learns:
            given = self.teacher_weights if self.selection == "fixed" else [1 / count] * count
            fixed = self.fitted if self.selection == "logistic" else hardware.to_device(torch.tensor(given), labels.device)
            return fixed.expand(len(labels), -1)
        state = self.state_of(step)
        with torch.no_grad():
            probabilities = at_least_float32(self.policy(state)).sigmoid()
            every = self.selection == "all" or step.progress.fraction < self.warmup
            actions = (
                torch.ones_like(probabilities) if every else (step.draws("actions", count) < probabilities).to(state.dtype)
            )
            weights = selected_weights(probabilities, actions)
            if self.weights_of == "expected" and not every:
                weights = probabilities / probabilities.sum(dim=1, keepdim=True)
        self.taken = (state, actions, weights)
        return weights

    def state_of(self, step: Step) -> Tensor:
        """Return the state of each example, (batch, features), constants."""
        parts: list[Tensor] = []
        if "vector" in self.state:
            parts.append(at_least_float32(step.student.outputs.cls(self.depth)))
        if "probabilities" in self.state:
            parts += [predictions(step, teacher.outputs.logits) for teacher in step.teachers]
        if "losses" in self.state:
            parts.append(by_teacher.errors(step))
        state = torch.cat([part.detach().to(next(self.policy.parameters()).dtype) for part in parts], dim=1)
        return nn.functional.layer_norm(state, state.shape[1:]) if self.normalize else state

    def _policy(self, step: Step) -> dict[str, Tensor]:
        """Return the policy's term, with the reward of the student as it is after its turn."""
        assert self.taken is not None, "the student's turn comes first"
        (state, actions, weights), self.taken = self.taken, None
        rewards = self.rewards_of(step, weights)
        self.rewarded = rewards.mean() if self.credit == "batch" else step.across(rewards).mean()
        advantages = rewards
        if self.baseline == "ema":  # the first reward is its own baseline
            advantages = rewards - torch.where(self.rewards > 0, self.mean_reward, self.rewarded).to(rewards.dtype)
        return {"policy": -(advantages * log_probability(self.policy(state), actions)).mean()}

    @torch.no_grad()
    def rewards_of(self, step: Step, weights: Tensor) -> Tensor:
        """Return the reward of each example, (batch,), or of the batch, of all ranks, (1,).

        Args:
            step: step after the student's turn.
            weights: weights of the teachers in that turn, (batch, teachers).
        """
        ours = step.student.evaluate(needs=Needs()).logits
        rewards = -step.task.errors(ours, step.batch.labels)
        if self.reward > 1:
            rewards = rewards - self._soft(step, ours, self.mixture(step, weights), "none")
        if self.credit == "batch":
            rewards = step.across(rewards).mean(dim=0, keepdim=True)
        if self.reward < 3:
            return rewards
        held = step.on_held()
        right = held.task.predict(held.student.evaluate(needs=Needs()).logits) == held.batch.labels
        return self.gamma * rewards + (1 - self.gamma) * held.across(right.to(rewards.dtype)).mean()

    def after_step(self, step: Step, terms: Mapping[str, Tensor]) -> None:
        """Update the mean of earlier rewards."""
        if self.rewarded is None:
            return
        latest, self.rewarded = self.rewarded.double(), None
        before = torch.where(self.rewards > 0, self.mean_reward, latest)
        self.mean_reward.copy_(self.decay * before + (1 - self.decay) * latest)
        self.rewards += 1

    def describe(self) -> dict[str, str]:
        """Describe the weights of the teachers."""
        return {"teachers": f"{self.teachers}, selection={self.selection}"}

    def batch_dependence(self) -> str | None:
        """Return that the reward is of a batch, unless each example has its own."""
        if self.learns and (self.credit == "batch" or self.reward == 3):
            return "the reward of the policy is that of a batch"
        return None

    def label_dependence(self) -> str | None:
        """Return that the policy and the best teacher need labels."""
        if self.learns:
            return "the reward, and the state of the policy, are made of losses against the labels"
        return "selection=best compares teachers by their losses against the labels" if self.selection == "best" else None


def features(state: Sequence[str]) -> tuple[str, ...]:
    """Check the parts of the state, and return them in the order of `FEATURES`.

    Raises:
        InputError: for an unknown part, or none.
    """
    if isinstance(state, str) or not isinstance(state, Sequence) or not state:
        raise InputError(f"state={state} is not a list of parts: {', '.join(FEATURES)}", "state")
    for part in state:
        word(part, FEATURES, "state")
    return tuple(part for part in FEATURES if part in state)


def shares(weights: Sequence[float] | None) -> list[float]:
    """Check weights of teachers, and return them scaled to add up to 1.

    Raises:
        InputError: if they are no list of numbers that are not negative, of which one is positive.
    """
    if isinstance(weights, str) or not isinstance(weights, Sequence) or not weights:
        raise InputError("selection=fixed needs teacher_weights, a list of one weight for each teacher", "teacher_weights")
    values = [float(number(weight, "teacher_weights", 0, 1e9)) for weight in weights]
    if sum(values) == 0:
        raise InputError("teacher_weights are all zero", "teacher_weights")
    return [value / sum(values) for value in values]


def predictions(step: Step, logits: Tensor) -> Tensor:
    """Return probabilities of the classes, (batch, classes), or the score of a regression, (batch, 1)."""
    return widened(logits).softmax(dim=-1) if step.task.labels is not None else widened(logits)
