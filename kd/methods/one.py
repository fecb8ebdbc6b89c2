"""Distillation from an ensemble of the branches of one network."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from kd.errors import InputError
from kd.forward import Needs
from kd.functional import ensembles
from kd.functional.hidden import at_least_float32
from kd.functional.logits import SOFT_LOSSES
from kd.methods.base import ANY_TEACHERS, Bound, Method, Step
from kd.methods.options import BATCH_MEANS, temperature_schedule, whole, word
from kd.models import Encoder
from kd.schedules import Schedule

NORMS = ("layer", "batch", "none")
HEADS = ("new", "copied")
MOST_BRANCHES = 64


class Branch(nn.Module):
    """Copies of a student's upper blocks and of its head.

    Args:
        student: the student.
        shared: number of blocks, from the lowest, that are not copied.
        new_head: whether the last linear layer gets random weights, of the same standard deviation. Its bias is copied.
    """

    def __init__(self, student: Encoder, shared: int, *, new_head: bool) -> None:
        super().__init__()
        copies: dict[int, nn.Module] = {}  # of all modules, by the address of the original
        self.blocks = nn.ModuleList(copy.deepcopy(block, copies) for block in blocks_of(student)[shared:])
        self.head = nn.ModuleList(copy.deepcopy(module, copies) for _, _, module in head_of(student))
        last = copies[id(student.outputs)]
        if new_head:
            assert isinstance(last, nn.Linear)
            with torch.no_grad():
                last.weight.copy_(torch.randn_like(last.weight) * last.weight.std())

    @contextmanager
    def inside(self, student: Encoder) -> Iterator[None]:
        """Replace the student's upper blocks and its head by these inside this context."""
        path, _, name = student.family.blocks.rpartition(".")
        owner, blocks = student.base.get_submodule(path), blocks_of(student)
        with ExitStack() as stack:
            stack.callback(setattr, owner, name, blocks)
            setattr(owner, name, nn.ModuleList([*blocks[: len(blocks) - len(self.blocks)], *self.blocks]))
            for (parent, child, module), own in zip(head_of(student), self.head, strict=True):
                stack.callback(setattr, parent, child, module)
                setattr(parent, child, own)
            yield


