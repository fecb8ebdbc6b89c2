"""Distillation on samples that support the teacher's decision boundary."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kd.errors import InputError
from kd.forward import Needs, Outputs
from kd.functional import boundary
from kd.functional.logits import SOFT_LOSSES
from kd.methods.base import Bound, Method, Step
from kd.methods.options import BATCH_MEANS, number, temperature_schedule, whole, word
from kd.schedules import Schedule

STATES = ("embedded", "words")
BASES = ("both", "teacher")
BOUNDARY_MEANS = ("batch", "base")
MOST_STEPS = 1000
"""Largest number of steps of an example toward the boundary; each is a forward and a backward pass of the teacher."""


class BSS(Method):
    r"""Boundary supporting samples (Heo, Lee, Yun, Choi, AAAI 2019, arXiv:1805.05532), for BERT.

    :math:`L = CE + r(e) CE_T(p_t, p_s) + a(e) CE_T(p_t(\hat x), p_s(\hat x))`: base samples x are moved across the teacher's
    boundary between their class y and another class k, drawn with a probability proportional to :math:`p_t`, and the student
    imitates the teacher at the samples :math:`\hat x` that result. A step is :math:`x + \eta (|z_k - z_y| + 10^{-4}) \nabla /
    \lVert \nabla \rVert_2` with the gradient of :math:`z_k - z_y` of the teacher, and an example that the teacher no longer
    assigns to y stays where it is. The paper is about images; the version for tokens is our adaptation: x are the embeddings of
    a sentence, and the norm is over all its tokens. Authors' code consulted for facts: bhheo/BSS_distillation.

    Terms:
        `task`: the task's hard loss.
        `logits`: :math:`CE_T(p_t, p_s)`, without T squared (authors' code). Weight r.
        `boundary`: :math:`CE_T(p_t(\hat x), p_s(\hat x))`. Weight a.

    Args:
        states: what is moved: `embedded`, the output of the embeddings, or `words`, the word embeddings. The student reads its
            own embeddings plus the teacher's shift, which with equal embeddings is the teacher's sample. Between other widths
            the shift goes through the linear map that takes the teacher's table of word embeddings to the student's, in least
            squares, as the tables are before training. All this is our choice; there is no limit of the values, as the authors
            have for pixels.
        base: base samples: `both`, those that teacher and student classify correctly (paper), or `teacher` (authors' code).
        samples: largest number of base samples of a batch: those with the largest :math:`\sum_{c \ne y} (p_t^c - p_s^c)^2`. 64
            of a batch of 256 in the authors' code; null for all (our choice: no example depends on the others), which is the
            same for batches of up to 64.
        steps: largest number of steps, 10 in the authors' code. A sample that has not crossed the boundary then counts too.
        step_size: :math:`\eta`, 0.3 in the authors' code.
        until: fraction of training, in (0, 1], after which no samples are made and `boundary` is 0: that at which its weight
            has fallen to 0.
        boundary_reduction: `batch` divides the sum over base samples by the number of examples (our choice); `base` by that of
            base samples (authors' code).
        temperature: T > 0 of both terms, a number or a schedule. 3 in the authors' code.
        loss: loss of both terms: `ce` (authors' code), `kl` or `mse`; `kl` is multiplied by T squared.
        reduction: `batchmean`, or `elementmean`, which divides both terms by the number of classes.

    The weights r, from 4 to 1, and a, from 2 to 0 at three quarters of training, are the authors', with the fraction of
    training in place of their epochs. The teacher runs at every step, in eval mode, once and at most `steps` times more.
    """

    names = ("task", "logits", "boundary")
    same_vocabulary = True

    def __init__(
        self,
        states: str = "embedded",
        base: str = "both",
        samples: int | None = None,
        steps: int = 10,
        step_size: float = 0.3,
        until: float = 0.75,
        boundary_reduction: str = "batch",
        temperature: "float | Schedule" = 3.0,
        loss: str = "ce",
        reduction: str = "batchmean",
    ) -> None:
        super().__init__()
        self.states = word(states, STATES, "states")
        self.base = word(base, BASES, "base")
        self.samples = None if samples is None else whole(samples, "samples", 1)
        self.steps = whole(steps, "steps", 1, MOST_STEPS)
        self.step_size = number(step_size, "step_size", 1e-6, 1e6)
        self.until = number(until, "until", 1e-6, 1)
        self.boundary_reduction = word(boundary_reduction, BOUNDARY_MEANS, "boundary_reduction")
        self.temperature = temperature_schedule(temperature)
        self.loss = word(loss, SOFT_LOSSES, "loss")
        self.reduction = word(reduction, BATCH_MEANS, "reduction")
        # Late in training `boundary` may be 0. A sample's cross entropy is above 0, and a wrong student has fewer of them.
        least = self.until == 1 and (loss != "ce" or base == "teacher")
        self.distances = ("logits", "boundary") if least else ("logits",)
        self.across_ranks = self.batch_dependence() is not None
        self.shift: Tensor | None
        self.register_buffer("shift", None)

    def bind(self, bound: Bound) -> None:
        """Compute the map of shifts between embeddings of other widths.

        Raises:
            InputError: for a task without classes.
        """
        if bound.task.labels is None or not bound.student.classifies:
            raise InputError(
                f"method=bss moves examples across a boundary between two classes, and task={bound.task.name} has none; use "
                "method=kd",
                "method",
            )
        student, teacher = bound.student, bound.teacher
        if student.width != teacher.width:
            model: Any = getattr(teacher, "encoder", teacher)
            ids = torch.arange(model.config.vocab_size, device=next(model.parameters()).device)
            theirs = model.word_embeddings(ids)
            # Another vocabulary is refused later; until then the map has to have a shape only.
            ours = student.word_embeddings(ids.to(next(student.parameters()).device) % student.config.vocab_size)
            if theirs.is_meta or ours.is_meta:
                self.shift = theirs.new_empty((teacher.width, student.width))
            else:
                self.shift = boundary.least_squares_map(theirs, ours.to(theirs.device))

    def needs(self) -> tuple[Needs, Sequence[Needs]]:
        """Declare the embeddings, by which the teacher is differentiated."""
        if self.states == "words":
            return Needs(), [Needs(words=True, gradient=True)]
        return Needs(hidden=[0]), [Needs(hidden=[0], gradient=True)]

    def terms(self, step: Step) -> dict[str, Tensor]:
        """Return the loss terms listed in the class docstring."""
        student, teacher = step.student.outputs, step.teacher.outputs
        temperature = self.temperature(step.progress.fraction)
        theirs = teacher.logits.detach()
        return {
            "task": step.task.hard(student.logits, step.batch.labels),
            "logits": step.task.soft(student.logits, theirs, temperature, self.loss, self.reduction),
            "boundary": self.boundary(step, temperature),
        }

    def boundary(self, step: Step, temperature: float) -> Tensor:
        """Return the loss at the samples near the boundary."""
        student = step.student.outputs
        start, own = self.moved(step.teacher.outputs), self.own(step)
        base = self.base_samples(step)
        if step.progress.fraction > self.until:
            base = torch.zeros_like(base)
        rows = base.nonzero().squeeze(1)
        losses = (student.logits * 0).sum(dim=-1)  # in the graph of the student, also where there are no base samples
        if len(rows):
            shift, theirs = self.samples_of(step, start, rows)
            inputs = {name: tensor[rows] for name, tensor in step.student.inputs.items()}
            ours = step.student.run({**inputs, self.states: own[rows] + shift.to(own.dtype)}, Needs()).logits
            values = step.task.soft(ours, theirs, temperature, self.loss, "none")
            if self.reduction == "elementmean":
                values = values / ours.shape[-1]
            losses = losses.to(values.dtype).index_add(0, rows, values)
        if self.boundary_reduction == "batch":
            return losses.mean()
        losses, counted = step.across(losses), step.across(base)
        return losses.sum() / counted.sum().clamp(min=1)

    def moved(self, outputs: Outputs) -> Tensor:
        """Return the states of a pass of the teacher that are moved, (batch, tokens, width)."""
        return outputs.words if self.states == "words" else outputs.hidden(0)

    def own(self, step: Step) -> Tensor:
        """Return the student's states in the place of those that are moved, (batch, tokens, width)."""
        if self.states == "embedded":
            return step.student.outputs.hidden(0)
        embedded: Tensor = step.student.model.word_embeddings(step.student.inputs["input_ids"])
        return embedded

    def base_samples(self, step: Step) -> Tensor:
        """Return which examples are moved, (batch,), bool."""
        labels = step.batch.labels
        ours, theirs = step.student.outputs.logits.detach(), step.teacher.outputs.logits.detach()
        base = theirs.argmax(dim=-1) == labels
        if self.base == "both":
            base = base & (ours.argmax(dim=-1) == labels)
        if self.samples is None:
            return base
        scores = boundary.disagreement(ours, theirs, labels).masked_fill(~base, -torch.inf)
        scores, index = step.across(scores), step.across(step.batch.index)
        chosen = index[scores.topk(min(self.samples, len(scores))).indices]
        return base & torch.isin(step.batch.index, chosen)

    def samples_of(self, step: Step, start: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the shift of each base sample in the student's space, (rows, tokens, width), and the teacher's logits there.

        Args:
            step: the step.
            start: the teacher's states, (batch, tokens, width), by which its first pass is differentiated.
            rows: indices of the base samples in the batch.
        """
        labels, mask = step.batch.labels[rows], step.teacher.outputs.mask[rows, :, None]
        first = step.teacher.outputs.logits.detach()[rows]
        classes = boundary.other_classes(first, labels, step.draws("class", 1)[rows, 0])
        inputs = {name: tensor[rows] for name, tensor in step.teacher.inputs.items()}
        needs = step.teacher.needs
        states = begin = start.detach()[rows]
        with torch.enable_grad():  # also if the step is of a reward, without gradients of the student
            logits, at = step.teacher.outputs.logits[rows], start
            for done in range(self.steps + 1):
                if done:
                    logits, at = self.teacher_at(step, inputs, states, needs)
                stays = logits.detach().argmax(dim=-1) != labels
                if done == self.steps or bool(stays.all()):
                    break
                against = boundary.difference(logits, classes, labels)
                # The first pass is shared: another method, such as that of another student, may differentiate it too.
                (gradient,) = torch.autograd.grad(against.sum(), at, retain_graph=done == 0)
                gradient = (gradient if done else gradient[rows]).masked_fill(~mask, 0)
                moved = boundary.toward_boundary(states, gradient, against.detach(), self.step_size).to(begin.dtype)
                states = torch.where(stays[:, None, None], states, moved)
        shift = states - begin
        if self.shift is not None:
            with torch.autocast(shift.device.type, enabled=False):
                shift = shift.to(self.shift.dtype) @ self.shift
        return shift, logits.detach()

    def teacher_at(self, step: Step, inputs: Mapping[str, Tensor], states: Tensor, needs: Needs) -> tuple[Tensor, Tensor]:
        """Return the teacher's logits at moved states, and these states in the graph."""
        start = None if self.states == "words" else 0
        outputs = step.teacher.run({**inputs, self.states: states}, needs.available_from(start))
        return outputs.logits, self.moved(outputs)

    def batch_dependence(self) -> str | None:
        """Return that `samples` chooses from a batch, or that `boundary_reduction=base` is a mean over a part of one."""
        if self.samples is not None:
            return f"samples={self.samples} takes the examples of a batch on which student and teacher differ most"
        if self.boundary_reduction == "base":
            return "boundary_reduction=base is a mean over the base samples of a batch"
        return None

    def label_dependence(self) -> str | None:
        """Return that base samples are those that are classified as their label."""
        return "base samples are those that the teacher classifies correctly"
