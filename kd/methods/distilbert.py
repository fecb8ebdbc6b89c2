"""DistilBERT: soft targets, masked language modelling and the direction of the last states."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kd.data.masked_lm.task import NOT_PREDICTED
from kd.forward import Forward, Needs
from kd.functional import layer_maps
from kd.functional.hidden import cosine_distance
from kd.functional.logits import SOFT_LOSSES
from kd.methods.base import Bound, Method, Step, match_width
from kd.methods.options import switch, temperature_schedule, word
from kd.schedules import Schedule

TOKEN_MEANS = ("examples", "batch")


class DistilBERT(Method):
    r"""DistilBERT (Sanh, Debut, Chaumond, Wolf, NeurIPS EMC2 workshop 2019, arXiv:1910.01108, section 2 and 3).

    :math:`L = 5 L_{ce} + 2 L_{mlm} + 1 L_{cos}`, on text without labels: a student of half the depth is trained as a masked
    language model (`task=text`), and fine-tuned afterwards as any other. With the labels of a classification task in place of
    the masked tokens it is distillation with a cosine loss. The paper removes token-type embeddings and the pooler and starts
    from the teacher's layers 1, 3, 5, 8, 10 and 12; both are choices of the student (`student.init`), not of the method.
    Authors' code consulted for facts: huggingface/transformers-research-projects, `distillation/distiller.py`.

    Terms:
        `task`: L_mlm, the hard loss, temperature 1. Weight 2.
        `logits`: L_ce, T squared included for `kl`; 0 if the student equals its teacher. Weight 5.
        `cosine`: L_cos, 1 - cosine of the last states of student and teacher, in [0, 2], a mean over real tokens. Weight 1.
        `mse`: squared error of the logits, summed over the vocabulary. Weight 0, as in the authors' code.

    The authors' README has two sets of weights: these, and a third for each of the first three.

    Args:
        temperature: T > 0, on both sides; a number or a schedule. 2 in the authors' code.
        loss: loss of `logits`: `kl`, `ce` or `mse`.
        only_predicted: whether `logits` and `mse` of a masked language model are means over the predicted positions alone;
            false takes all real tokens, as the authors do by default, and so much memory as their logits have, (real tokens,
            vocabulary). For other tasks it makes no difference.
        token_mean: means over tokens: `examples` takes them over the tokens of each example, then over examples (our choice: a
            result then does not depend on how a batch is split); `batch` over all tokens of the batch (authors' code).

    The cosine needs states of one width. For a student of another width a learned linear map is added (our choice).
    """

    names = ("task", "logits", "cosine", "mse")

    def __init__(
        self,
        temperature: "float | Schedule" = 2.0,
        loss: str = "kl",
        only_predicted: bool = False,
        token_mean: str = "examples",
    ) -> None:
        super().__init__()
        self.temperature = temperature_schedule(temperature)
        self.loss = word(loss, SOFT_LOSSES, "loss")
        self.only_predicted = switch(only_predicted, "only_predicted")
        self.token_mean = word(token_mean, TOKEN_MEANS, "token_mean")
        self.depths = (0, 0)

    def bind(self, bound: Bound) -> None:
        """Build the map between widths, if they differ."""
        student, teacher = bound.student, bound.teacher
        self.depths = (student.depth, teacher.depth)
        self.project = match_width(student.width, teacher.width)

    def needs(self) -> tuple[Needs, Sequence[Needs]]:
        """Declare the last states of student and teacher."""
        ours, theirs = (Needs(hidden=[depth]) for depth in self.depths)
        return ours, [theirs]

    def prepare(self, step: Step) -> Step:
        """Return the step with logits of all real tokens of a masked language model, unless only the predicted ones count."""
        if self.only_predicted or "predicted" not in step.student.inputs:
            return step

        def every_token(forward: Forward[Any]) -> Forward[Any]:
            inputs = {**forward.inputs, "predicted": forward.inputs["attention_mask"].bool()}
            return Forward(forward.model, inputs, forward.needs)

        return step.replace(student=every_token(step.student), teachers=[every_token(step.teacher)])

    def terms(self, step: Step) -> dict[str, Tensor]:
        """Return the hard loss, the soft loss, the cosine distance and the squared error of logits."""
        student, teacher, labels = step.student.outputs, step.teacher.outputs, step.batch.labels
        ours, theirs, task, hard = student.logits, teacher.logits, step.task, student.logits
        compared = hard_positions = labels != NOT_PREDICTED if labels.ndim == 2 else None
        if hard_positions is not None and not self.only_predicted:
            compared = student.mask
            task = step.task.of(torch.where(compared, 0, NOT_PREDICTED))
            hard = ours[hard_positions[compared]]
        temperature = self.temperature(step.progress.fraction)
        distances = cosine_distance(
            self.project(student.hidden(self.depths[0])), teacher.hidden(self.depths[1]), student.mask, reduction="none"
        )
        return {
            "task": self.mean(step.task.hard(hard, labels, "none"), hard_positions),
            "logits": self.mean(task.soft(ours, theirs, temperature, self.loss, "none"), compared),
            "cosine": self.mean(distances, student.mask),
            "mse": self.mean(task.soft(ours, theirs, 1.0, "mse", "none"), compared),
        }

    def mean(self, losses: Tensor, positions: Tensor | None) -> Tensor:
        """Return the mean over examples of their means over tokens, or the mean over the tokens of the batch.

        Args:
            losses: means over the tokens of each example, (batch,).
            positions: the tokens, (batch, tokens), bool; None if an example has one loss.
        """
        if self.token_mean == "examples" or positions is None:
            return losses.mean()
        counts = positions.sum(dim=1)
        return (losses * counts).sum() / counts.sum()

    def layer_maps(self) -> Sequence[Mapping[str, Tensor]]:
        """Return the pair of last layers."""
        return [{"cosine": layer_maps.matrix((self.depths,), *self.depths)}]

    def batch_dependence(self) -> str | None:
        """Return that the weight of an example depends on the lengths of the others, for `token_mean=batch`."""
        return "token_mean=batch averages over all tokens of a batch" if self.token_mean == "batch" else None