def blocks_of(student: Encoder) -> nn.ModuleList:
    """Return the list of blocks."""
    blocks = student.base.get_submodule(student.family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def head_of(student: Encoder) -> list[tuple[nn.Module, str, nn.Module]]:
    """Return the modules after the blocks, each with the module that it is a child of and its name there."""
    family, base = student.family, student.base
    below = {family.embeddings.partition(".")[0], family.blocks.partition(".")[0]}
    of_base = [(base, name, module) for name, module in base.named_children() if name == "pooler" and name not in below]
    return of_base + [(student.model, name, module) for name, module in student.model.named_children() if module is not base]


class ONE(Method):
    r"""Knowledge Distillation by On-the-Fly Native Ensemble (Lan, Zhu, Gong, NeurIPS 2018, arXiv:1806.04606), for BERT.

    There is no teacher. The network has m branches that share its lower layers, and the branches' gated ensemble teaches each
    of them: :math:`L = \sum_i CE(z_i) + CE(z_e) + w(e) \sum_i T^2 KL(p_e^T \| p_i^T)` with :math:`z_e = \sum_i g_i z_i` and
    :math:`g = softmax(relu(BN(W h)))`, the ensemble held constant in the divergence. The paper is about images; the version for
    tokens is our adaptation: the branches share embeddings and the lower k layers, each has upper layers and a head of its own,
    and h is the [CLS] state of layer k. The first branch is the student, so that it is what is validated and exported; the
    others are discarded after training. Authors' code consulted for facts: Lan1991Xu/ONE_NeurIPS2018, `cifar_one.py`.

    Terms:
        `task`: :math:`CE(z_1)`, the student's hard loss; of a regression its squared error, as everywhere here.
        `branches`: :math:`\sum_{i > 1} CE(z_i)`.
        `ensemble`: :math:`CE(z_e)`, which trains the gate.
        `logits`: :math:`\sum_i T^2 KL(p_e^T \| p_i^T)`. Weight w, which rises as :math:`e^{-5 (1 - e / 80)^2}` over the first
            80 epochs, of 300 in the authors' code, and is 1 then: `kd.schedules.RampUp`.

    Args:
        branches: m, 2 at least, the student included. 3 in the paper.
        shared: k, from 0, the embeddings alone, to the depth, so that only heads are branches; null is two thirds of the depth,
            rounded down (our choice: a ResNet shares two of its three stages).
        heads: `new` gives each further branch a last linear layer with random weights of the student's standard deviation, so
            that the branches differ (our choice); with `copied` all begin as the student, and differ by dropout alone. Layers
            are copied in both cases.
        norm: normalisation in the gate: `batch` (paper), always with the statistics of the global batch; `layer`, over the
            branches of an example (our choice: no example depends on the others); `none`.
        temperature: T > 0, a number or a schedule. 3 in the authors' code.
        loss: loss of `logits`: `kl`, `ce` or `mse`; only `kl` is multiplied by T squared.
        reduction: reduction of `logits`: `batchmean` or `elementmean`.

    A configured teacher gives shape and initialisation only, as for `finetune`.
    """

    names = ("task", "branches", "ensemble", "logits")
    teachers = ANY_TEACHERS
    uses_teachers = False
    distances = ()
    pools = False

    def __init__(
        self,
        branches: int = 3,
        shared: int | None = None,
        heads: str = "new",
        norm: str = "layer",
        temperature: "float | Schedule" = 3.0,
        loss: str = "kl",
        reduction: str = "batchmean",
    ) -> None:
        super().__init__()
        self.count = whole(branches, "branches", 2, MOST_BRANCHES)
        self.shared = None if shared is None else whole(shared, "shared", 0)
        self.heads = word(heads, HEADS, "heads")
        self.norm = word(norm, NORMS, "norm")
        self.temperature = temperature_schedule(temperature)
        self.loss = word(loss, SOFT_LOSSES, "loss")
        self.reduction = word(reduction, BATCH_MEANS, "reduction")
        self.across_ranks = norm == "batch"
        self.layer = self.depth = 0
        self.branches = nn.ModuleList()

    def bind(self, bound: Bound) -> None:
        """Copy the student's upper layers and its head, and create the gate.

        Raises:
            InputError: for more shared layers than the student has, or a student without a classifier.
        """
        student = bound.student
        self.teachers = len(bound.teachers)
        if not student.classifies:
            raise InputError(
                "method=one has branches that classify a text or predict its score, and this student does neither; use "
                "method=finetune",
                "method",
            )
        self.depth = student.depth
        self.layer = 2 * self.depth // 3 if self.shared is None else self.shared
        if self.layer > self.depth:
            raise InputError(f"shared={self.layer} is more than the student's {self.depth} layers", "shared")
        self.branches = nn.ModuleList(Branch(student, self.layer, new_head=self.heads == "new") for _ in range(self.count - 1))
        self.gate = nn.Linear(student.width, self.count, bias=self.norm == "none")
        if self.norm != "none":  # which takes a bias before it away
            self.weight, self.bias = nn.Parameter(torch.ones(self.count)), nn.Parameter(torch.zeros(self.count))

    def needs(self) -> tuple[Needs, Sequence[Needs]]:
        """Declare the states of the highest shared layer."""
        return Needs(hidden=[self.layer]), [Needs()] * (self.teachers or 0)

    def logits(self, step: Step) -> list[Tensor]:
        """Return the logits of the branches, (batch, classes) each; the first are the student's."""
        outputs, student = step.student.outputs, step.student.model
        states = outputs.hidden(self.layer)
        inputs: dict[str, Tensor | int] = {
            "attention_mask": step.student.inputs["attention_mask"],
            "embedded": states,
            "from_layer": self.layer,
        }
        logits = [outputs.logits]
        for branch in self.branches:
            assert isinstance(branch, Branch)
            with branch.inside(student):
                logits.append(step.student.run(inputs, Needs()).logits)
        return logits

    def scores(self, step: Step) -> Tensor:
        """Return what the gate is computed from, (batch, branches), of all ranks with `norm=batch`."""
        states = at_least_float32(step.student.outputs.hidden(self.layer)[:, 0])
        with torch.autocast(states.device.type, enabled=False):  # normalisation would multiply what half precision rounds
            scores: Tensor = self.gate(states.to(self.gate.weight.dtype))
        if self.norm == "batch":
            return ensembles.over_rows(step.across(scores), self.weight, self.bias)
        if self.norm == "layer":
            scores = at_least_float32(scores)
            return nn.functional.layer_norm(scores, (self.count,), self.weight, self.bias)
        return scores

    def terms(self, step: Step) -> dict[str, Tensor]:
        """Return the loss terms listed in the class docstring."""
        labels = step.batch.labels
        logits, scores = self.logits(step), self.scores(step)
        terms = {
            "task": step.task.hard(logits[0], labels),
            "branches": torch.stack([step.task.hard(one, labels) for one in logits[1:]]).sum(),
        }
        if self.norm == "batch":  # the gate of an example depends on those of all ranks, and so does all that follows
            logits, labels = [step.across(one) for one in logits], step.across(labels)
        ensemble = ensembles.gated(logits, ensembles.gate(scores))
        temperature = self.temperature(step.progress.fraction)
        terms["ensemble"] = step.task.hard(ensemble, labels)
        terms["logits"] = torch.stack(
            [step.task.soft(one, ensemble.detach(), temperature, self.loss, self.reduction) for one in logits]
        ).sum()
        return terms

    def describe(self) -> dict[str, str]:
        """Describe the branches, and which of them is the result."""
        lower = "the embeddings" if self.layer == 0 else f"the embeddings and layers 1 to {self.layer} of {self.depth}"
        return {"branches": f"{self.count}, which share {lower}; the first is the student, the others are not exported"}

    def batch_dependence(self) -> str | None:
        """Return that `norm=batch` normalises over a batch."""
        return "norm=batch normalises the gate over the examples of a batch" if self.norm == "batch" else None

    def label_dependence(self) -> str | None:
        """Return that `norm=batch` computes the ensemble's hard loss over the batches of all ranks."""
        return "norm=batch reads the labels of all ranks" if self.norm == "batch" else None
