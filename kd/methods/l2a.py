"""Reinforced selection of generated examples for distillation."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd.errors import InputError
from kd.forward import Needs
from kd.functional.hidden import at_least_float32
from kd.functional.logits import SOFT_LOSSES
from kd.functional.reinforce import log_probability, selected_mean
from kd.methods.base import Bound, Progress, Step, Turn
from kd.methods.options import held_share, number, switch, temperature_schedule, whole, word
from kd.methods.options import holds as checked_holds
from kd.methods.rl_kd import predictions
from kd.methods.tinybert import TinyBERT
from kd.schedules import Schedule

SELECTIONS = ("policy", "all", "random")
SELECTS = ("unlabelled", "all")
REWARDS = ("accuracy", "loss")


class L2A(TinyBERT):
    r"""Learning to Augment for Data-Scarce Domain BERT Knowledge Distillation (L2A: Feng et al., AAAI 2021, arXiv:2101.08106).

    A policy decides about each generated example i whether the student learns from it, :math:`a_i \sim \pi(a | s_i)`. With
    :math:`L_i` TinyBERT's losses of an example, of layers and of logits, the student's loss is
    :math:`\sum_i a_i L_i / \max(1, \sum_i a_i)`. The reward of optimiser step b is the change of the student's accuracy on a
    held part of train, :math:`r_b = acc_{after} - acc_{before}`, and the policy moves along
    :math:`\sum_b R_b \frac{1}{n_b} \sum_i \nabla \ln \pi(a_i | s_i)` after an episode of several steps, with the return
    :math:`R_b = \sum_{k \ge 0} \gamma^k r_{b + k}` within the episode and the :math:`n_b` examples that it decided about.

    There is no code of the authors, and of the paper only abstract and introduction could be read: a generator makes samples
    from texts of source and target domain, and a reinforced selector keeps those that help, by the student's performance.
    All equations above, and everything below, are our choice. The generator is `edit=[denoising_chain]`, whose examples have no
    label. An update has two turns: the student learns, then the policy.

    Terms:
        `task`: the task's hard loss of selected examples with labels. Weight 0: only the teacher teaches, as in TinyBERT.
        `attention`, `hidden`, `embedding`: TinyBERT's losses of layers, over the selected examples.
        `logits`: soft cross entropy with the teacher, summed over classes, over the selected examples.
        `policy`: minus the sum over the steps of the episode so far of :math:`R_b` times the mean log-probability of its
            actions; the policy moves at the end of an episode. 0 without a policy.

    Args:
        selection: `policy`; or, without one, `all` examples or a `random` part of them, the baselines.
        selects: what is selected from: `unlabelled` examples, those with a label always being used; or `all`, for augmentation
            that keeps labels (`edit=[word_replacement]`).
        keep: probability of being selected, in [0, 1], of `random`.
        reward: what changes: `accuracy` on the held part, or minus the `loss` on it, also for a regression.
        holds: share of the labelled examples of train, in (0, 1), of the kind that is evaluated, that is held for the reward.
        episode: optimiser steps of an episode, at least 1; the last one may be shorter.
        gamma: discount of later rewards in an episode, in [0, 1].
        hidden: width of the policy's hidden layer: :math:`\pi(1 | s) = \sigma(w^T \tanh(W s + b) + c)`.
        domain: further column of classes whose one-hot vector is part of the state; None for none.
        normalize: scale a state to mean 0 and variance 1.
        policy_lr: peak learning rate of the policy; None for the run's.
        temperature: T > 0 of `logits`, a number or a schedule.
        loss: loss of `logits`: `ce` (TinyBERT's), `kl` (times temperature squared) or `mse`.
        options: those of TinyBERT: layers, attention, padding, project and so on.

    The state of an example, constants: the student's [CLS] state of its last layer, probabilities of teacher and student, the
    entropy of the teacher, the cross entropy of the student with it, and the domain. No label is part of it, since generated
    examples have none. Ranks select as one process does, and share a mean over the selected examples of all of them. If none of
    a batch is selected its loss is 0; the optimiser's momentum may still move the student. Where more examples are held than a
    batch has, the rewards of two steps are of different ones.
    """

    names = ("task", "attention", "hidden", "embedding", "logits", "policy")
    distances = ("attention", "hidden", "embedding", "logits")

    trace: Tensor
    summed: Tensor
    values: Tensor
    episode_of: Tensor

    def __init__(
        self,
        selection: str = "policy",
        selects: str = "unlabelled",
        keep: float = 0.5,
        reward: str = "accuracy",
        holds: float = 0.2,
        episode: int = 10,
        gamma: float = 0.9,
        hidden: int = 128,
        domain: str | None = None,
        policy_lr: float | None = None,
        temperature: "float | Schedule" = 1.0,
        loss: str = "ce",
        *,
        normalize: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.selection = word(selection, SELECTIONS, "selection")
        self.selects = word(selects, SELECTS, "selects")
        self.keep = float(number(keep, "keep", 0, 1))
        self.reward = word(reward, REWARDS, "reward")
        share = held_share(holds, "the reward of the policy is the performance") if self.learns else checked_holds(holds)
        self.holds = share if self.learns else 0.0
        self.across_ranks = self.padding == "strict"
        self.episode = whole(episode, "episode", 1, 1 << 30)
        self.gamma = float(number(gamma, "gamma", 0, 1))
        self.hidden_units = whole(hidden, "hidden", 1, 1 << 20)
        self.domain = None if domain is None else name(domain, "domain")
        self.policy_lr = None if policy_lr is None else float(number(policy_lr, "policy_lr", 1e-12, 100))
        self.temperature = temperature_schedule(temperature)
        self.loss = word(loss, SOFT_LOSSES, "loss")
        self.normalize = switch(normalize, "normalize")
        self.keeps = ("policy",) if self.learns else ()
        self.policy: nn.Module = nn.Identity()
        self.domains = 0
        self.taken: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        """State, actions and which of them were decided, of all ranks, and the performance before the student's turn."""
        self.next: dict[str, Tensor] = {}
        """Values of the buffers after the step."""

    @property
    def learns(self) -> bool:
        """True if there is a policy."""
        return self.selection == "policy"

    def bind(self, bound: Bound) -> None:
        """Resolve TinyBERT's layer map, and build the policy.

        Raises:
            InputError: for a task or a column that the options do not fit.
        """
        self.bind_layers(bound)
        if not bound.student.classifies:
            raise InputError(
                f"selection={self.selection} is of examples, and a masked language model has many predictions for each; use "
                "another method",
                "selection",
            )
        regression = bound.task.labels is None
        if regression and self.learns and self.reward == "accuracy":
            raise InputError("reward=accuracy needs classes, the task is a regression; use reward=loss", "reward")
        if self.domain is not None:
            if self.domain not in bound.task.column_classes or self.domain not in bound.task.columns:
                raise InputError(
                    f"domain={self.domain} is not a column of classes: 'task.extra={{{self.domain}: classes}}'", "domain"
                )
            self.domains = len(bound.task.column_classes[self.domain])
        if not self.learns:
            return
        of_outputs = 3 if bound.task.labels is None else 2 * len(bound.task.labels) + 2
        size = bound.student.width + of_outputs + self.domains
        self.policy = nn.Sequential(nn.Linear(size, self.hidden_units), nn.Tanh(), nn.Linear(self.hidden_units, 1))
        count = sum(parameter.numel() for parameter in self.policy.parameters())
        for name, shape in {"trace": (count,), "summed": (count,), "values": (2,)}.items():
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("episode_of", torch.full((2,), -1, dtype=torch.long))

    def needs(self) -> tuple[Needs, Sequence[Needs]]:
        """Declare TinyBERT's needs, and the student's vector for the state."""
        student, teachers = super().needs()
        return (student | Needs(cls=[self.depths[0]]) if self.learns else student), teachers

    def turns(self) -> Sequence[Turn]:
        """Return the student's turn, and then the policy's if there is one, at the end of each episode."""
        student = Turn("student", self._student)
        if not self.learns:
            return [student]
        return [student, Turn("policy", self._policy, list(self.policy.parameters()), self.policy_lr, self.ends)]

    def ends(self, progress: Progress) -> bool:
        """Return whether an episode ends with this step."""
        return (progress.step + 1) % self.episode == 0 or progress.step + 1 == progress.total

    def terms(self, step: Step) -> dict[str, Tensor]:
        """Return the terms of both turns."""
        return {name: term for turn in self.turns() for name, term in turn.terms(step).items()}

    def _student(self, step: Step) -> dict[str, Tensor]:
        """Return the student's terms; what the policy's turn needs is kept for it."""
        ours, theirs = step.student.outputs.logits, step.teacher.outputs.logits
        errors = step.task.errors(ours, step.batch.labels)
        labelled = ~errors.isnan()
        losses = self.layer_losses(step, "none")
        losses["logits"] = step.task.soft(ours, theirs, self.temperature(step.progress.fraction), self.loss, "none")
        actions = self.actions(step, labelled)
        # Every rank computes the mean over the selected examples of all ranks.
        selected = step.across(actions)
        rows = step.across(torch.stack(list(losses.values()), dim=1)).unbind(dim=1)
        terms = {name: selected_mean(each, selected) for name, each in zip(losses, rows, strict=True)}
        if self.selects == "unlabelled" or self.selection == "all":  # every example with a label is used
            terms["task"] = step.task.hard(ours, step.batch.labels)
        else:
            hard = torch.where(labelled, errors, 0.0)
            terms["task"] = selected_mean(step.across(hard), selected * step.across(labelled.to(selected.dtype)))
        return terms if self.learns else {**terms, "policy": torch.zeros_like(terms["task"])}

    def actions(self, step: Step, labelled: Tensor) -> Tensor:
        """Return whether each example is selected, (batch,), 0 or 1, constants.

        Args:
            step: the step.
            labelled: whether each example has a label, (batch,).
        """
        decided = torch.ones_like(labelled) if self.selects == "all" else ~labelled
        dtype = at_least_float32(step.student.outputs.logits).dtype
        if self.selection == "all":
            return torch.ones_like(labelled, dtype=dtype)
        chances = step.draws("actions", 1).squeeze(1)
        if self.selection == "random":
            return torch.where(decided, chances < self.keep, True).to(dtype)
        with torch.no_grad():
            state = self.state_of(step)
            probabilities = at_least_float32(self.policy(state)).sigmoid().squeeze(1)
            actions = torch.where(decided, chances < probabilities, True).to(dtype)
            self.taken = (step.across(state), step.across(actions), step.across(decided.to(dtype)), self.performance(step))
        return actions

    @torch.no_grad()
    def state_of(self, step: Step) -> Tensor:
        """Return the state of each example, (batch, features), constants."""
        student, teacher = step.student.outputs, step.teacher.outputs
        parts = [student.cls(self.depths[0]), predictions(step, teacher.logits), predictions(step, student.logits)]
        if step.task.labels is not None:
            parts.append(step.task.soft(teacher.logits, teacher.logits, 1.0, "ce", "none").unsqueeze(1))
        parts.append(step.task.soft(student.logits, teacher.logits, 1.0, "ce", "none").unsqueeze(1))
        if self.domain is not None:
            parts.append(nn.functional.one_hot(step.batch.columns[self.domain], self.domains))
        state = torch.cat([part.to(next(self.policy.parameters()).dtype) for part in parts], dim=1)
        return nn.functional.layer_norm(state, state.shape[1:]) if self.normalize else state

    @torch.no_grad()
    def performance(self, step: Step) -> Tensor:
        """Return the student's performance on the held batch of all ranks, without dropout, a scalar."""
        held = step.on_held()
        logits = held.student.evaluate(needs=Needs()).logits
        if self.reward == "accuracy":
            values = (held.task.predict(logits) == held.batch.labels).to(torch.float)
        else:
            values = -held.task.errors(logits, held.batch.labels)
        return held.across(values).mean()

    def _policy(self, step: Step) -> dict[str, Tensor]:
        r"""Return the policy's term.

        The policy does not move within an episode, so that :math:`\sum_b R_b g_b = \sum_b r_b e_b` with the trace
        :math:`e_b = \gamma e_{b-1} + g_b` of the gradients :math:`g_b` of the mean log-probabilities: the sum is known at the
        end, and no state of an earlier step has to be stored.
        """
        assert self.taken is not None, "the student's turn comes first"
        (state, actions, decided, before), self.taken = self.taken, None
        parameters = list(self.policy.parameters())
        with torch.enable_grad():
            logits = self.policy(state)
            mean = selected_mean(log_probability(logits, actions.unsqueeze(1)), decided)
            gradient = torch.cat([part.flatten() for part in torch.autograd.grad(mean, parameters)])
        reward = (self.performance(step) - before).to(gradient.dtype)
        number = torch.full_like(self.episode_of[0], step.progress.step // self.episode)
        again = (self.episode_of[0] == number).to(gradient.dtype)  # of the same episode as the last step
        trace = self.gamma * again * self.trace + gradient
        value = self.gamma * again * self.values[0] + mean.detach()
        kept = (self.episode_of[1] < self.episode_of[0]).to(gradient.dtype)  # has not moved the policy yet
        summed, total = kept * self.summed + reward * trace, kept * self.values[1] + reward * value
        moved = number if self.ends(step.progress) else self.episode_of[1]
        self.next = {
            "trace": trace,
            "summed": summed,
            "values": torch.stack([value, total]),
            "episode_of": torch.stack([number, moved]),
        }
        return {"policy": with_gradient(-total, parameters, -summed)}

    def after_step(self, step: Step, terms: Mapping[str, Tensor]) -> None:
        """Take over the traces of the step."""
        super().after_step(step, terms)
        with torch.no_grad():
            for name, value in self.next.items():
                getattr(self, name).copy_(value)
        self.next = {}

    def describe(self) -> dict[str, str]:
        """Describe the layer map and the selection."""
        how = {"policy": f"a policy, episodes of {self.episode} steps", "random": f"each with probability {self.keep}"}
        return {**super().describe(), "selection": f"{how.get(self.selection, 'all')}; of {self.selects} examples"}

    def batch_dependence(self) -> str | None:
        """Return that the mean is over selected examples of a batch or the reward is one of a batch, and TinyBERT's reason."""
        reasons = {
            "policy": "the reward of the policy is that of a batch",
            "random": "a mean over the selected examples of a batch depends on how many they are",
        }
        return "; ".join(filter(None, (reasons.get(self.selection), super().batch_dependence()))) or None

    def unlabelled_dependence(self) -> str | None:
        """Return that there is nothing to decide about, for `selects=unlabelled` with a policy."""
        if self.learns and self.selects == "unlabelled":
            return "with selects=unlabelled the policy decides about these alone"
        return None


def name(value: object, key: str) -> str:
    """Check the name of a column, and return it.

    Raises:
        InputError: if it is no text.
    """
    if not isinstance(value, str):
        raise InputError(f"{key}={value} is not the name of a column", key)
    return value


def with_gradient(value: Tensor, parameters: Sequence[Tensor], gradient: Tensor) -> Tensor:
    """Return a scalar with this value and this gradient, for a loss whose gradient was accumulated over steps.

    Args:
        value: the value, a constant.
        parameters: tensors that the gradient is of.
        gradient: (sum of their sizes,), constants, in their order.

    >>> weight = torch.ones(2, requires_grad=True)
    >>> loss = with_gradient(torch.tensor(5.0), [weight], torch.tensor([1.0, -2.0]))
    >>> loss.backward()
    >>> loss.item(), weight.grad
    (5.0, tensor([ 1., -2.]))
    """
    flat = torch.cat([parameter.flatten() for parameter in parameters])
    return value.detach() + ((flat - flat.detach()) * gradient.detach()).sum()  # a matrix product would be in half precision
