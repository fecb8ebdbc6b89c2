"""Meta-KD's distillation of a student of one domain from a teacher of several, by layers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kd.errors import InputError
from kd.forward import Needs
from kd.functional.hidden import at_least_float32
from kd.functional.prototypes import content_vector, expertise
from kd.methods.base import Bound, Step
from kd.methods.domains import (
    DomainHead,
    check_column,
    domain_vector,
    domains_of,
    in_full,
    marks_of,
    spread_of,
    transferability_of,
)
from kd.methods.options import word
from kd.methods.tinybert import TinyBERT

WEIGHTINGS = ("expertise", "transferability", "none")
WEIGHTED = ("example", "batch")


class MetaKD(TinyBERT):
    r"""Meta-distillation (Pan et al., ACL 2021, arXiv:2012.01266), Meta-KD's first stage for the student of a domain.

    TinyBERT's losses of an example, weighted by the teacher's expertise, and the error of the outputs of the heads of domains:
    :math:`L = mean_i w_i (rep_i + att_i) + \gamma_2 \, mean_i(w_i) \, dom`, with
    :math:`w_i = (1 + t_i) / (\exp((p_i - 1)^2) + 1)`, t the transferability of the example, p the teacher's probability of its
    label at temperature 1, and dom the squared error between :math:`W u_s` and :math:`u_t`, u the output of
    `kd.methods.domains.DomainHead`. The second stage is the soft cross entropy, `kd.methods.kd.KD`: `conf/method/meta_kd.yaml`
    has both. Authors' code consulted for facts: alibaba/EasyTransfer, `meta_distill.py`.

    Terms, each as in TinyBERT but weighted:
        `attention`: :math:`mean_i w_i att_i`.
        `hidden`: :math:`mean_i w_i rep_i` of the layers from 1.
        `embedding`: the same of the embeddings, which the authors add to `hidden`.
        `domain`: :math:`mean_i(w_i) \, dom`, see `domain_error`. Weight :math:`\gamma_2`: 0.5 in the authors' script.

    Args:
        domain: name of the task's column of domains.
        transferability: name of the column of t, which `edit=[prototype_weights]` adds; null for t = 0.
        weighting: `expertise`, w; `transferability`, 1 + t; or `none`.
        weighted: `example` weighs the losses of each example; `batch` multiplies the means over the batch by the mean weight,
            as a later port does (EasyNLP), by oversight.
        domain_error: `batch`, the mean over the batch, which then has the mean weight (authors' code, where the mean is taken
            too early); `example` weighs each example's error.
        options: those of TinyBERT: layers, attention, padding, project, teacher_dropout and so on. The vector of a text takes
            `padding` too.

    The teacher comes from `kd.methods.meta_teacher.MetaTeacher`, and its head from what that kept. The student's head is drawn
    at random and is discarded.

    Raises:
        InputError: for an option that does not have one of its allowed values.
    """

    names = ("attention", "hidden", "embedding", "domain")
    distances = ("attention", "hidden", "embedding")

    def __init__(
        self,
        domain: str = "domain",
        transferability: str | None = "transferability",
        weighting: str = "expertise",
        weighted: str = "example",
        domain_error: str = "batch",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.domain, self.transferability = domain, transferability
        self.weighting = word(weighting, WEIGHTINGS, "weighting")
        self.weighted = word(weighted, WEIGHTED, "weighted")
        self.domain_error = word(domain_error, WEIGHTED, "domain_error")

    def bind(self, bound: Bound) -> None:
        """Build the student's head of the domains, and take over the teacher's.

        Raises:
            InputError: for a task without these columns, or a teacher that kept no head.
        """
        super().bind(bound)
        if max(self._ours()) < bound.student.depth:
            raise InputError(
                f"layers={self.layers} leaves out the student's last layer, {bound.student.depth}, which the term `domain` "
                "reads",
                "layers",
            )
        names = domains_of(bound, self.domain)
        if self.weighting != "none":
            check_column(bound, self.transferability)
        if bound.task.labels is None and self.weighting == "expertise":
            raise InputError(
                "weighting=expertise needs classes, the task is a regression; use weighting=transferability", "weighting"
            )
        self.head = DomainHead(len(names), bound.student.width, spread_of(bound.student))
        for name, tensor in teachers_head(bound, names).items():
            self.register_buffer(buffer_of(name), tensor, persistent=False)

    def needs(self) -> tuple[Needs, Sequence[Needs]]:
        """Declare TinyBERT's needs, and the states of the last layers."""
        student, (teacher,) = super().needs()
        return student | Needs(hidden=[self.depths[0]]), [teacher | Needs(hidden=[self.depths[1]])]

    def terms(self, step: Step) -> dict[str, Tensor]:
        """Return the weighted losses."""
        weights, errors = self.weights(step), self.layer_losses(step, "none")
        domain = self.domain_errors(step)
        if self.weighted == "example":
            terms = {name: (weights * losses).mean() for name, losses in errors.items()}
        else:
            terms = {name: weights.mean() * losses.mean() for name, losses in errors.items()}
        apart = self.weighted == "batch" or self.domain_error == "batch"
        return {**terms, "domain": weights.mean() * domain.mean() if apart else (weights * domain).mean()}

    def weights(self, step: Step) -> Tensor:
        """Return the weights of the examples, (batch,), constants."""
        if self.weighting == "none":
            return torch.ones(len(step.batch), device=step.batch.labels.device)
        transfer = transferability_of(step, self.transferability, absent=0.0)
        if self.weighting == "transferability":
            return 1 + transfer
        predicted = at_least_float32(step.teacher.outputs.logits.detach()).softmax(dim=-1)
        return expertise(transfer, predicted.gather(1, step.batch.labels.unsqueeze(1)).squeeze(1))

    def domain_errors(self, step: Step) -> Tensor:
        """Return the mean squared error between the heads' outputs of each example, (batch,)."""
        domains = step.batch.columns[self.domain]
        contents = [
            content_vector(outputs.hidden(depth), outputs.mask, self.padding)
            for outputs, depth in zip((step.student.outputs, step.teacher.outputs), self.depths, strict=True)
        ]
        ours = in_full(self.projections[self._place(self.depths[0])], self.head(contents[0], domains))
        kept = {name: getattr(self, buffer_of(name)) for name in self.head.state()}
        return ((ours - domain_vector(kept, contents[1], domains).detach()) ** 2).mean(dim=1)

    def describe(self) -> dict[str, str]:
        """Describe the layer map and the weights of examples."""
        return {**super().describe(), "weights of examples": f"weighting={self.weighting}, of each {self.weighted}"}

    def batch_dependence(self) -> str | None:
        """Return that a product of means over the batch is not a mean over examples, besides TinyBERT's reasons."""
        if self.weighted == "batch":
            return "weighted=batch multiplies the batch's mean loss by its mean weight"
        if self.domain_error == "batch":
            return "domain_error=batch multiplies the batch's mean error by its mean weight"
        return super().batch_dependence()

    def label_dependence(self) -> str | None:
        """Return that weights need labels, for `weighting=expertise`."""
        return "weighting=expertise reads the teacher's probability of the label" if self.weighting == "expertise" else None


def buffer_of(name: str) -> str:
    """Return the name of the buffer with a parameter of the teacher's head."""
    return f"teachers_{name.replace('.', '_')}"


def teachers_head(bound: Bound, names: Sequence[str]) -> dict[str, Tensor]:
    """Return the parameters of the head of domains that a teacher's method kept, by name.

    Raises:
        InputError: if it kept none, or one of other domains.
    """
    own = DomainHead(len(names), bound.teacher.width).state()
    kept = {name.removeprefix("head."): tensor for name, tensor in bound.teacher.kept.items() if name.startswith("head.")}
    marks = bound.teacher.kept.get("domains")
    same = marks is not None and (marks.is_meta or torch.equal(marks.cpu(), marks_of(names)))
    if not same or {name: tensor.shape for name, tensor in kept.items()} != {
        name: tensor.shape for name, tensor in own.items()
    }:
        raise InputError(
            f"the teacher '{bound.teacher.name}' kept {'a head of other domains' if kept else 'no head of domains'}, and the "
            f"method reads that of {', '.join(names)}, in this order: train it on them by "
            f"teacher.{bound.teacher.name}.method=meta_teacher",
            "teacher",
        )
    return kept
