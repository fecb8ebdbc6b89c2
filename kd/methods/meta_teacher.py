"""Meta-KD's meta-teacher: one teacher of several domains."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd.forward import Needs
from kd.functional.hidden import PADDING, at_least_float32
from kd.functional.prototypes import content_vector
from kd.methods.base import ANY_TEACHERS, Bound, Method, Step
from kd.methods.domains import DomainHead, check_column, domains_of, in_full, marks_of, spread_of, transferability_of
from kd.methods.options import number, word
from kd.system import hardware

CORRUPTIONS = ("permute", "other")


class MetaTeacher(Method):
    r"""Fine-tuning on several domains, Meta-KD's meta-teacher (Pan et al., ACL 2021, arXiv:2012.01266).

    :math:`L = mean_i t_i (CE(z_i, y_i) + \gamma_1 CE(d_i, y'_i))`: examples are weighted by their transferability t, and a
    head d that reads the domain's embedding and the mean of the last states is trained toward wrong domains y', so that the
    states come to tell little of the domain. There is no gradient reversal. Authors' code consulted for facts:
    alibaba/EasyTransfer, `meta_teacher.py`.

    Terms:
        `task`: :math:`mean_i t_i CE(z_i, y_i)`, or squared errors of a regression.
        `domain`: :math:`mean_i t_i CE(d_i, y'_i)`, in nats. Weight :math:`\gamma_1`: 0.5 in the authors' script, which
            however does not switch the term on.

    Args:
        domain: name of the task's column of domains.
        transferability: name of the column of t, which `edit=[prototype_weights]` adds; null for t = 1.
        corruption: y': `permute`, the domains of the batch in random order, of which some stay right (authors' code); or
            `other`, another domain, each equally likely (our choice).
        padding: mean of states over real tokens without [CLS] (`strict`, our choice), or over all positions but the first,
            padding included (`reference`, authors' code).
        dropout: of the vector that the domain's classifier reads; null for that of the model.

    Train should have examples of all domains: the embedding of a domain without examples stays as it was drawn, and with one
    domain alone `permute` trains the head toward the right one. A configured teacher is never run in training. The domains'
    names, their embedding and the head's first layer are kept for the student's method (`keeps`).
    """

    names = ("task", "domain")
    teachers = ANY_TEACHERS
    uses_teachers = False
    pools = False
    keeps = ("head", "domains")
    distances = ()

    def __init__(
        self,
        domain: str = "domain",
        transferability: str | None = "transferability",
        corruption: str = "permute",
        padding: str = "strict",
        dropout: float | None = None,
    ) -> None:
        super().__init__()
        self.domain, self.transferability = domain, transferability
        self.corruption = word(corruption, CORRUPTIONS, "corruption")
        self.padding = word(padding, PADDING, "padding")
        self.rate = None if dropout is None else number(dropout, "dropout", 0, 0.99)
        self.across_ranks = corruption == "permute" and padding == "strict"
        self.depth = 0

    def bind(self, bound: Bound) -> None:
        """Build the head of the domains.

        Raises:
            InputError: for a task without these columns.
        """
        names = domains_of(bound, self.domain)
        check_column(bound, self.transferability)
        self.teachers = len(bound.teachers)
        self.depth = bound.student.depth
        spread = spread_of(bound.student)
        self.head = DomainHead(len(names), bound.student.width, spread)
        self.register_buffer("domains", marks_of(names))
        self.classifier = nn.Linear(bound.student.width, len(names))
        nn.init.normal_(self.classifier.weight, std=spread)
        nn.init.zeros_(self.classifier.bias)
        own = [module.p for module in bound.student.modules() if isinstance(module, nn.Dropout)]
        self.dropout = nn.Dropout(max(own, default=0.0) if self.rate is None else self.rate)

    def needs(self) -> tuple[Needs, Sequence[Needs]]:
        """Declare the states of the last layer."""
        return Needs(hidden=[self.depth]), [Needs()] * (self.teachers or 0)

    def terms(self, step: Step) -> dict[str, Tensor]:
        """Return the weighted hard loss, and the weighted loss of the domains."""
        weights = transferability_of(step, self.transferability, absent=1.0)
        student = step.student.outputs
        content = content_vector(student.hidden(self.depth), student.mask, self.padding)
        domains = step.batch.columns[self.domain]
        logits = in_full(self.classifier, self.dropout(self.head(content, domains).tanh()))
        wrong = F.cross_entropy(at_least_float32(logits), self.wrong_domains(step), reduction="none")
        hard = step.task.hard(student.logits, step.batch.labels, reduction="none")
        return {"task": (weights * hard).mean(), "domain": (weights * wrong).mean()}

    def wrong_domains(self, step: Step) -> Tensor:
        """Return y', (batch,)."""
        domains = step.batch.columns[self.domain]
        if self.corruption == "other":
            count = self.classifier.out_features
            shift = 1 + (step.draws("domains", 1)[:, 0] * (count - 1)).long().to(domains.device)
            return (domains + shift) % count
        # In the order of the examples' indices, so that it does not depend on how the ranks share the batch.
        everyone, order = step.across(domains), step.across(step.batch.index).argsort()
        shuffled = hardware.to_device(torch.from_numpy(step.rng("domains").permutation(len(order))), order.device)
        given = torch.empty_like(everyone)
        given[order] = everyone[order[shuffled]]
        own = torch.searchsorted(step.across(step.batch.index)[order].contiguous(), step.batch.index)
        return given[order[own]]

    def batch_dependence(self) -> str | None:
        """Return that domains are permuted within a batch, or that a mean over padding depends on its longest example."""
        if self.padding == "reference":
            return "padding=reference averages over padding too, and the longest example of a batch says how much there is"
        return "corruption=permute permutes the domains of a batch" if self.corruption == "permute" else None
